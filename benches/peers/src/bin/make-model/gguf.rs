//! [`Writer`]: a GGUF file from front to back, as <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md> describes it.

use std::fs::File;
use std::io::{BufWriter, Write};

use anyhow::Result;

use crate::Dtype;
use crate::shape::{NORM_EPSILON, ROPE_THETA, Shape, Tensor};

const VERSION: u32 = 3;
/// Of the data's start and of each tensor in it, in bytes; the format's default.
const ALIGNMENT: usize = 32;

/// Types of metadata.
const UINT32: u32 = 4;
const FLOAT32: u32 = 6;
const STRING: u32 = 8;

/// ggml's number of a type of tensor.
fn ggml_type(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::Bf16 => 30,
    }
}

/// Norms are f32 in every GGUF file.
fn dtype_of(tensor: &Tensor, dtype: Dtype) -> Dtype {
    if tensor.is_vector() { Dtype::F32 } else { dtype }
}

pub struct Writer {
    file: BufWriter<File>,
    dtype: Dtype,
    /// Of the tensor that is being written.
    current: Dtype,
    /// Bytes so far.
    position: usize,
}

impl Writer {
    /// Writes all that is in front of the tensors' data.
    pub fn new(mut file: BufWriter<File>, dtype: Dtype, shape: &Shape) -> Result<Self> {
        let head = head(dtype, shape);
        file.write_all(&head)?;
        Ok(Self { file, dtype, current: dtype, position: head.len() })
    }

    /// Goes to where the next tensor starts.
    pub fn begin(&mut self, tensor: &Tensor) -> Result<()> {
        self.current = dtype_of(tensor, self.dtype);
        let padding = self.position.next_multiple_of(ALIGNMENT) - self.position;
        self.file.write_all(&[0; ALIGNMENT][..padding])?;
        self.position += padding;
        Ok(())
    }

    /// Writes a row of the tensor.
    pub fn row(&mut self, values: &[f32]) -> Result<()> {
        self.current.write(values, &mut self.file)?;
        self.position += values.len() * self.current.size();
        Ok(())
    }

    pub fn finish(mut self) -> Result<()> {
        Ok(self.file.flush()?)
    }
}

/// The header, the metadata and the tensors' descriptions.
fn head(dtype: Dtype, shape: &Shape) -> Vec<u8> {
    let numbers = [
        ("llama.block_count", shape.layers),
        ("llama.context_length", shape.positions),
        ("llama.embedding_length", shape.hidden),
        ("llama.feed_forward_length", shape.intermediate),
        ("llama.attention.head_count", shape.heads),
        ("llama.attention.head_count_kv", shape.kv_heads),
        ("llama.rope.dimension_count", shape.head_dim()),
        ("llama.vocab_size", shape.vocab),
    ];
    let reals = [("llama.attention.layer_norm_rms_epsilon", NORM_EPSILON), ("llama.rope.freq_base", ROPE_THETA)];
    // llama.cpp runs a model without a tokenizer if it is told that there is none.
    let texts = [("general.architecture", "llama"), ("tokenizer.ggml.model", "no_vocab")];
    let tensors = shape.tensors();

    let mut head = b"GGUF".to_vec();
    head.extend(VERSION.to_le_bytes());
    head.extend((tensors.len() as u64).to_le_bytes());
    head.extend(((numbers.len() + reals.len() + texts.len()) as u64).to_le_bytes());
    for (key, value) in texts {
        string(&mut head, key);
        head.extend(STRING.to_le_bytes());
        string(&mut head, value);
    }
    for (key, value) in numbers {
        string(&mut head, key);
        head.extend(UINT32.to_le_bytes());
        head.extend((value as u32).to_le_bytes());
    }
    for (key, value) in reals {
        string(&mut head, key);
        head.extend(FLOAT32.to_le_bytes());
        head.extend((value as f32).to_le_bytes());
    }

    let mut offset = 0_usize;
    for tensor in tensors {
        let dtype = dtype_of(&tensor, dtype);
        // The fastest-running size first.
        let sizes = if tensor.is_vector() { vec![tensor.columns] } else { vec![tensor.columns, tensor.rows] };
        string(&mut head, &tensor.gguf_name);
        head.extend((sizes.len() as u32).to_le_bytes());
        sizes.iter().for_each(|&size| head.extend((size as u64).to_le_bytes()));
        head.extend(ggml_type(dtype).to_le_bytes());
        head.extend((offset as u64).to_le_bytes());
        offset = (offset + tensor.elements() * dtype.size()).next_multiple_of(ALIGNMENT);
    }
    head.resize(head.len().next_multiple_of(ALIGNMENT), 0);
    head
}

/// Its length, and then its bytes.
fn string(head: &mut Vec<u8>, text: &str) {
    head.extend((text.len() as u64).to_le_bytes());
    head.extend(text.as_bytes());
}
