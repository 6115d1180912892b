//! The rotary positions of a config: their base, and how their frequencies are scaled.

use super::{Keys, keys, unsupported};
use crate::error::Result;

/// How rotary frequencies are changed so that positions reach beyond the length that a model was first trained on.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Every frequency is divided by `factor`.
    Linear { factor: f32 },
    /// As Llama 3.1 and later: frequencies that turn less than `low_freq_factor` times within `original_max_position_embeddings` positions
    /// are divided by `factor`, those that turn more than `high_freq_factor` times stay, and between them one goes over into the other.
    Llama3 { factor: f32, low_freq_factor: f32, high_freq_factor: f32, original_max_position_embeddings: usize },
    /// A divisor for each of the `head_dim / 2` frequencies, as GGUF files carry them (`rope_freqs.weight`).
    Divisors(Vec<f32>),
}

impl RopeScaling {
    /// What is wrong with it for heads of `head_dim` elements.
    pub(crate) fn problem(&self, head_dim: usize) -> Option<String> {
        let positive = |x: f32| x.is_finite() && x > 0.0;
        match self {
            Self::Linear { factor } => (!positive(*factor)).then(|| format!("factor is {factor}; a finite positive number is needed")),
            Self::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original_max_position_embeddings: original } => {
                if let Some(wrong) = [*factor, *low, *high].into_iter().find(|&x| !positive(x)) {
                    return Some(format!("one of its factors is {wrong}; finite positive numbers are needed"));
                }
                if low >= high {
                    return Some(format!("low_freq_factor is {low}; it must be less than high_freq_factor, which is {high}"));
                }
                (*original == 0).then(|| "original_max_position_embeddings is 0; at least 1 is needed".into())
            }
            Self::Divisors(divisors) => {
                if divisors.len() != head_dim / 2 {
                    return Some(format!("it has {} divisors; heads of {head_dim} elements need {}", divisors.len(), head_dim / 2));
                }
                let wrong = divisors.iter().position(|&x| !positive(x))?;
                Some(format!("divisor {wrong} is {}; a finite positive number is needed", divisors[wrong]))
            }
        }
    }
}

/// The base of the frequencies, and their scaling.
///
/// Transformers 5 writes both into `rope_parameters`; before, `rope_theta`, which may be left out, and `rope_scaling` stood side by side.
pub(super) fn read(keys: &Keys<'_>) -> Result<(f32, Option<RopeScaling>)> {
    whole(keys, "partial_rotary_factor")?;
    let mut theta = keys.positive("rope_theta")?;
    let mut scaling = None;
    if let Some(rope) = keys.object("rope_parameters", "rope_parameters.")? {
        whole(&rope, "rope_parameters.partial_rotary_factor")?;
        theta = rope.positive("rope_theta")?.or(theta);
        if theta.is_none() {
            return Err(rope.wrong("rope_theta", "it has no default"));
        }
        scaling = Some(kind(&rope, "rope_parameters.rope_type", Some("default"))?);
    }
    if let Some(rope) = keys.object("rope_scaling", "rope_scaling.")? {
        let older = kind(&rope, "rope_scaling.rope_type", None)?;
        if scaling.as_ref().is_some_and(|newer| *newer != older) {
            return Err(keys.wrong("rope_scaling", "rope_parameters say something else"));
        }
        scaling = Some(older);
    }
    Ok((theta.unwrap_or(10_000.0), scaling.flatten()))
}

fn whole(rope: &Keys<'_>, name: &'static str) -> Result<()> {
    match rope.get("partial_rotary_factor").filter(|part| part.as_f64() != Some(1.0)) {
        Some(part) => Err(unsupported(name, keys::shown(part), "heads that rotate whole")),
        None => Ok(()),
    }
}

/// The scaling that an object names under `rope_type`, or, as older files have it, `type`. `name`: of the key, for messages.
fn kind(rope: &Keys<'_>, name: &'static str, default: Option<&str>) -> Result<Option<RopeScaling>> {
    let named = match rope.text("rope_type")? {
        Some(named) => Some(named),
        None => rope.text("type")?,
    };
    let number = |key| rope.positive(key)?.ok_or_else(|| rope.wrong(key, "it has no default"));
    match named.or(default) {
        Some("default") => Ok(None),
        Some("linear") => Ok(Some(RopeScaling::Linear { factor: number("factor")? })),
        Some("llama3") => Ok(Some(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_position_embeddings: rope.required_size("original_max_position_embeddings")?,
        })),
        Some(other) => Err(unsupported(name, other, "\"default\", \"linear\" and \"llama3\"")),
        None => Err(rope.wrong("rope_type", "it has no default")),
    }
}
