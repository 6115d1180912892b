//! [`QuantFormat`]: how a block of weights becomes a scale and small integers, and what they are worth.

/// Columns that share a scale.
pub(crate) const BLOCK: usize = 32;

/// How a weight matrix is quantised: blocks of 32 columns with one f16 scale d each, as ggml (llama.cpp) defines them.
///
/// The errors are the root mean square relative to the weights', for normally distributed ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum QuantFormat {
    /// `q * d` with d = max |x| / 127 and q in -127..=127: 8.5 bits a weight, error 0.6%.
    Q8_0,
    /// `(q - 8) * d`, where d puts the largest magnitude at -8, and q in 0..=15: 4.5 bits a weight, error 9.2%.
    Q4_0,
    /// `CODEBOOK[q] * d` with sixteen levels that are denser near zero and d fitted by least squares: 4.5 bits a weight, error 7.5%.
    Iq4Nl,
}

/// The levels of [`QuantFormat::Iq4Nl`].
const IQ4_NL: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
const Q4_0: [i8; 16] = [-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7];

impl QuantFormat {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Q8_0, Self::Q4_0, Self::Iq4Nl];

    /// The name used in tables and on the command line: `q8_0`, `q4_0`, `iq4_nl`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Iq4Nl => "iq4_nl",
        }
    }

    /// The format of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// What the 4-bit values stand for, in units of the scale; `None` where a value stands for itself.
    pub(super) fn codebook(self) -> Option<&'static [i8; 16]> {
        match self {
            Self::Q8_0 => None,
            Self::Q4_0 => Some(&Q4_0),
            Self::Iq4Nl => Some(&IQ4_NL),
        }
    }

    /// Bytes of a block's quants in one row.
    pub(super) fn quant_bytes(self) -> usize {
        if self.codebook().is_some() { BLOCK / 2 } else { BLOCK }
    }
}
