//! [`GenerationConfig`]: the tokens that begin and end a text.

use std::path::Path;

use serde_json::Value;

use crate::config::{CONFIG_LIMIT, Keys, read_at_most};
use crate::error::Result;

/// What `generation_config.json` says about a model's special tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct GenerationConfig {
    /// Tokens that end a text; none if the model never says.
    pub eos_token_id: Vec<u32>,
    /// The token in front of every prompt.
    pub bos_token_id: Option<u32>,
}

impl GenerationConfig {
    /// Reads `generation_config.json` of `dir`; what it leaves out, and all of it if there is none, is taken from `config.json`.
    pub(super) fn load(dir: &Path, config: &Keys) -> Result<Self> {
        let path = dir.join("generation_config.json");
        if !path.exists() {
            return Self::of(None, config);
        }
        let json = read_at_most(&path, CONFIG_LIMIT)?;
        Self::of(Some(&Keys::parse(&json, &path)?), config)
    }

    /// [`Self::load`] of the keys of both files.
    pub(super) fn of(own: Option<&Keys>, config: &Keys) -> Result<Self> {
        let eos_token_id = match own.map(eos).transpose()?.flatten() {
            Some(tokens) => tokens,
            None => eos(config)?.unwrap_or_default(),
        };
        let bos_token_id = match own.map(bos).transpose()?.flatten() {
            Some(token) => Some(token),
            None => bos(config)?,
        };
        Ok(Self { eos_token_id, bos_token_id })
    }
}

/// One token or a list of them.
fn eos(keys: &Keys) -> Result<Option<Vec<u32>>> {
    let Some(value) = keys.get("eos_token_id") else { return Ok(None) };
    let tokens: Option<Vec<u32>> = match value {
        Value::Array(tokens) => tokens.iter().map(token).collect(),
        one => token(one).map(|token| vec![token]),
    };
    tokens.map(Some).ok_or_else(|| keys.wrong("eos_token_id", "a token or a list of tokens is needed"))
}

fn bos(keys: &Keys) -> Result<Option<u32>> {
    let Some(value) = keys.get("bos_token_id") else { return Ok(None) };
    token(value).map(Some).ok_or_else(|| keys.wrong("bos_token_id", "a token is needed"))
}

fn token(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}
