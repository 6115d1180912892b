//! [`TileAt`]: a tile as the kernels go through it.

use std::ops::Range;

use super::form::Form;
use super::format::{BLOCK, SUPER};
use super::packed::{Packed, TILE};
use crate::kernels::lanes::Lanes;

/// How far ahead weights are fetched, in bytes: of 8 bits into L2, of 4 bits, where a byte takes longer to compute, into L1. Measured.
const AHEAD: [usize; 2] = [8192, 4096];

/// Where a tile's blocks lie, and behind them those of the next.
#[derive(Clone, Copy)]
pub(super) struct TileAt<'a> {
    bytes: &'a [u8],
    phase: usize,
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
        TileAt { bytes: self.tile(tile), phase: self.shape.phase, blocks: self.shape.blocks() }
    }
}

/// What [`Shape`](super::packed::Shape) says of every format of a form, as constants.
trait Measures: Form {
    const BLOCK_BYTES: usize = TILE * Self::BITS * BLOCK / 8;
    const STRIDE: usize = Self::BLOCK_BYTES + TILE * Self::SCALING.row_bytes().0;
    const SHARED: usize = TILE * Self::SCALING.row_bytes().1;
}
impl<F: Form> Measures for F {}

impl TileAt<'_> {
    #[inline(always)]
    fn at(&self, byte: usize) -> *const u8 {
        self.bytes.as_ptr().wrapping_add(byte)
    }

    /// # Safety
    /// `block` is below `blocks`, and `F` the matrix's form, here and below.
    #[inline(always)]
    pub unsafe fn quants<F: Form>(&self, block: usize) -> *const u8 {
        let groups = if F::SHARED == 0 { 0 } else { (self.phase + block) / SUPER + 1 };
        self.at(groups * F::SHARED + block * F::STRIDE)
    }

    /// # Safety
    /// As [`TileAt::quants`].
    #[inline(always)]
    pub unsafe fn scales<F: Form>(&self, block: usize) -> *const u8 {
        unsafe { self.quants::<F>(block).wrapping_add(F::BLOCK_BYTES) }
    }

    /// What the block's scales are multiplied by.
    ///
    /// # Safety
    /// As [`TileAt::quants`].
    #[inline(always)]
    pub unsafe fn shared<F: Form>(&self, block: usize) -> *const u8 {
        let group = (self.phase + block) / SUPER;
        self.at(group * F::SHARED + (group * SUPER).saturating_sub(self.phase) * F::STRIDE)
    }

    /// Fetches what will be needed some blocks after this one, in this tile or the one behind it.
    ///
    /// # Safety
    /// The CPU has the instructions of `L`.
    #[inline(always)]
    pub unsafe fn prefetch<L: Lanes, F: Form>(&self, block: usize) {
        unsafe {
            let near = F::BITS < 8;
            let ahead = self.quants::<F>(block).wrapping_add(AHEAD[usize::from(near)]);
            for line in (0..F::STRIDE).step_by(64) {
                let line = ahead.wrapping_add(line);
                if near { L::prefetch_near(line) } else { L::prefetch(line) }
            }
        }
    }
}
