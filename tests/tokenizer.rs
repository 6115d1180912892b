//! The tokenizer against Hugging Face's own answers, and the streaming decoder against the whole one.

use std::path::{Path, PathBuf};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::{Value, json};
use torchless::{Error, Tokenizer};

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn tiny_stories() -> Tokenizer {
    Tokenizer::from_file(repository("examples/models/tiny-stories/tokenizer.json")).unwrap()
}

/// The same vocabulary with another decoder.
fn tiny_stories_with(decoder: Value) -> Result<Tokenizer, Error> {
    let mut json: Value =
        serde_json::from_slice(&std::fs::read(repository("examples/models/tiny-stories/tokenizer.json")).unwrap()).unwrap();
    json["decoder"] = decoder;
    Tokenizer::from_bytes(json.to_string().as_bytes())
}

/// A byte-level tokenizer: the 256 letters of GPT-2's alphabet, then pieces of several bytes that cut characters anywhere.
fn byte_level() -> Tokenizer {
    let plain = |b: &u32| matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut others = 0x100..;
    let letters: Vec<char> = (0..=255).map(|b| char::from_u32(if plain(&b) { b } else { others.next().unwrap() }).unwrap()).collect();
    let mut vocab = serde_json::Map::new();
    for letter in &letters {
        vocab.insert(letter.to_string(), json!(vocab.len()));
    }
    for piece in ["né".as_bytes(), &"é".as_bytes()[1..], &"漢字".as_bytes()[..4], &"字".as_bytes()[1..], b"\xF0\x9F", b" \xFF"] {
        vocab.insert(piece.iter().map(|&b| letters[b as usize]).collect(), json!(vocab.len()));
    }
    let added = json!([{"id": vocab.len(), "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
        {"id": vocab.len() + 1, "content": "日本", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": false}]);
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let json = json!({"version": "1.0", "added_tokens": added, "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []}});
    Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap()
}

fn stream(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let mut decoder = tokenizer.decoder();
    let mut texts: Vec<String> = ids.iter().map(|&id| decoder.push(id).unwrap()).collect();
    texts.push(decoder.flush().unwrap());
    texts
}

#[test]
fn ids_and_texts_are_those_of_hugging_face() {
    let fixture: Value =
        serde_json::from_slice(&std::fs::read(repository("tests/fixtures/tokenizers/tiny-stories.json")).unwrap()).unwrap();
    let tokenizer = tiny_stories();
    let cases = fixture["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 19);
    let mut failures = Vec::new();
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        let found = (tokenizer.encode(text).unwrap(), tokenizer.decode(&ids).unwrap(), stream(&tokenizer, &ids).concat());
        let decoded = case["decoded"].as_str().unwrap().to_owned();
        if found != (ids, decoded.clone(), decoded) {
            failures.push(format!("{text:?}: {found:?}"));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn streaming_gives_what_decoding_gives_for_any_ids() {
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let decoders = [
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": false}),
        json!({"type": "Sequence", "decoders": [replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 3, "stop": 0}]}),
        Value::Null,
    ];
    let others = decoders.map(|decoder| tiny_stories_with(decoder).unwrap());
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for (tokenizer, vocabulary) in
        std::iter::once((&tiny_stories(), 1030)).chain([(&byte_level(), 266)]).chain(others.iter().map(|t| (t, 1030)))
    {
        for _ in 0..400 {
            // From the whole vocabulary and beyond, from the bytes alone, and from spaces, special tokens and a few bytes.
            let ranges: [&[u32]; 3] = [&[0, vocabulary], &[3, 259], &[0, 6]];
            let range = ranges[rng.next_u32() as usize % 3];
            let length = rng.next_u32() % 24;
            let mut ids: Vec<u32> = (0..length).map(|_| range[0] + rng.next_u32() % (range[1] - range[0])).collect();
            if rng.next_u32().is_multiple_of(4) {
                let space = tokenizer.encode("  ").unwrap();
                ids.splice(0..0, space);
            }
            assert_eq!(stream(tokenizer, &ids).concat(), tokenizer.decode(&ids).unwrap(), "{ids:?}");
        }
    }
}

#[test]
fn a_character_of_several_tokens_comes_out_whole() {
    for tokenizer in [tiny_stories(), byte_level()] {
        let ids = tokenizer.encode("a 漢字🐉b").unwrap();
        let texts = stream(&tokenizer, &ids);
        assert!(ids.len() > 10 && !texts.concat().contains('\u{FFFD}'), "{texts:?}");
        assert_eq!(texts.concat(), "a 漢字🐉b");
    }
}

#[test]
fn text_comes_out_with_its_token_unless_a_later_one_could_change_it() {
    let tokenizer = tiny_stories();
    let ids = tokenizer.encode("the cat 漢 sat").unwrap();
    let mut decoder = tokenizer.decoder();
    for (i, &id) in ids.iter().enumerate() {
        let text = decoder.push(id).unwrap();
        let is_byte = |id: u32| (3..259).contains(&id);
        assert_eq!(text.is_empty(), id == 1 || is_byte(id), "token {i}: {text:?}");
    }
    assert_eq!(decoder.flush().unwrap(), "");
}

#[test]
fn text_goes_on_behind_skipped_tokens() {
    for tokenizer in [tiny_stories(), byte_level()] {
        for (prompt, next) in [("Once", " upon"), ("", "Once"), ("漢", " ok"), (" ", " x")] {
            let first = tokenizer.encode(prompt).unwrap();
            let all = [&first[..], &tokenizer.encode_continuation(next.trim_start()).unwrap()].concat();
            let mut decoder = tokenizer.decoder();
            decoder.skip(&first).unwrap();
            let mut text: String = all[first.len()..].iter().map(|&id| decoder.push(id).unwrap()).collect();
            text.push_str(&decoder.flush().unwrap());
            assert_eq!(tokenizer.decode(&first).unwrap() + &text, tokenizer.decode(&all).unwrap(), "{prompt:?} then {next:?}");
        }
    }
}

#[test]
fn pieces_are_spelt_as_in_the_vocabulary() {
    let tokenizer = tiny_stories();
    let piece = |id| tokenizer.piece(id);
    assert_eq!((piece(1).as_deref(), piece(13).as_deref(), piece(1024)), (Some("<s>"), Some("<0x0A>"), None));
}

#[test]
fn truncation_and_padding_in_the_file_are_left_out() {
    let mut json: Value =
        serde_json::from_slice(&std::fs::read(repository("examples/models/tiny-stories/tokenizer.json")).unwrap()).unwrap();
    json["truncation"] = json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"});
    let tokenizer = Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap();
    let text = "Once upon a time, there was a little fox.";
    assert_eq!(tokenizer.encode(text).unwrap(), tiny_stories().encode(text).unwrap());
}

#[test]
fn damaged_files_are_typed_errors() {
    let sound = std::fs::read(repository("examples/models/tiny-stories/tokenizer.json")).unwrap();
    let mut broken: Vec<Vec<u8>> = (0..sound.len()).step_by(4099).map(|end| sound[..end].to_vec()).collect();
    broken.extend([b"{}".to_vec(), b"[[[[".repeat(100_000), vec![0xFF; 100], b"null".to_vec()]);
    let edit = |from: &str, to: &str| String::from_utf8(sound.clone()).unwrap().replacen(from, to, 1).into_bytes();
    broken.push(edit("\"merges\"", "\"seams\""));
    broken.push(edit("\"vocab\"", "\"words\""));
    for bytes in &broken {
        let error = Tokenizer::from_bytes(bytes).expect_err("a damaged file was taken");
        assert!(matches!(error, Error::Tokenizer(_)), "{error:?}");
    }
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for _ in 0..100 {
        let mut bytes = sound.clone();
        let at = rng.next_u32() as usize % bytes.len();
        bytes[at] = rng.next_u32() as u8;
        // Some changes are harmless; none may panic, here or in use.
        if let Ok(tokenizer) = Tokenizer::from_bytes(&bytes) {
            let _ = tokenizer.encode("<s>Once upon 漢 a time").map(|ids| tokenizer.decode(&ids));
        }
    }
}

#[test]
fn a_decoder_that_may_change_any_text_is_refused_by_name() {
    for decoder in [
        json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
        json!({"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 0, "stop": 1}]}),
    ] {
        let error = tiny_stories_with(decoder).expect_err("refused");
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    }
}

#[test]
fn what_is_no_file_is_refused() {
    for path in [repository("tests"), repository("nowhere.json"), PathBuf::from("/dev/zero")] {
        let error = Tokenizer::from_file(&path).expect_err("refused").to_string();
        assert!(error.contains(&*path.to_string_lossy()), "{error}");
    }
}
