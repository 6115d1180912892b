use std::sync::Mutex;
use std::sync::atomic::Ordering::Relaxed;

use super::*;
use crate::kernels::memory::Words;
use crate::kernels::pool::Pool;

const KV_HEADS: usize = 2;

fn value(i: usize) -> f32 {
    ((i * 7919 % 2003) as f32 / 1001.0 - 1.0) * 2.0
}

/// A sequence whose pages lie backwards, those in front of its window being gone, behind other words in each page.
struct Sequence {
    shape: KvShape,
    pages: Vec<Words>,
    seq: Seq,
}

const OFFSET: usize = 24;

impl Sequence {
    fn new(kv: KvType, head_dim: usize, positions: Range<usize>) -> Self {
        let shape = KvShape { kv, kv_heads: KV_HEADS, head_dim };
        let first_page = positions.start / kv.page_len();
        let n = positions.end.div_ceil(kv.page_len()) - first_page;
        // What nobody stored must not matter: it is not a number.
        let page = |_| {
            let mut page = Words::zeroed(OFFSET + 2 * shape.words()).unwrap();
            page.fill(u32::MAX);
            page
        };
        let mut pages: Vec<Words> = (0..=n).map(page).collect();
        let seq = Seq { pages: (1..=n as u32).rev().collect(), first_page: first_page as u32 };
        for position in positions {
            let page = &mut pages[seq.pages[position / kv.page_len() - first_page] as usize][OFFSET..];
            let (keys, values) = page.split_at_mut(shape.words());
            let [k, v] =
                [0, 1].map(|which| (0..KV_HEADS * head_dim).map(|i| value((position * 131 + which) * 257 + i)).collect::<Vec<_>>());
            store_kv(shape, keys, values, position % kv.page_len(), &k, &v);
        }
        Self { shape, pages, seq }
    }

    fn cache(&self) -> Cache<'_> {
        Cache { shape: self.shape, pages: &self.pages, offset: OFFSET, seq: &self.seq }
    }

    /// As stored.
    fn vector(&self, which: usize, position: usize, head: usize) -> Vec<f64> {
        let of = |i: usize| {
            let v = value((position * 131 + which) * 257 + head * self.shape.head_dim + i);
            if self.shape.kv == KvType::F16 { f16::from_f32(v).to_f64() } else { f64::from(v) }
        };
        (0..self.shape.head_dim).map(of).collect()
    }

    /// The definition, in f64.
    fn attend(&self, head: usize, q: &[f32], seen: Range<usize>) -> Vec<f64> {
        let dot = |k: Vec<f64>| k.iter().zip(q).map(|(k, q)| k * f64::from(*q)).sum::<f64>() / (q.len() as f64).sqrt();
        let scores: Vec<f64> = seen.clone().map(|p| dot(self.vector(0, p, head))).collect();
        let max = scores.iter().copied().fold(f64::MIN, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        let mut y = vec![0.0; q.len()];
        for (p, score) in seen.zip(scores) {
            let weight = (score - max).exp() / sum;
            y.iter_mut().zip(self.vector(1, p, head)).for_each(|(y, v)| *y += weight * v);
        }
        y
    }
}

/// The queries of `heads` heads in each row, some of them large enough for the largest score to stand out.
fn queries(rows: usize, heads: usize, head_dim: usize) -> Vec<f32> {
    (0..rows * heads * head_dim).map(|i| value(i * 3 + 5) * (1 + i / head_dim % 3) as f32).collect()
}

/// y of every query of every tile.
fn outputs(isa: Isa, threads: usize, tiles: &[Tile<'_>]) -> Vec<Vec<Vec<f32>>> {
    let found: Vec<_> = tiles.iter().map(|tile| Mutex::new(vec![Vec::new(); tile.seen().count()])).collect();
    let put = |tile: usize, query: usize, y: &[f32]| {
        let before = std::mem::replace(&mut found[tile].lock().unwrap()[query], y.to_vec());
        assert!(before.is_empty(), "query {query} of tile {tile} comes twice");
    };
    let stats = WorkStealingStats::new();
    Pool::new(Some(threads)).unwrap().enter(|| attend_on(isa, threads, tiles, &stats, put));
    let [created, local, stolen] = [&stats.tasks_created, &stats.local_tasks, &stats.stolen_tasks].map(|n| n.load(Relaxed));
    assert!(created == local + stolen && created >= tiles.len() && (threads > 1 || stolen == 0), "{stats:?}");
    found.into_iter().map(|y| y.into_inner().unwrap()).collect()
}

/// Rows in one tile that end at these positions, with a window.
fn tile<'a>(s: &'a Sequence, q: &'a [f32], heads: usize, ends: &[usize], window: usize) -> Tile<'a> {
    let rows = ends.iter().zip(q.chunks_exact(heads * s.shape.head_dim));
    let rows = rows.map(|(&end, q)| (q, end.saturating_sub(window)..end)).collect();
    Tile { cache: s.cache(), kv_head: 1, rows }
}

/// Rows that share a block, cross blocks, pages and stretches, and whose windows begin in their midst.
const CASES: [(&[usize], usize); 8] = [
    (&[1], 9999),
    (&[64], 64),
    (&[63, 64, 65], 9999),
    (&[201, 202, 203, 204, 205], 130),
    (&[66, 67, 68, 69, 70, 71, 72, 73], 7),
    (&[126, 127, 128, 129, 130, 131], 9999),
    (&[510, 511, 512, 513, 514], 450),
    (&[1085, 1086, 1087, 1088], 1030),
];

#[test]
fn every_instruction_set_attends_on_odd_sizes_and_windows() {
    for kv in [KvType::F32, KvType::F16] {
        for head_dim in [2, 16, 20, 64, 80, 128] {
            for (ends, window) in CASES {
                let heads = QUERIES / ends.len().next_power_of_two() - usize::from(ends.len() == 1);
                let s = Sequence::new(kv, head_dim, ends[0].saturating_sub(window)..ends[ends.len() - 1]);
                let q = queries(ends.len(), heads, head_dim);
                let tile = tile(&s, &q, heads, ends, window);
                let want: Vec<_> = q.chunks_exact(head_dim).zip(tile.seen()).map(|(q, seen)| s.attend(1, q, seen)).collect();
                for isa in Isa::available() {
                    for (query, y) in outputs(isa, 1, std::slice::from_ref(&tile))[0].iter().enumerate() {
                        for (y, want) in y.iter().zip(&want[query]) {
                            let case = format!("{isa:?} {kv:?} {head_dim}, rows to {ends:?}, window {window}, query {query}");
                            assert!((f64::from(*y) - want).abs() < 1e-5, "{case}: {y} is not {want}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn the_bits_depend_on_neither_tile_nor_threads() {
    for kv in [KvType::F32, KvType::F16] {
        for (head_dim, heads) in [(20, 1), (64, 2), (80, 3)] {
            for (ends, window) in CASES {
                let heads = heads.min(QUERIES / ends.len());
                let s = Sequence::new(kv, head_dim, ends[0].saturating_sub(window)..ends[ends.len() - 1]);
                let q = queries(ends.len(), heads, head_dim);
                let whole = || tile(&s, &q, heads, ends, window);
                let each = |row: usize| Tile { rows: vec![whole().rows[row].clone()], ..whole() };
                for isa in Isa::available() {
                    let want: Vec<Vec<f32>> = (0..ends.len()).flat_map(|row| outputs(isa, 1, &[each(row)]).remove(0)).collect();
                    for head in 0..heads {
                        let alone = Tile { rows: vec![(&q[head * head_dim..][..head_dim], whole().rows[0].1.clone())], ..whole() };
                        assert_eq!(outputs(isa, 1, &[alone])[0][0], want[head], "{isa:?} {kv:?} {head_dim}, {ends:?}: one head alone");
                    }
                    for threads in [1, 3, 64] {
                        let found = outputs(isa, threads, &[whole(), each(0), whole()]);
                        let case = format!("{isa:?} {kv:?} {head_dim}, rows to {ends:?}, window {window}, {threads} threads");
                        assert!(found[0] == want && found[2] == want && found[1][..] == want[..heads], "{case}");
                    }
                }
            }
        }
    }
}

#[test]
fn what_a_later_row_holds_never_reaches_an_earlier_one() {
    let finite = Sequence::new(KvType::F32, 16, 0..90);
    let mut s = Sequence::new(KvType::F32, 16, 0..90);
    let page = &mut s.pages[s.seq.pages[1] as usize][OFFSET..];
    let (keys, values) = page.split_at_mut(s.shape.words());
    store_kv(s.shape, keys, values, 82 - 64, &[f32::INFINITY; 32], &[f32::NAN; 32]);
    let q = queries(4, 1, 16);
    let found = outputs(Isa::best(), 1, &[tile(&s, &q, 1, &[81, 82, 83, 84], 99)]).remove(0);
    assert_eq!(found[..2], outputs(Isa::best(), 1, &[tile(&finite, &q, 1, &[81, 82], 99)])[0][..]);
    assert!(found[2..].iter().flatten().all(|y| y.is_nan()));
}

#[test]
fn long_tiles_are_split_by_stretches_where_they_are_few() {
    let s = Sequence::new(KvType::F16, 64, 3000..4000);
    let q = queries(1, 2, 64);
    let one = |from: usize| Tile { cache: s.cache(), kv_head: 0, rows: vec![(&q, from..4000)] };
    let cuts =
        |tiles: &[Tile<'_>], threads| -> Vec<_> { cut(tiles, threads).into_iter().map(|p| (p.tile, p.stretches, p.split)).collect() };
    assert_eq!(cuts(&[one(3000)], 1), [(0, 5..8, false)]);
    assert_eq!(cuts(&[one(3000)], 2), [(0, 5..6, true), (0, 6..7, true), (0, 7..8, true)]);
    // Beside a long one a short one is left whole.
    assert_eq!(cuts(&[one(3990), one(3000)], 2), [(0, 7..8, false), (1, 5..6, true), (1, 6..7, true), (1, 7..8, true)]);
    // Many need no splitting.
    let many: Vec<_> = (0..20).map(|_| one(3000)).collect();
    assert!(cut(&many, 2).iter().all(|piece| !piece.split));
}

#[test]
fn what_f16_cannot_hold_becomes_the_largest_that_it_can() {
    let shape = KvShape { kv: KvType::F16, kv_heads: 1, head_dim: 2 };
    let (mut keys, mut values) = (vec![0; shape.words()], vec![0; shape.words()]);
    store_kv(shape, &mut keys, &mut values, 69, &[1e9, -1e9], &[-1e9, 1e9]);
    let (keys, values) = (bytemuck::cast_slice::<u32, f16>(&keys), bytemuck::cast_slice::<u32, f16>(&values));
    assert_eq!([keys[128 + 5], keys[128 + 64 + 5]], [f16::MAX, f16::MIN]);
    assert_eq!(values[138..140], [f16::MIN, f16::MAX]);
}
