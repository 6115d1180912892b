//! Mistral-family language models, split over whatever devices a person has.
#![allow(dead_code, unused_imports)] // until the engine uses it all

mod backend;
mod collective;
mod config;
mod error;
mod kernels;
mod params;
mod partition;
mod plan;
mod sampler;
mod tokenizer;

pub use backend::{KvType, PlaceCounts};
pub use collective::{Alone, Collective};
pub use config::Config;
pub use error::{Error, Result};
pub use kernels::matrix::{DType, Matrix};
pub use params::{GenerationConfig, Parameters};
pub use partition::{Partition, RankPartition, StagePartition, TensorParallelConfig, TensorParallelStrategy};
pub use sampler::{Sampler, SamplerOptions};
pub use tokenizer::{Decoder, Tokenizer};
