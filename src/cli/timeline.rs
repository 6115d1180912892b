//! `torchless timeline`: a trace that `--trace` wrote, drawn as an SVG picture or as text.

use std::path::PathBuf;

use serde_json::{Value, json};
use torchless::{Busy, Timeline};

use super::output::{print, print_json};
use super::{Outcome, files, note};

/// Columns of the picture as text.
const COLUMNS: usize = 100;

#[derive(clap::Args)]
pub struct Args {
    /// A trace, as --trace writes it
    #[arg(value_name = "FILE")]
    trace: PathBuf,

    /// Draw into this SVG file; without it, as text
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,

    /// Begin so many milliseconds after the first span
    #[arg(long, value_name = "MS", allow_negative_numbers = true)]
    from: Option<f64>,

    /// End so many milliseconds after the first span
    #[arg(long, value_name = "MS", allow_negative_numbers = true)]
    to: Option<f64>,

    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Outcome {
    if let Some(out) = &args.out {
        files::check_writable(out)?;
        files::check_apart(out, &[&args.trace])?;
    }
    let mut timeline = Timeline::read(&args.trace)?;
    if args.from.is_some() || args.to.is_some() {
        timeline = timeline.between(args.from.unwrap_or(0.0), args.to.unwrap_or(f64::INFINITY))?;
    }
    if timeline.dropped() > 0 {
        note(format_args!("the recorder had no room for {} later spans, so that the picture ends too early", timeline.dropped()));
    }
    if let Some(out) = &args.out {
        let svg = timeline.svg();
        files::write(out, |file| file.write_all(svg.as_bytes()))?;
    }
    if args.json {
        let (from, to) = timeline.range_ms();
        let rows: Vec<Value> = timeline.busy().iter().map(document).collect();
        return print_json(&json!({"out": args.out, "from_ms": from, "to_ms": to, "dropped": timeline.dropped(), "rows": rows}));
    }
    match &args.out {
        Some(out) => print(&format!("{} ranks are drawn in {}\n", timeline.busy().len(), out.display())),
        None => print(&timeline.text(COLUMNS)),
    }
}

fn document(row: &Busy) -> Value {
    json!({
        "stage": row.stage,
        "rank": row.rank,
        "device": row.device,
        "spans": row.spans,
        "elapsed_ms": row.elapsed_ms,
        "computing_ms": row.computing_ms,
        "busy": row.share,
    })
}
