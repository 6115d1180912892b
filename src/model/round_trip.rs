//! What an all-reduce through the host costs: by itself, and against the same work without it.

use std::sync::Arc;
use std::time::Instant;

use crate::backend::cpu::Threads;
use crate::backend::{self, Assignment, Batch, Flow, KvType, Numerics, Opened, Place, Room, Row, Wire};
use crate::collective::Alone;
use crate::config::Config;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::matrix::Matrix;
use crate::kernels::parallel::WorkDistributionConfig;
use crate::kernels::pool::Pool;
use crate::model::engine::{Load, Trip};
use crate::model::stage::Stage;
use crate::partition::{Dim, RankPartition, StagePartition};
use crate::plan::{ColumnParallel, Plan, Recorder, RowParallel, SegmentId};
use crate::trace::{Trace, TraceRow};

/// All-reduces of a round.
const ALL_REDUCES: usize = 8;

/// Seconds that an all-reduce took, each the mean over a round's.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct AllReduceTime {
    /// Of all of it: every rank's dispatches and read-back, the sum, and the write of the sum to every rank.
    pub whole: f64,
    /// Of the same dispatches and read-backs, without the sum and the writes; and, where sums travel in 2 bytes an element, without the dispatches that widen them.
    pub bare: f64,
    /// What the host spent of `whole` on reading and adding.
    pub host: f64,
}

/// Times all-reduces of `rows` x `values` f32 between `devices`, a rank each, which travel as `wire` says, in so many rounds. Every rank runs two small kernels between two sums: one that adds the
/// sum to a residual, and one that makes its next part.
///
/// # Errors
/// [`Error::NoDevices`]; a device that can't be opened, has no room or fails.
pub fn all_reduce_times(devices: &[Device], values: usize, rows: usize, wire: Wire, rounds: usize) -> Result<Vec<AllReduceTime>> {
    if devices.is_empty() {
        return Err(Error::NoDevices);
    }
    let (values, rows) = (values.max(1), rows.max(1));
    let whole = plan();
    let mut bare = whole.clone();
    bare.segments.iter_mut().for_each(|segment| segment.write = None);
    let (mut stage, mut others) = (stage(&whole, devices, values, rows, wire)?, places(&bare, devices, values, rows, wire)?);
    // The first round compiles what drivers compile late.
    (0..=rounds)
        .map(|round| {
            let batch = batch(round as u64 + 1, rows, wire);
            let load = Load { batch: batch.clone(), flow: Ok(Flow::Host(vec![1.0; rows * values])) };
            let [whole, host] = reduced(&mut stage, load)?;
            Ok(AllReduceTime { whole, bare: unreduced(&mut others, &batch)?, host })
        })
        .skip(1)
        .collect()
}

/// Seconds an all-reduce of a round of them: all of it, and what the host reads and adds.
fn reduced(stage: &mut Stage, load: Load) -> Result<[f64; 2]> {
    // By rank: computing, reading, reducing, writing.
    let host = |stage: &Stage| stage.trace.seconds().iter().map(|rank| rank[1] + rank[2]).sum::<f64>();
    let (mut trip, before) = (Trip::unanswered(load), host(stage));
    stage.step(0, &mut trip);
    let start = Instant::now();
    (1..=ALL_REDUCES).for_each(|segment| stage.step(segment, &mut trip));
    let seconds = [start.elapsed().as_secs_f64(), host(stage) - before];
    stage.step(ALL_REDUCES + 1, &mut trip);
    trip.loads.remove(0).flow.map(|_| seconds.map(|seconds| seconds / ALL_REDUCES as f64))
}

/// [`reduced`], but what is read is dropped and nothing is written.
fn unreduced(places: &mut [Box<dyn Place>], batch: &Batch) -> Result<f64> {
    let nothing = Flow::Host(Vec::new());
    // Those that return at once first, as a stage does.
    places.sort_by_key(|place| !place.is_asynchronous());
    let launch = |places: &mut [Box<dyn Place>], segment| {
        places.iter_mut().try_for_each(|place| place.launch(0, SegmentId(segment), batch, &nothing))
    };
    let land = |places: &mut [Box<dyn Place>]| {
        places.iter_mut().try_for_each(|place| {
            crate::model::stage::wait(place.as_mut(), 0, 0)?;
            place.output(0, &mut |_| {})
        })
    };
    launch(places, 0)?;
    let start = Instant::now();
    for segment in 1..=ALL_REDUCES {
        land(places)?;
        launch(places, segment)?;
    }
    let seconds = start.elapsed().as_secs_f64();
    land(places)?;
    Ok(seconds / ALL_REDUCES as f64)
}

fn plan() -> Plan {
    let mut r = Recorder::new(true);
    let x = r.input();
    let h = r.linear(x, "up", Dim::Channels, ColumnParallel);
    for _ in 0..ALL_REDUCES {
        let y = r.linear(h, "down", Dim::Hidden, RowParallel);
        r.all_reduce(y);
        r.add(x, y);
    }
    r.pass(x)
}

fn stage(plan: &Plan, devices: &[Device], values: usize, rows: usize, wire: Wire) -> Result<Stage> {
    let rows_of = |(rank, device): (usize, &Device)| TraceRow { stage: 0, rank, device: device.label() };
    let trace = Trace::new(devices.iter().enumerate().map(rows_of).collect());
    trace.start();
    let (places, pool) = (places(plan, devices, values, rows, wire)?, Arc::new(Pool::new(Some(1))?));
    Ok(Stage {
        index: 0,
        plan: plan.clone(),
        places,
        pool,
        gathered: Vec::new(),
        collective: Arc::new(Alone),
        trace: Arc::new(trace),
        collectives: 0,
        in_flight: vec![vec![None; devices.len()]],
        done: vec![Instant::now(); devices.len()],
    })
}

/// A place for every device, whatever it is.
fn places(plan: &Plan, devices: &[Device], values: usize, rows: usize, wire: Wire) -> Result<Vec<Box<dyn Place>>> {
    let ranks = devices.len();
    let config = Config {
        vocab_size: 1,
        hidden_size: values,
        intermediate_size: ranks,
        n_layers: 1,
        n_heads: 1,
        n_kv_heads: 1,
        head_dim: 2,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: None,
        max_position_embeddings: rows,
        sliding_window: None,
        tie_word_embeddings: false,
        qkv_bias: false,
        qk_norm: false,
    };
    let part = |rank| RankPartition { heads: 0..0, kv_heads: 0..0, channels: rank..rank + 1, vocab: 0..0 };
    let partition = StagePartition { layers: 0..1, ranks: (0..ranks).map(part).collect() };
    let tensor = |name: &str| match name {
        "up.weight" => Ok(Matrix::from_f32(ranks, values, vec![0.0; ranks * values])),
        _ => Ok(Matrix::from_f32(values, ranks, vec![0.0; ranks * values])),
    };
    let threads = Threads { pool: Arc::new(Pool::new(Some(1))?), work: WorkDistributionConfig::default(), stats: Arc::default() };
    let place = |(rank, device): (usize, &Device)| {
        let assignment = Assignment {
            stage: 0,
            stays: false,
            spare: None,
            lanes: 1,
            wire,
            tune: false,
            ranks: vec![rank],
            plan,
            config: &config,
            partition: &partition,
            tensor: &tensor,
            packing: None,
        };
        let room = backend::room(device, &assignment, Room { rows, wanted: 1, pages: 1 })?;
        backend::place(device, &assignment, room, &threads, &mut Opened::default())
    };
    devices.iter().enumerate().map(place).collect()
}

fn batch(number: u64, rows: usize, wire: Wire) -> Batch {
    Batch {
        number,
        rows: (0..rows as u32).map(|pos| Row { seq: 0, pos }).collect(),
        seqs: vec![backend::Seq::default()],
        wanted: vec![0],
        copies: Vec::new(),
        rope: vec![0.0; 2 * rows],
        kv: KvType::F32,
        numerics: Numerics::Exact,
        wire,
        timed: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_timed_on_any_devices() {
        let times = all_reduce_times(&[Device::cpu(), Device::cpu()], 40, 3, Wire::F16, 4).unwrap();
        assert_eq!(times.len(), 4);
        assert!(times.iter().all(|t| t.whole > 0.0 && t.bare > 0.0 && t.host > 0.0 && t.host < t.whole), "{times:?}");
        assert!(all_reduce_times(&[], 40, 3, Wire::F32, 4).unwrap_err().to_string().contains("device list is empty"));
    }
}
