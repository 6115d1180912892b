//! [`Board`]: who waits, who is ready for a step, and what is kept of those that have ended.

use std::collections::VecDeque;

use futures::channel::mpsc::UnboundedSender;

use super::SchedulerCounts;
use crate::error::{Error, Result};
use crate::generate::{Course, Token};
use crate::model::kv::Lease;
use crate::model::state::InferenceState;

/// Prefixes kept at most; looking for one compares with all of them.
const MOST_KEPT: usize = 64;
/// Tokens of a prefix that are worth reusing at least: they cost a copy of a page.
const LEAST_REUSED: usize = 8;

/// A request, wherever it is.
pub(super) struct Request {
    /// The order of arrival.
    pub id: u64,
    pub state: InferenceState,
    /// Tokens to be computed next, behind those of the state.
    pub todo: Vec<u32>,
    /// Whether they are the prompt's, or were computed before.
    pub is_prompt: bool,
    pub course: Course,
    pub tokens: UnboundedSender<Result<Token>>,
}

impl Request {
    pub(super) fn is_cancelled(&self) -> bool {
        self.tokens.is_closed()
    }

    pub(super) fn fail(self, error: Error) {
        // Nobody need be there to hear it.
        let _ = self.tokens.unbounded_send(Err(error));
    }

    /// Gives its pages back. All is computed again when its turn comes.
    fn start_over(&mut self) {
        let behind = std::mem::take(&mut self.todo);
        self.todo = [self.state.tokens(), &behind].concat();
        self.is_prompt = true;
        self.state.reset();
    }
}

/// The tokens of an earlier request, and the pages that hold their keys and values.
pub(super) struct Kept {
    pub tokens: Vec<u32>,
    pub lease: Lease,
}

#[derive(Default)]
pub(super) struct Board {
    /// In the order of arrival.
    pub waiting: VecDeque<Request>,
    /// Admitted and in no step, in the order of their turns.
    pub ready: VecDeque<Request>,
    /// Of those, the ones that the step being put together has passed over.
    pub passed: VecDeque<Request>,
    /// Requests in steps.
    pub in_steps: usize,
    /// Requests that cannot run, and why: they hear of it when the board is free.
    pub failed: Vec<(Request, Error)>,
    /// The one used last is at the back.
    pub kept: VecDeque<Kept>,
    /// Why nothing runs any more.
    pub closed: Option<&'static str>,
    arrivals: u64,
    done: SchedulerCounts,
}

impl Board {
    pub(super) fn next_id(&mut self) -> u64 {
        self.arrivals += 1;
        self.arrivals
    }

    pub(super) fn running(&self) -> usize {
        self.ready.len() + self.passed.len() + self.in_steps
    }

    pub(super) fn counts(&self) -> SchedulerCounts {
        SchedulerCounts { waiting: self.waiting.len(), running: self.running(), kept_prefixes: self.kept.len(), ..self.done }
    }

    pub(super) fn count_reused(&mut self, tokens: usize) {
        self.done.reused_tokens += tokens as u64;
    }

    pub(super) fn count_step(&mut self, tokens: usize) {
        self.done.steps += 1;
        self.done.computed_tokens += tokens as u64;
    }

    /// Takes out a request, unless it is in a step.
    pub(super) fn cancel(&mut self, id: u64) -> Option<Request> {
        [&mut self.waiting, &mut self.ready, &mut self.passed].into_iter().find_map(|queue| {
            let at = queue.iter().position(|request| request.id == id)?;
            queue.remove(at)
        })
    }

    /// Takes out every request that is in no step.
    pub(super) fn drain(&mut self) -> Vec<Request> {
        self.waiting.drain(..).chain(self.ready.drain(..)).chain(self.passed.drain(..)).collect()
    }

    /// The youngest request younger than `id` and in no step goes back among those that wait, and its pages are free. Whether there was one.
    pub(super) fn preempt_after(&mut self, id: u64) -> bool {
        let Self { ready, passed, .. } = self;
        let Some(youngest) = ready.iter().chain(&*passed).map(|request| request.id).max().filter(|&youngest| youngest > id) else {
            return false;
        };
        let take = |queue: &mut VecDeque<Request>| {
            let at = queue.iter().position(|request| request.id == youngest);
            at.and_then(|at| queue.remove(at))
        };
        let Some(request) = take(ready).or_else(|| take(passed)) else { return false };
        self.done.preemptions += 1;
        self.wait(request);
        true
    }

    /// Puts a request where its arrival has it.
    pub(super) fn wait(&mut self, mut request: Request) {
        request.start_over();
        let at = self.waiting.partition_point(|waiting| waiting.id < request.id);
        self.waiting.insert(at, request);
    }

    /// Keeps pages for requests that begin with `tokens`.
    pub(super) fn keep(&mut self, tokens: Vec<u32>, lease: Lease) {
        let covers = |lease: &Lease, tokens: &[u32], other: &Kept| {
            tokens.starts_with(&other.tokens) && lease.seq().first_page <= other.lease.seq().first_page
        };
        self.kept.retain(|other| !covers(&lease, &tokens, other));
        self.kept.push_back(Kept { tokens, lease });
        if self.kept.len() > MOST_KEPT {
            self.kept.pop_front();
        }
    }

    /// Gives a request that has computed nothing yet what is kept of a prefix of its tokens. Answers how many that are.
    pub(super) fn reuse(&mut self, request: &mut Request, checkpoint: u64) -> usize {
        // The last token's logits are wanted, so it is computed in any case.
        let common = |kept: &Kept| kept.tokens.iter().zip(&request.todo[..request.todo.len() - 1]).take_while(|(a, b)| a == b).count();
        let best = (0..self.kept.len()).max_by_key(|&i| common(&self.kept[i]));
        let Some(best) = best else { return 0 };
        let kept = &self.kept[best];
        let n = common(kept).min(kept.lease.stored());
        if n >= LEAST_REUSED
            && let Some(lease) = kept.lease.fork(n, request.state.config.first_seen(n))
        {
            request.state.adopt(request.todo.drain(..n).collect(), lease, checkpoint);
            let kept = self.kept.remove(best);
            self.kept.extend(kept);
            return n;
        }
        0
    }
}
