//! A tile of outputs as a sum of outer products, and the packing of weights for it.

use std::ops::Range;

use crate::kernels::lanes::{Element, Lanes};
#[cfg(target_arch = "x86_64")]
use crate::kernels::linear::ahead_in_rows;
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
    pub(super) fn multiply_one(self, weights: &Matrix, rows: Range<usize>, x: &[u32], put: impl FnMut(usize, usize, f32)) {
        assert!(rows.end <= weights.rows(), "rows {rows:?} of a matrix of {} rows", weights.rows());
        assert_eq!(x.len(), weights.cols().div_ceil(self.elements()), "a word for each pair of columns");
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
trait Arithmetic {
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

/// The products of weight rows with a single activation row: four sums side by side.
///
/// A checkpoint's tensors begin at any multiple of 8 bytes. Vectors that lie in two cache lines cost up to a quarter of the speed of memory, so
/// weights and activations are taken by vectors that don't, and what lies in front of the first and behind the last of a row by one that overlaps it.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn one<A: Arithmetic>(weights: &Matrix, rows: Range<usize>, x: &[u32], mut put: impl FnMut(usize, usize, f32)) {
    let stride = if weights.rows() > 1 { weights.row(1).as_ptr().addr() - weights.row(0).as_ptr().addr() } else { 0 };
    let word = weights.dtype().bytes(A::ELEMENTS);
    let ends = Ends::new(x, weights.row(0).as_ptr().addr(), stride, word, weights.cols() / A::ELEMENTS);
    for r in rows {
        let dot = unsafe {
            match weights.row(r) {
                Row::F32(w) => dot::<A, _, 0>(w, x, &ends, stride),
                Row::F16(w) => dot::<A, _, AHEAD>(w, x, &ends, stride),
                Row::Bf16(w) => dot::<A, _, AHEAD>(w, x, &ends, stride),
            }
        };
        put(r, 0, dot);
    }
}

/// Words that lie in one cache line.
#[cfg(target_arch = "x86_64")]
#[repr(align(64))]
struct Line([f32; LANES]);

/// Words of an activation row that the first and the last vector of a weight row meet, zeros where those between have them.
#[cfg(target_arch = "x86_64")]
struct Ends {
    /// Words in front of the first vector that lies in one line.
    front: usize,
    head: [f32; LANES],
    /// What those between meet, as they lie.
    whole: Vec<Line>,
    /// Vectors from there on.
    steps: usize,
    /// `None` if nothing is left behind them.
    tail: Option<[f32; LANES]>,
}

#[cfg(target_arch = "x86_64")]
impl Ends {
    /// For rows of so many whole words, the first at `addr`.
    fn new(x: &[u32], addr: usize, stride: usize, word: usize, words: usize) -> Self {
        let vector = LANES * word;
        let gap = addr.wrapping_neg() % vector;
        // Rows that lie each in its own way, or are short, are taken from their starts.
        let alike = stride.is_multiple_of(vector) && gap.is_multiple_of(word) && words >= 2 * LANES;
        let front = if alike { gap / word } else { 0 };
        let (steps, rest) = ((words - front) / LANES, (words - front) % LANES);
        let mut head = [0.0; LANES];
        head.iter_mut().zip(&x[..front]).for_each(|(to, x)| *to = f32::from_bits(*x));
        let tail = (rest > 0 && words >= LANES).then(|| {
            let last = &x[words - LANES..words];
            std::array::from_fn(|i| if i < LANES - rest { 0.0 } else { f32::from_bits(last[i]) })
        });
        let whole = x[front..].as_chunks().0.iter().take(steps).map(|line| Line(line.map(f32::from_bits))).collect();
        Self { front, head, whole, steps, tail }
    }
}

/// How far ahead the weights of a single activation row are fetched, in bytes, where they take two bytes; of four the CPU itself
/// fetches enough. Measured.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 8 << 10;

#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn dot<A: Arithmetic, W: Element, const AHEAD: usize>(w: &[W], x: &[u32], ends: &Ends, stride: usize) -> f32 {
    let Ends { front, head, whole: x_of_whole, steps, tail } = ends;
    let (step, words) = (LANES * A::ELEMENTS, w.len() / A::ELEMENTS);
    let (from, x) = (w.as_ptr(), x.as_ptr().cast::<f32>());
    // From the weights at hand to those that will be needed: as long as both are in rows as far apart as at first, and then.
    let (bytes, last) = (size_of_val(w), size_of_val(w).saturating_sub(AHEAD % size_of_val(w).max(1)));
    let ahead = [0, last].map(|at| ahead_in_rows(at, AHEAD, bytes, stride));
    unsafe {
        let (mut sums, one) = ([A::Lanes::zero(); 4], A::Lanes::splat(1.0));
        if *front > 0 {
            sums[3] = A::add_products(sums[3], A::words(from), A::Lanes::load_f32(head.as_ptr()));
        }
        let whole = from.add(front * A::ELEMENTS);
        for s in 0..*steps {
            let w = whole.add(s * step);
            let at = s * step * size_of::<W>();
            if AHEAD > 0 && at.is_multiple_of(64) {
                A::Lanes::prefetch_near(w.wrapping_byte_add(ahead[usize::from(at >= last)]));
            }
            sums[s % 4] = A::add_products(sums[s % 4], A::words(w), A::Lanes::load_f32(x_of_whole.get_unchecked(s).0.as_ptr()));
        }
        let mut done = front + steps * LANES;
        if let Some(tail) = tail {
            sums[2] = A::add_products(sums[2], A::words(from.add((words - LANES) * A::ELEMENTS)), A::Lanes::load_f32(tail.as_ptr()));
            done = words;
        }
        let rest = w.len() - done * A::ELEMENTS;
        if rest > 0 {
            let (mut last, mut last_x) = ([W::default(); 2 * LANES], [0.0f32; LANES]);
            last[..rest].copy_from_slice(&w[done * A::ELEMENTS..]);
            std::ptr::copy_nonoverlapping(x.add(done), last_x.as_mut_ptr(), rest.div_ceil(A::ELEMENTS));
            sums[1] = A::add_products(sums[1], A::words(last.as_ptr()), A::Lanes::load_f32(last_x.as_ptr()));
        }
        sums[0].fma(sums[1], one).fma(sums[2].fma(sums[3], one), one).sum()
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::mem::transmute;

    use super::*;

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
