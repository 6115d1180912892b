//! [`TensorParallelMistral`]: the model as callers see it.

use std::path::Path;
use std::sync::Arc;

use crate::backend::{Numerics, PlaceCounts};
use crate::collective::{Alone, Collective};
use crate::config::Config;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::grid::{Grid, How, RankInfo, Want};
use crate::model::parallel_config::ParallelConfig;
use crate::model::state::InferenceState;
use crate::params::Parameters;

/// A Mistral-family model whose every matrix is split over ranks.
///
/// Calls may come from many threads; each is a step of one sequence, and they take turns.
pub struct TensorParallelMistral {
    grid: Grid,
}

impl TensorParallelMistral {
    /// Loads all ranks into this process, on the CPU, whatever `config`'s rank is. Answers are full logits.
    ///
    /// # Errors
    /// A world of no ranks, a rank outside it, more ranks than query heads, stages or shares that don't fit.
    pub fn load(params: Parameters, config: impl Into<ParallelConfig>) -> Result<Self> {
        let config = config.into();
        config.validate(params.config())?;
        let world = config.tensor.world_size;
        let stages = config.stages_for(params.config().n_layers);
        let devices = vec![Device::cpu(); stages * world];
        Self::on(params, &config, stages, &devices)
    }

    /// Loads rank i onto `devices[i]`. The list may mix GPUs of any vendor and the CPU, and may name a device several times: those
    /// ranks then live in one place and are summed there, unless the device is [`Device::isolated`].
    ///
    /// # Errors
    /// An empty list, more devices than query heads, a device that can't be opened or has too little memory.
    pub fn load_on_gpus(params: Parameters, devices: impl IntoIterator<Item = Device>) -> Result<Self> {
        Self::load_grid(params, ParallelConfig::default(), devices)
    }

    /// Loads a grid: the list is cut into `config`'s stages (by default one), a rank a device. `config`'s shares weight the ranks.
    ///
    /// # Errors
    /// As [`Self::load_on_gpus`]; a list that the stages don't divide; shares that don't fit.
    pub fn load_grid(params: Parameters, config: impl Into<ParallelConfig>, devices: impl IntoIterator<Item = Device>) -> Result<Self> {
        let config = config.into();
        let devices: Vec<Device> = devices.into_iter().collect();
        Self::on(params, &config, config.stages.unwrap_or(1), &devices)
    }

    /// Loads rank `config.rank` only, on the CPU, and joins the other ranks through `collective`. Every member answers with full
    /// logits, and all must make the same calls in the same order.
    ///
    /// # Errors
    /// A collective of another size than the world or of another rank than the config; members with another checkpoint or partition.
    pub fn load_with(params: Parameters, config: impl Into<ParallelConfig>, collective: Arc<dyn Collective>) -> Result<Self> {
        let config = config.into();
        config.validate(params.config())?;
        let (world, rank) = (config.tensor.world_size, config.tensor.rank);
        if (collective.size(), collective.rank()) != (world, rank) {
            let (size, member) = (collective.size(), collective.rank());
            return Err(Error::Collective(format!("it is member {member} of {size}, the configuration is rank {rank} of {world}")));
        }
        let stages = config.stages.unwrap_or(1);
        if stages != 1 {
            let right = "use one stage where ranks are in several processes".into();
            return Err(Error::Stages { stages, what: format!("a group of {world} processes"), right });
        }
        let grid = Grid::load(params, &config, 1, &[rank], &[Device::cpu()], collective)?;
        Ok(Self { grid })
    }

    fn on(params: Parameters, config: &ParallelConfig, stages: usize, devices: &[Device]) -> Result<Self> {
        if devices.is_empty() {
            return Err(Error::NoDevices);
        }
        let local: Vec<usize> = (0..devices.len() / stages.max(1)).collect();
        Ok(Self { grid: Grid::load(params, config, stages, &local, devices, Arc::new(Alone))? })
    }

    /// The model's numbers.
    #[must_use]
    pub fn config(&self) -> &Config {
        self.grid.params().config()
    }

    /// The checkpoint that it was loaded from.
    #[must_use]
    pub fn parameters(&self) -> &Parameters {
        self.grid.params()
    }

    /// Computes one token at the state's position and advances it; the logits land in the state. Exact: for one grid and machine the
    /// same bits with any number of threads, token by token or prefilled in any chunks. `debug` reports each step to stderr.
    ///
    /// # Panics
    /// Where [`Self::try_forward`] returns an error.
    pub fn forward(&self, state: &mut InferenceState, token: u32, debug: bool) {
        self.step(state, &[token], Numerics::Exact, debug).unwrap_or_else(|e| panic!("{e}"));
    }

    /// [`Self::forward`] without the promise of bits. Until it has faster kernels of its own it runs the exact ones; on a state with
    /// an f16 cache it differs from [`Self::forward`] on an f32 cache by that rounding only.
    ///
    /// # Panics
    /// Where [`Self::try_fast_forward`] returns an error.
    pub fn fast_forward(&self, state: &mut InferenceState, token: u32, debug: bool) {
        self.step(state, &[token], Numerics::Fast, debug).unwrap_or_else(|e| panic!("{e}"));
    }

    /// [`Self::forward`] without the panic. After an error the state is as before.
    ///
    /// # Errors
    /// A token outside the vocabulary, a full context or cache, a state of another checkpoint, a lost device.
    pub fn try_forward(&self, state: &mut InferenceState, token: u32) -> Result<()> {
        self.step(state, &[token], Numerics::Exact, false)
    }

    /// [`Self::fast_forward`] without the panic.
    ///
    /// # Errors
    /// As [`Self::try_forward`].
    pub fn try_fast_forward(&self, state: &mut InferenceState, token: u32) -> Result<()> {
        self.step(state, &[token], Numerics::Fast, false)
    }

    /// Computes a whole prompt in chunks; the logits of its last token land in the state. The numerics of [`Self::forward`].
    ///
    /// # Errors
    /// As [`Self::try_forward`], and for an empty prompt.
    pub fn prefill(&self, state: &mut InferenceState, tokens: &[u32]) -> Result<()> {
        self.step(state, tokens, Numerics::Exact, false)
    }

    /// [`Self::prefill`] with the numerics of [`Self::fast_forward`].
    ///
    /// # Errors
    /// As [`Self::prefill`].
    pub fn fast_prefill(&self, state: &mut InferenceState, tokens: &[u32]) -> Result<()> {
        self.step(state, tokens, Numerics::Fast, false)
    }

    /// [`Self::prefill`] that answers with the logits of every token: `[tokens, vocab_size]`.
    ///
    /// # Errors
    /// As [`Self::prefill`].
    pub fn prefill_logits(&self, state: &mut InferenceState, tokens: &[u32]) -> Result<Vec<f32>> {
        self.prefill_logits_in_chunks(state, tokens, usize::MAX)
    }

    /// [`Self::prefill_logits`] in chunks of at most `chunk` tokens. The same bits for every chunk.
    ///
    /// # Errors
    /// As [`Self::prefill`].
    pub fn prefill_logits_in_chunks(&self, state: &mut InferenceState, tokens: &[u32], chunk: usize) -> Result<Vec<f32>> {
        self.grid.advance(state, tokens, How { want: Want::All, numerics: Numerics::Exact, chunk, debug: false })
    }

    fn step(&self, state: &mut InferenceState, tokens: &[u32], numerics: Numerics, debug: bool) -> Result<()> {
        self.grid.advance(state, tokens, How { want: Want::Last, numerics, chunk: usize::MAX, debug }).map(drop)
    }

    /// Every rank, where it is and what it holds.
    #[must_use]
    pub fn ranks(&self) -> &[RankInfo] {
        self.grid.ranks()
    }

    /// What every place has done since it was loaded, stage after stage.
    ///
    /// # Errors
    /// If the model's driver thread has ended.
    pub fn counts(&self) -> Result<Vec<PlaceCounts>> {
        self.grid.counts()
    }

    /// All-reduces and gathers through the host so far.
    ///
    /// # Errors
    /// If the model's driver thread has ended.
    pub fn collectives(&self) -> Result<u64> {
        self.grid.collectives()
    }

    /// Pages of the KV cache that states hold now.
    #[must_use]
    pub fn kv_pages_held(&self) -> usize {
        self.grid.pages_held()
    }

    /// Records from now on what each rank does when.
    pub fn start_trace(&self) {
        self.grid.trace().start();
    }

    /// Seconds recorded since [`Self::start_trace`], summed over ranks: computing, reading, reducing, writing.
    #[must_use]
    pub fn traced_seconds(&self) -> [f64; 4] {
        self.grid.trace().seconds()
    }

    /// Writes what was recorded as a Chrome/Perfetto trace: one JSON document with `traceEvents`.
    ///
    /// # Errors
    /// If the file can't be written.
    pub fn write_trace(&self, path: impl AsRef<Path>) -> Result<()> {
        self.grid.trace().write(path.as_ref())
    }
}
