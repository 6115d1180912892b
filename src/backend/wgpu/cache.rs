//! [`Cache`]: the keys and values of one layer and rank, on the device.

use super::gpu::Gpu;
use crate::backend::PageId;
use crate::error::Result;

const USAGE: wgpu::BufferUsages = wgpu::BufferUsages::STORAGE.union(wgpu::BufferUsages::COPY_SRC).union(wgpu::BufferUsages::COPY_DST);

/// Pages of keys, and as many of values.
pub(super) struct Cache {
    pub keys: wgpu::Buffer,
    pub values: wgpu::Buffer,
    page_bytes: u64,
}

impl Cache {
    pub(super) fn new(gpu: &Gpu, pages: usize, page_bytes: u64) -> Result<Self> {
        let bytes = pages.max(1) as u64 * page_bytes;
        Ok(Self { keys: gpu.buffer("keys", bytes, USAGE)?, values: gpu.buffer("values", bytes, USAGE)?, page_bytes })
    }
}

/// All caches of a place, and a page on the side: no copy goes from a buffer to itself.
pub(super) struct Caches {
    pub all: Vec<Cache>,
    page: wgpu::Buffer,
}

impl Caches {
    pub(super) fn new(gpu: &Gpu, all: Vec<Cache>) -> Result<Self> {
        let most = all.iter().map(|cache| cache.page_bytes).max().unwrap_or(4);
        Ok(Self { all, page: gpu.buffer("a page to be copied", most, USAGE)? })
    }

    /// Encodes copies of whole pages, `[from, to]`, one after the other.
    pub(super) fn copy(&self, encoder: &mut wgpu::CommandEncoder, copies: &[[PageId; 2]]) {
        for [from, to] in copies {
            for Cache { keys, values, page_bytes } in &self.all {
                let at = |page: PageId| u64::from(page) * page_bytes;
                for buffer in [keys, values] {
                    encoder.copy_buffer_to_buffer(buffer, at(*from), &self.page, 0, *page_bytes);
                    encoder.copy_buffer_to_buffer(&self.page, 0, buffer, at(*to), *page_bytes);
                }
            }
        }
    }
}
