//! Damaged checkpoints: each is refused with a message that says what is wrong, and none brings the process down.

mod common;

use std::fs::{self, File};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use common::{Spec, write_checkpoint};
use serde_json::{Map, Value, json};
use torchless::Parameters;

const MODEL: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const SHARD: &str = "model-00001-of-00002.safetensors";

/// What damages a sound checkpoint in this directory.
type Damage<'a> = &'a dyn Fn(&Path);

/// Writes `spec`, damages it, and complains unless loading fails with all of `words` in its message.
fn complaint(name: &str, spec: &Spec, damage: Damage, words: &[&str]) -> Option<String> {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), spec);
    damage(dir.path());
    let found = match catch_unwind(AssertUnwindSafe(|| Parameters::load(dir.path()))) {
        Err(_) => "it panicked".into(),
        Ok(Ok(_)) => "it loaded".into(),
        Ok(Err(error)) => error.to_string(),
    };
    let missing: Vec<_> = words.iter().filter(|word| !found.contains(**word)).collect();
    (!missing.is_empty()).then(|| format!("{name}: no {missing:?} in: {found}"))
}

fn report(complaints: impl Iterator<Item = Option<String>>) {
    let complaints: Vec<_> = complaints.flatten().collect();
    assert!(complaints.is_empty(), "{} rows fail:\n{}", complaints.len(), complaints.join("\n"));
}

/// Every row on one checkpoint: the name, the damage, the words.
fn check(spec: &Spec, rows: &[(&str, Damage, &[&str])]) {
    report(rows.iter().map(|(name, damage, words)| complaint(name, spec, damage, words)));
}

fn sharded() -> Spec {
    Spec { shards: 2, ..Spec::default() }
}

fn write(dir: &Path, file: &str, bytes: impl AsRef<[u8]>) {
    fs::write(dir.join(file), bytes).unwrap();
}

fn edit_json(dir: &Path, file: &str, edit: impl FnOnce(&mut Map<String, Value>)) {
    let mut value: Value = serde_json::from_slice(&fs::read(dir.join(file)).unwrap()).unwrap();
    edit(value.as_object_mut().unwrap());
    write(dir, file, value.to_string());
}

fn edit_weight_map(dir: &Path, edit: impl FnOnce(&mut Map<String, Value>)) {
    edit_json(dir, INDEX, |index| edit(index["weight_map"].as_object_mut().unwrap()));
}

/// The header's text and the data of a safetensors file.
fn read_parts(dir: &Path, file: &str) -> (String, Vec<u8>) {
    let bytes = fs::read(dir.join(file)).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (String::from_utf8(bytes[8..8 + header].to_vec()).unwrap(), bytes[8 + header..].to_vec())
}

fn write_parts(dir: &Path, file: &str, header: impl AsRef<[u8]>, data: &[u8]) {
    let header = header.as_ref();
    write(dir, file, [&(header.len() as u64).to_le_bytes(), header, data].concat());
}

/// Edits a header as text, and leaves it at a multiple of 8 bytes.
fn edit_header_text(dir: &Path, edit: impl FnOnce(String) -> String) {
    let (header, data) = read_parts(dir, MODEL);
    let header = edit(header.trim_end().to_owned());
    write_parts(dir, MODEL, format!("{header:<width$}", width = header.len().next_multiple_of(8)), &data);
}

fn edit_header(dir: &Path, edit: impl FnOnce(&mut Map<String, Value>)) {
    edit_header_text(dir, |text| {
        let mut header: Value = serde_json::from_str(&text).unwrap();
        edit(header.as_object_mut().unwrap());
        header.to_string()
    });
}

/// Appends a tensor of zeros.
fn add_tensor(dir: &Path, file: &str, name: &str, len: usize) {
    let (text, mut data) = read_parts(dir, file);
    let mut header: Value = serde_json::from_str(&text).unwrap();
    let start = data.len();
    data.resize(start + 4 * len, 0);
    header[name] = json!({"dtype": "F32", "shape": [len], "data_offsets": [start, data.len()]});
    let header = header.to_string();
    write_parts(dir, file, format!("{header:<width$}", width = header.len().next_multiple_of(8)), &data);
}

#[test]
fn values_of_the_config_that_make_no_sense_are_refused_by_key() {
    let size = "a whole number from 1 to 4294967295 is needed";
    let mut rows: Vec<(&str, Value, Vec<&str>)> = Vec::new();
    let sizes = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    ];
    for key in sizes {
        for value in [json!(0), json!(-4), json!(2.5), json!("16"), json!([16]), json!(1_u64 << 40), json!(1_u64 << 60), json!(1e30)] {
            rows.push((key, value, vec![key, size]));
        }
    }
    for key in ["rms_norm_eps", "rope_theta"] {
        for value in [json!(0), json!(-1e-5), json!("1e-5"), json!(1e-60), json!(1e60), json!(true)] {
            rows.push((key, value, vec![key, "finite positive number"]));
        }
    }
    rows.extend([
        ("num_hidden_layers", json!(u32::MAX), vec!["model.layers.2.input_layernorm.weight", "missing"]),
        ("num_key_value_heads", json!(3), vec!["num_key_value_heads is 3", "divide the 4"]),
        ("num_key_value_heads", json!(8), vec!["num_key_value_heads is 8", "divide the 4"]),
        ("head_dim", json!(5), vec!["head_dim is 5", "even"]),
        ("sliding_window", json!(0), vec!["sliding_window is 0", "null means"]),
        ("sliding_window", json!(-1), vec!["sliding_window is -1", size]),
        ("sliding_window", json!("4096"), vec!["sliding_window", size]),
        ("tie_word_embeddings", json!(1), vec!["tie_word_embeddings is 1", "true or false"]),
        ("hidden_act", json!("gelu"), vec!["hidden_act", "gelu", "silu"]),
        ("hidden_act", json!("swish"), vec!["hidden_act", "swish"]),
        ("hidden_act", json!(1), vec!["hidden_act is 1", "string"]),
        ("attention_bias", json!(true), vec!["attention_bias", "without biases"]),
        ("mlp_bias", json!(true), vec!["mlp_bias", "without biases"]),
        ("model_type", json!("mixtral"), vec!["model_type", "mixtral", "mistral", "llama", "qwen2", "qwen3"]),
        ("model_type", json!("gemma3_text"), vec!["model_type", "gemma3_text"]),
        ("model_type", json!("phi3"), vec!["model_type", "phi3"]),
        ("model_type", json!("qwen3_moe"), vec!["model_type", "qwen3_moe"]),
        ("model_type", json!("qwen2"), vec!["model.layers.0.self_attn.q_proj.bias", "missing"]),
        ("model_type", json!("qwen3"), vec!["model.layers.0.self_attn.q_norm.weight", "missing"]),
        ("model_type", json!(null), vec!["model_type"]),
        ("rope_scaling", json!({"rope_type": "llama3", "factor": 8.0}), vec!["rope_scaling.low_freq_factor is absent"]),
        ("rope_scaling", json!({"type": "linear"}), vec!["rope_scaling.factor is absent"]),
        ("rope_scaling", json!({"type": "linear", "factor": "2"}), vec!["rope_scaling.factor is \"2\"", "finite positive number"]),
        ("rope_scaling", json!({"factor": 2.0}), vec!["rope_scaling.rope_type is absent"]),
        ("rope_scaling", json!("linear"), vec!["rope_scaling is \"linear\"", "object"]),
        ("rope_scaling", json!({"rope_type": 3}), vec!["rope_scaling.rope_type is 3", "string"]),
        ("rope_scaling", json!({"rope_type": "dynamic", "factor": 2.0}), vec!["rope_scaling.rope_type", "dynamic", "llama3"]),
        ("rope_scaling", json!({"rope_type": "longrope", "short_factor": [1.0]}), vec!["rope_scaling.rope_type", "longrope"]),
        ("partial_rotary_factor", json!(0.25), vec!["partial_rotary_factor", "0.25"]),
        ("rope_parameters", json!({"rope_type": "yarn", "rope_theta": 1e4}), vec!["rope_parameters.rope_type", "yarn"]),
        ("rope_parameters", json!({"rope_type": "default", "rope_theta": 0}), vec!["rope_parameters.rope_theta is 0"]),
        ("rope_parameters", json!({"rope_theta": 1e4, "partial_rotary_factor": 0.5}), vec!["partial_rotary_factor", "0.5"]),
        ("rope_parameters", json!([1e4]), vec!["rope_parameters", "object"]),
        ("quantization_config", json!({"quant_method": "gptq", "bits": 4}), vec!["quantization_config", "gptq"]),
    ]);
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    });
    for key in ["factor", "low_freq_factor", "high_freq_factor"] {
        for wrong in [json!(0), json!(-8.0), json!(1e60), json!("8")] {
            let mut scaling = llama3.clone();
            scaling[key] = wrong;
            rows.push(("rope_scaling", scaling, vec![key, "finite positive number"]));
        }
    }
    for (key, wrong, word) in [
        ("low_freq_factor", json!(4.0), "low_freq_factor is 4; it must be less than high_freq_factor, which is 4"),
        ("high_freq_factor", json!(0.5), "low_freq_factor is 1; it must be less than high_freq_factor, which is 0.5"),
        ("original_max_position_embeddings", json!(0), size),
        ("original_max_position_embeddings", json!(1.5), size),
    ] {
        let mut scaling = llama3.clone();
        scaling[key] = wrong;
        rows.push(("rope_scaling", scaling.clone(), vec![word]));
        scaling["rope_theta"] = json!(1e4);
        rows.push(("rope_parameters", scaling, vec![word]));
    }
    report(rows.into_iter().map(|(key, value, words)| {
        let damage = |dir: &Path| edit_json(dir, "config.json", |config| _ = config.insert(key.into(), value.clone()));
        complaint(&format!("{key} = {value}"), &Spec::default(), &damage, &words)
    }));
}

#[test]
fn a_required_key_of_the_config_that_is_missing_is_named() {
    let keys = [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ];
    report(keys.into_iter().map(|key| {
        let damage = |dir: &Path| edit_json(dir, "config.json", |config| _ = config.remove(key));
        complaint(key, &Spec::default(), &damage, &[key, "absent"])
    }));
}

#[test]
fn sizes_that_disagree_with_each_other_or_with_the_tensors_are_refused() {
    fn set(dir: &Path, values: &[(&str, Value)]) {
        edit_json(dir, "config.json", |config| config.extend(values.iter().map(|(key, value)| ((*key).to_owned(), value.clone()))));
    }
    check(
        &Spec::default(),
        &[
            ("vocabulary", &|dir| set(dir, &[("vocab_size", json!(41))]), &["model.embed_tokens.weight", "[40, 16]", "[41, 16]"]),
            ("hidden size", &|dir| set(dir, &[("hidden_size", json!(32))]), &["model.embed_tokens.weight", "[40, 16]", "[40, 32]"]),
            ("channels", &|dir| set(dir, &[("intermediate_size", json!(25))]), &["mlp.gate_proj.weight", "[24, 16]", "[25, 16]"]),
            ("heads", &|dir| set(dir, &[("num_attention_heads", json!(8))]), &["self_attn.q_proj.weight", "[16, 16]", "[32, 16]"]),
            ("key-value heads", &|dir| set(dir, &[("num_key_value_heads", json!(1))]), &["self_attn.k_proj.weight", "[8, 16]", "[4, 16]"]),
            ("head_dim", &|dir| set(dir, &[("head_dim", json!(8))]), &["self_attn.q_proj.weight", "[16, 16]", "[32, 16]"]),
            ("layers", &|dir| set(dir, &[("num_hidden_layers", json!(3))]), &["model.layers.2.input_layernorm.weight", "missing"]),
            (
                "hidden size without head_dim",
                &|dir| set(dir, &[("head_dim", Value::Null), ("hidden_size", json!(18))]),
                &["hidden_size is 18", "4 heads"],
            ),
            (
                "the product of the sizes",
                &|dir| {
                    set(dir, &[("hidden_size", json!(u32::MAX)), ("vocab_size", json!(u32::MAX)), ("num_hidden_layers", json!(u32::MAX))])
                },
                &["bytes, which no memory can hold"],
            ),
            (
                "the product of all sizes",
                &|dir| {
                    let keys = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"];
                    set(dir, &keys.map(|key| (key, json!(u32::MAX))));
                    set(dir, &[("head_dim", json!(u32::MAX - 1))]);
                },
                &["bytes, which no memory can hold"],
            ),
        ],
    );
}

#[test]
fn json_files_that_are_not_what_they_should_be_are_refused() {
    check(
        &Spec::default(),
        &[
            ("no directory", &|dir| fs::remove_dir_all(dir).unwrap(), &["cannot open"]),
            (
                "a file for a directory",
                &|dir| {
                    fs::remove_dir_all(dir).unwrap();
                    fs::write(dir, "").unwrap();
                },
                &["neither the directory of a model nor a GGUF file"],
            ),
            ("no config", &|dir| fs::remove_file(dir.join("config.json")).unwrap(), &["cannot open", "config.json"]),
            ("an empty config", &|dir| write(dir, "config.json", ""), &["config.json", "not a JSON object"]),
            ("half a config", &|dir| write(dir, "config.json", r#"{"model_type": "mis"#), &["config.json", "not a JSON object"]),
            ("a config of text", &|dir| write(dir, "config.json", "vocab_size = 3"), &["config.json", "not a JSON object"]),
            ("a config of numbers", &|dir| write(dir, "config.json", "[1, 2]"), &["config.json", "not a JSON object"]),
            ("a config of no characters", &|dir| write(dir, "config.json", b"{\"\xff\": 1}"), &["config.json", "not a JSON object"]),
            ("Python's NaN", &|dir| write(dir, "config.json", r#"{"rms_norm_eps": NaN}"#), &["config.json", "not a JSON object"]),
            ("a huge config", &|dir| write(dir, "config.json", vec![b' '; 2 << 20]), &["config.json", "more than 1048576 bytes"]),
            (
                "a deep config",
                &|dir| write(dir, "config.json", format!("{{\"a\": {}", "[".repeat(500_000))),
                &["config.json", "recursion limit"],
            ),
            (
                "a directory for a config",
                &|dir| {
                    fs::remove_file(dir.join("config.json")).unwrap();
                    fs::create_dir(dir.join("config.json")).unwrap();
                },
                &["config.json", "not a regular file"],
            ),
            ("a damaged generation config", &|dir| write(dir, "generation_config.json", "{"), &["generation_config.json"]),
            (
                "an eos of text",
                &|dir| write(dir, "generation_config.json", r#"{"eos_token_id": "</s>"}"#),
                &["generation_config.json", "eos_token_id", "a token or a list"],
            ),
            (
                "an eos below 0",
                &|dir| write(dir, "generation_config.json", r#"{"eos_token_id": [2, -1]}"#),
                &["generation_config.json", "eos_token_id is [2,-1]"],
            ),
            (
                "a bos of 1.5",
                &|dir| write(dir, "generation_config.json", r#"{"bos_token_id": 1.5}"#),
                &["generation_config.json", "bos_token_id is 1.5"],
            ),
        ],
    );
}

#[test]
fn damaged_safetensors_files_are_refused() {
    const NORM: &str = "model.norm.weight";
    const Q: &str = "model.layers.0.self_attn.q_proj.weight";
    check(
        &Spec::default(),
        &[
            ("no file", &|dir| fs::remove_file(dir.join(MODEL)).unwrap(), &["neither model.safetensors nor"]),
            (
                "a directory",
                &|dir| {
                    fs::remove_file(dir.join(MODEL)).unwrap();
                    fs::create_dir(dir.join(MODEL)).unwrap();
                },
                &[MODEL, "not a regular file"],
            ),
            ("empty", &|dir| write(dir, MODEL, ""), &["not a sound safetensors file", "0 bytes"]),
            ("7 bytes", &|dir| write(dir, MODEL, "1234567"), &["not a sound safetensors file", "7 bytes"]),
            ("header past the file", &|dir| write(dir, MODEL, b"\x03\0\0\0\0\0\0\0{}"), &["claims 3 bytes", "only 2 follow"]),
            ("header of 2^64 - 1", &|dir| write(dir, MODEL, [255; 64]), &["claims 18446744073709551615 bytes"]),
            (
                "header over 100 MB, and there",
                &|dir| {
                    write(dir, MODEL, 100_000_001_u64.to_le_bytes());
                    File::options().write(true).open(dir.join(MODEL)).unwrap().set_len(200_000_000).unwrap();
                },
                &["claims 100000001 bytes", "allows 100000000"],
            ),
            ("header of no characters", &|dir| write_parts(dir, MODEL, b"{\"\xff\xfe\": {}}", &[]), &["header is damaged"]),
            ("header of a list", &|dir| write_parts(dir, MODEL, "[]", &[]), &["header is damaged"]),
            ("header with something behind it", &|dir| write_parts(dir, MODEL, "{}{}", &[]), &["header is damaged", "trailing"]),
            ("deep header", &|dir| write_parts(dir, MODEL, format!("{{\"a\":{}", "[".repeat(500_000)), &[]), &["header is damaged"]),
            ("empty header", &|dir| write_parts(dir, MODEL, "{}", &[]), &["model.embed_tokens.weight", "missing"]),
            (
                "duplicate tensor",
                &|dir| edit_header_text(dir, |text| text.replace("model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.q_proj")),
                &[Q, "there twice"],
            ),
            (
                "duplicate dtype",
                &|dir| edit_header_text(dir, |text| text.replacen(r#""dtype":"F32""#, r#""dtype":"F32","dtype":"F32""#, 1)),
                &["duplicate field `dtype`"],
            ),
            ("shape below 0", &|dir| edit_header(dir, |h| h[NORM]["shape"] = json!([-16])), &[NORM, "-16"]),
            ("shape too large", &|dir| edit_header(dir, |h| h[NORM]["shape"] = json!([1_u64 << 40, 1_u64 << 40])), &[NORM, "64 bits"]),
            ("shape larger than its bytes", &|dir| edit_header(dir, |h| h[NORM]["shape"] = json!([17])), &[NORM, "64 bytes", "needs 68"]),
            ("many dimensions", &|dir| edit_header(dir, |h| h[NORM]["shape"] = json!(vec![1; 1000])), &[NORM, "1000 dimensions"]),
            ("unknown dtype", &|dir| edit_header(dir, |h| h[NORM]["dtype"] = json!("Q4_K")), &[NORM, "Q4_K"]),
            ("wrong dtype", &|dir| edit_header(dir, |h| h[NORM]["dtype"] = json!("I32")), &[NORM, "I32", "F32, F16 and BF16"]),
            ("wrong shape", &|dir| edit_header(dir, |h| h[Q]["shape"] = json!([8, 32])), &[Q, "[8, 32]", "[16, 16]"]),
            ("vector stored as a matrix", &|dir| edit_header(dir, |h| h[NORM]["shape"] = json!([1, 16])), &[NORM, "[1, 16]", "[16]"]),
            ("missing tensor", &|dir| edit_header_text(dir, |text| text.replace(NORM, "model.norm.wait")), &[NORM, "missing"]),
            (
                "overlapping tensors",
                &|dir| {
                    edit_header(dir, |h| {
                        let first = h["lm_head.weight"]["data_offsets"].clone();
                        h["model.embed_tokens.weight"]["data_offsets"] = first;
                    });
                },
                &["overlaps"],
            ),
            (
                "a range outside the file",
                &|dir| {
                    let (_, data) = read_parts(dir, MODEL);
                    edit_header(dir, |h| {
                        _ = h.insert("behind".into(), json!({"dtype": "F32", "shape": [4], "data_offsets": [data.len(), data.len() + 16]}))
                    });
                },
                &["behind", "outside the file"],
            ),
            (
                "a range that ends before it starts",
                &|dir| edit_header(dir, |h| h[NORM]["data_offsets"] = json!([64, 0])),
                &[NORM, "before its start"],
            ),
            (
                "ranges whose end wraps around 64 bits",
                &|dir| {
                    let len = (1_u64 << 61) - 1;
                    let tensor = |i: u64| json!({"dtype": "U8", "shape": [len], "data_offsets": [i * len, (i + 1) * len]});
                    let header: Map<_, _> = (0..8).map(|i| (i.to_string(), tensor(i))).collect();
                    write_parts(dir, MODEL, Value::from(header).to_string(), &[]);
                },
                &["outside the file"],
            ),
            ("a hole", &|dir| edit_header(dir, |h| _ = h.remove("model.embed_tokens.weight")), &["hole before"]),
            (
                "bytes behind the last tensor",
                &|dir| {
                    let (header, data) = read_parts(dir, MODEL);
                    write_parts(dir, MODEL, header, &[data, vec![0; 8]].concat());
                },
                &["hole behind"],
            ),
            (
                "unaligned data",
                &|dir| {
                    let (header, data) = read_parts(dir, MODEL);
                    write_parts(dir, MODEL, header + " ", &data);
                },
                &["tensor", "not a multiple of its element's 4 bytes"],
            ),
            (
                "a bias of attention",
                &|dir| add_tensor(dir, MODEL, "model.layers.1.self_attn.q_proj.bias", 16),
                &["model.layers.1.self_attn.q_proj.bias", "without biases"],
            ),
            ("a bias of the head", &|dir| add_tensor(dir, MODEL, "lm_head.bias", 40), &["lm_head.bias", "without biases"]),
        ],
    );
}

#[test]
fn of_qwen_only_the_biases_that_it_has_are_computed_and_each_must_be_there() {
    let last = "model.layers.1.self_attn";
    check(
        &Spec { model_type: "qwen2", ..Spec::default() },
        &[
            (
                "a bias of the output",
                &|dir| add_tensor(dir, MODEL, "model.layers.1.self_attn.o_proj.bias", 16),
                &[last, "o_proj.bias", "without biases"],
            ),
            (
                "a bias of the MLP",
                &|dir| add_tensor(dir, MODEL, "model.layers.0.mlp.up_proj.bias", 24),
                &["mlp.up_proj.bias", "without biases"],
            ),
            (
                "a bias by another name",
                &|dir| {
                    edit_header_text(dir, |text| {
                        text.replace("model.layers.1.self_attn.v_proj.bias", "model.layers.1.self_attn.v_proj.ofst")
                    })
                },
                &[last, "v_proj.bias", "missing"],
            ),
            (
                "a bias of another length",
                &|dir| edit_json(dir, "config.json", |config| _ = config.insert("num_key_value_heads".into(), json!(1))),
                &["k_proj"],
            ),
        ],
    );
    let heads = Spec { model_type: "qwen3", ..Spec::default() };
    check(
        &heads,
        &[(
            "a norm of another length",
            &|dir| {
                edit_header(dir, |header| {
                    for name in ["self_attn.q_norm.weight", "self_attn.k_norm.weight"] {
                        header[&format!("model.layers.0.{name}")]["shape"] = json!([2, 2]);
                    }
                });
            },
            &["model.layers.0.self_attn.q_norm.weight", "[2, 2]", "[4]"],
        )],
    );
}

#[test]
fn an_index_that_disagrees_with_its_shards_is_refused() {
    /// Names every tensor's shard anew.
    fn rename(dir: &Path, to: &str) {
        edit_weight_map(dir, |map| map.values_mut().for_each(|shard| *shard = json!(to)));
    }
    check(
        &sharded(),
        &[
            ("no JSON", &|dir| write(dir, INDEX, "weight_map"), &[INDEX, "not an index of shards"]),
            ("no weight map", &|dir| write(dir, INDEX, "{}"), &[INDEX, "weight_map"]),
            ("a shard that is no text", &|dir| edit_weight_map(dir, |map| map["lm_head.weight"] = json!(2)), &[INDEX, "lm_head.weight"]),
            ("a shard that isn't there", &|dir| fs::remove_file(dir.join(SHARD)).unwrap(), &["cannot open", SHARD]),
            ("a shard that is damaged", &|dir| write(dir, SHARD, "12345678"), &[SHARD, "not a sound safetensors file"]),
            ("a shard above the directory", &|dir| rename(dir, &format!("../{SHARD}")), &[INDEX, "../model", "without any directory"]),
            ("a shard below the directory", &|dir| rename(dir, "a/b.safetensors"), &[INDEX, "a/b", "without any directory"]),
            ("a shard in Windows' notation", &|dir| rename(dir, "..\\b.safetensors"), &[INDEX, "without any directory"]),
            ("a shard on another drive", &|dir| rename(dir, "C:b.safetensors"), &[INDEX, "without any directory"]),
            ("a shard by absolute path", &|dir| rename(dir, dir.join(SHARD).to_str().unwrap()), &[INDEX, "without any directory"]),
            ("a shard without a name", &|dir| rename(dir, ""), &[INDEX, "without any directory"]),
            ("the directory as a shard", &|dir| rename(dir, "."), &[INDEX, "without any directory"]),
            (
                "a tensor that no shard has",
                &|dir| edit_weight_map(dir, |map| _ = map.insert("extra.weight".into(), json!(SHARD))),
                &[INDEX, "extra.weight", SHARD, "doesn't have it"],
            ),
            (
                "a tensor of another shard",
                &|dir| edit_weight_map(dir, |map| map["lm_head.weight"] = json!(SHARD)),
                &[INDEX, "lm_head.weight", SHARD, "doesn't have it"],
            ),
            ("a tensor that it doesn't name", &|dir| add_tensor(dir, SHARD, "extra", 4), &[INDEX, "doesn't name", "extra", SHARD]),
            (
                "a tensor in two shards",
                &|dir| add_tensor(dir, SHARD, "lm_head.weight", 640),
                &[INDEX, "lm_head.weight", "model-00002-of-00002.safetensors", SHARD],
            ),
            (
                "a tensor named twice",
                &|dir| {
                    let text = fs::read_to_string(dir.join(INDEX)).unwrap();
                    write(dir, INDEX, text.replace("model.norm.weight", "lm_head.weight"));
                },
                &[INDEX, "lm_head.weight", "there twice"],
            ),
            (
                "a bias",
                &|dir| {
                    add_tensor(dir, SHARD, "model.layers.0.mlp.up_proj.bias", 24);
                    edit_weight_map(dir, |map| _ = map.insert("model.layers.0.mlp.up_proj.bias".into(), json!(SHARD)));
                },
                &["model.layers.0.mlp.up_proj.bias", "without biases"],
            ),
        ],
    );
}

#[test]
fn a_model_file_cut_at_any_length_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &Spec::default());
    let (header, data) = read_parts(dir.path(), MODEL);
    let file = File::options().write(true).open(dir.path().join(MODEL)).unwrap();
    let data_start = 8 + header.len();
    let lengths = (0..data_start + 100).chain((data_start + 100..data_start + data.len()).step_by(97));
    report(lengths.rev().map(|length| {
        file.set_len(length as u64).unwrap();
        let found = Parameters::load(dir.path()).err().map_or_else(|| "it loaded".into(), |e| e.to_string());
        (!found.contains("not a sound safetensors file")).then(|| format!("{length} bytes: {found}"))
    }));
}

#[test]
fn no_changed_byte_of_a_header_or_of_the_json_files_brings_the_process_down() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &Spec { layers: 1, ..sharded() });
    let mut complaints = Vec::new();
    for file in ["config.json", "generation_config.json", INDEX, SHARD] {
        let sound = fs::read(dir.path().join(file)).unwrap();
        let changed = if file == SHARD { 8 + read_parts(dir.path(), file).0.len() } else { sound.len() };
        for at in 0..changed {
            // A neighbouring digit or letter, a quote or bracket broken, and no character at all.
            for flip in [0x01, 0x10, 0x80] {
                let mut bytes = sound.clone();
                bytes[at] ^= flip;
                write(dir.path(), file, &bytes);
                if catch_unwind(AssertUnwindSafe(|| _ = Parameters::load(dir.path()))).is_err() {
                    complaints.push(Some(format!("{file}: byte {at} ^ {flip:#x} panics")));
                }
            }
        }
        write(dir.path(), file, &sound);
    }
    report(complaints.into_iter());
}
