//! Reading a packed weight row by row, for what lays it out in another way.

use half::f16;

use super::format::Scaling;
use super::packed::{Packed, Shape, TILE};
use super::stored::Stored;

impl Packed {
    /// The 4 bytes of row `r` in vector `g` of a block's quants.
    pub(crate) fn word(&self, r: usize, block: usize, g: usize) -> [u8; 4] {
        let at = self.shape.block_at(block) + 64 * g + 4 * (r % TILE);
        std::array::from_fn(|i| self.tile(r / TILE)[at + i])
    }

    /// The bytes of row `r` in plane `plane` of a block's scales, of `N` bytes a row.
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
