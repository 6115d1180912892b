//! The decoder in f64, by hand, straight from its definition: shares no code with the crate.

use std::collections::HashMap;
use std::path::Path;

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

type Rows = Vec<Vec<f64>>;

/// The weights of a checkpoint in f64, and its config.
pub struct Reference {
    config: Value,
    tensors: HashMap<String, (Vec<usize>, Vec<f64>)>,
}

impl Reference {
    pub fn open(dir: &Path) -> Self {
        let config = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
        let mut tensors = HashMap::new();
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if !(name.starts_with("model") && name.ends_with(".safetensors")) {
                continue;
            }
            let bytes = std::fs::read(&path).unwrap();
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                let half = |b: &[u8]| u16::from_le_bytes(b.try_into().unwrap());
                let values = match view.dtype() {
                    Dtype::F32 => view.data().chunks(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect(),
                    Dtype::F16 => view.data().chunks(2).map(|b| half::f16::from_bits(half(b)).to_f64()).collect(),
                    Dtype::BF16 => view.data().chunks(2).map(|b| half::bf16::from_bits(half(b)).to_f64()).collect(),
                    other => panic!("{other:?}"),
                };
                tensors.insert(name, (view.shape().to_vec(), values));
            }
        }
        Self { config, tensors }
    }

    fn size(&self, key: &str) -> usize {
        self.config[key].as_u64().unwrap_or_else(|| panic!("{key}")) as usize
    }

    fn linear(&self, x: &Rows, name: &str) -> Rows {
        let (shape, w) = &self.tensors[name];
        let bias = self.tensors.get(&name.replace(".weight", ".bias")).map(|(_, bias)| bias);
        let out = |x: &Vec<f64>, r: usize| (0..shape[1]).map(|c| w[r * shape[1] + c] * x[c]).sum::<f64>() + bias.map_or(0.0, |b| b[r]);
        x.iter().map(|x| (0..shape[0]).map(|r| out(x, r)).collect()).collect()
    }

    /// Norms every head by itself, where the model has a weight for that.
    fn norm_heads(&self, x: &mut Rows, d: usize, name: &str) {
        if self.tensors.contains_key(name) {
            for row in x {
                let heads: Rows = row.chunks(d).map(<[f64]>::to_vec).collect();
                *row = self.norm(&heads, name).concat();
            }
        }
    }

    fn norm(&self, x: &Rows, name: &str) -> Rows {
        let (eps, w) = (self.config["rms_norm_eps"].as_f64().unwrap(), &self.tensors[name].1);
        let one = |x: &Vec<f64>| {
            let scale = 1.0 / (x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64 + eps).sqrt();
            x.iter().zip(w).map(|(x, w)| x * scale * w).collect()
        };
        x.iter().map(one).collect()
    }

    fn rope(&self, x: &mut Rows, d: usize) {
        let theta = self.config["rope_theta"].as_f64().or(self.config["rope_parameters"]["rope_theta"].as_f64()).unwrap();
        for (p, row) in x.iter_mut().enumerate() {
            for head in row.chunks_mut(d) {
                for i in 0..d / 2 {
                    let angle = p as f64 * theta.powf(-2.0 * i as f64 / d as f64);
                    let (a, b) = (head[i], head[i + d / 2]);
                    head[i] = a * angle.cos() - b * angle.sin();
                    head[i + d / 2] = b * angle.cos() + a * angle.sin();
                }
            }
        }
    }

    /// The logits at every position: `[ids, vocab]`.
    pub fn logits(&self, ids: &[u32]) -> Vec<f32> {
        let (heads, kv, hidden) = (self.size("num_attention_heads"), self.size("num_key_value_heads"), self.size("hidden_size"));
        let d = self.config["head_dim"].as_u64().map_or(hidden / heads, |d| d as usize);
        let window = self.config["sliding_window"].as_u64().map_or(usize::MAX, |w| w as usize);
        let embedding = &self.tensors["model.embed_tokens.weight"].1;
        let mut x: Rows = ids.iter().map(|&t| embedding[t as usize * hidden..][..hidden].to_vec()).collect();
        let add = |x: &mut Rows, y: Rows| x.iter_mut().flatten().zip(y.into_iter().flatten()).for_each(|(x, y)| *x += y);
        for layer in 0..self.size("num_hidden_layers") {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            let h = self.norm(&x, &name("input_layernorm"));
            let mut q = self.linear(&h, &name("self_attn.q_proj"));
            let mut k = self.linear(&h, &name("self_attn.k_proj"));
            let v = self.linear(&h, &name("self_attn.v_proj"));
            self.norm_heads(&mut q, d, &name("self_attn.q_norm"));
            self.norm_heads(&mut k, d, &name("self_attn.k_norm"));
            self.rope(&mut q, d);
            self.rope(&mut k, d);
            let mut mixed = vec![vec![0.0; heads * d]; ids.len()];
            for p in 0..ids.len() {
                for head in 0..heads {
                    let of = head / (heads / kv) * d;
                    let from = (p + 1).saturating_sub(window);
                    let score = |s: usize| (0..d).map(|i| q[p][head * d + i] * k[s][of + i]).sum::<f64>() / (d as f64).sqrt();
                    let scores: Vec<f64> = (from..=p).map(score).collect();
                    let max = scores.iter().copied().fold(f64::MIN, f64::max);
                    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                    let sum: f64 = weights.iter().sum();
                    for i in 0..d {
                        mixed[p][head * d + i] = (from..=p).zip(&weights).map(|(s, w)| w / sum * v[s][of + i]).sum();
                    }
                }
            }
            add(&mut x, self.linear(&mixed, &name("self_attn.o_proj")));
            let h = self.norm(&x, &name("post_attention_layernorm"));
            let gate = self.linear(&h, &name("mlp.gate_proj"));
            let up = self.linear(&h, &name("mlp.up_proj"));
            let act = |(g, u): (&f64, &f64)| g / (1.0 + (-g).exp()) * u;
            let g: Rows = gate.iter().zip(&up).map(|(g, u)| g.iter().zip(u).map(act).collect()).collect();
            add(&mut x, self.linear(&g, &name("mlp.down_proj")));
        }
        let h = self.norm(&x, "model.norm.weight");
        let head = if self.config["tie_word_embeddings"] == true { "model.embed_tokens.weight" } else { "lm_head.weight" };
        self.linear(&h, head).into_iter().flatten().map(|v| v as f32).collect()
    }
}
