//! [`Sandbox`]: the engine with everything that transformers gives a template, within bounds.

use std::borrow::Cow;
use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ObjectRepr, Tuple, Value, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error as Fault, ErrorKind, State};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::Serialize;

use super::ChatMessage;
use super::form::{self, KEEP};
use crate::error::{Error, Result};

/// Most bytes of a text.
const MAX_TEXT: usize = 16 << 20;
/// How long a template may take. Those in use take less than a millisecond for a long conversation.
const MAX_TIME: Duration = Duration::from_secs(5);
/// Deepest that a value with a name may hold others.
const MAX_DEPTH: usize = 32;
/// What a value with a name may take in bytes, beyond four times the messages.
const MAX_VALUE: usize = 256 << 10;
/// What an item of a list is counted as.
const ITEM_BYTES: usize = 32;
/// Most characters that `strip` and its like look for: their time is that times the text.
const MAX_STRIPPED: usize = 256;
/// Steps, beyond those for each message and its bytes.
const FUEL: u64 = 200_000;
const FUEL_A_MESSAGE: u64 = 2_000;
/// Bytes of the messages that a step is added for.
const BYTES_A_STEP: usize = 8;
/// Expressions nest at most [`form`]'s tokens, and values these tokens and [`MAX_DEPTH`]: without optimisation some KiB each.
const STACK: usize = 64 << 20;
/// What a template calls itself in error messages.
const NAME: &str = "chat template";

/// The engine's filters that multiply a value at every use, or write all of the engine's state. transformers has the first two, and no template uses them.
const LEFT_OUT: [&str; 6] = ["groupby", "batch", "slice", "zip", "chain", "pprint"];

#[derive(Clone)]
pub(super) struct Sandbox(Arc<Environment<'static>>);

impl fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sandbox").finish_non_exhaustive()
    }
}

impl Sandbox {
    pub(super) fn new(source: &str) -> Result<Self> {
        let source = form::checked(source)?;
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.map_err(told)?);
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        LEFT_OUT.iter().for_each(|name| env.remove_filter(name));
        env.remove_global("debug");
        env.add_filter("tojson", to_json);
        env.add_filter("trim", trim);
        env.add_function("raise_exception", |message: Cow<'_, str>| {
            Err::<Value, _>(Fault::new(ErrorKind::InvalidOperation, message.into_owned()))
        });
        env.add_function("strftime_now", time_now);
        with_stack(|| env.add_template_owned(NAME, source))?.map_err(told)?;
        Ok(Self(Arc::new(env)))
    }

    pub(super) fn render(&self, messages: &[ChatMessage], add_generation_prompt: bool, [bos, eos]: [&str; 2]) -> Result<String> {
        let bytes: usize = messages.iter().map(|m| m.role.len() + m.content.len()).sum();
        if bytes > MAX_TEXT {
            return Err(Error::ChatTemplate(format!("the messages have {bytes} bytes; at most {MAX_TEXT} make a text")));
        }
        let bounds = Bounds { end: Instant::now() + MAX_TIME, value: MAX_VALUE + 4 * (bytes + 4 * ITEM_BYTES * messages.len()) };
        let mut env = Environment::clone(&self.0);
        let steps = FUEL_A_MESSAGE.saturating_mul(messages.len() as u64).saturating_add((bytes / BYTES_A_STEP) as u64);
        env.set_fuel(Some(FUEL.saturating_add(steps)));
        env.add_filter(KEEP, move |state: &State<'_, '_>, value: Value, is_held: Option<bool>| {
            bounds.keep(state, value, is_held.unwrap_or(false))
        });
        let namespace = Value::from_function(minijinja::functions::namespace);
        env.add_function("namespace", move |state: &mut State<'_, '_>, values: Option<ValueOrKwargs>| {
            let values = values.map(|values| bounds.keep(state, values.into_value(), true)).transpose()?;
            namespace.call(state, values.as_slice())
        });
        env.set_unknown_method_callback(move |state, value, method, args| {
            bounds.look_at_clock()?;
            check_method(state, value, method, args)?;
            unknown_method_callback(state, value, method, args)
        });
        let of_message =
            |m: &ChatMessage| Value::from_pairs([("role", Value::from(m.role.as_str())), ("content", Value::from(m.content.as_str()))]);
        let context = Value::from_pairs([
            ("messages", messages.iter().map(of_message).collect::<Value>()),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            ("bos_token", Value::from(bos)),
            ("eos_token", Value::from(eos)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ]);
        let mut text = Text(Vec::new());
        with_stack(|| {
            let template = env.get_template(NAME)?;
            template.render_captured_to(context, &mut text).map(drop)
        })?
        .map_err(told)?;
        String::from_utf8(text.0).map_err(|e| Error::ChatTemplate(e.to_string()))
    }
}

/// What a rendering may take.
#[derive(Clone, Copy)]
struct Bounds {
    end: Instant,
    /// Bytes of a value.
    value: usize,
}

impl Bounds {
    fn look_at_clock(self) -> Result<(), Fault> {
        match Instant::now() < self.end {
            true => Ok(()),
            false => Err(too_much(format!("it takes longer than {} seconds", MAX_TIME.as_secs()))),
        }
    }

    /// The value, if it is small enough to be walked through however often. What would be computed at each use is computed now.
    /// `is_held`: by a namespace.
    fn keep(self, state: &State<'_, '_>, value: Value, is_held: bool) -> Result<Value, Fault> {
        self.look_at_clock()?;
        let mut left = self.value;
        let made = self.measure(&value, usize::from(is_held), &mut left)?;
        state.consume_fuel(((self.value - left) / 256) as u64)?;
        Ok(made.unwrap_or(value))
    }

    /// Takes what a value holds from what is `left`; a new value where it has to be another one.
    fn measure(self, value: &Value, depth: usize, left: &mut usize) -> Result<Option<Value>, Fault> {
        let size = ITEM_BYTES + value.as_str().map_or(0, str::len);
        let too_large = || too_much(format!("a value has more than {} bytes", self.value));
        *left = left.checked_sub(size).ok_or_else(too_large)?;
        let Some(object) = value.as_object() else { return Ok(None) };
        if depth > MAX_DEPTH {
            return Err(too_much(format!("values hold each other more than {MAX_DEPTH} deep")));
        }
        match object.repr() {
            ObjectRepr::Plain => Ok(None),
            // One that holds itself would have no end.
            _ if object.type_name().ends_with("::Namespace") && depth > 0 => Err(too_much("a namespace is held by another value".into())),
            ObjectRepr::Map => {
                let (mut pairs, mut is_new) = (Vec::new(), false);
                for pair in object.try_iter_pairs().into_iter().flatten() {
                    let made = [self.measure(&pair.0, depth + 1, left)?, self.measure(&pair.1, depth + 1, left)?];
                    is_new |= made.iter().any(Option::is_some);
                    let [key, value] = made;
                    pairs.push((key.unwrap_or(pair.0), value.unwrap_or(pair.1)));
                }
                Ok(is_new.then(|| Value::from_pairs(pairs)))
            }
            repr => {
                let (mut items, mut is_new) = (Vec::new(), repr == ObjectRepr::Iterable);
                for item in value.try_iter()?.checked() {
                    let item = item?;
                    let made = self.measure(&item, depth + 1, left)?;
                    is_new |= made.is_some();
                    items.push(made.unwrap_or(item));
                }
                let make = |items: Vec<Value>| if value.is_tuple() { Value::from(Tuple::from(items)) } else { Value::from(items) };
                Ok(is_new.then(|| make(items)))
            }
        }
    }
}

/// What the engine's methods do in more time than they are counted with.
fn check_method(state: &State<'_, '_>, value: &Value, method: &str, args: &[Value]) -> Result<(), Fault> {
    match method {
        "strip" | "lstrip" | "rstrip" => args.first().and_then(Value::as_str).map_or(Ok(()), check_stripped),
        "format" if value.as_str().is_some_and(has_large_number) => {
            Err(too_much("a format pads to a length of more than three digits".into()))
        }
        "count" if value.kind() == ValueKind::Seq => state.consume_fuel(value.len().unwrap_or(0) as u64),
        _ => Ok(()),
    }
}

fn has_large_number(format: &str) -> bool {
    format.split(|c: char| !c.is_ascii_digit()).any(|digits| digits.len() > 3)
}

fn check_stripped(chars: &str) -> Result<(), Fault> {
    match chars.len() <= MAX_STRIPPED {
        true => Ok(()),
        false => Err(too_much(format!("more than {MAX_STRIPPED} characters are to be stripped"))),
    }
}

fn trim(value: Cow<'_, str>, chars: Option<Cow<'_, str>>) -> Result<String, Fault> {
    let Some(chars) = chars else { return Ok(value.trim().into()) };
    check_stripped(&chars)?;
    Ok(value.trim_matches(|c| chars.contains(c)).into())
}

/// The local time, by a format of the C library.
fn time_now(format: &str) -> Result<String, Fault> {
    jiff::fmt::strtime::format(format, &jiff::ZonedDateTime::now()).map_err(|e| Fault::new(ErrorKind::InvalidOperation, e.to_string()))
}

/// JSON as python's `json.dumps(value, ensure_ascii=False)` writes it.
fn to_json(state: &State<'_, '_>, value: &Value, args: Kwargs) -> Result<Value, Fault> {
    let indent: Option<usize> = args.get("indent")?;
    if args.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false) {
        return Err(Fault::new(ErrorKind::InvalidOperation, "tojson with ensure_ascii is not supported"));
    }
    args.assert_all_used()?;
    let mut json = Text(Vec::new());
    let written = match indent {
        Some(indent) if indent > 16 => return Err(too_much("JSON is indented by more than 16".into())),
        Some(indent) => {
            let indent = " ".repeat(indent);
            let pretty = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, pretty))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, Spaced)),
    };
    written.map_err(|e| Fault::new(ErrorKind::InvalidOperation, format!("tojson: {e}")))?;
    state.consume_fuel((json.0.len() / 4) as u64)?;
    Ok(Value::from(String::from_utf8_lossy(&json.0)))
}

/// JSON on one line, with a space behind each comma and colon.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// A text of at most [`MAX_TEXT`] bytes.
struct Text(Vec<u8>);

impl Write for Text {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_TEXT {
            return Err(io::Error::other(format!("its text has more than {MAX_TEXT} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs the engine where it can't run out of stack.
fn with_stack<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work);
        let thread = thread.map_err(|e| Error::ChatTemplate(format!("no thread could be started for it: {e}")))?;
        thread.join().map_err(|_| Error::ChatTemplate("it met a fault of the template engine".into()))
    })
}

fn too_much(what: String) -> Fault {
    Fault::new(ErrorKind::InvalidOperation, what)
}

/// The engine's error as ours.
fn told(fault: Fault) -> Error {
    let what = match fault.kind() {
        ErrorKind::OutOfFuel => "it takes more steps than these messages can need".into(),
        ErrorKind::WriteFailure => format!("its text has more than {MAX_TEXT} bytes"),
        kind => fault.detail().map_or_else(|| kind.to_string(), str::to_owned),
    };
    let what: String = what.chars().take(400).collect();
    Error::ChatTemplate(match fault.line() {
        Some(line) => format!("{what} (line {line})"),
        None => what,
    })
}
