//! The planner: what it considers, what it says of devices that can't, and that its figures are those of a whole model.

mod common;

use common::{Spec, fixture, write_checkpoint};
use torchless::{Device, Error, ParallelConfig, Parameters, TensorParallelMistral, choose, plan_summary, predict};

fn config() -> ParallelConfig {
    ParallelConfig::default().untuned()
}

#[test]
fn one_device_is_predicted_and_chosen() {
    let params = fixture::load("tiny-mistral");
    let choice = choose(&params, &config(), &[Device::cpu()], 2).unwrap();
    let [only] = &choice.predictions[..] else { panic!("{choice:?}") };
    assert_eq!((choice.chosen, choice.failed.len(), only.batch), (0, 0, 2));
    assert!(only.seconds_per_step > 0.0 && only.tokens_per_second().is_finite(), "{only:?}");
    assert!(matches!(choose(&params, &config(), &[], 1), Err(Error::NoDevices)));
}

#[test]
fn stages_and_models_of_few_layers_are_predicted_too() {
    let dir = tempfile::tempdir().unwrap();
    for (layers, stages) in [(1, 1), (2, 2), (3, 2), (8, 2)] {
        write_checkpoint(dir.path(), &Spec { layers, ..Spec::default() });
        let params = Parameters::load(dir.path()).unwrap();
        let prediction = predict(&params, &config().stages(stages), &vec![Device::cpu(); stages], 1).unwrap();
        assert!(prediction.seconds_per_step >= prediction.seconds_per_layer * (layers as f64 - stages as f64), "{prediction:?}");
    }
}

#[test]
fn every_device_is_considered_alone_and_the_fastest_together() {
    let Some(gpu) = common::gpus().into_iter().next() else { return };
    let params = fixture::load("tiny-mistral");
    // It can't hold a row of activations.
    let useless = gpu.clone().isolated().with_binding_limit(256);
    let choice = choose(&params, &config(), &[Device::cpu(), gpu, useless], 1).unwrap();
    let mut sizes: Vec<usize> = choice.predictions.iter().map(|prediction| prediction.devices.len()).collect();
    sizes.sort_unstable();
    assert_eq!(sizes, [1, 1, 2], "{choice:?}");
    let split = choice.predictions.iter().find(|prediction| prediction.devices.len() == 2).unwrap();
    assert!(split.shares.as_ref().unwrap().iter().all(|share| *share > 0.0), "{split:?}");
    assert!(choice.predictions.is_sorted_by(|a, b| a.seconds_per_step <= b.seconds_per_step), "{choice:?}");
    let [(failed, error)] = &choice.failed[..] else { panic!("{choice:?}") };
    assert_eq!(failed.len(), 1);
    assert!(error.to_string().contains("binding of 256 bytes"), "{error}");
    // What was chosen is not slower than either device alone.
    let chosen = &choice.predictions[choice.chosen];
    assert!(choice.predictions.iter().all(|p| p.devices.len() > 1 || p.seconds_per_step >= chosen.seconds_per_step), "{choice:?}");
}

#[test]
fn a_plan_says_what_every_device_holds_and_refuses_what_does_not_fit() {
    let params = fixture::load("tiny-mistral");
    let cpu = plan_summary(&params, &config().kv_positions(128), &[Device::cpu(), Device::cpu()]).unwrap();
    let [memory] = &cpu.memory[..] else { panic!("{:?}", cpu.memory) };
    assert_eq!((memory.weights, memory.has), (cpu.ranks.iter().map(|rank| rank.weight_bytes).sum(), None));
    let sizes = params.config();
    assert_eq!(memory.cache, (2 * sizes.n_layers * 128 * 4 * sizes.n_kv_heads * sizes.head_dim) as u64);
    assert!(memory.workspace > 0);

    let Some(gpu) = common::gpus().into_iter().next() else { return };
    let weights = plan_summary(&params, &config(), std::slice::from_ref(&gpu)).unwrap().memory[0].weights;
    // Too small for the weights; for anything beside them; for all pages that were wanted.
    let with = |bytes: u64| plan_summary(&params, &config(), &[gpu.clone().with_memory_limit(bytes)]);
    let error = with(weights - 100).unwrap_err();
    assert!(matches!(error, Error::TooLittleMemory { wanted, .. } if wanted == weights), "{error}");
    assert!(error.to_string().contains("100 are missing") && error.to_string().contains("99% of these weights would fit"), "{error}");
    let error = with(weights + 1000).unwrap_err().to_string();
    assert!(error.contains("not even one page of keys fits") && error.contains("the 1000 bytes of memory beside the weights"), "{error}");
    let small = with(weights + (8 << 20)).unwrap().memory.remove(0);
    assert!(small.cache > 0 && small.weights + small.cache + small.workspace <= small.has.unwrap(), "{small:?}");
    let limited = gpu.with_memory_limit(weights - 100);
    let error = TensorParallelMistral::load_grid(params, config(), [limited]).err().unwrap();
    assert!(matches!(error, Error::TooLittleMemory { .. }), "{error}");
}

#[test]
fn what_fits_no_device_alone_is_split_over_several_that_it_fits() {
    let Some(gpu) = common::gpus().into_iter().next() else { return };
    let params = fixture::load("tiny-mistral");
    let config = config().kv_positions(64);
    let weights = plan_summary(&params, &config, std::slice::from_ref(&gpu)).unwrap().memory[0].weights;
    let small = gpu.clone().isolated().with_memory_limit(weights - 1);
    let choice = choose(&params, &config, &[small.clone(), Device::cpu()], 1).unwrap();
    // The CPU can alone, the GPU can't.
    assert!(choice.predictions.iter().any(|p| p.devices.len() == 1 && p.devices[0].is_cpu()), "{choice:?}");
    assert!(choice.failed.iter().any(|(devices, e)| devices.len() == 1 && matches!(e, Error::TooLittleMemory { .. })), "{choice:?}");
    assert!(choice.predictions.iter().all(|p| p.devices.len() > 1 || p.devices[0].is_cpu()), "{choice:?}");
    // It alone: an error that says what is missing.
    assert!(matches!(choose(&params, &config, &[small], 1), Err(Error::TooLittleMemory { .. })));
}
