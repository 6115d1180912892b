//! Sixteen f32 lanes: the unit in which every dot product is summed, on whatever the CPU has for it.

#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86;

use half::{bf16, f16};

/// Sixteen partial sums. The order of additions is the same in every implementation; whether a product is rounded before it is
/// added (no FMA) is what an instruction set may change.
pub(crate) trait Lanes: Copy {
    /// # Safety
    /// The CPU has the instructions of the implementation, here and below.
    unsafe fn zero() -> Self;
    /// # Safety
    /// As [`Lanes::zero`].
    unsafe fn splat(v: f32) -> Self;
    /// # Safety
    /// `p` points to 16 writable elements; alignment is not needed, here and below.
    unsafe fn store(self, p: *mut f32);
    /// # Safety
    /// `p` points to 16 readable elements.
    unsafe fn load_f32(p: *const f32) -> Self;
    /// # Safety
    /// As [`Lanes::load_f32`].
    unsafe fn load_f16(p: *const f16) -> Self;
    /// # Safety
    /// As [`Lanes::load_f32`].
    unsafe fn load_bf16(p: *const bf16) -> Self;
    /// `self + a * b`, lane by lane.
    ///
    /// # Safety
    /// As [`Lanes::zero`].
    unsafe fn fma(self, a: Self, b: Self) -> Self;
    /// The larger, lane by lane; that of `other` where one is a NaN.
    ///
    /// # Safety
    /// As [`Lanes::zero`].
    unsafe fn max(self, other: Self) -> Self;
    /// The largest of all lanes.
    ///
    /// # Safety
    /// As [`Lanes::zero`].
    unsafe fn largest(self) -> f32;
    /// 2^n of each lane, which holds 1.5 * 2^23 + n with n in -127..=127; 0 for the least of them.
    ///
    /// # Safety
    /// As [`Lanes::zero`].
    unsafe fn power_of_two(self) -> Self;
    /// The sum of all lanes by a fixed tree: the upper half onto the lower, until one is left.
    ///
    /// # Safety
    /// As [`Lanes::zero`].
    unsafe fn sum(self) -> f32;
    /// `totals[i] += sums[i].sum()`
    ///
    /// # Safety
    /// As [`Lanes::zero`].
    #[inline(always)]
    unsafe fn add_sums(sums: &[Self], totals: &mut [f32]) {
        for i in 0..sums.len() {
            totals[i] += unsafe { sums[i].sum() };
        }
    }
    /// Makes rows of columns: lane j of vector i becomes lane i of vector j. Bits stay as they are.
    ///
    /// # Safety
    /// As [`Lanes::zero`].
    #[inline(always)]
    unsafe fn transpose(square: &mut [Self; 16]) {
        let mut rows = [[0.0; 16]; 16];
        for i in 0..16 {
            unsafe { square[i].store(rows[i].as_mut_ptr()) };
        }
        for (j, column) in square.iter_mut().enumerate() {
            *column = unsafe { Self::load_f32(rows.map(|row| row[j]).as_ptr()) };
        }
    }
    /// Asks for the cache line at `p`, which need not be readable, to be fetched into L2. Nothing where there is no such instruction.
    ///
    /// # Safety
    /// As [`Lanes::zero`].
    #[inline(always)]
    unsafe fn prefetch<T>(_p: *const T) {}
    /// [`Lanes::prefetch`] into L1.
    ///
    /// # Safety
    /// As [`Lanes::zero`].
    #[inline(always)]
    unsafe fn prefetch_near<T>(_p: *const T) {}
}

/// What a weight can be stored as, and how 16 of it become lanes.
pub(crate) trait Element: Copy + Default + Send + Sync {
    /// # Safety
    /// As [`Lanes::load_f32`].
    unsafe fn load<L: Lanes>(p: *const Self) -> L;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(p: *const Self) -> L {
        unsafe { L::load_f32(p) }
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(p: *const Self) -> L {
        unsafe { L::load_f16(p) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(p: *const Self) -> L {
        unsafe { L::load_bf16(p) }
    }
}

/// Any CPU: an array, which the compiler may vectorise.
impl Lanes for [f32; 16] {
    #[inline(always)]
    unsafe fn zero() -> Self {
        [0.0; 16]
    }
    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        [v; 16]
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe { p.cast::<Self>().write_unaligned(self) }
    }
    #[inline(always)]
    unsafe fn load_f32(p: *const f32) -> Self {
        unsafe { p.cast::<Self>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Self {
        unsafe { p.cast::<[f16; 16]>().read_unaligned() }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> Self {
        // A shift alone, which vectorises; `bf16::to_f32` looks for NaNs.
        unsafe { p.cast::<[bf16; 16]>().read_unaligned() }.map(|v| f32::from_bits(u32::from(v.to_bits()) << 16))
    }
    #[inline(always)]
    unsafe fn fma(mut self, a: Self, b: Self) -> Self {
        for l in 0..16 {
            self[l] += a[l] * b[l];
        }
        self
    }
    #[inline(always)]
    unsafe fn max(mut self, other: Self) -> Self {
        for l in 0..16 {
            self[l] = if self[l] > other[l] { self[l] } else { other[l] };
        }
        self
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        self.into_iter().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        // n is in the lowest bits and becomes the exponent.
        self.map(|v| f32::from_bits((v.to_bits() << 23).wrapping_add(1.0f32.to_bits())))
    }
    #[inline(always)]
    unsafe fn sum(mut self) -> f32 {
        for half in [8, 4, 2, 1] {
            for l in 0..half {
                self[l] += self[l + half];
            }
        }
        self[0]
    }
}
