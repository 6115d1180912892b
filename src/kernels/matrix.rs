//! [`Matrix`]: a weight, where it lies and how it is stored.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use memmap2::Mmap;

use crate::error::{Error, Result};
use crate::kernels::quant::{self, QuantFormat};

/// How the elements of a weight are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 single precision, 4 bytes.
    F32,
    /// IEEE 754 half precision, 2 bytes.
    F16,
    /// The upper half of an f32, 2 bytes.
    Bf16,
    /// Blocks of small integers with their scales, as GGUF files have them.
    Quantised(QuantFormat),
}

impl DType {
    /// Bytes of `n` elements, and of those that share their last block.
    #[must_use]
    pub fn bytes(self, n: usize) -> usize {
        match self {
            Self::F32 => 4 * n,
            Self::F16 | Self::Bf16 => 2 * n,
            Self::Quantised(format) => n.div_ceil(format.block()) * format.block_bytes(),
        }
    }

    /// Elements of a row that are stored together: 1, 32 or 256.
    #[must_use]
    pub fn block(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Quantised(format) => format.block(),
        }
    }

    /// The bytes that an element's address is a multiple of.
    fn alignment(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Quantised(_) => 1,
        }
    }

    /// The quantised format that it is, if it is one.
    pub(crate) fn quantised(self) -> Option<QuantFormat> {
        if let Self::Quantised(format) = self { Some(format) } else { None }
    }

    /// The name used in tables: `f32`, `f16`, `bf16`, or that of the quantised format.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Quantised(format) => format.name(),
        }
    }
}

/// One stored row, in the dtype it is stored in.
#[derive(Clone, Copy)]
pub(crate) enum Row<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
    Quantised(Blocks<'a>),
}

/// A quantised row: whole blocks, and the column of the first one at which the row begins.
#[derive(Clone, Copy)]
pub(crate) struct Blocks<'a> {
    pub bytes: &'a [u8],
    pub skip: usize,
}

impl<'a> Row<'a> {
    /// The elements as they are stored.
    #[cfg_attr(not(feature = "gpu"), expect(dead_code))]
    pub(crate) fn bytes(self) -> &'a [u8] {
        match self {
            Self::F32(row) => bytemuck::cast_slice(row),
            Self::F16(row) => bytemuck::cast_slice(row),
            Self::Bf16(row) => bytemuck::cast_slice(row),
            Self::Quantised(row) => row.bytes,
        }
    }

    pub(crate) fn as_ptr(self) -> *const u8 {
        match self {
            Self::F32(row) => row.as_ptr().cast(),
            Self::F16(row) => row.as_ptr().cast(),
            Self::Bf16(row) => row.as_ptr().cast(),
            Self::Quantised(row) => row.bytes.as_ptr(),
        }
    }
}

#[derive(Clone)]
enum Storage {
    Owned(Arc<Vec<f32>>),
    Mapped(Arc<Mmap>),
}

/// A weight: 2-D, row-major, `[out_features, in_features]` as in Hugging Face checkpoints.
///
/// It owns its values or borrows them from a mapped file; cloning and slicing copy nothing.
#[derive(Clone)]
pub struct Matrix {
    storage: Storage,
    dtype: DType,
    rows: usize,
    cols: usize,
    /// Elements from one row to the next in storage.
    stride: usize,
    /// Elements before the first one, from `base` bytes into the storage.
    offset: usize,
    base: usize,
    /// Rows of a head whose rotary pairs are neighbours in storage, to be given as [`Matrix::with_neighbour_pairs`] says; 0 for none.
    paired: usize,
}

impl Matrix {
    /// A matrix that owns its values, row by row.
    ///
    /// # Panics
    /// If `data.len() != rows * cols`; [`Matrix::try_from_f32`] returns that as an error.
    #[must_use]
    pub fn from_f32(rows: usize, cols: usize, data: Vec<f32>) -> Self {
        Self::try_from_f32(rows, cols, data).unwrap_or_else(|e| panic!("{e}"))
    }

    /// [`Matrix::from_f32`] without the panic.
    ///
    /// # Errors
    /// [`Error::MatrixSize`] if `data.len() != rows * cols`.
    pub fn try_from_f32(rows: usize, cols: usize, data: Vec<f32>) -> Result<Self> {
        if rows.checked_mul(cols) != Some(data.len()) {
            return Err(Error::MatrixSize { rows, cols, found: data.len() });
        }
        Ok(Self { storage: Storage::Owned(Arc::new(data)), dtype: DType::F32, rows, cols, stride: cols, offset: 0, base: 0, paired: 0 })
    }

    /// A matrix inside a mapped file: `rows * cols` elements from byte `base`.
    ///
    /// # Errors
    /// If the bytes lie outside the file, `base` is not a multiple of the element's size, or the columns are not whole blocks.
    pub(crate) fn mapped(file: Arc<Mmap>, base: usize, dtype: DType, rows: usize, cols: usize) -> Result<Self, String> {
        let block = dtype.block();
        if !cols.is_multiple_of(block) {
            return Err(format!("has {cols} columns, which are no whole blocks of {block}, as {} has them", dtype.name()));
        }
        let bytes = rows
            .checked_mul(cols / block)
            .and_then(|n| n.checked_mul(dtype.bytes(block)))
            .and_then(|n| n.checked_add(base))
            .ok_or_else(|| format!("of {rows} x {cols} elements is too large to address"))?;
        if bytes > file.len() {
            return Err(format!("ends at byte {bytes} of a file of {}", file.len()));
        }
        if !base.is_multiple_of(dtype.alignment()) {
            return Err(format!("starts at byte {base}, which is not a multiple of its element's {} bytes", dtype.alignment()));
        }
        Ok(Self { storage: Storage::Mapped(file), dtype, rows, cols, stride: cols, offset: 0, base, paired: 0 })
    }

    /// The rows of heads of `head_dim`, in Hugging Face order where the file has llama.cpp's: there a rotary pair is two neighbours, here it is
    /// elements i and i + head_dim / 2 of a head.
    ///
    /// # Panics
    /// If this is a slice, or its rows are no whole heads of an even dimension.
    pub(crate) fn with_neighbour_pairs(self, head_dim: usize) -> Self {
        assert!(self.offset == 0, "a whole matrix has heads");
        assert!(head_dim.is_multiple_of(2) && self.rows.is_multiple_of(head_dim), "{} rows of heads of {head_dim}", self.rows);
        Self { paired: head_dim, ..self }
    }

    /// Number of output features.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of input features.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the elements are stored.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes that the elements take in storage.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.rows * self.dtype.bytes(self.cols)
    }

    /// The part of the matrix at these rows and columns, sharing its storage.
    ///
    /// # Panics
    /// If a range reaches outside the matrix.
    #[must_use]
    pub fn slice(&self, rows: Range<usize>, cols: Range<usize>) -> Self {
        assert!(
            rows.start <= rows.end && rows.end <= self.rows && cols.start <= cols.end && cols.end <= self.cols,
            "slice {rows:?} x {cols:?} reaches outside a matrix of {} x {}",
            self.rows,
            self.cols
        );
        Self { offset: self.offset + rows.start * self.stride + cols.start, rows: rows.len(), cols: cols.len(), ..self.clone() }
    }

    /// Asks the system to read what of this lies in a file, from its first row to its last, before it is needed.
    pub(crate) fn will_need(&self) {
        #[cfg(unix)]
        self.advise(|file, start, len| file.advise_range(memmap2::Advice::WillNeed, start, len));
    }

    /// Tells the system that what of this lies in a file won't be needed soon: its pages need not stay in memory.
    pub(crate) fn forget(&self) {
        // SAFETY: pages of a file that is only read come back from it with the same contents.
        #[cfg(unix)]
        self.advise(|file, start, len| unsafe { file.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, len) });
    }

    /// Advice is no more than that: where the system refuses it, nothing changes.
    #[cfg(unix)]
    fn advise(&self, advise: impl FnOnce(&Mmap, usize, usize) -> std::io::Result<()>) {
        let Storage::Mapped(file) = &self.storage else { return };
        // No rows may have any number of columns, of which there is nothing to advise on.
        if self.rows == 0 || self.cols == 0 {
            return;
        }
        let (mut first, mut last) = (self.offset, self.offset + (self.rows - 1) * self.stride + self.cols);
        if self.paired > 0 {
            let head = self.stride * self.paired;
            (first, last) = (first / head * head, last.next_multiple_of(head));
        }
        let block = self.dtype.block();
        let (start, end) = (self.dtype.bytes(first / block * block), self.dtype.bytes(last));
        let _ = advise(file, self.base + start, end - start);
    }

    /// Row `r` as it is stored: `[cols]`.
    pub(crate) fn row(&self, r: usize) -> Row<'_> {
        assert!(r < self.rows, "row {r} of a matrix of {} rows", self.rows);
        let at = self.stored_at(r);
        let range = at..at + self.cols;
        let skip = at % self.dtype.block();
        let bytes = match &self.storage {
            Storage::Owned(data) => return Row::F32(&data[range]),
            Storage::Mapped(file) => &file[self.base + self.dtype.bytes(range.start - skip)..self.base + self.dtype.bytes(range.end)],
        };
        match self.dtype {
            DType::F32 => Row::F32(bytemuck::cast_slice(bytes)),
            DType::F16 => Row::F16(bytemuck::cast_slice(bytes)),
            DType::Bf16 => Row::Bf16(bytemuck::cast_slice(bytes)),
            DType::Quantised(_) => Row::Quantised(Blocks { bytes, skip }),
        }
    }

    /// The element in storage at which row `r` begins.
    fn stored_at(&self, r: usize) -> usize {
        if self.paired == 0 {
            return self.offset + r * self.stride;
        }
        let (row, col) = (self.offset / self.stride + r, self.offset % self.stride);
        let (head, i, half) = (row / self.paired, row % self.paired, self.paired / 2);
        let stored = head * self.paired + if i < half { 2 * i } else { 2 * (i - half) + 1 };
        stored * self.stride + col
    }

    /// Row `r` converted to f32, exactly: `[cols]`.
    ///
    /// # Panics
    /// If `r` or the length of `out` doesn't fit the matrix.
    pub fn row_to_f32(&self, r: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "a row of {} columns", self.cols);
        match self.row(r) {
            Row::F32(row) => out.copy_from_slice(row),
            Row::F16(row) => out.iter_mut().zip(row).for_each(|(o, v)| *o = v.to_f32()),
            Row::Bf16(row) => out.iter_mut().zip(row).for_each(|(o, v)| *o = v.to_f32()),
            Row::Quantised(Blocks { bytes, skip }) => {
                let DType::Quantised(format) = self.dtype else { unreachable!("the row is as the matrix is") };
                quant::row_to_f32(format, bytes, skip, out);
            }
        }
    }

    /// The same values in f32, in memory of its own.
    pub(crate) fn widened(&self) -> Self {
        let mut values = vec![0.0; self.rows * self.cols];
        for (r, row) in values.chunks_exact_mut(self.cols.max(1)).enumerate() {
            self.row_to_f32(r, row);
        }
        Self::from_f32(self.rows, self.cols, values)
    }
}

impl std::fmt::Debug for Matrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Matrix({} x {} {})", self.rows, self.cols, self.dtype.name())
    }
}

#[cfg(feature = "ndarray")]
impl From<ndarray::ArrayView2<'_, f32>> for Matrix {
    fn from(view: ndarray::ArrayView2<'_, f32>) -> Self {
        Self::from_f32(view.nrows(), view.ncols(), view.iter().copied().collect())
    }
}

#[cfg(all(test, feature = "ndarray"))]
mod tests {
    use super::*;

    #[test]
    fn a_transposed_view_becomes_the_transposed_matrix() {
        let array = ndarray::Array2::from_shape_vec((2, 3), vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        let matrix = Matrix::from(array.t());
        assert_eq!((matrix.rows(), matrix.cols()), (3, 2));
        let mut row = [0.0; 2];
        matrix.row_to_f32(1, &mut row);
        assert_eq!(row, [2.0, 5.0]);
    }
}
