//! Attention over paged keys and values, a tile of queries at a time.
//!
//! The queries of a tile share a KV head and a sequence: the heads of a group, in neighbouring rows. A block of keys and values is
//! read once for all of them. The order of additions is fixed for each query alone, so that the same bits come out with any tile, batch
//! and number of threads: positions are cut, from 0, into blocks of 64 and stretches of 512. A score adds up as the elements of the head
//! rise. Within a stretch the blocks follow each other, the largest score so far being the reference: where it grows, what was summed is
//! scaled down. The weights are summed in 16 lanes (position mod 16), y as positions rise. Then the stretches are merged in order.
//! What a query doesn't see adds nothing, not even a zero.

use std::ops::Range;
use std::sync::OnceLock;

use bytemuck::Pod;
use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::backend::{BLOCK, KvType, Seq};
use crate::kernels::linear::Isa;
use crate::kernels::memory::Words;
use crate::kernels::parallel::WorkStealingStats;
use crate::kernels::pool::{for_each, threads};

mod tile;

use tile::{Partial, attend_stretch};

/// Most queries of a tile.
pub(crate) const QUERIES: usize = 16;

/// Positions that one thread takes in one go; their partial results are merged in order.
const STRETCH: usize = 512;

/// Pieces of work that each thread should get: more balance better and cost more.
const PIECES: usize = 4;

/// Fewest multiplications of a piece that are worth spreading over threads.
const SMALL: usize = 1 << 15;

/// Where the keys and values of one layer of one rank lie in a page, elements of the cache's type packed into words: values as
/// `[kv_heads, page_len, head_dim]`, keys as `[kv_heads, page_len / 64, head_dim, 64]`, so that the scores of 16 positions are formed side by side.
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

    /// Elements of a head's block of keys or of values.
    fn block(self) -> usize {
        BLOCK * self.head_dim
    }

    /// First element of the block of `head` that holds a position of the page.
    fn block_at(self, head: usize, position: usize) -> usize {
        (head * self.kv.page_len() / BLOCK + position / BLOCK) * self.block()
    }
}

/// Stores one position's keys and values, `[kv_heads, head_dim]` each, in their page.
pub(crate) fn store_kv(shape: KvShape, keys: &mut [u32], values: &mut [u32], position: usize, k: &[f32], v: &[f32]) {
    match shape.kv {
        KvType::F32 => store::<f32>(shape, keys, values, position, k, v, |to, x| to.copy_from_slice(x)),
        KvType::F16 => store::<f16>(shape, keys, values, position, k, v, |to, x| {
            // What f16 can't hold becomes the largest that it can, as in the shader.
            let mut held = [0.0; BLOCK];
            held.iter_mut().zip(x).for_each(|(held, x)| *held = x.clamp(-65504.0, 65504.0));
            to.convert_from_f32_slice(&held[..x.len()]);
        }),
    }
}

/// `convert` takes 64 elements at most.
fn store<E: Pod>(
    shape: KvShape,
    keys: &mut [u32],
    values: &mut [u32],
    position: usize,
    k: &[f32],
    v: &[f32],
    convert: impl Fn(&mut [E], &[f32]),
) {
    let (keys, values) = (bytemuck::cast_slice_mut::<u32, E>(keys), bytemuck::cast_slice_mut::<u32, E>(values));
    let slot = position % BLOCK;
    for (head, (k, v)) in k.chunks_exact(shape.head_dim).zip(v.chunks_exact(shape.head_dim)).enumerate() {
        let at = shape.block_at(head, position);
        let (keys, values) = (&mut keys[at..][..shape.block()], &mut values[at..][..shape.block()]);
        let values = &mut values[slot * shape.head_dim..][..shape.head_dim];
        for (to, v) in values.chunks_mut(BLOCK).zip(v.chunks(BLOCK)) {
            convert(to, v);
        }
        let mut converted = [E::zeroed(); BLOCK];
        for (to, k) in keys.chunks_mut(BLOCK * BLOCK).zip(k.chunks(BLOCK)) {
            convert(&mut converted[..k.len()], k);
            for (to, k) in to.chunks_exact_mut(BLOCK).zip(converted) {
                to[slot] = k;
            }
        }
    }
}

/// The keys and values of one sequence in one layer of one rank.
#[derive(Clone, Copy)]
pub(crate) struct Cache<'a> {
    pub shape: KvShape,
    /// Every page of the place.
    pub pages: &'a [Words],
    /// Words of a page before the layer's keys; its values follow.
    pub offset: usize,
    pub seq: &'a Seq,
}

impl<'a> Cache<'a> {
    /// A head's keys `[head_dim, 64]` and values `[64, head_dim]` of the block's positions.
    fn block<E: Pod>(&self, head: usize, block: usize) -> [&'a [E]; 2] {
        let (shape, position) = (self.shape, block * BLOCK);
        let page = self.seq.pages[position / shape.kv.page_len() - self.seq.first_page as usize];
        let at = shape.block_at(head, position % shape.kv.page_len());
        [0, 1].map(|which| {
            let words = &self.pages[page as usize][self.offset + which * shape.words()..][..shape.words()];
            &bytemuck::cast_slice(words)[at..][..shape.block()]
        })
    }
}

/// Queries that share a KV head and a sequence, [`QUERIES`] at most.
pub(crate) struct Tile<'a> {
    pub cache: Cache<'a>,
    pub kv_head: usize,
    /// Of each row its queries, `[heads, head_dim]` with as many heads in each, and the positions that they see: at least one.
    pub rows: Vec<(&'a [f32], Range<usize>)>,
}

impl Tile<'_> {
    /// The positions that each query sees, row by row.
    fn seen(&self) -> impl Iterator<Item = Range<usize>> {
        let head_dim = self.cache.shape.head_dim;
        self.rows.iter().flat_map(move |(q, seen)| (0..q.len() / head_dim).map(|_| seen.clone()))
    }

    /// The queries one by one, times `scale`: `[queries, head_dim]`.
    fn queries(&self, scale: f32) -> Vec<f32> {
        self.rows.iter().flat_map(|(q, _)| q.iter().map(|q| q * scale)).collect()
    }

    /// All that some query sees.
    fn positions(&self) -> Range<usize> {
        let (from, to) = self.rows.iter().fold((usize::MAX, 0), |(from, to), (_, seen)| (from.min(seen.start), to.max(seen.end)));
        from..to
    }

    /// The stretches that these positions touch.
    fn stretches(&self) -> Range<usize> {
        let positions = self.positions();
        positions.start / STRETCH..positions.end.div_ceil(STRETCH)
    }

    /// Multiplications, those of the softmax aside.
    fn work(&self) -> usize {
        self.rows.iter().map(|(q, seen)| 2 * q.len() * seen.len()).sum()
    }
}

/// Calls `put(tile, query, y)` for every query of every tile, counted row by row: `y = softmax(q k^T / sqrt(head_dim)) v` over what its row sees.
/// The tasks are added to `stats`.
pub(crate) fn attend(tiles: &[Tile<'_>], stats: &WorkStealingStats, put: impl Fn(usize, usize, &[f32]) + Sync) {
    attend_on(Isa::best(), threads(), tiles, stats, put);
}

/// Stretches of a tile, which one thread takes in order.
#[derive(Debug, PartialEq, Eq)]
struct Piece {
    tile: usize,
    stretches: Range<usize>,
    /// Whether there are others of this tile.
    split: bool,
}

/// Tiles whole, unless they are more than a piece's share of the work.
fn cut(tiles: &[Tile<'_>], threads: usize) -> Vec<Piece> {
    let total: usize = tiles.iter().map(Tile::work).sum();
    let share = if threads == 1 { usize::MAX } else { total.div_ceil(threads * PIECES).max(SMALL) };
    let pieces = tiles.iter().enumerate().flat_map(|(tile, t)| {
        let all = t.stretches();
        let parts = t.work().div_ceil(share).clamp(1, all.len());
        let border = move |i: usize| all.start + all.len() * i / parts;
        (0..parts).map(move |i| Piece { tile, stretches: border(i)..border(i + 1), split: parts > 1 })
    });
    pieces.collect()
}

fn attend_on(isa: Isa, threads: usize, tiles: &[Tile<'_>], stats: &WorkStealingStats, put: impl Fn(usize, usize, &[f32]) + Sync) {
    let pieces = cut(tiles, threads);
    // A split tile's partial results, by stretch.
    let mut parts: Vec<Vec<OnceLock<Partial>>> = tiles.iter().map(|_| Vec::new()).collect();
    for piece in pieces.iter().filter(|piece| piece.split) {
        parts[piece.tile].extend(piece.stretches.clone().map(|_| OnceLock::new()));
    }
    let work: usize = tiles.iter().map(Tile::work).sum();
    let spread = |n: usize, task: &(dyn Fn(usize) + Sync)| {
        let counted = |i: usize, stolen: bool| {
            stats.count(stolen);
            task(i);
        };
        if work < SMALL { (0..n).for_each(|i| counted(i, false)) } else { for_each(n, counted) }
    };
    spread(pieces.len(), &|i| {
        let Piece { tile, stretches, split } = &pieces[i];
        let (tile, parts, first) = (&tiles[*tile], &parts[*tile], tiles[*tile].stretches().start);
        // 2^x is cheaper than e^x.
        let scale = std::f32::consts::LOG2_E / (tile.cache.shape.head_dim as f32).sqrt();
        let queries = tile.queries(scale);
        let mut total = Partial::new(tile);
        for stretch in stretches.clone() {
            let part = attend_stretch(isa, tile, &queries, stretch * STRETCH..(stretch + 1) * STRETCH);
            if *split {
                parts[stretch - first].get_or_init(|| part);
            } else {
                total.merge(&part);
            }
        }
        if !split {
            total.finish(|query, y| put(pieces[i].tile, query, y));
        }
    });
    let split: Vec<usize> = (0..tiles.len()).filter(|&tile| !parts[tile].is_empty()).collect();
    spread(split.len(), &|i| {
        let mut total = Partial::new(&tiles[split[i]]);
        parts[split[i]].iter().filter_map(OnceLock::get).for_each(|part| total.merge(part));
        total.finish(|query, y| put(split[i], query, y));
    });
}

#[cfg(test)]
mod tests;
