//! What the verbs that plan or run a model have in common.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Once;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use torchless::{
    Device, InferenceState, KvType, ParallelConfig, Parameters, QuantFormat, TensorParallelMistral, Wire, choose, kept_prediction,
};

use super::Outcome;
use super::model::ModelArg;

/// Which model, on which devices.
#[derive(clap::Args)]
pub struct GridArgs {
    #[command(flatten)]
    pub model: ModelArg,

    /// Devices, one for each rank: cpu and gpu:N (as `torchless devices` numbers them) between commas, repeated at will; or auto: of the hardware GPUs and the CPU those that are fastest, by running a few layers; without a GPU, the CPU
    #[arg(long, value_name = "LIST", default_value = "auto")]
    pub devices: String,

    /// Cuts the device list into this many equal groups, each a stage with its part of the layers
    #[arg(long, value_name = "S", default_value = "1")]
    pub stages: NonZeroUsize,

    /// What each rank of a stage owns in proportion to the others, such as 3,1; or, with --stages, one number a device, which also give each stage layers by the sum of its own
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub shares: Option<Vec<f64>>,

    /// Threads of the CPU, shared out to stages that compute at the same time; one a core by default
    #[arg(long, value_name = "T")]
    pub threads: Option<NonZeroUsize>,

    /// Positions that the KV cache may hold, rounded up to whole pages of 64 (f32) or 128 (f16); by default as many as the call can need
    #[arg(long, value_name = "N")]
    pub context: Option<NonZeroUsize>,

    /// Quantise the weights as they are loaded: q8_0, iq4_nl (the better 4-bit), q4_0; or stored: as the checkpoint has them
    #[arg(long, value_name = "FORMAT", default_value = "stored", value_parser = weights)]
    pub weights: Weights,

    /// Keep quantised weights, as they are laid out to be multiplied, in files beside the checkpoint, and take them from there the next time
    #[arg(long)]
    pub cache_weights: bool,

    /// Take each GPU's default kernels instead of measuring which are fastest; what was measured is kept in the user's cache directory
    #[arg(long)]
    pub no_tune: bool,

    /// Compute all rows of a prompt before they are summed over the devices, not one half while the other is summed
    #[arg(long)]
    pub no_overlap: bool,

    /// How a prompt's rows travel between GPUs and the host that sums them: f32, f16 or bf16
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = wire)]
    pub wire: Wire,

    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// `None`: as the checkpoint stores them.
#[derive(Clone, Copy)]
pub struct Weights(pub Option<QuantFormat>);

fn weights(name: &str) -> Result<Weights, String> {
    if name == "stored" {
        return Ok(Weights(None));
    }
    let names = QuantFormat::ENCODABLE.map(QuantFormat::name).join(", ");
    QuantFormat::from_name(name)
        .filter(|format| QuantFormat::ENCODABLE.contains(format))
        .map(|format| Weights(Some(format)))
        .ok_or_else(|| format!("the formats are stored, {names}"))
}

fn wire(name: &str) -> Result<Wire, String> {
    Wire::from_name(name).ok_or_else(|| format!("the types are {}", Wire::ALL.map(Wire::name).join(", ")))
}

impl GridArgs {
    pub fn devices(&self) -> Outcome<Vec<Device>> {
        Ok(Device::parse_list(&self.devices)?)
    }

    /// The grid, with a KV cache for one sequence of `positions` at most.
    pub fn config(&self, params: &Parameters, positions: usize) -> ParallelConfig {
        let bound = self.context.map_or(usize::MAX, NonZeroUsize::get).min(params.config().max_position_embeddings);
        let mut config = ParallelConfig::for_model(params.config()).stages(self.stages.get()).kv_positions(positions.clamp(1, bound));
        if let Some(shares) = &self.shares {
            config = config.with_shares(shares.clone());
        }
        if let Some(threads) = self.threads {
            config = config.threads(threads.get());
        }
        config.weights = self.weights.0;
        config.cache_weights = self.cache_weights;
        config.tune = !self.no_tune;
        config.overlap = !self.no_overlap;
        config.wire = self.wire;
        config
    }

    /// Whether devices and shares are left to us.
    pub fn is_left_to_us(&self) -> bool {
        self.devices == "auto" && self.stages.get() == 1 && self.shares.is_none()
    }

    /// The devices that were asked for; where the choice is ours, those to choose from: every hardware GPU, and the CPU.
    pub fn candidates(&self) -> Outcome<Vec<Device>> {
        let mut devices = self.devices()?;
        if self.is_left_to_us() && !devices.iter().any(Device::is_cpu) {
            devices.push(Device::cpu());
        }
        Ok(devices)
    }

    /// The devices to run on, and the shares of each: those that were asked for, or where the choice is ours and there is one, the fastest.
    pub fn chosen(&self, params: &Parameters, config: ParallelConfig) -> Outcome<(Vec<Device>, ParallelConfig)> {
        let devices = self.candidates()?;
        if !self.is_left_to_us() || devices.len() == 1 {
            warn_of_slow_split(params, &config, &devices);
            return Ok((devices, config));
        }
        let mut choice = choose(params, &config, &devices, 1)?;
        for (devices, error) in &choice.failed {
            super::note(format!("{} can't run it: {error}", labels(devices)));
        }
        let best = choice.predictions.swap_remove(choice.chosen);
        let (devices, speed) = (labels(&best.devices), best.tokens_per_second());
        super::note(format!(
            "running on {devices}, where a few layers promise {speed:.1} tokens/s; torchless plan --predict shows what else there is"
        ));
        let config = match best.shares {
            Some(shares) => config.with_shares(shares),
            None => config,
        };
        Ok((best.devices, config))
    }

    /// The model on this grid, ready to run as `run` says.
    pub fn load(&self, run: &RunArgs, params: &Parameters, config: ParallelConfig) -> Outcome<Loaded> {
        let (devices, config) = self.chosen(params, config)?;
        self.load_on(devices, run, params, config)
    }

    /// The model on these devices, ready to run as `run` says.
    pub fn load_on(&self, devices: Vec<Device>, run: &RunArgs, params: &Parameters, config: ParallelConfig) -> Outcome<Loaded> {
        // Better now than after the work.
        if let Some(trace) = &run.trace {
            super::files::check_writable(trace)?;
            super::files::check_apart(trace, &[self.model.path()?])?;
        }
        let start = Instant::now();
        // Drawn only where stderr is a terminal: a spinner, until there are bytes to count.
        let bar = ProgressBar::new_spinner().with_message(format!("loading {}", self.model.name()));
        bar.enable_steady_tick(Duration::from_millis(100));
        let counting = Once::new();
        let model = TensorParallelMistral::load_grid_with_progress(params.clone(), config, devices, |done, all| {
            counting.call_once(|| {
                bar.set_length(all);
                bar.set_style(counted());
            });
            bar.set_position(done);
        });
        bar.finish_and_clear();
        Ok(Loaded { model: model?, seconds: start.elapsed().as_secs_f64() })
    }
}

/// What one grid must be faster than another by for that to be said.
pub const SLOWER: f64 = 1.03;

/// Each device once.
pub fn distinct(devices: &[Device]) -> Vec<Device> {
    let mut distinct: Vec<Device> = Vec::new();
    for device in devices {
        if !distinct.iter().any(|known| known.label() == device.label()) {
            distinct.push(device.clone());
        }
    }
    distinct
}

/// Says so where a few layers have shown before that one of the devices is faster than all of them.
fn warn_of_slow_split(params: &Parameters, config: &ParallelConfig, devices: &[Device]) {
    let each = distinct(devices);
    if each.len() < 2 {
        return;
    }
    let mut alone = config.clone().stages(1);
    alone.shares = None;
    let of_one = |device: &Device| kept_prediction(params, &alone, std::slice::from_ref(device), 1);
    let fastest = each.iter().filter_map(of_one).max_by(|a, b| a.tokens_per_second().total_cmp(&b.tokens_per_second()));
    let (Some(one), Some(all)) = (fastest, kept_prediction(params, config, devices, 1)) else { return };
    let (fast, slow) = (one.tokens_per_second(), all.tokens_per_second());
    if fast > SLOWER * slow {
        let (one, all) = (labels(&one.devices), labels(devices));
        super::note(format!(
            "{all} together are slower than {one} alone: {slow:.1} against {fast:.1} tokens/s when a few layers were run; torchless plan --predict measures anew"
        ));
    }
}

/// Devices as `--devices` takes them.
pub fn labels(devices: &[Device]) -> String {
    devices.iter().map(Device::label).collect::<Vec<_>>().join(",")
}

/// The look of a bar that counts bytes.
pub fn counted() -> ProgressStyle {
    ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// A model, and how long it took to load.
pub struct Loaded {
    pub model: TensorParallelMistral,
    pub seconds: f64,
}

/// How a model computes.
#[derive(clap::Args)]
pub struct RunArgs {
    /// Exact numerics, with an f32 KV cache
    #[arg(long, conflicts_with = "fast")]
    exact: bool,

    /// Fast numerics, with an f16 KV cache
    #[arg(long)]
    fast: bool,

    /// The KV cache's type, whatever the numerics
    #[arg(long, value_name = "TYPE")]
    kv: Option<Kv>,

    /// Write what each rank did when to this file, for Perfetto or chrome://tracing
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kv {
    F32,
    F16,
}

impl RunArgs {
    /// Whether the fast forms are asked for, in a verb that is fast by default or isn't.
    pub fn is_fast(&self, default: bool) -> bool {
        self.fast || (default && !self.exact)
    }

    pub fn kv(&self, is_fast: bool) -> KvType {
        match self.kv {
            Some(Kv::F32) => KvType::F32,
            Some(Kv::F16) => KvType::F16,
            None if is_fast => KvType::F16,
            None => KvType::F32,
        }
    }

    /// Runs `work` on a model and a fresh state, with the trace that was asked for.
    pub fn run<T>(&self, loaded: &Loaded, is_fast: bool, work: impl FnOnce(&mut InferenceState) -> Outcome<T>) -> Outcome<T> {
        let mut state = InferenceState::with_kv(loaded.model.config(), self.kv(is_fast));
        self.traced(loaded, || work(&mut state))
    }

    /// Runs `work` with the trace that was asked for.
    pub fn traced<T>(&self, loaded: &Loaded, work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
        let Some(path) = &self.trace else { return work() };
        loaded.model.start_trace();
        let result = work()?;
        loaded.model.write_trace(path)?;
        Ok(result)
    }
}
