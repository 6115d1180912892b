//! [`Packed`]: a quantised weight in the layout that the kernels read.
//!
//! Tiles of 16 rows. A tile is its blocks of 32 columns, each its quants and then its scales, padded to a multiple of 64 bytes:
//!
//! - the quants of a block of 8-bit values are 8 vectors of 64 bytes; dword r of vector g holds columns 4g..4g+4 of row r, as q + 128;
//! - those of a block of 4-bit values are 4 vectors: the low nibbles are such a vector g, the high ones vector g + 4;
//! - those of 5 and 6 bits have their upper H = 1 or 2 bits in H more vectors: of vector g at bit gH % 8 of vector gH / 8;
//! - the scales are 16 f16, one a row; behind them, in formats that have that, 16 f16 that are added;
//! - in formats whose scales are bytes, they are twice 16 bytes: scales and minima, or the scales of either half of the columns plus 128.
//!   In front of the first block, and of every 8th of the whole matrix, are the f16 that those are multiplied by: 16, or twice 16.
//!
//! So a product reads a matrix from end to end as one stream. Scales in a place of their own, or several tiles side by side, cost 10 to 40% of
//! the speed, although every vector then lies in one cache line.
//!
//! Blocks have the borders of the whole matrix: in front of a slice that starts inside a block stand `lead` columns of its neighbours,
//! with their values, so that a slice stores the very weights of the whole; its inputs are zero there, as behind its last column.
//! Rows beyond the last have scales of zero.

use std::sync::Arc;

use memmap2::Mmap;

use super::form::phase;
use super::format::{BLOCK, QuantFormat, SUPER};

/// Weight rows of a tile: the rows of a task start at a multiple of it.
pub(crate) const TILE: usize = 16;

/// The measures of a packed weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub format: QuantFormat,
    pub rows: usize,
    pub cols: usize,
    pub lead: usize,
    /// Blocks of the whole matrix in front of the first that share scales with it, in formats that have that.
    pub phase: usize,
}

impl Shape {
    /// Of a slice whose first column is the whole matrix's `start`.
    pub fn of(format: QuantFormat, rows: usize, cols: usize, start: usize) -> Self {
        Self { format, rows, cols, lead: start % BLOCK, phase: phase(start) }
    }

    pub fn blocks(&self) -> usize {
        (self.lead + self.cols).div_ceil(BLOCK)
    }

    /// Bytes of the quants of one block of a tile.
    pub fn block_bytes(&self) -> usize {
        TILE * self.format.quant_bytes()
    }

    /// From one block of a tile to the next.
    pub fn stride(&self) -> usize {
        self.format.tile_block_bytes()
    }

    /// Bytes that 8 blocks share, in front of them.
    pub fn shared_bytes(&self) -> usize {
        self.format.tile_shared_bytes()
    }

    /// Where what a block shares begins, in a tile.
    pub fn shared_at(&self, block: usize) -> usize {
        let group = (self.phase + block) / SUPER;
        group * self.shared_bytes() + (group * SUPER).saturating_sub(self.phase) * self.stride()
    }

    /// Where a block begins, in a tile.
    pub fn block_at(&self, block: usize) -> usize {
        ((self.phase + block) / SUPER + 1) * self.shared_bytes() + block * self.stride()
    }

    pub fn tile_bytes(&self) -> usize {
        let groups = self.format.groups(self.blocks(), self.phase);
        (groups * self.shared_bytes() + self.blocks() * self.stride()).next_multiple_of(64)
    }

    pub fn bytes(&self) -> usize {
        self.rows.div_ceil(TILE) * self.tile_bytes()
    }
}

/// A quantised weight, 2-D as [`Matrix`](crate::Matrix) is. Cloning copies nothing.
#[derive(Clone)]
pub(crate) struct Packed {
    pub(super) shape: Shape,
    storage: Arc<Mmap>,
    offset: usize,
}

impl Packed {
    /// Bytes of a packed weight of so many rows and columns, the first of which is the whole matrix's `start`.
    pub(crate) fn bytes_for(format: QuantFormat, rows: usize, cols: usize, start: usize) -> usize {
        Shape::of(format, rows, cols, start).bytes()
    }

    /// A packed weight inside a mapped file, from byte `offset`; its first column is the whole matrix's `start`.
    ///
    /// # Errors
    /// If the bytes lie outside the file, or `offset` is not a multiple of 64.
    pub(crate) fn mapped(
        file: Arc<Mmap>,
        offset: usize,
        format: QuantFormat,
        rows: usize,
        cols: usize,
        start: usize,
    ) -> Result<Self, String> {
        if !offset.is_multiple_of(64) {
            return Err(format!("starts at byte {offset}, which is not a multiple of 64"));
        }
        // At most 2 bytes a weight: beyond this the sums of `Shape` could overflow.
        let sane = (rows.checked_add(2 * TILE)).zip(cols.checked_add(16 * BLOCK)).and_then(|(r, c)| r.checked_mul(c)?.checked_mul(2));
        let shape = Shape::of(format, rows, cols, start);
        let end = sane.and_then(|_| offset.checked_add(shape.bytes()));
        match end {
            None => Err(format!("of {rows} x {cols} elements is too large to address")),
            Some(end) if end > file.len() => Err(format!("ends at byte {end} of a file of {}", file.len())),
            Some(_) => Ok(Self { shape, storage: file, offset }),
        }
    }

    /// Takes tiles that were just written.
    pub(super) fn new(shape: Shape, storage: Mmap) -> Self {
        Self { shape, storage: Arc::new(storage), offset: 0 }
    }

    pub(crate) fn rows(&self) -> usize {
        self.shape.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.shape.cols
    }

    /// Columns in front of the first one, which its inputs don't have.
    pub(crate) fn lead(&self) -> usize {
        self.shape.lead
    }

    /// Blocks of the whole matrix in front of the first one here that share scales with it; 0 where none do.
    #[cfg_attr(not(feature = "gpu"), expect(dead_code))]
    pub(crate) fn phase(&self) -> usize {
        if self.shape.shared_bytes() == 0 { 0 } else { self.shape.phase }
    }

    pub(crate) fn format(&self) -> QuantFormat {
        self.shape.format
    }

    /// Bytes that it takes in memory.
    pub(crate) fn bytes(&self) -> usize {
        self.shape.bytes()
    }

    /// The tiles, as they would be written to a file.
    pub(crate) fn data(&self) -> &[u8] {
        &self.storage[self.offset..][..self.bytes()]
    }

    /// The tile that starts at row `TILE * tile`.
    pub(super) fn tile(&self, tile: usize) -> &[u8] {
        &self.data()[tile * self.shape.tile_bytes()..][..self.shape.tile_bytes()]
    }
}
