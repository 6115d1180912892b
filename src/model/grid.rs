//! [`Grid`]: a model loaded onto places.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use crate::backend::cpu::Threads;
use crate::backend::{self, Assignment, BLOCK, KvType, Opened, Packing, Room, Wire};
use crate::collective::Collective;
use crate::config::Config;
use crate::device::Device;
use crate::error::Result;
use crate::kernels::parallel::WorkStealingStats;
use crate::kernels::pool::Pool;
use crate::model::engine::{Counts, Driver};
use crate::model::group;
use crate::model::kv::PagePool;
use crate::model::layout::{LANES, Layout, RankInfo, lay_out, overlap, packing, rank_infos, spare};
use crate::model::parallel_config::ParallelConfig;
use crate::model::rope::RopeTable;
use crate::model::stage::Stage;
use crate::params::Parameters;
use crate::partition::{Partition, TensorParallelConfig};
use crate::trace::{Trace, TraceRow};

/// Rows that one walk through the plan takes at most: a prompt is cut into chunks of so many.
const MOST_ROWS: usize = 256;
/// Rows of them whose logits can be had: logits are wide.
const MOST_WANTED: usize = 64;
/// Sequences of full length that the cache has room for unless told otherwise.
const SEQUENCES: usize = 16;

/// A model loaded onto places.
pub(crate) struct Grid {
    pub(super) params: Parameters,
    pub(crate) pages: Arc<PagePool>,
    pub(crate) room: Room,
    pub(super) rope: RopeTable,
    ranks: Vec<RankInfo>,
    trace: Arc<Trace>,
    /// Whether devices time what they compute.
    pub(super) timed: AtomicBool,
    /// Tasks of the products on the CPU.
    pub(super) stats: Arc<WorkStealingStats>,
    /// Batches made so far.
    pub(super) batches: AtomicU64,
    /// Batches that the rows of a call are cut into, so that they fill the stages.
    pub(crate) micro_batches: usize,
    /// Trips of a call that are on their way at once, at most, and the batches in each.
    pub(super) in_flight: usize,
    pub(super) lanes: usize,
    /// How sums of many rows travel between ranks.
    pub(super) wire: Wire,
    /// Processes that the ranks are in.
    pub(crate) members: usize,
    pub(super) driver: Driver,
}

impl Grid {
    /// Loads the ranks `local` of every stage onto `devices` (stage after stage), joined to others by `collective`. While matrices are
    /// quantised, `progress` hears how many bytes of the checkpoint are done, of how many.
    pub(crate) fn load(
        params: Parameters,
        config: &ParallelConfig,
        stages: usize,
        local: &[usize],
        devices: &[Device],
        collective: Arc<dyn Collective>,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Self> {
        let world = config.tensor.world_size;
        let partition = Partition::new(params.config(), stages, world, config.shares.as_deref(), config.granule(&params))?;
        let mut layouts = lay_out(&params, config, &partition, local, devices, collective.size());
        // Members make the same sums in the same order, whatever devices they have.
        if group::any(&*collective, layouts[0].lanes > 1)? && config.overlap {
            overlap(&mut layouts);
        }
        let stamp = params.stamp();
        let cache = config.cache_weights.then_some((params.directory(), &stamp[..]));
        let (done, all) = (AtomicU64::new(0), rank_infos(&params, &partition, &layouts, None)?.iter().map(|rank| rank.weight_bytes).sum());
        let count = |bytes: usize| progress(done.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64, all);
        let packing = packing(&params, config, cache, &count)?;
        let ranks = rank_infos(&params, &partition, &layouts, packing)?;
        let rows = ranks.iter().map(|r| TraceRow { stage: r.stage, rank: r.rank, device: r.device.clone() }).collect();
        let (trace, stats) = (Arc::new(Trace::new(rows)), Arc::new(WorkStealingStats::new()));
        let pools = pools(config, &layouts)?;
        let tensor = |name: &str| params.tensor(name);

        let (micro_batches, in_flight) = batches(config, stages);
        let room = group::least(&*collective, room(&params, config, &partition, &layouts, &ranks, packing)?)?;
        let (mut built, mut opened) = (Vec::new(), Opened::default());
        for (index, layout) in layouts.iter().enumerate() {
            let assignments = layout.assignments(index, &params, &partition, &tensor, config.tune, packing);
            let threads = Threads { pool: pools[index].clone(), work: config.work, stats: stats.clone() };
            let mut places = Vec::new();
            for (device, assignment) in assignments {
                let assignment = Assignment { spare: spare(device, &ranks, &layouts)?, ..assignment };
                places.push(backend::place(device, &assignment, room, &threads, &mut opened)?);
            }
            let gathered = partition.stages[index].ranks.iter().map(|r| r.vocab.len()).collect();
            let (plan, collective, trace) = (layout.plan.clone(), collective.clone(), trace.clone());
            built.push(Stage {
                index,
                plan,
                places,
                pool: pools[index].clone(),
                gathered,
                collective,
                trace,
                collectives: 0,
                in_flight: vec![vec![None; layout.groups.len()]; layout.lanes],
                done: vec![Instant::now(); layout.groups.len()],
            });
        }
        group::agree(&*collective, &params, &partition, config)?;
        // Where one member of a group would have to compute a half by itself for want of pages, another might not.
        let for_both = |window: usize| window.saturating_add(LANES * MOST_ROWS + BLOCK);
        let is_tight = params.config().sliding_window.is_some_and(|window| room.pages.saturating_mul(BLOCK) < for_both(window));
        let lanes = if collective.size() > 1 && is_tight { 1 } else { layouts[0].lanes };
        Ok(Self {
            rope: RopeTable::new(params.config()),
            pages: Arc::new(PagePool::new(room.pages)),
            driver: Driver::start(built, config.pipeline.async_execution, micro_batches)?,
            batches: AtomicU64::new(0),
            micro_batches,
            in_flight,
            lanes,
            wire: config.wire,
            members: collective.size(),
            params,
            room,
            ranks,
            trace,
            timed: AtomicBool::new(false),
            stats,
        })
    }

    pub(crate) fn params(&self) -> &Parameters {
        &self.params
    }

    /// The longest sequence that one state can hold, in positions.
    pub(crate) fn context(&self) -> usize {
        self.context_within(self.room.pages, KvType::F32)
    }

    /// [`Self::context`] of a state that can have so many pages.
    pub(crate) fn context_within(&self, pages: usize, kv: KvType) -> usize {
        let config = self.params.config();
        let cached = pages.saturating_mul(kv.page_len());
        match config.sliding_window {
            // What no later row sees is freed, so that a full window and a chunk are enough for any length.
            Some(window) if cached >= window.saturating_add(MOST_ROWS + kv.page_len()) => config.max_position_embeddings,
            _ => cached.min(config.max_position_embeddings),
        }
    }

    pub(crate) fn stages(&self) -> usize {
        self.ranks.last().map_or(1, |last| last.stage + 1)
    }

    /// Bytes that a page takes, over all places of this process.
    pub(crate) fn page_bytes(&self) -> usize {
        let head = size_of::<f32>() * BLOCK * self.params.config().head_dim;
        self.ranks.iter().map(|rank| 2 * rank.layers.len() * rank.partition.kv_heads.len() * head).sum()
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

    pub(crate) fn counts(&self) -> Result<Counts> {
        self.driver.counts()
    }
}

/// Batches that a call's rows are cut into, and how many of them are on their way at once.
fn batches(config: &ParallelConfig, stages: usize) -> (usize, usize) {
    // A single stage has nothing to fill.
    let micro_batches = if stages == 1 { 1 } else { config.pipeline.num_micro_batches };
    // One more than there are stages, so that the first always has its next one.
    (micro_batches, micro_batches.min(stages + 1))
}

/// The rows and pages that every place of a grid can take.
///
/// # Errors
/// If a device has no room for its weights, or for a row or a page beside them.
pub(super) fn room(
    params: &Parameters,
    config: &ParallelConfig,
    partition: &Partition,
    layouts: &[Layout],
    ranks: &[RankInfo],
    packing: Option<Packing<'_>>,
) -> Result<Room> {
    let (_, in_flight) = batches(config, layouts.len());
    let rows = rows_within(config.pipeline.memory_budget, params.config(), layouts, in_flight)?;
    let mut room = Room { rows, wanted: MOST_WANTED, pages: wanted_pages(params.config(), config) };
    let tensor = |name: &str| params.tensor(name);
    for (stage, layout) in layouts.iter().enumerate() {
        for (device, assignment) in layout.assignments(stage, params, partition, &tensor, config.tune, packing) {
            let assignment = Assignment { spare: spare(device, ranks, layouts)?, ..assignment };
            room = room.min(backend::room(device, &assignment, room)?);
        }
    }
    Ok(room)
}

/// Rows whose activations, on all stages, and residual streams between them stay within `budget` bytes; at least 1.
fn rows_within(budget: usize, model: &Config, layouts: &[Layout], in_flight: usize) -> Result<usize> {
    let whole = &Partition::new(model, 1, 1, None, 1)?.stages[0].ranks[0];
    let widths = layouts.iter().flat_map(|layout| &layout.plan.bufs).map(|buf| whole.width(buf.dim, model));
    let row = size_of::<f32>() * (widths.sum::<usize>() + in_flight * layouts[0].lanes * model.hidden_size);
    Ok((budget / row.max(1)).clamp(1, MOST_ROWS))
}

/// The threads of each stage's CPU ranks. Stages that compute at the same time share out the CPU's threads, at least one each, those
/// that take turns have all of them.
fn pools(config: &ParallelConfig, layouts: &[Layout]) -> Result<Vec<Arc<Pool>>> {
    let on_cpu = |layout: &Layout| layout.groups.iter().any(|(device, _)| device.is_cpu());
    let sharing = layouts.iter().filter(|layout| on_cpu(layout)).count();
    if !config.pipeline.async_execution || sharing < 2 {
        let pool = Arc::new(Pool::new(config.threads)?);
        return Ok(vec![pool; layouts.len()]);
    }
    let all = config.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, NonZeroUsize::get));
    let mut next = 0;
    layouts
        .iter()
        .map(|layout| {
            let mut threads = 1;
            if on_cpu(layout) {
                threads = TensorParallelConfig::new(sharing, next).local_size(all).max(1);
                next += 1;
            }
            Pool::new(Some(threads)).map(Arc::new)
        })
        .collect()
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
