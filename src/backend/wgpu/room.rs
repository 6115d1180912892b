//! What an adapter can take: how large buffers may be, and so how many rows and pages fit.

use super::adapters::Adapter;
use super::dispatch::Split;
use super::gpu::Owner;
use crate::backend::{Assignment, BLOCK, Room, Wire};
use crate::device::Device;
use crate::error::Result;
use crate::partition::Dim;
use crate::plan::{Buf, Op, Rows};

/// The most that one place keeps of keys and values.
const MOST_KV: u64 = 1 << 30;

/// The largest sizes on an adapter, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Of what a kernel sees of a buffer.
    pub binding: u64,
    /// Of a buffer.
    pub buffer: u64,
    /// Of a workgroup's memory.
    workgroup: usize,
}

impl Bounds {
    pub(super) fn of(device: &Device, adapter: &Adapter) -> Self {
        let limits = &adapter.limits;
        let pretended = device.limits().map_or(u64::MAX, |l| l.largest_binding);
        // Bindings start and end at multiples of 256, so that a limit of 2^31 - 1 means a little less.
        let binding = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size).min(pretended) / 256 * 256;
        Self { binding, buffer: limits.max_buffer_size, workgroup: limits.max_compute_workgroup_storage_size as usize }
    }
}

/// One rank's part of a row of an activation, or all ranks'.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    /// Zeros in front: quantised weights whose columns begin inside a block have those of its start too.
    pub lead: usize,
    pub width: usize,
}

impl Part {
    /// Elements from one row to the next: kernels read rows in blocks of 32.
    pub(super) fn stride(self) -> usize {
        (self.lead + self.width).next_multiple_of(super::weights::BLOCK)
    }
}

/// Bytes of a page of one rank: the keys, or as many values, of one layer.
pub(super) fn page_bytes(assignment: &Assignment<'_>, rank: usize) -> u64 {
    (BLOCK * 4 * assignment.partition.ranks[rank].width(Dim::KvHeads, assignment.config)) as u64
}

/// The parts of an activation: one where it is shared, else one a hosted rank.
pub(super) fn parts(assignment: &Assignment<'_>, buf: Buf) -> Vec<Part> {
    let dim = assignment.plan.bufs[buf.0].dim;
    let ranks = if dim == Dim::Hidden { &assignment.ranks[..1] } else { &assignment.ranks[..] };
    let part = |&rank: &usize| {
        let partition = &assignment.partition.ranks[rank];
        // Whatever multiplies it has its columns cut where this is cut.
        let lead = if assignment.packing.is_some() && dim != Dim::Hidden {
            partition.range(dim, assignment.config).start % super::weights::BLOCK
        } else {
            0
        };
        Part { lead, width: partition.width(dim, assignment.config) }
    };
    ranks.iter().map(part).collect()
}

/// What a rank's projected queries, keys and values are together.
pub(super) fn projected(assignment: &Assignment<'_>, rank: usize) -> Part {
    let rank = &assignment.partition.ranks[rank];
    let width = |dim| rank.width(dim, assignment.config);
    Part { lead: 0, width: width(Dim::Heads) + 2 * width(Dim::KvHeads) }
}

/// Of each rank [`projected`], where a place keeps that for a moment.
fn all_projected(assignment: &Assignment<'_>) -> impl Iterator<Item = Part> {
    let kept = assignment.plan.ops.iter().any(|op| matches!(op, Op::AddBias { .. } | Op::HeadNorm { .. }));
    assignment.ranks.iter().filter(move |_| kept).map(|&rank| projected(assignment, rank))
}

/// Rows that a place shrinks to at most to have more room for keys and values.
const FEW_ROWS: usize = 16;

/// Most spans that attention is split into.
const MOST_SPANS: u64 = 64;

/// Elements that attention leaves of a span of a row, at most: of every head its sums, the largest score and the sum of shares.
pub(super) fn part_of_attention(assignment: &Assignment<'_>) -> usize {
    let heads = assignment.ranks.iter().map(|&rank| assignment.partition.ranks[rank].heads.len()).max().unwrap_or(0);
    heads * (assignment.config.head_dim + 2)
}

/// How attention is split into spans of `positions`, if it is at all: what is left of all spans has to fit a binding.
pub(super) fn split(bounds: Bounds, assignment: &Assignment<'_>, positions: Option<u32>) -> Option<Split> {
    let most = bounds.binding / (4 * Split::ROWS * part_of_attention(assignment)).max(1) as u64;
    let window = assignment.config.sliding_window;
    positions.filter(|_| most > 1).map(|positions| Split { positions, most: most.min(MOST_SPANS) as u32, window })
}

/// Bytes of the widest input of a linear layer in int8, with scales.
pub(super) fn int8_bytes(assignment: &Assignment<'_>, room: Room) -> usize {
    // Logits are no input.
    let inputs = (0..assignment.plan.bufs.len()).filter(|&i| assignment.plan.bufs[i].dim != Dim::Vocab);
    let widest = inputs.flat_map(|i| parts(assignment, Buf(i))).map(Part::stride).max().unwrap_or(0);
    room.rows * widest / super::weights::BLOCK * INT8_BLOCK
}

/// Bytes of a block of a row of int8 activations, as shaders/quantise.wgsl writes it.
pub(super) const INT8_BLOCK: usize = 48;

/// Bytes of a place's activations, at most, of what is read of them, of what attention leaves of spans, and of a linear layer's input in int8.
fn workspace(assignment: &Assignment<'_>, room: Room) -> u64 {
    let bytes = |i: usize| {
        let rows = if assignment.plan.bufs[i].rows == Rows::All { room.rows } else { room.wanted };
        parts(assignment, Buf(i)).into_iter().map(|part| 4 * (rows * part.stride()) as u64).sum::<u64>()
    };
    let all = (0..assignment.plan.bufs.len()).map(bytes);
    // Every lane has its own of what is carried, and of what is read, both where it is made and on its way.
    let plan = assignment.plan;
    let is_read = |i: usize| plan.segments.iter().any(|segment| segment.read == Some(Buf(i)));
    let own: u64 = (0..plan.bufs.len()).filter(|&i| plan.bufs[i].carried || is_read(i)).map(bytes).sum();
    let lanes = assignment.lanes as u64;
    let spans = 4 * Split::ROWS as u64 * MOST_SPANS * part_of_attention(assignment) as u64;
    let wire = if assignment.wire == Wire::F32 { 0 } else { own / 2 };
    let int8 = assignment.packing.as_ref().map_or(0, |_| int8_bytes(assignment, room)) as u64;
    let projected: u64 = all_projected(assignment).map(|part| 4 * (room.rows * part.stride()) as u64).sum();
    projected + all.clone().sum::<u64>() + (lanes - 1) * own + lanes * all.max().unwrap_or(0) + spans + wire + int8
}

/// What of `want` fits.
pub(super) fn fit(bounds: Bounds, assignment: &Assignment<'_>, owner: &Owner, want: Room) -> Result<Room> {
    let head_dim = assignment.config.head_dim;
    // What shaders/attend.wgsl declares: the query, the sums, the shares of a block, and the reduction's vectors.
    let attention = 8 * head_dim + 4 * BLOCK + 16 * BLOCK;
    if !head_dim.is_multiple_of(2) || attention > bounds.workgroup {
        let most = bounds.workgroup.saturating_sub(20 * BLOCK) / 8 / 2 * 2;
        return Err(owner.error(format!("heads of {head_dim} elements cannot be computed; even sizes up to {most} can")));
    }

    // The rotary angles of a row are an activation of one head's width.
    let widest = |rows| {
        let bufs = (0..assignment.plan.bufs.len()).filter(|&i| assignment.plan.bufs[i].rows == rows);
        let projected = all_projected(assignment).filter(|_| rows == Rows::All);
        bufs.flat_map(|i| parts(assignment, Buf(i))).chain(projected).map(Part::stride).max().unwrap_or(4).max(head_dim) as u64
    };
    // What a segment reads of all ranks is copied to one buffer.
    let read = |rows| {
        let reads = assignment.plan.segments.iter().filter_map(|s| s.read).filter(|b| assignment.plan.bufs[b.0].rows == rows);
        reads.map(|b| parts(assignment, b).into_iter().map(Part::stride).sum::<usize>()).max().unwrap_or(0).max(1) as u64
    };
    let rows = |of: Rows| (bounds.binding / 4 / widest(of)).min(bounds.buffer / 4 / read(of));
    let pages = |room: Room| {
        let bytes: Vec<u64> = assignment.ranks.iter().map(|&rank| page_bytes(assignment, rank).max(1)).collect();
        // Keys and values of every layer, and an entry in the table of every row's sequence.
        let all: u64 = bytes.iter().sum::<u64>() * 2 * assignment.plan.layers.max(1) as u64 + 4 * room.rows as u64;
        let spare = assignment.spare.map_or(MOST_KV, |spare| spare.saturating_sub(workspace(assignment, room)).min(MOST_KV));
        bytes.iter().map(|b| bounds.binding / b).min().unwrap_or(0).min(spare / all)
    };
    let most = |wanted: usize, fit: u64, what: &str| match usize::try_from(fit).unwrap_or(usize::MAX).min(wanted) {
        0 if wanted > 0 => {
            let memory = assignment.spare.map_or(String::new(), |spare| format!(" and the {spare} bytes of memory beside the weights"));
            Err(owner.error(format!("not even one {what} fits a binding of {} bytes{memory}", bounds.binding)))
        }
        n => Ok(n),
    };
    let mut room = Room {
        rows: most(want.rows, rows(Rows::All), "row of activations")?,
        wanted: most(want.wanted, rows(Rows::Wanted), "row of logits")?,
        pages: want.pages,
    };
    // Fewer rows at a time rather than no cache.
    while pages(room) == 0 && room.rows > FEW_ROWS {
        room = Room { rows: room.rows.div_ceil(2), wanted: room.wanted.min(room.rows.div_ceil(2)), ..room };
    }
    Ok(Room { pages: most(want.pages, pages(room), "page of keys")?, ..room })
}
