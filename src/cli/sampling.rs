//! How the verbs that write text choose its tokens.

use torchless::{GenerateOptions, Sampler, SamplerOptions};

use super::Outcome;

#[derive(clap::Args)]
pub struct SamplingArgs {
    /// How freely tokens are drawn; 0 always takes the likeliest
    #[arg(long, value_name = "T", default_value_t = 0.8, allow_negative_numbers = true)]
    temperature: f32,

    /// Draw from the K likeliest tokens only; 0 for all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,

    /// Draw only from the likeliest tokens that together reach this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f32,

    /// Leave out tokens less than this many times as likely as the likeliest
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true)]
    min_p: f32,

    /// Make tokens that are there already less likely; 1 for none
    #[arg(long, value_name = "R", default_value_t = 1.0, allow_negative_numbers = true)]
    repetition_penalty: f32,

    /// Repeat an earlier run's draws; by default a new seed, which is printed to stderr
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// End before this text; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,

    /// Draft up to K tokens from what followed the same tokens earlier, and compute them in one launch; 7 without a number, 0 for none.
    /// Pays where a text says things again. With --exact the text is the same
    #[arg(long, value_name = "K", num_args = 0..=1, default_value = "0", default_missing_value = "7", value_parser = clap::value_parser!(u8).range(0..=32))]
    speculate: u8,
}

impl SamplingArgs {
    /// The seed that was given, or a new one; fails on options that make no sense.
    pub fn seed(&self) -> Outcome<u64> {
        Ok(Sampler::new(self.options(self.seed))?.seed())
    }

    /// Whether the seed is new and matters, so that somebody may want to know it.
    pub fn is_seed_news(&self) -> bool {
        self.seed.is_none() && !self.is_greedy()
    }

    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// All of it for a text of at most `max_tokens`.
    pub fn generate(&self, seed: u64, max_tokens: usize, fast: bool) -> GenerateOptions {
        let (sampling, speculate) = (self.options(Some(seed)), usize::from(self.speculate));
        GenerateOptions { max_tokens, sampling, stop: self.stop.clone(), fast, speculate }
    }

    fn options(&self, seed: Option<u64>) -> SamplerOptions {
        SamplerOptions {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed,
        }
    }
}
