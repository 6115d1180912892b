//! What the benches measure by.
#![allow(dead_code)] // every bench compiles this and uses a part

use std::hint::black_box;
use std::time::Instant;

/// Memory that a reading loop goes through: 256 MiB of words when measured.
pub fn words(measured: bool) -> Vec<u64> {
    vec![1; if measured { 1 << 25 } else { 1 << 10 }]
}

/// GB/s of a loop that reads all of `words` once, each thread a part.
pub fn read(words: &[u64], threads: usize) -> f64 {
    let start = Instant::now();
    std::thread::scope(|scope| {
        for part in words.chunks(words.len().div_ceil(threads)) {
            scope.spawn(|| black_box(part.iter().fold(0, |sum, word| sum ^ word)));
        }
    });
    size_of_val(words) as f64 / start.elapsed().as_secs_f64() / 1e9
}

pub fn seconds(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

/// Median, 10th and 90th percentile.
pub fn spread(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [0.5, 0.1, 0.9].map(|p| values[((values.len() - 1) as f64 * p).round() as usize])
}

/// A spread as tables have it.
pub fn told([median, low, high]: [f64; 3]) -> String {
    format!("{median:.2} ({low:.2}..{high:.2})")
}

/// Whether one of `parts` is named in the command line and it isn't `part`.
pub fn leaves_out(part: &str, parts: &[&str]) -> bool {
    let args: Vec<String> = std::env::args().collect();
    args.iter().any(|arg| parts.contains(&&arg[..])) && !args.iter().any(|arg| arg == part)
}

/// `cargo bench` says --bench. `cargo test --benches` doesn't: then small models and one round show that all of it runs.
pub fn measured() -> bool {
    std::env::args().any(|arg| arg == "--bench")
}
