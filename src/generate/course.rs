//! [`Course`]: how a text goes on behind its prompt, whoever computes the logits.

use super::{FinishReason, GenerateOptions, Prompt, Token};
use crate::error::{Error, Result};
use crate::params::Parameters;
use crate::sampler::Sampler;
use crate::tokenizer::Decoder;

/// Chooses the tokens of one text, turns them into characters, and says when it ends.
#[derive(Debug)]
pub(crate) struct Course {
    params: Parameters,
    sampler: Sampler,
    text: Option<StoppingText>,
    /// Tokens that may still come; 0 once it has ended.
    left: usize,
}

impl Course {
    /// The prompt's tokens behind those of `context`, and how the text goes on after them.
    pub(crate) fn new(params: &Parameters, context: &[u32], prompt: &Prompt<'_>, options: GenerateOptions) -> Result<(Vec<u32>, Self)> {
        if options.stop.iter().any(String::is_empty) {
            return Err(Error::Option { option: "stop", value: "\"\"".into(), right: "a stop needs at least one character" });
        }
        let sampler = Sampler::new(options.sampling)?;
        let tokenizer = params.tokenizer();
        let (tokens, tokenizer) = match prompt {
            // Even though the special tokens in front could be continued: refused rather than guessed.
            Prompt::Text(text) if text.is_empty() => return Err(Error::EmptyPrompt),
            Prompt::Text(text) => {
                let tokenizer = tokenizer?;
                let encode = if context.is_empty() { tokenizer.encode(text) } else { tokenizer.encode_continuation(text) };
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
            decoder.skip(&[context, &tokens].concat())?;
            Ok::<_, Error>(StoppingText { decoder, stops: options.stop, held: String::new() })
        });
        Ok((tokens, Self { params: params.clone(), sampler, text: text.transpose()?, left: options.max_tokens }))
    }

    pub(crate) fn left(&self) -> usize {
        self.left
    }

    /// Nothing more will come.
    pub(crate) fn end(&mut self) {
        self.left = 0;
    }

    /// Chooses the token behind `context`, after whose last come `logits`. There is no room for more than `limit` positions.
    pub(crate) fn next(&mut self, logits: &[f32], context: &[u32], limit: usize) -> Result<Token> {
        let id = self.sampler.sample(logits, context);
        self.left -= 1;
        let is_eos = self.params.generation().eos_token_id.contains(&id);
        let mut finish = match () {
            () if is_eos => Some(FinishReason::Eos),
            () if self.left == 0 => Some(FinishReason::Length),
            () if context.len() >= limit => Some(FinishReason::Context),
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

/// Text as it comes, cut before the first stop.
#[derive(Debug)]
struct StoppingText {
    decoder: Decoder,
    stops: Vec<String>,
    /// Certain text that a stop may begin in.
    held: String,
}

impl StoppingText {
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
pub(super) fn first_stop(text: &str, stops: &[String]) -> Option<usize> {
    let found = stops.iter().filter_map(|stop| text.find(stop.as_str()).map(|start| (start + stop.len(), start)));
    found.min().map(|(_, start)| start)
}

/// The length of the longest end of `text` that a stop begins with.
pub(super) fn begun_stop(text: &str, stops: &[String]) -> usize {
    let begun = |stop: &String| (1..stop.len()).rev().find(|&n| text.as_bytes().ends_with(&stop.as_bytes()[..n]));
    stops.iter().filter_map(begun).max().unwrap_or(0)
}
