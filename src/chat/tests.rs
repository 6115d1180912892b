use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{ChatMessage, ChatTemplate};

fn render(source: &str) -> Result<String, String> {
    let template = ChatTemplate::new(source, "<s>", "</s>").map_err(|e| e.to_string())?;
    template.render(&[ChatMessage::user("Hi")], true).map_err(|e| e.to_string())
}

#[test]
fn texts_are_those_of_jinja2_as_transformers_calls_it() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat");
    let expected: Vec<Value> = serde_json::from_slice(&std::fs::read(dir.join("expected.json")).unwrap()).unwrap();
    let mut wrong = Vec::new();
    for case in &expected {
        let name = case["template"].as_str().unwrap();
        let template = ChatTemplate::new(&std::fs::read_to_string(dir.join(name)).unwrap(), "<s>", "</s>").unwrap();
        let text = |of: &Value, key: &str| of[key].as_str().unwrap().to_owned();
        let messages = case["messages"].as_array().unwrap().iter();
        let messages: Vec<_> = messages.map(|m| ChatMessage { role: text(m, "role"), content: text(m, "content") }).collect();
        let today = || jiff::ZonedDateTime::now().strftime("%d %b %Y").to_string();
        let before = today();
        let found = template.render(&messages, case["add_generation_prompt"].as_bool().unwrap());
        let is_right = match (&found, case["error"].as_str()) {
            (Err(error), Some(words)) => error.to_string().contains(words),
            // The day may end in between.
            (Ok(found), None) => [before, today()].iter().any(|day| *found == text(case, "text").replace("@%d %b %Y@", day)),
            _ => false,
        };
        if !is_right {
            wrong.push(format!("{name} of {messages:?}:\n{found:?}\nis not\n{case}"));
        }
    }
    assert!(expected.len() > 80 && wrong.is_empty(), "{} of {} wrong: {}", wrong.len(), expected.len(), wrong.join("\n\n"));
}

#[test]
fn a_fault_is_told_with_its_line() {
    for (source, words) in [
        ("a\n{{ messages[0].content ", "a tag has no end (line 2)"),
        ("a\n\n{% if %}", "(line 3)"),
        ("{{ 'a", "a text in quotes has no end (line 1)"),
        ("a\n{# b", "a comment has no end (line 2)"),
        ("{% raw %}\n{{ }}", "a raw block has no end"),
        ("{{ ) }}", "never opened"),
        ("{% sing %}", "unknown statement sing (line 1)"),
        ("\n{{ raise_exception('roles must alternate') }}", "roles must alternate (line 2)"),
        ("{{ missing.thing }}", "`missing` is undefined (line 1)"),
        ("{{ 'a'|shout }}", "shout is unknown (line 1)"),
        ("{{ 'a'.shout() }}", "no method named shout (line 1)"),
        ("{{ 1 // 0 }}", "(line 1)"),
        ("{{ strftime_now('%!') }}", "(line 1)"),
        ("{% include 'file' %}", "\"include\" is not supported"),
        ("{% import '/etc/passwd' as x %}", "\"import\" is not supported"),
    ] {
        let error = render(source).expect_err(source);
        assert!(error.starts_with("chat template: ") && error.contains(words), "{source}: {error}");
    }
}

#[test]
fn marks_and_rounds_leave_the_text_as_it_is() {
    for (source, text) in [
        ("{% for i in [1, 2] -%}\n  a\n{% endfor %}", "a\na\n"),
        ("{% for i in [1, 2] +%}\na{% endfor %}", "\na\na"),
        ("{%- macro f(a, b='x, y', c=(1, 2)) -%} {{ a }}{{ b }}{{ c[1] }} {%- endmacro -%} {{ f('q', c=[3, 4]) }}", "qx, y4"),
        ("{% macro f() %}m{% endmacro %}{{ f() }}", "m"),
        ("{% set a, b = 1, 2 %}{{ b }}{{ a }}", "21"),
        ("{% set a = 1 if false else 2 -%} \n {{ a }}", "2"),
        ("{% set ns = namespace(x=1) %}{% set ns.x = ns.x + 1, 3 %}{{ ns.x[0] }}", "2"),
        ("{% set x %}{{ messages[0].role }}{% endset %}{{ x }}", "user"),
        ("{{ {'a': {'b': [1]}}['a'].b[0] }}{{ '}}' }}", "1}}"),
        ("{# {{ #}{{ 'é' }}{{-' {% '-}} é", "é {% é"),
        ("{%raw-%} {{ {%-endraw%} }}", "{{ }}"),
        ("{% for k, v in {'b': 1, 'a': 2}.items() %}{{ k }}{{ v }}{% endfor %}", "b1a2"),
        (
            "{% set x = {'m': messages[0:], 'n': 1} %}{{ x.m|length }}{{ x.m[0].content }}{{ x }}",
            "1Hi{'m': [{'role': 'user', 'content': 'Hi'}], 'n': 1}",
        ),
        ("{% for m in messages[1:] %}a{% else %}none{% endfor %}", "none"),
    ] {
        assert_eq!(render(source).as_deref(), Ok(text), "{source}");
    }
}

/// A template that does `what` to `ns.x` many times, and then `then`.
fn often(what: &str, then: &str) -> String {
    format!("{{% set ns = namespace(x=[1]) %}}{{% for i in range(10000) %}}{what}{{% endfor %}}{then}")
}

#[test]
fn a_hostile_template_is_refused_in_time() {
    let ranges = "{% for a in range(99999) %}".repeat(4);
    let ends = "{% endfor %}".repeat(4);
    let rows = [
        ("{{ 'a' * 10**9 }}".to_owned(), "more steps"),
        ("{{ [1] * 10**9 }}".into(), "only a text in quotes may be multiplied"),
        ("{{ range(10**12) }}".into(), "too many elements"),
        ("{{ 10 ** 10 ** 10 }}".into(), "unable to calculate"),
        (format!("{ranges}{ends}"), "more steps"),
        (format!("{ranges}{}{ends}", "a".repeat(10_000)), "more steps"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}".into(), "recursion limit"),
        ("{% macro f(x) %}{{ f([x, x]) }}{% endmacro %}{{ f([1]) }}".into(), "a value has more than"),
        ("{% macro f(x) %}{{ f(x + x) }}{% endmacro %}{{ f([1]) }}".into(), "a value has more than"),
        ("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}".into(), "recursive"),
        ("{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}".into(), "held by another"),
        ("{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns }}".into(), "held by another"),
        ("{% set ns = namespace() %}{% set m = namespace(x=ns) %}{% set ns.x = m %}{{ ns }}".into(), "held by another"),
        (often("{% set ns.x = [ns.x] %}", "{{ ns.x }}"), "more than 32 deep"),
        (often("{% set ns.x = {'a': ns.x} %}", "{{ ns.x }}"), "more than 32 deep"),
        (often("{% set ns.x = {ns.x: 1} %}", "{{ ns.x }}"), "more than 32 deep"),
        (often("{% set ns.x = ns.x, %}", "{{ ns.x }}"), "more than 32 deep"),
        (often("{% set ns.x = [ns.x, ns.x] %}", "{{ ns.x == ns.x }}"), "a value has more than"),
        (often("{% set ns.x = ns.x + ns.x %}", ""), "a value has more than"),
        (often("{% set ns.x = ns.x ~ ns.x %}", ""), "a value has more than"),
        (often("{% set ns.x = (ns.x|string).replace('1', '11') %}", ""), "a value has more than"),
        ("{% set x = [1] %}".to_owned() + &"{% set x = [x, x] %}".repeat(60), "a value has more than"),
        ("{% set x = [1] %}".to_owned() + &"{% set x = [x] %}".repeat(10_000), "more than 32 deep"),
        ("{{ '{:900000000}'.format(1) }}".into(), "more than three digits"),
        ("{{ '%900000000d'|format(1) }}".into(), "more steps"),
        ("{{ 'a\nb'|indent(900000000) }}".into(), "more steps"),
        ("{{ [1]|tojson(indent=900000000) }}".into(), "indented by more"),
        ("{{ ('a' * 90000)|list|join('b' * 90000) }}".into(), "more steps"),
        ("{{ ('a' * 9000).replace('a', 'b' * 90000) }}".into(), "more steps"),
        ("{% set x = 'a' * 90000 %}{{ x.strip('b' * 90000 ~ 'a') }}".into(), "to be stripped"),
        ("{% set x = 'a' * 90000 %}{{ x|trim('b' * 90000 ~ 'a') }}".into(), "to be stripped"),
    ];
    for (source, words) in rows {
        let start = Instant::now();
        let shown: String = source.chars().take(80).collect();
        let error = render(&source).expect_err(&shown);
        assert!(error.contains(words), "{shown}: {error}");
        assert!(start.elapsed() < Duration::from_secs(10), "{shown} took {:?}", start.elapsed());
    }
}

#[test]
fn nesting_without_end_is_an_error_and_no_overflow() {
    for n in [400, 100_000] {
        for (before, middle, after) in [
            ("{{ ", "(", ""),
            ("{{ ", "[", ""),
            ("{{ ", "{1:", ""),
            ("{{ ", "not ", "x }}"),
            ("{{ ", "- ", "1 }}"),
            ("{{ 1", " + 1", " }}"),
            ("{{ 1", " ~ 1", " }}"),
            ("{{ 2", " ** 1", " }}"),
            ("{{ x", "()", " }}"),
            ("{{ x", "[0]", " }}"),
            ("{{ x", ".a", " }}"),
            ("{{ x", "|upper", " }}"),
            ("{{ x", " if x else 1", " }}"),
            ("{{ x", " is defined", " }}"),
            ("", "{% if x %}", ""),
            ("", "{% for x in y %}", ""),
            ("{% if x %}", "{% elif x %}", "{% endif %}"),
            ("{% filter upper", "|upper", "%}{% endfilter %}"),
        ] {
            // Some of 400 are right: what counts is that each comes back.
            let found = render(&format!("{before}{}{after}", middle.repeat(n)));
            assert!(n == 400 || found.is_err(), "{n} times {middle:?} is {found:?}");
        }
    }
}

#[test]
fn long_conversations_are_rendered_and_endless_ones_refused() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat");
    let messages: Vec<_> = (0..2000)
        .map(|i| if i % 2 == 0 { ChatMessage::user("a question ".repeat(50)) } else { ChatMessage::assistant("an answer ".repeat(200)) })
        .collect();
    for name in ["smollm2", "mistral-v0.1", "mistral-v0.3", "llama-3", "llama-3.1", "zephyr"] {
        let template = ChatTemplate::new(&std::fs::read_to_string(dir.join(format!("{name}.jinja"))).unwrap(), "<s>", "</s>").unwrap();
        let text = template.render(&messages, true).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(text.len() > 2_500_000, "{name}");
    }
    let template = ChatTemplate::new("{{ messages[0].content }}", "", "").unwrap();
    let text = "a".repeat(15 << 20);
    assert!(template.render(&[ChatMessage::user(&text)], true).is_ok_and(|found| found == text));
    let error = template.render(&[ChatMessage::user(text.repeat(2))], true).unwrap_err().to_string();
    assert!(error.contains("31457284 bytes; at most 16777216"), "{error}");
    let twice = ChatTemplate::new("{{ messages[0].content }}{{ messages[0].content }}", "", "").unwrap();
    let error = twice.render(&[ChatMessage::user(text)], true).unwrap_err().to_string();
    assert!(error.contains("its text has more than 16777216 bytes"), "{error}");
}
