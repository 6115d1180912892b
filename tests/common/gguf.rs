//! Small GGUF files, sound and not.

use std::fs;
use std::path::Path;

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// A metadata value.
#[derive(Debug, Clone)]
pub enum Item {
    U32(u32),
    I32(i32),
    U64(u64),
    F32(f32),
    Bool(bool),
    Text(Vec<u8>),
    Texts(Vec<Vec<u8>>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    /// A type and the bytes of the value.
    Raw(u32, Vec<u8>),
}

#[derive(Debug, Clone)]
pub struct Tensor {
    pub name: Vec<u8>,
    /// The length of a row first.
    pub dims: Vec<u64>,
    pub kind: u32,
    /// Where it says that it lies; where it does if `None`.
    pub offset: Option<u64>,
    pub data: Vec<u8>,
}

/// What a file says. It is sound unless made otherwise.
#[derive(Debug, Clone)]
pub struct Gguf {
    pub magic: [u8; 4],
    pub version: u32,
    /// What it claims, if not the truth.
    pub tensor_count: Option<u64>,
    pub key_count: Option<u64>,
    pub keys: Vec<(Vec<u8>, Item)>,
    pub tensors: Vec<Tensor>,
    pub alignment: u64,
}

impl Default for Gguf {
    fn default() -> Self {
        Self { magic: *b"GGUF", version: 3, tensor_count: None, key_count: None, keys: vec![], tensors: vec![], alignment: 32 }
    }
}

pub fn text(text: &str) -> Item {
    Item::Text(text.into())
}

pub fn texts(texts: &[&str]) -> Item {
    Item::Texts(texts.iter().map(|text| text.as_bytes().to_vec()).collect())
}

impl Gguf {
    /// The checkpoint in `dir`, as llama.cpp's converter would write it without changing any number.
    pub fn of_checkpoint(dir: &Path) -> Self {
        let config: Value = serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
        let size = |key: &str| config[key].as_u64().map(|n| n as u32);
        let needed = |key: &str| Item::U32(size(key).unwrap_or_else(|| panic!("{key}")));
        let number = |key: &str| config[key].as_f64().map(|x| Item::F32(x as f32));
        let heads = size("num_attention_heads").unwrap();
        let head_dim = size("head_dim").unwrap_or_else(|| size("hidden_size").unwrap() / heads);
        let mut file = Self::default();
        let architecture = config["model_type"].as_str().filter(|name| name.starts_with("qwen")).unwrap_or("llama");
        file.set("general.architecture", text(architecture));
        let key = |name: &str| format!("{architecture}.{name}");
        file.set(&key("block_count"), needed("num_hidden_layers"));
        file.set(&key("context_length"), needed("max_position_embeddings"));
        file.set(&key("embedding_length"), needed("hidden_size"));
        file.set(&key("feed_forward_length"), needed("intermediate_size"));
        file.set(&key("attention.head_count"), Item::U32(heads));
        file.set(&key("attention.head_count_kv"), needed("num_key_value_heads"));
        file.set(&key("attention.key_length"), Item::U32(head_dim));
        file.set(&key("attention.value_length"), Item::U32(head_dim));
        file.set(&key("rope.dimension_count"), Item::U32(head_dim));
        file.set(&key("rope.freq_base"), number("rope_theta").unwrap());
        file.set(&key("attention.layer_norm_rms_epsilon"), number("rms_norm_eps").unwrap());
        if let Some(window) = size("sliding_window") {
            file.set(&key("attention.sliding_window"), Item::U32(window));
        }
        file.set(&key("vocab_size"), needed("vocab_size"));
        file.set("tokenizer.ggml.bos_token_id", Item::U32(1));
        file.set("tokenizer.ggml.eos_token_id", Item::U32(2));
        let scaling = &config["rope_scaling"];
        let factor = |key: &str| scaling[key].as_f64().unwrap();
        match scaling["rope_type"].as_str() {
            None => {}
            Some("linear") => {
                file.set("llama.rope.scaling.type", text("linear"));
                file.set("llama.rope.scaling.factor", Item::F32(factor("factor") as f32));
            }
            Some("llama3") => {
                let theta = config["rope_theta"].as_f64().unwrap();
                let divisor = |i| llama3_divisor(theta.powf(-2.0 * f64::from(i) / f64::from(head_dim)), factor) as f32;
                let data = (0..head_dim / 2).flat_map(|i| divisor(i).to_le_bytes()).collect();
                let dims = vec![u64::from(head_dim / 2)];
                file.tensors.push(Tensor { name: b"rope_freqs.weight".to_vec(), dims, kind: 0, offset: None, data });
            }
            Some(other) => panic!("{other}"),
        }
        let mut paths: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        for path in paths {
            let name = path.file_name().unwrap().to_str().unwrap();
            if name.starts_with("model") && name.ends_with(".safetensors") {
                file.add_tensors(&fs::read(&path).unwrap(), (architecture == "llama").then_some(head_dim as usize));
            }
        }
        file
    }

    /// `head_dim`: where rotary pairs become neighbours.
    fn add_tensors(&mut self, safetensors: &[u8], head_dim: Option<usize>) {
        let mut tensors = SafeTensors::deserialize(safetensors).unwrap().tensors();
        // They come in any order.
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        for (name, view) in tensors {
            let kind = match view.dtype() {
                Dtype::F32 => 0,
                Dtype::F16 => 1,
                Dtype::BF16 => 30,
                other => panic!("{other:?}"),
            };
            let bytes = view.data().len() / view.shape()[0];
            let data = match head_dim.filter(|_| name.contains("q_proj") || name.contains("k_proj")) {
                Some(head_dim) => neighbour_pairs(view.data(), bytes, head_dim),
                None => view.data().to_vec(),
            };
            let dims = view.shape().iter().rev().map(|n| *n as u64).collect();
            self.tensors.push(Tensor { name: gguf_name(&name).into(), dims, kind, offset: None, data });
        }
    }

    /// Sets a key, in its place or behind the others.
    pub fn set(&mut self, key: &str, item: Item) {
        match self.keys.iter_mut().find(|(name, _)| name == key.as_bytes()) {
            Some((_, old)) => *old = item,
            None => self.keys.push((key.into(), item)),
        }
    }

    pub fn remove(&mut self, key: &str) {
        let before = self.keys.len();
        self.keys.retain(|(name, _)| name != key.as_bytes());
        assert_eq!(self.keys.len() + 1, before, "{key}");
    }

    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name.as_bytes()).unwrap_or_else(|| panic!("{name}"))
    }

    /// The bytes before the padding in front of the data.
    pub fn header(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.key_count.unwrap_or(self.keys.len() as u64).to_le_bytes());
        for (key, item) in &self.keys {
            string(&mut out, key);
            write_item(&mut out, item);
        }
        let mut at = 0;
        for tensor in &self.tensors {
            string(&mut out, &tensor.name);
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|n| out.extend(n.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(at).to_le_bytes());
            at = (at + tensor.data.len() as u64).next_multiple_of(self.alignment);
        }
        out
    }

    /// The whole file, which ends with its last tensor.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment as usize), 0);
            out.extend(&tensor.data);
        }
        out
    }
}

/// What Llama 3.1 divides a frequency by.
fn llama3_divisor(frequency: f64, of: impl Fn(&str) -> f64) -> f64 {
    let turns = of("original_max_position_embeddings") * frequency / std::f64::consts::TAU;
    let (low, high) = (of("low_freq_factor"), of("high_freq_factor"));
    let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
    1.0 / (kept + (1.0 - kept) / of("factor"))
}

fn string(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend((bytes.len() as u64).to_le_bytes());
    out.extend(bytes);
}

fn write_item(out: &mut Vec<u8>, item: &Item) {
    let array = |out: &mut Vec<u8>, kind: u32, len: usize| {
        out.extend(9_u32.to_le_bytes());
        out.extend(kind.to_le_bytes());
        out.extend((len as u64).to_le_bytes());
    };
    let (kind, bytes) = match item {
        Item::U32(n) => (4, n.to_le_bytes().to_vec()),
        Item::I32(n) => (5, n.to_le_bytes().to_vec()),
        Item::U64(n) => (10, n.to_le_bytes().to_vec()),
        Item::F32(x) => (6, x.to_le_bytes().to_vec()),
        Item::Bool(flag) => (7, vec![u8::from(*flag)]),
        Item::Raw(kind, bytes) => (*kind, bytes.clone()),
        Item::Text(bytes) => {
            out.extend(8_u32.to_le_bytes());
            return string(out, bytes);
        }
        Item::Texts(all) => {
            array(out, 8, all.len());
            return all.iter().for_each(|bytes| string(out, bytes));
        }
        Item::I32s(all) => {
            array(out, 5, all.len());
            return all.iter().for_each(|n| out.extend(n.to_le_bytes()));
        }
        Item::F32s(all) => {
            array(out, 6, all.len());
            return all.iter().for_each(|x| out.extend(x.to_le_bytes()));
        }
    };
    out.extend(u32::to_le_bytes(kind));
    out.extend(bytes);
}

/// Rows of heads, with elements i and i + head_dim / 2 of each side by side.
fn neighbour_pairs(rows: &[u8], row: usize, head_dim: usize) -> Vec<u8> {
    let row_of = |head: usize, i: usize| &rows[(head * head_dim + i) * row..][..row];
    let heads = rows.len() / row / head_dim;
    let pair = |head: usize, i: usize| [row_of(head, i), row_of(head, i + head_dim / 2)].concat();
    (0..heads).flat_map(|head| (0..head_dim / 2).flat_map(move |i| pair(head, i))).collect()
}

pub fn gguf_name(name: &str) -> String {
    let renamed = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
    ];
    renamed.iter().fold(name.to_owned(), |name, (theirs, ours)| name.replace(theirs, ours))
}
