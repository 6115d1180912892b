//! The linear layers: their weights, laid out for what becomes of their outputs, and the dispatches that multiply by them.

use super::{Activation, Lowerer};
use crate::backend::KvType;
use crate::backend::steps::Projection;
use crate::backend::wgpu::dispatch::Size;
use crate::backend::wgpu::moment::Moment;
use crate::backend::wgpu::room;
use crate::backend::wgpu::shaders::{Finish, Kernel, Shape};
use crate::backend::wgpu::tune::Layer;
use crate::backend::wgpu::tuning::Linear;
use crate::backend::wgpu::weights::{BLOCK, GpuWeight, TILE};
use crate::error::Result;
use crate::partition::RankPartition;
use crate::plan::{Buf, Rows, Weight};

impl Lowerer<'_> {
    /// `sum`: y is the sum over the ranks.
    pub(super) fn linear(&mut self, x: Buf, y: Buf, weight: Weight, sum: bool) -> Result<()> {
        for rank in 0..self.assignment.ranks.len() {
            let name = self.assignment.plan.weights[weight.0].name.clone();
            let source = self.source(weight, rank)?;
            let accumulate = sum && rank > 0;
            // A rank that owns nothing of the input adds nothing; the first one still writes the zeros that others add to.
            if accumulate && source.cols() == 0 {
                continue;
            }
            let (x, y) = (self.part(x, rank)?, self.part(y, rank)?);
            let weight = GpuWeight::upload(self.gpu, self.bounds, &name, &[source], |row| (0, row))?;
            let shape = Shape { stride: y.stride() as u32, accumulate: u32::from(accumulate), ..Shape::of(&x) };
            self.products(&x, &weight, |_| Finish::Store, 1, y.part.lead, shape, &[&y.buffer])?;
        }
        Ok(())
    }

    pub(super) fn gated_linear(&mut self, x: Buf, weights: [Weight; 2], y: Buf) -> Result<()> {
        for rank in 0..self.assignment.ranks.len() {
            let name = format!("{} and up", self.assignment.plan.weights[weights[0].0].name);
            let sources = [self.source(weights[0], rank)?, self.source(weights[1], rank)?];
            let (x, y) = (self.part(x, rank)?, self.part(y, rank)?);
            let weight = GpuWeight::upload(self.gpu, self.bounds, &name, &sources, |row| (row % 2, row / 2))?;
            let shape = Shape { stride: y.stride() as u32, ..Shape::of(&x) };
            self.products(&x, &weight, |_| Finish::SwiGlu, 2, y.part.lead, shape, &[&y.buffer])?;
        }
        Ok(())
    }

    pub(super) fn qkv(&mut self, x: Buf, parts: &[Projection; 3], layer: usize) -> Result<()> {
        let head_dim = self.assignment.config.head_dim;
        for rank in 0..self.assignment.ranks.len() {
            let name = format!("{}, k and v", self.assignment.plan.weights[parts[0].weight.0].name);
            let [wq, wk, wv] = parts.map(|part| part.weight);
            let sources = [self.source(wq, rank)?, self.source(wk, rank)?, self.source(wv, rank)?];
            let (x, q) = (self.part(x, rank)?, self.part(parts[0].y, rank)?);
            let RankPartition { heads, kv_heads, .. } = self.rank(rank);
            let [queries, keys] = [heads.len() * head_dim, kv_heads.len() * head_dim];
            // The elements that are rotated together are neighbours.
            let paired = |row: usize| row / head_dim * head_dim + row % head_dim / 2 + row % 2 * (head_dim / 2);
            let order = |row: usize| match row.checked_sub(queries) {
                None => (0, paired(row)),
                Some(row) if row < keys => (1, paired(row)),
                Some(row) => (2, row - keys),
            };
            let weight = GpuWeight::upload(self.gpu, self.bounds, &name, &sources, order)?;
            let shape = Shape { stride: q.stride() as u32, ..self.heads(rank, &x) };
            let Moment { positions, tables, angles, .. } = self.moment;
            let cache = &self.caches[layer][rank];
            let buffers = [&q.buffer, &cache.keys, &cache.values, positions, tables, angles].map(wgpu::Buffer::clone);
            if parts.iter().all(|part| part.bias.is_none() && part.norm.is_none()) {
                self.products(&x, &weight, Finish::Qkv, 1, 0, shape, &buffers.each_ref())?;
                continue;
            }

            let projected = self.projected(rank)?;
            let stored = Shape { stride: projected.stride() as u32, ..Shape::of(&x) };
            self.products(&x, &weight, |_| Finish::Store, 1, 0, stored, &[&projected.buffer])?;
            // Biases in the order of the rows that they are added to, then what the pairs of a query's and a key's head are multiplied by.
            let biases = [self.values(parts[0].bias, rank)?, self.values(parts[1].bias, rank)?, self.values(parts[2].bias, rank)?];
            let norms = [self.values(parts[0].norm, rank)?, self.values(parts[1].norm, rank)?];
            let bias = |row: usize| {
                let (of, row) = order(row);
                biases[of].as_ref().map_or(0.0, |biases| biases[row])
            };
            let mut constants: Vec<f32> = (0..queries + 2 * keys).map(bias).collect();
            for norm in &norms {
                constants.extend((0..head_dim).map(|i| norm.as_ref().map_or(1.0, |norm| norm[paired(i)])));
            }
            let constants = self.upload(&format!("biases and norms of {name}"), &constants)?;
            let shape = Shape {
                stride: q.stride() as u32,
                out: (queries + 2 * keys) as u32,
                accumulate: u32::from(norms.iter().any(Option::is_some)),
                eps: self.assignment.config.rms_norm_eps,
                ..self.heads(rank, &projected)
            };
            let buffers = [constants, projected.buffer].into_iter().chain(buffers).collect();
            self.call(x.rows, Size::Groups((queries + 2 * keys) / head_dim), |kv| vec![Kernel::Heads(kv)], shape, buffers)?;
        }
        Ok(())
    }

    /// A rank's slice of a vector, if there is one.
    fn values(&mut self, weight: Option<Weight>, rank: usize) -> Result<Option<Vec<f32>>> {
        let Some(weight) = weight else { return Ok(None) };
        let slice = self.assignment.weight(weight, self.assignment.ranks[rank])?;
        self.weight_bytes[rank] += slice.bytes() as u64;
        let mut values = vec![0.0; slice.cols()];
        slice.row_to_f32(0, &mut values);
        Ok(Some(values))
    }

    /// Where hosted rank `rank`'s projected queries, keys and values lie between the two dispatches of a layer that has to norm them.
    fn projected(&mut self, rank: usize) -> Result<Activation> {
        for rank in self.projected.len()..=rank {
            let part = room::projected(self.assignment, self.assignment.ranks[rank]);
            let bytes = 4 * (self.room.rows * part.stride()).max(4) as u64;
            let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
            let buffer = self.gpu.buffer("queries, keys and values", bytes, usage)?;
            self.projected.push(Activation { buffer, part, rows: Rows::All });
        }
        Ok(self.projected[rank].clone())
    }

    /// A linear layer, block by block of its weight. `merged`: rows of the weight that become one output, of which the first is number
    /// `first`; `buffers`: what it writes and what its end reads.
    #[expect(clippy::too_many_arguments)] // the three kinds of linear layer differ in all of them
    fn products(
        &mut self,
        x: &Activation,
        weight: &GpuWeight,
        finish: impl Fn(KvType) -> Finish,
        merged: usize,
        first: usize,
        shape: Shape,
        buffers: &[&wgpu::Buffer],
    ) -> Result<()> {
        if weight.lead != x.part.lead {
            let problem = format!("a weight begins {} columns inside a block, and its input {}", weight.lead, x.part.lead);
            return Err(self.gpu.owner.error(problem));
        }
        for block in &weight.blocks {
            let layer = Layer { format: block.format, blocks: weight.blocks_of_columns, tiles: block.rows.div_ceil(TILE) };
            let mut variants = self.tuner.linear(self.gpu, &mut self.pipelines, layer, &block.buffer)?;
            if block.format.int8_source().is_none() {
                variants.int8 = None;
            }
            let shape = Shape {
                blocks: weight.blocks_of_columns as u32,
                out: block.rows as u32,
                first_out: (first + block.first / merged) as u32,
                phase: weight.phase as u32,
                ..shape
            };
            let kernels = |kv| {
                let (format, finish) = (block.format, finish(kv));
                let few = [variants.one, variants.few].map(|few| Kernel::Linear(format, finish, few));
                few.into_iter().chain(variants.many.map(|(_, tile)| Kernel::LinearTile(format, finish, tile))).collect()
            };
            let all = |x| [&block.buffer, x].into_iter().chain(buffers.iter().copied()).cloned().collect();
            self.call(x.rows, Size::Linear(block.rows, variants), kernels, shape, all(&x.buffer))?;
            if let Some((least, tile)) = variants.int8 {
                let kernels = |kv| vec![Kernel::LinearInt8(block.format, finish(kv), tile)];
                let quantised = self.quantise(x, least, variants)?;
                self.call(x.rows, Size::LinearInt8(block.rows, variants), kernels, shape, all(&quantised))?;
            }
        }
        Ok(())
    }

    /// Where an activation is in int8, from so many rows on; the dispatch that rounds it is added unless the step has it already.
    fn quantise(&mut self, x: &Activation, least: usize, variants: Linear) -> Result<wgpu::Buffer> {
        let quantised = match &self.int8 {
            Some(quantised) => quantised.clone(),
            None => {
                let bytes = room::int8_bytes(self.assignment, self.room).max(16) as u64;
                self.int8.insert(self.gpu.buffer("activations in int8", bytes, wgpu::BufferUsages::STORAGE)?).clone()
            }
        };
        let of = Some((x.buffer.clone(), least));
        if self.int8_of != of {
            let buffers = vec![x.buffer.clone(), quantised.clone()];
            self.call(x.rows, Size::Quantise(x.stride() / BLOCK, variants), |_| vec![Kernel::Quantise], Shape::of(x), buffers)?;
            self.int8_of = of;
        }
        Ok(quantised)
    }
}
