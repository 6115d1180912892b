//! [`Form`]: what of a format the kernels are compiled for; and what they read of a tile's block by it.

use super::format::{BLOCK, QuantFormat, SUPER, Scaling};
use super::packed::TILE;
use super::tile::TileAt;
use super::vectors::Vectors;

/// How the quants and the scales of a block are stored.
pub(super) trait Form {
    /// Of a quant.
    const BITS: usize;
    const SCALING: Scaling;
}

macro_rules! forms {
    ($($name:ident: $bits:literal, $scaling:ident;)*) => {
        $(pub(super) enum $name {}
        impl Form for $name {
            const BITS: usize = $bits;
            const SCALING: Scaling = Scaling::$scaling;
        })*
    };
}
forms! {
    Plain8: 8, Plain;
    Plain4: 4, Plain;
    Plain5: 5, Plain;
    Affine4: 4, Affine;
    Affine5: 5, Affine;
    Super4: 4, Super;
    Super5: 5, Super;
    Halves6: 6, Halves;
}

/// An expression with `$form` as the [`Form`] of a format.
macro_rules! by_form {
    ($format:expr, $form:ident => $value:expr) => {{
        use crate::kernels::quant::form::*;
        match $format {
            QuantFormat::Q8_0 => {
                type $form = Plain8;
                $value
            }
            QuantFormat::Q4_0 | QuantFormat::Iq4Nl => {
                type $form = Plain4;
                $value
            }
            QuantFormat::Q4_1 => {
                type $form = Affine4;
                $value
            }
            QuantFormat::Q5_0 => {
                type $form = Plain5;
                $value
            }
            QuantFormat::Q5_1 => {
                type $form = Affine5;
                $value
            }
            QuantFormat::Q4K => {
                type $form = Super4;
                $value
            }
            QuantFormat::Q5K => {
                type $form = Super5;
                $value
            }
            QuantFormat::Q6K => {
                type $form = Halves6;
                $value
            }
        }
    }};
}
pub(super) use by_form;

/// Scales of the 16 rows of a tile in one block.
#[derive(Clone, Copy)]
pub(super) struct Scales<V> {
    /// What the quants of either half of the columns are to be multiplied by before the sums of both halves are, in `Halves`.
    pub halves: [V; 2],
    pub d: V,
    /// What is added, in `Affine` and `Super`.
    pub added: V,
}

/// What the blocks' scales have beside them.
pub(super) const fn adds(scaling: Scaling) -> bool {
    matches!(scaling, Scaling::Affine | Scaling::Super)
}

impl QuantFormat {
    /// What of a format its kernels have to be told.
    pub(super) fn levels(self) -> Levels {
        Levels { book: *self.codebook().unwrap_or(&[0; 16]), offset: self.offset() }
    }
}

/// What quants stand for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Levels {
    /// Those of 4 bits.
    pub book: [i8; 16],
    /// What is to be taken from those of 5 and 6.
    pub offset: u8,
}

/// The scales of a block.
///
/// # Safety
/// The CPU has the instructions of `V`; `block` is one of the tile's, here and below.
#[inline(always)]
pub(super) unsafe fn scales<V: Vectors, F: Form>(tile: &TileAt<'_>, block: usize) -> Scales<V> {
    unsafe {
        let at = tile.scales::<F>(block);
        let (zero, one) = (V::zero(), V::splat(1.0));
        match F::SCALING {
            Scaling::Plain => Scales { halves: [one; 2], d: V::load_f16(at.cast()), added: zero },
            Scaling::Affine => Scales { halves: [one; 2], d: V::load_f16(at.cast()), added: V::load_f16(at.add(2 * TILE).cast()) },
            Scaling::Super => {
                let shared = tile.shared::<F>(block);
                let (d, m) = (V::load_f16(shared.cast()), V::load_f16(shared.add(2 * TILE).cast()));
                // Products of 11 and 6 bits are exact.
                let added = zero.fma(zero.fma(m, V::splat(-1.0)), V::load_bytes(at.add(TILE)));
                Scales { halves: [one; 2], d: zero.fma(d, V::load_bytes(at)), added }
            }
            Scaling::Halves => {
                let minus = V::splat(-128.0);
                let halves = [minus.fma(V::load_bytes(at), one), minus.fma(V::load_bytes(at.add(TILE)), one)];
                Scales { halves, d: V::load_f16(tile.shared::<F>(block).cast()), added: zero }
            }
        }
    }
}

/// Quants `4g..4g + 4` of a block as factors of integer products.
///
/// # Safety
/// As [`scales`]; `g` is below 8, here and below.
#[inline(always)]
pub(super) unsafe fn quants<V: Vectors, F: Form>(p: *const u8, levels: V::Levels, offset: u8, g: usize) -> V::Quants {
    unsafe {
        match F::BITS {
            8 => V::quants(p.add(64 * g)),
            4 => V::quants_4(p.add(64 * (g % 4)), levels)[g / 4],
            5 => V::quants_more::<1>(p, g, offset),
            _ => V::quants_more::<2>(p, g, offset),
        }
    }
}

/// Columns `4g..4g + 4` of a block in f32, in units of what the whole block is multiplied by.
///
/// # Safety
/// As [`quants`].
#[inline(always)]
pub(super) unsafe fn columns<V: Vectors, F: Form>(p: *const u8, book: V, offset: u8, scales: &Scales<V>, g: usize) -> [V; 4] {
    unsafe {
        let columns = match F::BITS {
            8 => V::columns(V::quants(p.add(64 * g))),
            4 if g < 4 => V::columns_4::<false>(p.add(64 * g), book),
            4 => V::columns_4::<true>(p.add(64 * (g - 4)), book),
            5 => V::columns(V::quants_more::<1>(p, g, offset)),
            _ => V::columns(V::quants_more::<2>(p, g, offset)),
        };
        if F::SCALING != Scaling::Halves {
            return columns;
        }
        // Products of 6 and 8 bits are exact.
        let mut scaled = [V::zero(); 4];
        for (scaled, column) in scaled.iter_mut().zip(columns) {
            *scaled = V::zero().fma(column, scales.halves[g / 4]);
        }
        scaled
    }
}

/// The sum of each block of activations, in the order of products: four sums by k mod 4, k rising, then `(s0 + s1) + (s2 + s3)`.
pub(super) fn sum_of(x: &[f32; BLOCK]) -> f32 {
    let mut s = [0.0; 4];
    for four in x.as_chunks::<4>().0 {
        for (s, x) in s.iter_mut().zip(four) {
            *s += x;
        }
    }
    (s[0] + s[1]) + (s[2] + s[3])
}

impl Scaling {
    /// Of how many kinds the scales of a block are.
    #[cfg_attr(not(feature = "gpu"), expect(dead_code))]
    pub(super) fn planes(self) -> usize {
        if self == Self::Plain { 1 } else { 2 }
    }

    /// Bytes of a row's scales in a block, and of what 8 blocks share.
    pub(super) const fn row_bytes(self) -> (usize, usize) {
        match self {
            Self::Plain => (2, 0),
            Self::Affine => (4, 0),
            Self::Super => (2, 4),
            Self::Halves => (2, 2),
        }
    }
}

/// Blocks in front of a block's own that share with it, counted from the first of their eight.
pub(super) fn phase(first_column: usize) -> usize {
    first_column / BLOCK % SUPER
}
