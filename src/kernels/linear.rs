//! The linear layer: dot products of weight rows with activation rows.
//!
//! The order of additions is fixed, so that the same bits come out with any number of threads, rows and tiles: K is cut into
//! blocks of 512 from the slice's start; within a block, lane l sums the products with k mod 16 = l as k rises; a fixed tree adds
//! the 16 lanes; the blocks are added in order. Tiles only share loads between rows.

use std::ops::Range;
use std::sync::OnceLock;

use crate::kernels::lanes::{Element, Lanes};
use crate::kernels::matrix::{Matrix, Row};

const LANES: usize = 16;
const BLOCK: usize = 512;

/// The instruction sets that the dot products are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Isa {
    /// Those that this CPU has, best first.
    pub(crate) fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                found.push(Self::Avx512);
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
                found.push(Self::Avx2);
            }
        }
        found.push(Self::Portable);
        found
    }

    fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available()[0])
    }
}

/// `out[i] = weights[rows.start + i] . x`
///
/// # Panics
/// If the rows are not the matrix's, or the lengths of `x` and `out` don't fit it.
pub(crate) fn linear_row(weights: &Matrix, rows: Range<usize>, x: &[f32], out: &mut [f32]) {
    assert_eq!(out.len(), rows.len(), "one output a weight row");
    let first = rows.start;
    linear(Isa::best(), weights, rows, &[x], |row, _, dot| out[row - first] = dot);
}

/// Calls `put(row, i, weights[row] . xs[i])` for every row of `rows` and every activation row.
///
/// # Panics
/// As [`linear_row`].
pub(crate) fn linear_rows(weights: &Matrix, rows: Range<usize>, xs: &[&[f32]], put: impl FnMut(usize, usize, f32)) {
    linear(Isa::best(), weights, rows, xs, put);
}

fn linear(isa: Isa, weights: &Matrix, rows: Range<usize>, xs: &[&[f32]], put: impl FnMut(usize, usize, f32)) {
    assert!(rows.end <= weights.rows(), "rows {rows:?} of a matrix of {} rows", weights.rows());
    for x in xs {
        assert_eq!(x.len(), weights.cols(), "an input of {} columns for a matrix of {}", x.len(), weights.cols());
    }
    if rows.is_empty() || xs.is_empty() {
        return;
    }
    // The dtype of the first row is that of all.
    match weights.row(rows.start) {
        Row::F32(_) => dispatch(isa, |r| if let Row::F32(w) = weights.row(r) { w } else { unreachable!() }, rows, xs, put),
        Row::F16(_) => dispatch(isa, |r| if let Row::F16(w) = weights.row(r) { w } else { unreachable!() }, rows, xs, put),
        Row::Bf16(_) => dispatch(isa, |r| if let Row::Bf16(w) = weights.row(r) { w } else { unreachable!() }, rows, xs, put),
    }
}

fn dispatch<'w, W: Element + 'w>(
    isa: Isa,
    row: impl Fn(usize) -> &'w [W],
    rows: Range<usize>,
    xs: &[&[f32]],
    put: impl FnMut(usize, usize, f32),
) {
    // SAFETY: `Isa::available` lists only what the CPU has.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512(row, rows, xs, put),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2(row, rows, xs, put),
            Isa::Portable => tiles::<[f32; 16], W, 2, 2>(row, rows, xs, put),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512<'w, W: Element + 'w>(
    row: impl Fn(usize) -> &'w [W],
    rows: Range<usize>,
    xs: &[&[f32]],
    put: impl FnMut(usize, usize, f32),
) {
    unsafe { tiles::<std::arch::x86_64::__m512, W, 4, 4>(row, rows, xs, put) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<'w, W: Element + 'w>(row: impl Fn(usize) -> &'w [W], rows: Range<usize>, xs: &[&[f32]], put: impl FnMut(usize, usize, f32)) {
    unsafe { tiles::<[std::arch::x86_64::__m256; 2], W, 3, 2>(row, rows, xs, put) }
}

/// Covers rows x xs with tiles of R x C, and their edges with smaller ones.
#[inline(always)]
unsafe fn tiles<'w, L: Lanes, W: Element + 'w, const R: usize, const C: usize>(
    row: impl Fn(usize) -> &'w [W],
    rows: Range<usize>,
    xs: &[&[f32]],
    mut put: impl FnMut(usize, usize, f32),
) {
    let mut r = rows.start;
    while r < rows.end {
        let many_rows = rows.end - r >= R;
        let mut c = 0;
        while c < xs.len() {
            let many_xs = xs.len() - c >= C;
            unsafe {
                match (many_rows, many_xs) {
                    (true, true) => tile::<L, W, R, C>(&row, r, xs, c, &mut put),
                    (true, false) => tile::<L, W, R, 1>(&row, r, xs, c, &mut put),
                    (false, true) => tile::<L, W, 1, C>(&row, r, xs, c, &mut put),
                    (false, false) => tile::<L, W, 1, 1>(&row, r, xs, c, &mut put),
                }
            }
            c += if many_xs { C } else { 1 };
        }
        r += if many_rows { R } else { 1 };
    }
}

/// The dot products of weight rows r.. r + R with activation rows c .. c + C.
#[inline(always)]
unsafe fn tile<'w, L: Lanes, W: Element + 'w, const R: usize, const C: usize>(
    row: impl Fn(usize) -> &'w [W],
    r: usize,
    xs: &[&[f32]],
    c: usize,
    mut put: impl FnMut(usize, usize, f32),
) {
    let w: [&[W]; R] = std::array::from_fn(|i| row(r + i));
    let x: [&[f32]; C] = std::array::from_fn(|i| xs[c + i]);
    let n = x[0].len();
    // The pointers below stay inside the rows because all have the same length.
    assert!(w.iter().all(|w| w.len() == n) && x.iter().all(|x| x.len() == n));
    let mut total = [[0.0f32; C]; R];
    for start in (0..n).step_by(BLOCK) {
        let end = (start + BLOCK).min(n);
        unsafe {
            let mut sum = [[L::zero(); C]; R];
            let whole = end - (end - start) % LANES;
            for k in (start..whole).step_by(LANES) {
                // Loops and no closures: intrinsics would not be inlined through those.
                let mut xk = [L::zero(); C];
                for j in 0..C {
                    xk[j] = L::load_f32(x[j].as_ptr().add(k));
                }
                for i in 0..R {
                    let wk: L = W::load(w[i].as_ptr().add(k));
                    for j in 0..C {
                        sum[i][j] = sum[i][j].fma(wk, xk[j]);
                    }
                }
            }
            if whole < end {
                // Zeros beyond the end add nothing.
                let mut xk = [L::zero(); C];
                for j in 0..C {
                    xk[j] = L::load_f32(padded(&x[j][whole..end]).as_ptr());
                }
                for i in 0..R {
                    let wk: L = W::load(padded(&w[i][whole..end]).as_ptr());
                    for j in 0..C {
                        sum[i][j] = sum[i][j].fma(wk, xk[j]);
                    }
                }
            }
            for i in 0..R {
                for j in 0..C {
                    total[i][j] += sum[i][j].sum();
                }
            }
        }
    }
    for (i, dots) in total.into_iter().enumerate() {
        dots.into_iter().enumerate().for_each(|(j, dot)| put(r + i, c + j, dot));
    }
}

fn padded<T: Copy + Default>(tail: &[T]) -> [T; LANES] {
    let mut out = [T::default(); LANES];
    out[..tail.len()].copy_from_slice(tail);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: u32) -> Vec<f32> {
        let mut s = seed.wrapping_mul(2_654_435_761) | 1;
        (0..n)
            .map(|_| {
                s ^= s << 13;
                s ^= s >> 17;
                s ^= s << 5;
                (s >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    /// The definition, in f64.
    fn dot(w: &[f32], x: &[f32]) -> f64 {
        w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum()
    }

    #[test]
    fn every_instruction_set_computes_the_dot_product_on_odd_sizes() {
        for isa in Isa::available() {
            for (rows, cols, n) in [(1, 1, 1), (3, 15, 2), (5, 17, 5), (9, 511, 3), (4, 513, 9), (7, 1200, 4)] {
                let w = values(rows * cols, 1);
                let m = Matrix::from_f32(rows, cols, w.clone());
                let x: Vec<Vec<f32>> = (0..n).map(|i| values(cols, 7 + i as u32)).collect();
                let xs: Vec<&[f32]> = x.iter().map(Vec::as_slice).collect();
                let mut seen = 0;
                linear(isa, &m, 0..rows, &xs, |r, i, got| {
                    let want = dot(&w[r * cols..][..cols], &x[i]);
                    assert!((f64::from(got) - want).abs() < 1e-5 * (cols as f64).sqrt(), "{isa:?} {rows}x{cols}: {got} is not {want}");
                    seen += 1;
                });
                assert_eq!(seen, rows * n, "{isa:?}: every output once");
            }
        }
    }

    #[test]
    fn a_tile_has_the_bits_of_its_rows_computed_alone() {
        for isa in Isa::available() {
            let (rows, cols, n) = (11, 1234, 7);
            let m = Matrix::from_f32(rows, cols, values(rows * cols, 3));
            let x: Vec<Vec<f32>> = (0..n).map(|i| values(cols, 70 + i as u32)).collect();
            let xs: Vec<&[f32]> = x.iter().map(Vec::as_slice).collect();
            let mut together = vec![0.0; rows * n];
            linear(isa, &m, 0..rows, &xs, |r, i, v| together[r * n + i] = v);
            for r in 0..rows {
                for i in 0..n {
                    linear(isa, &m, r..r + 1, &xs[i..=i], |_, _, v| {
                        assert_eq!(v.to_bits(), together[r * n + i].to_bits(), "{isa:?} row {r}, input {i}");
                    });
                }
            }
        }
    }
}
