//! Attention over paged keys and values, a query head at a time.

use half::f16;

use crate::backend::{BLOCK, KvType};

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
/// blocks of 64 that start at multiples of 64, so that the bits depend on nothing but the row.
pub(crate) fn attend<'p>(
    shape: KvShape,
    head: usize,
    q: &[f32],
    from: usize,
    to: usize,
    page: impl Fn(usize) -> (&'p [u32], &'p [u32]),
    y: &mut [f32],
) {
    let scale = 1.0 / (shape.head_dim as f32).sqrt();
    let page_len = shape.kv.page_len();
    let score = |position: usize| {
        let (keys, _) = page(position / page_len);
        scale * dot(shape.kv, keys, shape.element(head, position % page_len), q)
    };
    let scores: Vec<f32> = (from..=to).map(score).collect();
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0f32;
    y.fill(0.0);
    // A block's sum is formed first and then added: long contexts lose less.
    let mut position = from;
    while position <= to {
        let end = (position / BLOCK * BLOCK + BLOCK - 1).min(to);
        let mut block = 0.0f32;
        for p in position..=end {
            let weight = (scores[p - from] - max).exp();
            block += weight;
            let at = shape.element(head, p % page_len);
            let (_, values) = page(p / page_len);
            accumulate(shape.kv, values, at, weight, y);
        }
        sum += block;
        position = end + 1;
    }
    y.iter_mut().for_each(|y| *y /= sum);
}

fn dot(kv: KvType, words: &[u32], at: usize, q: &[f32]) -> f32 {
    // Eight sums, which the compiler turns into one vector.
    fn sums(q: &[f32], key: impl Fn(usize) -> f32) -> f32 {
        let mut sum = [0.0f32; 8];
        let whole = q.len() - q.len() % 8;
        for i in (0..whole).step_by(8) {
            for l in 0..8 {
                sum[l] += q[i + l] * key(i + l);
            }
        }
        for i in whole..q.len() {
            sum[i - whole] += q[i] * key(i);
        }
        (sum[0] + sum[4]) + (sum[1] + sum[5]) + ((sum[2] + sum[6]) + (sum[3] + sum[7]))
    }
    match kv {
        KvType::F32 => {
            let key = &bytemuck::cast_slice::<u32, f32>(words)[at..at + q.len()];
            sums(q, |i| key[i])
        }
        KvType::F16 => {
            let key = &bytemuck::cast_slice::<u32, f16>(words)[at..at + q.len()];
            sums(q, |i| key[i].to_f32())
        }
    }
}

fn accumulate(kv: KvType, words: &[u32], at: usize, weight: f32, y: &mut [f32]) {
    match kv {
        KvType::F32 => {
            let value = &bytemuck::cast_slice::<u32, f32>(words)[at..at + y.len()];
            y.iter_mut().zip(value).for_each(|(y, v)| *y += weight * v);
        }
        KvType::F16 => {
            let value = &bytemuck::cast_slice::<u32, f16>(words)[at..at + y.len()];
            y.iter_mut().zip(value).for_each(|(y, v)| *y += weight * v.to_f32());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_f16_cannot_hold_becomes_the_largest_that_it_can() {
        let shape = KvShape { kv: KvType::F16, kv_heads: 1, head_dim: 2 };
        let mut page = vec![0; shape.words()];
        store_kv(shape, &mut page, 5, &[1e9, -1e9]);
        let stored = &bytemuck::cast_slice::<u32, f16>(&page)[10..12];
        assert_eq!(stored, [f16::MAX, f16::MIN]);
    }
}
