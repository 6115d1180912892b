//! Products of matrices with vectors on all cores, and the pieces of tensor parallelism as functions.

mod work;

use super::linear::linear_row;
use super::matrix::Matrix;
use super::pool::{self, Scatter, for_each};
use super::swiglu;
use crate::partition::TensorParallelConfig;
pub use work::{WorkDistributionConfig, WorkStealingStats};

/// `weights * input`: `[rows]` of a `[rows, cols]` matrix and `[cols]` values.
///
/// The same bits whatever the configuration and the number of threads: threads share rows and never the sum within one.
/// It runs on the Rayon pool of the calling thread, or on the global one; without the feature `parallel`, on the calling thread.
///
/// ```
/// use torchless::{Matrix, WorkDistributionConfig, matmul_vec_adaptive, matmul_vec_adaptive_into};
///
/// let weights = Matrix::from_f32(2, 3, vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
/// let input = [1.0, 0.0, -1.0];
/// let config = WorkDistributionConfig::for_matmul(2, 3);
/// let result = matmul_vec_adaptive(&weights, &input, &config);
/// assert_eq!(result, [-2.0, -2.0]);
///
/// let mut output = vec![0.0; 2];
/// matmul_vec_adaptive_into(&weights, &input, &mut output, &config);
/// assert_eq!(output, result);
/// ```
///
/// # Panics
/// If `input` hasn't as many values as the matrix has columns.
#[must_use]
pub fn matmul_vec_adaptive(weights: &Matrix, input: &[f32], config: &WorkDistributionConfig) -> Vec<f32> {
    matmul_vec_adaptive_with_stats(weights, input, config, &WorkStealingStats::new())
}

/// [`matmul_vec_adaptive`] into memory that is there already.
///
/// # Panics
/// If `input` hasn't as many values as the matrix has columns, or `output` as it has rows.
pub fn matmul_vec_adaptive_into(weights: &Matrix, input: &[f32], output: &mut [f32], config: &WorkDistributionConfig) {
    matmul_counted(weights, input, output, config, &WorkStealingStats::new());
}

/// [`matmul_vec_adaptive`], which adds its tasks to `stats`.
///
/// # Panics
/// If `input` hasn't as many values as the matrix has columns.
pub fn matmul_vec_adaptive_with_stats(
    weights: &Matrix,
    input: &[f32],
    config: &WorkDistributionConfig,
    stats: &WorkStealingStats,
) -> Vec<f32> {
    let mut output = vec![0.0; weights.rows()];
    matmul_counted(weights, input, &mut output, config, stats);
    output
}

fn matmul_counted(weights: &Matrix, input: &[f32], output: &mut [f32], config: &WorkDistributionConfig, stats: &WorkStealingStats) {
    let (rows, cols) = (weights.rows(), weights.cols());
    assert!(input.len() == cols, "an input of {} values does not fit a matrix of {rows} x {cols}: {cols} are needed", input.len());
    assert!(output.len() == rows, "an output of {} values does not fit a matrix of {rows} x {cols}: {rows} are needed", output.len());
    let chunks: Vec<_> = config.chunks(output, cols, pool::threads()).collect();
    let output = Scatter::new(output);
    for_each(chunks.len(), |i, stolen| {
        stats.count(stolen);
        // SAFETY: chunks don't overlap.
        linear_row(weights, chunks[i].clone(), input, unsafe { output.range(chunks[i].clone()) });
    });
}

/// This rank's outputs of `weights * input`, from the full matrix and the full input.
///
/// The rank owns rows [`TensorParallelConfig::local_range`]`(weights.rows())`; the outputs of all ranks, one behind the
/// other, are the full product. A rank outside its world owns none.
///
/// ```
/// use torchless::{Matrix, TensorParallelConfig, column_parallel_linear};
///
/// let weights = Matrix::from_f32(3, 1, vec![1.0, 2.0, 3.0]);
/// assert_eq!(column_parallel_linear(&weights, &[10.0], &TensorParallelConfig::new(2, 0)), [10.0, 20.0]);
/// assert_eq!(column_parallel_linear(&weights, &[10.0], &TensorParallelConfig::new(2, 1)), [30.0]);
/// ```
///
/// # Panics
/// If `input` hasn't as many values as the matrix has columns.
#[must_use]
pub fn column_parallel_linear(weights: &Matrix, input: &[f32], config: &TensorParallelConfig) -> Vec<f32> {
    let local = weights.slice(config.local_range(weights.rows()), 0..weights.cols());
    matmul(&local, input)
}

/// This rank's partial sums of `weights * input`, from the full matrix and the full input.
///
/// The rank owns columns [`TensorParallelConfig::local_range`]`(weights.cols())` and those values of the input; the sum of all
/// ranks' results ([`all_reduce_sum`]) is the full product. A rank outside its world adds zeros.
///
/// ```
/// use torchless::{Matrix, TensorParallelConfig, all_reduce_sum, row_parallel_linear};
///
/// let weights = Matrix::from_f32(1, 3, vec![1.0, 2.0, 3.0]);
/// let partials = [0, 1].map(|rank| row_parallel_linear(&weights, &[1.0, 1.0, 1.0], &TensorParallelConfig::new(2, rank)));
/// assert_eq!(partials, [[3.0], [3.0]]);
/// assert_eq!(all_reduce_sum(&partials), [6.0]);
/// ```
///
/// # Panics
/// If `input` hasn't as many values as the matrix has columns.
#[must_use]
pub fn row_parallel_linear(weights: &Matrix, input: &[f32], config: &TensorParallelConfig) -> Vec<f32> {
    let (rows, cols) = (weights.rows(), weights.cols());
    assert!(input.len() == cols, "an input of {} values does not fit a matrix of {rows} x {cols}: {cols} are needed", input.len());
    let owned = config.local_range(cols);
    matmul(&weights.slice(0..rows, owned.clone()), &input[owned])
}

/// The sum of all ranks' partial results, added in the order of ranks. None gives an empty vector.
///
/// ```
/// use torchless::all_reduce_sum;
///
/// assert_eq!(all_reduce_sum(&[vec![1.0, 2.0], vec![10.0, 20.0]]), [11.0, 22.0]);
/// assert!(all_reduce_sum(&[]).is_empty());
/// ```
///
/// # Panics
/// If the partial results are of different lengths.
#[must_use]
pub fn all_reduce_sum(partials: &[Vec<f32>]) -> Vec<f32> {
    let mut sum = vec![0.0; partials.first().map_or(0, Vec::len)];
    sum_in_order(&mut sum, partials);
    sum
}

/// [`all_reduce_sum`] into `result`, whose old values are overwritten. None gives zeros.
///
/// # Panics
/// If a partial result is not as long as `result`.
pub fn all_reduce_sum_inplace(result: &mut [f32], partials: &[&[f32]]) {
    sum_in_order(result, partials);
}

fn sum_in_order(sum: &mut [f32], partials: &[impl AsRef<[f32]>]) {
    for (rank, partial) in partials.iter().enumerate() {
        let (found, wanted) = (partial.as_ref().len(), sum.len());
        assert!(found == wanted, "the partial result of rank {rank} has {found} values, but {wanted} are to be summed");
    }
    // Copying the first rather than adding it to zero keeps the sum of one bit for bit.
    match partials.split_first() {
        None => sum.fill(0.0),
        Some((first, others)) => {
            sum.copy_from_slice(first.as_ref());
            for partial in others {
                sum.iter_mut().zip(partial.as_ref()).for_each(|(s, p)| *s += p);
            }
        }
    }
}

/// This rank's partial result of a gated MLP, `down * (silu(gate * input) . (up * input))`, from full matrices and the full input.
///
/// The rank owns channels [`TensorParallelConfig::local_range`]`(gate.rows())`: rows of `gate` and `up`, columns of `down`. The
/// sum of all ranks' results is the MLP's; a world of one gives it at once. A rank outside its world adds zeros.
///
/// ```
/// use torchless::{Matrix, TensorParallelConfig, all_reduce_sum, mlp_tensor_parallel};
///
/// let (gate_proj, up_proj) = (Matrix::from_f32(3, 1, vec![1.0, 2.0, 3.0]), Matrix::from_f32(3, 1, vec![1.0; 3]));
/// let (down_proj, input) = (Matrix::from_f32(1, 3, vec![1.0; 3]), [0.5]);
/// let partial = |world, rank| {
///     let tp_config = TensorParallelConfig::new(world, rank);
///     mlp_tensor_parallel(&input, &gate_proj, &up_proj, &down_proj, &tp_config)
/// };
/// let sum = all_reduce_sum(&[partial(2, 0), partial(2, 1)]);
/// assert!((sum[0] - partial(1, 0)[0]).abs() < 1e-6);
/// ```
///
/// # Panics
/// If the matrices' shapes don't fit each other: `gate` and `up` `[channels, hidden]`, `down` `[out, channels]`; or `input` isn't `[hidden]`.
#[must_use]
pub fn mlp_tensor_parallel(input: &[f32], gate: &Matrix, up: &Matrix, down: &Matrix, config: &TensorParallelConfig) -> Vec<f32> {
    let channels = gate.rows();
    assert!(
        up.rows() == channels && up.cols() == gate.cols() && down.cols() == channels,
        "an MLP cannot be made of gate {} x {}, up {} x {} and down {} x {}: up must be as gate, and down have a column for each of its rows",
        gate.rows(),
        gate.cols(),
        up.rows(),
        up.cols(),
        down.rows(),
        down.cols()
    );
    let mut activated = column_parallel_linear(gate, input, config);
    swiglu(&mut activated, &column_parallel_linear(up, input, config));
    matmul(&down.slice(0..down.rows(), config.local_range(channels)), &activated)
}

fn matmul(weights: &Matrix, input: &[f32]) -> Vec<f32> {
    matmul_vec_adaptive(weights, input, &WorkDistributionConfig::for_matmul(weights.rows(), weights.cols()))
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;
    use crate::kernels::matrix::DType;
    use crate::kernels::samples;

    /// Multiples of 1/8 up to 2: exact in every dtype, and so are their sums of products in f32 in any order.
    fn exact(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 104_729) % 33) as f32 / 8.0 - 2.0).collect()
    }

    fn matrix(rows: usize, cols: usize, seed: usize) -> Matrix {
        Matrix::from_f32(rows, cols, exact(rows * cols, seed))
    }

    /// The same values as [`matrix`], stored as `dtype` in mapped memory.
    fn mapped(dtype: DType, rows: usize, cols: usize, seed: usize) -> Matrix {
        samples::mapped(dtype, rows, cols, &exact(rows * cols, seed))
    }

    fn product(weights: &Matrix, x: &[f32]) -> Vec<f32> {
        let mut row = vec![0.0; weights.cols()];
        let dot = |r| {
            weights.row_to_f32(r, &mut row);
            row.iter().zip(x).map(|(w, x)| f64::from(w * x)).sum::<f64>() as f32
        };
        (0..weights.rows()).map(dot).collect()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|v| v.to_bits()).collect()
    }

    /// Runs on pools of 1, 2 and 5 threads; without the feature `parallel`, on this thread.
    fn on_pools(test: impl Fn() + Sync) {
        #[cfg(feature = "parallel")]
        for threads in [1, 2, 5] {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(&test);
        }
        test();
    }

    fn configs() -> [WorkDistributionConfig; 5] {
        let default = WorkDistributionConfig::default();
        [
            default,
            WorkDistributionConfig { min_chunk_size: 1, max_chunk_size: 1, ..default },
            WorkDistributionConfig { min_chunk_size: 1, max_chunk_size: 40, ..default },
            WorkDistributionConfig { min_chunk_size: 0, max_chunk_size: 0, tasks_per_thread: 0, cache_line_size: 0, numa_aware: true },
            WorkDistributionConfig { max_chunk_size: usize::MAX, tasks_per_thread: usize::MAX, cache_line_size: usize::MAX, ..default },
        ]
    }

    /// Worlds of 1 to `most` ranks: what each rank gives.
    fn worlds(most: usize, rank: impl Fn(&TensorParallelConfig) -> Vec<f32>) -> impl Iterator<Item = Vec<Vec<f32>>> {
        (1..=most).map(move |world| (0..world).map(|r| rank(&TensorParallelConfig::new(world, r))).collect())
    }

    #[test]
    fn products_are_right_for_any_shape_dtype_and_distribution() {
        on_pools(|| {
            for (rows, cols) in [(0, 0), (0, 5), (5, 0), (1, 1), (17, 33), (301, 127), (1000, 9)] {
                for dtype in [DType::F32, DType::F16, DType::Bf16] {
                    let (weights, x) = (mapped(dtype, rows, cols, rows), exact(cols, 1));
                    for config in configs() {
                        let y = matmul_vec_adaptive(&weights, &x, &config);
                        assert_eq!(y, product(&weights, &x), "{weights:?} with {config:?}");
                        let mut into = vec![f32::NAN; rows];
                        matmul_vec_adaptive_into(&weights, &x, &mut into, &config);
                        assert_eq!(into, y, "{weights:?} with {config:?} into memory");
                    }
                }
            }
        });
    }

    #[test]
    fn bits_depend_on_neither_chunks_nor_threads() {
        // Values whose sums are rounded, so that another order would show.
        let rounded = |n: usize| (0..n).map(|i| (i as f32 * 0.737).sin() * 10f32.powi(i as i32 % 5)).collect::<Vec<_>>();
        let (rows, cols) = (301, 1111);
        let (weights, x) = (Matrix::from_f32(rows, cols, rounded(rows * cols)), rounded(cols));
        let mut whole = vec![0.0; rows];
        linear_row(&weights, 0..rows, &x, &mut whole);
        on_pools(|| {
            for config in configs() {
                assert_eq!(bits(&matmul_vec_adaptive(&weights, &x, &config)), bits(&whole), "{config:?}");
            }
        });
    }

    #[test]
    fn every_chunk_is_a_task_and_every_task_local_or_stolen() {
        let (weights, x) = (matrix(1000, 3, 2), exact(3, 3));
        on_pools(|| {
            for (size, tasks) in [(1, 1000), (7, 143), (64, 16), (1000, 1), (4096, 1)] {
                let config = WorkDistributionConfig { min_chunk_size: size, max_chunk_size: size, ..Default::default() };
                let stats = WorkStealingStats::new();
                matmul_vec_adaptive_with_stats(&weights, &x, &config, &stats);
                let (created, stolen) = (stats.tasks_created.load(Relaxed), stats.stolen_tasks.load(Relaxed));
                assert_eq!(created, tasks, "chunks of {size}");
                assert_eq!(stats.local_tasks.load(Relaxed) + stolen, tasks, "chunks of {size}");
                assert_eq!(stats.steal_ratio(), stolen as f32 / tasks as f32);
            }
        });
        let stats = WorkStealingStats::new();
        matmul_vec_adaptive_with_stats(&matrix(0, 3, 2), &x, &WorkDistributionConfig::default(), &stats);
        assert_eq!((stats.tasks_created.load(Relaxed), stats.steal_ratio()), (0, 0.0), "no rows, no tasks");
    }

    /// Two chunks that wait for each other can only end on two threads, so one is stolen; on one thread none ever is.
    #[cfg(feature = "parallel")]
    #[test]
    fn a_chunk_that_runs_on_another_thread_counts_as_stolen() {
        let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let stats = WorkStealingStats::new();
        let meeting = std::sync::Barrier::new(2);
        pool(2).install(|| {
            for_each(2, |_, stolen| {
                stats.count(stolen);
                meeting.wait();
            });
        });
        assert_eq!((stats.local_tasks.load(Relaxed), stats.stolen_tasks.load(Relaxed)), (1, 1));
        assert_eq!(stats.steal_ratio(), 0.5);

        let stats = WorkStealingStats::new();
        pool(1).install(|| for_each(100, |_, stolen| stats.count(stolen)));
        assert_eq!((stats.local_tasks.load(Relaxed), stats.stolen_tasks.load(Relaxed)), (100, 0));
    }

    #[test]
    fn outputs_of_column_parallel_ranks_concatenate_to_the_product() {
        for (rows, cols) in [(0, 3), (1, 3), (5, 0), (33, 17), (64, 64)] {
            let (weights, x) = (matrix(rows, cols, 4), exact(cols, 5));
            for ranks in worlds(9, |config| column_parallel_linear(&weights, &x, config)) {
                assert_eq!(ranks.concat(), product(&weights, &x), "{weights:?} over {} ranks", ranks.len());
            }
        }
    }

    #[test]
    fn partials_of_row_parallel_ranks_sum_to_the_product() {
        for (rows, cols) in [(0, 3), (3, 0), (3, 1), (17, 33), (64, 64)] {
            for dtype in [DType::F32, DType::F16, DType::Bf16] {
                let (weights, x) = (mapped(dtype, rows, cols, 6), exact(cols, 7));
                for ranks in worlds(9, |config| row_parallel_linear(&weights, &x, config)) {
                    assert_eq!(all_reduce_sum(&ranks), product(&weights, &x), "{weights:?} over {} ranks", ranks.len());
                }
            }
        }
    }

    #[test]
    fn partials_of_the_mlp_sum_to_the_mlp() {
        for (hidden, channels) in [(8, 16), (5, 7), (3, 1), (4, 0)] {
            let (gate, up, down) = (matrix(channels, hidden, 8), matrix(channels, hidden, 9), matrix(hidden, channels, 10));
            let x = exact(hidden, 11);
            let silu = |v: f32| v / (1.0 + (-v).exp());
            let activated: Vec<f32> = product(&gate, &x).into_iter().zip(product(&up, &x)).map(|(g, u)| silu(g) * u).collect();
            let expected = product(&down, &activated);
            for ranks in worlds(9, |config| mlp_tensor_parallel(&x, &gate, &up, &down, config)) {
                for (sum, expected) in all_reduce_sum(&ranks).into_iter().zip(&expected) {
                    let bound = 1e-5 * (1.0 + activated.iter().map(|a| 2.0 * a.abs()).sum::<f32>());
                    assert!((sum - expected).abs() <= bound, "{hidden} x {channels} over {}: {sum}, not {expected}", ranks.len());
                }
            }
        }
    }

    #[test]
    fn a_rank_outside_its_world_adds_nothing() {
        let (weights, x) = (matrix(4, 4, 12), exact(4, 13));
        for config in [TensorParallelConfig::new(0, 0), TensorParallelConfig::new(2, 2)] {
            assert!(column_parallel_linear(&weights, &x, &config).is_empty());
            assert_eq!(row_parallel_linear(&weights, &x, &config), [0.0; 4]);
            assert_eq!(mlp_tensor_parallel(&x, &weights, &weights, &weights, &config), [0.0; 4]);
        }
    }

    #[test]
    fn all_reduce_adds_in_the_order_of_ranks_and_overwrites() {
        // In any other order the ones are lost or survive differently.
        let partials = [vec![1e8, -0.0], vec![1.0, -0.0], vec![-1e8, -0.0]];
        assert_eq!(bits(&all_reduce_sum(&partials)), bits(&[(1e8 + 1.0) - 1e8, -0.0]));
        let mut result = [f32::NAN; 2];
        all_reduce_sum_inplace(&mut result, &partials.each_ref().map(Vec::as_slice));
        assert_eq!(bits(&result), bits(&all_reduce_sum(&partials)));
        all_reduce_sum_inplace(&mut result, &[]);
        assert_eq!(result, [0.0; 2]);
        assert!(all_reduce_sum(&[]).is_empty());
    }

    #[test]
    fn shapes_that_do_not_fit_panic_with_the_numbers() {
        let (weights, whole, config) = (matrix(2, 3, 14), TensorParallelConfig::default(), WorkDistributionConfig::default());
        let mlp = |up: &Matrix, down: &Matrix| drop(mlp_tensor_parallel(&[0.0; 3], &weights, up, down, &whole));
        let cases: [(&dyn Fn(), &[&str]); 9] = [
            (&|| drop(matmul_vec_adaptive(&weights, &[0.0; 4], &config)), &["4 values", "2 x 3"]),
            (&|| matmul_vec_adaptive_into(&weights, &[0.0; 3], &mut [0.0; 5], &config), &["5 values", "2 x 3"]),
            (&|| drop(column_parallel_linear(&weights, &[0.0; 2], &whole)), &["2 values", "3 are needed"]),
            (&|| drop(row_parallel_linear(&weights, &[0.0; 4], &whole)), &["4 values", "3 are needed"]),
            (&|| mlp(&matrix(2, 4, 0), &matrix(3, 2, 0)), &["gate 2 x 3", "up 2 x 4"]),
            (&|| mlp(&matrix(3, 3, 0), &matrix(3, 2, 0)), &["gate 2 x 3", "up 3 x 3"]),
            (&|| mlp(&weights, &matrix(3, 5, 0)), &["gate 2 x 3", "down 3 x 5"]),
            (&|| drop(all_reduce_sum(&[vec![0.0; 2], vec![0.0; 3]])), &["rank 1", "3 values", "2 are to be"]),
            (&|| all_reduce_sum_inplace(&mut [0.0; 2], &[&[0.0]]), &["rank 0", "1 values", "2 are to be"]),
        ];
        for (call, words) in cases {
            let panic = catch_unwind(AssertUnwindSafe(call)).expect_err(words[0]);
            let message = panic.downcast::<String>().expect("a sentence");
            assert!(words.iter().all(|w| message.contains(w)), "{message:?} should say {words:?}");
        }
    }
}
