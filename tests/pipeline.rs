//! Stages that work at the same time, and several sequences in a launch: the fixtures' answers on every grid, and the same bits
//! however rows are batched.

mod common;

use common::{Spec, fixture, write_checkpoint};
use torchless::{
    Device, Error, InferenceState, KvType, ParallelConfig, Parameters, PipelineConfig, PipelineParallelMistral, TensorParallelMistral,
};

const TOLERANCE: f32 = 1e-4;

/// A grid of so many stages and ranks on the CPU.
fn grid(name: &str, [stages, ranks]: [usize; 2], pipeline: PipelineConfig) -> PipelineParallelMistral {
    let mut config = ParallelConfig::tensor_parallel(ranks, 0).stages(stages);
    config.pipeline = pipeline;
    PipelineParallelMistral::load(fixture::load(name), config).unwrap_or_else(|e| panic!("{name} on {stages} x {ranks}: {e}"))
}

fn micro_batches(num_micro_batches: usize, async_execution: bool) -> PipelineConfig {
    PipelineConfig { num_micro_batches, async_execution, ..PipelineConfig::default() }
}

/// 1 to 4 stages of 1 to 3 ranks, as far as the fixture has layers.
fn grids(name: &str) -> Vec<[usize; 2]> {
    let layers = fixture::load(name).config().n_layers;
    (1..=layers.min(4)).flat_map(|stages| (1..=3).map(move |ranks| [stages, ranks])).collect()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn every_grid_gives_the_logits_and_texts_of_every_fixture_in_any_number_of_micro_batches() {
    for name in fixture::ALL {
        for [stages, ranks] in grids(name) {
            for (m, is_async) in [(1, true), (2, true), (3, false), (4, true), (8, true), (8, false), (usize::MAX, true)] {
                let model = grid(name, [stages, ranks], micro_batches(m, is_async));
                fixture::check(name, &model, TOLERANCE).unwrap_or_else(|e| panic!("{stages} x {ranks}, {m} micro-batches: {e}"));
            }
        }
    }
}

#[test]
fn a_thread_a_stage_and_one_for_all_give_the_same_bits_in_any_number_of_micro_batches() {
    for name in fixture::ALL {
        let ids = &fixture::cases(name)[0].ids;
        for [stages, ranks] in grids(name) {
            let run = |pipeline| {
                let model = grid(name, [stages, ranks], pipeline);
                let mut state = InferenceState::new(model.config());
                let logits = model.prefill_logits(&mut state, ids).unwrap();
                model.forward(&mut state, 7, false);
                (bits(&logits), bits(state.logits()))
            };
            let want = run(micro_batches(1, false));
            for (m, is_async) in [(1, true), (2, false), (5, true), (8, false), (8, true)] {
                assert!(run(micro_batches(m, is_async)) == want, "{name} on {stages} x {ranks}: {m} micro-batches, async {is_async}");
            }
        }
    }
}

/// Sequences of different lengths, among them the fixture's, step together for a while; every one has the bits of running alone.
#[test]
fn a_batch_of_1_to_9_sequences_has_the_bits_of_each_alone() {
    for name in fixture::ALL {
        let cases = fixture::cases(name);
        for [stages, ranks] in grids(name) {
            let model = grid(name, [stages, ranks], micro_batches(3, true));
            let vocab = model.config().vocab_size as u32;
            let prompt = |i: usize| match cases.get(i) {
                Some(case) => case.ids.clone(),
                None => (0..(i * i) as u32).map(|t| (t * 31 + i as u32) % vocab).collect(),
            };
            let steps = cases[0].greedy.len();
            let alone: Vec<(Vec<u32>, Vec<u32>)> = (0..9)
                .map(|i| {
                    let mut state = InferenceState::new(model.config());
                    model.prefill(&mut state, &prompt(i)).unwrap();
                    let text = fixture::greedy(&model, &mut state, steps).unwrap();
                    (text, bits(state.logits()))
                })
                .collect();
            for n in 1..=9 {
                let mut states: Vec<InferenceState> = (0..n).map(|_| InferenceState::new(model.config())).collect();
                for (i, state) in states.iter_mut().enumerate() {
                    model.prefill(state, &prompt(i)).unwrap();
                }
                let mut texts = vec![Vec::new(); n];
                for _ in 0..steps {
                    let tokens: Vec<u32> = states.iter().map(|state| fixture::argmax(state.logits())).collect();
                    texts.iter_mut().zip(&tokens).for_each(|(text, &token)| text.push(token));
                    model.forward_batch(&mut states.iter_mut().collect::<Vec<_>>(), &tokens).unwrap();
                }
                for (i, (text, logits)) in alone.iter().take(n).enumerate() {
                    assert!(texts[i] == *text, "{name} on {stages} x {ranks}: sequence {i} of {n} has another text");
                    assert!(bits(states[i].logits()) == *logits, "{name} on {stages} x {ranks}: sequence {i} of {n} has other bits");
                }
                // What transformers writes.
                for (text, case) in texts.iter().zip(&cases) {
                    assert_eq!(*text, case.greedy[..steps.min(case.greedy.len())], "{name} on {stages} x {ranks}");
                }
            }
        }
    }
}

#[test]
fn a_batch_is_one_launch_on_one_stage() {
    let model = TensorParallelMistral::load(fixture::load("uneven"), ParallelConfig::tensor_parallel(2, 0)).unwrap();
    let mut states: Vec<InferenceState> = (0..8).map(|_| InferenceState::new(model.config())).collect();
    let submissions = || model.counts().unwrap()[0].submissions;
    let before = submissions();
    model.forward_batch(&mut states.iter_mut().collect::<Vec<_>>(), &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
    assert_eq!(submissions() - before, 1);
    assert!(states.iter().enumerate().all(|(i, state)| state.tokens() == [i as u32 + 1]));
}

#[test]
fn a_batch_may_hold_more_sequences_than_a_launch_and_caches_of_both_types() {
    let model = grid("tied", [2, 2], micro_batches(2, true));
    let kv = |i: usize| if i.is_multiple_of(3) { KvType::F16 } else { KvType::F32 };
    let mut states: Vec<InferenceState> = (0..100).map(|i| InferenceState::with_kv(model.config(), kv(i))).collect();
    for round in 0..2 {
        let tokens: Vec<u32> = (0..100).map(|i| (i * 7 + round) % 300).collect();
        model.forward_batch(&mut states.iter_mut().collect::<Vec<_>>(), &tokens).unwrap();
    }
    for (i, state) in states.iter().enumerate() {
        let mut alone = InferenceState::with_kv(model.config(), kv(i));
        model.prefill(&mut alone, state.tokens()).unwrap();
        assert!(bits(alone.logits()) == bits(state.logits()), "sequence {i}");
    }
}

#[test]
fn a_batch_that_cannot_run_leaves_every_sequence_as_it_was() {
    let model = grid("tied", [2, 1], micro_batches(4, true));
    let mut states: Vec<InferenceState> = (0..3).map(|_| InferenceState::new(model.config())).collect();
    let mut all: Vec<&mut InferenceState> = states.iter_mut().collect();
    model.forward_batch(&mut all, &[1, 2, 3]).unwrap();
    let error = model.forward_batch(&mut all, &[1, 2]).unwrap_err();
    assert!(matches!(error, Error::BatchSize { states: 3, tokens: 2 }), "{error}");
    let error = model.forward_batch(&mut all, &[1, 300, 3]).unwrap_err();
    assert!(matches!(error, Error::TokenOutOfRange { token: 300, .. }), "{error}");
    model.forward_batch(&mut [], &[]).unwrap();
    assert!(states.iter().all(|state| state.position() == 1 && state.logits().len() == 300));

    // Three pages: a fourth sequence finds none, and the others must not advance.
    let mut config = ParallelConfig::pipeline(2).stages(2);
    config.kv_positions = Some(3 * 64);
    let small = PipelineParallelMistral::load(fixture::load("tied"), config).unwrap();
    let mut states: Vec<InferenceState> = (0..4).map(|_| InferenceState::new(small.config())).collect();
    let error = small.forward_batch(&mut states.iter_mut().collect::<Vec<_>>(), &[1, 2, 3, 4]).unwrap_err();
    assert!(matches!(error, Error::CacheFull { .. }), "{error}");
    assert!(states.iter().all(|state| state.position() == 0 && state.logits().is_empty()));
    assert_eq!(small.kv_pages_held(), 0);
    states.pop();
    small.forward_batch(&mut states.iter_mut().collect::<Vec<_>>(), &[1, 2, 3]).unwrap();
}

#[test]
fn micro_batches_of_a_long_prompt_fit_a_cache_that_holds_little_more_than_the_window() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &Spec { layers: 4, sliding_window: Some(70), max_positions: 4096, ..Spec::default() });
    let params = Parameters::load(dir.path()).unwrap();
    let ids: Vec<u32> = (0..1000).map(|i| i * 7 % 40).collect();
    let run = |positions, pipeline| {
        let mut config = ParallelConfig::default().stages(4).kv_positions(positions);
        config.pipeline = pipeline;
        let model = PipelineParallelMistral::load(params.clone(), config).unwrap();
        let mut state = InferenceState::new(model.config());
        model.prefill(&mut state, &ids).unwrap();
        let held = state.kv_pages();
        let logits = bits(state.logits());
        drop(state);
        assert_eq!(model.kv_pages_held(), 0);
        (held, logits)
    };
    let (held, want) = run(4096, micro_batches(1, false));
    assert!(held <= 3, "{held} pages for a window of 70");
    for (m, is_async) in [(8, true), (20, false), (20, true)] {
        // Window, one batch of 125 or 50 rows, and the page that both straddle: batches on their way wait for pages.
        assert_eq!(run(5 * 64, micro_batches(m, is_async)), (held, want.clone()), "{m} micro-batches");
    }
}

#[test]
fn as_many_stages_as_layers_work_and_one_more_is_refused() {
    for (name, layers) in [("uneven", 5), ("tied", 3)] {
        for stages in 1..=layers {
            fixture::check(name, &grid(name, [stages, 1], micro_batches(4, true)), TOLERANCE).unwrap();
        }
        let config = ParallelConfig::pipeline(4).stages(layers + 1);
        let error = PipelineParallelMistral::load(fixture::load(name), config).err().unwrap().to_string();
        assert!(error.contains(&format!("{} stages cannot share {layers} layers", layers + 1)), "{error}");
    }
}

#[test]
fn a_list_of_devices_is_a_stage_each_and_every_stage_holds_its_layers_only() {
    let model = PipelineParallelMistral::load_on_gpus(fixture::load("tied"), vec![Device::cpu(); 3]).unwrap();
    fixture::check("tied", &model, TOLERANCE).unwrap();
    let layers: Vec<_> = model.ranks().iter().map(|rank| rank.layers.clone()).collect();
    assert_eq!((layers[0].start, layers[2].end, layers.len()), (0, 3, 3));
    assert!(layers.windows(2).all(|pair| pair[0].end == pair[1].start && !pair[0].is_empty()), "{layers:?}");
    let counts = model.counts().unwrap();
    assert_eq!(counts.len(), 3);
    let ops: Vec<u64> = counts.iter().map(|c| c.ops).collect();
    assert!(ops.iter().all(|&ops| ops > 0), "{ops:?}");
    let bytes: Vec<u64> = counts.iter().map(|c| c.weight_bytes).collect();
    assert_eq!(bytes, model.ranks().iter().map(|rank| rank.weight_bytes).collect::<Vec<_>>());
}

#[test]
fn sequences_of_several_threads_share_the_stages() {
    let model = grid("tiny-mistral", [3, 2], micro_batches(4, true));
    let run = |seed: u32| {
        let mut state = InferenceState::new(model.config());
        let ids: Vec<u32> = (0..50).map(|i| (i * seed) % 320).collect();
        model.prefill(&mut state, &ids).unwrap();
        model.forward(&mut state, seed, false);
        bits(state.logits())
    };
    let alone: Vec<_> = (1..=6).map(run).collect();
    let together = std::thread::scope(|scope| {
        let threads: Vec<_> = (1..=6).map(|seed| scope.spawn(move || run(seed))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    assert_eq!(alone, together);
}
