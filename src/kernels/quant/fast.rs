//! Dot products with int8 activations.
//!
//! Within a block the products are added as integers, exactly. Then, block by block as K rises,
//! `total = fma(sum, d_weight * d_activation, total)` in f32, where an instruction set without FMA rounds the product. So an output
//! depends on its two rows alone, and all instruction sets with FMA give the same bits.

use std::ops::Range;

use super::Isa;
use super::format::BLOCK;
use super::int8::{GROUP, Int8Rows, Measure};
use super::packed::{Packed, TILE};
use super::tile::TileAt;
use super::vectors::Vectors;

/// Bytes of activations that are taken through all weights of a task at once: they stay in L2.
const PASS: usize = 384 << 10;

/// A tile and a group of activation rows that it meets.
struct Job<'a> {
    tile: TileAt<'a>,
    levels: &'a [i8; 16],
    values: &'a [[i8; BLOCK]],
    measures: &'a [Measure],
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
                let levels = w.format().codebook();
                let job = Job { tile, levels: levels.unwrap_or(&[0; 16]), values, measures, fetch: group == first_group };
                let kernel = if levels.is_some() { kernel_of::<true>(isa, width) } else { kernel_of::<false>(isa, width) };
                // SAFETY: the CPU has what `isa` names; the slices have the lengths that the shapes say.
                unsafe { kernel(&job, &mut totals) };
                for (i, totals) in totals[..count].iter().enumerate() {
                    put(first, group * GROUP + i, &totals[..TILE.min(rows.end - first)]);
                }
            }
        }
    }
}

fn kernel_of<const NIBBLES: bool>(isa: Isa, width: usize) -> Kernel {
    match width {
        1 => kernel::<NIBBLES, 1>(isa),
        2 => kernel::<NIBBLES, 2>(isa),
        4 => kernel::<NIBBLES, 4>(isa),
        8 => kernel::<NIBBLES, 8>(isa),
        12 => kernel::<NIBBLES, 12>(isa),
        _ => kernel::<NIBBLES, GROUP>(isa),
    }
}

fn kernel<const NIBBLES: bool, const C: usize>(isa: Isa) -> Kernel {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Vnni => vnni::<NIBBLES, C>,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx2 => avx2::<NIBBLES, C>,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => neon::<NIBBLES, C>,
        Isa::Portable => dots::<[f32; 16], NIBBLES, C>,
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn vnni<const NIBBLES: bool, const C: usize>(job: &Job<'_>, totals: &mut [[f32; TILE]; GROUP]) {
    unsafe { dots::<std::arch::x86_64::__m512, NIBBLES, C>(job, totals) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<const NIBBLES: bool, const C: usize>(job: &Job<'_>, totals: &mut [[f32; TILE]; GROUP]) {
    unsafe { dots::<[std::arch::x86_64::__m256; 2], NIBBLES, C>(job, totals) }
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon,dotprod,fp16")]
unsafe fn neon<const NIBBLES: bool, const C: usize>(job: &Job<'_>, totals: &mut [[f32; TILE]; GROUP]) {
    unsafe { dots::<super::neon::Neon, NIBBLES, C>(job, totals) }
}

/// The dot products of the rows of a tile with C activation rows.
#[inline(always)]
unsafe fn dots<V: Vectors, const NIBBLES: bool, const C: usize>(job: &Job<'_>, totals: &mut [[f32; TILE]; GROUP]) {
    let Job { tile, levels, values, measures, fetch } = job;
    assert!(values.len() == tile.blocks * C && measures.len() == tile.blocks * C);
    let (x, measures) = (values.as_ptr(), measures.as_ptr());
    unsafe {
        let levels = V::levels(levels);
        let mut total = [V::zero(); C];
        for b in 0..tile.blocks {
            let w = block::<V, NIBBLES>(tile.quants(b), levels);
            let d = V::load_f16(tile.scales(b));
            if *fetch {
                tile.prefetch::<V, NIBBLES>(b);
            }
            // Four rows at once hide the instructions' latency.
            for first in (0..C).step_by(4) {
                let few = if C < 4 { C } else { 4 };
                let at = b * C + first;
                let mut sums = [V::sums(0); 4];
                if V::BIASED {
                    for (i, sum) in sums[..few].iter_mut().enumerate() {
                        *sum = V::sums((*measures.add(at + i)).correction);
                    }
                }
                for (g, w) in w.iter().enumerate() {
                    for (i, sum) in sums[..few].iter_mut().enumerate() {
                        *sum = V::dot(*sum, *w, x.add(at + i).cast::<i8>().add(4 * g));
                    }
                }
                for (i, sum) in sums[..few].iter().enumerate() {
                    let scale = V::zero().fma(d, V::splat((*measures.add(at + i)).scale));
                    total[first + i] = total[first + i].fma(V::to_f32(*sum), scale);
                }
            }
        }
        for (total, out) in total.iter().zip(totals) {
            total.store(out.as_mut_ptr());
        }
    }
}

/// The 8 vectors of a block.
#[inline(always)]
unsafe fn block<V: Vectors, const NIBBLES: bool>(p: *const u8, levels: V::Levels) -> [V::Quants; 8] {
    unsafe {
        if NIBBLES {
            let (a, b) = (V::quants_4(p, levels), V::quants_4(p.add(64), levels));
            let (c, d) = (V::quants_4(p.add(128), levels), V::quants_4(p.add(192), levels));
            [a[0], b[0], c[0], d[0], a[1], b[1], c[1], d[1]]
        } else {
            [
                V::quants(p),
                V::quants(p.add(64)),
                V::quants(p.add(128)),
                V::quants(p.add(192)),
                V::quants(p.add(256)),
                V::quants(p.add(320)),
                V::quants(p.add(384)),
                V::quants(p.add(448)),
            ]
        }
    }
}
