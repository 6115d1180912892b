//! [`Grid`]: a model loaded onto places, and how a sequence advances on it.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::backend::cpu::Threads;
use crate::backend::{self, Batch, KvType, PlaceCounts, Room, Row};
use crate::collective::Collective;
use crate::config::Config;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::pool::Pool;
use crate::model::engine::{Driver, Engine, Stage};
use crate::model::kv::{Lease, PagePool};
use crate::model::layout::{RankInfo, lay_out, rank_infos};
use crate::model::parallel_config::ParallelConfig;
use crate::model::rope::RopeTable;
use crate::model::state::InferenceState;
use crate::params::Parameters;
use crate::partition::Partition;
use crate::trace::{Trace, TraceRow};

/// Rows that one walk through the plan takes at most: a prompt is cut into chunks of so many.
const MOST_ROWS: usize = 256;
/// Rows of them whose logits can be had: logits are wide.
const MOST_WANTED: usize = 64;
/// Sequences of full length that the cache has room for unless told otherwise.
const SEQUENCES: usize = 16;

/// Which logits a call wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Want {
    Last,
    All,
}

/// How a call computes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct How {
    pub want: Want,
    /// Rows a chunk at most.
    pub chunk: usize,
    /// Report every step to stderr.
    pub debug: bool,
}

/// A model loaded onto places.
pub(crate) struct Grid {
    params: Parameters,
    pages: Arc<PagePool>,
    room: Room,
    rope: RopeTable,
    ranks: Vec<RankInfo>,
    trace: Arc<Trace>,
    batches: AtomicU64,
    driver: Driver,
}

impl Grid {
    /// Loads the ranks `local` of every stage onto `devices` (stage after stage), joined to others by `collective`.
    pub(crate) fn load(
        params: Parameters,
        config: &ParallelConfig,
        stages: usize,
        local: &[usize],
        devices: &[Device],
        collective: Arc<dyn Collective>,
    ) -> Result<Self> {
        let world = config.tensor.world_size;
        let partition = Partition::new(params.config(), stages, world, config.shares.as_deref(), 1)?;
        let layouts = lay_out(&params, &partition, local, devices, collective.size());
        let ranks = rank_infos(&params, &partition, &layouts)?;
        let rows = ranks.iter().map(|r| TraceRow { stage: r.stage, rank: r.rank, device: r.device.clone() }).collect();
        let trace = Arc::new(Trace::new(rows));
        let threads = Threads { pool: Arc::new(Pool::new(config.threads)?), work: config.work };
        let tensor = |name: &str| params.tensor(name);

        let mut room = Room { rows: MOST_ROWS, wanted: MOST_WANTED, pages: wanted_pages(params.config(), config) };
        for (stage, layout) in layouts.iter().enumerate() {
            for (device, assignment) in layout.assignments(stage, &params, &partition, &tensor) {
                room = room.min(backend::room(device, &assignment, room)?);
            }
        }
        let mut built = Vec::new();
        for (index, layout) in layouts.iter().enumerate() {
            let assignments = layout.assignments(index, &params, &partition, &tensor);
            let places = assignments.map(|(device, a)| backend::place(device, &a, room, &threads)).collect::<Result<_>>()?;
            let gathered = partition.stages[index].ranks.iter().map(|r| r.vocab.len()).collect();
            built.push(Stage { index, plan: layout.plan.clone(), places, gathered });
        }
        agree(&*collective, &params, &partition, room)?;
        let engine = Engine { stages: built, collective, trace: trace.clone(), collectives: 0 };
        Ok(Self {
            rope: RopeTable::new(params.config()),
            pages: Arc::new(PagePool::new(room.pages)),
            driver: Driver::start(engine)?,
            batches: AtomicU64::new(0),
            params,
            room,
            ranks,
            trace,
        })
    }

    pub(crate) fn params(&self) -> &Parameters {
        &self.params
    }

    /// The longest sequence that one state can hold, in positions.
    pub(crate) fn context(&self) -> usize {
        let config = self.params.config();
        let cached = self.room.pages.saturating_mul(crate::KvType::F32.page_len());
        match config.sliding_window {
            // What no later row sees is freed, so that a full window and a chunk are enough for any length.
            Some(window) if cached >= window.saturating_add(MOST_ROWS + crate::KvType::F32.page_len()) => config.max_position_embeddings,
            _ => cached.min(config.max_position_embeddings),
        }
    }

    pub(crate) fn ranks(&self) -> &[RankInfo] {
        &self.ranks
    }

    pub(crate) fn trace(&self) -> &Trace {
        &self.trace
    }

    pub(crate) fn pages_held(&self) -> usize {
        self.pages.held()
    }

    pub(crate) fn counts(&self) -> Result<Vec<PlaceCounts>> {
        self.driver.call(|engine| engine.counts())
    }

    pub(crate) fn collectives(&self) -> Result<u64> {
        self.driver.call(|engine| engine.collectives)
    }

    /// Appends `tokens` to the sequence and computes them, in chunks. All or nothing: after an error the state is as before.
    ///
    /// The logits of the last land in the state; of all, `[tokens, vocab]`, in the answer where they are wanted.
    pub(crate) fn advance(&self, state: &mut InferenceState, tokens: &[u32], how: How) -> Result<Vec<f32>> {
        self.check(state, tokens)?;
        let before = state.position();
        state.tokens.extend_from_slice(tokens);
        let mut lease = match state.lease.take() {
            Some(lease) if lease.is_of(&self.pages) => lease,
            _ => Lease::new(self.pages.clone(), state.kv),
        };
        match self.compute(state, &mut lease, before, how) {
            Ok(logits) => {
                let vocab = self.params.config().vocab_size;
                state.logits.clear();
                state.logits.extend_from_slice(&logits[logits.len() - vocab..]);
                state.checkpoint = Some(self.params.fingerprint());
                state.lease = Some(lease);
                Ok(logits)
            }
            Err(e) => {
                state.tokens.truncate(before);
                let seen = state.config.first_seen(before);
                state.lease = lease.truncate(before, seen).then_some(lease);
                Err(e)
            }
        }
    }

    /// Computes what the lease doesn't hold yet of the state's tokens; logits are wanted from `before` on, or of the last.
    fn compute(&self, state: &InferenceState, lease: &mut Lease, before: usize, how: How) -> Result<Vec<f32>> {
        let tokens = &state.tokens;
        let mut logits = Vec::new();
        while lease.stored() < tokens.len() {
            let start = lease.stored();
            let end = match how.want {
                Want::All if start < before => before.min(start + self.room.rows),
                Want::All => start + self.room.rows.min(self.room.wanted),
                Want::Last => start + self.room.rows,
            };
            let end = end.min(start.saturating_add(how.chunk.max(1))).min(tokens.len());
            let wanted = match how.want {
                Want::All if start >= before => 0..end - start,
                Want::Last if end == tokens.len() => end - start - 1..end - start,
                _ => 0..0,
            };
            lease.reserve(end)?;
            let rows: Vec<Row> = (start..end).map(|p| Row { seq: 0, pos: p as u32 }).collect();
            let batch = Batch {
                number: self.batches.fetch_add(1, Ordering::Relaxed) + 1,
                rope: self.rope.angles(&rows),
                rows,
                seqs: vec![lease.seq().clone()],
                wanted: wanted.map(|r| r as u32).collect(),
                copies: Vec::new(),
                kv: state.kv,
            };
            let embedded = self.embed(&tokens[start..end]);
            logits.extend(self.driver.call(move |engine| reporting(how.debug, || engine.run(&batch, embedded)))??);
            lease.commit(end, state.config.first_seen(end));
        }
        Ok(logits)
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

    fn check(&self, state: &InferenceState, tokens: &[u32]) -> Result<()> {
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

/// Pages for the positions asked for, or for [`SEQUENCES`] sequences of full length.
fn wanted_pages(model: &Config, config: &ParallelConfig) -> usize {
    let page_len = KvType::F32.page_len();
    config.kv_positions.map_or_else(
        || {
            let longest = model.max_position_embeddings;
            let positions = model.sliding_window.map_or(longest, |w| longest.min(w.saturating_add(MOST_ROWS)));
            (positions.div_ceil(page_len) + 1).saturating_mul(SEQUENCES)
        },
        |positions| positions.div_ceil(page_len),
    )
}

/// All members of a group must have the same checkpoint, partition and room, or their sums mean nothing. All see all, so that where
/// one differs none goes on to wait for it.
fn agree(collective: &dyn Collective, params: &Parameters, partition: &Partition, room: Room) -> Result<()> {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    params.fingerprint().hash(&mut hasher);
    format!("{partition:?} {room:?}").hash(&mut hasher);
    // 16 bits are exact in an f32.
    let mine: Vec<f32> = hasher.finish().to_le_bytes().chunks(2).map(|b| f32::from(u16::from_le_bytes([b[0], b[1]]))).collect();
    let mut all = vec![0.0; mine.len() * collective.size()];
    collective.all_gather(&mine, &vec![mine.len(); collective.size()], &mut all)?;
    match all.chunks(mine.len()).position(|member| member != mine) {
        None => Ok(()),
        Some(other) => {
            let rank = collective.rank();
            Err(Error::Collective(format!(
                "ranks {rank} and {other} differ in their checkpoint, their partition or the room of their cache"
            )))
        }
    }
}

/// Runs `f`; with `debug`, what it reports through `tracing` goes to stderr where the program installed no subscriber of its own.
fn reporting<T>(debug: bool, f: impl FnOnce() -> T) -> T {
    use tracing::{Dispatch, dispatcher, subscriber::NoSubscriber};
    static TO_STDERR: OnceLock<Dispatch> = OnceLock::new();
    if !debug || !dispatcher::get_default(Dispatch::is::<NoSubscriber>) {
        return f();
    }
    let to_stderr = TO_STDERR.get_or_init(|| {
        let is_terminal = std::io::stderr().is_terminal();
        tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).with_ansi(is_terminal).with_writer(std::io::stderr).finish().into()
    });
    dispatcher::with_default(to_stderr, f)
}
