//! Files that the command reads, within bounds, and writes, whole or not at all.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::Path;

use super::{Failure, Outcome};

/// The longest input that is read: a few hours of work for any model.
const MAX_BYTES: u64 = 64 << 20;

/// A text or a list of ids. Pipes and devices are read up to the bound.
pub fn read(path: &Path) -> Outcome<Vec<u8>> {
    let failed = |why: String| Failure::because(format!("cannot read {}", path.display()), why);
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|e| failed(e.to_string()))?;
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|e| failed(e.to_string()))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(failed(format!("it is larger than {MAX_BYTES} bytes")));
    }
    Ok(bytes)
}

/// A JSON array of token ids.
pub fn read_ids(path: &Path) -> Outcome<Vec<u32>> {
    serde_json::from_slice(&read(path)?).map_err(|e| Failure::because(format!("{} must hold a JSON array of token ids", path.display()), e))
}

/// Fails now if [`write`] could only fail later: to be asked before a long computation.
pub fn check_writable(path: &Path) -> Outcome {
    let failed = |why: &str| Err(Failure::because(format!("cannot write {}", path.display()), why));
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match fs::metadata(parent) {
        Ok(parent) if !parent.is_dir() => failed("what should hold it is no directory"),
        Ok(_) if path.is_dir() => failed("it is a directory"),
        Ok(_) => Ok(()),
        Err(e) => failed(&e.to_string()),
    }
}

/// Refuses to write what is to be read: one of `inputs`, or something in them.
pub fn check_apart(path: &Path, inputs: &[&Path]) -> Outcome {
    let whole = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    // What doesn't exist yet lies where its directory is.
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let (itself, directory) = (whole(path), whole(parent));
    match inputs.iter().find(|input| itself == whole(input) || directory == whole(input)) {
        Some(input) => Err(Failure::because(format!("cannot write {}", path.display()), format!("{} is read", input.display()))),
        None => Ok(()),
    }
}

/// Writes a file beside `path` and renames it when it is complete, so that a failure leaves what was there before.
/// A pipe or a device is written as it is.
pub fn write(path: &Path, content: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Outcome {
    let failed = |e: io::Error| Failure::because(format!("cannot write {}", path.display()), e);
    // Through a link, what it points to is replaced, not the link.
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if fs::metadata(&path).is_ok_and(|m| !m.is_file()) {
        return File::options().write(true).open(&path).and_then(|file| fill(file, content)).map_err(failed);
    }
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = File::create_new(&temporary).and_then(|file| fill(file, content)).and_then(|()| fs::rename(&temporary, &path));
    written.map_err(|e| {
        // It may not exist; the first error is the one to tell.
        let _ = fs::remove_file(&temporary);
        failed(e)
    })
}

fn fill(file: File, content: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let mut writer = BufWriter::with_capacity(1 << 20, file);
    content(&mut writer)?;
    writer.flush()
}
