//! [`GgufFile`]: one mapped file, its header checked to the last byte.
//!
//! The format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::bytes::Bytes;
use super::metadata::{Entries, Metadata};
use super::types::TensorType;
use crate::error::{Error, Result};
use crate::kernels::matrix::Matrix;
use crate::params::mapped::MappedFile;

/// What messages call this kind of file.
pub(super) const KIND: &str = "GGUF";

const MAGIC: [u8; 4] = *b"GGUF";

/// Least bytes of a tensor's description: the lengths of its name and shape, its type and offset.
const LEAST_TENSOR: usize = 8 + 4 + 4 + 8;

/// Most tensors: each takes more memory than it may take in the file.
const TENSORS_LIMIT: u64 = 1 << 16;

/// As the format says.
const NAME_LIMIT: usize = 64;
const DIMS_LIMIT: u32 = 4;

pub(super) struct GgufFile {
    file: MappedFile,
    metadata: Metadata,
    tensors: BTreeMap<String, TensorInfo>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct TensorInfo {
    kind: TensorType,
    /// The length of a row first.
    dims: Vec<usize>,
    /// From the start of the data.
    offset: usize,
    bytes: usize,
}

impl GgufFile {
    pub(super) fn open(path: PathBuf) -> Result<Self> {
        let (file, (values, tensors)) = MappedFile::open(path, KIND, read_header)?;
        let metadata = Metadata::new(file.path(), Arc::clone(file.map()), values);
        Ok(Self { file, metadata, tensors })
    }

    /// [`Self::open`] of what `path` is mapped to.
    #[cfg(any(fuzzing, test))]
    pub(super) fn mapped(path: PathBuf, map: memmap2::Mmap) -> Result<Self> {
        let (file, (values, tensors)) = MappedFile::of(path, map, KIND, read_header)?;
        let metadata = Metadata::new(file.path(), Arc::clone(file.map()), values);
        Ok(Self { file, metadata, tensors })
    }

    pub(super) fn file(&self) -> &MappedFile {
        &self.file
    }

    pub(super) fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Every tensor's name, in alphabetical order.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Rows and columns of a tensor that has no more dimensions; a vector is one row.
    pub(super) fn shape(&self, name: &str) -> Option<(usize, usize)> {
        match *self.tensors.get(name)?.dims.as_slice() {
            [cols] => Some((1, cols)),
            [cols, rows] => Some((rows, cols)),
            _ => None,
        }
    }

    /// A tensor that must have this shape, `[rows, cols]` or `[cols]`, in a type that [`Matrix`] has.
    pub(super) fn matrix(&self, name: &str, shape: &[usize]) -> Result<Matrix> {
        let info = self.tensors.get(name).ok_or_else(|| Error::tensor(name, format!("is missing from {}", self.file.path().display())))?;
        let found: Vec<usize> = info.dims.iter().rev().copied().collect();
        // Writers leave out lengths of 1 behind the others.
        if without_ones(&found) != without_ones(shape) {
            return Err(Error::tensor(name, format!("has shape {found:?}; the sizes of the metadata make it {shape:?}")));
        }
        let Some(dtype) = info.kind.dtype else {
            let problem = format!("has type {}; torchless reads {}", info.kind.name, TensorType::supported());
            return Err(Error::tensor(name, problem));
        };
        let (rows, cols) = match *shape {
            [rows, cols] => (rows, cols),
            _ => (1, shape.iter().product()),
        };
        Matrix::mapped(Arc::clone(self.file.map()), self.file.header_len() + info.offset, dtype, rows, cols)
            .map_err(|problem| Error::tensor(name, problem))
    }
}

/// A shape, rows first, without the lengths of 1 in front.
fn without_ones(shape: &[usize]) -> &[usize] {
    let ones = shape.iter().take_while(|n| **n == 1).count();
    &shape[ones..]
}

type Header = (Entries, BTreeMap<String, TensorInfo>);

/// Where the data starts, the metadata, and every tensor, its range known to lie in the file.
fn read_header(file: &[u8]) -> Result<(usize, Header), String> {
    let mut bytes = Bytes::new(file, 0);
    check_version(&mut bytes)?;
    let header = |e| format!("its header is cut short: {e}");
    let (tensor_count, key_count) = (bytes.u64().map_err(header)?, bytes.u64().map_err(header)?);
    bytes.count(tensor_count, LEAST_TENSOR, "tensors")?;
    if tensor_count > TENSORS_LIMIT {
        return Err(format!(
            "it claims {tensor_count} tensors; {TENSORS_LIMIT} are read at most, and the largest models have some thousand"
        ));
    }
    let values = Entries::read(&mut bytes, key_count)?;
    let alignment = values.alignment()?;
    let mut tensors = BTreeMap::new();
    bytes.count(tensor_count, LEAST_TENSOR, "tensors")?;
    for i in 0..tensor_count {
        let name = bytes.name(NAME_LIMIT).map_err(|e| format!("tensor {i} of {tensor_count}: {e}"))?;
        let info = read_tensor(&mut bytes, alignment).map_err(|e| format!("tensor {name:?} ({i} of {tensor_count}): {e}"))?;
        if tensors.insert(name.to_owned(), info).is_some() {
            return Err(format!("tensor {name:?} is there twice"));
        }
    }
    // Below 2^63 + 2^32, and a file is no longer than 2^63.
    let data = (bytes.at() as u64).next_multiple_of(alignment) as usize;
    check_layout(&tensors, data, file.len())?;
    Ok((data, (values, tensors)))
}

fn check_version(bytes: &mut Bytes) -> Result<(), String> {
    let start = format!("it has {} bytes, and its start alone takes 24", bytes.left());
    let magic: [u8; 4] = bytes.array().map_err(|_| start.clone())?;
    let swapped = || "it is big-endian, and only little-endian files are read".to_owned();
    if magic != MAGIC {
        let reversed = magic.iter().rev().eq(&MAGIC);
        return Err(if reversed {
            swapped()
        } else {
            format!("it begins with {:?} and not with \"GGUF\"", String::from_utf8_lossy(&magic))
        });
    }
    match bytes.u32().map_err(|_| start)? {
        2 | 3 => Ok(()),
        other if (1..=3).contains(&other.swap_bytes()) => Err(swapped()),
        other => Err(format!("it has version {other}; versions 2 and 3 are read")),
    }
}

fn read_tensor(bytes: &mut Bytes, alignment: u64) -> Result<TensorInfo, String> {
    let n = bytes.u32()?;
    if n > DIMS_LIMIT {
        return Err(format!("it has {n} dimensions; {DIMS_LIMIT} are the most"));
    }
    let shape = (0..n).map(|_| bytes.u64()).collect::<Result<Vec<_>, _>>()?;
    let id = bytes.u32()?;
    let kind = TensorType::from_id(id).ok_or_else(|| format!("it has type {id}, which is none of GGML's"))?;
    let offset = bytes.u64()?;
    if !offset.is_multiple_of(alignment) {
        return Err(format!("it starts at byte {offset} of the data, which is not a multiple of the file's alignment of {alignment}"));
    }
    let too_large = || format!("of shape {shape:?} (rows last) and type {} it is too large to address", kind.name);
    let dims = shape.iter().map(|dim| usize::try_from(*dim)).collect::<Result<Vec<_>, _>>().map_err(|_| too_large())?;
    let row = dims.first().copied().unwrap_or(1);
    if !row.is_multiple_of(kind.block) {
        return Err(format!("its rows of {row} elements are no whole blocks of {}, as {} has them", kind.block, kind.name));
    }
    let rows = dims.iter().skip(1).try_fold(1_usize, |n, dim| n.checked_mul(*dim)).ok_or_else(too_large)?;
    let size = (row / kind.block).checked_mul(rows).and_then(|blocks| blocks.checked_mul(kind.bytes)).ok_or_else(too_large)?;
    let offset = usize::try_from(offset).map_err(|_| too_large())?;
    Ok(TensorInfo { kind, dims, offset, bytes: size })
}

/// The tensors must lie in the file, and none on another. What is between them is padding.
fn check_layout(tensors: &BTreeMap<String, TensorInfo>, data: usize, file: usize) -> Result<(), String> {
    let room = file.saturating_sub(data);
    let mut in_order: Vec<_> = tensors.iter().collect();
    in_order.sort_by_key(|(_, info)| (info.offset, info.bytes));
    let mut covered = 0;
    for (name, info) in in_order {
        let end = info.offset.checked_add(info.bytes).filter(|end| *end <= room);
        let end = end.ok_or_else(|| {
            format!(
                "tensor {name:?} of {} bytes from byte {} of the data ends outside the file: it has {room} bytes of data",
                info.bytes, info.offset
            )
        })?;
        if info.offset < covered {
            return Err(format!(
                "tensor {name:?} starts at byte {} of the data and overlaps the one before it, which ends at {covered}",
                info.offset
            ));
        }
        covered = end;
    }
    Ok(())
}
