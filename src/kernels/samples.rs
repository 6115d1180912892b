//! Matrices and values for the tests of kernels.

use std::io::Write;
use std::sync::Arc;

use half::{bf16, f16};
use memmap2::Mmap;

use crate::kernels::matrix::{DType, Matrix};
use crate::kernels::quant::QuantFormat;

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
        DType::Quantised(_) => unreachable!("these are `blocks`"),
    };
    from_bytes(&bytes, dtype, rows, cols)
}

/// A matrix of random blocks as a file stores them, with scales that make weights of about 1.
pub(crate) fn blocks(format: QuantFormat, rows: usize, cols: usize, seed: u32) -> Matrix {
    let dtype = DType::Quantised(format);
    let mut random = values(rows * dtype.bytes(cols), seed).into_iter();
    let mut bytes = Vec::new();
    // Where the f16 of a block are, and what they are worth at most.
    let (halves, most): (&[usize], f32) = match format {
        QuantFormat::Q8_0 => (&[0], 0.01),
        QuantFormat::Q4_0 | QuantFormat::Iq4Nl | QuantFormat::Q5_0 => (&[0], 0.1),
        QuantFormat::Q4_1 | QuantFormat::Q5_1 => (&[0, 2], 0.1),
        QuantFormat::Q4K | QuantFormat::Q5K => (&[0, 2], 0.003),
        QuantFormat::Q6K => (&[208], 0.0003),
    };
    for _ in 0..rows * cols / format.block() {
        let start = bytes.len();
        bytes.extend((0..format.block_bytes()).map(|_| (random.next().unwrap() * 128.0) as i32 as u8));
        for at in halves {
            let scale = f16::from_f32(f32::from(bytes[start + at]) / 255.0 * most - 0.2 * most);
            bytes[start + at..start + at + 2].copy_from_slice(&scale.to_le_bytes());
        }
    }
    from_bytes(&bytes, dtype, rows, cols)
}

fn from_bytes(bytes: &[u8], dtype: DType, rows: usize, cols: usize) -> Matrix {
    // What is packed is given back to the system, which keeps what is in a file.
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(if bytes.is_empty() { &[0] } else { bytes }).unwrap();
    // SAFETY: nobody else has the file.
    let map = unsafe { Mmap::map(&file) }.unwrap();
    Matrix::mapped(Arc::new(map), 0, dtype, rows, cols).unwrap()
}

/// Takes runs of dot products apart: `put(row, i, dot)` for each.
pub(crate) fn one_by_one(mut put: impl FnMut(usize, usize, f32)) -> impl FnMut(usize, usize, &[f32]) {
    move |row, i, dots| dots.iter().zip(row..).for_each(|(dot, row)| put(row, i, *dot))
}
