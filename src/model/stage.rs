//! [`Stage`]: walks the plan over the places of a stage: launch all, read, sum in order, write.

use std::io::IsTerminal;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::backend::{Batch, Flow, Place, PlaceCounts};
use crate::collective::Collective;
use crate::error::{Error, Result};
use crate::kernels::pool::Pool;
use crate::model::engine::Trip;
use crate::plan::{Exchange, Plan, SegmentId};
use crate::trace::{Category, Trace};

/// A place that gives no answer for so long is taken for lost.
const PATIENCE: Duration = Duration::from_secs(600);

/// One stage of the grid, as far as this process hosts it.
pub(crate) struct Stage {
    pub index: usize,
    pub plan: Plan,
    pub places: Vec<Box<dyn Place>>,
    /// The threads of its CPU ranks.
    pub pool: Arc<Pool>,
    /// Width of every rank's part of the gathered logits.
    pub gathered: Vec<usize>,
    pub collective: Arc<dyn Collective>,
    pub trace: Arc<Trace>,
    /// All-reduces and gathers done.
    pub collectives: u64,
    /// When the segment at hand was launched.
    pub started: Instant,
    /// The places that run it, and since when.
    pub in_flight: Vec<(usize, Instant)>,
}

impl Stage {
    /// Whether a launch here returns before the work is done.
    pub(crate) fn is_asynchronous(&self) -> bool {
        self.places.iter().any(|place| place.is_asynchronous())
    }

    /// Whether whoever drives it may be one of its own threads: those neither wait for a GPU nor talk to other processes.
    pub(crate) fn may_be_hosted(&self) -> bool {
        !self.is_asynchronous() && self.collective.size() == 1
    }

    pub(crate) fn counts(&self) -> impl Iterator<Item = PlaceCounts> {
        self.places.iter().map(|place| place.counts())
    }

    /// Computes a batch, from the rows that come in to those that go out.
    pub(crate) fn run(&mut self, trip: &mut Trip) {
        for segment in 0..self.plan.segments.len() {
            self.launch(segment, trip);
            self.land(segment, trip);
        }
    }

    /// Launches a segment on every place, those that return at once first. Past the plan's end, and after an error, nothing happens.
    pub(crate) fn launch(&mut self, segment: usize, trip: &mut Trip) {
        let (Ok(flow), true) = (&trip.flow, segment < self.plan.segments.len()) else { return };
        self.started = Instant::now();
        let mut failed = None;
        let mut order: Vec<usize> = (0..self.places.len()).collect();
        order.sort_by_key(|&place| !self.places[place].is_asynchronous());
        for i in order {
            let (place, start) = (&mut self.places[i], Instant::now());
            match place.launch(SegmentId(segment), &trip.batch, flow) {
                Ok(()) => {
                    let category = if place.is_asynchronous() { Category::Write } else { Category::Compute };
                    span(&self.trace, self.index, place.ranks(), category, start, &trip.batch);
                    self.in_flight.push((i, Instant::now()));
                }
                Err(e) => failed = failed.or(Some(e)),
            }
        }
        if let Some(e) = failed {
            // Where one failed the others are still waited for, so that the next launch finds them idle.
            let _ = self.wait(&trip.batch);
            trip.flow = Err(e);
        }
    }

    /// Waits for what was launched, and lets the places exchange what they read.
    pub(crate) fn land(&mut self, segment: usize, trip: &mut Trip) {
        if trip.flow.is_err() || segment >= self.plan.segments.len() {
            return;
        }
        let exchange = self.plan.segments[segment].exchange;
        trip.flow = self.wait(&trip.batch).and_then(|()| match exchange {
            Exchange::AllReduce => self.all_reduce(&trip.batch).map(Flow::Host),
            Exchange::AllGather => self.all_gather(&trip.batch).map(Flow::Host),
            Exchange::Pass => self.pass(&trip.batch),
        });
        let (stage, rows, micros) = (self.index, trip.batch.rows.len(), self.started.elapsed().as_micros() as u64);
        reporting(trip.debug, || tracing::debug!(stage, segment, ?exchange, rows, micros, "step"));
    }

    fn wait(&mut self, batch: &Batch) -> Result<()> {
        let mut failed = None;
        for (place, start) in std::mem::take(&mut self.in_flight) {
            let place = self.places[place].as_mut();
            match wait(place, self.index) {
                Ok(()) if place.is_asynchronous() => span(&self.trace, self.index, place.ranks(), Category::Compute, start, batch),
                Ok(()) => {}
                Err(e) => failed = failed.or(Some(e)),
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// The sum of what the places read, place after place, and then rank after rank of the group.
    fn all_reduce(&mut self, batch: &Batch) -> Result<Vec<f32>> {
        let parts = self.read(batch)?;
        let start = Instant::now();
        let mut sum = parts[0].to_vec();
        parts[1..].iter().for_each(|part| crate::kernels::add(&mut sum, part));
        let (n, size) = (sum.len(), self.collective.size());
        let mut all = vec![0.0; n * size];
        self.collective.all_gather(&sum, &vec![n; size], &mut all)?;
        sum.copy_from_slice(&all[..n]);
        (1..size).for_each(|rank| crate::kernels::add(&mut sum, &all[rank * n..(rank + 1) * n]));
        self.exchanged(start, batch);
        Ok(sum)
    }

    /// `[rows, sum of widths]`: of each row the ranks' parts, in rank order.
    fn all_gather(&mut self, batch: &Batch) -> Result<Vec<f32>> {
        let (index, rows, widths) = (self.index, batch.wanted.len(), self.gathered.clone());
        let ranks: Vec<Vec<usize>> = self.places.iter().map(|p| p.ranks().to_vec()).collect();
        let (group, read) = (self.collective.clone(), self.read(batch)?);
        let start = Instant::now();
        let mut parts = vec![&[][..]; widths.len()];
        for (ranks, mut read) in ranks.into_iter().zip(read) {
            for rank in ranks {
                parts[rank] = read
                    .split_off(..rows * widths[rank])
                    .ok_or_else(|| Error::DriverGone(format!("a place read too little for rank {rank} of stage {index}")))?;
            }
        }
        // Alone, this process hosts all ranks; in a group, each member one.
        let mut all = Vec::new();
        if group.size() > 1 {
            let counts: Vec<usize> = widths.iter().map(|width| rows * width).collect();
            all.resize(counts.iter().sum(), 0.0);
            group.all_gather(&parts.concat(), &counts, &mut all)?;
            let mut all = &all[..];
            parts = counts.iter().filter_map(|&count| all.split_off(..count)).collect();
        }
        let mut gathered = Vec::with_capacity(rows * widths.iter().sum::<usize>());
        for row in 0..rows {
            parts.iter().zip(&widths).for_each(|(part, width)| gathered.extend_from_slice(&part[row * width..][..*width]));
        }
        self.exchanged(start, batch);
        Ok(gathered)
    }

    /// The residual stream, which every place has.
    fn pass(&mut self, batch: &Batch) -> Result<Flow> {
        let start = Instant::now();
        let passed = self.places[0].pass()?;
        span(&self.trace, self.index, self.places[0].ranks(), Category::Read, start, batch);
        Ok(passed)
    }

    /// What each place read, in order.
    fn read(&mut self, batch: &Batch) -> Result<Vec<&[f32]>> {
        let (index, trace) = (self.index, &*self.trace);
        self.places.iter_mut().map(|place| read(place.as_mut(), index, batch, trace)).collect()
    }

    /// The stage has waited for this batch since `idle`, if it had any before.
    pub(crate) fn waited(&self, idle: Option<Instant>, trip: &Trip) {
        if let Some(start) = idle {
            span(&self.trace, self.index, &self.ranks(), Category::Schedule, start, &trip.batch);
        }
    }

    /// The ranks talked since `start`.
    fn exchanged(&mut self, start: Instant, batch: &Batch) {
        self.collectives += 1;
        span(&self.trace, self.index, &self.ranks(), Category::Reduce, start, batch);
    }

    /// The ranks that this process hosts.
    fn ranks(&self) -> Vec<usize> {
        self.places.iter().flat_map(|p| p.ranks().iter().copied()).collect()
    }
}

fn span(trace: &Trace, stage: usize, ranks: &[usize], category: Category, start: Instant, batch: &Batch) {
    trace.span(stage, ranks, category, start, batch.number, batch.rows.len());
}

/// What a place read, and how long it took to get at it.
fn read<'a>(place: &'a mut dyn Place, stage: usize, batch: &Batch, trace: &Trace) -> Result<&'a [f32]> {
    let (ranks, start) = (place.ranks().to_vec(), Instant::now());
    let output = place.output()?;
    span(trace, stage, &ranks, Category::Read, start, batch);
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

/// Runs `f`; with `debug`, what it reports through `tracing` goes to stderr where the program installed no subscriber of its own.
fn reporting<T>(debug: bool, f: impl FnOnce() -> T) -> T {
    use tracing::{Dispatch, dispatcher, subscriber::NoSubscriber};
    static TO_STDERR: OnceLock<Dispatch> = OnceLock::new();
    if !debug || !dispatcher::get_default(Dispatch::is::<NoSubscriber>) {
        return f();
    }
    let to_stderr = TO_STDERR.get_or_init(|| {
        let is_terminal = std::io::stderr().is_terminal();
        tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).with_ansi(is_terminal).with_writer(std::io::stderr).finish().into()
    });
    dispatcher::with_default(to_stderr, f)
}
