//! [`Shape`]: the sizes of the model and the names of its tensors.

use serde_json::{Value, json};

pub const NORM_EPSILON: f64 = 1e-5;
pub const ROPE_THETA: f64 = 10000.0;

/// A Mistral model. The default has 1.0 billion parameters.
pub struct Shape {
    pub vocab: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub positions: usize,
}

/// A matrix, or a norm's vector, which is a matrix of one row.
pub struct Tensor {
    /// As a checkpoint of Hugging Face has it.
    pub name: String,
    pub gguf_name: String,
    pub rows: usize,
    pub columns: usize,
}

impl Tensor {
    pub fn is_vector(&self) -> bool {
        self.rows == 1
    }

    pub fn elements(&self) -> usize {
        self.rows * self.columns
    }
}

impl Default for Shape {
    fn default() -> Self {
        Self { vocab: 32000, hidden: 2048, intermediate: 7168, layers: 16, heads: 32, kv_heads: 8, positions: 32768 }
    }
}

impl Shape {
    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }

    /// `config.json`.
    pub fn config(&self) -> Value {
        json!({
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim(),
            "hidden_act": "silu",
            "rms_norm_eps": NORM_EPSILON,
            "rope_theta": ROPE_THETA,
            "max_position_embeddings": self.positions,
            "sliding_window": null,
            "tie_word_embeddings": false,
            "bos_token_id": 1,
            "eos_token_id": 2,
        })
    }

    /// All tensors, in the order of the files.
    pub fn tensors(&self) -> Vec<Tensor> {
        let (hidden, kv) = (self.hidden, self.kv_heads * self.head_dim());
        let tensor = |name: &str, gguf: &str, rows, columns| Tensor {
            name: format!("{name}.weight"),
            gguf_name: format!("{gguf}.weight"),
            rows,
            columns,
        };
        let mut tensors = vec![tensor("model.embed_tokens", "token_embd", self.vocab, hidden)];
        for layer in 0..self.layers {
            for (name, gguf, rows, columns) in [
                ("input_layernorm", "attn_norm", 1, hidden),
                ("self_attn.q_proj", "attn_q", hidden, hidden),
                ("self_attn.k_proj", "attn_k", kv, hidden),
                ("self_attn.v_proj", "attn_v", kv, hidden),
                ("self_attn.o_proj", "attn_output", hidden, hidden),
                ("post_attention_layernorm", "ffn_norm", 1, hidden),
                ("mlp.gate_proj", "ffn_gate", self.intermediate, hidden),
                ("mlp.up_proj", "ffn_up", self.intermediate, hidden),
                ("mlp.down_proj", "ffn_down", hidden, self.intermediate),
            ] {
                tensors.push(tensor(&format!("model.layers.{layer}.{name}"), &format!("blk.{layer}.{gguf}"), rows, columns));
            }
        }
        tensors.push(tensor("model.norm", "output_norm", 1, hidden));
        tensors.push(tensor("lm_head", "output", self.vocab, hidden));
        tensors
    }
}
