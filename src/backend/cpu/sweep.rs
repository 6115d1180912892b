//! [`Sweep`]: products of rows of activations with any number of matrices, as one flat list of tasks.

use std::ops::Range;

use crate::backend::cpu::Threads;
use crate::kernels::pool::{self, Scatter, for_each};
use crate::kernels::product::{Inputs, Weights};
use crate::kernels::quant::TILE;
use crate::kernels::{Numerics, add, swiglu};

/// A matrix and the input that it is multiplied with, an index into [`Sweep::inputs`].
type Product<'a> = (&'a Weights, usize);

/// Outputs of one matrix, or of all ranks' parts of it: `[rows, width]`.
struct Target<'a> {
    width: usize,
    out: Scatter<'a, f32>,
    /// Added up in this order.
    parts: Vec<Product<'a>>,
    /// The product that `out`, once it is whole, gates, and where that lands.
    gated: Option<(Scatter<'a, f32>, Product<'a>)>,
}

/// Products of `n` rows of activations. A task is a chunk of one target's outputs, so that every thread finds work until all of them are done.
pub(super) struct Sweep<'a> {
    n: usize,
    numerics: Numerics,
    /// What was made of each distinct `[n, in]`, for each kind of weights.
    inputs: Vec<(&'a [f32], Inputs<'a>)>,
    targets: Vec<Target<'a>>,
}

impl<'a> Sweep<'a> {
    pub(super) fn new(n: usize, numerics: Numerics) -> Self {
        Self { n, numerics, inputs: Vec::new(), targets: Vec::new() }
    }

    /// `out = sum of x weights^T` over `parts`, in their order.
    pub(super) fn add(&mut self, width: usize, out: &'a mut [f32], parts: impl IntoIterator<Item = (&'a Weights, &'a [f32])>) {
        let parts = parts.into_iter().map(|(weights, x)| self.product(weights, x)).collect();
        self.targets.push(Target { width, out: Scatter::new(out), parts, gated: None });
    }

    /// `out = silu(x gate^T) * (x up^T)`; the second product lands in `scratch`.
    pub(super) fn add_gated(&mut self, width: usize, x: &'a [f32], [out, scratch]: [&'a mut [f32]; 2], [gate, up]: [&'a Weights; 2]) {
        let (gate, up) = (self.product(gate, x), self.product(up, x));
        self.targets.push(Target { width, out: Scatter::new(out), parts: vec![gate], gated: Some((Scatter::new(scratch), up)) });
    }

    fn product(&mut self, weights: &'a Weights, x: &'a [f32]) -> Product<'a> {
        let suits = |(of, inputs): &(&[f32], Inputs<'_>)| std::ptr::eq(*of, x) && weights.take(inputs, self.numerics);
        let found = self.inputs.iter().position(suits).unwrap_or_else(|| {
            let width = weights.cols();
            let rows = (0..self.n).map(|i| &x[i * width..(i + 1) * width]).collect();
            self.inputs.push((x, weights.prepare(rows, self.numerics)));
            self.inputs.len() - 1
        });
        (weights, found)
    }

    pub(super) fn run(&self, threads: &Threads) {
        if self.n == 0 {
            return;
        }
        let tasks: Vec<(usize, Range<usize>)> =
            self.targets.iter().enumerate().flat_map(|(t, target)| self.chunks(target, threads).map(move |rows| (t, rows))).collect();
        for_each(tasks.len(), |task, stolen| {
            threads.stats.count(stolen);
            let (target, rows) = &tasks[task];
            self.compute(&self.targets[*target], rows.clone());
        });
    }

    /// Chunks of a target's outputs that begin where its weights' tiles do.
    fn chunks(&self, target: &Target<'_>, threads: &Threads) -> impl Iterator<Item = Range<usize>> + use<> {
        let products = target.parts.iter().chain(target.gated.as_ref().map(|(_, up)| up));
        let (work, granule) =
            products.fold((0, 1), |(work, granule), (weights, _)| (work + weights.cols() * self.n, granule.max(weights.granule())));
        let width = target.width;
        let border = move |row: usize| if row == width { width } else { row.next_multiple_of(granule).min(width) };
        // SAFETY: only looked at for its address, before any task writes.
        let first = unsafe { target.out.range(0..width) };
        let chunks = threads.work.chunks(first, work, pool::threads());
        chunks.map(move |rows| border(rows.start)..border(rows.end)).filter(|rows| !rows.is_empty())
    }

    fn compute(&self, target: &Target<'_>, rows: Range<usize>) {
        let width = target.width;
        // SAFETY, here and below: an output belongs to one task.
        // The ranks' parts of a stored row lie side by side: taken in turn they are nearly one stream.
        let together = if self.n == 1 && target.parts.len() > 1 { TILE } else { rows.len().max(1) };
        for first in rows.clone().step_by(together) {
            let rows = first..rows.end.min(first + together);
            for (i, &(weights, input)) in target.parts.iter().enumerate() {
                weights.products(rows.clone(), &self.inputs[input].1, |row, of, dots| {
                    let y = unsafe { target.out.range(of * width + row..of * width + row + dots.len()) };
                    if i == 0 { y.copy_from_slice(dots) } else { add(y, dots) }
                });
            }
        }
        if let Some((scratch, (weights, input))) = &target.gated {
            weights.products(rows.clone(), &self.inputs[*input].1, |row, of, dots| {
                unsafe { scratch.range(of * width + row..of * width + row + dots.len()) }.copy_from_slice(dots);
            });
            for of in 0..self.n {
                let range = of * width + rows.start..of * width + rows.end;
                unsafe { swiglu(target.out.range(range.clone()), scratch.range(range)) };
            }
        }
    }
}
