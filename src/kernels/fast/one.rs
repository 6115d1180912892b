//! The products of weight rows with a single activation row: four sums side by side.
//!
//! A checkpoint's tensors begin at any multiple of 8 bytes. Vectors that lie in two cache lines cost up to a quarter of the speed of memory, so
//! weights and activations are taken by vectors that don't, and what lies in front of the first and behind the last of a row by one that overlaps it.

use std::ops::Range;

use super::tile::Arithmetic;
use crate::kernels::lanes::{Element, Lanes};
use crate::kernels::linear::{LANES, ahead_in_rows};
use crate::kernels::matrix::{Matrix, Row};

/// Calls `put(row, 0, weights[row] . x)` for every row of `rows`; `x` is in words.
///
/// # Safety
/// The CPU has the instructions of `A`; the rows are the matrix's, and `x` holds a word for each of their words.
#[inline(always)]
pub(super) unsafe fn one<A: Arithmetic>(weights: &Matrix, rows: Range<usize>, x: &[u32], mut put: impl FnMut(usize, usize, f32)) {
    if rows.is_empty() {
        return;
    }
    let stride = if weights.rows() > 1 { weights.row(1).as_ptr().addr().wrapping_sub(weights.row(0).as_ptr().addr()) } else { 0 };
    let word = weights.dtype().bytes(A::ELEMENTS);
    let ends = Ends::new(x, weights.row(0).as_ptr().addr(), stride, word, weights.cols() / A::ELEMENTS);
    for r in rows {
        let dot = unsafe {
            match weights.row(r) {
                Row::F32(w) => dot::<A, _, 0>(w, x, &ends, stride),
                Row::F16(w) => dot::<A, _, AHEAD>(w, x, &ends, stride),
                Row::Bf16(w) => dot::<A, _, AHEAD>(w, x, &ends, stride),
                Row::Quantised(_) => unreachable!("quantised weights are packed"),
            }
        };
        put(r, 0, dot);
    }
}

/// Words that lie in one cache line.
#[repr(align(64))]
struct Line([f32; LANES]);

/// Words of an activation row that the first and the last vector of a weight row meet, zeros where those between have them.
struct Ends {
    /// Words in front of the first vector that lies in one line.
    front: usize,
    head: [f32; LANES],
    /// What the vectors from there on meet, as they lie.
    whole: Vec<Line>,
    /// `None` if nothing is left behind them.
    tail: Option<[f32; LANES]>,
}

impl Ends {
    /// For rows of so many whole words, the first at `addr`.
    fn new(x: &[u32], addr: usize, stride: usize, word: usize, words: usize) -> Self {
        let vector = LANES * word;
        let gap = addr.wrapping_neg() % vector;
        // Rows that lie each in its own way, or are short, are taken from their starts.
        let alike = stride.is_multiple_of(vector) && gap.is_multiple_of(word) && words >= 2 * LANES;
        let front = if alike { gap / word } else { 0 };
        let (steps, rest) = ((words - front) / LANES, (words - front) % LANES);
        let mut head = [0.0; LANES];
        head.iter_mut().zip(&x[..front]).for_each(|(to, x)| *to = f32::from_bits(*x));
        let tail = (rest > 0 && words >= LANES).then(|| {
            let last = &x[words - LANES..words];
            std::array::from_fn(|i| if i < LANES - rest { 0.0 } else { f32::from_bits(last[i]) })
        });
        let whole = x[front..].as_chunks().0.iter().take(steps).map(|line| Line(line.map(f32::from_bits))).collect();
        Self { front, head, whole, tail }
    }
}

/// How far ahead the weights of a single activation row are fetched, in bytes, where they take two bytes; of four the CPU itself
/// fetches enough. Measured.
const AHEAD: usize = 8 << 10;

#[inline(always)]
unsafe fn dot<A: Arithmetic, W: Element, const AHEAD: usize>(w: &[W], x: &[u32], ends: &Ends, stride: usize) -> f32 {
    let Ends { front, head, whole: x_of_whole, tail } = ends;
    let (step, words) = (LANES * A::ELEMENTS, w.len() / A::ELEMENTS);
    let (from, x) = (w.as_ptr(), x.as_ptr().cast::<f32>());
    // From the weights at hand to those that will be needed: as long as both are in rows as far apart as at first, and then.
    let (bytes, last) = (size_of_val(w), size_of_val(w).saturating_sub(AHEAD % size_of_val(w).max(1)));
    let ahead = [0, last].map(|at| ahead_in_rows(at, AHEAD, bytes, stride));
    unsafe {
        let (mut sums, one) = ([A::Lanes::zero(); 4], A::Lanes::splat(1.0));
        if *front > 0 {
            sums[3] = A::add_products(sums[3], A::words(from), A::Lanes::load_f32(head.as_ptr()));
        }
        let whole = from.add(front * A::ELEMENTS);
        for (s, x) in x_of_whole.iter().enumerate() {
            let w = whole.add(s * step);
            let at = s * step * size_of::<W>();
            if AHEAD > 0 && at.is_multiple_of(64) {
                A::Lanes::prefetch_near(w.wrapping_byte_add(ahead[usize::from(at >= last)]));
            }
            sums[s % 4] = A::add_products(sums[s % 4], A::words(w), A::Lanes::load_f32(x.0.as_ptr()));
        }
        let mut done = front + x_of_whole.len() * LANES;
        if let Some(tail) = tail {
            sums[2] = A::add_products(sums[2], A::words(from.add((words - LANES) * A::ELEMENTS)), A::Lanes::load_f32(tail.as_ptr()));
            done = words;
        }
        let rest = w.len() - done * A::ELEMENTS;
        if rest > 0 {
            let (mut last, mut last_x) = ([W::default(); 2 * LANES], [0.0f32; LANES]);
            last[..rest].copy_from_slice(&w[done * A::ELEMENTS..]);
            std::ptr::copy_nonoverlapping(x.add(done), last_x.as_mut_ptr(), rest.div_ceil(A::ELEMENTS));
            sums[1] = A::add_products(sums[1], A::words(last.as_ptr()), A::Lanes::load_f32(last_x.as_ptr()));
        }
        sums[0].fma(sums[1], one).fma(sums[2].fma(sums[3], one), one).sum()
    }
}
