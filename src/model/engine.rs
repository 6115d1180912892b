//! Walks the plan over the grid: launch all, read, sum in order, write.

use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::backend::{Batch, Flow, Place, PlaceCounts};
use crate::collective::Collective;
use crate::error::{Error, Result};
use crate::plan::{Exchange, Plan, SegmentId};
use crate::trace::{Category, Trace};

/// A place that gives no answer for so long is taken for lost.
const PATIENCE: Duration = Duration::from_secs(600);

/// One stage of the grid, as far as this process hosts it.
pub(crate) struct Stage {
    pub index: usize,
    pub plan: Plan,
    pub places: Vec<Box<dyn Place>>,
    /// Width of every rank's part of the gathered logits.
    pub gathered: Vec<usize>,
}

/// All stages, and what joins this process to others.
pub(crate) struct Engine {
    pub stages: Vec<Stage>,
    pub collective: Arc<dyn Collective>,
    pub trace: Arc<Trace>,
    /// All-reduces and gathers done.
    pub collectives: u64,
}

impl Engine {
    /// The logits of the wanted rows, `[wanted, vocab]`, from the embedded rows, `[rows, hidden]`.
    pub(crate) fn run(&mut self, batch: &Batch, embedded: Vec<f32>) -> Result<Vec<f32>> {
        let mut flow = Flow::Host(embedded);
        for stage in &mut self.stages {
            for segment in 0..stage.plan.segments.len() {
                let start = Instant::now();
                stage.run(SegmentId(segment), batch, &flow, &self.trace)?;
                let exchange = stage.plan.segments[segment].exchange;
                flow = match exchange {
                    Exchange::AllReduce => Flow::Host(stage.all_reduce(batch, &*self.collective, &self.trace)?),
                    Exchange::AllGather => Flow::Host(stage.all_gather(batch, &*self.collective, &self.trace)?),
                    Exchange::Pass => stage.pass(batch, &self.trace)?,
                };
                tracing::debug!(
                    stage = stage.index,
                    segment,
                    ?exchange,
                    rows = batch.rows.len(),
                    micros = start.elapsed().as_micros() as u64,
                    "step"
                );
                if exchange != Exchange::Pass {
                    self.collectives += 1;
                }
            }
        }
        let Flow::Host(logits) = flow;
        Ok(logits)
    }

    pub(crate) fn counts(&self) -> Vec<PlaceCounts> {
        self.stages.iter().flat_map(|s| s.places.iter().map(|p| p.counts())).collect()
    }
}

impl Stage {
    /// Launches a segment on every place, those that return at once first, and waits for all.
    fn run(&mut self, segment: SegmentId, batch: &Batch, input: &Flow, trace: &Trace) -> Result<()> {
        let index = self.index;
        let mut failed = None;
        let mut in_flight = Vec::new();
        let mut places: Vec<_> = self.places.iter_mut().collect();
        places.sort_by_key(|p| !p.is_asynchronous());
        for place in places {
            let start = Instant::now();
            match place.launch(segment, batch, input) {
                Ok(()) => {
                    let category = if place.is_asynchronous() { Category::Write } else { Category::Compute };
                    trace.span(index, place.ranks(), category, start, batch.number, batch.rows.len());
                    in_flight.push((place, Instant::now()));
                }
                Err(e) => failed = failed.or(Some(e)),
            }
        }
        // Where one failed the others are still waited for, so that the next launch finds them idle.
        for (place, start) in in_flight {
            match wait(place.as_mut(), index) {
                Ok(()) if place.is_asynchronous() => {
                    trace.span(index, place.ranks(), Category::Compute, start, batch.number, batch.rows.len());
                }
                Ok(()) => {}
                Err(e) => failed = failed.or(Some(e)),
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// The sum of what the places read, place after place, and then rank after rank of the group.
    fn all_reduce(&mut self, batch: &Batch, collective: &dyn Collective, trace: &Trace) -> Result<Vec<f32>> {
        let parts = self.read(batch, trace)?;
        let start = Instant::now();
        let mut sum = parts[0].to_vec();
        parts[1..].iter().for_each(|part| crate::kernels::add(&mut sum, part));
        let n = sum.len();
        let mut all = vec![0.0; n * collective.size()];
        collective.all_gather(&sum, &vec![n; collective.size()], &mut all)?;
        sum.copy_from_slice(&all[..n]);
        (1..collective.size()).for_each(|rank| crate::kernels::add(&mut sum, &all[rank * n..(rank + 1) * n]));
        trace.span(self.index, &self.ranks(), Category::Reduce, start, batch.number, batch.rows.len());
        Ok(sum)
    }

    /// `[rows, sum of widths]`: of each row the ranks' parts, in rank order.
    fn all_gather(&mut self, batch: &Batch, collective: &dyn Collective, trace: &Trace) -> Result<Vec<f32>> {
        let (index, rows, widths) = (self.index, batch.wanted.len(), self.gathered.clone());
        let ranks: Vec<Vec<usize>> = self.places.iter().map(|p| p.ranks().to_vec()).collect();
        let read = self.read(batch, trace)?;
        let start = Instant::now();
        let mut local = vec![Vec::new(); widths.len()];
        for (ranks, mut parts) in ranks.into_iter().zip(read) {
            for rank in ranks {
                let part = parts
                    .split_off(..rows * widths[rank])
                    .ok_or_else(|| Error::DriverGone(format!("a place read too little for rank {rank} of stage {index}")))?;
                local[rank] = part.to_vec();
            }
        }
        let local = local.concat();
        // Alone, this process hosts all ranks; in a group, each member one.
        let counts: Vec<usize> = if collective.size() == 1 { vec![local.len()] } else { widths.iter().map(|width| rows * width).collect() };
        let mut all = vec![0.0; counts.iter().sum()];
        collective.all_gather(&local, &counts, &mut all)?;
        let total: usize = widths.iter().sum();
        let mut gathered = vec![0.0; rows * total];
        let (mut from, mut column) = (0, 0);
        for width in widths {
            for row in 0..rows {
                gathered[row * total + column..][..width].copy_from_slice(&all[from + row * width..][..width]);
            }
            from += rows * width;
            column += width;
        }
        trace.span(index, &self.ranks(), Category::Reduce, start, batch.number, batch.rows.len());
        Ok(gathered)
    }

    /// The residual stream, which every place has.
    fn pass(&mut self, batch: &Batch, trace: &Trace) -> Result<Flow> {
        let start = Instant::now();
        let passed = self.places[0].pass()?;
        trace.span(self.index, self.places[0].ranks(), Category::Read, start, batch.number, batch.rows.len());
        Ok(passed)
    }

    /// What each place read, in order.
    fn read(&mut self, batch: &Batch, trace: &Trace) -> Result<Vec<&[f32]>> {
        self.places.iter_mut().map(|place| read(place.as_mut(), self.index, batch, trace)).collect()
    }

    /// The ranks that this process hosts.
    fn ranks(&self) -> Vec<usize> {
        self.places.iter().flat_map(|p| p.ranks().iter().copied()).collect()
    }
}

/// What a place read, and how long it took to get at it.
fn read<'a>(place: &'a mut dyn Place, stage: usize, batch: &Batch, trace: &Trace) -> Result<&'a [f32]> {
    let (ranks, start) = (place.ranks().to_vec(), Instant::now());
    let output = place.output()?;
    trace.span(stage, &ranks, Category::Read, start, batch.number, batch.rows.len());
    Ok(output)
}

fn wait(place: &mut dyn Place, stage: usize) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        if place.poll(Duration::from_millis(100))?.is_ready() {
            return Ok(());
        }
    }
    let reason = format!("no answer in {} seconds", PATIENCE.as_secs());
    Err(Error::DeviceLost { stage, ranks: place.ranks().to_vec(), device: place.device().into(), reason })
}

type Job = Box<dyn FnOnce(&mut Engine) + Send>;

/// The thread that drives an engine. Callers hand it jobs and wait; it owns every place, so no lock is held while it works.
pub(crate) struct Driver {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Driver {
    pub(crate) fn start(mut engine: Engine) -> Result<Self> {
        let (jobs, inbox) = mpsc::channel::<Job>();
        let work = move || inbox.into_iter().for_each(|job| job(&mut engine));
        let thread = std::thread::Builder::new().name("torchless-driver".into()).spawn(work);
        let thread = thread.map_err(|e| Error::DriverGone(format!("it cannot start: {e}")))?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Runs `job` on the driver thread and waits for its answer.
    pub(crate) fn call<T: Send + 'static>(&self, job: impl FnOnce(&mut Engine) -> T + Send + 'static) -> Result<T> {
        let gone = || Error::DriverGone("it panicked in an earlier step".into());
        let (reply, answer) = mpsc::sync_channel(1);
        let job: Job = Box::new(move |engine| {
            // A caller that has gone away needs no answer.
            let _ = reply.send(job(engine));
        });
        self.jobs.as_ref().ok_or_else(gone)?.send(job).map_err(|_| gone())?;
        answer.recv().map_err(|_| gone())
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // A panic was reported to the caller whose job it was.
            let _ = thread.join();
        }
    }
}
