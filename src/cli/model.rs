//! `--model`: a path, or the name of a model of the hub, which is fetched when it is first needed.

use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use indicatif::ProgressBar;
use torchless::{FetchProgress, fetch_model, fetch_tokenizer, is_model_name};

use super::grid::counted;
use super::output::bytes;
use super::{Failure, Outcome, note};

/// Which model.
#[derive(clap::Args)]
pub struct ModelArg {
    /// The model: its directory in the Hugging Face layout, or a GGUF file; or, where nothing lies at that path, org/name or org/name:file.gguf of the Hugging Face hub, which is fetched once
    #[arg(long, value_name = "MODEL")]
    model: PathBuf,

    /// Where it is, once that was asked.
    #[arg(skip)]
    found: OnceLock<PathBuf>,
}

impl ModelArg {
    /// As it was given.
    pub fn named(&self) -> &Path {
        &self.model
    }

    /// As it was given, to be shown.
    pub fn name(&self) -> impl std::fmt::Display {
        self.model.display()
    }

    /// Where the model is. Fetches one of the hub the first time.
    pub fn path(&self) -> Outcome<&Path> {
        self.find(|name, progress| fetch_model(name, progress))
    }

    /// Where the model's tokenizer is: of the hub's only that is fetched, if it is in a file of its own.
    pub fn tokenizer_path(&self) -> Outcome<&Path> {
        self.find(|name, progress| fetch_tokenizer(name, progress))
    }

    fn find(&self, fetch: impl Fn(&str, &mut dyn FnMut(FetchProgress<'_>)) -> torchless::Result<PathBuf>) -> Outcome<&Path> {
        if let Some(found) = self.found.get() {
            return Ok(found);
        }
        let path = match (fs::metadata(&self.model), self.model.to_str().filter(|name| is_model_name(name))) {
            // What exists goes before what is called the same elsewhere.
            (Ok(_), _) => self.model.clone(),
            (Err(error), Some(name)) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                let mut shown = Shown::new(name);
                let fetched = fetch(name, &mut |progress| shown.show(progress));
                shown.bar.finish_and_clear();
                fetched.map_err(|e| Failure::because(format!("nothing lies at the path {name}"), e))?
            }
            (Err(error), name) => {
                let hint = if name.is_none() { "; a model of the Hugging Face hub would be org/name or org/name:file.gguf" } else { "" };
                return Err(Failure::because(format!("cannot open {}", self.model.display()), format!("{error}{hint}")));
            }
        };
        Ok(self.found.get_or_init(|| path))
    }
}

/// A bar for each file on a terminal, a line for each elsewhere.
struct Shown<'a> {
    name: &'a str,
    bar: ProgressBar,
    file: OsString,
}

impl<'a> Shown<'a> {
    fn new(name: &'a str) -> Self {
        Self { name, bar: ProgressBar::new(0).with_style(counted()), file: OsString::new() }
    }

    fn show(&mut self, FetchProgress { file, done, size, .. }: FetchProgress<'_>) {
        if self.file != file {
            self.file = file.into();
            if self.bar.is_hidden() {
                let kept = if done > 0 { format!(", of which {} are here", bytes(done)) } else { String::new() };
                note(format!("fetching {file} of {}, {}{kept}", self.name, bytes(size)));
            }
            self.bar.reset();
            self.bar.set_length(size);
            self.bar.set_message(file.to_owned());
        }
        self.bar.set_position(done);
    }
}
