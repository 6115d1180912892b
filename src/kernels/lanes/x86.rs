//! [`Lanes`] of AVX-512 and AVX2.

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
    unsafe fn splat(v: f32) -> Self {
        unsafe { _mm512_set1_ps(v) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe { _mm512_storeu_ps(p, self) }
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
        // One permutation instead of widening and shifting, which share the ports that permute.
        unsafe {
            let to_upper = _mm512_cvtepu16_epi32(_mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
            let to_upper = _mm512_slli_epi32::<16>(to_upper);
            let values = _mm512_castsi256_si512(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaa_aaaa, to_upper, values))
        }
    }
    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        unsafe { _mm512_fmadd_ps(a, b, self) }
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        unsafe { _mm512_max_ps(self, other) }
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        unsafe {
            let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(self)));
            largest_of_8(_mm256_max_ps(_mm512_castps512_ps256(self), upper))
        }
    }
    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        unsafe {
            let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(self));
            _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_castps_si512(Self::splat(1.0))))
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe {
            let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(self)));
            sum8(_mm256_add_ps(_mm512_castps512_ps256(self), upper))
        }
    }
    #[inline(always)]
    unsafe fn add_sums(sums: &[Self], totals: &mut [f32]) {
        unsafe {
            let (eights, rest) = sums.as_chunks::<8>();
            let (to_eights, to_rest) = totals.as_chunks_mut::<8>();
            for i in 0..eights.len() {
                let to = to_eights[i].as_mut_ptr();
                _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), sums_of_8(&eights[i])));
            }
            for i in 0..rest.len() {
                to_rest[i] += rest[i].sum();
            }
        }
    }
    #[inline(always)]
    unsafe fn transpose(square: &mut [Self; 16]) {
        unsafe { transpose_16(square) }
    }
    #[inline(always)]
    unsafe fn prefetch<T>(p: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn prefetch_near<T>(p: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}

/// AVX2 with FMA and F16C.
impl Lanes for [__m256; 2] {
    #[inline(always)]
    unsafe fn zero() -> Self {
        unsafe { [_mm256_setzero_ps(); 2] }
    }
    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        unsafe { [_mm256_set1_ps(v); 2] }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe {
            _mm256_storeu_ps(p, self[0]);
            _mm256_storeu_ps(p.add(8), self[1]);
        }
    }
    #[inline(always)]
    unsafe fn load_f32(p: *const f32) -> Self {
        unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Self {
        unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast()))] }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> Self {
        unsafe {
            let low = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())));
            let high = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(8).cast())));
            [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
        }
    }
    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        unsafe { [_mm256_fmadd_ps(a[0], b[0], self[0]), _mm256_fmadd_ps(a[1], b[1], self[1])] }
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        unsafe { [_mm256_max_ps(self[0], other[0]), _mm256_max_ps(self[1], other[1])] }
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        unsafe { largest_of_8(_mm256_max_ps(self[0], self[1])) }
    }
    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        unsafe {
            let one = _mm256_castps_si256(_mm256_set1_ps(1.0));
            let exponents = [_mm256_slli_epi32::<23>(_mm256_castps_si256(self[0])), _mm256_slli_epi32::<23>(_mm256_castps_si256(self[1]))];
            [_mm256_castsi256_ps(_mm256_add_epi32(exponents[0], one)), _mm256_castsi256_ps(_mm256_add_epi32(exponents[1], one))]
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe { sum8(_mm256_add_ps(self[0], self[1])) }
    }
    #[inline(always)]
    unsafe fn transpose(square: &mut [Self; 16]) {
        unsafe {
            let mut quarters = [[_mm256_setzero_ps(); 8]; 4];
            for i in 0..8 {
                [quarters[0][i], quarters[1][i]] = square[i];
                [quarters[2][i], quarters[3][i]] = square[8 + i];
            }
            for quarter in &mut quarters {
                transpose_8(quarter);
            }
            for i in 0..8 {
                square[i] = [quarters[0][i], quarters[2][i]];
                square[8 + i] = [quarters[1][i], quarters[3][i]];
            }
        }
    }
    #[inline(always)]
    unsafe fn prefetch<T>(p: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn prefetch_near<T>(p: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
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

/// # Safety
/// The CPU has AVX.
#[inline(always)]
unsafe fn largest_of_8(v: __m256) -> f32 {
    unsafe {
        let four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
    }
}

/// [`Lanes::sum`] of each, by the same tree, in a third of the instructions: a vector that is halved makes room for another.
///
/// # Safety
/// The CPU has AVX-512F and AVX-512VL.
#[inline(always)]
unsafe fn sums_of_8(v: &[__m512; 8]) -> __m256 {
    unsafe {
        let (ab, cd, ef, gh) = (add_halves(v[0], v[1]), add_halves(v[2], v[3]), add_halves(v[4], v[5]), add_halves(v[6], v[7]));
        // Quarters hold 4 lanes of a, b, c, d, in this order.
        let (abcd, efgh) = (add_quarters(ab, cd), add_quarters(ef, gh));
        let (abcd, efgh) = (_mm512_castps_pd(abcd), _mm512_castps_pd(efgh));
        // Then 2 of a and of e, of b and of f, and so on.
        let two = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(abcd, efgh)), _mm512_castpd_ps(_mm512_unpackhi_pd(abcd, efgh)));
        let one = _mm512_add_ps(two, _mm512_movehdup_ps(two));
        let order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0);
        _mm512_castps512_ps256(_mm512_permutexvar_ps(order, one))
    }
}

/// The upper half of each onto its lower one: 8 lanes of a, then 8 of b.
///
/// # Safety
/// The CPU has AVX-512F.
#[inline(always)]
unsafe fn add_halves(a: __m512, b: __m512) -> __m512 {
    unsafe { _mm512_add_ps(_mm512_shuffle_f32x4::<0b01_00_01_00>(a, b), _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b)) }
}

/// The upper quarter of each half onto the lower one: 4 lanes of each half of `a`, then of `b`.
///
/// # Safety
/// The CPU has AVX-512F.
#[inline(always)]
unsafe fn add_quarters(a: __m512, b: __m512) -> __m512 {
    unsafe { _mm512_add_ps(_mm512_shuffle_f32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b)) }
}

/// Squares of 4 in each 128 bits first, then the 128 bits.
///
/// # Safety
/// The CPU has AVX-512F.
#[inline(always)]
unsafe fn transpose_16(v: &mut [__m512; 16]) {
    unsafe {
        for i in [0, 4, 8, 12] {
            let (ab, cd) = (_mm512_unpacklo_ps(v[i], v[i + 1]), _mm512_unpacklo_ps(v[i + 2], v[i + 3]));
            let (ef, gh) = (_mm512_unpackhi_ps(v[i], v[i + 1]), _mm512_unpackhi_ps(v[i + 2], v[i + 3]));
            let (ab, cd, ef, gh) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd), _mm512_castps_pd(ef), _mm512_castps_pd(gh));
            v[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
            v[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
            v[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ef, gh));
            v[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ef, gh));
        }
        for i in [0, 1, 2, 3] {
            let (low, high) = (_mm512_shuffle_f32x4::<0x44>(v[i], v[i + 4]), _mm512_shuffle_f32x4::<0x44>(v[i + 8], v[i + 12]));
            let (low2, high2) = (_mm512_shuffle_f32x4::<0xee>(v[i], v[i + 4]), _mm512_shuffle_f32x4::<0xee>(v[i + 8], v[i + 12]));
            v[i] = _mm512_shuffle_f32x4::<0x88>(low, high);
            v[i + 4] = _mm512_shuffle_f32x4::<0xdd>(low, high);
            v[i + 8] = _mm512_shuffle_f32x4::<0x88>(low2, high2);
            v[i + 12] = _mm512_shuffle_f32x4::<0xdd>(low2, high2);
        }
    }
}

/// As [`transpose_16`].
///
/// # Safety
/// The CPU has AVX.
#[inline(always)]
unsafe fn transpose_8(v: &mut [__m256; 8]) {
    unsafe {
        for i in [0, 4] {
            let (ab, cd) = (_mm256_unpacklo_ps(v[i], v[i + 1]), _mm256_unpacklo_ps(v[i + 2], v[i + 3]));
            let (ef, gh) = (_mm256_unpackhi_ps(v[i], v[i + 1]), _mm256_unpackhi_ps(v[i + 2], v[i + 3]));
            v[i] = _mm256_shuffle_ps::<0x44>(ab, cd);
            v[i + 1] = _mm256_shuffle_ps::<0xee>(ab, cd);
            v[i + 2] = _mm256_shuffle_ps::<0x44>(ef, gh);
            v[i + 3] = _mm256_shuffle_ps::<0xee>(ef, gh);
        }
        for i in [0, 1, 2, 3] {
            let (low, high) = (v[i], v[i + 4]);
            v[i] = _mm256_permute2f128_ps::<0x20>(low, high);
            v[i + 4] = _mm256_permute2f128_ps::<0x31>(low, high);
        }
    }
}
