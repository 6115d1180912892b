//! Checkpoints of shapes that the fixtures don't have, on CPU grids, against a forward pass in f64.

mod common;

use common::reference::Reference;
use common::{Spec, fixture, write_checkpoint};
use safetensors::Dtype;
use torchless::{Device, InferenceState, ParallelConfig, Parameters, TensorParallelMistral};

fn shapes() -> Vec<(&'static str, Spec)> {
    let plain = Spec { max_positions: 128, ..Spec::default() };
    let shape = |hidden, intermediate, heads, kv_heads, head_dim, vocab| Spec {
        hidden,
        intermediate,
        heads,
        kv_heads,
        head_dim,
        vocab,
        ..plain.clone()
    };
    vec![
        ("one head of two elements", shape(2, 1, 1, 1, 2, 3)),
        ("primes", shape(53, 31, 7, 7, 6, 101)),
        ("multi-query attention", shape(40, 56, 10, 1, 4, 67)),
        ("odd heads", Spec { transformers5: true, ..shape(45, 77, 15, 5, 6, 131) }),
        ("wide heads", shape(24, 40, 3, 1, 96, 50)),
        ("wider heads", Spec { layers: 1, ..shape(20, 12, 2, 2, 256, 33) }),
        ("fewer channels than ranks", shape(16, 2, 4, 2, 4, 3)),
        ("a hidden size over one block of the sum", Spec { layers: 1, ..shape(600, 1100, 4, 2, 8, 40) }),
        ("window shorter than the prompt", Spec { sliding_window: Some(5), ..plain.clone() }),
        ("window of one", Spec { sliding_window: Some(1), ..plain.clone() }),
        ("window longer than the prompt", Spec { sliding_window: Some(500), ..plain.clone() }),
        ("window of a page", Spec { sliding_window: Some(64), ..plain.clone() }),
        ("odd heads in f16", Spec { dtype: Dtype::F16, ..shape(33, 49, 9, 3, 2, 71) }),
        ("odd heads in bf16, tied, sharded", Spec { dtype: Dtype::BF16, tied: true, shards: 3, ..shape(35, 51, 5, 1, 10, 73) }),
        ("llama", Spec { model_type: "llama", ..plain.clone() }),
        ("biases", Spec { model_type: "qwen2", ..shape(33, 49, 9, 3, 2, 71) }),
        (
            "biases in f16, tied, one head of keys",
            Spec { model_type: "qwen2", dtype: Dtype::F16, tied: true, ..shape(40, 56, 10, 1, 4, 67) },
        ),
        ("heads that are normed", Spec { model_type: "qwen3", ..shape(45, 77, 15, 5, 6, 131) }),
        ("wide heads that are normed", Spec { model_type: "qwen3", dtype: Dtype::BF16, ..shape(24, 40, 3, 1, 96, 50) }),
    ]
}

fn check(devices: impl Fn(usize) -> Vec<Device>, tolerance: f32) {
    let mut failures = Vec::new();
    for (name, spec) in shapes() {
        let dir = tempfile::tempdir().unwrap();
        write_checkpoint(dir.path(), &spec);
        let ids: Vec<u32> = (0..90).map(|i| (i * 7 + i * i) % spec.vocab as u32).collect();
        let want = Reference::open(dir.path()).logits(&ids);
        let params = Parameters::load(dir.path()).unwrap_or_else(|e| panic!("{name}: {e}"));
        for ranks in [1, 2, 3, 4, 5, 7, spec.heads] {
            if ranks > spec.heads {
                continue;
            }
            let model = TensorParallelMistral::load_grid(params.clone(), ParallelConfig::default(), devices(ranks)).unwrap();
            let got = model.prefill_logits(&mut InferenceState::new(model.config()), &ids).unwrap();
            let gap = fixture::gap(&got, &want);
            if gap > tolerance {
                failures.push(format!("{name}, {ranks} ranks: {gap:e}"));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn every_shape_gives_the_reference_logits_on_ranks_in_one_place() {
    check(|ranks| vec![Device::cpu(); ranks], 1e-4);
}

#[test]
fn every_shape_gives_the_reference_logits_on_isolated_ranks() {
    check(|ranks| vec![Device::cpu().isolated(); ranks], 1e-4);
}
