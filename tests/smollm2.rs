//! A real public model, SmolLM2-135M-Instruct in GGUF, answers as transformers computes it from the same file: `tests/fixtures/smollm2`.
//!
//! `scripts/smollm2.sh` fetches it; `TORCHLESS_SMOLLM2` says where it is. Its 9 query heads and 3 key-value heads fit no even number of ranks.

mod common;

use std::path::PathBuf;

use common::fixture;
use serde::Deserialize;
use torchless::{ChatMessage, Device, InferenceState, ParallelConfig, Parameters, TensorParallelMistral};

/// Of the logits, whose standard deviation is 3.4.
const TOLERANCE: f32 = 2e-3;

/// A prompt, and what transformers makes of it.
#[derive(Deserialize)]
struct Case {
    prompt: String,
    text: String,
    input_ids: Vec<u32>,
    last_position_top20_ids: Vec<u32>,
    last_position_top20_logits: Vec<f32>,
    greedy_ids: Vec<u32>,
}

fn cases() -> Vec<Case> {
    serde_json::from_slice(&std::fs::read(fixture::path("smollm2/expected.json")).unwrap()).unwrap()
}

/// The model, or a word about the test that can't have it.
fn model(test: &str) -> Option<Parameters> {
    if let Some(path) = std::env::var_os("TORCHLESS_SMOLLM2").map(PathBuf::from) {
        return Some(Parameters::load(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())));
    }
    let why = "TORCHLESS_SMOLLM2 doesn't name the model, which scripts/smollm2.sh fetches";
    assert!(std::env::var_os("TORCHLESS_REQUIRE_MODELS").is_none(), "{test}: {why}");
    eprintln!("SKIPPED {test}: {why}");
    None
}

/// One grid: the top logits of these prompts, and their answers token for token.
fn check(params: &Parameters, devices: Vec<Device>, config: &ParallelConfig, cases: &[Case]) {
    let what = format!("{:?} stages of {:?}", config.stages.unwrap_or(1), devices.iter().map(Device::to_string).collect::<Vec<_>>());
    let config = config.clone().kv_positions(256);
    let model = TensorParallelMistral::load_grid(params.clone(), config, devices).unwrap_or_else(|e| panic!("{what}: {e}"));
    for case in cases {
        let mut state = InferenceState::new(model.config());
        model.prefill(&mut state, &case.input_ids).unwrap();
        let logits = state.logits();
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
        let found: Vec<f32> = case.last_position_top20_ids.iter().map(|&id| logits[id as usize]).collect();
        let gap = fixture::gap(&found, &case.last_position_top20_logits);
        assert!(gap <= TOLERANCE, "{what}: {:?}: the top logits are off by {gap}", case.prompt);
        let least = case.last_position_top20_logits[19];
        assert!(logits[order[20] as usize] <= least + TOLERANCE, "{what}: {:?}: another token is among the top 20", case.prompt);
        let mut answer = Vec::new();
        for _ in 0..case.greedy_ids.len() {
            let token = fixture::argmax(state.logits());
            answer.push(token);
            model.forward(&mut state, token, false);
        }
        assert_eq!(answer, case.greedy_ids, "{what}: {:?}", case.prompt);
        eprintln!("{what}: {:?}: top logits within {gap:.1e}", case.prompt);
    }
}

#[test]
fn every_number_of_ranks_and_stages_of_the_cpu_answers_as_transformers_does() {
    let Some(params) = model("every_number_of_ranks_and_stages_of_the_cpu_answers_as_transformers_does") else { return };
    let cases = cases();
    for ranks in [1, 2, 3, 4, 9] {
        check(&params, vec![Device::cpu(); ranks], &ParallelConfig::default(), &cases);
    }
    for stages in [2, 3] {
        check(&params, vec![Device::cpu(); stages], &ParallelConfig::default().stages(stages), &cases);
    }
    check(&params, vec![Device::cpu().isolated(); 6], &ParallelConfig::default().stages(2), &cases);
    check(&params, vec![Device::cpu().isolated(); 2], &ParallelConfig::default().with_shares(vec![3.0, 1.0]), &cases);
}

#[cfg(feature = "gpu")]
#[test]
fn gpus_alone_and_together_with_the_cpu_answer_as_transformers_does() {
    let Some(params) = model("gpus_alone_and_together_with_the_cpu_answer_as_transformers_does") else { return };
    let (gpus, cases, plain) = (common::gpus(), cases(), ParallelConfig::default());
    // Software adapters take a while for a token: the prompts take turns.
    for (i, gpu) in gpus.iter().enumerate() {
        check(&params, vec![gpu.clone()], &plain, &cases[i % 2..=i % 2]);
    }
    let Some(last) = gpus.last() else { return };
    check(&params, vec![last.clone(); 9], &plain, &cases[..1]);
    check(&params, vec![last.clone(), Device::cpu(), last.clone(), Device::cpu()], &plain.clone().stages(2), &cases[1..]);
    let all: Vec<Device> = gpus.iter().cloned().chain([Device::cpu()]).collect();
    check(&params, all, &plain, &cases[..1]);
}

#[test]
fn its_own_tokenizer_and_template_make_the_prompts_tokens() {
    let Some(params) = model("its_own_tokenizer_and_template_make_the_prompts_tokens") else { return };
    let (tokenizer, template) = (params.tokenizer().unwrap(), params.chat_template().unwrap());
    for case in cases() {
        let text = template.render(&[ChatMessage::user(case.prompt.as_str())], true).unwrap();
        assert_eq!(text, case.text, "{:?}", case.prompt);
        assert_eq!(tokenizer.encode(&text).unwrap(), case.input_ids, "{:?}", case.prompt);
    }
}
