//! The readers of a checkpoint's files, given bytes. Each says whether it took them.

use std::path::Path;

use memmap2::MmapMut;
use safetensors::SafeTensors;

use super::files::parse_index;
use super::fingerprint::fingerprint;
pub(crate) use super::gguf::fuzzed::gguf;
use super::safetensors::SafetensorsFile;
use super::{GenerationConfig, tensors_of};
use crate::config::{Config, Keys};
use crate::fuzzing::took;
use crate::kernels::matrix::Matrix;

/// A file of tensors: its header, and of every tensor what a model would read.
pub(crate) fn safetensors(bytes: &[u8]) -> bool {
    let mut map = MmapMut::map_anon(bytes.len()).expect("memory for a small file");
    map.copy_from_slice(bytes);
    let map = map.make_read_only().expect("a map can be made read-only");
    let Some(file) = took(SafetensorsFile::mapped("model.safetensors".into(), map), bytes.len()) else { return false };

    let mut covered = 0;
    for (name, info) in file.tensors() {
        assert!(file.has(name), "{name:?} is among its tensors");
        covered += info.data_offsets.1 - info.data_offsets.0;
        if let Some(matrix) = took(file.matrix(name, &info.shape), bytes.len()) {
            read(&matrix);
        }
        let other = [info.shape.as_slice(), &[1]].concat();
        file.matrix(name, &other).expect_err("no tensor is given out in another shape than its own");
    }
    assert_eq!(file.names().count(), file.tensors().len());
    assert_eq!(file.file().header_len() + covered, bytes.len(), "the tensors are all of the data");
    fingerprint(b"", &[file.file()]);

    // The format's own library refuses metadata that isn't text, which nobody here reads; where it takes a file, it finds the same in it.
    if let Ok((header, theirs)) = SafeTensors::read_metadata(bytes) {
        assert_eq!(8 + header, file.file().header_len());
        let theirs = theirs.tensors();
        assert_eq!(theirs.len(), file.tensors().len());
        for (name, info) in file.tensors() {
            let other = theirs[name];
            assert!((info.dtype, &info.shape, info.data_offsets) == (other.dtype, &other.shape, other.data_offsets), "{name:?}");
        }
    }
    true
}

/// The first row and the last, of the whole and of a part.
pub(super) fn read(matrix: &Matrix) {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    matrix.will_need();
    for matrix in [matrix, &matrix.slice(rows / 2..rows, cols / 3..cols)] {
        let Some(last) = matrix.rows().checked_sub(1) else { continue };
        let mut values = vec![0.0; matrix.cols()];
        for row in [0, last] {
            matrix.row_to_f32(row, &mut values);
        }
    }
}

/// A `config.json`, and with it a `generation_config.json`.
pub(crate) fn config(json: &[u8], generation: Option<&[u8]>) -> bool {
    let (path, generation_path) = (Path::new("config.json"), Path::new("generation_config.json"));
    let read = json.len() + generation.map_or(0, <[u8]>::len);
    let config = took(Config::from_json(json, path), read);
    if let Some(keys) = took(Keys::parse(json, path), read) {
        let own = generation.and_then(|json| took(Keys::parse(json, generation_path), read));
        if let Some(tokens) = took(GenerationConfig::of(own.as_ref(), &keys), read) {
            assert!(tokens.eos_token_id.len() <= read);
        }
    }
    let Some(config) = config else { return false };
    check_sizes(&config);
    true
}

/// What must hold of the sizes that a reader takes.
pub(super) fn check_sizes(config: &Config) {
    // What a loader makes of the sizes: of every tensor the bytes, none of which overflows.
    let bytes = |shape: &[usize]| shape.iter().product::<usize>() * size_of::<f32>();
    let layer = tensors_of(config).take(12).map(|(_, shape)| bytes(&shape)).max().expect("a model has tensors");
    assert!(isize::try_from(layer).is_ok());
    assert!(config.layer_elements() + config.head_elements() <= isize::MAX as u128);
    assert_eq!(config.q_dim() % config.kv_dim(), 0, "{config:?}");
    assert!(config.first_seen(0) == 0 && config.first_seen(config.max_position_embeddings - 1) < config.max_position_embeddings);
    assert!(config.rope_theta.is_finite() && config.rms_norm_eps > 0.0);
}

/// An index of shards.
pub(crate) fn index(json: &[u8]) -> bool {
    let Some(shard_of) = took(parse_index(json, Path::new("model.safetensors.index.json")), json.len()) else { return false };
    for shard in shard_of.values() {
        let joined = Path::new("checkpoint").join(shard);
        assert_eq!(joined.parent(), Some(Path::new("checkpoint")), "{shard:?} leaves the directory");
    }
    true
}
