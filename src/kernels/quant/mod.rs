//! Quantised weights on the CPU.
//!
//! [`format`] says what the formats are, [`packed`] how their tiles lie in memory, [`pack`] makes them. [`exact`] multiplies them
//! with f32 activations, [`fast`] with int8 ones. In both the lanes of a vector are the 16 rows of a tile, so that no sum is ever
//! taken across lanes.

mod encode;
mod exact;
mod fast;
mod form;
mod format;
mod int8;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pack;
mod packed;
mod stored;
#[cfg(test)]
mod tests;
mod tile;
#[cfg(any(feature = "gpu", test))]
mod unpack;
mod vectors;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use crate::kernels::linear;

pub(crate) use exact::packed_rows;
pub(crate) use fast::packed_rows_int8;
pub(crate) use format::BLOCK;
pub use format::QuantFormat;
#[cfg(feature = "gpu")]
pub(crate) use format::SUPER;
pub(crate) use int8::Int8Rows;
pub(crate) use packed::{Packed, TILE};
pub(crate) use stored::row_to_f32;

/// The instruction sets that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Isa {
    /// AVX-512 F, BW, VL and VNNI.
    #[cfg(target_arch = "x86_64")]
    Vnni,
    /// Without VNNI; integer dot products are those of AVX2.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// With FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// With dot products and half precision.
    #[cfg(target_arch = "aarch64")]
    Neon,
    Portable,
}

impl Isa {
    /// Those that this CPU has, best first.
    fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let dense = linear::Isa::available();
            if dense.contains(&linear::Isa::Avx2) {
                if dense.contains(&linear::Isa::Avx512) {
                    found.extend(is_x86_feature_detected!("avx512vnni").then_some(Self::Vnni));
                    found.push(Self::Avx512);
                }
                found.push(Self::Avx2);
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("dotprod") && std::arch::is_aarch64_feature_detected!("fp16") {
            found.push(Self::Neon);
        }
        found.push(Self::Portable);
        found
    }

    fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available()[0])
    }
}
