//! The types of GGUF's tensors.

use crate::kernels::matrix::DType;
use crate::kernels::quant::QuantFormat;

/// How a tensor's elements are stored: blocks of so many elements of a row in so many bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TensorType {
    id: u32,
    pub name: &'static str,
    pub block: usize,
    pub bytes: usize,
    /// `None` where torchless doesn't compute with it.
    pub dtype: Option<DType>,
}

impl TensorType {
    /// The type that GGML numbers so. Numbers that it took back, and those above the last, are none.
    pub(super) fn from_id(id: u32) -> Option<Self> {
        TYPES.iter().copied().find(|known| known.id == id)
    }

    /// The names of the types that torchless reads.
    pub(super) fn supported() -> String {
        let names: Vec<_> = TYPES.iter().filter(|known| known.dtype.is_some()).map(|known| known.name).collect();
        names.join(", ")
    }
}

const fn known(id: u32, name: &'static str, block: usize, bytes: usize) -> TensorType {
    TensorType { id, name, block, bytes, dtype: None }
}

const fn plain(id: u32, name: &'static str, bytes: usize, dtype: DType) -> TensorType {
    TensorType { id, name, block: 1, bytes, dtype: Some(dtype) }
}

const fn quantised(id: u32, name: &'static str, block: usize, bytes: usize, format: QuantFormat) -> TensorType {
    TensorType { id, name, block, bytes, dtype: Some(DType::Quantised(format)) }
}

/// GGML's numbers: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, and `GGML_QUANT_SIZES` of the `gguf` package.
const TYPES: &[TensorType] = &[
    plain(0, "F32", 4, DType::F32),
    plain(1, "F16", 2, DType::F16),
    plain(30, "BF16", 2, DType::Bf16),
    quantised(8, "Q8_0", 32, 34, QuantFormat::Q8_0),
    quantised(2, "Q4_0", 32, 18, QuantFormat::Q4_0),
    quantised(3, "Q4_1", 32, 20, QuantFormat::Q4_1),
    quantised(6, "Q5_0", 32, 22, QuantFormat::Q5_0),
    quantised(7, "Q5_1", 32, 24, QuantFormat::Q5_1),
    quantised(20, "IQ4_NL", 32, 18, QuantFormat::Iq4Nl),
    quantised(12, "Q4_K", 256, 144, QuantFormat::Q4K),
    quantised(13, "Q5_K", 256, 176, QuantFormat::Q5K),
    quantised(14, "Q6_K", 256, 210, QuantFormat::Q6K),
    known(9, "Q8_1", 32, 40),
    known(10, "Q2_K", 256, 84),
    known(11, "Q3_K", 256, 110),
    known(15, "Q8_K", 256, 292),
    known(16, "IQ2_XXS", 256, 66),
    known(17, "IQ2_XS", 256, 74),
    known(18, "IQ3_XXS", 256, 98),
    known(19, "IQ1_S", 256, 50),
    known(21, "IQ3_S", 256, 110),
    known(22, "IQ2_S", 256, 82),
    known(23, "IQ4_XS", 256, 136),
    known(24, "I8", 1, 1),
    known(25, "I16", 1, 2),
    known(26, "I32", 1, 4),
    known(27, "I64", 1, 8),
    known(28, "F64", 1, 8),
    known(29, "IQ1_M", 256, 56),
    known(34, "TQ1_0", 256, 54),
    known(35, "TQ2_0", 256, 66),
    known(39, "MXFP4", 32, 17),
    known(40, "NVFP4", 64, 36),
    known(41, "Q1_0", 128, 18),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_that_are_read_have_the_blocks_of_their_matrices() {
        for known in TYPES {
            let Some(dtype) = known.dtype else { continue };
            assert_eq!((known.block, known.bytes), (dtype.block(), dtype.bytes(known.block)), "{}", known.name);
        }
    }

    #[test]
    fn no_number_stands_for_two_types() {
        for known in TYPES {
            assert_eq!(TensorType::from_id(known.id), Some(*known));
        }
    }
}
