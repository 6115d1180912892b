//! The command as its users meet it: arguments in; text, files and a status out.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::fixture::{cases, gap, path, stories};
use safetensors::SafeTensors;
use serde_json::{Value, json};

/// What a run of the command gave.
struct Run {
    status: i32,
    stdout: String,
    stderr: String,
}

impl Run {
    fn json(&self) -> Value {
        assert_eq!(self.status, 0, "{}", self.stderr);
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {:?}", self.stdout))
    }
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_torchless"));
    // Without the directory some graphics drivers complain on stderr of their own accord.
    command.args(args).env_remove("RUST_BACKTRACE").env_remove("XDG_RUNTIME_DIR");
    command
}

fn run(args: &[&str]) -> Run {
    output(command(args))
}

fn output(mut command: Command) -> Run {
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Run { status: output.status.code().unwrap(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// A trace of 8 ms: a rank that computes three quarters of it.
const TRACE: &str = r#"{"traceEvents": [
    {"name": "thread_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": "stage 0 rank 0 (cpu)"}},
    {"ph": "X", "cat": "compute", "ts": 2000, "dur": 6000, "args": {"stage": 0, "rank": 0, "micro_batch": 9, "rows": 4}},
    {"ph": "X", "cat": "write", "ts": 8000, "dur": 2000, "args": {"stage": 0, "rank": 0, "micro_batch": 10, "rows": 4}}]}"#;

/// Arguments in one string, with `{model}` for tiny-stories, `{ids}` for a file with `[1, 5, 9]`, `{trace}` for one with [`TRACE`] and
/// `{dir}` for an empty directory.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("empty")).unwrap();
        std::fs::write(dir.path().join("ids.json"), "[1, 5, 9]").unwrap();
        std::fs::write(dir.path().join("trace.json"), TRACE).unwrap();
        Self { dir }
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    fn run(&self, line: &str) -> Run {
        let fill = |word: &str| {
            word.replace("{model}", &stories().display().to_string())
                .replace("{mistral}", &path("tiny-mistral").display().to_string())
                .replace("{ids}", &self.dir.path().join("ids.json").display().to_string())
                .replace("{trace}", &self.dir.path().join("trace.json").display().to_string())
                .replace("{dir}", &self.dir.path().join("empty").display().to_string())
        };
        let words: Vec<String> = line.split_whitespace().map(fill).collect();
        let mut command = command(&words.iter().map(String::as_str).collect::<Vec<_>>());
        // What earlier runs have measured is not this one's.
        command.env("TORCHLESS_CACHE", self.dir.path().join("cache"));
        output(command)
    }

    fn left_behind(&self) -> Vec<std::ffi::OsString> {
        std::fs::read_dir(self.dir.path().join("empty")).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    }
}

/// Runs each line, which must fail with `status` and one sentence that contains the words.
fn assert_fails(status: i32, rows: &[(&str, &str)]) {
    let bench = Bench::new();
    let mut wrong = Vec::new();
    for (line, words) in rows {
        let run = bench.run(line);
        let one_sentence = run.stderr.starts_with("torchless: ") && run.stderr.matches('\n').count() == 1;
        if run.status != status || !run.stdout.is_empty() || !one_sentence || !run.stderr.contains(words) {
            wrong.push(format!("{line}\n  status {}, stdout {:?}, stderr {:?}", run.status, run.stdout, run.stderr));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(bench.left_behind().is_empty(), "{:?}", bench.left_behind());
}

#[test]
fn wrong_usage_is_one_sentence_and_status_2() {
    assert_fails(
        2,
        &[
            ("", "which verb?"),
            ("sing", "sing"),
            ("devices --loud", "--loud"),
            ("generate --model {model}", "--prompt"),
            ("generate --prompt a", "--model"),
            ("plan", "--model"),
            ("generate --model {model} --prompt a --exact --fast", "--fast"),
            ("generate --model {model} --prompt a --temperature -1", "temperature -1"),
            ("generate --model {model} --prompt a --temperature warm", "warm"),
            ("generate --model {model} --prompt a --top-p 1.5", "top_p 1.5"),
            ("generate --model {model} --prompt a --min-p -0.5", "min_p -0.5"),
            ("generate --model {model} --prompt a --repetition-penalty 0", "repetition_penalty 0"),
            ("generate --model {model} --prompt a --devices cpu --stop=", "stop"),
            ("generate --model {model} --prompt a --stages 0", "--stages"),
            ("generate --model {model} --prompt a --threads 0", "--threads"),
            ("generate --model {model} --prompt a --context 0", "--context"),
            ("generate --model {model} --prompt a --kv f64", "f64"),
            ("plan --model {model} --shares half", "half"),
            ("plan --model {model} --devices cpu --predict --batch 0", "--batch"),
            ("tune --devices cpu --rounds 5", "--rounds"),
            ("generate --model {model} --prompt a --speculate 33", "0..=32"),
            ("perplexity --model {model}", "--text"),
            ("perplexity --model {model} --text {ids} --window 1 --devices cpu", "a window of 1 tokens scores nothing"),
            ("tokenize --model {model}", "--text"),
            ("tokenize --model {model} --text a --file b", "--file"),
            ("logits --model {model} --tokens {ids}", "--out"),
            ("bench --model {model} --batch 0", "1..=4096"),
            ("bench --model {model} --decode-tokens 0", "--decode-tokens"),
            ("timeline", "<FILE>"),
            ("timeline {trace} --from 5 --to 5", "to 5 makes no sense"),
            ("timeline {trace} --from 900", "from 900 makes no sense"),
            ("timeline {trace} --to nan", "to NaN makes no sense"),
            ("timeline {trace} --to soon", "soon"),
        ],
    );
}

#[test]
fn a_failure_is_one_sentence_and_status_1() {
    assert_fails(
        1,
        &[
            ("plan --model nowhere --devices cpu", "nowhere"),
            ("logits --model {model} --devices cpu --tokens {ids} --out {ids}", "is read"),
            ("logits --model {model} --devices cpu --tokens {ids} --out {model}/model.safetensors", "is read"),
            ("bench --model {model} --devices cpu --trace {model}/model.safetensors", "is read"),
            ("timeline {trace} -o {trace}", "is read"),
            ("generate --model {model} --devices cpu --prompt=", "the prompt is empty"),
            ("plan --model {dir} --devices cpu", "config.json"),
            ("plan --model {model} --devices tpu", "\"tpu\""),
            ("tune --devices cpu", "one kernel for each format"),
            ("plan --model {model} --devices gpu:999", "gpu:999"),
            ("plan --model {model} --devices=", "device list is empty"),
            ("plan --model {model} --devices cpu,cpu,cpu --stages 2", "2 stages"),
            ("plan --model {model} --devices cpu,cpu --shares 1", "shares"),
            ("plan --model {model} --devices cpu,cpu --shares 1,-1", "shares"),
            ("plan --model {model} --devices cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu", "9 ranks"),
            ("generate --model {mistral} --prompt a --devices cpu", "tokenizer.json"),
            ("tokenize --model nowhere --text a", "nowhere"),
            ("tokenize --model {model} --file nowhere", "nowhere"),
            ("tokenize --model {model} --file {dir}", "cannot read"),
            ("tokenize --model {model} --file /dev/zero", "larger than"),
            ("tokenize --model {model} --decode /dev/zero", "larger than"),
            ("tokenize --model {model} --decode {model}/config.json", "JSON array of token ids"),
            ("logits --model {mistral} --tokens nowhere --out {dir}/l", "nowhere"),
            ("logits --model {mistral} --tokens {ids} --out {dir}/a/b --devices cpu", "cannot write"),
            ("logits --model {mistral} --tokens {ids} --out {dir} --devices cpu", "cannot write"),
            ("bench --model {model} --devices cpu --prompt-tokens 512", "context of 512"),
            ("generate --model {model} --prompt a --devices cpu --trace {dir}/a/b", "cannot write"),
            ("timeline nowhere", "nowhere"),
            ("timeline {dir}", "not a regular file"),
            ("timeline /dev/zero", "not a regular file"),
            ("timeline {ids}", "ids.json is no trace that can be drawn"),
            ("timeline {model}/config.json", "missing field `traceEvents`"),
            ("timeline {model}/model.safetensors", "no trace that can be drawn"),
            ("timeline {trace} -o {dir}/a/b", "cannot write"),
        ],
    );
}

#[test]
fn ids_that_a_model_does_not_have_are_refused() {
    let bench = Bench::new();
    for (content, words) in [
        ("[]", "the prompt is empty"),
        ("[1, 320]", "token 320 does not exist"),
        ("[1, -1]", "JSON array of token ids"),
        ("[1, 4294967296]", "JSON array of token ids"),
        ("[1, \"a\"]", "JSON array of token ids"),
        ("[1, 2", "JSON array of token ids"),
        ("", "JSON array of token ids"),
    ] {
        bench.file("ids.json", content);
        let run = bench.run("logits --model {mistral} --tokens {ids} --out {dir}/l --devices cpu");
        assert!(run.status == 1 && run.stderr.contains(words), "{content}: {}", run.stderr);
        assert!(bench.left_behind().is_empty());
    }
    bench.file("ids.json", "[5000]");
    let run = bench.run("tokenize --model {model} --decode {ids}");
    assert!(run.status == 1 && run.stderr.contains("token 5000 is not in the vocabulary"), "{}", run.stderr);
}

#[test]
fn help_and_version_go_to_stdout() {
    for (args, words) in [(&["--help"][..], "bench"), (&["generate", "--help"], "--repetition-penalty"), (&["--version"], "torchless 0")] {
        let run = run(args);
        assert!(run.status == 0 && run.stdout.contains(words) && run.stderr.is_empty(), "{args:?}: {} {}", run.stdout, run.stderr);
    }
}

#[test]
fn text_is_tokenized_as_by_hugging_face_and_back() {
    let fixture: Value = serde_json::from_slice(&std::fs::read(path("tokenizers/tiny-stories.json")).unwrap()).unwrap();
    let bench = Bench::new();
    let model = stories();
    let model = model.to_str().unwrap();
    for case in fixture["cases"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let file = bench.file("text", text);
        for source in [["--text", text], ["--file", file.to_str().unwrap()]] {
            let found = run(&["tokenize", "--model", model, source[0], source[1], "--json"]).json();
            assert_eq!(found["ids"], case["ids"], "{text:?} by {}", source[0]);
            assert_eq!(found["pieces"].as_array().unwrap().len(), case["ids"].as_array().unwrap().len());
            assert_eq!(found["pieces"][0], "<s>");
        }
        let ids = bench.file("ids.json", case["ids"].to_string());
        let ids = ids.to_str().unwrap();
        assert_eq!(run(&["tokenize", "--model", model, "--decode", ids, "--json"]).json(), json!({"text": case["decoded"]}));
        assert_eq!(run(&["tokenize", "--model", model, "--decode", ids]).stdout, format!("{}\n", case["decoded"].as_str().unwrap()));
    }
    let bytes = bench.file("text", b"a\xFFb");
    let run = run(&["tokenize", "--model", model, "--file", bytes.to_str().unwrap()]);
    assert!(run.status == 1 && run.stderr.contains("is not UTF-8"), "{}", run.stderr);
}

#[test]
fn greedy_texts_are_those_of_transformers_on_any_split() {
    let expected: Value = serde_json::from_slice(&std::fs::read(stories().join("expected.json")).unwrap()).unwrap();
    for devices in ["cpu", "cpu,cpu", "cpu,cpu,cpu,cpu"] {
        for case in expected.as_array().unwrap() {
            let (model, prompt) = (stories(), case["prompt"].as_str().unwrap());
            let mut args = vec!["generate", "--model", model.to_str().unwrap(), "--prompt", prompt, "--devices", devices];
            args.extend(["--temperature", "0", "--exact", "--echo"]);
            let text = run(&args);
            assert_eq!((text.status, text.stdout), (0, format!("{}\n", case["text"].as_str().unwrap())), "{devices}: {}", text.stderr);
            args.push("--json");
            let found = run(&args).json();
            assert_eq!([&found["text"], &found["ids"], &found["prompt_ids"]], [&case["text"], &case["greedy_ids"], &case["input_ids"]]);
            assert_eq!((&found["finish"], &found["seed"]), (&json!("eos"), &Value::Null));
        }
    }
}

#[test]
fn a_text_ends_where_it_is_told_to() {
    let bench = Bench::new();
    let run = |more: &str| {
        bench.run(&format!("generate --model {{model}} --prompt Lily --devices cpu --temperature 0 --exact --json {more}")).json()
    };
    let whole = run("");
    let text = whole["text"].as_str().unwrap();
    let length = run("--max-tokens 5");
    assert_eq!((length["ids"].as_array().unwrap(), &length["finish"]), (&whole["ids"].as_array().unwrap()[..5].to_vec(), &json!("length")));
    let stop = run("--stop zebra --stop ed.");
    assert_eq!((stop["text"].as_str().unwrap(), &stop["finish"]), (&text[..text.find("ed.").unwrap()], &json!("stop")));
    // The cache has room in pages of 64 positions; the last token needs none.
    let context = run("--context 64");
    assert_eq!((context["ids"].as_array().unwrap().len(), &context["finish"]), (63, &json!("context")));
    assert_eq!(run("--max-tokens 0")["ids"], json!([]));
}

#[test]
fn a_text_with_drafts_is_the_same_and_they_are_counted() {
    let model = stories().display().to_string();
    let text = "Tap, tap, tap! Tap, tap, tap! Tap, tap, tap! Tap, tap, tap! Tap,";
    for temperature in ["0", "0.7"] {
        let line = [
            "generate",
            "--model",
            &model,
            "--devices",
            "cpu",
            "--exact",
            "--temperature",
            temperature,
            "--seed",
            "4",
            "--prompt",
            text,
            "--json",
        ];
        let [plain, drafted] = [&[][..], &["--speculate"]].map(|more| run(&[&line, more].concat()).json());
        assert_eq!((&plain["ids"], &plain["text"]), (&drafted["ids"], &drafted["text"]));
        let count = |of: &Value, name: &str| of[name].as_u64().unwrap();
        let tokens = plain["ids"].as_array().unwrap().len() as u64;
        assert_eq!((count(&plain, "drafted"), count(&plain, "launches")), (0, tokens));
        assert!(count(&drafted, "drafted") > 0 && count(&drafted, "accepted") + count(&drafted, "launches") == tokens, "{drafted}");
    }
}

#[test]
fn a_perplexity_is_that_of_the_library_in_windows_of_any_size() {
    let bench = Bench::new();
    let text = std::fs::read_to_string(path("../data/held-out-stories.txt")).unwrap();
    let text = &text[..3000];
    let file = bench.file("text.txt", text).display().to_string();
    let params = torchless::Parameters::load(stories()).unwrap();
    let tokens = params.tokenizer().unwrap().encode_continuation(text).unwrap();
    let model = torchless::TensorParallelMistral::load(params, torchless::TensorParallelConfig::default()).unwrap();
    for window in [2, 64, 512] {
        let mut wanted = torchless::Score::default();
        for part in tokens.chunks(window - 1) {
            let mut state = torchless::InferenceState::new(model.config());
            wanted += torchless::score(&model, &mut state, &[&[1], part].concat(), false).unwrap();
        }
        let line = format!("perplexity --model {{model}} --devices cpu --text {file} --window {window} --json");
        let found = bench.run(&line).json();
        let number = |name: &str| found[name].as_f64().unwrap_or_else(|| panic!("{name} in {found}"));
        assert!((number("perplexity") - wanted.perplexity()).abs() < 1e-9 * wanted.perplexity(), "{found} is not {wanted:?}");
        assert!((number("nats_per_token") - wanted.nats_per_token()).abs() < 1e-9, "{found}");
        assert!((number("bits_per_byte") - wanted.nats / std::f64::consts::LN_2 / 3000.0).abs() < 1e-9, "{found}");
        assert_eq!((number("tokens_scored"), number("tokens")), (tokens.len() as f64, tokens.len() as f64));
        assert_eq!((number("bytes"), number("windows")), (3000.0, tokens.len().div_ceil(window - 1) as f64));
        assert!(number("tokens_per_s") > 0.0);
    }
    // By default a window is the model's context, or what --context leaves of it.
    let line = format!("perplexity --model {{model}} --devices cpu,cpu --text {file}");
    let table = bench.run(&format!("{line} --fast")).stdout;
    assert!(table.contains("windows of 512") && table.contains("bits per byte"), "{table}");
    assert_eq!(bench.run(&format!("{line} --context 128 --json")).json()["window"], 128);
}

#[test]
fn a_text_that_cannot_be_scored_is_a_failure() {
    let bench = Bench::new();
    let [empty, latin] = [bench.file("empty.txt", ""), bench.file("latin.txt", b"caf\xe9")].map(|path| path.display().to_string());
    for (text, more, words) in [
        ("nowhere.txt", "", "cannot read nowhere.txt"),
        ("{dir}", "", "cannot read"),
        (&*empty, "", "has no token to score"),
        (&*latin, "", "is not UTF-8"),
        ("{ids}", "--window 513", "context of 512"),
        ("{ids}", "--window 100 --context 64", "context of 64"),
    ] {
        let run = bench.run(&format!("perplexity --model {{model}} --devices cpu --text {text} {more}"));
        assert!(run.status == 1 && run.stderr.contains(words) && run.stderr.matches('\n').count() == 1, "{text} {more}: {}", run.stderr);
    }
    // A single token is scored behind the model's <s>.
    let one = bench.file("one.txt", "the").display().to_string();
    assert_eq!(bench.run(&format!("perplexity --model {{model}} --devices cpu --text {one} --json")).json()["tokens_scored"], 1);
}

#[test]
fn a_seed_repeats_a_text_and_is_told() {
    let bench = Bench::new();
    let run = |more: &str| bench.run(&format!("generate --model {{model}} --prompt Lily --devices cpu --exact --max-tokens 60 {more}"));
    let first = run("--json").json();
    let again = run(&format!("--json --seed {}", first["seed"])).json();
    assert_eq!([&first["text"], &first["seed"]], [&again["text"], &again["seed"]]);
    assert_ne!(run("--json").json()["text"], first["text"]);
    let told = run("");
    let seed = told.stderr.strip_prefix("torchless: seed ").unwrap().trim();
    assert_eq!(run(&format!("--seed {seed}")).stdout, told.stdout);
}

#[test]
fn logits_are_those_of_transformers_and_alone_in_their_file() {
    let bench = Bench::new();
    for case in cases("tiny-mistral") {
        bench.file("ids.json", json!(case.ids).to_string());
        for (more, bound) in [("", 1e-4), ("--micro-batches 1", 1e-4), ("--micro-batches 64 --devices cpu,cpu", 1e-4), ("--fast", 0.1)] {
            let devices = if more.contains("--devices") { "" } else { "--devices cpu" };
            let run = bench.run(&format!("logits --model {{mistral}} --tokens {{ids}} --out {{dir}}/l {devices} --json {more}"));
            let shape = [case.ids.len(), 320];
            assert_eq!(run.json()["shape"], json!(shape), "{more}");
            let bytes = std::fs::read(bench.dir.path().join("empty/l")).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            assert_eq!(file.names(), ["logits"]);
            let tensor = file.tensor("logits").unwrap();
            assert_eq!((tensor.dtype(), tensor.shape()), (safetensors::Dtype::F32, &shape[..]));
            let found: Vec<f32> = tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            let gap = gap(&found, &case.logits);
            assert!(gap < bound, "{} {more}: {gap}", case.name);
            assert_eq!(bench.left_behind(), ["l"]);
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_a_failure_and_a_device_stays_one() {
    let bench = Bench::new();
    let run = bench.run("logits --model {mistral} --tokens {ids} --out /dev/full --devices cpu");
    assert!(run.status == 1 && run.stderr.contains("No space left"), "{}", run.stderr);
    assert!(!std::fs::metadata("/dev/full").unwrap().is_file());
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let output = command(&["devices", "--json"]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot write to standard output"));
}

#[test]
fn a_failure_leaves_the_file_that_was_there() {
    let bench = Bench::new();
    let out = bench.dir.path().join("empty/l");
    std::fs::write(&out, "before").unwrap();
    bench.file("ids.json", "[1, 99999]");
    assert_eq!(bench.run("logits --model {mistral} --tokens {ids} --out {dir}/l --devices cpu").status, 1);
    assert_eq!((std::fs::read_to_string(&out).unwrap(), bench.left_behind().len()), ("before".into(), 1));
}

#[test]
fn nobody_reading_is_no_reason_to_complain() {
    let model = stories();
    let generate = ["generate", "--model", model.to_str().unwrap(), "--prompt", "Lily", "--devices", "cpu", "--seed", "1"];
    for args in [&generate[..], &["devices"], &["--help"]] {
        let mut child = command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""), "{args:?}");
    }
}

#[test]
fn devices_begin_with_the_cpu() {
    let bench = Bench::new();
    let found = bench.run("devices --json").json();
    let devices = found["devices"].as_array().unwrap();
    assert_eq!((&devices[0]["device"], &devices[0]["kind"], &devices[0]["software"]), (&json!("cpu"), &json!("cpu"), &json!(false)));
    for (n, gpu) in devices[1..].iter().enumerate() {
        assert_eq!(gpu["device"], format!("gpu:{n}"));
        assert!(gpu["limits"]["largest_binding"].is_u64(), "{gpu}");
    }
    assert_eq!(bench.run("devices").stdout.lines().count(), 1 + devices.len());
}

#[test]
fn a_plan_says_who_owns_what_before_loading() {
    let bench = Bench::new();
    let plan = bench.run("plan --model {model} --devices cpu,cpu,cpu,cpu --stages 2 --shares 3,1 --json").json();
    let owned = |rank: usize, what: &str| plan["ranks"][rank][what].clone();
    assert_eq!(plan["ranks"].as_array().unwrap().len(), 4);
    assert_eq!([owned(0, "layers"), owned(3, "layers")], [json!([0, 3]), json!([3, 6])]);
    assert_eq!([owned(0, "heads"), owned(1, "heads")], [json!([0, 6]), json!([6, 8])]);
    assert_eq!([owned(2, "kv_heads"), owned(3, "kv_heads")], [json!([0, 3]), json!([3, 4])]);
    assert_eq!([owned(0, "channels"), owned(1, "vocab")], [json!([0, 288]), json!([768, 1024])]);
    let bytes = |rank: usize| plan["ranks"][rank]["weight_bytes"].as_u64().unwrap();
    assert!(bytes(0) > 2 * bytes(1));
    assert_eq!(plan["weight_bytes_per_token"], (0..4).map(bytes).sum::<u64>());
    for count in ["ops_per_token", "submissions_per_token", "collectives_per_token"] {
        assert!(plan[count].as_u64().unwrap() > 0, "{count}");
    }
    let memory = &plan["memory"][0];
    assert_eq!((&memory["device"], &memory["weight_bytes"]), (&json!("cpu"), &plan["weight_bytes_per_token"]));
    assert!(memory["cache_bytes"].as_u64().unwrap() > 0 && plan["forecast"].is_null(), "{plan}");
    // Ranks, memory, what a token takes.
    assert_eq!(bench.run("plan --model {model} --devices cpu,cpu").stdout.lines().count(), 3 + 1 + 2 + 1 + 1);
}

#[test]
fn a_forecast_says_how_fast_what_was_asked_for_would_be_and_what_else_there_is() {
    let bench = Bench::new();
    let plan = bench.run("plan --model {model} --devices cpu,cpu --predict --batch 2 --json").json();
    let forecast = &plan["forecast"];
    assert_eq!((&forecast["asked"]["devices"], &forecast["asked"]["batch"]), (&json!(["cpu", "cpu"]), &json!(2)));
    assert_eq!(forecast["predictions"].as_array().unwrap().len(), 1, "{forecast}");
    assert!(forecast["asked"]["tokens_per_s"].as_f64().unwrap() > 0.0 && forecast["chosen"] == 0, "{forecast}");
    assert!(bench.run("plan --model {model} --devices cpu --predict").stdout.contains("cpu is the only device"));
}

#[test]
fn a_split_that_is_slower_than_one_device_is_foretold_once_and_warned_of() {
    if common::gpus().is_empty() {
        return;
    }
    let bench = Bench::new();
    let kept = |bench: &Bench| {
        let files = std::fs::read_dir(bench.dir.path().join("cache")).into_iter().flatten();
        let name = |file: std::io::Result<std::fs::DirEntry>| file.unwrap().path();
        files.map(name).filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("predicted")).collect::<Vec<_>>()
    };
    let generate = "generate --model {model} --devices cpu,gpu:0 --prompt Once --max-tokens 2 --no-tune";
    assert!(!bench.run(generate).stderr.contains("slower"), "nobody has measured it yet");
    let plan = "plan --model {model} --devices cpu,gpu:0";
    assert!(!bench.run(&format!("{plan} --no-predict")).stdout.contains("predicted") && kept(&bench).is_empty());
    let first = bench.run(plan);
    // A software adapter beside the CPU has nothing to give, and a sum costs as much as this model's whole layer.
    assert!(
        first.stdout.contains("cpu would be ") && first.stdout.contains("times as fast as cpu,gpu:0"),
        "{}{}",
        first.stdout,
        first.stderr
    );
    let [file] = &kept(&bench)[..] else { panic!("{:?}", kept(&bench)) };
    let before = std::fs::read(file).unwrap();
    assert_eq!(bench.run(plan).stdout, first.stdout, "what is kept is not measured again");
    assert!(std::fs::read(file).unwrap() == before);
    let tuned = generate.replace(" --no-tune", "");
    let warned = bench.run(&tuned);
    assert!(warned.stderr.contains("cpu,gpu:0 together are slower than cpu alone"), "{}", warned.stderr);
    assert!(!bench.run(&tuned.replace("cpu,gpu:0", "cpu")).stderr.contains("slower"));
    bench.run(&format!("{plan} --predict"));
    assert!(std::fs::read(file).unwrap() != before, "--predict measures anew");
}

#[test]
fn a_benchmark_measures_speed_and_memory() {
    let bench = Bench::new();
    let line = "bench --model {model} --devices cpu,cpu --prompt-tokens 16 --decode-tokens 8";
    let found = bench.run(&format!("{line} --json")).json();
    for key in ["prefill_tokens_per_s", "decode_tokens_per_s", "weight_bytes_per_token", "load_s"] {
        assert!(found[key].as_f64().unwrap() > 0.0, "{key}: {found}");
    }
    assert!(found["step_s"]["compute"].as_f64().unwrap() > 0.0, "{found}");
    assert!(found["ranks"][1]["step_s"]["compute"].as_f64().unwrap() > 0.0 && found["ranks"][2].is_null(), "{found}");
    assert!(found["peak_rss_bytes"].as_u64().is_none_or(|bytes| bytes > 1 << 20), "{found}");
    assert!(bench.run(line).stdout.contains("tokens/s"));
}

#[test]
fn a_trace_has_a_row_for_every_rank() {
    let bench = Bench::new();
    for verb in ["generate --prompt a --max-tokens 3", "logits --tokens {ids} --out {dir}/l", "bench --prompt-tokens 4 --decode-tokens 4"] {
        let run = bench.run(&format!("{verb} --model {{model}} --devices cpu,cpu --stages 2 --trace {{dir}}/trace.json"));
        assert_eq!(run.status, 0, "{verb}: {}", run.stderr);
        let trace: Value = serde_json::from_slice(&std::fs::read(bench.dir.path().join("empty/trace.json")).unwrap()).unwrap();
        let spans: Vec<&Value> = trace["traceEvents"].as_array().unwrap().iter().filter(|event| event["ph"] == "X").collect();
        for tid in [0, 1] {
            assert!(spans.iter().any(|s| s["tid"] == tid && s["cat"] == "compute" && s["dur"].is_number()), "{verb}: {spans:?}");
        }
    }
}

#[test]
fn a_trace_is_drawn_as_text_as_a_picture_and_summed_up() {
    let bench = Bench::new();
    let text = bench.run("timeline {trace}");
    assert_eq!(text.stdout.lines().nth(1).unwrap().split(' ').next_back(), Some("75%"), "{}", text.stdout);
    let drawn = bench.run("timeline {trace} -o {dir}/out.svg --json");
    assert_eq!(
        drawn.json()["rows"],
        json!([{"stage": 0, "rank": 0, "device": "cpu", "spans": 2, "elapsed_ms": 8.0, "computing_ms": 6.0, "busy": 0.75}])
    );
    let svg = std::fs::read_to_string(bench.dir.path().join("empty/out.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.matches("<title>micro-batch").count() == 2, "{svg}");
    let part = bench.run("timeline {trace} --from 7 --json").json();
    assert_eq!((&part["from_ms"], &part["to_ms"], &part["rows"][0]["busy"]), (&json!(7.0), &json!(8.0), &json!(0.0)));

    // And of a real run: a row for each rank of each stage.
    let run = bench.run("logits --model {mistral} --tokens {ids} --out {dir}/l --devices cpu,cpu,cpu,cpu --stages 2 --trace {trace}");
    assert_eq!(run.status, 0, "{}", run.stderr);
    let rows = bench.run("timeline {trace} --json").json()["rows"].clone();
    let place = |row: &Value| [row["stage"].as_u64().unwrap(), row["rank"].as_u64().unwrap()];
    assert_eq!(rows.as_array().unwrap().iter().map(place).collect::<Vec<_>>(), [[0, 0], [0, 1], [1, 0], [1, 1]]);
    assert!(rows.as_array().unwrap().iter().all(|row| row["busy"].as_f64().unwrap() > 0.0 && row["device"] == "cpu"), "{rows}");
    assert!(bench.run("timeline {trace}").stdout.contains("stage 1 rank 1 (cpu) |"));
}

#[test]
fn a_damaged_model_is_a_failure_within_seconds() {
    let bench = Bench::new();
    let copy = bench.dir.path().join("copy");
    let names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"];
    for damaged in names {
        for content in [&b""[..], b"{}", b"\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x7F{", &b"[".repeat(100_000)] {
            std::fs::create_dir_all(&copy).unwrap();
            for name in names {
                std::fs::copy(stories().join(name), copy.join(name)).unwrap();
            }
            std::fs::write(copy.join(damaged), content).unwrap();
            let run =
                run(&["generate", "--model", path_of(&copy), "--prompt", "a", "--devices", "cpu", "--max-tokens", "2", "--seed", "1"]);
            // Without its own settings a model falls back on its config's.
            let sound = damaged == "generation_config.json" && content == b"{}";
            assert_eq!(run.status, if sound { 0 } else { 1 }, "{damaged} {content:.20?}: {}", run.stderr);
            assert!(sound || (run.stderr.starts_with("torchless: ") && run.stderr.matches('\n').count() == 1), "{}", run.stderr);
        }
    }
}

fn path_of(path: &Path) -> &str {
    path.to_str().unwrap()
}
