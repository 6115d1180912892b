//! Tokenizers of directories without a `tokenizer.json`: `tokenizer.model`, a SentencePiece file, and what may lie beside it.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::{Value, json};
use torchless::{Error, Parameters, Tokenizer};

use common::{Spec, say_skipped, write_checkpoint};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers").join(name)
}

/// Mistral's `tokenizer.model.v1`.
fn mistral_v1() -> Vec<u8> {
    fs::read(fixture("mistral-v1.model")).unwrap()
}

fn directory(model: &[u8], beside: &[(&str, Value)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.model"), model).unwrap();
    for (name, value) in beside {
        fs::write(dir.path().join(name), value.to_string()).unwrap();
    }
    dir
}

fn tokenizer(model: &[u8], beside: &[(&str, Value)]) -> Result<Tokenizer, Error> {
    Tokenizer::from_dir(directory(model, beside).path())
}

/// The cases of a fixture as `sentencepiece` has them: no bos, and special tokens are plain text.
fn cases(name: &str) -> Vec<(String, Vec<u32>)> {
    let fixture: Value = serde_json::from_slice(&fs::read(fixture(name)).unwrap()).unwrap();
    let cases = fixture["cases"].as_array().unwrap();
    cases.iter().map(|case| serde_json::from_value(json!([case["text"], case["ids"]])).unwrap()).collect()
}

fn compare(tokenizer: &Tokenizer, name: &str) {
    let cases = cases(name);
    assert_eq!(cases.len(), 19);
    for (text, ids) in cases {
        assert_eq!(tokenizer.encode_plain(&text).unwrap(), ids, "{name}: {text:?}");
        if !text.contains("<s>") {
            assert_eq!(tokenizer.encode(&text).unwrap(), [&[1], &ids[..]].concat(), "{name}: {text:?}");
        }
    }
}

#[test]
fn a_sentencepiece_file_gives_the_ids_of_sentencepiece() {
    compare(&tokenizer(&mistral_v1(), &[]).unwrap(), "mistral-v1.json");
}

#[test]
fn mistrals_own_files_give_the_ids_of_sentencepiece() {
    let Some(dir) = std::env::var_os("TORCHLESS_TOKENIZERS").map(PathBuf::from) else {
        say_skipped("TORCHLESS_TOKENIZERS names no directory with the data files of the package mistral-common");
        return;
    };
    for (file, name) in [("tokenizer.model.v1", "mistral-v1.json"), ("mistral_instruct_tokenizer_240323.model.v3", "mistral-v3.json")] {
        compare(&tokenizer(&fs::read(dir.join(file)).unwrap(), &[]).unwrap(), name);
    }
}

#[test]
fn tokenizer_json_goes_first_and_is_what_is_missed() {
    let dir = directory(&mistral_v1(), &[]);
    let stories = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/tiny-stories/tokenizer.json");
    let encode = |dir: &Path| Tokenizer::from_dir(dir).unwrap().encode("Once upon a time").unwrap();
    let of_model = encode(dir.path());
    fs::copy(&stories, dir.path().join("tokenizer.json")).unwrap();
    assert_ne!(encode(dir.path()), of_model);
    let empty = tempfile::tempdir().unwrap();
    let error = Tokenizer::from_dir(empty.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json"), "{error}");
}

#[test]
fn a_checkpoint_finds_its_sentencepiece_file() {
    let dir = directory(&mistral_v1(), &[]);
    write_checkpoint(dir.path(), &Spec::default());
    let parameters = Parameters::load(dir.path()).unwrap();
    assert_eq!(parameters.tokenizer().unwrap().encode("Hello, world!").unwrap(), [1, 22557, 28725, 1526, 28808]);
}

#[test]
fn the_tool_tokenizes_with_a_sentencepiece_file() {
    let dir = directory(&mistral_v1(), &[]);
    let run = |args: &[&str]| {
        let tool =
            Command::new(env!("CARGO_BIN_EXE_torchless")).arg("tokenize").arg("--model").arg(dir.path()).args(args).output().unwrap();
        assert!(tool.status.success(), "{}", String::from_utf8_lossy(&tool.stderr));
        serde_json::from_slice::<Value>(&tool.stdout).unwrap()
    };
    let found = run(&["--json", "--text", "Hello, world!"]);
    assert_eq!(found, json!({"ids": [1, 22557, 28725, 1526, 28808], "pieces": ["<s>", "▁Hello", ",", "▁world", "!"]}));
    let ids = dir.path().join("ids.json");
    fs::write(&ids, "[1, 22557, 28725, 1526, 28808]").unwrap();
    assert_eq!(run(&["--json", "--decode", ids.to_str().unwrap()]), json!({"text": "Hello, world!"}));
}

#[test]
fn the_config_beside_it_says_what_goes_in_front_of_a_text_and_which_tokens_there_are_more() {
    let config = json!({"add_bos_token": false, "add_eos_token": true, "legacy": true, "added_tokens_decoder": {
        "1": {"content": "<s>", "special": true, "lstrip": false},
        "32000": {"content": "<|im_start|>", "special": true}, "32001": {"content": "<think>", "special": false}}});
    let older = json!({"<|im_end|>": 32002, "<s>": 1});
    let tokenizer = tokenizer(&mistral_v1(), &[("tokenizer_config.json", config), ("added_tokens.json", older)]).unwrap();
    // What would end it is not put behind a text that is to go on.
    assert_eq!(tokenizer.encode("a").unwrap(), [264]);
    let ids = tokenizer.encode_continuation("<|im_start|>a<think>b<|im_end|>").unwrap();
    assert_eq!((ids[0], ids[1], ids[2], ids.last()), (32_000, 264, 32_001, Some(&32_002)));
    assert_eq!(tokenizer.decode(&ids).unwrap(), "a<think> b");
}

#[test]
fn files_beside_it_that_are_damaged_are_refused_by_name() {
    for (name, value, part) in [
        ("tokenizer_config.json", json!([]), "tokenizer_config.json"),
        ("tokenizer_config.json", json!({"add_bos_token": "yes"}), "tokenizer_config.json"),
        ("tokenizer_config.json", json!({"added_tokens_decoder": {"x": {"content": "a"}}}), "tokenizer_config.json"),
        ("tokenizer_config.json", json!({"added_tokens_decoder": {"32001": {"content": "<late>"}}}), "32001"),
        ("tokenizer_config.json", json!({"added_tokens_decoder": {"4294967295": {"content": "<late>"}}}), "4294967295"),
        ("added_tokens.json", json!({"<s>": 32000}), "\"<s>\""),
        ("added_tokens.json", json!({"a": -1}), "added_tokens.json"),
    ] {
        let error = tokenizer(&mistral_v1(), &[(name, value)]).expect_err("refused");
        assert!(matches!(error, Error::Tokenizer(_)) && error.to_string().contains(part), "{error}");
    }
}

#[test]
fn models_that_are_no_bpe_or_change_texts_are_refused_by_name() {
    // A message is a sequence of fields, of which a later one goes before: key, length and value of an inner one.
    for (change, part) in [
        (&[0x12, 2, 0x18, 1][..], "unigram"),
        (&[0x12, 2, 0x18, 3], "word"),
        (&[0x12, 2, 0x18, 4], "char"),
        (&[0x12, 2, 0x18, 9], "9"),
        (&[0x12, 3, 0xC0, 1, 1], "treat_whitespace_as_suffix"),
        (&[0x1A, 3, 0x12, 1, 0x41], "precompiled_charsmap"),
        (&[0x2A, 3, 0x12, 1, 0x41], "precompiled_charsmap"),
        (&[0x1A, 2, 0x28, 0], "escape_whitespaces"),
    ] {
        let error = tokenizer(&[&mistral_v1(), change].concat(), &[]).expect_err("refused");
        assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains(part), "{error}");
    }
    // No trainer's specification: then it is unigram.
    let error = tokenizer(&[0x0A, 3, 0x0A, 1, 0x61], &[]).expect_err("refused");
    assert!(error.to_string().contains("unigram"), "{error}");
    // A field that nobody knows changes nothing.
    compare(&tokenizer(&[&mistral_v1(), &[0xFA, 0x7F, 1, 0x41][..]].concat(), &[]).unwrap(), "mistral-v1.json");
}

#[test]
fn damaged_sentencepiece_files_are_typed_errors() {
    let sound = mistral_v1();
    let bpe = [0x12, 2, 0x18, 2];
    let mut broken: Vec<Vec<u8>> = [101, 10_007, 400_001].map(|end| sound[..end].to_vec()).to_vec();
    broken.extend([Vec::new(), b"{}".to_vec(), vec![0xFF; 100], vec![0x0A; 100_000], [&bpe[..], &[0x0A, 0].repeat(1000)].concat()]);
    // A piece that claims more bytes than there are, one that is not UTF-8, a score that is no number.
    broken.push([&bpe[..], &[0x0A, 0xFF, 0xFF, 0xFF, 0xFF, 0x07]].concat());
    broken.push([&bpe[..], &[0x0A, 3, 0x0A, 1, 0xFF]].concat());
    broken.push([&sound[..], &[0x0A, 11, 0x0A, 4, 0xF0, 0x9F, 0x90, 0x89, 0x15, 0, 0, 0xC0, 0x7F]].concat());
    for bytes in &broken {
        let error = tokenizer(bytes, &[]).expect_err("a damaged file was taken");
        let named = matches!(&error, Error::Tokenizer(problem) if problem.contains("tokenizer.model"));
        assert!(named || matches!(error, Error::Unsupported { .. }), "{error:?}");
    }
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    // The first pieces are enough to be damaged, and are read sooner.
    let mut first = 0;
    while first < 20_000 {
        assert!(sound[first] == 0x0A && sound[first + 1] < 0x80, "a piece begins at {first}");
        first += 2 + usize::from(sound[first + 1]);
    }
    let mut taken = 0;
    for _ in 0..200 {
        let mut bytes = [&sound[..first], &bpe].concat();
        for _ in 0..=rng.next_u32() % 3 {
            let at = rng.next_u32() as usize % bytes.len();
            bytes[at] = rng.next_u32() as u8;
        }
        // Some changes are harmless; none may panic, here or in use.
        if let Ok(tokenizer) = tokenizer(&bytes, &[]) {
            let _ = tokenizer.encode("<s>Once upon 漢 a time").map(|ids| tokenizer.decode(&ids));
            taken += 1;
        }
    }
    assert!((10..190).contains(&taken), "{taken} of 200 were taken");
}

#[test]
fn what_is_no_file_or_too_large_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("tokenizer.model")).unwrap();
    let error = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.model: it is not a file"), "{error}");
    let dir = directory(&vec![0; (16 << 20) + 1], &[]);
    let error = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
    assert!(error.contains("larger than 16777216 bytes"), "{error}");
}
