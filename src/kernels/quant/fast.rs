//! Dot products with int8 activations.
//!
//! Within a block the products are added as integers, exactly. Then, block by block as K rises,
//! `total = fma(sum, d_weight * d_activation, total)` in f32, where an instruction set without FMA rounds the product; where something is added to
//! all weights of a block, then `total = fma(m, d_activation * sum of the block's values, total)`. Halves with scales of their own are added as
//! integers, each times its scale. So an output depends on its two rows alone, and all instruction sets with FMA give the same bits.

use std::ops::Range;

use super::Isa;
use super::form::{Form, Levels, Plain4, Plain8, adds, by_form, quants, scales};
use super::format::{BLOCK, QuantFormat, Scaling};
use super::int8::{GROUP, Int8Rows, Measure};
use super::packed::{Packed, TILE};
use super::tile::TileAt;
use super::vectors::Vectors;

/// Bytes of activations that are taken through all weights of a task at once: they stay in L2.
const PASS: usize = 384 << 10;

/// A tile and a group of activation rows that it meets.
#[derive(Clone, Copy)]
struct Job<'a> {
    tile: TileAt<'a>,
    levels: Levels,
    values: &'a [[i8; BLOCK]],
    measures: &'a [Measure],
    /// Rows of the group in storage, and the first of those that are taken.
    width: usize,
    first: usize,
    /// The tile is not in a cache yet.
    fetch: bool,
}

type Kernel = unsafe fn(&Job<'_>, &mut [[f32; TILE]; GROUP]);

/// Calls `put(row, i, dots)` with the dot products of the weight rows from `row` on with activation row `i`, a run for each tile of `rows`,
/// which start at a multiple of [`TILE`].
///
/// # Panics
/// If the rows are not the matrix's, or the activations' columns not its own.
pub(crate) fn packed_rows_int8(w: &Packed, rows: Range<usize>, x: &Int8Rows, put: impl FnMut(usize, usize, &[f32])) {
    packed_rows_int8_on(Isa::best(), w, rows, x, put);
}

pub(super) fn packed_rows_int8_on(isa: Isa, w: &Packed, rows: Range<usize>, x: &Int8Rows, mut put: impl FnMut(usize, usize, &[f32])) {
    w.check(&rows);
    if rows.is_empty() || x.rows() == 0 {
        return;
    }
    assert_eq!((x.cols(), x.lead()), (w.cols(), w.lead()), "the inputs' columns are the matrix's");
    let groups = x.rows().div_ceil(GROUP);
    let pass = (PASS / (GROUP * BLOCK * w.shape.blocks()).max(1)).max(1);
    let mut totals = [[0.0; TILE]; GROUP];
    for first_group in (0..groups).step_by(pass) {
        for first in rows.clone().step_by(TILE) {
            let tile = w.tile_at(first / TILE);
            for group in first_group..groups.min(first_group + pass) {
                let (count, width, values, measures) = x.group(group);
                let job = Job { tile, levels: w.format().levels(), values, measures, width, first: 0, fetch: group == first_group };
                let (at_once, kernel) = kernel_of(w.format(), isa, width);
                for first in (0..count).step_by(at_once) {
                    let job = Job { first, fetch: job.fetch && first == 0, ..job };
                    // SAFETY: the CPU has what `isa` names; the slices have the lengths that the shapes say.
                    unsafe { kernel(&job, &mut totals) };
                }
                for (i, totals) in totals[..count].iter().enumerate() {
                    put(first, group * GROUP + i, &totals[..TILE.min(rows.end - first)]);
                }
            }
        }
    }
}

/// The kernel for groups of a width, and how many of their rows it takes at once. Every pair of both is compiled by itself: those of formats that
/// weights are quantised to have one for each width, the others, and CPUs without vectors, one for all that are not single.
fn kernel_of(format: QuantFormat, isa: Isa, width: usize) -> (usize, Kernel) {
    match format {
        QuantFormat::Q8_0 if isa != Isa::Portable => (width, for_width::<Plain8>(isa, width)),
        QuantFormat::Q4_0 | QuantFormat::Iq4Nl if isa != Isa::Portable => (width, for_width::<Plain4>(isa, width)),
        _ if width < 4 => (1, by_form!(format, F => any_kernel::<F, 1>(isa))),
        _ => (4, by_form!(format, F => any_kernel::<F, 4>(isa))),
    }
}

fn for_width<F: Form>(isa: Isa, width: usize) -> Kernel {
    match width {
        1 => kernel::<F, 1>(isa),
        2 => kernel::<F, 2>(isa),
        4 => kernel::<F, 4>(isa),
        8 => kernel::<F, 8>(isa),
        12 => kernel::<F, 12>(isa),
        _ => kernel::<F, GROUP>(isa),
    }
}

fn any_kernel<F: Form, const C: usize>(isa: Isa) -> Kernel {
    if isa == Isa::Portable { dots::<[f32; 16], F, C> } else { kernel::<F, C>(isa) }
}

fn kernel<F: Form, const C: usize>(isa: Isa) -> Kernel {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Vnni => vnni::<F, C>,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx2 => avx2::<F, C>,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => neon::<F, C>,
        Isa::Portable => unreachable!("it has one kernel for many widths"),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn vnni<F: Form, const C: usize>(job: &Job<'_>, totals: &mut [[f32; TILE]; GROUP]) {
    unsafe { dots::<std::arch::x86_64::__m512, F, C>(job, totals) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<F: Form, const C: usize>(job: &Job<'_>, totals: &mut [[f32; TILE]; GROUP]) {
    unsafe { dots::<[std::arch::x86_64::__m256; 2], F, C>(job, totals) }
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon,dotprod,fp16")]
unsafe fn neon<F: Form, const C: usize>(job: &Job<'_>, totals: &mut [[f32; TILE]; GROUP]) {
    unsafe { dots::<super::neon::Neon, F, C>(job, totals) }
}

/// The dot products of the rows of a tile with C activation rows.
#[inline(always)]
unsafe fn dots<V: Vectors, F: Form, const C: usize>(job: &Job<'_>, totals: &mut [[f32; TILE]; GROUP]) {
    let &Job { tile, levels, values, measures, width, first: of_group, fetch } = job;
    // A constant, where all rows of a group are taken at once.
    let width = if C == 1 || C == 4 { width } else { C };
    assert!(values.len() == tile.blocks * width && measures.len() == tile.blocks * width && of_group + C <= width);
    let (x, measures) = (values.as_ptr(), measures.as_ptr());
    unsafe {
        let (book, offset) = (V::levels(&levels.book), levels.offset);
        let mut total = [V::zero(); C];
        for b in 0..tile.blocks {
            let p = tile.quants::<F>(b);
            // Loops and no closures: intrinsics would not be inlined through those.
            let mut w = [quants::<V, F>(p, book, offset, 0); 8];
            for (g, w) in w.iter_mut().enumerate().skip(1) {
                *w = quants::<V, F>(p, book, offset, g);
            }
            let scales = scales::<V, F>(&tile, b);
            if fetch {
                tile.prefetch::<V, F>(b);
            }
            // Four rows at once hide the instructions' latency.
            for first in (0..C).step_by(4) {
                let few = if C < 4 { C } else { 4 };
                let at = b * width + of_group + first;
                let mut dots = [V::zero(); 4];
                if F::SCALING == Scaling::Halves {
                    for half in 0..2 {
                        let corrections: [i32; 4] = std::array::from_fn(|i| if i < few { (*measures.add(at + i)).half(half) } else { 0 });
                        let sums = sums_of::<V>(&w[4 * half..][..4], x.add(at), 16 * half, few, corrections);
                        for i in 0..few {
                            dots[i] = dots[i].fma(V::to_f32(sums[i]), scales.halves[half]);
                        }
                    }
                } else {
                    let corrections: [i32; 4] = std::array::from_fn(|i| if i < few { (*measures.add(at + i)).correction } else { 0 });
                    let sums = sums_of::<V>(&w, x.add(at), 0, few, corrections);
                    for i in 0..few {
                        dots[i] = V::to_f32(sums[i]);
                    }
                }
                for (i, dot) in dots[..few].iter().enumerate() {
                    let measure = *measures.add(at + i);
                    let scale = V::zero().fma(scales.d, V::splat(measure.scale));
                    total[first + i] = total[first + i].fma(*dot, scale);
                    if adds(F::SCALING) {
                        total[first + i] = total[first + i].fma(scales.added, V::splat(measure.sum()));
                    }
                }
            }
        }
        for (total, out) in total.iter().zip(&mut totals[of_group..]) {
            total.store(out.as_mut_ptr());
        }
    }
}

/// The integer sums of up to 4 activation rows with some vectors of a block, the first of which has column `column`.
///
/// # Safety
/// The CPU has the instructions of `V`; there are `few` activation blocks at `x`.
#[inline(always)]
unsafe fn sums_of<V: Vectors>(w: &[V::Quants], x: *const [i8; BLOCK], column: usize, few: usize, corrections: [i32; 4]) -> [V::Sums; 4] {
    unsafe {
        let mut sums = [V::sums(0); 4];
        if V::BIASED {
            for (sum, correction) in sums.iter_mut().zip(corrections) {
                *sum = V::sums(correction);
            }
        }
        for (g, w) in w.iter().enumerate() {
            for (i, sum) in sums[..few].iter_mut().enumerate() {
                *sum = V::dot(*sum, *w, x.add(i).cast::<i8>().add(column + 4 * g));
            }
        }
        sums
    }
}
