//! A lane: puts a step together, computes it, hands out its tokens, and so on. There are as many as stages.

use super::Hub;
use super::board::{Board, Request};
use crate::error::{Error, Result};
use crate::generate::Token;
use crate::model::advance::{How, Want};
use crate::model::kv::Lease;

/// Rows of a micro-batch of a step, about: thinner ones would read the weights too often.
const MICRO_ROWS: usize = 32;

/// A request in a step, and how many of its tokens are computed.
struct Turn {
    request: Request,
    tokens: usize,
}

pub(super) fn run(hub: &Hub) {
    let _end = End(hub);
    while let Some(mut turns) = hub.next_step() {
        let outcome = hub.compute(&mut turns);
        hub.hand_out(turns, outcome);
    }
}

/// A lane that ends, even by a panic, leaves nobody waiting for ever.
struct End<'a>(&'a Hub);

impl Drop for End<'_> {
    fn drop(&mut self) {
        let mut board = self.0.board();
        let why = *board.closed.get_or_insert("a thread of the scheduler panicked");
        let left = board.drain();
        drop(board);
        self.0.changed.notify_all();
        left.into_iter().for_each(|request| request.fail(Error::Request(why.into())));
    }
}

impl Hub {
    /// The next step, once there is something to compute; `None` once the scheduler is closed.
    fn next_step(&self) -> Option<Vec<Turn>> {
        let mut board = self.board();
        loop {
            if board.closed.is_some() {
                return None;
            }
            self.admit(&mut board);
            let turns = self.take_turns(&mut board);
            board.in_steps += turns.len();
            let failed = std::mem::take(&mut board.failed);
            if turns.is_empty() && failed.is_empty() {
                board = self.changed.wait(board).unwrap_or_else(std::sync::PoisonError::into_inner);
                continue;
            }
            drop(board);
            failed.into_iter().for_each(|(request, error)| request.fail(error));
            if !turns.is_empty() {
                return Some(turns);
            }
            // The one that could not run is gone, and there may be others.
            board = self.board();
        }
    }

    /// Rows of prompts in a step.
    fn prompt_rows(&self) -> usize {
        // More at once could ask for more pages than the cache of a sliding window has.
        self.config.prompt_rows.min(self.grid.room.rows)
    }

    /// Lets requests in, in the order of their arrival, as long as their prompts fit the cache.
    fn admit(&self, board: &mut Board) {
        while board.running() < self.config.max_sequences
            && let Some(mut request) = board.waiting.pop_front()
        {
            let reused = board.reuse(&mut request, self.grid.params().fingerprint());
            let window = self.grid.params().config().sliding_window.unwrap_or(usize::MAX);
            // Of a prompt longer than the window, pages are freed before others are needed; what is reused has some of them already.
            let ahead = request.todo.len().min(window.saturating_sub(reused).saturating_add(self.prompt_rows()));
            match self.reserve(board, &mut request, ahead, false) {
                Ok(()) => {
                    board.count_reused(reused);
                    board.ready.push_back(request);
                }
                Err(full) if board.running() == 0 => board.failed.push((request, full)),
                Err(_) => return board.wait(request),
            }
        }
    }

    /// Leases pages for `n` more tokens of a request. Kept prefixes make room for it, and where it may `preempt`, so do younger requests.
    fn reserve(&self, board: &mut Board, request: &mut Request, n: usize, preempt: bool) -> Result<()> {
        loop {
            match self.grid.reserve(&mut request.state, n, self.pages) {
                Ok(()) => return Ok(()),
                Err(_) if board.kept.pop_front().is_some() => {}
                Err(_) if preempt && board.preempt_after(request.id) => {}
                Err(full) => return Err(full),
            }
        }
    }

    /// This lane's share of the requests that are ready, in the order of their turns: a token each, or a part of their prompt.
    fn take_turns(&self, board: &mut Board) -> Vec<Turn> {
        let share = board.running().div_ceil(self.lanes).min(self.grid.room.wanted);
        let mut prompt_rows = self.prompt_rows();
        let mut turns = Vec::new();
        while turns.len() < share
            && let Some(mut request) = board.ready.pop_front()
        {
            let tokens = if request.is_prompt { request.todo.len().min(prompt_rows) } else { 1 };
            if tokens == 0 {
                board.passed.push_back(request);
                continue;
            }
            match self.reserve(board, &mut request, tokens, true) {
                Ok(()) => {
                    prompt_rows -= if request.is_prompt { tokens } else { 0 };
                    turns.push(Turn { request, tokens });
                }
                // It is the only one, so that nothing will be freed: others use the model's cache beside the scheduler.
                Err(full) if board.running() == 0 && turns.is_empty() => board.failed.push((request, full)),
                Err(_) => board.passed.push_back(request),
            }
        }
        while let Some(request) = board.passed.pop_back() {
            board.ready.push_front(request);
        }
        turns
    }

    fn compute(&self, turns: &mut [Turn]) -> Result<()> {
        let rows: usize = turns.iter().map(|turn| turn.tokens).sum();
        // Other lanes fill the stages too, so that only long prompts are worth cutting.
        let batches = Some((rows / MICRO_ROWS).clamp(1, self.grid.micro_batches));
        let (mut states, mut tokens) = (Vec::new(), Vec::new());
        for turn in turns {
            states.push(&mut turn.request.state);
            tokens.push(&turn.request.todo[..turn.tokens]);
        }
        self.grid.advance(&mut states, &tokens, How { batches, ..How::new(Want::Last) }).map(drop)
    }

    /// Chooses the tokens of those that have computed all they had, and puts every request where it belongs.
    fn hand_out(&self, mut turns: Vec<Turn>, outcome: Result<()>) {
        let chosen: Vec<Option<Result<Token>>> = match &outcome {
            Ok(()) => turns.iter_mut().map(|turn| self.choose(turn)).collect(),
            Err(e) => turns.iter().map(|_| Some(Err(Error::Request(e.to_string())))).collect(),
        };
        let (mut told, mut going_on) = (Vec::new(), Vec::new());
        // What has ended leaves first: whoever hears of a token finds the board as it is after it.
        let mut board = self.board();
        board.count_step(turns.iter().map(|turn| turn.tokens).sum());
        for (Turn { request, .. }, token) in turns.into_iter().zip(chosen) {
            let tokens = request.tokens.clone();
            going_on.extend(self.settle(&mut board, request, token.as_ref()));
            told.extend(token.map(|token| (tokens, token)));
        }
        drop(board);
        // A client's waker may do anything, so no lock is held. Nobody need be there to hear it.
        told.into_iter().for_each(|(tokens, token)| drop(tokens.unbounded_send(token)));
        // Not before, or a next token might overtake.
        let stepped = going_on.len();
        going_on.retain(|request| !request.is_cancelled());
        let mut board = self.board();
        board.in_steps -= stepped;
        board.ready.extend(going_on);
        drop(board);
        self.changed.notify_all();
    }

    /// The next token of a text all of whose tokens are computed.
    fn choose(&self, turn: &mut Turn) -> Option<Result<Token>> {
        let request = &mut turn.request;
        request.todo.drain(..turn.tokens);
        let is_next = request.todo.is_empty() && !request.is_cancelled();
        is_next.then(|| request.course.next(request.state.logits(), request.state.tokens(), self.limit))
    }

    /// Keeps what others may reuse of a request that has been in a step, and answers with it unless `token` is its last.
    fn settle(&self, board: &mut Board, mut request: Request, token: Option<&Result<Token>>) -> Option<Request> {
        let Some(token) = token else { return Some(request) };
        let was_prompt = std::mem::replace(&mut request.is_prompt, false);
        let ended = token.as_ref().map_or(true, |token| token.finish.is_some());
        let prefix = match token {
            Ok(_) if self.config.reuse_prefixes && ended => request.state.give_up(),
            Ok(_) if self.config.reuse_prefixes && was_prompt => self.whole_pages(&request),
            _ => None,
        };
        if let Some((tokens, lease)) = prefix {
            board.keep(tokens, lease);
        }
        if ended {
            board.in_steps -= 1;
            return None;
        }
        request.todo.extend(token.as_ref().map(|token| token.id));
        Some(request)
    }

    /// The whole pages of a running request, to be shared with others: a page that is still written would have to be copied.
    fn whole_pages(&self, request: &Request) -> Option<(Vec<u32>, Lease)> {
        let tokens = request.state.tokens();
        let n = tokens.len() / self.config.kv.page_len() * self.config.kv.page_len();
        let lease = request.state.lease.as_ref()?.fork(n, request.state.config.first_seen(n))?;
        (n > 0).then(|| (tokens[..n].to_vec(), lease))
    }
}
