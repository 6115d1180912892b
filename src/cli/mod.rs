//! The command: a thin face over the library. Each verb is a file of its own.

mod bench;
mod chat;
mod devices;
mod files;
mod generate;
mod grid;
mod logits;
mod model;
mod output;
mod perplexity;
mod plan;
mod sampling;
mod timeline;
mod tokenize;
mod tune;

use std::fmt::Display;
use std::io::{self, Write};
use std::panic;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Mistral-family language models, split over whatever devices you have.
#[derive(Parser)]
#[command(name = "torchless", version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// List the CPU and every GPU
    Devices(devices::Args),
    /// Show how a model would be split, without loading it
    Plan(plan::Args),
    /// Continue a text
    Generate(generate::Args),
    /// Talk with a model
    Chat(chat::Args),
    /// Write the logits of every position of a sequence to a file
    Logits(logits::Args),
    /// Measure how well a model foretells a text
    Perplexity(perplexity::Args),
    /// Turn text into tokens, or tokens into text
    Tokenize(tokenize::Args),
    /// Measure how fast a model runs
    Bench(bench::Args),
    /// Measure every variant of a GPU's matrix-vector kernel
    Tune(tune::Args),
    /// Draw a recorded trace: what each rank did for which micro-batch when
    Timeline(timeline::Args),
}

/// Why a verb ended early.
enum Failure {
    /// It was asked for what makes no sense: status 2.
    Usage(String),
    /// It could not be done: status 1.
    Failed(String),
    /// Nobody reads standard output any more: no reason to complain.
    NoReader,
}

type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    /// `what` went wrong by `why`.
    fn because(what: impl Display, why: impl Display) -> Self {
        Self::Failed(format!("{what}: {why}"))
    }
}

impl From<torchless::Error> for Failure {
    fn from(error: torchless::Error) -> Self {
        match error {
            torchless::Error::Option { .. } => Self::Usage(error.to_string()),
            _ => Self::Failed(error.to_string()),
        }
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    // Where there is no desktop, Mesa's layer that picks a default device complains on stderr. We ask for all of them.
    // SAFETY: this is the only thread so far.
    unsafe { std::env::set_var("NODEVICE_SELECT", "1") };
    // A panic is a fault of ours: reported as a sentence below, and in full where somebody looks for it.
    if std::env::var_os("RUST_BACKTRACE").is_none() {
        panic::set_hook(Box::new(|_| {}));
    }
    let outcome = panic::catch_unwind(run).unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str).or_else(|| payload.downcast_ref().copied());
        let text = text.unwrap_or("no reason given");
        Err(Failure::because("a fault in torchless itself (set RUST_BACKTRACE=1 to see where)", text))
    });
    let (status, message) = match outcome {
        Ok(()) | Err(Failure::NoReader) => return ExitCode::SUCCESS,
        Err(Failure::Failed(message)) => (1, message),
        Err(Failure::Usage(message)) => (2, message),
    };
    note(message);
    ExitCode::from(status)
}

fn run() -> Outcome {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return explain(&error),
    };
    match cli.verb {
        Verb::Devices(args) => devices::run(&args),
        Verb::Plan(args) => plan::run(&args),
        Verb::Generate(args) => generate::run(&args),
        Verb::Chat(args) => chat::run(&args),
        Verb::Logits(args) => logits::run(&args),
        Verb::Perplexity(args) => perplexity::run(&args),
        Verb::Tokenize(args) => tokenize::run(&args),
        Verb::Bench(args) => bench::run(&args),
        Verb::Tune(args) => tune::run(&args),
        Verb::Timeline(args) => timeline::run(&args),
    }
}

/// Prints help that was asked for, and makes one sentence of everything else that clap says.
fn explain(error: &clap::Error) -> Outcome {
    let text = error.to_string();
    if !error.use_stderr() {
        return output::print(&text);
    }
    let sentence = text.lines().take_while(|line| !line.trim().is_empty()).map(str::trim).collect::<Vec<_>>().join(" ");
    let sentence = sentence
        .strip_prefix("error: ")
        .unwrap_or("which verb? devices, plan, generate, chat, logits, perplexity, tokenize, bench, tune or timeline");
    Err(Failure::Usage(format!("{sentence}; see torchless --help")))
}

/// One line on stderr.
fn note(message: impl Display) {
    let line: String = message.to_string().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    // If stderr is closed there is nobody to tell.
    let _ = writeln!(io::stderr(), "torchless: {line}");
}
