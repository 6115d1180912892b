//! What the fuzzers call, a function a reader; `fuzz/README.md` tells how. Each says whether the reader took the bytes.
//!
//! They are part of the library so that they reach its readers, and of its tests, which give them every input kept in `fuzz/corpus`.

use crate::backend;
use crate::chat::{ChatMessage, ChatTemplate};
use crate::error::Result;
use crate::params::fuzzed;

/// A target's name, which is also that of its file in `fuzz/fuzz_targets` and of its directory in `fuzz/corpus`; and what it gives bytes to.
pub type Target = (&'static str, fn(&[u8]) -> bool);

/// All of them.
pub const TARGETS: &[Target] =
    &[("chat_template", chat_template), ("config", config), ("gguf", gguf), ("kept_weights", kept_weights), ("safetensors", safetensors)];

/// Most bytes of a conversation's text.
const MAX_TEXT: usize = 16 << 20;

/// A chat template; behind a zero byte what a user says. Where nothing is said, there is no system message either, which some templates refuse.
#[must_use]
pub fn chat_template(input: &[u8]) -> bool {
    leave_to_who_catches("/minijinja");
    let (source, said) = at_zero(input);
    let Ok(source) = std::str::from_utf8(source) else { return false };
    let Some(template) = took(ChatTemplate::new(source, "<s>", "</s>"), source.len()) else { return false };
    let history = [
        ChatMessage::system("Answer in one word."),
        ChatMessage::user(String::from_utf8_lossy(said)),
        ChatMessage::assistant("Yes."),
        ChatMessage::user("And then?"),
    ];
    let first = usize::from(said.is_empty());
    let Some(text) = took(template.render(&history[first..], true), input.len()) else { return false };
    assert!(text.len() <= MAX_TEXT, "a text of {} bytes", text.len());
    true
}

/// A GGUF file.
#[must_use]
pub fn gguf(input: &[u8]) -> bool {
    leave_to_who_catches("/tokenizers-");
    fuzzed::gguf(input)
}

/// A `config.json`; behind a zero byte a `generation_config.json`, behind another an index of shards.
#[must_use]
pub fn config(input: &[u8]) -> bool {
    let mut parts = input.split(|byte| *byte == 0);
    let (json, generation, index) = (parts.next().unwrap_or_default(), parts.next(), parts.next());
    let index = index.is_some_and(fuzzed::index);
    fuzzed::config(json, generation) | index
}

/// A file of tensors. What the first byte leaves of 3 says what the others are:
///
/// - 0: the file;
/// - 1: its header without the length, a zero byte, its data;
/// - 2: the length of its data, which is zeros, in two bytes of which 12 bits count; its header without the length.
#[must_use]
pub fn safetensors(input: &[u8]) -> bool {
    let Some((kind, rest)) = input.split_first() else { return false };
    let file = |header: &[u8], data: &[u8]| [&(header.len() as u64).to_le_bytes(), header, data].concat();
    match kind % 3 {
        0 => fuzzed::safetensors(rest),
        1 => {
            let (header, data) = at_zero(rest);
            fuzzed::safetensors(&file(header, data))
        }
        _ => {
            let Some((len, header)) = rest.split_first_chunk::<2>() else { return false };
            fuzzed::safetensors(&file(header, &vec![0; usize::from(u16::from_le_bytes(*len) & 0xfff)]))
        }
    }
}

/// A file of packed weights, as they are kept for the next load: its header without the length, a zero byte, its data.
#[must_use]
pub fn kept_weights(input: &[u8]) -> bool {
    let (header, data) = at_zero(input);
    backend::fuzzed::kept_weights(header, data)
}

/// Has the fuzzer, which ends at every panic, let those pass whose place is in a library of this name. Torchless catches them and makes errors of them;
/// what isn't caught ends the fuzzer nonetheless.
fn leave_to_who_catches(library: &'static str) {
    // The tests' own hook only reports.
    #[cfg(fuzzing)]
    {
        static SET: std::sync::Once = std::sync::Once::new();
        SET.call_once(|| {
            let ends = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                if !panic.location().is_some_and(|place| place.file().contains(library)) {
                    ends(panic);
                }
            }));
        });
    }
    let _ = library;
}

/// What is before the first zero byte, and what is behind it.
fn at_zero(input: &[u8]) -> (&[u8], &[u8]) {
    let end = input.iter().position(|byte| *byte == 0).unwrap_or(input.len());
    (&input[..end], input.get(end + 1..).unwrap_or_default())
}

/// What a reader took of so many bytes. What it says of those that it refused must not outgrow them.
pub(crate) fn took<T>(read: Result<T>, bytes: usize) -> Option<T> {
    let message = match read {
        Ok(value) => return Some(value),
        Err(error) => error.to_string(),
    };
    assert!(!message.is_empty() && message.len() <= 1000 + 4 * bytes, "{} bytes of message for {bytes}: {message}", message.len());
    None
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn a_tensor_of_no_rows_may_have_more_columns_than_there_are_addresses() {
        let header = format!("{:<80}", r#"{"a":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]}}"#);
        assert!(safetensors(&[b"\x02\0\0", header.as_bytes()].concat()));
    }

    #[test]
    fn inputs_that_fuzzing_has_kept_are_read_without_a_panic() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
        for (name, target) in TARGETS {
            let (mut taken, mut refused) = (0, 0);
            for entry in fs::read_dir(corpus.join(name)).unwrap() {
                let path = entry.unwrap().path();
                // What panics is named by the test's output.
                println!("{}", path.display());
                *(if target(&fs::read(path).unwrap()) { &mut taken } else { &mut refused }) += 1;
            }
            assert!(taken > 0 && refused > 0, "{name}: {taken} inputs were taken and {refused} refused; the corpus should have both");
        }
    }
}
