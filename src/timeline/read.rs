//! The JSON of a trace, event by event: what isn't kept is never held.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, SeqAccess, Visitor};

use super::{Row, Span};
use crate::trace::Category;

/// Times beyond this many microseconds, 30 years, are no times. Within it no sum or difference is rounded by more than a picture shows.
const MOST_MICROS: f64 = 1e15;

/// The rows of a trace, their spans by beginning, and how many spans it says were left out.
pub(super) fn rows(trace: &[u8]) -> serde_json::Result<(Vec<Row>, u64)> {
    let document: Document = serde_json::from_slice(trace)?;
    let mut rows: Vec<Row> = document.events.0.into_values().collect();
    for row in &mut rows {
        row.work.sort_by(|a, b| a.start.total_cmp(&b.start));
    }
    Ok((rows, document.dropped))
}

#[derive(Deserialize)]
#[serde(expecting = "an object with traceEvents")]
struct Document {
    #[serde(rename = "traceEvents")]
    events: Events,
    #[serde(default)]
    dropped: u64,
}

#[derive(Deserialize)]
#[serde(expecting = "an event")]
struct Event {
    #[serde(default)]
    ph: String,
    #[serde(default)]
    cat: String,
    ts: Option<f64>,
    dur: Option<f64>,
    #[serde(default)]
    args: Args,
}

#[derive(Default, Deserialize)]
struct Args {
    stage: Option<usize>,
    rank: Option<usize>,
    micro_batch: Option<u64>,
    rows: Option<usize>,
    /// Of a row, in an event that names one.
    name: Option<String>,
}

impl Event {
    /// The stage, the rank and what they did.
    fn span(&self) -> Option<(usize, usize, Span)> {
        let (category, ts, dur) = (Category::named(&self.cat)?, self.ts?, self.dur?);
        if self.ph != "X" || ts.abs() > MOST_MICROS || !(0.0..=MOST_MICROS).contains(&dur) {
            return None;
        }
        let Args { stage, rank, micro_batch, rows, .. } = self.args;
        let (start, end) = (ts / 1e3, (ts + dur) / 1e3);
        // The scheduler need not know for which micro-batch it waits.
        let micro_batch = micro_batch.or((category == Category::Schedule).then_some(0))?;
        Some((stage?, rank?, Span { category, start, end, micro_batch, rows: rows.unwrap_or(0) }))
    }

    /// The stage, the rank and the device that a row's name tells.
    fn name(&self) -> Option<(usize, usize, &str)> {
        let name = self.args.name.as_deref().filter(|_| self.ph == "M")?;
        let (stage, rest) = name.strip_prefix("stage ")?.split_once(" rank ")?;
        let (rank, device) = rest.split_once(" (")?;
        Some((stage.parse().ok()?, rank.parse().ok()?, device.strip_suffix(')')?))
    }
}

/// By stage and rank.
struct Events(BTreeMap<(usize, usize), Row>);

impl Events {
    fn row(&mut self, stage: usize, rank: usize) -> &mut Row {
        let empty = || Row { stage, rank, device: String::new(), work: Vec::new(), waits: Vec::new() };
        self.0.entry((stage, rank)).or_insert_with(empty)
    }

    fn add(&mut self, event: &Event) {
        if let Some((stage, rank, span)) = event.span() {
            let row = self.row(stage, rank);
            if span.category == Category::Schedule { row.waits.push(span) } else { row.work.push(span) }
        } else if let Some((stage, rank, device)) = event.name() {
            // A control character would command a terminal, and none of these may be in an SVG.
            let harmful = |c: char| c.is_control() || matches!(c, '\u{FFFE}' | '\u{FFFF}');
            self.row(stage, rank).device = device.replace(harmful, "\u{FFFD}");
        }
    }
}

impl<'de> Deserialize<'de> for Events {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = Events;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of events")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Events, A::Error> {
                let mut events = Events(BTreeMap::new());
                while let Some(event) = list.next_element::<Event>()? {
                    events.add(&event);
                }
                Ok(events)
            }
        }
        deserializer.deserialize_seq(List)
    }
}
