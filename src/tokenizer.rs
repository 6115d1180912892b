//! [`Tokenizer`]: text to token ids and back, and [`Decoder`], the way back one token at a time.

mod byte_level;
mod model_file;
mod pieces;
#[cfg(test)]
mod tests;
mod vocabulary;

use std::fs::File;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use tokenizers::DecoderWrapper;

use crate::error::{Error, Result};
pub(crate) use vocabulary::Vocabulary;

/// The longest `tokenizer.json` that is read. The largest in use have about 35 MB.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// A checkpoint's tokenizer. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    /// The same, but special tokens in a text are plain text; made when it is first needed.
    plain: Arc<OnceLock<tokenizers::Tokenizer>>,
    streaming: Streaming,
}

/// How much of a sequence must be known before a piece of its text is certain.
#[derive(Debug, Clone, PartialEq)]
enum Streaming {
    /// Pieces spell bytes: all but an unfinished UTF-8 character is certain.
    Bytes,
    /// A piece's text depends only on whether text precedes it, and runs of pieces like `<0xE5>` are a unit.
    /// `before` is an ordinary token with the text `text`, to stand for whatever is in front.
    Pieces { before: u32, text: String },
}

impl Tokenizer {
    /// Reads the tokenizer of a Hugging Face directory: `tokenizer.json`, or `tokenizer.model` (SentencePiece's BPE) where only that
    /// is there.
    ///
    /// A tokenizer of `tokenizer.model` is what `transformers` makes of it, with the `tokenizer_config.json` and `added_tokens.json`
    /// beside it: bos goes in front of a text, and special tokens that are spelt out in a text are taken as such.
    ///
    /// # Errors
    /// Those of [`Self::from_file`]; [`Error::Tokenizer`] if `tokenizer.model` is damaged, contradicts itself or is larger than 16 MiB;
    /// [`Error::Unsupported`] if it is no BPE model, or normalizes texts.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let (json, model) = (dir.as_ref().join("tokenizer.json"), dir.as_ref().join("tokenizer.model"));
        if json.exists() || !model.exists() {
            return Self::from_file(json);
        }
        model_file::read(dir.as_ref()).and_then(Self::from_vocabulary).map_err(|error| error_of(&model, error))
    }

    /// The tokenizer that a vocabulary means.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if its parts contradict each other or are larger than any in use; [`Error::Unsupported`] if its kind or
    /// its pre-tokenizer is not known.
    pub(crate) fn from_vocabulary(vocabulary: Vocabulary) -> Result<Self> {
        Self::of(vocabulary.build()?)
    }

    /// Reads a Hugging Face `tokenizer.json`. Truncation and padding that it may ask for are left out.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the file can't be read, is larger than 64 MiB, or is no sound tokenizer; [`Error::Unsupported`] if its
    /// decoder is neither byte-level nor built of replace, byte fallback, fuse, metaspace and strip.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = read_bounded(path, MAX_FILE_BYTES)?;
        Self::from_bytes(&bytes).map_err(|error| error_of(path, error))
    }

    /// Like [`Self::from_file`], of the file's content.
    ///
    /// # Errors
    /// As [`Self::from_file`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(bytes))?;
        guarded(|| inner.with_truncation(None).map(|_| ()))?;
        inner.with_padding(None);
        Self::of(inner)
    }

    fn of(inner: tokenizers::Tokenizer) -> Result<Self> {
        let streaming = Streaming::of(&inner)?;
        Ok(Self { inner: Arc::new(inner), plain: Arc::default(), streaming })
    }

    /// The ids of `text`, with the model's own special tokens in front. Special tokens spelt out in the text are taken as such
    /// where the tokenizer says so.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the text has a part that the tokenizer cannot express.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        guarded(|| self.inner.encode_fast(text, true).map(|encoding| encoding.get_ids().to_vec()))
    }

    /// The ids of a text that goes on after others: [`Self::encode`] without the special tokens in front.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_continuation(&self, text: &str) -> Result<Vec<u32>> {
        guarded(|| self.inner.encode_fast(text, false).map(|encoding| encoding.get_ids().to_vec()))
    }

    /// [`Self::encode_continuation`] of a text that nobody vouches for: special tokens spelt out in it, such as `</s>`, are plain text.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        let plain = self.plain.get_or_init(|| {
            let mut plain = (*self.inner).clone();
            plain.set_encode_special_tokens(true);
            plain
        });
        guarded(|| plain.encode_fast(text, false).map(|encoding| encoding.get_ids().to_vec()))
    }

    /// The text of `ids`, without special tokens. Ids that the tokenizer doesn't have add nothing; bytes that aren't UTF-8 become
    /// U+FFFD.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        guarded(|| self.inner.decode(ids, true))
    }

    /// How the vocabulary spells `id`, such as `▁the` or `<0x0A>`; `None` if it has no such id.
    #[must_use]
    pub fn piece(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Decodes one token at a time.
    #[must_use]
    pub fn decoder(&self) -> Decoder {
        Decoder { tokenizer: self.clone(), pending: Vec::new(), bytes: Vec::new(), text_before: false }
    }

    /// The piece of `id` if it adds to the text: neither unknown nor special.
    fn text_piece(&self, id: u32) -> Option<String> {
        self.piece(id).filter(|piece| !self.inner.get_added_vocabulary().is_special_token(piece))
    }
}

/// [`Tokenizer::decode`] in steps: every [`push`](Self::push) gives the text that has become certain, and all of them and
/// [`flush`](Self::flush) together give exactly the text that `decode` gives for all ids.
///
/// A character is never cut: one that takes several tokens comes out whole, with its last. Where the vocabulary spells
/// bytes as `<0xE5>`, a run of those is held back until another piece follows, since one wrong byte makes all of them U+FFFD.
/// A push costs the same however long the text has grown.
#[derive(Debug, Clone)]
pub struct Decoder {
    tokenizer: Tokenizer,
    /// Ids whose text is not out yet.
    pending: Vec<u32>,
    /// An unfinished character, where pieces spell bytes.
    bytes: Vec<u8>,
    /// Some text is out: what follows is not at the start.
    text_before: bool,
}

impl Decoder {
    /// Takes the next token and gives the text that is now certain, often that of this token.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String> {
        let Some(piece) = self.tokenizer.text_piece(id) else { return Ok(String::new()) };
        match &self.tokenizer.streaming {
            Streaming::Bytes => {
                self.bytes.extend(piece_bytes(&piece));
                Ok(take_characters(&mut self.bytes))
            }
            Streaming::Pieces { .. } => {
                self.pending.push(id);
                if is_byte(&piece) { Ok(String::new()) } else { self.take_pending() }
            }
        }
    }

    /// Gives the text that was held back. Tokens pushed later go on behind it.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer's decoder fails.
    pub fn flush(&mut self) -> Result<String> {
        match &self.tokenizer.streaming {
            Streaming::Bytes => Ok(String::from_utf8_lossy(&std::mem::take(&mut self.bytes)).into_owned()),
            Streaming::Pieces { .. } => self.take_pending(),
        }
    }

    /// Takes tokens whose text is known already, such as a prompt's, so that what is pushed next goes on behind it.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer's decoder fails.
    pub fn skip(&mut self, ids: &[u32]) -> Result<()> {
        if let Streaming::Pieces { .. } = self.tokenizer.streaming {
            self.pending.extend(ids.iter().filter(|&&id| self.tokenizer.text_piece(id).is_some()));
            self.take_pending()?;
        }
        Ok(())
    }

    fn take_pending(&mut self) -> Result<String> {
        let text = match &self.tokenizer.streaming {
            Streaming::Pieces { before, text } if self.text_before => {
                let both = self.tokenizer.decode(&[&[*before], &self.pending[..]].concat())?;
                both.strip_prefix(text.as_str()).unwrap_or(&both).to_owned()
            }
            _ => self.tokenizer.decode(&self.pending)?,
        };
        // While nothing is out, all is still at the start, where a space may vanish: keep what there is.
        self.text_before |= !text.is_empty();
        if self.text_before {
            self.pending.clear();
        }
        Ok(text)
    }
}

impl Streaming {
    fn of(tokenizer: &tokenizers::Tokenizer) -> Result<Self> {
        use DecoderWrapper::{ByteFallback, ByteLevel, Fuse, Metaspace, Replace, Sequence, Strip};
        let decoders = match tokenizer.get_decoder() {
            None => &[],
            Some(Sequence(sequence)) => sequence.get_decoders(),
            Some(single) => std::slice::from_ref(single),
        };
        if matches!(decoders, [ByteLevel(_)]) {
            return Ok(Self::Bytes);
        }
        // Before the fuse each works on its piece alone; behind it, on the whole text, of which only the start may change.
        let fuse = decoders.iter().position(|d| matches!(d, Fuse(_))).unwrap_or(decoders.len());
        let (each, whole) = decoders.split_at(fuse);
        let known = each.iter().all(|d| matches!(d, ByteFallback(_) | Metaspace(_) | Replace(_) | Strip(_)))
            && whole.iter().all(|d| matches!(d, Fuse(_)) || matches!(d, Strip(strip) if strip.stop == 0));
        if !known {
            let found = decoders.iter().map(|d| format!("{d:?}")).collect::<Vec<_>>().join(", ");
            let supported = "a byte-level decoder, and those made of replace, byte fallback, fuse, metaspace and strip";
            return Err(Error::Unsupported { what: "the tokenizer's decoder", found, supported });
        }
        // A special token decodes to nothing, a byte to something else, and a word's first piece loses its space.
        let ordinary = |id| {
            let piece = tokenizer.id_to_token(id).filter(|piece| !piece.is_empty())?;
            let text = guarded(|| tokenizer.decode(&[id], true)).ok()?;
            (text == piece).then_some(Self::Pieces { before: id, text })
        };
        let ids = 0..u32::try_from(tokenizer.get_vocab_size(true)).unwrap_or(u32::MAX);
        ids.into_iter().find_map(ordinary).ok_or_else(|| Error::Tokenizer("the vocabulary has no ordinary token".into()))
    }
}

/// Whether byte fallback takes a piece for a byte, by the rule of the `tokenizers` crate.
fn is_byte(piece: &str) -> bool {
    piece.len() == 6
        && piece.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')).is_some_and(|hex| u8::from_str_radix(hex, 16).is_ok())
}

/// The bytes that a byte-level piece spells in GPT-2's alphabet: printable Latin-1 for itself, the other 68 bytes as U+0100 and on.
/// A piece with any other character, as added tokens may be, stands for itself.
fn piece_bytes(piece: &str) -> Vec<u8> {
    let byte = |c: char| match u32::from(c) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => u8::try_from(code).ok(),
        code @ 0x100..=0x143 => (0..=255).filter(|b| !matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF)).nth(code as usize - 0x100),
        _ => None,
    };
    piece.chars().map(byte).collect::<Option<_>>().unwrap_or_else(|| piece.as_bytes().to_vec())
}

/// Takes the text at the front of `bytes`, U+FFFD for what is invalid, and leaves an unfinished character.
fn take_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut taken = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        taken += chunk.valid().len();
        let invalid = chunk.invalid();
        let is_last = taken + invalid.len() == bytes.len();
        let unfinished = is_last && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
        if !invalid.is_empty() && !unfinished {
            text.push(char::REPLACEMENT_CHARACTER);
            taken += invalid.len();
        }
    }
    bytes.drain(..taken);
    text
}

/// Says which file an error is about, where it doesn't yet.
fn error_of(path: &Path, error: Error) -> Error {
    match error {
        Error::Tokenizer(problem) if !problem.contains(&*path.to_string_lossy()) => {
            Error::Tokenizer(format!("{}: {problem}", path.display()))
        }
        other => other,
    }
}

fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let read = || {
        // Opening a pipe would wait for its writer.
        if !std::fs::metadata(path).map_err(|e| e.to_string())?.is_file() {
            return Err("it is not a file".into());
        }
        let file = File::open(path).map_err(|e| e.to_string())?;
        let mut bytes = Vec::new();
        file.take(limit + 1).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
        if bytes.len() as u64 > limit {
            return Err(format!("it is larger than {limit} bytes"));
        }
        Ok(bytes)
    };
    read().map_err(|problem: String| Error::Tokenizer(format!("cannot read {}: {problem}", path.display())))
}

/// Runs a call into the `tokenizers` crate, which panics on some contradictory files, and gives its error our type.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| Error::Tokenizer(error.to_string())),
        Err(_) => Err(Error::Tokenizer("its parts contradict each other".into())),
    }
}
