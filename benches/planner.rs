//! What the planner predicts against what whole models do: `cargo bench --bench planner`.

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::Instant;

use common::{Spec, write_checkpoint};
use safetensors::Dtype;
use torchless::{
    Device, InferenceState, KvType, ParallelConfig, Parameters, Prediction, TensorParallelMistral, choose, devices, forget_predictions,
};

/// Steps of a measurement, of which the first two are not counted.
const STEPS: usize = 22;

fn main() {
    let all = devices();
    let software: Vec<Device> = all.iter().filter(|device| !device.is_cpu()).cloned().collect();
    for device in &all {
        println!("- {device}");
    }
    let lists: Vec<Vec<Device>> = [vec![0], vec![1], vec![2], vec![0, 1], vec![1, 2], vec![0, 1, 2]]
        .into_iter()
        .map(|list| list.into_iter().filter_map(|i| if i == 0 { Some(Device::cpu()) } else { software.get(i).cloned() }).collect())
        .collect();
    println!("\n| model | devices considered | batch | grid | predicted | measured | error | |\n|---|---|---|---|---|---|---|---|");
    let dir = tempfile::tempdir().unwrap_or_else(|e| panic!("{e}"));
    let (mut errors, mut right, mut asked) = (Vec::new(), 0, 0);
    for (name, spec) in [
        (
            "12 layers of 256",
            Spec {
                hidden: 256,
                intermediate: 688,
                layers: 12,
                heads: 8,
                kv_heads: 4,
                head_dim: 32,
                vocab: 2000,
                dtype: Dtype::F16,
                ..Spec::default()
            },
        ),
        (
            "16 layers of 768",
            Spec {
                hidden: 768,
                intermediate: 2048,
                layers: 16,
                heads: 12,
                kv_heads: 4,
                head_dim: 64,
                vocab: 8000,
                dtype: Dtype::F16,
                ..Spec::default()
            },
        ),
    ] {
        write_checkpoint(dir.path(), &spec);
        let params = Parameters::load(dir.path()).unwrap_or_else(|e| panic!("{e}"));
        for list in &lists {
            for batch in [1, 8] {
                let choice = choose(&params, &ParallelConfig::default(), list, batch).unwrap_or_else(|e| panic!("{e}"));
                // Every choice is measured for itself.
                forget_predictions(&params, &ParallelConfig::default());
                let measured: Vec<f64> = choice.predictions.iter().map(|prediction| measure(&params, prediction)).collect();
                let best = measured.iter().copied().fold(0.0, f64::max);
                asked += 1;
                right += usize::from(measured[choice.chosen] >= 0.9 * best);
                for (i, (prediction, measured)) in choice.predictions.iter().zip(&measured).enumerate() {
                    let predicted = prediction.tokens_per_second();
                    let error = predicted / measured - 1.0;
                    errors.push(error.abs());
                    let labels = |devices: &[Device]| devices.iter().map(Device::label).collect::<Vec<_>>().join(", ");
                    let chosen = if i == choice.chosen { "chosen" } else { "" };
                    let (list, grid) = (labels(list), labels(&prediction.devices));
                    println!("| {name} | {list} | {batch} | {grid} | {predicted:.1} | {measured:.1} | {:+.0}% | {chosen} |", 100.0 * error);
                }
            }
        }
    }
    errors.sort_by(f64::total_cmp);
    let (median, most) = (errors[errors.len() / 2], errors[errors.len() - 1]);
    println!(
        "\nmedian error {:.0}%, largest {:.0}%; the choice was the best or within 10% of it {right} times of {asked}",
        100.0 * median,
        100.0 * most
    );
}

/// Tokens a second of a whole model.
fn measure(params: &Parameters, prediction: &Prediction) -> f64 {
    let mut config = ParallelConfig::default().kv_positions(prediction.batch * 128);
    config.shares.clone_from(&prediction.shares);
    let model = TensorParallelMistral::load_grid(params.clone(), config, prediction.devices.clone()).unwrap_or_else(|e| panic!("{e}"));
    let mut states: Vec<_> = (0..prediction.batch).map(|_| InferenceState::with_kv(model.config(), KvType::F16)).collect();
    let mut seconds: Vec<f64> = (0..STEPS)
        .map(|_| {
            let mut states: Vec<&mut InferenceState> = states.iter_mut().collect();
            let start = Instant::now();
            model.fast_forward_batch(&mut states, &vec![1; prediction.batch]).unwrap_or_else(|e| panic!("{e}"));
            start.elapsed().as_secs_f64()
        })
        .skip(2)
        .collect();
    seconds.sort_by(f64::total_cmp);
    prediction.batch as f64 / seconds[seconds.len() / 2]
}
