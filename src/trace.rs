//! What a model did when, for Perfetto and `chrome://tracing`.

use std::io::Write;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde_json::{Value, json};

use crate::error::{Error, Result};

/// Spans kept at most: about 100 MB of JSON. Later ones are counted and dropped.
const MOST: usize = 1 << 20;

/// What a span of time was spent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Category {
    Compute,
    Read,
    Reduce,
    Write,
    /// The scheduler chose what runs next, or a stage waited for its next micro-batch.
    Schedule,
}

impl Category {
    const ALL: [Self; 5] = [Self::Compute, Self::Read, Self::Reduce, Self::Write, Self::Schedule];

    /// The category of that name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|category| category.name() == name)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Compute => "compute",
            Self::Read => "read",
            Self::Reduce => "reduce",
            Self::Write => "write",
            Self::Schedule => "schedule",
        }
    }
}

/// A row of the picture: a rank of a stage.
#[derive(Debug, Clone)]
pub(crate) struct TraceRow {
    pub stage: usize,
    pub rank: usize,
    pub device: String,
}

#[derive(Debug, Clone, Copy)]
struct Span {
    row: usize,
    category: Category,
    start: Instant,
    end: Instant,
    batch: u64,
    rows: usize,
}

/// Records spans once it is started.
#[derive(Debug)]
pub(crate) struct Trace {
    on: AtomicBool,
    origin: Instant,
    rows: Vec<TraceRow>,
    spans: Mutex<(Vec<Span>, usize)>,
}

impl Trace {
    pub(crate) fn new(rows: Vec<TraceRow>) -> Self {
        Self { on: AtomicBool::new(false), origin: Instant::now(), rows, spans: Mutex::default() }
    }

    pub(crate) fn start(&self) {
        self.on.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// One span for each of `ranks` of `stage`.
    pub(crate) fn span(&self, stage: usize, ranks: &[usize], category: Category, time: Range<Instant>, batch: u64, rows: usize) {
        if !self.is_on() {
            return;
        }
        let Range { start, end } = time;
        let mut spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        for row in 0..self.rows.len() {
            if self.rows[row].stage == stage && ranks.contains(&self.rows[row].rank) {
                if spans.0.len() < MOST {
                    spans.0.push(Span { row, category, start, end, batch, rows });
                } else {
                    spans.1 += 1;
                }
            }
        }
    }

    /// Seconds spent on micro-batches, by row: compute, read, reduce, write.
    pub(crate) fn seconds(&self) -> Vec<[f64; 4]> {
        let spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sums = vec![[0.0; 4]; self.rows.len()];
        for span in &spans.0 {
            if span.category != Category::Schedule {
                sums[span.row][span.category as usize] += (span.end - span.start).as_secs_f64();
            }
        }
        sums
    }

    /// One JSON document with `traceEvents`, a `tid` a (stage, rank).
    pub(crate) fn document(&self) -> Value {
        // Copied, so that nobody who records waits for the writing.
        let spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let micros = |t: Instant| t.saturating_duration_since(self.origin).as_secs_f64() * 1e6;
        let names = self.rows.iter().enumerate().map(|(tid, row)| {
            let name = format!("stage {} rank {} ({})", row.stage, row.rank, row.device);
            json!({"name": "thread_name", "ph": "M", "pid": 1, "tid": tid, "args": {"name": name}})
        });
        let events = spans.0.iter().map(|s| {
            let (row, category) = (&self.rows[s.row], s.category.name());
            let args = json!({"stage": row.stage, "rank": row.rank, "micro_batch": s.batch, "rows": s.rows});
            json!({"name": category, "cat": category, "ph": "X", "pid": 1, "tid": s.row, "ts": micros(s.start),
                "dur": (s.end - s.start).as_secs_f64() * 1e6, "args": args})
        });
        json!({"traceEvents": names.chain(events).collect::<Vec<_>>(), "displayTimeUnit": "ms", "dropped": spans.1})
    }

    /// Writes [`Self::document`].
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let file = std::fs::File::create(path).map_err(Error::io("create", path))?;
        let mut file = std::io::BufWriter::new(file);
        let written = serde_json::to_writer(&mut file, &self.document()).map_err(std::io::Error::from).and_then(|()| file.flush());
        written.map_err(|e| {
            // Half a document is of no use, unless it went to a pipe; the first error is the one to tell.
            if path.is_file() {
                let _ = std::fs::remove_file(path);
            }
            Error::io("write", path)(e)
        })
    }
}
