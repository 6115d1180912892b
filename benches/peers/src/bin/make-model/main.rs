//! Writes a model of random weights in several formats: `make-model DIR --dtypes f32,f16,bf16`.
//!
//! For each dtype it makes `DIR/<dtype>`, a checkpoint as Hugging Face lays it out, and `DIR/<dtype>.gguf` with the same weights, which
//! `llama-quantize` turns into the quantised formats. The rows of Q and K are in the same order in both, though GGUF wants them permuted:
//! that matters to what a model says, and not to how fast it says it.

mod gguf;
mod shape;

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use half::{bf16, f16};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::{Map, json};
use shape::Shape;

/// Writes a model of random weights, as checkpoints of safetensors and as GGUF.
#[derive(Parser)]
struct Arguments {
    /// Where the checkpoints and files go.
    dir: PathBuf,
    /// How the weights are stored.
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["f32", "f16", "bf16"])]
    dtypes: Vec<Dtype>,
    /// Decoder layers; 16 make 1.0 billion parameters.
    #[arg(long, default_value_t = 16)]
    layers: usize,
    /// Equal seeds give equal weights, up to the rounding of the dtype.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Dtype {
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    fn size(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    fn write(self, values: &[f32], to: &mut impl Write) -> std::io::Result<()> {
        for &value in values {
            match self {
                Self::F32 => to.write_all(&value.to_le_bytes())?,
                Self::F16 => to.write_all(&f16::from_f32(value).to_le_bytes())?,
                Self::Bf16 => to.write_all(&bf16::from_f32(value).to_le_bytes())?,
            }
        }
        Ok(())
    }
}

/// The two files of a dtype, written from front to back.
struct Files {
    dtype: Dtype,
    safetensors: BufWriter<File>,
    gguf: gguf::Writer,
}

impl Files {
    fn create(dir: &Path, dtype: Dtype, shape: &Shape) -> Result<Self> {
        let checkpoint = dir.join(dtype.name());
        fs::create_dir_all(&checkpoint).with_context(|| format!("create {}", checkpoint.display()))?;
        fs::write(checkpoint.join("config.json"), serde_json::to_string_pretty(&shape.config())?)?;
        let mut safetensors = create(&checkpoint.join("model.safetensors"))?;
        safetensors.write_all(&safetensors_header(dtype, shape))?;
        let gguf = gguf::Writer::new(create(&dir.join(dtype.name()).with_extension("gguf"))?, dtype, shape)?;
        Ok(Self { dtype, safetensors, gguf })
    }

    fn finish(mut self) -> Result<()> {
        self.safetensors.flush()?;
        self.gguf.finish()
    }
}

fn create(path: &Path) -> Result<BufWriter<File>> {
    let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
    Ok(BufWriter::with_capacity(1 << 20, file))
}

/// The length and the JSON, padded with spaces to a multiple of 8 bytes: <https://github.com/huggingface/safetensors#format>.
fn safetensors_header(dtype: Dtype, shape: &Shape) -> Vec<u8> {
    let (mut entries, mut offset) = (Map::new(), 0);
    for tensor in shape.tensors() {
        let end = offset + tensor.elements() * dtype.size();
        let sizes = if tensor.is_vector() { vec![tensor.columns] } else { vec![tensor.rows, tensor.columns] };
        let entry = json!({"dtype": dtype.name().to_uppercase(), "shape": sizes, "data_offsets": [offset, end]});
        entries.insert(tensor.name, entry);
        offset = end;
    }
    let mut json = json!(entries).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    [&(json.len() as u64).to_le_bytes()[..], &json].concat()
}

/// Normal values of mean 0 and deviation 0.02, by Box and Muller's method: every matrix then keeps the size of what it is applied to.
fn random_row(random: &mut ChaCha8Rng, row: &mut [f32]) {
    for pair in row.chunks_mut(2) {
        // In (0, 1], because the logarithm of 0 is infinite.
        let uniform = (f64::from(random.next_u32()) + 1.0) / (f64::from(u32::MAX) + 1.0);
        let radius = 0.02 * (-2.0 * uniform.ln()).sqrt() as f32;
        let angle = std::f32::consts::TAU * (random.next_u32() as f32 / u32::MAX as f32);
        let (sin, cos) = angle.sin_cos();
        pair.iter_mut().zip([cos, sin]).for_each(|(value, part)| *value = radius * part);
    }
}

fn main() -> Result<()> {
    let Arguments { dir, dtypes, layers, seed } = Arguments::parse();
    let shape = Shape { layers, ..Shape::default() };
    let mut files = dtypes.iter().map(|&dtype| Files::create(&dir, dtype, &shape)).collect::<Result<Vec<_>>>()?;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    for tensor in shape.tensors() {
        let mut row = vec![1.0; tensor.columns];
        for file in &mut files {
            file.gguf.begin(&tensor)?;
        }
        for _ in 0..tensor.rows {
            if !tensor.is_vector() {
                random_row(&mut random, &mut row);
            }
            for file in &mut files {
                file.dtype.write(&row, &mut file.safetensors)?;
                file.gguf.row(&row)?;
            }
        }
    }
    files.into_iter().try_for_each(Files::finish)
}
