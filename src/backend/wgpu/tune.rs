//! [`Tuner`]: chooses the variant of a linear layer by measuring, the first time that an adapter meets a shape.

use std::time::{Duration, Instant};

use super::adapters::Adapter;
use super::dispatch::{Size, fold};
use super::gpu::{Gpu, Owner};
use super::room::{Bounds, INT8_BLOCK};
use super::shaders::{Finish, Kernel, Pipelines, Shape};
use super::tuned::Tuned;
use super::tuning::{Few, Linear, Tile, Tuning};
use super::weights::{BLOCK, Format, TILE};
use crate::backend::Numerics;
use crate::device::{Device, KernelTime};
use crate::error::{Error, Result};

/// Smaller weights take whatever the adapter's defaults are: what they cost is launching.
const SMALLEST: usize = 1 << 20;

/// The most that the copies of a weight take that a report reads in turn, so that a cache doesn't hold them all.
const COPIES: usize = 128 << 20;

/// How long one of the three runs that measure a variant takes, as far as it has more than one dispatch.
const RUN: Duration = Duration::from_millis(2);

/// The most that submitting and waiting may take beside a dispatch: a variant that takes twice the best time and this more is out.
const OVERHEAD: Duration = Duration::from_millis(1);

/// Most outputs and columns of a report.
const LARGEST: usize = 1 << 20;

/// Rounds of a report.
const ROUNDS: usize = 7;

/// Rows at which variants for few and for many are compared.
const FEW: usize = 8;
const MANY: usize = 64;

/// The shape of a linear layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Layer {
    pub format: Format,
    pub blocks: usize,
    pub tiles: usize,
}

impl Layer {
    fn bytes(self) -> usize {
        self.format.tile_bytes(self.blocks, 0) * self.tiles
    }

    /// The name that a choice is kept under.
    fn key(self) -> String {
        format!("{} {} x {}", self.format.name(), self.tiles * TILE, self.blocks * BLOCK)
    }
}

/// Chooses variants for one adapter.
pub(super) struct Tuner {
    base: Tuning,
    /// Where choices are kept; `None` takes the defaults for all.
    tuned: Option<Tuned>,
}

impl Tuner {
    /// The adapter's defaults, for all shapes alike.
    pub(super) fn defaults(base: Tuning) -> Self {
        Self { base, tuned: None }
    }

    /// Measures, and takes what was measured before.
    pub(super) fn measuring(adapter: &Adapter) -> Self {
        Self { base: Tuning::of(adapter), tuned: Some(Tuned::of(adapter)) }
    }

    pub(super) fn base(&self) -> Tuning {
        self.base
    }

    /// How a layer of this shape is computed, of which `weights` are one.
    pub(super) fn linear(&mut self, gpu: &Gpu, pipelines: &mut Pipelines<'_>, layer: Layer, weights: &wgpu::Buffer) -> Result<Linear> {
        let Some(tuned) = self.tuned.as_mut().filter(|_| layer.bytes() >= SMALLEST) else { return Ok(self.base.linear) };
        let key = layer.key();
        if let Some(linear) = tuned.get(&key) {
            return Ok(linear);
        }
        let linear = choose(pipelines, &Bench::new(gpu, layer, vec![weights.clone()])?, self.base.linear)?;
        tuned.keep(key, linear);
        Ok(linear)
    }
}

const fn one(tiles: u32, slices: u32) -> Few {
    Few { tiles, rows: 1, slices }
}

/// Workgroups for one row that are tried.
const ONE: [Few; 10] = [one(4, 1), one(2, 1), one(8, 1), one(1, 1), one(1, 8), one(1, 4), one(2, 4), one(4, 4), one(2, 8), one(1, 16)];

/// For several.
const SEVERAL: [Few; 5] = [
    Few { tiles: 4, rows: 4, slices: 1 },
    Few { tiles: 2, rows: 4, slices: 1 },
    Few { tiles: 1, rows: 4, slices: 8 },
    Few { tiles: 2, rows: 4, slices: 4 },
    Few { tiles: 1, rows: 8, slices: 4 },
];

const TILES: [Tile; 3] =
    [Tile { side: 16, down: 4, across: 4 }, Tile { side: 8, down: 4, across: 4 }, Tile { side: 16, down: 2, across: 4 }];

/// For int8 activations.
const INT8: [Tile; 3] =
    [Tile { side: 16, down: 4, across: 4 }, Tile { side: 8, down: 4, across: 4 }, Tile { side: 16, down: 8, across: 4 }];

fn choose(pipelines: &mut Pipelines<'_>, bench: &Bench<'_>, base: Linear) -> Result<Linear> {
    let layer = bench.layer;
    let few = |few| Kernel::Linear(layer.format, Finish::Store, few);
    let one = bench.fastest(pipelines, &ONE.map(few), 1)?;
    let several = bench.fastest(pipelines, &SEVERAL.map(few), FEW)?;
    let mut linear = Linear { one: ONE[one.0], few: SEVERAL[several.0], many: None, int8: None };
    if let Some((least, _)) = base.many {
        let workgroup = bench.gpu.device.limits().max_compute_workgroup_storage_size;
        let tiles: Vec<Tile> = TILES.into_iter().filter(|tile| tile.bytes() <= workgroup).collect();
        let kernels: Vec<_> = tiles.iter().map(|&tile| Kernel::LinearTile(layer.format, Finish::Store, tile)).collect();
        let (tile, time) = bench.fastest(pipelines, &kernels, MANY)?;
        let several = bench.time(pipelines, few(linear.few), MANY, Duration::MAX)?;
        if time < several {
            linear.many = Some((least, tiles[tile]));
        }
        if layer.format.int8_source().is_some() {
            linear.int8 = int8(pipelines, bench, time.min(several))?.map(|tile| (least, tile));
        }
    }
    Ok(linear)
}

/// The fastest workgroup for int8 activations, if it takes less than `other`, the quantising included.
fn int8(pipelines: &mut Pipelines<'_>, bench: &Bench<'_>, other: Duration) -> Result<Option<Tile>> {
    let workgroup = bench.gpu.device.limits().max_compute_workgroup_storage_size;
    let tiles: Vec<Tile> = INT8.into_iter().filter(|tile| tile.int8_bytes() <= workgroup).collect();
    let kernels: Vec<_> = tiles.iter().map(|&tile| Kernel::LinearInt8(bench.layer.format, Finish::Store, tile)).collect();
    let (tile, product) = bench.fastest(pipelines, &kernels, MANY)?;
    let quantise = bench.time(pipelines, Kernel::Quantise, MANY, Duration::MAX)?;
    Ok((quantise + product < other).then(|| tiles[tile]))
}

/// How long every variant for one row takes, measured in turn for several rounds, and which one a model would take after its short measurement.
pub(crate) fn kernel_times(device: &Device, adapter: &Adapter, weights: &str, out: usize, cols: usize) -> Result<Vec<KernelTime>> {
    let owner = Owner { stage: 0, ranks: Vec::new(), device: device.to_string() };
    let Some(format) = Format::all().find(|format| format.name() == weights) else {
        let right = "weights are f32, f16, bf16 or of a quantised format, such as q4_0 or q4_k";
        return Err(Error::Option { option: "--weights", value: weights.into(), right });
    };
    if !(1..=LARGEST).contains(&out) || !(1..=LARGEST).contains(&cols) {
        return Err(owner.error(format!("a weight of {out} x {cols} is not measured: outputs and columns are 1 to {LARGEST}")));
    }
    let layer = Layer { format, blocks: cols.div_ceil(BLOCK), tiles: out.div_ceil(TILE) };
    let most = Bounds::of(device, adapter).binding;
    if layer.bytes() as u64 > most {
        return Err(owner.error(format!("a weight of {out} x {cols} takes {} bytes, more than a binding of {most}", layer.bytes())));
    }
    let gpu = Gpu::open(adapter, most, owner)?;
    let mut pipelines = Pipelines::new(&gpu.device, Tuning::of(adapter), 64);
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
    let copies = (COPIES / layer.bytes()).clamp(1, 4);
    let weights = (0..copies).map(|_| gpu.buffer("weights to measure with", layer.bytes() as u64, usage)).collect::<Result<_>>()?;
    let bench = Bench::new(&gpu, layer, weights)?;
    let kernels = ONE.map(|few| Kernel::Linear(format, Finish::Store, few));
    let (chosen, _) = bench.fastest(&mut pipelines, &kernels, 1)?;
    let mut times = [Duration::MAX; ONE.len()];
    for _ in 0..ROUNDS {
        for (time, &kernel) in times.iter_mut().zip(&kernels) {
            *time = (*time).min(bench.time(&mut pipelines, kernel, 1, Duration::MAX)?);
        }
    }
    let name = |Few { tiles, slices, .. }| format!("{} outputs, {slices} slices", tiles * TILE as u32);
    Ok(ONE.into_iter().zip(times).enumerate().map(|(i, (few, time))| KernelTime { name: name(few), time, chosen: i == chosen }).collect())
}

/// A linear layer whose inputs are all zero, in both forms.
struct Bench<'a> {
    gpu: &'a Gpu,
    layer: Layer,
    weights: Vec<wgpu::Buffer>,
    x: wgpu::Buffer,
    /// x in int8.
    int8: wgpu::Buffer,
    y: wgpu::Buffer,
    shape: wgpu::Buffer,
    counts: wgpu::Buffer,
}

impl<'a> Bench<'a> {
    fn new(gpu: &'a Gpu, layer: Layer, weights: Vec<wgpu::Buffer>) -> Result<Self> {
        use wgpu::BufferUsages as Usage;
        let (columns, outs) = (layer.blocks * BLOCK, layer.tiles * TILE);
        let buffer = |bytes: usize, usage| gpu.buffer("what kernels are measured with", bytes as u64, usage | Usage::COPY_DST);
        let shape = Shape {
            width: columns as u32,
            width4: (columns / 4) as u32,
            stride: outs as u32,
            blocks: layer.blocks as u32,
            out: outs as u32,
            ..Shape::default()
        };
        let bench = Self {
            gpu,
            layer,
            weights,
            x: buffer(4 * MANY * columns, Usage::STORAGE)?,
            int8: buffer(INT8_BLOCK * MANY * layer.blocks, Usage::STORAGE)?,
            y: buffer(4 * MANY * outs, Usage::STORAGE)?,
            shape: buffer(size_of::<Shape>(), Usage::UNIFORM)?,
            counts: buffer(16, Usage::UNIFORM)?,
        };
        gpu.queue.write_buffer(&bench.shape, 0, bytemuck::bytes_of(&shape));
        Ok(bench)
    }

    /// The fastest of some kernels, and how long it takes.
    fn fastest(&self, pipelines: &mut Pipelines<'_>, kernels: &[Kernel], rows: usize) -> Result<(usize, Duration)> {
        let mut times = Vec::new();
        let mut best = Duration::MAX;
        let mut failed = None;
        for &kernel in kernels {
            // What a driver can't compile is out, as long as the device lives and there is another.
            times.push(self.time(pipelines, kernel, rows, best).or_else(|e| {
                failed = Some(e);
                self.gpu.check().map(|()| Duration::MAX)
            })?);
            best = best.min(times[times.len() - 1]);
        }
        if let Some(e) = failed.filter(|_| best == Duration::MAX) {
            return Err(e);
        }
        // Those that are close to the best once more, now that all are compiled.
        let close = best.saturating_add(best / 4);
        for (time, &kernel) in times.iter_mut().zip(kernels) {
            if *time <= close {
                *time = (*time).min(self.time(pipelines, kernel, rows, Duration::MAX)?);
            }
        }
        Ok(times.into_iter().enumerate().min_by_key(|(_, time)| *time).unwrap_or((0, Duration::MAX)))
    }

    /// How long a kernel takes for so many rows. It is not measured again where the first time is far above `best`.
    fn time(&self, pipelines: &mut Pipelines<'_>, kernel: Kernel, rows: usize, best: Duration) -> Result<Duration> {
        let (out, default) = (self.layer.tiles * TILE, Tuning::HARDWARE.linear);
        let size = match kernel {
            Kernel::Linear(_, _, few) => Size::Linear(out, Linear { one: few, few, many: None, int8: None }),
            Kernel::LinearTile(_, _, tile) => Size::Linear(out, Linear { many: Some((0, tile)), ..default }),
            Kernel::LinearInt8(_, _, tile) => Size::LinearInt8(out, Linear { int8: Some((0, tile)), ..default }),
            Kernel::Quantise => Size::Elements(self.layer.blocks),
            _ => unreachable!("only linear layers are tuned"),
        };
        let (_, groups) = size.groups(rows, 1, Numerics::Fast);
        let (x, y) = fold(groups, self.gpu.device.limits().max_compute_workgroups_per_dimension as usize);
        let pipeline = self.gpu.scoped("pipelines", 0, || pipelines.get(kernel))?;
        let bind = |weights| match kernel {
            Kernel::Quantise => pipelines.bind(kernel, &self.shape, 0, &self.counts, [&self.x, &self.int8]),
            Kernel::LinearInt8(..) => pipelines.bind(kernel, &self.shape, 0, &self.counts, [weights, &self.int8, &self.y]),
            _ => pipelines.bind(kernel, &self.shape, 0, &self.counts, [weights, &self.x, &self.y]),
        };
        let binds: Vec<_> = self.weights.iter().map(bind).collect();
        self.gpu.queue.write_buffer(&self.counts, 0, bytemuck::cast_slice(&[rows as u32, rows as u32, 0, 0]));
        let run = |n: usize| {
            let mut encoder = self.gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            pass.set_pipeline(&pipeline);
            for bind in binds.iter().cycle().take(n) {
                pass.set_bind_group(0, bind, &[]);
                pass.dispatch_workgroups(x, y, 1);
            }
            drop(pass);
            let start = Instant::now();
            let index = self.gpu.queue.submit([encoder.finish()]);
            self.gpu.finish(&index)?;
            Ok(start.elapsed() / n as u32)
        };
        // Many drivers compile at the first use.
        run(1)?;
        let single = run(1)?;
        if best < Duration::MAX && single > 2 * best + OVERHEAD {
            return Ok(single);
        }
        // Enough of them that what comes with a submission is little beside them, and the same for all.
        let n = (RUN.as_nanos() / single.as_nanos().max(1)).clamp(1, 64) as usize;
        let mut time = run(n)?;
        for _ in 0..2 {
            time = time.min(run(n)?);
        }
        Ok(time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::wgpu::tests::gpus;
    use crate::kernels::quant::QuantFormat;

    #[test]
    fn int8_is_chosen_only_where_it_takes_less_than_the_best_other() {
        for device in gpus() {
            let adapter = device.adapter().unwrap();
            let owner = Owner { stage: 0, ranks: vec![0], device: device.to_string() };
            let gpu = Gpu::open(adapter, Bounds::of(&device, adapter).binding, owner).unwrap();
            let layer = Layer { format: Format::Packed(QuantFormat::Q4_0), blocks: 9, tiles: 5 };
            let weights = gpu.buffer("weights", layer.bytes() as u64, wgpu::BufferUsages::STORAGE).unwrap();
            let bench = Bench::new(&gpu, layer, vec![weights]).unwrap();
            let mut pipelines = Pipelines::new(&gpu.device, Tuning::of(adapter), 64);
            assert_eq!(int8(&mut pipelines, &bench, Duration::ZERO).unwrap(), None, "{device}");
            let tile = int8(&mut pipelines, &bench, Duration::MAX).unwrap();
            assert!(tile.is_some_and(|tile| INT8.contains(&tile)), "{device}: {tile:?}");
        }
    }
}
