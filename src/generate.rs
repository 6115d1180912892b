//! [`generate`]: from a prompt to text, token by token.

mod course;
mod lookup;
mod run;
mod speculation;

use std::borrow::Cow;
use std::fmt;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::model::parallel::ParallelMistral;
use crate::model::state::InferenceState;
use crate::params::Parameters;
use crate::sampler::SamplerOptions;
pub(crate) use course::Course;
use run::Run;

/// What [`generate`] asks of a model, whatever its grid.
pub trait Model: Send + Sync {
    /// The model's numbers.
    fn config(&self) -> &Config;

    /// The checkpoint that it was loaded from.
    fn parameters(&self) -> &Parameters;

    /// The longest sequence that one state can hold here, in positions: the model's own limit, or less where the cache is smaller.
    fn context(&self) -> usize;

    /// Computes one token at the state's position and advances it; the logits land in the state.
    ///
    /// # Errors
    /// A token outside the vocabulary, a full context or cache, a state of another checkpoint, a lost device.
    fn try_forward(&self, state: &mut InferenceState, token: u32) -> Result<()>;

    /// [`Self::try_forward`] without its promise of bits.
    ///
    /// # Errors
    /// As [`Self::try_forward`].
    fn try_fast_forward(&self, state: &mut InferenceState, token: u32) -> Result<()>;

    /// Computes many tokens; the logits of the last land in the state.
    ///
    /// # Errors
    /// As [`Self::try_forward`], and for no tokens.
    fn prefill(&self, state: &mut InferenceState, tokens: &[u32]) -> Result<()>;

    /// [`Self::prefill`] with the numerics of [`Self::try_fast_forward`].
    ///
    /// # Errors
    /// As [`Self::prefill`].
    fn fast_prefill(&self, state: &mut InferenceState, tokens: &[u32]) -> Result<()>;

    /// Computes a token and a draft of what may follow it in one launch; answers with the logits after each: `[tokens, vocab_size]`.
    /// What is wrong of the draft is then taken back from the state.
    ///
    /// # Errors
    /// As [`Self::prefill`].
    fn forward_draft(&self, state: &mut InferenceState, tokens: &[u32]) -> Result<Vec<f32>>;

    /// [`Self::forward_draft`] with the numerics of [`Self::try_fast_forward`].
    ///
    /// # Errors
    /// As [`Self::prefill`].
    fn fast_forward_draft(&self, state: &mut InferenceState, tokens: &[u32]) -> Result<Vec<f32>>;
}

impl<By> Model for ParallelMistral<By> {
    fn config(&self) -> &Config {
        self.config()
    }
    fn parameters(&self) -> &Parameters {
        self.parameters()
    }
    fn context(&self) -> usize {
        self.context()
    }
    fn try_forward(&self, state: &mut InferenceState, token: u32) -> Result<()> {
        self.try_forward(state, token, false)
    }
    fn try_fast_forward(&self, state: &mut InferenceState, token: u32) -> Result<()> {
        self.try_fast_forward(state, token, false)
    }
    fn prefill(&self, state: &mut InferenceState, tokens: &[u32]) -> Result<()> {
        self.prefill(state, tokens)
    }
    fn fast_prefill(&self, state: &mut InferenceState, tokens: &[u32]) -> Result<()> {
        self.fast_prefill(state, tokens)
    }
    fn forward_draft(&self, state: &mut InferenceState, tokens: &[u32]) -> Result<Vec<f32>> {
        self.forward_draft(state, tokens)
    }
    fn fast_forward_draft(&self, state: &mut InferenceState, tokens: &[u32]) -> Result<Vec<f32>> {
        self.fast_forward_draft(state, tokens)
    }
}

/// What a text begins with: text, or tokens as they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt<'a> {
    /// Encoded by the model's tokenizer. At the start of a sequence its special tokens go in front.
    Text(Cow<'a, str>),
    /// Taken as they are.
    Tokens(Cow<'a, [u32]>),
}

macro_rules! prompt_from {
    ($($from:ty => $variant:ident),*) => {
        $(impl<'a> From<$from> for Prompt<'a> {
            fn from(prompt: $from) -> Self {
                Self::$variant(prompt.into())
            }
        })*
    };
}
prompt_from!(&'a str => Text, &'a String => Text, String => Text, &'a [u32] => Tokens, &'a Vec<u32> => Tokens, Vec<u32> => Tokens);

impl<'a, const N: usize> From<&'a [u32; N]> for Prompt<'a> {
    fn from(prompt: &'a [u32; N]) -> Self {
        Self::Tokens(prompt.into())
    }
}

/// How [`generate`] goes on and when it ends.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// Tokens at most.
    pub max_tokens: usize,
    /// How each is chosen.
    pub sampling: SamplerOptions,
    /// The text ends before the first of these that is complete.
    pub stop: Vec<String>,
    /// Take the model's fast forms instead of the exact ones.
    pub fast: bool,
    /// Draft at most so many tokens, 32 if more, and compute them with the one before in a single launch; 0 for none.
    ///
    /// A draft is what followed the same tokens earlier in the text, so that it pays where a text says things again: code, names,
    /// quotations, lists. Where drafts are wrong too often they become rare by themselves. In the exact forms on CPUs the text is the
    /// same to the token with and without, greedy or drawn. In the fast forms, and on GPUs, logits of several rows may differ from
    /// those of one by their rounding, so that a text may go another way where two tokens are about equally likely.
    pub speculate: usize,
}

impl Default for GenerateOptions {
    /// 256 tokens, sampled as by default, without stops, exact, without drafts.
    fn default() -> Self {
        Self { max_tokens: 256, sampling: SamplerOptions::default(), stop: Vec::new(), fast: false, speculate: 0 }
    }
}

/// One new token.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// The text that has become certain with it: all texts in order are the text. Empty while a character is unfinished or a stop may
    /// have begun.
    pub text: String,
    /// Why this is the last token, if it is.
    pub finish: Option<FinishReason>,
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FinishReason {
    /// It has as many tokens as were asked for.
    Length,
    /// The model ended it.
    Eos,
    /// It came to a stop string.
    Stop,
    /// The context is full.
    Context,
}

impl fmt::Display for FinishReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Length => "length",
            Self::Eos => "eos",
            Self::Stop => "stop",
            Self::Context => "context",
        })
    }
}

/// Generates text behind `prompt`, which goes on behind what the state holds already.
///
/// Nothing is computed before the first call of `next`, and dropping the iterator cancels the rest. An error ends it. The last
/// token is sampled but not computed: `state.tokens()` ends with the one before. A prompt of tokens runs on a model without a
/// tokenizer too, unless there are stops; all texts are then empty.
///
/// The first item is the error if the prompt is empty or cannot be encoded, or an option makes no sense; later ones are the model's.
///
/// ```
/// use torchless::{GenerateOptions, InferenceState, Parameters, TensorParallelConfig, TensorParallelMistral, generate};
///
/// let model = TensorParallelMistral::load(Parameters::load("examples/models/tiny-stories")?, TensorParallelConfig::new(2, 0))?;
/// let mut state = InferenceState::new(model.config());
/// for token in generate(&model, &mut state, "Lily had a red ball.", GenerateOptions { max_tokens: 20, ..Default::default() }) {
///     print!("{}", token?.text);
/// }
/// # Ok::<(), torchless::Error>(())
/// ```
pub fn generate<'a, 'p, M: Model + ?Sized>(
    model: &'a M,
    state: &'a mut InferenceState,
    prompt: impl Into<Prompt<'p>>,
    options: GenerateOptions,
) -> Generation<'a, M> {
    Generation(Run::new(model, state, &prompt.into(), options).map_err(Some))
}

/// The tokens of [`generate`], as they come.
#[derive(Debug)]
pub struct Generation<'a, M: ?Sized>(Result<Run<'a, M>, Option<Error>>);

impl<M: ?Sized> Generation<'_, M> {
    /// What drafts have done so far. A draft counts once it is known how much of it is right.
    #[must_use]
    pub fn counts(&self) -> DraftCounts {
        self.0.as_ref().map_or(DraftCounts::default(), Run::counts)
    }
}

/// What has become of the drafts of a [`Generation`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DraftCounts {
    /// Times that the model computed: the prompt is one, each token without a draft another, a token and its draft a third.
    pub launches: u64,
    /// Tokens drafted.
    pub drafted: u64,
    /// Those of them that came: each saved a launch.
    pub accepted: u64,
}

impl<M: Model + ?Sized> Iterator for Generation<'_, M> {
    type Item = Result<Token>;

    fn next(&mut self) -> Option<Result<Token>> {
        match &mut self.0 {
            Ok(run) => run.step(),
            Err(error) => error.take().map(Err),
        }
    }
}

#[cfg(test)]
mod tests;
