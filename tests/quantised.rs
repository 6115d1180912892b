//! Weights that are quantised as they are loaded: every grid computes with the same ones, and each format stays within its bound.

mod common;

use std::fs;
use std::path::Path;
use std::sync::Mutex;

use common::{Spec, fixture, write_checkpoint};
use safetensors::Dtype;
use torchless::{Device, InferenceState, KvType, ParallelConfig, Parameters, QuantFormat, TensorParallelMistral, plan_summary};

/// Logits at every position of the main prompt: of the exact forms, of the fast ones token by token, and of a fast prefill.
fn logits(model: &TensorParallelMistral, ids: &[u32]) -> [Vec<f32>; 3] {
    let mut state = InferenceState::new(model.config());
    let exact = model.prefill_logits(&mut state, ids).unwrap();
    state.reset();
    let mut fast = Vec::new();
    for &id in ids {
        model.fast_forward(&mut state, id, false);
        fast.extend_from_slice(state.logits());
    }
    state.reset();
    let filled = model.fast_prefill_logits(&mut state, ids).unwrap();
    [exact, fast, filled]
}

/// The root mean square of the difference, relative to that of `of`.
fn relative_error(found: &[f32], of: &[f32]) -> f64 {
    assert_eq!(found.len(), of.len());
    let square = |v: f32| f64::from(v) * f64::from(v);
    let (error, size) = found.iter().zip(of).fold((0.0, 0.0), |(e, s), (f, o)| (e + square(f - o), s + square(*o)));
    (error / size).sqrt()
}

fn load(name: &str, config: ParallelConfig) -> TensorParallelMistral {
    TensorParallelMistral::load(fixture::load(name), config).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn grid(ranks: usize, stages: usize) -> ParallelConfig {
    ParallelConfig::tensor_parallel(ranks, 0).stages(stages)
}

/// Heads of 8 and 16 elements and channels of any number: most cuts are inside a block.
#[test]
fn every_grid_computes_with_the_weights_of_a_grid_of_one() {
    for name in fixture::ALL {
        let ids = &fixture::cases(name)[0].ids;
        for format in QuantFormat::ENCODABLE {
            let [alone, ..] = logits(&load(name, grid(1, 1).weights(format)), ids);
            for (ranks, stages) in [(2, 1), (3, 1), (4, 1), (1, 2), (2, 3)] {
                let [split, ..] = logits(&load(name, grid(ranks, stages).weights(format)), ids);
                let gap = fixture::gap(&split, &alone);
                assert!(gap < 1e-4, "{name}, {}, {stages} x {ranks}: {gap:e}", format.name());
            }
            let shares = grid(3, 1).weights(format).with_shares(vec![1.0, 5.0, 2.0]);
            let gap = fixture::gap(&logits(&load(name, shares), ids)[0], &alone);
            assert!(gap < 1e-4, "{name}, {}, shares 1, 5, 2: {gap:e}", format.name());
        }
    }
}

#[test]
fn the_exact_forms_have_the_same_bits_with_any_threads_and_chunks() {
    for (name, format) in fixture::ALL.into_iter().zip(QuantFormat::ENCODABLE.into_iter().cycle()) {
        let ids = &fixture::cases(name)[0].ids;
        let bits = |threads: usize, chunk: usize| -> Vec<u32> {
            let model = load(name, grid(2, 1).weights(format).threads(threads));
            let mut state = InferenceState::new(model.config());
            model.prefill_logits_in_chunks(&mut state, ids, chunk).unwrap().into_iter().map(f32::to_bits).collect()
        };
        let one = bits(1, usize::MAX);
        for (threads, chunk) in [(1, 1), (2, 3), (3, usize::MAX)] {
            assert!(bits(threads, chunk) == one, "{name}, {}: {threads} threads, chunks of {chunk}", format.name());
        }
    }
}

/// The bounds are stated in README.md; the fixtures' weights are random, which is the worst case for a format.
#[test]
fn formats_and_fast_forms_stay_within_their_bounds() {
    for name in fixture::ALL {
        let ids = &fixture::cases(name)[0].ids;
        let [stored, fast, filled] = logits(&load(name, grid(1, 1)), ids);
        let [stepped, filled] = [fast, filled].map(|fast| relative_error(&fast, &stored));
        println!("{name} stored: token by token {stepped:.6}, prefill {filled:.6}");
        // Where weights are bf16, activations may be rounded to it.
        let bound = if name == "gqa-headdim" { 0.01 } else { 1e-4 };
        assert!(stepped < bound, "{name}, fast form on stored weights: {stepped}");
        assert!(filled < 0.02, "{name}, fast prefill on stored weights: {filled}");
        for (format, bound) in [(QuantFormat::Q8_0, 0.05), (QuantFormat::Iq4Nl, 0.5), (QuantFormat::Q4_0, 0.6)] {
            let [exact, fast, filled] = logits(&load(name, grid(1, 1).weights(format)), ids);
            let (weights, activations) = (relative_error(&exact, &stored), relative_error(&fast, &exact));
            assert!(relative_error(&filled, &fast) < 0.02, "{name}, {}: a fast prefill is as fast steps", format.name());
            println!("{name} {}: weights {weights:.4}, int8 activations {activations:.4}", format.name());
            assert!(weights > 0.0 && weights < bound, "{name}, {}: {weights} from the stored weights", format.name());
            assert!(activations < 0.06, "{name}, {}: {activations} between the forms", format.name());
        }
    }
}

#[test]
fn ranks_hold_the_bytes_that_the_plan_says_and_a_format_its_bits() {
    let dir = tempfile::tempdir().unwrap();
    let spec =
        Spec { dtype: Dtype::BF16, vocab: 320, hidden: 256, intermediate: 640, heads: 4, kv_heads: 2, head_dim: 64, ..Spec::default() };
    write_checkpoint(dir.path(), &spec);
    let params = Parameters::load(dir.path()).unwrap();
    for (format, bits) in [(QuantFormat::Q8_0, 8.5), (QuantFormat::Q4_0, 4.5), (QuantFormat::Iq4Nl, 4.5)] {
        for ranks in [1, 2] {
            let config = grid(ranks, 1).weights(format);
            let plan = plan_summary(&params, &config, &vec![Device::cpu(); ranks]).unwrap();
            let model = TensorParallelMistral::load(params.clone(), config).unwrap();
            let planned: u64 = plan.ranks.iter().map(|rank| rank.weight_bytes).sum();
            // Norms are planned as they are stored, in bf16, and held as f32.
            let norms = (256 * 5 * ranks) as u64 * 2;
            assert_eq!(model.counts().unwrap()[0].weight_bytes, planned + norms, "{}, {ranks} ranks", format.name());
            let matrices: usize = spec.tensors().iter().skip(1).map(|(_, shape)| shape.iter().product::<usize>()).sum();
            let found = planned as f64 * 8.0 / matrices as f64;
            assert!((found - bits).abs() < 0.12, "{}: {found} bits a weight with norms and all", format.name());
        }
    }
}

#[test]
fn progress_is_told_to_the_last_byte() {
    let heard = Mutex::new(Vec::new());
    let tell = |done, all| heard.lock().unwrap().push((done, all));
    let config = ParallelConfig::default().weights(QuantFormat::Q4_0);
    TensorParallelMistral::load_grid_with_progress(fixture::load("tied"), config, [Device::cpu()], tell).unwrap();
    let heard = heard.into_inner().unwrap();
    let (most, all) = heard.iter().copied().max().unwrap();
    assert!(heard.len() > 10 && heard.iter().all(|(_, total)| *total == all), "{heard:?}");
    assert!(most <= all && most as f64 > 0.95 * all as f64, "{most} of {all}: only the norms are left out");
}

fn packed_files(dir: &Path) -> Vec<std::path::PathBuf> {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|e| e == "packed")).collect()
}

#[test]
fn packed_weights_are_kept_and_taken_again_and_made_anew_where_the_file_is_not_what_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let spec = Spec { hidden: 64, intermediate: 96, ..Spec::default() };
    write_checkpoint(dir.path(), &spec);
    let run = |config: ParallelConfig| {
        let model = TensorParallelMistral::load(Parameters::load(dir.path()).unwrap(), config).unwrap();
        logits(&model, &[1, 2, 3, 4]).concat()
    };
    let plain = run(grid(2, 1).weights(QuantFormat::Iq4Nl));
    assert!(packed_files(dir.path()).is_empty(), "nothing is kept unless asked for");
    let kept = || run(grid(2, 1).weights(QuantFormat::Iq4Nl).cache_weights());
    assert_eq!(kept(), plain);
    let [file] = &packed_files(dir.path())[..] else { panic!("one file a place") };
    let (good, written) = (fs::read(file).unwrap(), fs::metadata(file).unwrap().modified().unwrap());
    assert_eq!(kept(), plain, "from the file");
    assert_eq!(fs::metadata(file).unwrap().modified().unwrap(), written, "which is not written again");

    // Damaged at its end, cut short, empty, or a header that lies: each is made anew.
    let mut flipped = good.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let mut long_header = good.clone();
    long_header[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    for bad in [&flipped[..], &good[..good.len() / 2], &[], &long_header] {
        fs::write(file, bad).unwrap();
        assert_eq!(kept(), plain);
        assert_eq!(fs::read(file).unwrap(), good);
    }

    // Another format, another cut, other weights: other files.
    let q8 = run(grid(2, 1).weights(QuantFormat::Q8_0).cache_weights());
    assert_ne!(q8, plain);
    run(grid(1, 2).weights(QuantFormat::Iq4Nl).cache_weights());
    assert_eq!(packed_files(dir.path()).len(), 4, "one more for the other format, and one for each of two stages");
    write_checkpoint(dir.path(), &Spec { seed: 2, ..spec });
    assert_ne!(kept(), plain, "the old file is of other weights");
}

#[test]
fn a_file_that_cannot_be_written_is_no_failure() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &Spec::default());
    let run = || {
        let config = ParallelConfig::default().weights(QuantFormat::Q8_0).cache_weights();
        let model = TensorParallelMistral::load(Parameters::load(dir.path()).unwrap(), config).unwrap();
        logits(&model, &[1, 2, 3])
    };
    let first = run();
    // A directory in its place holds off even those who may write everywhere.
    let [file] = &packed_files(dir.path())[..] else { panic!("one file a place") };
    fs::remove_file(file).unwrap();
    fs::create_dir(file).unwrap();
    assert!(run() == first);
    assert!(file.is_dir() && fs::read_dir(dir.path()).unwrap().count() == 4, "and no half of a file is left");
}

/// GPUs compute with the weights that CPUs compute with, cut wherever it may be.
#[test]
fn every_format_runs_on_gpus_and_beside_the_cpu() {
    let gpus = common::gpus();
    for (i, name) in fixture::ALL.into_iter().enumerate() {
        let ids = &fixture::cases(name)[0].ids;
        for format in QuantFormat::ENCODABLE {
            let [alone, ..] = logits(&load(name, grid(1, 1).weights(format)), ids);
            // Every adapter meets every format, and every fixture some adapter.
            let Some(gpu) = gpus.get(i % gpus.len().max(1)) else { return };
            let isolated = gpu.clone().isolated();
            for devices in [vec![gpu.clone(); 2], vec![isolated.clone(), Device::cpu(), isolated]] {
                let list: Vec<String> = devices.iter().map(Device::to_string).collect();
                let config = ParallelConfig::default().weights(format);
                let model =
                    TensorParallelMistral::load_grid(fixture::load(name), config, devices).unwrap_or_else(|e| panic!("{list:?}: {e}"));
                let gap = fixture::gap(&logits(&model, ids)[0], &alone);
                assert!(gap < 1e-3, "{name}, {}, {list:?}: {gap:e}", format.name());
            }
        }
    }
}

#[test]
fn an_f16_cache_and_batches_work_with_quantised_weights() {
    let model = load("gqa-headdim", grid(2, 1).weights(QuantFormat::Iq4Nl));
    let mut states: Vec<_> = (0..3).map(|_| InferenceState::with_kv(model.config(), KvType::F16)).collect();
    for (i, state) in states.iter_mut().enumerate() {
        model.fast_prefill(state, &[1, 2, 3, 4, 5][..3 + i.min(2)]).unwrap();
    }
    let mut together: Vec<&mut InferenceState> = states.iter_mut().collect();
    model.fast_forward_batch(&mut together, &[7, 8, 9]).unwrap();
    let mut alone = InferenceState::with_kv(model.config(), KvType::F16);
    model.fast_prefill(&mut alone, &[1, 2, 3]).unwrap();
    model.fast_forward(&mut alone, 7, false);
    assert!(relative_error(states[0].logits(), alone.logits()) < 1e-3, "other rows leave a row as it is");
}
