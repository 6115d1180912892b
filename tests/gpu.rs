//! Grids with GPUs in them give the fixtures' logits and greedy texts: alone, several ranks on one adapter, isolated, mixed with the
//! CPU, over every pair of adapters, and over all of them at once.
#![cfg(feature = "gpu")]

mod common;

use common::{Spec, at_least, fixture, gpus, reference::Reference, write_checkpoint};
use futures::executor::block_on_stream;
use torchless::{
    Completion, Device, GenerateOptions, InferenceState, KvType, ParallelConfig, Parameters, PipelineConfig, PipelineParallelMistral,
    SamplerOptions, Scheduler, SchedulerConfig, TensorParallelMistral, Wire,
};

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
}

#[test]
fn all_adapters_and_the_cpu_run_every_fixture_in_one_group_with_even_and_weighted_shares() {
    let gpus = at_least(2);
    if gpus.is_empty() {
        return;
    }
    let all: Vec<Device> = gpus.into_iter().chain([Device::cpu()]).take(9).collect();
    for name in fixture::ALL {
        let heads = fixture::load(name).config().n_heads;
        let some: Vec<Device> = all.iter().take(heads).cloned().collect();
        let shares: Vec<f64> = (0..some.len()).map(|i| [1.0, 3.0, 2.0][i % 3]).collect();
        check(name, some.clone(), &ParallelConfig::default());
        check(name, some, &ParallelConfig::default().with_shares(shares));
    }
}

#[test]
fn stages_on_different_devices_pass_their_rows_on() {
    if let Some(gpu) = gpus().first() {
        let config = ParallelConfig::default().stages(2);
        check("tiny-mistral", vec![gpu.clone(), Device::cpu()], &config);
        check("sliding", vec![Device::cpu(), gpu.clone(), gpu.clone(), gpu.clone()], &config);
    }
}

/// Two adapters, the same one twice where there is no other.
fn two() -> Option<[Device; 2]> {
    let gpus = gpus();
    Some([gpus.first()?.clone(), gpus.last()?.clone()])
}

#[test]
fn stages_that_work_at_the_same_time_on_different_devices_give_every_fixture() {
    let (Some([a, b]), cpu) = (two(), Device::cpu()) else { return };
    let [mixed, three] = [vec![b.clone(), cpu.clone()], vec![cpu.clone(), a.clone(), b.clone()]];
    let square = vec![a, cpu.clone(), b, cpu];
    for (name, devices, stages) in [
        ("gqa-headdim", &mixed, 2),
        ("sliding", &mixed, 2),
        ("sharded-f16", &mixed, 2),
        ("uneven", &three, 3),
        ("tied", &three, 3),
        ("tiny-mistral", &square, 2),
        ("uneven", &square, 2),
    ] {
        for (num_micro_batches, async_execution) in [(4, true), (3, false)] {
            let mut config = ParallelConfig::default().stages(stages);
            config.pipeline = PipelineConfig { num_micro_batches, async_execution, ..PipelineConfig::default() };
            let model = PipelineParallelMistral::load_grid(fixture::load(name), config, devices.clone()).unwrap();
            let worst = fixture::check(name, &model, TOLERANCE).unwrap_or_else(|e| panic!("{devices:?}, async {async_execution}: {e}"));
            eprintln!("{name} on {stages} stages, async {async_execution}: logits within {worst:.1e}");
        }
    }
    // A list is a stage each.
    let model = PipelineParallelMistral::load_on_gpus(fixture::load("tied"), mixed).unwrap();
    assert_eq!(model.ranks().iter().map(|rank| rank.stage).collect::<Vec<_>>(), [0, 1]);
    fixture::check("tied", &model, TOLERANCE).unwrap();
}

/// GPUs promise no bits, so that a driver may round otherwise for other numbers of rows. The software adapters don't.
#[test]
fn sequences_that_step_together_on_an_adapter_have_the_logits_of_each_alone() {
    for gpu in gpus() {
        let name = "gqa-headdim";
        let model = TensorParallelMistral::load_on_gpus(fixture::load(name), vec![gpu.clone()]).unwrap();
        let cases = fixture::cases(name);
        // Of 1 position and of more than a page too.
        let prompt =
            |i: usize| cases.get(i).map_or_else(|| (0..[1, 70, 130][i - 5]).map(|t| t * 7 % 384).collect(), |case| case.ids.clone());
        let steps = 6;
        let alone: Vec<Vec<Vec<f32>>> = (0..8)
            .map(|i| {
                let mut state = InferenceState::new(model.config());
                model.prefill(&mut state, &prompt(i)).unwrap();
                let step = |_| {
                    let token = fixture::argmax(state.logits());
                    model.forward(&mut state, token, false);
                    state.logits().to_vec()
                };
                (0..steps).map(step).collect()
            })
            .collect();
        let mut worst = 0.0f32;
        for n in [1, 3, 8] {
            let mut states: Vec<InferenceState> = (0..n).map(|_| InferenceState::new(model.config())).collect();
            states.iter_mut().enumerate().for_each(|(i, state)| model.prefill(state, &prompt(i)).unwrap());
            for step in 0..steps {
                let tokens: Vec<u32> = states.iter().map(|state| fixture::argmax(state.logits())).collect();
                model.forward_batch(&mut states.iter_mut().collect::<Vec<_>>(), &tokens).unwrap();
                for (state, alone) in states.iter().zip(&alone) {
                    worst = worst.max(fixture::gap(state.logits(), &alone[step]));
                }
            }
            for (state, case) in states.iter().zip(&cases) {
                let want = &case.greedy[..steps.min(case.greedy.len())];
                assert_eq!(state.tokens()[case.ids.len()..][..want.len()], *want, "{n} on {gpu}: {}", case.name);
            }
        }
        eprintln!("{gpu}: 1, 3 and 8 sequences within {worst:.1e} of each alone");
        assert!(worst <= 1e-4, "{gpu}: {worst:e}");
    }
}

#[test]
fn a_scheduler_on_an_adapter_and_the_cpu_shares_and_copies_pages_there() {
    let Some([_, gpu]) = two() else { return };
    for (name, devices) in [("tiny-mistral", vec![gpu.clone(), Device::cpu()]), ("gqa-headdim", vec![Device::cpu(), gpu])] {
        let model = PipelineParallelMistral::load_on_gpus(fixture::load(name), devices).unwrap();
        let scheduler = Scheduler::new(&model, SchedulerConfig { prompt_rows: 50, ..SchedulerConfig::default() }).unwrap();
        let submit = |prompt: &[u32], max_tokens| {
            let sampling = SamplerOptions { temperature: 0.0, ..SamplerOptions::default() };
            scheduler.submit(prompt, GenerateOptions { max_tokens, sampling, ..GenerateOptions::default() }).unwrap()
        };
        let hear = |completion: Completion| block_on_stream(completion).map(|token| token.unwrap().id).collect::<Vec<u32>>();
        let cases = fixture::cases(name);
        for round in 0..3 {
            let reused = scheduler.counts().reused_tokens;
            let texts: Vec<_> = cases.iter().map(|case| submit(&case.ids, case.greedy.len())).collect();
            for (text, case) in texts.into_iter().zip(&cases) {
                assert_eq!(hear(text), case.greedy, "{name}, round {round}: {}", case.name);
            }
            assert!(round == 0 || scheduler.counts().reused_tokens > reused, "{name}, round {round}");
        }

        // Ways that part within a page: each writes a copy of its own, and what they copied stays as it was.
        let long: Vec<u32> = (0..150).map(|t| t * 7 % 300).collect();
        let first = hear(submit(&long, 12));
        let parting: Vec<_> = (0..4).map(|i| hear(submit(&[&long[..100 + i * 12], &[i as u32; 9]].concat(), 12))).collect();
        let before = scheduler.counts().reused_tokens;
        assert_eq!(hear(submit(&long, 12)), first, "{name}");
        assert_eq!(scheduler.counts().reused_tokens - before, 149, "{name}");
        scheduler.forget_prefixes();
        for (i, text) in parting.into_iter().enumerate() {
            assert_eq!(hear(submit(&[&long[..100 + i * 12], &[i as u32; 9]].concat(), 12)), text, "{name}: {i}");
            scheduler.forget_prefixes();
        }
        assert_eq!(model.kv_pages_held(), 0, "{name}");
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
        model.prefill(&mut state, &ids).unwrap();
        // The exact form: the CPU's fast one rounds activations where weights are bf16.
        model.forward(&mut state, 7, false);
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
    // Norm, projections, attention, output, norm, gate and up, down; and the last sum, the wanted row, the last norm, the head.
    assert_eq!(decode, 7 * 3 + 4);
    eprintln!("dispatches: {prefill} for a prefill of 256 tokens, {decode} for a token");
    assert!(prefill <= decode, "{prefill} dispatches for 256 tokens, {decode} for one");
}

/// Halves that overlap see the keys of those before them, and share what lies between.
#[test]
fn a_prompt_in_halves_that_overlap_gives_the_logits_of_one_that_is_computed_whole() {
    let Some(gpu) = gpus().into_iter().next() else { return };
    let (other, cpu) = (gpus().into_iter().nth(1).unwrap_or_else(|| gpu.clone()), Device::cpu());
    let dir = tempfile::tempdir().unwrap();
    let spec = Spec { hidden: 48, intermediate: 90, layers: 3, heads: 6, kv_heads: 3, head_dim: 8, vocab: 97, ..Spec::default() };
    // Of the last there are too few pages for both halves at once: the second waits for those that the first has done with.
    for (sliding_window, kv_positions) in [(None, 1000), (Some(100), 1000), (Some(100), 384)] {
        write_checkpoint(dir.path(), &Spec { sliding_window, max_positions: 2048, ..spec.clone() });
        let params = Parameters::load(dir.path()).unwrap();
        let ids: Vec<u32> = (0..929).map(|i| (i * 7 + i * i) % spec.vocab as u32).collect();
        let run = |devices: &[Device], config: &ParallelConfig| {
            let config = config.clone().kv_positions(kv_positions);
            let model = TensorParallelMistral::load_grid(params.clone(), config, devices.iter().cloned()).unwrap();
            let mut state = InferenceState::new(model.config());
            // Batches that a place has computed, each of them in all segments of its stage.
            let batches = || {
                let segments = if model.ranks().last().unwrap().stage == 0 { 2 * spec.layers } else { 0 } as u64 + 1;
                model.counts().unwrap()[0].submissions / segments
            };
            let mut found = (Vec::new(), Vec::new());
            for prompt in [&ids[..129], &ids[129..329], &ids[329..]] {
                let before = batches();
                model.prefill(&mut state, prompt).unwrap();
                found.0.extend_from_slice(state.logits());
                found.1.push(batches() - before);
            }
            found
        };
        let (want, _) = run(&[Device::cpu()], &ParallelConfig::default());
        let (plain, pair) = (ParallelConfig::default(), vec![gpu.clone().isolated(), other.clone().isolated()]);
        // Each micro-batch of which is two halves.
        let mut staged = plain.clone().stages(2);
        staged.pipeline.num_micro_batches = 2;
        for (devices, config, batches) in [
            (pair.clone(), plain.clone(), Some([2, 2, 4])),
            (pair.clone(), plain.clone().without_overlap(), Some([1, 1, 3])),
            (vec![cpu.clone(), gpu.clone()], plain.clone(), Some([2, 2, 4])),
            ([pair.clone(), pair].concat(), staged, None),
        ] {
            let (got, counted) = run(&devices, &config);
            let gap = fixture::gap(&got, &want);
            assert!(gap <= TOLERANCE, "{devices:?}, window {sliding_window:?}: {gap:e}");
            if let Some(batches) = batches {
                assert_eq!(counted, batches, "{devices:?}, window {sliding_window:?}");
            }
        }
    }
}

/// Each sum is off by a few units of its rounding (`Wire` says how many, and the backend's tests hold it to that), and what comes out of
/// all of them by not much more.
#[test]
fn sums_that_travel_in_two_bytes_move_logits_by_a_few_units_of_their_rounding() {
    let Some(gpu) = gpus().into_iter().next() else { return };
    for name in fixture::ALL {
        for (wire, unit) in [(Wire::F16, 2f32.powi(-11)), (Wire::Bf16, 2f32.powi(-9))] {
            let list = vec![gpu.clone().isolated(), gpu.clone().isolated()];
            let model = TensorParallelMistral::load_grid(fixture::load(name), ParallelConfig::default().wire(wire), list).unwrap();
            for case in fixture::cases(name) {
                let logits = model.prefill_logits(&mut InferenceState::new(model.config()), &case.ids).unwrap();
                let square = |v: f32| f64::from(v * v);
                let off: f64 = logits.iter().zip(&case.logits).map(|(got, want)| square(got - want)).sum();
                let error = (off / case.logits.iter().copied().map(square).sum::<f64>()).sqrt() as f32;
                eprintln!("{name} {} with sums in {wire:?}: {:.2} units", case.name, error / unit);
                // Batches of up to 8 rows travel in f32.
                assert!(case.ids.len() <= 8 || error > 0.01 * unit, "{name} {} {wire:?}: nothing was rounded", case.name);
                assert!(error <= 8.0 * unit, "{name} {} {wire:?}: {:.2} units", case.name, error / unit);
            }
        }
    }
}

#[test]
fn busy_work_computes_products_again_and_changes_nothing() {
    let Some(gpu) = gpus().into_iter().next() else { return };
    let dispatches = |device: Device| {
        let model = TensorParallelMistral::load_on_gpus(fixture::load("tied"), vec![device]).unwrap();
        fixture::check("tied", &model, TOLERANCE).unwrap();
        let count = || model.counts().unwrap()[0].dispatches;
        let before = count();
        model.forward(&mut InferenceState::new(model.config()), 1, false);
        count() - before
    };
    let layers = fixture::load("tied").config().n_layers as u64;
    // Of a layer four products, and the head.
    assert_eq!(dispatches(gpu.clone().with_busy_work(3)), dispatches(gpu) + 2 * (4 * layers + 1));
}
