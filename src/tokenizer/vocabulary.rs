//! [`Vocabulary`]: what GGUF metadata or a SentencePiece file says of a tokenizer, and the tokenizer that it means.

use std::collections::HashMap;

use tokenizers::processors::template::{SpecialToken, Template, TemplateProcessing};
use tokenizers::{AddedToken, Tokenizer};

use super::{byte_level, guarded, is_byte, pieces};
use crate::error::{Error, Result};

/// Four times the largest vocabulary in use.
const MAX_TOKENS: usize = 1 << 20;
/// Runs of spaces take a few hundred bytes; nothing known takes more.
const MAX_TOKEN_BYTES: usize = 4096;
/// The largest in use have about 600,000.
pub(super) const MAX_MERGES: usize = 1 << 21;

/// A tokenizer as GGUF metadata (`tokenizer.ggml.*`) or a SentencePiece file has it. Nothing in it need be true:
/// [`crate::Tokenizer::from_vocabulary`] checks it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Vocabulary {
    /// `model`: `llama` for SentencePiece's BPE with scores, `gpt2` for byte-level BPE.
    pub kind: String,
    /// `pre`: by which rule byte-level BPE cuts a text into words.
    pub pre: Option<String>,
    /// Every token's spelling, in the order of ids.
    pub tokens: Vec<String>,
    /// One a token: the higher, the earlier it is merged. Byte-level BPE has none.
    pub scores: Vec<f32>,
    /// `token_type`, one a token or none at all; see [`Type`].
    pub types: Vec<i32>,
    /// Byte-level BPE's merges, `left right`, the earliest first.
    pub merges: Vec<String>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub unk: Option<u32>,
    /// Whether `bos` goes in front of a text. What is absent, here and below, is as llama.cpp has it.
    pub add_bos: Option<bool>,
    /// Whether a text begins with a space that it doesn't have. SentencePiece only.
    pub add_space_prefix: Option<bool>,
    /// Whether spaces at the ends, and all but one in the middle, are dropped. SentencePiece only.
    pub remove_extra_whitespaces: Option<bool>,
}

/// What a token is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Type {
    Normal,
    /// Stands for what the vocabulary cannot spell.
    Unknown,
    /// Has a meaning and no text.
    Control,
    /// Ordinary text that is always one token.
    UserDefined,
    Unused,
    /// One byte, spelt `<0x0A>`.
    Byte,
}

/// A vocabulary whose parts agree.
pub(super) struct Checked {
    pub vocabulary: Vocabulary,
    pub types: Vec<Type>,
    pub ids: HashMap<String, u32>,
}

impl Vocabulary {
    pub(super) fn build(self) -> Result<Tokenizer> {
        let kind = self.kind.clone();
        let checked = self.check()?;
        let (mut tokenizer, adds_bos) = match kind.as_str() {
            "llama" => (pieces::assemble(&checked)?, true),
            "gpt2" => byte_level::assemble(&checked)?,
            other => {
                let found = shown(other);
                let supported = "\"llama\" (SentencePiece's BPE) and \"gpt2\" (byte-level BPE)";
                return Err(Error::Unsupported { what: "tokenizer model", found, supported });
            }
        };
        let Checked { vocabulary, types, .. } = checked;
        if let Some(bos) = vocabulary.front(adds_bos)? {
            tokenizer.with_post_processor(Some(template(bos, &vocabulary.tokens[bos as usize])?));
        }
        let added: Vec<AddedToken> = vocabulary.tokens.into_iter().zip(&types).filter_map(|(token, &kind)| added(token, kind)).collect();
        guarded(|| tokenizer.add_tokens(added))?;
        Ok(tokenizer)
    }

    /// Everything that can be checked without knowing the kind.
    fn check(self) -> Result<Checked> {
        let n = self.tokens.len();
        if n == 0 || n > MAX_TOKENS {
            return refuse(format!("it has {n} tokens; 1 to {MAX_TOKENS} are possible"));
        }
        for (what, found) in [("scores", self.scores.len()), ("token types", self.types.len())] {
            if found != 0 && found != n {
                return refuse(format!("it has {found} {what} for {n} tokens"));
            }
        }
        if self.merges.len() > MAX_MERGES {
            return refuse(format!("it has {} merges; at most {MAX_MERGES} are possible", self.merges.len()));
        }
        for (what, id) in [("begins a text", self.bos), ("ends a text", self.eos), ("stands for the unknown", self.unk)] {
            if let Some(id) = id.filter(|&id| id as usize >= n) {
                return refuse(format!("token {id}, which {what}, does not exist: the vocabulary has {n} tokens"));
            }
        }
        if let Some(id) = self.scores.iter().position(|score| score.is_nan()) {
            return refuse(format!("the score of token {id} ({:?}) is not a number", shown(&self.tokens[id])));
        }
        let mut ids = HashMap::with_capacity(n);
        for (id, token) in (0..).zip(&self.tokens) {
            if token.len() > MAX_TOKEN_BYTES {
                return refuse(format!("token {id} has {} bytes; at most {MAX_TOKEN_BYTES} are possible", token.len()));
            }
            if let Some(first) = ids.insert(token.clone(), id) {
                return refuse(format!("tokens {first} and {id} are both {:?}", shown(token)));
            }
        }
        let types = (0..).zip(&self.tokens).map(|(id, token)| self.type_of(id, token)).collect::<Result<_>>()?;
        Ok(Checked { vocabulary: self, types, ids })
    }

    fn type_of(&self, id: u32, token: &str) -> Result<Type> {
        Ok(match self.types.get(id as usize) {
            Some(1) => Type::Normal,
            Some(2) => Type::Unknown,
            Some(3) => Type::Control,
            Some(4) => Type::UserDefined,
            Some(5) => Type::Unused,
            Some(6) if is_byte(token) => Type::Byte,
            Some(6) => {
                return refuse(format!("token {id} ({:?}) is of type 6, a byte, and such are spelt like <0x0A>", shown(token)));
            }
            Some(other) => return refuse(format!("token {id} ({:?}) is of type {other}; the types are 1 to 6", shown(token))),
            // A file without types: what it calls by name has one nonetheless.
            None if [self.bos, self.eos].contains(&Some(id)) => Type::Control,
            None if self.unk == Some(id) => Type::Unknown,
            None if self.kind == "llama" && is_byte(token) => Type::Byte,
            None => Type::Normal,
        })
    }

    /// What goes in front of a text. What would go behind it (`add_eos_token`) ends it, and ours go on.
    fn front(&self, adds_bos: bool) -> Result<Option<u32>> {
        match self.bos {
            Some(id) => Ok(self.add_bos.unwrap_or(adds_bos).then_some(id)),
            None if self.add_bos == Some(true) => refuse("a bos token is to be added to every text, and the vocabulary names none".into()),
            None => Ok(None),
        }
    }
}

impl Checked {
    /// The tokens of some types.
    pub fn of_type(&self, wanted: impl Fn(Type) -> bool) -> impl Iterator<Item = (u32, &str)> {
        let tokens = (0..).zip(&self.vocabulary.tokens).zip(&self.types);
        tokens.filter(move |&(_, &kind)| wanted(kind)).map(|((id, token), _)| (id, token.as_str()))
    }

    /// In the form that the model takes.
    pub fn vocab(&self) -> tokenizers::models::bpe::Vocab {
        self.ids.iter().map(|(token, &id)| (token.clone(), id)).collect()
    }
}

/// The entry of a token that is looked for before a text is cut up, if it is one.
fn added(token: String, kind: Type) -> Option<AddedToken> {
    let special = match kind {
        Type::Control | Type::Unknown => true,
        Type::UserDefined => false,
        Type::Normal | Type::Unused | Type::Byte => return None,
    };
    Some(AddedToken::from(token, special).normalized(false))
}

fn template(bos: u32, spelling: &str) -> Result<TemplateProcessing> {
    let problem = |what: String| Error::Tokenizer(format!("nothing can be put in front of a text: {what}"));
    // The template's own name: the token's spelling may mean something else there.
    let special = SpecialToken::new("bos".into(), vec![bos], vec![spelling.to_owned()]).map_err(|e| problem(e.to_string()))?;
    let single = Template::try_from(vec!["bos", "$A"]).map_err(problem)?;
    TemplateProcessing::builder().single(single).special_tokens(vec![special]).build().map_err(|e| problem(e.to_string()))
}

/// As much of a token as fits a message.
pub(super) fn shown(token: &str) -> String {
    const MOST: usize = 60;
    if token.chars().nth(MOST).is_none() { token.to_owned() } else { token.chars().take(MOST).chain(['…']).collect() }
}

/// A refusal of the vocabulary as it is.
pub(super) fn refuse<T>(problem: String) -> Result<T> {
    Err(Error::Tokenizer(problem))
}
