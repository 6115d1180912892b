//! The sliding window of a config: one for all layers, or none.

use serde_json::Value;

use super::{Keys, keys, unsupported};
use crate::error::Result;

/// Where a config has a window but doesn't say of how many positions, transformers' says this.
const DEFAULT: usize = 4096;

/// Null means no window, and so no default.
pub(super) fn of_mistral(keys: &Keys<'_>) -> Result<Option<usize>> {
    if keys.get("sliding_window").and_then(Value::as_u64) == Some(0) {
        return Err(keys.wrong("sliding_window", "null means that there is no window; a window has at least 1 position"));
    }
    if keys.has("sliding_window") { keys.size("sliding_window") } else { Ok(Some(DEFAULT)) }
}

/// Qwen's layers have a window where `layer_types` say so, or, in older files, from `max_window_layers` on; and only with `use_sliding_window`.
pub(super) fn of_qwen(keys: &Keys<'_>, n_layers: usize) -> Result<Option<usize>> {
    let alike = "layers that all have the window, or none";
    let used = keys.flag("use_sliding_window")?;
    let windowed = match keys.get("layer_types") {
        None if used => n_layers - n_layers.min(max_window_layers(keys)?),
        None => 0,
        Some(types) => {
            let listed = types.as_array().filter(|listed| listed.len() == n_layers);
            let listed = listed.ok_or_else(|| keys.wrong("layer_types", &format!("a list of {n_layers} strings is needed")))?;
            let other = |kind: &&Value| !matches!(kind.as_str(), Some("full_attention" | "sliding_attention"));
            if let Some(other) = listed.iter().find(other) {
                return Err(unsupported("layer_types", keys::shown(other), "\"full_attention\" and \"sliding_attention\""));
            }
            listed.iter().filter(|kind| kind.as_str() == Some("sliding_attention")).count()
        }
    };
    match windowed {
        0 => Ok(None),
        all if all == n_layers && used => Ok(Some(keys.size("sliding_window")?.unwrap_or(DEFAULT))),
        some if used => Err(unsupported("use_sliding_window", format!("true, for {some} of {n_layers} layers"), alike)),
        some => Err(keys.wrong("use_sliding_window", &format!("layer_types give a window to {some} of {n_layers} layers"))),
    }
}

/// The layers before the first with a window.
fn max_window_layers(keys: &Keys<'_>) -> Result<usize> {
    match keys.get("max_window_layers") {
        Some(none) if none.as_u64() == Some(0) => Ok(0),
        _ => Ok(keys.size("max_window_layers")?.unwrap_or(28)),
    }
}
