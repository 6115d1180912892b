//! The names of tensors in GGUF files.

/// A tensor's name in Hugging Face checkpoints and in GGUF files, without `.weight` or `.bias`.
const ENDS: [(&str, &str); 3] = [("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];

/// The same within a layer.
const LAYER: [(&str, &str); 11] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("self_attn.o_proj", "attn_output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// Whether a tensor has no part in what a model of so many layers computes: one of a further layer, which predicts tokens after the next,
/// or one that is read in another place.
pub(super) fn changes_nothing(name: &str, n_layers: usize) -> bool {
    let layer = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')?.0.parse::<usize>().ok());
    layer.is_some_and(|layer| layer >= n_layers)
        || name == "rope_freqs.weight"
        || name.trim_end_matches(".weight").ends_with(".attn_rot_embd")
}

pub(super) const EMBEDDING: &str = "token_embd.weight";
pub(super) const HEAD: &str = "output.weight";

/// The rows of these are heads, in which GGUF files have the elements of a rotary pair as neighbours.
pub(super) fn has_rotary_rows(name: &str) -> bool {
    name.ends_with(".self_attn.q_proj.weight") || name.ends_with(".self_attn.k_proj.weight")
}

/// What GGUF files call the tensor that transformers' `MistralForCausalLM` names so.
pub(super) fn gguf_name(name: &str) -> Option<String> {
    let (part, kind) = name.rsplit_once('.')?;
    let of = |table: &[(&str, &'static str)], part: &str| table.iter().find(|(theirs, _)| *theirs == part).map(|(_, ours)| *ours);
    match part.strip_prefix("model.layers.") {
        Some(rest) => {
            let (layer, part) = rest.split_once('.')?;
            Some(format!("blk.{layer}.{}.{kind}", of(&LAYER, part)?))
        }
        None => Some(format!("{}.{kind}", of(&ENDS, part)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_have_the_names_of_converted_checkpoints() {
        let names = [
            ("model.embed_tokens.weight", Some(EMBEDDING)),
            ("lm_head.weight", Some(HEAD)),
            ("model.layers.12.self_attn.o_proj.weight", Some("blk.12.attn_output.weight")),
            ("model.layers.0.post_attention_layernorm.weight", Some("blk.0.ffn_norm.weight")),
            ("model.layers.0.self_attn.q_norm.weight", Some("blk.0.attn_q_norm.weight")),
            ("model.layers.0.self_attn.q_proj.bias", Some("blk.0.attn_q.bias")),
            ("model.rotary.weight", None),
        ];
        for (theirs, ours) in names {
            assert_eq!(gguf_name(theirs).as_deref(), ours, "{theirs}");
        }
    }
}
