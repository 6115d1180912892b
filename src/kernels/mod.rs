//! The CPU's kernels.

pub(crate) mod linear;
pub(crate) mod matrix;
pub(crate) mod parallel;
