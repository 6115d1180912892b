//! What the tests share: adapters, small models of a few ops, and their numbers.

use std::collections::HashMap;
use std::io::Write;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use crate::backend::cpu::{CpuPlace, Threads};
use crate::backend::wgpu::GpuPlace;
use crate::backend::wgpu::gpu::Gpu;
use crate::backend::wgpu::lower::Activation;
use crate::backend::wgpu::tune::Tuner;
use crate::backend::wgpu::tuning::{Few, Linear, Reduce, Tile, Tuning};
use crate::backend::{Assignment, Batch, Flow, KvType, Numerics, Opened, Packing, Place, Room, Row, Seq, Wire};
use crate::config::Config;
use crate::device::{Device, devices};
use crate::error::Result;
use crate::kernels::matrix::Matrix;
use crate::kernels::parallel::WorkDistributionConfig;
use crate::kernels::pool::Pool;
use crate::kernels::quant::{Packed, QuantFormat};
pub(super) use crate::kernels::samples::mapped as matrix;
use crate::partition::{RankPartition, StagePartition};
use crate::plan::{Plan, Recorder, SegmentId};

/// Every adapter of this machine. Where there is none, says so, or fails if `TORCHLESS_REQUIRE_GPU` is 1.
pub(in crate::backend::wgpu) fn gpus() -> Vec<Device> {
    gpus_named("")
}

/// Those whose name contains `name`, likewise.
pub(super) fn gpus_named(name: &str) -> Vec<Device> {
    let gpus: Vec<Device> = devices().into_iter().filter(|d| !d.is_cpu() && d.name().contains(name)).collect();
    if gpus.is_empty() {
        let required = std::env::var("TORCHLESS_REQUIRE_GPU").is_ok_and(|v| v == "1");
        assert!(!required, "TORCHLESS_REQUIRE_GPU=1, but there is no adapter {name:?}");
        let thread = std::thread::current();
        // The print macros are captured; writing to the stream is not.
        let _ = writeln!(std::io::stderr(), "SKIPPED: {}: no adapter {name:?} was found", thread.name().unwrap_or("a test"));
    }
    gpus
}

/// Tunings that differ in everything, as far as an adapter can.
pub(super) fn tunings(device: &Device) -> Vec<Tuning> {
    let small = Linear {
        one: Few { tiles: 1, rows: 1, slices: 8 },
        few: Few { tiles: 1, rows: 2, slices: 4 },
        many: Some((9, Tile { side: 8, down: 4, across: 4 })),
        int8: Some((9, Tile { side: 8, down: 2, across: 4 })),
    };
    let large = Linear {
        one: Few { tiles: 4, rows: 1, slices: 1 },
        few: Few { tiles: 2, rows: 4, slices: 1 },
        many: Some((33, Tile { side: 16, down: 2, across: 4 })),
        int8: Some((33, Tile { side: 16, down: 4, across: 4 })),
    };
    let mut all = vec![
        Tuning { reduce: Reduce::Workgroup, lanes: 64, computed_levels: false, unrolled: false, span: Some(64), linear: small },
        Tuning { reduce: Reduce::Workgroup, lanes: 8, computed_levels: true, unrolled: false, span: None, linear: large },
    ];
    if device.adapter().unwrap().features.contains(wgpu::Features::SUBGROUP) {
        all.push(Tuning { reduce: Reduce::Subgroup, lanes: 64, computed_levels: true, unrolled: true, span: Some(128), linear: small });
    }
    all
}

/// Numbers without a pattern, of about [-1, 1].
pub(super) struct Numbers(u64);

impl Numbers {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn take(&mut self, n: usize) -> Vec<f32> {
        (0..n)
            .map(|_| {
                self.0 ^= self.0 << 13;
                self.0 ^= self.0 >> 7;
                self.0 ^= self.0 << 17;
                (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }
}

/// `x weight^T` in f64: `[rows, out]` of `[rows, in]`.
pub(super) fn linear(x: &[f64], weight: &Matrix) -> Vec<f64> {
    let mut row = vec![0.0; weight.cols()];
    let mut y = vec![0.0; x.len() / weight.cols() * weight.rows()];
    for out in 0..weight.rows() {
        weight.row_to_f32(out, &mut row);
        for (r, x) in x.chunks_exact(weight.cols()).enumerate() {
            y[r * weight.rows() + out] = x.iter().zip(&row).map(|(x, w)| x * f64::from(*w)).sum();
        }
    }
    y
}

/// What a matrix is worth after quantising.
pub(super) fn quantised(matrix: &Matrix, format: QuantFormat) -> Matrix {
    let packed = pool().enter(|| Packed::quantise(matrix, 0..matrix.rows(), 0..matrix.cols(), format, &|_| {})).unwrap();
    let mut values = vec![0.0; matrix.rows() * matrix.cols()];
    values.chunks_exact_mut(matrix.cols()).enumerate().for_each(|(r, row)| packed.row_to_f32(r, row));
    Matrix::from_f32(matrix.rows(), matrix.cols(), values)
}

pub(super) fn f64s(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

#[track_caller]
pub(super) fn assert_close(found: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    // The normalised mean square error: for f32 weights and caches 1e-7 is asked for, for others 1e-6.
    let square = |v: f64| v * v;
    let (error, size) = found.iter().zip(expected).fold((0.0, 0.0), |(n, s), (f, e)| (n + square(f64::from(*f) - e), s + square(*e)));
    let most = if tolerance < 1e-3 { 1e-7 } else { 1e-6 };
    assert!(error <= most * size, "{what}: the normalised mean square error is {:e}, above {most:e}", error / size);
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(*f) - e).abs();
        assert!(error <= tolerance * (1.0 + e.abs()), "{what}: value {i} is {f}, not {e} (tolerance {tolerance})");
    }
}

/// One thread.
pub(super) fn pool() -> Pool {
    Pool::new(Some(1)).unwrap()
}

/// A model of a few ops, with its weights and ranks.
pub(super) struct Model {
    pub config: Config,
    pub partition: StagePartition,
    pub plan: Plan,
    pub tensors: HashMap<String, Matrix>,
    /// What its matrices are quantised to.
    pub quantised: Option<QuantFormat>,
}

impl Model {
    /// Whether any matrix is packed.
    fn packs(&self) -> bool {
        self.quantised.is_some() || self.tensors.values().any(|matrix| matrix.dtype().quantised().is_some())
    }

    /// One layer on one rank, without weights.
    pub(super) fn new(hidden: usize, head_dim: usize, n_heads: usize, n_kv_heads: usize, channels: usize) -> Self {
        let config = Config {
            vocab_size: 50,
            hidden_size: hidden,
            intermediate_size: channels,
            n_layers: 1,
            n_heads,
            n_kv_heads,
            head_dim,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: None,
            max_position_embeddings: 4096,
            sliding_window: None,
            tie_word_embeddings: false,
            qkv_bias: false,
            qk_norm: false,
        };
        let whole = RankPartition { heads: 0..n_heads, kv_heads: 0..n_kv_heads, channels: 0..channels, vocab: 0..50 };
        let partition = StagePartition { layers: 0..1, ranks: vec![whole] };
        Self { config, partition, plan: Plan::default(), tensors: HashMap::new(), quantised: None }
    }

    pub(super) fn plan(mut self, record: impl FnOnce(Recorder) -> Plan) -> Self {
        self.plan = record(Recorder::new(true));
        self
    }

    pub(super) fn tensor(mut self, name: &str, matrix: Matrix) -> Self {
        self.tensors.insert(format!("{name}.weight"), matrix);
        self
    }

    /// Calls `with` with the assignment of all ranks.
    pub(super) fn assign<T>(&self, with: impl FnOnce(Assignment<'_>) -> T) -> T {
        let tensor = |name: &str| Ok(self.tensors[name].clone());
        with(Assignment {
            stage: 0,
            stays: false,
            tune: false,
            spare: None,
            lanes: 1,
            wire: Wire::F32,
            ranks: (0..self.partition.ranks.len()).collect(),
            plan: &self.plan,
            config: &self.config,
            partition: &self.partition,
            tensor: &tensor,
            packing: self.packs().then_some(Packing { format: self.quantised, cache: None, progress: &|_| {} }),
        })
    }

    pub(super) fn place(&self, device: &Device, tuning: Tuning, room: Room) -> GpuPlace {
        self.assign(|assignment| GpuPlace::with_tuner(device, assignment, room, Tuner::defaults(tuning), &pool(), &mut Opened::default()))
            .unwrap()
    }

    pub(super) fn on(&self, device: &Device, room: Room) -> Result<GpuPlace> {
        self.assign(|assignment| GpuPlace::new(device, assignment, room, &pool(), &mut Opened::default()))
    }

    /// The reference: the same on the CPU.
    pub(super) fn on_cpu(&self) -> CpuPlace {
        let threads = Threads { pool: Arc::new(pool()), work: WorkDistributionConfig::default(), stats: Arc::default() };
        self.assign(|assignment| CpuPlace::new(&assignment, &threads)).unwrap()
    }

    /// A batch of `rows` positions of one sequence, from 0, whose logits are all wanted.
    pub(super) fn rows(&self, number: u64, rows: usize) -> Batch {
        let pages = (0..rows.div_ceil(64) as u32).collect();
        let rows = (0..rows as u32).map(|pos| Row { seq: 0, pos }).collect();
        self.batch(number, rows, vec![Seq { pages, first_page: 0 }], KvType::F32)
    }

    pub(super) fn batch(&self, number: u64, rows: Vec<Row>, seqs: Vec<Seq>, kv: KvType) -> Batch {
        let half = self.config.head_dim / 2;
        let rope = rows.iter().flat_map(|row| {
            let angle = move |i: usize| f64::from(row.pos) * 10_000f64.powf(-(i as f64) / half as f64);
            (0..half).map(move |i| angle(i).cos() as f32).chain((0..half).map(move |i| angle(i).sin() as f32))
        });
        let rope = rope.collect();
        Batch {
            number,
            wanted: (0..rows.len() as u32).collect(),
            rows,
            seqs,
            copies: Vec::new(),
            rope,
            kv,
            numerics: Numerics::Exact,
            wire: Wire::F32,
            timed: false,
        }
    }
}

pub(super) const ROOM: Room = Room { rows: 70, wanted: 70, pages: 12 };

/// Launches the plan's only segment, waits, and reads.
pub(super) fn run(place: &mut dyn Place, batch: &Batch, input: &[f32]) -> Vec<f32> {
    try_run(place, batch, input).unwrap()
}

/// [`run`], with guard bands: in every activation, nothing is written to rows that the batch doesn't have, nor behind a row's width.
pub(super) fn guarded(place: &mut GpuPlace, batch: &Batch, input: &[f32]) -> Vec<f32> {
    const GUARD: f32 = -12345.5;
    let activations = place.activations.clone();
    let from = |part: &Activation| part.rows.of(batch) * part.stride();
    for part in &activations {
        let mut values = vec![GUARD; part.buffer.size() as usize / 4];
        values[..from(part)].fill(0.0);
        place.gpu.queue.write_buffer(&part.buffer, 0, bytemuck::cast_slice(&values));
    }
    let output = run(place, batch, input);
    for part in &activations {
        let values: Vec<f32> = download(&place.gpu, &part.buffer);
        let (rows, guards) = values.split_at(from(part));
        assert!(guards.iter().all(|v| *v == GUARD), "{}: written behind the last row", place.device());
        for row in rows.chunks_exact(part.stride().max(1)) {
            let (lead, rest) = row.split_at(part.part.lead);
            assert!(lead.iter().chain(&rest[part.part.width..]).all(|v| *v == 0.0), "{}: written beside a row", place.device());
        }
    }
    output
}

/// What a buffer of a device holds.
pub(super) fn download<T: bytemuck::Pod>(gpu: &Gpu, buffer: &wgpu::Buffer) -> Vec<T> {
    let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
    let staging = gpu.buffer("what a test looks at", buffer.size(), usage).unwrap();
    let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    encoder.copy_buffer_to_buffer(buffer, 0, &staging, 0, buffer.size());
    let index = gpu.queue.submit([encoder.finish()]);
    staging.map_async(wgpu::MapMode::Read, .., |mapped| mapped.unwrap());
    gpu.finish(&index).unwrap();
    let view = staging.get_mapped_range(..).unwrap();
    bytemuck::cast_slice(&view).to_vec()
}

pub(super) fn try_run(place: &mut dyn Place, batch: &Batch, input: &[f32]) -> Result<Vec<f32>> {
    place.launch(0, SegmentId(0), batch, &Flow::Host(input.to_vec()))?;
    for _ in 0..60 {
        if let Poll::Ready(()) = place.poll(0, Duration::from_secs(1))? {
            return place.collect(0);
        }
    }
    panic!("a launch did not end within a minute");
}
