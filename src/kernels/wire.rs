//! [`Wire`]: how rows travel between the ranks that sum them.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// How the rows of a prompt travel between devices and the host that sums them over ranks. Sums are made in f32; every rank gets the same
/// rounded one. Batches of up to 8 rows, such as a token's, travel in f32 always: they are small, and cost time by their number.
///
/// With r = 2^-11 for f16 (where values are normal: 2^-25 is the least error) and 2^-9 for bf16, a sum of parts p is off by at most
/// r |sum| + 2 r (1 + r) sum |p|: GPUs may round a part to either neighbour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Wire {
    /// 4 bytes, exact.
    #[default]
    F32,
    /// 2 bytes, 11 bits of precision. Beyond +-65504 values are held at that.
    F16,
    /// 2 bytes, 8 bits of precision, and the range of f32.
    Bf16,
}

impl Wire {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// `f32`, `f16` or `bf16`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// Bytes of an element.
    #[cfg_attr(not(feature = "gpu"), expect(dead_code))]
    pub(crate) fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// The one of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|wire| wire.name() == name)
    }

    /// The bits of values in 2 bytes each, nearest; of [`Self::F32`] there are none.
    pub(crate) fn narrow(self, values: &[f32]) -> Vec<u16> {
        let mut bits = vec![0u16; if self == Self::F32 { 0 } else { values.len() }];
        match self {
            Self::F32 => {}
            Self::F16 => {
                let within: Vec<f32> = values.iter().map(|v| v.clamp(-65504.0, 65504.0)).collect();
                bytemuck::cast_slice_mut::<u16, f16>(&mut bits).convert_from_f32_slice(&within);
            }
            Self::Bf16 => bytemuck::cast_slice_mut::<u16, bf16>(&mut bits).convert_from_f32_slice(values),
        }
        bits
    }

    /// The values of such bits.
    pub(crate) fn widen(self, bits: &[u16], values: &mut [f32]) {
        match self {
            Self::F32 => {}
            Self::F16 => bytemuck::cast_slice::<u16, f16>(bits).convert_to_f32_slice(values),
            Self::Bf16 => bytemuck::cast_slice::<u16, bf16>(bits).convert_to_f32_slice(values),
        }
    }

    /// Rounds values to those that travel.
    pub(crate) fn round(self, values: &mut [f32]) {
        for values in values.chunks_mut(4096).filter(|_| self != Self::F32) {
            let bits = self.narrow(values);
            self.widen(&bits, values);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_rounded_to_the_nearest_and_stay_finite() {
        let values = [1.0, -100.1, 1e-6, 65520.0, -1e9, 3e38, 0.0];
        let rounded = |wire: Wire| {
            let mut rounded = values;
            wire.round(&mut rounded);
            rounded
        };
        assert_eq!(rounded(Wire::F32), values);
        assert_eq!(rounded(Wire::F16), [1.0, -100.125, f16::from_f32(1e-6).to_f32(), 65504.0, -65504.0, 65504.0, 0.0]);
        for (value, rounded) in values.into_iter().zip(rounded(Wire::Bf16)) {
            assert!((value - rounded).abs() <= value.abs() / 512.0, "{value} became {rounded}");
        }
        assert_eq!(Wire::ALL.map(|wire| Wire::from_name(wire.name())), Wire::ALL.map(Some));
    }
}
