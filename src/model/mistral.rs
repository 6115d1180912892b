//! THE model: one decoder layer, recorded once and used by every grid, device and entry point.

use std::ops::Range;

use crate::config::Config;
use crate::partition::Dim;
use crate::plan::{Buf, ColumnParallel, Plan, Recorder, RowParallel};

/// Records what the stage of `layers` does. `cut`: several places hold it, so that sums go through the host.
pub(crate) fn record(config: &Config, layers: Range<usize>, cut: bool) -> Plan {
    let mut r = Recorder::new(cut).having(config.optional_weights().into_iter().map(|(name, _)| name));
    let x = r.input();
    for (in_stage, layer) in layers.clone().enumerate() {
        r.within(format!("model.layers.{layer}."));
        decoder_layer(&mut r, in_stage, x);
    }
    if layers.end < config.n_layers {
        return r.pass(x);
    }
    r.within("");
    let x = r.take_rows(x);
    let h = r.rms_norm(x, "model.norm");
    let logits = r.linear(h, head(config), Dim::Vocab, ColumnParallel);
    r.all_gather(logits)
}

/// The name of the head, which may be the embedding.
pub(crate) fn head(config: &Config) -> &'static str {
    if config.tie_word_embeddings { "model.embed_tokens" } else { "lm_head" }
}

fn decoder_layer(r: &mut Recorder, layer: usize, x: Buf) {
    let h = r.rms_norm(x, "input_layernorm");
    let q = r.linear(h, "self_attn.q_proj", Dim::Heads, ColumnParallel);
    let k = r.linear(h, "self_attn.k_proj", Dim::KvHeads, ColumnParallel);
    let v = r.linear(h, "self_attn.v_proj", Dim::KvHeads, ColumnParallel);
    r.head_norm(q, "self_attn.q_norm");
    r.head_norm(k, "self_attn.k_norm");
    r.rope(q);
    r.rope(k);
    let a = r.attend(layer, q, k, v);
    let o = r.linear(a, "self_attn.o_proj", Dim::Hidden, RowParallel);
    r.all_reduce(o);
    r.add(x, o);
    let h = r.rms_norm(x, "post_attention_layernorm");
    let gate = r.linear(h, "mlp.gate_proj", Dim::Channels, ColumnParallel);
    let up = r.linear(h, "mlp.up_proj", Dim::Channels, ColumnParallel);
    let g = r.swiglu(gate, up);
    let d = r.linear(g, "mlp.down_proj", Dim::Hidden, RowParallel);
    r.all_reduce(d);
    r.add(x, d);
}
