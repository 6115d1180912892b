//! The split can be seen: members of a group that hold a rank each, bytes and counts by rank, a poisoned shard.

mod common;

use std::sync::{Arc, Barrier, Mutex};

use common::{Spec, fixture, write_checkpoint};
use torchless::{
    Alone, Collective, Device, Error, InferenceState, ParallelConfig, Parameters, TensorParallelConfig, TensorParallelMistral, plan_summary,
};

/// A group of threads that exchange vectors through shared memory.
struct Threads {
    rank: usize,
    shared: Arc<Shared>,
}

struct Shared {
    barrier: Barrier,
    parts: Mutex<Vec<Vec<f32>>>,
    bytes: Mutex<Vec<u8>>,
}

fn group(size: usize) -> Vec<Arc<Threads>> {
    let shared = Arc::new(Shared { barrier: Barrier::new(size), parts: Mutex::new(vec![vec![]; size]), bytes: Mutex::default() });
    (0..size).map(|rank| Arc::new(Threads { rank, shared: shared.clone() })).collect()
}

impl Collective for Threads {
    fn rank(&self) -> usize {
        self.rank
    }
    fn size(&self) -> usize {
        self.shared.parts.lock().unwrap().len()
    }
    fn all_gather(&self, local: &[f32], counts: &[usize], all: &mut [f32]) -> Result<(), Error> {
        assert_eq!(counts[self.rank], local.len());
        self.shared.parts.lock().unwrap()[self.rank] = local.to_vec();
        self.shared.barrier.wait();
        all.copy_from_slice(&self.shared.parts.lock().unwrap().concat());
        self.shared.barrier.wait();
        Ok(())
    }
    fn broadcast(&self, root: usize, bytes: &mut [u8]) -> Result<(), Error> {
        if self.rank == root {
            *self.shared.bytes.lock().unwrap() = bytes.to_vec();
        }
        self.shared.barrier.wait();
        bytes.copy_from_slice(&self.shared.bytes.lock().unwrap());
        self.shared.barrier.wait();
        Ok(())
    }
}

#[test]
fn members_with_a_rank_each_give_the_bits_of_one_process_with_all_ranks() {
    for name in fixture::ALL {
        for world in [2, 3] {
            let case = &fixture::cases(name)[0];
            let alone = TensorParallelMistral::load(fixture::load(name), TensorParallelConfig::new(world, 0)).unwrap();
            let run = |model: &TensorParallelMistral| {
                let mut state = InferenceState::new(model.config());
                let mut logits = model.prefill_logits(&mut state, &case.ids).unwrap();
                model.forward(&mut state, 5, false);
                logits.extend_from_slice(state.logits());
                logits
            };
            let want = run(&alone);
            std::thread::scope(|scope| {
                for member in group(world) {
                    let (run, want) = (&run, &want);
                    scope.spawn(move || {
                        let config = TensorParallelConfig::new(world, member.rank);
                        let model = TensorParallelMistral::load_with(fixture::load(name), config, member).unwrap();
                        assert_eq!(model.ranks().len(), 1, "a member hosts its own rank only");
                        assert!(run(&model) == *want, "{name}: another answer on a member of {world}");
                    });
                }
            });
        }
    }
}

/// A member on a GPU computes one half of a prompt while the group sums the other; all others do alike. Members have the room of the least.
#[test]
fn members_of_whatever_devices_overlap_their_halves_in_the_same_order() {
    let ids: Vec<u32> = (0..200).map(|i| i * 3 % 384).collect();
    let run = |model: &TensorParallelMistral| {
        let mut state = InferenceState::new(model.config());
        model.prefill(&mut state, &ids).unwrap();
        (state.logits().to_vec(), model.counts().unwrap()[0].submissions)
    };
    let (want, _) = run(&TensorParallelMistral::load(fixture::load("gqa-headdim"), ParallelConfig::default()).unwrap());
    let (gpu, layers) = (common::gpus().into_iter().next(), fixture::load("gqa-headdim").config().n_layers as u64);
    for (overlap, gpu) in [(true, gpu.clone()), (false, gpu), (true, None)] {
        std::thread::scope(|scope| {
            for member in group(2) {
                let (run, want) = (&run, &want);
                // It has room for fewer pages than the other member would take.
                let device = gpu.clone().filter(|_| member.rank > 0).unwrap_or_else(Device::cpu).with_memory_limit(8 << 20);
                let batches = if overlap && gpu.is_some() { 2 } else { 1 };
                scope.spawn(move || {
                    let mut config = ParallelConfig::tensor_parallel(2, member.rank);
                    config.overlap = overlap;
                    let model = TensorParallelMistral::load_with_device(fixture::load("gqa-headdim"), config, member, device).unwrap();
                    let (logits, submissions) = run(&model);
                    let gap = fixture::gap(&logits, want);
                    assert!(gap <= 1e-3, "overlap {overlap}: {gap:e}");
                    assert_eq!(submissions, batches * (2 * layers + 1), "overlap {overlap}");
                });
            }
        });
    }
}

#[test]
fn groups_that_do_not_fit_are_refused() {
    let load = |config, collective| TensorParallelMistral::load_with(fixture::load("tied"), config, collective).err().unwrap().to_string();
    let message = load(TensorParallelConfig::new(2, 0), Arc::new(Alone));
    assert!(message.contains("member 0 of 1") && message.contains("rank 0 of 2"), "{message}");
    std::thread::scope(|scope| {
        for member in group(2) {
            scope.spawn(move || {
                let (rank, name) = (member.rank, ["tied", "tiny-mistral"][member.rank]);
                let loaded = TensorParallelMistral::load_with(fixture::load(name), TensorParallelConfig::new(2, rank), member);
                let message = loaded.err().expect("rank 1 has another checkpoint than rank 0").to_string();
                assert!(message.contains("differ in their checkpoint"), "{message}");
            });
        }
    });
}

#[test]
fn every_rank_holds_its_part_of_what_splits() {
    for name in ["sharded-f16", "gqa-headdim", "uneven"] {
        let params = fixture::load(name);
        let config = params.config().clone();
        let total: u64 = plan_summary(&params, &ParallelConfig::default(), &[Device::cpu()]).unwrap().ranks[0].weight_bytes;
        for ranks in [2, 4] {
            let model = TensorParallelMistral::load(params.clone(), TensorParallelConfig::new(ranks, 0)).unwrap();
            let element = if name == "uneven" { 4 } else { 2 };
            let head = (config.n_layers * 4 * config.head_dim * config.hidden_size * element) as f64;
            let channel = ((config.n_layers * 3 + 1) * config.hidden_size * element) as f64;
            for rank in model.ranks() {
                let (share, held) = (total as f64 / ranks as f64, rank.weight_bytes as f64);
                assert!((held - share).abs() <= (0.1 * share).max(head + channel), "{name}: rank {} of {ranks} holds {held}", rank.rank);
            }
        }
    }
}

#[test]
fn a_token_costs_the_ops_submissions_and_collectives_of_its_plan() {
    let grids: [(&str, usize, Vec<Device>); 4] = [
        ("alone", 1, vec![Device::cpu()]),
        ("one place", 1, vec![Device::cpu(); 3]),
        ("three places", 1, vec![Device::cpu().isolated(); 3]),
        ("2 x 2", 2, vec![Device::cpu().isolated(); 4]),
    ];
    for (name, stages, devices) in grids {
        let config = ParallelConfig::default().stages(stages);
        let params = fixture::load("tiny-mistral");
        let plan = plan_summary(&params, &config, &devices).unwrap();
        let ranks = devices.len() / stages;
        let model = TensorParallelMistral::load_grid(params, config, devices).unwrap();
        let mut state = InferenceState::new(model.config());
        model.forward(&mut state, 1, false);
        let before = (model.counts().unwrap(), model.collectives().unwrap());
        model.forward(&mut state, 2, false);
        let after = (model.counts().unwrap(), model.collectives().unwrap());
        let sum = |field: fn(&torchless::PlaceCounts) -> u64| {
            after.0.iter().map(field).sum::<u64>() as usize - before.0.iter().map(field).sum::<u64>() as usize
        };
        // 16 ops a layer; the last stage takes the wanted rows, norms them and multiplies by the head.
        assert_eq!(plan.ops_per_token, 16 * 3 + 3, "{name}");
        assert_eq!(sum(|c| c.ops), plan.ops_per_token * ranks, "{name}");
        assert_eq!(sum(|c| c.submissions), plan.submissions_per_token, "{name}");
        assert_eq!((after.1 - before.1) as usize, plan.collectives_per_token, "{name}");
        let collectives = if name == "three places" || name == "2 x 2" { 2 * 3 + 1 } else { 1 };
        assert_eq!(plan.collectives_per_token, collectives, "{name}");
    }
}

#[test]
fn a_poisoned_shard_changes_the_answer_of_every_world_that_holds_it() {
    let spec = Spec { layers: 2, ..Spec::default() };
    let sound = tempfile::tempdir().unwrap();
    write_checkpoint(sound.path(), &spec);
    let ids = [1, 5, 9, 2];
    for ranks in [1, 2, 4] {
        for rank in 0..ranks {
            // One column of o_proj that only this rank holds.
            let poisoned = tempfile::tempdir().unwrap();
            std::fs::copy(sound.path().join("config.json"), poisoned.path().join("config.json")).unwrap();
            let file = std::fs::read(sound.path().join("model.safetensors")).unwrap();
            let column = rank * spec.heads * spec.head_dim / ranks;
            std::fs::write(poisoned.path().join("model.safetensors"), poison(file, "model.layers.1.self_attn.o_proj.weight", column))
                .unwrap();
            let run = |dir: &std::path::Path| {
                let model = TensorParallelMistral::load(Parameters::load(dir).unwrap(), TensorParallelConfig::new(ranks, 0)).unwrap();
                model.prefill_logits(&mut InferenceState::new(model.config()), &ids).unwrap()
            };
            assert!(fixture::gap(&run(sound.path()), &run(poisoned.path())) > 1e-2, "rank {rank} of {ranks} computes nothing that counts");
        }
    }
}

/// Adds 1 to one element of the first row of a tensor of f32.
fn poison(mut file: Vec<u8>, tensor: &str, column: usize) -> Vec<u8> {
    let header = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&file[8..8 + header]).unwrap();
    let at = 8 + header + json[tensor]["data_offsets"][0].as_u64().unwrap() as usize + 4 * column;
    let value = f32::from_le_bytes(file[at..at + 4].try_into().unwrap()) + 1.0;
    file[at..at + 4].copy_from_slice(&value.to_le_bytes());
    file
}
