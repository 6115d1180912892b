//! [`Timer`]: how long a device computes, by its own clock.

use super::gpu::Gpu;
use crate::error::Result;

/// Two timestamps around a compute pass.
pub(super) struct Timer {
    queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    /// Nanoseconds of a tick.
    period: f64,
}

impl Timer {
    /// What the timestamps take behind what is read.
    pub(super) const BYTES: u64 = 16;

    /// `None` where the adapter has no timestamps.
    pub(super) fn new(gpu: &Gpu) -> Result<Option<Self>> {
        if !gpu.device.features().contains(wgpu::Features::TIMESTAMP_QUERY) {
            return Ok(None);
        }
        let descriptor = wgpu::QuerySetDescriptor { label: None, ty: wgpu::QueryType::Timestamp, count: 2 };
        let queries = gpu.scoped("timestamps", Self::BYTES, || gpu.device.create_query_set(&descriptor))?;
        let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
        let resolved = gpu.buffer("timestamps", Self::BYTES, usage)?;
        Ok(Some(Self { queries, resolved, period: f64::from(gpu.queue.get_timestamp_period()) }))
    }

    /// For a pass that is timed.
    pub(super) fn writes(&self) -> wgpu::ComputePassTimestampWrites<'_> {
        let query_set = &self.queries;
        wgpu::ComputePassTimestampWrites { query_set, beginning_of_pass_write_index: Some(0), end_of_pass_write_index: Some(1) }
    }

    /// Copies both to byte `at` of `to`.
    pub(super) fn copy(&self, encoder: &mut wgpu::CommandEncoder, to: &wgpu::Buffer, at: u64) {
        encoder.resolve_query_set(&self.queries, 0..2, &self.resolved, 0);
        encoder.copy_buffer_to_buffer(&self.resolved, 0, to, at, Self::BYTES);
    }

    /// Nanoseconds between what was copied.
    pub(super) fn nanoseconds(&self, copied: &[u8]) -> u64 {
        let tick = |i: usize| copied.get(8 * i..8 * i + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_ne_bytes);
        (tick(1).saturating_sub(tick(0)) as f64 * self.period) as u64
    }
}
