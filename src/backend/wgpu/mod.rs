//! The wgpu backend: a [`Place`](super::Place) on an adapter of any vendor.

pub(crate) mod adapters;
mod cache;
mod dispatch;
mod gpu;
mod handover;
mod lower;
mod moment;
mod opened;
mod place;
mod room;
mod shaders;
mod timer;
mod tune;
mod tuned;
mod tuning;
mod twins;
mod weights;

pub(crate) use opened::Opened;
pub(crate) use place::GpuPlace;
pub(crate) use tune::kernel_times;

#[cfg(test)]
mod tests;
