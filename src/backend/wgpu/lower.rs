//! Lowering: from a plan's ops to dispatches with their pipelines, bind groups and shapes, once, when a model is loaded.

mod products;

use super::cache::{Cache, Caches};
use super::dispatch::{Dispatch, Size, Split};
use super::gpu::Gpu;
use super::moment::Moment;
use super::room::{self, Bounds, Part};
use super::shaders::{Kernel, Pipelines, Shape};
use super::tune::Tuner;
use super::twins::Twins;
use super::weights::{BLOCK, Source};
use crate::backend::packer::Packer;
use crate::backend::steps::{Step, lower};
use crate::backend::{Assignment, Cut, KvType, Lane, Room, Wire};
use crate::error::Result;
use crate::kernels::pool::Pool;
use crate::partition::RankPartition;
use crate::plan::{Buf, Op, Rows, Weight};

/// A binding of a uniform may start at a multiple of this in every implementation.
const SLOT: usize = 256;

/// An activation of one rank, or of all: `[rows, stride]`.
#[derive(Clone)]
pub(super) struct Activation {
    pub buffer: wgpu::Buffer,
    pub part: Part,
    pub rows: Rows,
}

impl Activation {
    /// Elements from one row to the next; those that aren't its own stay zero.
    pub(super) fn stride(&self) -> usize {
        self.part.stride()
    }
}

/// A dispatch that still lacks its bind group: shapes are uploaded together, once all are known.
struct Call {
    rows: Rows,
    size: Size,
    kernel: Kernel,
    pipelines: [Vec<wgpu::ComputePipeline>; 2],
    shape: Shape,
    buffers: Vec<wgpu::Buffer>,
}

/// What [`Lowerer`] made.
pub(super) struct Lowered {
    pub dispatches: Vec<Dispatch>,
    pub caches: Caches,
    pub twins: Twins,
    /// Where sums lie as they travel.
    pub wire: wgpu::Buffer,
    /// Of each hosted rank: its logical weights, as they are held.
    pub weight_bytes: Vec<u64>,
    /// All that there are.
    #[cfg(test)]
    pub activations: Vec<Activation>,
}

/// Makes everything that a place keeps on its device.
pub(super) struct Lowerer<'a> {
    gpu: &'a Gpu,
    bounds: Bounds,
    assignment: &'a Assignment<'a>,
    moment: &'a Moment,
    twins: Twins,
    tuner: Tuner,
    pipelines: Pipelines<'a>,
    /// Packs matrices, on the threads of this pool.
    packer: Option<Packer<'a>>,
    pool: &'a Pool,
    /// `[buf][rank]`, one rank where it is shared; empty until it is asked for, since steps don't use every buffer of the plan.
    activations: Vec<Vec<Activation>>,
    room: Room,
    split: Option<Split>,
    /// Rows of sums in 2 bytes an element, coming or going; empty unless that is how they travel.
    wire: wgpu::Buffer,
    /// The input of a linear layer in int8, once one takes it so: all share it, one after the other.
    int8: Option<wgpu::Buffer>,
    /// Which activation of the step it holds, and from how many rows on.
    int8_of: Option<(wgpu::Buffer, usize)>,
    /// Of each rank, its projected queries, keys and values where they are not done with as they are computed. All layers share it.
    projected: Vec<Activation>,
    /// What attention leaves of every span of a batch's rows. All layers and ranks share it, one after the other.
    parts: wgpu::Buffer,
    /// `[layer][rank]`.
    caches: Vec<Vec<Cache>>,
    calls: Vec<Call>,
    /// See [`Lowered::weight_bytes`].
    weight_bytes: Vec<u64>,
}

impl<'a> Lowerer<'a> {
    #[expect(clippy::too_many_arguments)] // all that a place consists of
    pub(super) fn new(
        gpu: &'a Gpu,
        bounds: Bounds,
        assignment: &'a Assignment<'a>,
        room: Room,
        moments: &'a [Moment],
        split: Option<Split>,
        tuner: Tuner,
        pool: &'a Pool,
    ) -> Result<Self> {
        let bytes = split.map_or(0, |split| 4 * Split::ROWS * split.most as usize * room::part_of_attention(assignment));
        let parts = gpu.buffer("parts of attention", bytes.max(16) as u64, wgpu::BufferUsages::STORAGE)?;
        let stride = Part { lead: 0, width: assignment.config.hidden_size }.stride();
        let bytes = if assignment.wire == Wire::F32 { 0 } else { 2 * room.rows * stride };
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let wire = gpu.buffer("sums as they travel", bytes.max(16) as u64, usage)?;
        let mut caches = Vec::new();
        for _ in 0..assignment.plan.layers {
            let mut parts = Vec::new();
            for &rank in &assignment.ranks {
                parts.push(Cache::new(gpu, room.pages, room::page_bytes(assignment, rank))?);
            }
            caches.push(parts);
        }
        Ok(Self {
            gpu,
            bounds,
            assignment,
            moment: &moments[0],
            twins: Twins::of(moments),
            pipelines: Pipelines::new(&gpu.device, tuner.base(), assignment.config.head_dim),
            tuner,
            packer: assignment.packing.as_ref().map(|packing| Packer::new(assignment, packing, &gpu.owner.device)),
            pool,
            activations: vec![Vec::new(); assignment.plan.bufs.len()],
            room,
            split,
            wire,
            int8: None,
            int8_of: None,
            projected: Vec::new(),
            parts,
            caches,
            calls: Vec::new(),
            weight_bytes: vec![0; assignment.ranks.len()],
        })
    }

    /// An activation's parts: one where it is shared, else one a rank.
    pub(super) fn parts_of(&mut self, buf: Buf) -> Result<&[Activation]> {
        let parts = &mut self.activations[buf.0];
        if parts.is_empty() {
            let spec = &self.assignment.plan.bufs[buf.0];
            let rows = if spec.rows == Rows::All { self.room.rows } else { self.room.wanted };
            let mut usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
            let is_mapped = self.gpu.maps && self.assignment.plan.segments.iter().any(|segment| segment.read == Some(buf));
            usage.set(wgpu::BufferUsages::MAP_READ, is_mapped);
            for part in room::parts(self.assignment, buf) {
                let bytes = 4 * (rows * part.stride()).max(4) as u64;
                let make = || self.gpu.buffer(spec.name, bytes, usage);
                let buffer = make()?;
                // What is mapped for one lane is out of the others' reach.
                if spec.carried || is_mapped {
                    self.twins.0.iter_mut().try_for_each(|lane| make().map(|twin| lane.push((buffer.clone(), twin))))?;
                }
                parts.push(Activation { buffer, part, rows: spec.rows });
            }
        }
        Ok(parts)
    }

    /// A dispatch that narrows an activation for its way, or widens it, unless it travels as it is.
    pub(super) fn travel(&mut self, buf: Buf, leaves: bool) -> Result<bool> {
        let wire = self.assignment.wire;
        if wire == Wire::F32 {
            return Ok(false);
        }
        let part = self.part(buf, 0)?;
        let (kernel, mut buffers) =
            (if leaves { Kernel::Narrow(wire) } else { Kernel::Widen(wire) }, vec![part.buffer.clone(), self.wire.clone()]);
        if !leaves {
            buffers.reverse();
        }
        self.call(part.rows, Size::Elements(part.stride() / 4), |_| vec![kernel], Shape::of(&part), buffers)?;
        Ok(true)
    }

    /// Lowers the ops of a segment for all ranks. The dispatches gather up until [`Self::finish`].
    pub(super) fn segment(&mut self, ops: &[Op]) -> Result<()> {
        lower(ops).iter().try_for_each(|step| self.step(step))
    }

    fn step(&mut self, step: &Step) -> Result<()> {
        self.int8_of = None;
        match *step {
            Step::Norm { add, x, y, weight } => self.norm(add, x, y, weight),
            Step::Linear { x, ref to, sum } => to.iter().try_for_each(|&(weight, y)| self.linear(x, y, weight, sum)),
            Step::Qkv { x, ref parts, layer } => self.qkv(x, parts, layer),
            Step::GatedLinear { x, gate, up, y, .. } => self.gated_linear(x, [gate, up], y),
            Step::Op(Op::Attend { layer, q, y }) => self.attend(layer, q, y),
            Step::Op(Op::Add { x, y }) => self.elementwise(Kernel::Add, x, &[x, y], None),
            Step::Op(Op::TakeRows { x, y }) => self.elementwise(Kernel::TakeRows, y, &[x, y], Some(&self.moment.wanted)),
            Step::Op(op) => Err(self.gpu.owner.error(format!("no kernel computes {op:?} on its own"))),
        }
    }

    fn norm(&mut self, add: Option<Buf>, x: Buf, y: Buf, weight: Weight) -> Result<()> {
        // Every rank has the same rows and the same weight: one of each serves all, and counts for each.
        let matrix = self.assignment.weight(weight, self.assignment.ranks[0])?;
        self.weight_bytes.iter_mut().for_each(|bytes| *bytes += matrix.bytes() as u64);
        let (x, y) = (self.part(x, 0)?, self.part(y, 0)?);
        let mut values = vec![0.0; x.stride()];
        matrix.row_to_f32(0, &mut values[..matrix.cols()]);
        let buffer = self.upload(&self.assignment.plan.weights[weight.0].name, &values)?;
        let shape = Shape { eps: self.assignment.config.rms_norm_eps, accumulate: u32::from(add.is_some()), ..Shape::of(&x) };
        let added = add.map_or_else(|| Ok(buffer.clone()), |add| self.part(add, 0).map(|added| added.buffer))?;
        self.call(x.rows, Size::Groups(1), |_| vec![Kernel::RmsNorm], shape, vec![buffer, x.buffer, y.buffer, added])
    }

    /// A buffer of constants.
    fn upload(&self, name: &str, values: &[f32]) -> Result<wgpu::Buffer> {
        let size = size_of_val(values) as u64;
        let buffer = self.gpu.buffer(name, size, wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST)?;
        self.gpu.scoped(name, size, || self.gpu.queue.write_buffer(&buffer, 0, bytemuck::cast_slice(values)))?;
        Ok(buffer)
    }

    fn attend(&mut self, layer: usize, q: Buf, y: Buf) -> Result<()> {
        for rank in 0..self.assignment.ranks.len() {
            let (q, y) = (self.part(q, rank)?, self.part(y, rank)?);
            let shape = Shape { stride: y.stride() as u32, lead: y.part.lead as u32, ..self.heads(rank, &q) };
            let (heads, head_dim) = (self.rank(rank).heads.len(), self.assignment.config.head_dim);
            let cache = &self.caches[layer][rank];
            let Moment { positions, tables, .. } = self.moment;
            let buffers = [&q.buffer, &y.buffer, &cache.keys, &cache.values, positions, tables, &self.parts].map(wgpu::Buffer::clone);
            self.call(q.rows, Size::Spans(heads, self.split), |kv| vec![Kernel::Attend(kv)], shape, buffers.into())?;
            if self.split.is_some() {
                let buffers = vec![self.parts.clone(), y.buffer];
                self.call(q.rows, Size::Merge(heads * head_dim, self.split), |_| vec![Kernel::AttendMerge], shape, buffers)?;
            }
        }
        Ok(())
    }

    /// An op that treats every vector of 4 alike. `y` says how many there are.
    fn elementwise(&mut self, kernel: Kernel, y: Buf, bufs: &[Buf], moment: Option<&wgpu::Buffer>) -> Result<()> {
        for rank in 0..self.parts_of(y)?.len() {
            let y = self.part(y, rank)?;
            let shape = Shape::of(&y);
            let mut buffers = bufs.iter().map(|&buf| self.part(buf, rank).map(|part| part.buffer)).collect::<Result<Vec<_>>>()?;
            buffers.extend(moment.cloned());
            self.call(y.rows, Size::Elements(shape.width4 as usize), |_| vec![kernel], shape, buffers)?;
        }
        Ok(())
    }

    /// A rank's slice of a matrix.
    fn source(&mut self, weight: Weight, rank: usize) -> Result<Source> {
        let of = self.assignment.ranks[rank];
        let source = match &mut self.packer {
            Some(packer) => match self.pool.enter(|| packer.pack(weight, of))? {
                Some(packed) => Source::Packed(packed),
                None => {
                    let Cut { whole, rows, cols } = self.assignment.cut(weight, of)?;
                    let lead = cols.start % BLOCK;
                    Source::Stored(whole.slice(rows, cols.start - lead..cols.end), lead)
                }
            },
            None => Source::Stored(self.assignment.weight(weight, of)?, 0),
        };
        self.weight_bytes[rank] += source.bytes() as u64;
        Ok(source)
    }

    /// Hosted rank `rank`'s part of an activation.
    fn part(&mut self, buf: Buf, rank: usize) -> Result<Activation> {
        let parts = self.parts_of(buf)?;
        Ok(parts[rank.min(parts.len() - 1)].clone())
    }

    fn rank(&self, rank: usize) -> &'a RankPartition {
        &self.assignment.partition.ranks[self.assignment.ranks[rank]]
    }

    /// The shape of what reads `x` and deals with a rank's heads.
    fn heads(&self, rank: usize, x: &Activation) -> Shape {
        let config = self.assignment.config;
        let RankPartition { heads, kv_heads, .. } = self.rank(rank);
        Shape {
            heads: heads.len() as u32,
            half_head: (config.head_dim / 2) as u32,
            kv_heads: kv_heads.len() as u32,
            first_head: heads.start as u32,
            first_kv_head: kv_heads.start as u32,
            group: (config.n_heads / config.n_kv_heads) as u32,
            window: config.sliding_window.map_or(0, |w| u32::try_from(w).unwrap_or(u32::MAX)),
            scale: 1.0 / (config.head_dim as f32).sqrt(),
            ..Shape::of(x)
        }
    }

    /// Adds a dispatch, unless there is nothing to compute. `kernels`: for either type of keys and values, see [`Dispatch::pipelines`].
    fn call(
        &mut self,
        rows: Rows,
        size: Size,
        kernels: impl Fn(KvType) -> Vec<Kernel>,
        shape: Shape,
        buffers: Vec<wgpu::Buffer>,
    ) -> Result<()> {
        let (Size::Groups(n)
        | Size::Elements(n)
        | Size::Linear(n, _)
        | Size::LinearInt8(n, _)
        | Size::Quantise(n, _)
        | Size::Spans(n, _)
        | Size::Merge(n, _)) = size;
        if n == 0 {
            return Ok(());
        }
        let kernels = [KvType::F32, KvType::F16].map(kernels);
        let (kernel, pipelines) = (kernels[0][0], &mut self.pipelines);
        let made = self.gpu.scoped("pipelines", 0, || kernels.map(|kernels| kernels.into_iter().map(|k| pipelines.get(k)).collect()))?;
        self.calls.push(Call { rows, size, kernel, pipelines: made, shape, buffers });
        Ok(())
    }

    /// How many dispatches there are so far.
    pub(super) fn len(&self) -> usize {
        self.calls.len()
    }

    /// Uploads the shapes and binds everything.
    pub(super) fn finish(mut self) -> Result<Lowered> {
        let gpu = self.gpu;
        let size = SLOT * self.calls.len().max(1);
        let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let shapes = gpu.buffer("shapes", size as u64, usage)?;
        let mut bytes = vec![0; size];
        for (slot, call) in bytes.chunks_exact_mut(SLOT).zip(&self.calls) {
            let shape = bytemuck::bytes_of(&call.shape);
            slot[..shape.len()].copy_from_slice(shape);
        }
        gpu.scoped("shapes", size as u64, || gpu.queue.write_buffer(&shapes, 0, &bytes))?;

        let (counts, pipelines, twins) = (&self.moment.counts, &mut self.pipelines, &self.twins);
        let mut dispatches = Vec::new();
        for (i, call) in self.calls.into_iter().enumerate() {
            let at = (SLOT * i) as u64;
            let mut bind = |lane: Lane| {
                let buffers: Vec<_> = call.buffers.iter().map(|buffer| twins.in_lane(lane, buffer).clone()).collect();
                gpu.scoped("bind groups", 0, || pipelines.bind(call.kernel, &shapes, at, twins.in_lane(lane, counts), &buffers))
            };
            let binds = (0..=twins.0.len()).map(&mut bind).collect::<Result<_>>()?;
            let Call { rows, size, pipelines, shape, .. } = call;
            let repeats = matches!(size, Size::Linear(..) | Size::LinearInt8(..)) && shape.accumulate == 0;
            dispatches.push(Dispatch { rows, size, pipelines, repeats, binds });
        }
        if let Some(packer) = self.packer {
            packer.keep();
        }
        let caches = Caches::new(gpu, self.caches.into_iter().flatten().collect())?;
        Ok(Lowered {
            dispatches,
            caches,
            twins: self.twins,
            wire: self.wire,
            weight_bytes: self.weight_bytes,
            #[cfg(test)]
            activations: self.activations.into_iter().flatten().chain(self.projected).collect(),
        })
    }
}

impl Shape {
    /// What every kernel reads of an activation's shape.
    fn of(x: &Activation) -> Self {
        let rows_of = match x.rows {
            Rows::All => 0,
            Rows::Wanted => 1,
        };
        Self { rows_of, width: x.part.width as u32, width4: (x.stride() / 4) as u32, ..Self::default() }
    }
}
