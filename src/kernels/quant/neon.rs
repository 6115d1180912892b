//! [`Vectors`] of AArch64 with dot products and half precision.

use std::arch::aarch64::*;

use super::vectors::Vectors;
use crate::kernels::lanes::Lanes;

/// Rows 0..4, 4..8, 8..12 and 12..16.
pub(super) type Neon = [float32x4_t; 4];

#[inline(always)]
fn to_array(v: Neon) -> [f32; 16] {
    // SAFETY: both are 64 bytes of f32.
    unsafe { std::mem::transmute(v) }
}

impl Vectors for Neon {
    type Quants = [int8x16_t; 4];
    type Sums = [int32x4_t; 4];
    type Levels = int8x16_t;
    const BIASED: bool = false;

    #[inline(always)]
    unsafe fn levels(levels: &[i8; 16]) -> int8x16_t {
        unsafe { vld1q_s8(levels.as_ptr()) }
    }
    #[inline(always)]
    unsafe fn quants(p: *const u8) -> [int8x16_t; 4] {
        unsafe {
            let mut out = [vdupq_n_s8(0); 4];
            for i in 0..4 {
                out[i] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p.add(16 * i)), vdupq_n_u8(0x80)));
            }
            out
        }
    }
    #[inline(always)]
    unsafe fn quants_4(p: *const u8, levels: int8x16_t) -> [[int8x16_t; 4]; 2] {
        unsafe {
            let mut out = [[vdupq_n_s8(0); 4]; 2];
            for i in 0..4 {
                let both = vld1q_u8(p.add(16 * i));
                out[0][i] = vqtbl1q_s8(levels, vandq_u8(both, vdupq_n_u8(15)));
                out[1][i] = vqtbl1q_s8(levels, vshrq_n_u8::<4>(both));
            }
            out
        }
    }
    #[inline(always)]
    unsafe fn sums(v: i32) -> [int32x4_t; 4] {
        unsafe { [vdupq_n_s32(v); 4] }
    }
    #[inline(always)]
    unsafe fn dot(mut sums: [int32x4_t; 4], quants: [int8x16_t; 4], x: *const i8) -> [int32x4_t; 4] {
        unsafe {
            let x = vreinterpretq_s8_s32(vdupq_n_s32(x.cast::<i32>().read_unaligned()));
            for i in 0..4 {
                sums[i] = sdot(sums[i], quants[i], x);
            }
            sums
        }
    }
    #[inline(always)]
    unsafe fn to_f32(sums: [int32x4_t; 4]) -> Self {
        unsafe { [vcvtq_f32_s32(sums[0]), vcvtq_f32_s32(sums[1]), vcvtq_f32_s32(sums[2]), vcvtq_f32_s32(sums[3])] }
    }
    #[inline(always)]
    unsafe fn to_ints(sums: [int32x4_t; 4]) -> [i32; 16] {
        // SAFETY: both are 64 bytes of integers.
        unsafe { std::mem::transmute(sums) }
    }
    #[inline(always)]
    unsafe fn look_up(table: Self, index: [int32x4_t; 4]) -> Self {
        unsafe { Self::load_f32(<[f32; 16]>::look_up(to_array(table), Self::to_ints(index)).as_ptr()) }
    }
    #[inline(always)]
    unsafe fn raise(self, index: [int32x4_t; 4], by: i32, table: Self) -> [int32x4_t; 4] {
        // SAFETY: both are 64 bytes of integers.
        unsafe { std::mem::transmute(to_array(self).raise(Self::to_ints(index), by, to_array(table))) }
    }
    #[inline(always)]
    unsafe fn quants_more<const HIGH: usize>(p: *const u8, g: usize, offset: u8) -> [int8x16_t; 4] {
        unsafe {
            let mut out = [vdupq_n_s8(0); 4];
            for i in 0..4 {
                let (low, high) = (vld1q_u8(p.add(64 * (g % 4) + 16 * i)), vld1q_u8(p.add(64 * (4 + g * HIGH / 8) + 16 * i)));
                let low = if g < 4 { vandq_u8(low, vdupq_n_u8(15)) } else { vshrq_n_u8::<4>(low) };
                // To the right, which NEON spells as a negative shift to the left.
                let high = vshlq_u8(high, vdupq_n_s8(-((g * HIGH % 8) as i8)));
                let high = vshlq_n_u8::<4>(vandq_u8(high, vdupq_n_u8((1 << HIGH) - 1)));
                out[i] = vreinterpretq_s8_u8(vsubq_u8(vorrq_u8(low, high), vdupq_n_u8(offset)));
            }
            out
        }
    }
    #[inline(always)]
    unsafe fn load_bytes(p: *const u8) -> Self {
        unsafe { Self::load_f32(p.cast::<[u8; 16]>().read_unaligned().map(f32::from).as_ptr()) }
    }
    #[inline(always)]
    unsafe fn columns(quants: [int8x16_t; 4]) -> [Self; 4] {
        unsafe { columns(quants) }
    }
    #[inline(always)]
    unsafe fn columns_4<const HIGH: bool>(p: *const u8, levels: Self) -> [Self; 4] {
        unsafe {
            // All levels are small integers.
            let halves = Self::quants_4(p, Self::levels(&to_array(levels).map(|v| v as i8)));
            columns(halves[usize::from(HIGH)])
        }
    }
}

/// Byte j of all lanes, for each j.
///
/// # Safety
/// The CPU has NEON.
#[inline(always)]
unsafe fn columns(quants: [int8x16_t; 4]) -> [Neon; 4] {
    unsafe {
        let mut out = [Neon::zero(); 4];
        for i in 0..4 {
            let q = vreinterpretq_s32_s8(quants[i]);
            out[0][i] = vcvtq_f32_s32(vshrq_n_s32::<24>(vshlq_n_s32::<24>(q)));
            out[1][i] = vcvtq_f32_s32(vshrq_n_s32::<24>(vshlq_n_s32::<16>(q)));
            out[2][i] = vcvtq_f32_s32(vshrq_n_s32::<24>(vshlq_n_s32::<8>(q)));
            out[3][i] = vcvtq_f32_s32(vshrq_n_s32::<24>(q));
        }
        out
    }
}

/// `vdotq_s32`, which is not stable yet.
///
/// # Safety
/// The CPU has the dot product instructions.
#[inline(always)]
unsafe fn sdot(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    unsafe {
        std::arch::asm!(
            ".arch_extension dotprod",
            "sdot {s:v}.4s, {a:v}.16b, {b:v}.16b",
            s = inout(vreg) sums, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}
