//! Byte-level BPE, `gpt2` in GGUF: a text is cut into words by a pattern, and every word's bytes are merged in the order of a list.

use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

use super::guarded;
use super::vocabulary::{Checked, refuse, shown};
use crate::error::{Error, Result};

/// The patterns of the models' own `tokenizer.json`.
const LLAMA_3: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// What llama.cpp takes where a file names no pattern: each is tried on what those before it left, matches and rests alike.
const DEFAULT: [&str; 4] =
    [r"[\p{P}\$\+<=>\^~\|]+", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)", r"\p{N}+", r"[0-9][0-9][0-9]"];

/// How a text becomes words.
struct Words {
    /// The patterns, each of which cuts what those before it left.
    patterns: &'static [&'static str],
    digits_stand_alone: bool,
    /// GPT-2's own pattern comes last.
    gpt2: bool,
    /// Characters are composed first.
    nfc: bool,
    /// A word that is a token needs no merges.
    whole: bool,
    adds_bos: bool,
}

impl Words {
    fn of(pre: Option<&str>) -> Result<Self> {
        let plain = Self { patterns: &[], digits_stand_alone: false, gpt2: false, nfc: false, whole: false, adds_bos: false };
        Ok(match pre.unwrap_or("default") {
            "default" => Self { patterns: &DEFAULT, ..plain },
            "gpt-2" => Self { gpt2: true, ..plain },
            "smollm" => Self { gpt2: true, digits_stand_alone: true, ..plain },
            "llama-bpe" | "llama3" | "llama-v3" => Self { patterns: &[LLAMA_3], whole: true, adds_bos: true, ..plain },
            "tekken" => Self { patterns: &[TEKKEN], whole: true, adds_bos: true, ..plain },
            "qwen2" => Self { patterns: &[QWEN_2], nfc: true, ..plain },
            other => {
                let supported = "\"default\", \"gpt-2\", \"smollm\", \"llama-bpe\" (\"llama3\", \"llama-v3\"), \"tekken\" and \"qwen2\"";
                return Err(Error::Unsupported { what: "pre-tokenizer", found: shown(other), supported });
            }
        })
    }

    fn pre_tokenizer(&self) -> Result<Sequence> {
        let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
        if self.digits_stand_alone {
            steps.push(Digits::new(true).into());
        }
        for &pattern in self.patterns {
            let pattern = SplitPattern::Regex(pattern.into());
            steps.push(guarded(|| Split::new(pattern, SplitDelimiterBehavior::Isolated, false))?.into());
        }
        steps.push(ByteLevel::new(false, true, self.gpt2).into());
        Ok(Sequence::new(steps))
    }
}

/// The tokenizer without its special tokens, and whether it puts bos in front unless told otherwise.
///
/// A byte that the vocabulary has no token for is left out of a text, as Hugging Face and llama.cpp leave it out: published
/// vocabularies lack control characters, and bytes that their training text didn't have.
pub(super) fn assemble(checked: &Checked) -> Result<(Tokenizer, bool)> {
    let words = Words::of(checked.vocabulary.pre.as_deref())?;
    let model = BPE::builder().vocab_and_merges(checked.vocab(), merges(checked)?).ignore_merges(words.whole);
    let mut tokenizer = Tokenizer::new(guarded(|| model.build())?);
    if words.nfc {
        guarded(|| tokenizer.with_normalizer(Some(NFC)).map(|_| ()))?;
    }
    tokenizer.with_pre_tokenizer(Some(words.pre_tokenizer()?));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    Ok((tokenizer, words.adds_bos))
}

fn merges(checked: &Checked) -> Result<Vec<(String, String)>> {
    let known = |token: &str| checked.ids.contains_key(token);
    let merge = |(i, merge): (usize, &String)| match merge.split_once(' ') {
        Some((left, right)) if [left, right, &[left, right].concat()].into_iter().all(known) => Ok((left.to_owned(), right.to_owned())),
        _ => refuse(format!(
            "merge {i} is {:?}; a merge is two tokens with a space between, and both together must be a token",
            shown(merge)
        )),
    };
    checked.vocabulary.merges.iter().enumerate().map(merge).collect()
}
