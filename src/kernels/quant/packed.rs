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

use half::f16;
use memmap2::Mmap;

use super::form::phase;
use super::format::{BLOCK, QuantFormat, SUPER, Scaling};
use super::stored::Stored;

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

    /// The 4 bytes of row `r` in vector `g` of a block's quants.
    #[cfg_attr(not(any(feature = "gpu", test)), expect(dead_code))]
    pub(crate) fn word(&self, r: usize, block: usize, g: usize) -> [u8; 4] {
        let at = self.shape.block_at(block) + 64 * g + 4 * (r % TILE);
        std::array::from_fn(|i| self.tile(r / TILE)[at + i])
    }

    /// The bytes of row `r` in plane `plane` of a block's scales, of `N` bytes a row.
    #[cfg_attr(not(any(feature = "gpu", test)), expect(dead_code))]
    pub(crate) fn scale<const N: usize>(&self, r: usize, block: usize, plane: usize) -> [u8; N] {
        let at = self.shape.block_at(block) + self.shape.block_bytes() + N * (TILE * plane + r % TILE);
        std::array::from_fn(|i| self.tile(r / TILE)[at + i])
    }

    /// Copies the scales of row `r` in a block to where `place(plane, bytes of a row)` says.
    #[cfg(feature = "gpu")]
    pub(crate) fn copy_scales(&self, r: usize, block: usize, place: impl Fn(usize, usize) -> usize, to: &mut [u8]) {
        let all = self.shape.format.scaling();
        for plane in 0..all.planes() {
            match all {
                Scaling::Plain | Scaling::Affine => to[place(plane, 2)..][..2].copy_from_slice(&self.scale::<2>(r, block, plane)),
                Scaling::Super | Scaling::Halves => to[place(plane, 1)] = self.scale::<1>(r, block, plane)[0],
            }
        }
    }

    /// One of the f16 of row `r` that a block shares with its neighbours.
    #[cfg_attr(not(any(feature = "gpu", test)), expect(dead_code))]
    pub(crate) fn shared(&self, r: usize, block: usize, plane: usize) -> [u8; 2] {
        let at = self.shape.shared_at(block) + 2 * (TILE * plane + r % TILE);
        std::array::from_fn(|i| self.tile(r / TILE)[at + i])
    }

    /// A block of row `r`, as a file would have it.
    pub(super) fn stored(&self, r: usize, block: usize) -> Stored {
        let (bits, half) = (self.shape.format.bits(), |bytes: [u8; 2]| f16::from_ne_bytes(bytes));
        let quant = |k: usize| match bits {
            8 => self.word(r, block, k / 4)[k % 4],
            _ => {
                let (g, high) = (k / 4, bits - 4);
                let low = self.word(r, block, g % 4)[k % 4] >> (g / 4 * 4) & 15;
                let more = if high == 0 { 0 } else { self.word(r, block, 4 + g * high / 8)[k % 4] >> (g * high % 8) & ((1 << high) - 1) };
                low | more << 4
            }
        };
        let plane = |plane| half(self.scale::<2>(r, block, plane));
        let shared = |plane| half(self.shared(r, block, plane));
        let bytes = || [0, 1].map(|plane| self.scale::<1>(r, block, plane)[0]);
        let (d, m, bytes) = match self.shape.format.scaling() {
            Scaling::Plain => (plane(0), f16::ZERO, [0; 2]),
            Scaling::Affine => (plane(0), plane(1), [0; 2]),
            Scaling::Super => (shared(0), shared(1), bytes()),
            Scaling::Halves => (shared(0), f16::ZERO, bytes()),
        };
        Stored { quants: std::array::from_fn(quant), d, m, bytes }
    }

    /// What the weights of row `r` are worth, exactly: `[cols]`.
    ///
    /// # Panics
    /// If `r` or the length of `out` doesn't fit the matrix.
    pub(crate) fn row_to_f32(&self, r: usize, out: &mut [f32]) {
        let Shape { rows, cols, lead, format, .. } = self.shape;
        assert!(r < rows, "row {r} of a matrix of {rows} rows");
        assert_eq!(out.len(), cols, "a row of {cols} columns");
        let values: Vec<f32> = (0..self.shape.blocks()).flat_map(|b| self.stored(r, b).to_f32(format)).collect();
        out.copy_from_slice(&values[lead..lead + cols]);
    }
}
