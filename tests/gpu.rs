//! Grids with GPUs in them give the fixtures' logits and greedy texts: alone, several ranks on one adapter, isolated, mixed with the
//! CPU, over every pair of adapters, and over all of them at once.
#![cfg(feature = "gpu")]

mod common;

use common::{Spec, at_least, fixture, gpus, reference::Reference, write_checkpoint};
use torchless::{Device, InferenceState, KvType, ParallelConfig, Parameters, TensorParallelMistral};

const TOLERANCE: f32 = 1e-3;

/// One fixture on one grid.
fn check(name: &str, devices: Vec<Device>, config: &ParallelConfig) {
    let list: Vec<String> = devices.iter().map(Device::to_string).collect();
    let model = TensorParallelMistral::load_grid(fixture::load(name), config.clone(), devices).unwrap_or_else(|e| panic!("{list:?}: {e}"));
    let worst = fixture::check(name, &model, TOLERANCE).unwrap_or_else(|e| panic!("{list:?}: {e}"));
    eprintln!("{name} on {list:?}: logits within {worst:.1e}");
}

#[test]
fn every_fixture_runs_on_every_adapter_alone_and_as_two_ranks() {
    for gpu in gpus() {
        for name in fixture::ALL {
            check(name, vec![gpu.clone()], &ParallelConfig::default());
            check(name, vec![gpu.clone(); 2], &ParallelConfig::default());
        }
    }
}

#[test]
fn every_fixture_runs_on_isolated_ranks_of_an_adapter() {
    if let Some(gpu) = gpus().first() {
        for name in fixture::ALL {
            check(name, vec![gpu.clone().isolated(); 2], &ParallelConfig::default());
        }
        check("uneven", vec![gpu.clone().isolated(); 4], &ParallelConfig::default());
    }
}

#[test]
fn every_fixture_runs_on_an_adapter_and_the_cpu() {
    if let Some(gpu) = gpus().first() {
        for name in fixture::ALL {
            check(name, vec![Device::cpu(), gpu.clone()], &ParallelConfig::default());
        }
        check("uneven", vec![gpu.clone(), Device::cpu(), gpu.clone()], &ParallelConfig::default().with_shares(vec![1.0, 3.0, 2.0]));
    }
}

#[test]
fn every_pair_of_adapters_runs_and_all_of_them_with_the_cpu() {
    let gpus = at_least(2);
    if gpus.is_empty() {
        return;
    }
    for (i, a) in gpus.iter().enumerate() {
        for b in &gpus[i + 1..] {
            check("gqa-headdim", vec![a.clone(), b.clone()], &ParallelConfig::default());
        }
    }
    // The first pair runs the others too.
    for name in fixture::ALL {
        check(name, gpus[..2].to_vec(), &ParallelConfig::default());
    }
    let all: Vec<Device> = gpus.into_iter().chain([Device::cpu()]).take(9).collect();
    check("uneven", all, &ParallelConfig::default());
}

#[test]
fn stages_on_different_devices_pass_their_rows_on() {
    if let Some(gpu) = gpus().first() {
        let config = ParallelConfig::default().stages(2);
        check("tiny-mistral", vec![gpu.clone(), Device::cpu()], &config);
        check("sliding", vec![Device::cpu(), gpu.clone(), gpu.clone(), gpu.clone()], &config);
    }
}

#[test]
fn stages_on_one_adapter_keep_what_they_pass_on_it() {
    let (plain, pipeline) = (ParallelConfig::default().stages(2), ParallelConfig::pipeline(3).stages(2));
    for (i, gpu) in gpus().into_iter().enumerate() {
        let isolated = gpu.clone().isolated();
        // Every fixture on the first adapter, one on the others.
        for name in fixture::ALL.into_iter().filter(|name| i == 0 || *name == "uneven") {
            for (config, device) in [(&plain, &gpu), (&pipeline, &gpu), (&pipeline, &isolated)] {
                let model = TensorParallelMistral::load_grid(fixture::load(name), config.clone(), vec![device.clone(); 2]).unwrap();
                fixture::check(name, &model, TOLERANCE).unwrap_or_else(|e| panic!("{device:?}: {e}"));
                let counts = model.counts().unwrap();
                let [first, second] = counts[..] else { panic!("{device:?}: {} places", counts.len()) };
                assert!(first.bytes_written > 0 && second.bytes_read > 0, "{device:?}: rows go in and logits come out");
                assert_eq!(first.bytes_read, second.bytes_written, "{device:?}");
                assert_eq!(first.bytes_read > 0, std::ptr::eq(device, &isolated), "{device:?}: what crosses from stage to stage");
            }
            check(name, vec![gpu.clone(); 4], &pipeline);
        }
    }
}

#[test]
fn bindings_of_64_kib_change_nothing() {
    let Some(gpu) = gpus().into_iter().next() else { return };
    for name in fixture::ALL {
        check(name, vec![gpu.clone().with_binding_limit(64 << 10); 2], &ParallelConfig::default());
    }
}

#[test]
fn shapes_beyond_the_fixtures_run_on_two_isolated_ranks() {
    let Some(gpu) = gpus().into_iter().next() else { return };
    let shape = |hidden, intermediate, heads, kv_heads, head_dim, vocab| Spec {
        hidden,
        intermediate,
        heads,
        kv_heads,
        head_dim,
        vocab,
        ..Spec::default()
    };
    for spec in [
        shape(53, 31, 7, 7, 6, 101),
        shape(40, 1, 10, 1, 4, 67),
        Spec { dtype: safetensors::Dtype::F16, sliding_window: Some(5), ..shape(45, 77, 15, 5, 6, 131) },
        Spec { dtype: safetensors::Dtype::BF16, ..shape(24, 40, 3, 1, 256, 50) },
    ] {
        let dir = tempfile::tempdir().unwrap();
        write_checkpoint(dir.path(), &spec);
        let ids: Vec<u32> = (0..70).map(|i| (i * 7 + i * i) % spec.vocab as u32).collect();
        let want = Reference::open(dir.path()).logits(&ids);
        let model = TensorParallelMistral::load_on_gpus(Parameters::load(dir.path()).unwrap(), vec![gpu.clone().isolated(); 2]).unwrap();
        let got = model.prefill_logits(&mut InferenceState::new(model.config()), &ids).unwrap();
        let gap = fixture::gap(&got, &want);
        assert!(gap <= TOLERANCE, "{spec:?}: {gap:e}");
    }
}

#[test]
fn an_f16_cache_on_a_gpu_agrees_with_the_cpus() {
    let Some(gpu) = gpus().into_iter().next() else { return };
    let ids: Vec<u32> = (0..150).map(|i| i * 3 % 384).collect();
    let [on_gpu, on_cpu] = [gpu, Device::cpu()].map(|device| {
        let model = TensorParallelMistral::load_on_gpus(fixture::load("gqa-headdim"), vec![device]).unwrap();
        let mut state = InferenceState::with_kv(model.config(), KvType::F16);
        model.fast_prefill(&mut state, &ids).unwrap();
        model.fast_forward(&mut state, 7, false);
        state.logits().to_vec()
    });
    // Keys that round to different neighbours make up the difference.
    assert!(fixture::gap(&on_gpu, &on_cpu) < 2e-2, "{}", fixture::gap(&on_gpu, &on_cpu));
}

#[test]
fn a_token_takes_one_submission_on_one_place_and_one_more_for_each_all_reduce_on_several() {
    let Some(gpu) = gpus().into_iter().next() else { return };
    let layers = 3;
    for (devices, submissions) in [
        (vec![gpu.clone()], 1),
        (vec![gpu.clone(); 2], 1),
        (vec![gpu.clone().isolated(); 2], 2 * (1 + 2 * layers)),
        (vec![gpu.clone(), Device::cpu()], 2 * (1 + 2 * layers)),
    ] {
        let model = TensorParallelMistral::load_on_gpus(fixture::load("tiny-mistral"), devices).unwrap();
        let mut state = InferenceState::new(model.config());
        let count = || model.counts().unwrap().iter().map(|c| c.submissions).sum::<u64>();
        model.forward(&mut state, 1, false);
        let before = count();
        model.forward(&mut state, 2, false);
        eprintln!("submissions for a token: {}", count() - before);
        assert_eq!(count() - before, submissions);
    }
}

#[test]
fn a_prompt_is_dispatched_in_chunks_and_not_token_by_token() {
    let Some(gpu) = gpus().into_iter().next() else { return };
    let model = TensorParallelMistral::load_on_gpus(fixture::load("tiny-mistral"), vec![gpu]).unwrap();
    let dispatches = || model.counts().unwrap().iter().map(|c| c.dispatches).sum::<u64>();
    let mut state = InferenceState::new(model.config());
    model.prefill(&mut state, &[1; 256]).unwrap();
    let prefill = dispatches();
    model.forward(&mut state, 1, false);
    let decode = dispatches() - prefill;
    eprintln!("dispatches: {prefill} for a prefill of 256 tokens, {decode} for a token");
    assert!(prefill <= decode, "{prefill} dispatches for 256 tokens, {decode} for one");
}
