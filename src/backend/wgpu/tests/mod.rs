//! The backend on every adapter at hand, against plain references in f64.

mod attention;
mod faults;
mod int8;
mod ops;
mod rig;
mod shaders;
mod stages;
mod wire;

pub(super) use rig::gpus;
