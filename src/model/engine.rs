//! [`Driver`]: sends batches through the stages, on a thread a stage or on one thread for all.

use std::collections::VecDeque;
use std::sync::mpsc::{self, Receiver, SyncSender, TryRecvError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::backend::{Batch, Flow, PlaceCounts};
use crate::error::{Error, Result};
use crate::model::pipeline::PipelineState;
use crate::model::stage::Stage;

/// Batches that wait in front of a stage. One is enough for the stage to go on at once; more would only hold memory.
const QUEUE: usize = 1;
/// How long a stage looks for its next batch before it sleeps.
const LOOKING: Duration = Duration::from_micros(200);

/// A batch, and its rows as the last stage left them; an error travels on as rows do.
pub(crate) struct Load {
    pub batch: Batch,
    pub flow: Result<Flow>,
}

/// Batches on their way through the stages: in every stage one computes while another is exchanged.
pub(crate) struct Trip {
    /// By lane, in the order of computing.
    pub loads: Vec<Load>,
    /// Report every step to stderr.
    pub debug: bool,
    answer: SyncSender<Result<Vec<f32>>>,
}

impl Trip {
    /// One that nobody waits for.
    pub(crate) fn unanswered(load: Load) -> Self {
        Self { loads: vec![load], debug: false, answer: mpsc::sync_channel(1).0 }
    }

    /// Gives the logits to whoever waits.
    fn arrive(self) {
        // After an error, the others' rows are wherever they were left.
        let flows: Result<Vec<Flow>> = self.loads.into_iter().map(|load| load.flow).collect();
        let logits = flows.and_then(|flows| {
            let host = |flow| match flow {
                Flow::Host(logits) => Ok(logits),
                Flow::Device(_) => Err(Error::DriverGone("the last stage left its logits on a device".into())),
            };
            let mut flows = flows.into_iter().map(host);
            // Mostly there is but one, and nothing is copied.
            let first = flows.next().unwrap_or_else(|| Ok(Vec::new()))?;
            flows.try_fold(first, |mut all, more| {
                all.extend_from_slice(&more?);
                Ok(all)
            })
        });
        // A caller that has gone away needs no answer.
        let _ = self.answer.send(logits);
    }
}

/// What visits the stages in order.
enum Visitor {
    Trip(Box<Trip>),
    /// What the stages so far have counted.
    Count(Counts, SyncSender<Counts>),
}

/// What an engine has done.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counts {
    /// Of every place, stage after stage.
    pub places: Vec<PlaceCounts>,
    /// All-reduces and gathers through the host.
    pub collectives: u64,
}

impl Counts {
    fn add(&mut self, stage: &Stage) {
        self.places.extend(stage.counts());
        self.collectives += stage.collectives;
    }
}

/// The logits of a trip, `[wanted, vocab]` of one batch after the other, once it has arrived.
pub(crate) struct Pending(Option<Receiver<Result<Vec<f32>>>>);

impl Pending {
    pub(crate) fn wait(mut self) -> Result<Vec<f32>> {
        self.0.take().and_then(|answer| answer.recv().ok()).unwrap_or_else(|| Err(gone()))
    }
}

impl Drop for Pending {
    /// Waits: while a batch is on its way its pages must not go to others.
    fn drop(&mut self) {
        if let Some(answer) = self.0.take() {
            let _ = answer.recv();
        }
    }
}

fn gone() -> Error {
    Error::DriverGone("it panicked in an earlier step".into())
}

/// The threads that drive the stages. They own every place, so that no lock is held while one works.
pub(crate) struct Driver {
    inbox: Option<SyncSender<Visitor>>,
    threads: Vec<JoinHandle<()>>,
}

impl Driver {
    /// A thread a stage where `concurrent`, with a bounded queue in front of each; otherwise one that steps the schedule of at
    /// most `depth` batches over all stages. Batches arrive in the order they were sent, with the same bits. A driver of nothing but
    /// CPU ranks, alone, is a thread of their pool: every change of threads costs a token tens of microseconds.
    pub(crate) fn start(stages: Vec<Stage>, concurrent: bool, depth: usize) -> Result<Self> {
        let mut driver = Self { inbox: None, threads: Vec::new() };
        if !concurrent || stages.len() == 1 {
            let (inbox, visitors) = mpsc::sync_channel(QUEUE);
            let pool = stages[0].pool.clone();
            let hosted = stages.iter().all(Stage::may_be_hosted);
            driver.spawn("torchless-driver".into(), move || {
                if hosted { pool.host(|| step(stages, visitors, depth)) } else { step(stages, visitors, depth) }
            })?;
            driver.inbox = Some(inbox);
            return Ok(driver);
        }
        // From the last to the first, so that each knows the next one's queue.
        for stage in stages.into_iter().rev() {
            let (inbox, visitors) = mpsc::sync_channel(QUEUE);
            let next = driver.inbox.take();
            driver.spawn(format!("torchless-stage-{}", stage.index), move || work(stage, &visitors, next.as_ref()))?;
            driver.inbox = Some(inbox);
        }
        Ok(driver)
    }

    fn spawn(&mut self, name: String, run: impl FnOnce() + Send + 'static) -> Result<()> {
        let thread = std::thread::Builder::new().name(name).spawn(run);
        self.threads.push(thread.map_err(|e| Error::DriverGone(format!("it cannot start: {e}")))?);
        Ok(())
    }

    /// Sends batches, one for each of the first lanes, with their embedded rows, `[rows, hidden]`. Blocks while the first stage has enough to do.
    pub(crate) fn send(&self, batches: Vec<(Batch, Vec<f32>)>, debug: bool) -> Result<Pending> {
        let loads = batches.into_iter().map(|(batch, embedded)| Load { batch, flow: Ok(Flow::Host(embedded)) }).collect();
        let (answer, pending) = mpsc::sync_channel(1);
        self.visit(Visitor::Trip(Box::new(Trip { loads, debug, answer })))?;
        Ok(Pending(Some(pending)))
    }

    /// What has been done by the batches sent before.
    pub(crate) fn counts(&self) -> Result<Counts> {
        let (answer, counts) = mpsc::sync_channel(1);
        self.visit(Visitor::Count(Counts::default(), answer))?;
        counts.recv().map_err(|_| gone())
    }

    fn visit(&self, visitor: Visitor) -> Result<()> {
        self.inbox.as_ref().ok_or_else(gone)?.send(visitor).map_err(|_| gone())
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        drop(self.inbox.take());
        for thread in self.threads.drain(..) {
            // A panic was reported to the caller whose batch it was.
            let _ = thread.join();
        }
    }
}

/// One stage on a thread of its own.
fn work(mut stage: Stage, visitors: &Receiver<Visitor>, next: Option<&SyncSender<Visitor>>) {
    let mut idle = None;
    while let Some(mut visitor) = next_of(visitors, idle) {
        match &mut visitor {
            Visitor::Trip(trip) => {
                stage.waited(idle, trip);
                stage.run(trip);
            }
            Visitor::Count(counts, _) => counts.add(&stage),
        }
        idle = Some(Instant::now());
        match (visitor, next) {
            // If the next stage is gone, dropping the visitor tells whoever waits for it.
            (visitor, Some(next)) => drop(next.send(visitor)),
            (Visitor::Trip(trip), None) => trip.arrive(),
            (Visitor::Count(counts, answer), None) => drop(answer.send(counts)),
        }
    }
}

/// The next visitor. For a moment the thread looks for it and lets others run: the next batch mostly comes soon, and to be woken takes longer.
fn next_of(visitors: &Receiver<Visitor>, idle: Option<Instant>) -> Option<Visitor> {
    while idle.is_some_and(|since| since.elapsed() < LOOKING) {
        match visitors.try_recv() {
            Ok(visitor) => return Some(visitor),
            Err(TryRecvError::Disconnected) => return None,
            Err(TryRecvError::Empty) => std::thread::yield_now(),
        }
    }
    visitors.recv().ok()
}

/// All stages on one thread, which steps the schedule: in every step each stage computes the batch that it holds, all of them
/// launched before the first is waited for.
fn step(mut stages: Vec<Stage>, visitors: Receiver<Visitor>, depth: usize) {
    let mut schedule = PipelineState::new(stages.len(), depth);
    let mut trips: VecDeque<Trip> = VecDeque::new();
    let mut idle = None;
    loop {
        while schedule.can_accept() {
            // Only an empty pipeline has time to wait.
            match if trips.is_empty() { next_of(&visitors, idle) } else { visitors.try_recv().ok() } {
                Some(Visitor::Trip(trip)) => {
                    schedule.push();
                    trips.push_back(*trip);
                }
                Some(Visitor::Count(mut counts, answer)) => {
                    stages.iter().for_each(|stage| counts.add(stage));
                    let _ = answer.send(counts);
                }
                None if trips.is_empty() => return,
                None => break,
            }
        }
        // Oldest first, and so the last stage first, as is their order.
        let mut order: Vec<Option<&mut Stage>> = stages.iter_mut().map(Some).collect();
        let mut held: Vec<(&mut Stage, &mut Trip)> =
            schedule.stages().zip(&mut trips).filter_map(|(at, trip)| Some((order[at].take()?, trip))).collect();
        held.sort_by_key(|(stage, _)| !stage.is_asynchronous());
        let segments = held.iter().map(|(stage, _)| stage.plan.segments.len()).max().unwrap_or(0);
        for segment in 0..=segments {
            held.iter_mut().for_each(|(stage, trip)| stage.step(segment, trip));
        }
        if schedule.pop().is_some()
            && let Some(trip) = trips.pop_front()
        {
            trip.arrive();
            idle = Some(Instant::now());
        }
        schedule.advance();
    }
}
