//! Sixteen f32 lanes: the unit in which every dot product is summed, on whatever the CPU has for it.

use half::{bf16, f16};

/// Sixteen partial sums. The order of additions is the same in every implementation; whether a product is rounded before it is
/// added (no FMA) is what an instruction set may change.
pub(crate) trait Lanes: Copy {
    /// # Safety
    /// The CPU has the instructions of the implementation, here and below.
    unsafe fn zero() -> Self;
    /// # Safety
    /// `p` points to 16 readable elements; alignment is not needed, here and below.
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
    /// The sum of all lanes by a fixed tree: the upper half onto the lower, until one is left.
    ///
    /// # Safety
    /// As [`Lanes::zero`].
    unsafe fn sum(self) -> f32;
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
    unsafe fn load_f32(p: *const f32) -> Self {
        unsafe { p.cast::<Self>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Self {
        unsafe { p.cast::<[f16; 16]>().read_unaligned() }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> Self {
        unsafe { p.cast::<[bf16; 16]>().read_unaligned() }.map(bf16::to_f32)
    }
    #[inline(always)]
    unsafe fn fma(mut self, a: Self, b: Self) -> Self {
        for l in 0..16 {
            self[l] += a[l] * b[l];
        }
        self
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

#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    use std::arch::x86_64::*;

    use half::{bf16, f16};

    use super::Lanes;

    /// AVX-512F.
    impl Lanes for __m512 {
        #[inline(always)]
        unsafe fn zero() -> Self {
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        unsafe fn load_f32(p: *const f32) -> Self {
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const f16) -> Self {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const bf16) -> Self {
            unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())))) }
        }
        #[inline(always)]
        unsafe fn fma(self, a: Self, b: Self) -> Self {
            unsafe { _mm512_fmadd_ps(a, b, self) }
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe {
                let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(self)));
                sum8(_mm256_add_ps(_mm512_castps512_ps256(self), upper))
            }
        }
    }

    /// AVX2 with FMA and F16C.
    impl Lanes for [__m256; 2] {
        #[inline(always)]
        unsafe fn zero() -> Self {
            unsafe { [_mm256_setzero_ps(); 2] }
        }
        #[inline(always)]
        unsafe fn load_f32(p: *const f32) -> Self {
            unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const f16) -> Self {
            unsafe { [0, 8].map(|i| _mm256_cvtph_ps(_mm_loadu_si128(p.add(i).cast()))) }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const bf16) -> Self {
            unsafe {
                [0, 8].map(|i| {
                    let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(i).cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
                })
            }
        }
        #[inline(always)]
        unsafe fn fma(self, a: Self, b: Self) -> Self {
            unsafe { [_mm256_fmadd_ps(a[0], b[0], self[0]), _mm256_fmadd_ps(a[1], b[1], self[1])] }
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe { sum8(_mm256_add_ps(self[0], self[1])) }
        }
    }

    /// # Safety
    /// The CPU has AVX.
    #[inline(always)]
    unsafe fn sum8(v: __m256) -> f32 {
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
}
