//! [`Packed`]: a quantised weight in the layout that the kernels read.
//!
//! Tiles of 16 rows. A tile is its blocks of 32 columns, each its quants and then its scales, padded to a multiple of 64 bytes:
//!
//! - the quants of a block of 8-bit values are 8 vectors of 64 bytes; dword r of vector g holds columns 4g..4g+4 of row r, as q + 128;
//! - those of a block of 4-bit values are 4 vectors: the low nibbles are such a vector g, the high ones vector g + 4;
//! - the scales are 16 f16, one a row.
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

use super::format::{BLOCK, QuantFormat};

/// Weight rows of a tile: the rows of a task start at a multiple of it.
pub(crate) const TILE: usize = 16;

/// The measures of a packed weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub format: QuantFormat,
    pub rows: usize,
    pub cols: usize,
    pub lead: usize,
}

impl Shape {
    pub fn blocks(&self) -> usize {
        (self.lead + self.cols).div_ceil(BLOCK)
    }

    /// Bytes of the quants of one block of a tile.
    pub fn block_bytes(&self) -> usize {
        TILE * self.format.quant_bytes()
    }

    /// From one block of a tile to the next.
    pub fn stride(&self) -> usize {
        self.block_bytes() + TILE * size_of::<f16>()
    }

    pub fn tile_bytes(&self) -> usize {
        (self.blocks() * self.stride()).next_multiple_of(64)
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
    /// Bytes of a packed weight of so many rows, and columns including those in front of a slice.
    pub(crate) fn bytes_for(format: QuantFormat, rows: usize, lead_plus_cols: usize) -> usize {
        Shape { format, rows, cols: lead_plus_cols, lead: 0 }.bytes()
    }

    /// A packed weight inside a mapped file, from byte `offset`.
    ///
    /// # Errors
    /// If the bytes lie outside the file, `offset` is not a multiple of 64, or `lead` reaches beyond a block.
    pub(crate) fn mapped(
        file: Arc<Mmap>,
        offset: usize,
        format: QuantFormat,
        rows: usize,
        cols: usize,
        lead: usize,
    ) -> Result<Self, String> {
        let name = format.name();
        if lead >= BLOCK {
            return Err(format!("has {lead} columns in front of its first: a block of {name} has {BLOCK}"));
        }
        if !offset.is_multiple_of(64) {
            return Err(format!("starts at byte {offset}, which is not a multiple of 64"));
        }
        // At most 2 bytes a weight: beyond this the sums of `Shape` could overflow.
        let sane = (rows.checked_add(2 * TILE)).zip(cols.checked_add(2 * BLOCK)).and_then(|(r, c)| r.checked_mul(c)?.checked_mul(2));
        let shape = Shape { format, rows, cols, lead };
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

    /// Word `g` of row `r` of a block of 32 columns: 4 of its 8-bit values, or the low nibbles of four columns and the high ones of those 16 behind.
    #[cfg_attr(not(feature = "gpu"), expect(dead_code))]
    pub(crate) fn word(&self, r: usize, block: usize, g: usize) -> [u8; 4] {
        let at = block * self.shape.stride() + 64 * g + 4 * (r % TILE);
        std::array::from_fn(|i| self.tile(r / TILE)[at + i])
    }

    /// The scale of a block of row `r`.
    #[cfg_attr(not(feature = "gpu"), expect(dead_code))]
    pub(crate) fn scale(&self, r: usize, block: usize) -> [u8; 2] {
        let at = block * self.shape.stride() + self.shape.block_bytes() + 2 * (r % TILE);
        std::array::from_fn(|i| self.tile(r / TILE)[at + i])
    }

    /// The quants and the scales of a tile's block.
    #[cfg(test)]
    pub(super) fn block(&self, tile: usize, block: usize) -> (&[u8], &[f16]) {
        let bytes = &self.tile(tile)[block * self.shape.stride()..][..self.shape.stride()];
        let (quants, scales) = bytes.split_at(self.shape.block_bytes());
        (quants, bytemuck::cast_slice(scales))
    }

    /// What the weights of row `r` are worth, exactly: `[cols]`.
    ///
    /// # Panics
    /// If `r` or the length of `out` doesn't fit the matrix.
    #[cfg(test)]
    pub(crate) fn row_to_f32(&self, r: usize, out: &mut [f32]) {
        let Shape { rows, cols, lead, format } = self.shape;
        assert!(r < rows, "row {r} of a matrix of {rows} rows");
        assert_eq!(out.len(), cols, "a row of {cols} columns");
        for (i, out) in out.iter_mut().enumerate() {
            let (block, k) = ((lead + i) / BLOCK, (lead + i) % BLOCK);
            let (quants, scales) = self.block(r / TILE, block);
            *out = f32::from(quant(format, quants, r % TILE, k)) * scales[r % TILE].to_f32();
        }
    }
}

/// Weight k of row r of a block, in units of its scale.
#[cfg(test)]
pub(super) fn quant(format: QuantFormat, block: &[u8], r: usize, k: usize) -> i8 {
    let at = |k: usize| block[k / 4 * 64 + 4 * r + k % 4];
    match format.codebook() {
        None => (at(k) ^ 0x80) as i8,
        Some(levels) if k < BLOCK / 2 => levels[usize::from(at(k) & 15)],
        Some(levels) => levels[usize::from(at(k - BLOCK / 2) >> 4)],
    }
}
