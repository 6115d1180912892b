//! Small JSON files, read with a bound, and their keys, with errors that name the file, the key and what it holds.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Opens a regular file, or a symbolic link to one. A pipe would block, and a directory fails only when it is read.
pub(crate) fn open(path: &Path) -> Result<File> {
    let fail = || Error::io("open", path);
    if !fs::metadata(path).map_err(fail())?.is_file() {
        return Err(fail()(io::Error::other("it is not a regular file")));
    }
    File::open(path).map_err(fail())
}

/// The bytes of a file that may have `limit` of them, and is read no further.
pub(crate) fn read_at_most(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.take(limit + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > limit {
        return Err(Error::config(path, format!("the file has more than {limit} bytes, the most that are read of such a file")));
    }
    Ok(bytes)
}

/// A JSON object. A key that holds null counts as absent.
pub(crate) struct Keys<'a> {
    path: &'a Path,
    /// Precedes a key in messages: the key of the object itself and a dot, or nothing.
    prefix: &'static str,
    map: Map<String, Value>,
}

impl<'a> Keys<'a> {
    /// Parses the text of `path`.
    pub(crate) fn parse(json: &[u8], path: &'a Path) -> Result<Self> {
        let map = serde_json::from_slice(json).map_err(|e| Error::config(path, format!("not a JSON object: {e}")))?;
        Ok(Self { path, prefix: "", map })
    }

    /// The object under a key of this one; `prefix` is the key and a dot.
    pub(crate) fn object(&self, key: &str, prefix: &'static str) -> Result<Option<Keys<'a>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let map = value.as_object().ok_or_else(|| self.wrong(key, "an object is needed"))?;
        Ok(Some(Keys { path: self.path, prefix, map: map.clone() }))
    }

    /// Whether the key is there, if only with null.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// The error of a key that holds something else than is `needed`.
    pub(crate) fn wrong(&self, key: &str, needed: &str) -> Error {
        let found = self.map.get(key).map_or_else(|| "absent".into(), shown);
        Error::config(self.path, format!("{}{key} is {found}; {needed}", self.prefix))
    }

    /// A size: it counts something, and fits the 32 bits in which positions, tokens and GPU indices are kept.
    pub(crate) fn size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let size = value.as_u64().and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0);
        let size = size.ok_or_else(|| self.wrong(key, &format!("a whole number from 1 to {} is needed", u32::MAX)))?;
        Ok(Some(size as usize))
    }

    /// A size that has no default.
    pub(crate) fn required_size(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| self.wrong(key, "it has no default"))
    }

    /// A number that stays finite and positive as f32.
    pub(crate) fn positive(&self, key: &str) -> Result<Option<f32>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().map(|x| x as f32).filter(|x| x.is_finite() && *x > 0.0);
        number.map(Some).ok_or_else(|| self.wrong(key, "a finite positive number is needed"))
    }

    /// A flag, by default false.
    pub(crate) fn flag(&self, key: &str) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(false) };
        value.as_bool().ok_or_else(|| self.wrong(key, "true or false is needed"))
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(key, "a string is needed"))
    }
}

/// A value as JSON, cut where it grows too long for a message.
pub(crate) fn shown(value: &Value) -> String {
    const LONGEST: usize = 80;
    let mut text = value.to_string();
    if let Some((end, _)) = text.char_indices().nth(LONGEST) {
        text.truncate(end);
        text.push_str("..");
    }
    text
}
