//! Every CPU grid gives the fixtures' logits and greedy texts, and the exact forms the same bits however they are computed.

mod common;

use common::{Spec, fixture, write_checkpoint};
use torchless::{Device, InferenceState, ParallelConfig, Parameters, TensorParallelConfig, TensorParallelMistral};

const CPU_TOLERANCE: f32 = 1e-4;

/// Runs every row of a table and reports all that fail.
fn every<T: std::fmt::Debug>(rows: impl IntoIterator<Item = T>, check: impl Fn(&T) -> Result<(), String>) {
    let failures: Vec<String> = rows.into_iter().filter_map(|row| check(&row).err().map(|e| format!("{row:?}: {e}"))).collect();
    assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
}

fn cpu_grids() -> Vec<(&'static str, ParallelConfig, Vec<Device>)> {
    let (cpu, alone) = (Device::cpu, || Device::cpu().isolated());
    let default = ParallelConfig::default;
    vec![
        ("1 rank", default(), vec![cpu()]),
        ("2 ranks in one place", default(), vec![cpu(); 2]),
        ("3 ranks in one place", default(), vec![cpu(); 3]),
        ("4 ranks in one place", default(), vec![cpu(); 4]),
        ("2 isolated ranks", default(), vec![alone(), alone()]),
        ("4 isolated ranks", default(), vec![alone(), alone(), alone(), alone()]),
        ("ranks 0 and 2 together, 1 alone", default(), vec![cpu(), alone(), cpu()]),
        ("shares 3 to 1", default().with_shares(vec![3.0, 1.0]), vec![cpu(), alone()]),
        ("shares 1, 100, 1", default().with_shares(vec![1.0, 100.0, 1.0]), vec![alone(), cpu(), cpu()]),
        ("2 stages of 1", default().stages(2), vec![cpu(); 2]),
        (
            "2 stages of 2, weighted by device",
            default().stages(2).with_shares(vec![1.0, 2.0, 3.0, 1.0]),
            vec![alone(), cpu(), cpu(), alone()],
        ),
        ("3 stages of 2", default().stages(3), vec![cpu(); 6]),
        ("1 thread", default().threads(1), vec![cpu(); 2]),
    ]
}

#[test]
fn every_cpu_grid_gives_the_logits_and_greedy_texts_of_every_fixture() {
    for name in fixture::ALL {
        every(cpu_grids(), |(_, config, devices)| {
            let model =
                TensorParallelMistral::load_grid(fixture::load(name), config.clone(), devices.clone()).map_err(|e| e.to_string())?;
            fixture::check(name, &model, CPU_TOLERANCE).map(drop)
        });
    }
}

#[test]
fn what_scales_the_rotary_frequencies_shows_in_the_fixtures() {
    for name in ["rope-llama3", "rope-linear"] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(fixture::path(name).join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
        let config = std::fs::read(fixture::path(name).join("config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        config.as_object_mut().unwrap().remove("rope_scaling").unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let unscaled = TensorParallelMistral::load(Parameters::load(dir.path()).unwrap(), TensorParallelConfig::default()).unwrap();
        let case = &fixture::cases(name)[0];
        let logits = unscaled.prefill_logits(&mut InferenceState::new(unscaled.config()), &case.ids).unwrap();
        let gap = fixture::gap(&logits, &case.logits);
        eprintln!("{name} without its scaling: logits differ by {gap}");
        assert!(gap > 5.0, "{name}: {gap}");
    }
}

#[test]
fn as_many_ranks_as_query_heads_work_and_one_more_is_refused() {
    for (name, heads) in [("uneven", 9), ("tied", 8), ("sliding", 4)] {
        let params = fixture::load(name);
        let model = TensorParallelMistral::load(params.clone(), TensorParallelConfig::new(heads, 0)).unwrap();
        fixture::check(name, &model, CPU_TOLERANCE).unwrap();
        let error = TensorParallelMistral::load(params, TensorParallelConfig::new(heads + 1, 0)).err().unwrap().to_string();
        assert!(error.contains(&format!("{} ranks cannot share {heads} query heads", heads + 1)), "{error}");
    }
}

/// The bits of the logits at every position, and of a few greedy steps after them.
fn bits(model: &TensorParallelMistral, ids: &[u32], chunk: usize) -> Vec<u32> {
    let mut state = InferenceState::new(model.config());
    let mut logits = model.prefill_logits_in_chunks(&mut state, ids, chunk).unwrap();
    for _ in 0..5 {
        let token = fixture::argmax(state.logits());
        model.forward(&mut state, token, false);
        logits.extend_from_slice(state.logits());
    }
    logits.into_iter().map(f32::to_bits).collect()
}

#[test]
fn exact_forms_give_the_same_bits_with_any_threads_and_chunks_and_on_every_run() {
    for name in fixture::ALL {
        let case = &fixture::cases(name)[0];
        for ranks in [1, 2, 3] {
            let load = |threads| {
                let config = ParallelConfig::tensor_parallel(ranks, 0).threads(threads);
                TensorParallelMistral::load(fixture::load(name), config).unwrap()
            };
            let reference = bits(&load(1), &case.ids, usize::MAX);
            for threads in [1, 2, 3, 7] {
                let model = load(threads);
                for chunk in [usize::MAX, 1, 3, 8, 17] {
                    assert!(bits(&model, &case.ids, chunk) == reference, "{name}, {ranks} ranks, {threads} threads, chunks of {chunk}");
                }
            }
        }
    }
}

#[test]
fn isolated_ranks_give_the_bits_of_ranks_in_one_place() {
    let case = &fixture::cases("uneven")[0];
    let together = TensorParallelMistral::load_on_gpus(fixture::load("uneven"), vec![Device::cpu(); 3]).unwrap();
    let apart = TensorParallelMistral::load_on_gpus(fixture::load("uneven"), vec![Device::cpu().isolated(); 3]).unwrap();
    assert!(bits(&together, &case.ids, 7) == bits(&apart, &case.ids, 7));
}

#[test]
fn a_state_moves_between_grids_of_a_checkpoint_and_no_further() {
    let case = &fixture::cases("sliding")[0];
    let load = |ranks| TensorParallelMistral::load(fixture::load("sliding"), TensorParallelConfig::new(ranks, 0)).unwrap();
    let (one, two) = (load(1), load(2));
    let mut state = InferenceState::new(one.config());
    one.prefill(&mut state, &case.ids[..20]).unwrap();
    two.prefill(&mut state, &case.ids[20..]).unwrap();
    assert!(fixture::gap(state.logits(), &case.logits[case.logits.len() - 320..]) < CPU_TOLERANCE);
    assert_eq!(one.kv_pages_held(), 0, "the first model has its pages back");

    let other = TensorParallelMistral::load(fixture::load("tiny-mistral"), TensorParallelConfig::default()).unwrap();
    let error = other.prefill(&mut state, &[1]).unwrap_err().to_string();
    assert!(error.contains("another checkpoint"), "{error}");
    assert_eq!(state.tokens(), case.ids, "nothing was added");
}

#[test]
fn a_state_without_tokens_belongs_to_no_checkpoint() {
    let [one, other] = [1, 2].map(|seed| {
        let dir = tempfile::tempdir().unwrap();
        write_checkpoint(dir.path(), &Spec { seed, ..Spec::default() });
        TensorParallelMistral::load(Parameters::load(dir.path()).unwrap(), TensorParallelConfig::default()).unwrap()
    });
    let mut state = InferenceState::new(one.config());
    one.prefill(&mut state, &[1, 2, 3]).unwrap();
    let error = other.prefill(&mut state, &[4]).unwrap_err().to_string();
    assert!(error.contains("other weights"), "{error}");
    state.truncate(0);
    other.prefill(&mut state, &[4]).unwrap();
    assert_eq!((one.kv_pages_held(), other.kv_pages_held()), (0, 1));
}

#[test]
fn truncated_tokens_leave_no_trace() {
    for name in ["sliding", "uneven"] {
        let case = &fixture::cases(name)[0];
        let model = TensorParallelMistral::load(fixture::load(name), TensorParallelConfig::new(2, 0)).unwrap();
        let mut state = InferenceState::new(model.config());
        model.prefill(&mut state, &case.ids).unwrap();
        for keep in [39, 30, 7, 0] {
            model.prefill(&mut state, &[5, 6, 7]).unwrap();
            state.truncate(keep);
            assert!(state.logits().is_empty());
            let logits = model.prefill_logits(&mut state, &case.ids[keep..]).unwrap();
            let vocab = model.config().vocab_size;
            assert!(fixture::gap(&logits, &case.logits[keep * vocab..]) < CPU_TOLERANCE, "{name} cut at {keep}");
        }
    }
}

#[test]
fn contexts_end_with_an_error_and_an_unchanged_state() {
    let params = fixture::load("tiny-mistral");
    let limit = params.config().max_position_embeddings;
    let model = TensorParallelMistral::load(params.clone(), TensorParallelConfig::default()).unwrap();
    let mut state = InferenceState::new(model.config());
    let error = model.prefill(&mut state, &vec![1; limit + 1]).unwrap_err().to_string();
    assert!(error.contains("context of 512"), "{error}");
    model.prefill(&mut state, &vec![1; limit]).unwrap();
    let before = state.logits().to_vec();
    assert!(model.try_forward(&mut state, 1, false).is_err());
    assert_eq!((state.position(), state.logits()), (limit, &before[..]));

    let small = TensorParallelMistral::load(params, ParallelConfig::default().kv_positions(128)).unwrap();
    let mut state = InferenceState::new(small.config());
    let error = small.prefill(&mut state, &vec![1; 129]).unwrap_err().to_string();
    assert!(error.contains("KV cache is full") && state.position() == 0, "{error}");
    small.prefill(&mut state, &vec![1; 128]).unwrap();
    let mut second = InferenceState::new(small.config());
    assert!(small.prefill(&mut second, &[1]).is_err(), "the first state holds all pages");
    drop(state);
    small.prefill(&mut second, &[1]).unwrap();
}

#[test]
fn a_sliding_window_bounds_the_pages_held_over_ten_windows_and_more() {
    let params = fixture::load("sliding");
    let model = TensorParallelMistral::load(params, TensorParallelConfig::default()).unwrap();
    let mut state = InferenceState::new(model.config());
    let mut most = 0;
    for i in 0..400 {
        model.forward(&mut state, i % 320, false);
        most = most.max(state.kv_pages());
    }
    eprintln!("pages held over 50 windows of 8: {most} at most, {} at the end", state.kv_pages());
    // Window 8, chunks of one row, pages of 64.
    assert!(most <= 9usize.div_ceil(64) + 1, "{most} pages");
    assert_eq!(model.kv_pages_held(), state.kv_pages());
}

#[test]
fn inputs_that_make_no_sense_are_refused_with_their_numbers() {
    let model = TensorParallelMistral::load(fixture::load("tied"), TensorParallelConfig::default()).unwrap();
    let mut state = InferenceState::new(model.config());
    let said = |e: torchless::Error| e.to_string();
    assert!(said(model.prefill(&mut state, &[]).unwrap_err()).contains("prompt is empty"));
    assert!(said(model.prefill(&mut state, &[1, 300]).unwrap_err()).contains("token 300"));
    let params: Parameters = fixture::load("tied");
    let refused = |r: torchless::Result<TensorParallelMistral>| r.err().unwrap().to_string();
    assert!(refused(TensorParallelMistral::load_on_gpus(params.clone(), vec![])).contains("device list is empty"));
    assert!(refused(TensorParallelMistral::load(params.clone(), TensorParallelConfig::new(0, 0))).contains("world size is 0"));
    assert!(refused(TensorParallelMistral::load(params.clone(), TensorParallelConfig::new(2, 2))).contains("rank 2"));
    let shares = ParallelConfig::tensor_parallel(2, 0).with_shares(vec![1.0, 0.0]);
    assert!(refused(TensorParallelMistral::load(params.clone(), shares)).contains("shares"));
    let stages = ParallelConfig::default().stages(3);
    assert!(refused(TensorParallelMistral::load_grid(params, stages, vec![Device::cpu(); 4])).contains("3 stages"));
}
