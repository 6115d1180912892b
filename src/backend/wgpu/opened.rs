//! [`Opened`]: the devices that a model has opened while it is being loaded.

use super::adapters::Adapter;
use super::gpu::{Gpu, Owner};
use crate::device::Device;
use crate::error::Result;

/// Stages on one device share it, so that what one passes to the next stays there. Isolated devices are opened for each.
#[derive(Default)]
pub(crate) struct Opened(Vec<(Device, Gpu)>);

impl Opened {
    /// Opens `device`, unless that was done before.
    pub(super) fn open(&mut self, device: &Device, adapter: &Adapter, binding: u64, owner: Owner) -> Result<Gpu> {
        if let Some((_, gpu)) = self.0.iter().find(|(opened, _)| opened.shares_place_with(device)) {
            return Ok(gpu.shared_with(owner));
        }
        let gpu = Gpu::open(adapter, binding, owner)?;
        self.0.push((device.clone(), gpu.clone()));
        Ok(gpu)
    }
}
