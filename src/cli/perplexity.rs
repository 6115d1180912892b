//! `torchless perplexity`: how well a model foretells a text.

use std::f64::consts::LN_2;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

use indicatif::ProgressBar;
use serde_json::json;
use torchless::{Error, Parameters, Score, Tokenizer, score};

use super::grid::{GridArgs, RunArgs};
use super::output::{print, print_json, table};
use super::{Failure, Outcome, files};

/// Bytes of the text that are tokenised at once, at least: what a tokenizer needs is many times its text.
const PART: usize = 1 << 20;
/// Tokens of a window unless told otherwise, of a model that has a longer context.
const WINDOW: usize = 2048;

const DEFINITION: &str = "\
The text is tokenised without special tokens and cut into windows that follow each other and do not overlap. Each begins with what the model's \
tokenizer puts in front of every text (<s> of Mistral's), which is not scored; then all tokens of the text are, each once, behind those before it in \
its window. A tokenizer that puts nothing in front leaves each window's first token unscored. With -ln p of every scored token, nats per token is \
their mean, perplexity e to the power of it, and bits per byte their sum over ln 2 and over the file's bytes. Special tokens that the text spells \
out are taken as such where the tokenizer says so. A text above 1 MiB is tokenised in parts that end with a line.";

#[derive(clap::Args)]
#[command(after_help = DEFINITION)]
pub struct Args {
    #[command(flatten)]
    grid: GridArgs,
    #[command(flatten)]
    run: RunArgs,

    /// The text: UTF-8, at most 64 MiB, not trimmed
    #[arg(long, value_name = "FILE")]
    text: PathBuf,

    /// Tokens of a window, with those in front; by default as many as the model's context (or --context) holds, 2048 at most
    #[arg(long, value_name = "N")]
    window: Option<NonZeroUsize>,
}

/// What a text came to.
#[derive(Default)]
struct Sum {
    score: Score,
    /// Of the text, scored or not.
    tokens: usize,
    windows: usize,
}

pub fn run(args: &Args) -> Outcome {
    let name = args.text.display();
    let text = String::from_utf8(files::read(&args.text)?).map_err(|e| Failure::because(format!("{name} is not UTF-8"), e.utf8_error()))?;
    let params = Parameters::load(args.grid.model.path()?)?;
    let tokenizer = params.tokenizer()?;
    let front = front(tokenizer)?;
    let limit = args.grid.context.map_or(usize::MAX, NonZeroUsize::get).min(params.config().max_position_embeddings);
    let size = args.window.map_or(limit.min(WINDOW), NonZeroUsize::get);
    if size > limit {
        return Err(Error::ContextFull { position: 0, wanted: size, limit }.into());
    }
    let least = front.len().max(1) + 1;
    if size < least {
        return Err(Failure::Usage(format!("a window of {size} tokens scores nothing: this model needs {least}")));
    }
    let loaded = args.grid.load(&args.run, &params, args.grid.config(&params, size))?;

    let fast = args.run.is_fast(false);
    let progress = ProgressBar::new(text.len() as u64);
    let start = Instant::now();
    let sum = args.run.run(&loaded, fast, |state| {
        let mut sum = Sum::default();
        let mut window = front.clone();
        let mut add = |window: &[u32]| {
            state.reset();
            sum.score += score(&loaded.model, state, window, fast)?;
            sum.tokens += window.len() - front.len();
            sum.windows += 1;
            Ok::<_, Error>(())
        };
        for part in parts(&text, PART) {
            for token in tokenizer.encode_continuation(part)? {
                window.push(token);
                if window.len() == size {
                    add(&window)?;
                    window.truncate(front.len());
                }
            }
            progress.inc(part.len() as u64);
        }
        if window.len() > front.len() {
            add(&window)?;
        }
        Ok(sum)
    })?;
    progress.finish_and_clear();
    let seconds = start.elapsed().as_secs_f64();
    if sum.score.tokens == 0 {
        return Err(Failure::because(format!("{name} has no token to score"), format_args!("it has {} bytes", text.len())));
    }
    tell(args, &sum, text.len(), size, seconds)
}

fn tell(args: &Args, sum: &Sum, bytes: usize, window: usize, seconds: f64) -> Outcome {
    let Sum { score, tokens, windows } = sum;
    let speed = *tokens as f64 / seconds;
    // Of a text with tokens left out it would be too low.
    let bits_per_byte = (score.tokens == *tokens).then(|| score.nats / LN_2 / bytes as f64);
    if args.grid.json {
        return print_json(&json!({
            "perplexity": score.perplexity(),
            "nats_per_token": score.nats_per_token(),
            "bits_per_byte": bits_per_byte,
            "tokens_scored": score.tokens,
            "tokens": tokens,
            "bytes": bytes,
            "window": window,
            "windows": windows,
            "seconds": seconds,
            "tokens_per_s": speed,
        }));
    }
    let row = |name: &str, value: String| vec![name.to_owned(), value];
    print(&table(&[
        row("measured", "value".into()),
        row("perplexity", format!("{:.4}", score.perplexity())),
        row("nats per token", format!("{:.5}", score.nats_per_token())),
        row("bits per byte", bits_per_byte.map_or("unknown".into(), |bits| format!("{bits:.5}"))),
        row("tokens scored", format!("{} in {windows} windows of {window}", score.tokens)),
        row("speed", format!("{speed:.1} tokens/s")),
    ]))
}

/// What the tokenizer puts in front of every text.
fn front(tokenizer: &Tokenizer) -> Outcome<Vec<u32>> {
    let (whole, bare) = (tokenizer.encode("a")?, tokenizer.encode_continuation("a")?);
    Ok(whole.strip_suffix(&bare[..]).unwrap_or_default().to_vec())
}

/// Parts of a text that end with a line, each the shortest such of at least `size` bytes.
fn parts(mut text: &str, size: usize) -> impl Iterator<Item = &str> {
    std::iter::from_fn(move || {
        let from = (size - 1).min(text.len());
        let end = text.as_bytes()[from..].iter().position(|&byte| byte == b'\n').map_or(text.len(), |at| from + at + 1);
        let part;
        (part, text) = text.split_at(end);
        (!part.is_empty()).then_some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::parts;

    #[test]
    fn parts_are_the_text_and_end_with_lines() {
        let text = "one\ntwo\n\nthreé\nfour";
        for (size, wanted) in [
            (1, &["one\n", "two\n", "\n", "threé\n", "four"][..]),
            (4, &["one\n", "two\n", "\nthreé\n", "four"]),
            (9, &["one\ntwo\n\n", "threé\nfour"]),
            (99, &[text]),
        ] {
            assert_eq!(parts(text, size).collect::<Vec<_>>(), wanted, "of {size} bytes");
        }
        assert_eq!(parts("", 5).count(), 0);
    }
}
