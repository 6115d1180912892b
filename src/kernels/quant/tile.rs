//! [`TileAt`]: a tile as the kernels go through it.

use std::ops::Range;

use half::f16;

use super::packed::{Packed, TILE};
use crate::kernels::lanes::Lanes;

/// How far ahead weights are fetched, in bytes: of 8 bits into L2, of 4 bits, where a byte takes longer to compute, into L1. Measured.
const AHEAD: [usize; 2] = [8192, 4096];

/// Where a tile's blocks lie, and behind them those of the next.
#[derive(Clone, Copy)]
pub(super) struct TileAt<'a> {
    bytes: &'a [u8],
    block_bytes: usize,
    stride: usize,
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
        let (block_bytes, stride) = (self.shape.block_bytes(), self.shape.stride());
        TileAt { bytes: self.tile(tile), block_bytes, stride, blocks: self.shape.blocks() }
    }
}

impl TileAt<'_> {
    /// # Safety
    /// `block` is below `blocks`, here and below.
    #[inline(always)]
    pub unsafe fn quants(&self, block: usize) -> *const u8 {
        self.bytes.as_ptr().wrapping_add(block * self.stride)
    }

    /// # Safety
    /// As [`TileAt::quants`].
    #[inline(always)]
    pub unsafe fn scales(&self, block: usize) -> *const f16 {
        self.bytes.as_ptr().wrapping_add(block * self.stride + self.block_bytes).cast()
    }

    /// Fetches what will be needed some blocks after this one, in this tile or the one behind it.
    ///
    /// # Safety
    /// The CPU has the instructions of `L`.
    #[inline(always)]
    pub unsafe fn prefetch<L: Lanes, const NIBBLES: bool>(&self, block: usize) {
        unsafe {
            let ahead = self.quants(block).wrapping_add(AHEAD[usize::from(NIBBLES)]);
            for line in (0..self.stride).step_by(64) {
                let line = ahead.wrapping_add(line);
                if NIBBLES { L::prefetch_near(line) } else { L::prefetch(line) }
            }
        }
    }
}
