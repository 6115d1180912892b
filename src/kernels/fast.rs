//! The linear layer for many activation rows, where the order of additions is free.
//!
//! Weights go through K in blocks: 16 rows of a block at a time are transposed to words of 16 rows side by side, so that one vector holds a
//! step of K for 16 outputs, and a tile of outputs is a sum of outer products (Goto and van de Geijn, 2008). Activations are packed once
//! for all tasks of an op, in panels of as many rows as a tile is wide. Every word is an f32, except where bf16 weights meet a CPU that
//! multiplies pairs of bf16: there it is such a pair, and activations are rounded to bf16.
//!
//! Few rows don't repay the transposing: they go the way of [`linear`](crate::kernels::linear).

mod tile;

use std::cell::RefCell;
use std::ops::Range;

use half::bf16;

use crate::kernels::linear::{LANES, linear_rows};
use crate::kernels::matrix::{DType, Matrix};
use crate::kernels::pool::{Scatter, for_each};
use tile::Kernel;

/// Words of a weight row that are packed at once: a panel of activations so long lies in L1.
const STEPS: usize = 512;
/// Weight rows that are packed at once: with their outputs they lie in L2.
const GROUP: usize = 128;
/// Fewest activation rows that repay the packing.
const FEWEST: usize = 8;

/// The activation rows of an op, as [`linear_rows_fast`] takes them: prepared once, shared by all tasks.
pub(crate) struct FastRows<'a> {
    xs: Vec<&'a [f32]>,
    panels: Option<Panels>,
}

impl<'a> FastRows<'a> {
    /// Rows for weights of this dtype. Many are packed, spread over the pool that this is called in.
    ///
    /// # Panics
    /// If the rows are not of one length.
    pub(crate) fn new(xs: &[&'a [f32]], dtype: DType) -> Self {
        let panels = (xs.len() >= FEWEST).then(|| Panels::new(dtype, Kernel::best(dtype), xs));
        Self { xs: xs.to_vec(), panels }
    }
}

/// Calls `put(row, i, weights[row] . x[i])` for every row of `rows` and every activation row, in an order of additions that depends on how many there are.
///
/// # Panics
/// If the rows are not the matrix's, or the activations don't fit it.
pub(crate) fn linear_rows_fast(weights: &Matrix, rows: Range<usize>, x: &FastRows<'_>, put: impl FnMut(usize, usize, f32)) {
    match &x.panels {
        Some(panels) => panels.product(weights, rows, put),
        None => linear_rows(weights, rows, &x.xs, put),
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

    fn product(&self, weights: &Matrix, rows: Range<usize>, mut put: impl FnMut(usize, usize, f32)) {
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
                    for (row, sum) in group.clone().zip(sums) {
                        put(row, i, *sum);
                    }
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
    let places = out.iter_mut().skip(at).step_by(width);
    if kernel.elements() == 1 {
        places.zip(x).for_each(|(word, v)| *word = v.to_bits());
    } else {
        let pair = |v: &[f32]| {
            let [low, high] = [v[0], v.get(1).copied().unwrap_or(0.0)].map(|v| u32::from(bf16::from_f32(v).to_bits()));
            low | high << 16
        };
        places.zip(x.chunks(2)).for_each(|(word, v)| *word = pair(v));
    }
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
    use std::sync::Arc;

    use half::f16;
    use memmap2::MmapMut;

    use super::*;

    fn values(n: usize, seed: u32) -> Vec<f32> {
        let mut s = seed.wrapping_mul(2_654_435_761) | 1;
        let mut next = || {
            s ^= s << 13;
            s ^= s >> 17;
            s ^= s << 5;
            (s >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    fn matrix(dtype: DType, rows: usize, cols: usize) -> Matrix {
        let values = values(rows * cols, 1).into_iter();
        let bytes: Vec<u8> = match dtype {
            DType::F32 => values.flat_map(f32::to_ne_bytes).collect(),
            DType::F16 => values.flat_map(|v| f16::from_f32(v).to_ne_bytes()).collect(),
            DType::Bf16 => values.flat_map(|v| bf16::from_f32(v).to_ne_bytes()).collect(),
        };
        let mut map = MmapMut::map_anon(bytes.len()).unwrap();
        map.copy_from_slice(&bytes);
        Matrix::mapped(Arc::new(map.make_read_only().unwrap()), 0, dtype, rows, cols).unwrap()
    }

    /// Every output once, and as near to the product in f64 as the module's head promises.
    fn check(kernel: Kernel, weights: &Matrix, rows: Range<usize>, xs: &[&[f32]]) {
        let case = format!("{kernel:?}, {weights:?}, rows {rows:?}, {} inputs", xs.len());
        let (n, mut seen) = (xs.len(), vec![0; weights.rows() * xs.len()]);
        let mut row = vec![0.0; weights.cols()];
        Panels::new(weights.dtype(), kernel, xs).product(weights, rows.clone(), |r, i, got| {
            weights.row_to_f32(r, &mut row);
            let products = || row.iter().zip(xs[i]).map(|(w, x)| f64::from(*w) * f64::from(*x));
            let (want, size): (f64, f64) = (products().sum(), products().map(f64::abs).sum());
            // f32: a unit of the last place for each addition of a block's chain, far from all in the same direction; bf16: half a unit of 8 bits for each activation.
            let bound = size * (f64::from(f32::EPSILON) * 40.0 + if kernel.elements() == 2 { 1.0 / 256.0 } else { 0.0 });
            assert!((f64::from(got) - want).abs() <= bound, "{case}: row {r}, input {i} is {got}, not {want} within {bound}");
            seen[r * n + i] += 1;
        });
        assert!(seen.into_iter().eq((0..weights.rows() * n).map(|at| i32::from(rows.contains(&(at / n))))), "{case}: every output once");
    }

    #[test]
    fn every_kernel_is_near_the_product_on_odd_sizes() {
        let sizes = (13..=40).map(|n| (33, 77, n)).chain([
            (1, 1, 13),
            (5, 16, 13),
            (31, 31, 24),
            (70, 1100, 40),
            (129, 1025, 25),
            (300, 33, 17),
            (16, 2049, 16),
        ]);
        for (rows, cols, n) in sizes {
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
}
