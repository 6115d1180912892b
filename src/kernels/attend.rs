//! Attention over paged keys and values, a query head at a time.

use std::ops::Range;

use bytemuck::Pod;
use half::f16;

use crate::backend::{BLOCK, KvType};
use crate::kernels::lanes::{Element, Lanes};
use crate::kernels::linear::{Isa, LANES, padded};

/// Where the keys and values of one layer of one rank lie in a page: `[kv_heads, page_len, head_dim]` of each, elements of the
/// cache's type packed into words.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KvShape {
    pub kv: KvType,
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl KvShape {
    /// Words of the keys (or of the values) of one layer of one rank in a page.
    pub(crate) fn words(self) -> usize {
        self.kv_heads * BLOCK * self.head_dim
    }

    /// First element of the vector of `head` at a position of the page.
    fn element(self, head: usize, position: usize) -> usize {
        (head * self.kv.page_len() + position) * self.head_dim
    }
}

/// Stores one position's keys (or values), `[kv_heads, head_dim]`, in its page.
pub(crate) fn store_kv(shape: KvShape, page: &mut [u32], position: usize, x: &[f32]) {
    for (head, x) in x.chunks_exact(shape.head_dim).enumerate() {
        let at = shape.element(head, position);
        match shape.kv {
            KvType::F32 => bytemuck::cast_slice_mut::<u32, f32>(page)[at..at + x.len()].copy_from_slice(x),
            KvType::F16 => {
                let page = &mut bytemuck::cast_slice_mut::<u32, f16>(page)[at..at + x.len()];
                // What f16 can't hold becomes the largest that it can, as in the shader.
                page.iter_mut().zip(x).for_each(|(p, v)| *p = f16::from_f32(v.clamp(-65504.0, 65504.0)));
            }
        }
    }
}

/// `y = softmax(q k^T / sqrt(head_dim)) v` for one query head, over positions `from..=to`.
///
/// `page(i)` gives the keys and values of the sequence's i-th page, counted from position 0. Positions are taken in order, in
/// blocks of 64 that start at multiples of 64, so that the bits depend on nothing but the row: a score is a dot product in 16 lanes, as in
/// [`linear`](crate::kernels::linear); every element of `y` adds up as positions rise; the weights of a block are added in 16 lanes, the blocks in order.
pub(crate) fn attend<'p>(
    shape: KvShape,
    head: usize,
    q: &[f32],
    from: usize,
    to: usize,
    page: impl Fn(usize) -> (&'p [u32], &'p [u32]),
    y: &mut [f32],
) {
    let query = Query { shape, head, q, positions: from..to + 1 };
    match shape.kv {
        KvType::F32 => dispatch::<f32>(Isa::best(), query, page, y),
        KvType::F16 => dispatch::<f16>(Isa::best(), query, page, y),
    }
}

/// One query head and what it attends to.
struct Query<'a> {
    shape: KvShape,
    head: usize,
    q: &'a [f32],
    positions: Range<usize>,
}

fn dispatch<'p, E: Element + Pod>(isa: Isa, query: Query<'_>, page: impl Fn(usize) -> (&'p [u32], &'p [u32]), y: &mut [f32]) {
    // SAFETY: `Isa::available` lists only what the CPU has.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::<E>(query, page, y),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::<E>(query, page, y),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => blocks::<[std::arch::aarch64::float32x4_t; 4], E>(query, page, y),
            Isa::Portable => blocks::<[f32; 16], E>(query, page, y),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl")]
unsafe fn avx512<'p, E: Element + Pod>(query: Query<'_>, page: impl Fn(usize) -> (&'p [u32], &'p [u32]), y: &mut [f32]) {
    unsafe { blocks::<std::arch::x86_64::__m512, E>(query, page, y) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<'p, E: Element + Pod>(query: Query<'_>, page: impl Fn(usize) -> (&'p [u32], &'p [u32]), y: &mut [f32]) {
    unsafe { blocks::<[std::arch::x86_64::__m256; 2], E>(query, page, y) }
}

/// All scores first, block by block, then the weighted values likewise.
#[inline(always)]
unsafe fn blocks<'p, L: Lanes, E: Element + Pod>(query: Query<'_>, page: impl Fn(usize) -> (&'p [u32], &'p [u32]), y: &mut [f32]) {
    let Query { shape, head, q, positions } = query;
    let (page_len, head_dim) = (shape.kv.page_len(), shape.head_dim);
    let scale = 1.0 / (head_dim as f32).sqrt();
    let first = positions.start / BLOCK;
    let blocks = first..positions.end.div_ceil(BLOCK);
    // The slots of a block that are seen, and where its vectors begin in the page.
    let slots = |block: usize| positions.start.max(block * BLOCK) - block * BLOCK..positions.end.min((block + 1) * BLOCK) - block * BLOCK;
    let at = |block: usize| shape.element(head, block * BLOCK % page_len);
    // Zeros outside of what is seen weigh nothing.
    let mut weights = vec![[0.0f32; BLOCK]; blocks.len()];
    let mut max = f32::NEG_INFINITY;
    for (block, weights) in blocks.clone().zip(&mut weights) {
        let keys: &[E] = &bytemuck::cast_slice(page(block * BLOCK / page_len).0)[at(block)..][..BLOCK * head_dim];
        unsafe { scores::<L, E>(keys, q, slots(block), weights) };
        for score in &mut weights[slots(block)] {
            *score *= scale;
            max = max.max(*score);
        }
    }
    let mut sum = 0.0f32;
    y.fill(0.0);
    for (block, weights) in blocks.zip(&mut weights) {
        // A block's sum is formed first and then added: long contexts lose less.
        weights[slots(block)].iter_mut().for_each(|w| *w = exp(*w - max));
        unsafe {
            let mut lanes = L::zero();
            for at in (0..BLOCK).step_by(LANES) {
                lanes = lanes.fma(L::load_f32(weights.as_ptr().add(at)), L::splat(1.0));
            }
            sum += lanes.sum();
            let values: &[E] = &bytemuck::cast_slice(page(block * BLOCK / page_len).1)[at(block)..][..BLOCK * head_dim];
            add_values::<L, E>(values, weights, slots(block), y);
        }
    }
    y.iter_mut().for_each(|y| *y /= sum);
}

/// Keys of a block whose dot products are formed together.
const TOGETHER: usize = 8;

/// `scores[slot] = keys[slot] . q` for the slots of a block.
#[inline(always)]
#[expect(clippy::needless_range_loop)] // all sides are indexed alike
unsafe fn scores<L: Lanes, E: Element>(keys: &[E], q: &[f32], slots: Range<usize>, scores: &mut [f32; BLOCK]) {
    let n = q.len();
    let whole = n - n % LANES;
    assert!(keys.len() == BLOCK * n && slots.end <= BLOCK);
    for slot in slots.clone().step_by(TOGETHER) {
        unsafe {
            let mut sums = [L::zero(); TOGETHER];
            // Past the end the last key is repeated.
            let mut key = [keys.as_ptr(); TOGETHER];
            for i in 0..TOGETHER {
                key[i] = keys.as_ptr().add((slot + i).min(slots.end - 1) * n);
            }
            for k in (0..whole).step_by(LANES) {
                let qk = L::load_f32(q.as_ptr().add(k));
                for i in 0..TOGETHER {
                    sums[i] = sums[i].fma(E::load(key[i].add(k)), qk);
                }
            }
            if whole < n {
                let qk = L::load_f32(padded(&q[whole..]).as_ptr());
                for i in 0..TOGETHER {
                    let tail = std::slice::from_raw_parts(key[i].add(whole), n - whole);
                    sums[i] = sums[i].fma(E::load(padded(tail).as_ptr()), qk);
                }
            }
            let mut dots = [0.0; TOGETHER];
            L::add_sums(&sums, &mut dots);
            let seen = TOGETHER.min(slots.end - slot);
            scores[slot..slot + seen].copy_from_slice(&dots[..seen]);
        }
    }
}

/// Vectors of 16 elements of y that add up together, so that none waits for its last sum.
const ABREAST: usize = 4;

/// `y += weights[slot] * values[slot]` for the slots of a block, in order.
#[inline(always)]
#[expect(clippy::needless_range_loop)] // all sides are indexed alike
unsafe fn add_values<L: Lanes, E: Element>(values: &[E], weights: &[f32; BLOCK], slots: Range<usize>, y: &mut [f32]) {
    let n = y.len();
    assert!(values.len() == BLOCK * n && slots.end <= BLOCK);
    let mut k = 0;
    while k + ABREAST * LANES <= n {
        unsafe {
            let mut sums = [L::zero(); ABREAST];
            for j in 0..ABREAST {
                sums[j] = L::load_f32(y.as_ptr().add(k + j * LANES));
            }
            for slot in slots.clone() {
                let (weight, value) = (L::splat(weights[slot]), values.as_ptr().add(slot * n + k));
                for j in 0..ABREAST {
                    sums[j] = sums[j].fma(weight, E::load(value.add(j * LANES)));
                }
            }
            for j in 0..ABREAST {
                sums[j].store(y.as_mut_ptr().add(k + j * LANES));
            }
        }
        k += ABREAST * LANES;
    }
    while k < n {
        let end = n.min(k + LANES);
        unsafe {
            let mut sum = L::load_f32(padded(&y[k..end]).as_ptr());
            for slot in slots.clone() {
                let value = padded(&values[slot * n + k..slot * n + end]);
                sum = sum.fma(L::splat(weights[slot]), E::load(value.as_ptr()));
            }
            let mut out = [0.0; LANES];
            sum.store(out.as_mut_ptr());
            y[k..end].copy_from_slice(&out[..end - k]);
        }
        k = end;
    }
}

/// e^x for x <= 0, within 2 units of the last place, as the compiler can vectorise it: 2^n e^r with |r| <= ln(2) / 2, the polynomial of Cephes'
/// expf (Moshier 1989). What f32 holds only as a subnormal becomes 0.
#[inline(always)]
#[expect(clippy::excessive_precision)] // as published
fn exp(x: f32) -> f32 {
    let n = (x * std::f32::consts::LOG2_E).max(-126.0).round_ties_even();
    let r = x - n * 0.693_359_375 + n * 2.121_944_4e-4;
    let p = 1.987_569_15e-4;
    let p = p * r + 1.398_199_95e-3;
    let p = p * r + 8.333_451_9e-3;
    let p = p * r + 4.166_579_59e-2;
    let p = p * r + 1.666_666_55e-1;
    let p = p * r + 5.000_000_12e-1;
    let e = p * r * r + r + 1.0;
    let power = f32::from_bits(((n as i32 + 127) as u32) << 23);
    if x < -87.0 { 0.0 } else { e * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition in f64, over a window that begins and ends anywhere, on every instruction set.
    #[test]
    fn every_instruction_set_attends_on_odd_sizes_and_windows() {
        let value = |i: usize| ((i * 7919 % 2003) as f32 / 1001.0 - 1.0) * 2.0;
        for kv in [KvType::F32, KvType::F16] {
            for head_dim in [2, 16, 20, 64, 80, 128] {
                let shape = KvShape { kv, kv_heads: 2, head_dim };
                let pages: Vec<[Vec<u32>; 2]> = (0..4)
                    .map(|page| {
                        [0, 1].map(|which| {
                            let mut words = vec![0; shape.words()];
                            for position in 0..kv.page_len() {
                                let x: Vec<f32> =
                                    (0..2 * head_dim).map(|i| value((page * 991 + position * 131 + which) * 257 + i)).collect();
                                store_kv(shape, &mut words, position, &x);
                            }
                            words
                        })
                    })
                    .collect();
                let page = |i: usize| (&pages[i][0][..], &pages[i][1][..]);
                let vector = |which: usize, position: usize, i: usize| -> f64 {
                    let (words, at) = (&pages[position / kv.page_len()][which], shape.element(1, position % kv.page_len()) + i);
                    match kv {
                        KvType::F32 => f64::from(bytemuck::cast_slice::<u32, f32>(words)[at]),
                        KvType::F16 => bytemuck::cast_slice::<u32, f16>(words)[at].to_f64(),
                    }
                };
                let q: Vec<f32> = (0..head_dim).map(|i| value(i + 5)).collect();
                for (from, to) in [(0, 0), (0, 63), (3, 64), (0, 200), (61, 67), (130, 255)] {
                    let scores: Vec<f64> = (from..=to)
                        .map(|p| (0..head_dim).map(|i| vector(0, p, i) * f64::from(q[i])).sum::<f64>() / (head_dim as f64).sqrt())
                        .collect();
                    let max = scores.iter().copied().fold(f64::MIN, f64::max);
                    let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                    for isa in Isa::available() {
                        let mut y = vec![f32::NAN; head_dim];
                        let query = Query { shape, head: 1, q: &q, positions: from..to + 1 };
                        match kv {
                            KvType::F32 => dispatch::<f32>(isa, query, page, &mut y),
                            KvType::F16 => dispatch::<f16>(isa, query, page, &mut y),
                        }
                        for (i, y) in y.iter().enumerate() {
                            let want: f64 = (from..=to).zip(&scores).map(|(p, s)| (s - max).exp() / sum * vector(1, p, i)).sum();
                            assert!((f64::from(*y) - want).abs() < 1e-5, "{isa:?} {kv:?} {head_dim} {from}..={to}: {y} is not {want}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_exponential_is_right_to_the_last_places_and_ends_at_zero() {
        for i in 0..200_000 {
            let x = -(i as f32) * 5e-4;
            let (found, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((found - want).abs() <= 2.5e-7 * want + 1e-37, "e^{x} is {want}, not {found}");
        }
        assert_eq!((exp(0.0), exp(-0.0), exp(-1000.0), exp(f32::NEG_INFINITY)), (1.0, 1.0, 0.0, 0.0));
    }

    #[test]
    fn what_f16_cannot_hold_becomes_the_largest_that_it_can() {
        let shape = KvShape { kv: KvType::F16, kv_heads: 1, head_dim: 2 };
        let mut page = vec![0; shape.words()];
        store_kv(shape, &mut page, 5, &[1e9, -1e9]);
        let stored = &bytemuck::cast_slice::<u32, f16>(&page)[10..12];
        assert_eq!(stored, [f16::MAX, f16::MIN]);
    }
}
