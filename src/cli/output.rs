//! Standard output: text, tables and JSON.

use std::io::{self, Write};

use serde::Serialize;

use super::{Failure, Outcome};

/// Prints `text` as it is, at once.
pub fn print(text: &str) -> Outcome {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::NoReader,
        _ => Failure::because("cannot write to standard output", error),
    })
}

/// Prints one JSON document.
pub fn print_json(document: &impl Serialize) -> Outcome {
    let text = serde_json::to_string_pretty(document).map_err(|e| Failure::because("cannot make JSON of the answer", e))?;
    print(&(text + "\n"))
}

/// Rows with aligned columns; numbers to the right. The first row is the header.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let cell = |row: usize, column: usize| rows[row].get(column).map_or("", String::as_str);
    let width = |column| (0..rows.len()).map(|row| cell(row, column).chars().count()).max().unwrap_or(0);
    let is_number = |column| (1..rows.len()).all(|row| cell(row, column).starts_with(|c: char| c.is_ascii_digit()));
    let shape: Vec<(usize, bool)> = (0..columns).map(|column| (width(column), is_number(column))).collect();
    let mut text = String::new();
    for row in 0..rows.len() {
        let cells = shape.iter().enumerate().map(|(column, &(width, to_right))| match to_right {
            true => format!("{:>width$}", cell(row, column)),
            false => format!("{:<width$}", cell(row, column)),
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

/// Bytes in the unit that fits.
pub fn bytes(n: u64) -> String {
    let units = [(1u64 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|(size, _)| n >= *size) {
        Some((size, unit)) => format!("{:.1} {unit}", n as f64 / *size as f64),
        None => format!("{n} B"),
    }
}
