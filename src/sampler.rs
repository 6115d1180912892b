//! [`Sampler`]: from logits to the next token.

use std::cmp::Ordering;
use std::hash::{BuildHasher, RandomState};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::error::{Error, Result};

/// How a token is chosen. Every field at [`SamplerOptions::default`] leaves its filter out, but for the temperature of 0.8.
///
/// The order is that of Hugging Face transformers: repetition penalty, temperature, top-k, top-p, min-p, then a draw from what is left.
/// (llama.cpp's default differs in that its temperature comes last, so that its top-p sees the model's own distribution.)
#[derive(Debug, Clone, PartialEq)]
pub struct SamplerOptions {
    /// Logits are divided by it. At 0 the likeliest token is taken, the lowest id of equals, and only the penalty applies.
    pub temperature: f32,
    /// Only the `top_k` likeliest tokens stay, the lower ids of equals; 0 for all.
    pub top_k: usize,
    /// Only the likeliest tokens stay whose probabilities together first reach `top_p`, at least one; 1 for all.
    pub top_p: f32,
    /// Only tokens at least `min_p` times as likely as the likeliest stay; 0 for all.
    pub min_p: f32,
    /// The logit of every token in the context is divided by it if positive, else multiplied (CTRL, Keskar et al. 2019); 1 for none.
    pub repetition_penalty: f32,
    /// The same seed draws the same tokens from the same logits, on every platform; without, each [`Sampler`] makes its own.
    pub seed: Option<u64>,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        Self { temperature: 0.8, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: None }
    }
}

impl SamplerOptions {
    /// Always the likeliest token.
    #[must_use]
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    fn validate(&self) -> Result<()> {
        let zero_to_one = |x: f32| (0.0..=1.0).contains(&x);
        let checks = [
            ("temperature", self.temperature, self.temperature >= 0.0, "it must be a finite number of at least 0"),
            ("top_p", self.top_p, zero_to_one(self.top_p), "it must be from 0 to 1"),
            ("min_p", self.min_p, zero_to_one(self.min_p), "it must be from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0.0, "it must be a finite number above 0"),
        ];
        match checks.into_iter().find(|(_, value, right, _)| !value.is_finite() || !right) {
            Some((option, value, _, right)) => Err(Error::Option { option, value: value.to_string(), right }),
            None => Ok(()),
        }
    }
}

/// Chooses tokens by [`SamplerOptions`]. Each draw moves its random numbers on.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplerOptions,
    seed: u64,
    rng: ChaCha8Rng,
    candidates: Vec<Candidate>,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    token: u32,
    logit: f32,
    /// Its probability over that of the likeliest token, 0 to 1.
    weight: f64,
}

impl Sampler {
    /// A sampler at the start of its random numbers.
    ///
    /// # Errors
    /// [`Error::Option`] for a value that makes no sense.
    pub fn new(options: SamplerOptions) -> Result<Self> {
        options.validate()?;
        // The standard library's hash keys are the system's randomness. 32 bits are enough to differ, and easy to retype.
        let seed = options.seed.unwrap_or_else(|| RandomState::new().hash_one(0) >> 32);
        Ok(Self { options, seed, rng: ChaCha8Rng::seed_from_u64(seed), candidates: Vec::new() })
    }

    /// The seed in use: given in the options, or made.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The next token, given one logit for every token of the vocabulary and the tokens so far, which the repetition penalty looks at.
    ///
    /// A NaN is never chosen, and infinity always is. If no logit is above minus infinity the answer is token 0.
    pub fn sample(&mut self, logits: &[f32], context: &[u32]) -> u32 {
        self.candidates.clear();
        self.candidates.extend((0..).zip(logits).map(|(token, &logit)| Candidate { token, logit, weight: 0.0 }));
        self.penalise(context);
        self.candidates.retain(|c| c.logit > f32::NEG_INFINITY);
        let Some(&best) = self.candidates.iter().min_by(|a, b| likelier_first(a, b)) else { return 0 };
        if self.options.temperature == 0.0 || best.logit == f32::INFINITY {
            return best.token;
        }
        if self.options.top_k > 0 {
            keep_first(&mut self.candidates, self.options.top_k);
        }
        for c in &mut self.candidates {
            c.weight = ((f64::from(c.logit) - f64::from(best.logit)) / f64::from(self.options.temperature)).exp();
        }
        if self.options.top_p < 1.0 {
            let all: f64 = self.candidates.iter().map(|c| c.weight).sum();
            keep_mass(&mut self.candidates, f64::from(self.options.top_p) * all);
        }
        self.candidates.retain(|c| c.weight >= f64::from(self.options.min_p));
        self.draw()
    }

    fn penalise(&mut self, context: &[u32]) {
        let penalty = self.options.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        let mut seen = vec![false; self.candidates.len()];
        for &token in context {
            let Some(seen) = seen.get_mut(token as usize) else { continue };
            if !std::mem::replace(seen, true) {
                let logit = &mut self.candidates[token as usize].logit;
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }

    fn draw(&mut self) -> u32 {
        let all: f64 = self.candidates.iter().map(|c| c.weight).sum();
        // 53 bits: every f64 from 0 to 1 in equal steps, 1 left out.
        let mut left = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * all;
        for c in &self.candidates {
            if left < c.weight {
                return c.token;
            }
            left -= c.weight;
        }
        // Rounding may leave a last crumb.
        self.candidates.iter().rfind(|c| c.weight > 0.0).map_or(0, |c| c.token)
    }
}

/// By falling logit, then by rising id: a total order, so that what is kept and drawn never depends on how it was sorted.
fn likelier_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.token.cmp(&b.token))
}

/// Keeps the `n` likeliest, likeliest first, without sorting the rest.
fn keep_first(candidates: &mut Vec<Candidate>, n: usize) {
    if n < candidates.len() {
        candidates.select_nth_unstable_by(n - 1, likelier_first);
        candidates.truncate(n);
    }
    candidates.sort_unstable_by(likelier_first);
}

/// Keeps the likeliest whose weights first reach `mass`, likeliest first. Most distributions need a few hundred of a large vocabulary,
/// so the front is sorted in parts that grow until they are enough.
fn keep_mass(candidates: &mut Vec<Candidate>, mass: f64) {
    let (mut sorted, mut part, mut sum) = (0, 256, 0.0);
    while sorted < candidates.len() {
        let end = (sorted + part).min(candidates.len());
        let rest = &mut candidates[sorted..];
        if end - sorted < rest.len() {
            rest.select_nth_unstable_by(end - sorted - 1, likelier_first);
        }
        rest[..end - sorted].sort_unstable_by(likelier_first);
        for i in sorted..end {
            sum += candidates[i].weight;
            if sum >= mass {
                candidates.truncate(i + 1);
                return;
            }
        }
        (sorted, part) = (end, part * 4);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(options: SamplerOptions) -> Sampler {
        Sampler::new(SamplerOptions { seed: Some(options.seed.unwrap_or(7)), ..options }).unwrap()
    }

    fn plain() -> SamplerOptions {
        SamplerOptions { temperature: 1.0, ..SamplerOptions::default() }
    }

    /// How often each token is drawn, of `n`.
    fn frequencies(options: SamplerOptions, logits: &[f32], context: &[u32], n: usize) -> Vec<f64> {
        let mut sampler = sampler(options);
        let mut counts = vec![0.0; logits.len()];
        for _ in 0..n {
            counts[sampler.sample(logits, context) as usize] += 1.0 / n as f64;
        }
        counts
    }

    fn softmax(logits: &[f32], temperature: f64) -> Vec<f64> {
        let weights: Vec<f64> = logits.iter().map(|&l| (f64::from(l) / temperature).exp()).collect();
        let all: f64 = weights.iter().sum();
        weights.iter().map(|w| w / all).collect()
    }

    /// Logits of the given probabilities.
    fn logits(probabilities: &[f32]) -> Vec<f32> {
        probabilities.iter().map(|p| p.ln() + 3.0).collect()
    }

    /// The tokens that can be drawn.
    fn support(options: SamplerOptions, logits: &[f32]) -> Vec<usize> {
        let drawn = frequencies(options, logits, &[], 4000);
        (0..drawn.len()).filter(|&token| drawn[token] > 0.0).collect()
    }

    #[test]
    fn draws_follow_the_softmax_at_any_temperature() {
        let logits = [1.0, -0.5, 0.3, 2.0, -1.0, 0.0];
        for temperature in [0.3, 1.0, 2.5] {
            let drawn = frequencies(SamplerOptions { temperature, ..plain() }, &logits, &[], 40_000);
            for (token, (drawn, wanted)) in drawn.iter().zip(softmax(&logits, f64::from(temperature))).enumerate() {
                // Five standard deviations of 40,000 draws are at most 0.0125.
                assert!((drawn - wanted).abs() < 0.0125, "token {token} at {temperature}: {drawn} for {wanted}");
            }
        }
    }

    #[test]
    fn greedy_takes_the_likeliest_and_the_lowest_id_of_equals() {
        let mut greedy = sampler(SamplerOptions::greedy());
        for (logits, wanted) in [
            (&[1.0, 3.0, 3.0, 2.0][..], 1),
            (&[f32::NAN, -5.0, f32::NAN, -4.0], 3),
            (&[f32::NEG_INFINITY, f32::NEG_INFINITY, -1e30], 2),
            (&[0.0, f32::INFINITY, f32::INFINITY], 1),
            (&[-0.0, 0.0], 0),
            (&[f32::NAN], 0),
            (&[], 0),
        ] {
            assert_eq!(greedy.sample(logits, &[]), wanted, "{logits:?}");
        }
    }

    #[test]
    fn drawing_bears_what_is_no_number() {
        let odd = [f32::NAN, 0.0, f32::NEG_INFINITY, 0.0, f32::NAN];
        assert_eq!(support(plain(), &odd), [1, 3]);
        assert_eq!(support(SamplerOptions { top_k: 1, top_p: 0.5, min_p: 0.5, ..plain() }, &odd), [1]);
        assert_eq!(support(plain(), &[0.0, f32::INFINITY, 5.0]), [1]);
        assert_eq!(sampler(plain()).sample(&[], &[]), 0);
        assert_eq!(sampler(plain()).sample(&[f32::NAN; 3], &[]), 0);
    }

    #[test]
    fn the_coldest_temperature_is_greedy() {
        let cold = SamplerOptions { temperature: f32::MIN_POSITIVE, ..plain() };
        assert_eq!(support(cold, &[1.0, 1.001, -3.0]), [1]);
    }

    #[test]
    fn top_k_keeps_the_likeliest_and_the_lower_ids_of_equals() {
        let logits = logits(&[0.1, 0.3, 0.2, 0.1, 0.2, 0.1]);
        for (top_k, wanted) in
            [(1, &[1][..]), (2, &[1, 2]), (3, &[1, 2, 4]), (4, &[0, 1, 2, 4]), (0, &[0, 1, 2, 3, 4, 5]), (99, &[0, 1, 2, 3, 4, 5])]
        {
            assert_eq!(support(SamplerOptions { top_k, ..plain() }, &logits), wanted, "top_k {top_k}");
        }
    }

    #[test]
    fn top_p_keeps_the_fewest_that_reach_it() {
        let logits = logits(&[0.05, 0.5, 0.15, 0.3]);
        for (top_p, wanted) in [
            (0.0, &[1][..]),
            (0.49, &[1]),
            (0.51, &[1, 3]),
            (0.79, &[1, 3]),
            (0.81, &[1, 2, 3]),
            (0.96, &[0, 1, 2, 3]),
            (1.0, &[0, 1, 2, 3]),
        ] {
            assert_eq!(support(SamplerOptions { top_p, ..plain() }, &logits), wanted, "top_p {top_p}");
        }
    }

    #[test]
    fn min_p_is_a_fraction_of_the_likeliest() {
        let logits = logits(&[0.05, 0.5, 0.15, 0.3]);
        for (min_p, wanted) in [(0.0, &[0, 1, 2, 3][..]), (0.09, &[0, 1, 2, 3]), (0.11, &[1, 2, 3]), (0.31, &[1, 3]), (1.0, &[1])] {
            assert_eq!(support(SamplerOptions { min_p, ..plain() }, &logits), wanted, "min_p {min_p}");
        }
    }

    #[test]
    fn filters_apply_in_the_order_of_transformers() {
        // After top-k the two left have 0.625 and 0.375 of the mass; of the whole, 0.5 would not reach 0.6.
        let logits = logits(&[0.5, 0.3, 0.2]);
        assert_eq!(support(SamplerOptions { top_k: 2, top_p: 0.6, ..plain() }, &logits), [0]);
        assert_eq!(support(SamplerOptions { top_p: 0.6, ..plain() }, &logits), [0, 1]);
        // At temperature 0.5 the first has 0.66 of the mass: temperature comes before top-p.
        assert_eq!(support(SamplerOptions { top_p: 0.6, temperature: 0.5, ..plain() }, &logits), [0]);
        // Squared, 0.3 / 0.5 is 0.36: temperature comes before min-p.
        assert_eq!(support(SamplerOptions { min_p: 0.5, temperature: 0.5, ..plain() }, &logits), [0]);
        assert_eq!(support(SamplerOptions { min_p: 0.5, ..plain() }, &logits), [0, 1]);
    }

    #[test]
    fn the_penalty_counts_a_token_once_and_pushes_both_signs_down() {
        let logits = [2.0, 2.0, -1.0, -1.0];
        let drawn = frequencies(SamplerOptions { repetition_penalty: 2.0, ..plain() }, &logits, &[0, 2, 0, 0, 2, 999], 40_000);
        for (drawn, wanted) in drawn.iter().zip(softmax(&[1.0, 2.0, -2.0, -1.0], 1.0)) {
            assert!((drawn - wanted).abs() < 0.0125, "{drawn} for {wanted}");
        }
        let mut greedy = sampler(SamplerOptions { repetition_penalty: 1.5, ..SamplerOptions::greedy() });
        assert_eq!(greedy.sample(&[2.0, 1.9], &[0]), 1);
    }

    #[test]
    fn a_large_vocabulary_is_filtered_as_a_full_sort_would() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let logits: Vec<f32> = (0..5000).map(|_| (rng.next_u32() % 4000) as f32 / 500.0).collect();
        let all: Vec<Candidate> =
            (0..).zip(&logits).map(|(token, &logit)| Candidate { token, logit, weight: f64::from(logit).exp() }).collect();
        let mut sorted = all.clone();
        sorted.sort_by(likelier_first);
        let tokens = |c: &[Candidate]| c.iter().map(|c| c.token).collect::<Vec<_>>();
        let total: f64 = all.iter().map(|c| c.weight).sum();
        for share in [0.01, 0.3, 0.9, 0.999] {
            let mut sum = 0.0;
            let wanted = 1 + sorted
                .iter()
                .position(|c| {
                    sum += c.weight;
                    sum >= share * total
                })
                .unwrap();
            let mut kept = all.clone();
            keep_mass(&mut kept, share * total);
            assert_eq!(tokens(&kept), tokens(&sorted[..wanted]), "a share of {share}");
        }
        for n in [1, 40, 4999, 5000, 9000] {
            let mut kept = all.clone();
            keep_first(&mut kept, n);
            assert_eq!(tokens(&kept), tokens(&sorted[..n.min(5000)]), "the first {n}");
        }
    }

    #[test]
    fn a_seed_draws_the_same_tokens_everywhere() {
        let logits: Vec<f32> = (0..100).map(|i| ((i * 37) % 100) as f32 / 25.0).collect();
        let draw = |seed| {
            let mut sampler = Sampler::new(SamplerOptions { seed, top_p: 0.95, ..plain() }).unwrap();
            let tokens: Vec<u32> = (0..12).map(|_| sampler.sample(&logits, &[])).collect();
            (sampler.seed(), tokens)
        };
        assert_eq!(draw(Some(42)), (42, vec![2, 85, 51, 21, 16, 8, 43, 45, 64, 89, 59, 69]));
        let (seed, tokens) = draw(None);
        assert_eq!(draw(Some(seed)), (seed, tokens.clone()));
        assert_ne!(draw(None).1, tokens);
    }

    #[test]
    fn values_that_make_no_sense_are_refused_by_name() {
        for (options, name) in [
            (SamplerOptions { temperature: -0.1, ..plain() }, "temperature"),
            (SamplerOptions { temperature: f32::NAN, ..plain() }, "temperature"),
            (SamplerOptions { temperature: f32::INFINITY, ..plain() }, "temperature"),
            (SamplerOptions { top_p: 1.1, ..plain() }, "top_p"),
            (SamplerOptions { top_p: f32::NAN, ..plain() }, "top_p"),
            (SamplerOptions { min_p: -0.1, ..plain() }, "min_p"),
            (SamplerOptions { repetition_penalty: 0.0, ..plain() }, "repetition_penalty"),
            (SamplerOptions { repetition_penalty: f32::INFINITY, ..plain() }, "repetition_penalty"),
        ] {
            let error = Sampler::new(options).expect_err(name);
            assert!(matches!(error, Error::Option { option, .. } if option == name), "{error}");
        }
    }
}
