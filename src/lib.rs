//! Mistral-family language models, split over whatever devices a person has.

mod backend;
mod collective;
mod config;
mod device;
mod error;
mod generate;
mod kernels;
mod model;
mod params;
mod partition;
mod plan;
mod sampler;
mod tokenizer;
mod trace;

pub use backend::{KvType, PlaceCounts};
pub use collective::{Alone, Collective};
pub use config::Config;
pub use device::{Device, DeviceKind, DeviceLimits, devices};
pub use error::{Error, Result};
pub use generate::{FinishReason, GenerateOptions, Generation, Model, Prompt, Token, generate};
pub use kernels::matrix::{DType, Matrix};
pub use kernels::parallel::{
    WorkDistributionConfig, WorkStealingStats, all_reduce_sum, all_reduce_sum_inplace, column_parallel_linear, matmul_vec_adaptive,
    matmul_vec_adaptive_into, matmul_vec_adaptive_with_stats, mlp_tensor_parallel, row_parallel_linear,
};
pub use model::grid::{PlanSummary, RankInfo, plan_summary};
pub use model::parallel::TensorParallelMistral;
pub use model::parallel_config::ParallelConfig;
pub use model::pipeline::{PipelineConfig, PipelineState};
pub use model::state::InferenceState;
pub use params::{GenerationConfig, Parameters};
pub use partition::{Partition, RankPartition, StagePartition, TensorParallelConfig, TensorParallelStrategy};
pub use sampler::{Sampler, SamplerOptions};
pub use tokenizer::{Decoder, Tokenizer};
