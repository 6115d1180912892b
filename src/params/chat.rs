//! Where a Hugging Face directory keeps its chat template.

use std::path::Path;

use serde_json::Value;

use crate::chat::ChatTemplate;
use crate::config::{Keys, read_at_most};
use crate::error::{Error, Result};

/// Names every special token too, so that some have a megabyte.
const TOKENIZER_CONFIG_LIMIT: u64 = 16 << 20;
/// [`ChatTemplate::new`] has a bound of its own, and says more.
const TEMPLATE_LIMIT: u64 = 1 << 20;

const TEMPLATE: &str = "chat_template.jinja";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// As transformers: a file of its own goes before `tokenizer_config.json`, which names the tokens that begin and end a text.
pub(super) fn load(dir: &Path) -> Result<ChatTemplate> {
    let (file, path) = (dir.join(TEMPLATE), dir.join(TOKENIZER_CONFIG));
    let json = if path.exists() { read_at_most(&path, TOKENIZER_CONFIG_LIMIT)? } else { b"{}".to_vec() };
    let keys = Keys::parse(&json, &path)?;
    let source = if file.exists() {
        String::from_utf8(read_at_most(&file, TEMPLATE_LIMIT)?).map_err(|_| Error::config(&file, "the template is not UTF-8"))?
    } else {
        template(&keys)?.ok_or_else(|| {
            let dir = dir.display();
            Error::ChatTemplate(format!("{dir} has none: neither {TEMPLATE} nor a chat_template in {TOKENIZER_CONFIG}"))
        })?
    };
    ChatTemplate::new(&source, &token(&keys, "bos_token")?, &token(&keys, "eos_token")?)
}

/// One template, or several with names, of which `default` is for conversations without tools.
fn template(keys: &Keys<'_>) -> Result<Option<String>> {
    let named = match keys.get("chat_template") {
        None => return Ok(None),
        Some(Value::String(template)) => return Ok(Some(template.clone())),
        Some(Value::Array(named)) => named.iter().find(|one| one["name"] == "default"),
        Some(_) => None,
    };
    let template = named.and_then(|one| one["template"].as_str()).map(str::to_owned);
    template.map(Some).ok_or_else(|| keys.wrong("chat_template", "a template or a list of named ones with a \"default\" is needed"))
}

/// A token's text, or the text within its description; empty if there is none.
fn token(keys: &Keys<'_>, key: &str) -> Result<String> {
    let Some(value) = keys.get(key) else { return Ok(String::new()) };
    let text = value.as_str().or_else(|| value["content"].as_str());
    text.map(str::to_owned).ok_or_else(|| keys.wrong(key, "a text, or an object with a text under \"content\" is needed"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::chat::ChatMessage;

    fn read(config: Option<Value>, file: Option<&str>) -> Result<String, String> {
        let dir = tempfile::tempdir().unwrap();
        if let Some(config) = config {
            std::fs::write(dir.path().join(TOKENIZER_CONFIG), config.to_string()).unwrap();
        }
        if let Some(file) = file {
            std::fs::write(dir.path().join(TEMPLATE), file).unwrap();
        }
        let template = load(dir.path()).map_err(|e| e.to_string())?;
        template.render(&[ChatMessage::user("Hi")], true).map_err(|e| e.to_string())
    }

    #[test]
    fn a_template_is_found_wherever_transformers_finds_it() {
        let source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}";
        for (config, file, text) in [
            (
                Some(json!({"chat_template": source, "bos_token": "<s>", "eos_token": {"content": "</s>", "special": true}})),
                None,
                "<s>Hi</s>",
            ),
            (Some(json!({"chat_template": source, "bos_token": null})), None, "Hi"),
            (Some(json!({"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": source}]})), None, "Hi"),
            (Some(json!({"chat_template": "no", "bos_token": "<s>"})), Some(source), "<s>Hi"),
            (None, Some(source), "Hi"),
        ] {
            assert_eq!(read(config.clone(), file).as_deref(), Ok(text), "{config:?}");
        }
    }

    #[test]
    fn without_a_sound_template_the_error_says_so() {
        for (config, file, words) in [
            (None, None, "has none: neither chat_template.jinja nor a chat_template in tokenizer_config.json"),
            (Some(json!({"bos_token": "<s>", "chat_template": null})), None, "has none"),
            (Some(json!({"chat_template": 5})), None, "chat_template is 5; a template or a list"),
            (Some(json!({"chat_template": [{"name": "rag", "template": "x"}]})), None, "with a \"default\" is needed"),
            (Some(json!({"chat_template": [{"name": "default"}]})), None, "with a \"default\" is needed"),
            (Some(json!({"chat_template": "x", "eos_token": ["</s>"]})), None, "eos_token is"),
            (Some(json!([])), Some("x"), "not a JSON object"),
            (Some(json!({"chat_template": "{% if"})), None, "chat template: a tag has no end (line 1)"),
        ] {
            let error = read(config.clone(), file).expect_err(words);
            assert!(error.contains(words), "{config:?}: {error}");
        }
    }
}
