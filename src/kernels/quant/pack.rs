//! Quantising a matrix into tiles.

use std::io;
use std::ops::Range;

use half::f16;

use super::Isa;
use super::encode::{Quants, encode, iq4_nl};
use super::format::{BLOCK, QuantFormat, Scaling};
use super::packed::{Packed, Shape, TILE};
use super::stored::Stored;
use super::vectors::Vectors;
use crate::kernels::lanes::Element;
use crate::kernels::matrix::{Blocks, Matrix, Row};
use crate::kernels::memory::zeroed;
use crate::kernels::pool::{Scatter, for_each};

/// Tiles whose source is given back to the system together.
const FORGOTTEN: usize = 16;

impl Packed {
    /// Quantises the weights at `rows` and `cols` of a whole matrix, on the threads of the pool that this is called in; those that are stored in
    /// `format` are taken over as they are.
    ///
    /// Blocks have the whole matrix's borders: the neighbours' columns in a block that `cols` cuts are stored too. `done` is told
    /// the bytes of the source that every finished tile took.
    ///
    /// # Errors
    /// If there is no memory.
    ///
    /// # Panics
    /// If a range reaches outside the matrix, which is quantised in another format, or is not and cannot be quantised to this one.
    pub(crate) fn quantise(
        whole: &Matrix,
        rows: Range<usize>,
        cols: Range<usize>,
        format: QuantFormat,
        done: &(dyn Fn(usize) + Sync),
    ) -> io::Result<Self> {
        Self::quantise_on(Isa::best(), whole, rows, cols, format, done)
    }

    pub(super) fn quantise_on(
        isa: Isa,
        whole: &Matrix,
        rows: Range<usize>,
        cols: Range<usize>,
        format: QuantFormat,
        done: &(dyn Fn(usize) + Sync),
    ) -> io::Result<Self> {
        let found = whole.dtype().quantised();
        let right = found.map_or(QuantFormat::ENCODABLE.contains(&format), |found| found == format);
        assert!(right, "{} weights cannot become {}", whole.dtype().name(), format.name());
        let shape = Shape::of(format, rows.len(), cols.len(), cols.start);
        // With all columns of its blocks, as far as the whole matrix has them.
        let blocks = cols.start - shape.lead..cols.end.next_multiple_of(BLOCK).min(whole.cols()).max(cols.end);
        let source = whole.slice(rows, blocks);
        let mut storage = zeroed(shape.bytes())?;
        let tiles = Scatter::new(&mut storage);
        for_each(shape.rows.div_ceil(TILE), |tile, _| {
            // SAFETY: every tile is one task's.
            let out = unsafe { tiles.range(tile * shape.tile_bytes()..(tile + 1) * shape.tile_bytes()) };
            let rows = tile * TILE..shape.rows.min((tile + 1) * TILE);
            let bytes = rows.len() * whole.dtype().bytes(shape.cols);
            // SAFETY: the CPU has what `isa` names.
            unsafe {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    Isa::Vnni | Isa::Avx512 => avx512(&source, rows, shape, out),
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => avx2(&source, rows, shape, out),
                    _ => fill::<[f32; 16]>(&source, rows, shape, out),
                }
            }
            // What was read is not needed again. A neighbour that is not done yet fetches its pages once more.
            if tile % FORGOTTEN == FORGOTTEN - 1 {
                source.slice((tile + 1 - FORGOTTEN) * TILE..shape.rows.min((tile + 1) * TILE), 0..source.cols()).forget();
            }
            done(bytes);
        });
        Ok(Self::new(shape, storage.make_read_only()?))
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
unsafe fn avx512(source: &Matrix, rows: Range<usize>, shape: Shape, tile: &mut [u8]) {
    unsafe { fill::<std::arch::x86_64::__m512>(source, rows, shape, tile) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2(source: &Matrix, rows: Range<usize>, shape: Shape, tile: &mut [u8]) {
    unsafe { fill::<[std::arch::x86_64::__m256; 2]>(source, rows, shape, tile) }
}

/// Writes the tile of these rows, of which there may be fewer than 16: the others keep the zeros of new memory as their scales.
#[inline(always)]
unsafe fn fill<V: Vectors>(source: &Matrix, rows: Range<usize>, shape: Shape, tile: &mut [u8]) {
    unsafe {
        match source.row(rows.start) {
            Row::F32(_) => fill_from::<V, _>(rows.map(|r| if let Row::F32(w) = source.row(r) { w } else { unreachable!() }), shape, tile),
            Row::F16(_) => fill_from::<V, _>(rows.map(|r| if let Row::F16(w) = source.row(r) { w } else { unreachable!() }), shape, tile),
            Row::Bf16(_) => fill_from::<V, _>(rows.map(|r| if let Row::Bf16(w) = source.row(r) { w } else { unreachable!() }), shape, tile),
            Row::Quantised(_) => {
                for (r, row) in rows.enumerate() {
                    let Row::Quantised(blocks) = source.row(row) else { unreachable!() };
                    take_row(blocks, r, shape, tile);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn fill_from<'w, V: Vectors, W: Element + 'w>(rows: impl Iterator<Item = &'w [W]>, shape: Shape, tile: &mut [u8]) {
    let rows: Vec<&[W]> = rows.collect();
    if shape.format == QuantFormat::Iq4Nl {
        return unsafe { fill_columns::<V, W>(&rows, shape, tile) };
    }
    for (r, values) in rows.into_iter().enumerate() {
        unsafe { fill_row::<V, W>(values, r, shape, tile) };
    }
}

/// Block b of a row; what the row doesn't have is zero.
#[inline(always)]
fn block_of<W: Element>(values: &[W], b: usize) -> [W; BLOCK] {
    let values = &values[b * BLOCK..];
    // A copy of fixed length is no call.
    values.first_chunk().copied().unwrap_or_else(|| {
        let mut block = [W::default(); BLOCK];
        block[..values.len()].copy_from_slice(values);
        block
    })
}

/// Block by block, all rows at once.
#[inline(always)]
unsafe fn fill_columns<V: Vectors, W: Element>(rows: &[&[W]], shape: Shape, tile: &mut [u8]) {
    for (b, block) in tile.chunks_exact_mut(shape.stride()).take(shape.blocks()).enumerate() {
        let (quants, scales) = block.split_at_mut(shape.block_bytes());
        let mut x = [[0.0; TILE]; BLOCK];
        for half in 0..2 {
            let mut square = unsafe { [V::zero(); TILE] };
            for (values, lanes) in rows.iter().zip(&mut square) {
                *lanes = unsafe { W::load(block_of(values, b).as_ptr().add(half * BLOCK / 2)) };
            }
            unsafe { V::transpose(&mut square) };
            for (lanes, x) in square.into_iter().zip(&mut x[half * BLOCK / 2..]) {
                unsafe { lanes.store(x.as_mut_ptr()) };
            }
        }
        let mut encoded = [f16::ZERO; TILE];
        unsafe { iq4_nl::<V>(&x, bytemuck::cast_slice_mut(quants), &mut encoded) };
        scales.copy_from_slice(bytemuck::cast_slice(&encoded));
    }
}

#[inline(always)]
unsafe fn fill_row<V: Vectors, W: Element>(values: &[W], r: usize, shape: Shape, tile: &mut [u8]) {
    for (b, block) in tile.chunks_exact_mut(shape.stride()).take(shape.blocks()).enumerate() {
        let (quants, scales) = block.split_at_mut(shape.block_bytes());
        let (values, mut x) = (block_of(values, b), [0.0f32; BLOCK]);
        unsafe {
            W::load::<V>(values.as_ptr()).store(x.as_mut_ptr());
            W::load::<V>(values.as_ptr().add(16)).store(x.as_mut_ptr().add(16));
        }
        let (scale, stored) = encode(shape.format, &x);
        scales[2 * r..2 * r + 2].copy_from_slice(&scale.to_ne_bytes());
        lay_out(&stored, quants, r);
    }
}

/// Takes over a row as a file stores it, with the very same quants and scales.
fn take_row(blocks: Blocks<'_>, r: usize, shape: Shape, tile: &mut [u8]) {
    let format = shape.format;
    let (parts, bytes) = (format.block() / BLOCK, format.block_bytes());
    for b in 0..shape.blocks() {
        let at = blocks.skip / BLOCK + b;
        let stored = Stored::read(format, &blocks.bytes[at / parts * bytes..][..bytes], at % parts);
        let (d, m) = (stored.d.to_ne_bytes(), stored.m.to_ne_bytes());
        let plane = |plane: usize, size: usize| size * (TILE * plane + r);
        if shape.shared_bytes() > 0 {
            let shared = &mut tile[shape.shared_at(b)..][..shape.shared_bytes()];
            shared[plane(0, 2)..][..2].copy_from_slice(&d);
            if format.scaling() == Scaling::Super {
                shared[plane(1, 2)..][..2].copy_from_slice(&m);
            }
        }
        let (quants, scales) = tile[shape.block_at(b)..][..shape.stride()].split_at_mut(shape.block_bytes());
        match format.scaling() {
            Scaling::Plain | Scaling::Affine => {
                scales[plane(0, 2)..][..2].copy_from_slice(&d);
                if format.scaling() == Scaling::Affine {
                    scales[plane(1, 2)..][..2].copy_from_slice(&m);
                }
            }
            Scaling::Super | Scaling::Halves => [scales[plane(0, 1)], scales[plane(1, 1)]] = stored.bytes,
        }
        let more = if format.bits() == 8 { 0 } else { format.bits() - 4 };
        if more == 0 {
            lay_out(&stored.quants, quants, r);
            continue;
        }
        let (low, high) = quants.split_at_mut(TILE * BLOCK / 2);
        lay_out(&stored.quants.map(|q| q & 15), low, r);
        for (g, four) in stored.quants.as_chunks::<4>().0.iter().enumerate() {
            let out = &mut high[64 * (g * more / 8) + 4 * r..][..4];
            out.iter_mut().zip(four).for_each(|(out, q)| *out |= q >> 4 << (g * more % 8));
        }
    }
}

/// Row r's dwords of a block: see [`super::packed`].
#[inline(always)]
fn lay_out(stored: &Quants, quants: &mut [u8], r: usize) {
    if quants.len() == TILE * BLOCK {
        for (vector, four) in quants.chunks_exact_mut(64).zip(stored.as_chunks::<4>().0) {
            vector[4 * r..4 * r + 4].copy_from_slice(four);
        }
    } else {
        let (low, high) = stored.split_at(BLOCK / 2);
        let mut both = [0; BLOCK / 2];
        for ((both, low), high) in both.iter_mut().zip(low).zip(high) {
            *both = low | high << 4;
        }
        for (vector, four) in quants.chunks_exact_mut(64).zip(both.as_chunks::<4>().0) {
            vector[4 * r..4 * r + 4].copy_from_slice(four);
        }
    }
}
