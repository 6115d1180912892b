//! `torchless bench`: tokens a second, and where the time goes.

use std::num::NonZeroUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use serde_json::json;
use torchless::{Error, InferenceState, Parameters, TensorParallelMistral, plan_summary};

use super::Outcome;
use super::grid::{GridArgs, RunArgs};
use super::output::{bytes, print, print_json, table};

/// What a step's time goes to, in the order of [`TensorParallelMistral::traced_seconds`]; and what is left of it, in which a rank waits for others.
const PARTS: [&str; 5] = ["compute", "read", "reduce", "write", "idle"];

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

    /// Sequences that decode at once, dealt out to the stages
    #[arg(long, value_name = "B", default_value = "1", value_parser = clap::value_parser!(u16).range(1..=4096))]
    batch: u16,

    /// Show what became of the CPU's tasks, chunks of a matrix's outputs or of attention, in one timed prefill and in one timed decode
    #[arg(long)]
    stats: bool,
}

/// Tasks of the CPU: all, and those that ran on another thread than the one that split them off.
#[derive(Clone, Copy)]
struct Tasks {
    created: usize,
    stolen: usize,
}

impl Tasks {
    fn of(model: &TensorParallelMistral) -> Self {
        let stats = model.work_stats();
        Self { created: stats.tasks_created.load(Relaxed), stolen: stats.stolen_tasks.load(Relaxed) }
    }

    fn since(self, before: Self) -> Self {
        Self { created: self.created - before.created, stolen: self.stolen - before.stolen }
    }

    fn steal_ratio(self) -> f64 {
        self.stolen as f64 / self.created.max(1) as f64
    }

    fn json(self) -> serde_json::Value {
        json!({ "created": self.created, "local": self.created - self.stolen, "stolen": self.stolen, "steal_ratio": self.steal_ratio() })
    }
}

/// A prompt and its continuation, computed once.
struct Run<'a> {
    model: &'a TensorParallelMistral,
    fast: bool,
    callers: usize,
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

    /// Every sequence takes the same tokens. Each of the stages' worth of callers steps its part of them, so that no stage waits for another's.
    fn decode(&self, states: &mut [InferenceState]) -> Result<f64, Error> {
        let part = states.len().div_ceil(self.callers);
        let start = Instant::now();
        std::thread::scope(|scope| {
            let callers: Vec<_> = states.chunks_mut(part).map(|states| scope.spawn(|| self.steps(states))).collect();
            callers.into_iter().try_for_each(|caller| caller.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })?;
        Ok(start.elapsed().as_secs_f64())
    }

    fn steps(&self, states: &mut [InferenceState]) -> Result<(), Error> {
        let mut states: Vec<&mut InferenceState> = states.iter_mut().collect();
        for &token in &self.decode {
            let tokens = vec![token; states.len()];
            if self.fast { self.model.fast_forward_batch(&mut states, &tokens)? } else { self.model.forward_batch(&mut states, &tokens)? }
        }
        Ok(())
    }
}

pub fn run(args: &Args) -> Outcome {
    let params = Parameters::load(args.grid.model.path()?)?;
    let (p, d) = (args.prompt_tokens.get(), args.decode_tokens.get());
    let positions = p.saturating_add(d);
    let limit = params.config().max_position_embeddings;
    if positions > limit {
        return Err(Error::ContextFull { position: 0, wanted: positions, limit }.into());
    }
    let batch = usize::from(args.batch);
    let mut config = args.grid.config(&params, positions);
    // Each sequence has whole pages, of either type.
    config.kv_positions = config.kv_positions.map(|positions| positions.next_multiple_of(128).saturating_mul(batch));
    config.pipeline.async_execution = true;
    let (devices, config) = args.grid.chosen(&params, config)?;
    let plan = plan_summary(&params, &config, &devices)?;
    let loaded = args.grid.load_on(devices, &args.run, &params, config)?;
    let vocab = params.config().vocab_size;
    // Which tokens doesn't matter to the speed, but equal ones would be kind to caches.
    let token = |i: usize| (i.wrapping_mul(7919) % vocab) as u32;
    let fast = args.run.is_fast(true);
    let callers = args.grid.stages.get();
    let run = Run { model: &loaded.model, fast, callers, prompt: (0..p).map(token).collect(), decode: (p..positions).map(token).collect() };

    // The first round warms caches and compiles kernels, the second is timed, the third traced.
    let mut states: Vec<_> = (0..batch).map(|_| InferenceState::with_kv(params.config(), args.run.kv(fast))).collect();
    let round = |states: &mut [InferenceState]| -> Result<_, Error> {
        let (mut prefill, start) = (0.0, Tasks::of(&loaded.model));
        for state in &mut *states {
            prefill += run.prefill(state)?;
        }
        let (decoding, filled) = (Tasks::of(&loaded.model), prefill / batch as f64);
        let decode = run.decode(states)?;
        Ok((filled, decode, [decoding.since(start), Tasks::of(&loaded.model).since(decoding)]))
    };
    round(&mut states)?;
    let (prefill, decode, tasks) = round(&mut states)?;
    loaded.model.start_trace();
    let parts = args.run.traced(&loaded, || {
        states.iter_mut().try_for_each(|state| run.prefill(state).map(drop))?;
        let before = loaded.model.traced_seconds_by_rank();
        let seconds = run.decode(&mut states)?;
        let after = loaded.model.traced_seconds_by_rank();
        let a_step = |(after, before): (&[f64; 4], &[f64; 4])| {
            let parts = [0, 1, 2, 3].map(|part| (after[part] - before[part]) / d as f64);
            let idle = (seconds / d as f64 - parts.iter().sum::<f64>()).max(0.0);
            [parts[0], parts[1], parts[2], parts[3], idle]
        };
        Ok(after.iter().zip(&before).map(a_step).collect::<Vec<_>>())
    })?;
    // By the GPUs' own clocks, which cost something: a round for nothing else.
    states.iter_mut().try_for_each(|state| run.prefill(state).map(drop))?;
    let before = device_seconds(&loaded.model)?;
    loaded.model.time_devices(true);
    run.decode(&mut states)?;
    loaded.model.time_devices(false);
    let clocked = (device_seconds(&loaded.model)? - before) / d as f64;
    let mean = |part: usize| parts.iter().map(|rank| rank[part]).sum::<f64>() / parts.len() as f64;

    let (prefill_speed, decode_speed, peak) = (p as f64 / prefill, (batch * d) as f64 / decode, peak_rss_bytes());
    if args.grid.json {
        let mut document = json!({
            "prompt_tokens": p,
            "decode_tokens": d,
            "batch": batch,
            "prefill_tokens_per_s": prefill_speed,
            "decode_tokens_per_s": decode_speed,
            "weight_bytes_per_token": plan.weight_bytes_per_token,
            "collectives_per_token": plan.collectives_per_token,
            "load_s": loaded.seconds,
            "peak_rss_bytes": peak,
            "step_s": named(&std::array::from_fn(mean)),
            "device_s": clocked,
            "ranks": loaded.model.ranks().iter().zip(&parts).map(|(rank, parts)| {
                json!({ "stage": rank.stage, "rank": rank.rank, "device": rank.device, "step_s": named(parts) })
            }).collect::<Vec<_>>(),
        });
        if args.stats {
            document["cpu_tasks"] = json!({ "prefill": tasks[0].json(), "decode": tasks[1].json() });
        }
        return print_json(&document);
    }
    let mut rows = vec![
        ["measured", "value"].map(str::to_owned).to_vec(),
        vec!["load".into(), format!("{:.3} s", loaded.seconds)],
        vec![format!("prefill of {p}"), format!("{prefill_speed:.1} tokens/s")],
        vec![if batch == 1 { format!("decode of {d}") } else { format!("decode of {batch} x {d}") }, format!("{decode_speed:.1} tokens/s")],
        vec![if batch == 1 { "weights read a token".into() } else { "weights read a step".into() }, bytes(plan.weight_bytes_per_token)],
        vec!["peak memory".into(), peak.map_or("unknown".into(), bytes)],
    ];
    if args.stats {
        for (part, tasks) in ["prefill", "decode"].into_iter().zip(tasks) {
            let Tasks { created, stolen } = tasks;
            rows.push(vec![format!("CPU tasks, {part}"), format!("{created}, {stolen} stolen ({:.1} %)", 100.0 * tasks.steal_ratio())]);
        }
    }
    if clocked > 0.0 {
        rows.push(vec!["GPUs' own clocks, a decode step".into(), format!("{:.1} us", clocked * 1e6)]);
    }
    let header = [&["us of a decode step", "stage", "rank"][..], &PARTS].concat().into_iter().map(str::to_owned).collect();
    let steps = loaded.model.ranks().iter().zip(&parts).map(|(rank, parts)| {
        let places = [rank.device.clone(), rank.stage.to_string(), rank.rank.to_string()];
        places.into_iter().chain(parts.map(|seconds| format!("{:.1}", seconds * 1e6))).collect()
    });
    print(&format!("{}\n{}", table(&rows), table(&std::iter::once(header).chain(steps).collect::<Vec<_>>())))
}

/// What GPUs have computed by their own clocks, all together.
fn device_seconds(model: &TensorParallelMistral) -> Result<f64, Error> {
    Ok(model.counts()?.iter().map(|place| place.device_nanoseconds as f64 / 1e9).sum())
}

/// The seconds of each part of a step.
fn named(parts: &[f64; 5]) -> std::collections::BTreeMap<&'static str, f64> {
    PARTS.into_iter().zip(*parts).collect()
}

/// The most memory that this process has had, where the system says.
fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
