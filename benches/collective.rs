//! What an all-reduce through the host costs, in microseconds, by devices: `cargo bench --bench collective [-- --json]`.
//!
//! A model whose every sum has 4096 values, and whose matrices are otherwise next to nothing, steps on many grids in turn. The
//! engine's own trace says how long each part of each all-reduce took. benches/README.md says what the columns mean.

#[path = "../tests/common/mod.rs"]
mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Spec, write_checkpoint};
use serde::{Deserialize, Serialize};
use torchless::{
    AllReduceTime, Device, InferenceState, ParallelConfig, Parameters, TensorParallelMistral, Wire, all_reduce_times, devices,
};

/// Values of a sum: 16 KiB, the hidden size of Mistral-7B.
const HIDDEN: usize = 4096;
const LAYERS: usize = 2;
/// After attention and after the MLP.
const ALL_REDUCES: usize = 2 * LAYERS;
/// Tokens of a grid's turn. The first is not counted: it finds the caches full of another grid's data.
const TOKENS: usize = 5;
const MOST_ROUNDS: usize = 300;
const TIME: Duration = Duration::from_secs(60);
/// Rounds of all-reduces by themselves.
const ALONE_ROUNDS: usize = 30;

/// A model on some devices, each rank a place of its own.
struct Grid {
    devices: Vec<Device>,
    model: TensorParallelMistral,
    /// Median seconds of a token, by round.
    tokens: Vec<f64>,
}

impl Grid {
    fn load(params: &Parameters, devices: Vec<Device>) -> Self {
        let isolated = devices.iter().map(|d| d.clone().isolated());
        let config = ParallelConfig::default().kv_positions(64 * TOKENS);
        let model = TensorParallelMistral::load_grid(params.clone(), config, isolated).unwrap_or_else(|e| panic!("{e}"));
        let mut grid = Self { devices, model, tokens: Vec::new() };
        // The first tokens compile what drivers compile late.
        grid.turn();
        grid.tokens.clear();
        grid.model.start_trace();
        grid
    }

    fn turn(&mut self) {
        let mut state = InferenceState::new(self.model.config());
        let step = |token| {
            let start = Instant::now();
            self.model.forward(&mut state, token, false);
            start.elapsed().as_secs_f64()
        };
        let seconds: Vec<f64> = [1; TOKENS].into_iter().map(step).skip(1).collect();
        self.tokens.push(Quantiles::of(seconds).median);
    }

    fn labels(&self) -> Vec<String> {
        self.devices.iter().map(Device::label).collect()
    }
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Quantiles {
    p10: f64,
    median: f64,
    p90: f64,
}

impl Quantiles {
    fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let at = |q: f64| values[((values.len() - 1) as f64 * q).round() as usize];
        Self { p10: at(0.1), median: at(0.5), p90: at(0.9) }
    }
}

/// An event of a trace as [`TensorParallelMistral::write_trace`] writes it, in microseconds. Those that name rows have no `args` of a span.
#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    cat: String,
    #[serde(default)]
    ts: f64,
    #[serde(default)]
    dur: f64,
    args: Args,
}

#[derive(Deserialize)]
struct Args {
    micro_batch: Option<u64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Trace {
    trace_events: Vec<Event>,
    dropped: usize,
}

/// Microseconds of an all-reduce by part, each the mean over a token's all-reduces.
#[derive(Default)]
struct Parts {
    launch: Vec<f64>,
    work: Vec<f64>,
    read: Vec<f64>,
    sum: Vec<f64>,
    step: Vec<f64>,
}

impl Parts {
    /// Of every counted token in the trace of a model.
    fn of(model: &TensorParallelMistral, dir: &Path) -> Self {
        let path = dir.join("trace.json");
        model.write_trace(&path).unwrap();
        let trace: Trace = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(trace.dropped, 0, "the trace is full: lower MOST_ROUNDS");
        let mut tokens: BTreeMap<u64, Vec<Event>> = BTreeMap::new();
        for event in trace.trace_events {
            if let Some(number) = event.args.micro_batch {
                tokens.entry(number).or_default().push(event);
            }
        }
        let mut parts = Self::default();
        tokens.values().enumerate().filter(|(i, _)| i % TOKENS > 0).for_each(|(_, events)| parts.add(events));
        parts
    }

    /// Adds a token. Its events come in the order of their ends: a step's launches, then of rank after rank its work, its read and its addition.
    fn add(&mut self, events: &[Event]) {
        let [mut launch, mut work, mut read, mut sum] = [0.0; 4];
        let mut step_start = events[0].ts;
        // The next step begins with a launch, on the CPU with its computing.
        let mut steps = events.chunk_by(|a, b| a.cat != "reduce" || !["write", "compute"].contains(&&*b.cat) || b.ts < a.ts);
        for step in steps.by_ref().take(ALL_REDUCES) {
            let total = |cat: &str| step.iter().filter(|e| e.cat == cat).map(|e| e.dur).sum::<f64>();
            let end = step.iter().map(|e| e.ts + e.dur).fold(step_start, f64::max);
            let [launched, taken, added] = ["write", "read", "reduce"].map(total);
            launch += launched;
            read += taken;
            sum += added;
            work += end - step_start - launched - taken - added;
            step_start = end;
        }
        assert_eq!(steps.count(), 1, "the gather of the logits ends a token");
        let whole = step_start - events[0].ts;
        for (all, token) in [&mut self.launch, &mut self.work, &mut self.read, &mut self.sum, &mut self.step]
            .into_iter()
            .zip([launch, work, read, sum, whole])
        {
            all.push(token / ALL_REDUCES as f64);
        }
    }
}

/// What the table says of a grid, in microseconds.
#[derive(Serialize)]
struct Row {
    devices: Vec<String>,
    token: Quantiles,
    /// `None` where there is one rank and so no all-reduce.
    all_reduce: Option<AllReduce>,
}

/// The columns of benches/README.md.

#[derive(Serialize)]
struct AllReduce {
    launch: Quantiles,
    work: Quantiles,
    read: Quantiles,
    sum: Quantiles,
    step: Quantiles,
    one_place: Quantiles,
    over_one_place: Quantiles,
}

/// One rank, two and four on each device; each adapter with the CPU; each pair of adapters; all adapters.
fn lists(all: &[Device]) -> Vec<Vec<Device>> {
    let (cpu, gpus) = (&all[0], &all[1..]);
    let mut lists: Vec<_> = [1, 2, 4].into_iter().flat_map(|n| all.iter().map(move |d| vec![d.clone(); n])).collect();
    lists.extend(gpus.iter().map(|gpu| vec![cpu.clone(), gpu.clone()]));
    for (i, a) in gpus.iter().enumerate() {
        lists.extend(gpus[i + 1..].iter().map(|b| vec![a.clone(), b.clone()]));
    }
    if gpus.len() > 2 {
        lists.push(gpus[..gpus.len().min(4)].to_vec());
    }
    lists
}

fn measure(all: &[Device], most_rounds: usize) -> (usize, Vec<Row>) {
    let dir = tempfile::tempdir().unwrap();
    let spec = Spec {
        hidden: HIDDEN,
        layers: LAYERS,
        intermediate: 4,
        heads: 4,
        kv_heads: 1,
        head_dim: 2,
        vocab: 4,
        max_positions: 64,
        ..Spec::default()
    };
    write_checkpoint(dir.path(), &spec);
    let params = Parameters::load(dir.path()).unwrap();
    let mut grids: Vec<Grid> = lists(all).into_iter().map(|list| Grid::load(&params, list)).collect();

    let (start, mut rounds) = (Instant::now(), 0);
    while rounds < most_rounds && start.elapsed() < TIME {
        grids.iter_mut().for_each(Grid::turn);
        rounds += 1;
    }
    let alone = |device: &Device| grids.iter().find(|g| g.devices.len() == 1 && g.labels()[0] == device.label()).map(|g| &g.tokens);
    let row = |grid: &Grid| {
        let all_reduce = (grid.devices.len() > 1).then(|| {
            let slowest = |round: usize| grid.devices.iter().filter_map(alone).map(|tokens| tokens[round]).fold(0.0, f64::max);
            let each = |seconds: f64| 1e6 * seconds / ALL_REDUCES as f64;
            let parts = Parts::of(&grid.model, dir.path());
            AllReduce {
                launch: Quantiles::of(parts.launch),
                work: Quantiles::of(parts.work),
                read: Quantiles::of(parts.read),
                sum: Quantiles::of(parts.sum),
                step: Quantiles::of(parts.step),
                one_place: Quantiles::of((0..grid.tokens.len()).map(|round| each(slowest(round)))),
                over_one_place: Quantiles::of(grid.tokens.iter().enumerate().map(|(round, token)| each(token - slowest(round)))),
            }
        });
        Row { devices: grid.labels(), token: Quantiles::of(grid.tokens.iter().map(|t| 1e6 * t)), all_reduce }
    };
    (rounds, grids.iter().map(row).collect())
}

/// Values of one row, and of a prompt's.
const SIZES: [(usize, usize, Wire); 4] = [(4096, 1, Wire::F32), (1024, 1, Wire::F32), (4096, 64, Wire::F32), (4096, 64, Wire::F16)];

/// All-reduces by themselves, against the same dispatches and read-backs without the sum and the writes.
fn print_alone(all: &[Device], rounds: usize) {
    let heads = SIZES.map(|(values, rows, wire)| format!("{rows} x {values} {}", wire.name())).join(" | ");
    println!("\n| ranks | {heads} | read and added, of the first |\n|---|---|---|---|---|---|");
    for list in lists(all).into_iter().filter(|list| list.len() > 1) {
        let mut host = 0.0;
        let cells = SIZES.iter().enumerate().map(|(i, &(values, rows, wire))| {
            // Four ranks of many rows take long.
            if list.len() > 2 && rows > 1 {
                return "-".to_owned();
            }
            let times = all_reduce_times(&list, values, rows, wire, rounds).unwrap_or_else(|e| panic!("{e}"));
            let of = |part: fn(&AllReduceTime) -> f64| Quantiles::of(times.iter().map(part));
            let (whole, ratio) = (of(|t| t.whole).median, of(|t| t.whole / t.bare));
            if i == 0 {
                host = of(|t| t.host).median / whole;
            }
            format!("{:.0}: {:.2} ({:.2}..{:.2})", 1e6 * whole, ratio.median, ratio.p10, ratio.p90)
        });
        let cells = cells.collect::<Vec<_>>().join(" | ");
        let labels: Vec<String> = list.iter().map(Device::label).collect();
        println!("| {} | {cells} | {:.1} % |", labels.join(", "), 100.0 * host);
    }
}

fn print_table(rows: &[Row]) {
    println!("| devices | launch | work | read | sum | step (p10..p90) | one place (p10..p90) | over it (p10..p90) | token (p10..p90) |");
    println!("|---|---|---|---|---|---|---|---|---|");
    let spread = |q: Quantiles| format!("{:.0} ({:.0}..{:.0})", q.median, q.p10, q.p90);
    for Row { devices, token, all_reduce } in rows {
        let cells = match all_reduce {
            Some(a) => {
                let [launch, work, read, sum] = [a.launch, a.work, a.read, a.sum].map(|q| q.median);
                let spreads = [a.step, a.one_place, a.over_one_place].map(spread).join(" | ");
                format!("{launch:.1} | {work:.1} | {read:.1} | {sum:.1} | {spreads}")
            }
            None => "- | - | - | - | - | - | -".to_owned(),
        };
        println!("| {} | {cells} | {} |", devices.join(", "), spread(*token));
    }
}

fn main() {
    let given = |flag: &str| std::env::args().any(|arg| arg == flag);
    let json = given("--json");
    // `cargo bench` says --bench. `cargo test --benches` doesn't: then one round shows that all grids run.
    let most_rounds = if given("--bench") { MOST_ROUNDS } else { 1 };
    let all = devices();
    if all.len() == 1 {
        eprintln!("SKIPPED: gpu:0 is missing: only CPU ranks are measured");
    }
    let start = Instant::now();
    let (rounds, rows) = measure(&all, most_rounds);
    let describe = |d: &Device| [d.to_string().as_str(), d.backend(), d.driver(), d.driver_info()].join(" ").trim_end().to_owned();
    let described: Vec<String> = all.iter().map(describe).collect();
    if json {
        let document = serde_json::json!({
            "values": HIDDEN,
            "all_reduces_per_token": ALL_REDUCES,
            "rounds": rounds,
            "devices": described,
            "microseconds": rows,
        });
        println!("{document:#}");
    } else {
        described.iter().for_each(|d| println!("- {d}"));
        println!("\n{rounds} rounds of {} tokens, {:.0} s in all; microseconds:\n", TOKENS - 1, start.elapsed().as_secs_f64());
        print_table(&rows);
        print_alone(&all, if given("--bench") { ALONE_ROUNDS } else { 1 });
    }
}
