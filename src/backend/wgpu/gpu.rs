//! [`Gpu`]: an opened device, its errors and its waits.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::adapters::Adapter;
use crate::error::{Error, Result};

/// How long a wait inside wgpu may take before loss is looked for again.
const SLICE: Duration = Duration::from_millis(100);

/// How long the host spins before it blocks, on hardware: a blocking wait costs up to a millisecond there.
const SPIN: Duration = Duration::from_micros(200);

/// How long the host sleeps between two looks at a device on which several threads wait.
const PAUSE: Duration = Duration::from_micros(100);

/// The longest that an upload or a measurement may stand still.
const STALLED: Duration = Duration::from_secs(60);

/// Who owns a device, for messages.
#[derive(Debug, Clone)]
pub(super) struct Owner {
    pub stage: usize,
    pub ranks: Vec<usize>,
    pub device: String,
}

impl Owner {
    pub(super) fn error(&self, problem: impl Into<String>) -> Error {
        Error::Device { stage: self.stage, ranks: self.ranks.clone(), device: self.device.clone(), problem: problem.into() }
    }

    fn lost(&self, reason: impl Into<String>) -> Error {
        Error::DeviceLost { stage: self.stage, ranks: self.ranks.clone(), device: self.device.clone(), reason: reason.into() }
    }

    fn out_of_memory(&self, what: impl Into<String>, wanted: u64) -> Error {
        Error::OutOfMemory { stage: self.stage, ranks: self.ranks.clone(), device: self.device.clone(), what: what.into(), wanted }
    }
}

/// The first of something that a callback reported.
type Report = Arc<Mutex<Option<String>>>;

fn record(report: &Report, what: String) {
    report.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(what);
}

fn recorded(report: &Report) -> Option<String> {
    report.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// An opened wgpu device with its queue, as one of its owners has it: what goes wrong is told to all of them.
#[derive(Clone)]
pub(super) struct Gpu {
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub owner: Owner,
    /// Whether buffers that kernels write may be mapped: where device and host share their memory, what is read needs no copy.
    pub maps: bool,
    spins: bool,
    is_shared: Arc<AtomicBool>,
    lost: Report,
    failed: Report,
}

impl Gpu {
    /// Opens an adapter, on which no kernel sees more than `binding` bytes of a buffer.
    pub(super) fn open(adapter: &Adapter, binding: u64, owner: Owner) -> Result<Self> {
        let shares_memory = matches!(adapter.info.device_type, wgpu::DeviceType::Cpu | wgpu::DeviceType::IntegratedGpu);
        let mappable = if shares_memory { wgpu::Features::MAPPABLE_PRIMARY_BUFFERS } else { wgpu::Features::empty() };
        let descriptor = wgpu::DeviceDescriptor {
            label: Some(&owner.device),
            required_features: adapter.features & (wgpu::Features::SUBGROUP | wgpu::Features::TIMESTAMP_QUERY | mappable),
            required_limits: wgpu::Limits { max_storage_buffer_binding_size: binding, ..adapter.limits.clone() },
            // Buffers are few and large: blocks reserved ahead of need would be wasted.
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            ..Default::default()
        };
        let maps = descriptor.required_features.contains(wgpu::Features::MAPPABLE_PRIMARY_BUFFERS);
        let opened = pollster::block_on(adapter.handle.request_device(&descriptor));
        let (device, queue) = opened.map_err(|e| owner.error(format!("the device could not be opened: {e}")))?;

        let (lost, failed) = (Report::default(), Report::default());
        let report = Arc::clone(&lost);
        device.set_device_lost_callback(move |reason, message| {
            let message = if message.is_empty() { format!("{reason:?}") } else { message };
            record(&report, message);
        });
        let report = Arc::clone(&failed);
        device.on_uncaptured_error(Arc::new(move |e: wgpu::Error| record(&report, e.to_string())));
        Ok(Self { device, queue, owner, maps, spins: !adapter.is_software(), is_shared: Arc::default(), lost, failed })
    }

    /// The same device for another owner, who may be on another thread.
    pub(super) fn shared_with(&self, owner: Owner) -> Self {
        self.is_shared.store(true, Ordering::Relaxed);
        Self { owner, ..self.clone() }
    }

    /// An error if the device was lost, or refused something that no scope caught.
    pub(super) fn check(&self) -> Result<()> {
        if let Some(reason) = recorded(&self.lost) {
            return Err(self.owner.lost(reason));
        }
        match recorded(&self.failed) {
            Some(problem) => Err(self.owner.error(problem)),
            None => Ok(()),
        }
    }

    /// Runs something that makes or fills objects on the device, and turns its errors into ours.
    ///
    /// `what` takes `bytes`, for the message of a device that is out of memory.
    pub(super) fn scoped<T>(&self, what: &str, bytes: u64, make: impl FnOnce() -> T) -> Result<T> {
        use wgpu::ErrorFilter::{Internal, OutOfMemory, Validation};
        let scopes = [OutOfMemory, Validation, Internal].map(|filter| self.device.push_error_scope(filter));
        let made = make();
        for scope in scopes.into_iter().rev() {
            match pollster::block_on(scope.pop()) {
                None => {}
                Some(wgpu::Error::OutOfMemory { .. }) => return Err(self.owner.out_of_memory(what, bytes)),
                Some(e) => return Err(self.owner.error(format!("{what}: {e}"))),
            }
        }
        self.check().map(|()| made)
    }

    pub(super) fn buffer(&self, what: &str, size: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer> {
        self.scoped(what, size, || {
            self.device.create_buffer(&wgpu::BufferDescriptor { label: Some(what), size, usage, mapped_at_creation: false })
        })
    }

    pub(super) fn lost(&self, reason: impl Into<String>) -> Error {
        // What the driver said comes before what followed from it.
        self.owner.lost(recorded(&self.lost).unwrap_or_else(|| reason.into()))
    }

    /// One look at the device, or one wait for a submission that lasts at most `timeout`. Whether it is done, callbacks tell.
    fn poll_once(&self, poll: wgpu::PollType) -> Result<()> {
        // wgpu panics where the driver reports the loss to a wait.
        let polled = catch_unwind(AssertUnwindSafe(|| self.device.poll(poll)));
        self.check()?;
        match polled {
            Ok(Ok(_) | Err(wgpu::PollError::Timeout)) => Ok(()),
            Ok(Err(e @ wgpu::PollError::WrongSubmissionIndex(..))) => Err(self.lost(e.to_string())),
            Err(_) => Err(self.lost("the driver gave up while it was waited for")),
        }
    }

    /// Polls until `done` or until `bound` is over. Answers `done`.
    pub(super) fn wait(&self, index: &wgpu::SubmissionIndex, bound: Duration, done: impl Fn() -> bool) -> Result<bool> {
        self.poll_once(wgpu::PollType::Poll)?;
        let start = Instant::now();
        while self.spins && !done() && start.elapsed() < SPIN.min(bound) {
            std::hint::spin_loop();
            self.poll_once(wgpu::PollType::Poll)?;
        }
        while !done() {
            let Some(left) = bound.checked_sub(start.elapsed()).filter(|left| !left.is_zero()) else { return Ok(false) };
            if self.is_shared.load(Ordering::Relaxed) {
                // A wait that times out panics within wgpu if another thread's wait just saw the end.
                std::thread::sleep(left.min(PAUSE));
                self.poll_once(wgpu::PollType::Poll)?;
                continue;
            }
            let timeout = Some(left.min(SLICE));
            self.poll_once(wgpu::PollType::Wait { submission_index: Some(index.clone()), timeout })?;
        }
        Ok(true)
    }

    /// Submits what was written so far and waits for it, so that wgpu lets go of its staging memory.
    pub(super) fn flush(&self) -> Result<()> {
        let index = self.queue.submit([]);
        self.finish(&index)
    }

    /// Waits for what was submitted, which nothing else waits for.
    pub(super) fn finish(&self, index: &wgpu::SubmissionIndex) -> Result<()> {
        let done = Arc::new(AtomicBool::new(false));
        let signal = Arc::clone(&done);
        self.queue.on_submitted_work_done(move || signal.store(true, Ordering::Release));
        match self.wait(index, STALLED, || done.load(Ordering::Acquire))? {
            true => Ok(()),
            false => Err(self.lost(format!("an upload or a measurement did not end within {} s", STALLED.as_secs()))),
        }
    }
}
