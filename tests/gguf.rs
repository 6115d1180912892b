//! GGUF files hold what they were made of, and damaged ones are refused with a message that says what is wrong.

mod common;

use std::fs::{self, File};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use common::gguf::{Gguf, Item, Tensor, gguf_name, text, texts};
use common::{Spec, fixture, write_checkpoint};
use safetensors::SafeTensors;
use torchless::{DType, Device, Error, InferenceState, Matrix, ParallelConfig, Parameters, QuantFormat, TensorParallelMistral};

const FILE: &str = "model.gguf";

fn models() -> PathBuf {
    fixture::path("gguf")
}

/// A sound file of a small model.
fn sound() -> Gguf {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &Spec { layers: 1, ..Spec::default() });
    Gguf::of_checkpoint(dir.path())
}

fn written(file: &Gguf) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(FILE), file.bytes()).unwrap();
    dir
}

fn load(file: &Gguf) -> Result<Parameters, Error> {
    Parameters::load(written(file).path().join(FILE))
}

fn rows(matrix: &Matrix, n: usize) -> Vec<f32> {
    let mut out = vec![0.0; n * matrix.cols()];
    out.chunks_mut(matrix.cols()).enumerate().for_each(|(r, row)| matrix.row_to_f32(r, row));
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn report(complaints: impl IntoIterator<Item = Option<String>>) {
    let complaints: Vec<_> = complaints.into_iter().flatten().collect();
    assert!(complaints.is_empty(), "{} rows fail:\n{}", complaints.len(), complaints.join("\n"));
}

/// Complains unless loading the path fails soon, with all of `words` in its message.
fn refusal(name: &str, path: &Path, words: &[&str]) -> Option<String> {
    let start = Instant::now();
    let found = match catch_unwind(AssertUnwindSafe(|| Parameters::load(path))) {
        Err(_) => "it panicked".into(),
        Ok(Ok(_)) => "it loaded".into(),
        Ok(Err(error)) => error.to_string(),
    };
    if start.elapsed() > Duration::from_secs(10) {
        return Some(format!("{name}: took {:?}: {found}", start.elapsed()));
    }
    let missing: Vec<_> = words.iter().filter(|word| !found.contains(**word)).collect();
    (!missing.is_empty()).then(|| format!("{name}: no {missing:?} in: {found}"))
}

/// What is done to a sound file before it is written.
type Damage<'a> = &'a dyn Fn(&mut Gguf);

/// Every row on a sound file: the name, the damage, the words.
fn check(table: &[(&str, Damage, &[&str])]) {
    let sound = sound();
    load(&sound).unwrap();
    report(table.iter().map(|(name, damage, words)| {
        let mut file = sound.clone();
        damage(&mut file);
        refusal(name, &written(&file).path().join(FILE), words)
    }));
}

/// Every row is the bytes of a file.
fn check_bytes(table: &[(&str, Vec<u8>, &[&str])]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE);
    report(table.iter().map(|(name, bytes, words)| {
        fs::write(&path, bytes).unwrap();
        refusal(name, &path, words)
    }));
}

fn grids() -> [(&'static str, ParallelConfig, usize); 3] {
    [
        ("1 rank", ParallelConfig::default(), 1),
        ("3 ranks", ParallelConfig::default(), 3),
        ("2 stages", ParallelConfig::default().stages(2), 2),
    ]
}

#[test]
fn a_file_holds_the_tensors_and_sizes_of_the_checkpoint_that_it_was_made_of() {
    for name in fixture::ALL {
        let (ours, theirs) = (load(&Gguf::of_checkpoint(&fixture::path(name))).unwrap(), fixture::load(name));
        let mut config = theirs.config().clone();
        if name == "rope-llama3" {
            // Divisors there, and the numbers that they are computed from here.
            assert!(ours.config().rope_scaling.is_some());
            config.rope_scaling = ours.config().rope_scaling.clone();
        }
        assert_eq!(ours.config(), &config, "{name}");
        config.n_layers += 1;
        assert_ne!(ours.config(), &config);
        assert_eq!((ours.bytes(), ours.generation()), (theirs.bytes(), theirs.generation()), "{name}");
        let mut tensors = 0;
        for file in fs::read_dir(fixture::path(name)).unwrap().map(|entry| entry.unwrap().path()) {
            if !file.file_name().unwrap().to_str().unwrap().starts_with("model") || file.extension().unwrap() != "safetensors" {
                continue;
            }
            let bytes = fs::read(file).unwrap();
            for tensor in SafeTensors::deserialize(&bytes).unwrap().names() {
                let (a, b) = (ours.tensor(tensor).unwrap(), theirs.tensor(tensor).unwrap());
                assert_eq!((a.rows(), a.cols(), a.dtype()), (b.rows(), b.cols(), b.dtype()), "{name} {tensor}");
                assert!(bits(&rows(&a, a.rows())) == bits(&rows(&b, b.rows())), "{name} {tensor}");
                tensors += 1;
            }
        }
        assert!(tensors >= 3 * 9 + 2, "{name}: {tensors}");
    }
}

#[test]
fn files_of_the_fixtures_give_their_logits_and_greedy_texts_on_every_kind_of_grid() {
    let mut complaints = Vec::new();
    for name in fixture::ALL {
        let params = load(&Gguf::of_checkpoint(&fixture::path(name))).unwrap();
        for (grid, config, devices) in grids() {
            let model = TensorParallelMistral::load_grid(params.clone(), config, vec![Device::cpu(); devices]).unwrap();
            complaints.push(fixture::check(name, &model, 1e-4).err().map(|e| format!("{grid}: {e}")));
        }
    }
    report(complaints);
}

/// Every model of the fixtures on a grid.
fn check_models(grid: &str, config: &ParallelConfig, devices: &[Device], tolerance: f32) -> Vec<Option<String>> {
    let expected = fs::read(models().join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&expected).unwrap();
    let all = ["f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "q8_0", "q4_k", "q5_k", "q6_k", "q4_k_m"];
    let check = |name: &str| {
        let file = if name == "q8_0" { "q8_0-00001-of-00003".into() } else { name.to_owned() };
        let params = Parameters::load(models().join(format!("{file}.gguf"))).unwrap();
        let view = expected.tensor(&format!("{name}.input_ids")).unwrap();
        let ids: Vec<u32> = view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect();
        let logits = floats(&expected, &format!("{name}.logits"));
        let model = TensorParallelMistral::load_grid(params, config.clone(), devices.to_vec()).unwrap();
        let mut state = InferenceState::new(model.config());
        let found = model.prefill_logits(&mut state, &ids).unwrap();
        let gap = fixture::gap(&found, &logits);
        (gap > tolerance).then(|| format!("{name} on {grid}: logits differ by {gap:e}"))
    };
    all.map(check).into()
}

#[test]
fn models_of_every_format_give_the_logits_of_numpy() {
    report(grids().into_iter().flat_map(|(grid, config, devices)| check_models(grid, &config, &vec![Device::cpu(); devices], 1e-4)));
}

#[cfg(feature = "gpu")]
#[test]
fn models_of_every_format_give_the_logits_of_numpy_on_gpus_and_beside_them() {
    let plain = ParallelConfig::default();
    let mut complaints = Vec::new();
    for gpu in common::gpus() {
        complaints.extend(check_models(&gpu.to_string(), &plain, std::slice::from_ref(&gpu), 1e-3));
        complaints.extend(check_models(&format!("{gpu}, the CPU and {gpu}"), &plain, &[gpu.clone(), Device::cpu(), gpu.clone()], 1e-3));
    }
    report(complaints);
}

#[test]
fn tensors_that_a_plain_layer_does_not_have_are_refused_by_name() {
    let with = |name: &str| {
        let mut file = sound();
        let tensor = Tensor { name: name.into(), ..file.tensor("blk.0.attn_norm.weight").clone() };
        file.tensors.push(tensor);
        load(&file).map(|_| ()).map_err(|e| e.to_string())
    };
    for name in ["blk.0.attn_q.scale", "blk.0.attn_q_norm.weight", "blk.0.ffn_gate_inp.weight", "per_layer.weight", "blk.0.ffn_up.bias"] {
        let error = with(name).expect_err(name);
        assert!(error.contains(name) && error.contains("is not supported"), "{error}");
    }
    // A layer behind the last predicts further tokens.
    assert_eq!(with("blk.1.nextn.eh_proj.weight"), Ok(()));
}

#[test]
fn more_keys_or_tensors_than_any_model_has_are_refused_before_they_are_read() {
    let (mut keys, mut tensors) = (sound(), sound());
    keys.keys.extend((0..70_000).map(|i| (format!("k{i}").into_bytes(), Item::Bool(true))));
    tensors.tensors.extend((0..70_000).map(|i| Tensor {
        name: format!("t{i}").into(),
        dims: vec![0],
        kind: 0,
        offset: None,
        data: vec![],
    }));
    for (file, word) in [(keys, "metadata keys; 65536"), (tensors, "tensors; 65536")] {
        let error = load(&file).expect_err("refused").to_string();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn progress_is_told_to_the_last_byte_of_blocks_that_ranks_cut() {
    let heard = Mutex::new((0, 0));
    let tell = |done: u64, all| {
        let mut heard = heard.lock().unwrap();
        *heard = (done.max(heard.0), all);
    };
    let params = Parameters::load(models().join("q4_k_m.gguf")).unwrap();
    TensorParallelMistral::load_grid_with_progress(params, ParallelConfig::default(), vec![Device::cpu(); 3], tell).unwrap();
    let (done, all) = heard.into_inner().unwrap();
    assert!(done <= all && done as f64 > 0.95 * all as f64, "{done} of {all}: only the norms are left out");
}

#[test]
fn quantised_weights_are_not_quantised_again_and_formats_without_an_encoder_are_refused() {
    let params = Parameters::load(models().join("q4_k_m.gguf")).unwrap();
    let load = |params: &Parameters, format| {
        let mut config = ParallelConfig::default();
        config.weights = Some(format);
        TensorParallelMistral::load(params.clone(), config).err().expect("it is refused").to_string()
    };
    assert!(load(&params, QuantFormat::Q4_0).contains("quantised already"));
    assert!(load(&fixture::load("tied"), QuantFormat::Q4K).contains("q8_0, q4_0 or iq4_nl"));
}

fn floats(file: &SafeTensors, name: &str) -> Vec<f32> {
    file.tensor(name).unwrap().data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn every_format_is_dequantised_to_the_bit_as_the_gguf_package_does() {
    let params = Parameters::load(models().join("formats.gguf")).unwrap();
    let expected = fs::read(models().join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&expected).unwrap();
    let mut names = vec!["model.embed_tokens.weight".to_owned(), "lm_head.weight".into()];
    for layer in 0..3 {
        names.extend(["self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"].map(|part| format!("model.layers.{layer}.{part}.weight")));
    }
    let mut dtypes = std::collections::HashSet::new();
    report(names.into_iter().map(|name| {
        let (matrix, expected) = (params.tensor(&name).unwrap(), floats(&expected, &format!("formats.{}", gguf_name(&name))));
        dtypes.insert(matrix.dtype());
        let found = rows(&matrix, expected.len() / matrix.cols());
        assert_eq!(found.len(), expected.len());
        let different = (0..found.len()).filter(|&i| found[i].to_bits() != expected[i].to_bits()).collect::<Vec<_>>();
        let first = *different.first()?;
        Some(format!(
            "{} ({name}): {} of {} differ, the first at {first}: {:e} is not {:e}",
            matrix.dtype().name(),
            different.len(),
            found.len(),
            found[first],
            expected[first]
        ))
    }));
    assert_eq!(dtypes.len(), 11, "{dtypes:?}");
}

#[test]
fn the_matrices_of_each_fixture_have_its_format() {
    for (name, dtype) in [("f16", "f16"), ("bf16", "bf16"), ("q4_0", "q4_0"), ("q5_1", "q5_1"), ("q4_k", "q4_k"), ("q6_k", "q6_k")] {
        let params = Parameters::load(models().join(format!("{name}.gguf"))).unwrap();
        assert_eq!(params.tensor("model.layers.1.self_attn.q_proj.weight").unwrap().dtype().name(), dtype);
        assert_eq!(params.tensor("model.layers.1.input_layernorm.weight").unwrap().dtype(), DType::F32);
    }
    let mixed = Parameters::load(models().join("q4_k_m.gguf")).unwrap();
    let of = |name: &str| mixed.tensor(&format!("{name}.weight")).unwrap().dtype().name();
    assert_eq!((of("lm_head"), of("model.layers.0.mlp.down_proj"), of("model.layers.1.mlp.down_proj")), ("q6_k", "q6_k", "q4_k"));
    assert_eq!((of("model.embed_tokens"), of("model.layers.0.self_attn.o_proj")), ("q4_k", "q5_0"));
}

#[test]
fn a_split_set_is_named_by_any_of_its_parts() {
    let part = |n: usize| models().join(format!("q8_0-0000{n}-of-00003.gguf"));
    let loaded: Vec<_> = (1..=3).map(|n| Parameters::load(part(n)).unwrap()).collect();
    for params in &loaded {
        assert_eq!(params.fingerprint(), loaded[0].fingerprint());
        assert_eq!((params.config().n_layers, params.config().vocab_size), (2, 48));
    }
    assert_ne!(loaded[0].fingerprint(), Parameters::load(models().join("q4_0.gguf")).unwrap().fingerprint());
}

/// A split set of the sound model in a directory of its own, its parts changed.
fn split(change: impl FnOnce(&mut Vec<Gguf>)) -> tempfile::TempDir {
    let whole = sound();
    let thirds = whole.tensors.chunks(whole.tensors.len().div_ceil(3)).map(<[_]>::to_vec);
    let mut parts: Vec<Gguf> = thirds.map(|tensors| Gguf { tensors, ..Gguf::default() }).collect();
    parts[0].keys = whole.keys.clone();
    for (i, part) in parts.iter_mut().enumerate() {
        part.set("split.no", Item::Raw(2, vec![i as u8, 0]));
        part.set("split.count", Item::Raw(2, vec![3, 0]));
        part.set("split.tensors.count", Item::I32(whole.tensors.len() as i32));
    }
    change(&mut parts);
    let dir = tempfile::tempdir().unwrap();
    for (i, part) in parts.iter().enumerate() {
        fs::write(dir.path().join(part_name(i + 1)), part.bytes()).unwrap();
    }
    dir
}

fn part_name(n: usize) -> String {
    format!("m-{n:05}-of-00003.gguf")
}

#[test]
fn split_sets_that_do_not_fit_together_are_refused() {
    type Change<'a> = &'a dyn Fn(&mut Vec<Gguf>);
    Parameters::load(split(|_| {}).path()).unwrap();
    let table: &[(&str, Change, &[&str])] = &[
        ("a missing part", &|parts| _ = parts.pop(), &["part 3 of 3", "missing", "m-00003-of-00003.gguf"]),
        ("parts exchanged", &|parts| parts.swap(1, 2), &["m-00002-of-00003.gguf", "split.no is 2", "should be 1"]),
        ("another count", &|parts| parts[1].set("split.count", Item::U32(4)), &["split.count is 4", "should be 3"]),
        ("no number", &|parts| parts[0].remove("split.no"), &["split.no is absent"]),
        ("a number outside", &|parts| parts[0].set("split.no", Item::U32(3)), &["split.no is 3", "3 parts"]),
        ("a negative number", &|parts| parts[0].set("split.no", Item::I32(-1)), &["split.no is -1"]),
        ("another name", &|parts| parts[0].set("split.no", Item::U32(1)), &["part 2 of 3", "-00002-of-00003.gguf"]),
        ("a million parts", &|parts| parts[0].set("split.count", Item::U32(1_000_000)), &["split.count is 1000000", "99999"]),
        ("a count of no integer", &|parts| parts[0].set("split.count", text("3")), &["split.count is \"3\"", "integer"]),
        (
            "another number of tensors",
            &|parts| parts.iter_mut().for_each(|part| part.set("split.tensors.count", Item::I32(99))),
            &["split.tensors.count is 99", "3 parts have 12"],
        ),
        (
            "a tensor in two parts",
            &|parts| {
                let twice = parts[0].tensors[0].clone();
                parts[2].tensors.push(twice);
            },
            &["in two parts", "m-00001-of-00003.gguf", "m-00003-of-00003.gguf"],
        ),
        ("a part without its tensors", &|parts| parts[2].tensors.clear(), &["split.tensors.count is 12", "have 8"]),
        ("a damaged part", &|parts| parts[1].version = 9, &["m-00002-of-00003.gguf", "version 9"]),
    ];
    report(table.iter().map(|(name, change, words)| refusal(name, &split(change).path().join(part_name(1)), words)));
}

#[test]
fn a_directory_is_named_for_the_one_model_that_it_holds() {
    let dir = written(&sound());
    let direct = Parameters::load(dir.path().join(FILE)).unwrap();
    assert_eq!(Parameters::load(dir.path()).unwrap().fingerprint(), direct.fingerprint());
    Parameters::load(split(|_| {}).path()).unwrap();
    // Its first bytes say what it is.
    fs::copy(dir.path().join(FILE), dir.path().join("other.bin")).unwrap();
    Parameters::load(dir.path().join("other.bin")).unwrap();

    fs::copy(dir.path().join(FILE), dir.path().join("other.GGUF")).unwrap();
    let error = Parameters::load(dir.path()).unwrap_err().to_string();
    assert!(["2 GGUF models", FILE, "other.GGUF"].iter().all(|word| error.contains(word)), "{error}");
    // Safetensors go before them.
    write_checkpoint(dir.path(), &Spec { seed: 5, ..Spec::default() });
    assert_ne!(Parameters::load(dir.path()).unwrap().fingerprint(), direct.fingerprint());

    for (i, path) in ["missing.gguf", "empty"].iter().enumerate() {
        let empty = tempfile::tempdir().unwrap();
        fs::create_dir(empty.path().join("empty")).unwrap();
        let error = Parameters::load(empty.path().join(path)).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{i}: {error}");
    }
}

#[test]
fn a_fingerprint_follows_what_is_in_the_file_and_not_its_place() {
    let of = |file: &Gguf| load(file).unwrap().fingerprint();
    let plain = of(&sound());
    assert_eq!(plain, of(&sound()));
    let (mut key, mut data) = (sound(), sound());
    key.set("general.name", text("another"));
    *data.tensors.last_mut().unwrap().data.last_mut().unwrap() ^= 1;
    assert_ne!(plain, of(&key));
    assert_ne!(plain, of(&data));
}

#[test]
fn what_a_file_leaves_out_has_llama_cpps_defaults() {
    let config = |change: Damage| {
        let mut file = sound();
        change(&mut file);
        load(&file).unwrap().config().clone()
    };
    let plain = config(&|_| {});
    assert_eq!((plain.n_kv_heads, plain.head_dim, plain.rope_theta, plain.sliding_window), (2, 4, 1e4, None));
    let same: &[(&str, Damage)] = &[
        ("theta", &|file| file.remove("llama.rope.freq_base")),
        ("rotary", &|file| file.remove("llama.rope.dimension_count")),
        ("lengths", &|file| {
            file.remove("llama.attention.key_length");
            file.remove("llama.attention.value_length");
        }),
        ("a list of KV heads", &|file| file.set("llama.attention.head_count_kv", Item::I32s(vec![2]))),
        ("integers of 64 bits", &|file| file.set("llama.block_count", Item::U64(1))),
        ("version 2", &|file| file.version = 2),
        ("scaling by nothing", &|file| file.set("llama.rope.scaling.type", text("none"))),
        ("scaling by 1", &|file| file.set("llama.rope.scaling.factor", Item::F32(1.0))),
        ("no experts", &|file| file.set("llama.expert_count", Item::U32(0))),
        ("window of 0", &|file| file.set("llama.attention.sliding_window", Item::U32(0))),
        ("older converters", &|file| file.set("llama.tensor_data_layout", text("Meta AI original pth"))),
        ("another alignment", &|file| {
            file.set("general.alignment", Item::U32(4096));
            file.alignment = 4096;
        }),
        ("a tensor that isn't needed", &|file| {
            let mut other = file.tensor("blk.0.attn_norm.weight").clone();
            (other.name, other.kind) = ("blk.0.attn_rot_embd.weight".into(), 26);
            file.tensors.push(other);
        }),
        ("a vector of two dimensions", &|file| file.tensor("output_norm.weight").dims.push(1)),
    ];
    report(same.iter().map(|(name, change)| {
        let found = config(*change);
        (found != plain).then(|| format!("{name}: {found:?}"))
    }));
    assert_eq!(config(&|file| file.set("llama.attention.sliding_window", Item::U32(9))).sliding_window, Some(9));
    let scaled = config(&|file| file.set("llama.rope.scale_linear", Item::F32(4.0)));
    assert!(scaled.rope_scaling.is_some() && plain.rope_scaling.is_none());
    let tied = config(&|file| file.tensors.retain(|tensor| tensor.name != b"output.weight"));
    assert!(tied.tie_word_embeddings && !plain.tie_word_embeddings);
}

#[test]
fn control_tokens_that_end_a_turn_end_a_text() {
    let mut file = sound();
    let mut tokens: Vec<String> = (0..40).map(|i| format!("t{i}")).collect();
    for (id, token) in [(7, "<|im_end|>"), (8, "<|end|>"), (9, "<|eot_id|>")] {
        tokens[id] = token.into();
    }
    let mut types = vec![1; 40];
    [2, 7, 9, 10].into_iter().for_each(|id| types[id] = 3);
    file.set("tokenizer.ggml.tokens", texts(&tokens.iter().map(String::as_str).collect::<Vec<_>>()));
    file.set("tokenizer.ggml.token_type", Item::I32s(types));
    file.set("tokenizer.ggml.eot_token_id", Item::U32(9));
    let params = load(&file).unwrap();
    assert_eq!(params.generation().eos_token_id, [2, 9, 7]);
    assert_eq!(params.generation().bos_token_id, Some(1));
}

#[test]
fn values_that_make_no_sense_are_refused_by_key() {
    let size = "a whole number from 1 to 4294967295 is needed";
    let mut table: Vec<(String, Item, Vec<&str>)> = Vec::new();
    for key in [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "rope.dimension_count",
        "vocab_size",
    ] {
        for item in [Item::U32(0), Item::I32(-4), Item::U64(1 << 40), Item::U64(u64::MAX), Item::F32(16.0), text("16"), Item::Bool(true)] {
            table.push((format!("llama.{key}"), item, vec![size]));
        }
    }
    for key in ["rope.freq_base", "attention.layer_norm_rms_epsilon"] {
        for item in [Item::F32(0.0), Item::F32(-1.0), Item::F32(f32::NAN), Item::F32(f32::INFINITY), text("1e-5"), Item::Bool(true)] {
            table.push((format!("llama.{key}"), item, vec!["finite"]));
        }
    }
    let more: Vec<(&str, Item, Vec<&str>)> = vec![
        ("general.architecture", text("gemma2"), vec!["gemma2", "\"llama\"", "Mistral"]),
        ("general.architecture", Item::U32(1), vec!["is 1", "string"]),
        ("general.architecture", Item::Text(b"lla\xffma".to_vec()), vec!["UTF-8"]),
        ("llama.block_count", Item::U32(u32::MAX), vec!["blk.1.attn_norm.weight", "missing"]),
        ("llama.attention.head_count_kv", Item::U32(3), vec!["is 3", "divide the 4"]),
        ("llama.attention.head_count_kv", Item::I32s(vec![2, 1]), vec!["all alike"]),
        ("llama.attention.head_count_kv", Item::I32s(vec![]), vec!["array of 0 integers"]),
        ("llama.attention.head_count_kv", Item::F32s(vec![2.0]), vec!["array of 1 floats", "integers"]),
        ("llama.attention.key_length", Item::U32(8), vec!["value_length is 4", "8 elements"]),
        ("llama.attention.value_length", Item::U32(8), vec!["is 8", "4 elements"]),
        ("llama.rope.dimension_count", Item::U32(2), vec!["is 2", "all of them must rotate"]),
        ("llama.rope.scaling.type", text("yarn"), vec!["yarn", "\"linear\""]),
        ("llama.rope.scaling.factor", Item::F32(-4.0), vec!["rotary scaling", "factor is -4"]),
        ("llama.rope.scale_linear", Item::F32(f32::NAN), vec!["rope.scale_linear is NaN", "finite"]),
        ("llama.expert_count", Item::U32(8), vec!["llama.expert_count = 8", "without experts"]),
        ("llama.tensor_data_layout", text("rows last"), vec!["tensor_data_layout", "rows last"]),
        ("llama.attention.sliding_window", Item::I32(-1), vec!["is -1", size]),
        ("llama.vocab_size", Item::U32(41), vec!["is 41", "40 rows"]),
        ("tokenizer.ggml.tokens", texts(&["a", "b"]), vec!["array of 2 strings", "40 rows"]),
        ("tokenizer.ggml.tokens", Item::I32s(vec![1]), vec!["array of strings"]),
        ("tokenizer.ggml.token_type", texts(&["a"]), vec!["array of integers"]),
        ("tokenizer.ggml.eos_token_id", Item::U32(40), vec!["is 40", "40 tokens"]),
        ("tokenizer.ggml.bos_token_id", Item::I32(-1), vec!["is -1", "a token is needed"]),
        ("tokenizer.ggml.eot_token_id", text("x"), vec!["is \"x\"", "integer"]),
        ("general.alignment", Item::U32(0), vec!["alignment is 0", "power of two"]),
        ("general.alignment", Item::U32(3), vec!["alignment is 3", "power of two"]),
        ("general.alignment", Item::U32(48), vec!["alignment is 48", "power of two"]),
        ("general.alignment", Item::I32(-32), vec!["alignment is -32"]),
        ("general.alignment", Item::U64(1 << 63), vec!["alignment is 9223372036854775808"]),
        ("general.alignment", Item::U32(1 << 31), vec!["not a multiple of the file's alignment of 2147483648"]),
        ("general.alignment", text("32"), vec!["alignment is no integer"]),
    ];
    table.extend(more.into_iter().map(|(key, item, words)| (key.to_owned(), item, words)));
    let sound = sound();
    report(table.into_iter().map(|(key, item, mut words)| {
        let mut file = sound.clone();
        file.set(&key, item.clone());
        if !words.iter().any(|word| {
            word.contains(".weight") || word.contains("alignment of") || word.contains("rotary scaling") || word.contains("value_length")
        }) {
            words.push(key.strip_prefix("general.").unwrap_or(&key));
        }
        refusal(&format!("{key} = {item:?}"), &written(&file).path().join(FILE), &words)
    }));
}

#[test]
fn keys_that_have_no_default_are_needed() {
    let sound = sound();
    let needed = [
        "general.architecture",
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
    ];
    report(needed.into_iter().map(|key| {
        let mut file = sound.clone();
        file.remove(key);
        refusal(key, &written(&file).path().join(FILE), &[key, "absent", "no default"])
    }));
}

#[test]
fn damaged_headers_are_refused() {
    let key = |file: &mut Gguf, kind: u32, bytes: Vec<u8>| file.set("some.key", Item::Raw(kind, bytes));
    let array = |kind: u32, count: u64, bytes: &[u8]| [&kind.to_le_bytes()[..], &count.to_le_bytes(), bytes].concat();
    let kind = "not a sound GGUF file";
    check(&[
        ("another magic", &|file| file.magic = *b"GGML", &[kind, "begins with \"GGML\""]),
        ("magic from behind", &|file| file.magic = *b"FUGG", &[kind, "big-endian"]),
        ("version 0", &|file| file.version = 0, &[kind, "version 0", "2 and 3"]),
        ("version 1", &|file| file.version = 1, &["version 1", "2 and 3"]),
        ("version 4", &|file| file.version = 4, &["version 4", "2 and 3"]),
        ("version 9", &|file| file.version = 9, &["version 9"]),
        ("big-endian", &|file| file.version = 3_u32.swap_bytes(), &["big-endian"]),
        ("no tensors", &|file| file.tensor_count = Some(0), &["token_embd.weight", "missing"]),
        ("2^64 - 1 tensors", &|file| file.tensor_count = Some(u64::MAX), &["claims 18446744073709551615 tensors", "room for"]),
        ("2^40 tensors", &|file| file.tensor_count = Some(1 << 40), &["claims 1099511627776 tensors", "room for"]),
        ("a tensor too many", &|file| file.tensor_count = Some(13), &[kind]),
        ("2^64 - 1 keys", &|file| file.key_count = Some(u64::MAX), &["claims 18446744073709551615 metadata keys", "room for"]),
        ("2^62 keys", &|file| file.key_count = Some(1 << 62), &["metadata keys", "room for"]),
        ("a key too many", &|file| file.key_count = Some(file.keys.len() as u64 + 1), &[kind]),
        ("a key too few", &|file| file.key_count = Some(file.keys.len() as u64 - 1), &[kind]),
        ("a key twice", &|file| file.keys.push(file.keys[1].clone()), &["llama.block_count", "there twice"]),
        ("a key that isn't UTF-8", &|file| file.keys[1].0 = b"ll\xffama".to_vec(), &["key 1 of", "not UTF-8"]),
        ("a key of 65536 bytes", &|file| file.keys[1].0 = vec![b'k'; 65_536], &["key 1 of", "65536 bytes", "65535"]),
        ("an unknown type", &|file| key(file, 13, vec![0; 8]), &["some.key", "type 13"]),
        ("a type of 2^32 - 1", &|file| key(file, u32::MAX, vec![0; 8]), &["some.key", "type 4294967295"]),
        ("a flag of 2", &|file| key(file, 7, vec![2]), &["some.key", "flag is 2"]),
        ("a text of 2^64 - 1 bytes", &|file| key(file, 8, u64::MAX.to_le_bytes().into()), &["some.key", "18446744073709551615 bytes"]),
        ("a text of 2^40 bytes", &|file| key(file, 8, (1_u64 << 40).to_le_bytes().into()), &["some.key", "1099511627776 bytes"]),
        ("an array of arrays", &|file| key(file, 9, array(9, 1, &array(4, 1, &[0; 4]))), &["some.key", "array of arrays"]),
        ("2^61 arrays", &|file| key(file, 9, array(9, 1 << 61, &[])), &["some.key", "array of arrays"]),
        ("an array of an unknown type", &|file| key(file, 9, array(77, 1, &[0; 4])), &["some.key", "type 77"]),
        ("an array of 2^62 integers", &|file| key(file, 9, array(4, 1 << 62, &[])), &["some.key", "4611686018427387904 integers", "room"]),
        ("an array of 2^64 - 1 bytes", &|file| key(file, 9, array(0, u64::MAX, &[])), &["some.key", "18446744073709551615", "room"]),
        ("an array of 2^61 strings", &|file| key(file, 9, array(8, 1 << 61, &[])), &["some.key", "strings in an array", "room"]),
        (
            "a string of an array past the end",
            &|file| key(file, 9, array(8, 1, &(1_u64 << 50).to_le_bytes())),
            &["some.key", "string 0 of 1", "1125899906842624 bytes"],
        ),
    ]);
}

#[test]
fn damaged_tensors_are_refused() {
    const Q: &str = "blk.0.attn_q.weight";
    const NORM: &str = "output_norm.weight";
    let kind = "not a sound GGUF file";
    check(&[
        ("a tensor twice", &|file| file.tensors.push(file.tensors[0].clone()), &[kind, "there twice"]),
        ("a name that isn't UTF-8", &|file| file.tensor(Q).name = b"\xff".to_vec(), &[kind, "not UTF-8"]),
        ("a name of 65 bytes", &|file| file.tensor(Q).name = vec![b'n'; 65], &[kind, "65 bytes", "64 are the most"]),
        ("five dimensions", &|file| file.tensor(Q).dims = vec![16, 4, 2, 2, 1], &[Q, "5 dimensions"]),
        ("2^32 - 1 dimensions", &|file| file.tensor(Q).dims = vec![1; 1 << 20], &[Q, "1048576 dimensions"]),
        ("too many elements", &|file| file.tensor(Q).dims = vec![1 << 40, 1 << 40], &[Q, "too large to address"]),
        ("elements that wrap around to few", &|file| file.tensor(Q).dims = vec![1 << 33, 1 << 31, 16, 16], &[Q, "too large to address"]),
        ("bytes that wrap around", &|file| file.tensor(Q).dims = vec![1 << 62, 1], &[Q, "too large to address"]),
        ("a negative dimension", &|file| file.tensor(Q).dims = vec![u64::MAX, 16], &[Q, "too large to address"]),
        ("larger than the file", &|file| file.tensor(Q).dims = vec![16, 1 << 20], &[Q, "outside the file"]),
        ("no rows", &|file| file.tensor(Q).dims = vec![16, 0], &[Q, "shape [0, 16]", "[16, 16]"]),
        ("another shape", &|file| file.tensor(Q).dims = vec![32, 8], &[Q, "shape [8, 32]", "[16, 16]"]),
        ("a vector for a matrix", &|file| file.tensor(Q).dims = vec![256], &[Q, "shape [256]", "[16, 16]"]),
        ("three dimensions", &|file| file.tensor(Q).dims = vec![16, 8, 2], &[Q, "shape [2, 8, 16]", "[16, 16]"]),
        ("a misaligned offset", &|file| file.tensor(Q).offset = Some(33), &[kind, Q, "33", "alignment of 32"]),
        ("an offset past the end", &|file| file.tensor(Q).offset = Some(1 << 40), &[kind, Q, "outside the file"]),
        ("an offset that wraps around", &|file| file.tensor(Q).offset = Some(u64::MAX - 31), &[kind, Q, "outside the file"]),
        ("an offset of another tensor", &|file| file.tensor(Q).offset = Some(0), &[kind, "overlaps"]),
        ("a row that is no whole block", &|file| file.tensor(Q).kind = 8, &[Q, "rows of 16", "blocks of 32", "Q8_0"]),
        ("a type that isn't read", &|file| file.tensor(NORM).kind = 26, &[NORM, "type I32", "F32", "Q4_K"]),
        ("a number that was taken back", &|file| file.tensor(NORM).kind = 31, &[kind, NORM, "type 31"]),
        ("a number that is no type", &|file| file.tensor(NORM).kind = u32::MAX, &[kind, NORM, "type 4294967295"]),
        ("a missing tensor", &|file| file.tensor(Q).name = b"blk.0.attn_qq.weight".to_vec(), &[Q, "missing"]),
        ("a missing embedding", &|file| file.tensor("token_embd.weight").name = b"x".to_vec(), &["token_embd.weight", "missing"]),
        (
            "an embedding of three dimensions",
            &|file| file.tensor("token_embd.weight").dims = vec![16, 20, 2],
            &["token_embd.weight", "matrix"],
        ),
        (
            "a bias",
            &|file| {
                let mut bias = file.tensor(NORM).clone();
                bias.name = b"blk.0.attn_q.bias".to_vec();
                file.tensors.push(bias);
            },
            &["blk.0.attn_q.bias", "without biases"],
        ),
        (
            "factors of 0",
            &|file| {
                let mut factors = file.tensor(NORM).clone();
                (factors.name, factors.dims, factors.data) = (b"rope_freqs.weight".to_vec(), vec![2], vec![0; 8]);
                file.tensors.push(factors);
            },
            &["rotary scaling"],
        ),
        (
            "factors for heads of 2^32 elements",
            &|file| {
                let mut factors = file.tensor(NORM).clone();
                factors.name = b"rope_freqs.weight".to_vec();
                file.tensors.push(factors);
                file.remove("llama.rope.dimension_count");
                ["key_length", "value_length"]
                    .map(|key| format!("llama.attention.{key}"))
                    .iter()
                    .for_each(|key| file.set(key, Item::U32(u32::MAX - 1)));
            },
            &["rope_freqs.weight", "shape [16]", "[2147483647]"],
        ),
        (
            "more factors than frequencies",
            &|file| {
                let mut factors = file.tensor(NORM).clone();
                factors.name = b"rope_freqs.weight".to_vec();
                file.tensors.push(factors);
            },
            &["rope_freqs.weight", "shape [16]", "[2]"],
        ),
        (
            "a tensor outside the file that isn't needed",
            &|file| {
                let mut other = file.tensor(NORM).clone();
                (other.name, other.offset) = (b"other".to_vec(), Some(1 << 30));
                file.tensors.push(other);
            },
            &[kind, "other", "outside the file"],
        ),
    ]);
}

#[test]
fn types_that_are_known_and_not_computed_with_are_refused_by_name() {
    let mut file = sound();
    file.set("llama.feed_forward_length", Item::U32(256));
    for (name, shape) in [("blk.0.ffn_gate.weight", [16, 256]), ("blk.0.ffn_up.weight", [16, 256]), ("blk.0.ffn_down.weight", [256, 16])] {
        let tensor = file.tensor(name);
        (tensor.dims, tensor.data) = (shape.to_vec(), vec![0; 4 * 16 * 256]);
    }
    load(&file).unwrap();
    let types = [(10, "Q2_K"), (11, "Q3_K"), (15, "Q8_K"), (16, "IQ2_XXS"), (23, "IQ4_XS"), (34, "TQ1_0"), (39, "MXFP4"), (40, "NVFP4")];
    report(types.into_iter().map(|(kind, name)| {
        let mut file = file.clone();
        file.tensor("blk.0.ffn_down.weight").kind = kind;
        refusal(name, &written(&file).path().join(FILE), &["blk.0.ffn_down.weight", &format!("type {name};"), "Q4_0, Q4_1, Q5_0, Q5_1"])
    }));
}

#[test]
fn files_that_are_nothing_are_refused() {
    let kind = "not a sound GGUF file";
    check_bytes(&[
        ("empty", vec![], &[kind, "0 bytes"]),
        ("three bytes", b"GGU".to_vec(), &[kind, "3 bytes"]),
        ("the magic alone", b"GGUF".to_vec(), &[kind, "4 bytes"]),
        ("zeros", vec![0; 4096], &[kind, "begins with"]),
        ("ones", vec![255; 4096], &[kind, "begins with"]),
        ("a safetensors file", fs::read(fixture::path("tied").join("model.safetensors")).unwrap(), &[kind, "begins with"]),
        ("an empty header", Gguf::default().bytes(), &["general.architecture", "absent"]),
    ]);
}

#[test]
fn a_file_cut_at_any_length_is_refused() {
    let mut file = sound();
    file.set("tokenizer.ggml.tokens", Item::Texts((0..40).map(|i| format!("token {i}").into()).collect()));
    let (header, bytes) = (file.header().len(), file.bytes());
    let dir = written(&file);
    let path = dir.path().join(FILE);
    Parameters::load(&path).unwrap();
    let on_disk = File::options().write(true).open(&path).unwrap();
    let lengths = (0..header + 100).chain((header + 100..bytes.len() - 1).step_by(97)).chain([bytes.len() - 1]);
    report(lengths.rev().map(|length| {
        on_disk.set_len(length as u64).unwrap();
        refusal(&format!("{length} bytes"), &path, &["not a sound GGUF file"])
    }));
    // A fixture written by another program, whose last tensor has padding behind it.
    let whole = fs::read(models().join("q4_k_m.gguf")).unwrap();
    fs::write(&path, &whole).unwrap();
    let on_disk = File::options().write(true).open(&path).unwrap();
    report((0..whole.len() - 32).step_by(1000).rev().map(|length| {
        on_disk.set_len(length as u64).unwrap();
        refusal(&format!("{length} bytes of q4_k_m"), &path, &["not a sound GGUF file"])
    }));
}

#[test]
fn no_changed_byte_of_a_header_brings_the_process_down() {
    let mut file = sound();
    file.set("tokenizer.ggml.tokens", Item::Texts((0..40).map(|i| format!("t{i}").into()).collect()));
    file.set("tokenizer.ggml.token_type", Item::I32s(vec![3; 40]));
    let dir = written(&file);
    let path = dir.path().join(FILE);
    let sound = file.bytes();
    let mut complaints = Vec::new();
    for at in 0..file.header().len() {
        for flip in [0x01, 0x10, 0x80] {
            let mut bytes = sound.clone();
            bytes[at] ^= flip;
            fs::write(&path, &bytes).unwrap();
            if catch_unwind(AssertUnwindSafe(|| _ = Parameters::load(&path))).is_err() {
                complaints.push(Some(format!("byte {at} ^ {flip:#x} panics")));
            }
        }
    }
    report(complaints);
}
