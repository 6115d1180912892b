//! [`ParallelConfig`]: everything about how a model is spread, in one value.

use super::pipeline::PipelineConfig;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::kernels::parallel::WorkDistributionConfig;
use crate::kernels::quant::{self, QuantFormat};
use crate::kernels::wire::Wire;
use crate::params::Parameters;
use crate::partition::{Partition, TensorParallelConfig};

/// More threads than any machine has use for: starting them would take longer than computing.
const MOST_THREADS: usize = 1024;

/// How a model runs: the grid of stages x ranks, the pipeline over its stages, and the threads of its CPU ranks.
///
/// Whatever the configuration, products are cut adaptively and heads run in parallel.
///
/// ```
/// use torchless::{ParallelConfig, TensorParallelConfig};
///
/// // Default (adaptive matmul, parallel heads)
/// let config = ParallelConfig::default();
/// assert_eq!(config.tensor.world_size, 1);
///
/// // Pipeline parallelism with 4 micro-batches, here over 2 stages
/// let config = ParallelConfig::pipeline(4).stages(2);
/// assert_eq!((config.pipeline.num_micro_batches, config.stages), (4, Some(2)));
///
/// // Tensor parallelism over a device that is three times as fast as the other
/// let config = ParallelConfig::tensor_parallel(2, 0).with_shares(vec![3.0, 1.0]);
/// assert_eq!(config.tensor, TensorParallelConfig::new(2, 0));
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ParallelConfig {
    /// Ranks of each stage.
    pub tensor: TensorParallelConfig,
    /// Micro-batches over the stages.
    pub pipeline: PipelineConfig,
    /// Stages; `None` for min(4, layers) if this is [`Self::pipeline`]'s, otherwise 1.
    pub stages: Option<usize>,
    /// What each rank of a stage should own in proportion to the others, the same in every stage; or one entry for each device of
    /// the grid, stage after stage, which also weight the stages. `None` for all the same. [`Partition::new`] says more.
    pub shares: Option<Vec<f64>>,
    /// How products are cut for threads.
    pub work: WorkDistributionConfig,
    /// Threads of the CPU; `None` for one a core.
    pub threads: Option<usize>,
    /// Positions that the KV cache has room for, over all sequences; `None` leaves it to the model.
    pub kv_positions: Option<usize>,
    /// What matrices are quantised to as they are loaded; `None` leaves them as the checkpoint stores them, in its mapped file.
    /// The embedding, of which a token reads a row, always stays there.
    pub weights: Option<QuantFormat>,
    /// Whether quantised matrices are kept in a file beside the checkpoint, a file for each of its slices, and taken from there by the
    /// next load that cuts the model in the same way. A file that is damaged, or of another checkpoint, is made anew.
    pub cache_weights: bool,
    /// Whether GPUs choose among the variants of their kernels by a short measurement, the first time that they meet a shape. Choices are
    /// kept in the user's cache directory (or the one that `TORCHLESS_CACHE` names), by adapter, driver and version.
    pub tune: bool,
    /// Whether a prompt of 128 rows and more (of each micro-batch, where there are stages) is computed in two halves, so that one computes while the other is summed: where ranks sum through the host
    /// and one of them is a GPU, and in groups of processes with a GPU, whose members must all have it alike.
    pub overlap: bool,
    /// How rows of a prompt travel between GPUs and the host that sums them over ranks.
    pub wire: Wire,
    /// Whether `stages: None` asks for several.
    pipelined: bool,
}

impl Default for ParallelConfig {
    /// One rank, one stage, weights as they are stored, kernels chosen by measuring.
    fn default() -> Self {
        Self {
            tensor: TensorParallelConfig::default(),
            pipeline: PipelineConfig::default(),
            stages: None,
            shares: None,
            work: WorkDistributionConfig::default(),
            threads: None,
            kv_positions: None,
            weights: None,
            cache_weights: false,
            tune: true,
            overlap: true,
            wire: Wire::F32,
            pipelined: false,
        }
    }
}

impl ParallelConfig {
    /// Stages that compute at the same time, filled with so many micro-batches.
    #[must_use]
    pub fn pipeline(micro_batches: usize) -> Self {
        let pipeline = PipelineConfig { num_micro_batches: micro_batches, async_execution: true, ..PipelineConfig::default() };
        Self { pipeline, ..Self::default() }.pipelined()
    }

    /// Every matrix split over `world_size` ranks, of which this is `rank`. Checked when a model is loaded.
    #[must_use]
    pub fn tensor_parallel(world_size: usize, rank: usize) -> Self {
        TensorParallelConfig::new(world_size, rank).into()
    }

    /// One rank and one stage, with chunks and micro-batches that suit the model's sizes.
    #[must_use]
    pub fn for_model(config: &Config) -> Self {
        let pipeline = PipelineConfig::for_model(config.n_layers, config.hidden_size, PipelineConfig::default().memory_budget);
        let work = WorkDistributionConfig::for_matmul(config.intermediate_size, config.hidden_size);
        Self { pipeline, work, ..Self::default() }
    }

    /// Sets the number of stages.
    #[must_use]
    pub fn stages(mut self, stages: usize) -> Self {
        self.stages = Some(stages);
        self
    }

    /// Sets what each rank should own in proportion to the others, such as `vec![3.0, 1.0]`. Of several stages, one entry a rank
    /// holds for every stage; one a device of the whole grid, stage after stage, gives a stage layers by the sum of its own.
    #[must_use]
    pub fn with_shares(mut self, shares: Vec<f64>) -> Self {
        self.shares = Some(shares);
        self
    }

    /// Bounds the threads of the CPU.
    #[must_use]
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Sets how many positions, over all sequences, the KV cache has room for.
    #[must_use]
    pub fn kv_positions(mut self, positions: usize) -> Self {
        self.kv_positions = Some(positions);
        self
    }

    /// Quantises matrices as they are loaded.
    #[must_use]
    pub fn weights(mut self, format: QuantFormat) -> Self {
        self.weights = Some(format);
        self
    }

    /// Keeps quantised matrices in files beside the checkpoint, for the next load.
    #[must_use]
    pub fn cache_weights(mut self) -> Self {
        self.cache_weights = true;
        self
    }

    /// Takes every adapter's default kernels, without measuring.
    #[must_use]
    pub fn untuned(mut self) -> Self {
        self.tune = false;
        self
    }

    /// Computes all rows of a prompt before they are summed.
    #[must_use]
    pub fn without_overlap(mut self) -> Self {
        self.overlap = false;
        self
    }

    /// Lets the rows of a prompt travel between GPUs and the host in fewer bytes.
    #[must_use]
    pub fn wire(mut self, wire: Wire) -> Self {
        self.wire = wire;
        self
    }

    /// The block of the weights' format, at whose multiples channels are cut. Blocks of 256 columns are cut too: their 8 parts are packed one by one.
    pub(crate) fn granule(&self, params: &Parameters) -> usize {
        if self.weights.is_some() || params.is_quantised() { quant::BLOCK } else { 1 }
    }

    /// Several stages where no number was set.
    pub(crate) fn pipelined(self) -> Self {
        Self { pipelined: true, ..self }
    }

    /// The stages of a model of `n_layers` layers: those asked for, or the default.
    pub(crate) fn stages_for(&self, n_layers: usize) -> usize {
        self.stages.unwrap_or(if self.pipelined { n_layers.min(4) } else { 1 })
    }

    /// Whether a model with these sizes can run so.
    ///
    /// # Errors
    /// No ranks, a rank outside its world, more ranks than query heads, stages that the layers can't fill, shares that aren't
    /// one positive number a rank or one a device, or no micro-batches, threads or KV positions.
    pub fn validate(&self, config: &Config) -> Result<()> {
        self.tensor.validate()?;
        Partition::new(config, self.stages_for(config.n_layers), self.tensor.world_size, self.shares.as_deref(), 1)?;
        let counts =
            [("num_micro_batches", Some(self.pipeline.num_micro_batches)), ("threads", self.threads), ("kv_positions", self.kv_positions)];
        if let Some((option, _)) = counts.into_iter().find(|(_, count)| *count == Some(0)) {
            return Err(Error::Option { option, value: "0".into(), right: "at least 1 is needed" });
        }
        match self.threads {
            Some(threads) if threads > MOST_THREADS => {
                Err(Error::Option { option: "threads", value: threads.to_string(), right: "at most 1024 are started" })
            }
            _ => Ok(()),
        }
    }
}

impl From<TensorParallelConfig> for ParallelConfig {
    fn from(tensor: TensorParallelConfig) -> Self {
        Self { tensor, ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::partition::tests::sizes;

    #[test]
    fn stages_default_to_four_at_most_for_pipelines_and_one_otherwise() {
        for (n_layers, stages) in [(1, 1), (2, 2), (4, 4), (32, 4)] {
            assert_eq!(ParallelConfig::pipeline(4).stages_for(n_layers), stages, "{n_layers} layers");
        }
        for config in [ParallelConfig::default(), ParallelConfig::tensor_parallel(2, 0), ParallelConfig::for_model(&sizes(8, 2))] {
            assert_eq!(config.stages_for(32), 1);
            assert_eq!(config.stages(3).stages_for(32), 3);
        }
    }

    #[test]
    fn builders_set_their_field_and_no_other() {
        let built =
            ParallelConfig::from(TensorParallelConfig::new(2, 1)).stages(2).with_shares(vec![3.0, 1.0]).threads(5).kv_positions(640);
        let expected = ParallelConfig {
            tensor: TensorParallelConfig { world_size: 2, rank: 1 },
            stages: Some(2),
            shares: Some(vec![3.0, 1.0]),
            threads: Some(5),
            kv_positions: Some(640),
            ..ParallelConfig::default()
        };
        assert_eq!(built, expected);
    }

    #[test]
    fn what_cannot_run_is_refused_with_the_numbers() {
        let model = sizes(8, 2); // and 6 layers
        let tensor = |world, rank| ParallelConfig::tensor_parallel(world, rank);
        for good in [
            ParallelConfig::default(),
            ParallelConfig::pipeline(4),
            ParallelConfig::for_model(&model),
            tensor(8, 7).stages(6),
            tensor(2, 0).with_shares(vec![1000.0, 1.0]).threads(1).kv_positions(1),
            tensor(2, 0).stages(2).with_shares(vec![4.0, 3.0, 2.0, 1.0]),
            ParallelConfig::default().stages(2).with_shares(vec![3.0, 1.0]),
        ] {
            good.validate(&model).unwrap_or_else(|e| panic!("{good:?}: {e}"));
        }
        for (bad, words) in [
            (tensor(0, 0), "world size is 0"),
            (tensor(2, 2), "rank 2 does not exist in a world of 2"),
            (tensor(9, 0), "9 ranks cannot share 8 query heads"),
            (ParallelConfig::default().stages(0), "0 stages cannot share 6 layers"),
            (ParallelConfig::default().stages(7), "7 stages cannot share 6 layers"),
            (tensor(2, 0).with_shares(vec![1.0]), "[1.0] do not fit 2 ranks"),
            (tensor(2, 0).with_shares(vec![1.0, 0.0]), "[1.0, 0.0] do not fit 2 ranks"),
            (tensor(2, 0).stages(3).with_shares(vec![1.0; 3]), "[1.0, 1.0, 1.0] do not fit 2 ranks in each of 3 stages"),
            (ParallelConfig::pipeline(0), "num_micro_batches 0"),
            (ParallelConfig::default().threads(0), "threads 0"),
            (ParallelConfig::default().threads(1025), "threads 1025"),
            (ParallelConfig::default().kv_positions(0), "kv_positions 0"),
        ] {
            let message = bad.validate(&model).expect_err(words).to_string();
            assert!(message.contains(words), "{message:?} should say {words:?}");
        }
    }
}
