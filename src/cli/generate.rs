//! `torchless generate`: text behind a prompt, as it comes.

use std::time::Instant;

use serde_json::json;
use torchless::{Error, FinishReason, Parameters, Token};

use super::grid::{GridArgs, RunArgs};
use super::output::{print, print_json};
use super::sampling::SamplingArgs;
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

    #[command(flatten)]
    sampling: SamplingArgs,
}

pub fn run(args: &Args) -> Outcome {
    // Made here, so that it can be told.
    let seed = args.sampling.seed()?;
    let params = Parameters::load(args.grid.model.path()?)?;
    if args.prompt.is_empty() {
        return Err(Error::EmptyPrompt.into());
    }
    let prompt = params.tokenizer()?.encode(&args.prompt)?;
    let config = args.grid.config(&params, prompt.len().saturating_add(args.max_tokens));
    let loaded = args.grid.load(&args.run, &params, config)?;

    let fast = args.run.is_fast(true);
    let options = args.sampling.generate(seed, args.max_tokens, fast);
    let mut text = String::new();
    let mut show = |part: &str| {
        text += part;
        if args.grid.json { Ok(()) } else { print(part) }
    };
    if args.echo {
        show(&args.prompt)?;
    }
    // With the first token, so that a failure before it is one sentence.
    let mut untold = args.sampling.is_seed_news() && !args.grid.json;
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
            "seed": (!args.sampling.is_greedy()).then_some(seed),
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
