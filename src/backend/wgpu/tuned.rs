//! [`Tuned`]: what was chosen for an adapter, kept in a file of the user's cache directory.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;
use xxhash_rust::xxh3::xxh3_64;

use super::adapters::Adapter;
use super::tuning::Linear;

/// Goes up with every change of the kernels or of what is tried.
const GENERATION: u32 = 3;

/// The choices for one adapter, its driver and this version of torchless.
pub(super) struct Tuned {
    /// `None` where there is no cache directory: then they are of this model only.
    path: Option<PathBuf>,
    contents: Contents,
    /// Bytes of a workgroup's memory on the adapter.
    workgroup: u32,
}

#[derive(Serialize, Deserialize)]
struct Contents {
    /// What the choices depend on.
    of: String,
    /// By the format and size of a layer.
    layers: BTreeMap<String, Linear>,
}

impl Tuned {
    pub(super) fn of(adapter: &Adapter) -> Self {
        let wgpu::AdapterInfo { name, vendor, device, driver, driver_info, backend, subgroup_min_size, subgroup_max_size, .. } =
            &adapter.info;
        let version = env!("CARGO_PKG_VERSION");
        let of = format!(
            "torchless {version}, kernels {GENERATION}, {name} ({vendor:x}:{device:x}) over {backend}, {driver} {driver_info}, \
             subgroups of {subgroup_min_size} to {subgroup_max_size}"
        );
        Self::in_directory(directory().as_deref(), of, adapter.limits.max_compute_workgroup_storage_size)
    }

    fn in_directory(directory: Option<&Path>, of: String, workgroup: u32) -> Self {
        let path = directory.map(|directory| directory.join(format!("tuned-{:016x}.json", xxh3_64(of.as_bytes()))));
        let read = path.as_deref().and_then(|path| read(path, &of));
        let contents = read.unwrap_or(Contents { of, layers: BTreeMap::new() });
        Self { path, contents, workgroup }
    }

    pub(super) fn get(&self, layer: &str) -> Option<Linear> {
        self.contents.layers.get(layer).copied().filter(|linear| linear.is_sane(self.workgroup))
    }

    /// Keeps a choice, beside those that another process may have made meanwhile. A disk that is full or read-only costs only the next measurement.
    pub(super) fn keep(&mut self, layer: String, linear: Linear) {
        let Some(path) = &self.path else {
            self.contents.layers.insert(layer, linear);
            return;
        };
        if let Some(others) = read(path, &self.contents.of) {
            self.contents.layers.extend(others.layers);
        }
        self.contents.layers.insert(layer, linear);
        if let Err(e) = write(path, &self.contents) {
            tracing::debug!("what was measured could not be kept in {}: {e}", path.display());
        }
    }
}

/// `TORCHLESS_CACHE`, or the user's cache directory.
fn directory() -> Option<PathBuf> {
    std::env::var_os("TORCHLESS_CACHE").map(PathBuf::from).or_else(|| dirs::cache_dir().map(|cache| cache.join("torchless")))
}

/// The file, if it is there, whole, and of this.
fn read(path: &Path, of: &str) -> Option<Contents> {
    let contents: Contents = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    (contents.of == of).then_some(contents)
}

/// Writes a file that takes the place of the old one when it is whole.
fn write(path: &Path, contents: &Contents) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory)?;
    let mut file = NamedTempFile::new_in(directory)?;
    file.write_all(&serde_json::to_vec_pretty(contents)?)?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::wgpu::tuning::{Few, Tile, Tuning};

    fn at(directory: &Path, of: &str) -> Tuned {
        Tuned::in_directory(Some(directory), of.into(), 32 << 10)
    }

    #[test]
    fn choices_are_found_again_for_the_same_adapter_alone() {
        let directory = tempfile::tempdir().unwrap();
        let linear = Tuning::HARDWARE.linear;
        let mut first = at(directory.path(), "a card");
        assert_eq!(first.get("a layer"), None);
        first.keep("a layer".into(), linear);
        assert_eq!(first.get("a layer"), Some(linear));
        // Two at once lose nothing of each other.
        let mut second = at(directory.path(), "a card");
        first.keep("another".into(), linear);
        second.keep("a third".into(), Linear { many: None, ..linear });
        let again = at(directory.path(), "a card");
        assert_eq!([again.get("a layer"), again.get("another")], [Some(linear); 2]);
        assert_eq!(again.get("a third"), Some(Linear { many: None, ..linear }));
        assert_eq!(at(directory.path(), "another card").get("a layer"), None);
    }

    #[test]
    fn a_damaged_file_is_as_if_there_were_none() {
        let directory = tempfile::tempdir().unwrap();
        let linear = Tuning::HARDWARE.linear;
        at(directory.path(), "a card").keep("a layer".into(), linear);
        let file = std::fs::read_dir(directory.path()).unwrap().next().unwrap().unwrap().path();
        let whole = std::fs::read_to_string(&file).unwrap();
        for damage in ["", "{", &whole[..whole.len() / 2], &whole.replace("a card", "no card")] {
            std::fs::write(&file, damage).unwrap();
            assert_eq!(at(directory.path(), "a card").get("a layer"), None, "{damage}");
        }
        // Numbers that no kernel can have, and more memory than a workgroup has.
        let odd = |tiles, slices| Linear { one: Few { tiles, rows: 1, slices }, ..linear };
        let large = Linear { int8: Some((9, Tile { side: 16, down: 9, across: 4 })), ..linear };
        for odd in [odd(0, 999), odd(16, 16), odd(1, 3), large] {
            at(directory.path(), "a card").keep("a layer".into(), odd);
            assert_eq!(at(directory.path(), "a card").get("a layer"), None, "{odd:?}");
        }
        at(directory.path(), "a card").keep("a layer".into(), linear);
        assert_eq!(Tuned::in_directory(Some(directory.path()), "a card".into(), 16 << 10).get("a layer"), None);
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_no_failure() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        let mut tuned = at(&file, "a card");
        tuned.keep("a layer".into(), Tuning::HARDWARE.linear);
        assert_eq!(tuned.get("a layer"), Some(Tuning::HARDWARE.linear));
    }
}
