//! What it gains that one half of a prompt computes while the other is summed: `cargo bench --bench overlap`.

#[path = "../tests/common/mod.rs"]
mod common;
mod measure;

use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use common::{Spec, write_checkpoint};
use measure::{measured, spread, told};
use safetensors::Dtype;
use torchless::{Collective, Device, Error, InferenceState, KvType, ParallelConfig, Parameters, TensorParallelMistral, devices};

const PROMPT: usize = 512;
/// Turns of each of the two, at least and at most, and how long they may take together once there are enough.
const TURNS: std::ops::RangeInclusive<usize> = 5..=40;
const TIME: Duration = Duration::from_secs(20);

/// A thread of a group whose exchanges take time and no core, as a network or a bus does.
struct Link {
    rank: usize,
    shared: Arc<Shared>,
}

struct Shared {
    barrier: Barrier,
    parts: Mutex<Vec<Vec<f32>>>,
    seconds_per_value: Mutex<f64>,
    values: Mutex<usize>,
}

impl Link {
    fn group(size: usize) -> Vec<Self> {
        let shared = Shared {
            barrier: Barrier::new(size),
            parts: Mutex::new(vec![vec![]; size]),
            seconds_per_value: Mutex::new(0.0),
            values: Mutex::new(0),
        };
        let shared = Arc::new(shared);
        (0..size).map(|rank| Self { rank, shared: shared.clone() }).collect()
    }
}

impl Collective for Link {
    fn rank(&self) -> usize {
        self.rank
    }
    fn size(&self) -> usize {
        lock(&self.shared.parts).len()
    }
    fn all_gather(&self, local: &[f32], _: &[usize], all: &mut [f32]) -> Result<(), Error> {
        lock(&self.shared.parts)[self.rank] = local.to_vec();
        *lock(&self.shared.values) += local.len();
        self.shared.barrier.wait();
        all.copy_from_slice(&lock(&self.shared.parts).concat());
        std::thread::sleep(Duration::from_secs_f64(local.len() as f64 * *lock(&self.shared.seconds_per_value)));
        self.shared.barrier.wait();
        Ok(())
    }
    fn broadcast(&self, _: usize, _: &mut [u8]) -> Result<(), Error> {
        Err(Error::Collective("nothing is broadcast here".into()))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| panic!("{e}"))
}

/// A model of which a prompt can be timed.
struct Timed(TensorParallelMistral, InferenceState);

impl Timed {
    fn new(model: TensorParallelMistral) -> Self {
        let state = InferenceState::with_kv(model.config(), KvType::F16);
        Self(model, state)
    }

    fn seconds(&mut self) -> f64 {
        let prompt: Vec<u32> = (0..PROMPT).map(|i| (i * 7919 % self.0.config().vocab_size) as u32).collect();
        self.1.reset();
        let start = Instant::now();
        self.0.fast_prefill(&mut self.1, &prompt).unwrap_or_else(|e| panic!("{e}"));
        start.elapsed().as_secs_f64()
    }
}

/// Seconds of both in turn, without the first turn, which compiles what drivers compile late.
fn in_turn(most: usize, mut both: [impl FnMut() -> f64; 2]) -> [Vec<f64>; 2] {
    both.iter_mut().for_each(|one| _ = one());
    let (start, mut seconds) = (Instant::now(), [vec![], vec![]]);
    while seconds[0].len() < most && (seconds[0].len() < *TURNS.start() || start.elapsed() < TIME) {
        both.iter_mut().zip(&mut seconds).for_each(|(one, seconds)| seconds.push(one()));
    }
    seconds
}

fn print(what: &str, list: &[Device], [plain, overlapped]: [Vec<f64>; 2]) {
    let ratios = plain.iter().zip(&overlapped).map(|(plain, overlapped)| plain / overlapped).collect();
    let speed = |seconds: Vec<f64>| PROMPT as f64 / spread(seconds)[0];
    let labels: Vec<String> = list.iter().map(Device::label).collect();
    let (plain, overlapped, ratio) = (speed(plain), speed(overlapped), told(spread(ratios)));
    println!("| {what} | {} | {plain:.0} tokens/s | {overlapped:.0} tokens/s | {ratio} |", labels.join(", "));
}

fn configs() -> [ParallelConfig; 2] {
    let config = ParallelConfig::default().kv_positions(PROMPT).threads(1);
    [config.clone().without_overlap(), config]
}

/// Ranks of one process, whose host sums.
fn on_one_host(params: &Parameters, list: &[Device], most: usize) {
    let load = |config| TensorParallelMistral::load_grid(params.clone(), config, list.iter().cloned().map(Device::isolated));
    let [mut plain, mut overlapped] = configs().map(|config| Timed::new(load(config).unwrap_or_else(|e| panic!("{e}"))));
    let seconds = in_turn(most, [&mut || plain.seconds(), &mut || overlapped.seconds()] as [&mut dyn FnMut() -> f64; 2]);
    print("the host sums", list, seconds);
}

/// Ranks of two members, whose exchanges take these parts of the time that computing takes.
fn over_a_link(params: &Parameters, list: &[Device], most: usize, parts: &[f64]) {
    let groups: Vec<Vec<Link>> = (0..2).map(|_| Link::group(list.len())).collect();
    let shared: Vec<Arc<Shared>> = groups.iter().map(|group| group[0].shared.clone()).collect();
    // Each member steps both models as often as the others do.
    let start = Barrier::new(list.len());
    let mut members: Vec<Vec<Link>> = (0..list.len()).map(|_| Vec::new()).collect();
    groups.into_iter().flatten().for_each(|link| members[link.rank].push(link));
    std::thread::scope(|scope| {
        for (links, device) in members.into_iter().zip(list) {
            let (start, shared) = (&start, &shared);
            scope.spawn(move || {
                let rank = links[0].rank;
                let mut both: Vec<Timed> = links
                    .into_iter()
                    .zip(configs())
                    .map(|(link, mut config)| {
                        config.tensor = torchless::TensorParallelConfig::new(list.len(), rank);
                        let model = TensorParallelMistral::load_with_device(params.clone(), config, Arc::new(link), device.clone());
                        Timed::new(model.unwrap_or_else(|e| panic!("{e}")))
                    })
                    .collect();
                both.iter_mut().for_each(|model| _ = model.seconds());
                let mut turns = |what: &str| {
                    let mut seconds = [vec![], vec![]];
                    for _ in 0..most.min(*TURNS.start()) {
                        both.iter_mut().zip(&mut seconds).for_each(|(model, seconds)| seconds.push(model.seconds()));
                    }
                    if rank == 0 {
                        print(what, list, seconds.clone());
                    }
                    seconds
                };
                // How long computing alone takes, and how many values it exchanges.
                start.wait();
                *lock(&shared[0].values) = 0;
                start.wait();
                let [plain, _] = turns("exchanges take no time");
                let turns_taken = plain.len();
                start.wait();
                let values = *lock(&shared[0].values) / list.len() / turns_taken;
                let [alone, ..] = spread(plain);
                for part in parts {
                    start.wait();
                    shared.iter().for_each(|shared| *lock(&shared.seconds_per_value) = part * alone / values as f64);
                    start.wait();
                    turns(&format!("exchanges take {:.0} % of the time that computing takes", 100.0 * part));
                }
            });
        }
    });
}

fn main() {
    let most = if measured() { *TURNS.end() } else { 1 };
    let all = devices();
    all.iter().for_each(|device| println!("- {device}"));
    let find = |label: &str| all.iter().find(|device| device.label() == label).cloned();
    let list = |labels: &[&str]| labels.iter().map(|label| find(label)).collect::<Option<Vec<_>>>();
    let dir = tempfile::tempdir().unwrap_or_else(|e| panic!("{e}"));
    let spec = Spec {
        hidden: 1024,
        intermediate: 2816,
        layers: 2,
        heads: 16,
        kv_heads: 4,
        head_dim: 64,
        vocab: 64,
        dtype: Dtype::F16,
        max_positions: 1024,
        ..Spec::default()
    };
    write_checkpoint(dir.path(), &spec);
    let params = Parameters::load(dir.path()).unwrap_or_else(|e| panic!("{e}"));
    if find("gpu:1").is_none() {
        println!("SKIPPED: gpu:1 is missing: there is nothing to overlap");
    }
    println!("\n| how parts are exchanged | ranks | one after the other | overlapped | ratio (p10..p90) |\n|---|---|---|---|---|");
    for labels in [["gpu:1", "gpu:2"], ["gpu:0", "gpu:1"], ["gpu:1", "gpu:1"], ["cpu", "gpu:1"]] {
        list(&labels).into_iter().for_each(|list| on_one_host(&params, &list, most));
    }
    if let Some(list) = list(&["gpu:1", "gpu:2"]) {
        over_a_link(&params, &list, most, &[0.1, 0.25, 0.5]);
    }
}
