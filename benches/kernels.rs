//! What the CPU's kernels reach of this machine's limits: `cargo bench --bench kernels`, or `-- formats`, `rows`, `attention` or `uneven`.
//!
//! They are measured where they work: in models that consist of little else. Sides of a comparison take turns; a share or a ratio is that
//! of a round, and its median is told with the 10th and 90th percentiles.

#[path = "../tests/common/mod.rs"]
mod common;
mod measure;

use std::path::Path;

use common::{Spec, write_checkpoint};
use measure::{leaves_out, measured, read, seconds, spread, told};
use safetensors::Dtype;
use torchless::{InferenceState, KvType, ParallelConfig, Parameters, QuantFormat, TensorParallelMistral};

const PARTS: [&str; 4] = ["formats", "rows", "attention", "uneven"];
const ROWS: [usize; 7] = [1, 2, 4, 8, 16, 64, 256];

struct Bench {
    rounds: usize,
    words: Vec<u64>,
}

fn load(dir: &Path, threads: usize, positions: usize, weights: Option<QuantFormat>) -> TensorParallelMistral {
    let mut config = ParallelConfig::default().threads(threads).kv_positions(positions);
    config.weights = weights;
    let params = Parameters::load(dir).unwrap_or_else(|e| panic!("{e}"));
    TensorParallelMistral::load(params, config).unwrap_or_else(|e| panic!("{e}"))
}

/// Elements of a token's linear layers, all but the head.
fn elements(spec: &Spec) -> f64 {
    let layers = spec.tensors().into_iter().filter(|(name, shape)| shape.len() == 2 && name.contains("layers"));
    layers.map(|(_, shape)| shape.iter().product::<usize>()).sum::<usize>() as f64
}

impl Bench {
    /// One decoder layer of Mistral-7B in every format: a row from memory, and many.
    fn formats(&self, spec: &Spec, many: usize) {
        println!("\n| weights | threads | 1 row, GB/s | of reading | {many} rows, GFLOP/s |\n|---|---|---|---|---|");
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let (dir, spec) = (tempfile::tempdir().unwrap(), Spec { dtype, ..spec.clone() });
            write_checkpoint(dir.path(), &spec);
            let quantised = if dtype == Dtype::BF16 { &QuantFormat::ENCODABLE[..] } else { &[] };
            for weights in [None].into_iter().chain(quantised.iter().copied().map(Some)) {
                for threads in [1, 2] {
                    let model = load(dir.path(), threads, 2 * many, weights);
                    let bits = match (weights, dtype) {
                        (None, Dtype::F32) => 32.0,
                        (None, _) => 16.0,
                        (Some(QuantFormat::Q8_0), _) => 8.5,
                        (Some(_), _) => 4.5,
                    };
                    let bytes = elements(&spec) * bits / 8.0;
                    let mut state = InferenceState::with_kv(model.config(), KvType::F16);
                    let (mut speeds, mut shares, mut rates) = (Vec::new(), Vec::new(), Vec::new());
                    let prompt = vec![1; many];
                    for _ in 0..=self.rounds {
                        state.reset();
                        let before = read(&self.words, threads);
                        let one = seconds(|| (0..4).for_each(|token| model.fast_forward(&mut state, token, false))) / 4.0;
                        shares.push(2.0 * bytes / one / 1e9 / (before + read(&self.words, threads)));
                        speeds.push(bytes / one / 1e9);
                        state.reset();
                        let all = seconds(|| model.fast_prefill(&mut state, &prompt).unwrap());
                        rates.push(2.0 * many as f64 * elements(&spec) / all / 1e9);
                    }
                    // The first round warms up.
                    let [speeds, shares, rates] = [speeds, shares, rates].map(|of| spread(of[1..].to_vec()));
                    let name = weights.map_or(dtype.to_string().to_lowercase(), |format| format.name().into());
                    println!("| {name} | {threads} | {:.1} | {} | {:.0} |", speeds[0], told(shares), rates[0]);
                }
            }
        }
    }

    /// What a row costs by how many rows share a step of the exact form.
    fn rows(&self, spec: &Spec) {
        for dtype in [Dtype::F32, Dtype::BF16] {
            let (dir, spec) = (tempfile::tempdir().unwrap(), Spec { dtype, ..spec.clone() });
            write_checkpoint(dir.path(), &spec);
            for threads in [1, 2] {
                let model = load(dir.path(), threads, 256, None);
                let mut state = InferenceState::new(model.config());
                let (mut reads, mut steps) = (Vec::new(), [const { Vec::new() }; ROWS.len()]);
                for _ in 0..self.rounds {
                    reads.push(read(&self.words, threads));
                    for (rows, steps) in ROWS.into_iter().zip(&mut steps) {
                        state.reset();
                        let tokens = vec![1; rows];
                        steps.push(seconds(|| drop(model.prefill_logits_in_chunks(&mut state, &tokens, rows).unwrap())));
                    }
                }
                println!("\n{dtype}, {threads} threads; reading alone: {:.1} GB/s\n", spread(reads)[0]);
                println!("| rows | ms | GB/s | GFLOP/s | tokens/s | times those of 1 row |\n|---|---|---|---|---|---|");
                let (elements, element) = (elements(&spec), if dtype == Dtype::F32 { 4.0 } else { 2.0 });
                let one = spread(steps[0].clone())[0];
                for (rows, steps) in ROWS.into_iter().zip(steps) {
                    let ([median, ..], n) = (spread(steps), rows as f64);
                    let (gbs, flops) = (elements * element / median / 1e9, 2.0 * n * elements / median / 1e9);
                    println!("| {rows} | {:.2} | {gbs:.1} | {flops:.0} | {:.1} | {:.1} |", 1e3 * median, n / median, n * one / median);
                }
            }
        }
    }

    /// Decoding far into a long context, less decoding at its start: keys and values read a second.
    fn attention(&self, positions: usize) {
        println!("\n| cache, head_dim | threads | GB/s | of reading |\n|---|---|---|---|");
        for head_dim in [64, 128] {
            let dir = tempfile::tempdir().unwrap();
            let spec = Spec { layers: 16 * 64 / head_dim, head_dim, max_positions: positions + 64, ..narrow() };
            write_checkpoint(dir.path(), &spec);
            for (kv, bytes) in [(KvType::F16, 2), (KvType::F32, 4)] {
                for threads in [1, 2] {
                    let model = load(dir.path(), threads, positions + 512, None);
                    let [mut far, mut near] = [(); 2].map(|()| InferenceState::with_kv(model.config(), kv));
                    let prompt: Vec<u32> = (0..positions as u32).map(|i| i % spec.vocab as u32).collect();
                    model.fast_prefill(&mut far, &prompt).unwrap();
                    model.fast_prefill(&mut near, &prompt[..16]).unwrap();
                    let all = (2 * spec.layers * spec.kv_heads * head_dim * positions * bytes) as f64;
                    let step = |state: &mut InferenceState, at: usize| {
                        state.truncate(at);
                        seconds(|| (0..8).for_each(|token| model.fast_forward(state, token, false))) / 8.0
                    };
                    let (mut speeds, mut shares) = (Vec::new(), Vec::new());
                    for _ in 0..=self.rounds {
                        let before = read(&self.words, threads);
                        let speed = all / (step(&mut far, positions) - step(&mut near, 16)) / 1e9;
                        shares.push(2.0 * speed / (before + read(&self.words, threads)));
                        speeds.push(speed);
                    }
                    let [speeds, shares] = [speeds, shares].map(|of| spread(of[1..].to_vec()));
                    println!("| {kv:?}, {head_dim} | {threads} | {:.1} | {} |", speeds[0], told(shares));
                }
            }
        }
    }

    /// A batch of sequences of different lengths: two threads that steal from each other, against two that have half of the sequences each.
    fn uneven(&self, lengths: [usize; 8]) {
        let dir = tempfile::tempdir().unwrap();
        write_checkpoint(dir.path(), &Spec { layers: 8, max_positions: 4096, ..narrow() });
        let positions = lengths.iter().sum::<usize>() + 8 * 256;
        let models = [2, 1, 1].map(|threads| load(dir.path(), threads, positions, None));
        let filled = |model: &TensorParallelMistral, length: usize| {
            let mut state = InferenceState::with_kv(model.config(), KvType::F16);
            model.fast_prefill(&mut state, &vec![1; length]).unwrap();
            state
        };
        let mut together: Vec<_> = lengths.iter().map(|&length| filled(&models[0], length)).collect();
        let mut halves =
            [0, 1].map(|half| lengths[4 * half..][..4].iter().map(|&length| filled(&models[1 + half], length)).collect::<Vec<_>>());
        let step = |model: &TensorParallelMistral, states: &mut [InferenceState], lengths: &[usize]| {
            states.iter_mut().zip(lengths).for_each(|(state, &length)| state.truncate(length));
            let mut states: Vec<_> = states.iter_mut().collect();
            (0..16).for_each(|token| model.fast_forward_batch(&mut states, &vec![token; lengths.len()]).unwrap());
        };
        let (mut stolen, mut ratios) = (Vec::new(), Vec::new());
        for _ in 0..=self.rounds {
            let stealing = seconds(|| step(&models[0], &mut together, &lengths));
            let dealt = seconds(|| {
                std::thread::scope(|scope| {
                    for ((model, states), lengths) in models[1..].iter().zip(&mut halves).zip(lengths.chunks(4)) {
                        scope.spawn(|| step(model, states, lengths));
                    }
                });
            });
            stolen.push(f64::from(models[0].work_stats().steal_ratio()));
            ratios.push(dealt / stealing);
        }
        // No more than the longer half's share of all positions can be saved.
        let half = lengths[..4].iter().sum::<usize>().max(lengths[4..].iter().sum());
        let ideal = 2.0 * half as f64 / lengths.iter().sum::<usize>() as f64;
        println!("\n| lengths | stealing against halves | at best | tasks stolen |\n|---|---|---|---|");
        println!("| {lengths:?} | {} | {ideal:.2} | {:.0} % |", told(spread(ratios[1..].to_vec())), 100.0 * spread(stolen)[0]);
    }
}

/// A model whose decoding is little but attention.
fn narrow() -> Spec {
    let few = Spec { vocab: 256, hidden: 64, intermediate: 64, heads: 32, kv_heads: 8, head_dim: 64, ..Spec::default() };
    Spec { dtype: Dtype::BF16, ..few }
}

fn main() {
    let measured = measured();
    let bench = Bench { rounds: if measured { 9 } else { 1 }, words: measure::words(measured) };
    let layer = |hidden, intermediate, layers, head_dim| Spec {
        vocab: 64,
        hidden,
        intermediate,
        layers,
        heads: 32,
        kv_heads: 8,
        head_dim,
        max_positions: 2048,
        ..Spec::default()
    };
    let small = layer(64, 96, 1, 2);
    if !leaves_out("formats", &PARTS) {
        let (spec, many) = if measured { (layer(4096, 14336, 1, 128), 512) } else { (small.clone(), 16) };
        bench.formats(&spec, many);
    }
    if !leaves_out("rows", &PARTS) {
        bench.rows(&if measured { layer(2048, 7168, 2, 64) } else { small });
    }
    if !leaves_out("attention", &PARTS) {
        bench.attention(if measured { 8192 } else { 96 });
    }
    if !leaves_out("uneven", &PARTS) {
        bench.uneven(if measured { [2048, 128, 1024, 64, 512, 32, 256, 16] } else { [16, 1, 8, 1, 4, 1, 2, 1] });
    }
}
