//! What a row costs by how many rows share a step: `cargo bench --bench kernels`.
//!
//! Models whose weights are larger than any cache take steps of 1, 2, 4, .. rows in turn, beside a loop that only reads memory. One
//! row is bound by that loop's speed; with more rows every weight that is read is used more often, until arithmetic is the limit.

#[path = "../tests/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use common::{Spec, write_checkpoint};
use safetensors::Dtype;
use torchless::{InferenceState, ParallelConfig, Parameters, TensorParallelMistral};

const ROWS: [usize; 7] = [1, 2, 4, 8, 16, 64, 256];
const ROUNDS: usize = 9;
/// Words that the reading loop sums: 256 MiB.
const WORDS: usize = 1 << 25;

/// Two decoder layers of a model with 1.1 billion parameters; an embedding as small as may be, so that all the rest is linear layers.
fn spec(dtype: Dtype) -> Spec {
    Spec { dtype, vocab: 64, hidden: 2048, intermediate: 7168, layers: 2, heads: 32, kv_heads: 8, head_dim: 64, ..Spec::default() }
}

fn seconds(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Reads all of `words` once, each thread a part.
fn read(words: &[u64], threads: usize) {
    std::thread::scope(|scope| {
        for part in words.chunks(words.len().div_ceil(threads)) {
            scope.spawn(|| black_box(part.iter().fold(0, |sum, word| sum ^ word)));
        }
    });
}

/// The weights of a token's linear layers.
fn weights(spec: &Spec) -> usize {
    let layers = spec.tensors().into_iter().filter(|(name, shape)| shape.len() == 2 && !name.contains("embed"));
    layers.map(|(_, shape)| shape.iter().product::<usize>()).sum()
}

fn measure(dir: &Path, spec: &Spec, threads: usize, rounds: usize, words: &[u64]) {
    let params = Parameters::load(dir).unwrap_or_else(|e| panic!("{e}"));
    let config = ParallelConfig::default().threads(threads);
    let model = TensorParallelMistral::load(params, config).unwrap_or_else(|e| panic!("{e}"));
    let mut state = InferenceState::new(model.config());
    let (mut reads, mut steps) = (Vec::new(), [const { Vec::new() }; ROWS.len()]);
    for _ in 0..rounds {
        reads.push(seconds(|| read(words, threads)));
        for (rows, steps) in ROWS.into_iter().zip(&mut steps) {
            state.reset();
            let tokens = vec![1; rows];
            steps.push(seconds(|| drop(model.prefill_logits_in_chunks(&mut state, &tokens, rows).unwrap())));
        }
    }
    let (elements, element) = (weights(spec), if spec.dtype == Dtype::F32 { 4 } else { 2 });
    let best = |seconds: &[f64]| seconds.iter().copied().fold(f64::INFINITY, f64::min);
    let read = |seconds: f64| size_of_val(words) as f64 / seconds / 1e9;
    println!(
        "\n{}, {threads} threads; reading alone: {:.1} GB/s, at best {:.1}\n",
        spec.dtype,
        read(median(reads.clone())),
        read(best(&reads))
    );
    println!("| rows | ms | at best | GB/s | GFLOP/s | tokens/s | times those of 1 row | at best |");
    println!("|---|---|---|---|---|---|---|---|");
    let one = [median(steps[0].clone()), best(&steps[0])];
    for (rows, steps) in ROWS.into_iter().zip(steps) {
        let (best, median) = (best(&steps), median(steps));
        let n = rows as f64;
        println!(
            "| {rows} | {:.2} | {:.2} | {:.1} | {:.0} | {:.1} | {:.1} | {:.1} |",
            1e3 * median,
            1e3 * best,
            (elements * element) as f64 / median / 1e9,
            2.0 * n * elements as f64 / median / 1e9,
            n / median,
            n * one[0] / median,
            n * one[1] / best,
        );
    }
}

fn main() {
    // `cargo bench` says --bench. `cargo test --benches` doesn't: then one round shows that all of it runs.
    let rounds = if std::env::args().any(|arg| arg == "--bench") { ROUNDS } else { 1 };
    let words = vec![1; WORDS];
    for dtype in [Dtype::F32, Dtype::BF16] {
        let (dir, spec) = (tempfile::tempdir().unwrap(), spec(dtype));
        write_checkpoint(dir.path(), &spec);
        for threads in [1, 2] {
            measure(dir.path(), &spec, threads, rounds, &words);
        }
    }
}
