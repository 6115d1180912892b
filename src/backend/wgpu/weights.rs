//! Weights on the device, laid out as `shaders/weights/` reads them, streamed there in bounded chunks.

use super::gpu::Gpu;
use super::room::Bounds;
use crate::error::Result;
use crate::kernels::matrix::{DType, Matrix};
use crate::kernels::quant::{self, Packed, QuantFormat};

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
        stored.into_iter().chain(QuantFormat::ENCODABLE.map(Self::Packed))
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Stored(dtype) => dtype.name(),
            Self::Packed(format) => format.name(),
        }
    }

    /// Vectors of 16 bytes of a row in a block, and of the scales of all rows behind them.
    fn vectors(self) -> (usize, usize) {
        match self {
            Self::Stored(dtype) => (dtype.bytes(BLOCK) / 16, 0),
            Self::Packed(QuantFormat::Q8_0) => (2, 2),
            Self::Packed(_) => (1, 2),
        }
    }

    /// Bytes of a block of a tile.
    pub(super) fn block_bytes(self) -> usize {
        let (rows, scales) = self.vectors();
        16 * (TILE * rows + scales)
    }
}

/// A rank's slice of a matrix, on its way to the device.
pub(super) enum Source {
    Stored(Matrix),
    Packed(Packed),
}

impl Source {
    fn format(&self) -> Format {
        match self {
            Self::Stored(matrix) => Format::Stored(matrix.dtype()),
            Self::Packed(packed) => Format::Packed(packed.format()),
        }
    }

    pub(super) fn rows(&self) -> usize {
        match self {
            Self::Stored(matrix) => matrix.rows(),
            Self::Packed(packed) => packed.rows(),
        }
    }

    pub(super) fn cols(&self) -> usize {
        match self {
            Self::Stored(matrix) => matrix.cols(),
            Self::Packed(packed) => packed.cols(),
        }
    }

    /// Columns in front of the first one, whose inputs are zero: see [`Packed`].
    pub(super) fn lead(&self) -> usize {
        match self {
            Self::Stored(_) => 0,
            Self::Packed(packed) => packed.lead(),
        }
    }

    /// Logical bytes.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Stored(matrix) => matrix.bytes(),
            Self::Packed(packed) => packed.bytes(),
        }
    }

    /// The same values in f32.
    fn widened(&self) -> Self {
        let Self::Stored(matrix) = self else { unreachable!("a place packs all its matrices or none") };
        let mut values = vec![0.0; matrix.rows() * matrix.cols()];
        for (r, row) in values.chunks_exact_mut(matrix.cols().max(1)).enumerate() {
            matrix.row_to_f32(r, row);
        }
        Self::Stored(Matrix::from_f32(matrix.rows(), matrix.cols(), values))
    }

    /// Writes row `row` as row `r` of a tile, whose blocks are `block_bytes` long.
    fn lay_out(&self, row: usize, r: usize, tile: &mut [u8]) {
        let block_bytes = self.format().block_bytes();
        match self {
            Self::Stored(matrix) => {
                let dtype = matrix.dtype();
                let row = matrix.row(row).bytes();
                for (block, row) in tile.chunks_exact_mut(block_bytes).zip(row.chunks(dtype.bytes(BLOCK))) {
                    for (v, vector) in row.chunks(16).enumerate() {
                        block[16 * (TILE * v + r)..][..vector.len()].copy_from_slice(vector);
                    }
                }
            }
            Self::Packed(packed) => {
                let (vectors, _) = self.format().vectors();
                for (b, block) in tile.chunks_exact_mut(block_bytes).enumerate() {
                    for g in 0..4 * vectors {
                        block[16 * (TILE * (g / 4) + r) + g % 4 * 4..][..4].copy_from_slice(&packed.word(row, b, g));
                    }
                    block[16 * TILE * vectors + 2 * r..][..2].copy_from_slice(&packed.scale::<2>(row, b, 0));
                }
            }
        }
    }
}

/// Consecutive rows of a matrix, few enough for one binding.
pub(super) struct Block {
    pub buffer: wgpu::Buffer,
    pub first: usize,
    pub rows: usize,
}

/// Matrices of one rank that are multiplied together, as one.
pub(super) struct GpuWeight {
    pub format: Format,
    /// Blocks of 32 columns.
    pub blocks_of_columns: usize,
    pub lead: usize,
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
        let widened: Vec<Source>;
        let mixed = sources.iter().any(|source| source.format() != sources[0].format());
        let sources = if mixed {
            widened = sources.iter().map(Source::widened).collect();
            &widened
        } else {
            sources
        };
        let (format, cols, lead) = (sources[0].format(), sources[0].cols(), sources[0].lead());
        let rows: usize = sources.iter().map(Source::rows).sum();
        let blocks_of_columns = (lead + cols).div_ceil(BLOCK);
        let tile_bytes = blocks_of_columns * format.block_bytes();
        let fit = usize::try_from(bounds.binding).unwrap_or(usize::MAX) / tile_bytes.max(1);
        if fit == 0 && rows > 0 {
            let problem = format!("{TILE} rows of {name:?} take {tile_bytes} bytes, more than a binding of {}", bounds.binding);
            return Err(gpu.owner.error(problem));
        }
        let mut blocks = Vec::new();
        for first in (0..rows).step_by(fit.saturating_mul(TILE).max(TILE)) {
            let rows = fit.saturating_mul(TILE).min(rows - first);
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
                        let (source, row) = order(first + row + r);
                        sources[source].lay_out(row, r, tile);
                    }
                }
                gpu.scoped(name, size, || gpu.queue.write_buffer(&buffer, (start * tile_bytes) as u64, &bytes))?;
                gpu.flush()?;
            }
            blocks.push(Block { buffer, first, rows });
        }
        Ok(Self { format, blocks_of_columns, lead, blocks })
    }
}
