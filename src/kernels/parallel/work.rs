//! How the rows of a product become tasks: [`WorkDistributionConfig`] cuts them, [`WorkStealingStats`] counts who ran them.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Fewest elements that are worth a task of their own: some 10 us of one core's memory bandwidth, several times what stealing costs.
const TASK_ELEMENTS: usize = 32 * 1024;

/// Elements of an attention head in every Mistral model so far.
const HEAD_DIM: usize = 128;

/// How a product is cut into chunks of rows, which threads then share by work stealing.
///
/// A chunk is about `rows / (threads * tasks_per_thread)` rows, more where rows are so narrow that this would be too little
/// work for a task, and always within `min_chunk_size..=max_chunk_size`; only the last chunk may be shorter. Where one chunk ends
/// and the next begins is a cache line's border of the output, as far as the limits leave a choice: they do if they are a
/// line apart. Results never depend on any of this.
///
/// Any value is taken: 0 counts as 1, a minimum above the maximum counts as the maximum, and the line is rounded up to a power of two.
///
/// ```
/// use torchless::WorkDistributionConfig;
///
/// let config = WorkDistributionConfig::default();
/// assert_eq!((config.min_chunk_size, config.max_chunk_size), (64, 4096));
///
/// let narrow = WorkDistributionConfig::for_matmul(4096, 64);
/// let wide = WorkDistributionConfig::for_matmul(4096, 14336);
/// assert!(narrow.min_chunk_size > wide.min_chunk_size);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WorkDistributionConfig {
    /// Fewest rows of a chunk, the last one aside. 64 by default.
    pub min_chunk_size: usize,
    /// Most rows of a chunk. 4096 by default.
    pub max_chunk_size: usize,
    /// Chunks that each thread should get if rows are plenty: more balance better and cost more. 4 by default.
    pub tasks_per_thread: usize,
    /// A hint that memory is not equally near to all threads. It is recorded and nothing more: threads are not pinned. Off by default.
    pub numa_aware: bool,
    /// Bytes of a cache line, which two chunks' outputs should not share. 64 by default.
    pub cache_line_size: usize,
}

impl Default for WorkDistributionConfig {
    fn default() -> Self {
        Self { min_chunk_size: 64, max_chunk_size: 4096, tasks_per_thread: 4, numa_aware: false, cache_line_size: 64 }
    }
}

impl WorkDistributionConfig {
    /// For a matrix of `rows x cols`: a chunk has at least 32768 elements, and at least a cache line of outputs.
    #[must_use]
    pub fn for_matmul(rows: usize, cols: usize) -> Self {
        let default = Self::default();
        let line = default.line_rows();
        let max_chunk_size = rows.clamp(line, default.max_chunk_size);
        let min_chunk_size = (TASK_ELEMENTS / cols.max(1)).clamp(line, max_chunk_size);
        Self { min_chunk_size, max_chunk_size, ..default }
    }

    /// For attention of `n_heads` heads over `seq_len` positions. A row is a head, so one is enough for a chunk if the sequence is long.
    #[must_use]
    pub fn for_attention(n_heads: usize, seq_len: usize) -> Self {
        let max_chunk_size = n_heads.max(1);
        let head = seq_len.max(1).saturating_mul(2 * HEAD_DIM); // its keys and its values
        Self { min_chunk_size: (TASK_ELEMENTS / head).clamp(1, max_chunk_size), max_chunk_size, ..Self::default() }
    }

    /// The chunks of `out`, whose every element takes `cols` multiplications, for so many threads.
    pub(crate) fn chunks(&self, out: &[f32], cols: usize, threads: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let max = self.max_chunk_size.max(1);
        let min = self.min_chunk_size.clamp(1, max);
        let tasks = threads.max(1).saturating_mul(self.tasks_per_thread.max(1));
        let wanted = out.len().div_ceil(tasks).max(TASK_ELEMENTS / cols.max(1)).clamp(min, max).min(out.len());

        let line = self.line_rows();
        // The first size from `wanted` that ends `to_border` rows past a multiple of the line; within the limits if one is.
        let fit = |to_border: usize| {
            let up = to_border + wanted.saturating_sub(to_border).next_multiple_of(line);
            let down = up.saturating_sub(line);
            if up <= max {
                up
            } else if down >= min {
                down
            } else {
                wanted
            }
        };
        let past_border = out.as_ptr().addr() / size_of::<f32>() % line;
        let (first, rest, n) = (fit((line - past_border) % line), fit(0), out.len());
        std::iter::successors(Some(0..first.min(n)), move |last| Some(last.end..last.end.saturating_add(rest).min(n)))
            .take_while(|chunk| !chunk.is_empty())
    }

    /// Outputs in a cache line, a power of two.
    fn line_rows(&self) -> usize {
        let largest = 1 << (usize::BITS - 1);
        self.cache_line_size.checked_next_power_of_two().unwrap_or(largest).max(size_of::<f32>()) / size_of::<f32>()
    }
}

/// What became of the tasks of one or more products: how many there were, and which thread ran them.
///
/// A chunk of rows is a task. It is stolen if it ran on another thread than the one that split it off, local otherwise;
/// once a product is done, `tasks_created` is the sum of both. Without the feature `parallel` all are local.
///
/// ```
/// use std::sync::atomic::Ordering;
/// use torchless::{Matrix, WorkDistributionConfig, WorkStealingStats, matmul_vec_adaptive_with_stats};
///
/// let stats = WorkStealingStats::new();
/// let weights = Matrix::from_f32(4096, 16, vec![0.5; 4096 * 16]);
/// matmul_vec_adaptive_with_stats(&weights, &[1.0; 16], &WorkDistributionConfig::default(), &stats);
/// println!("Tasks created: {}", stats.tasks_created.load(Ordering::Relaxed));
/// println!("Steal ratio: {:.1}%", stats.steal_ratio() * 100.0);
/// ```
#[derive(Debug, Default)]
pub struct WorkStealingStats {
    /// All tasks.
    pub tasks_created: AtomicUsize,
    /// Those that ran on the thread that split them off.
    pub local_tasks: AtomicUsize,
    /// Those that another thread took.
    pub stolen_tasks: AtomicUsize,
}

impl WorkStealingStats {
    /// Counts of zero.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The part of the tasks that was stolen, 0 to 1; 0 when nothing ran.
    #[must_use]
    pub fn steal_ratio(&self) -> f32 {
        let created = self.tasks_created.load(Ordering::Relaxed);
        self.stolen_tasks.load(Ordering::Relaxed) as f32 / created.max(1) as f32
    }

    pub(crate) fn count(&self, stolen: bool) {
        self.tasks_created.fetch_add(1, Ordering::Relaxed);
        let kind = if stolen { &self.stolen_tasks } else { &self.local_tasks };
        kind.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [usize; 14] = [0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 1000, 4096, 14336, 32000];
    const COLS: [usize; 7] = [0, 1, 7, 64, 1024, 14336, usize::MAX];
    const THREADS: [usize; 6] = [0, 1, 2, 3, 16, usize::MAX];

    /// Starts and ends of all chunks of `out`.
    fn cut(config: &WorkDistributionConfig, out: &[f32], cols: usize, threads: usize) -> Vec<(usize, usize)> {
        config.chunks(out, cols, threads).map(|chunk| (chunk.start, chunk.end)).collect()
    }

    #[test]
    fn chunks_obey_min_and_max_and_end_at_cache_lines() {
        let memory = vec![0.0; 32000 + 16];
        let configs = [
            WorkDistributionConfig::default(),
            WorkDistributionConfig { cache_line_size: 128, ..Default::default() },
            WorkDistributionConfig { min_chunk_size: 1, max_chunk_size: 16, ..Default::default() },
            WorkDistributionConfig { min_chunk_size: 100, max_chunk_size: 131, tasks_per_thread: 9, ..Default::default() },
            WorkDistributionConfig::for_matmul(14336, 4096),
            WorkDistributionConfig::for_matmul(1000, 64),
        ];
        for config in configs {
            for rows in SIZES {
                for (cols, threads, skip) in COLS.iter().flat_map(|&c| THREADS.map(|t| (c, t, (c ^ t ^ rows) % 16))) {
                    let out = &memory[skip..skip + rows];
                    let cuts = cut(&config, out, cols, threads);
                    for (i, &(start, end)) in cuts.iter().enumerate() {
                        let case = format!("{config:?}, {rows} x {cols}, {threads} threads, chunk {start}..{end}");
                        assert!(end - start <= config.max_chunk_size, "{case}");
                        if i + 1 < cuts.len() {
                            assert!(end - start >= config.min_chunk_size, "{case}");
                            assert_eq!(out[end..].as_ptr().addr() % config.cache_line_size, 0, "{case}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn limits_closer_than_a_cache_line_win_over_it() {
        let out = vec![0.0; 100];
        for size in [1, 5, 10] {
            let config = WorkDistributionConfig { min_chunk_size: size, max_chunk_size: size, ..Default::default() };
            let cuts = cut(&config, &out, 4096, 2);
            assert!(cuts.iter().all(|&(start, end)| end - start == size), "{size}: {cuts:?}");
        }
    }

    #[test]
    fn hostile_values_still_cut_everything_once() {
        let out = vec![0.0; 1000];
        let values = [0, 1, 3, 6, 64, usize::MAX - 1, usize::MAX];
        for (min_chunk_size, max_chunk_size) in values.iter().flat_map(|&a| values.map(|b| (a, b))) {
            for (tasks_per_thread, cache_line_size) in values.iter().flat_map(|&a| values.map(|b| (a, b))) {
                let config =
                    WorkDistributionConfig { min_chunk_size, max_chunk_size, tasks_per_thread, cache_line_size, ..Default::default() };
                for (cols, threads) in COLS.iter().flat_map(|&c| THREADS.map(|t| (c, t))) {
                    let cuts = cut(&config, &out, cols, threads);
                    assert!(cuts.len() <= out.len() && cuts.iter().all(|(a, b)| b - a <= max_chunk_size.max(1)), "{config:?}");
                }
                assert!(cut(&config, &[], 8, 2).is_empty(), "{config:?}");
            }
        }
    }

    #[test]
    fn narrower_rows_make_larger_chunks_and_more_threads_smaller_ones() {
        let out = vec![0.0; 32000];
        let rest = |cols, threads| WorkDistributionConfig::default().chunks(&out, cols, threads).nth(1).unwrap().len();
        assert!(rest(8, 64) > rest(64, 64) && rest(64, 64) > rest(4096, 64));
        assert!(rest(4096, 2) > rest(4096, 16) && rest(4096, 16) > rest(4096, 100));
    }

    #[test]
    fn constructors_fit_the_work() {
        for (rows, cols) in SIZES.iter().chain(&[usize::MAX]).flat_map(|&r| COLS.map(|c| (r, c))) {
            for config in [WorkDistributionConfig::for_matmul(rows, cols), WorkDistributionConfig::for_attention(rows, cols)] {
                assert!(1 <= config.min_chunk_size && config.min_chunk_size <= config.max_chunk_size, "{rows} x {cols}: {config:?}");
            }
        }
        // A long sequence makes a head a task; a short one puts heads together.
        assert_eq!(WorkDistributionConfig::for_attention(32, 4096).min_chunk_size, 1);
        assert!(WorkDistributionConfig::for_attention(32, 8).min_chunk_size > 1);
    }

    #[test]
    fn steal_ratio_is_zero_when_nothing_ran() {
        let stats = WorkStealingStats::new();
        assert_eq!(stats.steal_ratio(), 0.0);
        for stolen in [false, true, false, false] {
            stats.count(stolen);
        }
        assert_eq!(stats.steal_ratio(), 0.25);
    }
}
