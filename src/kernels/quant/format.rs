//! [`QuantFormat`]: what small integers and scales weights become, and what they are worth.

use super::packed::TILE;

/// Columns that share a scale.
pub(crate) const BLOCK: usize = 32;

/// Blocks that share what their scales are multiplied by, in the formats that have that.
pub(crate) const SUPER: usize = 8;

/// How a weight matrix is quantised, as ggml (llama.cpp) defines it: columns in blocks of 32 with a scale each.
///
/// [`QuantFormat::ENCODABLE`] can be made at load; the others are read from GGUF files. The errors are the root mean square relative to the
/// weights', for normally distributed ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum QuantFormat {
    /// `q * d` with d = max |x| / 127 and q in -127..=127: 8.5 bits a weight, error 0.5%.
    Q8_0,
    /// `(q - 8) * d`, where d puts the largest magnitude at -8, and q in 0..=15: 4.5 bits a weight, error 8.6%.
    Q4_0,
    /// `CODEBOOK[q] * d` with sixteen levels that are denser near zero and d fitted by least squares: 4.5 bits a weight, error 7.5%.
    Iq4Nl,
    /// `q * d + m` with q in 0..=15: 5 bits a weight.
    Q4_1,
    /// `(q - 16) * d` with q in 0..=31: 5.5 bits a weight.
    Q5_0,
    /// `q * d + m` with q in 0..=31: 6 bits a weight.
    Q5_1,
    /// `q * (d * s) - e * m` with q in 0..=15, s and m of 6 bits a block, d and e for 8 blocks: 4.5 bits a weight.
    Q4K,
    /// As [`QuantFormat::Q4K`] with q in 0..=31: 5.5 bits a weight.
    Q5K,
    /// `(q - 32) * (d * s)` with q in 0..=63, s of 8 bits for 16 columns, d for 8 blocks: 6.6 bits a weight.
    Q6K,
}

/// How a block's scales are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scaling {
    /// An f16.
    Plain,
    /// An f16, and another that is added.
    Affine,
    /// A byte, and another that is subtracted; each to be multiplied by an f16 that 8 blocks share.
    Super,
    /// A signed byte for each half of the columns, to be multiplied by an f16 that 8 blocks share.
    Halves,
}

/// The levels of [`QuantFormat::Iq4Nl`].
pub(super) const IQ4_NL: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
const Q4_0: [i8; 16] = [-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7];
const UNSIGNED: [i8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

impl QuantFormat {
    /// All of them.
    pub const ALL: [Self; 9] = [Self::Q8_0, Self::Q4_0, Self::Iq4Nl, Self::Q4_1, Self::Q5_0, Self::Q5_1, Self::Q4K, Self::Q5K, Self::Q6K];

    /// Those that weights can be quantised to as they are loaded.
    pub const ENCODABLE: [Self; 3] = [Self::Q8_0, Self::Q4_0, Self::Iq4Nl];

    /// The name used in tables and on the command line, such as `q8_0` and `q4_k`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Iq4Nl => "iq4_nl",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q4K => "q4_k",
            Self::Q5K => "q5_k",
            Self::Q6K => "q6_k",
        }
    }

    /// The format of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// Columns of a block as files store it: a multiple of what shares a scale.
    pub(crate) fn block(self) -> usize {
        match self.scaling() {
            Scaling::Plain | Scaling::Affine => BLOCK,
            Scaling::Super | Scaling::Halves => SUPER * BLOCK,
        }
    }

    /// Bytes of such a block.
    pub(crate) fn block_bytes(self) -> usize {
        match self {
            Self::Q8_0 => 34,
            Self::Q4_0 | Self::Iq4Nl => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    pub(super) fn scaling(self) -> Scaling {
        match self {
            Self::Q8_0 | Self::Q4_0 | Self::Iq4Nl | Self::Q5_0 => Scaling::Plain,
            Self::Q4_1 | Self::Q5_1 => Scaling::Affine,
            Self::Q4K | Self::Q5K => Scaling::Super,
            Self::Q6K => Scaling::Halves,
        }
    }

    /// Bits of a quant.
    pub(super) fn bits(self) -> usize {
        match self {
            Self::Q8_0 => 8,
            Self::Q4_0 | Self::Iq4Nl | Self::Q4_1 | Self::Q4K => 4,
            Self::Q5_0 | Self::Q5_1 | Self::Q5K => 5,
            Self::Q6K => 6,
        }
    }

    /// What the 4-bit values stand for, in units of the scale; `None` where a value stands for itself.
    pub(super) fn codebook(self) -> Option<&'static [i8; 16]> {
        match self {
            Self::Q4_0 => Some(&Q4_0),
            Self::Iq4Nl => Some(&IQ4_NL),
            Self::Q4_1 | Self::Q4K => Some(&UNSIGNED),
            Self::Q8_0 | Self::Q5_0 | Self::Q5_1 | Self::Q5K | Self::Q6K => None,
        }
    }

    /// How much the values of 5 bits and more are stored above what they stand for.
    pub(super) fn offset(self) -> u8 {
        match self {
            Self::Q8_0 => 128,
            Self::Q5_0 => 16,
            Self::Q6K => 32,
            _ => 0,
        }
    }

    /// What a stored value stands for, in units of the scale.
    pub(super) fn level(self, q: u8) -> i8 {
        match self.codebook() {
            Some(levels) => levels[usize::from(q)],
            None => q.wrapping_sub(self.offset()) as i8,
        }
    }

    /// Words of a row's 4-bit or 8-bit values in a block of a tile, and of their further bits.
    #[cfg(feature = "gpu")]
    pub(crate) fn tile_words(self) -> (usize, usize) {
        if self.bits() == 8 { (BLOCK / 4, 0) } else { (BLOCK / 8, self.bits() - 4) }
    }

    /// Bytes of a block of a tile, scales included.
    pub(crate) fn tile_block_bytes(self) -> usize {
        TILE * (self.quant_bytes() + self.scaling().row_bytes().0)
    }

    /// Bytes of what 8 blocks of a tile share.
    pub(crate) fn tile_shared_bytes(self) -> usize {
        TILE * self.scaling().row_bytes().1
    }

    /// How many times blocks share, where the first of so many has `phase` in front of it that share with it.
    pub(crate) fn groups(self, blocks: usize, phase: usize) -> usize {
        if blocks == 0 { 0 } else { (phase + blocks).div_ceil(SUPER) }
    }

    /// Bytes of a block's quants in one row of a tile.
    pub(super) fn quant_bytes(self) -> usize {
        self.bits() * BLOCK / 8
    }
}
