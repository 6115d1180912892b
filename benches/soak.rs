//! The scheduler under load for long, half a minute a line: `cargo bench --bench soak [-- --seconds N]`, 10 minutes unless told.
//!
//! Every text is held against that of its prompt alone, as in tests/soak.rs. benches/README.md says what the columns mean.

#[path = "../tests/common/soak.rs"]
mod soak;

use std::time::Duration;

use soak::Tally;

const LINE: Duration = Duration::from_secs(30);

fn main() {
    let args: Vec<String> = std::env::args().collect();
    // `cargo bench` says --bench. `cargo test --benches` doesn't: then a moment shows that it runs.
    let default = if args.iter().any(|arg| arg == "--bench") { 600 } else { 5 };
    let seconds = args.iter().position(|arg| arg == "--seconds").map_or(default, |at| {
        let value = args.get(at + 1).and_then(|seconds| seconds.parse().ok());
        value.unwrap_or_else(|| panic!("--seconds needs a whole number"))
    });
    println!("| seconds | requests | finished | cancelled | dropped | heard/s | computed/s | reused/s | preemptions | pages | RSS MB |");
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    let mut last: Option<Tally> = None;
    let tally = soak::run(&soak::load(2, 1), usize::MAX, Duration::from_secs(seconds), |tally| {
        if tally.elapsed >= last.map_or(LINE, |last| last.elapsed + LINE) {
            line(tally, last.as_ref());
            last = Some(*tally);
        }
    });
    // The rest, if there is enough for a speed.
    if last.is_none_or(|last| tally.elapsed > last.elapsed + LINE / 6) {
        line(&tally, last.as_ref());
    }
}

/// All since the start, and the speeds since the line before.
fn line(now: &Tally, before: Option<&Tally>) {
    let seconds = (now.elapsed - before.map_or(Duration::ZERO, |tally| tally.elapsed)).as_secs_f64();
    let speed = |count: fn(&Tally) -> u64| ((count(now) - before.map_or(0, count)) as f64 / seconds).round();
    let [heard, computed, reused] =
        [speed(|tally| tally.tokens as u64), speed(|tally| tally.counts.computed_tokens), speed(|tally| tally.counts.reused_tokens)];
    let resident = soak::resident().map_or("-".into(), |bytes| format!("{:.1}", bytes as f64 / 1e6));
    let Tally { requests, finished, cancelled, dropped, elapsed, counts, pages, .. } = now;
    println!(
        "| {} | {requests} | {finished} | {cancelled} | {dropped} | {heard} | {computed} | {reused} | {} | {pages} | {resident} |",
        elapsed.as_secs(),
        counts.preemptions
    );
}
