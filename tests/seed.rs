//! The snippets of the parallelisation guide, as they are written there, around the values that they take for granted.

use std::sync::atomic::Ordering;

use torchless::{Matrix, TensorParallelConfig};

fn weights(rows: usize, cols: usize) -> Matrix {
    Matrix::from_f32(rows, cols, (0..rows * cols).map(|i| (i % 7) as f32 - 3.0).collect())
}

#[test]
fn work_distribution_config() {
    let (rows, cols, n_heads, seq_len) = (1024, 4096, 32, 512);

    use torchless::WorkDistributionConfig;

    // Default configuration
    let config = WorkDistributionConfig::default();
    assert_eq!(
        config,
        WorkDistributionConfig { min_chunk_size: 64, max_chunk_size: 4096, tasks_per_thread: 4, numa_aware: false, cache_line_size: 64 }
    );

    // Optimized for matrix multiplication
    let config = WorkDistributionConfig::for_matmul(rows, cols);
    assert!(config.max_chunk_size <= rows);

    // Optimized for attention computation
    let config = WorkDistributionConfig::for_attention(n_heads, seq_len);
    assert!(config.max_chunk_size <= n_heads);
}

#[test]
fn work_stealing_stats() {
    use torchless::WorkStealingStats;

    let stats = WorkStealingStats::new();
    // ... after parallel work ...
    let config = torchless::WorkDistributionConfig { min_chunk_size: 1, max_chunk_size: 8, ..Default::default() };
    torchless::matmul_vec_adaptive_with_stats(&weights(64, 8), &[1.0; 8], &config, &stats);
    println!("Tasks created: {}", stats.tasks_created.load(Ordering::Relaxed));
    println!("Steal ratio: {:.1}%", stats.steal_ratio() * 100.0);

    // 64 rows in chunks of at most 8; one more where the output doesn't begin at a cache line.
    let created = stats.tasks_created.load(Ordering::Relaxed);
    assert!((8..=9).contains(&created), "{created}");
    assert_eq!(stats.local_tasks.load(Ordering::Relaxed) + stats.stolen_tasks.load(Ordering::Relaxed), created);
}

#[test]
fn adaptive_parallel_operations() {
    use torchless::WorkDistributionConfig;
    let (weights, input, mut output) = (weights(1024, 4096), vec![1.0; 4096], vec![f32::NAN; 1024]);

    use torchless::{matmul_vec_adaptive, matmul_vec_adaptive_into};

    let config = WorkDistributionConfig::for_matmul(1024, 4096);

    // Adaptive matrix-vector multiplication
    let result = matmul_vec_adaptive(&weights, &input, &config);

    // Zero-allocation version
    matmul_vec_adaptive_into(&weights, &input, &mut output, &config);

    // Row 0 is -3 to 3 over and over; of 4096 = 585 * 7 + 1 values the one left is -3.
    assert_eq!((result.len(), result[0]), (1024, -3.0));
    assert_eq!(output, result);
}

#[test]
fn pipeline_state() {
    let (num_stages, max_depth, tokens) = (3, 2, 5);

    use torchless::PipelineState;

    let mut state = PipelineState::new(
        num_stages, // Number of pipeline stages (typically = n_layers)
        max_depth,  // Maximum micro-batches in flight
    );

    let mut outputs = Vec::new();
    while outputs.len() < tokens {
        // Check if pipeline can accept more input
        if state.can_accept() {
            state.push();
        }

        // Check if output is ready
        if state.has_output() {
            let completed = state.pop();
            outputs.extend(completed);
        }

        // Advance pipeline by one step
        state.advance();
    }
    assert_eq!(outputs, [1, 2, 3, 4, 5]);
}

#[test]
fn pipeline_config() {
    let (n_layers, hidden_size, memory_budget) = (32, 4096, 128 << 20);

    use torchless::PipelineConfig;

    // Default configuration
    let config = PipelineConfig::default();
    assert_eq!(config, PipelineConfig { num_micro_batches: 4, async_execution: false, memory_budget: 512 << 20 });

    // Compute optimal config for model
    let config = PipelineConfig::for_model(n_layers, hidden_size, memory_budget);
    assert!(1 < config.num_micro_batches && config.num_micro_batches < 8, "128 MiB allow some, but not all: {config:?}");
}

#[test]
fn tensor_parallel_config() {
    let hidden_size = 4096;

    use torchless::TensorParallelConfig;

    // Single device (no parallelism)
    let config = TensorParallelConfig::default();
    assert_eq!((config.local_offset(hidden_size), config.local_size(hidden_size)), (0, 4096));

    // 2-way tensor parallelism, rank 0
    let config = TensorParallelConfig::new(2, 0);

    // Compute local size for partitioned dimension
    let local_size = config.local_size(hidden_size); // hidden_size / world_size
    let offset = config.local_offset(hidden_size); // rank * local_size
    assert_eq!((local_size, offset), (2048, 0));
    assert_eq!(TensorParallelConfig::new(2, 1).local_offset(hidden_size), 2048);
}

#[test]
fn tensor_parallel_strategy() {
    let says = |strategy| {
        use torchless::TensorParallelStrategy;

        match strategy {
            TensorParallelStrategy::ColumnParallel => {
                // Split output dimension - each device computes partial output
                "output"
            }
            TensorParallelStrategy::RowParallel => {
                // Split input dimension - needs all-reduce for final result
                "input"
            }
            TensorParallelStrategy::None => {
                // No parallelism
                "none"
            }
        }
    };
    use torchless::TensorParallelStrategy;
    let all = [TensorParallelStrategy::ColumnParallel, TensorParallelStrategy::RowParallel, TensorParallelStrategy::None];
    assert_eq!(all.map(says), ["output", "input", "none"]);
}

#[test]
fn linears_and_all_reduce() {
    let (weights, input) = (weights(10, 10), vec![1.0; 10]);
    let full = torchless::matmul_vec_adaptive(&weights, &input, &Default::default());
    let (mut locals, mut partial_outputs) = (Vec::new(), Vec::new());
    for config in [0, 1, 2].map(|rank| TensorParallelConfig::new(3, rank)) {
        use torchless::column_parallel_linear;

        // Each device computes a subset of output features
        let local_output = column_parallel_linear(&weights, &input, &config);
        // Outputs from all devices are concatenated
        locals.extend(local_output);

        use torchless::row_parallel_linear;

        // Each device computes a partial result
        let partial_output = row_parallel_linear(&weights, &input, &config);
        // Partial results need all-reduce to get final output
        partial_outputs.push(partial_output);
    }
    assert_eq!(locals, full);

    let [partial_0, partial_1, partial_2] = partial_outputs.try_into().expect("one for each of 3 ranks");

    use torchless::{all_reduce_sum, all_reduce_sum_inplace};

    // Combine partial results
    let partials = vec![partial_0, partial_1, partial_2];
    let combined = all_reduce_sum(&partials);
    assert_eq!(combined, full);

    let mut result = vec![f32::NAN; 10];
    let partial_refs: Vec<&[f32]> = partials.iter().map(Vec::as_slice).collect();
    // In-place version
    all_reduce_sum_inplace(&mut result, &partial_refs);
    assert_eq!(result, full);
}

#[test]
fn tensor_parallel_mlp() {
    let (input, gate_proj, up_proj, down_proj) = (vec![0.25; 6], weights(9, 6), weights(9, 6), weights(6, 9));
    let mut partials = Vec::new();
    for tp_config in [TensorParallelConfig::default(), TensorParallelConfig::new(2, 0), TensorParallelConfig::new(2, 1)] {
        use torchless::mlp_tensor_parallel;

        let output = mlp_tensor_parallel(&input, &gate_proj, &up_proj, &down_proj, &tp_config);

        partials.push(output);
    }
    let (whole, halves) = (&partials[0], torchless::all_reduce_sum(&partials[1..]));
    assert!(whole.iter().any(|v| v.abs() > 0.1), "{whole:?}");
    assert!(whole.iter().zip(&halves).all(|(a, b)| (a - b).abs() < 1e-5), "{whole:?} and {halves:?}");
}

#[test]
fn parallel_config() {
    use torchless::ParallelConfig;

    // Default (adaptive matmul, parallel heads)
    let config = ParallelConfig::default();
    assert_eq!(config.tensor, TensorParallelConfig::default());

    // Pipeline parallelism with 4 micro-batches
    let config = ParallelConfig::pipeline(4);
    assert_eq!(config.pipeline.num_micro_batches, 4);

    // Tensor parallelism (2-way, rank 0)
    let config = ParallelConfig::tensor_parallel(2, 0);
    assert_eq!(config.tensor, TensorParallelConfig::new(2, 0));
    assert_eq!(ParallelConfig::from(TensorParallelConfig::new(2, 0)), config);
}

#[test]
fn parallel_config_for_a_model() {
    use torchless::{ParallelConfig, Parameters};

    let params = Parameters::load(fixture("tiny-mistral")).unwrap();
    let model_config = params.config().clone();

    // Auto-configure for model
    let config = ParallelConfig::for_model(&model_config);

    assert!(config.validate(&model_config).is_ok());
}

#[test]
fn tensor_parallel_mistral() -> Result<(), torchless::Error> {
    use torchless::{InferenceState, Parameters, TensorParallelConfig, TensorParallelMistral};

    let params = Parameters::load(fixture("tiny-mistral"))?;
    let mut state = InferenceState::new(params.config());
    let token = 1;

    let tp_config = TensorParallelConfig::new(2, 0); // 2-way, rank 0
    let model = TensorParallelMistral::load(params, tp_config)?;

    model.forward(&mut state, token, false);

    assert_eq!((state.position(), state.logits().len()), (1, 320));
    model.fast_forward(&mut state, token, true);
    assert_eq!(state.tokens(), [1, 1]);
    Ok(())
}

#[test]
fn load_on_gpus() -> Result<(), torchless::Error> {
    use torchless::{Device, InferenceState, Parameters, TensorParallelMistral};

    let params = Parameters::load(fixture("tied"))?;
    let mut state = InferenceState::new(params.config());
    let devices = vec![Device::cpu(), Device::cpu()];

    let model = TensorParallelMistral::load_on_gpus(params, devices)?;

    model.prefill(&mut state, &[1, 2, 3])?;
    assert_eq!(model.ranks().len(), 2);
    Ok(())
}

#[test]
fn pipeline_parallel_mistral() -> Result<(), torchless::Error> {
    use torchless::{InferenceState, ParallelConfig, Parameters};

    let params = Parameters::load(fixture("tiny-mistral"))?;
    let mut state = InferenceState::new(params.config());
    let layers = params.config().n_layers;
    let token = 1;

    use torchless::PipelineParallelMistral;

    let config = ParallelConfig::pipeline(4);
    let model = PipelineParallelMistral::load(params, config)?;

    model.forward(&mut state, token, false);
    assert_eq!((state.position(), state.logits().len()), (1, 320));
    model.fast_forward(&mut state, token, false);
    assert_eq!(state.tokens(), [1, 1]);
    assert_eq!(model.ranks().len(), layers.min(4), "a rank a stage");
    Ok(())
}

fn fixture(name: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}
