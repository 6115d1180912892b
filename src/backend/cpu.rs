//! The CPU as a place: all ranks of a stage that live on it, one flat list of (rank, chunk) tasks a step.

mod sweep;
mod weights;

use std::ops::Range;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use crate::backend::steps::{Projection, Step, lower};
use crate::backend::{Assignment, BLOCK, Batch, Flow, Lane, PageId, Place, PlaceCounts, Row};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::kernels::attend::{Cache, KvShape, QUERIES, Tile, attend, store_kv};
use crate::kernels::memory::Words;
use crate::kernels::parallel::{WorkDistributionConfig, WorkStealingStats};
use crate::kernels::pool::{Pool, Scatter, for_each};
use crate::kernels::{add, head_norm, rms_norm, rope, swiglu};
use crate::partition::{Dim, RankPartition};
use crate::plan::{Buf, BufSpec, Op, Plan, SegmentId, Weight};
use sweep::Sweep;
use weights::{Held, hold};

/// Below this many multiplications an op is not worth spreading over threads.
const SMALL: usize = 1 << 15;

/// One activation of one rank (or of all, where shared): `[rows, width]`, as many rows as the batch has.
#[derive(Default)]
struct Activation {
    width: usize,
    data: Vec<f32>,
}

/// The threads of a model, and how products are cut for them.
#[derive(Clone)]
pub(crate) struct Threads {
    pub pool: Arc<Pool>,
    pub work: WorkDistributionConfig,
    pub stats: Arc<WorkStealingStats>,
}

pub(crate) struct CpuPlace {
    stage: usize,
    plan: Plan,
    /// What is run of it, by segment.
    steps: Vec<Arc<[Step]>>,
    config: Config,
    ranks: Vec<usize>,
    parts: Vec<RankPartition>,
    /// `[weight][rank]`
    weights: Vec<Vec<Held>>,
    /// `[buf][rank]`; of a shared buffer there is one.
    bufs: Vec<Vec<Activation>>,
    lanes: Vec<Course>,
    /// Keys and values by page, allocated when first used: `[rank][layer][2]` of [`KvShape::words`].
    pages: Vec<Words>,
    threads: Threads,
    counts: PlaceCounts,
}

/// What a lane has of its own.
struct Course {
    /// Its carried activations: those of [`CpuPlace::bufs`] while another lane computes.
    carried: Vec<Vec<Activation>>,
    output: Vec<f32>,
}

impl CpuPlace {
    /// Weights stay where they are, in the mapped file; only norms are copied.
    pub(crate) fn new(assignment: &Assignment<'_>, threads: &Threads) -> Result<Self> {
        let Assignment { plan, config, partition, ranks, .. } = assignment;
        let parts: Vec<_> = ranks.iter().map(|&r| partition.ranks[r].clone()).collect();
        let weights = threads.pool.enter(|| hold(assignment))?;
        let parts_of = |spec: &BufSpec| {
            let held_by = if spec.dim == Dim::Hidden { &parts[..1] } else { &parts[..] };
            held_by.iter().map(|p| Activation { width: p.width(spec.dim, config), data: Vec::new() }).collect()
        };
        let bufs = plan.bufs.iter().map(parts_of).collect();
        let carried = || plan.bufs.iter().filter(|spec| spec.carried).map(parts_of).collect();
        let lanes = (0..assignment.lanes).map(|_| Course { carried: carried(), output: Vec::new() }).collect();
        let mut place = Self {
            stage: assignment.stage,
            plan: (*plan).clone(),
            steps: plan.segments.iter().map(|segment| lower(&plan.ops[segment.ops.clone()]).into()).collect(),
            config: (*config).clone(),
            ranks: ranks.clone(),
            parts,
            weights,
            bufs,
            lanes,
            pages: Vec::new(),
            threads: threads.clone(),
            counts: PlaceCounts::default(),
        };
        place.counts.weight_bytes = place.weight_bytes().iter().sum();
        Ok(place)
    }

    fn kv_shape(&self, rank: usize, batch: &Batch) -> KvShape {
        KvShape { kv: batch.kv, kv_heads: self.parts[rank].kv_heads.len(), head_dim: self.config.head_dim }
    }

    /// Words of one page before the keys of `layer` of hosted rank `rank`; their values follow.
    fn kv_offset(&self, rank: usize, layer: usize) -> usize {
        let words = |r: usize| 2 * self.parts[r].kv_heads.len() * BLOCK * self.config.head_dim;
        (0..rank).map(|r| self.plan.layers * words(r)).sum::<usize>() + layer * words(rank)
    }

    fn problem(&self, problem: String) -> Error {
        Error::Device { stage: self.stage, ranks: self.ranks.clone(), device: self.device().into(), problem }
    }

    fn make_pages(&mut self, batch: &Batch) -> Result<()> {
        let words = self.kv_offset(self.parts.len() - 1, self.plan.layers);
        let pages = batch.seqs.iter().flat_map(|s| &s.pages).chain(batch.copies.as_flattened());
        let most = pages.max().map_or(0, |&p| p as usize + 1);
        while self.pages.len() < most {
            let problem = |e| self.problem(format!("no memory for a page of the KV cache, {} bytes: {e}", 4 * words));
            self.pages.push(Words::zeroed(words).map_err(problem)?);
        }
        Ok(())
    }

    fn copy_pages(&mut self, copies: &[[PageId; 2]]) {
        for &[from, to] in copies {
            if let Ok([to, from]) = self.pages.get_disjoint_mut([to as usize, from as usize]) {
                to.copy_from_slice(from);
            }
        }
    }

    fn size_buffers(&mut self, batch: &Batch) {
        for (spec, bufs) in self.plan.bufs.iter().zip(&mut self.bufs) {
            for buf in bufs {
                buf.data.resize(spec.rows.of(batch) * buf.width, 0.0);
            }
        }
    }

    /// Puts a lane's carried activations where ops find them, or back.
    fn swap(&mut self, lane: Lane) {
        let carried = self.plan.bufs.iter().zip(&mut self.bufs).filter(|(spec, _)| spec.carried);
        carried.zip(&mut self.lanes[lane].carried).for_each(|((_, here), there)| std::mem::swap(here, there));
    }

    /// Takes a buffer out, so that an op can write it while it reads others.
    fn take(&mut self, buf: Buf) -> Vec<Activation> {
        std::mem::take(&mut self.bufs[buf.0])
    }

    fn run(&mut self, step: &Step, batch: &Batch) {
        match *step {
            Step::Norm { add, x, y, weight } => {
                let (mut stream, mut out) = (self.take(x), self.take(y));
                let add = add.map(|add| &self.bufs[add.0][0].data[..]);
                let weight = self.weights[weight.0][0].vector();
                norm(add, &mut stream[0].data, weight, self.config.rms_norm_eps, &mut out[0].data);
                (self.bufs[x.0], self.bufs[y.0]) = (stream, out);
            }
            Step::Linear { x, ref to, sum } => self.linear(x, to, sum, batch),
            Step::Qkv { x, parts, layer } => {
                self.linear(x, &parts.map(|part| (part.weight, part.y)), false, batch);
                for Projection { bias, norm, y, .. } in parts {
                    bias.into_iter().for_each(|bias| self.add_bias(y, bias, batch));
                    norm.into_iter().for_each(|norm| self.head_norm(y, norm, batch));
                }
                let [q, k, v] = parts.map(|part| part.y);
                self.rope(q, batch);
                self.rope(k, batch);
                self.store_kv(layer, k, v, batch);
            }
            Step::GatedLinear { x, gate, up, scratch, y } => self.gated_linear(x, [gate, up], scratch, y, batch),
            Step::Op(op) => self.run_op(op, batch),
        }
    }

    fn run_op(&mut self, op: Op, batch: &Batch) {
        match op {
            Op::RmsNorm { .. } | Op::Linear { .. } => unreachable!("they are steps of their own"),
            Op::AddBias { x, bias } => self.add_bias(x, bias, batch),
            Op::HeadNorm { x, weight } => self.head_norm(x, weight, batch),
            Op::Rope { x } => self.rope(x, batch),
            Op::StoreKv { layer, k, v } => self.store_kv(layer, k, v, batch),
            Op::Attend { layer, q, y } => {
                let mut out = self.take(y);
                self.attend(layer, &self.bufs[q.0], batch, &mut out);
                self.bufs[y.0] = out;
            }
            Op::SwiGlu { gate, up, y } => {
                let mut out = self.take(y);
                for (rank, y) in out.iter_mut().enumerate() {
                    y.data.copy_from_slice(&self.bufs[gate.0][rank].data);
                    swiglu(&mut y.data, &self.bufs[up.0][rank].data);
                }
                self.bufs[y.0] = out;
            }
            Op::Add { x, y } => {
                let mut out = self.take(x);
                add(&mut out[0].data, &self.bufs[y.0][0].data);
                self.bufs[x.0] = out;
            }
            Op::TakeRows { x, y } => {
                let mut out = self.take(y);
                let (x, width) = (&self.bufs[x.0][0].data, out[0].width);
                for (y, &row) in out[0].data.chunks_exact_mut(width).zip(&batch.wanted) {
                    y.copy_from_slice(&x[row as usize * width..][..width]);
                }
                self.bufs[y.0] = out;
            }
        }
    }

    fn add_bias(&mut self, x: Buf, bias: Weight, batch: &Batch) {
        let n = self.plan.bufs[x.0].rows.of(batch);
        for (Activation { width, data }, bias) in self.bufs[x.0].iter_mut().zip(&self.weights[bias.0]) {
            spread(n, *width, data, |_, row| add(row, bias.vector()));
        }
    }

    fn head_norm(&mut self, x: Buf, weight: Weight, batch: &Batch) {
        let (n, head_dim, eps) = (self.plan.bufs[x.0].rows.of(batch), self.config.head_dim, self.config.rms_norm_eps);
        for (Activation { width, data }, weight) in self.bufs[x.0].iter_mut().zip(&self.weights[weight.0]) {
            let norm = |head: &mut [f32]| head_norm(head, weight.vector(), eps);
            spread(n, 4 * *width, data, |_, row| row.chunks_exact_mut(head_dim).for_each(norm));
        }
    }

    fn rope(&mut self, x: Buf, batch: &Batch) {
        let angles = self.config.head_dim;
        for Activation { width, data } in &mut self.bufs[x.0] {
            let width = *width;
            spread(batch.rows.len(), 8 * width, data, |row, x| rope(x, &batch.rope[row * angles..][..angles]));
        }
    }

    /// Products of the rows of `x` with some weights, on all hosted ranks: their tasks are one list.
    fn linear(&mut self, x: Buf, to: &[(Weight, Buf)], sum: bool, batch: &Batch) {
        let mut outs: Vec<Vec<Activation>> = to.iter().map(|&(_, y)| self.take(y)).collect();
        let n = self.plan.bufs[x.0].rows.of(batch);
        let mut sweep = Sweep::new(n, batch.numerics);
        for (out, (weight, _)) in outs.iter_mut().zip(to) {
            let part = |rank: usize| (self.weights[weight.0][rank].matrix(), self.input(x, rank));
            if sum {
                sweep.add(out[0].width, &mut out[0].data, (0..self.parts.len()).map(part));
            } else {
                out.iter_mut().enumerate().for_each(|(rank, out)| sweep.add(out.width, &mut out.data, [part(rank)]));
            }
        }
        sweep.run(&self.threads);
        for (out, &(_, y)) in outs.into_iter().zip(to) {
            self.bufs[y.0] = out;
        }
    }

    /// Both products of a channel and their gate in one task.
    fn gated_linear(&mut self, x: Buf, weights: [Weight; 2], scratch: Buf, y: Buf, batch: &Batch) {
        let (mut gates, mut ups) = (self.take(y), self.take(scratch));
        let n = self.plan.bufs[x.0].rows.of(batch);
        let mut sweep = Sweep::new(n, batch.numerics);
        for (rank, (gate, up)) in gates.iter_mut().zip(&mut ups).enumerate() {
            let weights = weights.map(|weight| self.weights[weight.0][rank].matrix());
            sweep.add_gated(gate.width, self.input(x, rank), [&mut gate.data, &mut up.data], weights);
        }
        sweep.run(&self.threads);
        (self.bufs[y.0], self.bufs[scratch.0]) = (gates, ups);
    }

    /// What a rank multiplies: its own part, or what all ranks share.
    fn input(&self, x: Buf, rank: usize) -> &[f32] {
        let parts = &self.bufs[x.0];
        &parts[rank.min(parts.len() - 1)].data
    }

    fn store_kv(&mut self, layer: usize, k: Buf, v: Buf, batch: &Batch) {
        let n = batch.rows.len();
        for rank in 0..self.parts.len() {
            let shape = self.kv_shape(rank, batch);
            let at = self.kv_offset(rank, layer);
            let (k, v) = (&self.bufs[k.0][rank], &self.bufs[v.0][rank]);
            let stored = batch.rows.iter().zip(rows(&k.data, k.width, n)).zip(rows(&v.data, v.width, n));
            for ((row, k), v) in stored {
                let (page, position) = locate(batch, row.seq, row.pos as usize);
                let words = &mut self.pages[page as usize][at..at + 2 * shape.words()];
                let (keys, values) = words.split_at_mut(shape.words());
                store_kv(shape, keys, values, position, k, v);
            }
        }
    }

    /// The query heads of a rank that share a KV head, as many as a tile can take; both counted from the rank's first.
    fn heads_by_kv_head(&self, rank: usize) -> Vec<(usize, Range<usize>)> {
        let (part, group) = (&self.parts[rank], self.config.n_heads / self.config.n_kv_heads);
        let of_kv_head = |(i, kv_head): (usize, usize)| {
            let first = (kv_head * group).max(part.heads.start) - part.heads.start;
            let end = ((kv_head + 1) * group).min(part.heads.end) - part.heads.start;
            (first..end).step_by(QUERIES).map(move |head| (i, head..end.min(head + QUERIES)))
        };
        part.kv_heads.clone().enumerate().flat_map(of_kv_head).collect()
    }

    /// A tile takes the query heads that share a KV head, in neighbouring rows of a sequence.
    fn attend(&self, layer: usize, q: &[Activation], batch: &Batch, out: &mut [Activation]) {
        let head_dim = self.config.head_dim;
        let mut tiles = Vec::new();
        // Of each tile the rank, first row and heads.
        let mut places = Vec::new();
        for (rank, q) in q.iter().enumerate() {
            let (shape, offset) = (self.kv_shape(rank, batch), self.kv_offset(rank, layer));
            for (kv_head, heads) in self.heads_by_kv_head(rank) {
                for rows in runs(&batch.rows, QUERIES / heads.len()) {
                    let row = |row: usize| {
                        let to = batch.rows[row].pos as usize;
                        (&q.data[row * q.width..][heads.start * head_dim..heads.end * head_dim], self.config.first_seen(to)..to + 1)
                    };
                    let seq = &batch.seqs[batch.rows[rows.start].seq as usize];
                    let cache = Cache { shape, pages: &self.pages, offset, seq };
                    tiles.push(Tile { cache, kv_head, rows: rows.clone().map(row).collect() });
                    places.push((rank, rows.start, heads.clone()));
                }
            }
        }
        let outs: Vec<(usize, Scatter<'_, f32>)> = out.iter_mut().map(|o| (o.width, Scatter::new(&mut o.data))).collect();
        attend(&tiles, &self.threads.stats, |tile, query, y| {
            let (rank, row, heads) = &places[tile];
            let (width, out) = &outs[*rank];
            let at = (row + query / heads.len()) * width + (heads.start + query % heads.len()) * head_dim;
            // SAFETY: a row of a head belongs to one tile.
            unsafe { out.range(at..at + head_dim) }.copy_from_slice(y);
        });
    }

    /// Runs a segment on the activations that are in place.
    fn compute(&mut self, lane: Lane, segment: SegmentId, batch: &Batch, input: &Flow) -> Result<()> {
        self.size_buffers(batch);
        let segment_spec = self.plan.segments[segment.0].clone();
        if let Some(write) = segment_spec.write {
            let Some(input) = input.host() else {
                return Err(self.problem("rows were passed to it that lie on a GPU".into()));
            };
            self.bufs[write.0][0].data.copy_from_slice(input);
            self.counts.bytes_written += size_of_val(input) as u64;
        }
        let steps = self.steps[segment.0].clone();
        self.counts.ops += (segment_spec.ops.len() * self.parts.len()) as u64;
        self.counts.submissions += 1;
        let pool = self.threads.pool.clone();
        pool.enter(|| steps.iter().for_each(|step| self.run(step, batch)));
        let output = &mut self.lanes[lane].output;
        output.clear();
        if let Some(read) = segment_spec.read {
            self.bufs[read.0].iter().for_each(|part| output.extend_from_slice(&part.data));
            self.counts.bytes_read += size_of_val(&output[..]) as u64;
        }
        Ok(())
    }
}

impl Place for CpuPlace {
    fn ranks(&self) -> &[usize] {
        &self.ranks
    }

    fn device(&self) -> &str {
        "cpu"
    }

    fn is_asynchronous(&self) -> bool {
        false
    }

    fn launch(&mut self, lane: Lane, segment: SegmentId, batch: &Batch, input: &Flow) -> Result<()> {
        self.make_pages(batch)?;
        if segment.0 == 0 {
            self.copy_pages(&batch.copies);
        }
        self.swap(lane);
        let launched = self.compute(lane, segment, batch, input);
        self.swap(lane);
        launched
    }

    fn poll(&mut self, _: Lane, _: Duration) -> Result<Poll<()>> {
        Ok(Poll::Ready(()))
    }

    fn output(&mut self, lane: Lane, take: &mut dyn FnMut(&[f32])) -> Result<()> {
        take(&self.lanes[lane].output);
        Ok(())
    }

    fn counts(&self) -> PlaceCounts {
        self.counts
    }

    fn weight_bytes(&self) -> Vec<u64> {
        let bytes = |rank: usize| self.weights.iter().map(|by_rank| by_rank[rank].bytes() as u64).sum();
        (0..self.ranks.len()).map(bytes).collect()
    }
}

/// `x += add` and `y = rms_norm(x)`, row by row, all `[rows, hidden]`.
fn norm(add_to_x: Option<&[f32]>, x: &mut [f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let hidden = weight.len();
    let y = Scatter::new(y);
    spread(x.len() / hidden, 8 * hidden, x, |row, x| {
        let range = row * hidden..(row + 1) * hidden;
        if let Some(add_to_x) = add_to_x {
            add(x, &add_to_x[range.clone()]);
        }
        // SAFETY: a row belongs to one task.
        rms_norm(x, weight, eps, unsafe { y.range(range) });
    });
}

/// Calls `f(row, x[row])` for `n` equal rows of `x`, each worth `work` multiplications, on as many threads as that is worth.
fn spread(n: usize, work: usize, x: &mut [f32], f: impl Fn(usize, &mut [f32]) + Sync) {
    let (width, per_task) = (x.len() / n.max(1), SMALL.div_ceil(work.max(1)));
    let x = Scatter::new(x);
    for_each(n.div_ceil(per_task), |task, _| {
        for row in task * per_task..n.min((task + 1) * per_task) {
            // SAFETY: a row belongs to one task.
            f(row, unsafe { x.range(row * width..(row + 1) * width) });
        }
    });
}

/// The rows of a buffer, which still are rows where a rank without channels has no elements in them.
fn rows(data: &[f32], width: usize, n: usize) -> Vec<&[f32]> {
    (0..n).map(|i| &data[i * width..(i + 1) * width]).collect()
}

/// Neighbouring rows of one sequence, `most` at a time.
fn runs(rows: &[Row], most: usize) -> Vec<Range<usize>> {
    let mut end = 0;
    let of_seq = rows.chunk_by(|a, b| a.seq == b.seq).flat_map(|rows| rows.chunks(most));
    of_seq
        .map(|rows| {
            end += rows.len();
            end - rows.len()..end
        })
        .collect()
}

/// The page of a position and the place in it.
fn locate(batch: &Batch, seq: u32, position: usize) -> (PageId, usize) {
    let (seq, page_len) = (&batch.seqs[seq as usize], batch.kv.page_len());
    (seq.pages[position / page_len - seq.first_page as usize], position % page_len)
}
