//! [`Cache`]: one repository in the cache of Hugging Face's libraries. Files lie under `blobs` by their etag; `snapshots` has for each
//! commit a directory with links to them, and `refs/main` the commit that was last fetched.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::select::Names;
use crate::config::read_at_most;
use crate::error::{Error, Result};

pub(super) struct Cache {
    /// `models--org--name`.
    root: PathBuf,
    locks: PathBuf,
}

/// What the cache has of a commit.
pub(super) struct Snapshot {
    pub dir: PathBuf,
    pub files: Names,
}

impl Cache {
    pub fn new(cache: &Path, repository: &str) -> Self {
        let name = format!("models--{}", repository.replace('/', "--"));
        Self { root: cache.join(&name), locks: cache.join(".locks").join(name) }
    }

    /// What was last fetched; `None` if there is nothing.
    pub fn latest(&self) -> Option<Snapshot> {
        let commit = read_at_most(&self.reference(), 128).ok()?;
        let commit = str::from_utf8(&commit).ok()?.trim();
        if !is_plain(commit) {
            return None;
        }
        let dir = self.snapshot(commit);
        let mut files = Names::new();
        list(&dir, "", 0, &mut files);
        Some(Snapshot { dir, files })
    }

    /// The directory of a commit.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    pub fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    /// Where a blob is until it is whole; under this name Hugging Face's libraries go on with it too.
    pub fn partial(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// Waits until no other process fetches this blob, and keeps them waiting while the file lives.
    pub fn lock(&self, etag: &str) -> Result<File> {
        let path = self.locks.join(format!("{etag}.lock"));
        create_parent(&path)?;
        create_parent(&self.blob(etag))?;
        let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(Error::io("open", &path))?;
        file.lock().map_err(Error::io("lock", &path))?;
        Ok(file)
    }

    /// Gives a whole blob its name in the commit.
    pub fn link(&self, commit: &str, file: &str, etag: &str) -> Result<()> {
        let path = self.snapshot(commit).join(file);
        if path.exists() {
            return Ok(());
        }
        create_parent(&path)?;
        // A link to a blob that somebody deleted.
        if path.is_symlink() {
            fs::remove_file(&path).map_err(Error::io("replace", &path))?;
        }
        let linked = self.make_link(&path, file, etag);
        // Another process may have been faster.
        if path.exists() { Ok(()) } else { linked.map_err(Error::io("write", &path)) }
    }

    #[cfg(unix)]
    fn make_link(&self, path: &Path, file: &str, etag: &str) -> std::io::Result<()> {
        // Out of the file's directories, the commit's and `snapshots`; relative, so that the cache may be moved.
        let up = "../".repeat(file.split('/').count() + 1);
        std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), path)
    }

    /// Links need a privilege on Windows.
    #[cfg(not(unix))]
    fn make_link(&self, path: &Path, _file: &str, etag: &str) -> std::io::Result<()> {
        let blob = self.blob(etag);
        fs::hard_link(&blob, path).or_else(|_| fs::copy(&blob, path).map(drop))
    }

    /// Makes a commit the one that [`Self::latest`] finds: only when all that was wanted of it is there.
    pub fn set_latest(&self, commit: &str) -> Result<()> {
        let path = self.reference();
        create_parent(&path)?;
        let temporary = path.with_file_name(format!("main.{}.tmp", std::process::id()));
        let written = fs::write(&temporary, commit).and_then(|()| fs::rename(&temporary, &path));
        written.map_err(|e| {
            // It may not exist; the first error is the one to tell.
            let _ = fs::remove_file(&temporary);
            Error::io("write", &path)(e)
        })
    }

    fn reference(&self) -> PathBuf {
        self.root.join("refs").join("main")
    }
}

/// Whether a server's word, a commit or an etag, may be part of a path: no separators, and nothing hidden.
pub(super) fn is_plain(word: &str) -> bool {
    let is_plain = word.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    is_plain && (1..=128).contains(&word.len()) && !word.starts_with('.')
}

fn create_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).map_err(Error::io("create", parent))
}

/// Adds the files that are there: not those whose blob is gone.
fn list(dir: &Path, prefix: &str, depth: usize, files: &mut Names) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let (path, name) = (entry.path(), format!("{prefix}{name}"));
        match fs::metadata(&path) {
            Ok(kind) if kind.is_file() => drop(files.insert(name)),
            Ok(kind) if kind.is_dir() && depth < 8 => list(&path, &format!("{name}/"), depth + 1, files),
            _ => {}
        }
    }
}
