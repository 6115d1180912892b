//! `torchless chat` as its users meet it: lines in, answers out.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use common::fixture::stories;
use serde_json::{Value, json};

const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' and loop.first %}{{ raise_exception('a person begins') }}\
                        {% endif %}{{ m.content }} {% endfor %}";

/// A copy of tiny-stories with a template, and `change` made to it.
fn model(template: Option<&str>, change: impl FnOnce(&Path)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(stories().join(name), dir.path().join(name)).unwrap();
    }
    if let Some(template) = template {
        set(&dir.path().join("tokenizer_config.json"), "chat_template", json!(template));
    }
    change(dir.path());
    dir
}

fn set(file: &Path, key: &str, value: Value) {
    let mut content: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    content[key] = value;
    std::fs::write(file, content.to_string()).unwrap();
}

/// Its answers only end where they are cut.
fn endless(dir: &Path) {
    for name in ["config.json", "generation_config.json"] {
        set(&dir.join(name), "eos_token_id", json!([]));
    }
    set(&dir.join("tokenizer_config.json"), "eos_token", Value::Null);
}

fn start(model: &Path, more: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_torchless"));
    command.args(["chat", "--devices", "cpu", "--exact", "--temperature", "0", "--model"]).arg(model).args(more);
    command.env_remove("RUST_BACKTRACE").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// The status, standard output and standard error after these lines.
fn run(model: &Path, more: &[&str], lines: &str) -> (i32, String, String) {
    let mut child = start(model, more);
    // One that refuses to begin reads nothing.
    let _ = child.stdin.take().unwrap().write_all(lines.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn document(run: (i32, String, String)) -> Value {
    assert_eq!(run.0, 0, "{}", run.2);
    serde_json::from_str(&run.1).unwrap_or_else(|e| panic!("{e}: {}", run.1))
}

#[test]
fn turns_go_on_from_each_other_as_a_fresh_rendering_would() {
    let dir = model(Some(TEMPLATE), |_| ());
    let lines = "Lily had a red ball.\n\nTom was sad.\n";
    let found = document(run(dir.path(), &["--json", "--max-tokens", "20"], lines));
    let (said, turns) = (found["messages"].as_array().unwrap(), found["turns"].as_array().unwrap());
    assert_eq!(said.iter().map(|m| m["role"].as_str().unwrap()).collect::<Vec<_>>(), ["user", "assistant", "user", "assistant"]);
    assert_eq!((turns.len(), &turns[0]["kept_tokens"], &turns[0]["finish"]), (2, &json!(0), &json!("length")));
    assert!(turns[1]["kept_tokens"].as_u64().unwrap() >= turns[0]["prompt_tokens"].as_u64().unwrap(), "{found}");

    // The same by the library, whose state is new at every turn.
    let params = torchless::Parameters::load(dir.path()).unwrap();
    let template = params.chat_template().unwrap();
    let model = torchless::TensorParallelMistral::load(params, torchless::TensorParallelConfig::new(1, 0)).unwrap();
    let mut history = Vec::new();
    for (i, question) in ["Lily had a red ball.", "Tom was sad."].into_iter().enumerate() {
        history.push(torchless::ChatMessage::user(question));
        let prompt = model.parameters().tokenizer().unwrap().encode_continuation(&template.render(&history, true).unwrap()).unwrap();
        // One token in front, and not two.
        assert_eq!((prompt[0], prompt[1] == 1, &turns[i]["prompt_tokens"]), (1, false, &json!(prompt.len())));
        let options = torchless::GenerateOptions { max_tokens: 20, sampling: torchless::SamplerOptions::greedy(), ..Default::default() };
        let mut state = torchless::InferenceState::new(model.config());
        let answer: String = torchless::generate(&model, &mut state, &prompt, options).map(|token| token.unwrap().text).collect();
        assert_eq!(said[2 * i + 1]["content"], answer);
        history.push(torchless::ChatMessage::assistant(answer));
    }

    let (status, stdout, stderr) = run(dir.path(), &["--max-tokens", "20"], lines);
    let answers: Vec<&str> = [1, 3].iter().map(|&i| said[i]["content"].as_str().unwrap().trim_start()).collect();
    assert_eq!((status, stdout), (0, format!("{}\n{}\n", answers[0], answers[1])));
    assert!(stderr.contains("the answer ends after 20 tokens"), "{stderr}");
}

#[test]
fn commands_change_the_conversation_and_are_never_said() {
    let dir = model(Some(TEMPLATE), |_| ());
    let args = ["--json", "--max-tokens", "5", "--system", "A story."];
    let lines = "Lily had a ball.\n/reset\n/sing\n/help\nTom was sad.\n/system Another story.\n//home\n/exit\nnever\n";
    let (status, stdout, stderr) = run(dir.path(), &args, lines);
    assert!(stderr.contains("there is no command /sing") && stderr.contains("/reset begins anew"), "{stderr}");
    let found = document((status, stdout, stderr));
    let said: Vec<(&str, &str)> =
        found["messages"].as_array().unwrap().iter().map(|m| (m["role"].as_str().unwrap(), m["content"].as_str().unwrap())).collect();
    assert_eq!([said[0], said[1], said[3]], [("system", "Another story."), ("user", "Tom was sad."), ("user", "/home")]);
    assert_eq!((said.len(), found["turns"].as_array().unwrap().len()), (5, 3));
}

#[test]
fn a_full_context_is_told_and_the_turn_not_kept() {
    let dir = model(Some(TEMPLATE), endless);
    let long = "Lily had a red ball. ".repeat(60);
    let (status, stdout, stderr) = run(dir.path(), &["--json"], &format!("Lily\n{long}\n/reset\n{long}\n/reset\nTom\n"));
    assert!(stderr.contains("the answer ends because the context is full: /reset begins anew"), "{stderr}");
    assert!(stderr.contains("and the context has 512: /reset begins anew"), "{stderr}");
    let found = document((status, stdout, stderr));
    let finishes: Vec<_> = found["turns"].as_array().unwrap().iter().map(|turn| turn["finish"].as_str().unwrap()).collect();
    assert_eq!((finishes, found["messages"].as_array().unwrap().len()), (vec!["context"; 4], 2));
}

#[test]
fn the_templates_own_end_ends_an_answer() {
    let ends = |dir: &Path| {
        endless(dir);
        set(&dir.join("tokenizer_config.json"), "eos_token", json!({"content": "</s>"}));
    };
    let found = document(run(model(Some(TEMPLATE), ends).path(), &["--json"], "Lily had a red ball.\n"));
    assert_eq!(found["turns"][0]["finish"], "eos", "{found}");
}

#[test]
fn what_cannot_begin_is_refused_before_the_model_is_loaded() {
    for (template, args, status, words) in [
        (None, &[][..], 1, "has none: neither chat_template.jinja nor a chat_template in tokenizer_config.json"),
        (Some("{% if"), &[], 1, "chat template: a tag has no end (line 1)"),
        (
            Some("{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"),
            &["--system", "a"],
            1,
            "no system here",
        ),
        (Some(TEMPLATE), &["--top-p", "2"], 2, "top_p 2"),
    ] {
        let found = run(model(template, |_| ()).path(), args, "Hello\n");
        assert!(found.0 == status && found.1.is_empty() && found.2.contains(words), "{words}: {found:?}");
        assert_eq!(found.2.lines().count(), 1, "{}", found.2);
    }
}

#[test]
fn a_turn_that_the_template_refuses_is_not_kept() {
    let template =
        "{% for m in messages %}{% if 'sad' in m.content %}{{ raise_exception('no sad ones') }}{% endif %}{{ m.content }}{% endfor %}";
    let dir = model(Some(template), |_| ());
    let (status, stdout, stderr) = run(dir.path(), &["--json", "--max-tokens", "3"], "Tom was sad.\nTom was glad.\n");
    assert!(stderr.contains("no sad ones (line 1)"), "{stderr}");
    let found = document((status, stdout, stderr));
    assert_eq!((&found["messages"][0]["content"], &found["turns"][0]["finish"]), (&json!("Tom was glad."), &json!("refused")));
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_the_answer_and_where_there_is_none_the_program() {
    let interrupt = |child: &Child| {
        let done = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        assert!(done.success());
    };
    // Slow enough to be stopped: an answer of hundreds of tokens.
    let dir = model(Some(TEMPLATE), endless);
    let mut child = start(dir.path(), &["--threads", "1"]);
    let (mut stdin, mut stdout, mut stderr) =
        (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()), BufReader::new(child.stderr.take().unwrap()));
    stdin.write_all(b"Lily had a red ball.\n").unwrap();
    stdout.read_exact(&mut [0; 1]).unwrap();
    interrupt(&child);
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    assert!(line.contains("the answer was stopped"), "{line}");
    stdin.write_all(b"/reset\nTom was sad.\n").unwrap();
    line.clear();
    stdout.read_line(&mut line).unwrap();
    line.clear();
    stdout.read_line(&mut line).unwrap();
    assert!(!line.trim().is_empty(), "no second answer");
    line.clear();
    stderr.read_line(&mut line).unwrap();
    assert!(line.contains("context is full"), "{line}");
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
}
