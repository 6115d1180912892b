//! The model, and how it runs over a grid.

pub(crate) mod advance;
pub(crate) mod engine;
pub(crate) mod grid;
pub(crate) mod group;
pub(crate) mod kv;
pub(crate) mod layout;
pub(crate) mod mistral;
pub(crate) mod parallel;
pub(crate) mod parallel_config;
pub(crate) mod pipeline;
pub(crate) mod planner;
pub(crate) mod rope;
pub(crate) mod round_trip;
pub(crate) mod stage;
pub(crate) mod state;
