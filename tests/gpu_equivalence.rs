//! Grids of adapters, alone and mixed with the CPU, give the fixtures' logits and greedy texts.
#![cfg(feature = "gpu")]

mod common;

use common::fixture;
use torchless::{Device, ParallelConfig, TensorParallelMistral, devices};

const TOLERANCE: f32 = 2e-4;

/// Every adapter. Where there is none, says so, or fails if `TORCHLESS_REQUIRE_GPU` is 1.
fn gpus() -> Vec<Device> {
    let gpus: Vec<Device> = devices().into_iter().filter(|d| !d.is_cpu()).collect();
    if gpus.is_empty() {
        let required = std::env::var("TORCHLESS_REQUIRE_GPU").is_ok_and(|v| v == "1");
        assert!(!required, "TORCHLESS_REQUIRE_GPU=1, but no adapter was found");
        eprintln!("SKIPPED: gpu:0 is missing: no adapter was found");
    }
    gpus
}

/// Runs a fixture on a grid.
fn check(name: &str, config: ParallelConfig, devices: Vec<Device>) {
    let what = format!("{name} on {}", devices.iter().map(Device::label).collect::<Vec<_>>().join(","));
    let model = TensorParallelMistral::load_grid(fixture::load(name), config, devices).unwrap_or_else(|e| panic!("{what}: {e}"));
    fixture::check(name, &model, TOLERANCE).unwrap_or_else(|e| panic!("{what}: {e}"));
}

#[test]
fn every_adapter_computes_every_fixture() {
    for gpu in gpus() {
        for name in fixture::ALL {
            check(name, ParallelConfig::default(), vec![gpu.clone()]);
        }
    }
}

#[test]
fn grids_of_any_adapters_and_the_cpu_agree() {
    let gpus = gpus();
    let all = || [gpus.clone(), vec![Device::cpu()]].concat();
    for gpu in &gpus {
        let two = || vec![gpu.clone(); 2];
        check("uneven", ParallelConfig::default(), two());
        check("uneven", ParallelConfig::default(), two().into_iter().map(Device::isolated).collect());
        check("sliding", ParallelConfig::default().with_shares(vec![3.0, 1.0]), vec![gpu.clone(), Device::cpu()]);
        check("tied", ParallelConfig::default().stages(2), [two(), vec![Device::cpu(), gpu.clone()]].concat());
        let small = gpu.clone().with_binding_limit(16 << 10);
        check("gqa-headdim", ParallelConfig::default(), vec![small]);
    }
    check("uneven", ParallelConfig::default(), all());
}
