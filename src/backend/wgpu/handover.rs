//! [`Handover`]: rows on their way from one stage to the next, on the device that both live on.

use std::sync::{Arc, Mutex, PoisonError};

use super::gpu::Gpu;
use crate::error::Result;

const USAGE: wgpu::BufferUsages = wgpu::BufferUsages::COPY_SRC.union(wgpu::BufferUsages::COPY_DST);

/// Buffers that wait for their next use.
type Idle = Arc<Mutex<Vec<wgpu::Buffer>>>;

/// The buffers that a place hands rows over in: as many as were ever on their way at once.
pub(super) struct Handovers {
    /// Bytes of each.
    size: u64,
    idle: Idle,
}

impl Handovers {
    pub(super) fn new(size: u64) -> Self {
        Self { size, idle: Idle::default() }
    }

    /// A buffer for `bytes` of rows.
    pub(super) fn take(&self, gpu: &Gpu, bytes: u64) -> Result<Handover> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let buffer = match idle {
            Some(buffer) => buffer,
            None => gpu.buffer("what is handed over", self.size, USAGE)?,
        };
        Ok(Handover { device: gpu.device.clone(), buffer, bytes, idle: self.idle.clone() })
    }
}

/// The rows that a stage passed on, as its place holds them: padded. Dropping it gives the buffer back, which whoever is still to
/// copy from it needn't fear: a device runs what it is given in order.
#[derive(Debug)]
pub(crate) struct Handover {
    pub(super) device: wgpu::Device,
    pub(super) buffer: wgpu::Buffer,
    pub(super) bytes: u64,
    idle: Idle,
}

impl Drop for Handover {
    fn drop(&mut self) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(self.buffer.clone());
    }
}
