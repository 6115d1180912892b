//! How much memory a model takes at most, from loading to the last of a few tokens.
//!
//! What is measured runs in a process of its own, so that nothing else counts. It is this binary again: [`measured`] runs the calling
//! test alone, with [`CHILD`] set, and there [`child`] does the work and prints what it took.

mod common;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::{Spec, skip, stored, values, write_json};
#[cfg(feature = "gpu")]
use common::{gpus, say_skipped};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use torchless::{Device, InferenceState, ParallelConfig, Parameters, TensorParallelMistral};

/// Tokens, devices and checkpoint of a child, between blanks.
const CHILD: &str = "TORCHLESS_MEMORY_CHILD";

/// What a child took at most, in bytes.
#[derive(Debug, Serialize, Deserialize)]
struct Usage {
    /// Resident memory, the mapped pages of the checkpoint included.
    all: u64,
    /// Resident memory that is no page of a file.
    anonymous: u64,
    /// Weights of the ranks on GPUs.
    on_gpus: u64,
}

/// A line of this process's status, such as `VmHWM`, in bytes.
fn status(line: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let value = status.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(':'));
    let kib = value.unwrap_or_else(|| panic!("no {line} in the status")).trim().trim_end_matches(" kB");
    1024 * kib.parse::<u64>().unwrap()
}

/// Shared memory counts: some drivers keep buffers there.
fn anonymous() -> u64 {
    status("RssAnon") + status("RssShmem")
}

/// Whether this process is a child. Then its work is done when this returns.
fn child() -> bool {
    let Ok(job) = std::env::var(CHILD) else { return false };
    let [tokens, devices, dir] = job.splitn(3, ' ').collect::<Vec<_>>().try_into().unwrap();
    // The kernel keeps no record of the most that was anonymous: look often, until the process ends.
    static PEAK: AtomicU64 = AtomicU64::new(0);
    std::thread::spawn(|| {
        loop {
            PEAK.fetch_max(anonymous(), Ordering::Relaxed);
            std::thread::sleep(Duration::from_micros(200));
        }
    });
    // What drivers take to compile the variants that are measured is theirs.
    let config = ParallelConfig::default().kv_positions(64).untuned();
    let model = TensorParallelMistral::load_grid(Parameters::load(dir).unwrap(), config, Device::parse_list(devices).unwrap()).unwrap();
    let mut state = InferenceState::new(model.config());
    (0..tokens.parse().unwrap()).for_each(|token| model.forward(&mut state, token, false));
    let on_gpus = model.ranks().iter().filter(|r| r.device != "cpu").map(|r| r.weight_bytes).sum();
    let usage = Usage { all: status("VmHWM"), anonymous: PEAK.load(Ordering::Relaxed).max(anonymous()), on_gpus };
    println!("\n{CHILD}{}", serde_json::to_string(&usage).unwrap());
    true
}

/// What `devices` take for so many tokens of the checkpoint in `dir`, in a child that runs `test`.
fn measured(test: &str, tokens: usize, devices: &str, dir: &Path) -> Usage {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture"]).env(CHILD, format!("{tokens} {devices} {}", dir.display()));
    // Software drivers take device memory from malloc, and glibc keeps much of what they free unless told not to.
    let output = command.env("MALLOC_MMAP_THRESHOLD_", "131072").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let usage = text.lines().find_map(|line| line.strip_prefix(CHILD));
    let usage = usage.unwrap_or_else(|| panic!("{devices}: {text}{}", String::from_utf8_lossy(&output.stderr)));
    serde_json::from_str(usage).unwrap()
}

/// Writes a checkpoint of bf16 matrices, those of `down_proj` and vectors f32, and answers its size. Never holds more than some rows.
fn write_streaming(dir: &Path, spec: &Spec) -> u64 {
    write_json(&dir.join("config.json"), &spec.config());
    let tensors = spec.tensors().into_iter().map(|(name, shape)| {
        let dtype = if shape.len() == 1 || name.contains("down_proj") { Dtype::F32 } else { Dtype::BF16 };
        (name, shape, dtype)
    });
    let tensors: Vec<_> = tensors.collect();
    let (mut header, mut end) = (Map::new(), 0);
    for (name, shape, dtype) in &tensors {
        let start = end;
        end += shape.iter().product::<usize>() * dtype.bitsize() / 8;
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}));
    }
    let mut header = Value::Object(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));

    let path = dir.join("model.safetensors");
    let mut file = BufWriter::new(File::create(&path).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let mut random = ChaCha8Rng::seed_from_u64(spec.seed);
    for (_, shape, dtype) in &tensors {
        // The same rows again and again: random numbers take longer than writing them.
        let (rows, block_rows) = if shape.len() == 1 { (1, 1) } else { (shape[0], shape[0].min(64)) };
        let block_shape = if shape.len() == 1 { shape.clone() } else { vec![block_rows, shape[1]] };
        let block = stored(&values(&mut random, &block_shape), *dtype);
        for start in (0..rows).step_by(block_rows) {
            let left = (rows - start).min(block_rows);
            file.write_all(&block[..block.len() / block_rows * left]).unwrap();
        }
    }
    file.into_inner().unwrap().metadata().unwrap().len()
}

/// Whether memory can be measured here and the directory has room for `wanted` bytes. Says aloud what is missing.
fn possible(what: &str, dir: &Path, wanted: u64) -> bool {
    if !cfg!(target_os = "linux") {
        skip(&format!("{what}: resident memory is read from /proc, which is Linux's"));
        return false;
    }
    let df = Command::new("df").arg("-Pk").arg(dir).output().unwrap();
    let df = String::from_utf8_lossy(&df.stdout).into_owned();
    let free = df.lines().nth(1).and_then(|line| line.split_whitespace().nth(3)?.parse::<u64>().ok());
    let free = 1024 * free.unwrap_or_else(|| panic!("no free space in what df says: {df}"));
    if free < wanted {
        skip(&format!("{what}: {} has {} MB free, {} are needed", dir.display(), free / 1_000_000, wanted / 1_000_000));
    }
    free >= wanted
}

fn megabytes(bytes: u64) -> u64 {
    bytes / 1_000_000
}

#[test]
fn a_cpu_grid_takes_at_most_15_percent_more_than_its_checkpoint() {
    if child() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    if !possible("the peak of a CPU grid on a checkpoint of 1.2 GB", dir.path(), 1_500_000_000) {
        return;
    }
    let spec = Spec { hidden: 2048, intermediate: 5632, layers: 10, heads: 32, kv_heads: 8, head_dim: 64, vocab: 4096, ..Spec::default() };
    let size = write_streaming(dir.path(), &spec);
    assert!(size > 1_000_000_000, "{size}");
    for devices in ["cpu", "cpu,cpu"] {
        let usage = measured("a_cpu_grid_takes_at_most_15_percent_more_than_its_checkpoint", 10, devices, dir.path());
        let [all, anonymous, file] = [usage.all, usage.anonymous, size].map(megabytes);
        eprintln!("{devices}: at most {all} MB, {anonymous} of them anonymous, for a checkpoint of {file}");
        assert!(100 * all <= 115 * file, "{devices}: {all} MB for a checkpoint of {file}");
        // Ten tokens read every weight but most of the embedding's: with less than that in memory nothing was measured.
        assert!(100 * all > 90 * file, "{devices}: {all} MB for a checkpoint of {file}");
    }
}

#[cfg(feature = "gpu")]
#[test]
fn a_gpu_rank_takes_at_most_a_slice_of_the_hosts_memory_beyond_the_mapping_and_the_device() {
    if child() {
        return;
    }
    let (gpus, hardware): (Vec<_>, Vec<_>) = gpus().into_iter().partition(Device::is_software);
    for gpu in hardware {
        say_skipped(&format!("{gpu}: what its driver keeps on the host is not known; software adapters are measured"));
    }
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    if gpus.is_empty() || !possible("the peak of a GPU rank", dirs[0].path(), 500_000_000) {
        return;
    }
    let spec = Spec { hidden: 1024, intermediate: 2048, layers: 10, heads: 8, kv_heads: 2, head_dim: 128, vocab: 1024, ..Spec::default() };
    write_streaming(dirs[0].path(), &Spec::default());
    write_streaming(dirs[1].path(), &spec);
    let largest_slice = 4 * (spec.hidden * spec.intermediate) as u64;
    // Of 256 rows at a time: the stream, its norm, the outputs of attention and MLP, the queries and what they attend to, keys,
    // values, and the three of the channels. They are device memory, which software adapters take from the host.
    let widths = 4 * spec.hidden + 2 * (spec.heads + spec.kv_heads) * spec.head_dim + 3 * spec.intermediate;
    // Where ranks sum through the host, a second batch is on its way beside: its stream, both outputs, and what is read of them.
    let activations = |ranks: usize| 4 * 256 * (widths + if ranks > 1 { 4 * spec.hidden } else { 0 }) as u64;
    // What drivers take for more ops and larger buffers: measured up to 12 MB with SwiftShader, 1 with Mesa.
    let drivers = 20_000_000;

    let test = "a_gpu_rank_takes_at_most_a_slice_of_the_hosts_memory_beyond_the_mapping_and_the_device";
    for (i, gpu) in gpus.iter().enumerate() {
        let empty = measured(test, 1, &gpu.label(), dirs[0].path());
        let mixed = (i == 0).then(|| format!("{},cpu", gpu.label()));
        for devices in std::iter::once(gpu.label()).chain(mixed) {
            let usage = measured(test, 1, &devices, dirs[1].path());
            let beyond = usage.anonymous.saturating_sub(empty.anonymous + usage.on_gpus);
            let [all, anonymous, device, before, extra] =
                [usage.all, usage.anonymous, usage.on_gpus, empty.anonymous, beyond].map(megabytes);
            eprintln!("{devices} ({}): at most {all} MB, {anonymous} of them anonymous:", gpu.name());
            eprintln!("    {before} without weights, {device} of weights on the device, {extra} more");
            let most = megabytes(largest_slice + activations(devices.split(',').count()) + drivers);
            assert!(extra <= most, "{devices}: {extra} MB beyond the weights on the device; {most} are the most");
        }
    }
}
