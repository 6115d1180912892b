//! GGUF files: what llama.cpp and what builds on it keep models in, quantised or not.
//!
//! A model of architecture `llama` is read as the Hugging Face checkpoint that it was made from: tensors get the names that they have
//! there, and the rows of Q and K their order. Files are not trusted: every length is held against what follows before it is used.

mod bytes;
mod config;
mod file;
#[cfg(any(fuzzing, test))]
pub(crate) mod fuzzed;
mod metadata;
mod names;
mod parts;
mod text;
mod types;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::mapped::MappedFile;
use super::tensors_of;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::kernels::matrix::Matrix;
use crate::tokenizer::Vocabulary;
pub(crate) use metadata::Metadata;
use parts::Parts;

/// A GGUF model whose sizes are known.
pub(super) struct GgufModel {
    parts: Parts,
    pub config: Config,
    pub generation: super::GenerationConfig,
}

/// The GGUF file that `path` names: itself, or the one model of a directory that has no other.
///
/// # Errors
/// [`Error::Config`] if the directory has several.
pub(super) fn named_by(path: &Path) -> Result<Option<PathBuf>> {
    if path.is_dir() {
        return if super::files::any(path) { Ok(None) } else { parts::only_model(path) };
    }
    Ok(parts::is_gguf(path).then(|| path.into()))
}

/// The vocabulary of the model of which `path` is the file, or a part.
///
/// # Errors
/// Those of the file and of its metadata.
pub(super) fn vocabulary(path: &Path) -> Result<Vocabulary> {
    Parts::open(path)?.metadata().vocabulary()
}

impl GgufModel {
    /// Opens the model of which `path` is the file, or a part.
    pub(super) fn open(path: &Path) -> Result<Self> {
        Self::of(Parts::open(path)?)
    }

    fn of(parts: Parts) -> Result<Self> {
        let config = config::read(&parts)?;
        let generation = text::generation(parts.metadata(), config.vocab_size)?;
        Ok(Self { parts, config, generation })
    }

    /// Every tensor of the model, by its name in Hugging Face checkpoints.
    pub(super) fn tensors(&self) -> Result<HashMap<String, Matrix>> {
        let mut tensors = HashMap::new();
        // One by one: the metadata may claim any number of layers, and the first that is missing must end this.
        for (name, shape) in tensors_of(&self.config) {
            let theirs = names::gguf_name(&name).ok_or_else(|| Error::tensor(&name, "has no name in GGUF files"))?;
            let missing = || Error::tensor(&theirs, format!("is missing from {}", self.metadata().path().display()));
            let file = self.parts.find(&theirs).ok_or_else(missing)?;
            let bias = theirs.replace(".weight", ".bias");
            if self.parts.find(&bias).is_some() {
                return Err(Error::Unsupported { what: "tensor", found: bias, supported: "layers without biases" });
            }
            let matrix = file.matrix(&theirs, &shape)?;
            let matrix = if names::has_rotary_rows(&name) { matrix.with_neighbour_pairs(self.config.head_dim) } else { matrix };
            tensors.insert(name, matrix);
        }
        Ok(tensors)
    }

    pub(super) fn metadata(&self) -> &Metadata {
        self.parts.metadata()
    }

    pub(super) fn files(&self) -> Vec<&MappedFile> {
        self.parts.files().iter().map(file::GgufFile::file).collect()
    }
}
