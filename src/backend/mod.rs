//! [`Place`]: one device that hosts ranks of a stage, and what the engine asks of it.

#[cfg(feature = "gpu")]
pub(crate) mod wgpu;

use std::any::Any;
use std::ops::Range;
use std::path::Path;
use std::task::Poll;
use std::time::Duration;

use crate::backend::cpu::{CpuPlace, Threads};
use crate::config::Config;
use crate::device::Device;
use crate::error::Result;
pub(crate) use crate::kernels::Numerics;
use crate::kernels::matrix::Matrix;
use crate::kernels::quant::{Packed, QuantFormat};
pub(crate) use crate::kernels::wire::Wire;
use crate::partition::StagePartition;
use crate::plan::{Plan, Rows, SegmentId, Weight, WeightShape};

pub(crate) mod cpu;
mod packer;
#[cfg(any(fuzzing, test))]
pub(crate) use packer::fuzzed;
mod steps;

/// Positions in one block of attention, and in one f32 page.
pub(crate) const BLOCK: usize = 64;

/// How keys and values are cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum KvType {
    /// f32: the exact forms.
    #[default]
    F32,
    /// f16: half the memory, rounded.
    F16,
}

impl KvType {
    /// Positions in a page. A page has the same bytes in either type, so that one pool serves both.
    pub(crate) fn page_len(self) -> usize {
        match self {
            Self::F32 => BLOCK,
            Self::F16 => 2 * BLOCK,
        }
    }
}

/// Index of a page in the pool of every place.
pub(crate) type PageId = u32;

/// One row of a launch: a token of a sequence, at its position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Row {
    /// Index into [`Batch::seqs`].
    pub seq: u32,
    pub pos: u32,
}

/// The pages of one sequence: `pages[i]` holds the positions from `(first_page + i) * page_len`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Seq {
    pub pages: Vec<PageId>,
    pub first_page: u32,
}

/// What one walk through the plan computes: prefill, decode, a batch and a draft are all rows.
#[derive(Debug, Clone)]
pub(crate) struct Batch {
    /// Grows with every batch of an engine: a place that sees a new number uploads the batch.
    pub number: u64,
    /// Rows of one sequence are contiguous, their positions rising.
    pub rows: Vec<Row>,
    pub seqs: Vec<Seq>,
    /// Indices into `rows` of those whose logits are wanted, rising.
    pub wanted: Vec<u32>,
    /// Pages to be copied, `[from, to]`, before anything else is done, in the stage's first segment: a sequence that shares a page with another writes a copy of it.
    pub copies: Vec<[PageId; 2]>,
    /// Cosine and sine of the rotary angles: `[rows, 2, head_dim / 2]`, cosines first.
    pub rope: Vec<f32>,
    pub kv: KvType,
    pub numerics: Numerics,
    /// How what ranks sum travels.
    pub wire: Wire,
    /// Whether devices that can measure their own time do so.
    #[cfg_attr(not(feature = "gpu"), expect(dead_code))]
    pub timed: bool,
}

/// The rows of a batch on their way into a stage and from one stage to the next: `[rows, width]`, no padding.
#[derive(Debug)]
pub(crate) enum Flow {
    /// In the host's memory.
    Host(Vec<f32>),
    /// On the device that computed them, where the next stage lives too; only its backend knows how. What is behind the pointer keeps wgpu's deep
    /// types out of ours: to prove them `Send` exceeds the compiler's recursion limit in crates that use this one.
    #[cfg_attr(not(feature = "gpu"), expect(dead_code))]
    Device(Box<dyn Any + Send>),
}

impl Flow {
    /// The rows, if they are in the host's memory.
    pub(crate) fn host(&self) -> Option<&[f32]> {
        match self {
            Self::Host(rows) => Some(rows),
            Self::Device(_) => None,
        }
    }
}

impl Rows {
    /// How many a batch has.
    pub(crate) fn of(self, batch: &Batch) -> usize {
        match self {
            Self::All => batch.rows.len(),
            Self::Wanted => batch.wanted.len(),
        }
    }
}

/// Which of the batches that are on their way in a place at once: each has its own rows from segment to segment.
pub(crate) type Lane = usize;

/// Most rows, wanted rows and pages that a place can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Room {
    pub rows: usize,
    pub wanted: usize,
    pub pages: usize,
}

impl Room {
    /// What both can take.
    pub(crate) fn min(self, other: Self) -> Self {
        Self { rows: self.rows.min(other.rows), wanted: self.wanted.min(other.wanted), pages: self.pages.min(other.pages) }
    }
}

/// What a place has done and holds. Counted by the place itself, so that tests see the split.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlaceCounts {
    /// Bytes of weights held, by rank order within the place summed up.
    pub weight_bytes: u64,
    /// Segments run: on a GPU, command buffers submitted.
    pub submissions: u64,
    /// Ops run, of all hosted ranks.
    pub ops: u64,
    /// Compute dispatches encoded; 0 on the CPU.
    pub dispatches: u64,
    /// Nanoseconds that the device computed by its own clock, in batches that were timed; 0 on the CPU, where there are no timestamps, and for
    /// what ends in rows that stay on the device for the next stage.
    pub device_nanoseconds: u64,
    /// Bytes written by the host and read back by it, for collectives.
    pub bytes_written: u64,
    pub bytes_read: u64,
}

/// A device that holds the weights, activations and KV pages of the ranks of one stage that live there, and runs segments.
///
/// One launch is in flight a lane. They run in the order in which they were launched, so that what one stores in the cache, the next one sees.
/// The engine launches every place before it waits for any.
pub(crate) trait Place: Send {
    /// The ranks of the stage that live here, rising.
    fn ranks(&self) -> &[usize];

    /// The device's name, for messages.
    fn device(&self) -> &str;

    /// Whether `launch` returns before the work is done. Those places are launched first.
    fn is_asynchronous(&self) -> bool;

    /// Starts a segment: writes `input` to the segment's `write` buffer, runs the ops, copies `read` out.
    fn launch(&mut self, lane: Lane, segment: SegmentId, batch: &Batch, input: &Flow) -> Result<()>;

    /// Whether the launch is done; waits for it no longer than `within`.
    fn poll(&mut self, lane: Lane, within: Duration) -> Result<Poll<()>>;

    /// Hands over what the segment read, once `poll` said ready, in pieces from front to back: for each buffer of ranks in order, `[rows, width]` without
    /// padding. Of a shared buffer there is one part; of a sharded one, a part a rank, one behind the other.
    fn output(&mut self, lane: Lane, take: &mut dyn FnMut(&[f32])) -> Result<()>;

    /// [`Self::output`] in one piece.
    fn collect(&mut self, lane: Lane) -> Result<Vec<f32>> {
        let mut all = Vec::new();
        self.output(lane, &mut |piece| all.extend_from_slice(piece))?;
        Ok(all)
    }

    /// [`Self::output`] as the next stage takes it, where the segment ends its stage.
    fn pass(&mut self, lane: Lane) -> Result<Flow> {
        self.collect(lane).map(Flow::Host)
    }

    /// What was done and is held since the place was made.
    fn counts(&self) -> PlaceCounts;

    /// Bytes of weights of each hosted rank.
    fn weight_bytes(&self) -> Vec<u64>;
}

/// What a place is made of: the ranks of a stage that it hosts, what they compute, and where their weights come from.
#[derive(Clone)]
pub(crate) struct Assignment<'a> {
    pub stage: usize,
    /// Whether the next stage lives on this very device, with all its ranks: what is passed on need not leave it.
    #[cfg_attr(not(feature = "gpu"), expect(dead_code))] // the CPU's rows never leave the host
    pub stays: bool,
    /// Bytes that its device has for the cache and activations of this place, beside all weights that it will hold; `None` if nobody knows.
    #[cfg_attr(not(feature = "gpu"), expect(dead_code))] // the CPU's grow as they are used
    pub spare: Option<u64>,
    /// Batches that are on their way in it at once.
    pub lanes: usize,
    /// How what ranks sum travels, in batches of many rows.
    #[cfg_attr(not(feature = "gpu"), expect(dead_code))] // the CPU's rows never travel
    pub wire: Wire,
    /// Whether kernels are chosen by measuring them on the device.
    #[cfg_attr(not(feature = "gpu"), expect(dead_code))] // the CPU's need none
    pub tune: bool,
    /// Ranks of the stage that live in this place, rising.
    pub ranks: Vec<usize>,
    pub plan: &'a Plan,
    pub config: &'a Config,
    pub partition: &'a StagePartition,
    /// A whole tensor of the checkpoint by name, mapped and already checked; a vector is a matrix of one row.
    pub tensor: &'a (dyn Fn(&str) -> Result<Matrix> + Sync),
    /// How its matrices are packed as they are loaded; `None` leaves all as they are stored.
    pub packing: Option<Packing<'a>>,
}

/// How a place packs its matrices as it loads them: those that are stored quantised keep their format.
#[derive(Clone, Copy)]
pub(crate) struct Packing<'a> {
    /// What the others are quantised to; `None` leaves them as they are.
    pub format: Option<QuantFormat>,
    /// The directory in which what was packed is kept for the next load, and what tells this checkpoint from others.
    pub cache: Option<(&'a Path, &'a str)>,
    /// Told of every so many bytes of the checkpoint that are done.
    pub progress: &'a (dyn Fn(usize) + Sync),
}

impl Packing<'_> {
    /// What a matrix is packed as.
    pub(crate) fn format_of(&self, whole: &Matrix) -> Option<QuantFormat> {
        whole.dtype().quantised().or(self.format)
    }
}

/// A rank's slice of a matrix, and the whole.
pub(crate) struct Cut {
    pub whole: Matrix,
    pub rows: Range<usize>,
    pub cols: Range<usize>,
}

impl Assignment<'_> {
    /// Rank `rank`'s slice of a weight.
    pub(crate) fn weight(&self, weight: Weight, rank: usize) -> Result<Matrix> {
        let Cut { whole, rows, cols } = self.cut(weight, rank)?;
        Ok(whole.slice(rows, cols))
    }

    /// Where rank `rank`'s slice of a weight is in the whole.
    pub(crate) fn cut(&self, weight: Weight, rank: usize) -> Result<Cut> {
        let spec = &self.plan.weights[weight.0];
        let whole = (self.tensor)(&spec.name)?;
        let (rows, cols) = match spec.shape {
            WeightShape::Vector => (0..whole.rows(), 0..whole.cols()),
            WeightShape::Bias { out } => (0..whole.rows(), self.partition.ranks[rank].range(out, self.config)),
            WeightShape::Matrix { out, input } => {
                let rank = &self.partition.ranks[rank];
                (rank.range(out, self.config), rank.range(input, self.config))
            }
        };
        Ok(Cut { whole, rows, cols })
    }

    /// Bytes that rank `rank` will hold of a weight.
    pub(crate) fn bytes(&self, weight: Weight, rank: usize) -> Result<usize> {
        let Cut { whole, rows, cols } = self.cut(weight, rank)?;
        let format = match self.plan.weights[weight.0].shape {
            WeightShape::Matrix { .. } => self.packing.and_then(|packing| packing.format_of(&whole)),
            WeightShape::Vector | WeightShape::Bias { .. } => None,
        };
        let stored = || rows.len() * whole.dtype().bytes(cols.len());
        Ok(format.map_or_else(stored, |format| Packed::bytes_for(format, rows.len(), cols.len(), cols.start)))
    }
}

/// What `device` can take of `want` for its assignment.
pub(crate) fn room(device: &Device, assignment: &Assignment<'_>, want: Room) -> Result<Room> {
    #[cfg(feature = "gpu")]
    if !device.is_cpu() {
        return wgpu::GpuPlace::room(device, assignment, want);
    }
    let _ = (device, assignment);
    // The CPU takes what is wanted: activations and pages grow as they are used.
    Ok(want)
}

#[cfg(feature = "gpu")]
pub(crate) use wgpu::Opened;

/// There is nothing to open.
#[cfg(not(feature = "gpu"))]
#[derive(Default)]
pub(crate) struct Opened {}

/// Opens `device`, unless the model has done so before, and loads its assignment.
pub(crate) fn place(
    device: &Device,
    assignment: &Assignment<'_>,
    room: Room,
    threads: &Threads,
    opened: &mut Opened,
) -> Result<Box<dyn Place>> {
    #[cfg(feature = "gpu")]
    if !device.is_cpu() {
        return Ok(Box::new(wgpu::GpuPlace::new(device, assignment.clone(), room, &threads.pool, opened)?));
    }
    let _ = (device, room, opened);
    Ok(Box::new(CpuPlace::new(assignment, threads)?))
}
