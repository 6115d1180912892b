//! Small checkpoints of any shape, with random weights.
#![allow(dead_code)] // every test binary compiles this and uses a part

pub mod fixture;
pub mod gguf;
pub mod reference;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Write;
use std::path::Path;

use half::{bf16, f16};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// What [`write_checkpoint`] writes. The default is a small plain model that loads.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Equal seeds give equal weights, up to the rounding of `dtype`, however they are sharded.
    pub seed: u64,
    /// `mistral`, `llama`, `qwen2` or `qwen3`.
    pub model_type: &'static str,
    pub vocab: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    /// Need not be `hidden / heads`.
    pub head_dim: usize,
    pub sliding_window: Option<usize>,
    pub max_positions: usize,
    pub tied: bool,
    /// `F32`, `F16` or `BF16`.
    pub dtype: Dtype,
    /// 1 writes `model.safetensors`; more write an index too. Layers straddle shards.
    pub shards: usize,
    /// `rope_theta` within `rope_parameters`.
    pub transformers5: bool,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            seed: 1,
            model_type: "mistral",
            vocab: 40,
            hidden: 16,
            intermediate: 24,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 4,
            sliding_window: None,
            max_positions: 256,
            tied: false,
            dtype: Dtype::F32,
            shards: 1,
            transformers5: false,
        }
    }
}

impl Spec {
    pub fn config(&self) -> Value {
        let mut config = json!({
            "model_type": self.model_type,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": self.max_positions,
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": self.tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
        });
        if self.transformers5 {
            config["rope_parameters"] = json!({"rope_theta": 10000.0, "rope_type": "default"});
        } else {
            config["rope_theta"] = json!(10000.0);
        }
        config
    }

    /// Names and shapes, in an order that doesn't depend on how they are stored.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, channels) = (self.hidden, self.intermediate);
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut tensors = vec![("model.embed_tokens.weight".into(), vec![self.vocab, hidden])];
        for layer in 0..self.layers {
            for (name, shape) in [
                ("input_layernorm", vec![hidden]),
                ("self_attn.q_proj", vec![q, hidden]),
                ("self_attn.k_proj", vec![kv, hidden]),
                ("self_attn.v_proj", vec![kv, hidden]),
                ("self_attn.o_proj", vec![hidden, q]),
                ("post_attention_layernorm", vec![hidden]),
                ("mlp.gate_proj", vec![channels, hidden]),
                ("mlp.up_proj", vec![channels, hidden]),
                ("mlp.down_proj", vec![hidden, channels]),
            ] {
                tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
            }
            let optional = match self.model_type {
                "qwen2" => vec![("q_proj.bias", q), ("k_proj.bias", kv), ("v_proj.bias", kv)],
                "qwen3" => vec![("q_norm.weight", self.head_dim), ("k_norm.weight", self.head_dim)],
                _ => vec![],
            };
            tensors.extend(optional.into_iter().map(|(name, n)| (format!("model.layers.{layer}.self_attn.{name}"), vec![n])));
        }
        tensors.push(("model.norm.weight".into(), vec![hidden]));
        if !self.tied {
            tensors.push(("lm_head.weight".into(), vec![self.vocab, hidden]));
        }
        tensors
    }
}

/// Writes the checkpoint that `spec` describes into `dir`, which must exist. There is no tokenizer.
pub fn write_checkpoint(dir: &Path, spec: &Spec) {
    write_json(&dir.join("config.json"), &spec.config());
    write_json(&dir.join("generation_config.json"), &json!({"bos_token_id": 1, "eos_token_id": 2}));

    let mut random = ChaCha8Rng::seed_from_u64(spec.seed);
    let tensors: Vec<_> = spec
        .tensors()
        .into_iter()
        .map(|(name, shape)| {
            let values = values(&mut random, &shape);
            (name, shape, stored(&values, spec.dtype))
        })
        .collect();

    let mut weight_map = BTreeMap::new();
    for i in 0..spec.shards {
        let shard = &tensors[tensors.len() * i / spec.shards..tensors.len() * (i + 1) / spec.shards];
        let file = match spec.shards {
            1 => "model.safetensors".to_owned(),
            n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
        };
        weight_map.extend(shard.iter().map(|(name, ..)| (name.clone(), file.clone())));
        let views = shard.iter().map(|(name, shape, bytes)| (name, TensorView::new(spec.dtype, shape.clone(), bytes).unwrap()));
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::serialize_to_file(views, Some(metadata), &dir.join(file)).unwrap();
    }
    if spec.shards > 1 {
        let total: usize = tensors.iter().map(|(.., bytes)| bytes.len()).sum();
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        write_json(&dir.join("model.safetensors.index.json"), &index);
    }
}

pub fn write_json(path: &Path, value: &Value) {
    fs::write(path, serde_json::to_string_pretty(value).unwrap()).unwrap();
}

/// A norm about 1, so that leaving it out shows; a matrix that keeps the size of what it multiplies.
pub fn values(random: &mut ChaCha8Rng, shape: &[usize]) -> Vec<f32> {
    let (centre, spread) = match *shape {
        [_, inputs] => (0.0, (3.0 / inputs as f32).sqrt()),
        _ => (1.0, 0.3),
    };
    let uniform = |random: &mut ChaCha8Rng| random.next_u32() as f32 / u32::MAX as f32 * 2.0 - 1.0;
    (0..shape.iter().product()).map(|_| centre + spread * uniform(random)).collect()
}

pub fn stored(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        other => panic!("checkpoints are not written as {other}"),
    }
}

/// Every adapter of this machine. Where there is none, says so by name, or fails if `TORCHLESS_REQUIRE_GPU` is 1.
pub fn gpus() -> Vec<torchless::Device> {
    at_least(1)
}

/// Every adapter, if there are `n`. Where there are fewer, says which is missing, or fails if `TORCHLESS_REQUIRE_GPU` is 1.
pub fn at_least(n: usize) -> Vec<torchless::Device> {
    let gpus: Vec<_> = torchless::devices().into_iter().filter(|d| !d.is_cpu()).collect();
    if gpus.len() >= n {
        return gpus;
    }
    skip(&format!("gpu:{} is missing: {} adapters were found, {n} are needed", gpus.len(), gpus.len()));
    Vec::new()
}

/// Says that the test at hand is skipped, and why, even where output is captured. With `TORCHLESS_REQUIRE_GPU=1` (CI) it fails instead,
/// unless the build has no feature `gpu`.
pub fn skip(why: &str) {
    let required = cfg!(feature = "gpu") && std::env::var("TORCHLESS_REQUIRE_GPU").is_ok_and(|v| v == "1");
    assert!(!required, "TORCHLESS_REQUIRE_GPU=1, but {why}");
    say_skipped(why);
}

/// [`skip`] for what is never required.
pub fn say_skipped(why: &str) {
    let thread = std::thread::current();
    // The print macros are captured; writing to the stream is not.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {}: {why}", thread.name().unwrap_or("a test"));
}
