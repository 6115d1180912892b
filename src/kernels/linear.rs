//! Linear layers on the CPU.

use std::ops::Range;

use super::matrix::Matrix;

/// out[i] = dot(row `rows.start + i` of the weights, x).
pub(crate) fn linear_row(weights: &Matrix, rows: Range<usize>, x: &[f32], out: &mut [f32]) {
    let mut row = vec![0.0; weights.cols()];
    for (r, y) in rows.zip(out) {
        weights.row_to_f32(r, &mut row);
        *y = row.iter().zip(x).map(|(w, x)| w * x).sum();
    }
}
