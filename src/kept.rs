//! [`Kept`]: results of measurements, in a small file of the user's cache directory.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;
use xxhash_rust::xxh3::xxh3_64;

/// Results by name, all of one thing.
pub(crate) struct Kept<V> {
    /// `None` where there is no cache directory: then they are kept as long as this is.
    path: Option<PathBuf>,
    contents: Contents<V>,
}

#[derive(Serialize, Deserialize)]
struct Contents<V> {
    /// What the results depend on.
    of: String,
    results: BTreeMap<String, V>,
}

impl<V: Serialize + DeserializeOwned> Kept<V> {
    /// The results that depend on `of`; `kind` names the file.
    pub(crate) fn open(kind: &str, of: String) -> Self {
        Self::in_directory(directory().as_deref(), kind, of)
    }

    pub(crate) fn in_directory(directory: Option<&Path>, kind: &str, of: String) -> Self {
        let path = directory.map(|directory| directory.join(format!("{kind}-{:016x}.json", xxh3_64(of.as_bytes()))));
        let read = path.as_deref().and_then(|path| read(path, &of));
        Self { path, contents: read.unwrap_or(Contents { of, results: BTreeMap::new() }) }
    }

    pub(crate) fn get(&self, name: &str) -> Option<&V> {
        self.contents.results.get(name)
    }

    /// Keeps a result, beside those that another process may have kept meanwhile. A disk that is full or read-only costs only the next measurement.
    pub(crate) fn keep(&mut self, name: String, result: V) {
        let Some(path) = &self.path else {
            self.contents.results.insert(name, result);
            return;
        };
        if let Some(others) = read(path, &self.contents.of) {
            self.contents.results.extend(others.results);
        }
        self.contents.results.insert(name, result);
        if let Err(e) = write(path, &self.contents) {
            tracing::debug!("what was measured could not be kept in {}: {e}", path.display());
        }
    }
}

impl<V> Kept<V> {
    /// Removes the file, as far as that can be done.
    pub(crate) fn forget(self) {
        if let Some(path) = self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// `TORCHLESS_CACHE`, or the user's cache directory.
fn directory() -> Option<PathBuf> {
    std::env::var_os("TORCHLESS_CACHE").map(PathBuf::from).or_else(|| dirs::cache_dir().map(|cache| cache.join("torchless")))
}

/// The file, if it is there, whole, and of this.
fn read<V: DeserializeOwned>(path: &Path, of: &str) -> Option<Contents<V>> {
    let contents: Contents<V> = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    (contents.of == of).then_some(contents)
}

/// Writes a file that takes the place of the old one when it is whole.
fn write<V: Serialize>(path: &Path, contents: &Contents<V>) -> io::Result<()> {
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

    fn at(directory: &Path, of: &str) -> Kept<f64> {
        Kept::in_directory(Some(directory), "test", of.into())
    }

    #[test]
    fn results_are_found_again_for_the_same_thing_alone() {
        let directory = tempfile::tempdir().unwrap();
        let mut first = at(directory.path(), "a card");
        assert_eq!(first.get("a layer"), None);
        first.keep("a layer".into(), 1.0);
        assert_eq!(first.get("a layer"), Some(&1.0));
        // Two at once lose nothing of each other.
        let mut second = at(directory.path(), "a card");
        first.keep("another".into(), 2.0);
        second.keep("a third".into(), 3.0);
        let again = at(directory.path(), "a card");
        assert_eq!(["a layer", "another", "a third"].map(|name| again.get(name).copied()), [Some(1.0), Some(2.0), Some(3.0)]);
        assert_eq!(at(directory.path(), "another card").get("a layer"), None);
    }

    #[test]
    fn a_damaged_file_is_as_if_there_were_none() {
        let directory = tempfile::tempdir().unwrap();
        at(directory.path(), "a card").keep("a layer".into(), 1.0);
        let file = std::fs::read_dir(directory.path()).unwrap().next().unwrap().unwrap().path();
        let whole = std::fs::read_to_string(&file).unwrap();
        for damage in ["", "{", &whole[..whole.len() / 2], &whole.replace("a card", "no card"), &whole.replace("1.0", "\"one\"")] {
            std::fs::write(&file, damage).unwrap();
            assert_eq!(at(directory.path(), "a card").get("a layer"), None, "{damage}");
        }
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_no_failure() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        let mut kept = at(&file, "a card");
        kept.keep("a layer".into(), 1.0);
        assert_eq!(kept.get("a layer"), Some(&1.0));
    }
}
