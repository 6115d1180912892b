//! The CPU's kernels.

pub(crate) mod matrix;
