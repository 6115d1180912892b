//! A tile of outputs as a sum of outer products, and the packing of weights for it.

use std::ops::Range;

use crate::kernels::lanes::{Element, Lanes};
use crate::kernels::linear::{Isa, LANES};
use crate::kernels::matrix::{DType, Matrix, Row};

/// What multiplies: an instruction set, with f32 or with pairs of bf16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kernel {
    /// AVX-512 with BF16: sums of two products, of bf16, in f32.
    #[cfg(target_arch = "x86_64")]
    Pairs,
    /// f32, whatever the weights are stored as.
    Products(Isa),
}

impl Kernel {
    /// The fastest for weights of this dtype.
    pub(super) fn best(dtype: DType) -> Self {
        Self::available(dtype)[0]
    }

    /// Those that this CPU has for weights of this dtype, best first.
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables))] // only x86 has a kernel of its own for a dtype
    pub(super) fn available(dtype: DType) -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        if dtype == DType::Bf16 && is_x86_feature_detected!("avx512bf16") && Isa::best() == Isa::Avx512 {
            found.push(Self::Pairs);
        }
        found.extend(Isa::available().into_iter().map(Self::Products));
        found
    }

    /// Elements of a row in a word.
    pub(super) fn elements(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Pairs => 2,
            Self::Products(_) => 1,
        }
    }

    /// Weight rows of a tile, a multiple of 16.
    pub(super) fn rows(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Pairs | Self::Products(Isa::Avx512) => 2 * LANES,
            Self::Products(_) => LANES,
        }
    }

    /// Activation rows of the widest tile.
    pub(super) fn widest(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Pairs | Self::Products(Isa::Avx512) => 12,
            Self::Products(_) => 6,
        }
    }

    /// Whether it takes a single activation row too.
    pub(super) fn takes_one(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Pairs | Self::Products(Isa::Avx512) => true,
            Self::Products(_) => false,
        }
    }

    /// Fewest activation rows that repay the packing, by measurement.
    pub(super) fn fewest(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Products(Isa::Avx512) => 48,
            _ => 12,
        }
    }

    /// Columns `k` of 16 weight rows in words, `[steps, 16]`.
    pub(super) fn pack(self, rows: [Row<'_>; LANES], k: Range<usize>, words: &mut [u32]) {
        assert_eq!(words.len(), k.len().div_ceil(self.elements()) * LANES, "a word a step and row");
        match rows[0] {
            Row::F32(_) => self.pack_as(rows.map(|r| if let Row::F32(w) = r { &w[k.clone()] } else { unreachable!() }), words),
            Row::F16(_) => self.pack_as(rows.map(|r| if let Row::F16(w) = r { &w[k.clone()] } else { unreachable!() }), words),
            Row::Bf16(_) => self.pack_as(rows.map(|r| if let Row::Bf16(w) = r { &w[k.clone()] } else { unreachable!() }), words),
            Row::Quantised(_) => unreachable!("quantised weights are packed"),
        }
    }

    fn pack_as<W: Element>(self, rows: [&[W]; LANES], words: &mut [u32]) {
        // SAFETY: `available` lists only what the CPU has.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Self::Pairs => x86::pack_pairs(rows, words),
                #[cfg(target_arch = "x86_64")]
                Self::Products(Isa::Avx512) => x86::pack_avx512(rows, words),
                #[cfg(target_arch = "x86_64")]
                Self::Products(Isa::Avx2) => x86::pack_avx2(rows, words),
                #[cfg(target_arch = "aarch64")]
                Self::Products(Isa::Neon) => pack::<Products<[std::arch::aarch64::float32x4_t; 4]>, W>(rows, words),
                Self::Products(Isa::Portable) => pack::<Products<[f32; 16]>, W>(rows, words),
            }
        }
    }

    /// Calls `put(row, 0, weights[row] . x)` for every row of `rows`, of a single activation row in words.
    ///
    /// # Panics
    /// If the rows are not the matrix's or `x` is not as long, or for a kernel that takes many rows alone.
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables))] // only x86 has such a kernel
    pub(super) fn multiply_one(self, weights: &Matrix, rows: Range<usize>, x: &[u32], put: impl FnMut(usize, usize, f32)) {
        assert!(rows.end <= weights.rows(), "rows {rows:?} of a matrix of {} rows", weights.rows());
        assert_eq!(x.len(), weights.cols().div_ceil(self.elements()), "a word for every {} columns", self.elements());
        match self {
            // SAFETY: `available` lists only what the CPU has; the lengths are checked.
            #[cfg(target_arch = "x86_64")]
            Self::Pairs => unsafe { x86::multiply_one_pairs(weights, rows, x, put) },
            #[cfg(target_arch = "x86_64")]
            Self::Products(Isa::Avx512) => unsafe { x86::multiply_one_avx512(weights, rows, x, put) },
            Self::Products(_) => unreachable!("{self:?} takes many rows"),
        }
    }

    /// `sums[j * stride + r] += w[r] . x[j]` for a tile of weight rows, `[rows / 16, steps, 16]`, and a panel of `width` activation rows, `[steps, width]`.
    pub(super) fn multiply(self, width: usize, w: &[u32], x: &[u32], sums: &mut [f32], stride: usize, ahead: &[*const u8]) {
        let steps = w.len() / self.rows();
        assert!(w.len() == steps * self.rows() && x.len() == steps * width && sums.len() >= (width - 1) * stride + self.rows());
        // SAFETY: `available` lists only what the CPU has; the lengths are checked.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Self::Pairs => x86::multiply_pairs(width, w, x, sums, stride, ahead),
                #[cfg(target_arch = "x86_64")]
                Self::Products(Isa::Avx512) => x86::multiply_avx512(width, w, x, sums, stride, ahead),
                #[cfg(target_arch = "x86_64")]
                Self::Products(Isa::Avx2) => x86::multiply_avx2(width, w, x, sums, stride, ahead),
                #[cfg(target_arch = "aarch64")]
                Self::Products(Isa::Neon) => tiles::<Products<[std::arch::aarch64::float32x4_t; 4]>, 1>(width, w, x, sums, stride, ahead),
                Self::Products(Isa::Portable) => tiles::<Products<[f32; 16]>, 1>(width, w, x, sums, stride, ahead),
            }
        }
    }
}

/// How words are multiplied.
pub(super) trait Arithmetic {
    type Lanes: Lanes;
    /// Elements of a row in a word.
    const ELEMENTS: usize;
    /// 16 words, of `16 * ELEMENTS` elements.
    ///
    /// # Safety
    /// As [`Lanes::load_f32`], of so many elements.
    unsafe fn words<W: Element>(p: *const W) -> Self::Lanes;
    /// `sum + w * x`, word by word.
    ///
    /// # Safety
    /// As [`Lanes::zero`].
    unsafe fn add_products(sum: Self::Lanes, w: Self::Lanes, x: Self::Lanes) -> Self::Lanes;
}

/// Words are f32.
struct Products<L>(L);

impl<L: Lanes> Arithmetic for Products<L> {
    type Lanes = L;
    const ELEMENTS: usize = 1;
    #[inline(always)]
    unsafe fn words<W: Element>(p: *const W) -> L {
        unsafe { W::load(p) }
    }
    #[inline(always)]
    unsafe fn add_products(sum: L, w: L, x: L) -> L {
        unsafe { sum.fma(w, x) }
    }
}

/// Transposes squares of 16 rows by 16 words.
#[inline(always)]
#[expect(clippy::needless_range_loop)] // all sides are indexed alike
unsafe fn pack<A: Arithmetic, W: Element>(rows: [&[W]; LANES], words: &mut [u32]) {
    let n = rows[0].len();
    // The pointers below stay inside the rows because all have the same length.
    assert!(rows.iter().all(|row| row.len() == n));
    let stride = LANES * A::ELEMENTS;
    let (whole, tail) = words.as_chunks_mut::<{ LANES * LANES }>();
    unsafe {
        let mut square = [A::Lanes::zero(); LANES];
        for (s, words) in whole.iter_mut().take(n / stride).enumerate() {
            for r in 0..LANES {
                square[r] = A::words(rows[r].as_ptr().add(s * stride));
            }
            A::Lanes::transpose(&mut square);
            for s in 0..LANES {
                square[s].store(words.as_mut_ptr().add(s * LANES).cast());
            }
        }
        let done = n / stride * stride;
        if done < n {
            for r in 0..LANES {
                let mut padded = [W::default(); 2 * LANES];
                padded[..n - done].copy_from_slice(&rows[r][done..]);
                square[r] = A::words(padded.as_ptr());
            }
            A::Lanes::transpose(&mut square);
            // The last square may be whole where the last word is not.
            let words = if tail.is_empty() { &mut whole[n / stride][..] } else { tail };
            for (s, words) in words.chunks_exact_mut(LANES).enumerate() {
                square[s].store(words.as_mut_ptr().cast());
            }
        }
    }
}

/// A tile of R * 16 weight rows, of the width that is given.
#[inline(always)]
unsafe fn tiles<A: Arithmetic, const R: usize>(width: usize, w: &[u32], x: &[u32], sums: &mut [f32], stride: usize, ahead: &[*const u8]) {
    unsafe {
        match width {
            5 => tile::<A, R, 5>(w, x, sums, stride, ahead),
            6 => tile::<A, R, 6>(w, x, sums, stride, ahead),
            7 => tile::<A, R, 7>(w, x, sums, stride, ahead),
            8 => tile::<A, R, 8>(w, x, sums, stride, ahead),
            9 => tile::<A, R, 9>(w, x, sums, stride, ahead),
            10 => tile::<A, R, 10>(w, x, sums, stride, ahead),
            11 => tile::<A, R, 11>(w, x, sums, stride, ahead),
            12 => tile::<A, R, 12>(w, x, sums, stride, ahead),
            _ => unreachable!("a panel of {width} rows"),
        }
    }
}

/// One word of all rows a step; of the lines `ahead` one is fetched a step.
#[inline(always)]
#[expect(clippy::needless_range_loop)] // all sides are indexed alike
unsafe fn tile<A: Arithmetic, const R: usize, const C: usize>(w: &[u32], x: &[u32], sums: &mut [f32], stride: usize, ahead: &[*const u8]) {
    let steps = x.len() / C;
    let (w, x, sums) = (w.as_ptr().cast::<f32>(), x.as_ptr().cast::<f32>(), sums.as_mut_ptr());
    unsafe {
        let mut sum = [[A::Lanes::zero(); R]; C];
        for s in 0..steps {
            if let Some(line) = ahead.get(s) {
                A::Lanes::prefetch(*line);
            }
            let mut held = [A::Lanes::zero(); R];
            for i in 0..R {
                held[i] = A::Lanes::load_f32(w.add((i * steps + s) * LANES));
            }
            for j in 0..C {
                let x = A::Lanes::splat(*x.add(s * C + j));
                for i in 0..R {
                    sum[j][i] = A::add_products(sum[j][i], held[i], x);
                }
            }
        }
        for j in 0..C {
            for i in 0..R {
                let to = sums.add(j * stride + i * LANES);
                A::Lanes::load_f32(to).fma(sum[j][i], A::Lanes::splat(1.0)).store(to);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::mem::transmute;

    use super::*;
    use crate::kernels::fast::one::one;

    /// Words are pairs of bf16, whose two products are added to an f32.
    struct Pairs;

    impl Arithmetic for Pairs {
        type Lanes = __m512;
        const ELEMENTS: usize = 2;
        #[inline(always)]
        unsafe fn words<W: Element>(p: *const W) -> __m512 {
            unsafe { _mm512_loadu_ps(p.cast()) }
        }
        #[inline(always)]
        unsafe fn add_products(sum: __m512, w: __m512, x: __m512) -> __m512 {
            unsafe { _mm512_dpbf16_ps(sum, transmute::<__m512, __m512bh>(w), transmute::<__m512, __m512bh>(x)) }
        }
    }

    macro_rules! entries {
        ($features:literal, $arithmetic:ty, $rows:literal, $pack:ident, $multiply:ident $(, $one:ident)?) => {
            $(
                #[target_feature(enable = $features)]
                pub(super) unsafe fn $one(weights: &Matrix, rows: Range<usize>, x: &[u32], put: impl FnMut(usize, usize, f32)) {
                    unsafe { one::<$arithmetic>(weights, rows, x, put) }
                }
            )?
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $pack<W: Element>(rows: [&[W]; LANES], words: &mut [u32]) {
                unsafe { pack::<$arithmetic, W>(rows, words) }
            }
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $multiply(width: usize, w: &[u32], x: &[u32], sums: &mut [f32], stride: usize, ahead: &[*const u8]) {
                unsafe { tiles::<$arithmetic, $rows>(width, w, x, sums, stride, ahead) }
            }
        };
    }
    entries!("avx512f,avx512vl,avx512bw", Products<__m512>, 2, pack_avx512, multiply_avx512, multiply_one_avx512);
    entries!("avx512f,avx512vl,avx512bw,avx512bf16", Pairs, 2, pack_pairs, multiply_pairs, multiply_one_pairs);
    entries!("avx2,fma,f16c", Products<[__m256; 2]>, 1, pack_avx2, multiply_avx2);
}
