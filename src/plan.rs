//! What a stage does, as data: ops in segments, cut exactly where ranks must talk.
//!
//! A [`Plan`] is logical. It knows neither how many rows a launch has, nor how wide a rank's slice is: a buffer's width is a
//! [`Dim`], which a place resolves for each rank that it hosts. The model records it once ([`Recorder`]); the executor, the
//! counters and the cost tables all read the same one.

use std::ops::Range;

use crate::partition::{Dim, TensorParallelStrategy};

/// Index into [`Plan::bufs`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Buf(pub usize);

/// Index into [`Plan::weights`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Weight(pub usize);

/// Index into [`Plan::segments`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct SegmentId(pub usize);

/// How many rows a buffer has in a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Rows {
    /// One for every row of the batch.
    All,
    /// One for every row whose logits are wanted.
    Wanted,
}

/// An activation: f32, `[rows, width]`. Of dimension `Hidden` a place has one, shared by its ranks; of any other, one a rank.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BufSpec {
    pub name: &'static str,
    pub dim: Dim,
    pub rows: Rows,
    /// Whether a segment finds here what an earlier one left. A place that computes several batches in turn has one for each.
    pub carried: bool,
}

/// A tensor of the checkpoint, and how a rank's slice is cut from it.
#[derive(Debug, Clone)]
pub(crate) struct WeightSpec {
    /// Its full name in the checkpoint.
    pub name: String,
    pub shape: WeightShape,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WeightShape {
    /// A vector, whole on every rank.
    Vector,
    /// A vector with an element for each output of a linear layer.
    Bias { out: Dim },
    /// `[out, in]`.
    Matrix { out: Dim, input: Dim },
}

/// One op, over all ranks of a place and all rows of a launch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Op {
    /// `y = x / sqrt(mean(x^2) + eps) * weight`, a row at a time.
    RmsNorm { x: Buf, y: Buf, weight: Weight },
    /// `y = x weight^T`. Row-parallel, y is the sum over the place's ranks, in rank order.
    Linear { x: Buf, y: Buf, weight: Weight, strategy: TensorParallelStrategy },
    /// `x += bias`, in every row.
    AddBias { x: Buf, bias: Weight },
    /// [`Op::RmsNorm`] of every head of x by itself, in place.
    HeadNorm { x: Buf, weight: Weight },
    /// Rotates element i of every head of x with element i + head_dim / 2, by the row's position.
    Rope { x: Buf },
    /// Stores the rows' keys and values in the pages of `layer` (counted within the stage).
    StoreKv { layer: usize, k: Buf, v: Buf },
    /// `y = softmax(q k^T / sqrt(head_dim)) v` over the positions that each row sees.
    Attend { layer: usize, q: Buf, y: Buf },
    /// `y = silu(gate) * up`.
    SwiGlu { gate: Buf, up: Buf, y: Buf },
    /// `x += y`.
    Add { x: Buf, y: Buf },
    /// The rows of x whose logits are wanted.
    TakeRows { x: Buf, y: Buf },
}

/// A run of ops that needs nothing from other places until it ends. The engine runs a plan's segments in order.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Segment {
    pub ops: Range<usize>,
    /// Written by the host before the ops run.
    pub write: Option<Buf>,
    /// Read by the host after them; the copy-out rides in the same submission.
    pub read: Option<Buf>,
    /// What becomes of what was read.
    pub exchange: Exchange,
}

/// How the places of a stage talk when a segment has ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Exchange {
    /// Sum what was read over all places and processes; the next segment writes it.
    AllReduce,
    /// Concatenate what was read, by ranks.
    AllGather,
    /// Take it from the first place, for the next stage: every place has the same.
    #[default]
    Pass,
}

/// What one stage does for a batch of rows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Plan {
    pub bufs: Vec<BufSpec>,
    pub weights: Vec<WeightSpec>,
    pub ops: Vec<Op>,
    pub segments: Vec<Segment>,
    /// Layers of the stage: each has its own KV pages.
    pub layers: usize,
}

impl Plan {
    /// How many exchanges join the ranks.
    pub(crate) fn collectives(&self) -> usize {
        self.segments.iter().filter(|s| s.exchange != Exchange::Pass).count()
    }
}

/// Records a plan op by op, in the order of computing.
pub(crate) struct Recorder {
    plan: Plan,
    /// The ranks of the stage are spread over several places, so that sums go through the host.
    cut: bool,
    open: Segment,
    prefix: String,
    /// See [`Recorder::having`].
    optional: Vec<&'static str>,
}

pub(crate) use TensorParallelStrategy::{ColumnParallel, RowParallel};

impl Recorder {
    /// `cut`: whether several places hold the stage.
    pub(crate) fn new(cut: bool) -> Self {
        Self { plan: Plan::default(), cut, open: Segment::default(), prefix: String::new(), optional: Vec::new() }
    }

    /// Names those weights that not every model has, and this one does. Ops that only they would need are recorded for no other.
    pub(crate) fn having(self, optional: impl IntoIterator<Item = &'static str>) -> Self {
        Self { optional: optional.into_iter().collect(), ..self }
    }

    /// The names of the weights that follow start with `prefix`.
    pub(crate) fn within(&mut self, prefix: impl Into<String>) {
        self.prefix = prefix.into();
    }

    fn buf(&mut self, name: &'static str, dim: Dim, rows: Rows) -> Buf {
        let found = self.plan.bufs.iter().position(|b| b.name == name && b.dim == dim && b.rows == rows);
        Buf(found.unwrap_or_else(|| {
            self.plan.bufs.push(BufSpec { name, dim, rows, carried: false });
            self.plan.bufs.len() - 1
        }))
    }

    fn weight(&mut self, name: &str, shape: WeightShape) -> Weight {
        self.weight_named(&format!("{name}.weight"), shape)
    }

    fn weight_named(&mut self, name: &str, shape: WeightShape) -> Weight {
        self.plan.weights.push(WeightSpec { name: format!("{}{name}", self.prefix), shape });
        Weight(self.plan.weights.len() - 1)
    }

    /// A weight that not every model has.
    fn optional(&mut self, name: &str, shape: WeightShape) -> Option<Weight> {
        self.optional.contains(&name).then(|| self.weight_named(name, shape))
    }

    fn op(&mut self, op: Op) {
        self.plan.ops.push(op);
        self.open.ops.end = self.plan.ops.len();
    }

    fn end_segment(&mut self, read: Buf, exchange: Exchange) {
        let next = Segment { ops: self.plan.ops.len()..self.plan.ops.len(), ..Segment::default() };
        let ended = std::mem::replace(&mut self.open, next);
        self.plan.segments.push(Segment { read: Some(read), exchange, ..ended });
    }

    /// The residual stream as the stage receives it from the host.
    pub(crate) fn input(&mut self) -> Buf {
        let x = self.buf("residual", Dim::Hidden, Rows::All);
        self.plan.bufs[x.0].carried = true;
        self.open.write = Some(x);
        x
    }

    pub(crate) fn rms_norm(&mut self, x: Buf, weight: &str) -> Buf {
        let weight = self.weight(weight, WeightShape::Vector);
        let y = self.buf("normed", Dim::Hidden, self.plan.bufs[x.0].rows);
        self.op(Op::RmsNorm { x, y, weight });
        y
    }

    /// A linear layer to `out`, and its bias if it has one. Buffers are named after their weight, so that all layers share them.
    pub(crate) fn linear(&mut self, x: Buf, weight: &'static str, out: Dim, strategy: TensorParallelStrategy) -> Buf {
        let BufSpec { dim: input, rows, .. } = self.plan.bufs[x.0];
        let y = self.buf(weight, out, rows);
        let bias = self.optional(&format!("{weight}.bias"), WeightShape::Bias { out });
        let weight = self.weight(weight, WeightShape::Matrix { out, input });
        self.op(Op::Linear { x, y, weight, strategy });
        if let Some(bias) = bias {
            self.op(Op::AddBias { x: y, bias });
        }
        y
    }

    /// Norms every head of x, if the model does.
    pub(crate) fn head_norm(&mut self, x: Buf, weight: &str) {
        if let Some(weight) = self.optional(&format!("{weight}.weight"), WeightShape::Vector) {
            self.op(Op::HeadNorm { x, weight });
        }
    }

    pub(crate) fn rope(&mut self, x: Buf) {
        self.op(Op::Rope { x });
    }

    /// Stores k and v in the cache of `layer` and attends q to it.
    pub(crate) fn attend(&mut self, layer: usize, q: Buf, k: Buf, v: Buf) -> Buf {
        self.plan.layers = self.plan.layers.max(layer + 1);
        self.op(Op::StoreKv { layer, k, v });
        let y = self.buf("attended", Dim::Heads, Rows::All);
        self.op(Op::Attend { layer, q, y });
        y
    }

    pub(crate) fn swiglu(&mut self, gate: Buf, up: Buf) -> Buf {
        let y = self.buf("activated", Dim::Channels, Rows::All);
        self.op(Op::SwiGlu { gate, up, y });
        y
    }

    /// Sums a row-parallel result over all ranks. A place sums its own; only a stage on several places is cut here.
    pub(crate) fn all_reduce(&mut self, y: Buf) {
        if self.cut {
            self.end_segment(y, Exchange::AllReduce);
            self.open.write = Some(y);
        }
    }

    pub(crate) fn add(&mut self, x: Buf, y: Buf) {
        self.op(Op::Add { x, y });
    }

    pub(crate) fn take_rows(&mut self, x: Buf) -> Buf {
        let y = self.buf("wanted", Dim::Hidden, Rows::Wanted);
        self.op(Op::TakeRows { x, y });
        y
    }

    /// Ends the stage with its logits, gathered over ranks.
    pub(crate) fn all_gather(mut self, logits: Buf) -> Plan {
        self.end_segment(logits, Exchange::AllGather);
        self.plan
    }

    /// Ends the stage with its residual stream, for the next one.
    pub(crate) fn pass(mut self, x: Buf) -> Plan {
        self.end_segment(x, Exchange::Pass);
        self.plan
    }
}
