//! Rotary angles: computed on the host for every backend, since shaders promise sine and cosine only to 2^-11.

use crate::backend::Row;
use crate::config::Config;

/// The rotary frequencies of a model.
pub(crate) struct RopeTable {
    frequencies: Vec<f32>,
}

impl RopeTable {
    /// theta^(-2i / head_dim); the exponent, the power and its reciprocal are f32 each, as transformers has them.
    pub(crate) fn new(config: &Config) -> Self {
        let power = |i: usize| {
            let exponent = (2 * i) as f32 / config.head_dim as f32;
            f64::from(config.rope_theta).powf(f64::from(exponent)) as f32
        };
        Self { frequencies: (0..config.head_dim / 2).map(|i| 1.0 / power(i)).collect() }
    }

    /// `[rows, 2, head_dim / 2]`: of each row the cosines, then the sines. The angle itself is an f32.
    pub(crate) fn angles(&self, rows: &[Row]) -> Vec<f32> {
        let mut out = Vec::with_capacity(rows.len() * 2 * self.frequencies.len());
        for row in rows {
            let angles = || self.frequencies.iter().map(|f| f64::from(row.pos as f32 * f));
            out.extend(angles().map(|a| a.cos() as f32));
            out.extend(angles().map(|a| a.sin() as f32));
        }
        out
    }
}
