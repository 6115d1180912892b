//! Mistral-family language models, split over whatever devices a person has.
#![allow(dead_code, unused_imports)] // until the engine uses it all

mod backend;
mod config;
mod device;
mod error;
mod kernels;
mod partition;
mod plan;

pub use backend::{KvType, PlaceCounts};
pub use config::Config;
pub use device::{Device, DeviceKind, DeviceLimits, devices};
pub use error::{Error, Result};
pub use kernels::matrix::{DType, Matrix};
pub use partition::{Partition, RankPartition, StagePartition, TensorParallelConfig, TensorParallelStrategy};
