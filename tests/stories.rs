//! The embedded model writes, word for word, what transformers makes it write.

mod common;

use common::{fixture, gpus};
use serde_json::Value;
use torchless::{Device, FinishReason, GenerateOptions, InferenceState, Parameters, SamplerOptions, TensorParallelMistral, generate};

fn check(devices: Vec<Device>, tolerance: f32) {
    let list: Vec<String> = devices.iter().map(Device::label).collect();
    let model = TensorParallelMistral::load_on_gpus(Parameters::load(fixture::stories()).unwrap(), devices).unwrap();
    let tokenizer = model.parameters().tokenizer().unwrap();
    let expected: Vec<Value> = serde_json::from_slice(&std::fs::read(fixture::stories().join("expected.json")).unwrap()).unwrap();
    assert_eq!(expected.len(), 3);
    for story in expected {
        let ids = |key: &str| -> Vec<u32> { serde_json::from_value(story[key].clone()).unwrap() };
        let prompt = story["prompt"].as_str().unwrap();
        assert_eq!(tokenizer.encode(prompt).unwrap(), ids("input_ids"), "{prompt}");

        let mut state = InferenceState::new(model.config());
        model.prefill(&mut state, &ids("input_ids")).unwrap();
        let top: Vec<f32> = serde_json::from_value(story["last_position_top20_logits"].clone()).unwrap();
        let found: Vec<f32> = ids("last_position_top20_ids").iter().map(|&id| state.logits()[id as usize]).collect();
        assert!(fixture::gap(&found, &top) < tolerance, "{prompt} on {list:?}: {found:?} are not {top:?}");

        let greedy = SamplerOptions { temperature: 0.0, ..SamplerOptions::default() };
        let options = GenerateOptions { max_tokens: 320, sampling: greedy, ..GenerateOptions::default() };
        let mut state = InferenceState::new(model.config());
        let tokens: Vec<_> = generate(&model, &mut state, prompt, options).map(Result::unwrap).collect();
        let text: String = tokens.iter().map(|t| t.text.as_str()).collect();
        assert_eq!(format!("{prompt}{text}"), story["text"].as_str().unwrap(), "{list:?}");
        assert_eq!(tokens.iter().map(|t| t.id).collect::<Vec<_>>(), ids("greedy_ids"), "{list:?}");
        assert_eq!(tokens.last().unwrap().finish, Some(FinishReason::Eos));
    }
}

#[test]
fn stories_are_the_same_on_one_two_and_four_cpu_ranks() {
    for ranks in [1, 2, 4] {
        check(vec![Device::cpu(); ranks], 1e-4);
    }
}

#[test]
fn stories_are_the_same_on_an_adapter_beside_the_cpu() {
    if let Some(gpu) = gpus().into_iter().next() {
        check(vec![gpu, Device::cpu()], 1e-3);
    }
}
