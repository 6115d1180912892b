//! [`Client`]: what the hub is asked, and what its refusals mean.

use std::io::Read;
use std::time::Duration;

use serde::Deserialize;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{HeaderMap, Response, StatusCode};
use ureq::typestate::WithoutBody;
use ureq::{Agent, Body, RequestBuilder};

use super::cache::is_plain;
use super::name::{ModelName, stays_inside};
use super::select::Names;
use super::settings::Settings;
use crate::error::{Error, Result};

/// How long a connection may take to be made, and a name to be looked up.
const CONNECT: Duration = Duration::from_secs(5);
/// Most bytes of a list of files, and how long it may take.
const LIST_LIMIT: u64 = 20_000_000;
const LIST_TIME: Duration = Duration::from_secs(60);
/// How many addresses a file may be sent on to.
const HOPS: u32 = 6;

/// One model at the hub.
pub(super) struct Client<'a> {
    model: &'a ModelName,
    settings: &'a Settings,
    agent: Agent,
}

/// A repository as it was at one commit.
pub(super) struct Listing {
    pub commit: String,
    pub files: Names,
}

/// Where a file's bytes are, and what they must be.
pub(super) struct Source {
    url: String,
    /// Whether that is the hub itself, which alone may see the token.
    is_hub: bool,
    /// Without its quotes; of large files the SHA-256.
    pub etag: String,
    pub size: u64,
}

/// The answer to [`Client::open`].
pub(super) struct Opened {
    /// Which byte of the file comes first.
    pub start: u64,
    pub bytes: Box<dyn Read>,
}

/// Why a file doesn't come.
pub(super) enum Stop {
    /// It may be worth another attempt.
    Cut(String),
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl<'a> Client<'a> {
    pub fn new(model: &'a ModelName, settings: &'a Settings) -> Result<Self> {
        let endpoint = &settings.endpoint;
        let is_https = endpoint.starts_with("https://");
        if !is_https && !endpoint.starts_with("http://") {
            return Err(Error::hub(model.to_string(), format!("HF_ENDPOINT is {endpoint:?}; an address with https:// is needed")));
        }
        let config = Agent::config_builder()
            .user_agent(concat!("torchless/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            .https_only(is_https)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .max_redirects(HOPS)
            .timeout_resolve(Some(CONNECT))
            .timeout_connect(Some(CONNECT))
            .timeout_send_request(Some(settings.answer))
            .timeout_recv_response(Some(settings.answer))
            .timeout_per_read(Some(settings.silence))
            .build();
        Ok(Self { model, settings, agent: config.into() })
    }

    /// The files of the repository's main branch.
    pub fn list(&self) -> Result<Listing> {
        #[derive(Deserialize)]
        struct Info {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }

        let url = format!("{}/api/models/{}/revision/main", self.settings.endpoint, self.model.repository);
        let request = self.prepared(self.agent.get(url), true).config().timeout_recv_body(Some(LIST_TIME)).build();
        let mut response = request.call().map_err(|e| self.unreachable(plain(e)))?;
        if response.status() != StatusCode::OK {
            return Err(self.refused(response.status(), response.headers(), None));
        }
        let mut json = Vec::new();
        let body = response.body_mut().as_reader();
        body.take(LIST_LIMIT + 1).read_to_end(&mut json).map_err(|e| self.unreachable(plain(e.into())))?;
        if json.len() as u64 > LIST_LIMIT {
            return Err(self.failed(format!("its list of files has more than {LIST_LIMIT} bytes")));
        }
        let Info { sha, siblings } =
            serde_json::from_slice(&json).map_err(|e| self.failed(format!("{} sends no list of files: {e}", self.settings.endpoint)))?;
        if !is_plain(&sha) {
            return Err(self.failed(format!("its commit is called {sha:?}, which is no hash")));
        }
        let files: Names = siblings.into_iter().map(|file| file.rfilename).collect();
        match files.iter().find(|file| !stays_inside(file)) {
            Some(file) => Err(self.failed(format!("it lists a file {file:?}, which would not stay in its directory"))),
            None => Ok(Listing { commit: sha, files }),
        }
    }

    /// Where a file is. Asked without following, because the hub's own answer says what the file is, and the token is for it alone.
    pub fn locate(&self, commit: &str, file: &str) -> Result<Source, Stop> {
        let mut url = format!("{}/{}/resolve/{commit}/{}", self.settings.endpoint, self.model.repository, encoded(file));
        let wrong = |what: &str| Stop::Failed(self.failed(format!("the hub's answer about {file:?} {what}")));
        for _ in 0..HOPS {
            let is_hub = origin(&url) == origin(&self.settings.endpoint);
            let request = self.prepared(self.agent.head(&url), is_hub).config().max_redirects(0).max_redirects_will_error(false).build();
            let response = request.call().map_err(|e| Stop::Cut(plain(e)))?;
            let (status, headers) = (response.status(), response.headers());
            if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
                return Err(Stop::Cut(format!("it answers with {status}")));
            }
            if !status.is_success() && !status.is_redirection() {
                return Err(self.refused(status, headers, Some(file)).into());
            }
            let linked = text(headers, "x-linked-etag").zip(text(headers, "x-linked-size"));
            let named = match linked {
                None if status.is_success() => text(headers, "etag").zip(text(headers, "content-length")),
                linked => linked,
            };
            let next = status.is_redirection().then(|| text(headers, "location").and_then(|to| joined(&url, to)));
            let next = next.map(|next| next.ok_or_else(|| wrong("sends on to nowhere"))).transpose()?;
            if let Some((etag, size)) = named {
                let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
                let size = size.parse().map_err(|_| wrong("has a size that is no number"))?;
                if !is_plain(&etag) {
                    return Err(wrong(&format!("has the etag {etag:?}, which cannot be a file's name")));
                }
                let url = next.unwrap_or(url);
                let is_hub = origin(&url) == origin(&self.settings.endpoint);
                return Ok(Source { url, is_hub, etag, size });
            }
            url = next.ok_or_else(|| wrong("has no etag or no size"))?;
        }
        Err(wrong("sends on again and again"))
    }

    /// The bytes of a file from `start` on, or all of them, if the server doesn't send parts.
    pub fn open(&self, source: &Source, file: &str, start: u64) -> Result<Opened, Stop> {
        let request = self.prepared(self.agent.get(&source.url), source.is_hub);
        let request = if start > 0 { request.header("range", format!("bytes={start}-")) } else { request };
        let response: Response<Body> = request.call().map_err(|e| Stop::Cut(plain(e)))?;
        let start = match response.status() {
            StatusCode::OK => 0,
            StatusCode::PARTIAL_CONTENT => {
                let range = text(response.headers(), "content-range").unwrap_or_default();
                let is_asked = range.starts_with(&format!("bytes {start}-")) && range.ends_with(&format!("/{}", source.size));
                if !is_asked {
                    let asked = format!("asked for {file:?} from byte {start} of {} on, the server sends {range:?}", source.size);
                    return Err(self.failed(asked).into());
                }
                start
            }
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                return Err(Stop::Cut(format!("the server answers with {status}")));
            }
            status => return Err(self.refused(status, response.headers(), Some(file)).into()),
        };
        Ok(Opened { start, bytes: Box::new(response.into_body().into_reader()) })
    }

    fn prepared(&self, request: RequestBuilder<WithoutBody>, is_hub: bool) -> RequestBuilder<WithoutBody> {
        // As they are: sizes and ranges are those of the file.
        let request = request.header("accept-encoding", "identity");
        match &self.settings.token {
            Some(token) if is_hub => request.header("authorization", format!("Bearer {token}")),
            _ => request,
        }
    }

    pub fn failed(&self, problem: impl Into<String>) -> Error {
        Error::hub(self.model.to_string(), problem)
    }

    pub fn unreachable(&self, problem: impl Into<String>) -> Error {
        let endpoint = self.settings.endpoint.clone();
        Error::HubUnreachable { model: self.model.to_string(), endpoint, problem: problem.into() }
    }

    /// What a status means that is no success.
    fn refused(&self, status: StatusCode, headers: &HeaderMap, file: Option<&str>) -> Error {
        let (endpoint, has_token) = (&self.settings.endpoint, self.settings.token.is_some());
        let code = text(headers, "x-error-code").unwrap_or_default();
        if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
            return self.unreachable(format!("it answers with {status}"));
        }
        let page = format!("{endpoint}/{}", self.model.repository);
        let status = status.as_u16();
        self.failed(match (status, code, file) {
            (_, "GatedRepo", _) | (403, _, Some(_)) if has_token => {
                format!("it is gated, and the token's account may not read it ({status}): accept its terms at {page}")
            }
            (_, "GatedRepo", _) | (401 | 403, _, Some(_)) => {
                format!("it is gated ({status}): accept its terms at {page}, and set HF_TOKEN to a token of the account that did")
            }
            (_, "RevisionNotFound", _) => format!("{page} is there, but has no branch main ({status})"),
            (404, _, Some(file)) => format!("{page} lists the file {file:?}, but doesn't have it (404)"),
            (401 | 403, "RepoNotFound", None) | (404, _, None) if has_token => {
                format!("{endpoint} has no such model, or none that the token's account may see ({status})")
            }
            (401 | 403, "", None) if has_token => format!("{endpoint} doesn't accept the token ({status}); check HF_TOKEN"),
            (401 | 403 | 404, _, None) => {
                format!("{endpoint} has no such public model ({status}): check the name, or set HF_TOKEN if the model is private")
            }
            _ => format!("{endpoint} answers with {status}"),
        })
    }
}

/// A network error without what its type is called.
pub(super) fn plain(error: ureq::Error) -> String {
    match error {
        ureq::Error::Io(e) => e.to_string(),
        ureq::Error::Timeout(step) => format!("no answer in time ({step})"),
        ureq::Error::HostNotFound => "its name cannot be resolved".into(),
        other => other.to_string(),
    }
}

fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// Scheme, host and port of an address.
fn origin(url: &str) -> Option<&str> {
    let host = url.find("://")? + 3;
    let end = url[host..].find(['/', '?', '#']).map_or(url.len(), |end| host + end);
    Some(&url[..end])
}

/// Where an address sends on to: to another host, or to another path of its own.
fn joined(from: &str, to: &str) -> Option<String> {
    if to.starts_with("https://") || to.starts_with("http://") {
        return Some(to.to_owned());
    }
    let is_path = to.starts_with('/') && !to.starts_with("//");
    if is_path { Some(format!("{}{to}", origin(from)?)) } else { None }
}

/// A file's name as a part of an address.
fn encoded(file: &str) -> String {
    let encode = |byte: u8| match byte {
        b'/' | b'-' | b'_' | b'.' | b'~' => char::from(byte).to_string(),
        _ if byte.is_ascii_alphanumeric() => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    file.bytes().map(encode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_joined_within_an_origin_and_never_beside_it() {
        let from = "https://hub.example/org/name/resolve/main/x";
        assert_eq!(joined(from, "/api/y?z").as_deref(), Some("https://hub.example/api/y?z"));
        assert_eq!(joined(from, "https://cdn.example/y").as_deref(), Some("https://cdn.example/y"));
        for nowhere in ["//evil.example/y", "y", "ftp://x", ""] {
            assert_eq!(joined(from, nowhere), None, "{nowhere:?}");
        }
        assert_eq!(origin(from), Some("https://hub.example"));
        assert_eq!(origin("https://hub.example"), origin("https://hub.example?x/y"));
        assert_ne!(origin("https://hub.example.evil/"), origin(from));
        assert_ne!(origin("https://hub.example@evil.example/"), origin(from));
        assert_ne!(origin("http://hub.example/"), origin(from));
        assert_eq!(encoded("a b/c#?%\u{e4}.gguf"), "a%20b/c%23%3F%25%C3%A4.gguf");
    }
}
