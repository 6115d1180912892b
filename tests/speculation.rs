//! Drafts make texts cheaper and change nothing else.

mod common;

use common::fixture;
use torchless::{
    DraftCounts, GenerateOptions, InferenceState, KvType, ParallelConfig, ParallelMistral, Parameters, SamplerOptions,
    TensorParallelMistral, Token, generate,
};

fn stories() -> Parameters {
    Parameters::load(fixture::stories()).unwrap()
}

fn load(params: &Parameters, stages: usize, ranks: usize) -> TensorParallelMistral {
    let config = ParallelConfig::tensor_parallel(ranks, 0).stages(stages);
    TensorParallelMistral::load(params.clone(), config).unwrap()
}

fn greedy(max_tokens: usize) -> GenerateOptions {
    GenerateOptions { max_tokens, sampling: SamplerOptions::greedy(), ..GenerateOptions::default() }
}

/// A story that the model would tell by itself, and the beginning of the same: it tells much of it again.
fn told_twice(model: &TensorParallelMistral) -> Vec<u32> {
    let beginning = model.parameters().tokenizer().unwrap().encode("Lily had a red ball.").unwrap();
    let mut state = InferenceState::new(model.config());
    let story = generate(model, &mut state, &beginning, greedy(300)).map(|token| token.unwrap().id);
    let mut prompt = beginning.clone();
    prompt.extend(story);
    prompt.extend(beginning);
    prompt
}

/// What a text leaves behind.
#[derive(Debug, PartialEq)]
struct Outcome {
    tokens: Vec<Token>,
    computed: Vec<u32>,
    logits: Vec<u32>,
    pages: usize,
    pages_of_all: usize,
    /// The logits after one token more.
    then: Option<Vec<u32>>,
}

/// The text until it ends or `most` tokens have come, when it is dropped.
fn tell<By>(model: &ParallelMistral<By>, kv: KvType, prompt: &[u32], options: GenerateOptions, most: usize) -> (Outcome, DraftCounts) {
    let mut state = InferenceState::with_kv(model.config(), kv);
    let mut generation = generate(model, &mut state, prompt, options);
    let tokens: Vec<Token> = generation.by_ref().take(most).map(Result::unwrap).collect();
    let counts = generation.counts();
    drop(generation);
    let bits = |state: &InferenceState| state.logits().iter().map(|logit| logit.to_bits()).collect::<Vec<_>>();
    let (computed, logits) = (state.tokens().to_vec(), bits(&state));
    let (pages, pages_of_all) = (state.kv_pages(), model.kv_pages_held());
    let then = model.try_forward(&mut state, 7, false).is_ok().then(|| bits(&state));
    (Outcome { tokens, computed, logits, pages, pages_of_all, then }, counts)
}

/// The outcome with drafts must be that without. Answers what the drafts did.
fn check<By>(model: &ParallelMistral<By>, kv: KvType, prompt: &[u32], options: &GenerateOptions, most: usize) -> DraftCounts {
    let (plain, none) = tell(model, kv, prompt, options.clone(), most);
    assert_eq!((none.drafted, none.accepted, none.launches), (0, 0, plain.tokens.len() as u64));
    let mut counts = none;
    for speculate in [1, 7, 32] {
        let drafted;
        (drafted, counts) = tell(model, kv, prompt, GenerateOptions { speculate, ..options.clone() }, most);
        assert!(drafted == plain, "{speculate} drafted at most, {options:?}, {most} tokens:\n{drafted:?}\nis not\n{plain:?}");
        if most == usize::MAX {
            assert_eq!(counts.launches + counts.accepted, plain.tokens.len() as u64, "{counts:?}");
        }
    }
    counts
}

#[test]
fn texts_are_the_same_with_drafts_on_any_grid_and_cache() {
    let params = stories();
    let prompt = told_twice(&load(&params, 1, 1));
    for (stages, ranks) in [(1, 1), (1, 2), (2, 1)] {
        let model = load(&params, stages, ranks);
        for kv in [KvType::F32, KvType::F16] {
            for seed in [None, Some(1), Some(2)] {
                let sampling = match seed {
                    None => SamplerOptions::greedy(),
                    Some(_) => SamplerOptions { temperature: 0.9, top_p: 0.95, repetition_penalty: 1.1, seed, ..SamplerOptions::default() },
                };
                let options = GenerateOptions { sampling, ..greedy(100) };
                let counts = check(&model, kv, &prompt, &options, usize::MAX);
                assert!(counts.accepted > 0 && counts.drafted > counts.accepted, "{counts:?}");
            }
        }
    }
}

#[test]
fn texts_that_are_told_anew_are_the_same_too() {
    let model = load(&stories(), 1, 1);
    let tokenizer = model.parameters().tokenizer().unwrap();
    let prompts = [
        "The",
        "Tom saw a big dog.",
        "tap tap tap tap tap tap",
        "One sunny morning, Max and Nina wanted to build a sandcastle",
        "1 2 3 1 2 3 1 2",
    ];
    for (seed, prompt) in prompts.iter().enumerate() {
        let prompt = tokenizer.encode(prompt).unwrap();
        for temperature in [0.0, 0.8, 1.5] {
            let sampling = SamplerOptions { temperature, seed: Some(seed as u64), ..SamplerOptions::default() };
            check(&model, KvType::F32, &prompt, &GenerateOptions { sampling, ..greedy(120) }, usize::MAX);
        }
    }
}

#[test]
fn texts_end_where_they_would_without_drafts() {
    let model = load(&stories(), 1, 2);
    let prompt = told_twice(&model);
    for max_tokens in [0, 1, 2, 3, 9, 20] {
        check(&model, KvType::F32, &prompt, &greedy(max_tokens), usize::MAX);
    }
    for stop in ["everywhere", "o", "Where is", "ball?\""] {
        check(&model, KvType::F32, &prompt, &GenerateOptions { stop: vec![stop.into()], ..greedy(200) }, usize::MAX);
    }
    // The prompt again and again, so that the context is full soon.
    let limit = model.config().max_position_embeddings;
    for room in [1, 2, 3, 5, 9, 12] {
        let long: Vec<u32> = prompt.iter().copied().cycle().take(limit - room).collect();
        check(&model, KvType::F32, &long, &greedy(300), usize::MAX);
    }
}

#[test]
fn a_text_that_is_dropped_midway_leaves_no_draft_behind() {
    let model = load(&stories(), 1, 1);
    let prompt = told_twice(&model);
    let (whole, counts) = tell(&model, KvType::F32, &prompt, GenerateOptions { speculate: 7, ..greedy(60) }, usize::MAX);
    assert!(counts.accepted > 20, "{counts:?}");
    for most in (0..whole.tokens.len()).step_by(3) {
        check(&model, KvType::F32, &prompt, &greedy(60), most);
    }
}

#[test]
fn a_text_that_is_told_again_takes_a_fraction_of_the_launches() {
    let model = load(&stories(), 1, 1);
    let prompt = told_twice(&model);
    let launches = || model.counts().unwrap()[0].submissions;
    let mut taken = [0, 7].map(|speculate| {
        let before = launches();
        let mut state = InferenceState::new(model.config());
        let mut generation = generate(&model, &mut state, &prompt, GenerateOptions { speculate, ..greedy(160) });
        let tokens = generation.by_ref().map(Result::unwrap).count() as u64;
        let counts = generation.counts();
        // The first is the prompt's, in as many launches as it has chunks.
        assert_eq!(launches() - before, counts.launches - 1 + prompt.len().div_ceil(256) as u64);
        assert_eq!(counts.launches, tokens - counts.accepted);
        counts.launches
    });
    taken.sort_unstable();
    assert!(taken[0] * 2 < taken[1], "{taken:?}");
}

/// Rows that the first stage has computed since the model began to record.
fn rows(model: &TensorParallelMistral) -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace.json");
    model.write_trace(&path).unwrap();
    let trace: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap().iter();
    let of_first = events.filter(|event| event["cat"] == "compute" && event["args"]["stage"] == 0);
    of_first.map(|event| event["args"]["rows"].as_u64().unwrap()).sum()
}

#[test]
fn a_sliding_window_keeps_what_a_draft_taken_back_needs() {
    // A window of 8 and pages of 64: from position 72 on the first page is not seen any more.
    let params = fixture::load("sliding");
    let model = load(&params, 1, 1);
    model.start_trace();
    let tokens: Vec<u32> = (0..100).map(|i| 3 + i * 7 % 300).collect();
    for position in 60..80 {
        for keep in [1, 4, 8] {
            let before = rows(&model);
            let [mut drafted, mut plain] = [InferenceState::new(model.config()), InferenceState::new(model.config())];
            model.prefill(&mut drafted, &tokens[..position]).unwrap();
            model.forward_draft(&mut drafted, &tokens[position..position + 8]).unwrap();
            drafted.truncate(position + keep);
            model.forward(&mut drafted, 9, false);
            assert_eq!(rows(&model) - before, position as u64 + 8 + 1, "nothing is computed again");
            model.prefill(&mut plain, &tokens[..position + keep]).unwrap();
            model.forward(&mut plain, 9, false);
            assert!(plain.logits() == drafted.logits(), "{keep} behind {position}");
            assert_eq!(plain.kv_pages(), drafted.kv_pages());
        }
    }
}

#[test]
fn texts_with_a_sliding_window_are_the_same_with_drafts() {
    let params = fixture::load("sliding");
    for (stages, ranks) in [(1, 1), (2, 1)] {
        let model = load(&params, stages, ranks);
        let beginning: Vec<u32> = (10..20).collect();
        let (text, _) = tell(&model, KvType::F32, &beginning, greedy(30), usize::MAX);
        let text: Vec<u32> = text.tokens.iter().map(|token| token.id).collect();
        let (mut drafted, mut accepted) = (0, 0);
        for again in 10..24 {
            let prompt = [&beginning[..], &text, &beginning, &text[..again]].concat();
            let sampling = SamplerOptions { temperature: 0.5, seed: Some(again as u64), ..SamplerOptions::default() };
            let counts = check(&model, KvType::F32, &prompt, &GenerateOptions { sampling, ..greedy(16) }, usize::MAX);
            (drafted, accepted) = (drafted + counts.drafted, accepted + counts.accepted);
        }
        assert!(accepted > 0 && drafted > accepted, "{accepted} of {drafted}");
    }
}

#[test]
fn where_others_hold_the_cache_only_drafts_are_given_up() {
    let params = stories();
    let model = TensorParallelMistral::load(params, ParallelConfig::default().kv_positions(256)).unwrap();
    // One page of four is left, and the text ends within it.
    let mut other = InferenceState::new(model.config());
    model.prefill(&mut other, &[5; 150]).unwrap();
    let prompt: Vec<u32> = (0..56).map(|i| 300 + i % 6).collect();
    for max_tokens in 1..=9 {
        check(&model, KvType::F32, &prompt, &greedy(max_tokens), usize::MAX);
    }
}
