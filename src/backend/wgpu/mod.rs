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
mod tuning;
mod weights;

pub(crate) use handover::Handover;
pub(crate) use opened::Opened;
pub(crate) use place::GpuPlace;

#[cfg(test)]
mod tests;
