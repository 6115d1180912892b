//! The model's numbers from the metadata of a GGUF file.

use super::names::{EMBEDDING, HEAD};
use super::parts::Parts;
use crate::config::{Config, RopeScaling};
use crate::error::{Error, Result};

/// Llama's and Mistral's architecture, as converters call both.
const ARCHITECTURE: &str = "llama";

/// Factors that divide each rotary frequency, as Llama 3.1 and later have them.
const FREQUENCY_FACTORS: &str = "rope_freqs.weight";

/// Keys that change the result where they hold anything but nothing, and what it is then that is not computed.
const REFUSED: [(&str, &str); 9] = [
    ("expert_count", "layers without experts"),
    ("attention.clamp_kqv", "keys, queries and values as they are"),
    ("attention.max_alibi_bias", "rotary positions"),
    ("attention.scale", "attention scaled by the root of the head's dimension"),
    ("attention.sliding_window_pattern", "one sliding window for all layers"),
    ("attn_logit_softcapping", "attention without capping"),
    ("final_logit_softcapping", "logits without capping"),
    ("logit_scale", "logits as the head gives them"),
    ("residual_scale", "a residual stream without scale"),
];

/// Reads and checks the sizes of a model of architecture `llama`, by llama.cpp's defaults.
pub(super) fn read(parts: &Parts) -> Result<Config> {
    let metadata = parts.metadata();
    let path = metadata.path();
    match metadata.required_text("general.architecture")? {
        ARCHITECTURE => {}
        other => {
            return Err(Error::Unsupported {
                what: "general.architecture",
                found: other.into(),
                supported: "\"llama\", which Mistral's is too",
            });
        }
    }
    let key = |name: &str| format!("{ARCHITECTURE}.{name}");
    refuse_unsupported(parts)?;

    let hidden_size = metadata.required_size(&key("embedding_length"))?;
    let heads = key("attention.head_count");
    let n_heads = metadata.repeated_size(&heads)?.ok_or_else(|| metadata.wrong(&heads, "it has no default"))?;
    let kv_heads = key("attention.head_count_kv");
    let n_kv_heads = metadata.repeated_size(&kv_heads)?.unwrap_or(n_heads);
    if !n_heads.is_multiple_of(n_kv_heads) {
        return Err(metadata.wrong(&kv_heads, &format!("it must divide the {n_heads} of {heads}")));
    }
    let channels = key("feed_forward_length");
    let intermediate_size = metadata.repeated_size(&channels)?.ok_or_else(|| metadata.wrong(&channels, "it has no default"))?;
    let head_dim = head_dim(parts, hidden_size, n_heads)?;
    let config = Config {
        vocab_size: vocab_size(parts)?,
        hidden_size,
        intermediate_size,
        n_layers: metadata.required_size(&key("block_count"))?,
        n_heads,
        n_kv_heads,
        head_dim,
        rms_norm_eps: metadata.required_positive(&key("attention.layer_norm_rms_epsilon"))?,
        rope_theta: metadata.positive(&key("rope.freq_base"))?.unwrap_or(10_000.0),
        rope_scaling: rope_scaling(parts, head_dim)?,
        max_position_embeddings: metadata.required_size(&key("context_length"))?,
        sliding_window: sliding_window(parts, &key("attention.sliding_window"))?,
        tie_word_embeddings: parts.find(HEAD).is_none(),
        qkv_bias: false,
        qk_norm: false,
    };
    config.check_bytes(path)?;
    Ok(config)
}

/// The length of a head, by whichever keys are there; all of them must say the same.
fn head_dim(parts: &Parts, hidden_size: usize, n_heads: usize) -> Result<usize> {
    let metadata = parts.metadata();
    let [key_length, value_length, rotary, heads] =
        ["attention.key_length", "attention.value_length", "rope.dimension_count", "attention.head_count"]
            .map(|name| format!("{ARCHITECTURE}.{name}"));
    let head_dim = match metadata.size(&key_length)? {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(n_heads) => hidden_size / n_heads,
        None => return Err(metadata.wrong(&heads, &format!("without {key_length} it must divide the {hidden_size} of embedding_length"))),
    };
    let values = metadata.size(&value_length)?;
    // Llama.cpp takes the quotient for either where it is absent.
    if values.unwrap_or(hidden_size / n_heads) != head_dim {
        return Err(metadata.wrong(&value_length, &format!("keys have {head_dim} elements, and values must have as many")));
    }
    if metadata.size(&rotary)?.is_some_and(|n| n != head_dim) {
        return Err(metadata.wrong(&rotary, &format!("heads have {head_dim} elements, and all of them must rotate")));
    }
    if !head_dim.is_multiple_of(2) {
        let problem = format!("heads have {head_dim} elements, by {key_length} or embedding_length; rotary positions need an even number");
        return Err(Error::config(metadata.path(), problem));
    }
    Ok(head_dim)
}

/// Rows of the embedding; as many tokens as the vocabulary has, if there is one.
fn vocab_size(parts: &Parts) -> Result<usize> {
    let metadata = parts.metadata();
    let shape = parts
        .find(EMBEDDING)
        .ok_or_else(|| Error::tensor(EMBEDDING, format!("is missing from {}", metadata.path().display())))?
        .shape(EMBEDDING);
    let (rows, _) = shape.ok_or_else(|| Error::tensor(EMBEDDING, "is no matrix"))?;
    let (key, tokens) = match metadata.texts_len(TOKENS)? {
        Some(tokens) => (TOKENS.to_owned(), Some(tokens)),
        None => {
            let key = format!("{ARCHITECTURE}.vocab_size");
            let size = metadata.size(&key)?;
            (key, size)
        }
    };
    if tokens.is_some_and(|tokens| tokens != rows) {
        return Err(metadata.wrong(&key, &format!("{EMBEDDING} has {rows} rows, one a token")));
    }
    u32::try_from(rows)
        .ok()
        .filter(|rows| *rows > 0)
        .map(|_| rows)
        .ok_or_else(|| Error::tensor(EMBEDDING, format!("has {rows} rows; 1 to {} are possible", u32::MAX)))
}

pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";

/// Nothing and 0 both mean that there is none.
fn sliding_window(parts: &Parts, key: &str) -> Result<Option<usize>> {
    match parts.metadata().integer(key)? {
        Some(0) => Ok(None),
        _ => parts.metadata().size(key),
    }
}

/// What would change the result and isn't computed here.
fn refuse_unsupported(parts: &Parts) -> Result<()> {
    let metadata = parts.metadata();
    for (name, supported) in REFUSED {
        let key = format!("{ARCHITECTURE}.{name}");
        if !metadata.is_nothing(&key) {
            return Err(metadata.unsupported(&key, supported));
        }
    }
    let layout = format!("{ARCHITECTURE}.tensor_data_layout");
    // Older converters wrote what all of them do.
    if metadata.text(&layout)?.is_some_and(|layout| layout != "Meta AI original pth") {
        return Err(metadata.unsupported(&layout, "\"Meta AI original pth\""));
    }
    Ok(())
}

/// How the frequencies of the base are scaled: by one factor, or by a divisor each.
fn rope_scaling(parts: &Parts, head_dim: usize) -> Result<Option<RopeScaling>> {
    let metadata = parts.metadata();
    let key = |name: &str| format!("{ARCHITECTURE}.rope.{name}");
    let factor = match metadata.number(&key("scaling.factor"))? {
        None => metadata.number(&key("scale_linear"))?,
        factor => factor,
    };
    // As llama.cpp reads them: linear unless the type says otherwise, and 0 is no factor.
    let kind = metadata.text(&key("scaling.type"))?;
    let linear = match (kind.unwrap_or("linear"), factor) {
        ("none", _) | ("linear", None | Some(0.0 | 1.0)) => None,
        ("linear", Some(factor)) => Some(RopeScaling::Linear { factor: factor as f32 }),
        (other, _) => {
            return Err(Error::Unsupported { what: "llama.rope.scaling.type", found: other.into(), supported: "\"none\" and \"linear\"" });
        }
    };
    let divisors = match parts.find(FREQUENCY_FACTORS) {
        Some(file) => {
            // The file has them all before memory is asked for: the metadata may claim any length of a head.
            let matrix = file.matrix(FREQUENCY_FACTORS, &[head_dim / 2])?;
            let mut divisors = vec![0.0; matrix.cols()];
            matrix.row_to_f32(0, &mut divisors);
            Some(RopeScaling::Divisors(divisors))
        }
        None => None,
    };
    if linear.is_some() && divisors.is_some() {
        let problem = format!("it has both {} and {FREQUENCY_FACTORS}; one kind of rotary scaling is possible", key("scaling.factor"));
        return Err(Error::config(metadata.path(), problem));
    }
    let scaling = divisors.or(linear);
    match scaling.as_ref().and_then(|scaling| scaling.problem(head_dim)) {
        Some(problem) => Err(Error::config(metadata.path(), format!("rotary scaling: {problem}"))),
        None => Ok(scaling),
    }
}
