//! Weights on the device: in the file's dtype, rows padded to whole vectors of 4, streamed there in bounded chunks.

use std::num::NonZero;

use super::gpu::Gpu;
use super::room::Bounds;
use crate::error::Result;
use crate::kernels::matrix::{DType, Matrix, Row};

/// The most that is on its way to the device at once, in bytes: wgpu keeps what was written until it is flushed.
const CHUNK: usize = 16 << 20;

/// Consecutive rows of a matrix, few enough for one binding.
pub(super) struct Block {
    pub buffer: wgpu::Buffer,
    pub first: usize,
    pub rows: usize,
}

/// A rank's slice of a weight.
pub(super) struct GpuWeight {
    pub dtype: DType,
    pub cols: usize,
    pub blocks: Vec<Block>,
}

impl GpuWeight {
    pub(super) fn upload(gpu: &Gpu, bounds: Bounds, name: &str, matrix: &Matrix) -> Result<Self> {
        let (dtype, cols) = (matrix.dtype(), matrix.cols());
        let row_bytes = dtype.bytes(cols.next_multiple_of(4));
        let fit = usize::try_from(bounds.binding).unwrap_or(usize::MAX) / row_bytes.max(1);
        if fit == 0 && matrix.rows() > 0 {
            let problem = format!("a row of {name:?} takes {row_bytes} bytes, more than a binding of {}", bounds.binding);
            return Err(gpu.owner.error(problem));
        }
        let mut blocks = Vec::new();
        for first in (0..matrix.rows()).step_by(fit.max(1)) {
            let rows = fit.min(matrix.rows() - first);
            // A slice without columns still is a buffer, of one vector.
            let size = (rows * row_bytes).max(16) as u64;
            let buffer = gpu.buffer(name, size, wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST)?;
            let chunk = (CHUNK / row_bytes.max(1)).max(1);
            for start in (0..rows).step_by(chunk) {
                let end = rows.min(start + chunk);
                let part = matrix.slice(first + start..first + end, 0..cols);
                gpu.scoped(name, size, || write(gpu, &buffer, start * row_bytes, row_bytes, &part))?;
                gpu.flush()?;
            }
            blocks.push(Block { buffer, first, rows });
        }
        Ok(Self { dtype, cols, blocks })
    }
}

/// Writes rows to the buffer from byte `at`, each followed by zeros up to `row_bytes`.
fn write(gpu: &Gpu, buffer: &wgpu::Buffer, at: usize, row_bytes: usize, rows: &Matrix) {
    let Some(size) = NonZero::new((rows.rows() * row_bytes) as u64) else { return };
    // Without a view there is an error, which the scope around this reports.
    let Some(mut view) = gpu.queue.write_buffer_with(buffer, at as u64, size) else { return };
    let zeros = vec![0; row_bytes - rows.dtype().bytes(rows.cols())];
    for r in 0..rows.rows() {
        let bytes: &[u8] = match rows.row(r) {
            Row::F32(row) => bytemuck::cast_slice(row),
            Row::F16(row) => bytemuck::cast_slice(row),
            Row::Bf16(row) => bytemuck::cast_slice(row),
        };
        let (start, end) = (r * row_bytes, (r + 1) * row_bytes);
        view.slice(start..start + bytes.len()).copy_from_slice(bytes);
        view.slice(start + bytes.len()..end).copy_from_slice(&zeros);
    }
}
