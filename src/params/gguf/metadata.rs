//! [`Metadata`]: the keys of a GGUF file, with errors that name the file, the key and what it holds.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use super::bytes::{Bytes, quoted};
use crate::error::{Error, Result};

/// Most bytes of a key, as the format says.
const KEY_LIMIT: usize = 65_535;

/// Most keys: each takes more memory than it may take in the file.
const ENTRIES_LIMIT: u64 = 1 << 16;

/// Least bytes of a key and its value: two lengths of which one is of a type of 1 byte.
const LEAST_ENTRY: usize = 8 + 4 + 1;

/// The type of a value, or of an array's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    fn read(bytes: &mut Bytes) -> Result<Self, String> {
        use Kind::{Array, Bool, F32, F64, I8, I16, I32, I64, Text, U8, U16, U32, U64};
        const KINDS: [Kind; 13] = [U8, I8, U16, I16, U32, I32, F32, Bool, Text, Array, U64, I64, F64];
        let id = bytes.u32()?;
        KINDS.get(id as usize).copied().ok_or_else(|| format!("its value has type {id}; types are 0 to {}", KINDS.len() - 1))
    }

    /// Bytes of a value; `None` where they differ from value to value.
    fn size(self) -> Option<usize> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::Text | Self::Array => None,
        }
    }

    fn plural(self) -> &'static str {
        match self {
            Self::Text => "strings",
            Self::Bool => "flags",
            Self::F32 | Self::F64 => "floats",
            Self::Array => "arrays",
            _ => "integers",
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
enum Value {
    Integer(i128),
    Float(f64),
    Bool(bool),
    /// Where its bytes lie in the file; nobody has looked whether they are UTF-8.
    Text(Range<usize>),
    Array(Array),
}

/// An array, left where it lies in the file.
#[derive(Debug, Clone, PartialEq)]
struct Array {
    kind: Kind,
    len: usize,
    start: usize,
}

/// The keys of a file. Texts and arrays are read where they lie, when they are asked for.
#[derive(Clone)]
pub(crate) struct Metadata {
    path: PathBuf,
    map: Arc<Mmap>,
    values: Entries,
}

/// Values by key.
#[derive(Debug, Clone, Default)]
pub(super) struct Entries(BTreeMap<String, Value>);

impl Entries {
    /// Reads so many keys and their values.
    pub(super) fn read(bytes: &mut Bytes, count: u64) -> Result<Self, String> {
        bytes.count(count, LEAST_ENTRY, "metadata keys")?;
        if count > ENTRIES_LIMIT {
            return Err(format!(
                "it claims {count} metadata keys; {ENTRIES_LIMIT} are read at most, and files in use have fewer than a hundred"
            ));
        }
        let mut values = BTreeMap::new();
        for i in 0..count {
            let key = bytes.name(KEY_LIMIT).map_err(|e| format!("metadata key {i} of {count}: {e}"))?;
            let value = read_value(bytes).map_err(|e| format!("metadata key {} ({i} of {count}): {e}", quoted(key)))?;
            if values.insert(key.to_owned(), value).is_some() {
                return Err(format!("metadata key {} is there twice", quoted(key)));
            }
        }
        Ok(Self(values))
    }

    /// The value of `general.alignment`: what tensors' places are multiples of.
    pub(super) fn alignment(&self) -> Result<u64, String> {
        match self.0.get("general.alignment") {
            None => Ok(32),
            Some(Value::Integer(n)) if (8..=i128::from(u32::MAX)).contains(n) && (*n as u32).is_power_of_two() => Ok(*n as u64),
            Some(Value::Integer(n)) => Err(format!("general.alignment is {n}; a power of two from 8 on is needed")),
            Some(_) => Err("general.alignment is no integer".into()),
        }
    }
}

fn read_value(bytes: &mut Bytes) -> Result<Value, String> {
    let kind = Kind::read(bytes)?;
    match kind {
        Kind::Text => {
            let text = bytes.string()?;
            Ok(Value::Text(bytes.at() - text.len()..bytes.at()))
        }
        Kind::Array => read_array(bytes).map(Value::Array),
        scalar => read_scalar(bytes, scalar),
    }
}

fn read_scalar(bytes: &mut Bytes, kind: Kind) -> Result<Value, String> {
    Ok(match kind {
        Kind::U8 => Value::Integer(bytes.array().map(u8::from_le_bytes)?.into()),
        Kind::I8 => Value::Integer(bytes.array().map(i8::from_le_bytes)?.into()),
        Kind::U16 => Value::Integer(bytes.array().map(u16::from_le_bytes)?.into()),
        Kind::I16 => Value::Integer(bytes.array().map(i16::from_le_bytes)?.into()),
        Kind::U32 => Value::Integer(bytes.array().map(u32::from_le_bytes)?.into()),
        Kind::I32 => Value::Integer(bytes.array().map(i32::from_le_bytes)?.into()),
        Kind::U64 => Value::Integer(bytes.array().map(u64::from_le_bytes)?.into()),
        Kind::I64 => Value::Integer(bytes.array().map(i64::from_le_bytes)?.into()),
        Kind::F32 => Value::Float(bytes.array().map(f32::from_le_bytes)?.into()),
        Kind::F64 => Value::Float(bytes.array().map(f64::from_le_bytes)?),
        Kind::Bool => match bytes.array()? {
            [0] => Value::Bool(false),
            [1] => Value::Bool(true),
            [other] => return Err(format!("a flag is {other}; 0 and 1 are all that it may be")),
        },
        Kind::Text | Kind::Array => return Err("it is no single value".into()),
    })
}

/// Goes past an array, which must lie in the file with all of its elements.
fn read_array(bytes: &mut Bytes) -> Result<Array, String> {
    let kind = Kind::read(bytes)?;
    let count = bytes.u64()?;
    if kind == Kind::Array {
        return Err("it is an array of arrays, which no key that is read has".into());
    }
    // A string has at least its length.
    bytes.count(count, kind.size().unwrap_or(8), &format!("{} in an array", kind.plural()))?;
    let (len, start) = (count as usize, bytes.at());
    match kind.size() {
        Some(size) => _ = bytes.take((len * size) as u64)?,
        None => {
            for i in 0..len {
                bytes.string().map_err(|e| format!("string {i} of {len}: {e}"))?;
            }
        }
    }
    Ok(Array { kind, len, start })
}

impl Metadata {
    pub(super) fn new(path: &Path, map: Arc<Mmap>, values: Entries) -> Self {
        Self { path: path.into(), map, values }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a key is absent, or holds 0 or false.
    pub(super) fn is_nothing(&self, key: &str) -> bool {
        matches!(self.get(key), None | Some(Value::Integer(0) | Value::Bool(false)))
            || matches!(self.get(key), Some(Value::Float(x)) if *x == 0.0)
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.values.0.get(key)
    }

    /// The error of a key that holds something else than is `needed`.
    pub(super) fn wrong(&self, key: &str, needed: &str) -> Error {
        let found = self.get(key).map_or_else(|| "absent".into(), |value| self.shown(value));
        Error::config(&self.path, format!("{key} is {found}; {needed}"))
    }

    /// The error of a key that asks for what torchless doesn't compute.
    pub(super) fn unsupported(&self, key: &str, supported: &'static str) -> Error {
        let found = self.get(key).map_or_else(|| "absent".into(), |value| self.shown(value));
        Error::Unsupported { what: "metadata", found: format!("{key} = {found}"), supported }
    }

    /// A value as messages show it.
    fn shown(&self, value: &Value) -> String {
        match value {
            Value::Integer(n) => n.to_string(),
            Value::Float(x) => x.to_string(),
            Value::Bool(flag) => flag.to_string(),
            // A character has at most 4 bytes, and one that is cut in two shows as damaged behind all that is quoted.
            Value::Text(range) => quoted(&String::from_utf8_lossy(&self.map[range.start..range.end.min(range.start + 400)])),
            Value::Array(array) => format!("an array of {} {}", array.len, array.kind.plural()),
        }
    }

    fn missing(&self, key: &str) -> Error {
        self.wrong(key, "it has no default")
    }

    pub(super) fn integer(&self, key: &str) -> Result<Option<i128>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Integer(n)) => Ok(Some(*n)),
            Some(_) => Err(self.wrong(key, "an integer is needed")),
        }
    }

    /// A size: it counts something, and fits the 32 bits in which positions, tokens and GPU indices are kept.
    pub(super) fn size(&self, key: &str) -> Result<Option<usize>> {
        let needed = || self.wrong(key, &format!("a whole number from 1 to {} is needed", u32::MAX));
        match self.get(key) {
            None => Ok(None),
            Some(Value::Integer(n)) => as_size(*n).map(Some).ok_or_else(needed),
            Some(_) => Err(needed()),
        }
    }

    /// A size that has no default.
    pub(super) fn required_size(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| self.missing(key))
    }

    /// A size, or an array that repeats it for each layer.
    pub(super) fn repeated_size(&self, key: &str) -> Result<Option<usize>> {
        let Some(Value::Array(_)) = self.get(key) else { return self.size(key) };
        let sizes = self.integers(key)?.unwrap_or_default();
        match *sizes.as_slice() {
            [first, ref others @ ..] if others.iter().all(|n| *n == first) => {
                as_size(first.into()).map(Some).ok_or_else(|| self.wrong(key, "sizes are needed"))
            }
            [] => Err(self.wrong(key, "a size is needed")),
            [first, ..] => {
                let found = format!("{key} of {first} for some layers and other sizes for others");
                Err(Error::Unsupported { what: "metadata", found, supported: "layers that are all alike" })
            }
        }
    }

    /// A number that stays finite as f32.
    pub(super) fn number(&self, key: &str) -> Result<Option<f32>> {
        let number = match self.get(key) {
            None => return Ok(None),
            Some(Value::Float(x)) => Some(*x as f32),
            Some(Value::Integer(n)) => Some(*n as f32),
            Some(_) => None,
        };
        number.filter(|x| x.is_finite()).map(Some).ok_or_else(|| self.wrong(key, "a finite number is needed"))
    }

    /// A number that stays finite and positive as f32.
    pub(super) fn positive(&self, key: &str) -> Result<Option<f32>> {
        match self.number(key)? {
            Some(x) if x <= 0.0 => Err(self.wrong(key, "a finite positive number is needed")),
            number => Ok(number),
        }
    }

    /// A positive number that has no default.
    pub(super) fn required_positive(&self, key: &str) -> Result<f32> {
        self.positive(key)?.ok_or_else(|| self.missing(key))
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.wrong(key, "a flag is needed")),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text(range)) => {
                std::str::from_utf8(&self.map[range.clone()]).map(Some).map_err(|_| self.wrong(key, "UTF-8 is needed"))
            }
            Some(_) => Err(self.wrong(key, "a string is needed")),
        }
    }

    /// A text that has no default.
    pub(super) fn required_text(&self, key: &str) -> Result<&str> {
        self.text(key)?.ok_or_else(|| self.missing(key))
    }

    fn array(&self, key: &str, of: &[Kind], needed: &str) -> Result<Option<&Array>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(array)) if of.contains(&array.kind) => Ok(Some(array)),
            Some(_) => Err(self.wrong(key, needed)),
        }
    }

    /// The bytes of an array's elements, one after the other.
    fn elements(&self, array: &Array) -> impl Iterator<Item = Result<Value, String>> {
        let mut bytes = Bytes::new(&self.map, array.start);
        let kind = array.kind;
        (0..array.len).map(move |_| read_scalar(&mut bytes, kind))
    }

    /// How many elements an array of strings has.
    pub(super) fn texts_len(&self, key: &str) -> Result<Option<usize>> {
        Ok(self.array(key, &[Kind::Text], "an array of strings is needed")?.map(|array| array.len))
    }

    /// The strings of an array in their order, as they lie in the file: UTF-8 or not.
    pub(super) fn raw_texts(&self, key: &str) -> Result<Option<impl Iterator<Item = &[u8]>>> {
        let array = self.array(key, &[Kind::Text], "an array of strings is needed")?;
        Ok(array.map(|array| {
            let mut bytes = Bytes::new(&self.map, array.start);
            // All of them were there when the header was read.
            (0..array.len).map_while(move |_| bytes.string().ok())
        }))
    }

    /// The strings of an array.
    pub(super) fn texts(&self, key: &str) -> Result<Option<Vec<String>>> {
        let Some(texts) = self.raw_texts(key)? else { return Ok(None) };
        let text = |(i, bytes): (usize, &[u8])| {
            let text = std::str::from_utf8(bytes).map(str::to_owned);
            text.map_err(|_| {
                Error::config(&self.path, format!("string {i} of {key} is not UTF-8: {}", quoted(&String::from_utf8_lossy(bytes))))
            })
        };
        texts.enumerate().map(text).collect::<Result<_>>().map(Some)
    }

    /// The integers of an array.
    pub(super) fn integers(&self, key: &str) -> Result<Option<Vec<i64>>> {
        use Kind::{I8, I16, I32, I64, U8, U16, U32, U64};
        let needed = "an array of integers is needed";
        let Some(array) = self.array(key, &[U8, I8, U16, I16, U32, I32, U64, I64], needed)? else { return Ok(None) };
        let integer = |value| match value {
            Ok(Value::Integer(n)) => i64::try_from(n).map_err(|_| self.wrong(key, "one of its integers is too large")),
            _ => Err(self.wrong(key, needed)),
        };
        self.elements(array).map(integer).collect::<Result<_>>().map(Some)
    }

    /// The floats of an array.
    pub(super) fn floats(&self, key: &str) -> Result<Option<Vec<f32>>> {
        let needed = "an array of floats is needed";
        let Some(array) = self.array(key, &[Kind::F32, Kind::F64], needed)? else { return Ok(None) };
        let float = |value| match value {
            Ok(Value::Float(x)) => Ok(x as f32),
            _ => Err(self.wrong(key, needed)),
        };
        self.elements(array).map(float).collect::<Result<_>>().map(Some)
    }
}

fn as_size(n: i128) -> Option<usize> {
    u32::try_from(n).ok().filter(|n| *n > 0).map(|n| n as usize)
}
