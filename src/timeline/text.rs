//! The picture for a terminal: a line a rank, a character for each stretch of time.

use super::{Row, Timeline};

/// What stands for micro-batches 1, 2, ..; then from the beginning again.
const SYMBOLS: &[u8] = b"123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";

pub(super) fn draw(timeline: &Timeline, columns: usize) -> String {
    if timeline.rows.is_empty() {
        return "nothing was recorded\n".into();
    }
    let columns = columns.clamp(40, 1000);
    let labels: Vec<String> = timeline.rows.iter().map(|row| row.label().chars().take(columns / 3).collect()).collect();
    let gutter = labels.iter().map(|label| label.chars().count()).max().unwrap_or(0);
    let width = columns - gutter - " |".len() - "| 100%".len();

    let (from, to) = (format!("{:.3}", timeline.from), format!("{:.3} ms", timeline.to));
    let mut text = format!("{:gutter$}  {from}{to:>rest$}  busy\n", "", rest = width.saturating_sub(from.len()));
    for (row, label) in timeline.rows.iter().zip(labels) {
        let share = format!("{:.0}%", row.busy(timeline.to - timeline.from).share * 100.0);
        text += &format!("{label:gutter$} |{}| {share:>4}\n", cells(row, timeline, width));
    }
    let cell = cell(timeline, width);
    text + &format!("a character is {cell:.3} ms; 1 to 9, a to z, A to Z: computes that micro-batch, -: reads, reduces, writes, .: waits\n")
}

/// Milliseconds of a character.
fn cell(timeline: &Timeline, width: usize) -> f64 {
    (timeline.to - timeline.from).max(super::LEAST) / width as f64
}

/// One character for each of `width` stretches: the micro-batch that computes longest in it, otherwise what else there is.
fn cells(row: &Row, timeline: &Timeline, width: usize) -> String {
    let (first, from, cell) = (timeline.first(), timeline.from, cell(timeline, width));
    let touched = |start: f64, end: f64| {
        let left = (((start - from) / cell) as usize).min(width - 1);
        left..(((end - from) / cell).ceil() as usize).clamp(left + 1, width)
    };
    let mut line = vec![' '; width];
    for wait in &row.waits {
        line[touched(wait.start, wait.end)].fill('.');
    }
    for stay in row.stays() {
        line[touched(stay.start, stay.end)].fill('-');
    }
    let mut longest = vec![-1.0; width];
    for stay in row.stays() {
        let symbol = SYMBOLS[((stay.number(first) - 1) % SYMBOLS.len() as u64) as usize] as char;
        for span in stay.computing() {
            for i in touched(span.start, span.end) {
                let (start, end) = (from + i as f64 * cell, from + (i + 1) as f64 * cell);
                let within = span.end.min(end) - span.start.max(start);
                if within > longest[i] {
                    (longest[i], line[i]) = (within, symbol);
                }
            }
        }
    }
    line.into_iter().collect()
}
