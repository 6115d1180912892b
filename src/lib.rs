//! Mistral-family language models, split over whatever devices a person has: GPUs of any vendor through wgpu, the CPU, or both.
//!
//! A model is a grid of stages x ranks. A stage owns a range of layers, a rank a slice of every matrix in it; ranks live on the
//! devices that a list names, in order.
//!
//! ```
//! use torchless::{Device, InferenceState, Parameters, TensorParallelMistral};
//!
//! # fn main() -> Result<(), torchless::Error> {
//! let params = Parameters::load("examples/models/tiny-stories")?;
//! let model = TensorParallelMistral::load_on_gpus(params, vec![Device::cpu(), Device::cpu()])?;
//!
//! let mut state = InferenceState::new(model.config());
//! let prompt = model.parameters().tokenizer()?.encode("Lily had a red ball.")?;
//! model.prefill(&mut state, &prompt)?;
//! let likeliest = (0..state.logits().len()).max_by(|&a, &b| state.logits()[a].total_cmp(&state.logits()[b])).unwrap();
//! model.forward(&mut state, likeliest as u32, false);
//! assert_eq!(state.position(), prompt.len() + 1);
//! # Ok(())
//! # }
//! ```
//!
//! [`generate`] does that until the text ends. [`Parameters`] is a checkpoint, mapped and checked; [`TensorParallelMistral`] a loaded model;
//! [`InferenceState`] one sequence; [`ParallelConfig`] everything about how a model is spread; [`devices`] what there is to spread it over.
//! The pieces of tensor parallelism stand alone too: [`column_parallel_linear`], [`row_parallel_linear`], [`all_reduce_sum`], [`mlp_tensor_parallel`].
//!
//! `ARCHITECTURE.md` tells how it works inside.

/// The README's examples compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod backend;
mod chat;
mod collective;
mod config;
mod device;
mod error;
#[cfg(any(fuzzing, test))]
#[doc(hidden)]
pub mod fuzzing;
mod generate;
mod hub;
mod kept;
mod kernels;
mod model;
mod params;
mod partition;
mod perplexity;
mod plan;
mod sampler;
mod scheduler;
mod timeline;
mod tokenizer;
mod trace;

pub use backend::{KvType, PlaceCounts};
pub use chat::{ChatMessage, ChatTemplate};
pub use collective::{Alone, Collective};
pub use config::{Config, RopeScaling};
pub use device::{Device, DeviceKind, DeviceLimits, KernelTime, devices};
pub use error::{Error, Result};
pub use generate::{DraftCounts, FinishReason, GenerateOptions, Generation, Model, Prompt, Token, generate};
pub use hub::{FetchProgress, fetch_model, fetch_tokenizer, is_model_name};
pub use kernels::matrix::{DType, Matrix};
pub use kernels::parallel::{
    WorkDistributionConfig, WorkStealingStats, all_reduce_sum, all_reduce_sum_inplace, column_parallel_linear, matmul_vec_adaptive,
    matmul_vec_adaptive_into, matmul_vec_adaptive_with_stats, mlp_tensor_parallel, row_parallel_linear,
};
pub use kernels::quant::QuantFormat;
pub use kernels::wire::Wire;
pub use model::layout::{DeviceMemory, PlanSummary, RankInfo, plan_summary};
pub use model::parallel::{ParallelMistral, PipelineParallel, PipelineParallelMistral, TensorParallel, TensorParallelMistral};
pub use model::parallel_config::ParallelConfig;
pub use model::pipeline::{PipelineConfig, PipelineState};
pub use model::planner::{Choice, Prediction, choose, foresee, forget_predictions, kept_prediction, predict};
pub use model::round_trip::{AllReduceTime, all_reduce_times};
pub use model::state::InferenceState;
pub use params::{GenerationConfig, Parameters};
pub use partition::{Partition, RankPartition, StagePartition, TensorParallelConfig, TensorParallelStrategy};
pub use perplexity::{Score, score};
pub use sampler::{Sampler, SamplerOptions};
pub use scheduler::{Completion, Scheduler, SchedulerConfig, SchedulerCounts};
pub use timeline::{Busy, Timeline};
pub use tokenizer::{Decoder, Tokenizer};
