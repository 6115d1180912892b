//! [`Stage`]: walks the plan over the places of a stage: launch all, read, sum in order, write.

use std::io::IsTerminal;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::backend::{Batch, Flow, Lane, Place, PlaceCounts};
use crate::collective::Collective;
use crate::error::{Error, Result};
use crate::kernels::pool::Pool;
use crate::model::engine::{Load, Trip};
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
    /// Since when each place computes for each lane, `[lane][place]`; `None` once it has been waited for.
    pub in_flight: Vec<Vec<Option<Instant>>>,
    /// When each place was last seen to be done.
    pub done: Vec<Instant>,
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

    /// Computes a trip, from the rows that come in to those that go out.
    pub(crate) fn run(&mut self, trip: &mut Trip) {
        (0..=self.plan.segments.len()).for_each(|segment| self.step(segment, trip));
    }

    /// Takes every lane of a trip one segment on: waits for the one before, lets the places exchange it, and launches `segment`. Meanwhile
    /// they compute what the other lanes have launched. After an error nothing more is launched, and what was is waited for.
    pub(crate) fn step(&mut self, segment: usize, trip: &mut Trip) {
        for lane in 0..trip.loads.len() {
            if let Some(before) = segment.checked_sub(1) {
                self.land(lane, before, trip);
            }
            if segment < self.plan.segments.len() && trip.loads.iter().all(|load| load.flow.is_ok()) {
                self.launch(lane, segment, &mut trip.loads[lane]);
            }
        }
    }

    /// Launches a segment on every place, those that return at once first.
    fn launch(&mut self, lane: Lane, segment: usize, load: &mut Load) {
        let Ok(flow) = &load.flow else { return };
        let mut failed = None;
        let mut order: Vec<usize> = (0..self.places.len()).collect();
        order.sort_by_key(|&place| !self.places[place].is_asynchronous());
        for i in order {
            let (place, start) = (&mut self.places[i], Instant::now());
            match place.launch(lane, SegmentId(segment), &load.batch, flow) {
                Ok(()) => {
                    let category = if place.is_asynchronous() { Category::Write } else { Category::Compute };
                    span(&self.trace, self.index, place.ranks(), category, start, &load.batch);
                    self.in_flight[lane][i] = Some(Instant::now());
                }
                Err(e) => failed = failed.or(Some(e)),
            }
        }
        if let Some(e) = failed {
            // Where one failed the others are still waited for, so that the next launch finds them idle.
            let _ = self.wait_for_all(lane, &load.batch);
            load.flow = Err(e);
        }
    }

    /// Waits for what a lane launched, and lets the places exchange what they read.
    fn land(&mut self, lane: Lane, segment: usize, trip: &mut Trip) {
        let Some(started) = self.in_flight[lane].iter().flatten().min().copied() else { return };
        let failed = trip.loads.iter().any(|load| load.flow.is_err());
        let Load { batch, flow } = &mut trip.loads[lane];
        if failed {
            let _ = self.wait_for_all(lane, batch);
            return;
        }
        let exchange = self.plan.segments[segment].exchange;
        let exchanged = match exchange {
            Exchange::AllReduce => {
                // Nobody needs what came in any more: the sum takes its memory.
                let memory = match std::mem::replace(flow, Ok(Flow::Host(Vec::new()))) {
                    Ok(Flow::Host(rows)) => rows,
                    _ => Vec::new(),
                };
                self.all_reduce(lane, batch, memory).map(Flow::Host)
            }
            Exchange::AllGather => self.wait_for_all(lane, batch).and_then(|()| self.all_gather(lane, batch)).map(Flow::Host),
            Exchange::Pass => self.wait_for_all(lane, batch).and_then(|()| self.pass(lane, batch)),
        };
        if exchanged.is_err() {
            let _ = self.wait_for_all(lane, batch);
        }
        *flow = exchanged;
        let (stage, rows, micros) = (self.index, batch.rows.len(), started.elapsed().as_micros() as u64);
        reporting(trip.debug, || tracing::debug!(stage, segment, ?exchange, rows, micros, "step"));
    }

    /// Waits for every place that computes for a lane, whether or not one fails.
    fn wait_for_all(&mut self, lane: Lane, batch: &Batch) -> Result<()> {
        let waited = (0..self.places.len()).map(|place| self.wait(lane, place, batch));
        #[expect(clippy::manual_try_fold)] // it would leave places behind the first that fails to themselves
        waited.fold(Ok(()), |all, one| all.and(one))
    }

    fn wait(&mut self, lane: Lane, place: usize, batch: &Batch) -> Result<()> {
        let Some(start) = self.in_flight[lane][place].take() else { return Ok(()) };
        // It computes what was launched on it in that order.
        let start = start.max(self.done[place]);
        let done = wait(self.places[place].as_mut(), lane, self.index);
        self.done[place] = Instant::now();
        let place = &self.places[place];
        if done.is_ok() && place.is_asynchronous() {
            span(&self.trace, self.index, place.ranks(), Category::Compute, start, batch);
        }
        done
    }

    /// The sum of what the places read, place after place, each as soon as it is done, and then rank after rank of the group,
    /// rounded for its way back. It takes the place of what `sum` holds.
    fn all_reduce(&mut self, lane: Lane, batch: &Batch, mut sum: Vec<f32>) -> Result<Vec<f32>> {
        sum.clear();
        for place in 0..self.places.len() {
            self.wait(lane, place, batch)?;
            let mut at = 0;
            self.read(lane, place, batch, Category::Reduce, |piece| {
                if place == 0 {
                    sum.extend_from_slice(piece);
                } else {
                    crate::kernels::add(&mut sum[at..][..piece.len()], piece);
                    at += piece.len();
                }
            })?;
        }
        self.collectives += 1;
        let (n, size) = (sum.len(), self.collective.size());
        if size > 1 {
            let start = Instant::now();
            let mut all = vec![0.0; n * size];
            self.collective.all_gather(&sum, &vec![n; size], &mut all)?;
            sum.copy_from_slice(&all[..n]);
            (1..size).for_each(|rank| crate::kernels::add(&mut sum, &all[rank * n..(rank + 1) * n]));
            span(&self.trace, self.index, &self.ranks(), Category::Reduce, start, batch);
        }
        batch.wire.round(&mut sum);
        Ok(sum)
    }

    /// `[rows, sum of widths]`: of each row the ranks' parts, in rank order.
    fn all_gather(&mut self, lane: Lane, batch: &Batch) -> Result<Vec<f32>> {
        let (index, rows, widths) = (self.index, batch.wanted.len(), self.gathered.clone());
        let mut read = vec![Vec::new(); self.places.len()];
        for (place, read) in read.iter_mut().enumerate() {
            self.read(lane, place, batch, Category::Read, |piece| read.extend_from_slice(piece))?;
        }
        let start = Instant::now();
        let mut parts = vec![&[][..]; widths.len()];
        for (place, mut read) in self.places.iter().zip(read.iter().map(Vec::as_slice)) {
            for &rank in place.ranks() {
                parts[rank] = read
                    .split_off(..rows * widths[rank])
                    .ok_or_else(|| Error::DriverGone(format!("a place read too little for rank {rank} of stage {index}")))?;
            }
        }
        // Alone, this process hosts all ranks; in a group, each member one.
        let (mut all, group) = (Vec::new(), &self.collective);
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
        self.collectives += 1;
        span(&self.trace, self.index, &self.ranks(), Category::Reduce, start, batch);
        Ok(gathered)
    }

    /// The residual stream, which every place has.
    fn pass(&mut self, lane: Lane, batch: &Batch) -> Result<Flow> {
        let start = Instant::now();
        let passed = self.places[0].pass(lane)?;
        span(&self.trace, self.index, self.places[0].ranks(), Category::Read, start, batch);
        Ok(passed)
    }

    /// Hands what a place read to `take`, whose own time goes to `category`.
    fn read(&mut self, lane: Lane, place: usize, batch: &Batch, category: Category, mut take: impl FnMut(&[f32])) -> Result<()> {
        let (start, mut taking) = (Instant::now(), Duration::ZERO);
        let place = &mut self.places[place];
        place.output(lane, &mut |piece| {
            let start = Instant::now();
            take(piece);
            taking += start.elapsed();
        })?;
        let end = Instant::now();
        let taken = end.checked_sub(taking).unwrap_or(start).max(start);
        let span = |category, from, to| self.trace.span(self.index, place.ranks(), category, from..to, batch.number, batch.rows.len());
        span(Category::Read, start, taken);
        span(category, taken, end);
        Ok(())
    }

    /// The stage has waited for this batch since `idle`, if it had any before.
    pub(crate) fn waited(&self, idle: Option<Instant>, trip: &Trip) {
        if let (Some(start), Some(load)) = (idle, trip.loads.first()) {
            span(&self.trace, self.index, &self.ranks(), Category::Schedule, start, &load.batch);
        }
    }

    /// The ranks that this process hosts.
    fn ranks(&self) -> Vec<usize> {
        self.places.iter().flat_map(|p| p.ranks().iter().copied()).collect()
    }
}

fn span(trace: &Trace, stage: usize, ranks: &[usize], category: Category, start: Instant, batch: &Batch) {
    trace.span(stage, ranks, category, start..Instant::now(), batch.number, batch.rows.len());
}

pub(super) fn wait(place: &mut dyn Place, lane: Lane, stage: usize) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        if place.poll(lane, Duration::from_millis(100))?.is_ready() {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{KvType, Numerics, Row, Seq, Wire};
    use crate::collective::Alone;
    use crate::partition::Dim;
    use crate::plan::{Recorder, RowParallel};

    /// A place that computes nothing, and fails at a launch or at the wait for it.
    struct Fake {
        fails: Option<(Lane, usize, bool)>,
        running: [Option<usize>; 2],
    }

    impl Place for Fake {
        fn ranks(&self) -> &[usize] {
            &[0]
        }
        fn device(&self) -> &str {
            "fake"
        }
        fn is_asynchronous(&self) -> bool {
            true
        }
        fn launch(&mut self, lane: Lane, segment: SegmentId, _: &Batch, _: &Flow) -> Result<()> {
            assert_eq!(self.running[lane], None, "one launch is in flight a lane");
            if self.fails == Some((lane, segment.0, true)) {
                return Err(Error::DriverGone("at a launch".into()));
            }
            self.running[lane] = Some(segment.0);
            Ok(())
        }
        fn poll(&mut self, lane: Lane, _: Duration) -> Result<std::task::Poll<()>> {
            match self.running[lane].take() {
                Some(segment) if self.fails == Some((lane, segment, false)) => Err(Error::DriverGone("at a wait".into())),
                Some(_) => Ok(std::task::Poll::Ready(())),
                None => panic!("nothing is in flight"),
            }
        }
        fn output(&mut self, lane: Lane, take: &mut dyn FnMut(&[f32])) -> Result<()> {
            take(&[1.0 + lane as f32, 10.0]);
            Ok(())
        }
        fn counts(&self) -> PlaceCounts {
            PlaceCounts::default()
        }
        fn weight_bytes(&self) -> Vec<u64> {
            vec![0]
        }
    }

    fn stage(fails: Option<(Lane, usize, bool)>) -> Stage {
        let mut r = Recorder::new(true);
        let x = r.input();
        for _ in 0..2 {
            let y = r.linear(x, "w", Dim::Hidden, RowParallel);
            r.all_reduce(y);
            r.add(x, y);
        }
        // The second place fails.
        let place = |fails| -> Box<dyn Place> { Box::new(Fake { fails, running: [None; 2] }) };
        Stage {
            index: 0,
            plan: r.pass(x),
            places: vec![place(None), place(fails)],
            pool: Arc::new(Pool::new(Some(1)).unwrap()),
            gathered: Vec::new(),
            collective: Arc::new(Alone),
            trace: Arc::new(Trace::new(Vec::new())),
            collectives: 0,
            in_flight: vec![vec![None; 2]; 2],
            done: vec![Instant::now(); 2],
        }
    }

    fn load(number: u64) -> Load {
        let batch = Batch {
            number,
            rows: vec![Row { seq: 0, pos: 0 }],
            seqs: vec![Seq::default()],
            wanted: vec![0],
            copies: Vec::new(),
            rope: Vec::new(),
            kv: KvType::F32,
            numerics: Numerics::Exact,
            wire: Wire::F32,
            timed: false,
        };
        Load { batch, flow: Ok(Flow::Host(vec![0.0; 2])) }
    }

    fn run(stage: &mut Stage) -> Trip {
        let mut trip = Trip::unanswered(load(1));
        trip.loads.push(load(2));
        stage.run(&mut trip);
        assert!(stage.in_flight.iter().flatten().all(Option::is_none), "everything was waited for");
        trip
    }

    #[test]
    fn lanes_are_summed_each_by_itself() {
        let mut stage = stage(None);
        let trip = run(&mut stage);
        let rows: Vec<_> = trip.loads.iter().map(|load| load.flow.as_ref().unwrap().host().unwrap().to_vec()).collect();
        assert_eq!((rows, stage.collectives), (vec![vec![1.0, 10.0], vec![2.0, 10.0]], 4));
    }

    #[test]
    fn where_one_lane_fails_the_other_is_waited_for_and_the_stage_goes_on() {
        for (lane, segment, at_launch) in (0..2).flat_map(|lane| (0..3).flat_map(move |segment| [true, false].map(|l| (lane, segment, l))))
        {
            let mut stage = stage(Some((lane, segment, at_launch)));
            let trip = run(&mut stage);
            let failed: Vec<bool> = trip.loads.iter().map(|load| load.flow.is_err()).collect();
            assert!(failed[lane] && !failed[1 - lane], "{lane} {segment} {at_launch}");
            stage.places[1] = Box::new(Fake { fails: None, running: [None; 2] });
            assert!(run(&mut stage).loads.iter().all(|load| load.flow.is_ok()), "{lane} {segment} {at_launch}");
        }
    }
}
