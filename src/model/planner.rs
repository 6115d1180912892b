//! Which devices a model should be split over: a few of its layers are run on them, and the rest is arithmetic.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::backend::{KvType, PlaceCounts};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kept::Kept;
use crate::model::layout::plan_summary;
use crate::model::parallel::TensorParallelMistral;
use crate::model::parallel_config::ParallelConfig;
use crate::model::state::InferenceState;
use crate::params::Parameters;

/// Turns of each of the two short models, at least and at most, and how long they may take together once there are enough.
const TURNS: std::ops::RangeInclusive<usize> = 5..=40;
const TIME: Duration = Duration::from_millis(800);

/// A split must be faster than one device by this much to be chosen: it takes memory and power on all of them.
const MARGIN: f64 = 0.97;

/// How fast a model is predicted to run on some devices.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Prediction {
    /// One for each rank.
    pub devices: Vec<Device>,
    /// What each should own in proportion to the others; `None` for all the same.
    pub shares: Option<Vec<f64>>,
    /// Seconds that a token of each sequence takes, with the fast forms and an f16 cache that holds little yet.
    pub seconds_per_step: f64,
    /// How much of that is a layer's.
    pub seconds_per_layer: f64,
    /// Of ranks that meet through the host: how long each computes of a step of the longest model that was run, by its device's clock or else as the host saw it.
    /// 0 of others.
    pub computing: Vec<f64>,
    /// Sequences that step together.
    pub batch: usize,
}

impl Prediction {
    /// Tokens a second, over all sequences.
    #[must_use]
    pub fn tokens_per_second(&self) -> f64 {
        self.batch as f64 / self.seconds_per_step
    }
}

/// Every grid that was considered.
#[derive(Debug)]
#[non_exhaustive]
pub struct Choice {
    /// The fastest first.
    pub predictions: Vec<Prediction>,
    /// Index of the one to take: the fastest, unless one device is as fast.
    pub chosen: usize,
    /// Devices, alone or together, that can't run the model, and why.
    pub failed: Vec<(Vec<Device>, Error)>,
}

/// Goes up with every change that makes models faster or slower.
const GENERATION: u32 = 2;

/// What is kept of a prediction: its seconds.
#[derive(Clone, Serialize, Deserialize)]
struct Seconds {
    step: f64,
    layer: f64,
    computing: Vec<f64>,
}

/// What was predicted for a checkpoint, with these weights and threads and this version.
fn kept(params: &Parameters, config: &ParallelConfig) -> Kept<Seconds> {
    let ParallelConfig { weights, threads, work, .. } = config;
    let version = env!("CARGO_PKG_VERSION");
    Kept::open("predicted", format!("torchless {version}, generation {GENERATION}, {}, {weights:?}, {threads:?}, {work:?}", params.stamp()))
}

/// What tells the grids of a model apart.
fn name(config: &ParallelConfig, devices: &[Device], batch: usize) -> String {
    let devices: Vec<String> = devices.iter().map(Device::identity).collect();
    let ParallelConfig { shares, wire, overlap, pipeline, .. } = config;
    let stages = config.stages.unwrap_or(1);
    let pipeline = Some(pipeline).filter(|_| stages > 1);
    format!("{devices:?}, shares {shares:?}, {stages} stages {pipeline:?}, {batch} sequences, sums in {wire:?}, overlap {overlap}")
}

/// What [`predict`] said earlier, if it is kept: in the user's cache directory (or the one that `TORCHLESS_CACHE` names), by checkpoint, devices, drivers and
/// version. Nothing is kept of a configuration that is [`ParallelConfig::untuned`].
#[must_use]
pub fn kept_prediction(params: &Parameters, config: &ParallelConfig, devices: &[Device], batch: usize) -> Option<Prediction> {
    let batch = batch.max(1);
    let seconds = kept(params, config).get(&name(config, devices, batch)).filter(|_| config.tune)?.clone();
    let (devices, shares) = (devices.to_vec(), config.shares.clone());
    let is_sane = seconds.step > 0.0 && seconds.step.is_finite() && seconds.layer >= 0.0;
    let Seconds { step, layer, computing } = seconds;
    is_sane.then_some(Prediction { devices, shares, seconds_per_step: step, seconds_per_layer: layer, computing, batch })
}

/// Forgets what is kept of predictions for this checkpoint with such weights and threads, so that it is measured anew.
pub fn forget_predictions(params: &Parameters, config: &ParallelConfig) {
    kept(params, config).forget();
}

/// Predicts how fast `params` would run on `devices`, a rank each, by running two short models of its first layers there. The whole model need
/// not fit. Of several stages it is right as far as the short models are cut like the whole one.
///
/// What comes out is kept for [`kept_prediction`].
///
/// # Errors
/// As [`TensorParallelMistral::load_grid`] and [`TensorParallelMistral::fast_forward_batch`].
pub fn predict(params: &Parameters, config: &ParallelConfig, devices: &[Device], batch: usize) -> Result<Prediction> {
    let batch = batch.max(1);
    let (layers, stages) = (params.config().n_layers, config.stages.unwrap_or(1).max(1));
    // Every stage of the longer one has four layers more than of the shorter.
    let [short, long] = [stages.min(layers), (5 * stages).min(layers)];
    let load = |n: usize| Short::load(&params.first_layers(n), config, devices, batch);
    let mut shorter = load(short)?;
    let mut longer = if long > short { Some(load(long)?) } else { None };
    let start = Instant::now();
    for turn in 0..*TURNS.end() {
        if turn >= *TURNS.start() && start.elapsed() > TIME {
            break;
        }
        shorter.step()?;
        longer.as_mut().map_or(Ok(()), Short::step)?;
    }
    let base = shorter.median();
    let computing = longer.as_mut().unwrap_or(&mut shorter).computing()?;
    let seconds_per_layer = longer.map_or(0.0, |longer| (longer.median() - base).max(0.0) / (long - short) as f64);
    let seconds_per_step = base + seconds_per_layer * (layers - short) as f64;
    if config.tune {
        kept(params, config)
            .keep(name(config, devices, batch), Seconds { step: seconds_per_step, layer: seconds_per_layer, computing: computing.clone() });
    }
    let (devices, shares) = (devices.to_vec(), config.shares.clone());
    Ok(Prediction { devices, shares, seconds_per_step, seconds_per_layer, computing, batch })
}

/// [`kept_prediction`], or else [`predict`].
///
/// # Errors
/// As [`predict`].
pub fn foresee(params: &Parameters, config: &ParallelConfig, devices: &[Device], batch: usize) -> Result<Prediction> {
    kept_prediction(params, config, devices, batch).map_or_else(|| predict(params, config, devices, batch), Ok)
}

/// Predicts each device alone, then the fastest two, three and so on together with shares by their speed, and says what to take. A device
/// that can't hold the model alone still counts where several can. What is kept of earlier predictions is not measured again.
///
/// # Errors
/// [`Error::NoDevices`]; the first device's, if nothing can run the model.
pub fn choose(params: &Parameters, config: &ParallelConfig, devices: &[Device], batch: usize) -> Result<Choice> {
    let (mut singles, mut predictions, mut failed) = (Vec::new(), Vec::new(), Vec::new());
    let mut alone = config.clone().stages(1);
    alone.shares = None;
    for device in devices {
        let device = std::slice::from_ref(device);
        match foresee(params, &alone, device, batch) {
            Ok(prediction) => {
                match plan_summary(params, &alone, device) {
                    Ok(_) => predictions.push(prediction.clone()),
                    Err(e) => failed.push((device.to_vec(), e)),
                }
                singles.push(prediction);
            }
            Err(e) => failed.push((device.to_vec(), e)),
        }
    }
    let by_time = |a: &Prediction, b: &Prediction| a.seconds_per_step.total_cmp(&b.seconds_per_step);
    singles.sort_by(by_time);
    for together in 2..=singles.len().min(params.config().n_heads) {
        let devices: Vec<Device> = singles[..together].iter().flat_map(|single| single.devices.clone()).collect();
        let speeds: Vec<f64> = singles[..together].iter().map(|single| 1.0 / single.seconds_per_step).collect();
        let config = alone.clone().with_shares(rounded(&speeds));
        match plan_summary(params, &config, &devices).and_then(|_| balanced(params, &config, &devices, batch)) {
            Ok(prediction) => predictions.push(prediction),
            Err(e) => failed.push((devices, e)),
        }
    }
    if predictions.is_empty() {
        return Err(if failed.is_empty() { Error::NoDevices } else { failed.swap_remove(0).1 });
    }
    predictions.sort_by(by_time);
    let single = predictions.iter().position(|prediction| prediction.devices.len() == 1);
    let as_fast = single.filter(|&single| predictions[0].seconds_per_step >= MARGIN * predictions[single].seconds_per_step);
    Ok(Choice { chosen: as_fast.unwrap_or(0), predictions, failed })
}

/// A split with shares by the speeds of its devices alone, or by how long each then computed, whichever is faster: thin slices are slower on some, and some
/// work is everyone's.
fn balanced(params: &Parameters, config: &ParallelConfig, devices: &[Device], batch: usize) -> Result<Prediction> {
    let first = foresee(params, config, devices, batch)?;
    let Some(shares) = &first.shares else { return Ok(first) };
    let speeds: Vec<f64> = shares.iter().zip(&first.computing).map(|(share, seconds)| share / seconds).collect();
    let again = config.clone().with_shares(if speeds.iter().all(|speed| speed.is_normal()) { rounded(&speeds) } else { shares.clone() });
    if again.shares == first.shares || plan_summary(params, &again, devices).is_err() {
        return Ok(first);
    }
    let second = foresee(params, &again, devices, batch)?;
    Ok(if second.seconds_per_step < first.seconds_per_step { second } else { first })
}

/// Shares of these speeds in sixty-fourths of all, so that the same devices get the same ones the next time: what is kept of a grid, packed weights
/// and measured kernels, is of its very cuts.
fn rounded(speeds: &[f64]) -> Vec<f64> {
    let all: f64 = speeds.iter().sum();
    speeds.iter().map(|speed| (64.0 * speed / all).round().max(1.0)).collect()
}

/// A model of some layers, and how long its steps took.
struct Short {
    model: TensorParallelMistral,
    states: Vec<InferenceState>,
    seconds: Vec<f64>,
}

impl Short {
    fn load(params: &Parameters, config: &ParallelConfig, devices: &[Device], batch: usize) -> Result<Self> {
        let positions = (*TURNS.end() + 2).min(params.config().max_position_embeddings);
        let mut config = config.clone().kv_positions(batch.saturating_mul(positions.next_multiple_of(KvType::F16.page_len())));
        config.cache_weights = false;
        let model = TensorParallelMistral::load_grid(params.clone(), config, devices.iter().cloned())?;
        let states = (0..batch).map(|_| InferenceState::with_kv(model.config(), KvType::F16)).collect();
        let mut short = Self { model, states, seconds: Vec::new() };
        // Drivers compile what is used first, and caches are cold.
        short.step()?;
        short.step()?;
        short.seconds.clear();
        Ok(short)
    }

    /// See [`Prediction::computing`].
    fn computing(&mut self) -> Result<Vec<f64>> {
        let (ranks, clocks) = (self.model.ranks().len(), self.model.counts()?);
        if ranks == 1 || clocks.len() != ranks {
            return Ok(vec![0.0; ranks]);
        }
        self.model.start_trace();
        self.model.time_devices(true);
        let (steps, turns) = (self.seconds.len(), *TURNS.start());
        (0..turns).try_for_each(|_| self.step())?;
        self.seconds.truncate(steps);
        self.model.time_devices(false);
        let places = self.model.counts()?;
        let seen = self.model.traced_seconds_by_rank();
        let of = |((after, before), seen): ((&PlaceCounts, &PlaceCounts), &[f64; 4])| {
            let clock = 1e-9 * (after.device_nanoseconds - before.device_nanoseconds) as f64;
            (if clock > 0.0 { clock } else { seen[0] }) / turns as f64
        };
        Ok(places.iter().zip(&clocks).zip(&seen).map(of).collect())
    }

    fn step(&mut self) -> Result<()> {
        let limit = self.model.config().max_position_embeddings;
        self.states.iter_mut().filter(|state| state.position() >= limit).for_each(InferenceState::reset);
        let start = Instant::now();
        let tokens = vec![1 % self.model.config().vocab_size as u32; self.states.len()];
        let mut states: Vec<&mut InferenceState> = self.states.iter_mut().collect();
        self.model.fast_forward_batch(&mut states, &tokens)?;
        self.seconds.push(start.elapsed().as_secs_f64());
        Ok(())
    }

    fn median(&self) -> f64 {
        let mut seconds = self.seconds.clone();
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    }
}

#[cfg(test)]
mod tests {
    use super::rounded;

    #[test]
    fn shares_are_sixty_fourths_and_a_slow_device_keeps_one() {
        assert_eq!(rounded(&[3.1, 1.01]), [48.0, 16.0]);
        assert_eq!(rounded(&[1.0, 1.001, 0.998]), [21.0, 21.0, 21.0]);
        assert_eq!(rounded(&[500.0, 1.0]), [64.0, 1.0]);
    }
}
