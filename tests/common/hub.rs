//! A hub of one repository, `org/name`, on this machine: its two addresses, the answers that the real one gives, and whatever should go wrong with them.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use ring::digest::{SHA256, digest};
use serde_json::json;

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What was asked.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    /// By names in small letters.
    pub headers: BTreeMap<String, String>,
    /// At the address of the large files.
    pub is_cdn: bool,
}

impl Request {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

#[derive(Clone)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// How many bytes of the body are sent before the connection ends.
    pub cut: usize,
    /// How long it then stays open.
    pub hold: Duration,
}

impl Reply {
    pub fn new(status: u16, headers: &[(&str, &str)], body: impl Into<Vec<u8>>) -> Self {
        let headers = headers.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        Self { status, headers, body: body.into(), cut: usize::MAX, hold: Duration::ZERO }
    }

    fn send(self, mut to: TcpStream, is_head: bool) {
        let mut head = format!("HTTP/1.1 {} Said\r\nconnection: close\r\n", self.status);
        for (name, value) in &self.headers {
            head += &format!("{name}: {value}\r\n");
        }
        if !self.headers.iter().any(|(name, _)| name == "content-length") {
            head += &format!("content-length: {}\r\n", self.body.len());
        }
        // The other side may have gone: that is its affair.
        let _ = to.write_all((head + "\r\n").as_bytes());
        if !is_head {
            let _ = to.write_all(&self.body[..self.body.len().min(self.cut)]);
            thread::sleep(self.hold);
        }
    }
}

/// The files of the repository.
#[derive(Clone, Default)]
pub struct Repository(pub BTreeMap<String, Vec<u8>>);

impl Repository {
    /// All files of a directory.
    pub fn of(dir: &Path) -> Self {
        let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        Self(files.map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(&path).unwrap())).collect())
    }

    pub fn with(mut self, file: &str, content: impl Into<Vec<u8>>) -> Self {
        self.0.insert(file.into(), content.into());
        self
    }

    pub fn sha256(&self, file: &str) -> String {
        digest(&SHA256, &self.0[file]).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// What the hub answers: large files are at the other address, small ones at another path.
    pub fn answer(&self, request: &Request, cdn: &str) -> Reply {
        if request.path == "/api/models/org/name/revision/main" {
            let files: Vec<_> = self.0.keys().map(|file| json!({"rfilename": file})).collect();
            return Reply::new(200, &[], json!({"sha": COMMIT, "siblings": files}).to_string());
        }
        let (named, small) = (format!("/org/name/resolve/{COMMIT}/"), format!("/small/{COMMIT}/"));
        let place = [&named, &small, "/large/"].into_iter().find(|place| request.path.starts_with(*place));
        let Some((place, file)) = place.map(|place| (place, request.path[place.len()..].to_owned())) else {
            return Reply::new(404, &[("x-error-code", "RepoNotFound")], "");
        };
        let Some(content) = self.0.get(&file) else { return Reply::new(404, &[("x-error-code", "EntryNotFound")], "") };
        let is_large = [".safetensors", ".gguf"].iter().any(|end| file.ends_with(end));
        if place.starts_with("/org") && is_large {
            let (etag, size) = (format!("\"{}\"", self.sha256(&file)), content.len().to_string());
            let headers = [("location", format!("{cdn}/large/{file}")), ("x-linked-etag", etag), ("x-linked-size", size)];
            return Reply::new(302, &headers.each_ref().map(|(name, value)| (*name, value.as_str())), "elsewhere");
        }
        if place.starts_with("/org") {
            return Reply::new(307, &[("location", &format!("{small}{file}"))], "elsewhere");
        }
        let etag = format!("W/\"small-{}\"", &self.sha256(&file)[..32]);
        let start = request.header("range").strip_prefix("bytes=").and_then(|range| range.strip_suffix('-')?.parse::<usize>().ok());
        match start {
            Some(start) => {
                let range = format!("bytes {start}-{}/{}", content.len() - 1, content.len());
                Reply::new(206, &[("etag", &etag), ("content-range", &range)], &content[start..])
            }
            None => Reply::new(200, &[("etag", &etag)], content.clone()),
        }
    }
}

/// A server that runs until the tests end.
pub struct Server {
    pub url: String,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// Answers as the repository, unless `change` has another answer. It is told the usual one.
    pub fn new(repository: Repository, change: impl Fn(&Request, &Reply) -> Option<Reply> + Send + Sync + 'static) -> Self {
        let (hub, cdn) = (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
        let url = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());
        let (hub_url, cdn_url) = (url(&hub), url(&cdn));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let known = Arc::clone(&seen);
        let answer = Arc::new(move |request: &Request| {
            known.lock().unwrap().push(request.clone());
            let usual = repository.answer(request, &cdn_url);
            change(request, &usual).unwrap_or(usual)
        });
        for (listener, is_cdn) in [(hub, false), (cdn, true)] {
            let answer = Arc::clone(&answer);
            thread::spawn(move || {
                for stream in listener.incoming().map_while(Result::ok) {
                    let answer = Arc::clone(&answer);
                    thread::spawn(move || {
                        if let Some(request) = read(&stream, is_cdn) {
                            answer(&request).send(stream, request.method == "HEAD");
                        }
                    });
                }
            });
        }
        Self { url: hub_url, seen }
    }

    pub fn usual(repository: Repository) -> Self {
        Self::new(repository, |_, _| None)
    }

    /// All that was asked so far.
    pub fn seen(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }

    /// The ranges that were asked for of a file's bytes; empty for all of it.
    pub fn ranges_of(&self, file: &str) -> Vec<String> {
        let asked = |request: &Request| request.method == "GET" && request.path.ends_with(&format!("/{file}"));
        self.seen().iter().filter(|request| asked(request)).map(|request| request.header("range").to_owned()).collect()
    }
}

fn read(stream: &TcpStream, is_cdn: bool) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let first = lines.next()?;
    let mut words = first.split(' ').map(str::to_owned);
    let (method, path) = (words.next()?, words.next()?);
    let header = |line: String| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned()));
    let headers = lines.take_while(|line| !line.is_empty()).filter_map(header).collect();
    Some(Request { method, path, headers, is_cdn })
}
