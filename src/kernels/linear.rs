//! The linear layer: dot products of weight rows with activation rows.
//!
//! The order of additions is fixed, so that the same bits come out with any number of threads, rows and tiles: K is cut into
//! blocks of 512 from the slice's start; within a block, lane l sums the products with k mod 16 = l as k rises; a fixed tree adds
//! the 16 lanes; the blocks are added in order. Tiles only share loads between rows.
//!
//! One activation row is bound by memory: a tile of weight rows is read to its end while the next one is fetched. With more, groups
//! of weight rows go through K block by block, so that the activations of a block stay in L1 while each weight is read once.

use std::ops::Range;
use std::sync::OnceLock;

use crate::kernels::lanes::{Element, Lanes};
use crate::kernels::matrix::{Matrix, Row};

pub(super) const LANES: usize = 16;
const BLOCK: usize = 512;
/// Weight rows that share a block of activations: a multiple of every tile's, few enough for a block of them and the next to lie in L2.
const GROUP: usize = 48;
/// Activation rows of the widest tile.
const WIDEST: usize = 8;
/// How far ahead a single activation row has its weights fetched, in bytes. Measured, as is that they are one stream: two to eight
/// rows at a time are read at half to two thirds of its speed where their distance is near a multiple of 4 KiB.
const AHEAD: usize = 6 << 10;

/// The instruction sets that the dot products are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "aarch64")]
    Neon,
    Portable,
}

impl Isa {
    /// Those that this CPU has, best first.
    pub(crate) fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("avx512bw") {
                found.push(Self::Avx512);
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
                found.push(Self::Avx2);
            }
        }
        #[cfg(target_arch = "aarch64")]
        found.push(Self::Neon);
        found.push(Self::Portable);
        found
    }

    pub(super) fn best() -> Self {
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

/// Calls `put(row, i, dots)` with the dot products of the weight rows from `row` on with activation row `i`, a run for each part of `rows`.
///
/// # Panics
/// As [`linear_row`].
pub(crate) fn linear_rows(weights: &Matrix, rows: Range<usize>, xs: &[&[f32]], mut put: impl FnMut(usize, usize, &[f32])) {
    linear(Isa::best(), weights, rows, xs, |row, i, dot| put(row, i, &[dot]));
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
        // A model's are packed; these come from a caller of the pieces.
        Row::Quantised(_) => {
            let (widened, first) = (weights.slice(rows.clone(), 0..weights.cols()).widened(), rows.start);
            dispatch(isa, |r| if let Row::F32(w) = widened.row(r - first) { w } else { unreachable!() }, rows, xs, put);
        }
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
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => cover::<[std::arch::aarch64::float32x4_t; 4], W, 2, 2, 2, 2>(row, rows, xs, put),
            // Without registers of 16 lanes a larger tile only spills.
            Isa::Portable => cover::<[f32; 16], W, 1, 1, 1, 1>(row, rows, xs, put),
        }
    }
}

#[cfg(target_arch = "x86_64")]
// Without VL, halves of a vector live only in the first 16 registers, and the accumulators spill.
#[target_feature(enable = "avx512f,avx512vl,avx512bw")]
unsafe fn avx512<'w, W: Element + 'w>(
    row: impl Fn(usize) -> &'w [W],
    rows: Range<usize>,
    xs: &[&[f32]],
    put: impl FnMut(usize, usize, f32),
) {
    unsafe { cover::<std::arch::x86_64::__m512, W, 1, 4, 3, 8>(row, rows, xs, put) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<'w, W: Element + 'w>(row: impl Fn(usize) -> &'w [W], rows: Range<usize>, xs: &[&[f32]], put: impl FnMut(usize, usize, f32)) {
    unsafe { cover::<[std::arch::x86_64::__m256; 2], W, 1, 2, 3, 2>(row, rows, xs, put) }
}

/// Covers rows x xs with tiles of R1 x 1, R1 x C1 and R2 x C2, by how many activation rows are left.
#[inline(always)]
unsafe fn cover<'w, L: Lanes, W: Element + 'w, const R1: usize, const C1: usize, const R2: usize, const C2: usize>(
    row: impl Fn(usize) -> &'w [W],
    rows: Range<usize>,
    xs: &[&[f32]],
    mut put: impl FnMut(usize, usize, f32),
) {
    let mut panel = Panel([[0.0; LANES]; WIDEST * BLOCK / LANES]);
    for first in rows.clone().step_by(GROUP) {
        // Beyond the end the last row is repeated, so that every tile is whole.
        let w: [&[W]; GROUP] = std::array::from_fn(|i| row((first + i).min(rows.end - 1)));
        let count = GROUP.min(rows.end - first);
        let mut c = 0;
        while c < xs.len() {
            let left = xs.len() - c;
            let width = [1, C1, C2].into_iter().find(|&w| left <= w).unwrap_or(C2);
            let x = &xs[c..(c + width).min(xs.len())];
            let put = |r, i, dot| put(first + r, c + i, dot);
            unsafe {
                if width == 1 {
                    tiles::<L, W, R1, 1>(&w, count, x, &mut panel, put);
                } else if width == C1 {
                    tiles::<L, W, R1, C1>(&w, count, x, &mut panel, put);
                } else {
                    tiles::<L, W, R2, C2>(&w, count, x, &mut panel, put);
                }
            }
            c += width;
        }
    }
}

/// A block of up to C activation rows, 16 elements of each in turn: `[BLOCK / 16, C, 16]`. One stream, whatever the rows' addresses.
#[repr(align(64))]
struct Panel([[f32; LANES]; WIDEST * BLOCK / LANES]);

impl Panel {
    /// Elements `block` of each of `xs`. What is missing of the last 16 and of C rows becomes zero.
    #[inline(always)]
    fn pack<const C: usize>(&mut self, xs: &[&[f32]], block: Range<usize>) {
        for j in 0..C {
            let (whole, tail) = xs.get(j).map_or(&[][..], |x| &x[block.clone()]).as_chunks::<LANES>();
            for (s, values) in whole.iter().enumerate() {
                self.0[s * C + j] = *values;
            }
            let rest = padded(tail);
            for s in whole.len()..block.len().div_ceil(LANES) {
                self.0[s * C + j] = rest;
            }
        }
    }
}

/// The dot products of the first `count` rows of `w` with up to C activation rows.
#[inline(always)]
unsafe fn tiles<L: Lanes, W: Element, const R: usize, const C: usize>(
    w: &[&[W]; GROUP],
    count: usize,
    xs: &[&[f32]],
    panel: &mut Panel,
    mut put: impl FnMut(usize, usize, f32),
) {
    const { assert!(GROUP.is_multiple_of(R) && C <= WIDEST) };
    let n = xs[0].len();
    let stride = w[1].as_ptr().addr().wrapping_sub(w[0].as_ptr().addr());
    // A single activation row has nothing to share: the weights are best read row by row.
    let together = if C == 1 { R } else { count };
    for first in (0..count).step_by(together) {
        let mut totals = [[0.0f32; C]; GROUP];
        for start in (0..n).step_by(BLOCK) {
            let block = start..(start + BLOCK).min(n);
            let x = if C == 1 && block.len() == BLOCK {
                xs[0][block.clone()].as_ptr()
            } else {
                panel.pack::<C>(xs, block.clone());
                panel.0.as_ptr().cast()
            };
            // From these weights to those that the same tile of the next round takes.
            let ahead = if C == 1 {
                ahead_in_rows(start * size_of::<W>(), AHEAD, n * size_of::<W>(), stride)
            } else if block.end < n {
                BLOCK * size_of::<W>()
            } else {
                GROUP.wrapping_mul(stride).wrapping_sub(start * size_of::<W>())
            };
            for r in (first..first + together).step_by(R) {
                let w: [&[W]; R] = std::array::from_fn(|i| &w[r + i][block.clone()]);
                unsafe { tile::<L, W, R, C>(w, x, ahead, &mut totals[r - first..][..R]) };
            }
        }
        for (r, dots) in (first..count.min(first + together)).zip(totals) {
            for (i, dot) in dots.into_iter().take(xs.len()).enumerate() {
                put(r, i, dot);
            }
        }
    }
}

/// From byte `at` of a row of so many bytes to what lies `ahead` of it in this and the following rows, which begin `stride` bytes after each other.
#[inline(always)]
pub(super) fn ahead_in_rows(at: usize, ahead: usize, row: usize, stride: usize) -> usize {
    let rows = (at + ahead) / row.max(1);
    ahead.wrapping_add(rows.wrapping_mul(stride.wrapping_sub(row)))
}

/// Adds to `totals` the dot products of a block of R weight rows with C activation rows, which `x` points to, packed as in [`Panel`].
/// The weights `ahead` bytes on are fetched meanwhile.
#[inline(always)]
unsafe fn tile<L: Lanes, W: Element, const R: usize, const C: usize>(w: [&[W]; R], x: *const f32, ahead: usize, totals: &mut [[f32; C]]) {
    let n = w[0].len();
    // The pointers below stay inside the rows because all have the same length.
    assert!(w.iter().all(|w| w.len() == n));
    unsafe {
        let mut sum = [[L::zero(); C]; R];
        // Loops and no closures: intrinsics would not be inlined through those.
        let (steps, in_line) = (n / LANES, 64 / (LANES * size_of::<W>()));
        for line in (0..steps).step_by(in_line) {
            for w in w {
                let next = w.as_ptr().add(line * LANES).wrapping_byte_add(ahead);
                if C == 1 { L::prefetch_near(next) } else { L::prefetch(next) }
            }
            if line + in_line <= steps {
                for s in line..line + in_line {
                    step(&mut sum, w.map(|w| w.as_ptr().add(s * LANES)), x.add(s * C * LANES));
                }
            } else {
                step(&mut sum, w.map(|w| w.as_ptr().add(line * LANES)), x.add(line * C * LANES));
            }
        }
        if !n.is_multiple_of(LANES) {
            // Zeros beyond the end add nothing.
            let whole = n - n % LANES;
            let tails = w.map(|w| padded(&w[whole..]));
            step(&mut sum, tails.each_ref().map(|tail| tail.as_ptr()), x.add(whole * C));
        }
        L::add_sums(sum.as_flattened(), totals.as_flattened_mut());
    }
}

/// `sum[i][j] += w[i] * x[j]` for the 16 lanes at these places. The fewer operands are held in registers, the more are taken in turn.
#[inline(always)]
unsafe fn step<L: Lanes, W: Element, const R: usize, const C: usize>(sum: &mut [[L; C]; R], w: [*const W; R], x: *const f32) {
    unsafe {
        if R < C {
            let mut held = [L::zero(); R];
            for i in 0..R {
                held[i] = W::load(w[i]);
            }
            for j in 0..C {
                let x = L::load_f32(x.add(j * LANES));
                for (sum, w) in sum.iter_mut().zip(held) {
                    sum[j] = sum[j].fma(w, x);
                }
            }
        } else {
            let mut held = [L::zero(); C];
            for (j, held) in held.iter_mut().enumerate() {
                *held = L::load_f32(x.add(j * LANES));
            }
            for i in 0..R {
                let w: L = W::load(w[i]);
                for j in 0..C {
                    sum[i][j] = sum[i][j].fma(w, held[j]);
                }
            }
        }
    }
}

pub(super) fn padded<T: Copy + Default>(tail: &[T]) -> [T; LANES] {
    let mut out = [T::default(); LANES];
    out[..tail.len()].copy_from_slice(tail);
    out
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::kernels::matrix::DType;
    use crate::kernels::samples::{mapped, values};

    /// The same values as every dtype stores them, and those values.
    fn matrices(rows: usize, cols: usize, seed: u32) -> [(Matrix, Vec<f32>); 3] {
        let values: Vec<f32> = values(rows * cols, seed);
        let f16s: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
        let bf16s: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
        let (f16_matrix, bf16_matrix) = (mapped(DType::F16, rows, cols, &values), mapped(DType::Bf16, rows, cols, &values));
        [
            (Matrix::from_f32(rows, cols, values.clone()), values),
            (f16_matrix, f16s.iter().map(|v| v.to_f32()).collect()),
            (bf16_matrix, bf16s.iter().map(|v| v.to_f32()).collect()),
        ]
    }

    /// The order that the module's head promises, one element at a time.
    fn in_order(isa: Isa, w: &[f32], x: &[f32]) -> f32 {
        let fused = isa != Isa::Portable;
        let mut total = 0.0f32;
        for (w, x) in w.chunks(BLOCK).zip(x.chunks(BLOCK)) {
            let mut lanes = [0.0f32; LANES];
            for (k, (w, x)) in w.iter().zip(x).enumerate() {
                let sum = &mut lanes[k % LANES];
                *sum = if fused { w.mul_add(*x, *sum) } else { *sum + w * x };
            }
            for half in [8, 4, 2, 1] {
                for l in 0..half {
                    lanes[l] += lanes[l + half];
                }
            }
            total += lanes[0];
        }
        total
    }

    #[test]
    fn every_output_has_the_bits_of_the_documented_order_whatever_the_tile() {
        for isa in Isa::available() {
            // All widths of tiles and their remainders; rows that fill a group, and that end in the midst of a tile.
            for (rows, cols, n) in
                (1..=9).map(|n| (7, 530, n)).chain([(1, 1, 1), (5, 15, 3), (48, 512, 17), (53, 1031, 12), (97, 40, 1), (50, 1536, 8)])
            {
                let x: Vec<Vec<f32>> = (0..n).map(|i| values(cols, 7 + i as u32)).collect();
                let xs: Vec<&[f32]> = x.iter().map(Vec::as_slice).collect();
                for (m, w) in matrices(rows, cols, 1) {
                    for range in [0..rows, rows / 3..rows] {
                        let mut seen = vec![0; rows * n];
                        linear(isa, &m, range.clone(), &xs, |r, i, got| {
                            let want = in_order(isa, &w[r * cols..][..cols], xs[i]);
                            assert_eq!(got.to_bits(), want.to_bits(), "{isa:?} {m:?}, row {r}, input {i} of {n}: {got} is not {want}");
                            seen[r * n + i] += 1;
                        });
                        let wanted = (0..rows * n).map(|at| i32::from(range.contains(&(at / n))));
                        assert!(seen.into_iter().eq(wanted), "{isa:?} {m:?}, rows {range:?}, {n} inputs: every output once");
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_fetched_ahead_lies_in_the_rows_that_follow() {
        // Rows of 100 bytes, 250 apart.
        for (at, ahead, there) in [(0, 40, 40), (60, 39, 99), (60, 40, 250), (60, 139, 349), (60, 140, 500), (0, 300, 750)] {
            assert_eq!(at + ahead_in_rows(at, ahead, 100, 250), there, "{ahead} bytes from {at}");
            assert_eq!(ahead_in_rows(at, ahead, 100, 100), ahead, "rows without gaps are one stream");
        }
        assert_eq!(ahead_in_rows(0, 64, 0, 0), 64);
    }

    #[test]
    fn rows_apart_in_storage_are_taken_where_they_lie() {
        for isa in Isa::available() {
            let m = Matrix::from_f32(60, 600, values(60 * 600, 3));
            let slice = m.slice(2..58, 70..583);
            let x = values(513, 4);
            let mut row = [0.0; 513];
            linear(isa, &slice, 0..56, &[&x, &x], |r, i, got| {
                slice.row_to_f32(r, &mut row);
                assert_eq!(got.to_bits(), in_order(isa, &row, &x).to_bits(), "{isa:?} row {r}, input {i}");
            });
        }
    }
}
