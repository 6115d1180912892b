//! From 32 weights to a scale and small integers.
//!
//! Every operation is rounded by itself, whatever the instruction set, so that all store the same bytes.
//!
//! Hostile values: a block with a NaN or an infinity has a scale of NaN, so that the outputs of its row are NaN, as they would be
//! without quantisation, and those of no other. A scale beyond f16 becomes 65504 and the values saturate. A scale that f16 rounds
//! to zero makes the block zero.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::format::{BLOCK, IQ4_NL, QuantFormat};
use super::packed::TILE;
use super::vectors::Vectors;

/// The values as they are stored, before they are laid out in a tile: q + 128, or the 4 bits.
pub(super) type Quants = [u8; BLOCK];

/// What a block without weight stores: bytes that decode to a number, times a scale of 0 or NaN.
const NOTHING: Quants = [0x80; BLOCK];
const NOTHING_4: Quants = [8; BLOCK];

/// Below it a block is nothing: far below what f16 can scale, and before reciprocals overflow.
const LEAST: f32 = 1e-15;

/// The scale of a row's block of q8_0 or q4_0, and its values.
#[inline(always)]
pub(super) fn encode(format: QuantFormat, x: &[f32; BLOCK]) -> (f16, Quants) {
    let magnitude = |v: f32| v.to_bits() & 0x7fff_ffff;
    let largest = x.iter().fold(0, |m, &v| m.max(magnitude(v)));
    let nothing = if format == QuantFormat::Q8_0 { NOTHING } else { NOTHING_4 };
    let amax = f32::from_bits(largest);
    if !amax.is_finite() {
        return (f16::NAN, nothing);
    }
    if amax < LEAST {
        return (f16::ZERO, nothing);
    }
    if format == QuantFormat::Q8_0 {
        return q8_0(x, amax);
    }
    // The first of the largest, found without a branch.
    let of_largest = |(&v, i): (&f32, u32)| if magnitude(v) == largest { i } else { BLOCK as u32 - 1 };
    let first = x.iter().zip(0..BLOCK as u32).map(of_largest).fold(u32::MAX, u32::min);
    q4_0(x, x[first as usize])
}

/// The nearest scale that f16 has on this side of infinity.
#[inline(always)]
fn clamped(d: f32) -> f32 {
    d.clamp(f16::MIN.to_f32(), f16::MAX.to_f32())
}

/// Rounded to the nearest, ties to even.
#[inline(always)]
fn q8_0(x: &[f32; BLOCK], amax: f32) -> (f16, Quants) {
    let d = clamped(amax / 127.0);
    let inverse = 1.0 / d;
    // Adding 1.5 * 2^23 rounds to an integer in the lowest bits.
    let stored = x.map(|x| ((x * inverse).clamp(-127.0, 127.0) + (12_582_912.0 + 128.0)).to_bits() as u8);
    (f16::from_f32(d), stored)
}

#[inline(always)]
fn q4_0(x: &[f32; BLOCK], max: f32) -> (f16, Quants) {
    let d = clamped(max / -8.0);
    let inverse = 1.0 / d;
    // SAFETY: they are from 0 to 15.
    let stored = x.map(|x| unsafe { (x * inverse + 8.5).clamp(0.0, 15.0).to_int_unchecked::<i32>() } as u8);
    (f16::from_f32(d), stored)
}

/// Half-way between the levels of iq4_nl: `BORDERS[i]` lies below level i.
pub(super) const BORDERS: [f32; 16] =
    [f32::NEG_INFINITY, -115.5, -93.5, -74.0, -57.0, -42.0, -28.5, -16.0, -4.5, 7.0, 19.0, 31.5, 45.5, 61.0, 79.0, 101.0];

/// Cells of [`CELL`] from -128 on: the level at the lower end of each, and the border in it, of which there is one at most.
#[cfg(target_arch = "x86_64")]
pub(super) const CELLS: ([i32; 32], [f32; 32]) = {
    let (mut levels, mut borders) = ([0; 32], [f32::INFINITY; 32]);
    let mut cell = 0;
    while cell < 32 {
        let lower = -128.0 + CELL * cell as f32;
        let mut level = 1;
        while level < 16 {
            if BORDERS[level] < lower {
                levels[cell] = level as i32;
            } else if BORDERS[level] < lower + CELL {
                assert!(borders[cell] == f32::INFINITY, "one border a cell");
                borders[cell] = BORDERS[level];
            }
            level += 1;
        }
        cell += 1;
    }
    (levels, borders)
};
#[cfg(target_arch = "x86_64")]
pub(super) const CELL: f32 = 8.0;

/// Where the largest magnitude may land in the codebook, one candidate for the scale each. llama.cpp tries 16 around -127 alone; with
/// these four, and weights that are less unequal, the error is 1% smaller.
pub(super) const TARGETS: [f32; 4] = [-114.0, -124.0, -132.0, 118.0];

/// Blocks of iq4_nl of the 16 rows of a tile, a lane a row: `x` are their columns. Writes the 4 vectors of [`super::packed`] and the scales.
///
/// The scale is that with the least squared error, weighted by x^2 + mean(x^2), of those that the candidates' choices of levels would want.
///
/// # Safety
/// The CPU has the instructions of `V`.
#[inline(always)]
pub(super) unsafe fn iq4_nl<V: Vectors>(x: &[[f32; TILE]; BLOCK], quants: &mut [[[u8; 4]; TILE]], scales: &mut [f16; TILE]) {
    unsafe {
        let (levels, minus) = (V::load_f32(IQ4_NL.map(f32::from).as_ptr()), V::splat(-1.0));
        let (mut top, mut bottom) = (V::zero(), V::zero());
        // A NaN or an infinity makes this one.
        let mut poison = V::zero();
        for column in x {
            let column = V::load_f32(column.as_ptr());
            (top, bottom) = (top.max(column), bottom.max(mul(column, minus)));
            poison = add(poison, mul(column, V::zero()));
        }
        let (top, bottom, poison) = (lanes(top), lanes(bottom), lanes(poison));
        let (mut largest, mut unit) = ([0.0; TILE], [0.0; TILE]);
        for r in 0..TILE {
            largest[r] = if top[r] >= bottom[r] { top[r] } else { -bottom[r] };
            let sound = top[r].max(bottom[r]) >= LEAST && poison[r] == 0.0;
            unit[r] = if sound { 1.0 / largest[r] } else { 0.0 };
        }
        // Relative to the largest, so that no power of a weight leaves f32.
        let unit_lanes = V::load_f32(unit.as_ptr());
        let (mut y, mut mean) = ([V::zero(); BLOCK], V::zero());
        for k in 0..BLOCK {
            y[k] = mul(V::load_f32(x[k].as_ptr()), unit_lanes);
            mean = add(mean, mul(y[k], y[k]));
        }
        let mean = mul(mean, V::splat(1.0 / BLOCK as f32));
        let (mut products, mut squares) = ([V::zero(); TARGETS.len()], [V::zero(); TARGETS.len()]);
        for k in 0..BLOCK {
            let y = y[k];
            let weight = add(mul(y, y), mean);
            for i in 0..TARGETS.len() {
                let level = V::look_up(levels, mul(y, V::splat(TARGETS[i])).nearest_of_iq4_nl());
                let weighted = mul(weight, level);
                products[i] = add(products[i], mul(weighted, y));
                squares[i] = add(squares[i], mul(weighted, level));
            }
        }
        let (mut best, mut d) = ([0.0f32; TILE], [0.0f32; TILE]);
        for (product, square) in products.into_iter().zip(squares) {
            let (product, square) = (lanes(product), lanes(square));
            for r in 0..TILE {
                let (fit, score) = (product[r] / square[r], product[r] * product[r] / square[r]);
                (best[r], d[r]) = if score > best[r] { (score, fit) } else { (best[r], d[r]) };
            }
        }
        for r in 0..TILE {
            d[r] = clamped(d[r] * largest[r]);
        }
        scales.convert_from_f32_slice(&d);
        scales.convert_to_f32_slice(&mut d);
        let mut inverse = [0.0; TILE];
        for r in 0..TILE {
            inverse[r] = if d[r] == 0.0 || unit[r] == 0.0 { 0.0 } else { 1.0 / d[r] };
        }
        let inverse_lanes = V::load_f32(inverse.as_ptr());
        for (g, out) in quants.iter_mut().enumerate() {
            let mut dwords = [0u32; TILE];
            for j in 0..4 {
                let k = 4 * g + j;
                let (low, high) = (nearest::<V>(&x[k], inverse_lanes), nearest::<V>(&x[BLOCK / 2 + k], inverse_lanes));
                for r in 0..TILE {
                    dwords[r] |= ((low[r] | high[r] << 4) as u32) << (8 * j);
                }
            }
            for r in 0..TILE {
                out[r] = dwords[r].to_le_bytes();
            }
        }
        for r in (0..TILE).filter(|&r| inverse[r] == 0.0) {
            scales[r] = if poison[r] == 0.0 { f16::ZERO } else { f16::NAN };
            quants.iter_mut().for_each(|out| out[r] = [NOTHING_4[0] * 17; 4]);
        }
    }
}

/// The levels nearest to `x * scale`.
#[inline(always)]
unsafe fn nearest<V: Vectors>(x: &[f32; TILE], scale: V) -> [i32; TILE] {
    unsafe { V::to_ints(mul(V::load_f32(x.as_ptr()), scale).nearest_of_iq4_nl()) }
}

#[inline(always)]
unsafe fn lanes<V: Vectors>(v: V) -> [f32; TILE] {
    let mut out = [0.0; TILE];
    unsafe { v.store(out.as_mut_ptr()) };
    out
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
