//! The fixtures, and what transformers computes for them.

use std::path::PathBuf;

use safetensors::SafeTensors;
use torchless::{Config, InferenceState, ParallelMistral, Parameters, Result};

/// All checkpoints of tests/fixtures.
pub const ALL: [&str; 10] =
    ["tiny-mistral", "gqa-headdim", "sliding", "sharded-f16", "uneven", "tied", "rope-llama3", "rope-linear", "qwen2", "qwen3"];

/// One prompt and its answers.
pub struct Case {
    pub name: String,
    pub ids: Vec<u32>,
    /// `[ids, vocab]`
    pub logits: Vec<f32>,
    pub greedy: Vec<u32>,
}

pub fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

pub fn stories() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("examples/models/tiny-stories")
}

pub fn load(name: &str) -> Parameters {
    Parameters::load(path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// The prompts of a fixture: `main` and four of the batch.
pub fn cases(name: &str) -> Vec<Case> {
    let bytes = std::fs::read(path(name).join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = |name: &str| -> Vec<u32> {
        file.tensor(name).unwrap().data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect()
    };
    let floats = |name: &str| -> Vec<f32> {
        file.tensor(name).unwrap().data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    ["main", "batch.0", "batch.1", "batch.2", "batch.3"]
        .into_iter()
        .map(|case| Case {
            name: case.into(),
            ids: ids(&format!("{case}.input_ids")),
            logits: floats(&format!("{case}.logits")),
            greedy: ids(&format!("{case}.greedy_ids")),
        })
        .collect()
}

/// The largest absolute difference; infinite where lengths differ or a value is not a number.
pub fn gap(a: &[f32], b: &[f32]) -> f32 {
    if a.len() != b.len() {
        return f32::INFINITY;
    }
    a.iter().zip(b).map(|(a, b)| if (a - b).is_nan() { f32::INFINITY } else { (a - b).abs() }).fold(0.0, f32::max)
}

pub fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len()).reduce(|best, i| if logits[i] > logits[best] { i } else { best }).unwrap() as u32
}

/// The greedy continuation of what is in the state, `n` tokens of it.
pub fn greedy<By>(model: &ParallelMistral<By>, state: &mut InferenceState, n: usize) -> Result<Vec<u32>> {
    let mut out = Vec::new();
    while out.len() < n {
        let token = argmax(state.logits());
        out.push(token);
        model.try_forward(state, token, false)?;
    }
    Ok(out)
}

/// Logits at every position and the greedy continuation of every case, held against the fixture's. The largest difference.
pub fn check<By>(name: &str, model: &ParallelMistral<By>, tolerance: f32) -> Result<f32, String> {
    let config: &Config = model.config();
    let mut worst = 0.0f32;
    for case in cases(name) {
        let mut state = InferenceState::new(config);
        let logits = model.prefill_logits(&mut state, &case.ids).map_err(|e| format!("{name} {}: {e}", case.name))?;
        let found = gap(&logits, &case.logits);
        if found > tolerance {
            return Err(format!("{name} {}: logits differ by {found:e}, more than {tolerance:e}", case.name));
        }
        worst = worst.max(found);
        let text = greedy(model, &mut state, case.greedy.len()).map_err(|e| format!("{name} {}: {e}", case.name))?;
        if text != case.greedy {
            return Err(format!("{name} {}: greedy {text:?} is not {:?}", case.name, case.greedy));
        }
    }
    Ok(worst)
}
