//! [`Timeline`]: a recorded trace as a picture of the pipeline, a row for each rank and a box for each micro-batch.

mod read;
mod svg;
mod text;

use std::path::Path;

use crate::config::read_at_most;
use crate::error::{Error, Result};
use crate::trace::Category;

/// Most bytes of a trace: what a recorder keeps at most needs fewer.
const LIMIT: u64 = 256 << 20;
/// Milliseconds that a picture spans at least, so that its scale is finite.
const LEAST: f64 = 1e-9;

/// What each rank of a grid did when: [`TensorParallelMistral::timeline`], or a trace that `write_trace` (or the command's `--trace`) wrote.
///
/// Time counts in milliseconds from when the first micro-batch began, to when the last ended.
///
/// ```
/// use torchless::Timeline;
///
/// let timeline = Timeline::from_json(r#"{"traceEvents": [
///     {"ph": "X", "cat": "compute", "ts": 1000, "dur": 3000, "args": {"stage": 0, "rank": 0, "micro_batch": 7, "rows": 64}},
///     {"ph": "X", "cat": "read", "ts": 4000, "dur": 1000, "args": {"stage": 0, "rank": 0, "micro_batch": 7, "rows": 64}}
/// ]}"#)?;
/// assert_eq!(timeline.busy()[0].share, 0.75);
/// assert!(timeline.svg().starts_with("<svg"));
/// println!("{}", timeline.text(100));
/// # Ok::<(), torchless::Error>(())
/// ```
///
/// [`TensorParallelMistral::timeline`]: crate::TensorParallelMistral::timeline
#[derive(Debug, Clone, PartialEq)]
pub struct Timeline {
    /// By stage and rank.
    rows: Vec<Row>,
    /// Spans that the recorder had no room for.
    dropped: u64,
    from: f64,
    to: f64,
}

/// A rank of a stage.
#[derive(Debug, Clone, PartialEq)]
struct Row {
    stage: usize,
    rank: usize,
    device: String,
    /// What it did for micro-batches, by beginning.
    work: Vec<Span>,
    /// When it waited for the next.
    waits: Vec<Span>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Span {
    category: Category,
    start: f64,
    end: f64,
    micro_batch: u64,
    rows: usize,
}

/// How busy a rank was.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Busy {
    /// Its stage.
    pub stage: usize,
    /// Its number within the stage.
    pub rank: usize,
    /// The device that it is on; empty where the trace doesn't say.
    pub device: String,
    /// Spans of computing, reading, reducing and writing.
    pub spans: usize,
    /// Milliseconds that the timeline lasts, over all ranks.
    pub elapsed_ms: f64,
    /// Milliseconds of computing among them.
    pub computing_ms: f64,
    /// The one by the other, from 0 to 1; 0 where there is nothing.
    pub share: f64,
}

impl Timeline {
    /// Reads a trace of at most 256 MiB.
    ///
    /// Spans are complete events (`ph` is `X`) whose `cat` is one of ours and whose `args` name a stage, a rank and a micro-batch; other
    /// events, and spans at impossible times, are passed over, so that a trace may hold more than ours.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Trace`] if it is larger, or isn't a JSON object with `traceEvents`.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let wrong = |problem| Error::Trace { name: path.display().to_string(), problem };
        let trace = read_at_most(path, LIMIT).map_err(|e| match e {
            Error::Config { problem, .. } => wrong(problem),
            other => other,
        })?;
        read::rows(&trace).map(Self::new).map_err(|e| wrong(e.to_string()))
    }

    /// [`Self::read`] from the text of a trace.
    ///
    /// # Errors
    /// [`Error::Trace`].
    pub fn from_json(trace: &str) -> Result<Self> {
        read::rows(trace.as_bytes()).map(Self::new).map_err(|e| Error::Trace { name: "the text".into(), problem: e.to_string() })
    }

    /// All of these rows, from when the first micro-batch began to when the last ended: what a stage waited before is nobody's time.
    fn new((mut rows, dropped): (Vec<Row>, u64)) -> Self {
        let work = || rows.iter().flat_map(|row| &row.work);
        let origin = work().map(|span| span.start).reduce(f64::min).unwrap_or(0.0);
        let end = work().map(|span| span.end).reduce(f64::max).unwrap_or(origin);
        for row in &mut rows {
            row.work.iter_mut().chain(&mut row.waits).for_each(|span| (span.start, span.end) = (span.start - origin, span.end - origin));
            row.waits = cut(&row.waits, (0.0, end - origin));
        }
        Self { rows, dropped, from: 0.0, to: end - origin }
    }

    /// The part between two times: spans outside are left out, spans across are cut.
    ///
    /// # Errors
    /// [`Error::Option`] unless `from_ms` is before `to_ms` and before the end.
    pub fn between(&self, from_ms: f64, to_ms: f64) -> Result<Self> {
        let refused = |option, value: f64, right| Err(Error::Option { option, value: value.to_string(), right });
        if from_ms.is_nan() || from_ms >= self.to {
            return refused("from", from_ms, "it must lie before the end of the trace");
        }
        if to_ms.is_nan() || to_ms <= from_ms.max(self.from) {
            return refused("to", to_ms, "it must lie after the beginning");
        }
        let (from, to) = (from_ms.max(self.from), to_ms.min(self.to));
        let cut = |spans: &[Span]| cut(spans, (from, to));
        let rows = self.rows.iter().map(|row| Row { work: cut(&row.work), waits: cut(&row.waits), ..row.clone() });
        Ok(Self { rows: rows.collect(), dropped: self.dropped, from, to })
    }

    /// Later spans that the recorder had no room for: the picture ends too early.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// The times, in milliseconds, that it begins and ends at.
    #[must_use]
    pub fn range_ms(&self) -> (f64, f64) {
        (self.from, self.to)
    }

    /// How busy each rank was, stage after stage.
    #[must_use]
    pub fn busy(&self) -> Vec<Busy> {
        self.rows.iter().map(|row| row.busy(self.to - self.from)).collect()
    }

    /// The picture, as an SVG document: time goes across, a row is a rank, a box a micro-batch, whose computing is solid. The number
    /// in a box counts from the first micro-batch shown; the share at the end of a row is [`Busy::share`].
    #[must_use]
    pub fn svg(&self) -> String {
        svg::draw(self)
    }

    /// The picture in about so many columns of text (40 to 1000), for a terminal.
    #[must_use]
    pub fn text(&self, columns: usize) -> String {
        text::draw(self, columns)
    }

    /// The smallest number of a micro-batch shown: the first, as pictures count.
    fn first(&self) -> u64 {
        self.rows.iter().flat_map(|row| &row.work).map(|span| span.micro_batch).min().unwrap_or(0)
    }
}

/// A micro-batch's time in a row: its spans that follow one another there, from the beginning of the first.
struct Stay<'a> {
    micro_batch: u64,
    rows: usize,
    start: f64,
    end: f64,
    spans: &'a [Span],
}

impl Stay<'_> {
    /// The number that a picture shows, from 1.
    fn number(&self, first: u64) -> u64 {
        (self.micro_batch - first).saturating_add(1)
    }

    fn computing(&self) -> impl Iterator<Item = &Span> {
        self.spans.iter().filter(|span| span.category == Category::Compute)
    }
}

impl Row {
    fn label(&self) -> String {
        let device = if self.device.is_empty() { String::new() } else { format!(" ({})", self.device) };
        format!("stage {} rank {}{device}", self.stage, self.rank)
    }

    /// What pictures draw as boxes. A gap between two spans of a micro-batch is time waited for other ranks, and part of its box.
    fn stays(&self) -> impl Iterator<Item = Stay<'_>> {
        self.work.chunk_by(|a, b| a.micro_batch == b.micro_batch).map(|spans| {
            let Span { start, micro_batch, rows, .. } = spans[0];
            Stay { micro_batch, rows, start, end: last_end(spans), spans }
        })
    }

    fn busy(&self, elapsed_ms: f64) -> Busy {
        let computing_ms = covered(self.work.iter().filter(|span| span.category == Category::Compute));
        let share = if elapsed_ms > 0.0 { (computing_ms / elapsed_ms).min(1.0) } else { 0.0 };
        Busy { stage: self.stage, rank: self.rank, device: self.device.clone(), spans: self.work.len(), elapsed_ms, computing_ms, share }
    }
}

/// What of the spans lies between two times.
fn cut(spans: &[Span], (from, to): (f64, f64)) -> Vec<Span> {
    let inside = spans.iter().filter(|span| span.end > from && span.start < to);
    inside.map(|span| Span { start: span.start.max(from), end: span.end.min(to), ..*span }).collect()
}

fn last_end(spans: &[Span]) -> f64 {
    spans.iter().map(|span| span.end).fold(f64::NEG_INFINITY, f64::max)
}

/// Milliseconds within any of the spans, which come by beginning.
fn covered<'a>(spans: impl Iterator<Item = &'a Span>) -> f64 {
    let (sum, _) =
        spans.fold((0.0, f64::NEG_INFINITY), |(sum, until), span| (sum + (span.end - span.start.max(until)).max(0.0), span.end.max(until)));
    sum
}

#[cfg(test)]
mod tests;
