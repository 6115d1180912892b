//! Which files of a repository make a model.

use std::collections::BTreeSet;

use super::Want;
use super::name::ModelName;
use crate::params::PartName;

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
const CONFIG: &str = "config.json";
/// Taken where they are there.
const SMALL: [&str; 6] =
    [CONFIG, "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"];

/// The names of all files, with `/` between directories.
pub(super) type Names = BTreeSet<String>;

/// What is to be fetched, or to be found in the cache.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// A directory with these files, and with the shards that the index names where there is one among them.
    Directory(Vec<String>),
    /// A GGUF file, in the order of its parts.
    Gguf(Vec<String>),
}

/// The files of `names` that make the model, or why there are none.
pub(super) fn select(names: &Names, model: &ModelName, want: Want) -> Result<Choice, String> {
    if let Some(file) = &model.file {
        if !file.ends_with(".gguf") {
            return Err("only a .gguf file can be taken alone; without a file its safetensors would be".into());
        }
        return match parts(file) {
            parts if parts.iter().all(|part| names.contains(part)) => Ok(Choice::Gguf(parts)),
            parts => {
                let missing = parts.iter().find(|part| !names.contains(*part)).unwrap_or(file);
                Err(format!("it has no file {missing:?}; {}", ggufs_of(names, model)))
            }
        };
    }
    let small = || SMALL.iter().filter(|name| names.contains(**name)).map(|name| (*name).to_owned());
    // As in transformers, a single file goes before an index.
    let weights = [SINGLE, INDEX].into_iter().find(|name| names.contains(*name));
    // A GGUF file that would be loaded has the vocabulary that goes with it.
    let is_directory = weights.is_some() && names.contains(CONFIG) || ggufs(names).is_empty();
    if want == Want::Tokenizer && has_tokenizer(names) && is_directory {
        return Ok(Choice::Directory(small().collect()));
    }
    match weights {
        Some(weights) if names.contains(CONFIG) => return Ok(Choice::Directory(small().chain([weights.to_owned()]).collect())),
        _ => {}
    }
    match ggufs(names).as_slice() {
        [one] => {
            let parts = parts(one);
            match parts.iter().find(|part| !names.contains(*part)) {
                None => Ok(Choice::Gguf(parts)),
                Some(missing) => Err(format!("it has {one:?}, but not its part {missing:?}")),
            }
        }
        _ => Err(format!("it has no {CONFIG} with {SINGLE} or {INDEX}; {}", ggufs_of(names, model))),
    }
}

/// Whether the repository has a tokenizer beside the weights.
pub(super) fn has_tokenizer(names: &Names) -> bool {
    ["tokenizer.json", "tokenizer.model"].iter().any(|name| names.contains(*name))
}

/// Every GGUF file; of those in parts the first part.
fn ggufs(names: &Names) -> Vec<&str> {
    let first = |name: &str| PartName::parse(name).is_none_or(|part| part.number == 1);
    names.iter().map(String::as_str).filter(|name| name.ends_with(".gguf") && first(name)).collect()
}

/// What there is to be named, as the rest of a sentence.
fn ggufs_of(names: &Names, model: &ModelName) -> String {
    const SHOWN: usize = 24;
    let ggufs = ggufs(names);
    let Some(one) = ggufs.first() else { return "it has no .gguf file".into() };
    let more = if ggufs.len() > SHOWN { format!(" and {} more", ggufs.len() - SHOWN) } else { String::new() };
    let shown = ggufs[..ggufs.len().min(SHOWN)].join(", ");
    format!("its .gguf files are {shown}{more}; name one, such as {}:{one}", model.repository)
}

/// All parts of a file, the first in front; itself, if it is whole.
fn parts(file: &str) -> Vec<String> {
    match PartName::parse(file) {
        Some(part) => (1..=part.count).map(|number| part.of_number(number)).collect(),
        None => vec![file.to_owned()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(names: &str, model: &str, want: Want) -> Result<Choice, String> {
        let names = names.split_whitespace().map(str::to_owned).collect();
        select(&names, &ModelName::parse(model).unwrap(), want)
    }

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn a_directory_is_what_a_load_needs_and_a_single_file_goes_before_an_index() {
        let all = "README.md chat_template.jinja config.json consolidated.safetensors model-00001-of-00002.safetensors \
                   model.safetensors.index.json tokenizer.json";
        let directory = |files: &str| Ok(Choice::Directory(words(files)));
        let with_index = "config.json tokenizer.json chat_template.jinja model.safetensors.index.json";
        assert_eq!(chosen(all, "o/n", Want::All), directory(with_index));
        let with_single = "config.json tokenizer.json chat_template.jinja model.safetensors";
        assert_eq!(chosen(&format!("{all} model.safetensors x.gguf"), "o/n", Want::All), directory(with_single));
        assert_eq!(chosen(all, "o/n", Want::Tokenizer), directory("config.json tokenizer.json chat_template.jinja"));
    }

    #[test]
    fn a_gguf_file_is_taken_if_it_is_named_or_the_only_one() {
        let gguf = |files: &str| Ok(Choice::Gguf(words(files)));
        assert_eq!(chosen("config.json q/a.gguf", "o/n", Want::All), gguf("q/a.gguf"));
        assert_eq!(chosen("q/a.gguf", "o/n", Want::Tokenizer), gguf("q/a.gguf"));
        assert_eq!(chosen("config.json tokenizer.json q/a.gguf", "o/n", Want::Tokenizer), gguf("q/a.gguf"));
        let parts = "a-00001-of-00002.gguf a-00002-of-00002.gguf";
        assert_eq!(chosen(parts, "o/n", Want::All), gguf(parts));
        let two = format!("{parts} b.gguf config.json model.safetensors");
        assert_eq!(chosen(&two, "o/n:b.gguf", Want::All), gguf("b.gguf"));
        assert_eq!(chosen(&two, "o/n:a-00002-of-00002.gguf", Want::All), gguf(parts));
    }

    #[test]
    fn what_cannot_be_chosen_is_told_with_what_there_is() {
        let many = (0..30).map(|i| format!("m{i:02}.gguf ")).collect::<String>();
        for (names, model, words) in [
            ("a.gguf b.gguf", "o/n", "its .gguf files are a.gguf, b.gguf; name one, such as o/n:a.gguf"),
            (&many, "o/n", "m23.gguf and 6 more"),
            ("README.md model.safetensors", "o/n", "no config.json"),
            ("", "o/n", "no .gguf file"),
            ("a.gguf", "o/n:b.gguf", "it has no file \"b.gguf\"; its .gguf files are a.gguf"),
            ("model.safetensors", "o/n:model.safetensors", "only a .gguf file"),
            ("a-00001-of-00002.gguf", "o/n", "not its part \"a-00002-of-00002.gguf\""),
            ("a-00001-of-99999.gguf", "o/n:a-00001-of-99999.gguf", "no file \"a-00002-of-99999.gguf\""),
        ] {
            let why = chosen(names, model, Want::All).unwrap_err();
            assert!(why.contains(words), "{model}: {why}");
        }
    }

    #[test]
    fn only_five_digits_within_their_number_are_parts() {
        let part = PartName::parse("q/a-00002-of-00003.gguf").unwrap();
        assert_eq!((part.prefix, part.number, part.count), ("q/a", 2, 3));
        for whole in
            ["a.gguf", "a-1-of-2.gguf", "a-00000-of-00002.gguf", "a-00003-of-00002.gguf", "a-0000x-of-00002.gguf", "a-+0001-of-00002.gguf"]
        {
            assert_eq!(PartName::parse(whole), None, "{whole}");
        }
    }
}
