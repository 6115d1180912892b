//! GGUF files: what llama.cpp and what builds on it keep models in, quantised or not.
//!
//! A model is read as the Hugging Face checkpoint that it was made from: tensors get the names that they have there, and the rows of
//! Llama's Q and K their order. Files are not trusted: every length is held against what follows before it is used.

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

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use super::mapped::MappedFile;
use super::tensors_of;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::kernels::matrix::Matrix;
use crate::tokenizer::Vocabulary;
use config::Architecture;
pub(crate) use metadata::Metadata;
#[cfg(feature = "hub")]
pub(crate) use parts::PartName;
use parts::Parts;

/// A GGUF model whose sizes are known.
pub(super) struct GgufModel {
    parts: Parts,
    architecture: Architecture,
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
        let (architecture, config) = config::read(&parts)?;
        let generation = text::generation(parts.metadata(), config.vocab_size)?;
        Ok(Self { parts, architecture, config, generation })
    }

    /// Every tensor of the model, by its name in Hugging Face checkpoints.
    pub(super) fn tensors(&self) -> Result<HashMap<String, Matrix>> {
        let (mut tensors, optional) = (HashMap::new(), self.config.optional_weights());
        // One by one: the metadata may claim any number of layers, and the first that is missing must end this.
        for (name, shape) in tensors_of(&self.config) {
            let theirs = names::gguf_name(&name).ok_or_else(|| Error::tensor(&name, "has no name in GGUF files"))?;
            let missing = || Error::tensor(&theirs, format!("is missing from {}", self.metadata().path().display()));
            let file = self.parts.find(&theirs).ok_or_else(missing)?;
            let bias = theirs.replace(".weight", ".bias");
            let known = || optional.iter().any(|(other, _)| name.replace(".weight", ".bias").ends_with(other));
            if self.parts.find(&bias).is_some() && !known() {
                return Err(Error::Unsupported { what: "tensor", found: bias, supported: "layers without biases, but for Qwen 2's" });
            }
            let matrix = file.matrix(&theirs, &shape)?;
            let paired = self.architecture.pairs_neighbours() && names::has_rotary_rows(&name);
            let matrix = if paired { matrix.with_neighbour_pairs(self.config.head_dim) } else { matrix };
            tensors.insert(name, matrix);
        }
        let taken: HashSet<String> = tensors.keys().filter_map(|name| names::gguf_name(name)).collect();
        let unknown = |name: &&str| !taken.contains(*name) && !names::changes_nothing(name, self.config.n_layers);
        if let Some(found) = self.parts.files().iter().flat_map(file::GgufFile::names).find(unknown) {
            return Err(Error::Unsupported {
                what: "tensor",
                found: found.into(),
                supported: "the tensors of plain layers, and leaves no others out",
            });
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
