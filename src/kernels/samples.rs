//! Matrices and values for the tests of kernels.

use std::sync::Arc;

use half::{bf16, f16};
use memmap2::MmapMut;

use crate::kernels::matrix::{DType, Matrix};

/// Uniform in -1..1, the same for the same seed.
pub(crate) fn values(n: usize, seed: u32) -> Vec<f32> {
    let mut s = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        s ^= s << 13;
        s ^= s >> 17;
        s ^= s << 5;
        (s >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// A matrix of these values in a dtype, as if mapped from a file.
pub(crate) fn mapped(dtype: DType, rows: usize, cols: usize, values: &[f32]) -> Matrix {
    let bytes: Vec<u8> = match dtype {
        DType::F32 => bytemuck::cast_slice(values).to_vec(),
        DType::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_ne_bytes()).collect(),
        DType::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_ne_bytes()).collect(),
    };
    let mut map = MmapMut::map_anon(bytes.len().max(1)).unwrap();
    map[..bytes.len()].copy_from_slice(&bytes);
    Matrix::mapped(Arc::new(map.make_read_only().unwrap()), 0, dtype, rows, cols).unwrap()
}

/// Takes runs of dot products apart: `put(row, i, dot)` for each.
pub(crate) fn one_by_one(mut put: impl FnMut(usize, usize, f32)) -> impl FnMut(usize, usize, &[f32]) {
    move |row, i, dots| dots.iter().zip(row..).for_each(|(dot, row)| put(row, i, *dot))
}
