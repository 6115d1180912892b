//! [`score`]: how well a model foretells a text.

use std::ops::AddAssign;

use crate::error::Result;
use crate::model::parallel::ParallelMistral;
use crate::model::state::InferenceState;

/// Tokens whose logits are held at once, since logits are wide.
const CHUNK: usize = 256;

/// What tokens cost a model. Those of several texts add up.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct Score {
    /// Tokens scored.
    pub tokens: usize,
    /// Their negative log-likelihoods summed up: of each -ln p, where p is its probability behind all tokens before it, by a softmax of
    /// the logits at temperature 1.
    pub nats: f64,
}

impl Score {
    /// The mean of [`Self::nats`] over the tokens, the cross-entropy of the text; NaN of no tokens.
    #[must_use]
    pub fn nats_per_token(&self) -> f64 {
        self.nats / self.tokens as f64
    }

    /// e to the power of [`Self::nats_per_token`]: a model that is as unsure as among n equally likely tokens has n.
    #[must_use]
    pub fn perplexity(&self) -> f64 {
        self.nats_per_token().exp()
    }
}

impl AddAssign for Score {
    fn add_assign(&mut self, other: Self) {
        self.tokens += other.tokens;
        self.nats += other.nats;
    }
}

/// Computes `tokens` behind those of the state, in chunks, and scores each by the logits before it. The first of an empty state has none
/// and is not scored. With the numerics of [`ParallelMistral::forward`], or if `fast` those of [`ParallelMistral::fast_forward`]; the sums are f64.
///
/// ```
/// use torchless::{InferenceState, Parameters, TensorParallelConfig, TensorParallelMistral, score};
///
/// let model = TensorParallelMistral::load(Parameters::load("examples/models/tiny-stories")?, TensorParallelConfig::default())?;
/// let tokens = model.parameters().tokenizer()?.encode("Lily had a red ball.")?;
/// let score = score(&model, &mut InferenceState::new(model.config()), &tokens, false)?;
/// assert_eq!(score.tokens, tokens.len() - 1);
/// assert!(score.perplexity() < model.config().vocab_size as f64);
/// # Ok::<(), torchless::Error>(())
/// ```
///
/// # Errors
/// As [`ParallelMistral::prefill`]; the state then has the chunks before the one that failed.
pub fn score<By>(model: &ParallelMistral<By>, state: &mut InferenceState, tokens: &[u32], fast: bool) -> Result<Score> {
    let vocab = model.config().vocab_size;
    let mut score = Score::default();
    for chunk in tokens.chunks(CHUNK) {
        // After the token before each of the chunk: of the first it is in the state.
        let mut logits = state.logits().to_vec();
        let unscored = usize::from(logits.is_empty());
        logits.extend(if fast { model.fast_prefill_logits(state, chunk)? } else { model.prefill_logits(state, chunk)? });
        for (logits, &token) in logits.chunks_exact(vocab).zip(&chunk[unscored..]) {
            score += Score { tokens: 1, nats: nats(logits, token) };
        }
    }
    Ok(score)
}

/// -ln of the token's part of the softmax.
fn nats(logits: &[f32], token: u32) -> f64 {
    let most = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - most).exp()).sum();
    sum.ln() + most - f64::from(logits[token as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_costs_minus_the_logarithm_of_its_probability() {
        // Probabilities of 1/2, 1/4, 1/8 and 1/8, whatever is added to all logits.
        for shift in [-1000.0, 0.0, 1000.0] {
            let logits: Vec<f32> = [8.0f32, 4.0, 2.0, 2.0].iter().map(|p| p.ln() + shift).collect();
            for (token, bits) in [1.0, 2.0, 3.0, 3.0].into_iter().enumerate() {
                let found = nats(&logits, token as u32) / std::f64::consts::LN_2;
                assert!((found - bits).abs() < 1e-4, "token {token}, {shift}: {found} bits");
            }
        }
    }
}
