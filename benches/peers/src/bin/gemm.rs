//! torchless' prefill of an f32 model beside OpenBLAS multiplying the same matrices: `gemm --models DIR`, with the feature `openblas`
//! and Debian's `libopenblas-dev`. How fast OpenBLAS is depends on the kernels that it takes; `OPENBLAS_CORETYPE` chooses them.

use std::ffi::{CStr, c_char, c_int};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Parser;
use torchless::{Config, InferenceState, KvType, ParallelConfig, Parameters, TensorParallelMistral};

#[link(name = "openblas")]
unsafe extern "C" {
    fn openblas_set_num_threads(threads: c_int);
    fn openblas_get_corename() -> *const c_char;
    #[rustfmt::skip]
    fn cblas_sgemm(
        order: c_int,
        transpose_a: c_int,
        transpose_b: c_int,
        m: c_int,
        n: c_int,
        k: c_int,
        alpha: f32,
        a: *const f32,
        lda: c_int,
        b: *const f32,
        ldb: c_int,
        beta: f32,
        c: *mut f32,
        ldc: c_int,
    );
}

/// Compares torchless' prefill with OpenBLAS.
#[derive(Parser)]
struct Arguments {
    /// What `make-model` made.
    #[arg(long)]
    models: PathBuf,
    #[arg(long, default_value_t = 2)]
    threads: usize,
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Tokens of the prompt: rows of the products.
    #[arg(long, default_value_t = 512)]
    prompt: usize,
}

/// Outputs and inputs of a layer's matrices.
fn layer(config: &Config) -> [[usize; 2]; 7] {
    let (hidden, inter) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim);
    [[q, hidden], [kv, hidden], [kv, hidden], [hidden, q], [inter, hidden], [inter, hidden], [hidden, inter]]
}

/// `y = x w^T` of row-major `[m, k]` and `[n, k]`.
fn multiply(x: &[f32], w: &[f32], y: &mut [f32], m: usize, [n, k]: [usize; 2]) {
    const ROW_MAJOR: c_int = 101;
    const AS_IT_IS: c_int = 111;
    const TRANSPOSED: c_int = 112;
    assert!(x.len() >= m * k && w.len() >= n * k && y.len() >= m * n);
    let (rows, outs, ins) = (m as c_int, n as c_int, k as c_int);
    // SAFETY: the lengths are checked.
    unsafe {
        let (x, w, y) = (x.as_ptr(), w.as_ptr(), y.as_mut_ptr());
        cblas_sgemm(ROW_MAJOR, AS_IT_IS, TRANSPOSED, rows, outs, ins, 1.0, x, ins, w, ins, 0.0, y, outs);
    }
}

fn main() -> Result<()> {
    let Arguments { models, threads, rounds, prompt } = Arguments::parse();
    ensure!(rounds > 0 && prompt > 0 && threads > 0, "at least one round, token and thread are needed");
    let config = ParallelConfig::default().threads(threads).kv_positions(prompt);
    let model = TensorParallelMistral::load(Parameters::load(models.join("f32"))?, config)?;
    let (config, mut state) = (model.config().clone(), InferenceState::with_kv(model.config(), KvType::F16));
    let tokens: Vec<u32> = (0..prompt as u32).map(|i| 3 + i * 7919 % 31_991).collect();

    // SAFETY: OpenBLAS is idle.
    unsafe { openblas_set_num_threads(threads as c_int) };
    let shapes = layer(&config);
    let values = |n: usize| (0..n).map(|i| (i % 251) as f32 / 125.0 - 1.0).collect::<Vec<f32>>();
    let weights: Vec<Vec<f32>> = shapes.iter().map(|[n, k]| values(n * k)).collect();
    let widest = config.intermediate_size.max(config.hidden_size);
    let (x, mut y) = (values(prompt * widest), vec![0.0; prompt * widest]);
    let flops = 2.0 * (prompt * config.n_layers * shapes.iter().map(|[n, k]| n * k).sum::<usize>()) as f64;

    let (mut rates, mut ratios) = ([Vec::new(), Vec::new()], Vec::new());
    for round in 0..=rounds {
        let mut seconds = [0.0; 2];
        for turn in 0..2 {
            let side = (round + turn) % 2;
            let start = Instant::now();
            if side == 0 {
                state.reset();
                model.fast_prefill(&mut state, &tokens)?;
            } else {
                for (shape, w) in (0..config.n_layers).flat_map(|_| shapes.iter().zip(&weights)) {
                    multiply(&x, w, &mut y, prompt, *shape);
                }
            }
            seconds[side] = start.elapsed().as_secs_f64();
        }
        // The first round warms up.
        if round > 0 {
            rates.iter_mut().zip(seconds).for_each(|(rates, seconds)| rates.push(flops / seconds / 1e9));
            ratios.push(seconds[1] / seconds[0]);
        }
    }
    let at = |values: &mut Vec<f64>, share: f64| {
        values.sort_by(f64::total_cmp);
        values[((values.len() - 1) as f64 * share).round() as usize]
    };
    // SAFETY: a string that OpenBLAS keeps.
    let kernels = unsafe { CStr::from_ptr(openblas_get_corename()) }.to_string_lossy().into_owned();
    let [ours, theirs] = rates.each_mut().map(|rates| at(rates, 0.5));
    let [low, ratio, high] = [0.1, 0.5, 0.9].map(|share| at(&mut ratios, share));
    println!(
        "| rows | threads | torchless, whole prefill | OpenBLAS ({kernels}), products alone | ratio (p10..p90) |\n|---|---|---|---|---|"
    );
    println!("| {prompt} | {threads} | {ours:.0} GFLOP/s | {theirs:.0} GFLOP/s | {ratio:.2} ({low:.2}..{high:.2}) |");
    Ok(())
}
