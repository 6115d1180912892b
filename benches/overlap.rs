//! What it gains that one half of a prompt computes while the other is summed: `cargo bench --bench overlap`.

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::{Duration, Instant};

use common::{Spec, write_checkpoint};
use safetensors::Dtype;
use torchless::{Device, InferenceState, KvType, ParallelConfig, Parameters, TensorParallelMistral, devices};

const PROMPT: usize = 512;
/// Turns of each of the two, at least and at most, and how long they may take together once there are enough.
const TURNS: std::ops::RangeInclusive<usize> = 5..=40;
const TIME: Duration = Duration::from_secs(20);

fn main() {
    let most = if std::env::args().any(|arg| arg == "--bench") { *TURNS.end() } else { 1 };
    let all = devices();
    all.iter().for_each(|device| println!("- {device}"));
    let label = |label: &str| all.iter().find(|device| device.label() == label).cloned();
    let lists: Vec<Vec<Device>> = [["gpu:1", "gpu:2"], ["gpu:0", "gpu:1"], ["gpu:1", "gpu:1"], ["cpu", "gpu:1"]]
        .into_iter()
        .filter_map(|list| list.into_iter().map(|name| label(name).map(Device::isolated)).collect())
        .collect();
    if lists.is_empty() {
        println!("SKIPPED: gpu:1 is missing: there is nothing to overlap");
    }
    println!("\n| model | ranks | one after the other | overlapped | ratio (p10..p90) |\n|---|---|---|---|---|");
    let dir = tempfile::tempdir().unwrap_or_else(|e| panic!("{e}"));
    let small = Spec { heads: 16, kv_heads: 4, head_dim: 64, vocab: 64, dtype: Dtype::F16, max_positions: 1024, ..Spec::default() };
    for (name, spec) in [
        ("2 layers of 1024, 2816 channels", Spec { hidden: 1024, intermediate: 2816, layers: 2, ..small.clone() }),
        ("4 layers of 2048, 16 channels, 2 heads of 8", Spec { hidden: 2048, intermediate: 16, layers: 4, heads: 2, kv_heads: 2, head_dim: 8, ..small.clone() }),
    ] {
        write_checkpoint(dir.path(), &spec);
        let params = Parameters::load(dir.path()).unwrap_or_else(|e| panic!("{e}"));
        for list in &lists {
            measure(name, &params, list, most);
        }
    }
}

fn measure(name: &str, params: &Parameters, list: &[Device], most: usize) {
    let config = ParallelConfig::default().kv_positions(PROMPT).threads(1);
    let mut both = [config.clone().without_overlap(), config].map(|config| {
        let model = TensorParallelMistral::load_grid(params.clone(), config, list.iter().cloned()).unwrap_or_else(|e| panic!("{e}"));
        let state = InferenceState::with_kv(model.config(), KvType::F16);
        (model, state, Vec::new())
    });
    let prompt: Vec<u32> = (0..PROMPT).map(|i| (i * 7919 % params.config().vocab_size) as u32).collect();
    let start = Instant::now();
    // The first turn compiles what drivers compile late.
    for turn in 0..=most {
        if turn > *TURNS.start() && start.elapsed() > TIME {
            break;
        }
        for (model, state, seconds) in &mut both {
            state.reset();
            let start = Instant::now();
            model.fast_prefill(state, &prompt).unwrap_or_else(|e| panic!("{e}"));
            if turn > 0 {
                seconds.push(start.elapsed().as_secs_f64());
            }
        }
    }
    let [(.., plain), (.., overlapped)] = both;
    let mut ratios: Vec<f64> = plain.iter().zip(&overlapped).map(|(plain, overlapped)| plain / overlapped).collect();
    let speed = |mut seconds: Vec<f64>| PROMPT as f64 / quantile(&mut seconds, 0.5);
    let labels: Vec<String> = list.iter().map(Device::label).collect();
    println!(
        "| {name} | {} | {:.0} tokens/s | {:.0} tokens/s | {:.2} ({:.2}..{:.2}) |",
        labels.join(", "),
        speed(plain),
        speed(overlapped),
        quantile(&mut ratios, 0.5),
        quantile(&mut ratios, 0.1),
        quantile(&mut ratios, 0.9)
    );
}

fn quantile(values: &mut [f64], q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * q).round() as usize]
}
