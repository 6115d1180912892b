//! [`ModelName`]: what `org/name:file` may be, and what a file may be called.

use std::fmt;

/// A repository of the hub, and perhaps one of its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ModelName {
    /// `org/name`.
    pub repository: String,
    pub file: Option<String>,
}

impl ModelName {
    /// `None` for what the hub would never call a repository, or where the file would lie outside of it.
    pub fn parse(name: &str) -> Option<Self> {
        let (repository, file) = match name.split_once(':') {
            Some((repository, file)) => (repository, Some(file)),
            None => (name, None),
        };
        let (owner, model) = repository.split_once('/')?;
        let is_legal = is_legal(owner) && is_legal(model) && !model.ends_with(".git") && file.is_none_or(stays_inside);
        is_legal.then(|| Self { repository: repository.into(), file: file.map(str::to_owned) })
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => write!(f, "{}:{file}", self.repository),
            None => f.write_str(&self.repository),
        }
    }
}

/// The hub's own rule.
fn is_legal(part: &str) -> bool {
    let is_plain = part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    let edges = [part.chars().next(), part.chars().last()];
    let ends_well = edges.iter().all(|end| end.is_some_and(|c| !"-.".contains(c)));
    is_plain && ends_well && part.len() <= 96 && !part.contains("--") && !part.contains("..")
}

/// Whether a file of this name lies in the directory that it is put in, on any system: `\` and `:` have a meaning on Windows only.
pub(super) fn stays_inside(file: &str) -> bool {
    let is_plain = !file.contains(['\\', ':']) && !file.chars().any(char::is_control) && file.len() <= 512;
    is_plain && file.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

#[cfg(test)]
mod tests {
    use super::ModelName;

    #[test]
    fn a_name_is_an_owner_a_model_and_perhaps_a_file() {
        for (name, repository, file) in [
            ("mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-v0.3", None),
            ("a/b", "a/b", None),
            ("_org_/x.y_z", "_org_/x.y_z", None),
            ("org/name:model.Q4_K_M.gguf", "org/name", Some("model.Q4_K_M.gguf")),
            ("org/name:Q4/part-00001-of-00002.gguf", "org/name", Some("Q4/part-00001-of-00002.gguf")),
        ] {
            let parsed = ModelName::parse(name).unwrap_or_else(|| panic!("{name} is a name"));
            assert_eq!((parsed.repository.as_str(), parsed.file.as_deref()), (repository, file), "{name}");
            assert_eq!(parsed.to_string(), name);
        }
    }

    #[test]
    fn a_path_or_what_leaves_the_repository_is_no_name() {
        let long = format!("org/{}", "x".repeat(97));
        for name in [
            "",
            "name",
            "/",
            "org/",
            "/name",
            "/org/name",
            "./org",
            "../org",
            "org/..",
            "org/.",
            "org/name/",
            "a/b/c",
            "~/models",
            "org/na me",
            "org/n\u{e4}me",
            "org/name.git",
            "org/a--b",
            "org/a..b",
            "-org/name",
            "org/name-",
            "org/.name",
            "C:/models",
            "org\\name",
            "org/name:",
            "org/name:/etc/passwd",
            "org/name:../x.gguf",
            "org/name:a/../../x",
            "org/name:a//b",
            "org/name:./a",
            "org/name:a/",
            "org/name:a\\b",
            "org/name:C:x",
            "org/name:a\nb",
            &long,
        ] {
            assert_eq!(ModelName::parse(name), None, "{name:?}");
        }
    }
}
