//! Perplexity, held against what it must be.

mod common;

use common::{Spec, fixture, write_checkpoint};
use safetensors::SafeTensors;
use torchless::{
    Device, InferenceState, KvType, ParallelConfig, Parameters, QuantFormat, TensorParallelConfig, TensorParallelMistral, score,
};

fn load(params: Parameters, ranks: usize) -> TensorParallelMistral {
    TensorParallelMistral::load(params, TensorParallelConfig::new(ranks, 0)).unwrap()
}

#[test]
fn a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &Spec { vocab: 37, ..Spec::default() });
    // Without a head all logits are 0.
    let path = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let head = SafeTensors::deserialize(&bytes).unwrap().tensor("lm_head.weight").unwrap().data().as_ptr_range();
    let start = head.start as usize - bytes.as_ptr() as usize;
    let len = head.end as usize - head.start as usize;
    bytes[start..start + len].fill(0);
    std::fs::write(&path, bytes).unwrap();

    let model = load(Parameters::load(dir.path()).unwrap(), 2);
    let tokens: Vec<u32> = (0..100).map(|i| i * 11 % 37).collect();
    let score = score(&model, &mut InferenceState::new(model.config()), &tokens, false).unwrap();
    assert_eq!(score.tokens, 99);
    assert!((score.perplexity() - 37.0).abs() < 1e-9, "{}", score.perplexity());
}

#[test]
fn tokens_cost_what_they_cost_by_the_logits_of_transformers() {
    for name in fixture::ALL {
        let model = load(fixture::load(name), 1);
        let vocab = model.config().vocab_size;
        for case in fixture::cases(name) {
            let cost = |logits: &[f32], token: u32| {
                let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
                sum.ln() - f64::from(logits[token as usize])
            };
            let wanted: f64 = case.logits.chunks(vocab).zip(&case.ids[1..]).map(|(logits, &token)| cost(logits, token)).sum();
            for fast in [false, true] {
                let found = score(&model, &mut InferenceState::new(model.config()), &case.ids, fast).unwrap();
                assert_eq!(found.tokens, case.ids.len() - 1);
                // The fast forms round activations to bf16 where the weights are.
                let bound = if fast { 1e-2 } else { 1e-3 };
                assert!((found.nats - wanted).abs() <= bound * found.tokens as f64, "{name} {}: {} is not {wanted}", case.name, found.nats);
            }
        }
    }
}

#[test]
fn stories_are_foretold_about_as_well_as_in_training() {
    let model = load(Parameters::load(fixture::stories()).unwrap(), 1);
    let text = std::fs::read_to_string(fixture::path("../data/held-out-stories.txt")).unwrap();
    // Eight stories, each from its beginning.
    let mut sum = torchless::Score::default();
    for story in text.split("</s><s>").take(8) {
        let tokens = model.parameters().tokenizer().unwrap().encode(story).unwrap();
        sum += score(&model, &mut InferenceState::new(model.config()), &tokens, false).unwrap();
    }
    assert!(sum.tokens > 1500, "{sum:?}");
    // The model's card has 0.29 for other stories of the grammar.
    assert!((0.22..0.36).contains(&sum.nats_per_token()), "{}", sum.nats_per_token());
}

#[test]
fn a_text_in_parts_costs_what_it_costs_at_once() {
    let model = load(Parameters::load(fixture::stories()).unwrap(), 2);
    let tokens: Vec<u32> = (0..400).map(|i| 300 + i * 13 % 500).collect();
    let whole = score(&model, &mut InferenceState::new(model.config()), &tokens, false).unwrap();
    for cut in [1, 255, 257] {
        let mut state = InferenceState::new(model.config());
        let mut parts = score(&model, &mut state, &tokens[..cut], false).unwrap();
        parts += score(&model, &mut state, &tokens[cut..], false).unwrap();
        assert_eq!((parts.tokens, state.tokens()), (399, &tokens[..]));
        assert!((parts.nats - whole.nats).abs() < 1e-9, "{parts:?} is not {whole:?}");
    }
    let mut state = InferenceState::new(model.config());
    assert_eq!(score(&model, &mut state, &[], false).unwrap().tokens, 0);
    assert!(score(&model, &mut state, &[1, 2, 5000], false).unwrap_err().to_string().contains("token 5000"));
    assert!(score(&model, &mut state, &vec![5; 513], false).unwrap_err().to_string().contains("context of 512"));
}

/// A fast GPU grid computes with the CPU's weights, and rounds its cache as the CPU does.
#[test]
fn a_gpu_grid_foretells_stories_as_well_as_the_cpu_in_every_format() {
    let Some(gpu) = common::gpus().into_iter().next_back() else { return };
    let params = Parameters::load(fixture::stories()).unwrap();
    let text = std::fs::read_to_string(fixture::path("../data/held-out-stories.txt")).unwrap();
    let story = text.split("</s><s>").next().unwrap();
    let ids = params.tokenizer().unwrap().encode(story).unwrap();
    for format in [None, Some(QuantFormat::Q8_0), Some(QuantFormat::Q4_0), Some(QuantFormat::Iq4Nl)] {
        let mut config = ParallelConfig::default();
        config.weights = format;
        let isolated = gpu.clone().isolated();
        let perplexity = |devices: Vec<Device>| {
            let model = TensorParallelMistral::load_grid(params.clone(), config.clone(), devices).unwrap();
            score(&model, &mut InferenceState::with_kv(model.config(), KvType::F16), &ids, false).unwrap().perplexity()
        };
        let [on_gpus, on_cpu] = [vec![isolated.clone(), isolated], vec![Device::cpu()]].map(perplexity);
        assert!((on_gpus / on_cpu - 1.0).abs() < 1e-3, "{format:?}: {on_gpus} on {gpu}, {on_cpu} on the CPU");
    }
}
