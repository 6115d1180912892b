//! [`generate`]: from a prompt to text, token by token.

use std::borrow::Cow;
use std::fmt;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::model::parallel::ParallelMistral;
use crate::model::state::InferenceState;
use crate::params::Parameters;
use crate::sampler::{Sampler, SamplerOptions};
use crate::tokenizer::Decoder;

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
}

impl Default for GenerateOptions {
    /// 256 tokens, sampled as by default, without stops, exact.
    fn default() -> Self {
        Self { max_tokens: 256, sampling: SamplerOptions::default(), stop: Vec::new(), fast: false }
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

impl<M: Model + ?Sized> Iterator for Generation<'_, M> {
    type Item = Result<Token>;

    fn next(&mut self) -> Option<Result<Token>> {
        match &mut self.0 {
            Ok(run) if run.left > 0 => Some(run.step().inspect_err(|_| run.left = 0)),
            Ok(_) => None,
            Err(error) => error.take().map(Err),
        }
    }
}

struct Run<'a, M: ?Sized> {
    model: &'a M,
    state: &'a mut InferenceState,
    sampler: Sampler,
    text: Option<StoppingText<'a>>,
    fast: bool,
    /// What the next step computes first.
    next: Next,
    /// Tokens that may still come; 0 once it has ended.
    left: usize,
}

enum Next {
    Prompt(Vec<u32>),
    Token(u32),
}

impl<'a, M: Model + ?Sized> Run<'a, M> {
    fn new(model: &'a M, state: &'a mut InferenceState, prompt: &Prompt<'_>, options: GenerateOptions) -> Result<Self> {
        if options.stop.iter().any(String::is_empty) {
            return Err(Error::Option { option: "stop", value: "\"\"".into(), right: "a stop needs at least one character" });
        }
        let sampler = Sampler::new(options.sampling)?;
        let tokenizer = model.parameters().tokenizer();
        let (tokens, tokenizer) = match prompt {
            // Even though the special tokens in front could be continued: refused rather than guessed.
            Prompt::Text(text) if text.is_empty() => return Err(Error::EmptyPrompt),
            Prompt::Text(text) => {
                let tokenizer = tokenizer?;
                let encode = if state.position() == 0 { tokenizer.encode(text) } else { tokenizer.encode_continuation(text) };
                (encode?, Some(tokenizer))
            }
            Prompt::Tokens(tokens) if options.stop.is_empty() => (tokens.to_vec(), tokenizer.ok()),
            Prompt::Tokens(tokens) => (tokens.to_vec(), Some(tokenizer?)),
        };
        if tokens.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let text = tokenizer.map(|tokenizer| {
            let mut decoder = tokenizer.decoder();
            decoder.skip(&[state.tokens(), &tokens].concat())?;
            Ok::<_, Error>(StoppingText { decoder, stops: options.stop, held: String::new() })
        });
        Ok(Self {
            text: text.transpose()?,
            model,
            state,
            sampler,
            fast: options.fast,
            next: Next::Prompt(tokens),
            left: options.max_tokens,
        })
    }

    fn step(&mut self) -> Result<Token> {
        let (model, state) = (self.model, &mut *self.state);
        match (&self.next, self.fast) {
            (Next::Prompt(tokens), false) => model.prefill(state, tokens)?,
            (Next::Prompt(tokens), true) => model.fast_prefill(state, tokens)?,
            (&Next::Token(token), false) => model.try_forward(state, token)?,
            (&Next::Token(token), true) => model.try_fast_forward(state, token)?,
        }
        let id = self.sampler.sample(state.logits(), state.tokens());
        self.next = Next::Token(id);
        self.left -= 1;
        let is_eos = model.parameters().generation().eos_token_id.contains(&id);
        let mut finish = match () {
            () if is_eos => Some(FinishReason::Eos),
            () if self.left == 0 => Some(FinishReason::Length),
            () if state.position() >= model.context() => Some(FinishReason::Context),
            () => None,
        };
        let mut text = String::new();
        if let Some(stopping) = &mut self.text {
            let stopped;
            (text, stopped) = stopping.push((!is_eos).then_some(id), finish.is_some())?;
            finish = if stopped { Some(FinishReason::Stop) } else { finish };
        }
        if finish.is_some() {
            self.left = 0;
        }
        Ok(Token { id, text, finish })
    }
}

impl<M: ?Sized> fmt::Debug for Run<'_, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Run").field("position", &self.state.position()).field("left", &self.left).finish_non_exhaustive()
    }
}

/// Text as it comes, cut before the first stop.
struct StoppingText<'a> {
    decoder: Decoder<'a>,
    stops: Vec<String>,
    /// Certain text that a stop may begin in.
    held: String,
}

impl StoppingText<'_> {
    /// Takes a token, and says which text is certain and whether a stop ends it. Nothing is held back of the last.
    fn push(&mut self, token: Option<u32>, last: bool) -> Result<(String, bool)> {
        if let Some(token) = token {
            self.held += &self.decoder.push(token)?;
        }
        if last {
            self.held += &self.decoder.flush()?;
        }
        if let Some(start) = first_stop(&self.held, &self.stops) {
            self.held.truncate(start);
            return Ok((std::mem::take(&mut self.held), true));
        }
        let keep = if last { 0 } else { begun_stop(&self.held, &self.stops) };
        Ok((self.held.drain(..self.held.len() - keep).collect(), false))
    }
}

/// Where the stop begins that is complete first: of several that end there, the longest. So the cut never depends on how the text
/// was divided into tokens.
fn first_stop(text: &str, stops: &[String]) -> Option<usize> {
    let found = stops.iter().filter_map(|stop| text.find(stop.as_str()).map(|start| (start + stop.len(), start)));
    found.min().map(|(_, start)| start)
}

/// The length of the longest end of `text` that a stop begins with.
fn begun_stop(text: &str, stops: &[String]) -> usize {
    let begun = |stop: &String| (1..stop.len()).rev().find(|&n| text.as_bytes().ends_with(&stop.as_bytes()[..n]));
    stops.iter().filter_map(begun).max().unwrap_or(0)
}

#[cfg(test)]
mod tests;
