//! `torchless generate`: text behind a prompt, as it comes.

use std::time::Instant;

use serde_json::json;
use torchless::{Error, FinishReason, GenerateOptions, Parameters, Sampler, SamplerOptions, Token};

use super::grid::{GridArgs, RunArgs};
use super::output::{print, print_json};
use super::{Outcome, note};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    grid: GridArgs,
    #[command(flatten)]
    run: RunArgs,

    /// The text to continue
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: String,

    /// Print the prompt in front
    #[arg(long)]
    echo: bool,

    /// Tokens at most
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,

    /// How freely tokens are drawn; 0 always takes the likeliest
    #[arg(long, value_name = "T", default_value_t = 0.8, allow_negative_numbers = true)]
    temperature: f32,

    /// Draw from the K likeliest tokens only; 0 for all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,

    /// Draw only from the likeliest tokens that together reach this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f32,

    /// Leave out tokens less than this many times as likely as the likeliest
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true)]
    min_p: f32,

    /// Make tokens that are there already less likely; 1 for none
    #[arg(long, value_name = "R", default_value_t = 1.0, allow_negative_numbers = true)]
    repetition_penalty: f32,

    /// Repeat an earlier run's draws; by default a new seed, which is printed to stderr
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// End before this text; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,

    /// Draft up to K tokens from what followed the same tokens earlier, and compute them in one launch; 7 without a number, 0 for none.
    /// Pays where a text says things again. With --exact the text is the same
    #[arg(long, value_name = "K", num_args = 0..=1, default_value = "0", default_missing_value = "7", value_parser = clap::value_parser!(u8).range(0..=32))]
    speculate: u8,
}

impl Args {
    fn sampling(&self) -> SamplerOptions {
        SamplerOptions {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
        }
    }
}

pub fn run(args: &Args) -> Outcome {
    // Made here, so that it can be told.
    let seed = Sampler::new(args.sampling())?.seed();
    let is_greedy = args.temperature == 0.0;
    let params = Parameters::load(args.grid.model.path()?)?;
    if args.prompt.is_empty() {
        return Err(Error::EmptyPrompt.into());
    }
    let prompt = params.tokenizer()?.encode(&args.prompt)?;
    let config = args.grid.config(&params, prompt.len().saturating_add(args.max_tokens));
    let loaded = args.grid.load(&args.run, &params, config)?;

    let fast = args.run.is_fast(true);
    let sampling = SamplerOptions { seed: Some(seed), ..args.sampling() };
    let options =
        GenerateOptions { max_tokens: args.max_tokens, sampling, stop: args.stop.clone(), fast, speculate: usize::from(args.speculate) };
    let mut text = String::new();
    let mut show = |part: &str| {
        text += part;
        if args.grid.json { Ok(()) } else { print(part) }
    };
    if args.echo {
        show(&args.prompt)?;
    }
    // With the first token, so that a failure before it is one sentence.
    let mut untold = args.seed.is_none() && !is_greedy && !args.grid.json;
    let start = Instant::now();
    let (tokens, counts) = args.run.run(&loaded, fast, |state| {
        let mut generation = torchless::generate(&loaded.model, state, &prompt, options);
        let tokens = generation
            .by_ref()
            .map(|token| {
                let token = token?;
                if std::mem::take(&mut untold) {
                    note(format_args!("seed {seed}"));
                }
                show(&token.text)?;
                Ok(token)
            })
            .collect::<Outcome<Vec<Token>>>()?;
        Ok((tokens, generation.counts()))
    })?;
    let seconds = start.elapsed().as_secs_f64();
    let finish = tokens.last().and_then(|token| token.finish).unwrap_or(FinishReason::Length);
    if args.grid.json {
        return print_json(&json!({
            "text": text,
            "prompt_ids": prompt,
            "ids": tokens.iter().map(|token| token.id).collect::<Vec<_>>(),
            "finish": finish.to_string(),
            "seed": (!is_greedy).then_some(seed),
            "seconds": seconds,
            "launches": counts.launches,
            "drafted": counts.drafted,
            "accepted": counts.accepted,
        }));
    }
    print("\n")?;
    if finish == FinishReason::Context {
        note("the text ends because the context is full");
    }
    Ok(())
}
