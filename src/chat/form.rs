//! What a template's form must be, so that nothing which it does can grow without end.
//!
//! The engine's fuel bounds loops and what they write. It doesn't bound how deep an expression nests in its parser, nor how deep a list holds
//! lists, and both end in a stack overflow, which no error handling survives; nor how large such a list is when each holds another one
//! twice. So a template is looked through before the engine sees it: expressions have a bounded number of tokens, what would let values grow
//! around that is refused by name, and every `set` and macro passes its values through the filter [`KEEP`], which measures them.

use std::ops::Range;

use crate::error::{Error, Result};

/// The filter that values pass which are given a name.
pub(super) const KEEP: &str = "torchless_keep";

/// Most bytes of a template; the longest in use have about thirty thousand.
pub(super) const MAX_SOURCE: usize = 1 << 18;
/// Most tokens of one tag.
const MAX_TOKENS: usize = 1000;
/// Most `elif` of a template: each nests in the one before.
const MAX_ELIFS: usize = 500;

/// Statements that need what isn't there, or would need more care than any chat template is known to need.
const REFUSED: [&str; 8] = ["include", "import", "from", "extends", "block", "with", "autoescape", "trans"];

/// The template with its values measured, if its form can be bounded. Lines stay where they are.
pub(super) fn checked(source: &str) -> Result<String> {
    if source.len() > MAX_SOURCE {
        return Err(Error::ChatTemplate(format!("it has {} bytes; at most {MAX_SOURCE} are read", source.len())));
    }
    let mut form = Form { source, at: 0, tokens: Vec::new(), out: String::new(), copied: 0, elifs: 0 };
    while form.tag()? {}
    form.out += &source[form.copied..];
    Ok(form.out)
}

struct Form<'s> {
    source: &'s str,
    at: usize,
    /// Of the tag at hand.
    tokens: Vec<Token>,
    out: String,
    /// What of the source is in `out`.
    copied: usize,
    elifs: usize,
}

#[derive(Debug, Clone)]
struct Token {
    kind: Kind,
    span: Range<usize>,
    /// Brackets around it.
    depth: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Name,
    Text,
    Number,
    Sign,
}

impl<'s> Form<'s> {
    /// Looks through the next tag or comment; `false` if there is none.
    fn tag(&mut self) -> Result<bool> {
        let rest = &self.source.as_bytes()[self.at..];
        let Some(start) = rest.windows(2).position(|two| matches!(two, b"{{" | b"{%" | b"{#")) else { return Ok(false) };
        let kind = rest[start + 1];
        self.at += start + 2;
        if kind == b'#' {
            let Some(end) = self.source[self.at..].find("#}") else { return Err(self.wrong("a comment has no end")) };
            self.at += end + 2;
            return Ok(true);
        }
        if kind == b'%'
            && let Some(after) = plain_tag(&self.source[self.at..], "raw")
        {
            self.at += after;
            return self.skip_raw().map(|()| true);
        }
        // A sign in front belongs to the tag.
        if matches!(self.source.as_bytes().get(self.at), Some(b'-' | b'+')) {
            self.at += 1;
        }
        let end = self.read_tokens(if kind == b'%' { b'%' } else { b'}' })?;
        self.check_products()?;
        if kind == b'%' {
            self.statement(end)?;
        }
        Ok(true)
    }

    fn skip_raw(&mut self) -> Result<()> {
        while let Some(start) = self.source[self.at..].find("{%") {
            self.at += start + 2;
            if let Some(after) = plain_tag(&self.source[self.at..], "endraw") {
                self.at += after;
                return Ok(());
            }
        }
        Err(self.wrong("a raw block has no end"))
    }

    /// Reads the tokens of a tag that ends with `closing` and a brace, up to behind it; answers where its end begins.
    fn read_tokens(&mut self, closing: u8) -> Result<usize> {
        let bytes = self.source.as_bytes();
        self.tokens.clear();
        let mut depth = 0usize;
        loop {
            let start = self.at;
            let next = |n: usize| bytes.get(start + n).copied();
            let Some(byte) = next(0) else { return Err(self.wrong("a tag has no end")) };
            if depth == 0 {
                let sign = usize::from(matches!(byte, b'-' | b'+'));
                if next(sign) == Some(closing) && next(sign + 1) == Some(b'}') {
                    self.at += sign + 2;
                    return Ok(start);
                }
            }
            let run = |of: fn(u8) -> bool| bytes[start..].iter().take_while(|&&byte| of(byte)).count();
            let (kind, len) = match byte {
                b'\'' | b'"' => (Kind::Text, self.text_len(byte)?),
                b'a'..=b'z' | b'A'..=b'Z' | b'_' => (Kind::Name, run(|byte| byte.is_ascii_alphanumeric() || byte == b'_')),
                b'0'..=b'9' => (Kind::Number, run(|byte| byte.is_ascii_digit() || byte == b'_')),
                b'*' | b'/' | b'=' if next(1) == Some(byte) => (Kind::Sign, 2),
                b'!' | b'<' | b'>' if next(1) == Some(b'=') => (Kind::Sign, 2),
                // The whole of a character that is more than a byte.
                _ => (Kind::Sign, self.source[start..].chars().next().map_or(1, char::len_utf8)),
            };
            self.at += len;
            if self.source[start..].starts_with(char::is_whitespace) {
                continue;
            }
            match byte {
                b')' | b']' | b'}' if depth == 0 => return Err(self.wrong("a bracket closes that was never opened")),
                b')' | b']' | b'}' => depth -= 1,
                _ => {}
            }
            self.tokens.push(Token { kind, span: start..self.at, depth });
            if matches!(byte, b'(' | b'[' | b'{') {
                depth += 1;
            }
            if self.tokens.len() > MAX_TOKENS {
                return Err(self.wrong(&format!("a tag has more than {MAX_TOKENS} tokens")));
            }
        }
    }

    /// The length of the text that begins here with the quote `quote`.
    fn text_len(&self, quote: u8) -> Result<usize> {
        let mut escaped = false;
        for (i, &byte) in self.source.as_bytes()[self.at..].iter().enumerate().skip(1) {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                _ if byte == quote => return Ok(i + 1),
                _ => {}
            }
        }
        Err(self.wrong("a text in quotes has no end"))
    }

    /// A list times a number is as large as one likes and costs nothing, a text times a number costs its length.
    fn check_products(&self) -> Result<()> {
        let of_text = |i: usize| i > 0 && self.tokens[i - 1].kind == Kind::Text;
        match (0..self.tokens.len()).find(|&i| self.word(i) == "*" && !of_text(i)) {
            Some(_) => Err(self.wrong("only a text in quotes may be multiplied")),
            None => Ok(()),
        }
    }

    fn word(&self, i: usize) -> &'s str {
        self.tokens.get(i).map_or("", |token| &self.source[token.span.clone()])
    }

    /// Checks the statement whose tag ends at `end`, and has what it names measured.
    fn statement(&mut self, end: usize) -> Result<()> {
        match self.word(0) {
            word if REFUSED.contains(&word) => Err(self.wrong(&format!("{word:?} is not supported in chat templates"))),
            "call" if self.word(1) == "(" => Err(self.wrong("\"call\" with parameters is not supported in chat templates")),
            "for" if self.tokens.last().is_some_and(|last| &self.source[last.span.clone()] == "recursive") => {
                Err(self.wrong("a recursive \"for\" is not supported in chat templates"))
            }
            // So that every round looks at the clock.
            "for" => {
                self.insert(end, &format!(" %}}{{% set {KEEP} = 0|{KEEP} "));
                Ok(())
            }
            "elif" => {
                self.elifs += 1;
                if self.elifs > MAX_ELIFS { Err(self.wrong(&format!("there are more than {MAX_ELIFS} \"elif\""))) } else { Ok(()) }
            }
            "set" => {
                let value = (0..self.tokens.len()).find(|&i| self.word(i) == "=" && self.tokens[i].depth == 0);
                if let (Some(equals), Some(last)) = (value, self.tokens.last()) {
                    let (from, to) = (self.tokens[equals].span.end, last.span.end);
                    if from < to {
                        let is_held = (0..equals).any(|i| self.word(i) == ".");
                        self.insert(from, " (");
                        self.insert(to, &format!(")|{KEEP}({is_held})"));
                    }
                }
                Ok(())
            }
            "macro" => {
                let is_parameter = |i: &usize| {
                    let Token { kind, depth, .. } = self.tokens[*i];
                    kind == Kind::Name && depth == 1 && matches!(self.word(i - 1), "(" | ",")
                };
                let keep = |i| format!(" %}}{{% set {name} = {name}|{KEEP} ", name = self.word(i));
                let kept: String = (2..self.tokens.len()).filter(is_parameter).map(keep).collect();
                self.insert(end, &kept);
                Ok(())
            }
            // Marks what an assistant said, for training.
            "generation" | "endgeneration" if self.tokens.len() == 1 => {
                let span = self.tokens[0].span.clone();
                self.insert(span.start, if span.len() == "generation".len() { "if true" } else { "endif" });
                self.copied = span.end;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl Form<'_> {
    fn insert(&mut self, at: usize, text: &str) {
        self.out += &self.source[self.copied..at];
        self.out += text;
        self.copied = at;
    }

    fn wrong(&self, problem: &str) -> Error {
        let line = 1 + self.source.as_bytes()[..self.at].iter().filter(|&&byte| byte == b'\n').count();
        Error::ChatTemplate(format!("{problem} (line {line})"))
    }
}

/// The length of a tag that holds `name` alone, its `{%` left out.
fn plain_tag(source: &str, name: &str) -> Option<usize> {
    let rest = source.strip_prefix(['-', '+']).unwrap_or(source).trim_ascii_start();
    let rest = rest.strip_prefix(name)?.trim_ascii_start();
    let rest = rest.strip_prefix(['-', '+']).unwrap_or(rest).strip_prefix("%}")?;
    Some(source.len() - rest.len())
}
