//! Sound checkpoints load, with the values that they hold.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Spec, write_checkpoint};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use torchless::{Config, DType, Error, Matrix, Parameters, RopeScaling};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn write(spec: &Spec) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), spec);
    dir
}

fn row(matrix: &Matrix, r: usize) -> Vec<f32> {
    let mut row = vec![0.0; matrix.cols()];
    matrix.row_to_f32(r, &mut row);
    row
}

fn values(matrix: &Matrix) -> Vec<f32> {
    (0..matrix.rows()).flat_map(|r| row(matrix, r)).collect()
}

/// A `config.json` of a plain Mistral, changed.
fn config_with(change: impl FnOnce(&mut serde_json::Map<String, Value>)) -> Result<Config, Error> {
    let dir = write(&Spec::default());
    let path = dir.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(config.as_object_mut().unwrap());
    fs::write(&path, config.to_string()).unwrap();
    Config::load(path)
}

#[test]
fn every_fixture_loads_and_its_embedding_holds_the_expected_values() {
    for name in common::fixture::ALL {
        let params = Parameters::load(fixture(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let expected = fs::read(fixture(name).join("expected.safetensors")).unwrap();
        let expected = SafeTensors::deserialize(&expected).unwrap();
        let ids = expected.tensor("main.input_ids").unwrap();
        let ids = ids.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as usize);
        let rows = expected.tensor("main.embedding").unwrap();
        let rows: Vec<f32> = rows.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();

        let embedding = params.tensor("model.embed_tokens.weight").unwrap();
        assert_eq!((embedding.rows(), embedding.cols()), (params.config().vocab_size, params.config().hidden_size), "{name}");
        let found: Vec<f32> = ids.flat_map(|id| row(&embedding, id)).collect();
        assert_eq!(found, rows, "{name}");
        assert_eq!(params.generation().eos_token_id, [2], "{name}");
        assert_eq!(params.generation().bos_token_id, Some(1), "{name}");
    }
}

#[test]
fn the_sharded_fixture_gives_each_tensor_the_bytes_of_its_shard() {
    let dir = fixture("sharded-f16");
    let params = Parameters::load(&dir).unwrap();
    let mut tensors = 0;
    for shard in 1..=4 {
        let bytes = fs::read(dir.join(format!("model-{shard:05}-of-00004.safetensors"))).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let expected: Vec<f32> = view.data().chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect();
            let matrix = params.tensor(&name).unwrap();
            assert_eq!(values(&matrix), expected, "{name}");
            assert_eq!(matrix.dtype(), DType::F16, "{name}");
            tensors += 1;
        }
    }
    assert_eq!(tensors, 3 + 4 * 9);
    // The index says so under `total_size`.
    assert_eq!(params.bytes(), 1_009_344);
}

#[test]
fn both_forms_of_a_config_say_the_same() {
    let dir = fixture("gqa-headdim");
    let old = Config::load(dir.join("config.json")).unwrap();
    assert_eq!(old, Config::load(dir.join("config.transformers5.json")).unwrap());
    assert_eq!((old.head_dim, old.rope_theta, old.n_heads, old.n_kv_heads), (16, 1e6, 8, 4));
    let llama3 = RopeScaling::Llama3 { factor: 4.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position_embeddings: 32 };
    for (name, scaling) in [("rope-llama3", llama3), ("rope-linear", RopeScaling::Linear { factor: 4.0 })] {
        for file in ["config.json", "config.transformers5.json"] {
            let config = Config::load(fixture(name).join(file)).unwrap();
            assert_eq!((config.rope_scaling.as_ref(), config.rope_theta), (Some(&scaling), 10_000.0), "{name}/{file}");
        }
    }
}

#[test]
fn keys_that_configs_leave_out_have_the_defaults_of_transformers() {
    let without = |key: &'static str| config_with(|config| _ = config.remove(key).unwrap()).unwrap();
    assert_eq!(without("num_key_value_heads").n_kv_heads, 4);
    assert_eq!(without("head_dim").head_dim, 4);
    assert_eq!(without("rope_theta").rope_theta, 10_000.0);
    assert_eq!(without("rms_norm_eps").rms_norm_eps, 1e-6);
    assert_eq!(without("sliding_window").sliding_window, Some(4096));
    assert!(!without("tie_word_embeddings").tie_word_embeddings);
    without("hidden_act");
}

#[test]
fn null_in_a_config_means_that_there_is_none() {
    let plain = config_with(|_| {}).unwrap();
    for key in ["head_dim", "sliding_window", "rope_scaling", "rope_parameters", "quantization_config", "attention_bias"] {
        assert_eq!(config_with(|config| _ = config.insert(key.into(), Value::Null)).unwrap(), plain, "{key}");
    }
    let scaling = serde_json::json!({"rope_type": "default"});
    assert_eq!(config_with(|config| _ = config.insert("rope_scaling".into(), scaling.clone())).unwrap(), plain);
    let kv_heads = config_with(|config| config["num_key_value_heads"] = Value::Null).unwrap();
    assert_eq!(kv_heads.n_kv_heads, 4);
}

#[test]
fn a_sliding_window_is_mistrals_alone() {
    let window = |model_type: &str| {
        let config = config_with(|config| {
            config["model_type"] = json!(model_type);
            config["sliding_window"] = json!(7);
        });
        config.unwrap().sliding_window
    };
    assert_eq!((window("mistral"), window("llama")), (Some(7), None));
}

#[test]
fn the_window_of_qwen_is_one_for_all_layers_or_none() {
    let window = |rows: Value| {
        let config = config_with(|config| {
            config["model_type"] = json!("qwen2");
            config["sliding_window"] = json!(7);
            config.extend(rows.as_object().unwrap().clone());
        });
        config.map(|config| config.sliding_window).map_err(|e| e.to_string())
    };
    let (full, sliding) = ("full_attention", "sliding_attention");
    assert_eq!(window(json!({})), Ok(None), "it is only used where the config says so");
    assert_eq!(window(json!({"use_sliding_window": false, "max_window_layers": 0})), Ok(None));
    assert_eq!(window(json!({"use_sliding_window": true})), Ok(None), "both layers are before the 28th");
    assert_eq!(window(json!({"use_sliding_window": true, "max_window_layers": 0})), Ok(Some(7)));
    assert_eq!(window(json!({"use_sliding_window": true, "max_window_layers": 0, "sliding_window": null})), Ok(Some(4096)));
    assert_eq!(window(json!({"layer_types": [full, full]})), Ok(None));
    assert_eq!(window(json!({"use_sliding_window": true, "layer_types": [sliding, sliding]})), Ok(Some(7)));
    for (rows, words) in [
        (json!({"use_sliding_window": true, "max_window_layers": 1}), "for 1 of 2 layers"),
        (json!({"use_sliding_window": true, "layer_types": [full, sliding]}), "for 1 of 2 layers"),
        (json!({"layer_types": [sliding, sliding]}), "use_sliding_window is absent; layer_types give a window to 2 of 2 layers"),
        (json!({"layer_types": [full]}), "a list of 2 strings is needed"),
        (json!({"layer_types": [full, "linear_attention"]}), "linear_attention"),
        (json!({"use_sliding_window": true, "max_window_layers": -1}), "max_window_layers is -1"),
    ] {
        let error = window(rows.clone()).unwrap_err();
        assert!(error.contains(words), "{rows}: {error}");
    }
}

#[test]
fn heads_of_qwen3_have_128_elements_unless_its_config_says_otherwise() {
    let config = config_with(|config| {
        config["model_type"] = json!("qwen3");
        config.remove("head_dim");
    });
    assert_eq!(config.unwrap().head_dim, 128);
}

#[test]
fn rope_parameters_go_before_the_older_key_and_may_leave_theta_to_it() {
    let theta = |rope: Value| {
        config_with(|config| {
            config["rope_theta"] = json!(500_000);
            config.insert("rope_parameters".into(), rope);
        })
    };
    assert_eq!(theta(json!({"rope_theta": 1e6, "rope_type": "default"})).unwrap().rope_theta, 1e6);
    assert_eq!(theta(json!({"rope_type": "default"})).unwrap().rope_theta, 5e5);
    // Nested by kind of layer, as other model types have it: no theta is guessed.
    let nested = config_with(|config| {
        config.remove("rope_theta");
        config.insert("rope_parameters".into(), json!({"full_attention": {"rope_theta": 1e6, "rope_type": "default"}}));
    });
    assert!(nested.unwrap_err().to_string().contains("rope_parameters.rope_theta is absent"));
}

#[test]
fn rope_scaling_has_one_meaning_under_its_older_and_its_newer_names() {
    let scaling = |rows: &[(&str, Value)]| {
        let config = config_with(|config| config.extend(rows.iter().map(|(key, value)| ((*key).to_owned(), value.clone()))));
        config.map(|config| config.rope_scaling)
    };
    let linear = Some(RopeScaling::Linear { factor: 2.5 });
    let (older, oldest) = (json!({"rope_type": "linear", "factor": 2.5}), json!({"type": "linear", "factor": 2.5}));
    let newer = json!({"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4});
    assert_eq!(scaling(&[("rope_scaling", older.clone())]).unwrap(), linear);
    assert_eq!(scaling(&[("rope_scaling", oldest.clone())]).unwrap(), linear);
    assert_eq!(scaling(&[("rope_parameters", newer.clone())]).unwrap(), linear);
    assert_eq!(scaling(&[("rope_parameters", newer), ("rope_scaling", oldest)]).unwrap(), linear);
    let default = json!({"rope_type": "default", "rope_theta": 1e4});
    assert_eq!(scaling(&[("rope_parameters", default.clone())]).unwrap(), None);
    let both = scaling(&[("rope_parameters", default), ("rope_scaling", older)]).unwrap_err().to_string();
    assert!(both.contains("rope_scaling") && both.contains("rope_parameters say something else"), "{both}");
}

#[test]
fn checkpoints_of_many_shapes_load() {
    let plain = Spec::default;
    let specs = [
        Spec { heads: 3, kv_heads: 3, hidden: 18, head_dim: 6, ..plain() },
        Spec { heads: 5, kv_heads: 1, head_dim: 4, ..plain() },
        Spec { heads: 2, kv_heads: 2, head_dim: 32, ..plain() },
        Spec { vocab: 37, hidden: 13, intermediate: 29, heads: 7, kv_heads: 7, head_dim: 2, ..plain() },
        Spec { vocab: 37, hidden: 13, intermediate: 29, dtype: Dtype::BF16, shards: 3, ..plain() },
        Spec { layers: 1, tied: true, dtype: Dtype::F16, transformers5: true, sliding_window: Some(3), ..plain() },
        Spec { model_type: "llama", shards: 5, ..plain() },
        Spec { model_type: "qwen2", shards: 2, ..plain() },
        Spec { model_type: "qwen3", dtype: Dtype::BF16, ..plain() },
    ];
    for spec in specs {
        let params = Parameters::load(write(&spec).path()).unwrap_or_else(|e| panic!("{spec:?}: {e}"));
        let config = params.config();
        let found = (config.vocab_size, config.hidden_size, config.intermediate_size, config.n_layers, config.n_heads, config.n_kv_heads);
        assert_eq!(found, (spec.vocab, spec.hidden, spec.intermediate, spec.layers, spec.heads, spec.kv_heads), "{spec:?}");
        assert_eq!((config.head_dim, config.sliding_window, config.tie_word_embeddings), (spec.head_dim, spec.sliding_window, spec.tied));
        assert_eq!(params.tensor("lm_head.weight").is_err(), spec.tied, "{spec:?}");
    }
}

#[test]
fn a_checkpoint_holds_the_same_values_sharded_or_not() {
    let (single, sharded) = (write(&Spec::default()), write(&Spec { shards: 3, ..Spec::default() }));
    assert!(!sharded.path().join("model.safetensors").exists());
    let (single, sharded) = (Parameters::load(single.path()).unwrap(), Parameters::load(sharded.path()).unwrap());
    for name in
        ["model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight"]
    {
        assert_eq!(values(&single.tensor(name).unwrap()), values(&sharded.tensor(name).unwrap()), "{name}");
    }
    assert_eq!(single.bytes(), sharded.bytes());
}

#[test]
fn a_single_file_goes_before_an_index() {
    let (dir, other) = (write(&Spec { shards: 2, ..Spec::default() }), write(&Spec { seed: 2, ..Spec::default() }));
    fs::copy(other.path().join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let head = |dir: &tempfile::TempDir| values(&Parameters::load(dir.path()).unwrap().tensor("lm_head.weight").unwrap());
    assert_eq!(head(&dir), head(&other));
}

#[test]
fn tensors_that_the_model_does_not_need_are_left_alone() {
    let dir = write(&Spec::default());
    let file = dir.path().join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let plain = Parameters::load(dir.path()).unwrap().bytes();

    let inv_freq = TensorView::new(Dtype::I64, vec![2], &[0; 16]).unwrap();
    let mut tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    tensors.push(("model.layers.0.self_attn.rotary_emb.inv_freq".into(), inv_freq));
    safetensors::serialize_to_file(tensors, None, &file).unwrap();
    let params = Parameters::load(dir.path()).unwrap();
    assert_eq!(params.bytes(), plain);
    assert!(matches!(params.tensor("model.layers.0.self_attn.rotary_emb.inv_freq"), Err(Error::Tensor { .. })));
}

#[test]
fn a_vector_is_a_matrix_of_one_row() {
    let params = Parameters::load(write(&Spec::default()).path()).unwrap();
    let norm = params.tensor("model.norm.weight").unwrap();
    assert_eq!((norm.rows(), norm.cols()), (1, 16));
}

#[test]
fn generation_takes_from_the_config_what_its_own_file_leaves_out() {
    let dir = write(&Spec::default());
    let file = dir.path().join("generation_config.json");
    let generation = || {
        let params = Parameters::load(dir.path()).unwrap();
        (params.generation().eos_token_id.clone(), params.generation().bos_token_id)
    };
    fs::write(&file, r#"{"eos_token_id": [5, 6], "bos_token_id": 3}"#).unwrap();
    assert_eq!(generation(), (vec![5, 6], Some(3)));
    fs::write(&file, r#"{"eos_token_id": 7, "bos_token_id": null}"#).unwrap();
    assert_eq!(generation(), (vec![7], Some(1)));
    fs::write(&file, "{}").unwrap();
    assert_eq!(generation(), (vec![2], Some(1)));
    fs::remove_file(&file).unwrap();
    assert_eq!(generation(), (vec![2], Some(1)));
}

#[test]
fn a_fingerprint_is_the_same_in_another_directory_and_differs_for_another_checkpoint() {
    let of = |dir: &tempfile::TempDir| Parameters::load(dir.path()).unwrap().fingerprint();
    let plain = of(&write(&Spec::default()));
    assert_eq!(plain, of(&write(&Spec::default())));

    let last_byte = write(&Spec::default());
    let file = last_byte.path().join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();

    let others = [last_byte, write(&Spec { seed: 2, ..Spec::default() }), write(&Spec { max_positions: 255, ..Spec::default() })];
    for (i, other) in others.iter().enumerate() {
        assert_ne!(plain, of(other), "checkpoint {i}");
    }
}

#[test]
fn parameters_can_be_shared_between_threads() {
    fn shared<T: Clone + Send + Sync + 'static>() {}
    shared::<Parameters>();
}
