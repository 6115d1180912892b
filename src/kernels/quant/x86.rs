//! [`Vectors`] of AVX-512 and AVX2.

use std::arch::x86_64::*;

use super::encode::{CELL, CELLS};
use super::vectors::Vectors;
use crate::kernels::lanes::Lanes;

/// AVX-512 F, BW and VL; the dot product takes VNNI.
impl Vectors for __m512 {
    type Quants = __m512i;
    type Sums = __m512i;
    type Levels = __m512i;
    const BIASED: bool = true;

    #[inline(always)]
    unsafe fn levels(levels: &[i8; 16]) -> __m512i {
        unsafe {
            let signed = _mm512_broadcast_i32x4(_mm_loadu_si128(levels.as_ptr().cast()));
            _mm512_xor_si512(signed, _mm512_set1_epi8(-128))
        }
    }
    #[inline(always)]
    unsafe fn quants(p: *const u8) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn quants_4(p: *const u8, levels: __m512i) -> [__m512i; 2] {
        unsafe {
            let both = _mm512_loadu_si512(p.cast());
            let half = _mm512_set1_epi8(15);
            let (low, high) = (_mm512_and_si512(both, half), _mm512_and_si512(_mm512_srli_epi16::<4>(both), half));
            [_mm512_shuffle_epi8(levels, low), _mm512_shuffle_epi8(levels, high)]
        }
    }
    #[inline(always)]
    unsafe fn sums(v: i32) -> __m512i {
        unsafe { _mm512_set1_epi32(v) }
    }
    #[inline(always)]
    unsafe fn dot(sums: __m512i, quants: __m512i, x: *const i8) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(sums, quants, _mm512_set1_epi32(x.cast::<i32>().read_unaligned())) }
    }
    #[inline(always)]
    unsafe fn to_f32(sums: __m512i) -> Self {
        unsafe { _mm512_cvtepi32_ps(sums) }
    }
    #[inline(always)]
    unsafe fn to_ints(sums: __m512i) -> [i32; 16] {
        // SAFETY: both are 64 bytes of integers.
        unsafe { std::mem::transmute(sums) }
    }
    #[inline(always)]
    unsafe fn look_up(table: Self, index: __m512i) -> Self {
        unsafe { _mm512_permutexvar_ps(index, table) }
    }
    #[inline(always)]
    unsafe fn raise(self, index: __m512i, by: i32, table: Self) -> __m512i {
        unsafe {
            let raised = _mm512_add_epi32(index, _mm512_set1_epi32(by));
            let passes = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(self, _mm512_permutexvar_ps(raised, table));
            _mm512_mask_mov_epi32(index, passes, raised)
        }
    }
    #[inline(always)]
    unsafe fn nearest_of_iq4_nl(self) -> __m512i {
        unsafe {
            let (levels, borders) = (CELLS.0.as_ptr(), CELLS.1.as_ptr());
            // A lane that rounding moves to the next cell is below that cell's border.
            let at = _mm512_fmadd_ps(self, _mm512_set1_ps(1.0 / CELL), _mm512_set1_ps(128.0 / CELL));
            let cell = _mm512_cvttps_epi32(_mm512_max_ps(_mm512_min_ps(at, _mm512_set1_ps(31.0)), _mm512_setzero_ps()));
            let border = _mm512_permutex2var_ps(_mm512_loadu_ps(borders), cell, _mm512_loadu_ps(borders.add(16)));
            let level = _mm512_permutex2var_epi32(_mm512_loadu_si512(levels.cast()), cell, _mm512_loadu_si512(levels.add(16).cast()));
            let passes = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(self, border);
            _mm512_mask_add_epi32(level, passes, level, _mm512_set1_epi32(1))
        }
    }
    #[inline(always)]
    unsafe fn quants_more<const HIGH: usize>(p: *const u8, g: usize, offset: u8) -> __m512i {
        unsafe {
            let (low, high) = (_mm512_loadu_si512(p.add(64 * (g % 4)).cast()), _mm512_loadu_si512(p.add(64 * (4 + g * HIGH / 8)).cast()));
            let low = if g < 4 { low } else { _mm512_srli_epi16::<4>(low) };
            let high = _mm512_srl_epi16(high, _mm_cvtsi32_si128((g * HIGH % 8) as i32));
            let high = _mm512_slli_epi16::<4>(_mm512_and_si512(high, _mm512_set1_epi8((1 << HIGH) - 1)));
            let all = _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi8(15)), high);
            _mm512_add_epi8(all, _mm512_set1_epi8((128 - offset) as i8))
        }
    }
    #[inline(always)]
    unsafe fn load_bytes(p: *const u8) -> Self {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn columns(four: __m512i) -> [Self; 4] {
        unsafe {
            [byte(four), byte(_mm512_srli_epi32::<8>(four)), byte(_mm512_srli_epi32::<16>(four)), byte(_mm512_srli_epi32::<24>(four))]
        }
    }
    #[inline(always)]
    unsafe fn columns_4<const HIGH: bool>(p: *const u8, levels: Self) -> [Self; 4] {
        unsafe {
            let both = _mm512_loadu_si512(p.cast());
            let all = if HIGH { _mm512_srli_epi32::<4>(both) } else { both };
            // The permutation looks at the lowest 4 bits alone.
            [
                _mm512_permutexvar_ps(all, levels),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<8>(all), levels),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<16>(all), levels),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<24>(all), levels),
            ]
        }
    }
}

/// The lowest byte of each lane, less 128: as the last bits of 2^23, from which 2^23 + 128 is taken.
///
/// # Safety
/// The CPU has AVX-512F.
#[inline(always)]
unsafe fn byte(v: __m512i) -> __m512 {
    unsafe {
        let magic = _mm512_castps_si512(_mm512_set1_ps(8_388_608.0));
        let v = _mm512_or_si512(_mm512_and_si512(v, _mm512_set1_epi32(255)), magic);
        _mm512_sub_ps(_mm512_castsi512_ps(v), _mm512_set1_ps(8_388_608.0 + 128.0))
    }
}

/// AVX2 with FMA and F16C: rows 0..8, then 8..16.
impl Vectors for [__m256; 2] {
    type Quants = [__m256i; 2];
    type Sums = [__m256i; 2];
    type Levels = __m256i;
    const BIASED: bool = false;

    #[inline(always)]
    unsafe fn levels(levels: &[i8; 16]) -> __m256i {
        unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(levels.as_ptr().cast())) }
    }
    #[inline(always)]
    unsafe fn quants(p: *const u8) -> [__m256i; 2] {
        unsafe {
            let flip = _mm256_set1_epi8(-128);
            let (a, b) = (_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast()));
            [_mm256_xor_si256(a, flip), _mm256_xor_si256(b, flip)]
        }
    }
    #[inline(always)]
    unsafe fn quants_4(p: *const u8, levels: __m256i) -> [[__m256i; 2]; 2] {
        unsafe {
            let (a, b) = (_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast()));
            let (a2, b2) = (_mm256_srli_epi16::<4>(a), _mm256_srli_epi16::<4>(b));
            [[level(levels, a), level(levels, b)], [level(levels, a2), level(levels, b2)]]
        }
    }
    #[inline(always)]
    unsafe fn sums(v: i32) -> [__m256i; 2] {
        unsafe { [_mm256_set1_epi32(v); 2] }
    }
    #[inline(always)]
    unsafe fn dot(sums: [__m256i; 2], quants: [__m256i; 2], x: *const i8) -> [__m256i; 2] {
        unsafe {
            let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
            [dot8(sums[0], quants[0], x), dot8(sums[1], quants[1], x)]
        }
    }
    #[inline(always)]
    unsafe fn to_f32(sums: [__m256i; 2]) -> Self {
        unsafe { [_mm256_cvtepi32_ps(sums[0]), _mm256_cvtepi32_ps(sums[1])] }
    }
    #[inline(always)]
    unsafe fn to_ints(sums: [__m256i; 2]) -> [i32; 16] {
        // SAFETY: both are 64 bytes of integers.
        unsafe { std::mem::transmute(sums) }
    }
    #[inline(always)]
    unsafe fn look_up(table: Self, index: [__m256i; 2]) -> Self {
        unsafe { [nibble(table, index[0]), nibble(table, index[1])] }
    }
    #[inline(always)]
    unsafe fn raise(self, index: [__m256i; 2], by: i32, table: Self) -> [__m256i; 2] {
        unsafe {
            let by = _mm256_set1_epi32(by);
            [raise8(self[0], index[0], by, table), raise8(self[1], index[1], by, table)]
        }
    }
    #[inline(always)]
    unsafe fn quants_more<const HIGH: usize>(p: *const u8, g: usize, offset: u8) -> [__m256i; 2] {
        unsafe { [more8::<HIGH>(p, g, offset), more8::<HIGH>(p.add(32), g, offset)] }
    }
    #[inline(always)]
    unsafe fn load_bytes(p: *const u8) -> Self {
        unsafe {
            let (a, b) = (_mm_loadl_epi64(p.cast()), _mm_loadl_epi64(p.add(8).cast()));
            [_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(a)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(b))]
        }
    }
    #[inline(always)]
    unsafe fn columns(q: [__m256i; 2]) -> [Self; 4] {
        unsafe {
            let mut out = [Self::zero(); 4];
            for half in 0..2 {
                let q = q[half];
                out[0][half] = _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(_mm256_slli_epi32::<24>(q)));
                out[1][half] = _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(_mm256_slli_epi32::<16>(q)));
                out[2][half] = _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(_mm256_slli_epi32::<8>(q)));
                out[3][half] = _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(q));
            }
            out
        }
    }
    #[inline(always)]
    unsafe fn columns_4<const HIGH: bool>(p: *const u8, levels: Self) -> [Self; 4] {
        unsafe {
            let (a, b) = (_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast()));
            let (a, b) = if HIGH { (_mm256_srli_epi32::<4>(a), _mm256_srli_epi32::<4>(b)) } else { (a, b) };
            [
                [nibble(levels, a), nibble(levels, b)],
                [nibble(levels, _mm256_srli_epi32::<8>(a)), nibble(levels, _mm256_srli_epi32::<8>(b))],
                [nibble(levels, _mm256_srli_epi32::<16>(a)), nibble(levels, _mm256_srli_epi32::<16>(b))],
                [nibble(levels, _mm256_srli_epi32::<24>(a)), nibble(levels, _mm256_srli_epi32::<24>(b))],
            ]
        }
    }
}

/// Half of [`Vectors::quants_more`].
///
/// # Safety
/// The CPU has AVX2, and `p` points to a half of the block's first vector.
#[inline(always)]
unsafe fn more8<const HIGH: usize>(p: *const u8, g: usize, offset: u8) -> __m256i {
    unsafe {
        let (low, high) = (p.add(64 * (g % 4)), p.add(64 * (4 + g * HIGH / 8)));
        let (low, high) = (_mm256_loadu_si256(low.cast()), _mm256_loadu_si256(high.cast()));
        let low = if g < 4 { low } else { _mm256_srli_epi16::<4>(low) };
        let high = _mm256_srl_epi16(high, _mm_cvtsi32_si128((g * HIGH % 8) as i32));
        let high = _mm256_slli_epi16::<4>(_mm256_and_si256(high, _mm256_set1_epi8((1 << HIGH) - 1)));
        let all = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi8(15)), high);
        _mm256_sub_epi8(all, _mm256_set1_epi8(offset as i8))
    }
}

/// The levels of the low halves of bytes.
///
/// # Safety
/// The CPU has AVX2, here and below.
#[inline(always)]
unsafe fn level(levels: __m256i, v: __m256i) -> __m256i {
    unsafe { _mm256_shuffle_epi8(levels, _mm256_and_si256(v, _mm256_set1_epi8(15))) }
}

/// Adds products of 4 signed bytes with 4 signed bytes. The instruction wants one side unsigned, so signs go over to `x`; two
/// products of at most 128 * 127 don't saturate.
#[inline(always)]
unsafe fn dot8(sums: __m256i, quants: __m256i, x: __m256i) -> __m256i {
    unsafe {
        let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(quants), _mm256_sign_epi8(x, quants));
        _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }
}

/// Half of [`Vectors::raise`].
#[inline(always)]
unsafe fn raise8(v: __m256, index: __m256i, by: __m256i, table: [__m256; 2]) -> __m256i {
    unsafe {
        let passes = _mm256_cmp_ps::<_CMP_GE_OQ>(v, nibble(table, _mm256_add_epi32(index, by)));
        _mm256_add_epi32(index, _mm256_and_si256(_mm256_castps_si256(passes), by))
    }
}

/// The level of the lowest 4 bits of each lane: one permutation for either half of the levels.
#[inline(always)]
unsafe fn nibble(levels: [__m256; 2], v: __m256i) -> __m256 {
    unsafe {
        let (low, high) = (_mm256_permutevar8x32_ps(levels[0], v), _mm256_permutevar8x32_ps(levels[1], v));
        _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(v)))
    }
}
