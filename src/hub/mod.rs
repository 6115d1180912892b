//! Models by name: `org/name` or `org/name:file` of the Hugging Face hub, kept where Hugging Face's own libraries keep them.
//!
//! Why not the hf-hub crate: 0.5 waits for a silent server without end, takes a file for whole without looking at its size, and puts what the
//! server calls a file's etag into a path; 1.0 begins every file anew, and brings 165 crates and cmake. Their layout of the cache is kept here.

mod name;

#[cfg(feature = "hub")]
mod cache;
#[cfg(feature = "hub")]
mod client;
#[cfg(feature = "hub")]
mod fetch;
#[cfg(feature = "hub")]
mod select;
#[cfg(feature = "hub")]
mod settings;

use std::path::PathBuf;

use crate::error::{Error, Result};
use name::ModelName;

/// How far a file is that is being fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct FetchProgress<'a> {
    /// The file's name in its repository.
    pub file: &'a str,
    /// Bytes that are here already.
    pub done: u64,
    /// Bytes of the whole file.
    pub size: u64,
}

/// What is wanted of a model.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Want {
    All,
    Tokenizer,
}

/// Whether this is how a model of the hub is named: `org/name`, or `org/name:file` for one GGUF file of it. No question whether there is one.
#[must_use]
pub fn is_model_name(name: &str) -> bool {
    ModelName::parse(name).is_some()
}

/// Fetches a model of the Hugging Face hub, named as [`is_model_name`] says, and answers with the path for [`Parameters::load`](crate::Parameters::load).
///
/// Of a repository with safetensors that is a directory: the config, the tokenizer and the weights. Of one without, it is its GGUF file, if it
/// has only one; a file that is named is taken as it is, with all parts if it is one of several. What is in the cache is used without asking the hub; what was fetched in part is
/// gone on with. Sizes are checked, and of large files the SHA-256 by which the hub names them.
///
/// The environment is read as Hugging Face's libraries do: `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_OFFLINE`,
/// `HF_HUB_ETAG_TIMEOUT` and `HF_HUB_DOWNLOAD_TIMEOUT` (seconds). `progress` is told of each file that is fetched, first with what is here of it already.
///
/// # Errors
/// [`Error::HubUnreachable`] if the hub doesn't answer or mustn't be asked, and the cache doesn't have the model; [`Error::Hub`] if the hub refuses, has no such
/// model or none that could be loaded, or sends what it shouldn't, and without the feature `hub`; [`Error::Io`] if the cache can't be written.
pub fn fetch_model(name: &str, progress: impl FnMut(FetchProgress<'_>)) -> Result<PathBuf> {
    fetch(name, Want::All, progress)
}

/// As [`fetch_model`], but of a repository with a tokenizer of its own only the small files, without the weights.
///
/// # Errors
/// Those of [`fetch_model`].
pub fn fetch_tokenizer(name: &str, progress: impl FnMut(FetchProgress<'_>)) -> Result<PathBuf> {
    fetch(name, Want::Tokenizer, progress)
}

fn fetch(name: &str, want: Want, mut progress: impl FnMut(FetchProgress<'_>)) -> Result<PathBuf> {
    let Some(model) = ModelName::parse(name) else {
        return Err(Error::hub(name, "this is no name of a model; org/name or org/name:file is needed"));
    };
    #[cfg(feature = "hub")]
    return fetch::fetch(&model, want, &mut progress);
    #[cfg(not(feature = "hub"))]
    {
        let (_, _) = (want, &mut progress);
        Err(Error::hub(
            model.to_string(),
            "torchless was built without the feature hub, and fetches no models; give the path of a local copy",
        ))
    }
}

#[cfg(all(test, not(feature = "hub")))]
mod tests {
    #[test]
    fn without_the_feature_a_name_is_told_from_a_path_and_refused() {
        assert!(super::is_model_name("org/name"));
        let error = super::fetch_model("org/name", |_| {}).unwrap_err().to_string();
        assert!(error.contains("org/name") && error.contains("without the feature hub"), "{error}");
    }
}
