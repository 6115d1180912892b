//! What drafts gain: `cargo bench --bench speculation`. benches/README.md says what the rows mean.
//!
//! The same text with and without drafts in turn in one process; the median of the rounds' ratios counts.

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::Instant;

use common::{Spec, fixture, write_checkpoint};
use safetensors::Dtype;
use torchless::{
    DraftCounts, GenerateOptions, InferenceState, ParallelConfig, Parameters, SamplerOptions, TensorParallelMistral, generate,
};

/// Tokens drafted at most: the command's default.
const MOST: usize = 7;

fn load(params: &Parameters, threads: usize) -> TensorParallelMistral {
    TensorParallelMistral::load(params.clone(), ParallelConfig::default().threads(threads)).unwrap()
}

fn options(max_tokens: usize, seed: Option<u64>, speculate: usize) -> GenerateOptions {
    let temperature = if seed.is_some() { 0.8 } else { 0.0 };
    let sampling = SamplerOptions { temperature, seed, ..SamplerOptions::default() };
    GenerateOptions { max_tokens, sampling, speculate, ..GenerateOptions::default() }
}

/// A text's tokens, those after the first a second, and what drafts did.
fn tell(model: &TensorParallelMistral, prompt: &[u32], options: GenerateOptions) -> (Vec<u32>, f64, DraftCounts) {
    let mut state = InferenceState::new(model.config());
    let mut generation = generate(model, &mut state, prompt, options);
    let mut ids: Vec<u32> = generation.by_ref().take(1).map(|token| token.unwrap().id).collect();
    let start = Instant::now();
    ids.extend(generation.by_ref().map(|token| token.unwrap().id));
    let speed = (ids.len() - 1) as f64 / start.elapsed().as_secs_f64();
    (ids, speed, generation.counts())
}

fn quantile(mut values: Vec<f64>, q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * q).round() as usize]
}

/// One row of the table.
fn compare(what: &str, model: &TensorParallelMistral, prompt: &[u32], max_tokens: usize, seed: Option<u64>, rounds: usize) {
    let (mut drafted, mut plain, mut ratios) = (vec![], vec![], vec![]);
    let mut last = None;
    for round in 0..rounds + 1 {
        // Who goes first takes turns too.
        let mut sides = [MOST, 0];
        sides.rotate_left(round % 2);
        let mut told = sides.map(|speculate| tell(model, prompt, options(max_tokens, seed, speculate)));
        told.rotate_left(round % 2);
        let [with, without] = told;
        assert!(with.0 == without.0, "{what}: the text is another one");
        // The first round warms up.
        if round > 0 {
            drafted.push(with.1);
            plain.push(without.1);
            ratios.push(with.1 / without.1);
        }
        last = Some((with.0.len(), with.2));
    }
    let Some((tokens, counts)) = last else { return };
    let (with, without) = (quantile(drafted, 0.5), quantile(plain, 0.5));
    let [low, ratio, high] = [0.25, 0.5, 0.75].map(|q| quantile(ratios.clone(), q));
    let DraftCounts { launches, drafted, accepted, .. } = counts;
    println!("| {what} | {tokens} | {launches} | {accepted} of {drafted} | {with:.1} | {without:.1} | {ratio:.2} ({low:.2}..{high:.2}) |");
}

fn main() {
    // `cargo bench` says --bench. `cargo test --benches` doesn't: then one round of short texts shows that all runs.
    let real = std::env::args().any(|arg| arg == "--bench");
    let (rounds, long, most) = if real { (40, 240, 512) } else { (1, 12, 64) };
    println!("| text | tokens | launches | accepted | tokens/s with drafts | without | ratio (p25..p75) |\n|---|---|---|---|---|---|---|");

    let params = Parameters::load(fixture::stories()).unwrap();
    let tokenizer = params.tokenizer().unwrap();
    for threads in [1, 2] {
        let model = load(&params, threads);
        let prompt = tokenizer.encode("Lily had a red ball.").unwrap();
        let (story, ..) = tell(&model, &prompt, options(long, None, 0));
        let again = [&prompt[..], &story, &prompt].concat();
        compare(&format!("tiny-stories, {threads} threads, a story told again"), &model, &again, long, None, rounds);
        compare(&format!("tiny-stories, {threads} threads, a story"), &model, &prompt, long, None, rounds);
        compare(&format!("tiny-stories, {threads} threads, a story drawn at 0.8"), &model, &prompt, long, Some(5), rounds);
    }

    // Random weights: greedy texts go in circles sooner or later, drawn ones never say a thing again.
    let dir = tempfile::tempdir().unwrap();
    let hidden = if real { 1024 } else { 64 };
    let spec = Spec {
        layers: 8,
        hidden,
        intermediate: hidden * 7 / 2,
        heads: hidden / 16,
        kv_heads: hidden / 64,
        head_dim: 16,
        vocab: 4096,
        max_positions: most,
        dtype: Dtype::BF16,
        ..Spec::default()
    };
    write_checkpoint(dir.path(), &spec);
    let model = load(&Parameters::load(dir.path()).unwrap(), 2);
    let prompt: Vec<u32> = (0..64).map(|i| 5 + i % 8).collect();
    compare("beyond the cache, 2 threads, greedy", &model, &prompt, long.min(96), None, rounds.min(4));
    compare("beyond the cache, 2 threads, drawn", &model, &prompt, long.min(96), Some(5), rounds.min(4));
}
