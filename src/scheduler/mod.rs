//! [`Scheduler`]: many requests on one model at once, batched anew at every step.

mod board;
mod lane;

use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::thread::JoinHandle;

use futures::Stream;
use futures::channel::mpsc::{UnboundedReceiver, unbounded};

use crate::backend::KvType;
use crate::error::{Error, Result};
use crate::generate::{Course, GenerateOptions, Prompt, Token};
use crate::model::grid::Grid;
use crate::model::parallel::ParallelMistral;
use crate::model::state::InferenceState;
use board::{Board, Request};

/// How a [`Scheduler`] shares a model out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Requests that run at once, at most; others wait. 64 by default.
    pub max_sequences: usize,
    /// Bytes of keys and values that all requests and kept prefixes together may take, over all devices, in whole pages; `None`, the
    /// default, for all that the model's cache has. What other users of the model hold counts too.
    pub kv_memory: Option<usize>,
    /// Rows of prompts that a step computes beside the tokens of running texts, at most: fewer let those wait less, more read the
    /// weights less often. 128 by default.
    pub prompt_rows: usize,
    /// How keys and values are cached. f32 by default.
    pub kv: KvType,
    /// Whether the keys and values of earlier requests are kept, as long as nobody needs the room, for later ones that begin
    /// alike. On by default; the answers are the same.
    pub reuse_prefixes: bool,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self { max_sequences: 64, kv_memory: None, prompt_rows: 128, kv: KvType::F32, reuse_prefixes: true }
    }
}

/// What a [`Scheduler`] does and has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SchedulerCounts {
    /// Requests that wait for their turn or for room.
    pub waiting: usize,
    /// Requests that run.
    pub running: usize,
    /// Prefixes kept for reuse. Their pages go to whoever needs them.
    pub kept_prefixes: usize,
    /// Batches computed.
    pub steps: u64,
    /// Tokens computed.
    pub computed_tokens: u64,
    /// Tokens that were not computed, since an earlier request had been.
    pub reused_tokens: u64,
    /// Times that a request gave its pages to an older one, to be computed again later.
    pub preemptions: u64,
}

/// Runs many requests on one model at once.
///
/// Every step computes one token of each running text and a part of the prompts that have come in, as rows of one batch. Requests
/// join and leave between steps. They are admitted in the order of their arrival, as soon as the cache has room for their prompt;
/// where it runs full later, the youngest gives way and is computed again when there is room, so that the oldest
/// always goes on. On a pipeline, as many steps of different requests are on their way as there are stages.
///
/// Texts are those of [`generate`](crate::generate()) on each prompt alone, as far as the cache goes; on CPUs, with the same logits to the bit.
///
/// ```
/// use futures::executor::block_on_stream;
/// use torchless::{GenerateOptions, Parameters, Scheduler, SchedulerConfig, TensorParallelConfig, TensorParallelMistral};
///
/// let params = Parameters::load("examples/models/tiny-stories")?;
/// let model = TensorParallelMistral::load(params, TensorParallelConfig::new(2, 0))?;
/// let scheduler = Scheduler::new(&model, SchedulerConfig::default())?;
/// let options = GenerateOptions { max_tokens: 20, ..GenerateOptions::default() };
/// let stories: Vec<_> = ["Lily had a red ball.", "Tom saw a big dog."]
///     .map(|prompt| scheduler.submit(prompt, options.clone()))
///     .into_iter()
///     .collect::<Result<_, _>>()?;
/// for story in stories {
///     for token in block_on_stream(story) {
///         print!("{}", token?.text);
///     }
///     println!();
/// }
/// # Ok::<(), torchless::Error>(())
/// ```
pub struct Scheduler {
    hub: Arc<Hub>,
    lanes: Vec<JoinHandle<()>>,
}

/// What the lanes, the requests' owners and the scheduler share.
struct Hub {
    grid: Arc<Grid>,
    config: SchedulerConfig,
    /// Steps on their way at once.
    lanes: usize,
    /// Pages that may be held.
    pages: usize,
    /// The longest sequence that they hold.
    limit: usize,
    board: Mutex<Board>,
    /// Something has come, gone or been computed.
    changed: Condvar,
}

impl Scheduler {
    /// Starts one for `model`, which may be used beside it and shares its cache.
    ///
    /// # Errors
    /// No sequences, no prompt rows, memory for less than a page, or a model whose ranks are in several processes.
    pub fn new<By>(model: &ParallelMistral<By>, config: SchedulerConfig) -> Result<Self> {
        let grid = model.grid.clone();
        if grid.members > 1 {
            let why = "a scheduler decides by what comes when, and members must make the same calls in the same order";
            return Err(Error::Collective(why.into()));
        }
        let page = grid.page_bytes();
        let pages = config.kv_memory.map_or(usize::MAX, |bytes| bytes / page.max(1)).min(grid.pages.total());
        for (option, value, right) in [
            ("max_sequences", config.max_sequences, "at least 1 sequence must run"),
            ("prompt_rows", config.prompt_rows, "at least 1 row must be computed"),
        ] {
            if value == 0 {
                return Err(Error::Option { option, value: "0".into(), right });
            }
        }
        if pages == 0 {
            let value = format!("{} (a page takes {page} bytes)", config.kv_memory.unwrap_or(0));
            return Err(Error::Option { option: "kv_memory", value, right: "at least one page must fit" });
        }
        let limit = grid.context_within(pages, config.kv);
        let lanes = grid.stages();
        let hub = Arc::new(Hub { grid, config, lanes, pages, limit, board: Mutex::default(), changed: Condvar::new() });
        let mut scheduler = Self { hub, lanes: Vec::new() };
        for lane in 0..lanes {
            let hub = scheduler.hub.clone();
            let thread = std::thread::Builder::new().name(format!("torchless-lane-{lane}")).spawn(move || lane::run(&hub));
            scheduler.lanes.push(thread.map_err(|e| Error::DriverGone(format!("a lane of the scheduler cannot start: {e}")))?);
        }
        Ok(scheduler)
    }

    /// Hands in a request. Its tokens come as they are chosen; dropping the [`Completion`] cancels it and frees its part of the
    /// cache. Whether `options` ask for the fast forms makes no difference yet.
    ///
    /// # Errors
    /// An empty prompt, one that cannot be encoded or is longer than the cache, options that make no sense; a scheduler whose threads
    /// have panicked, as a waker of a [`Completion`] makes them that panics itself.
    pub fn submit<'p>(&self, prompt: impl Into<Prompt<'p>>, options: GenerateOptions) -> Result<Completion> {
        let hub = &self.hub;
        let state = InferenceState::with_kv(hub.grid.params().config(), hub.config.kv);
        let (prompt, course) = Course::new(hub.grid.params(), &[], &prompt.into(), options)?;
        hub.grid.check(&state, &prompt)?;
        if prompt.len() > hub.limit {
            return Err(Error::ContextFull { position: 0, wanted: prompt.len(), limit: hub.limit });
        }
        let (sender, tokens) = unbounded();
        let prompt_tokens = prompt.len();
        let mut board = hub.board();
        if let Some(why) = board.closed {
            return Err(Error::Request(why.into()));
        }
        let (id, nothing) = (board.next_id(), course.left() == 0);
        if !nothing {
            board.waiting.push_back(Request { id, state, todo: prompt, is_prompt: true, course, tokens: sender });
            hub.changed.notify_all();
        }
        drop(board);
        Ok(Completion { id, prompt_tokens, hub: hub.clone(), tokens, has_ended: nothing })
    }

    /// What it does and has done.
    #[must_use]
    pub fn counts(&self) -> SchedulerCounts {
        self.hub.board().counts()
    }

    /// Frees the pages of all kept prefixes.
    pub fn forget_prefixes(&self) {
        self.hub.board().kept.clear();
    }
}

impl Drop for Scheduler {
    /// Ends the requests that still wait or run with an error.
    fn drop(&mut self) {
        self.hub.board().closed = Some("the scheduler was dropped");
        self.hub.changed.notify_all();
        // A waker may drop it on a lane, which ends by itself.
        for lane in self.lanes.drain(..).filter(|lane| lane.thread().id() != std::thread::current().id()) {
            // One that panicked has said so to all who waited.
            let _ = lane.join();
        }
        self.forget_prefixes();
    }
}

impl std::fmt::Debug for Scheduler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scheduler").field("config", &self.hub.config).field("counts", &self.counts()).finish_non_exhaustive()
    }
}

impl Hub {
    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The tokens of one request, as they come. An error ends them. Dropping it cancels the request.
pub struct Completion {
    id: u64,
    prompt_tokens: usize,
    hub: Arc<Hub>,
    tokens: UnboundedReceiver<Result<Token>>,
    /// The last item has come.
    has_ended: bool,
}

impl Completion {
    /// Tokens of the prompt.
    #[must_use]
    pub fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }
}

impl Stream for Completion {
    type Item = Result<Token>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Token>>> {
        let polled = Pin::new(&mut self.tokens).poll_next(context);
        match &polled {
            Poll::Pending => {}
            Poll::Ready(Some(Ok(token))) => self.has_ended = token.finish.is_some(),
            Poll::Ready(Some(Err(_))) => self.has_ended = true,
            // A text that was cut off must not look like one that is complete.
            Poll::Ready(None) if !std::mem::replace(&mut self.has_ended, true) => {
                return Poll::Ready(Some(Err(Error::Request("a thread of the scheduler panicked".into()))));
            }
            Poll::Ready(None) => {}
        }
        polled
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        // A lane that has the request sees it when the step is done.
        self.tokens.close();
        let cancelled = self.hub.board().cancel(self.id);
        // Wakes whoever polled last, so not under the lock.
        drop(cancelled);
        self.hub.changed.notify_all();
    }
}

impl std::fmt::Debug for Completion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Completion").field("id", &self.id).finish_non_exhaustive()
    }
}
