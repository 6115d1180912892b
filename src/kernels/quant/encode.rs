//! From 32 weights to a scale and small integers.
//!
//! Every operation is rounded by itself, whatever the instruction set, so that all store the same bytes.
//!
//! Hostile values: a block with a NaN or an infinity has a scale of NaN, so that the outputs of its row are NaN, as they would be
//! without quantisation, and those of no other. A scale beyond f16 becomes 65504 and the values saturate. A scale that f16 rounds
//! to zero makes the block zero.

use half::f16;

use super::format::{BLOCK, IQ4_NL, QuantFormat};
use super::vectors::Vectors;

/// The values as they are stored, before they are laid out in a tile: q + 128, or the 4 bits.
pub(super) type Stored = [u8; BLOCK];

/// What a block without weight stores: bytes that decode to a number, times a scale of 0 or NaN.
const NOTHING: Stored = [0x80; BLOCK];
const NOTHING_4: Stored = [8; BLOCK];

/// The scale of a block and its values.
///
/// # Safety
/// The CPU has the instructions of `V`.
#[inline(always)]
pub(super) unsafe fn encode<V: Vectors>(format: QuantFormat, x: &[f32; BLOCK]) -> (f16, Stored) {
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
        QuantFormat::Iq4Nl => unsafe { iq4_nl::<V>(x, signed()) },
    }
}

/// The nearest scale that f16 has on this side of infinity.
fn clamped(d: f32) -> f32 {
    d.clamp(f16::MIN.to_f32(), f16::MAX.to_f32())
}

/// Rounded to the nearest, ties to even.
#[inline(always)]
fn q8_0(x: &[f32; BLOCK], amax: f32) -> (f16, Stored) {
    let d = clamped(amax / 127.0);
    let inverse = 1.0 / d;
    // Adding 1.5 * 2^23 rounds to an integer in the lowest bits.
    let stored = x.map(|x| ((x * inverse).clamp(-127.0, 127.0) + (12_582_912.0 + 128.0)).to_bits() as u8);
    (f16::from_f32(d), stored)
}

#[inline(always)]
fn q4_0(x: &[f32; BLOCK], max: f32) -> (f16, Stored) {
    let d = clamped(max / -8.0);
    let inverse = 1.0 / d;
    // SAFETY: they are from 0 to 15.
    let stored = x.map(|x| unsafe { (x * inverse + 8.5).clamp(0.0, 15.0).to_int_unchecked::<i32>() } as u8);
    (f16::from_f32(d), stored)
}

/// Half-way between the levels of iq4_nl: `BORDERS[i]` lies below level i.
const BORDERS: [f32; 16] =
    [f32::NEG_INFINITY, -115.5, -93.5, -74.0, -57.0, -42.0, -28.5, -16.0, -4.5, 7.0, 19.0, 31.5, 45.5, 61.0, 79.0, 101.0];

/// Where the largest magnitude may land in the codebook, one candidate for the scale each. llama.cpp tries 16 around -127 alone; with
/// these four, and weights that are less unequal, the error is 1% smaller.
pub(super) const TARGETS: [f32; 4] = [-114.0, -124.0, -132.0, 118.0];

/// The scale with the least squared error, weighted by x^2 + mean(x^2), of those that the candidates' choices of levels would want.
#[inline(always)]
unsafe fn iq4_nl<V: Vectors>(x: &[f32; BLOCK], max: f32) -> (f16, Stored) {
    unsafe {
        let (borders, levels) = (V::load_f32(BORDERS.as_ptr()), V::load_f32(IQ4_NL.map(f32::from).as_ptr()));
        let x = [V::load_f32(x.as_ptr()), V::load_f32(x.as_ptr().add(16))];
        // Relative to the largest, so that no power of a weight leaves f32.
        let unit = V::splat(1.0 / max);
        let y = [mul(x[0], unit), mul(x[1], unit)];
        let squares = [mul(y[0], y[0]), mul(y[1], y[1])];
        let mean = V::splat(add(squares[0], squares[1]).sum() / BLOCK as f32);
        let weights = [add(squares[0], mean), add(squares[1], mean)];
        let mut sums = [V::zero(); 2 * TARGETS.len()];
        for (i, target) in TARGETS.into_iter().enumerate() {
            for half in 0..2 {
                let level = V::look_up(levels, nearest(mul(y[half], V::splat(target)), borders));
                let weighted = mul(weights[half], level);
                sums[i] = add(sums[i], mul(weighted, y[half]));
                sums[TARGETS.len() + i] = add(sums[TARGETS.len() + i], mul(weighted, level));
            }
        }
        let mut totals = [0.0; 2 * TARGETS.len()];
        V::add_sums(&sums, &mut totals);
        let (products, squares) = totals.split_at(TARGETS.len());
        let (mut best, mut d) = (0.0f32, 0.0f32);
        for (product, square) in products.iter().zip(squares) {
            if product * product > best * square {
                best = product * product / square;
                d = product / square;
            }
        }
        let d = f16::from_f32(clamped(d * max));
        if d.to_f32() == 0.0 {
            return (f16::ZERO, NOTHING_4);
        }
        let inverse = V::splat(1.0 / d.to_f32());
        let mut stored = NOTHING_4;
        for half in 0..2 {
            let indices = V::to_ints(nearest(mul(x[half], inverse), borders));
            for (to, index) in stored[16 * half..].iter_mut().zip(indices) {
                *to = index as u8;
            }
        }
        (d, stored)
    }
}

/// The level nearest to each lane, by halving; of two as near, the upper one.
#[inline(always)]
unsafe fn nearest<V: Vectors>(v: V, borders: V) -> V::Sums {
    unsafe {
        let index = v.raise(V::sums(0), 8, borders);
        let index = v.raise(index, 4, borders);
        let index = v.raise(index, 2, borders);
        v.raise(index, 1, borders)
    }
}

/// `a * b`, rounded.
#[inline(always)]
unsafe fn mul<V: Vectors>(a: V, b: V) -> V {
    unsafe { V::zero().fma(a, b) }
}

#[inline(always)]
unsafe fn add<V: Vectors>(a: V, b: V) -> V {
    unsafe { a.fma(b, V::splat(1.0)) }
}
