//! The model, and how it runs over a grid.

pub(crate) mod parallel_config;
pub(crate) mod pipeline;
