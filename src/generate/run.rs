//! [`Run`]: who computes the logits that a [`Course`] goes by.

use std::fmt;

use super::speculation::Speculation;
use super::{Course, DraftCounts, GenerateOptions, Model, Prompt, Token};
use crate::error::{Error, Result};
use crate::model::state::InferenceState;

/// A text on its way.
pub(super) struct Run<'a, M: ?Sized> {
    model: &'a M,
    state: &'a mut InferenceState,
    course: Course,
    fast: bool,
    /// What comes behind the tokens that are computed.
    next: Next,
    speculation: Option<Speculation>,
    /// Of the last launch. The state ends with it until it is settled.
    draft: Draft,
    counts: DraftCounts,
}

enum Next {
    Prompt(Vec<u32>),
    Token(u32),
}

/// Tokens that were computed before it was known whether they come.
#[derive(Default)]
struct Draft {
    tokens: Vec<u32>,
    /// Those of them that have come.
    accepted: usize,
    /// After the token in front of the draft and after each of the draft: `[1 + tokens, vocab_size]`.
    logits: Vec<f32>,
}

impl Draft {
    /// Whether `token` is what it says next.
    fn accept(&mut self, token: u32) -> bool {
        let is_next = self.tokens.get(self.accepted) == Some(&token);
        self.accepted += usize::from(is_next);
        is_next
    }

    fn rejected(&self) -> usize {
        self.tokens.len() - self.accepted
    }

    /// After the last token that has come.
    fn logits(&self) -> &[f32] {
        let vocab = self.logits.len() / (self.tokens.len() + 1);
        &self.logits[self.accepted * vocab..][..vocab]
    }
}

impl<'a, M: Model + ?Sized> Run<'a, M> {
    pub(super) fn new(model: &'a M, state: &'a mut InferenceState, prompt: &Prompt<'_>, options: GenerateOptions) -> Result<Self> {
        let (fast, most) = (options.fast, options.speculate);
        let (tokens, course) = Course::new(model.parameters(), state.tokens(), prompt, options)?;
        let speculation = (most > 0).then(|| {
            let mut speculation = Speculation::new(most);
            state.tokens().iter().chain(&tokens).for_each(|&token| speculation.push(token));
            speculation
        });
        let (draft, counts) = (Draft::default(), DraftCounts::default());
        Ok(Self { model, state, course, fast, next: Next::Prompt(tokens), speculation, draft, counts })
    }

    /// The next token, unless the text has ended.
    pub(super) fn step(&mut self) -> Option<Result<Token>> {
        if self.course.left() == 0 {
            return None;
        }
        let token = self.token();
        match &token {
            Ok(Token { finish: None, .. }) => {}
            Ok(_) => self.settle(),
            Err(_) => {
                self.course.end();
                self.settle();
            }
        }
        Some(token)
    }

    fn token(&mut self) -> Result<Token> {
        let is_computed = matches!(self.next, Next::Token(token) if self.draft.accept(token));
        if !is_computed {
            self.settle();
            self.compute()?;
        }
        let tokens = &self.state.tokens()[..self.state.position() - self.draft.rejected()];
        let logits = if self.draft.tokens.is_empty() { self.state.logits() } else { self.draft.logits() };
        // The same draws from the same logits as without drafts, so the same text.
        let token = self.course.next(logits, tokens, self.model.context())?;
        if let Some(speculation) = &mut self.speculation {
            speculation.push(token.id);
        }
        self.next = Next::Token(token.id);
        Ok(token)
    }

    /// Computes what comes next, and with it what may come after.
    fn compute(&mut self) -> Result<()> {
        let draft = self.draft_next();
        let (model, state) = (self.model, &mut *self.state);
        self.counts.launches += 1;
        match (&self.next, self.fast) {
            (Next::Prompt(tokens), false) => model.prefill(state, tokens),
            (Next::Prompt(tokens), true) => model.fast_prefill(state, tokens),
            (&Next::Token(token), fast) if !draft.is_empty() => {
                let tokens = [&[token], &draft[..]].concat();
                let logits = if fast { model.fast_forward_draft(state, &tokens) } else { model.forward_draft(state, &tokens) };
                match logits {
                    Ok(logits) => self.draft = Draft { tokens: draft, accepted: 0, logits },
                    // Other states have the pages that the draft alone would need.
                    Err(Error::CacheFull { .. }) if fast => model.try_fast_forward(state, token)?,
                    Err(Error::CacheFull { .. }) => model.try_forward(state, token)?,
                    Err(error) => return Err(error),
                }
                Ok(())
            }
            (&Next::Token(token), false) => model.try_forward(state, token),
            (&Next::Token(token), true) => model.try_fast_forward(state, token),
        }
    }

    /// What may come after the next token, as far as it can be of use.
    fn draft_next(&mut self) -> Vec<u32> {
        let (Next::Token(_), Some(speculation)) = (&self.next, &mut self.speculation) else { return Vec::new() };
        let positions = self.model.context().saturating_sub(self.state.position() + 1);
        let mut draft = speculation.draft(positions.min(self.course.left() - 1));
        // Nothing comes after the end, and the end itself is not computed.
        let ends = &self.model.parameters().generation().eos_token_id;
        draft.truncate(draft.iter().position(|token| ends.contains(token)).unwrap_or(usize::MAX));
        draft
    }
}

impl<M: ?Sized> Run<'_, M> {
    pub(super) fn counts(&self) -> DraftCounts {
        self.counts
    }

    /// Takes back what has not come of the draft: the state is then as it would be without.
    fn settle(&mut self) {
        let draft = std::mem::take(&mut self.draft);
        if draft.tokens.is_empty() {
            return;
        }
        self.state.settle(self.state.position() - draft.rejected(), draft.logits());
        self.counts.drafted += draft.tokens.len() as u64;
        self.counts.accepted += draft.accepted as u64;
        if let Some(speculation) = &mut self.speculation {
            speculation.judge(draft.tokens.len(), draft.accepted);
        }
    }
}

impl<M: ?Sized> Drop for Run<'_, M> {
    fn drop(&mut self) {
        self.settle();
    }
}

impl<M: ?Sized> fmt::Debug for Run<'_, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let position = self.state.position() - self.draft.rejected();
        f.debug_struct("Run").field("position", &position).field("left", &self.course.left()).finish_non_exhaustive()
    }
}
