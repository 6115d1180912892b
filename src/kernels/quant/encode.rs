//! From 32 weights to a scale and small integers.
//!
//! Plain loops without fused operations, compiled for each instruction set: all store the same bytes.
//!
//! Hostile values: a block with a NaN or an infinity has a scale of NaN, so that the outputs of its row are NaN, as they would be
//! without quantisation, and those of no other. A scale beyond f16 becomes 65504 and the values saturate. A scale that f16 rounds
//! to zero makes the block zero.

use half::f16;

use super::format::{BLOCK, QuantFormat};

/// The values as they are stored, before they are laid out in a tile: q + 128, or the 4 bits.
pub(super) type Stored = [u8; BLOCK];

/// What a block without weight stores: bytes that decode to a number, times a scale of 0 or NaN.
const NOTHING: Stored = [0x80; BLOCK];
const NOTHING_4: Stored = [8; BLOCK];

/// The scale of a block and its values.
#[inline(always)]
pub(super) fn encode(format: QuantFormat, x: &[f32; BLOCK]) -> (f16, Stored) {
    let magnitude = |v: f32| v.to_bits() & 0x7fff_ffff;
    let largest = x.iter().fold(0, |m, &v| m.max(magnitude(v)));
    let nothing = if format == QuantFormat::Q8_0 { NOTHING } else { NOTHING_4 };
    let amax = f32::from_bits(largest);
    if !amax.is_finite() {
        return (f16::NAN, nothing);
    }
    // Far below what f16 can scale, and before reciprocals overflow.
    if amax < 1e-15 {
        return (f16::ZERO, nothing);
    }
    let signed = || x.iter().copied().find(|&v| magnitude(v) == largest).unwrap_or(amax);
    match format {
        QuantFormat::Q8_0 => q8_0(x, amax),
        QuantFormat::Q4_0 => q4_0(x, signed()),
        QuantFormat::Iq4Nl => iq4_nl(x, signed()),
    }
}

/// The nearest scale that f16 has on this side of infinity.
fn clamped(d: f32) -> f32 {
    d.clamp(f16::MIN.to_f32(), f16::MAX.to_f32())
}

#[inline(always)]
fn q8_0(x: &[f32; BLOCK], amax: f32) -> (f16, Stored) {
    let d = clamped(amax / 127.0);
    let inverse = 1.0 / d;
    let mut stored = NOTHING;
    for (to, x) in stored.iter_mut().zip(x) {
        let q = (x * inverse).round().clamp(-127.0, 127.0);
        *to = unsafe { (q + 128.0).to_int_unchecked::<i32>() } as u8;
    }
    (f16::from_f32(d), stored)
}

#[inline(always)]
fn q4_0(x: &[f32; BLOCK], max: f32) -> (f16, Stored) {
    let d = clamped(max / -8.0);
    let inverse = 1.0 / d;
    let mut stored = NOTHING_4;
    for (to, x) in stored.iter_mut().zip(x) {
        let q = (x * inverse + 8.5).clamp(0.0, 15.0);
        *to = unsafe { q.to_int_unchecked::<i32>() } as u8;
    }
    (f16::from_f32(d), stored)
}

/// Half-way between the levels of iq4_nl, and from each level to the next.
const BORDERS: [f32; 15] = [-115.5, -93.5, -74.0, -57.0, -42.0, -28.5, -16.0, -4.5, 7.0, 19.0, 31.5, 45.5, 61.0, 79.0, 101.0];
const STEPS: [f32; 15] = [23.0, 21.0, 18.0, 16.0, 14.0, 13.0, 12.0, 11.0, 12.0, 12.0, 13.0, 15.0, 16.0, 20.0, 24.0];

/// Where the largest magnitude may land in the codebook, one candidate for the scale each; llama.cpp tries 16 of them.
pub(super) const TARGETS: [f32; 5] = [127.0, -122.0, -127.0, -131.0, -134.0];

/// The scale with the least squared error, weighted by x^2, of those that the candidates' choices of levels would want.
#[inline(always)]
fn iq4_nl(x: &[f32; BLOCK], max: f32) -> (f16, Stored) {
    const LANES: usize = 16;
    // Relative to the largest, so that no power of a weight leaves f32.
    let unit = 1.0 / max;
    let mut y = [0.0f32; BLOCK];
    for (y, x) in y.iter_mut().zip(x) {
        *y = x * unit;
    }
    let (mut best, mut d) = (0.0f32, 0.0f32);
    for target in TARGETS {
        let (mut products, mut squares) = ([0.0f32; LANES], [0.0f32; LANES]);
        for half in y.as_chunks::<LANES>().0 {
            for l in 0..LANES {
                let v = half[l] * target;
                let mut level = -127.0f32;
                for i in 0..15 {
                    level += if v >= BORDERS[i] { STEPS[i] } else { 0.0 };
                }
                let weighted = half[l] * half[l] * level;
                products[l] += weighted * half[l];
                squares[l] += weighted * level;
            }
        }
        let (products, squares) = (sum(products), sum(squares));
        if products * products > best * squares {
            best = products * products / squares;
            d = products / squares;
        }
    }
    let d = f16::from_f32(clamped(d * max));
    if d.to_f32() == 0.0 {
        return (f16::ZERO, NOTHING_4);
    }
    let inverse = 1.0 / d.to_f32();
    let mut stored = NOTHING_4;
    for (to, x) in stored.iter_mut().zip(x) {
        let v = x * inverse;
        let mut index = 0;
        for border in BORDERS {
            index += i32::from(v >= border);
        }
        *to = index as u8;
    }
    (d, stored)
}

#[inline(always)]
fn sum(mut lanes: [f32; 16]) -> f32 {
    for half in [8, 4, 2, 1] {
        for l in 0..half {
            lanes[l] += lanes[l + half];
        }
    }
    lanes[0]
}
