//! [`GpuPlace`]: ranks of a stage on one wgpu device.

use std::any::Any;
use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::Poll;
use std::time::Duration;

use super::cache::Caches;
use super::dispatch::Dispatch;
use super::gpu::{Gpu, Owner};
use super::handover::{Handover, Handovers};
use super::lower::{Activation, Lowered, Lowerer};
use super::moment::Moment;
use super::opened::Opened;
use super::room::{self, Bounds, Part};
use super::timer::Timer;
use super::tune::Tuner;
use super::tuning::Tuning;
use super::twins::Twins;
use crate::backend::{Assignment, Batch, Flow, Lane, Place, PlaceCounts, Room, Wire};
use crate::device::Device;
use crate::error::Result;
use crate::kernels::pool::Pool;
use crate::plan::{Exchange, SegmentId};

/// A segment of the plan, lowered.
struct Segment {
    /// Of the plan, for each rank.
    ops: u64,
    dispatches: std::ops::Range<usize>,
    /// Whether the first of them widens what was written, and the last narrows what is read, where sums travel in 2 bytes an element.
    widens: bool,
    narrows: bool,
    write: Option<Activation>,
    /// One part where it is shared, else one a rank.
    read: Vec<Activation>,
    /// What is read stays on the device, for the next stage.
    stays: bool,
}

/// What a launch left running.
struct Flight {
    index: wgpu::SubmissionIndex,
    signal: Arc<Signal>,
    segment: usize,
    /// Rows of what is read, and its bytes in the staging buffer.
    rows: usize,
    wire: Wire,
    bytes: u64,
    /// Whether timestamps lie behind what is read.
    timed: bool,
    /// Where it is read from.
    mapped: wgpu::Buffer,
    /// What is handed over instead of read.
    handover: Option<Handover>,
}

/// How the callback of a launch tells that it is done.
#[derive(Default)]
struct Signal(AtomicU8);

impl Signal {
    const DONE: u8 = 1;
    const FAILED: u8 = 2;

    fn set(&self, done: bool) {
        self.0.store(if done { Self::DONE } else { Self::FAILED }, Ordering::Release);
    }

    fn get(&self) -> u8 {
        self.0.load(Ordering::Acquire)
    }
}

/// What a lane has of its own, beside its [`Twins`].
struct Course {
    moment: Moment,
    /// What a segment reads, on its way to the host.
    staging: wgpu::Buffer,
    flight: Option<Flight>,
}

pub(crate) struct GpuPlace {
    pub(super) gpu: Gpu,
    ranks: Vec<usize>,
    lanes: Vec<Course>,
    twins: Twins,
    wire: wgpu::Buffer,
    segments: Vec<Segment>,
    dispatches: Vec<Dispatch>,
    pub(super) caches: Caches,
    #[cfg(test)]
    pub(super) activations: Vec<Activation>,
    /// Workgroups in one dimension of a grid.
    dimension: u32,
    /// See [`Device::with_busy_work`].
    busy_work: u32,
    timer: Option<Timer>,
    handovers: Handovers,
    weight_bytes: Vec<u64>,
    counts: PlaceCounts,
}

impl GpuPlace {
    /// What of `want` the device can take.
    ///
    /// Rows shrink until every activation fits one binding, wanted rows until the logits do, and pages until the keys of one
    /// layer and rank do and all keys and values stay within 1 GiB.
    ///
    /// # Errors
    /// If not even one of them fits, or heads are larger than a workgroup's memory.
    pub(crate) fn room(device: &Device, assignment: &Assignment<'_>, want: Room) -> Result<Room> {
        let owner = owner(device, assignment);
        let adapter = device.adapter().ok_or_else(|| owner.error("is no adapter"))?;
        room::fit(Bounds::of(device, adapter), assignment, &owner, want)
    }

    /// Opens the device if need be, uploads the ranks' weights, quantised on the threads of `pool` where that is wanted, and makes
    /// everything that launches need.
    ///
    /// # Errors
    /// If the device can't be opened, is lost, runs out of memory, or can't take `room`.
    pub(crate) fn new(device: &Device, assignment: Assignment<'_>, room: Room, pool: &Pool, opened: &mut Opened) -> Result<Self> {
        let adapter = device.adapter().ok_or_else(|| owner(device, &assignment).error("is no adapter"))?;
        let tuner = if assignment.tune { Tuner::measuring(adapter) } else { Tuner::defaults(Tuning::of(adapter)) };
        Self::with_tuner(device, assignment, room, tuner, pool, opened)
    }

    pub(super) fn with_tuner(
        device: &Device,
        assignment: Assignment<'_>,
        room: Room,
        tuner: Tuner,
        pool: &Pool,
        opened: &mut Opened,
    ) -> Result<Self> {
        let owner = owner(device, &assignment);
        let adapter = device.adapter().ok_or_else(|| owner.error("is no adapter"))?;
        let bounds = Bounds::of(device, adapter);
        let fit = room::fit(bounds, &assignment, &owner, room)?;
        if fit != room {
            return Err(owner.error(format!("has room for {fit:?}, not for {room:?}")));
        }

        let gpu = opened.open(device, adapter, bounds.binding, owner)?;
        let split = room::split(bounds, &assignment, tuner.base().span);
        let moment = |_| Moment::new(&gpu, bounds, room, assignment.config.head_dim, split);
        let moments = (0..assignment.lanes).map(moment).collect::<Result<Vec<_>>>()?;
        let mut lowerer = Lowerer::new(&gpu, bounds, &assignment, room, &moments, split, tuner, pool)?;
        let (mut segments, mut is_sum) = (Vec::new(), false);
        for segment in &assignment.plan.segments {
            let start = lowerer.len();
            let widens = segment.write.filter(|_| is_sum).map_or(Ok(false), |buf| lowerer.travel(buf, false))?;
            lowerer.segment(&assignment.plan.ops[segment.ops.clone()])?;
            is_sum = segment.exchange == Exchange::AllReduce;
            let narrows = segment.read.filter(|_| is_sum).map_or(Ok(false), |buf| lowerer.travel(buf, true))?;
            segments.push(Segment {
                ops: (segment.ops.len() * assignment.ranks.len()) as u64,
                dispatches: start..lowerer.len(),
                widens,
                narrows,
                write: segment.write.map(|buf| lowerer.parts_of(buf).map(|parts| parts[0].clone())).transpose()?,
                read: segment.read.map_or(Ok(Vec::new()), |buf| lowerer.parts_of(buf).map(<[_]>::to_vec))?,
                stays: assignment.stays && segment.exchange == Exchange::Pass,
            });
        }
        let lowered = lowerer.finish()?;
        let Lowered { dispatches, caches, twins, wire, weight_bytes, .. } = lowered;

        let most = |stays: bool| {
            let read = segments.iter().filter(|s| s.stays == stays).map(|s| read_bytes(&s.read, room.rows, room.wanted));
            read.max().unwrap_or(0).max(16)
        };
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let staging = || gpu.buffer("what is read back", most(false).next_multiple_of(8) + Timer::BYTES, usage);
        let course = |moment| staging().map(|staging| Course { moment, staging, flight: None });
        let lanes = moments.into_iter().map(course).collect::<Result<_>>()?;
        let timer = Timer::new(&gpu)?;
        let handovers = Handovers::new(most(true));
        gpu.flush()?;
        let counts = PlaceCounts { weight_bytes: weight_bytes.iter().sum(), ..PlaceCounts::default() };
        Ok(Self {
            ranks: assignment.ranks,
            lanes,
            twins,
            wire,
            segments,
            dispatches,
            caches,
            #[cfg(test)]
            activations: lowered.activations,
            dimension: adapter.limits.max_compute_workgroups_per_dimension,
            busy_work: device.busy_work(),
            timer,
            handovers,
            weight_bytes,
            counts,
            gpu,
        })
    }

    /// Destroys the device under the place, so that a test sees what a loss looks like.
    #[cfg(test)]
    pub(crate) fn destroy(&self) {
        self.gpu.device.destroy();
    }

    /// Writes `[rows, width]` to an activation, whose rows are padded; or to where the segment's first dispatch widens it from, as `wire` has it.
    fn write(&mut self, lane: Lane, to: &Activation, rows: usize, input: &[f32], wire: Wire) -> Result<()> {
        if input.len() != rows * to.part.width {
            let problem = format!("an input of {} values was given for {rows} rows of {}", input.len(), to.part.width);
            return Err(self.gpu.owner.error(problem));
        }
        let padded = pad(input, to.part.width, to.stride());
        if wire == Wire::F32 {
            self.gpu.queue.write_buffer(self.twins.in_lane(lane, &to.buffer), 0, bytemuck::cast_slice(&padded));
        } else {
            self.gpu.queue.write_buffer(&self.wire, 0, bytemuck::cast_slice(&wire.narrow(&padded)));
        }
        self.counts.bytes_written += (input.len() * wire.bytes()) as u64;
        Ok(())
    }

    /// Copies what a stage on this device passed on to an activation, whose rows are padded alike.
    fn receive(&self, lane: Lane, encoder: &mut wgpu::CommandEncoder, to: &Activation, rows: usize, input: &dyn Any) -> Result<()> {
        let Some(input) = input.downcast_ref::<Handover>().filter(|input| input.device == self.gpu.device) else {
            return Err(self.gpu.owner.error("rows were passed to it that lie on another device"));
        };
        let bytes = 4 * (rows * to.stride()) as u64;
        if input.bytes != bytes {
            let problem = format!("{} bytes were passed to it for {rows} rows of {}, which take {bytes}", input.bytes, to.part.width);
            return Err(self.gpu.owner.error(problem));
        }
        encoder.copy_buffer_to_buffer(&input.buffer, 0, self.twins.in_lane(lane, &to.buffer), 0, bytes);
        Ok(())
    }

    /// The launch that is done.
    fn landed(&mut self, lane: Lane) -> Result<Flight> {
        let landed = self.lanes[lane].flight.take_if(|flight| flight.signal.get() == Signal::DONE);
        landed.ok_or_else(|| self.gpu.owner.error("an output was asked for before there was one"))
    }
}

impl Place for GpuPlace {
    fn ranks(&self) -> &[usize] {
        &self.ranks
    }

    fn device(&self) -> &str {
        &self.gpu.owner.device
    }

    fn is_asynchronous(&self) -> bool {
        true
    }

    fn launch(&mut self, lane: Lane, segment: SegmentId, batch: &Batch, input: &Flow) -> Result<()> {
        self.gpu.check()?;
        let course = &mut self.lanes[lane];
        if let Some(flight) = course.flight.take().filter(|flight| flight.bytes > 0) {
            flight.mapped.unmap();
        }
        course.moment.write(&self.gpu, batch)?;
        let mut encoder = self.gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        if let Some(to) = self.segments[segment.0].write.clone() {
            match input {
                Flow::Host(input) => {
                    let wire = if self.segments[segment.0].widens { batch.wire } else { Wire::F32 };
                    self.write(lane, &to, to.rows.of(batch), input, wire)?;
                }
                Flow::Device(input) => self.receive(lane, &mut encoder, &to, to.rows.of(batch), &**input)?,
            }
        }
        let lowered = &self.segments[segment.0];
        if segment.0 == 0 {
            self.caches.copy(&mut encoder, &batch.copies);
        }
        let timer = self.timer.as_ref().filter(|_| batch.timed && !lowered.stays);
        let timestamp_writes = timer.map(Timer::writes);
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: None, timestamp_writes });
        let (start, end) = (lowered.dispatches.start, lowered.dispatches.end);
        let skipped = |travels: bool| usize::from(travels && batch.wire == Wire::F32);
        for dispatch in &self.dispatches[start + skipped(lowered.widens)..end - skipped(lowered.narrows)] {
            self.counts.dispatches += u64::from(dispatch.encode(&mut pass, lane, batch, self.dimension, self.busy_work));
        }
        drop(pass);

        let rows = lowered.read.first().map_or(0, |part| part.rows.of(batch));
        let wire = if lowered.narrows { batch.wire } else { Wire::F32 };
        let size = |part: &Activation| (wire.bytes() * rows * part.stride()) as u64;
        let all = lowered.read.iter().map(size).sum();
        let handover = if lowered.stays { Some(self.handovers.take(&self.gpu, all)?) } else { None };
        let timer = timer.filter(|_| all > 0);
        let staging = &self.lanes[lane].staging;
        // Where it can be mapped as it is, nothing is copied.
        let mapped = match &lowered.read[..] {
            [part] if self.gpu.maps && handover.is_none() && wire == Wire::F32 && timer.is_none() => self.twins.in_lane(lane, &part.buffer),
            _ => staging,
        };
        let to = handover.as_ref().map_or(staging, |handover| &handover.buffer);
        let mut at = 0;
        for part in lowered.read.iter().filter(|_| mapped == staging) {
            let from = if wire == Wire::F32 { self.twins.in_lane(lane, &part.buffer) } else { &self.wire };
            if size(part) > 0 {
                encoder.copy_buffer_to_buffer(from, 0, to, at, size(part));
                at += size(part);
            }
        }
        let mut bytes = if lowered.stays { 0 } else { all };
        if let Some(timer) = timer {
            timer.copy(&mut encoder, staging, bytes);
            bytes += Timer::BYTES;
        }
        let timed = timer.is_some();
        let signal = Arc::new(Signal::default());
        let done = Arc::clone(&signal);
        if bytes > 0 {
            encoder.map_buffer_on_submit(mapped, wgpu::MapMode::Read, 0..bytes, move |mapped| done.set(mapped.is_ok()));
        } else {
            encoder.on_submitted_work_done(move || done.set(true));
        }
        let mapped = mapped.clone();
        let index = self.gpu.queue.submit([encoder.finish()]);
        self.counts.submissions += 1;
        self.counts.ops += lowered.ops;
        self.lanes[lane].flight = Some(Flight { index, signal, segment: segment.0, rows, wire, bytes, timed, mapped, handover });
        self.gpu.check()
    }

    fn poll(&mut self, lane: Lane, within: Duration) -> Result<Poll<()>> {
        let Some(flight) = &self.lanes[lane].flight else { return Ok(Poll::Ready(())) };
        if !self.gpu.wait(&flight.index, within, || flight.signal.get() != 0)? {
            return Ok(Poll::Pending);
        }
        match flight.signal.get() {
            Signal::FAILED => Err(self.gpu.lost("what was read could not be mapped")),
            _ => Ok(Poll::Ready(())),
        }
    }

    fn output(&mut self, lane: Lane, take: &mut dyn FnMut(&[f32])) -> Result<()> {
        let flight = self.landed(lane)?;
        if flight.bytes > 0 {
            let view = flight.mapped.slice(0..flight.bytes).get_mapped_range().map_err(|e| self.gpu.lost(e.to_string()))?;
            let (read, timestamps) = view.split_at(view.len() - if flight.timed { Timer::BYTES as usize } else { 0 });
            if let Some(timer) = self.timer.as_ref().filter(|_| flight.timed) {
                self.counts.device_nanoseconds += timer.nanoseconds(timestamps);
            }
            let mut left = read;
            for part in &self.segments[flight.segment].read {
                let (rows, stride, Part { lead, width }) = (flight.rows, part.stride(), part.part);
                let bytes;
                (bytes, left) = left.split_at(flight.wire.bytes() * rows * stride);
                self.counts.bytes_read += (flight.wire.bytes() * rows * width) as u64;
                if flight.wire != Wire::F32 {
                    let mut row = vec![0.0; stride];
                    for bits in bytemuck::cast_slice(bytes).chunks_exact(stride) {
                        flight.wire.widen(bits, &mut row);
                        take(&row[lead..][..width]);
                    }
                } else if width == stride {
                    take(bytemuck::cast_slice(bytes));
                } else if width > 0 {
                    bytemuck::cast_slice::<_, f32>(bytes).chunks_exact(stride).for_each(|row| take(&row[lead..][..width]));
                }
            }
            drop(view);
            flight.mapped.unmap();
        }
        Ok(())
    }

    fn pass(&mut self, lane: Lane) -> Result<Flow> {
        if let Some(handover) = self.lanes[lane].flight.as_mut().and_then(|flight| flight.handover.take()) {
            return self.landed(lane).map(|_| Flow::Device(Box::new(handover)));
        }
        self.collect(lane).map(Flow::Host)
    }

    fn counts(&self) -> PlaceCounts {
        self.counts
    }

    fn weight_bytes(&self) -> Vec<u64> {
        self.weight_bytes.clone()
    }
}

/// Rows of `width` elements in rows of `stride`, with zeros behind them.
fn pad(rows: &[f32], width: usize, stride: usize) -> Cow<'_, [f32]> {
    if width == stride || width == 0 {
        return Cow::Borrowed(rows);
    }
    let mut padded = vec![0.0; rows.len() / width * stride];
    padded.chunks_exact_mut(stride).zip(rows.chunks_exact(width)).for_each(|(to, from)| to[..width].copy_from_slice(from));
    Cow::Owned(padded)
}

fn owner(device: &Device, assignment: &Assignment<'_>) -> Owner {
    Owner { stage: assignment.stage, ranks: assignment.ranks.clone(), device: device.to_string() }
}

/// Bytes of the staging buffer that a segment needs.
fn read_bytes(parts: &[Activation], rows: usize, wanted: usize) -> u64 {
    let rows = |of| if of == crate::plan::Rows::All { rows } else { wanted };
    parts.iter().map(|part| 4 * (rows(part.rows) * part.stride()) as u64).sum()
}
