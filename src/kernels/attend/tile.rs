//! One tile of queries over one stretch of positions.

use std::ops::Range;

use bytemuck::Pod;
use half::f16;

use super::{QUERIES, Tile};
use crate::backend::{BLOCK, KvType};
use crate::kernels::lanes::{Element, Lanes};
use crate::kernels::linear::{Isa, LANES, padded};

/// What a tile's queries have found in some of the positions: y is relative to the largest score there and not yet divided by the sum.
pub(super) struct Partial {
    head_dim: usize,
    /// Of all scores, which are in units of ln(2); minus infinity where a query has seen nothing.
    max: [f32; QUERIES],
    sum: [f32; QUERIES],
    /// `[queries, head_dim rounded up to whole vectors]`
    y: Vec<f32>,
}

impl Partial {
    pub(super) fn new(tile: &Tile<'_>) -> Self {
        let (queries, head_dim) = (tile.seen().count(), tile.cache.shape.head_dim);
        let y = vec![0.0; queries * head_dim.next_multiple_of(LANES)];
        Self { head_dim, max: [f32::NEG_INFINITY; QUERIES], sum: [0.0; QUERIES], y }
    }

    /// From one query's y to the next.
    fn stride(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Takes the positions that come next.
    pub(super) fn merge(&mut self, next: &Self) {
        let stride = self.stride();
        for (query, (y, next_y)) in self.y.chunks_exact_mut(stride).zip(next.y.chunks_exact(stride)).enumerate() {
            if next.max[query] == f32::NEG_INFINITY && next.sum[query] == 0.0 {
                continue; // nothing seen there
            }
            let max = larger(self.max[query], next.max[query]);
            // SAFETY: any CPU has what an array takes.
            let [scale, next_scale] = [self.max[query], next.max[query]].map(|of| unsafe { exp2([of - max; LANES]) }[0]);
            self.max[query] = max;
            self.sum[query] = self.sum[query] * scale + next.sum[query] * next_scale;
            y.iter_mut().zip(next_y).for_each(|(y, next)| *y = *y * scale + next * next_scale);
        }
    }

    /// Calls `put(query, y)` for every query.
    pub(super) fn finish(mut self, mut put: impl FnMut(usize, &[f32])) {
        let (stride, head_dim) = (self.stride(), self.head_dim);
        for (query, y) in self.y.chunks_exact_mut(stride).enumerate() {
            let y = &mut y[..head_dim];
            y.iter_mut().for_each(|y| *y /= self.sum[query]);
            put(query, y);
        }
    }
}

/// Attends to `positions`, which begin at a block's start. `queries` are `[queries, head_dim]`, scaled so that weights are powers of two.
pub(super) fn attend_stretch(isa: Isa, tile: &Tile<'_>, queries: &[f32], positions: Range<usize>) -> Partial {
    match tile.cache.shape.kv {
        KvType::F32 => dispatch::<f32>(isa, tile, queries, positions),
        KvType::F16 => dispatch::<f16>(isa, tile, queries, positions),
    }
}

fn dispatch<E: Element + Pod>(isa: Isa, tile: &Tile<'_>, queries: &[f32], positions: Range<usize>) -> Partial {
    // SAFETY: `Isa::available` lists only what the CPU has.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::<E>(tile, queries, positions),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::<E>(tile, queries, positions),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => blocks::<[std::arch::aarch64::float32x4_t; 4], E, 1>(tile, queries, positions),
            Isa::Portable => blocks::<[f32; 16], E, 1>(tile, queries, positions),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl")]
unsafe fn avx512<E: Element + Pod>(tile: &Tile<'_>, queries: &[f32], positions: Range<usize>) -> Partial {
    unsafe { blocks::<std::arch::x86_64::__m512, E, 4>(tile, queries, positions) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<E: Element + Pod>(tile: &Tile<'_>, queries: &[f32], positions: Range<usize>) -> Partial {
    unsafe { blocks::<[std::arch::x86_64::__m256; 2], E, 1>(tile, queries, positions) }
}

/// Queries that share a load of keys or values.
const TOGETHER: usize = 4;

/// `V` vectors of 16 add up side by side for each of up to four queries.
#[inline(always)]
unsafe fn blocks<L: Lanes, E: Element + Pod, const V: usize>(tile: &Tile<'_>, queries: &[f32], positions: Range<usize>) -> Partial {
    let mut part = Partial::new(tile);
    let (n, head_dim, stride) = (tile.seen().count(), part.head_dim, part.stride());
    assert!(n <= QUERIES && queries.len() == n * head_dim);
    let mut seen = [const { 0..0 }; QUERIES];
    seen.iter_mut().zip(tile.seen()).for_each(|(to, seen)| *to = seen);
    // Of a query, the slots that it sees of a block.
    let slots = |query: usize, block: usize| {
        let slot = |position: usize| position.clamp(block * BLOCK, (block + 1) * BLOCK) - block * BLOCK;
        slot(seen[query].start)..slot(seen[query].end)
    };
    let all = tile.positions();
    let last = (all.end - 1) / BLOCK;
    let mut weights = [[0.0f32; BLOCK]; QUERIES];
    let mut sums = unsafe { [L::zero(); QUERIES] };
    let mut scales = sums;
    for block in all.start.max(positions.start) / BLOCK..all.end.min(positions.end).div_ceil(BLOCK) {
        let [keys, values] = tile.cache.block::<E>(tile.kv_head, block);
        let [next_keys, next_values] = tile.cache.block::<E>(tile.kv_head, (block + 1).min(last));
        for first in (0..n).step_by(TOGETHER) {
            let (q, scores) = (&queries[first * head_dim..], &mut weights[first..]);
            unsafe {
                match n - first {
                    1 => scores_of::<L, E, 1, V>(keys, next_keys, q, scores),
                    2 => scores_of::<L, E, 2, V>(keys, next_keys, q, scores),
                    3 => scores_of::<L, E, 3, V>(keys, next_keys, q, scores),
                    _ => scores_of::<L, E, TOGETHER, V>(keys, next_keys, q, scores),
                }
            }
        }
        for query in 0..n {
            let slots = slots(query, block);
            if !slots.is_empty() {
                scales[query] = unsafe { weigh(&mut weights[query], slots, &mut part.max[query], &mut sums[query]) };
            }
        }
        let mut first = 0;
        while first < n {
            let slots_of_first = slots(first, block);
            let alike = (first..n).take(TOGETHER).take_while(|&query| slots(query, block) == slots_of_first).count();
            if !slots_of_first.is_empty() {
                let (weights, scales, y) = (&weights[first..], &scales[first..], &mut part.y[first * stride..]);
                let values = Values { values, next: next_values, head_dim, slots: slots_of_first };
                unsafe {
                    match alike {
                        1 => add_values::<L, E, 1, V>(values, weights, scales, y),
                        2 => add_values::<L, E, 2, V>(values, weights, scales, y),
                        3 => add_values::<L, E, 3, V>(values, weights, scales, y),
                        _ => add_values::<L, E, TOGETHER, V>(values, weights, scales, y),
                    }
                }
            }
            first += alike;
        }
    }
    for (sum, lanes) in part.sum.iter_mut().zip(sums) {
        *sum = unsafe { lanes.sum() };
    }
    part
}

/// `scores[i][slot] = q[i] . keys[slot]` for all slots of a block, each sum in the order of the head's elements.
/// The next block's keys are fetched meanwhile.
#[inline(always)]
#[expect(clippy::needless_range_loop)] // all sides are indexed alike
unsafe fn scores_of<L: Lanes, E: Element, const C: usize, const V: usize>(keys: &[E], next: &[E], q: &[f32], scores: &mut [[f32; BLOCK]]) {
    let head_dim = keys.len() / BLOCK;
    assert!(keys.len() == head_dim * BLOCK && next.len() == keys.len() && q.len() >= C * head_dim && scores.len() >= C);
    for slot in (0..BLOCK).step_by(V * LANES) {
        unsafe {
            let mut sums = [[L::zero(); V]; C];
            for k in 0..head_dim {
                let (keys, q) = (keys.as_ptr().add(k * BLOCK + slot), q.as_ptr().add(k));
                prefetch::<L, E, V>(next.as_ptr().add(k * BLOCK + slot));
                let mut held = [L::zero(); V];
                for v in 0..V {
                    held[v] = E::load(keys.add(v * LANES));
                }
                for i in 0..C {
                    let q = L::splat(*q.add(i * head_dim));
                    for v in 0..V {
                        sums[i][v] = sums[i][v].fma(held[v], q);
                    }
                }
            }
            for i in 0..C {
                for v in 0..V {
                    sums[i][v].store(scores[i].as_mut_ptr().add(slot + v * LANES));
                }
            }
        }
    }
}

/// Asks for V vectors.
#[inline(always)]
unsafe fn prefetch<L: Lanes, E, const V: usize>(p: *const E) {
    for line in (0..V * LANES * size_of::<E>()).step_by(64) {
        unsafe { L::prefetch_near(p.byte_add(line)) };
    }
}

/// Turns the scores of a block into weights relative to the largest score so far, and adds them to the sum.
/// Says by how much what was summed before is to be scaled.
#[inline(always)]
unsafe fn weigh<L: Lanes>(scores: &mut [f32; BLOCK], slots: Range<usize>, max: &mut f32, sum: &mut L) -> L {
    if slots != (0..BLOCK) {
        let (start, end) = (slots.start as u32, slots.end as u32);
        for (slot, score) in (0u32..).zip(scores.iter_mut()) {
            *score = if start <= slot && slot < end { *score } else { f32::NEG_INFINITY };
        }
    }
    unsafe {
        let mut held = [L::zero(); BLOCK / LANES];
        let mut largest = L::splat(*max);
        for (i, held) in held.iter_mut().enumerate() {
            *held = L::load_f32(scores.as_ptr().add(i * LANES));
            largest = largest.max(*held);
        }
        let largest = largest.largest();
        let one = L::splat(1.0);
        let scale = exp2(L::splat(*max - largest));
        *sum = L::zero().fma(*sum, scale);
        for (i, held) in held.into_iter().enumerate() {
            let weights = exp2(held.fma(L::splat(-largest), one));
            *sum = sum.fma(weights, one);
            weights.store(scores.as_mut_ptr().add(i * LANES));
        }
        *max = largest;
        scale
    }
}

/// A block's values, those of the next one, and the slots that are seen.
struct Values<'a, E> {
    values: &'a [E],
    next: &'a [E],
    head_dim: usize,
    slots: Range<usize>,
}

/// `y[i] = scales[i] * y[i] + weights[i][slot] * values[slot]`, slot after slot. The next block's values are fetched meanwhile.
#[inline(always)]
unsafe fn add_values<L: Lanes, E: Element, const C: usize, const V: usize>(
    values: Values<'_, E>,
    weights: &[[f32; BLOCK]],
    scales: &[L],
    y: &mut [f32],
) {
    let Values { values, next, head_dim, slots } = values;
    let (whole, stride) = (head_dim - head_dim % LANES, head_dim.next_multiple_of(LANES));
    assert!(values.len() == BLOCK * head_dim && next.len() == values.len() && slots.end <= BLOCK);
    assert!(weights.len() >= C && scales.len() >= C && y.len() >= C * stride);
    let mut k = 0;
    unsafe {
        while k + V * LANES <= whole {
            let (from, next) = (values.as_ptr().add(k), next.as_ptr().add(k));
            columns::<L, E, C, V>(from, next, head_dim, slots.clone(), weights, scales, y.as_mut_ptr().add(k), stride);
            k += V * LANES;
        }
        while k < whole {
            let (from, next) = (values.as_ptr().add(k), next.as_ptr().add(k));
            columns::<L, E, C, 1>(from, next, head_dim, slots.clone(), weights, scales, y.as_mut_ptr().add(k), stride);
            k += LANES;
        }
        if whole < head_dim {
            let mut tails = [[E::default(); LANES]; BLOCK];
            for slot in slots.clone() {
                tails[slot] = padded(&values[slot * head_dim + whole..][..head_dim - whole]);
            }
            let from = tails.as_ptr().cast();
            columns::<L, E, C, 1>(from, from, LANES, slots, weights, scales, y.as_mut_ptr().add(whole), stride);
        }
    }
}

/// [`add_values`] for V vectors of each y; `values` and `next` step on by `step`, y by `stride`.
#[inline(always)]
#[expect(clippy::too_many_arguments, clippy::needless_range_loop)] // an inner loop; all sides are indexed alike
unsafe fn columns<L: Lanes, E: Element, const C: usize, const V: usize>(
    values: *const E,
    next: *const E,
    step: usize,
    slots: Range<usize>,
    weights: &[[f32; BLOCK]],
    scales: &[L],
    y: *mut f32,
    stride: usize,
) {
    unsafe {
        let mut sums = [[L::zero(); V]; C];
        for i in 0..C {
            for v in 0..V {
                sums[i][v] = sums[i][v].fma(L::load_f32(y.add(i * stride + v * LANES)), scales[i]);
            }
        }
        for slot in slots {
            prefetch::<L, E, V>(next.add(slot * step));
            let values = values.add(slot * step);
            let mut held = [L::zero(); V];
            for v in 0..V {
                held[v] = E::load(values.add(v * LANES));
            }
            for i in 0..C {
                let weight = L::splat(weights[i][slot]);
                for v in 0..V {
                    sums[i][v] = sums[i][v].fma(held[v], weight);
                }
            }
        }
        for i in 0..C {
            for v in 0..V {
                sums[i][v].store(y.add(i * stride + v * LANES));
            }
        }
    }
}

/// One instruction, where `f32::max` asks which one is a NaN.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// 2^x for x <= 0, within 2 units of the last place: 2^n 2^f with |f| <= 1/2, the polynomial of Cephes' exp2f (Moshier 1989). Below -126.5 it is 0.
#[inline(always)]
#[expect(clippy::excessive_precision)] // as published
unsafe fn exp2<L: Lanes>(x: L) -> L {
    unsafe {
        let (one, minus) = (L::splat(1.0), L::splat(-1.0));
        // At this size whole numbers are a unit of the last place apart: the sum is rounded to one.
        let round = L::splat(1.5 * (1 << 23) as f32);
        let x = L::splat(-127.0).max(x);
        let rounded = round.fma(x, one);
        let f = x.fma(rounded.fma(round, minus), minus);
        let mut p = L::splat(1.535_336_188_319_500e-4);
        for coefficient in [
            1.339_887_440_266_574e-3,
            9.618_437_357_674_640e-3,
            5.550_332_471_162_809e-2,
            2.402_264_791_363_012e-1,
            6.931_472_028_550_421e-1,
            1.0,
        ] {
            p = L::splat(coefficient).fma(p, f);
        }
        L::zero().fma(p, rounded.power_of_two())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    unsafe fn exp2_by(isa: Isa, x: f32) -> f32 {
        let mut y = [f32::NAN; LANES];
        unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => avx512(x, &mut y),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => avx2(x, &mut y),
                #[cfg(target_arch = "aarch64")]
                Isa::Neon => exp2(<[std::arch::aarch64::float32x4_t; 4]>::splat(x)).store(y.as_mut_ptr()),
                Isa::Portable => y = exp2([x; LANES]),
            }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512vl")]
        unsafe fn avx512(x: f32, y: &mut [f32; LANES]) {
            unsafe { exp2(<std::arch::x86_64::__m512 as Lanes>::splat(x)).store(y.as_mut_ptr()) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2(x: f32, y: &mut [f32; LANES]) {
            unsafe { exp2(<[std::arch::x86_64::__m256; 2] as Lanes>::splat(x)).store(y.as_mut_ptr()) }
        }
        assert!(y.iter().all(|v| v.to_bits() == y[0].to_bits()), "{isa:?}: 2^{x} is {y:?}");
        y[0]
    }

    #[test]
    fn the_power_of_two_is_right_to_the_last_places_and_ends_at_zero() {
        for isa in Isa::available() {
            // SAFETY: the CPU has what is available.
            let exp2 = |x: f32| unsafe { exp2_by(isa, x) };
            for i in 0..126_000 {
                let x = -(i as f32) * 1.0009e-3;
                let (found, want) = (f64::from(exp2(x)), f64::from(x).exp2());
                assert!((found - want).abs() <= 2.5e-7 * want, "{isa:?}: 2^{x} is {want}, not {found}");
            }
            assert_eq!([0.0, -0.0, -1.0, -127.0, -1000.0, f32::NEG_INFINITY].map(exp2), [1.0, 1.0, 0.5, 0.0, 0.0, 0.0]);
            assert!(exp2(f32::NAN).is_nan());
        }
    }
}
