//! The reader of GGUF files, given bytes.

use std::path::Path;

use memmap2::MmapMut;

use super::GgufModel;
use super::file::GgufFile;
use super::parts::Parts;
use crate::fuzzing::took;
use crate::params::fingerprint::fingerprint;
use crate::params::fuzzed::{check_sizes, read};
use crate::tokenizer::Tokenizer;

/// A file: its header, of every tensor what a model would read, its vocabulary and what that makes of a text; and the model, whether it was taken.
pub(crate) fn gguf(bytes: &[u8]) -> bool {
    let mut map = MmapMut::map_anon(bytes.len()).expect("memory for a small file");
    map.copy_from_slice(bytes);
    let map = map.make_read_only().expect("a map can be made read-only");
    // The first of a set whose other part is missing, if the metadata says that it is one.
    let path = Path::new("model-00001-of-00002.gguf");
    let Some(file) = took(GgufFile::mapped(path.into(), map), bytes.len()) else { return false };

    for name in file.names() {
        assert!(file.has(name), "{name:?} is among its tensors");
        let Some((rows, cols)) = file.shape(name) else { continue };
        if let Some(matrix) = took(file.matrix(name, &[rows, cols]), bytes.len()) {
            assert_eq!((matrix.rows(), matrix.cols()), (rows, cols));
            read(&matrix);
        }
        file.matrix(name, &[2, rows, cols]).expect_err("no tensor is given out in another shape than its own");
    }
    fingerprint(b"", &[file.file()]);
    let metadata = file.metadata().clone();
    took(metadata.chat_template(), bytes.len());
    let tokenizer = took(metadata.vocabulary(), bytes.len()).and_then(|vocabulary| {
        let tokens = vocabulary.tokens.len() as u32;
        took(Tokenizer::from_vocabulary(vocabulary), bytes.len()).map(|tokenizer| (tokenizer, tokens))
    });
    if let Some((tokenizer, tokens)) = tokenizer {
        let text = "a  b\u{e9}</s>\n7";
        if let Some(ids) = took(tokenizer.encode(text), bytes.len() + text.len()) {
            assert!(ids.iter().all(|id| *id < tokens), "{ids:?} of {tokens} tokens");
            took(tokenizer.decode(&ids), bytes.len() + text.len());
        }
    }

    let Some(model) = took(Parts::of(path, file).and_then(GgufModel::of), bytes.len()) else { return false };
    check_sizes(&model.config);
    let tokens = model.generation.eos_token_id.iter().chain(&model.generation.bos_token_id);
    assert!(tokens.into_iter().all(|id| (*id as usize) < model.config.vocab_size), "{:?}", model.generation);
    let Some(tensors) = took(model.tensors(), bytes.len()) else { return false };
    tensors.values().for_each(read);
    true
}
