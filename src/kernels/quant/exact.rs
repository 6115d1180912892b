//! Dot products with f32 activations.
//!
//! The order of additions is fixed, so that an output depends on its two rows alone. Blocks have the whole matrix's borders. Within
//! a block there are four sums by k mod 4, each from zero as `s = fma(q, x, s)` with the weight's integer or level q, k rising;
//! then `total = fma((s0 + s1) + (s2 + s3), d, total)`, block by block; where something is added to all weights of a block, then
//! `total = fma(m, sum of the block's x, total)`. The scales of halves are part of q, exactly. An instruction set without FMA rounds the products.
//!
//! A single activation row takes weights from their tiles as they stream by. More rows share weights that are decoded to f32 first, some
//! hundred columns of a few tiles, so that these stay in L2 and a block of activations in L1.

use std::borrow::Cow;
use std::ops::Range;

use super::Isa;
use super::form::{Form, Levels, adds, by_form, columns, scales, sum_of};
use super::format::{BLOCK, QuantFormat};
use super::int8::block_of;
use super::packed::{Packed, TILE};
use super::tile::TileAt;
use super::vectors::Vectors;

/// Blocks that are decoded at once, of so many tiles, for so many activation rows.
const CHUNK: usize = 8;
const TILES: usize = 4;
const PASS: usize = 256;
/// Activation rows of the widest register tile.
const WIDEST: usize = 8;

/// Calls `put(row, i, dots)` with the dot products of the weight rows from `row` on with activation row `i`, a run for each tile of `rows`,
/// which start at a multiple of [`TILE`].
///
/// # Panics
/// If the rows are not the matrix's, or the activations' lengths don't fit it.
pub(crate) fn packed_rows(w: &Packed, rows: Range<usize>, xs: &[&[f32]], put: impl FnMut(usize, usize, &[f32])) {
    packed_rows_on(Isa::best(), w, rows, xs, put);
}

pub(super) fn packed_rows_on(isa: Isa, w: &Packed, rows: Range<usize>, xs: &[&[f32]], mut put: impl FnMut(usize, usize, &[f32])) {
    w.check(&rows);
    for x in xs {
        assert_eq!(x.len(), w.cols(), "an input of {} columns for a matrix of {}", x.len(), w.cols());
    }
    let kernels = by_form!(w.format(), F => Kernels::of::<F>(isa));
    let levels = w.format().levels();
    if let [x] = xs {
        let x = padded(w, x);
        for first in rows.clone().step_by(TILE) {
            // SAFETY: the CPU has what `isa` names, here and below; the slices have the lengths that the shapes say.
            let totals = unsafe { (kernels.single)(&w.tile_at(first / TILE), levels, &x) };
            put(first, 0, &totals[..TILE.min(rows.end - first)]);
        }
        return;
    }
    let empty = || Decoded { columns: [[0.0; TILE]; CHUNK * BLOCK], d: [[0.0; TILE]; CHUNK], added: [[0.0; TILE]; CHUNK] };
    let mut decoded: Vec<Decoded> = (0..TILES).map(|_| empty()).collect();
    let mut panel = [[0.0; BLOCK]; CHUNK * WIDEST];
    // A row of totals an activation row, and some that zero rows of the panel add to.
    let stride = xs.len().min(PASS) + WIDEST;
    let mut totals = vec![[0.0; TILE]; TILES * stride];
    for (pass, xs) in xs.chunks(PASS).enumerate() {
        for first in rows.clone().step_by(TILES * TILE) {
            let tiles = first / TILE..rows.end.div_ceil(TILE).min(first / TILE + TILES);
            totals.fill([0.0; TILE]);
            for chunk in (0..w.shape.blocks()).step_by(CHUNK) {
                let blocks = chunk..w.shape.blocks().min(chunk + CHUNK);
                for (tile, out) in tiles.clone().zip(&mut decoded) {
                    unsafe { (kernels.decode)(&w.tile_at(tile), blocks.clone(), levels, out) };
                }
                let mut done = 0;
                while done < xs.len() {
                    let (width, product) = kernels.product(xs.len() - done);
                    fill_panel(&mut panel, width, &xs[done..xs.len().min(done + width)], w.lead(), blocks.clone());
                    for (t, decoded) in decoded[..tiles.len()].iter().enumerate() {
                        let totals = &mut totals[t * stride + done..][..width];
                        unsafe { product(blocks.len(), decoded, &panel, totals) };
                    }
                    done += width;
                }
            }
            for (t, tile) in tiles.enumerate() {
                let first = tile * TILE;
                for i in 0..xs.len() {
                    put(first, pass * PASS + i, &totals[t * stride + i][..TILE.min(rows.end - first)]);
                }
            }
        }
    }
}

/// The row as the blocks have it, with zeros where it has no columns.
fn padded<'x>(w: &Packed, x: &'x [f32]) -> Cow<'x, [f32]> {
    if w.lead() == 0 && x.len().is_multiple_of(BLOCK) {
        return Cow::Borrowed(x);
    }
    Cow::Owned((0..w.shape.blocks()).flat_map(|b| block_of(x, w.lead(), b)).collect())
}

/// Blocks of up to `width` rows, block by block; rows that are missing become zeros.
fn fill_panel(panel: &mut Panel, width: usize, xs: &[&[f32]], lead: usize, blocks: Range<usize>) {
    for (b, rows) in blocks.zip(panel.chunks_exact_mut(width)) {
        for (i, row) in rows.iter_mut().enumerate() {
            *row = xs.get(i).map_or([0.0; BLOCK], |x| block_of(x, lead, b));
        }
    }
}

type Panel = [[f32; BLOCK]; CHUNK * WIDEST];
/// Columns of a tile in f32, what the sums of each block are multiplied by, and what the sums of its activations are.
struct Decoded {
    columns: [[f32; TILE]; CHUNK * BLOCK],
    d: [[f32; TILE]; CHUNK],
    added: [[f32; TILE]; CHUNK],
}

/// The totals of a tile with one activation row, of as many columns as the blocks have.
type Single = unsafe fn(&TileAt<'_>, Levels, &[f32]) -> [f32; TILE];
/// Decodes up to CHUNK blocks.
type Decode = unsafe fn(&TileAt<'_>, Range<usize>, Levels, &mut Decoded);
/// Adds to totals what so many decoded blocks contribute.
type Product = unsafe fn(usize, &Decoded, &Panel, &mut [[f32; TILE]]);

/// The kernels of a format and an instruction set.
struct Kernels {
    single: Single,
    decode: Decode,
    /// By the number of activation rows, narrow to wide.
    products: &'static [(usize, Product)],
}

impl Kernels {
    fn of<F: Form>(isa: Isa) -> Self {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Vnni | Isa::Avx512 => avx512::kernels::<F>(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::kernels::<F>(),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::kernels::<F>(),
            Isa::Portable => portable::kernels::<F>(),
        }
    }

    /// The kernel for so many activation rows, or the widest.
    fn product(&self, rows: usize) -> (usize, Product) {
        let fits = self.products.iter().find(|(width, _)| *width >= rows);
        *fits.unwrap_or(&self.products[self.products.len() - 1])
    }
}

/// The kernels compiled for an instruction set, with products of these widths.
macro_rules! kernels {
    ($name:ident, $lanes:ty, [$($width:literal),+] $(, $features:literal)?) => {
        mod $name {
            use super::*;

            pub(super) fn kernels<F: Form>() -> Kernels {
                let products: &[(usize, Product)] = if adds(F::SCALING) {
                    const { &[$(($width, product::<true, $width> as Product)),+] }
                } else {
                    const { &[$(($width, product::<false, $width> as Product)),+] }
                };
                Kernels { single: single::<F>, decode: decode::<F>, products }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn single<F: Form>(tile: &TileAt<'_>, levels: Levels, x: &[f32]) -> [f32; TILE] {
                unsafe { super::single::<$lanes, F>(tile, levels, x) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn decode<F: Form>(tile: &TileAt<'_>, blocks: Range<usize>, levels: Levels, out: &mut Decoded) {
                unsafe { super::decode::<$lanes, F>(tile, blocks, levels, out) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn product<const ADDS: bool, const C: usize>(blocks: usize, w: &Decoded, x: &Panel, totals: &mut [[f32; TILE]]) {
                unsafe { super::product::<$lanes, ADDS, C>(blocks, w, x, totals) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
kernels!(avx512, std::arch::x86_64::__m512, [2, 4, 8], "avx512f,avx512bw,avx512vl");
#[cfg(target_arch = "x86_64")]
kernels!(avx2, [std::arch::x86_64::__m256; 2], [2, 4], "avx2,fma,f16c");
#[cfg(target_arch = "aarch64")]
kernels!(neon, crate::kernels::quant::neon::Neon, [2, 4], "neon,fp16");
kernels!(portable, [f32; 16], [2, 4]);

/// `(s[0] + s[1]) + (s[2] + s[3])`
#[inline(always)]
unsafe fn sum<V: Vectors>(s: [V; 4]) -> V {
    unsafe {
        let one = V::splat(1.0);
        s[0].fma(s[1], one).fma(s[2].fma(s[3], one), one)
    }
}

#[inline(always)]
unsafe fn book<V: Vectors>(levels: Levels) -> V {
    unsafe { V::load_f32(levels.book.map(f32::from).as_ptr()) }
}

#[inline(always)]
unsafe fn single<V: Vectors, F: Form>(tile: &TileAt<'_>, levels: Levels, x: &[f32]) -> [f32; TILE] {
    assert_eq!(x.len(), tile.blocks * BLOCK);
    unsafe {
        let book = book::<V>(levels);
        let mut total = V::zero();
        for (b, block) in x.as_chunks::<BLOCK>().0.iter().enumerate() {
            tile.prefetch::<V, F>(b);
            let (quants, scales) = (tile.quants::<F>(b), scales::<V, F>(tile, b));
            let x = block.as_ptr();
            let mut s = [V::zero(); 4];
            for g in 0..8 {
                let w = columns::<V, F>(quants, book, levels.offset, &scales, g);
                for j in 0..4 {
                    s[j] = s[j].fma(w[j], V::splat(*x.add(4 * g + j)));
                }
            }
            total = total.fma(sum(s), scales.d);
            if adds(F::SCALING) {
                total = total.fma(scales.added, V::splat(sum_of(block)));
            }
        }
        let mut out = [0.0; TILE];
        total.store(out.as_mut_ptr());
        out
    }
}

#[inline(always)]
unsafe fn decode<V: Vectors, F: Form>(tile: &TileAt<'_>, blocks: Range<usize>, levels: Levels, out: &mut Decoded) {
    assert!(blocks.len() <= CHUNK && blocks.end <= tile.blocks);
    unsafe {
        let book = book::<V>(levels);
        for (at, b) in blocks.enumerate() {
            tile.prefetch::<V, F>(b);
            let (quants, scales) = (tile.quants::<F>(b), scales::<V, F>(tile, b));
            scales.d.store(out.d[at].as_mut_ptr());
            scales.added.store(out.added[at].as_mut_ptr());
            let out = &mut out.columns[at * BLOCK..(at + 1) * BLOCK];
            for g in 0..8 {
                let w = columns::<V, F>(quants, book, levels.offset, &scales, g);
                for j in 0..4 {
                    w[j].store(out[4 * g + j].as_mut_ptr());
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn product<V: Vectors, const ADDS: bool, const C: usize>(blocks: usize, w: &Decoded, x: &Panel, totals: &mut [[f32; TILE]]) {
    assert!(blocks <= CHUNK && totals.len() == C && C <= WIDEST);
    unsafe {
        for at in 0..blocks {
            let (columns, rows) = (w.columns.as_ptr().add(at * BLOCK), &x[at * C..(at + 1) * C]);
            let x = rows.as_ptr();
            let mut s = [[V::zero(); C]; 4];
            for (j, s) in s.iter_mut().enumerate() {
                for k in (j..BLOCK).step_by(4) {
                    let w = V::load_f32(columns.add(k).cast());
                    for (i, s) in s.iter_mut().enumerate() {
                        *s = s.fma(w, V::splat(*x.add(i).cast::<f32>().add(k)));
                    }
                }
            }
            let (d, added) = (V::load_f32(w.d[at].as_ptr()), V::load_f32(w.added[at].as_ptr()));
            for i in 0..C {
                let to = totals[i].as_mut_ptr();
                let mut total = V::load_f32(to).fma(sum([s[0][i], s[1][i], s[2][i], s[3][i]]), d);
                if ADDS {
                    total = total.fma(added, V::splat(sum_of(&rows[i])));
                }
                total.store(to);
            }
        }
    }
}
