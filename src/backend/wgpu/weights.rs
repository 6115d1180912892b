//! Weights on the device, laid out as `shaders/weights/` reads them, streamed there in bounded chunks.

use std::ops::Range;

use super::gpu::Gpu;
use super::room::Bounds;
use crate::error::Result;
use crate::kernels::matrix::{DType, Matrix};
use crate::kernels::quant::{self, Packed, QuantFormat, SUPER};

/// The most that is laid out at once, in bytes. As much again is on its way to the device: wgpu keeps what was written until it is flushed.
const CHUNK: usize = 8 << 20;

/// Rows of a tile.
pub(super) const TILE: usize = 16;

/// Columns of a block.
pub(super) const BLOCK: usize = quant::BLOCK;

/// How a weight is held: a file of `shaders/weights/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Format {
    Stored(DType),
    Packed(QuantFormat),
}

impl Format {
    /// All of them.
    pub(super) fn all() -> impl Iterator<Item = Self> {
        let stored = [DType::F32, DType::F16, DType::Bf16].map(Self::Stored);
        stored.into_iter().chain(QuantFormat::ALL.map(Self::Packed))
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Stored(dtype) => dtype.name(),
            Self::Packed(format) => format.name(),
        }
    }

    /// Bytes of a tile of so many blocks, where the first has `phase` in front of it that share with it.
    pub(super) fn tile_bytes(self, blocks: usize, phase: usize) -> usize {
        match self {
            Self::Stored(dtype) => blocks * TILE * dtype.bytes(BLOCK),
            Self::Packed(format) => blocks * format.tile_block_bytes() + format.groups(blocks, phase) * format.tile_shared_bytes(),
        }
    }
}

/// A rank's slice of a matrix, on its way to the device.
pub(super) enum Source {
    /// With so many columns of its neighbours in front, which meet zeros: those of a block that quantised weights would have whole.
    Stored(Matrix, usize),
    Packed(Packed),
}

impl Source {
    fn format(&self) -> Format {
        match self {
            Self::Stored(matrix, _) => Format::Stored(matrix.dtype()),
            Self::Packed(packed) => Format::Packed(packed.format()),
        }
    }

    pub(super) fn rows(&self) -> usize {
        match self {
            Self::Stored(matrix, _) => matrix.rows(),
            Self::Packed(packed) => packed.rows(),
        }
    }

    pub(super) fn cols(&self) -> usize {
        match self {
            Self::Stored(matrix, lead) => matrix.cols() - lead,
            Self::Packed(packed) => packed.cols(),
        }
    }

    /// Columns in front of the first one, whose inputs are zero: see [`Packed`].
    pub(super) fn lead(&self) -> usize {
        match self {
            Self::Stored(_, lead) => *lead,
            Self::Packed(packed) => packed.lead(),
        }
    }

    /// Blocks of the whole matrix in front of the first that share with it.
    fn phase(&self) -> usize {
        match self {
            Self::Stored(..) => 0,
            Self::Packed(packed) => packed.phase(),
        }
    }

    /// Logical bytes.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Stored(matrix, _) => matrix.bytes(),
            Self::Packed(packed) => packed.bytes(),
        }
    }

    /// The same values in f32.
    fn widened(&self) -> Self {
        match self {
            Self::Stored(matrix, lead) => Self::Stored(matrix.widened(), *lead),
            Self::Packed(packed) => {
                let mut values = vec![0.0; packed.rows() * (packed.lead() + packed.cols())];
                for (r, row) in values.chunks_exact_mut((packed.lead() + packed.cols()).max(1)).enumerate() {
                    packed.row_to_f32(r, &mut row[packed.lead()..]);
                }
                Self::Stored(Matrix::from_f32(packed.rows(), packed.lead() + packed.cols(), values), packed.lead())
            }
        }
    }

    /// Writes row `row` as row `r` of a tile of so many blocks.
    fn lay_out(&self, row: usize, r: usize, blocks: usize, tile: &mut [u8]) {
        match self {
            Self::Stored(matrix, _) => {
                let dtype = matrix.dtype();
                let row = matrix.row(row).bytes();
                for (block, row) in tile.chunks_exact_mut(TILE * dtype.bytes(BLOCK)).zip(row.chunks(dtype.bytes(BLOCK))) {
                    for (v, vector) in row.chunks(16).enumerate() {
                        block[16 * (TILE * v + r)..][..vector.len()].copy_from_slice(vector);
                    }
                }
            }
            Self::Packed(packed) => {
                let format = packed.format();
                let (tiles, shared) = tile.split_at_mut(blocks * format.tile_block_bytes());
                for (b, block) in tiles.chunks_exact_mut(format.tile_block_bytes()).enumerate() {
                    // Vectors of 16 bytes a row, words a row, and the scales.
                    let (words, high) = format.tile_words();
                    let (vectors, rest) = block.split_at_mut(4 * TILE * words);
                    let (further, scales) = rest.split_at_mut(4 * TILE * high);
                    for g in 0..words {
                        vectors[16 * (TILE * (g / 4) + r) + g % 4 * 4..][..4].copy_from_slice(&packed.word(row, b, g));
                    }
                    for h in 0..high {
                        further[4 * (TILE * h + r)..][..4].copy_from_slice(&packed.word(row, b, words + h));
                    }
                    packed.copy_scales(row, b, |plane, size| size * (TILE * plane + r), scales);
                }
                for (group, shared) in shared.chunks_exact_mut(format.tile_shared_bytes().max(1)).enumerate() {
                    let b = (group * SUPER).saturating_sub(packed.phase());
                    for plane in 0..format.tile_shared_bytes() / (2 * TILE) {
                        shared[2 * (TILE * plane + r)..][..2].copy_from_slice(&packed.shared(row, b, plane));
                    }
                }
            }
        }
    }
}

/// Consecutive rows of a matrix, alike in format and few enough for one binding.
pub(super) struct Block {
    pub format: Format,
    pub buffer: wgpu::Buffer,
    pub first: usize,
    pub rows: usize,
}

/// Matrices of one rank that are multiplied together, as one.
pub(super) struct GpuWeight {
    /// Blocks of 32 columns.
    pub blocks_of_columns: usize,
    pub lead: usize,
    /// See [`Packed::phase`].
    pub phase: usize,
    pub blocks: Vec<Block>,
}

impl GpuWeight {
    /// Uploads the rows of `sources`, which have equal columns: row i is row `order(i).1` of source `order(i).0`.
    pub(super) fn upload(
        gpu: &Gpu,
        bounds: Bounds,
        name: &str,
        sources: &[Source],
        order: impl Fn(usize) -> (usize, usize),
    ) -> Result<Self> {
        let rows: usize = sources.iter().map(Source::rows).sum();
        let format = |sources: &[Source], row: usize| sources[order(row).0].format();
        // Rows in turn of matrices of several formats have to become alike.
        let in_turn = rows > 1 && order(0).0 != order(1).0 && format(sources, 0) != format(sources, 1);
        let widened: Vec<Source>;
        let sources = if in_turn {
            widened = sources.iter().map(Source::widened).collect();
            &widened
        } else {
            sources
        };
        let lead = sources[0].lead();
        let mut all = Self {
            blocks_of_columns: (lead + sources[0].cols()).div_ceil(BLOCK),
            lead,
            // Of those that share nothing any will do.
            phase: sources.iter().map(Source::phase).max().unwrap_or(0),
            blocks: Vec::new(),
        };
        let mut first = 0;
        while first < rows {
            let alike = (first..rows).take_while(|&row| format(sources, row) == format(sources, first)).count();
            all.upload_rows(gpu, bounds, name, format(sources, first), first..first + alike, |row, r, blocks, tile| {
                let (source, row) = order(row);
                sources[source].lay_out(row, r, blocks, tile);
            })?;
            first += alike;
        }
        Ok(all)
    }

    /// Uploads rows of one format; `lay_out(row, r, blocks, tile)` writes one as row `r` of a tile.
    fn upload_rows(
        &mut self,
        gpu: &Gpu,
        bounds: Bounds,
        name: &str,
        format: Format,
        range: Range<usize>,
        lay_out: impl Fn(usize, usize, usize, &mut [u8]),
    ) -> Result<()> {
        let tile_bytes = format.tile_bytes(self.blocks_of_columns, self.phase);
        let fit = usize::try_from(bounds.binding).unwrap_or(usize::MAX) / tile_bytes.max(1);
        if fit == 0 {
            let problem = format!("{TILE} rows of {name:?} take {tile_bytes} bytes, more than a binding of {}", bounds.binding);
            return Err(gpu.owner.error(problem));
        }
        for first in range.clone().step_by(fit.saturating_mul(TILE).max(TILE)) {
            let rows = fit.saturating_mul(TILE).min(range.end - first);
            let tiles = rows.div_ceil(TILE);
            // A slice without columns still is a buffer, of one vector.
            let size = (tiles * tile_bytes).max(16) as u64;
            let buffer = gpu.buffer(name, size, wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST)?;
            let chunk = (CHUNK / tile_bytes.max(1)).max(1);
            for start in (0..tiles).step_by(chunk) {
                let n = chunk.min(tiles - start);
                let mut bytes = vec![0; n * tile_bytes];
                for (t, tile) in bytes.chunks_exact_mut(tile_bytes.max(1)).enumerate() {
                    let row = (start + t) * TILE;
                    for r in 0..TILE.min(rows - row) {
                        lay_out(first + row + r, r, self.blocks_of_columns, tile);
                    }
                }
                gpu.scoped(name, size, || gpu.queue.write_buffer(&buffer, (start * tile_bytes) as u64, &bytes))?;
                gpu.flush()?;
            }
            self.blocks.push(Block { format, buffer, first, rows });
        }
        Ok(())
    }
}
