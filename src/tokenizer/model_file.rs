//! `tokenizer.model`: a SentencePiece model, which is a protobuf message, and what lies beside it in a Hugging Face directory.

use std::collections::BTreeMap;
use std::path::Path;

use prost::Message;
use serde::Deserialize;

use super::read_bounded;
use super::vocabulary::{Vocabulary, refuse, shown};
use crate::error::{Error, Result};

/// The largest in use have about 5 MB; every two bytes of a hostile one may become a piece of 40.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// The parts of SentencePiece's `ModelProto` that matter here; what else there is gets skipped.
#[derive(Message)]
struct Model {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<Trainer>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<Normalizer>,
    #[prost(message, optional, tag = "5")]
    denormalizer: Option<Normalizer>,
}

#[derive(Message)]
struct Piece {
    #[prost(string, tag = "1")]
    piece: String,
    #[prost(float, tag = "2")]
    score: f32,
    /// As in [`Vocabulary::types`].
    #[prost(int32, optional, tag = "3")]
    kind: Option<i32>,
}

#[derive(Message)]
struct Trainer {
    /// 1 unigram, 2 BPE, 3 word, 4 char.
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
    #[prost(bool, optional, tag = "24")]
    whitespace_as_suffix: Option<bool>,
    /// -1 for none, as the two below.
    #[prost(int32, optional, tag = "40")]
    unk: Option<i32>,
    #[prost(int32, optional, tag = "41")]
    bos: Option<i32>,
    #[prost(int32, optional, tag = "42")]
    eos: Option<i32>,
}

#[derive(Message)]
struct Normalizer {
    #[prost(bytes = "vec", tag = "2")]
    charsmap: Vec<u8>,
    #[prost(bool, optional, tag = "3")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5")]
    escape_whitespaces: Option<bool>,
}

/// Reads `dir/tokenizer.model`, and what `tokenizer_config.json` and `added_tokens.json` say beyond it.
pub(super) fn read(dir: &Path) -> Result<Vocabulary> {
    let mut vocabulary = of_bytes(&read_bounded(&dir.join("tokenizer.model"), MAX_FILE_BYTES)?)?;
    let config: Config = beside(dir, "tokenizer_config.json")?.unwrap_or_default();
    let older: BTreeMap<String, u32> = beside(dir, "added_tokens.json")?.unwrap_or_default();
    vocabulary.add_bos = config.add_bos_token.or(vocabulary.add_bos);
    let mut added = config.added_tokens_decoder;
    for (content, id) in older {
        added.entry(id).or_insert(Added { content, special: true });
    }
    // Those that the model has too are known; the rest goes on behind it.
    let n = vocabulary.tokens.len();
    for (id, Added { content, special }) in added.into_iter().filter(|&(id, _)| id as usize >= n) {
        if id as usize != vocabulary.tokens.len() {
            let (content, n) = (shown(&content), vocabulary.tokens.len());
            return refuse(format!("the added token {id} ({content:?}) is not the next one: the vocabulary has {n} tokens"));
        }
        vocabulary.tokens.push(content);
        vocabulary.scores.push(0.0);
        vocabulary.types.push(if special { 3 } else { 4 });
    }
    Ok(vocabulary)
}

/// What a SentencePiece model says.
pub(super) fn of_bytes(bytes: &[u8]) -> Result<Vocabulary> {
    let model = Model::decode(bytes).map_err(|e| Error::Tokenizer(format!("it is not a sound SentencePiece model: {e}")))?;
    let unsupported = |what, found: &str, supported| Err(Error::Unsupported { what, found: found.into(), supported });
    let trainer = model.trainer.unwrap_or_default();
    match trainer.model_type.unwrap_or(1) {
        2 => {}
        1 => return unsupported("SentencePiece model type", "unigram", "BPE"),
        3 => return unsupported("SentencePiece model type", "word", "BPE"),
        4 => return unsupported("SentencePiece model type", "char", "BPE"),
        other => return unsupported("SentencePiece model type", &other.to_string(), "BPE"),
    }
    if trainer.whitespace_as_suffix == Some(true) {
        return unsupported("SentencePiece option", "treat_whitespace_as_suffix", "spaces in front of words");
    }
    let normalizer = model.normalizer.unwrap_or_default();
    if normalizer.escape_whitespaces == Some(false) {
        return unsupported("SentencePiece option", "escape_whitespaces = false", "spaces that are spelt \u{2581}");
    }
    if !normalizer.charsmap.is_empty() || model.denormalizer.is_some_and(|spec| !spec.charsmap.is_empty()) {
        return unsupported("SentencePiece option", "precompiled_charsmap", "texts taken as they are (normalization \"identity\")");
    }
    let id = |id: Option<i32>, default: u32| id.map_or(Some(default), |id| u32::try_from(id).ok());
    let mut vocabulary = Vocabulary {
        kind: "llama".into(),
        unk: id(trainer.unk, 0),
        bos: id(trainer.bos, 1),
        eos: id(trainer.eos, 2),
        add_space_prefix: Some(normalizer.add_dummy_prefix.unwrap_or(true)),
        remove_extra_whitespaces: Some(normalizer.remove_extra_whitespaces.unwrap_or(true)),
        ..Vocabulary::default()
    };
    for Piece { piece, score, kind } in model.pieces {
        vocabulary.tokens.push(piece);
        vocabulary.scores.push(score);
        vocabulary.types.push(kind.unwrap_or(1));
    }
    Ok(vocabulary)
}

/// The parts of `tokenizer_config.json` that a SentencePiece model doesn't have.
#[derive(Default, Deserialize)]
struct Config {
    add_bos_token: Option<bool>,
    #[serde(default)]
    added_tokens_decoder: BTreeMap<u32, Added>,
}

#[derive(Deserialize)]
struct Added {
    content: String,
    #[serde(default)]
    special: bool,
}

/// A JSON file of the directory, if it is there.
fn beside<T: for<'a> Deserialize<'a>>(dir: &Path, name: &str) -> Result<Option<T>> {
    let path = dir.join(name);
    if !path.exists() {
        return Ok(None);
    }
    let json = read_bounded(&path, MAX_FILE_BYTES)?;
    serde_json::from_slice(&json).map(Some).map_err(|e| Error::Tokenizer(format!("{}: {e}", path.display())))
}
