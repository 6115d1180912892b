//! Packed weights kept in a file, so that the next load maps them instead of quantising again.
//!
//! The file is in the safetensors format with every tensor at a multiple of 64 bytes; its metadata says what it was made of and what
//! its data hashes to. Whatever is wrong with it, it is as if there were none.

#[cfg(any(fuzzing, test))]
pub(crate) mod fuzzed;

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::tensor::TensorInfo;
use serde::Deserialize;
use serde_json::json;
use tempfile::NamedTempFile;
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

use crate::kernels::quant::{Packed, QuantFormat};
use crate::params::read_header;

/// Where a tensor's bytes may start.
const ALIGNMENT: usize = 64;

/// Goes up with every change of [`Packed`]'s layout or of how weights are quantised.
const LAYOUT: u32 = 3;

/// The file of a place's packed weights.
pub(super) struct CacheFile {
    path: PathBuf,
    /// Everything that its contents depend on.
    of: String,
}

/// What a header says beside the tensors.
#[derive(Deserialize)]
struct Header {
    #[serde(rename = "__metadata__")]
    about: HashMap<String, String>,
}

/// A file that is what it should be.
pub(super) struct Cached {
    map: Arc<Mmap>,
    /// Byte and length of each tensor.
    tensors: HashMap<String, (usize, usize)>,
}

impl CacheFile {
    /// The file in `dir` for what `of` describes.
    pub(super) fn new(dir: &Path, of: &str) -> Self {
        let of = format!("layout {LAYOUT}, {of}");
        Self { path: dir.join(format!("torchless-{:016x}.packed", xxh3_64(of.as_bytes()))), of }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The file, if it is there, whole, and of this.
    pub(super) fn open(&self) -> Option<Cached> {
        let file = File::open(&self.path).ok()?;
        // SAFETY: read only. As with the checkpoint, nobody may change the file while the model lives; a new one takes its name, and not its place.
        let map = unsafe { Mmap::map(&file) }.ok()?;
        // It is read whole, from start to end, by the hash: that it was asked for early only helps.
        #[cfg(unix)]
        let _ = map.advise(memmap2::Advice::WillNeed);
        Cached::of(map, &self.of)
    }

    /// Writes the file anew: under another name first, so that no half of it is ever found.
    pub(super) fn write(&self, weights: &[(String, Packed)]) -> io::Result<()> {
        let mut hash = Xxh3Default::new();
        let (mut header, mut end) = (serde_json::Map::new(), 0);
        for (name, packed) in weights {
            let data = packed.data();
            hash.update(data);
            header.insert(name.clone(), json!({ "dtype": "U8", "shape": [data.len()], "data_offsets": [end, end + data.len()] }));
            end += data.len();
        }
        header.insert("__metadata__".into(), json!({ "of": self.of, "xxh3": format!("{:016x}", hash.digest()) }));
        let mut header = serde_json::to_string(&header)?;
        let len = (8 + header.len()).next_multiple_of(ALIGNMENT) - 8;
        header.extend(std::iter::repeat_n(' ', len - header.len()));

        let mut file = NamedTempFile::new_in(self.path.parent().unwrap_or(Path::new(".")))?;
        let mut out = BufWriter::new(file.as_file_mut());
        out.write_all(&(len as u64).to_le_bytes())?;
        out.write_all(header.as_bytes())?;
        weights.iter().try_for_each(|(_, packed)| out.write_all(packed.data()))?;
        out.flush()?;
        drop(out);
        file.persist(&self.path)?;
        Ok(())
    }
}

impl Cached {
    /// The mapped file, if it is whole and made of this.
    fn of(map: Mmap, of: &str) -> Option<Self> {
        // Not by the library of the format: sums of its own overflow where tensors claim all of the address space.
        let (data, tensors) = read_header(&map).ok()?;
        let Header { about } = serde_json::from_slice(&map[size_of::<u64>()..data]).ok()?;
        let has = |key: &str, value: &str| about.get(key).is_some_and(|found| found == value);
        let whole = has("of", of) && has("xxh3", &format!("{:016x}", xxh3_64(&map[data..])));
        let place = |(name, info): (String, TensorInfo)| {
            let (start, end) = info.data_offsets;
            (name, (data + start, end - start))
        };
        whole.then(|| Self { tensors: tensors.into_iter().map(place).collect(), map: Arc::new(map) })
    }

    /// The packed slice of this name, if it is in the file.
    pub(super) fn packed(&self, name: &str, format: QuantFormat, rows: &Range<usize>, cols: &Range<usize>) -> Option<Packed> {
        let &(offset, len) = self.tensors.get(name)?;
        let packed = Packed::mapped(self.map.clone(), offset, format, rows.len(), cols.len(), cols.start).ok()?;
        (packed.bytes() == len).then_some(packed)
    }
}
