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
                scope.spawn(|| black_box(sum(part)));
            }
        });
        size_of_val(&self.0[..]) as f64 / start.elapsed().as_secs_f64()
    }
}

/// So many accumulators that no addition waits for the one before, in vectors of any width.
fn sum(words: &[u64]) -> u64 {
    let mut sums = [0_u64; 64];
    for words in words.as_chunks::<64>().0 {
        for (sum, word) in sums.iter_mut().zip(words) {
            *sum ^= word;
        }
    }
    sums.into_iter().fold(0, |all, sum| all ^ sum)
}
