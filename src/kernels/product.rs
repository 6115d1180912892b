//! [`Weights`]: a matrix as a CPU rank holds it, in whatever format, and its products with rows of activations.

use std::ops::Range;

use crate::kernels::Numerics;
use crate::kernels::fast::{FastRows, linear_rows_fast};
use crate::kernels::linear::linear_rows;
use crate::kernels::matrix::{DType, Matrix};
use crate::kernels::quant::{Int8Rows, Packed, TILE, packed_rows, packed_rows_int8};

/// A matrix as a CPU rank holds it: `[out, in]`.
pub(crate) enum Weights {
    /// As the checkpoint stores it, where it is mapped.
    Stored(Matrix),
    /// Quantised, in tiles.
    Packed(Packed),
}

/// Rows of activations as the kernels of some format want them, made once for all threads: `[rows, in]`.
pub(crate) enum Inputs<'a> {
    F32(Vec<&'a [f32]>),
    /// Packed for weights stored in this dtype.
    Fast(FastRows<'a>, DType),
    /// Quantised too, for slices with so many columns of their neighbours in front.
    Int8(Int8Rows, usize),
}

impl Weights {
    pub(crate) fn cols(&self) -> usize {
        match self {
            Self::Stored(matrix) => matrix.cols(),
            Self::Packed(packed) => packed.cols(),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Stored(matrix) => matrix.bytes(),
            Self::Packed(packed) => packed.bytes(),
        }
    }

    /// A chunk of rows starts at a multiple of it.
    pub(crate) fn granule(&self) -> usize {
        match self {
            Self::Stored(_) => 1,
            Self::Packed(_) => TILE,
        }
    }

    /// The rows as these weights take them.
    pub(crate) fn prepare<'a>(&self, xs: Vec<&'a [f32]>, numerics: Numerics) -> Inputs<'a> {
        match (self, numerics) {
            (Self::Packed(packed), Numerics::Fast) => Inputs::Int8(Int8Rows::quantise(&xs, packed.lead()), packed.lead()),
            (Self::Stored(matrix), Numerics::Fast) => Inputs::Fast(FastRows::new(&xs, matrix.dtype()), matrix.dtype()),
            (_, Numerics::Exact) => Inputs::F32(xs),
        }
    }

    /// Whether `inputs`, which may have been made for other weights, suit these.
    pub(crate) fn take(&self, inputs: &Inputs<'_>, numerics: Numerics) -> bool {
        match (self, inputs, numerics) {
            (Self::Packed(packed), Inputs::Int8(_, lead), Numerics::Fast) => *lead == packed.lead(),
            (Self::Stored(matrix), Inputs::Fast(_, dtype), Numerics::Fast) => *dtype == matrix.dtype(),
            (_, Inputs::F32(_), Numerics::Exact) => true,
            _ => false,
        }
    }

    /// Calls `put(row, i, dots)` with the dot products of the weight rows from `row` on with input `i`, a run for each part of `rows`.
    pub(crate) fn products(&self, rows: Range<usize>, inputs: &Inputs<'_>, put: impl FnMut(usize, usize, &[f32])) {
        match (self, inputs) {
            (Self::Stored(matrix), Inputs::F32(xs)) => linear_rows(matrix, rows, xs, put),
            (Self::Packed(packed), Inputs::F32(xs)) => packed_rows(packed, rows, xs, put),
            (Self::Packed(packed), Inputs::Int8(xs, _)) => packed_rows_int8(packed, rows, xs, put),
            (Self::Stored(matrix), Inputs::Fast(xs, _)) => linear_rows_fast(matrix, rows, xs, put),
            (Self::Stored(_), Inputs::Int8(..)) | (Self::Packed(_), Inputs::Fast(..)) => {
                unreachable!("inputs are those that the weights take")
            }
        }
    }
}
