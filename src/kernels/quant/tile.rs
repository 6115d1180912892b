//! [`TileAt`]: a tile as the kernels go through it.

use std::ops::Range;

use half::f16;

use super::packed::{Packed, TILE};
use crate::kernels::lanes::Lanes;

/// How far ahead weights are fetched, in bytes of quants.
const AHEAD: usize = 4096;

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
    /// `block` is below `blocks`, here and below.
    #[inline(always)]
    pub unsafe fn quants(&self, block: usize) -> *const u8 {
        unsafe { self.quants.as_ptr().add(block * self.block_bytes) }
    }

    /// # Safety
    /// As [`TileAt::quants`].
    #[inline(always)]
    pub unsafe fn scales(&self, block: usize) -> *const f16 {
        unsafe { self.scales.as_ptr().add(block * TILE) }
    }

    /// Fetches what will be needed some blocks after this one, in this tile or the next.
    ///
    /// # Safety
    /// The CPU has the instructions of `L`.
    #[inline(always)]
    pub unsafe fn prefetch<L: Lanes>(&self, block: usize) {
        let ahead = block + AHEAD / self.block_bytes;
        let (block, tile) = if ahead < self.blocks { (ahead, 0) } else { (ahead - self.blocks, self.tile_bytes) };
        let quants = self.quants.as_ptr().wrapping_add(block * self.block_bytes + tile);
        let scales = self.scales.as_ptr().wrapping_byte_add(block * TILE * size_of::<f16>() + tile);
        unsafe {
            for line in (0..self.block_bytes).step_by(64) {
                L::prefetch(quants.wrapping_add(line));
            }
            L::prefetch(scales);
        }
    }
}
