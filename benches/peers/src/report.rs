//! [`Rounds`]: what was measured of one format, and its rows of the table.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::{Format, Work};

pub const HEAD: &str = "\
| format | threads | work | engine | tokens/s | torchless over it, p10..p90 | GB/s | of reading |
|---|---|---|---|---|---|---|---|";

/// The measurements of one format, round after round.
pub struct Rounds {
    format: Format,
    threads: usize,
    /// torchless first.
    engines: Vec<&'static str>,
    bytes_of_a_token: f64,
    rounds: Vec<Round>,
}

struct Round {
    work: Work,
    /// Bytes a second of the loop that only reads, just before and just after.
    read: f64,
    /// Of each engine.
    seconds: Vec<f64>,
}

impl Rounds {
    pub fn new(format: Format, threads: usize, engines: Vec<&'static str>, bytes_of_a_token: f64) -> Self {
        Self { format, threads, engines, bytes_of_a_token, rounds: Vec::new() }
    }

    pub fn add(&mut self, work: Work, read: f64, seconds: Vec<f64>) {
        self.rounds.push(Round { work, read, seconds });
    }

    /// A row for each kind of work and engine, and one for the reading loop.
    pub fn table(&self) -> String {
        let mut table = String::new();
        let (prefills, decodes): (Vec<_>, Vec<_>) = self.rounds.iter().partition(|round| matches!(round.work, Work::Prefill(_)));
        for rounds in [prefills, decodes].into_iter().filter(|rounds| !rounds.is_empty()) {
            let work = rounds[0].work;
            let name = match work {
                Work::Prefill(tokens) => format!("prefill {tokens}"),
                Work::Decode(tokens) => format!("decode {tokens}"),
            };
            let start = format!("| {} | {} | {name} |", self.format.name(), self.threads);
            let tokens = work.tokens() as f64;
            for (i, engine) in self.engines.iter().enumerate() {
                let speed = Spread::of(rounds.iter().map(|round| tokens / round.seconds[i])).median;
                let ratio = match i {
                    0 => "-".into(),
                    _ => Spread::of(rounds.iter().map(|round| round.seconds[i] / round.seconds[0])).to_string(),
                };
                // A prompt's tokens share what is read.
                let (gigabytes, share) = match work {
                    Work::Prefill(_) => ("-".into(), "-".into()),
                    Work::Decode(_) => {
                        let share = |round: &&Round| tokens * self.bytes_of_a_token / round.seconds[i] / round.read;
                        let share = Spread::of(rounds.iter().map(share));
                        (format!("{:.1}", speed * self.bytes_of_a_token / 1e9), format!("{:.2}", share.median))
                    }
                };
                writeln!(table, "{start} {engine} | {speed:.1} | {ratio} | {gigabytes} | {share} |").expect("a String grows");
            }
            let read = Spread::of(rounds.iter().map(|round| round.read / 1e9)).median;
            writeln!(table, "{start} reading alone | - | - | {read:.1} | 1 |").expect("a String grows");
        }
        table
    }

    /// Everything that was measured.
    pub fn json(&self) -> Value {
        let rounds = self.rounds.iter().map(|round| {
            let (work, tokens) = match round.work {
                Work::Prefill(tokens) => ("prefill", tokens),
                Work::Decode(tokens) => ("decode", tokens),
            };
            json!({"work": work, "tokens": tokens, "read_bytes_per_second": round.read, "seconds": round.seconds})
        });
        json!({
            "format": self.format.name(),
            "threads": self.threads,
            "engines": self.engines,
            "bytes_of_a_token": self.bytes_of_a_token,
            "rounds": rounds.collect::<Vec<_>>(),
        })
    }
}

/// The middle of some values, and between what four fifths of them lie.
struct Spread {
    low: f64,
    median: f64,
    high: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let at = |share: f64| values[((values.len() - 1) as f64 * share).round() as usize];
        Self { low: at(0.1), median: at(0.5), high: at(0.9) }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.2} ({:.2}..{:.2})", self.median, self.low, self.high)
    }
}
