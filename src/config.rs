//! [`Config`]: the model's numbers, read from `config.json` and checked. Those of GGUF files: `params/gguf/config.rs`.

mod keys;
mod rope;
mod window;

use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};
pub(crate) use keys::{Keys, open, read_at_most};
pub use rope::RopeScaling;

/// Most bytes of a `config.json`; those in use have about a thousand.
pub(crate) const CONFIG_LIMIT: u64 = 1 << 20;

/// The sizes and constants of a model.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Config {
    /// Tokens in the vocabulary: rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Channels of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key-value heads; query head h uses key-value head h / (n_heads / n_kv_heads).
    pub n_kv_heads: usize,
    /// Elements of a head; even.
    pub head_dim: usize,
    /// Added to the mean square before the root in RMSNorm.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// How the rotary frequencies are scaled; `None` where they are not.
    pub rope_scaling: Option<RopeScaling>,
    /// The longest sequence, in positions.
    pub max_position_embeddings: usize,
    /// A position sees this many positions, itself included; `None` for all.
    pub sliding_window: Option<usize>,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// The projections to queries, keys and values add a bias (Qwen 2).
    pub qkv_bias: bool,
    /// Every head of queries and keys is normed before it is rotated (Qwen 3).
    pub qk_norm: bool,
}

/// Which of the decoders it is, as far as their configs and layers differ.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Mistral,
    Llama,
    Qwen2,
    Qwen3,
}

impl Config {
    /// The first position that a row at `position` sees.
    pub(crate) fn first_seen(&self, position: usize) -> usize {
        self.sliding_window.map_or(0, |w| (position + 1).saturating_sub(w))
    }

    /// Reads and checks a `config.json` of model type `mistral`, `llama`, `qwen2` or `qwen3`, as any version of transformers writes it.
    ///
    /// What has no default here must be there; the defaults are those of transformers. Its `dtype` is not read:
    /// the checkpoint's files say how their tensors are stored.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Config`] if it isn't JSON, or a value is missing, of the wrong type, out of range or contradicts another;
    /// [`Error::Unsupported`] if it asks for what torchless doesn't compute.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::from_json(&read_at_most(path, CONFIG_LIMIT)?, path)
    }

    /// [`Self::load`] from the text of `path`.
    pub(crate) fn from_json(json: &[u8], path: &Path) -> Result<Self> {
        let keys = Keys::parse(json, path)?;
        let kind = match keys.text("model_type")?.ok_or_else(|| keys.wrong("model_type", "it has no default"))? {
            "mistral" => Kind::Mistral,
            "llama" => Kind::Llama,
            "qwen2" => Kind::Qwen2,
            "qwen3" => Kind::Qwen3,
            other => return Err(unsupported("model_type", other, "\"mistral\", \"llama\", \"qwen2\" and \"qwen3\"")),
        };
        refuse_unsupported(&keys)?;

        let hidden_size = keys.required_size("hidden_size")?;
        let n_heads = keys.required_size("num_attention_heads")?;
        // As `LlamaConfig` has it; `MistralConfig` says 8. A wrong guess shows in the shape of `k_proj`.
        let n_kv_heads = keys.size("num_key_value_heads")?.unwrap_or(n_heads);
        if !n_heads.is_multiple_of(n_kv_heads) {
            return Err(keys.wrong("num_key_value_heads", &format!("it must divide the {n_heads} of num_attention_heads")));
        }
        let head_dim = match keys.size("head_dim")? {
            Some(head_dim) => head_dim,
            None if kind == Kind::Qwen3 => 128,
            None if hidden_size.is_multiple_of(n_heads) => hidden_size / n_heads,
            None => return Err(keys.wrong("hidden_size", &format!("without head_dim, {n_heads} heads must divide it"))),
        };
        if !head_dim.is_multiple_of(2) {
            return Err(Error::config(path, format!("head_dim is {head_dim}; rotary positions need an even one")));
        }
        let (rope_theta, rope_scaling) = rope::read(&keys)?;
        if let Some(problem) = rope_scaling.as_ref().and_then(|scaling| scaling.problem(head_dim)) {
            return Err(Error::config(path, format!("rotary scaling: {problem}")));
        }
        let n_layers = keys.required_size("num_hidden_layers")?;
        let config = Self {
            vocab_size: keys.required_size("vocab_size")?,
            hidden_size,
            intermediate_size: keys.required_size("intermediate_size")?,
            n_layers,
            n_heads,
            n_kv_heads,
            head_dim,
            rms_norm_eps: keys.positive("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            max_position_embeddings: keys.required_size("max_position_embeddings")?,
            sliding_window: match kind {
                Kind::Mistral => window::of_mistral(&keys)?,
                Kind::Llama => None,
                Kind::Qwen2 | Kind::Qwen3 => window::of_qwen(&keys, n_layers)?,
            },
            tie_word_embeddings: keys.flag("tie_word_embeddings")?,
            qkv_bias: kind == Kind::Qwen2,
            qk_norm: kind == Kind::Qwen3,
        };
        config.check_bytes(path)?;
        Ok(config)
    }

    /// Refuses sizes, which `path` gave, whose products can't be counted.
    pub(crate) fn check_bytes(&self, path: &Path) -> Result<()> {
        let bytes = self.f32_bytes();
        if bytes > isize::MAX as u128 {
            return Err(Error::config(path, format!("the sizes multiply to a model of {bytes} bytes, which no memory can hold")));
        }
        Ok(())
    }

    /// Elements of all query heads: the rows of `q_proj`.
    pub(crate) fn q_dim(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Elements of all key-value heads: the rows of `k_proj` and `v_proj`.
    pub(crate) fn kv_dim(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// The weights that a layer of this model has and others lack, by name: vectors of so many elements.
    pub(crate) fn optional_weights(&self) -> Vec<(&'static str, usize)> {
        let (q, kv, head) = (self.q_dim(), self.kv_dim(), self.head_dim);
        let biases = [("self_attn.q_proj.bias", q), ("self_attn.k_proj.bias", kv), ("self_attn.v_proj.bias", kv)];
        let norms = [("self_attn.q_norm.weight", head), ("self_attn.k_norm.weight", head)];
        biases.into_iter().filter(|_| self.qkv_bias).chain(norms.into_iter().filter(|_| self.qk_norm)).collect()
    }

    /// Weights of a decoder layer, of which every layer has as many.
    pub(crate) fn layer_elements(&self) -> u128 {
        // Sizes have 32 bits, so this stays below 2^99.
        let [hidden, channels, heads, kv_heads, head_dim] =
            [self.hidden_size, self.intermediate_size, self.n_heads, self.n_kv_heads, self.head_dim].map(|size| size as u128);
        let optional: u128 = self.optional_weights().iter().map(|&(_, elements)| elements as u128).sum();
        2 * hidden * head_dim * (heads + kv_heads) + 3 * hidden * channels + 2 * hidden + optional
    }

    /// Weights of the head and of the norm before it.
    pub(crate) fn head_elements(&self) -> u128 {
        (self.vocab_size as u128 + 1) * self.hidden_size as u128
    }

    /// Bytes of the weights as f32, the widest type that they can have. Every product that a loader makes is part of it.
    fn f32_bytes(&self) -> u128 {
        let embedding = self.vocab_size as u128 * self.hidden_size as u128;
        // Only the number of layers can take it past 128 bits.
        self.layer_elements().saturating_mul(self.n_layers as u128).saturating_add(embedding + self.head_elements()).saturating_mul(4)
    }
}

fn unsupported(what: &'static str, found: impl Into<String>, supported: &'static str) -> Error {
    Error::Unsupported { what, found: found.into(), supported }
}

/// What would change the result and isn't computed here.
fn refuse_unsupported(keys: &Keys) -> Result<()> {
    match keys.text("hidden_act")? {
        None | Some("silu") => {}
        Some(other) => return Err(unsupported("hidden_act", other, "\"silu\"")),
    }
    for bias in ["attention_bias", "mlp_bias"] {
        if keys.flag(bias)? {
            return Err(unsupported(bias, "true", "linear layers without biases"));
        }
    }
    if let Some(value) = keys.get("quantization_config") {
        let named = value.get("quant_method").and_then(Value::as_str);
        return Err(unsupported("quantization_config", named.map_or_else(|| keys::shown(value), Into::into), "F32, F16 and BF16 weights"));
    }
    Ok(())
}
