//! Pipeline parallelism as a schedule: which item is in which stage, and how many micro-batches are worth having.

use std::collections::VecDeque;

/// A pipeline of items: who is in which stage.
///
/// Items are numbered from 1 in the order of their [`push`](Self::push) and come out in that order, each once. A stage holds one
/// item at most, and the item in the last stage is the output. One that isn't popped stays there, and stalls those behind it.
///
/// ```
/// use torchless::PipelineState;
///
/// let (num_stages, max_depth, tokens) = (3, 2, 5);
/// let mut state = PipelineState::new(num_stages, max_depth);
/// let (mut pushed, mut out) = (0, Vec::new());
/// while out.len() < tokens {
///     if pushed < tokens && state.can_accept() {
///         state.push();
///         pushed += 1;
///     }
///     if state.has_output() {
///         out.extend(state.pop());
///     }
///     state.advance();
/// }
/// assert_eq!(out, [1, 2, 3, 4, 5]);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PipelineState {
    num_stages: usize,
    max_depth: usize,
    /// The stage of every item in flight, the oldest first: falling, and no two the same.
    in_flight: VecDeque<usize>,
    popped: usize,
}

impl PipelineState {
    /// An empty pipeline of `num_stages` stages that holds at most `max_depth` items. Zero counts as one in both.
    pub fn new(num_stages: usize, max_depth: usize) -> Self {
        Self { num_stages: num_stages.max(1), max_depth: max_depth.max(1), in_flight: VecDeque::new(), popped: 0 }
    }

    /// Whether an item can be pushed: fewer than `max_depth` are in flight, and the first stage is free.
    pub fn can_accept(&self) -> bool {
        self.in_flight.len() < self.max_depth && self.in_flight.back() != Some(&0)
    }

    /// The next item enters the first stage. Nothing happens, and no number is used up, unless [`Self::can_accept`].
    pub fn push(&mut self) {
        if self.can_accept() {
            self.in_flight.push_back(0);
        }
    }

    /// Whether an item is in the last stage.
    pub fn has_output(&self) -> bool {
        self.in_flight.front() == Some(&(self.num_stages - 1))
    }

    /// The stage of every item in flight, the oldest first.
    pub(crate) fn stages(&self) -> impl Iterator<Item = usize> {
        self.in_flight.iter().copied()
    }

    /// Takes the item in the last stage out and returns its number. No other item moves.
    pub fn pop(&mut self) -> Option<usize> {
        if !self.has_output() {
            return None;
        }
        self.in_flight.pop_front();
        self.popped += 1;
        Some(self.popped)
    }

    /// Every item moves on by one stage, unless the last stage or an item that stays bars its way.
    pub fn advance(&mut self) {
        let mut barred = self.num_stages;
        for stage in &mut self.in_flight {
            if *stage + 1 < barred {
                *stage += 1;
            }
            barred = *stage;
        }
    }
}

/// How a pipeline of stages is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PipelineConfig {
    /// Micro-batches in flight: the rows of a prefill, or the sequences of a batch, are cut into so many. 4 by default.
    pub num_micro_batches: usize,
    /// Whether each stage has a thread of its own, so that stages compute at the same time. Off by default.
    pub async_execution: bool,
    /// Bytes that the micro-batches' activations, keys and values may take. 512 MiB by default.
    pub memory_budget: usize,
}

impl Default for PipelineConfig {
    fn default() -> Self {
        Self { num_micro_batches: 4, async_execution: false, memory_budget: 512 << 20 }
    }
}

impl PipelineConfig {
    /// Most micro-batches that [`Self::for_model`] chooses. With m of them in s stages, (s - 1) / (m + s - 1) of the time is
    /// spent filling and draining (Huang et al., GPipe, 2019): past 8, thinner batches cost more than that still saves.
    const MOST: usize = 8;

    /// Rows of a micro-batch in [`Self::for_model`]'s estimate.
    const ROWS: usize = 64;

    /// As many micro-batches as fit `memory_budget` bytes, 1 to 8.
    ///
    /// A micro-batch of 64 rows is counted as their keys and values at every layer, in f16 and with as many key-value heads as query
    /// heads, `64 * 2 * 2 * hidden_size * n_layers` bytes, and their f32 residual stream, `64 * 4 * hidden_size` bytes.
    ///
    /// ```
    /// use torchless::PipelineConfig;
    ///
    /// assert_eq!(PipelineConfig::for_model(32, 4096, 512 << 20).num_micro_batches, 8);
    /// assert_eq!(PipelineConfig::for_model(32, 4096, 128 << 20).num_micro_batches, 3);
    /// assert_eq!(PipelineConfig::for_model(32, 4096, 0).num_micro_batches, 1);
    /// ```
    #[must_use]
    pub fn for_model(n_layers: usize, hidden_size: usize, memory_budget: usize) -> Self {
        let keys_and_values = (2 * size_of::<half::f16>()).saturating_mul(n_layers);
        let bytes = keys_and_values.saturating_add(size_of::<f32>()).saturating_mul(Self::ROWS).saturating_mul(hidden_size);
        let num_micro_batches = (memory_budget / bytes.max(1)).clamp(1, Self::MOST);
        Self { num_micro_batches, memory_budget, ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};

    const SIZES: [usize; 8] = [0, 1, 2, 3, 4, 7, 32, usize::MAX];

    #[test]
    fn any_sequence_of_calls_loses_repeats_and_reorders_nothing() {
        let mut random = ChaCha8Rng::seed_from_u64(11);
        for (stages, depth) in SIZES.iter().flat_map(|&s| SIZES.map(|d| (s, d))) {
            let mut state = PipelineState::new(stages, depth);
            let (mut pushed, mut popped) = (0, 0);
            for step in 0..500 {
                let case = format!("{stages} stages, depth {depth}, step {step}: {state:?}");
                match random.next_u32() % 3 {
                    0 => {
                        pushed += usize::from(state.can_accept());
                        state.push();
                    }
                    1 => {
                        let ready = state.has_output();
                        let item = state.pop();
                        assert_eq!(item.is_some(), ready, "{case}");
                        popped += usize::from(ready);
                        assert!(item.is_none_or(|item| item == popped), "{case} gave {item:?} as number {popped}");
                    }
                    _ => state.advance(),
                }
                assert_eq!(state.in_flight.len(), pushed - popped, "{case}");
                assert!(state.in_flight.len() <= depth.max(1), "{case}");
                assert!(state.in_flight.iter().all(|&stage| stage < stages.max(1)), "{case}");
                assert!(state.in_flight.iter().zip(state.in_flight.iter().skip(1)).all(|(older, newer)| older > newer), "{case}");
            }
        }
    }

    #[test]
    fn the_plain_loop_ends_with_every_item_out_in_order() {
        for (stages, depth) in SIZES.iter().flat_map(|&s| SIZES.map(|d| (s, d))).filter(|(stages, _)| *stages < usize::MAX) {
            let mut state = PipelineState::new(stages, depth);
            let (mut pushed, mut out, items) = (0, Vec::new(), 20);
            // Alone in the pipeline, an item takes a step a stage; that bounds the loop for any depth.
            for _ in 0..items * stages.max(1) {
                if pushed < items && state.can_accept() {
                    state.push();
                    pushed += 1;
                }
                if state.has_output() {
                    out.extend(state.pop());
                }
                state.advance();
            }
            assert_eq!(out, (1..=items).collect::<Vec<_>>(), "{stages} stages, depth {depth}");
        }
    }

    #[test]
    fn a_full_pipeline_gives_an_item_a_step() {
        let mut state = PipelineState::new(4, 4);
        let mut steps = Vec::new();
        for step in 0..10 {
            state.push();
            steps.extend(state.pop().map(|item| (step, item)));
            state.advance();
        }
        assert_eq!(steps, (1..=7).map(|item| (item + 2, item)).collect::<Vec<_>>());
    }

    #[test]
    fn an_output_that_is_not_popped_stalls_those_behind_it() {
        let mut state = PipelineState::new(3, 8);
        for _ in 0..10 {
            state.push();
            state.advance();
        }
        state.push();
        assert!(state.has_output() && !state.can_accept());
        assert!(state.stages().eq([2, 1, 0]), "{state:?}");
        assert_eq!(state.pop(), Some(1));
        assert_eq!((state.has_output(), state.pop()), (false, None), "pop does not advance");
        state.advance();
        assert_eq!(state.pop(), Some(2));
    }

    #[test]
    fn a_refused_push_uses_up_no_number() {
        let mut state = PipelineState::new(1, 1);
        (0..5).for_each(|_| state.push());
        assert_eq!(state.pop(), Some(1));
        state.push();
        assert_eq!(state.pop(), Some(2));
        assert_eq!(state.pop(), None);
    }

    #[test]
    fn micro_batches_stay_within_the_budget_and_between_1_and_8() {
        for (layers, hidden) in SIZES.iter().flat_map(|&l| SIZES.map(|h| (l, h))) {
            for budget in [0, 1, 4096, 512 << 20, usize::MAX] {
                let config = PipelineConfig::for_model(layers, hidden, budget);
                let batches = config.num_micro_batches;
                let bytes = batches as f64 * 256.0 * (layers as f64 + 1.0) * hidden as f64;
                assert!((1..=8).contains(&batches), "{layers} layers of {hidden} in {budget}: {batches}");
                assert!(batches == 1 || bytes <= budget as f64, "{layers} layers of {hidden} in {budget}: {batches}");
                assert_eq!(config.memory_budget, budget);
            }
        }
    }
}
