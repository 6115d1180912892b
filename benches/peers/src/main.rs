//! torchless beside llama.cpp and candle: prefill and decode of one model, in turn within each round, beside a loop that only reads memory.
//! How to make the model and run it: `benches/README.md`.

mod engines;
mod read;
mod report;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use engines::{Candle, Engine, LlamaBench, Torchless};
use read::Memory;
use report::Rounds;
use torchless::Config;

/// Compares torchless with llama.cpp and candle on the CPU.
#[derive(Parser)]
struct Arguments {
    /// What `make-model` and `llama-quantize` made: `<dtype>/` and `<format>.gguf`.
    #[arg(long)]
    models: PathBuf,
    /// llama.cpp's bench; without it llama.cpp is left out.
    #[arg(long)]
    llama_bench: Option<PathBuf>,
    /// Formats of the weights.
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["f32", "f16", "bf16", "q8_0", "q4_0"])]
    formats: Vec<Format>,
    /// Threads of each engine and of the reading loop.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// How often each engine is measured.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Tokens of the prompt; 0 leaves prefill out.
    #[arg(long, default_value_t = 128)]
    prompt: usize,
    /// Tokens decoded one by one from an empty cache; 0 leaves decode out.
    #[arg(long, default_value_t = 32)]
    decode: usize,
    /// Leaves candle out: it needs memory and time to load.
    #[arg(long)]
    no_candle: bool,
    /// Prints a document with the seconds of every round for each format, instead of the table.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    F32,
    F16,
    Bf16,
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_0")]
    Q4_0,
    #[value(name = "iq4_nl")]
    Iq4Nl,
}

impl Format {
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Iq4Nl => "iq4_nl",
        }
    }

    /// Bits of a weight; of the quantised formats with the f16 scale of its block of 32.
    fn bits(self) -> f64 {
        match self {
            Self::F32 => 32.0,
            Self::F16 | Self::Bf16 => 16.0,
            Self::Q8_0 => 8.5,
            Self::Q4_0 | Self::Iq4Nl => 4.5,
        }
    }
}

/// What an engine does from an empty cache.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// A prompt of so many tokens at once, until the logits of the last are there.
    Prefill(usize),
    /// So many tokens one by one, each with its logits.
    Decode(usize),
}

impl Work {
    pub fn tokens(self) -> usize {
        let (Self::Prefill(tokens) | Self::Decode(tokens)) = self;
        tokens
    }
}

/// Bytes of the weights that a decoded token needs: those of all layers and of the head.
fn bytes_of_a_token(config: &Config, format: Format) -> f64 {
    let (q, kv) = (config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim);
    let layer = config.hidden_size * (2 * q + 2 * kv + 3 * config.intermediate_size);
    let weights = config.n_layers * layer + config.vocab_size * config.hidden_size;
    weights as f64 * format.bits() / 8.0
}

fn measure(arguments: &Arguments, format: Format, memory: &Memory) -> Result<Rounds> {
    let Arguments { models, threads, .. } = arguments;
    let works = [Work::Prefill(arguments.prompt), Work::Decode(arguments.decode)].into_iter().filter(|work| work.tokens() > 0);
    let torchless = Torchless::load(models, format, *threads, arguments.prompt.max(arguments.decode))?;
    let bytes_of_a_token = bytes_of_a_token(torchless.config(), format);
    let mut engines: Vec<Box<dyn Engine>> = vec![Box::new(torchless)];
    if let Some(path) = &arguments.llama_bench {
        engines.push(Box::new(LlamaBench::new(path, models, format, *threads)));
    }
    if let Some(candle) = (!arguments.no_candle).then(|| Candle::load(models, format)).transpose()?.flatten() {
        engines.push(Box::new(candle));
    }
    // Every engine once unmeasured: pages are mapped, and buffers have their sizes. llama-bench does that by itself.
    for work in works.clone() {
        engines.iter_mut().try_for_each(|engine| engine.warm_up(work))?;
    }

    let names = engines.iter().map(|engine| engine.name()).collect();
    let mut rounds = Rounds::new(format, *threads, names, bytes_of_a_token);
    for round in 0..arguments.rounds {
        for work in works.clone() {
            let before = memory.read(*threads);
            let mut seconds = vec![0.0; engines.len()];
            // Nobody is always the first.
            for turn in 0..engines.len() {
                let engine = (round + turn) % engines.len();
                seconds[engine] = engines[engine].seconds(work)?;
            }
            let read = (before + memory.read(*threads)) / 2.0;
            rounds.add(work, read, seconds);
        }
    }
    Ok(rounds)
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(arguments.threads > 0 && arguments.rounds > 0, "at least one thread and one round are needed");
    // SAFETY: no other thread has been started. candle takes the number of its threads from here.
    unsafe { std::env::set_var("RAYON_NUM_THREADS", arguments.threads.to_string()) };
    let memory = Memory::new();
    if !arguments.json {
        println!("{}", report::HEAD);
    }
    for &format in &arguments.formats {
        let rounds =
            measure(&arguments, format, &memory).with_context(|| format!("{} with {} threads", format.name(), arguments.threads))?;
        if arguments.json { println!("{}", rounds.json()) } else { print!("{}", rounds.table()) }
    }
    Ok(())
}
