//! Attention over paged keys and values, a query head at a time.

use half::f16;
use half::slice::HalfFloatSliceExt;

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

    /// The vector from element `at` of a page: where it lies in f32, otherwise converted into `widened`.
    fn vector<'a>(self, page: &'a [u32], at: usize, widened: &'a mut [f32]) -> &'a [f32] {
        match self.kv {
            KvType::F32 => &bytemuck::cast_slice(page)[at..at + self.head_dim],
            KvType::F16 => {
                let half: &[f16] = &bytemuck::cast_slice(page)[at..at + self.head_dim];
                half.convert_to_f32_slice(widened);
                widened
            }
        }
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
    let mut widened = vec![0.0; shape.head_dim];
    let score = |position: usize| {
        let (keys, _) = page(position / page_len);
        scale * dot(shape.vector(keys, shape.element(head, position % page_len), &mut widened), q)
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
            let value = shape.vector(values, at, &mut widened);
            y.iter_mut().zip(value).for_each(|(y, v)| *y += weight * v);
        }
        sum += block;
        position = end + 1;
    }
    y.iter_mut().for_each(|y| *y /= sum);
}

/// `key . q`, in eight sums, which the compiler turns into one vector.
fn dot(key: &[f32], q: &[f32]) -> f32 {
    let mut sum = [0.0f32; 8];
    let whole = q.len() - q.len() % 8;
    for i in (0..whole).step_by(8) {
        for l in 0..8 {
            sum[l] += q[i + l] * key[i + l];
        }
    }
    for i in whole..q.len() {
        sum[i - whole] += q[i] * key[i];
    }
    (sum[0] + sum[4]) + (sum[1] + sum[5]) + ((sum[2] + sum[6]) + (sum[3] + sum[7]))
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
