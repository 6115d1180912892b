//! What the kernels of quantised weights need of an instruction set, beyond [`Lanes`]: the lanes are the 16 rows of a tile.

use super::encode::BORDERS;
use crate::kernels::lanes::Lanes;

/// Vectors of 64 quants: 4 columns of 16 rows, a dword a row.
pub(super) trait Vectors: Lanes {
    /// 64 quants as factors of a dot product.
    type Quants: Copy;
    /// 16 sums.
    type Sums: Copy;
    /// What the 16 values of 4 bits are worth as factors.
    type Levels: Copy;
    /// The factors are 128 above what they are worth, and so unsigned; otherwise they are exact.
    const BIASED: bool;

    /// # Safety
    /// The CPU has the instructions of the implementation, here and below.
    unsafe fn levels(levels: &[i8; 16]) -> Self::Levels;
    /// A vector of 8-bit values.
    ///
    /// # Safety
    /// `p` points to 64 readable bytes, here and below.
    unsafe fn quants(p: *const u8) -> Self::Quants;
    /// The low and the high halves of a vector of 4-bit values.
    ///
    /// # Safety
    /// As [`Vectors::quants`].
    unsafe fn quants_4(p: *const u8, levels: Self::Levels) -> [Self::Quants; 2];
    /// 16 times the same.
    ///
    /// # Safety
    /// As [`Vectors::levels`].
    unsafe fn sums(v: i32) -> Self::Sums;
    /// Adds to each lane its row's 4 products with the 4 values at `x`, which are not -128.
    ///
    /// # Safety
    /// `x` points to 4 readable values.
    unsafe fn dot(sums: Self::Sums, quants: Self::Quants, x: *const i8) -> Self::Sums;
    /// # Safety
    /// As [`Vectors::levels`].
    unsafe fn to_f32(sums: Self::Sums) -> Self;
    /// # Safety
    /// As [`Vectors::levels`].
    unsafe fn to_ints(sums: Self::Sums) -> [i32; 16];
    /// `table[index]` of each lane.
    ///
    /// # Safety
    /// The indices are below 16, here and below.
    unsafe fn look_up(table: Self, index: Self::Sums) -> Self;
    /// The indices, raised by `by` where that finds an element of `table` that is not above `self`.
    ///
    /// # Safety
    /// As [`Vectors::look_up`], of the raised indices.
    unsafe fn raise(self, index: Self::Sums, by: i32, table: Self) -> Self::Sums;
    /// The level of iq4_nl nearest to each lane; of two as near, the upper one.
    ///
    /// # Safety
    /// As [`Vectors::levels`].
    #[inline(always)]
    unsafe fn nearest_of_iq4_nl(self) -> Self::Sums {
        unsafe {
            let borders = Self::load_f32(BORDERS.as_ptr());
            let index = self.raise(Self::sums(0), 8, borders);
            let index = self.raise(index, 4, borders);
            let index = self.raise(index, 2, borders);
            self.raise(index, 1, borders)
        }
    }

    /// Vector `g` of a block of values of 4 bits and `HIGH` more, which lie behind those; `offset` is taken from them.
    ///
    /// # Safety
    /// As [`Vectors::quants`], of the whole block; `g` is below 8.
    unsafe fn quants_more<const HIGH: usize>(p: *const u8, g: usize, offset: u8) -> Self::Quants;
    /// What the 4 columns of a vector are worth.
    ///
    /// # Safety
    /// As [`Vectors::levels`].
    unsafe fn columns(quants: Self::Quants) -> [Self; 4];
    /// 16 unsigned bytes.
    ///
    /// # Safety
    /// `p` points to 16 readable bytes.
    unsafe fn load_bytes(p: *const u8) -> Self;
    /// The 4 columns in the low or the high halves of a vector of 4-bit values.
    ///
    /// # Safety
    /// As [`Vectors::quants`].
    unsafe fn columns_4<const HIGH: bool>(p: *const u8, levels: Self) -> [Self; 4];
}

/// Any CPU.
impl Vectors for [f32; 16] {
    type Quants = [i8; 64];
    type Sums = [i32; 16];
    type Levels = [i8; 16];
    const BIASED: bool = false;

    #[inline(always)]
    unsafe fn levels(levels: &[i8; 16]) -> [i8; 16] {
        *levels
    }
    #[inline(always)]
    unsafe fn quants(p: *const u8) -> [i8; 64] {
        unsafe { p.cast::<[u8; 64]>().read_unaligned() }.map(|q| (q ^ 0x80) as i8)
    }
    #[inline(always)]
    unsafe fn quants_4(p: *const u8, levels: [i8; 16]) -> [[i8; 64]; 2] {
        let both = unsafe { p.cast::<[u8; 64]>().read_unaligned() };
        [both.map(|q| levels[usize::from(q & 15)]), both.map(|q| levels[usize::from(q >> 4)])]
    }
    #[inline(always)]
    unsafe fn sums(v: i32) -> [i32; 16] {
        [v; 16]
    }
    #[inline(always)]
    unsafe fn dot(mut sums: [i32; 16], quants: [i8; 64], x: *const i8) -> [i32; 16] {
        let x = unsafe { x.cast::<[i8; 4]>().read_unaligned() };
        for (sum, q) in sums.iter_mut().zip(quants.as_chunks::<4>().0) {
            for j in 0..4 {
                *sum += i32::from(q[j]) * i32::from(x[j]);
            }
        }
        sums
    }
    #[inline(always)]
    unsafe fn to_f32(sums: [i32; 16]) -> Self {
        sums.map(|s| s as f32)
    }
    #[inline(always)]
    unsafe fn to_ints(sums: [i32; 16]) -> [i32; 16] {
        sums
    }
    #[inline(always)]
    unsafe fn look_up(table: Self, index: [i32; 16]) -> Self {
        index.map(|i| table[i as usize])
    }
    #[inline(always)]
    unsafe fn raise(self, mut index: [i32; 16], by: i32, table: Self) -> [i32; 16] {
        for (index, v) in index.iter_mut().zip(self) {
            *index += if v >= table[(*index + by) as usize] { by } else { 0 };
        }
        index
    }
    #[inline(always)]
    unsafe fn quants_more<const HIGH: usize>(p: *const u8, g: usize, offset: u8) -> [i8; 64] {
        let vector = |at: usize| unsafe { p.add(64 * at).cast::<[u8; 64]>().read_unaligned() };
        let (low, high) = (vector(g % 4), vector(4 + g * HIGH / 8));
        std::array::from_fn(|i| {
            let more = high[i] >> (g * HIGH % 8) & ((1 << HIGH) - 1);
            (low[i] >> (g / 4 * 4) & 15 | more << 4) as i8 - offset as i8
        })
    }
    #[inline(always)]
    unsafe fn load_bytes(p: *const u8) -> Self {
        unsafe { p.cast::<[u8; 16]>().read_unaligned() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn columns(quants: [i8; 64]) -> [Self; 4] {
        std::array::from_fn(|j| std::array::from_fn(|r| f32::from(quants[4 * r + j])))
    }
    #[inline(always)]
    unsafe fn columns_4<const HIGH: bool>(p: *const u8, levels: Self) -> [Self; 4] {
        let both = unsafe { p.cast::<[u8; 64]>().read_unaligned() };
        std::array::from_fn(|j| {
            std::array::from_fn(|r| {
                let q = both[4 * r + j];
                levels[usize::from(if HIGH { q >> 4 } else { q & 15 })]
            })
        })
    }
}
