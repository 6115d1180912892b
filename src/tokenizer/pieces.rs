//! SentencePiece's BPE, `llama` in GGUF: of all neighbours in a text, those are merged first whose merged piece has the highest score.

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::replace::{Replace, ReplacePattern};
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Sequence as Normalizers};
use tokenizers::{DecoderWrapper, Tokenizer};

use super::guarded;
use super::vocabulary::{Checked, MAX_MERGES, Type, refuse};
use crate::error::Result;

/// Bounds the sum of the squares of all pieces' lengths, and so the time and memory that taking them apart costs. Gemma's
/// 256,000 pieces take a tenth.
const MAX_WORK: usize = 1 << 28;
const SPACE: &str = "▁";

/// The tokenizer without its special tokens.
pub(super) fn assemble(checked: &Checked) -> Result<Tokenizer> {
    let vocabulary = &checked.vocabulary;
    if vocabulary.scores.len() != vocabulary.tokens.len() {
        return refuse(format!("it has {} scores for {} tokens", vocabulary.scores.len(), vocabulary.tokens.len()));
    }
    let unknown = vocabulary.unk.or_else(|| checked.of_type(|kind| kind == Type::Unknown).next().map(|(id, _)| id));
    let has_bytes = checked.of_type(|kind| kind == Type::Byte).count() == 256;
    let mut model = BPE::builder().vocab_and_merges(checked.vocab(), merges(checked)?).byte_fallback(has_bytes).fuse_unk(true);
    match unknown {
        Some(id) => model = model.unk_token(vocabulary.tokens[id as usize].clone()),
        None if has_bytes => {}
        None => return refuse("it has neither a token for what is unknown nor one for every byte".into()),
    }
    let mut tokenizer = Tokenizer::new(guarded(|| model.build())?);

    let prefix = vocabulary.add_space_prefix.unwrap_or(true);
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    let mut replace = |pattern: ReplacePattern, by: &str| {
        let step = guarded(|| Replace::new(pattern, by))?;
        normalizers.push(step.into());
        Ok(())
    };
    if vocabulary.remove_extra_whitespaces == Some(true) {
        replace(ReplacePattern::Regex("^ +| +$".into()), "")?;
        replace(ReplacePattern::Regex(" {2,}".into()), " ")?;
    }
    replace(ReplacePattern::String(" ".into()), SPACE)?;
    if prefix {
        normalizers.push(Prepend::new(SPACE.into()).into());
    }
    guarded(|| tokenizer.with_normalizer(Some(Normalizers::new(normalizers))).map(|_| ()))?;

    let back = guarded(|| Replace::new(SPACE, " "))?;
    let mut decoders: Vec<DecoderWrapper> = vec![back.into(), ByteFallback::new().into(), Fuse::new().into()];
    if prefix {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(Decoders::new(decoders)));
    Ok(tokenizer)
}

/// All ways in which two pieces make a third, in the order in which SentencePiece would take them: by the third's score, and where
/// that is the same, the longer left part first, which is the one further left in a text.
///
/// Pieces that are not text, such as `</s>` and bytes, neither merge nor come of merges.
fn merges(checked: &Checked) -> Result<Vec<(String, String)>> {
    let is_text = |id: u32| matches!(checked.types[id as usize], Type::Normal | Type::UserDefined);
    let text = |piece: &str| checked.ids.get(piece).copied().filter(|&id| is_text(id));
    let texts = || checked.of_type(|kind| matches!(kind, Type::Normal | Type::UserDefined));
    let work: usize = texts().map(|(_, piece)| piece.len() * piece.len()).sum();
    if work > MAX_WORK {
        return refuse(format!("its pieces are too long: the squares of their lengths add up to {work}, and {MAX_WORK} is the most"));
    }
    // Strings only once they are in order.
    let mut cuts: Vec<Cut> = Vec::new();
    for (id, piece) in texts() {
        let (score, chars) = (checked.vocabulary.scores[id as usize], piece.chars().count());
        let inner = piece.char_indices().enumerate().skip(1);
        let possible = inner.filter(|&(_, (at, _))| text(&piece[..at]).is_some() && text(&piece[at..]).is_some());
        cuts.extend(possible.map(|(left, (at, _))| Cut { score, lengths: (left, chars - left), id, at }));
        if cuts.len() > MAX_MERGES {
            return refuse(format!("its pieces make each other in more than {MAX_MERGES} ways"));
        }
    }
    cuts.sort_by(|a, b| b.score.total_cmp(&a.score).then_with(|| b.lengths.cmp(&a.lengths)).then_with(|| a.id.cmp(&b.id)));
    let parts = |cut: &Cut| checked.vocabulary.tokens[cut.id as usize].split_at(cut.at);
    Ok(cuts.iter().map(parts).map(|(left, right)| (left.to_owned(), right.to_owned())).collect())
}

/// A piece, and the byte before which it is cut in two.
struct Cut {
    score: f32,
    /// Characters of either part.
    lengths: (usize, usize),
    id: u32,
    at: usize,
}
