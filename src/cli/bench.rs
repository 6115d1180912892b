//! `torchless bench`: tokens a second, and where the time goes.

use std::num::NonZeroUsize;
use std::time::Instant;

use serde_json::json;
use torchless::{Error, InferenceState, Parameters, TensorParallelMistral, plan_summary};

use super::Outcome;
use super::grid::{GridArgs, RunArgs};
use super::output::{bytes, print, print_json, table};

/// What a step's time goes to, in the order of [`TensorParallelMistral::traced_seconds`].
const PARTS: [&str; 4] = ["compute", "read", "reduce", "write"];

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    grid: GridArgs,
    #[command(flatten)]
    run: RunArgs,

    /// Tokens of the prompt
    #[arg(long, value_name = "P", default_value = "128")]
    prompt_tokens: NonZeroUsize,

    /// Tokens generated after it
    #[arg(long, value_name = "D", default_value = "32")]
    decode_tokens: NonZeroUsize,

    /// Sequences at once; only 1 for now
    #[arg(long, value_name = "B", default_value = "1", value_parser = one)]
    batch: usize,
}

fn one(value: &str) -> Result<usize, String> {
    match value.parse() {
        Ok(1) => Ok(1),
        Ok(_) => Err("only one sequence at a time can be measured, so it must be 1".into()),
        Err(e) => Err(format!("{e}")),
    }
}

/// A prompt and its continuation, computed once.
struct Run<'a> {
    model: &'a TensorParallelMistral,
    fast: bool,
    prompt: Vec<u32>,
    decode: Vec<u32>,
}

impl Run<'_> {
    fn prefill(&self, state: &mut InferenceState) -> Result<f64, Error> {
        state.reset();
        let start = Instant::now();
        if self.fast {
            self.model.fast_prefill(state, &self.prompt)?
        } else {
            self.model.prefill(state, &self.prompt)?
        }
        Ok(start.elapsed().as_secs_f64())
    }

    fn decode(&self, state: &mut InferenceState) -> Result<f64, Error> {
        let start = Instant::now();
        for &token in &self.decode {
            if self.fast { self.model.try_fast_forward(state, token, false)? } else { self.model.try_forward(state, token, false)? }
        }
        Ok(start.elapsed().as_secs_f64())
    }
}

pub fn run(args: &Args) -> Outcome {
    let params = Parameters::load(&args.grid.model)?;
    let (p, d) = (args.prompt_tokens.get(), args.decode_tokens.get());
    let positions = p.saturating_add(d);
    let limit = params.config().max_position_embeddings;
    if positions > limit {
        return Err(Error::ContextFull { position: 0, wanted: positions, limit }.into());
    }
    let plan = plan_summary(&params, &args.grid.config(&params, positions), &args.grid.devices()?)?;
    let loaded = args.grid.load(&args.run, &params, positions)?;
    let vocab = params.config().vocab_size;
    // Which tokens doesn't matter to the speed, but equal ones would be kind to caches.
    let token = |i: usize| (i.wrapping_mul(7919) % vocab) as u32;
    let fast = args.run.is_fast(true);
    let run = Run { model: &loaded.model, fast, prompt: (0..p).map(token).collect(), decode: (p..positions).map(token).collect() };

    // The first round warms caches and compiles kernels, the second is timed, the third traced.
    let mut state = InferenceState::with_kv(params.config(), args.run.kv(fast));
    run.prefill(&mut state)?;
    run.decode(&mut state)?;
    let (prefill, decode) = (run.prefill(&mut state)?, run.decode(&mut state)?);
    drop(state);
    loaded.model.start_trace();
    let parts = args.run.run(&loaded, fast, |state| {
        run.prefill(state)?;
        let before = loaded.model.traced_seconds();
        run.decode(state)?;
        let after = loaded.model.traced_seconds();
        let share = (d * plan.ranks.len()) as f64;
        Ok([0, 1, 2, 3].map(|part| (after[part] - before[part]) / share))
    })?;

    let (prefill_speed, decode_speed, peak) = (p as f64 / prefill, d as f64 / decode, peak_rss_bytes());
    if args.grid.json {
        return print_json(&json!({
            "prompt_tokens": p,
            "decode_tokens": d,
            "batch": args.batch,
            "prefill_tokens_per_s": prefill_speed,
            "decode_tokens_per_s": decode_speed,
            "weight_bytes_per_token": plan.weight_bytes_per_token,
            "collectives_per_token": plan.collectives_per_token,
            "load_s": loaded.seconds,
            "peak_rss_bytes": peak,
            "step_s": PARTS.into_iter().zip(parts).collect::<std::collections::BTreeMap<_, _>>(),
        }));
    }
    let mut rows = vec![
        ["measured", "value"].map(str::to_owned).to_vec(),
        vec!["load".into(), format!("{:.3} s", loaded.seconds)],
        vec![format!("prefill of {p}"), format!("{prefill_speed:.1} tokens/s")],
        vec![format!("decode of {d}"), format!("{decode_speed:.1} tokens/s")],
        vec!["weights read a token".into(), bytes(plan.weight_bytes_per_token)],
        vec!["peak memory".into(), peak.map_or("unknown".into(), bytes)],
    ];
    rows.extend(PARTS.iter().zip(parts).map(|(part, seconds)| vec![format!("{part}, a decode step"), format!("{:.1} us", seconds * 1e6)]));
    print(&table(&rows))
}

/// The most memory that this process has had, where the system says.
fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
