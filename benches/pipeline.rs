//! What stages and batches gain on the CPU: `cargo bench --bench pipeline`. benches/README.md says what the rows mean.
//!
//! Both sides of every ratio run in turn in one process, the median of the rounds' ratios counts.

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::Instant;

use common::{Spec, write_checkpoint};
use safetensors::Dtype;
use torchless::{InferenceState, ParallelConfig, Parameters, PipelineParallelMistral};

const PROMPT: usize = 512;
const MICRO_BATCHES: usize = 8;
const SEQUENCES: usize = 8;
/// What is there already when decoding begins.
const CONTEXT: usize = 32;

fn load(params: &Parameters, stages: usize, threads: usize) -> PipelineParallelMistral {
    let config = ParallelConfig::pipeline(MICRO_BATCHES).stages(stages).threads(threads).kv_positions(64 * 64);
    PipelineParallelMistral::load(params.clone(), config).unwrap()
}

/// Seconds of a prefill, and of the sequence's state.
fn prefill(model: &PipelineParallelMistral) -> f64 {
    let mut state = InferenceState::new(model.config());
    let prompt: Vec<u32> = (0..PROMPT as u32).map(|t| t * 7919 % model.config().vocab_size as u32).collect();
    let start = Instant::now();
    model.prefill(&mut state, &prompt).unwrap();
    start.elapsed().as_secs_f64()
}

/// Tokens a second of `n` sequences that decode `steps` tokens each, dealt out to as many callers as there are stages.
fn decode(model: &PipelineParallelMistral, n: usize, steps: usize) -> f64 {
    let callers = model.ranks().last().unwrap().stage + 1;
    let mut states: Vec<InferenceState> = (0..n).map(|_| InferenceState::new(model.config())).collect();
    for (i, state) in states.iter_mut().enumerate() {
        model.prefill(state, &[i as u32 + 1; CONTEXT]).unwrap();
    }
    let start = Instant::now();
    std::thread::scope(|scope| {
        for states in states.chunks_mut(n.div_ceil(callers)) {
            scope.spawn(move || {
                let mut states: Vec<&mut InferenceState> = states.iter_mut().collect();
                for token in 0..steps as u32 {
                    let tokens = vec![token + 5; states.len()];
                    model.forward_batch(&mut states, &tokens).unwrap();
                }
            });
        }
    });
    (n * steps) as f64 / start.elapsed().as_secs_f64()
}

/// The share of the steady part of a traced prefill, from the last stage's first row to the first stage's last, that each stage computes.
fn steady(model: &PipelineParallelMistral) -> Vec<f64> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace.json");
    model.start_trace();
    prefill(model);
    model.write_trace(&path).unwrap();
    let trace: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let stages = model.ranks().len();
    let mut spans = vec![Vec::new(); stages];
    let events = trace["traceEvents"].as_array().unwrap();
    let newest = events.iter().filter_map(|e| e["args"]["micro_batch"].as_u64()).max().unwrap();
    for event in events.iter().filter(|e| e["cat"] == "compute") {
        // A trace goes on as long as its model: the last prefill's micro-batches are the last.
        if event["args"]["micro_batch"].as_u64().unwrap() + MICRO_BATCHES as u64 > newest {
            let (start, dur) = (event["ts"].as_f64().unwrap(), event["dur"].as_f64().unwrap());
            spans[event["args"]["stage"].as_u64().unwrap() as usize].push((start, start + dur));
        }
    }
    assert!(spans.iter().all(|spans| spans.len() == MICRO_BATCHES), "a span for each stage and micro-batch");
    let from = spans[stages - 1].iter().map(|s| s.0).fold(f64::INFINITY, f64::min);
    let to = spans[0].iter().map(|s| s.1).fold(0.0, f64::max);
    let busy = |spans: &Vec<(f64, f64)>| spans.iter().map(|s| (s.1.min(to) - s.0.max(from)).max(0.0)).sum::<f64>() / (to - from);
    spans.iter().map(busy).collect()
}

struct Ratios {
    what: String,
    figures: [f64; 2],
    unit: &'static str,
    ratios: Vec<f64>,
}

impl Ratios {
    /// `a` against `b`, more is better.
    fn of(what: &str, unit: &'static str, pairs: &[[f64; 2]]) -> Self {
        let median = |i: usize| quantile(pairs.iter().map(|p| p[i]).collect(), 0.5);
        let ratios = pairs.iter().map(|[a, b]| a / b).collect();
        Self { what: what.into(), figures: [median(0), median(1)], unit, ratios }
    }

    fn print(self) {
        let at = |q| quantile(self.ratios.clone(), q);
        let [a, b] = self.figures;
        println!("| {} | {a:.1} | {b:.1} {} | {:.2} ({:.2}..{:.2}) |", self.what, self.unit, at(0.5), at(0.1), at(0.9));
    }
}

fn quantile(mut values: Vec<f64>, q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * q).round() as usize]
}

/// One model: what it is called, how it is made, and how many tokens a decode takes.
fn measure(name: &str, spec: &Spec, rounds: usize, steps: usize) {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), spec);
    let params = Parameters::load(dir.path()).unwrap();
    let bytes = std::fs::metadata(dir.path().join("model.safetensors")).unwrap().len();
    println!("\n{name}: {} layers of {}, {} MB\n", spec.layers, spec.hidden, bytes >> 20);
    println!("| what | it | against | ratio (p10..p90) |\n|---|---|---|---|");
    let (one, two, wide) = (load(&params, 1, 1), load(&params, 2, 2), load(&params, 1, 2));
    let (mut prefills, mut decodes, mut batched, mut batched_one, mut busy) = (vec![], vec![], vec![], vec![], vec![]);
    for round in 0..rounds + 1 {
        let speed = |model| PROMPT as f64 / prefill(model);
        let step = [[speed(&two), speed(&one)], [decode(&two, SEQUENCES, steps), decode(&one, SEQUENCES, steps)]];
        let batch = [decode(&wide, SEQUENCES, steps), decode(&wide, 1, steps), decode(&one, SEQUENCES, steps), decode(&one, 1, steps)];
        let steady = steady(&two);
        // The first round warms up.
        if round > 0 {
            prefills.push(step[0]);
            decodes.push(step[1]);
            batched.push([batch[0], batch[1]]);
            batched_one.push([batch[2], batch[3]]);
            busy.push(steady.into_iter().fold(1.0, f64::min));
        }
    }
    Ratios::of("prefill of 512 in 8 micro-batches, 2 stages of 1 thread, against 1 stage of 1 thread", "tokens/s", &prefills).print();
    Ratios::of("decode of 8 sequences, 2 stages of 1 thread, against 1 stage of 1 thread", "tokens/s", &decodes).print();
    Ratios::of("decode of 8 sequences against 1, 2 threads", "tokens/s", &batched).print();
    Ratios::of("decode of 8 sequences against 1, 1 thread", "tokens/s", &batched_one).print();
    let at = |q| quantile(busy.clone(), q);
    println!(
        "\nThe less busy stage computes {:.1} % (p10 {:.1}, p90 {:.1}) of a prefill's steady part.",
        100.0 * at(0.5),
        100.0 * at(0.1),
        100.0 * at(0.9)
    );
}

fn main() {
    // `cargo bench` says --bench. `cargo test --benches` doesn't: then a small model shows that all runs.
    let real = std::env::args().any(|arg| arg == "--bench");
    let rounds = if real { 9 } else { 1 };
    let shape = |layers, hidden: usize, dtype| Spec {
        layers,
        hidden,
        intermediate: hidden * 7 / 2,
        heads: hidden / 64,
        kv_heads: hidden / 256,
        head_dim: 64,
        vocab: 1024,
        max_positions: 4096,
        dtype,
        ..Spec::default()
    };
    println!("{rounds} rounds, {} threads", std::thread::available_parallelism().map_or(1, std::num::NonZero::get));
    if !real {
        return measure("small", &shape(2, 256, Dtype::F32), rounds, 2);
    }
    measure("within the cache, bf16", &shape(8, 256, Dtype::BF16), rounds, 64);
    measure("beyond the cache, bf16", &shape(8, 1024, Dtype::BF16), rounds, 16);
    measure("beyond the cache, f32", &shape(8, 1024, Dtype::F32), rounds, 16);
}
