//! [`TensorParallelMistral`] and [`PipelineParallelMistral`]: the model as callers see it.

use std::marker::PhantomData;
use std::path::Path;
use std::sync::Arc;

use crate::backend::Numerics::{self, Exact, Fast};
use crate::backend::PlaceCounts;
use crate::collective::{Alone, Collective};
use crate::config::Config;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::parallel::WorkStealingStats;
use crate::model::advance::{How, Want};
use crate::model::grid::Grid;
use crate::model::layout::{RankInfo, ranks_per_stage};
use crate::model::parallel_config::ParallelConfig;
use crate::model::pipeline::PipelineConfig;
use crate::model::state::InferenceState;
use crate::params::Parameters;
use crate::partition::TensorParallelConfig;
use crate::timeline::Timeline;

/// A Mistral-family model on a grid of stages x ranks: [`TensorParallelMistral`] or [`PipelineParallelMistral`].
///
/// The two differ only in the grid that they make of a list of devices. Calls may come from many threads; each advances sequences of
/// its own, and on several stages they overlap.
pub struct ParallelMistral<By> {
    pub(crate) grid: Arc<Grid>,
    by: PhantomData<fn() -> By>,
}

/// Says of a [`ParallelMistral`] that a device is a rank, which holds a slice of every matrix.
#[derive(Debug)]
pub enum TensorParallel {}

/// Says of a [`ParallelMistral`] that a device is a stage, which holds some of the layers.
#[derive(Debug)]
pub enum PipelineParallel {}

/// A model whose every matrix is split over ranks.
pub type TensorParallelMistral = ParallelMistral<TensorParallel>;

/// A model whose layers are split into stages, which work on different rows at the same time.
///
/// Overlap is real where there are several micro-batches: in a prefill, in [`forward_batch`](ParallelMistral::forward_batch), in calls
/// from several threads, and best with a [`Scheduler`](crate::Scheduler). The decoding of one sequence cannot overlap, since token t + 1
/// needs token t: it is no faster than on one stage.
pub type PipelineParallelMistral = ParallelMistral<PipelineParallel>;

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
        Self::on(params, &config, stages, &devices, &|_, _| {})
    }

    /// Loads rank i onto `devices[i]`. The list may mix GPUs of any vendor and the CPU, and may name a device several times: those
    /// ranks then live in one place and are summed there, unless the device is [`Device::isolated`].
    ///
    /// # Errors
    /// An empty list, more devices than query heads, a device that can't be opened or has too little memory.
    pub fn load_on_gpus(params: Parameters, devices: impl IntoIterator<Item = Device>) -> Result<Self> {
        Self::load_grid(params, ParallelConfig::default(), devices)
    }

    /// Loads a grid: the list is cut into `config`'s stages (by default one), a rank a device. `config`'s shares weight the ranks; the
    /// list, and not `config.tensor`, says how many there are.
    ///
    /// # Errors
    /// As [`Self::load_on_gpus`]; a list that the stages don't divide; shares that don't fit.
    pub fn load_grid(params: Parameters, config: impl Into<ParallelConfig>, devices: impl IntoIterator<Item = Device>) -> Result<Self> {
        Self::load_grid_with_progress(params, config, devices, |_, _| {})
    }

    /// [`Self::load_grid`] that tells how far it is: while matrices are quantised, `progress(done, all)` hears from any thread how many bytes
    /// of the checkpoint are done, and how many there are. Nothing else takes long enough to be told.
    ///
    /// # Errors
    /// As [`Self::load_grid`].
    pub fn load_grid_with_progress(
        params: Parameters,
        config: impl Into<ParallelConfig>,
        devices: impl IntoIterator<Item = Device>,
        progress: impl Fn(u64, u64) + Sync,
    ) -> Result<Self> {
        let config = config.into();
        let devices: Vec<Device> = devices.into_iter().collect();
        Self::on(params, &config, config.stages.unwrap_or(1), &devices, &progress)
    }

    /// Loads rank `config.rank` only, on the CPU, and joins the other ranks through `collective`. Every member answers with full
    /// logits, and all must make the same calls in the same order.
    ///
    /// # Errors
    /// A collective of another size than the world or of another rank than the config; members with another checkpoint or partition.
    pub fn load_with(params: Parameters, config: impl Into<ParallelConfig>, collective: Arc<dyn Collective>) -> Result<Self> {
        Self::load_with_device(params, config, collective, Device::cpu())
    }

    /// [`Self::load_with`] on a device of this process, whatever the other members have.
    ///
    /// # Errors
    /// As [`Self::load_with`]; a device that can't be opened or has too little memory.
    pub fn load_with_device(
        params: Parameters,
        config: impl Into<ParallelConfig>,
        collective: Arc<dyn Collective>,
        device: Device,
    ) -> Result<Self> {
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
        let grid = Grid::load(params, &config, 1, &[rank], &[device], collective, &|_, _| {})?;
        Ok(Self { grid: Arc::new(grid), by: PhantomData })
    }
}

impl PipelineParallelMistral {
    /// Loads all stages into this process, on the CPU: as many as `config` says, by default min(4, layers).
    ///
    /// # Errors
    /// As [`TensorParallelMistral::load`].
    pub fn load(params: Parameters, config: impl Into<ParallelConfig>) -> Result<Self> {
        let config = config.into().pipelined();
        config.validate(params.config())?;
        let stages = config.stages_for(params.config().n_layers);
        let devices = vec![Device::cpu(); stages * config.tensor.world_size];
        Self::on(params, &config, stages, &devices, &|_, _| {})
    }

    /// Loads stage i onto `devices[i]`, each on a thread of its own. The list may mix GPUs of any vendor and the CPU, and may name a
    /// device several times.
    ///
    /// # Errors
    /// An empty list, more devices than layers, a device that can't be opened or has too little memory.
    pub fn load_on_gpus(params: Parameters, devices: impl IntoIterator<Item = Device>) -> Result<Self> {
        Self::load_grid(params, ParallelConfig::pipeline(PipelineConfig::default().num_micro_batches), devices)
    }

    /// Loads a grid: the list is cut into `config`'s stages, by default a stage a device. `config`'s shares weight stages and ranks.
    ///
    /// # Errors
    /// As [`Self::load_on_gpus`]; a list that the stages don't divide; shares that don't fit.
    pub fn load_grid(params: Parameters, config: impl Into<ParallelConfig>, devices: impl IntoIterator<Item = Device>) -> Result<Self> {
        let config = config.into();
        let devices: Vec<Device> = devices.into_iter().collect();
        Self::on(params, &config, config.stages.unwrap_or(devices.len()), &devices, &|_, _| {})
    }
}

impl<By> ParallelMistral<By> {
    fn on(
        params: Parameters,
        config: &ParallelConfig,
        stages: usize,
        devices: &[Device],
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Self> {
        let world = ranks_per_stage(devices.len(), stages)?;
        let mut config = config.clone().stages(stages);
        config.tensor = TensorParallelConfig::new(world, 0);
        config.validate(params.config())?;
        let local: Vec<usize> = (0..world).collect();
        let grid = Grid::load(params, &config, stages, &local, devices, Arc::new(Alone), progress)?;
        Ok(Self { grid: Arc::new(grid), by: PhantomData })
    }

    /// The model's numbers.
    #[must_use]
    pub fn config(&self) -> &Config {
        self.grid.params().config()
    }

    /// The longest sequence that one state can hold, in positions: the model's limit, or less where the cache is smaller.
    #[must_use]
    pub fn context(&self) -> usize {
        self.grid.context()
    }

    /// The checkpoint that it was loaded from.
    #[must_use]
    pub fn parameters(&self) -> &Parameters {
        self.grid.params()
    }

    /// Computes one token at the state's position and advances it; the logits land in the state. Exact: for one grid of CPU ranks and one machine the
    /// same bits with any number of threads, token by token, in a batch or prefilled in any chunks. `debug` reports each step to stderr.
    ///
    /// # Panics
    /// Where [`Self::try_forward`] returns an error.
    pub fn forward(&self, state: &mut InferenceState, token: u32, debug: bool) {
        self.step(state, &[token], Exact, debug).unwrap_or_else(|e| panic!("{e}"));
    }

    /// [`Self::forward`] without the promise of bits: sums in any order, bf16 products where the weights are bf16, int8 activations
    /// where they are quantised. GPUs run the exact forms' kernels.
    ///
    /// # Panics
    /// Where [`Self::try_fast_forward`] returns an error.
    pub fn fast_forward(&self, state: &mut InferenceState, token: u32, debug: bool) {
        self.step(state, &[token], Fast, debug).unwrap_or_else(|e| panic!("{e}"));
    }

    /// [`Self::forward`] without the panic. After an error the state is as before. `debug` reports each step to stderr.
    ///
    /// # Errors
    /// A token outside the vocabulary, a full context or cache, a state of another checkpoint, a lost device.
    pub fn try_forward(&self, state: &mut InferenceState, token: u32, debug: bool) -> Result<()> {
        self.step(state, &[token], Exact, debug)
    }

    /// [`Self::fast_forward`] without the panic.
    ///
    /// # Errors
    /// As [`Self::try_forward`].
    pub fn try_fast_forward(&self, state: &mut InferenceState, token: u32, debug: bool) -> Result<()> {
        self.step(state, &[token], Fast, debug)
    }

    /// Computes a whole prompt in chunks; the logits of its last token land in the state. The numerics of [`Self::forward`].
    ///
    /// # Errors
    /// As [`Self::try_forward`], and for an empty prompt.
    pub fn prefill(&self, state: &mut InferenceState, tokens: &[u32]) -> Result<()> {
        self.step(state, tokens, Exact, false)
    }

    /// [`Self::prefill`] with the numerics of [`Self::fast_forward`].
    ///
    /// # Errors
    /// As [`Self::prefill`].
    pub fn fast_prefill(&self, state: &mut InferenceState, tokens: &[u32]) -> Result<()> {
        self.step(state, tokens, Fast, false)
    }

    /// [`Self::prefill`] that answers with the logits of every token: `[tokens, vocab_size]`.
    ///
    /// # Errors
    /// As [`Self::prefill`].
    pub fn prefill_logits(&self, state: &mut InferenceState, tokens: &[u32]) -> Result<Vec<f32>> {
        self.prefill_logits_in_chunks(state, tokens, usize::MAX)
    }

    /// [`Self::prefill_logits`] in chunks of at most `chunk` tokens. On CPUs the same bits for every chunk.
    ///
    /// # Errors
    /// As [`Self::prefill`].
    pub fn prefill_logits_in_chunks(&self, state: &mut InferenceState, tokens: &[u32], chunk: usize) -> Result<Vec<f32>> {
        self.every_logits(state, tokens, How { chunk, ..How::new(Want::All) })
    }

    /// [`Self::prefill_logits`] with the numerics of [`Self::fast_forward`].
    ///
    /// # Errors
    /// As [`Self::prefill`].
    pub fn fast_prefill_logits(&self, state: &mut InferenceState, tokens: &[u32]) -> Result<Vec<f32>> {
        self.fast_prefill_logits_in_chunks(state, tokens, usize::MAX)
    }

    /// [`Self::fast_prefill_logits`] in chunks of at most `chunk` tokens.
    ///
    /// # Errors
    /// As [`Self::prefill`].
    pub fn fast_prefill_logits_in_chunks(&self, state: &mut InferenceState, tokens: &[u32], chunk: usize) -> Result<Vec<f32>> {
        self.every_logits(state, tokens, How { numerics: Fast, chunk, ..How::new(Want::All) })
    }

    /// Computes a token and a draft of what may follow it as the rows of one launch; answers with the logits after each: `[tokens,
    /// vocab_size]`, on CPUs with the bits of [`Self::forward`]. What turns out to be wrong of the draft is taken back by
    /// [`InferenceState::truncate`], and nothing is computed again for it, under a sliding window neither.
    ///
    /// # Errors
    /// As [`Self::prefill`].
    pub fn forward_draft(&self, state: &mut InferenceState, tokens: &[u32]) -> Result<Vec<f32>> {
        self.draft(state, tokens, Exact)
    }

    /// [`Self::forward_draft`] with the numerics of [`Self::fast_forward`]: logits of several rows may differ from those of one by
    /// their rounding.
    ///
    /// # Errors
    /// As [`Self::prefill`].
    pub fn fast_forward_draft(&self, state: &mut InferenceState, tokens: &[u32]) -> Result<Vec<f32>> {
        self.draft(state, tokens, Fast)
    }

    /// Computes one token of each of several sequences, of any lengths, in one launch that reads every weight once (on several stages, in
    /// up to as many as there are micro-batches; more where there are above 64 sequences or caches of both types). Each advances by its token, and its logits land in its state: on CPUs the bits of
    /// [`Self::forward`] on each alone. All or nothing: after an error all are as before.
    ///
    /// ```
    /// use torchless::{InferenceState, Parameters, TensorParallelConfig, TensorParallelMistral};
    ///
    /// let model = TensorParallelMistral::load(Parameters::load("examples/models/tiny-stories")?, TensorParallelConfig::default())?;
    /// let [mut one, mut other] = [InferenceState::new(model.config()), InferenceState::new(model.config())];
    /// model.prefill(&mut one, &[1, 2, 3])?;
    /// model.prefill(&mut other, &[4])?;
    /// model.forward_batch(&mut [&mut one, &mut other], &[5, 6])?;
    /// assert_eq!((one.tokens(), other.tokens()), (&[1, 2, 3, 5][..], &[4, 6][..]));
    /// # Ok::<(), torchless::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Self::try_forward`]; another number of tokens than of states.
    pub fn forward_batch(&self, states: &mut [&mut InferenceState], tokens: &[u32]) -> Result<()> {
        self.step_each(states, tokens, Exact)
    }

    /// [`Self::forward_batch`] with the numerics of [`Self::fast_forward`].
    ///
    /// # Errors
    /// As [`Self::forward_batch`].
    pub fn fast_forward_batch(&self, states: &mut [&mut InferenceState], tokens: &[u32]) -> Result<()> {
        self.step_each(states, tokens, Fast)
    }

    fn draft(&self, state: &mut InferenceState, tokens: &[u32], numerics: Numerics) -> Result<Vec<f32>> {
        let drafted = tokens.len().saturating_sub(1);
        self.every_logits(state, tokens, How { numerics, batches: Some(1), drafted, ..How::new(Want::All) })
    }

    fn every_logits(&self, state: &mut InferenceState, tokens: &[u32], how: How) -> Result<Vec<f32>> {
        self.grid.advance(&mut [state], &[tokens], how).map(|logits| logits.concat())
    }

    fn step(&self, state: &mut InferenceState, tokens: &[u32], numerics: Numerics, debug: bool) -> Result<()> {
        self.grid.advance(&mut [state], &[tokens], How { numerics, debug, ..How::new(Want::Last) }).map(drop)
    }

    fn step_each(&self, states: &mut [&mut InferenceState], tokens: &[u32], numerics: Numerics) -> Result<()> {
        let tokens: Vec<&[u32]> = tokens.iter().map(std::slice::from_ref).collect();
        self.grid.advance(states, &tokens, How { numerics, ..How::new(Want::Last) }).map(drop)
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
        self.grid.counts().map(|counts| counts.places)
    }

    /// All-reduces and gathers through the host so far.
    ///
    /// # Errors
    /// If the model's driver thread has ended.
    pub fn collectives(&self) -> Result<u64> {
        self.grid.counts().map(|counts| counts.collectives)
    }

    /// What became of the CPU's tasks so far: a task is a chunk of a matrix's outputs, or in attention the queries of a key-value head with some of their positions.
    #[must_use]
    pub fn work_stats(&self) -> &WorkStealingStats {
        &self.grid.stats
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

    /// Lets GPUs that can time from now on what they compute, by their own clocks: [`PlaceCounts::device_nanoseconds`]. That costs them some time
    /// with every submission (a millisecond on a software adapter), so that nothing else should be measured meanwhile.
    pub fn time_devices(&self, on: bool) {
        self.grid.timed.store(on, std::sync::atomic::Ordering::Relaxed);
    }

    /// Seconds recorded since the first [`Self::start_trace`], summed over ranks: computing, reading, reducing, writing.
    #[must_use]
    pub fn traced_seconds(&self) -> [f64; 4] {
        let by_rank = self.traced_seconds_by_rank();
        std::array::from_fn(|part| by_rank.iter().map(|seconds| seconds[part]).sum())
    }

    /// The same of each rank, in the order of [`Self::ranks`].
    #[must_use]
    pub fn traced_seconds_by_rank(&self) -> Vec<[f64; 4]> {
        self.grid.trace().seconds()
    }

    /// Writes what was recorded as a Chrome/Perfetto trace: one JSON document with `traceEvents`.
    ///
    /// # Errors
    /// If the file can't be written.
    pub fn write_trace(&self, path: impl AsRef<Path>) -> Result<()> {
        self.grid.trace().write(path.as_ref())
    }

    /// What was recorded so far, as a picture of the pipeline.
    ///
    /// # Errors
    /// As [`Timeline::from_json`].
    pub fn timeline(&self) -> Result<Timeline> {
        Timeline::from_json(&self.grid.trace().document().to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(name: &str) -> Parameters {
        Parameters::load(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)).unwrap()
    }

    fn load(name: &str, world: usize) -> TensorParallelMistral {
        TensorParallelMistral::load(params(name), TensorParallelConfig::new(world, 0)).unwrap()
    }

    fn bits(logits: &[f32]) -> Vec<u32> {
        logits.iter().map(|v| v.to_bits()).collect()
    }

    #[test]
    fn token_by_token_and_prefilled_have_the_same_bits() {
        for (name, world) in [("uneven", 3), ("sliding", 2), ("sharded-f16", 1)] {
            let model = load(name, world);
            let ids: Vec<u32> = (0..30).collect();
            let (mut stepped, mut filled) = (InferenceState::new(model.config()), InferenceState::new(model.config()));
            ids.iter().for_each(|&id| model.forward(&mut stepped, id, false));
            model.prefill(&mut filled, &ids).unwrap();
            assert_eq!(bits(stepped.logits()), bits(filled.logits()), "{name}");
            assert_eq!((stepped.position(), stepped.tokens()), (30, filled.tokens()), "{name}");
        }
    }

    #[test]
    fn any_rank_of_the_config_answers_with_full_logits() {
        let ids = [3, 1, 4, 1, 5];
        let answers = [0, 1, 2].map(|rank| {
            let model = TensorParallelMistral::load(params("uneven"), TensorParallelConfig::new(3, rank)).unwrap();
            let mut state = InferenceState::new(model.config());
            model.prefill(&mut state, &ids).unwrap();
            assert_eq!(state.logits().len(), model.config().vocab_size);
            bits(state.logits())
        });
        assert!(answers[0] == answers[1] && answers[1] == answers[2]);
    }

    #[test]
    fn a_failed_step_leaves_the_state_as_it_was_and_the_model_usable() {
        let model = load("tied", 2);
        let mut state = InferenceState::new(model.config());
        model.prefill(&mut state, &[1, 2, 3]).unwrap();
        let before = bits(state.logits());
        assert!(matches!(model.try_forward(&mut state, 300, false), Err(Error::TokenOutOfRange { token: 300, vocab_size: 300 })));
        assert_eq!((bits(state.logits()), state.position()), (before, 3));
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| model.forward(&mut state, 300, false)));
        assert!(panic.unwrap_err().downcast_ref::<String>().unwrap().contains("token 300"));
        model.forward(&mut state, 4, false);
        assert_eq!(state.position(), 4);
    }

    #[test]
    fn an_f16_cache_stays_within_its_rounding_and_takes_half_the_pages() {
        let model = load("gqa-headdim", 2);
        let ids: Vec<u32> = (0..200).map(|i| i * 3 % 384).collect();
        let [exact, half] = [crate::KvType::F32, crate::KvType::F16].map(|kv| {
            let mut state = InferenceState::with_kv(model.config(), kv);
            model.prefill(&mut state, &ids).unwrap();
            state
        });
        let gap = exact.logits().iter().zip(half.logits()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(gap > 0.0 && gap < 0.05, "{gap}");
        assert_eq!((exact.kv_pages(), half.kv_pages()), (4, 2));
        drop((exact, half));
        assert_eq!(model.kv_pages_held(), 0);
    }

    #[test]
    fn a_trace_tells_reads_and_sums_from_computing() {
        let model = TensorParallelMistral::load_on_gpus(params("tied"), vec![Device::cpu().isolated(); 2]).unwrap();
        model.start_trace();
        let start = std::time::Instant::now();
        model.forward(&mut InferenceState::new(model.config()), 1, false);
        let both_ranks = 2.0 * start.elapsed().as_secs_f64();
        let [compute, read, reduce, write] = model.traced_seconds();
        assert!(compute > 0.0 && read > 0.0 && reduce > 0.0, "{:?}", [compute, read, reduce]);
        assert_eq!(write, 0.0, "the CPU computes where it is written to");
        assert!(compute + read + reduce <= both_ranks, "no time counts twice");
    }

    #[test]
    fn many_threads_share_a_model_even_inside_a_callers_own_pool() {
        let model = load("tiny-mistral", 2);
        let run = |seed: u32| {
            let mut state = InferenceState::new(model.config());
            let ids: Vec<u32> = (0..20).map(|i| (i * seed) % 320).collect();
            model.prefill(&mut state, &ids).unwrap();
            bits(state.logits())
        };
        let alone: Vec<_> = (1..=8).map(run).collect();
        let shared = std::thread::scope(|scope| {
            let threads: Vec<_> = (1..=8).map(|seed| scope.spawn(move || run(seed))).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(alone, shared);
        #[cfg(feature = "parallel")]
        {
            use rayon::prelude::*;
            let inside: Vec<_> = (1..=8u32).into_par_iter().map(run).collect();
            assert_eq!(alone, inside);
        }
    }

    #[test]
    fn what_callers_share_between_threads_is_send_and_sync() {
        fn check<T: Send + Sync>() {}
        check::<TensorParallelMistral>();
        check::<PipelineParallelMistral>();
        check::<Parameters>();
        check::<Device>();
        check::<InferenceState>();
        check::<Error>();
    }
}
