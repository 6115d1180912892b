//! Tokenizers that are no `tokenizer.json` against what Hugging Face's `tokenizers`, `sentencepiece` and `tiktoken` make of the same
//! vocabularies. `tests/fixtures/tokenizers/make_vocabularies.py` wrote what they say.

use std::path::Path;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::Value;

use super::{Tokenizer, Vocabulary, model_file};
use crate::error::Error;

fn read(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers").join(name)).unwrap()
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&read(name)).unwrap()
}

fn lines(value: &Value, separator: &str) -> Vec<String> {
    value.as_str().unwrap().split(separator).map(str::to_owned).collect()
}

fn control(vocabulary: &Value) -> Vec<String> {
    serde_json::from_value(vocabulary["control"].clone()).unwrap()
}

/// As the metadata of SmolLM2's GGUF has it.
fn smollm2() -> Vocabulary {
    let file = json("smollm2.vocab.json");
    let (control, merges) = (control(&file), lines(&file["merges"], "\n"));
    let mut types = vec![3; control.len()];
    let mut tokens = control;
    tokens.extend(file["letters"].as_str().unwrap().chars().map(String::from));
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    types.resize(tokens.len(), 1);
    let (kind, pre) = ("gpt2".into(), Some("smollm".into()));
    Vocabulary { kind, pre, tokens, types, merges, bos: Some(1), eos: Some(2), unk: Some(0), add_bos: Some(false), ..Vocabulary::default() }
}

/// The beginning of tekken, with any pre-tokenizer.
fn small(pre: Option<&str>) -> Vocabulary {
    let file = json("small.vocab.json");
    let mut tokens = control(&file);
    let mut types = vec![3; tokens.len()];
    tokens.extend(lines(&file["tokens"], " "));
    types.resize(tokens.len(), 1);
    let merges = lines(&file["merges"], "\n");
    Vocabulary { kind: "gpt2".into(), pre: pre.map(Into::into), tokens, types, merges, bos: Some(1), eos: Some(2), ..Vocabulary::default() }
}

fn mistral_v1() -> Vocabulary {
    model_file::of_bytes(&read("mistral-v1.model")).unwrap()
}

/// Version 3 has the pieces of version 1 behind 768 more tokens, whose names don't matter here.
fn mistral_v3() -> Vocabulary {
    let mut vocabulary = mistral_v1();
    vocabulary.tokens.splice(3..3, (0..768).map(|i| format!("[control {i}]")));
    vocabulary.scores.splice(3..3, [0.0; 768]);
    vocabulary.types.splice(3..3, [3; 768]);
    vocabulary
}

fn build(vocabulary: Vocabulary) -> Tokenizer {
    Tokenizer::from_vocabulary(vocabulary).unwrap()
}

fn problem(vocabulary: Vocabulary) -> String {
    let error = Tokenizer::from_vocabulary(vocabulary).expect_err("it was taken");
    assert!(matches!(error, Error::Tokenizer(_) | Error::Unsupported { .. }), "{error:?}");
    let problem = error.to_string();
    assert!(problem.len() < 500, "{} bytes of message", problem.len());
    problem
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn stream(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut decoder = tokenizer.decoder();
    let text: String = ids.iter().map(|&id| decoder.push(id).unwrap()).collect();
    text + &decoder.flush().unwrap()
}

/// Strings, the ids that a reference gives them, and the text it makes of those ids where that is known.
fn cases(name: &str) -> Vec<(String, Vec<u32>, Option<String>)> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let file = json(&format!("{name}.json"));
    let first = file["cases"].as_array().unwrap().iter().map(|c| (text(&c["text"]).unwrap(), ids(&c["ids"]), text(&c["decoded"])));
    let more = json("more.json");
    let second = more[name].as_array().into_iter().flatten().zip(more["strings"].as_array().unwrap());
    first.chain(second.map(|(found, string)| (text(string).unwrap(), ids(found), None))).collect()
}

/// Every case must give the reference's ids, and these the reference's text, at once and token by token.
fn compare(name: &str, tokenizer: &Tokenizer, encode: impl Fn(&str) -> Vec<u32>) {
    let cases = cases(name);
    assert!(cases.len() >= 19, "{} cases", cases.len());
    let mut failures = Vec::new();
    for (text, expected, decoded) in cases {
        let (found, back) = (encode(&text), tokenizer.decode(&expected).unwrap());
        if found != expected || decoded.is_some_and(|decoded| decoded != back) || stream(tokenizer, &expected) != back {
            failures.push(format!("{text:?}: {found:?}, not {expected:?}; {back:?}"));
        }
    }
    assert!(failures.is_empty(), "{name}: {failures:#?}");
}

#[test]
fn smollm2_gives_the_ids_of_hugging_face() {
    let tokenizer = build(smollm2());
    compare("smollm2", &tokenizer, |text| tokenizer.encode(text).unwrap());
}

#[test]
fn mistral_gives_the_ids_of_sentencepiece() {
    for (name, vocabulary) in [("mistral-v1", mistral_v1()), ("mistral-v3", mistral_v3())] {
        let tokenizer = build(vocabulary);
        compare(name, &tokenizer, |text| tokenizer.encode_plain(text).unwrap());
    }
}

#[test]
fn special_tokens_in_a_text_are_taken_as_such_unless_it_is_plain() {
    let tokenizer = build(mistral_v1());
    // SentencePiece takes them for text, as `encode_plain` does; this is the only case in which `encode` differs, but for bos.
    let differ = cases("mistral-v1").into_iter().filter(|(text, ids, _)| tokenizer.encode(text).unwrap() != [&[1], &ids[..]].concat());
    let mut texts: Vec<String> = differ.map(|(text, ..)| text).collect();
    texts.dedup();
    texts.sort();
    texts.dedup();
    assert_eq!(texts, ["<s>special or not?</s>"]);
    let found = tokenizer.encode("<s>special or not?</s>").unwrap();
    assert_eq!(
        (&found[..2], found.last(), found.len()),
        (&[1, 1][..], Some(&2), 3 + tokenizer.encode_plain("special or not?").unwrap().len())
    );
}

#[test]
fn every_pre_tokenizer_cuts_words_as_its_models_do() {
    let more = json("more.json");
    let strings: Vec<String> = serde_json::from_value(more["strings"].clone()).unwrap();
    let expected = |pre: &str| more[pre].as_array().unwrap().iter().map(ids).collect::<Vec<_>>();
    let names = ["tekken", "llama-bpe", "qwen2", "gpt-2", "smollm", "default"];
    for (pre, name) in names.iter().map(|&name| (Some(name), name)).chain([
        (Some("llama3"), "llama-bpe"),
        (Some("llama-v3"), "llama-bpe"),
        (None, "default"),
    ]) {
        let tokenizer = build(small(pre));
        for (text, expected) in strings.iter().zip(expected(name)) {
            assert_eq!(tokenizer.encode_plain(text).unwrap(), expected, "{pre:?}: {text:?}");
            if name != "qwen2" {
                assert_eq!(tokenizer.decode(&expected).unwrap(), *text, "{pre:?}");
            }
        }
    }
    // They are told apart: no two agree on all strings.
    for (i, name) in names.iter().enumerate() {
        assert!(names[..i].iter().all(|other| expected(other) != expected(name)), "{name}");
    }
}

#[test]
fn texts_come_back_from_their_tokens_whole_and_in_pieces() {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    for tokenizer in [build(mistral_v1()), build(small(Some("tekken"))), build(small(Some("llama-bpe"))), build(small(None))] {
        for _ in 0..300 {
            let text: String = (0..rng.next_u32() % 30)
                .map(|_| match rng.next_u32() % 4 {
                    0 => ' ',
                    1 => char::from(rng.next_u32() as u8 % 128),
                    2 => char::from_u32(rng.next_u32() % 0xD800).unwrap(),
                    _ => char::from_u32(0x1F300 + rng.next_u32() % 0x400).unwrap(),
                })
                .filter(|&c| c != '▁')
                .collect();
            let ids = tokenizer.encode(&text).unwrap();
            assert_eq!((tokenizer.decode(&ids).unwrap(), stream(&tokenizer, &ids)), (text.clone(), text));
        }
    }
}

#[test]
fn streaming_gives_what_decoding_gives_for_any_ids_of_these_vocabularies() {
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let no_prefix = Vocabulary { add_space_prefix: Some(false), ..mistral_v1() };
    for (tokenizer, n) in
        [(build(mistral_v1()), 32_000), (build(no_prefix), 32_000), (build(smollm2()), 49_152), (build(small(None)), 3020)]
    {
        for _ in 0..300 {
            // From the whole vocabulary and a little beyond, or from the special tokens and bytes.
            let range = [n + 4, 270][rng.next_u32() as usize % 2];
            let ids: Vec<u32> = (0..rng.next_u32() % 24).map(|_| rng.next_u32() % range).collect();
            assert_eq!(stream(&tokenizer, &ids), tokenizer.decode(&ids).unwrap(), "{ids:?}");
        }
    }
}

#[test]
fn what_is_put_in_front_of_a_text_is_what_the_file_says_or_the_kind_means() {
    let front = |vocabulary: Vocabulary| {
        let tokenizer = build(vocabulary);
        let (all, text) = (tokenizer.encode("a b").unwrap(), tokenizer.encode_continuation("a b").unwrap());
        all.strip_suffix(text.as_slice()).expect("nothing goes behind a text").to_vec()
    };
    let with = |vocabulary: Vocabulary, add_bos| Vocabulary { add_bos, ..vocabulary };
    for (pre, expected) in
        [("llama-bpe", vec![1]), ("tekken", vec![1]), ("qwen2", vec![]), ("gpt-2", vec![]), ("smollm", vec![]), ("default", vec![])]
    {
        assert_eq!(front(small(Some(pre))), expected, "{pre}");
        assert_eq!(front(with(small(Some(pre)), Some(true))), [1], "{pre}");
        assert_eq!(front(with(small(Some(pre)), Some(false))), [0; 0], "{pre}");
    }
    assert_eq!(front(mistral_v1()), [1]);
    assert_eq!(front(with(mistral_v1(), Some(false))), [0; 0]);
    // Its name may mean something to a template.
    let mut odd = with(small(None), Some(true));
    odd.tokens[1] = "$A:1 b".into();
    assert_eq!(front(odd), [1]);
    assert_eq!(front(Vocabulary { bos: None, ..mistral_v1() }), [0; 0]);
    assert!(problem(Vocabulary { bos: None, ..with(mistral_v1(), Some(true)) }).contains("bos"));
}

#[test]
fn spaces_are_added_and_dropped_as_the_file_says() {
    let plain = |tokenizer: &Tokenizer, text: &str| tokenizer.encode_plain(text).unwrap();
    let usual = build(mistral_v1());
    let as_it_is = build(Vocabulary { add_space_prefix: Some(false), ..mistral_v1() });
    assert_eq!(plain(&as_it_is, " x  y "), plain(&usual, "x  y "));
    assert_ne!(plain(&as_it_is, "x  y "), plain(&usual, "x  y "));
    assert_eq!(as_it_is.decode(&plain(&as_it_is, " x")).unwrap(), " x");
    let tidy = build(Vocabulary { remove_extra_whitespaces: Some(true), ..mistral_v1() });
    assert_eq!(plain(&tidy, "  one   two\t three "), plain(&usual, "one two\t three"));
    assert_eq!(plain(&tidy, "   "), [0; 0]);
}

#[test]
fn user_defined_tokens_are_one_token_and_have_a_text() {
    for mut vocabulary in [small(Some("tekken")), mistral_v1()] {
        vocabulary.tokens.push("<odd one>".into());
        vocabulary.types.push(4);
        if vocabulary.kind == "llama" {
            vocabulary.scores.push(0.0);
        }
        let id = vocabulary.tokens.len() as u32 - 1;
        let tokenizer = build(vocabulary);
        for ids in [tokenizer.encode("a<odd one>b").unwrap(), tokenizer.encode_plain("a<odd one>b").unwrap()] {
            assert_eq!(ids.iter().filter(|&&found| found == id).count(), 1, "{ids:?}");
            assert!(tokenizer.decode(&ids).unwrap().starts_with("a<odd one>"), "{ids:?}");
        }
    }
}

#[test]
fn what_cannot_be_spelt_is_the_unknown_token_where_there_are_no_bytes() {
    let spelt = ["<unk>", "▁", "a", "b", "▁a", "▁ab"].map(String::from).to_vec();
    let vocabulary = Vocabulary {
        kind: "llama".into(),
        scores: vec![0.0, -3.0, -4.0, -5.0, -1.0, -2.0],
        types: vec![2, 1, 1, 1, 1, 1],
        tokens: spelt,
        ..Vocabulary::default()
    };
    let tokenizer = build(vocabulary.clone());
    assert_eq!(tokenizer.encode("ab漢字a").unwrap(), [5, 0, 2]);
    assert!(problem(Vocabulary { types: vec![1; 6], ..vocabulary }).contains("unknown"));
}

#[test]
fn contradictions_are_refused_by_name() {
    let refused = |vocabulary: Vocabulary, part: &str| {
        let problem = problem(vocabulary);
        assert!(problem.contains(part), "{problem}");
    };
    type Change = fn(&mut Vocabulary);
    let changes: [(Change, &str); 18] = [
        (|v| v.kind = "bert".into(), "\"bert\""),
        (|v| v.kind = String::new(), "\"\""),
        (|v| v.tokens.clear(), "0 tokens"),
        (|v| v.tokens = vec![String::new(); (1 << 20) + 1], "1048577 tokens"),
        (|v| v.tokens[7] = v.tokens[9].clone(), "tokens 7 and 9"),
        (|v| v.tokens[7] = "x".repeat(5000), "5000 bytes"),
        (|v| v.scores = vec![0.0; 5], "5 scores"),
        (|v| v.types = vec![1; 5], "5 token types"),
        (|v| v.types[300] = 7, "type 7"),
        (|v| v.types[300] = 0, "type 0"),
        (|v| v.types[300] = 6, "type 6"),
        (|v| v.bos = Some(u32::MAX), "token 4294967295"),
        (|v| v.eos = Some(v.tokens.len() as u32), "ends a text"),
        (|v| v.unk = Some(1 << 30), "unknown"),
        (|v| v.scores = vec![f32::NAN; v.tokens.len()], "not a number"),
        (|v| v.merges = vec!["a b".into(); (1 << 21) + 1], "2097153 merges"),
        (|v| v.tokens.truncate(0), "0 tokens"),
        (|v| v.types.truncate(3), "3 token types"),
    ];
    for (change, part) in changes {
        for mut vocabulary in [small(Some("tekken")), mistral_v1()] {
            change(&mut vocabulary);
            refused(vocabulary, part);
        }
    }
    refused(small(Some("dbrx")), "\"dbrx\"");
    refused(small(Some("")), "llama-bpe");
    refused(small(Some(&"x".repeat(1000))), "llama-bpe");
    refused(Vocabulary { merges: vec!["x".repeat(1000)], ..small(None) }, "merge 0 ");
    for merge in ["", " ", "a", "a ", " a", "a  b", "a b c", "\u{120} nowhere", "1 1"] {
        let mut vocabulary = small(Some("tekken"));
        vocabulary.merges.insert(2, merge.into());
        refused(vocabulary, "merge 2 ");
    }
    refused(Vocabulary { scores: Vec::new(), ..mistral_v1() }, "0 scores");
}

#[test]
fn pieces_that_would_take_forever_to_take_apart_are_refused() {
    let of = |tokens: Vec<String>| {
        let (scores, mut types) = (vec![0.0; tokens.len()], vec![1; tokens.len()]);
        types[0] = 2;
        problem(Vocabulary { kind: "llama".into(), tokens, scores, types, ..Vocabulary::default() })
    };
    // Every part of every token is a token.
    let runs = (0..8_u8).flat_map(|c| (1..=300).map(move |n| char::from(b'a' + c).to_string().repeat(n)));
    let many = std::iter::once("<unk>".to_owned()).chain(runs).collect::<Vec<_>>();
    assert!(
        Tokenizer::from_vocabulary(Vocabulary {
            kind: "llama".into(),
            scores: vec![0.0; many.len()],
            tokens: many,
            unk: Some(0),
            ..Vocabulary::default()
        })
        .is_ok()
    );
    let longer = (0..8).flat_map(|c| (1..=520).map(move |n| char::from_u32(0x4E00 + c).unwrap().to_string().repeat(n)));
    assert!(of(std::iter::once("<unk>".to_owned()).chain(longer).collect()).contains("too long"));
    // All words of two letters.
    let words =
        (1..=17).flat_map(|n| (0..1_u32 << n).map(move |bits| (0..n).map(|i| if bits >> i & 1 == 0 { 'a' } else { 'b' }).collect()));
    assert!(of(std::iter::once("<unk>".to_owned()).chain(words).collect()).contains("2097152 ways"));
}
