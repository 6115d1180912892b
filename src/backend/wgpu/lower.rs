//! Lowering: from a plan's ops to dispatches with their pipelines, bind groups and shapes, once, when a model is loaded.

use super::cache::{Cache, Caches};
use super::dispatch::{Dispatch, Size};
use super::gpu::Gpu;
use super::moment::Moment;
use super::room::{self, Bounds};
use super::shaders::{Kernel, Pipelines, Shape, Tuning, Variant};
use super::weights::GpuWeight;
use crate::backend::{Assignment, KvType, Room};
use crate::error::Result;
use crate::partition::{RankPartition, TensorParallelStrategy};
use crate::plan::{Buf, Op, Rows, Weight};

/// A binding of a uniform may start at a multiple of this in every implementation.
const SLOT: usize = 256;

/// An activation of one rank, or of all: `[rows, stride]`.
#[derive(Clone)]
pub(super) struct Activation {
    pub buffer: wgpu::Buffer,
    pub width: usize,
    pub rows: Rows,
}

impl Activation {
    /// Elements from one row to the next; those beyond the width stay zero.
    pub(super) fn stride(&self) -> usize {
        room::stride(self.width)
    }
}

/// A dispatch that still lacks its bind group: shapes are uploaded together, once all are known.
struct Call {
    rows: Rows,
    size: Size,
    kernel: Kernel,
    pipelines: [wgpu::ComputePipeline; 2],
    shape: Shape,
    buffers: Vec<wgpu::Buffer>,
}

/// What [`Lowerer`] made.
pub(super) struct Lowered {
    pub dispatches: Vec<Dispatch>,
    pub caches: Caches,
    /// Of each hosted rank: its logical weights, in their dtype.
    pub weight_bytes: Vec<u64>,
}

/// Makes everything that a place keeps on its device.
pub(super) struct Lowerer<'a> {
    gpu: &'a Gpu,
    bounds: Bounds,
    assignment: &'a Assignment<'a>,
    moment: &'a Moment,
    pipelines: Pipelines<'a>,
    /// `[buf][rank]`, one rank where it is shared.
    activations: Vec<Vec<Activation>>,
    /// `[layer][rank]`.
    caches: Vec<Vec<Cache>>,
    calls: Vec<Call>,
    /// See [`Lowered::weight_bytes`].
    weight_bytes: Vec<u64>,
}

impl<'a> Lowerer<'a> {
    pub(super) fn new(
        gpu: &'a Gpu,
        bounds: Bounds,
        assignment: &'a Assignment<'a>,
        room: Room,
        moment: &'a Moment,
        tuning: Tuning,
    ) -> Result<Self> {
        let copied = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let mut activations = Vec::new();
        for (i, spec) in assignment.plan.bufs.iter().enumerate() {
            let rows = if spec.rows == Rows::All { room.rows } else { room.wanted };
            let mut parts = Vec::new();
            for width in room::widths(assignment, Buf(i)) {
                let bytes = 4 * (rows * room::stride(width)).max(4) as u64;
                parts.push(Activation { buffer: gpu.buffer(spec.name, bytes, copied)?, width, rows: spec.rows });
            }
            activations.push(parts);
        }
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
            moment,
            pipelines: Pipelines::new(&gpu.device, tuning, assignment.config.head_dim),
            activations,
            caches,
            calls: Vec::new(),
            weight_bytes: vec![0; assignment.ranks.len()],
        })
    }

    /// An activation's parts: one where it is shared, else one a rank.
    pub(super) fn parts(&self, buf: Buf) -> &[Activation] {
        &self.activations[buf.0]
    }

    /// Lowers one op for all ranks. The dispatches gather up until [`Self::finish`].
    pub(super) fn op(&mut self, op: &Op) -> Result<()> {
        match *op {
            Op::RmsNorm { x, y, weight } => self.rms_norm(x, y, weight)?,
            Op::Linear { x, y, weight, strategy } => self.linear(x, y, weight, strategy)?,
            Op::Rope { x } => self.rope(x)?,
            Op::StoreKv { layer, k, v } => self.store_kv(layer, k, v)?,
            Op::Attend { layer, q, y } => self.attend(layer, q, y)?,
            Op::SwiGlu { gate, up, y } => self.elementwise(Kernel::SwiGlu, y, &[gate, up, y], None)?,
            Op::Add { x, y } => self.elementwise(Kernel::Add, x, &[x, y], None)?,
            Op::TakeRows { x, y } => self.elementwise(Kernel::TakeRows, y, &[x, y], Some(&self.moment.wanted))?,
        }
        Ok(())
    }

    fn rms_norm(&mut self, x: Buf, y: Buf, weight: Weight) -> Result<()> {
        // Every rank has the same rows and the same weight: one of each serves all, and counts for each.
        let weight = self.upload(weight, 0)?;
        for bytes in &mut self.weight_bytes[1..] {
            *bytes += weight.dtype.bytes(weight.cols) as u64;
        }
        let (x, y) = (self.part(x, 0), self.part(y, 0));
        let shape = Shape { width: x.width as u32, eps: self.assignment.config.rms_norm_eps, ..Shape::of(&x) };
        let variant = Variant { kernel: Kernel::RmsNorm, weight: Some(weight.dtype), kv: None };
        let buffers = vec![weight.blocks[0].buffer.clone(), x.buffer, y.buffer];
        self.call(x.rows, Size::Groups(1), [variant; 2], shape, buffers)
    }

    fn linear(&mut self, x: Buf, y: Buf, weight: Weight, strategy: TensorParallelStrategy) -> Result<()> {
        let row_parallel = strategy == TensorParallelStrategy::RowParallel;
        // A shared result is the sum over the ranks, or the same on each.
        let ranks = if row_parallel { self.assignment.ranks.len() } else { self.parts(y).len() };
        for rank in 0..ranks {
            let weight = self.upload(weight, rank)?;
            let accumulate = row_parallel && rank > 0;
            // A rank that owns nothing of the input adds nothing; the first one still writes the zeros that others add to.
            if accumulate && weight.cols == 0 {
                continue;
            }
            let (x, y) = (self.part(x, rank), self.part(y, rank));
            for block in &weight.blocks {
                let shape = Shape {
                    stride: y.stride() as u32,
                    out: block.rows as u32,
                    first_out: block.first as u32,
                    accumulate: u32::from(accumulate),
                    ..Shape::of(&x)
                };
                let variant = |kernel| Variant { kernel, weight: Some(weight.dtype), kv: None };
                let variants = [variant(Kernel::Linear), variant(Kernel::LinearTile)];
                let buffers = vec![block.buffer.clone(), x.buffer.clone(), y.buffer.clone()];
                self.call(x.rows, Size::Linear(block.rows), variants, shape, buffers)?;
            }
        }
        Ok(())
    }

    fn rope(&mut self, x: Buf) -> Result<()> {
        for x in self.parts(x).to_vec() {
            let shape = Shape { heads: (x.width / self.assignment.config.head_dim) as u32, ..self.heads(&x) };
            let buffers = vec![x.buffer.clone(), self.moment.angles.clone()];
            let variant = Variant { kernel: Kernel::Rope, weight: None, kv: None };
            self.call(x.rows, Size::Elements(x.width / 2), [variant; 2], shape, buffers)?;
        }
        Ok(())
    }

    fn store_kv(&mut self, layer: usize, k: Buf, v: Buf) -> Result<()> {
        for rank in 0..self.assignment.ranks.len() {
            let (k, v, cache) = (self.part(k, rank), self.part(v, rank), &self.caches[layer][rank]);
            let shape = Shape { kv_heads: self.rank(rank).kv_heads.len() as u32, ..self.heads(&k) };
            let Moment { positions, tables, .. } = self.moment;
            let buffers = [&k.buffer, &v.buffer, &cache.keys, &cache.values, positions, tables].map(wgpu::Buffer::clone);
            self.call(k.rows, Size::Elements(k.width / 2), by_kv(Kernel::StoreKv), shape, buffers.into())?;
        }
        Ok(())
    }

    fn attend(&mut self, layer: usize, q: Buf, y: Buf) -> Result<()> {
        let config = self.assignment.config;
        for rank in 0..self.assignment.ranks.len() {
            let (q, y, cache) = (self.part(q, rank), self.part(y, rank), &self.caches[layer][rank]);
            let RankPartition { heads, kv_heads, .. } = self.rank(rank);
            let shape = Shape {
                heads: heads.len() as u32,
                kv_heads: kv_heads.len() as u32,
                first_head: heads.start as u32,
                first_kv_head: kv_heads.start as u32,
                group: (config.n_heads / config.n_kv_heads) as u32,
                window: config.sliding_window.map_or(0, |w| u32::try_from(w).unwrap_or(u32::MAX)),
                scale: 1.0 / (config.head_dim as f32).sqrt(),
                ..self.heads(&q)
            };
            let groups = heads.len();
            let Moment { positions, tables, .. } = self.moment;
            let buffers = [&q.buffer, &y.buffer, &cache.keys, &cache.values, positions, tables].map(wgpu::Buffer::clone);
            self.call(q.rows, Size::Groups(groups), by_kv(Kernel::Attend), shape, buffers.into())?;
        }
        Ok(())
    }

    /// An op that treats every vector of 4 alike. `y` says how many there are.
    fn elementwise(&mut self, kernel: Kernel, y: Buf, bufs: &[Buf], moment: Option<&wgpu::Buffer>) -> Result<()> {
        for rank in 0..self.parts(y).len() {
            let y = self.part(y, rank);
            let shape = Shape::of(&y);
            let mut buffers: Vec<_> = bufs.iter().map(|&buf| self.part(buf, rank).buffer).collect();
            buffers.extend(moment.cloned());
            let variant = Variant { kernel, weight: None, kv: None };
            self.call(y.rows, Size::Elements(shape.width4 as usize), [variant; 2], shape, buffers)?;
        }
        Ok(())
    }

    /// Puts a rank's slice of a weight on the device.
    fn upload(&mut self, weight: Weight, rank: usize) -> Result<GpuWeight> {
        let matrix = self.assignment.weight(weight, self.assignment.ranks[rank])?;
        self.weight_bytes[rank] += matrix.bytes() as u64;
        GpuWeight::upload(self.gpu, self.bounds, &self.assignment.plan.weights[weight.0].name, &matrix)
    }

    /// Hosted rank `rank`'s part of an activation.
    fn part(&self, buf: Buf, rank: usize) -> Activation {
        let parts = self.parts(buf);
        parts[rank.min(parts.len() - 1)].clone()
    }

    fn rank(&self, rank: usize) -> &'a RankPartition {
        &self.assignment.partition.ranks[self.assignment.ranks[rank]]
    }

    /// The shape of an activation of heads.
    fn heads(&self, x: &Activation) -> Shape {
        let half_head = (self.assignment.config.head_dim / 2) as u32;
        Shape { half_head, stride: x.stride() as u32, ..Shape::of(x) }
    }

    /// Adds a dispatch, unless there is nothing to compute.
    fn call(&mut self, rows: Rows, size: Size, variants: [Variant; 2], shape: Shape, buffers: Vec<wgpu::Buffer>) -> Result<()> {
        let (Size::Groups(n) | Size::Elements(n) | Size::Linear(n)) = size;
        if n == 0 {
            return Ok(());
        }
        let pipelines = &mut self.pipelines;
        let made = self.gpu.scoped("pipelines", 0, || variants.map(|variant| pipelines.get(variant)))?;
        self.calls.push(Call { rows, size, kernel: variants[0].kernel, pipelines: made, shape, buffers });
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

        let (counts, pipelines) = (&self.moment.counts, &mut self.pipelines);
        let mut dispatches = Vec::new();
        for (i, call) in self.calls.into_iter().enumerate() {
            let shape =
                wgpu::BufferBinding { buffer: &shapes, offset: (SLOT * i) as u64, size: std::num::NonZero::new(size_of::<Shape>() as u64) };
            let buffers = std::iter::once(counts).chain(&call.buffers).map(wgpu::Buffer::as_entire_binding);
            let resources = std::iter::once(wgpu::BindingResource::Buffer(shape)).chain(buffers);
            let entries: Vec<_> = resources.enumerate().map(|(i, resource)| wgpu::BindGroupEntry { binding: i as u32, resource }).collect();
            let bind = gpu.scoped("bind groups", 0, || {
                let layout = pipelines.layout(call.kernel);
                gpu.device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries })
            })?;
            let Call { rows, size, pipelines, .. } = call;
            dispatches.push(Dispatch { rows, size, pipelines, bind });
        }
        let caches = Caches::new(gpu, self.caches.into_iter().flatten().collect())?;
        Ok(Lowered { dispatches, caches, weight_bytes: self.weight_bytes })
    }
}

/// A kernel for either type of keys and values.
fn by_kv(kernel: Kernel) -> [Variant; 2] {
    [KvType::F32, KvType::F16].map(|kv| Variant { kernel, weight: None, kv: Some(kv) })
}

impl Shape {
    /// What every kernel reads of an activation's shape.
    fn of(x: &Activation) -> Self {
        let rows_of = match x.rows {
            Rows::All => 0,
            Rows::Wanted => 1,
        };
        Self { rows_of, width4: (x.stride() / 4) as u32, ..Self::default() }
    }
}
