//! What shares by speed are worth where ranks aren't equally fast: `cargo bench --bench shares`.

#[path = "../tests/common/mod.rs"]
mod common;
mod measure;

use std::time::Instant;

use common::{Spec, write_checkpoint};
use measure::{measured, spread, told};
use safetensors::Dtype;
use torchless::{Device, InferenceState, KvType, ParallelConfig, Parameters, TensorParallelMistral, choose, devices, forget_predictions};

/// Tokens of a turn, of which the first is not counted, and turns.
const TOKENS: usize = 6;
const TURNS: usize = 5;

/// A model on some devices, and how fast it was in each turn.
struct Grid {
    model: TensorParallelMistral,
    states: Vec<InferenceState>,
    tokens_per_second: Vec<f64>,
}

impl Grid {
    fn load(params: &Parameters, devices: &[Device], shares: Option<Vec<f64>>, batch: usize) -> Self {
        let mut config = ParallelConfig::default().kv_positions(128 * batch).threads(1);
        config.shares = shares;
        let model = TensorParallelMistral::load_grid(params.clone(), config, devices.iter().cloned()).unwrap_or_else(|e| panic!("{e}"));
        let states = (0..batch).map(|_| InferenceState::with_kv(model.config(), KvType::F16)).collect();
        Self { model, states, tokens_per_second: Vec::new() }
    }

    fn turn(&mut self) {
        self.states.iter_mut().for_each(InferenceState::reset);
        let mut start = Instant::now();
        for token in 0..TOKENS {
            if token == 1 {
                start = Instant::now();
            }
            let mut states: Vec<&mut InferenceState> = self.states.iter_mut().collect();
            let tokens = vec![token as u32; states.len()];
            self.model.fast_forward_batch(&mut states, &tokens).unwrap_or_else(|e| panic!("{e}"));
        }
        self.tokens_per_second.push((self.states.len() * (TOKENS - 1)) as f64 / start.elapsed().as_secs_f64());
    }
}

fn main() {
    let turns = if measured() { TURNS } else { 1 };
    let all = devices();
    all.iter().for_each(|device| println!("- {device}"));
    // gpu:1, an older lavapipe, has about half of gpu:2's speed.
    let (Some(slow), Some(fast)) = (all.get(2), all.get(3)) else {
        println!("SKIPPED: gpu:1 and gpu:2 are missing: there are no two adapters with a core each");
        return;
    };
    let dir = tempfile::tempdir().unwrap_or_else(|e| panic!("{e}"));
    let spec = Spec {
        hidden: 2048,
        intermediate: 7168,
        layers: 4,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        vocab: 2000,
        dtype: Dtype::BF16,
        ..Spec::default()
    };
    write_checkpoint(dir.path(), &spec);
    let params = Parameters::load(dir.path()).unwrap_or_else(|e| panic!("{e}"));
    println!(
        "\n| the second rank is slower | batch | alone | ideal | automatic shares | of the ideal (p10..p90) | equal shares | of the ideal (p10..p90) |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for (times, batch) in [(1, 1), (2, 1), (2, 8)] {
        let pair = [fast.clone().isolated(), slow.clone().isolated().with_busy_work(times)];
        let config = ParallelConfig::default().threads(1);
        let choice = choose(&params, &config, &pair, batch).unwrap_or_else(|e| panic!("{e}"));
        forget_predictions(&params, &config);
        let chosen = choice.predictions.iter().find(|prediction| prediction.devices.len() == 2);
        let chosen = chosen.unwrap_or_else(|| panic!("the pair was not considered"));
        // In the order in which the planner lists them.
        let mut grids = [
            Grid::load(&params, &pair[..1], None, batch),
            Grid::load(&params, &pair[1..], None, batch),
            Grid::load(&params, &chosen.devices, chosen.shares.clone(), batch),
            Grid::load(&params, &pair, None, batch),
        ];
        grids.iter_mut().for_each(Grid::turn);
        grids.iter_mut().for_each(|grid| grid.tokens_per_second.clear());
        let mut at_once = Vec::new();
        for _ in 0..turns {
            grids.iter_mut().for_each(Grid::turn);
            let [a, b, ..] = &mut grids;
            at_once.push(both(a, b));
        }
        let [a, b, automatic, equal] = grids.map(|grid| grid.tokens_per_second);
        let ideal: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
        let of = |speeds: &[f64]| -> Vec<f64> { speeds.iter().zip(&ideal).map(|(speed, ideal)| speed / ideal).collect() };
        let median = |values: &[f64]| spread(values.to_vec())[0];
        let ratio = median(&a) / median(&b);
        println!(
            "| {ratio:.1} times | {batch} | {:.1} and {:.1} | {:.1} | {:.1}, {:.2} | {:.1}, {:?} | {} | {:.1} | {} |",
            median(&a),
            median(&b),
            median(&ideal),
            median(&at_once),
            median(&of(&at_once)),
            median(&automatic),
            chosen.shares.clone().unwrap_or_default(),
            told(spread(of(&automatic))),
            median(&equal),
            told(spread(of(&equal))),
        );
    }
}

/// The speeds of both while they run at the same time.
fn both(a: &mut Grid, b: &mut Grid) -> f64 {
    std::thread::scope(|scope| {
        let other = scope.spawn(|| b.turn());
        a.turn();
        other.join().unwrap_or_else(|_| panic!("the other model panicked"));
    });
    [a, b].into_iter().filter_map(|grid| grid.tokens_per_second.pop()).sum()
}
