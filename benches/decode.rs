//! What a decoded token costs on the CPU, by format and distribution of work: `cargo bench --bench decode`.
//!
//! Sides of a comparison take turns within a round; a ratio is that of a round, and its median is told with the 10th and 90th percentiles.
//! The model is four layers of the shape of `benches/peers` unless `-- --model DIR` names another.

#[path = "../tests/common/mod.rs"]
mod common;
mod measure;

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use common::{Spec, write_checkpoint};
use measure::{leaves_out, measured, read, spread};
use safetensors::Dtype;
use torchless::{
    InferenceState, KvType, ParallelConfig, Parameters, QuantFormat, TensorParallelMistral, WorkDistributionConfig, plan_summary,
};

const ROUNDS: usize = 9;
/// Tokens that a side decodes in its turn.
const TOKENS: usize = 16;

/// A model as one side of a comparison runs it.
struct Side {
    model: TensorParallelMistral,
    state: InferenceState,
    fast: bool,
    bytes: u64,
}

impl Side {
    fn new(dir: &Path, config: ParallelConfig, fast: bool) -> Self {
        let params = Parameters::load(dir).unwrap_or_else(|e| panic!("{e}"));
        let ranks = config.tensor.world_size;
        let plan = plan_summary(&params, &config, &vec![torchless::Device::cpu(); ranks]).unwrap_or_else(|e| panic!("{e}"));
        let model = TensorParallelMistral::load(params, config).unwrap_or_else(|e| panic!("{e}"));
        let mut state = InferenceState::with_kv(model.config(), KvType::F16);
        model.fast_prefill(&mut state, &[1; 8]).unwrap();
        Self { model, state, fast, bytes: plan.weight_bytes_per_token }
    }

    /// Seconds of a token.
    fn turn(&mut self) -> f64 {
        self.state.truncate(8);
        let start = Instant::now();
        for token in 0..TOKENS as u32 {
            if self.fast {
                self.model.fast_forward(&mut self.state, token, false)
            } else {
                self.model.forward(&mut self.state, token, false)
            }
        }
        start.elapsed().as_secs_f64() / TOKENS as f64
    }
}

/// Other work on the machine, until it is dropped.
struct Busy<'a>(&'a AtomicBool);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn with_busy_threads<T>(n: usize, f: impl FnOnce() -> T) -> T {
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _busy = Busy(&ended);
        for _ in 0..n {
            scope.spawn(|| {
                let mut x = 1u64;
                while !ended.load(Ordering::Relaxed) {
                    x = black_box(x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
                }
            });
        }
        f()
    })
}

/// One side against another, in turn: `it` is so many times as fast.
fn compare(rounds: usize, what: &str, it: &mut Side, other: &mut Side, busy: [usize; 2]) {
    let (mut its, mut others, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        let (a, b) = (with_busy_threads(busy[0], || it.turn()), with_busy_threads(busy[1], || other.turn()));
        its.push(1.0 / a);
        others.push(1.0 / b);
        ratios.push(b / a);
    }
    let [ratio, low, high] = spread(ratios);
    println!("| {what} | {:.1} | {:.1} | {ratio:.2} ({low:.2}..{high:.2}) |", spread(its)[0], spread(others)[0]);
}

fn formats(rounds: usize, dir: &Path, words: &[u64]) {
    println!("\n| weights | threads | form | tokens/s | GB/s | reading alone | share of it |\n|---|---|---|---|---|---|---|");
    let formats = [None, Some(QuantFormat::Q8_0), Some(QuantFormat::Iq4Nl), Some(QuantFormat::Q4_0)];
    for format in formats {
        for threads in [1, 2] {
            for fast in [true, false] {
                let mut config = ParallelConfig::default().threads(threads);
                config.weights = format;
                let mut side = Side::new(dir, config, fast);
                let (mut speeds, mut reads, mut shares) = (Vec::new(), Vec::new(), Vec::new());
                for _ in 0..rounds {
                    let before = read(words, threads);
                    let token = side.turn();
                    let limit = (before + read(words, threads)) / 2.0;
                    speeds.push(1.0 / token);
                    reads.push(limit);
                    shares.push(side.bytes as f64 / token / 1e9 / limit);
                }
                let (name, form) = (format.map_or("stored", QuantFormat::name), if fast { "fast" } else { "exact" });
                let ([speed, ..], [share, low, high]) = (spread(speeds), spread(shares));
                let gbs = speed * side.bytes as f64 / 1e9;
                println!(
                    "| {name} | {threads} | {form} | {speed:.1} | {gbs:.1} | {:.1} | {share:.2} ({low:.2}..{high:.2}) |",
                    spread(reads)[0]
                );
            }
        }
    }
}

fn distribution(rounds: usize, dir: &Path) {
    println!("\n| comparison | it, tokens/s | against | ratio (p10..p90) |\n|---|---|---|---|");
    for (name, format) in [("stored", None), ("iq4_nl", Some(QuantFormat::Iq4Nl))] {
        let side = |ranks: usize, threads: usize, work: WorkDistributionConfig, fast: bool| {
            let mut config = ParallelConfig::tensor_parallel(ranks, 0).threads(threads);
            (config.weights, config.work) = (format, work);
            Side::new(dir, config, fast)
        };
        let adaptive = WorkDistributionConfig::default();
        let equal = WorkDistributionConfig { tasks_per_thread: 1, max_chunk_size: usize::MAX, ..adaptive };
        let rows = WorkDistributionConfig { min_chunk_size: 1, max_chunk_size: 1, ..adaptive };
        let (mut two, mut one) = (side(1, 2, adaptive, true), side(1, 1, adaptive, true));
        compare(rounds, &format!("{name}: 2 threads against 1"), &mut two, &mut one, [0, 0]);
        compare(rounds, &format!("{name}: 2 threads beside a busy third against 1 thread beside it"), &mut two, &mut one, [1, 1]);
        compare(rounds, &format!("{name}: 2 threads beside a busy third against 1 thread alone"), &mut two, &mut one, [1, 0]);
        compare(rounds, &format!("{name}: fast against exact, 2 threads"), &mut two, &mut side(1, 2, adaptive, false), [0, 0]);
        compare(rounds, &format!("{name}: 2 ranks against 1 rank, 2 threads"), &mut side(2, 2, adaptive, true), &mut two, [0, 0]);
        let (mut equal, mut rows) = (side(1, 2, equal, true), side(1, 2, rows, true));
        for (neighbour, busy) in [("", [0, 0]), (" beside a busy thread", [1, 1])] {
            compare(rounds, &format!("{name}: adaptive chunks against equal ones{neighbour}"), &mut two, &mut equal, busy);
            compare(rounds, &format!("{name}: adaptive chunks against single rows{neighbour}"), &mut two, &mut rows, busy);
        }
    }
}

fn loading(rounds: usize, dir: &Path) {
    println!("\n| weights | load, ms | GB/s of the checkpoint (p10..p90) |\n|---|---|---|");
    for format in [None, Some(QuantFormat::Q8_0), Some(QuantFormat::Iq4Nl), Some(QuantFormat::Q4_0)] {
        let (mut seconds, mut speeds) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let start = Instant::now();
            let params = Parameters::load(dir).unwrap();
            let mut config = ParallelConfig::default().threads(2);
            config.weights = format;
            let model = TensorParallelMistral::load(params.clone(), config).unwrap();
            // The first token touches what was only mapped.
            model.fast_forward(&mut InferenceState::new(model.config()), 1, false);
            let took = start.elapsed().as_secs_f64();
            seconds.push(1e3 * took);
            speeds.push(params.bytes() as f64 / took / 1e9);
        }
        let ([ms, ..], [speed, low, high]) = (spread(seconds), spread(speeds));
        println!("| {} | {ms:.0} | {speed:.2} ({low:.2}..{high:.2}) |", format.map_or("stored", QuantFormat::name));
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let measured = measured();
    let (made, rounds) = (tempfile::tempdir().unwrap(), if measured { ROUNDS } else { 1 });
    let named = args.iter().position(|arg| arg == "--model").and_then(|i| args.get(i + 1)).map(PathBuf::from);
    let dir = named.unwrap_or_else(|| {
        let shape = Spec {
            dtype: Dtype::BF16,
            vocab: 4096,
            hidden: 2048,
            intermediate: 7168,
            layers: 4,
            heads: 32,
            kv_heads: 8,
            head_dim: 64,
            ..Spec::default()
        };
        write_checkpoint(
            made.path(),
            &if measured { shape } else { Spec { hidden: 64, head_dim: 2, intermediate: 96, vocab: 64, ..shape } },
        );
        made.path().into()
    });
    let words = measure::words(measured);
    let only = |part: &str| !leaves_out(part, &["formats", "distribution", "loading"]);
    if only("formats") {
        formats(rounds, &dir, &words);
    }
    if only("distribution") {
        distribution(rounds, &dir);
    }
    if only("loading") {
        loading(rounds, &dir);
    }
}
