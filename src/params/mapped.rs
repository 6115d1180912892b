//! [`MappedFile`]: a file of a checkpoint, and where its header ends.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use memmap2::Mmap;

use crate::config::open;
use crate::error::{Error, Result};

#[cfg(target_endian = "big")]
compile_error!("checkpoints are little-endian, and torchless reads their elements in place");

pub(super) struct MappedFile {
    path: PathBuf,
    map: Arc<Mmap>,
    /// The byte at which the data starts, behind the header.
    data: usize,
}

impl MappedFile {
    /// Maps a file. `read_header` gets all of it, and says where its data starts and what it learned; or what is wrong with this `kind` of file.
    pub(super) fn open<T>(
        path: PathBuf,
        kind: &'static str,
        read_header: impl FnOnce(&[u8]) -> Result<(usize, T), String>,
    ) -> Result<(Self, T)> {
        let file = open(&path)?;
        // SAFETY: the map is read only. Nobody may change the file under it, which `Parameters::load` asks of its caller.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", &path))?;
        Self::of(path, map, kind, read_header)
    }

    /// [`Self::open`] of what `path` is mapped to.
    pub(super) fn of<T>(
        path: PathBuf,
        map: Mmap,
        kind: &'static str,
        read_header: impl FnOnce(&[u8]) -> Result<(usize, T), String>,
    ) -> Result<(Self, T)> {
        match read_header(&map) {
            Ok((data, found)) => Ok((Self { path, data: data.min(map.len()), map: Arc::new(map) }, found)),
            Err(problem) => Err(Error::Checkpoint { path, kind, problem }),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn map(&self) -> &Arc<Mmap> {
        &self.map
    }

    /// The whole file, as mapped.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// When the file was last written, since 1970, as the system says.
    pub(super) fn written(&self) -> Option<Duration> {
        self.path.metadata().ok()?.modified().ok()?.duration_since(UNIX_EPOCH).ok()
    }

    /// The bytes before the data.
    pub(super) fn header_len(&self) -> usize {
        self.data
    }
}
