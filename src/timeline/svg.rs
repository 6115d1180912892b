//! The picture as an SVG document.

use super::{Row, Stay, Timeline};

/// Pixels: the plot's width, a row's box and its distance to the next, the space above the rows and below.
const PLOT: f64 = 1000.0;
const BOX: f64 = 26.0;
const PITCH: f64 = 34.0;
const ABOVE: f64 = 28.0;
const BELOW: f64 = 52.0;
/// Pixels of a character, about, and how many of a label are shown.
const CHAR: f64 = 7.0;
const LABEL: usize = 48;
/// Pixels right of the plot, for the shares.
const SHARES: f64 = 56.0;

/// A micro-batch's colour is this, by its number.
const PALETTE: [&str; 8] = ["#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#9c755f"];

const LEGEND: &str = "a box is a micro-batch: solid where it is computed, light where it is read, reduced, written or waits for other ranks; \
    a grey line is waiting for the next";

pub(super) fn draw(timeline: &Timeline) -> String {
    let labels: Vec<String> = timeline.rows.iter().map(Row::label).collect();
    let longest = labels.iter().map(|label| label.chars().count().min(LABEL)).max().unwrap_or(0);
    let elapsed = timeline.to - timeline.from;
    let plot = Plot {
        left: longest as f64 * CHAR + 16.0,
        from: timeline.from,
        elapsed,
        scale: PLOT / elapsed.max(super::LEAST),
        first: timeline.first(),
    };
    let (width, bottom) = (plot.left + PLOT + SHARES, ABOVE + PITCH * labels.len() as f64);
    let height = bottom + BELOW;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    if timeline.rows.is_empty() {
        return svg + "<text x=\"16\" y=\"20\">nothing was recorded</text>\n</svg>\n";
    }
    svg += &plot.axis(timeline.to, bottom);
    svg += &format!("<text x=\"{:.2}\" y=\"{:.2}\">busy</text>\n", plot.left + PLOT + 8.0, ABOVE - 10.0);
    for (index, (row, label)) in timeline.rows.iter().zip(&labels).enumerate() {
        svg += &plot.row(row, label, ABOVE + PITCH * index as f64);
    }
    svg + &format!("<text x=\"{:.2}\" y=\"{:.2}\" fill=\"#666\">{LEGEND}</text>\n</svg>\n", plot.left, height - 10.0)
}

/// Where times are across the picture.
struct Plot {
    left: f64,
    from: f64,
    elapsed: f64,
    /// Pixels of a millisecond.
    scale: f64,
    first: u64,
}

impl Plot {
    fn x(&self, time: f64) -> f64 {
        self.left + (time - self.from) * self.scale
    }

    /// Lines at round times, with their milliseconds below.
    fn axis(&self, to: f64, bottom: f64) -> String {
        let step = round_step((to - self.from) / 8.0);
        let decimals = (-step.log10().floor()).clamp(0.0, 9.0) as usize;
        let first = (self.from / step).ceil();
        let mut svg = String::new();
        for time in (0..=16).map(|i| (first + f64::from(i)) * step).filter(|time| (self.from..=to).contains(time)) {
            let x = self.x(time);
            svg += &format!("<path d=\"M{x:.2} {:.2}V{bottom:.2}\" stroke=\"#ddd\"/>", ABOVE - 4.0);
            svg += &format!(
                "<text x=\"{x:.2}\" y=\"{:.2}\" text-anchor=\"middle\" fill=\"#666\">{time:.decimals$} ms</text>\n",
                bottom + 14.0
            );
        }
        svg
    }

    /// A rank's label, boxes and share.
    fn row(&self, row: &Row, label: &str, y: f64) -> String {
        let text = y + BOX * 0.66;
        let shown: String = label.chars().take(LABEL).collect();
        let mut svg = format!("<text x=\"{:.2}\" y=\"{text:.2}\" text-anchor=\"end\">{}</text>\n", self.left - 8.0, escape(&shown));
        row.stays().for_each(|stay| svg += &self.stay(&stay, y));
        if !row.waits.is_empty() {
            let waits: String = row.waits.iter().map(|wait| self.part(wait.start, wait.end, y + BOX + 2.0, 2.0)).collect();
            svg += &format!("<path d=\"{waits}\" fill=\"#999\"><title>waiting for the next micro-batch</title></path>\n");
        }
        let share = row.busy(self.elapsed).share * 100.0;
        svg + &format!("<text x=\"{:.2}\" y=\"{text:.2}\">{share:.0}%</text>\n", self.left + PLOT + 8.0)
    }

    /// A micro-batch's box, its solid parts, and its number where there is room.
    fn stay(&self, stay: &Stay<'_>, y: f64) -> String {
        let (number, x, width) = (stay.number(self.first), self.x(stay.start), (stay.end - stay.start) * self.scale);
        let colour = PALETTE[((number - 1) % PALETTE.len() as u64) as usize];
        let (rows, took, start) = (stay.rows, stay.end - stay.start, stay.start);
        let computing = super::covered(stay.computing());
        let solid: String = stay.computing().map(|span| self.part(span.start, span.end, y, BOX)).collect();
        let mut svg = format!(
            "<g fill=\"{colour}\"><title>micro-batch {number}: {rows} rows, {took:.3} ms from {start:.3} ms, {computing:.3} ms of them computing</title>\
             <rect x=\"{x:.2}\" y=\"{y:.2}\" width=\"{width:.2}\" height=\"{BOX}\" fill-opacity=\".35\"/><path d=\"{solid}\"/>"
        );
        let text = number.to_string();
        if width > (text.len() + 1) as f64 * CHAR {
            let (middle, y) = (x + width / 2.0, y + BOX * 0.66);
            svg += &format!("<text x=\"{middle:.2}\" y=\"{y:.2}\" text-anchor=\"middle\" fill=\"#000\">{text}</text>");
        }
        svg + "</g>\n"
    }

    /// A rectangle, as a part of a path.
    fn part(&self, start: f64, end: f64, y: f64, height: f64) -> String {
        let (left, right) = (self.x(start), self.x(end));
        format!("M{left:.2} {y:.2}H{right:.2}v{height}H{left:.2}z")
    }
}

/// The smallest of 1, 2 or 5 times a power of ten that isn't below `step`, or 1 for nothing.
fn round_step(step: f64) -> f64 {
    if step <= 0.0 {
        return 1.0;
    }
    let power = 10f64.powf(step.log10().floor());
    [1.0, 2.0, 5.0].map(|digit| digit * power).into_iter().find(|round| *round >= step).unwrap_or(10.0 * power)
}

/// Text as an XML document may hold it. Control characters were taken out where the trace was read.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;").replace('\'', "&apos;")
}
