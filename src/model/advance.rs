//! How sequences advance on a grid: their rows are cut into batches, which follow each other through the stages.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::backend::{Batch, Numerics, Row, Wire};
use crate::error::{Error, Result};
use crate::model::engine::Pending;
use crate::model::grid::Grid;
use crate::model::kv::Lease;
use crate::model::state::InferenceState;

/// Rows of a micro-batch at least, where there are so many: fewer don't fill a tile of the kernels.
const LEAST_ROWS: usize = 4;

/// Batches of more rows travel between ranks as [`ParallelConfig::wire`](crate::ParallelConfig::wire) says; what others gain is lost to the conversion.
const FEW_ROWS: usize = 8;

/// A trip of fewer rows for each lane is one batch: reading the weights for both has to be cheap beside what they compute.
const LEAST_OVERLAP: usize = 64;

/// Which logits a call wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Want {
    /// Of the last token.
    Last,
    /// Of every token that the call adds.
    All,
}

/// How a call computes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct How {
    pub want: Want,
    /// Rows of a batch at most.
    pub chunk: usize,
    /// Batches that the rows are cut into, where there are enough; `None` for the model's micro-batches.
    pub batches: Option<usize>,
    pub numerics: Numerics,
    /// Tokens at the end of each sequence that may be taken back: what the rows before them see is kept.
    pub drafted: usize,
    /// Report every step to stderr.
    pub debug: bool,
}

impl How {
    pub(crate) fn new(want: Want) -> Self {
        Self { want, chunk: usize::MAX, batches: None, drafted: 0, numerics: Numerics::Exact, debug: false }
    }
}

/// A sequence while a call advances it.
struct Sequence<'a> {
    state: &'a mut InferenceState,
    lease: Lease,
    /// Its tokens before the call.
    before: usize,
    /// Those that will not be taken back.
    sure: usize,
    /// Tokens that were sent on their way, or are stored.
    sent: usize,
    /// Wanted so far: `[wanted, vocab]`.
    logits: Vec<f32>,
}

/// What one sequence computes in a batch.
struct Part {
    /// Index of the sequence.
    sequence: usize,
    positions: Range<usize>,
    /// Those of them whose logits are wanted.
    wanted: Range<usize>,
}

/// Batches on their way together.
struct Flight {
    /// Of one batch after the other.
    parts: Vec<Part>,
    pending: Pending,
}

impl Grid {
    /// Appends its tokens to each sequence and computes them. All or nothing: after an error the states are as before.
    ///
    /// The logits of a sequence's last token land in its state; those wanted of all its tokens, `[tokens, vocab]`, in the answer.
    pub(crate) fn advance(&self, states: &mut [&mut InferenceState], tokens: &[&[u32]], how: How) -> Result<Vec<Vec<f32>>> {
        if states.len() != tokens.len() {
            return Err(Error::BatchSize { states: states.len(), tokens: tokens.len() });
        }
        for (state, tokens) in states.iter().zip(tokens) {
            self.check(state, tokens)?;
        }
        let mut sequences: Vec<_> = states.iter_mut().zip(tokens).map(|(state, tokens)| self.extend(state, tokens, how.drafted)).collect();
        let outcome = self.compute(&mut sequences, how);
        let ended = |sequence| self.end(sequence, how.want, outcome.is_ok());
        let logits = sequences.into_iter().map(ended).collect();
        outcome.map(|()| logits)
    }

    /// Leases pages for `n` more tokens of a sequence ahead of their computing, as long as no more than `most` are held in all.
    ///
    /// # Errors
    /// [`Error::CacheFull`], and nothing has changed.
    pub(crate) fn reserve(&self, state: &mut InferenceState, n: usize, most: usize) -> Result<()> {
        let lease = state.lease.get_or_insert_with(|| Lease::new(self.pages.clone(), state.kv));
        lease.reserve(state.tokens.len() + n, most)
    }

    /// A sequence with its new tokens. What the cache doesn't hold of the old ones will be computed again.
    fn extend<'a>(&self, state: &'a mut InferenceState, tokens: &[u32], drafted: usize) -> Sequence<'a> {
        let before = state.position();
        state.tokens.extend_from_slice(tokens);
        let lease = state.lease.take().filter(|lease| lease.is_of(&self.pages));
        let lease = lease.unwrap_or_else(|| Lease::new(self.pages.clone(), state.kv));
        Sequence { before, sure: state.position() - drafted, sent: lease.stored(), lease, state, logits: Vec::new() }
    }

    /// Puts into the state what came out, or takes everything back.
    fn end(&self, sequence: Sequence<'_>, want: Want, done: bool) -> Vec<f32> {
        let Sequence { state, mut lease, before, mut logits, .. } = sequence;
        if done {
            let last = logits.len() - self.params.config().vocab_size;
            // Of the last token alone they are all there is.
            state.logits = if want == Want::Last { std::mem::take(&mut logits) } else { logits[last..].to_vec() };
            state.checkpoint = Some(self.params.fingerprint());
            state.lease = Some(lease);
        } else {
            state.tokens.truncate(before);
            let seen = state.config.first_seen(before);
            state.lease = lease.truncate(before, seen).then_some(lease);
        }
        logits
    }

    /// Sends the rows that are missing batch by batch, and takes the answers in that order.
    fn compute(&self, sequences: &mut [Sequence<'_>], how: How) -> Result<()> {
        let missing: usize = sequences.iter().map(|s| s.state.tokens.len() - s.sent).sum();
        let trips = how.batches.unwrap_or(self.micro_batches).max(1);
        let most = how.chunk.min(self.room.rows).max(1);
        let lanes = if missing / trips < self.lanes * LEAST_OVERLAP || most < LEAST_OVERLAP { 1 } else { self.lanes };
        let batches = missing.div_ceil(most).max(trips * lanes).next_multiple_of(lanes);
        let rows = missing.div_ceil(batches).max(LEAST_ROWS).min(most);
        // Dropped on an error, they are waited for: no page is given back while a batch may write it.
        let mut flights = VecDeque::new();
        loop {
            if flights.len() >= self.in_flight {
                self.land(&mut flights, sequences)?;
            }
            let (mut loads, mut sent) = (Vec::new(), Vec::new());
            while loads.len() < lanes {
                let parts = self.cut(sequences, rows, how.want);
                if parts.is_empty() || !self.lease(sequences, &parts, &mut flights, loads.is_empty())? {
                    break;
                }
                loads.push(self.batch(sequences, &parts, how));
                parts.iter().for_each(|part| sequences[part.sequence].sent = part.positions.end);
                sent.extend(parts);
            }
            if loads.is_empty() {
                break;
            }
            flights.push_back(Flight { parts: sent, pending: self.driver.send(loads, how.debug)? });
        }
        while !flights.is_empty() {
            self.land(&mut flights, sequences)?;
        }
        Ok(())
    }

    /// Leases the pages of a batch. Answers whether there were enough; if the batch is the `first` of its trip, too few are an error.
    fn lease(&self, sequences: &mut [Sequence<'_>], parts: &[Part], flights: &mut VecDeque<Flight>, first: bool) -> Result<bool> {
        for part in parts {
            // Under a sliding window, batches that arrive free pages.
            while let Err(full) = sequences[part.sequence].lease.reserve(part.positions.end, usize::MAX) {
                match (flights.is_empty(), first) {
                    (false, _) => self.land(flights, sequences)?,
                    (true, false) if self.members == 1 => return Ok(false),
                    // Members of a group must send the same batches together: another might have had the pages.
                    (true, _) => return Err(full),
                }
            }
        }
        Ok(true)
    }

    /// The next batch: at most `rows` rows, in the order of the sequences, of one type of cache.
    fn cut(&self, sequences: &[Sequence<'_>], rows: usize, want: Want) -> Vec<Part> {
        let (mut rows, mut most_wanted) = (rows, self.room.wanted);
        let mut parts: Vec<Part> = Vec::new();
        for (i, sequence) in sequences.iter().enumerate() {
            let Sequence { ref state, before, sent, .. } = *sequence;
            let (len, kv) = (state.tokens.len(), parts.first().map_or(state.kv, |part| sequences[part.sequence].state.kv));
            if sent == len || state.kv != kv {
                continue;
            }
            // Logits are wanted from here on.
            let wanted = sent.max(match want {
                Want::Last => len - 1,
                Want::All => before,
            });
            let end = len.min(sent + rows).min(wanted + most_wanted);
            if end == sent {
                break;
            }
            rows -= end - sent;
            most_wanted -= end.saturating_sub(wanted);
            parts.push(Part { sequence: i, positions: sent..end, wanted: wanted.min(end)..end });
        }
        parts
    }

    /// A batch and its embedded rows.
    fn batch(&self, sequences: &mut [Sequence<'_>], parts: &[Part], how: How) -> (Batch, Vec<f32>) {
        let (mut rows, mut wanted, mut seqs, mut copies, mut tokens) = (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (seq, part) in parts.iter().enumerate() {
            let Sequence { state, lease, .. } = &mut sequences[part.sequence];
            copies.extend(lease.take_copies());
            wanted.extend(part.wanted.clone().map(|position| (rows.len() + position - part.positions.start) as u32));
            rows.extend(part.positions.clone().map(|position| Row { seq: seq as u32, pos: position as u32 }));
            tokens.extend_from_slice(&state.tokens[part.positions.clone()]);
            seqs.push(lease.seq().clone());
        }
        let number = self.batches.fetch_add(1, Ordering::Relaxed) + 1;
        let kv = sequences[parts[0].sequence].state.kv;
        let (numerics, timed) = (how.numerics, self.timed.load(Ordering::Relaxed));
        let wire = if rows.len() > FEW_ROWS { self.wire } else { Wire::F32 };
        let batch = Batch { number, rope: self.rope.angles(&rows), rows, seqs, wanted, copies, kv, numerics, wire, timed };
        (batch, self.embed(&tokens))
    }

    /// Waits for the oldest batches.
    fn land(&self, flights: &mut VecDeque<Flight>, sequences: &mut [Sequence<'_>]) -> Result<()> {
        let Some(Flight { parts, pending }) = flights.pop_front() else { return Ok(()) };
        let mut logits = pending.wait()?;
        for Part { sequence, positions, wanted } in parts {
            let sequence = &mut sequences[sequence];
            let seen = sequence.state.config.first_seen(positions.end.min(sequence.sure));
            sequence.lease.commit(positions.end, seen);
            let others = logits.split_off(wanted.len() * self.params.config().vocab_size);
            // Mostly there is but this part, and nothing is copied.
            if sequence.logits.is_empty() {
                sequence.logits = logits;
            } else {
                sequence.logits.extend_from_slice(&logits);
            }
            logits = others;
        }
        Ok(())
    }

    /// The tokens' rows of the embedding: `[tokens, hidden]`.
    fn embed(&self, tokens: &[u32]) -> Vec<f32> {
        let table = self.params.embedding();
        let mut rows = vec![0.0; tokens.len() * table.cols()];
        for (row, &token) in rows.chunks_exact_mut(table.cols()).zip(tokens) {
            table.row_to_f32(token as usize, row);
        }
        rows
    }

    /// Whether the tokens can follow those of the state.
    pub(crate) fn check(&self, state: &InferenceState, tokens: &[u32]) -> Result<()> {
        let config = self.params.config();
        if tokens.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        if let Some(&token) = tokens.iter().find(|&&t| t as usize >= config.vocab_size) {
            return Err(Error::TokenOutOfRange { token, vocab_size: config.vocab_size });
        }
        if state.config != *config {
            return Err(Error::ForeignState(format!("it was made for {:?}, this model is {config:?}", state.config)));
        }
        if state.checkpoint.is_some_and(|c| c != self.params.fingerprint()) {
            return Err(Error::ForeignState("its tokens were computed with other weights of the same shape".into()));
        }
        let (position, wanted, limit) = (state.position(), tokens.len(), config.max_position_embeddings);
        if wanted > limit.saturating_sub(position) {
            return Err(Error::ContextFull { position, wanted, limit });
        }
        Ok(())
    }
}
