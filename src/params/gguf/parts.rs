//! [`Parts`]: the files of a GGUF model, one or a split set.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::file::GgufFile;
use super::metadata::Metadata;
use crate::config::open;
use crate::error::{Error, Result};

const COUNT: &str = "split.count";
const NUMBER: &str = "split.no";
const TENSORS: &str = "split.tensors.count";

/// Most models that a message names.
const NAMED: usize = 8;

/// The files of a model in their order; the first has the metadata.
pub(super) struct Parts(Vec<GgufFile>);

impl Parts {
    /// Opens the model of which `path` is the file, or any part of a split set.
    pub(super) fn open(path: &Path) -> Result<Self> {
        Self::of(path, GgufFile::open(path.into())?)
    }

    /// [`Self::open`] of a file that is open.
    pub(super) fn of(path: &Path, file: GgufFile) -> Result<Self> {
        let metadata = file.metadata();
        let count = metadata.integer(COUNT)?.unwrap_or(1);
        if count <= 1 {
            return Ok(Self(vec![file]));
        }
        let number = metadata.integer(NUMBER)?.ok_or_else(|| metadata.wrong(NUMBER, "a part of a split set has a number"))?;
        let count = u32::try_from(count).ok().filter(|count| *count < 100_000).ok_or_else(|| metadata.wrong(COUNT, "99999 is the most"))?;
        if !(0..i128::from(count)).contains(&number) {
            return Err(metadata.wrong(NUMBER, &format!("the {count} parts of {COUNT} have numbers from 0 on")));
        }
        let number = number as u32 + 1;
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let part = PartName::parse(name).filter(|part| (part.number, part.count) == (number, count));
        let part = part.ok_or_else(|| {
            let problem = format!(
                "it is part {number} of {count}, as its metadata says, and its name doesn't end in -{number:05}-of-{count:05}.gguf"
            );
            Error::config(path, problem)
        })?;
        let total = metadata.integer(TENSORS)?;

        let mut files = Vec::new();
        let mut given = Some(file);
        for other in 1..=count {
            let file = match given.take_if(|_| other == number) {
                Some(file) => file,
                None => open_part(path, &part.of_number(other), other, count, total)?,
            };
            files.push(file);
        }
        check_tensors(&files, path, total)?;
        Ok(Self(files))
    }

    pub(super) fn files(&self) -> &[GgufFile] {
        &self.0
    }

    pub(super) fn metadata(&self) -> &Metadata {
        self.0[0].metadata()
    }

    /// The file that has a tensor of this name.
    pub(super) fn find(&self, name: &str) -> Option<&GgufFile> {
        self.0.iter().find(|file| file.has(name))
    }
}

/// Opens another part of the set that `given` belongs to.
fn open_part(given: &Path, name: &str, number: u32, count: u32, total: Option<i128>) -> Result<GgufFile> {
    let path = given.with_file_name(name);
    if !path.exists() {
        return Err(Error::config(given, format!("part {number} of {count} of its set is missing: {name}")));
    }
    let file = GgufFile::open(path)?;
    let metadata = file.metadata();
    for (key, needed) in [(COUNT, Some(i128::from(count))), (NUMBER, Some(i128::from(number) - 1)), (TENSORS, total)] {
        if metadata.integer(key)? != needed {
            let needed = needed.map_or_else(|| "absent".into(), |n| n.to_string());
            return Err(metadata.wrong(key, &format!("beside {} it should be {needed}", given.display())));
        }
    }
    Ok(file)
}

/// All parts together must have as many tensors as each says, and none twice.
fn check_tensors(files: &[GgufFile], path: &Path, total: Option<i128>) -> Result<()> {
    let mut parts = BTreeMap::new();
    for file in files {
        for name in file.names() {
            if let Some(other) = parts.insert(name, file.file().path()) {
                let problem = format!("tensor {name:?} is in two parts, {} and {}", other.display(), file.file().path().display());
                return Err(Error::config(path, problem));
            }
        }
    }
    if total.is_some_and(|total| total != parts.len() as i128) {
        return Err(files[0].metadata().wrong(TENSORS, &format!("the {} parts have {}", files.len(), parts.len())));
    }
    Ok(())
}

/// The name of a part: `prefix-00001-of-00003.gguf`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PartName<'a> {
    pub(crate) prefix: &'a str,
    pub(crate) number: u32,
    pub(crate) count: u32,
}

impl<'a> PartName<'a> {
    pub(crate) fn parse(name: &'a str) -> Option<Self> {
        let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (prefix, number) = rest.rsplit_once('-')?;
        let five_digits = |text: &str| (text.len() == 5 && text.bytes().all(|c| c.is_ascii_digit())).then(|| text.parse().ok())?;
        let (number, count) = (five_digits(number)?, five_digits(count)?);
        (1..=count).contains(&number).then_some(Self { prefix, number, count })
    }

    /// The name of another part of the same set.
    pub(crate) fn of_number(&self, number: u32) -> String {
        format!("{}-{number:05}-of-{:05}.gguf", self.prefix, self.count)
    }
}

/// Whether a path is that of a GGUF file: by its name, or by its first bytes.
pub(super) fn is_gguf(path: &Path) -> bool {
    let begins_so = || {
        let mut magic = [0; 4];
        open(path).and_then(|mut file| file.read_exact(&mut magic).map_err(Error::io("read", path))).is_ok() && magic == *b"GGUF"
    };
    path.is_file() && (has_extension(path) || begins_so())
}

fn has_extension(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// The one GGUF model in a directory, if there is any: its file, or the first of its parts that is there.
///
/// # Errors
/// [`Error::Config`] if there are several.
pub(super) fn only_model(dir: &Path) -> Result<Option<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io("open", dir))? {
        let path = entry.map_err(Error::io("read", dir))?.path();
        if has_extension(&path) && path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    let mut models: Vec<PathBuf> = Vec::new();
    for path in found {
        let part = |path: &Path| {
            let name = path.file_name()?.to_str()?;
            PartName::parse(name).map(|part| (part.prefix.to_owned(), part.count))
        };
        // In order, the parts of a set stand side by side, but for sets of another count.
        let known = part(&path).is_some_and(|this| models.iter().any(|model| part(model).as_ref() == Some(&this)));
        if !known {
            models.push(path);
        }
    }
    if models.len() > 1 {
        let names: Vec<_> = models.iter().filter_map(|path| path.file_name()).map(|name| name.to_string_lossy()).collect();
        let more = if names.len() > NAMED { ", .." } else { "" };
        let names = names[..names.len().min(NAMED)].join(", ");
        return Err(Error::config(
            dir,
            format!("the directory holds {} GGUF models, {names}{more}; the path of one is needed", models.len()),
        ));
    }
    Ok(models.pop())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts_are_read_as_they_are_written() {
        let part = PartName::parse("a-of-b-00002-of-00003.gguf").unwrap();
        assert_eq!((part.prefix, part.number, part.count), ("a-of-b", 2, 3));
        assert_eq!(part.of_number(3), "a-of-b-00003-of-00003.gguf");
        for other in
            ["a.gguf", "a-00002-of-00001.gguf", "a-00000-of-00001.gguf", "a-2-of-3.gguf", "a-+0002-of-00003.gguf", "a-00001-of-00001"]
        {
            assert_eq!(PartName::parse(other), None, "{other}");
        }
    }
}
