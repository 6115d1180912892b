//! What a GGUF file's metadata says of text: its vocabulary, and the tokens that begin and end one.

use super::config::TOKENS;
use super::metadata::Metadata;
use crate::error::Result;
use crate::params::GenerationConfig;
use crate::tokenizer::Vocabulary;

const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";
const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: &str = "tokenizer.ggml.eos_token_id";

/// In `token_type`, a token that has a meaning and no text.
const CONTROL: i64 = 3;

/// Control tokens that end what a model says, whatever `eos_token_id` is: as llama.cpp has it, of vocabularies that Llama's and Mistral's
/// architecture occurs with. Few files name them in any other way.
const ENDS: [&str; 11] = [
    "</s>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
];

impl Metadata {
    /// The vocabulary, whose texts are copied out of the file.
    ///
    /// # Errors
    /// [`crate::Error::Config`] if the model or the tokens are missing, or a value has another type.
    pub(crate) fn vocabulary(&self) -> Result<Vocabulary> {
        let flag = |name: &str| self.flag(&format!("tokenizer.ggml.{name}"));
        let types = self.integers(TOKEN_TYPE)?.unwrap_or_default();
        let as_i32 = |n: i64| i32::try_from(n).map_err(|_| self.wrong(TOKEN_TYPE, "integers of 32 bits are needed"));
        Ok(Vocabulary {
            kind: self.required_text("tokenizer.ggml.model")?.into(),
            pre: self.text("tokenizer.ggml.pre")?.map(Into::into),
            tokens: self.texts(TOKENS)?.ok_or_else(|| self.wrong(TOKENS, "it has no default"))?,
            scores: self.floats("tokenizer.ggml.scores")?.unwrap_or_default(),
            types: types.into_iter().map(as_i32).collect::<Result<_>>()?,
            merges: self.texts("tokenizer.ggml.merges")?.unwrap_or_default(),
            bos: token(self, BOS)?,
            eos: token(self, EOS)?,
            unk: token(self, "tokenizer.ggml.unknown_token_id")?,
            add_bos: flag("add_bos_token")?,
            add_space_prefix: flag("add_space_prefix")?,
            remove_extra_whitespaces: flag("remove_extra_whitespaces")?,
        })
    }

    /// The spelling of the token in front of a text; empty if there is none.
    pub(crate) fn bos(&self) -> Result<String> {
        self.spelling(BOS)
    }

    /// The spelling of the token that ends a text; empty if there is none.
    pub(crate) fn eos(&self) -> Result<String> {
        self.spelling(EOS)
    }

    fn spelling(&self, key: &str) -> Result<String> {
        let (Some(id), Some(mut tokens)) = (token(self, key)?, self.raw_texts(TOKENS)?) else { return Ok(String::new()) };
        let spelt = tokens.nth(id as usize).unwrap_or_default();
        Ok(String::from_utf8_lossy(spelt).into_owned())
    }

    /// The Jinja template that a chat is written by.
    ///
    /// # Errors
    /// [`crate::Error::Config`] if it is no text.
    pub(crate) fn chat_template(&self) -> Result<Option<&str>> {
        self.text("tokenizer.chat_template")
    }
}

/// The tokens that begin and end a text of a model with this many tokens.
pub(super) fn generation(metadata: &Metadata, vocab_size: usize) -> Result<GenerationConfig> {
    let known = |key: &str| match token(metadata, key)? {
        Some(id) if id as usize >= vocab_size => Err(metadata.wrong(key, &format!("the vocabulary has {vocab_size} tokens"))),
        id => Ok(id),
    };
    let mut ends = Vec::new();
    for key in [EOS, "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        ends.extend(known(key)?);
    }
    let types = metadata.integers(TOKEN_TYPE)?.unwrap_or_default();
    if let Some(tokens) = metadata.raw_texts(TOKENS)? {
        let control = tokens.zip(types).enumerate().filter(|(_, (_, kind))| *kind == CONTROL);
        let spelt = control.filter(|(_, (token, _))| ENDS.iter().any(|end| end.as_bytes() == *token));
        ends.extend(spelt.map(|(id, _)| id as u32));
    }
    let mut eos_token_id = Vec::new();
    for id in ends {
        if !eos_token_id.contains(&id) {
            eos_token_id.push(id);
        }
    }
    Ok(GenerationConfig { eos_token_id, bos_token_id: known(BOS)? })
}

fn token(metadata: &Metadata, key: &str) -> Result<Option<u32>> {
    let Some(id) = metadata.integer(key)? else { return Ok(None) };
    u32::try_from(id).map(Some).map_err(|_| metadata.wrong(key, "a token is needed"))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::params::gguf::GgufModel;

    #[test]
    fn a_vocabulary_is_what_another_writer_wrote() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gguf/q4_k_m.gguf");
        let model = GgufModel::open(&path).unwrap();
        let vocabulary = model.metadata().vocabulary().unwrap();
        assert_eq!((vocabulary.kind.as_str(), vocabulary.pre.as_deref()), ("llama", Some("default")));
        assert_eq!(vocabulary.tokens.len(), 32);
        assert_eq!((vocabulary.tokens[3].as_str(), vocabulary.tokens[31].as_str()), ("<|im_end|>", "\u{2581}w31\u{e9}"));
        assert_eq!((vocabulary.scores.len(), vocabulary.scores[31]), (32, -31.0));
        assert_eq!(vocabulary.types[..6], [2, 3, 3, 3, 1, 1]);
        assert_eq!((vocabulary.bos, vocabulary.eos, vocabulary.unk), (Some(1), Some(2), Some(0)));
        assert_eq!((vocabulary.add_bos, vocabulary.add_space_prefix), (Some(true), Some(false)));
        assert!(vocabulary.merges.is_empty());
        assert_eq!(model.metadata().chat_template().unwrap(), Some("{{ messages[0]['content'] }}"));
        // "<|end|>" is no control token there.
        assert_eq!(model.generation.eos_token_id, [2, 3]);
    }
}
