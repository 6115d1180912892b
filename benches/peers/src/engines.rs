//! Those who run the model.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::quantized::gguf_file;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{mistral, quantized_llama};
use torchless::{Config, InferenceState, KvType, ParallelConfig, Parameters, QuantFormat, TensorParallelMistral};

use crate::{Format, Work};

pub trait Engine {
    fn name(&self) -> &'static str;

    /// Does `work` from an empty cache and says how long it took.
    fn seconds(&mut self, work: Work) -> Result<f64>;

    /// What has to be done once before `work` is measured.
    fn warm_up(&mut self, work: Work) -> Result<()> {
        self.seconds(work).map(drop)
    }
}

/// Some tokens of the vocabulary; which, doesn't matter to the time.
fn tokens(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| 3 + i * 7919 % 31_991).collect()
}

/// torchless' fast forms, with an f16 cache.
pub struct Torchless {
    model: TensorParallelMistral,
    state: InferenceState,
}

impl Torchless {
    /// Quantised weights are made of the bf16 ones as they are loaded.
    pub fn load(models: &Path, format: Format, threads: usize, positions: usize) -> Result<Self> {
        let config = ParallelConfig::default().threads(threads).kv_positions(positions);
        let (checkpoint, config) = match format {
            Format::F32 | Format::F16 | Format::Bf16 => (format.name(), config),
            Format::Q8_0 => ("bf16", config.weights(QuantFormat::Q8_0).cache_weights()),
            Format::Q4_0 => ("bf16", config.weights(QuantFormat::Q4_0).cache_weights()),
            Format::Iq4Nl => ("bf16", config.weights(QuantFormat::Iq4Nl).cache_weights()),
        };
        let model = TensorParallelMistral::load(Parameters::load(models.join(checkpoint))?, config)?;
        let state = InferenceState::with_kv(model.config(), KvType::F16);
        Ok(Self { model, state })
    }

    pub fn config(&self) -> &Config {
        self.model.config()
    }
}

impl Engine for Torchless {
    fn name(&self) -> &'static str {
        "torchless"
    }

    fn seconds(&mut self, work: Work) -> Result<f64> {
        let tokens = tokens(work.tokens());
        self.state.reset();
        let start = Instant::now();
        match work {
            Work::Prefill(_) => self.model.fast_prefill(&mut self.state, &tokens)?,
            Work::Decode(_) => tokens.iter().try_for_each(|&token| self.model.try_fast_forward(&mut self.state, token, false))?,
        }
        Ok(start.elapsed().as_secs_f64())
    }
}

/// A process of llama.cpp's own bench for every measurement: it maps the file, warms up, and then looks at its own clock.
pub struct LlamaBench {
    program: PathBuf,
    file: PathBuf,
    threads: usize,
}

impl LlamaBench {
    pub fn new(program: &Path, models: &Path, format: Format, threads: usize) -> Self {
        Self { program: program.into(), file: gguf(models, format), threads }
    }
}

fn gguf(models: &Path, format: Format) -> PathBuf {
    models.join(format.name()).with_extension("gguf")
}

impl Engine for LlamaBench {
    fn name(&self) -> &'static str {
        "llama.cpp"
    }

    fn seconds(&mut self, work: Work) -> Result<f64> {
        let (prompt, decode) = match work {
            Work::Prefill(tokens) => (tokens, 0),
            Work::Decode(tokens) => (0, tokens),
        };
        let mut command = Command::new(&self.program);
        command.arg("-m").arg(&self.file).args(["-r", "1", "-o", "json", "-ngl", "0"]);
        for (option, value) in [("-t", self.threads), ("-p", prompt), ("-n", decode)] {
            command.args([option, &value.to_string()]);
        }
        let output = command.output().with_context(|| format!("start {}", self.program.display()))?;
        ensure!(output.status.success(), "{}: {}", self.program.display(), String::from_utf8_lossy(&output.stderr));
        let document: serde_json::Value = serde_json::from_slice(&output.stdout).context("read what llama-bench printed")?;
        let nanoseconds = document[0]["avg_ns"].as_f64().context("llama-bench printed no avg_ns")?;
        Ok(nanoseconds / 1e9)
    }

    fn warm_up(&mut self, _: Work) -> Result<()> {
        Ok(())
    }
}

/// candle in this process: its Mistral for floats, its quantised Llama (the same layer) for GGUF. Its cache is of the activations' type.
pub enum Candle {
    Floats(mistral::Model),
    Quantised(quantized_llama::ModelWeights),
}

impl Candle {
    /// `None` if candle's CPU doesn't multiply the format.
    pub fn load(models: &Path, format: Format) -> Result<Option<Self>> {
        let dtype = match format {
            Format::F32 => DType::F32,
            Format::F16 => DType::F16,
            Format::Q8_0 | Format::Q4_0 => {
                let mut file = File::open(gguf(models, format))?;
                let content = gguf_file::Content::read(&mut file)?;
                return Ok(Some(Self::Quantised(quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?)));
            }
            Format::Bf16 | Format::Iq4Nl => return Ok(None),
        };
        let checkpoint = models.join(format.name());
        let config: mistral::Config = serde_json::from_reader(File::open(checkpoint.join("config.json"))?)?;
        // SAFETY: nobody changes the model's files while it is measured.
        let weights = unsafe { VarBuilder::from_mmaped_safetensors(&[checkpoint.join("model.safetensors")], dtype, &Device::Cpu) }?;
        Ok(Some(Self::Floats(mistral::Model::new(&config, weights)?)))
    }

    fn forward(&mut self, tokens: &[u32], position: usize) -> Result<Tensor> {
        let tokens = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
        Ok(match self {
            Self::Floats(model) => model.forward(&tokens, position)?,
            Self::Quantised(model) => model.forward(&tokens, position)?,
        })
    }
}

impl Engine for Candle {
    fn name(&self) -> &'static str {
        "candle"
    }

    fn seconds(&mut self, work: Work) -> Result<f64> {
        match self {
            Self::Floats(model) => model.clear_kv_cache(),
            Self::Quantised(model) => model.clear_kv_cache(),
        }
        let tokens = tokens(work.tokens());
        let start = Instant::now();
        match work {
            Work::Prefill(_) => drop(self.forward(&tokens, 0)?),
            Work::Decode(_) => {
                for (position, token) in tokens.iter().enumerate() {
                    self.forward(&[*token], position)?;
                }
            }
        }
        Ok(start.elapsed().as_secs_f64())
    }
}
