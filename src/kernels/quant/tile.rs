//! [`TileAt`]: a tile as the kernels go through it.

use std::ops::Range;

use half::f16;

use super::format::BLOCK;
use super::packed::{Packed, TILE};
use crate::kernels::lanes::Lanes;

/// How far ahead weights are fetched, in bytes of quants of all tiles that are gone through together: of 8 bits, and of 4, where a byte takes
/// longer to compute. Measured.
const AHEAD: [usize; 2] = [4096, 8192];

/// Where a tile's blocks lie, and those of the one behind it in memory.
#[derive(Clone, Copy)]
pub(super) struct TileAt<'a> {
    quants: &'a [u8],
    scales: &'a [f16],
    block_bytes: usize,
    tile_bytes: usize,
    pub blocks: usize,
}

impl Packed {
    /// # Panics
    /// If these are not rows that a task can take.
    pub(super) fn check(&self, rows: &Range<usize>) {
        assert!(rows.end <= self.rows(), "rows {rows:?} of a matrix of {} rows", self.rows());
        assert!(rows.start.is_multiple_of(TILE), "rows {rows:?} start inside a tile of {TILE}");
    }

    pub(super) fn tile_at(&self, tile: usize) -> TileAt<'_> {
        let (quants, scales) = self.tile(tile);
        let (block_bytes, tile_bytes) = (self.shape.block_bytes(), self.shape.tile_bytes());
        TileAt { quants, scales, block_bytes, tile_bytes, blocks: self.shape.blocks() }
    }
}

impl TileAt<'_> {
    /// # Safety
    /// The matrix has a tile so many behind this one, and `block` is below `blocks`, here and below.
    #[inline(always)]
    pub unsafe fn quants(&self, tile: usize, block: usize) -> *const u8 {
        self.quants.as_ptr().wrapping_add(tile * self.tile_bytes + block * self.block_bytes)
    }

    /// # Safety
    /// As [`TileAt::quants`].
    #[inline(always)]
    pub unsafe fn scales(&self, tile: usize, block: usize) -> *const f16 {
        self.scales.as_ptr().wrapping_byte_add(tile * self.tile_bytes + block * TILE * size_of::<f16>())
    }

    /// Fetches what will be needed some blocks after this one, in this tile or the one that follows when T at a time are gone through.
    ///
    /// # Safety
    /// The CPU has the instructions of `L`.
    #[inline(always)]
    pub unsafe fn prefetch<L: Lanes, const T: usize>(&self, tile: usize, block: usize) {
        let bytes = AHEAD[usize::from(self.block_bytes < TILE * BLOCK)];
        let ahead = block + bytes / T / self.block_bytes;
        let (block, tile) = if ahead < self.blocks { (ahead, tile) } else { (ahead - self.blocks, tile + T) };
        unsafe {
            let (quants, scales) = (self.quants(tile, block), self.scales(tile, block));
            for line in (0..self.block_bytes).step_by(64) {
                L::prefetch(quants.wrapping_add(line));
            }
            L::prefetch(scales);
        }
    }
}
