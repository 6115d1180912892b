//! What is typed, or read where nobody types.

use std::io::{self, BufRead, IsTerminal, Read};

use rustyline::error::ReadlineError;
use rustyline::history::MemHistory;
use rustyline::{Behavior, Config, Editor};

use crate::cli::{Failure, Outcome, note};

const PROMPT: &str = "> ";
/// Longer than any context.
const MAX_LINE: u64 = 16 << 20;

/// A line that isn't empty.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    Say(String),
    Reset,
    System(String),
    Help,
    Unknown(String),
}

pub enum Lines {
    /// With editing and a history; its prompt goes to the terminal, wherever standard output goes.
    Terminal(Box<Editor<(), MemHistory>>),
    Plain,
}

impl Lines {
    pub fn new() -> Outcome<Self> {
        if !io::stdin().is_terminal() {
            return Ok(Self::Plain);
        }
        let config = Config::builder().behavior(Behavior::PreferTerm).build();
        let editor = Editor::with_history(config, MemHistory::new()).map_err(|e| Failure::because("cannot use the terminal", e))?;
        Ok(Self::Terminal(Box::new(editor)))
    }

    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal(_))
    }

    /// The next line; none at the end, where `/exit` or ctrl-D, or ctrl-C twice, say so.
    pub fn next(&mut self) -> Outcome<Option<Line>> {
        loop {
            let line = match self {
                Self::Terminal(editor) => typed(editor)?,
                Self::Plain => plain(&mut io::stdin().lock())?,
            };
            match line.as_deref().map(str::trim) {
                None | Some("/exit") => return Ok(None),
                Some("") => {}
                Some(line) => return Ok(Some(parse(line))),
            }
        }
    }
}

fn typed(editor: &mut Editor<(), MemHistory>) -> Outcome<Option<String>> {
    for last in [false, true] {
        match editor.readline(PROMPT) {
            Ok(line) => {
                editor.add_history_entry(line.as_str()).map_err(|e| Failure::because("cannot keep a line", e))?;
                return Ok(Some(line));
            }
            Err(ReadlineError::Eof) => return Ok(None),
            Err(ReadlineError::Interrupted) if !last => note("ctrl-C again ends, and so do ctrl-D and /exit"),
            Err(ReadlineError::Interrupted) => return Ok(None),
            Err(e) => return Err(Failure::because("cannot read from the terminal", e)),
        }
    }
    Ok(None)
}

fn plain(input: &mut impl BufRead) -> Outcome<Option<String>> {
    let failed = |why: &str| Failure::because("cannot read from standard input", why);
    let mut line = Vec::new();
    input.take(MAX_LINE + 1).read_until(b'\n', &mut line).map_err(|e| failed(&e.to_string()))?;
    if line.len() as u64 > MAX_LINE {
        return Err(failed(&format!("a line is longer than {MAX_LINE} bytes")));
    }
    if line.is_empty() {
        return Ok(None);
    }
    String::from_utf8(line).map(Some).map_err(|_| failed("a line is not UTF-8"))
}

fn parse(line: &str) -> Line {
    let Some(command) = line.strip_prefix('/') else { return Line::Say(line.into()) };
    if command.starts_with('/') {
        return Line::Say(command.into());
    }
    match command.split_once(char::is_whitespace).unwrap_or((command, "")) {
        ("reset", "") => Line::Reset,
        ("system", text) => Line::System(text.trim().into()),
        ("help", "") => Line::Help,
        _ => Line::Unknown(line.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_said_unless_it_is_a_command() {
        for (line, wanted) in [
            ("Hello!", Line::Say("Hello!".into())),
            ("//reset", Line::Say("/reset".into())),
            ("/reset", Line::Reset),
            ("/system", Line::System(String::new())),
            ("/system  Be brief.", Line::System("Be brief.".into())),
            ("/help", Line::Help),
            ("/reset now", Line::Unknown("/reset now".into())),
            ("/sing", Line::Unknown("/sing".into())),
        ] {
            assert_eq!(parse(line), wanted, "{line}");
        }
    }

    #[test]
    fn plain_lines_end_with_the_input_and_must_be_text() {
        let mut input = &b"a\r\n\nb"[..];
        let mut next = || plain(&mut input).ok().flatten();
        assert_eq!([next(), next(), next(), next()], [Some("a\r\n".into()), Some("\n".into()), Some("b".into()), None]);
        assert!(plain(&mut &b"\xFF\n"[..]).is_err());
    }
}
