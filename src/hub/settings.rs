//! What the environment says about the hub, under the names that Hugging Face's libraries read.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// Where the hub is and where its files are kept.
pub(super) struct Settings {
    /// Without a slash at the end.
    pub endpoint: String,
    /// `None` where there is neither a variable nor a home directory.
    pub cache: Option<PathBuf>,
    pub token: Option<String>,
    pub offline: bool,
    /// How long a request may go unanswered.
    pub answer: Duration,
    /// How long a file may stand still.
    pub silence: Duration,
}

impl Settings {
    pub fn from_env() -> Self {
        let cache_home = || set("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| dirs::home_dir().map(|home| home.join(".cache")));
        let home = set("HF_HOME").map(PathBuf::from).or_else(|| cache_home().map(|cache| cache.join("huggingface")));
        let cache = set("HF_HUB_CACHE").or_else(|| set("HUGGINGFACE_HUB_CACHE")).map(PathBuf::from);
        let token_file = set("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| home.as_ref().map(|home| home.join("token")));
        let token = set("HF_TOKEN").or_else(|| fs::read_to_string(token_file?).ok());
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let offline = set("HF_HUB_OFFLINE").is_some_and(|v| ["1", "on", "yes", "true"].contains(&v.to_ascii_lowercase().as_str()));
        Self {
            endpoint: endpoint.trim_end_matches('/').into(),
            cache: cache.or_else(|| home.map(|home| home.join("hub"))),
            token: token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()),
            offline,
            answer: seconds("HF_HUB_ETAG_TIMEOUT"),
            silence: seconds("HF_HUB_DOWNLOAD_TIMEOUT"),
        }
    }
}

/// A variable that has a value.
fn set(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.trim().is_empty())
}

/// 10 without a sensible number, as in Hugging Face's libraries.
fn seconds(name: &str) -> Duration {
    let seconds = set(name).and_then(|value| value.trim().parse::<u64>().ok()).filter(|seconds| (1..=3600).contains(seconds));
    Duration::from_secs(seconds.unwrap_or(10))
}
