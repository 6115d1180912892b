//! The safetensors files of a checkpoint: one, or the shards that an index names.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use serde::Deserialize;

use super::by_tensor::ByTensor;
use super::safetensors::SafetensorsFile;
use crate::config::read_at_most;
use crate::error::{Error, Result};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Most bytes of an index; the largest models' have a tenth of that.
const INDEX_LIMIT: u64 = 100_000_000;

#[derive(Deserialize)]
struct Index {
    /// The shard of each tensor.
    weight_map: ByTensor<String>,
}

/// Whether there is a checkpoint in `dir`, sound or not.
pub(super) fn any(dir: &Path) -> bool {
    [SINGLE, INDEX].iter().any(|name| dir.join(name).exists())
}

/// Opens the files of the checkpoint in `dir`. As in transformers, a single file goes before an index.
pub(super) fn open_all(dir: &Path) -> Result<Vec<SafetensorsFile>> {
    let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
    if single.exists() {
        return Ok(vec![SafetensorsFile::open(single)?]);
    }
    if index.exists() {
        return open_shards(dir, &index);
    }
    Err(Error::config(dir, format!("the directory holds neither {SINGLE} nor {INDEX}, nor a GGUF file")))
}

/// The index is the authority: every shard must hold the tensors that it assigns to it, and no others.
fn open_shards(dir: &Path, index: &Path) -> Result<Vec<SafetensorsFile>> {
    let bad = |problem: String| Error::config(index, problem);
    let shard_of = parse_index(&read_at_most(index, INDEX_LIMIT)?, index)?;
    let shards: BTreeSet<&str> = shard_of.values().map(String::as_str).collect();
    let files = shards.iter().map(|shard| SafetensorsFile::open(dir.join(shard))).collect::<Result<Vec<_>>>()?;
    let files: BTreeMap<&str, SafetensorsFile> = shards.into_iter().zip(files).collect();

    if let Some((name, shard)) = shard_of.iter().find(|(name, shard)| !files[shard.as_str()].has(name)) {
        return Err(bad(format!("it says that tensor {name:?} is in {shard:?}, which doesn't have it")));
    }
    for (shard, file) in &files {
        if let Some(name) = file.names().find(|name| shard_of.get(*name).map(String::as_str) != Some(shard)) {
            let assigned = shard_of.get(name).map_or_else(|| "doesn't name".into(), |other| format!("says that {other:?} holds"));
            return Err(bad(format!("it {assigned} tensor {name:?}, which is in {shard:?}")));
        }
    }
    Ok(files.into_values().collect())
}

/// The shards that an index names.
#[cfg(feature = "hub")]
pub(crate) fn shards_of(index: &Path) -> Result<BTreeSet<String>> {
    Ok(parse_index(&read_at_most(index, INDEX_LIMIT)?, index)?.into_values().collect())
}

/// The shard of each tensor, its name known to be that of a file in the directory of `index`.
pub(super) fn parse_index(json: &[u8], index: &Path) -> Result<BTreeMap<String, String>> {
    let Index { weight_map: ByTensor(shard_of) } =
        serde_json::from_slice(json).map_err(|e| Error::config(index, format!("not an index of shards: {e}")))?;
    if let Some(shard) = shard_of.values().find(|shard| !is_plain_file_name(shard)) {
        return Err(Error::config(index, format!("it names the shard {shard:?}; a file name without any directory is needed")));
    }
    Ok(shard_of)
}

/// Whether a name stays in its directory on any system: `\` and `:` have a meaning on Windows only.
fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None)) && !name.contains(['/', '\\', ':'])
}
