//! Models by name, from a hub that is a thread of the test.
#![cfg(feature = "hub")]

#[path = "common/hub.rs"]
mod server;

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use server::{COMMIT, Reply, Repository, Request, Server};

const MODEL: &str = "model.safetensors";
const PLAN: &str = "plan --model org/name --devices cpu --no-predict";

fn repository(dir: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(dir)
}

fn stories() -> Repository {
    Repository::of(&repository("examples/models/tiny-stories"))
}

/// A user with an empty cache.
struct User {
    home: tempfile::TempDir,
}

impl User {
    fn new() -> Self {
        Self { home: tempfile::tempdir().unwrap() }
    }

    /// The command with words that hold no spaces.
    fn command(&self, endpoint: &str, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_torchless"));
        self.set(&mut command, endpoint);
        command.args(line.split_whitespace());
        command
    }

    fn set(&self, command: &mut Command, endpoint: &str) {
        for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "HF_HUB_ETAG_TIMEOUT"] {
            command.env_remove(name);
        }
        command.env_remove("RUST_BACKTRACE").env_remove("XDG_RUNTIME_DIR").env("HF_HUB_DOWNLOAD_TIMEOUT", "5");
        command.env("HF_HOME", self.home.path()).env("HF_ENDPOINT", endpoint).env("NO_PROXY", "127.0.0.1");
        command.env("TORCHLESS_CACHE", self.home.path().join("torchless")).current_dir(self.home.path());
    }

    fn run(&self, server: &Server, line: &str) -> Run {
        Run::of(&mut self.command(&server.url, line))
    }

    /// With a port that nobody listens at.
    fn run_without_network(&self, line: &str) -> Run {
        Run::of(&mut self.command(&nobody(), line))
    }

    fn cached(&self, path: &str) -> PathBuf {
        self.home.path().join("hub/models--org--name").join(path)
    }

    fn snapshot(&self, file: &str) -> PathBuf {
        self.cached("snapshots").join(COMMIT).join(file)
    }

    /// Every file below the home, links included.
    fn files(&self) -> BTreeSet<PathBuf> {
        fn walk(dir: &Path, files: &mut BTreeSet<PathBuf>) {
            for entry in fs::read_dir(dir).unwrap().map(|entry| entry.unwrap()) {
                if entry.file_type().unwrap().is_dir() { walk(&entry.path(), files) } else { files.extend([entry.path()]) }
            }
        }
        let mut files = BTreeSet::new();
        walk(self.home.path(), &mut files);
        files
    }
}

/// What a run of the command gave.
#[derive(Debug)]
struct Run {
    status: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Run {
    fn of(command: &mut Command) -> Self {
        Self::from(command.output().unwrap())
    }

    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { status: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    #[track_caller]
    fn succeeds(self) -> Self {
        assert_eq!(self.status, Some(0), "{self:?}");
        self
    }

    /// Ends with status 1 and one last sentence that has all the words.
    #[track_caller]
    fn fails_with(self, words: &[&str]) -> Self {
        let last = self.stderr.lines().last().unwrap_or_default();
        let is_told = words.iter().all(|words| last.contains(words));
        assert!(self.status == Some(1) && self.stdout.is_empty() && is_told, "{words:?} are not all told: {self:?}");
        self
    }
}

fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

fn is_bytes_of(request: &Request, file: &str) -> bool {
    request.method == "GET" && request.is_cdn && request.path.ends_with(file)
}

#[test]
fn a_model_is_fetched_once_and_then_found_without_the_network_by_every_verb() {
    let (user, server) = (User::new(), Server::usual(stories()));
    let by_path = format!("plan --model {} --devices cpu --no-predict", repository("examples/models/tiny-stories").display());
    let by_path = user.run_without_network(&by_path).succeeds();
    let fetched = user.run(&server, PLAN).succeeds();
    assert_eq!(fetched.stdout, by_path.stdout);
    assert!(fetched.stderr.contains("torchless: fetching model.safetensors of org/name, 2.8 MiB\n"), "{}", fetched.stderr);

    // As Hugging Face's libraries lay it out, and nothing but what a load needs.
    assert_eq!(fs::read_to_string(user.cached("refs/main")).unwrap(), COMMIT);
    let blob = user.cached("blobs").join(stories().sha256(MODEL));
    assert_eq!(fs::canonicalize(user.snapshot(MODEL)).unwrap(), fs::canonicalize(blob).unwrap());
    let files: BTreeSet<_> = fs::read_dir(user.snapshot("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    let needed = ["config.json", "generation_config.json", MODEL, "tokenizer.json", "tokenizer_config.json"];
    assert_eq!(files, needed.into_iter().map(Into::into).collect());

    let ids = user.home.path().join("ids.json");
    fs::write(&ids, "[1, 5, 9]").unwrap();
    fs::write(user.home.path().join("text"), "Lily had a red ball.").unwrap();
    for line in [
        PLAN,
        "generate --model org/name --devices cpu --prompt Lily --max-tokens 3",
        "logits --model org/name --devices cpu --tokens ids.json --out out.safetensors",
        "perplexity --model org/name --devices cpu --text text",
        "tokenize --model org/name --text Lily",
        "bench --model org/name --devices cpu --prompt-tokens 4 --decode-tokens 2",
    ] {
        let again = user.run_without_network(line).succeeds();
        assert!(!again.stderr.contains("fetching"), "{line}: {}", again.stderr);
    }
}

#[test]
fn shards_are_those_that_the_index_names() {
    let sharded = Repository::of(&repository("tests/fixtures/sharded-f16")).with("model-00009-of-00009.safetensors", "of something else");
    let (user, server) = (User::new(), Server::usual(sharded.clone()));
    let by_path = format!("plan --model {} --devices cpu --no-predict", repository("tests/fixtures/sharded-f16").display());
    assert_eq!(user.run(&server, PLAN).succeeds().stdout, user.run_without_network(&by_path).succeeds().stdout);
    assert!(!user.snapshot("model-00009-of-00009.safetensors").exists());
    user.run_without_network(PLAN).succeeds();

    // A shard that the cache has lost is fetched again, and only that.
    let shard = "model-00003-of-00004.safetensors";
    fs::remove_file(fs::canonicalize(user.snapshot(shard)).unwrap()).unwrap();
    let asked = server.seen().len();
    user.run(&server, PLAN).succeeds();
    let bytes = server.seen().split_off(asked).into_iter().filter(|request| request.method == "GET" && request.is_cdn);
    assert_eq!(bytes.map(|request| request.path).collect::<Vec<_>>(), [format!("/large/{shard}")]);

    let without: Repository = Repository(sharded.0.into_iter().filter(|(name, _)| name != shard).collect());
    User::new().run(&Server::usual(without), PLAN).fails_with(&["names the shard", shard]);
}

#[test]
fn a_tokenizer_is_fetched_without_the_weights() {
    let (user, server) = (User::new(), Server::usual(stories()));
    let line = "tokenize --model org/name --text Lily";
    let first = user.run(&server, line).succeeds();
    assert_eq!(user.run_without_network(line).succeeds().stdout, first.stdout);
    assert!(server.seen().iter().all(|request| !request.path.ends_with(MODEL)));
    // The weights still come when they are needed.
    user.run_without_network(PLAN).fails_with(&["org/name", "cannot be reached"]);
    user.run(&server, PLAN).succeeds();
    assert_eq!(server.ranges_of("tokenizer.json").len(), 1);
}

#[test]
fn the_token_is_for_the_hub_alone() {
    let (user, server) = (User::new(), Server::usual(stories()));
    Run::of(user.command(&server.url, PLAN).env("HF_TOKEN", " hf_secret\n")).succeeds();
    for request in server.seen() {
        let expected = if request.is_cdn { "" } else { "Bearer hf_secret" };
        assert_eq!(request.header("authorization"), expected, "{} {}", request.method, request.path);
    }
    assert!(server.seen().iter().any(|request| request.is_cdn));

    let (user, server) = (User::new(), Server::usual(stories()));
    fs::write(user.home.path().join("token"), "hf_from_file\n").unwrap();
    user.run(&server, PLAN).succeeds();
    assert_eq!(server.seen()[0].header("authorization"), "Bearer hf_from_file");
}

/// Cuts the first `times` transfers of the model in the middle of what they would send.
fn cutting(times: usize) -> Server {
    let left = AtomicUsize::new(times);
    Server::new(stories(), move |request, usual| {
        let is_cut = is_bytes_of(request, MODEL) && left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok();
        is_cut.then(|| Reply { cut: usual.body.len() / 2, ..usual.clone() })
    })
}

/// Where each transfer of the model began.
fn starts(server: &Server) -> Vec<u64> {
    let start = |range: &String| range.strip_prefix("bytes=").map_or(0, |range| range.trim_end_matches('-').parse().unwrap());
    server.ranges_of(MODEL).iter().map(start).collect()
}

#[test]
fn a_download_that_is_cut_goes_on_where_it_ended() {
    let whole = stories().0[MODEL].len() as u64;
    let (user, server) = (User::new(), cutting(2));
    user.run(&server, PLAN).succeeds();
    assert_eq!(starts(&server), [0, whole / 2, whole - whole / 4]);

    // Cut too often it is an error; the next call, at a sound server, fetches the rest.
    let (user, server) = (User::new(), cutting(usize::MAX));
    let kept = user.cached("blobs").join(format!("{}.incomplete", stories().sha256(MODEL)));
    user.run(&server, PLAN).fails_with(&[
        "org/name",
        MODEL,
        "was cut off 4 times",
        &format!("of {whole} bytes are here, and the next call goes on"),
    ]);
    let here = fs::metadata(&kept).unwrap().len();
    assert!(here > whole / 2 && here < whole, "{here} of {whole}");
    assert!(!user.snapshot(MODEL).exists() && !user.cached("refs/main").exists());
    let server = Server::usual(stories());
    let rest = user.run(&server, PLAN).succeeds();
    assert_eq!(starts(&server), [here]);
    assert!(rest.stderr.contains("are here"), "{}", rest.stderr);
    assert!(!kept.exists());
}

#[test]
fn what_was_kept_is_not_trusted() {
    let model = stories().0[MODEL].clone();
    let range_refused = |request: &Request, _: &Reply| {
        let is_refused = is_bytes_of(request, MODEL) && !request.header("range").is_empty();
        is_refused.then(|| Reply::new(200, &[], stories().0[MODEL].clone()))
    };
    let longer = [model.clone(), vec![0]].concat();
    for (what, kept, server) in [
        ("other bytes", vec![7; 1000], Server::usual(stories())),
        ("as many other bytes", vec![7; model.len()], Server::usual(stories())),
        ("more bytes", longer, Server::usual(stories())),
        ("a part that the server can't go on with", model[..1000].to_vec(), Server::new(stories(), range_refused)),
        ("the whole", model.clone(), Server::usual(stories())),
    ] {
        let user = User::new();
        fs::create_dir_all(user.cached("blobs")).unwrap();
        fs::write(user.cached("blobs").join(format!("{}.incomplete", stories().sha256(MODEL))), kept).unwrap();
        let run = user.run(&server, PLAN);
        assert_eq!(run.status, Some(0), "{what}: {run:?}");
        assert!(fs::read(user.snapshot(MODEL)).unwrap() == model, "{what}");
    }
}

#[test]
fn what_is_not_what_the_hub_says_is_never_taken_for_the_file() {
    type Change = fn(&Request, &Reply) -> Option<Reply>;
    let cases: [(&str, Change, &[&str]); 5] = [
        (
            "fewer bytes",
            |q, r| is_bytes_of(q, MODEL).then(|| Reply { body: r.body[..1000].to_vec(), ..r.clone() }),
            &["the server sent 4000 of 2892992 bytes", "4000 of 2892992 bytes are here"],
        ),
        (
            "more bytes",
            |q, r| is_bytes_of(q, MODEL).then(|| Reply::new(200, &[], [&r.body[..], b"x"].concat())),
            &["more than the 2892992 bytes"],
        ),
        ("other bytes", |q, r| is_bytes_of(q, MODEL).then(|| Reply::new(200, &[], vec![7; r.body.len()])), &["SHA-256", "thrown away"]),
        (
            "another part",
            |q, r| match is_bytes_of(q, MODEL) {
                true if q.header("range").is_empty() => Some(Reply { cut: 1000, ..r.clone() }),
                true => Some(Reply::new(206, &[("content-range", "bytes 0-2892991/2892992")], &r.body[..])),
                false => None,
            },
            &["asked for \"model.safetensors\" from byte 1000", "bytes 0-2892991/2892992"],
        ),
        (
            "a small file that is cut",
            |q, r| (q.method == "GET" && q.path.ends_with("/config.json")).then(|| Reply::new(200, &[], &r.body[..10])),
            &["config.json", "10 of 600 bytes"],
        ),
    ];
    for (what, change, words) in cases {
        let user = User::new();
        let run = user.run(&Server::new(stories(), change), PLAN).fails_with(words);
        assert!(!user.snapshot(MODEL).exists() && !user.cached("refs/main").exists(), "{what}: {run:?}");
        user.run(&Server::usual(stories()), PLAN).succeeds();
    }
}

#[cfg(unix)]
#[test]
fn a_full_disk_is_told_and_what_was_written_is_kept() {
    let (user, server) = (User::new(), Server::usual(stories()));
    let mut shell = Command::new("sh");
    user.set(&mut shell, &server.url);
    // A limit of the size of files stands for a disk that is full; the signal that comes with it is ignored.
    let script = format!("trap '' XFSZ; ulimit -f 2048; exec {} {PLAN}", env!("CARGO_BIN_EXE_torchless"));
    Run::of(shell.args(["-c", &script])).fails_with(&["cannot write", ".incomplete", "File too large"]);
    assert!(!user.snapshot(MODEL).exists());
    user.run(&server, PLAN).succeeds();
    assert!(*starts(&server).last().unwrap() > 0, "{:?}", starts(&server));
}

#[test]
fn two_that_want_the_same_model_fetch_it_once() {
    let (user, server) = (User::new(), Server::usual(stories()));
    let start =
        || user.command(&server.url, PLAN).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let runs = [start(), start(), start()].map(|child| Run::from(child.wait_with_output().unwrap()).succeeds());
    assert!(runs.iter().all(|run| run.stdout == runs[0].stdout));
    assert_eq!(server.ranges_of(MODEL), [""]);
}

#[test]
fn refusals_are_told_by_name() {
    let list = "/api/models/org/name/revision/main";
    let of_file = |request: &Request| request.path.ends_with(MODEL);
    let refusing = |status: u16, code: &'static str| {
        let headers = [("x-error-code", code)];
        Server::new(stories(), move |request, _| {
            (request.path == list).then(|| Reply::new(status, &headers[..headers.len() * usize::from(!code.is_empty())], "no"))
        })
    };
    let gated =
        || Server::new(stories(), move |request, _| of_file(request).then(|| Reply::new(403, &[("x-error-code", "GatedRepo")], "no")));
    let without = |status: u16| Server::new(stories(), move |request, _| of_file(request).then(|| Reply::new(status, &[], "no")));
    let listing = |text: &'static str| Server::new(stories(), move |request, _| (request.path == list).then(|| Reply::new(200, &[], text)));
    for (server, token, words) in [
        (refusing(404, "RepoNotFound"), "", ["no such public model (404)", "nothing lies at the path org/name"]),
        (refusing(401, "RepoNotFound"), "", ["no such public model (401)", "set HF_TOKEN"]),
        (refusing(401, ""), "", ["no such public model (401)", "check the name"]),
        (refusing(404, "RepoNotFound"), "hf_x", ["no such model", "none that the token's account may see"]),
        (refusing(401, ""), "hf_x", ["doesn't accept the token (401)", "check HF_TOKEN"]),
        (refusing(404, "RevisionNotFound"), "", ["no branch main", "org/name"]),
        (refusing(403, "GatedRepo"), "", ["it is gated (403)", "set HF_TOKEN"]),
        (refusing(503, ""), "", ["cannot be reached", "503"]),
        (refusing(429, ""), "", ["cannot be reached", "429"]),
        (refusing(418, ""), "", ["answers with 418", "org/name"]),
        (gated(), "", ["accept its terms at", "set HF_TOKEN"]),
        (gated(), "hf_x", ["the token's account may not read it (403)", "accept its terms at"]),
        (without(404), "", ["lists the file \"model.safetensors\"", "(404)"]),
        (without(500), "", ["asked for \"model.safetensors\"", "500"]),
        (listing("{}"), "", ["sends no list of files", "missing field"]),
        (listing("<html>"), "", ["sends no list of files", "expected value"]),
    ] {
        let user = User::new();
        let mut command = user.command(&server.url, PLAN);
        if !token.is_empty() {
            command.env("HF_TOKEN", token);
        }
        let run = Run::of(&mut command).fails_with(&words);
        assert!(!run.stderr.contains("hf_x"), "{run:?}");
    }
}

#[test]
fn without_a_network_it_is_told_at_once_and_what_is_in_the_cache_still_runs() {
    let local = "the path of a local copy needs no network";
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silence = format!("http://{}", silent.local_addr().unwrap());
    let server = Server::usual(stories());
    let user = User::new();
    for (endpoint, offline, words) in [
        (nobody(), "0", "refused"),
        (silence, "0", "no answer in time"),
        ("http://no-such-host.invalid".into(), "0", "no-such-host.invalid cannot be reached"),
        (server.url.clone(), "1", "HF_HUB_OFFLINE is set"),
    ] {
        let start = Instant::now();
        let run = Run::of(user.command(&endpoint, PLAN).env("HF_HUB_OFFLINE", offline).env("HF_HUB_ETAG_TIMEOUT", "1"));
        run.fails_with(&["org/name", &endpoint, words, local]);
        assert!(start.elapsed() < Duration::from_secs(8), "{endpoint}: {:?}", start.elapsed());
    }
    assert!(server.seen().is_empty());
    Run::of(&mut user.command("hub.example", PLAN)).fails_with(&["HF_ENDPOINT", "hub.example"]);

    // The bytes may begin and then stop.
    let stalled = Server::new(stories(), |request, usual| {
        is_bytes_of(request, MODEL).then(|| Reply { cut: 1000, hold: Duration::from_secs(3), ..usual.clone() })
    });
    let run = Run::of(user.command(&stalled.url, PLAN).env("HF_HUB_DOWNLOAD_TIMEOUT", "1"));
    run.fails_with(&[MODEL, "was cut off 4 times", "no answer in time", "4000 of 2892992 bytes are here"]);

    user.run(&server, PLAN).succeeds();
    Run::of(user.command(&server.url, PLAN).env("HF_HUB_OFFLINE", "1")).succeeds();
}

#[test]
fn a_path_that_exists_goes_before_a_name() {
    let (user, server) = (User::new(), Server::usual(stories()));
    let dir = user.home.path().join("org/name");
    fs::create_dir_all(&dir).unwrap();
    // What is there is taken, even if it is no model.
    user.run(&server, PLAN).fails_with(&["config.json"]);
    for (name, content) in stories().0 {
        fs::write(dir.join(name), content).unwrap();
    }
    user.run(&server, PLAN).succeeds();
    assert!(server.seen().is_empty());
    assert!(!user.home.path().join("hub").exists());
}

#[test]
fn what_is_neither_a_path_nor_a_name_is_told_with_the_form() {
    let (user, server) = (User::new(), Server::usual(stories()));
    for name in ["nowhere", "./org/name", "/org/name", "a/b/c", "org/name:../x.gguf", "org/name:/x.gguf"] {
        for line in [format!("plan --model {name} --devices cpu"), format!("tokenize --model {name} --text a")] {
            user.run(&server, &line).fails_with(&[&format!("cannot open {name}"), "No such file", "org/name:file.gguf"]);
        }
    }
    assert!(server.seen().is_empty());
}

#[test]
fn names_from_the_hub_never_lead_out_of_the_cache() {
    fn listed(sha: &'static str, file: &'static str) -> Server {
        Server::new(stories(), move |request, _| {
            let json = serde_json::json!({"sha": sha, "siblings": [{"rfilename": "config.json"}, {"rfilename": file}]});
            request.path.starts_with("/api/").then(|| Reply::new(200, &[], json.to_string()))
        })
    }
    fn tagged(etag: &'static str) -> Server {
        Server::new(stories(), move |request, usual| {
            let size = usual.body.len().to_string();
            (request.method == "HEAD").then(|| Reply::new(200, &[("etag", etag), ("content-length", &size)], ""))
        })
    }
    let sharded = Repository::of(&repository("tests/fixtures/sharded-f16"));
    let index = String::from_utf8(sharded.0["model.safetensors.index.json"].clone()).unwrap();
    let index = |shard: &str| {
        Server::usual(sharded.clone().with("model.safetensors.index.json", index.replace("model-00002-of-00004.safetensors", shard)))
    };
    let sent_on = |to: &'static str| {
        Server::new(stories(), move |request, _| (request.method == "HEAD").then(|| Reply::new(307, &[("location", to)], "")))
    };
    for (server, words) in [
        (listed(COMMIT, "../x.gguf"), "lists a file \"../x.gguf\""),
        (listed(COMMIT, "a/../../x.gguf"), "lists a file \"a/../../x.gguf\""),
        (listed(COMMIT, "/tmp/x.gguf"), "lists a file \"/tmp/x.gguf\""),
        (listed(COMMIT, "..\\x.gguf"), "lists a file \"..\\\\x.gguf\""),
        (listed(COMMIT, "C:x.gguf"), "lists a file \"C:x.gguf\""),
        (listed("../../../x", MODEL), "its commit is called \"../../../x\""),
        (listed("", MODEL), "its commit is called \"\""),
        (listed("..", MODEL), "its commit is called \"..\""),
        (tagged("\"../../../../x\""), "has the etag \"../../../../x\""),
        (tagged("\"\""), "has the etag \"\""),
        (index("../model-00002-of-00004.safetensors"), "a file name without any directory is needed"),
        (index("/etc/passwd"), "a file name without any directory is needed"),
        (sent_on("file:///etc/passwd"), "sends on to nowhere"),
        (sent_on("//evil.example/x"), "sends on to nowhere"),
        (sent_on("/again"), "sends on again and again"),
    ] {
        let user = User::new();
        user.run(&server, PLAN).fails_with(&[words]);
        let inside = [user.cached(""), user.home.path().join("hub/.locks/models--org--name")];
        let files = user.files();
        assert!(files.iter().all(|file| inside.iter().any(|dir| file.starts_with(dir))), "{words}: {files:?}");
    }
}

#[test]
fn a_gguf_file_is_fetched_by_name_with_all_its_parts() {
    let parts = ["q/a-00001-of-00002.gguf", "q/a-00002-of-00002.gguf"];
    let ggufs = Repository::default().with("README.md", "").with("b.gguf", "no GGUF").with(parts[0], "nor this").with(parts[1], "nor that");
    let server = Server::usual(ggufs.clone());
    let user = User::new();
    user.run(&server, PLAN).fails_with(&["its .gguf files are b.gguf, q/a-00001-of-00002.gguf; name one, such as org/name:b.gguf"]);
    user.run(&server, "plan --model org/name:c.gguf --devices cpu").fails_with(&["it has no file \"c.gguf\"", "b.gguf"]);
    user.run(&server, "plan --model org/name:README.md --devices cpu").fails_with(&["only a .gguf file"]);
    assert!(!user.cached("snapshots").exists());

    // They are no GGUF files, and so not loaded; but they are the files that were named.
    user.run(&server, "plan --model org/name:b.gguf --devices cpu").fails_with(&["b.gguf"]);
    assert_eq!(fs::read(user.snapshot("b.gguf")).unwrap(), b"no GGUF");
    user.run(&server, "plan --model org/name:q/a-00002-of-00002.gguf --devices cpu").fails_with(&["a-00001-of-00002.gguf"]);
    for part in parts {
        assert_eq!(fs::read(user.snapshot(part)).unwrap(), ggufs.0[part], "{part}");
    }
    let again = user.run_without_network("plan --model org/name:b.gguf --devices cpu").fails_with(&["b.gguf"]);
    assert!(!again.stderr.contains("cannot be reached"), "{again:?}");
    // Which of several is meant is not guessed.
    user.run_without_network(PLAN).fails_with(&["cannot be reached"]);

    let one = Repository::default().with("config.json", "{}").with("only.gguf", "no GGUF");
    let user = User::new();
    user.run(&Server::usual(one), PLAN).fails_with(&["only.gguf"]);
    let again = user.run_without_network(PLAN).fails_with(&["only.gguf"]);
    assert!(!again.stderr.contains("cannot be reached"), "{again:?}");
}
