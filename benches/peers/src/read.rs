//! [`Memory`]: how fast this machine reads at the moment.

use std::hint::black_box;
use std::time::Instant;

/// 512 MiB of words, more than any cache holds.
pub struct Memory(Vec<u64>);

impl Memory {
    pub fn new() -> Self {
        Self((0..1 << 26).collect())
    }

    /// Reads all of it once, each thread a part: bytes a second.
    pub fn read(&self, threads: usize) -> f64 {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for part in self.0.chunks(self.0.len().div_ceil(threads)) {
                // The compiler makes several accumulators of vectors of it.
                scope.spawn(|| black_box(part.iter().fold(0, |sum, word| sum ^ word)));
            }
        });
        size_of_val(&self.0[..]) as f64 / start.elapsed().as_secs_f64()
    }
}
