//! [`SafetensorsFile`]: one mapped file, its header checked to the last byte.
//!
//! The `safetensors` crate's own `read_metadata` keeps the last of duplicate keys, lets the end of the data wrap around, doesn't
//! look at alignment and rarely names the tensor; so only its types are used, and the layout is checked here.
//! The format: <https://huggingface.co/docs/safetensors/index#format>.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

use super::by_tensor::ByTensor;
use super::mapped::MappedFile;
use crate::error::{Error, Result};
use crate::kernels::matrix::{DType, Matrix};

/// Most bytes of a header, as the format says.
const HEADER_LIMIT: u64 = 100_000_000;

/// Most dimensions of any tensor in the file.
const DIMS_LIMIT: usize = 64;

pub(super) struct SafetensorsFile {
    file: MappedFile,
    tensors: BTreeMap<String, TensorInfo>,
}

impl SafetensorsFile {
    pub(super) fn open(path: PathBuf) -> Result<Self> {
        let (file, tensors) = MappedFile::open(path, "safetensors", read_header)?;
        Ok(Self { file, tensors })
    }

    /// [`Self::open`] of what `path` is mapped to.
    #[cfg(any(fuzzing, test))]
    pub(super) fn mapped(path: PathBuf, map: memmap2::Mmap) -> Result<Self> {
        let (file, tensors) = MappedFile::of(path, map, "safetensors", read_header)?;
        Ok(Self { file, tensors })
    }

    pub(super) fn file(&self) -> &MappedFile {
        &self.file
    }

    /// Every tensor's name, in alphabetical order.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Every tensor as the header has it.
    #[cfg(any(fuzzing, test))]
    pub(super) fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A tensor that must have this shape, `[rows, cols]` or `[cols]`, in a dtype that [`Matrix`] has.
    pub(super) fn matrix(&self, name: &str, shape: &[usize]) -> Result<Matrix> {
        let info = self.tensors.get(name).ok_or_else(|| Error::tensor(name, format!("is missing from {}", self.file.path().display())))?;
        if info.shape != shape {
            return Err(Error::tensor(name, format!("has shape {:?}; the sizes of config.json make it {shape:?}", info.shape)));
        }
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::Bf16,
            other => return Err(Error::tensor(name, format!("has dtype {other}; torchless reads F32, F16 and BF16"))),
        };
        let (rows, cols) = match *shape {
            [rows, cols] => (rows, cols),
            _ => (1, shape.iter().product()),
        };
        Matrix::mapped(Arc::clone(self.file.map()), self.file.header_len() + info.data_offsets.0, dtype, rows, cols)
            .map_err(|problem| Error::tensor(name, problem))
    }
}

/// Where the data starts, and every tensor, its range known to lie in the file.
pub(crate) fn read_header(file: &[u8]) -> Result<(usize, BTreeMap<String, TensorInfo>), String> {
    let Some((len, rest)) = file.split_first_chunk::<8>() else {
        return Err(format!("it has {} bytes, and the length of its header alone takes 8", file.len()));
    };
    let len = u64::from_le_bytes(*len);
    if len > HEADER_LIMIT {
        return Err(format!("its header claims {len} bytes; the format allows {HEADER_LIMIT}"));
    }
    if len > rest.len() as u64 {
        return Err(format!("its header claims {len} bytes, and only {} follow", rest.len()));
    }
    let (header, data) = rest.split_at(len as usize);
    let ByTensor(tensors) = serde_json::from_slice(header).map_err(|e| format!("its header is damaged: {e}"))?;
    check_layout(&tensors, data.len())?;
    Ok((file.len() - data.len(), tensors))
}

/// The tensors must cover the data exactly, one behind the other, each with the bytes that its shape needs.
fn check_layout(tensors: &BTreeMap<String, TensorInfo>, data_len: usize) -> Result<(), String> {
    let mut in_order: Vec<_> = tensors.iter().collect();
    in_order.sort_by_key(|(_, info)| info.data_offsets);
    let mut covered = 0;
    for (name, info) in in_order {
        let (start, end) = info.data_offsets;
        if info.shape.len() > DIMS_LIMIT {
            return Err(format!("tensor {name:?} has {} dimensions; {DIMS_LIMIT} are the most", info.shape.len()));
        }
        let needed =
            byte_size(info).ok_or_else(|| format!("tensor {name:?} of shape {:?} has no whole number of bytes in 64 bits", info.shape))?;
        if end < start {
            return Err(format!("tensor {name:?} ends at byte {end} of the data, before its start at {start}"));
        }
        if start < covered {
            return Err(format!(
                "tensor {name:?} starts at byte {start} of the data and overlaps the one before it, which ends at {covered}"
            ));
        }
        if start > covered {
            return Err(format!("bytes {covered} to {start} of the data are a hole before tensor {name:?}"));
        }
        if end > data_len {
            return Err(format!("tensor {name:?} ends at byte {end} of the data, outside the file: it has {data_len} bytes of data"));
        }
        if end - start != needed {
            return Err(format!("tensor {name:?} has {} bytes; {} of shape {:?} needs {needed}", end - start, info.dtype, info.shape));
        }
        covered = end;
    }
    if covered != data_len {
        return Err(format!("bytes {covered} to {data_len} of the data are a hole behind the last tensor"));
    }
    Ok(())
}

/// Bytes of a tensor; `None` if they are too many to count or not whole, which types of less than a byte can bring about.
fn byte_size(info: &TensorInfo) -> Option<usize> {
    let elements = info.shape.iter().try_fold(1_usize, |n, dim| n.checked_mul(*dim))?;
    let bits = elements.checked_mul(info.dtype.bitsize())?;
    bits.is_multiple_of(8).then_some(bits / 8)
}
