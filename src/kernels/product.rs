//! [`Weights`]: a matrix as a CPU rank holds it, in whatever format, and its products with rows of activations.

use std::ops::Range;

use crate::kernels::Numerics;
use crate::kernels::linear::linear_rows;
use crate::kernels::matrix::Matrix;

/// A matrix as a CPU rank holds it: `[out, in]`.
pub(crate) enum Weights {
    /// As the checkpoint stores it, where it is mapped.
    Stored(Matrix),
}

/// Rows of activations as the kernels of some format want them, made once for all threads: `[rows, in]`.
pub(crate) enum Inputs<'a> {
    F32(Vec<&'a [f32]>),
}

impl Weights {
    pub(crate) fn cols(&self) -> usize {
        match self {
            Self::Stored(matrix) => matrix.cols(),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Stored(matrix) => matrix.bytes(),
        }
    }

    /// A chunk of rows starts at a multiple of it.
    pub(crate) fn granule(&self) -> usize {
        match self {
            Self::Stored(_) => 1,
        }
    }

    /// The rows as these weights take them.
    pub(crate) fn prepare<'a>(&self, xs: Vec<&'a [f32]>, numerics: Numerics) -> Inputs<'a> {
        match (self, numerics) {
            (Self::Stored(_), _) => Inputs::F32(xs),
        }
    }

    /// Whether `inputs`, which may have been made for other weights, suit these.
    pub(crate) fn take(&self, inputs: &Inputs<'_>, numerics: Numerics) -> bool {
        match (self, inputs, numerics) {
            (Self::Stored(_), Inputs::F32(_), _) => true,
        }
    }

    /// Calls `put(row, i, weights[row] . inputs[i])` for every row of `rows` and every input.
    pub(crate) fn products(&self, rows: Range<usize>, inputs: &Inputs<'_>, put: impl FnMut(usize, usize, f32)) {
        match (self, inputs) {
            (Self::Stored(matrix), Inputs::F32(xs)) => linear_rows(matrix, rows, xs, put),
        }
    }
}
