//! The linear layer for many activation rows, where the order of additions is free.
//!
//! Weights go through K in blocks: 16 rows of a block at a time are transposed to words of 16 rows side by side, so that one vector holds a
//! step of K for 16 outputs, and a tile of outputs is a sum of outer products (Goto and van de Geijn, 2008). Activations are packed once
//! for all tasks of an op, in panels of as many rows as a tile is wide. Every word is an f32, except where bf16 weights meet a CPU that
//! multiplies pairs of bf16: there it is such a pair, and activations are rounded to bf16.
//!
//! With S the sum of the products' magnitudes, an output is within S * 2^-19 of the exact one for the usual lengths of K, as products are
//! added to each sum in f32; where activations are rounded to bf16, S * 2^-8 comes on top.
//!
//! Few rows don't repay the transposing: they go the way of [`linear`](crate::kernels::linear). A single one takes
//! the weights as they lie, in words too: in pairs it needs half of the room in L1, beside the weights that stream through.

#[cfg(target_arch = "x86_64")] // no other CPU has shown that it gains
mod one;
mod tile;

use std::cell::RefCell;
use std::ops::Range;

use crate::kernels::linear::{LANES, linear_rows};
use crate::kernels::matrix::{DType, Matrix};
use crate::kernels::pool::{Scatter, for_each};
use crate::kernels::widely;
use tile::Kernel;

/// Words of a weight row that are packed at once: a panel of activations so long lies in L1.
const STEPS: usize = 512;
/// Weight rows that are packed at once: with their outputs they lie in L2.
const GROUP: usize = 128;

/// The activation rows of an op, as [`linear_rows_fast`] takes them: prepared once, shared by all tasks.
pub(crate) struct FastRows<'a> {
    xs: Vec<&'a [f32]>,
    packing: Packing,
}

/// What was made of the rows.
enum Packing {
    Nothing,
    /// The words of a single row, for this kernel.
    One(Kernel, Vec<u32>),
    Many(Panels),
}

impl<'a> FastRows<'a> {
    /// Rows for weights of this dtype. Many are packed, spread over the pool that this is called in.
    ///
    /// # Panics
    /// If the rows are not of one length.
    pub(crate) fn new(xs: &[&'a [f32]], dtype: DType) -> Self {
        let kernel = Kernel::best(dtype);
        let packing = match xs {
            [x] if kernel.takes_one() => {
                let mut words = vec![0; x.len().div_ceil(kernel.elements())];
                pack_row(kernel, x, &mut words, 1, 0);
                Packing::One(kernel, words)
            }
            _ if xs.len() >= kernel.fewest() => Packing::Many(Panels::new(dtype, kernel, xs)),
            _ => Packing::Nothing,
        };
        Self { xs: xs.to_vec(), packing }
    }
}

/// As [`linear_rows`], in an order of additions that depends on how many activation rows there are.
///
/// # Panics
/// If the rows are not the matrix's, or the activations don't fit it.
pub(crate) fn linear_rows_fast(weights: &Matrix, rows: Range<usize>, x: &FastRows<'_>, mut put: impl FnMut(usize, usize, &[f32])) {
    match &x.packing {
        Packing::Nothing => linear_rows(weights, rows, &x.xs, put),
        Packing::One(kernel, words) => {
            assert_eq!(x.xs[0].len(), weights.cols(), "an input for another matrix than one of {} columns", weights.cols());
            kernel.multiply_one(weights, rows, words, |row, i, dot| put(row, i, &[dot]));
        }
        Packing::Many(panels) => panels.product(weights, rows, put),
    }
}

/// Activation rows in words, `[blocks of STEPS, panels, steps of the block, width]`; rows that the last panel lacks are zeros.
struct Panels {
    dtype: DType,
    kernel: Kernel,
    rows: usize,
    cols: usize,
    width: usize,
    words: Vec<u32>,
}

impl Panels {
    fn new(dtype: DType, kernel: Kernel, xs: &[&[f32]]) -> Self {
        let cols = xs[0].len();
        assert!(xs.iter().all(|x| x.len() == cols), "activation rows of one length");
        // As even as can be: no panel is much narrower than the kernel's tile.
        let panels = xs.len().div_ceil(kernel.widest());
        let width = xs.len().div_ceil(panels);
        let mut packed = Self { dtype, kernel, rows: xs.len(), cols, width, words: Vec::new() };
        let panels = packed.panels();
        let mut words = vec![0; packed.steps() * panels * width];
        let blocks = packed.steps().div_ceil(STEPS);
        let out = Scatter::new(&mut words);
        for_each(blocks * panels, |task, _| {
            let (block, panel) = (task / panels, task % panels);
            // SAFETY: a panel of a block belongs to one task.
            let out = unsafe { out.range(packed.place(block, panel)) };
            for (j, x) in xs.iter().skip(panel * width).take(width).enumerate() {
                pack_row(kernel, &x[packed.columns(block)], out, width, j);
            }
        });
        packed.words = words;
        packed
    }

    fn panels(&self) -> usize {
        self.rows.div_ceil(self.width)
    }

    /// Words of a row.
    fn steps(&self) -> usize {
        self.cols.div_ceil(self.kernel.elements())
    }

    fn steps_of(&self, block: usize) -> usize {
        STEPS.min(self.steps() - block * STEPS)
    }

    /// Columns of the matrix in a block.
    fn columns(&self, block: usize) -> Range<usize> {
        let columns = STEPS * self.kernel.elements();
        block * columns..((block + 1) * columns).min(self.cols)
    }

    /// Where a panel of a block lies.
    fn place(&self, block: usize, panel: usize) -> Range<usize> {
        let len = self.steps_of(block) * self.width;
        let start = block * STEPS * self.panels() * self.width + panel * len;
        start..start + len
    }

    fn product(&self, weights: &Matrix, rows: Range<usize>, mut put: impl FnMut(usize, usize, &[f32])) {
        assert!(rows.end <= weights.rows(), "rows {rows:?} of a matrix of {} rows", weights.rows());
        assert_eq!(self.dtype, weights.dtype(), "activations prepared for another dtype");
        assert_eq!(self.cols, weights.cols(), "an input of {} columns for a matrix of {}", self.cols, weights.cols());
        let blocks = self.steps().div_ceil(STEPS);
        SCRATCH.with_borrow_mut(|Scratch { words, sums, ahead }| {
            words.resize(GROUP * STEPS, 0);
            sums.resize(self.panels() * self.width * GROUP, 0.0);
            for first in rows.clone().step_by(GROUP) {
                let group = first..rows.end.min(first + GROUP);
                sums.fill(0.0);
                for block in 0..blocks {
                    ahead.clear();
                    if block + 1 < blocks {
                        self.list_lines(weights, group.clone(), block + 1, ahead);
                    } else {
                        self.list_lines(weights, group.end..rows.end.min(group.end + GROUP), 0, ahead);
                    }
                    self.add_block(weights, group.clone(), block, words, sums, ahead);
                }
                for (i, sums) in sums.chunks_exact(GROUP).take(self.rows).enumerate() {
                    put(group.start, i, &sums[..group.len()]);
                }
            }
        });
    }

    /// Adds to `sums`, `[rows, GROUP]`, the products of a block of a group of weight rows. The lines `ahead` are fetched meanwhile.
    fn add_block(&self, weights: &Matrix, group: Range<usize>, block: usize, words: &mut [u32], sums: &mut [f32], ahead: &[*const u8]) {
        let (steps, tile) = (self.steps_of(block), self.kernel.rows());
        let count = group.len().next_multiple_of(tile);
        for (i, words) in words.chunks_exact_mut(steps * LANES).take(count / LANES).enumerate() {
            // Beyond the end the last row is repeated, so that every tile is whole.
            let row = |r: usize| weights.row((group.start + i * LANES + r).min(group.end - 1));
            self.kernel.pack(std::array::from_fn(row), self.columns(block), words);
        }
        let mut ahead = ahead.chunks(ahead.len().div_ceil(self.panels() * (count / tile)).max(1));
        for panel in 0..self.panels() {
            let x = &self.words[self.place(block, panel)];
            let sums = &mut sums[panel * self.width * GROUP..][..self.width * GROUP];
            for r in (0..count).step_by(tile) {
                let words = &words[r * steps..][..tile * steps];
                self.kernel.multiply(self.width, words, x, &mut sums[r..], GROUP, ahead.next().unwrap_or_default());
            }
        }
    }

    /// The cache lines of a block of weight rows.
    fn list_lines(&self, weights: &Matrix, rows: Range<usize>, block: usize, lines: &mut Vec<*const u8>) {
        let columns = self.columns(block);
        let (start, len) = (self.dtype.bytes(columns.start), self.dtype.bytes(columns.len()));
        for row in rows {
            let start = weights.row(row).as_ptr().wrapping_add(start);
            lines.extend((0..len).step_by(64).map(|at| start.wrapping_add(at)));
        }
    }
}

/// Writes the words of a row to every `width`-th place from `at`.
fn pack_row(kernel: Kernel, x: &[f32], out: &mut [u32], width: usize, at: usize) {
    const WORDS: usize = 64;
    let mut words = [0; WORDS];
    let mut places = out.iter_mut().skip(at).step_by(width);
    for x in x.chunks(WORDS * kernel.elements()) {
        widely(|| match kernel.elements() {
            1 => words.iter_mut().zip(x).for_each(|(word, v)| *word = v.to_bits()),
            _ => {
                let (pairs, last) = x.as_chunks::<2>();
                words.iter_mut().zip(pairs).for_each(|(word, v)| *word = bf16_bits(v[0]) | bf16_bits(v[1]) << 16);
                last.iter().for_each(|&v| words[pairs.len()] = bf16_bits(v));
            }
        });
        words[..x.len().div_ceil(kernel.elements())].iter().zip(&mut places).for_each(|(word, place)| *place = *word);
    }
}

/// As [`half::bf16::from_f32`], in a form that vectorises.
#[inline(always)]
fn bf16_bits(v: f32) -> u32 {
    let bits = v.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    (if v.is_nan() { bits | 0x40_0000 } else { rounded }) >> 16
}

/// What a thread packs into, kept from op to op.
struct Scratch {
    words: Vec<u32>,
    sums: Vec<f32>,
    ahead: Vec<*const u8>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch { words: Vec::new(), sums: Vec::new(), ahead: Vec::new() }) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::samples::{mapped, one_by_one, values};

    fn matrix(dtype: DType, rows: usize, cols: usize) -> Matrix {
        mapped(dtype, rows, cols, &values(rows * cols, 1))
    }

    /// As near to the product in f64 as the module's head promises.
    fn check_one(kernel: Kernel, weights: &Matrix, r: usize, x: &[f32], got: f32) {
        let mut row = vec![0.0; weights.cols()];
        weights.row_to_f32(r, &mut row);
        let products = || row.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
        let (want, size): (f64, f64) = (products().sum(), products().map(f64::abs).sum());
        let rounding = if kernel.elements() == 2 { 2f64.powi(-8) } else { 0.0 };
        let bound = size * (2f64.powi(-19) + rounding);
        assert!((f64::from(got) - want).abs() <= bound, "{kernel:?}, {weights:?}: row {r} is {got}, not {want} within {bound}");
    }

    /// Every output once, and near to the product.
    fn check(kernel: Kernel, weights: &Matrix, rows: Range<usize>, xs: &[&[f32]]) {
        let case = format!("{kernel:?}, {weights:?}, rows {rows:?}, {} inputs", xs.len());
        let (n, mut seen) = (xs.len(), vec![0; weights.rows() * xs.len()]);
        Panels::new(weights.dtype(), kernel, xs).product(
            weights,
            rows.clone(),
            one_by_one(|r, i, got| {
                check_one(kernel, weights, r, xs[i], got);
                seen[r * n + i] += 1;
            }),
        );
        assert!(seen.into_iter().eq((0..weights.rows() * n).map(|at| i32::from(rows.contains(&(at / n))))), "{case}: every output once");
    }

    #[test]
    fn every_kernel_is_near_the_product_on_odd_sizes() {
        let odd = [(1, 1, 13), (5, 16, 14), (31, 31, 24), (70, 1100, 40), (129, 1025, 25), (300, 33, 17), (16, 2049, 16)];
        for (rows, cols, n) in (12..=40).map(|n| (33, 77, n)).chain(odd) {
            let x: Vec<Vec<f32>> = (0..n).map(|i| values(cols, 7 + i as u32)).collect();
            let xs: Vec<&[f32]> = x.iter().map(Vec::as_slice).collect();
            for dtype in [DType::F32, DType::F16, DType::Bf16] {
                let whole = matrix(dtype, rows + 3, cols + 5);
                for kernel in Kernel::available(dtype) {
                    check(kernel, &matrix(dtype, rows, cols), rows / 3..rows, &xs);
                    check(kernel, &whole.slice(2..rows + 2, 3..cols + 3), 0..rows, &xs);
                }
            }
        }
    }

    #[test]
    fn a_single_row_is_near_the_product_on_odd_sizes() {
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            for kernel in Kernel::available(dtype).into_iter().filter(|kernel| kernel.takes_one()) {
                // Rows that begin anywhere in a line, all in the same place or each in its own.
                for (cols, skip) in (1..=130).chain([511, 513, 1031, 2046, 2048]).flat_map(|cols| [(cols, 2), (cols, 3)]) {
                    let (weights, x) = (matrix(dtype, 9, cols + skip).slice(2..9, skip..cols + skip), values(cols, 5));
                    let mut words = vec![0; cols.div_ceil(kernel.elements())];
                    pack_row(kernel, &x, &mut words, 1, 0);
                    let mut next = 3;
                    kernel.multiply_one(&weights, 3..7, &words, |r, i, got| {
                        check_one(kernel, &weights, r, &x, got);
                        assert_eq!((r, i), (next, 0));
                        next += 1;
                    });
                    assert_eq!(next, 7, "every output once");
                }
            }
        }
    }

    #[test]
    fn activations_are_rounded_as_half_rounds_them() {
        let all = (0..=u32::MAX).step_by(4099).chain([0x7f80_0000, 0x7f80_0001, 0xffc0_0000, 0x7f7f_ffff, 0x3f80_8000, 0x3f81_8000]);
        for v in all.map(f32::from_bits) {
            assert_eq!(bf16_bits(v), u32::from(half::bf16::from_f32(v).to_bits()), "{v}");
        }
    }

    #[test]
    fn few_rows_have_the_bits_of_the_fixed_order_and_many_are_near_it() {
        let cols = 530;
        let x: Vec<Vec<f32>> = (0..70).map(|i| values(cols, 7 + i)).collect();
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let weights = matrix(dtype, 37, cols);
            for n in (1..=40).chain([47, 48, 70]) {
                let xs: Vec<&[f32]> = x[..n].iter().map(Vec::as_slice).collect();
                let mut want = vec![0.0; 37 * n];
                linear_rows(&weights, 0..37, &xs, one_by_one(|row, i, dot| want[i * 37 + row] = dot));
                let mut got = vec![f32::NAN; 37 * n];
                linear_rows_fast(&weights, 0..37, &FastRows::new(&xs, dtype), one_by_one(|row, i, dot| got[i * 37 + row] = dot));
                // Products are below 1, so that S is below the number of columns.
                let kernel = Kernel::best(dtype);
                let few = n < kernel.fewest() && !(n == 1 && kernel.takes_one());
                let bound = if few { 0.0 } else { cols as f32 / 256.0 };
                assert!(got.iter().zip(&want).all(|(g, w)| (g - w).abs() <= bound), "{dtype:?}, {n} rows");
            }
        }
    }

    #[test]
    fn what_is_not_a_number_reaches_its_outputs_alone() {
        let n = 50;
        let mut x: Vec<Vec<f32>> = (0..n).map(|i| values(64, 7 + i)).collect();
        x[3][5] = f32::NAN;
        x[4][6] = f32::INFINITY;
        let xs: Vec<&[f32]> = x.iter().map(Vec::as_slice).collect();
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let x = FastRows::new(&xs, dtype);
            linear_rows_fast(
                &matrix(dtype, 40, 64),
                0..40,
                &x,
                one_by_one(|_, i, dot| match i {
                    3 => assert!(dot.is_nan(), "{dtype:?}"),
                    4 => assert!(dot.is_infinite(), "{dtype:?}"),
                    _ => assert!(dot.is_finite(), "{dtype:?}"),
                }),
            );
        }
    }
}
