//! Rotary angles: computed on the host for every backend, since shaders promise sine and cosine only to 2^-11.

use crate::backend::Row;
use crate::config::{Config, RopeScaling};

/// The rotary frequencies of a model.
pub(crate) struct RopeTable {
    frequencies: Vec<f32>,
}

impl RopeTable {
    /// theta^(-2i / head_dim), scaled; the exponent, the power and its reciprocal are f32 each, as transformers has them.
    pub(crate) fn new(config: &Config) -> Self {
        let power = |i: usize| {
            let exponent = (2 * i) as f32 / config.head_dim as f32;
            f64::from(config.rope_theta).powf(f64::from(exponent)) as f32
        };
        let scaled = |(i, f)| config.rope_scaling.as_ref().map_or(f, |scaling| scale(scaling, i, f));
        Self { frequencies: (0..config.head_dim / 2).map(|i| 1.0 / power(i)).enumerate().map(scaled).collect() }
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

/// Frequency `f`, the `i`-th, as it is used. The formulas, and that every operation rounds to f32, are those of transformers'
/// `modeling_rope_utils.py`: `_compute_linear_scaling_rope_parameters` and `_compute_llama3_parameters`.
fn scale(scaling: &RopeScaling, i: usize, f: f32) -> f32 {
    match scaling {
        RopeScaling::Linear { factor } => f / factor,
        RopeScaling::Divisors(divisors) => f / divisors[i],
        RopeScaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original_max_position_embeddings: original } => {
            // Torch divides a number by a tensor as the number times a reciprocal.
            let (wavelength, original) = (std::f32::consts::TAU * (1.0 / f), *original as f32);
            if wavelength < original / high {
                f
            } else if wavelength > original / low {
                f / factor
            } else {
                let smooth = (original * (1.0 / wavelength) - low) / (high - low);
                (1.0 - smooth) * f / factor + smooth * f
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::partition::tests::sizes;

    /// Frequencies of heads of 32 elements on base 10 000.
    fn frequencies(scaling: Option<RopeScaling>) -> Vec<f32> {
        RopeTable::new(&Config { head_dim: 32, rope_scaling: scaling, ..sizes(4, 4) }).frequencies
    }

    #[test]
    fn llama3_keeps_short_waves_divides_long_ones_and_goes_over_between() {
        let plain = frequencies(None);
        let scaled = frequencies(Some(RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 64,
        }));
        let ratios: Vec<f32> = plain.iter().zip(&scaled).map(|(plain, scaled)| plain / scaled).collect();
        // Waves of 6.3, 11.2, 19.9, 35.3, 62.8 and 111.7 positions; those of 16 turn 4 times, that of 64 once.
        assert_eq!(ratios[..2], [1.0; 2]);
        assert_eq!(ratios[5..], [8.0; 11]);
        for (i, wave) in [(2, 19.87), (3, 35.33), (4, 62.83)] {
            let kept = (64.0 / wave - 1.0) / 3.0;
            let expected = 1.0 / (kept + (1.0 - kept) / 8.0);
            assert!((ratios[i] - expected).abs() < 2e-3 * expected, "{i}: {} is not {expected}", ratios[i]);
        }
    }

    #[test]
    fn divisors_say_what_the_numbers_of_llama3_and_linear_say() {
        let plain = frequencies(None);
        for scaling in [
            RopeScaling::Linear { factor: 3.0 },
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position_embeddings: 64 },
        ] {
            let scaled = frequencies(Some(scaling));
            let divisors: Vec<f32> = plain.iter().zip(&scaled).map(|(plain, scaled)| plain / scaled).collect();
            let divided = frequencies(Some(RopeScaling::Divisors(divisors)));
            assert!(divided.iter().zip(&scaled).all(|(a, b)| (a / b - 1.0).abs() < 1e-6), "{divided:?} are not {scaled:?}");
        }
    }

    #[test]
    fn divisors_that_make_no_sense_are_named() {
        let problem = |divisors: Vec<f32>| RopeScaling::Divisors(divisors).problem(4);
        assert_eq!(problem(vec![1.0, 8.0]), None);
        assert!(problem(vec![1.0]).unwrap().contains("1 divisors; heads of 4 elements need 2"));
        for wrong in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            assert!(problem(vec![1.0, wrong]).unwrap().contains(&format!("divisor 1 is {wrong}")));
        }
    }
}
