//! From a name to a path: what the cache has, what the hub has, and the difference fetched.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ring::digest::{Context, SHA256};

use super::cache::{Cache, Snapshot};
use super::client::{Client, Source, Stop, plain};
use super::name::ModelName;
use super::select::{Choice, INDEX, Names, has_tokenizer, select};
use super::settings::Settings;
use super::{FetchProgress, Want};
use crate::error::{Error, Result};
use crate::params::shards_of;

/// How often in a row a file may be cut off before much of it came.
const ATTEMPTS: u32 = 4;
const FIRST_PAUSE: Duration = Duration::from_millis(250);

pub(super) fn fetch(model: &ModelName, want: Want, tell: &mut dyn FnMut(FetchProgress<'_>)) -> Result<PathBuf> {
    let settings = Settings::from_env();
    let Some(dir) = &settings.cache else {
        return Err(Error::hub(model.to_string(), "there is no home directory to keep it in; set HF_HOME"));
    };
    let cache = Cache::new(dir, &model.repository);
    let kept = cache.latest();
    let found = kept.and_then(|kept| complete(&kept, model, want));
    if let Some(Found { path, is_all: true }) = found {
        return Ok(path);
    }
    let client = Client::new(model, &settings)?;
    let listed = if settings.offline { Err(client.unreachable("HF_HUB_OFFLINE is set")) } else { client.list() };
    let listing = match listed {
        Ok(listing) => listing,
        Err(error @ Error::HubUnreachable { .. }) => return found.map(|found| found.path).ok_or(error),
        Err(error) => return Err(error),
    };

    let fetcher = Fetcher { cache: &cache, client: &client, commit: &listing.commit };
    let snapshot = cache.snapshot(&listing.commit);
    let choice = select(&listing.files, model, want).map_err(|why| client.failed(why))?;
    let (files, path) = match choice {
        Choice::Directory(files) => (files, snapshot.clone()),
        Choice::Gguf(parts) => {
            let first = snapshot.join(&parts[0]);
            (parts, first)
        }
    };
    for file in &files {
        fetcher.fetch(file, tell)?;
        if file == INDEX {
            for shard in shards(&snapshot.join(INDEX), &listing.files, &client)? {
                fetcher.fetch(&shard, tell)?;
            }
        }
    }
    cache.set_latest(&listing.commit)?;
    Ok(path)
}

/// A model in the cache that can be loaded.
struct Found {
    path: PathBuf,
    /// Whether the hub has nothing to add: there may be more GGUF files than were fetched, and a tokenizer of a model that was kept without one.
    is_all: bool,
}

fn complete(kept: &Snapshot, model: &ModelName, want: Want) -> Option<Found> {
    match select(&kept.files, model, want).ok()? {
        Choice::Gguf(parts) => Some(Found { path: kept.dir.join(&parts[0]), is_all: model.file.is_some() }),
        Choice::Directory(files) => {
            if files.iter().any(|file| file == INDEX) {
                let shards = shards_of(&kept.dir.join(INDEX)).ok()?;
                shards.iter().all(|shard| kept.files.contains(shard)).then_some(())?;
            }
            Some(Found { path: kept.dir.clone(), is_all: has_tokenizer(&kept.files) })
        }
    }
}

/// The shards that an index names, which the repository must have.
fn shards(index: &Path, files: &Names, client: &Client<'_>) -> Result<Vec<String>> {
    let shards = shards_of(index)?;
    match shards.iter().find(|shard| !files.contains(*shard)) {
        Some(shard) => Err(client.failed(format!("its {INDEX} names the shard {shard:?}, which it doesn't have"))),
        None => Ok(shards.into_iter().collect()),
    }
}

/// Fetches files of one commit.
struct Fetcher<'a> {
    cache: &'a Cache,
    client: &'a Client<'a>,
    commit: &'a str,
}

impl Fetcher<'_> {
    fn fetch(&self, file: &str, tell: &mut dyn FnMut(FetchProgress<'_>)) -> Result<()> {
        if self.cache.snapshot(self.commit).join(file).exists() {
            return Ok(());
        }
        let (mut failures, mut counted) = (0, 0);
        loop {
            let mut here = None;
            let attempt = self.attempt(file, &mut |progress: FetchProgress<'_>| {
                here = Some((progress.done, progress.size));
                tell(progress);
            });
            let why = match attempt {
                Ok(()) => return Ok(()),
                Err(Stop::Failed(error)) => return Err(error),
                Err(Stop::Cut(why)) => why,
            };
            // A hundredth of the file is worth a new beginning; less isn't, or there might be no end.
            if let Some((done, size)) = here
                && done > counted + size / 100
            {
                (failures, counted) = (0, done);
            }
            failures += 1;
            if failures == ATTEMPTS {
                return Err(match here {
                    None => self.client.unreachable(format!("asked for {file:?}, {why}")),
                    Some((done, size)) => {
                        let here = format!("{done} of {size} bytes are here, and the next call goes on");
                        self.client.failed(format!("{file:?} was cut off {ATTEMPTS} times: {why}; {here}"))
                    }
                });
            }
            std::thread::sleep(FIRST_PAUSE * 2u32.pow(failures - 1));
        }
    }

    fn attempt(&self, file: &str, tell: &mut dyn FnMut(FetchProgress<'_>)) -> Result<(), Stop> {
        let source = self.client.locate(self.commit, file)?;
        let (blob, partial) = (self.cache.blob(&source.etag), self.cache.partial(&source.etag));
        let _lock = self.cache.lock(&source.etag)?;
        // Of another commit, or fetched by another process. Of another size it can only be damaged.
        if fs::metadata(&blob).is_ok_and(|blob| blob.is_file() && blob.len() == source.size) {
            return Ok(self.cache.link(self.commit, file, &source.etag)?);
        }
        let mut part =
            File::options().read(true).write(true).create(true).truncate(false).open(&partial).map_err(Error::io("open", &partial))?;
        self.fill(&mut part, &partial, file, &source, tell)?;
        // Before the name that says that it is whole.
        part.sync_all().map_err(Error::io("write", &partial))?;
        drop(part);
        fs::rename(&partial, &blob).map_err(Error::io("write", &blob))?;
        Ok(self.cache.link(self.commit, file, &source.etag)?)
    }

    /// Makes `part` the whole file, from where it ends now.
    fn fill(&self, part: &mut File, path: &Path, file: &str, source: &Source, tell: &mut dyn FnMut(FetchProgress<'_>)) -> Result<(), Stop> {
        let size = source.size;
        let write = || Error::io("write", path);
        let mut buffer = vec![0; 1 << 18];
        let mut digest = Context::new(&SHA256);
        let mut done = part.metadata().map_err(Error::io("read", path))?.len();
        // What cannot be checked in the end is not gone on with: those files are small.
        if done > size || !is_sha256(&source.etag) {
            part.set_len(0).map_err(write())?;
            done = 0;
        }
        tell(FetchProgress { file, done, size });
        let kept = done;
        let mut old = Read::by_ref(part).take(kept);
        loop {
            match old.read(&mut buffer).map_err(Error::io("read", path))? {
                0 => break,
                n => digest.update(&buffer[..n]),
            }
        }
        if done < size {
            let mut opened = self.client.open(source, file, done)?;
            if opened.start != done {
                part.set_len(0).map_err(write())?;
                (done, digest) = (0, Context::new(&SHA256));
            }
            part.seek(SeekFrom::Start(done)).map_err(write())?;
            loop {
                let n = match opened.bytes.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(n) => n,
                    Err(e) => return Err(Stop::Cut(plain(e.into()))),
                };
                if n as u64 > size - done {
                    part.set_len(0).map_err(write())?;
                    return Err(self.client.failed(format!("of {file:?} more than the {size} bytes come that the hub says it has")).into());
                }
                part.write_all(&buffer[..n]).map_err(write())?;
                digest.update(&buffer[..n]);
                done += n as u64;
                tell(FetchProgress { file, done, size });
            }
        }
        if done < size {
            return Err(Stop::Cut(format!("the server sent {done} of {size} bytes")));
        }
        let hash: String = digest.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        if is_sha256(&source.etag) && source.etag != hash {
            part.set_len(0).map_err(write())?;
            let problem = format!("{file:?} came with the SHA-256 {hash}, but the hub says {}; it was thrown away", source.etag);
            // What was kept may be to blame.
            return Err(if kept > 0 { Stop::Cut(problem) } else { self.client.failed(problem).into() });
        }
        Ok(())
    }
}

/// Whether an etag is the hash of its file: that of a small one is Git's, or whatever a mirror says.
fn is_sha256(etag: &str) -> bool {
    etag.len() == 64 && etag.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}
