//! [`Lanes`] of NEON.

use std::arch::aarch64::*;

use half::{bf16, f16};

use super::Lanes;

/// NEON, which every aarch64 has.
impl Lanes for [float32x4_t; 4] {
    #[inline(always)]
    unsafe fn zero() -> Self {
        unsafe { Self::splat(0.0) }
    }
    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        unsafe { [vdupq_n_f32(v); 4] }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        for i in 0..4 {
            unsafe { vst1q_f32(p.add(4 * i), self[i]) };
        }
    }
    #[inline(always)]
    unsafe fn load_f32(p: *const f32) -> Self {
        unsafe { [vld1q_f32(p), vld1q_f32(p.add(4)), vld1q_f32(p.add(8)), vld1q_f32(p.add(12))] }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Self {
        // Rust has no stable intrinsic for it.
        unsafe { Self::load_f32(p.cast::<[f16; 16]>().read_unaligned().map(f16::to_f32).as_ptr()) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> Self {
        unsafe {
            let p = p.cast::<u16>();
            let mut lanes = Self::zero();
            for i in 0..4 {
                lanes[i] = vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.add(4 * i))));
            }
            lanes
        }
    }
    #[inline(always)]
    unsafe fn fma(mut self, a: Self, b: Self) -> Self {
        for i in 0..4 {
            self[i] = unsafe { vfmaq_f32(self[i], a[i], b[i]) };
        }
        self
    }
    #[inline(always)]
    unsafe fn max(mut self, other: Self) -> Self {
        for i in 0..4 {
            // Where one is a NaN neither is greater, and it is the other's.
            self[i] = unsafe { vbslq_f32(vcgtq_f32(self[i], other[i]), self[i], other[i]) };
        }
        self
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        unsafe { vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(self[0], self[1]), vmaxnmq_f32(self[2], self[3]))) }
    }
    #[inline(always)]
    unsafe fn power_of_two(mut self) -> Self {
        for lane in &mut self {
            unsafe {
                let exponent = vshlq_n_u32::<23>(vreinterpretq_u32_f32(*lane));
                *lane = vreinterpretq_f32_u32(vaddq_u32(exponent, vdupq_n_u32(1.0f32.to_bits())));
            }
        }
        self
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe {
            let four = vaddq_f32(vaddq_f32(self[0], self[2]), vaddq_f32(self[1], self[3]));
            let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
            vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
        }
    }
}
