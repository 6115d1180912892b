//! What places run of a plan: ops that share a pass over their data become one step.

use crate::plan::{Buf, ColumnParallel, Op, RowParallel, Weight};

/// One pass over the data of one or more ops, over all ranks of the place and all rows of a launch.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Step {
    /// `x += add`, where there is one, and `y = rms_norm(x)`.
    Norm { add: Option<Buf>, x: Buf, y: Buf, weight: Weight },
    /// Products of the same rows with one or more weights, in one sweep; `sum`: row-parallel, the place's ranks are added up.
    Linear { x: Buf, to: Vec<(Weight, Buf)>, sum: bool },
    /// The projections of x to queries, keys and values: the first two rotated, the last two stored in the pages of `layer`.
    Qkv { x: Buf, weights: [Weight; 3], q: Buf, k: Buf, v: Buf, layer: usize },
    /// `y = silu(x gate^T) * (x up^T)`; `scratch` takes the second product.
    GatedLinear { x: Buf, gate: Weight, up: Weight, scratch: Buf, y: Buf },
    /// An op alone.
    Op(Op),
}

/// The steps of a segment's ops, in their order.
pub(crate) fn lower(mut ops: &[Op]) -> Vec<Step> {
    let mut steps = Vec::new();
    while let Some(&first) = ops.first() {
        let (step, taken) = match *ops {
            [Op::Add { x, y: add }, Op::RmsNorm { x: normed, y, weight }, ..] if x == normed => {
                (Step::Norm { add: Some(add), x, y, weight }, 2)
            }
            [Op::RmsNorm { x, y, weight }, ..] => (Step::Norm { add: None, x, y, weight }, 1),
            [
                Op::Linear { x, y: gate_y, weight: gate, strategy: ColumnParallel },
                Op::Linear { x: same, y: scratch, weight: up, strategy: ColumnParallel },
                Op::SwiGlu { gate: g, up: u, y },
                ..,
            ] if (same, g, u) == (x, gate_y, scratch) => (Step::GatedLinear { x, gate, up, scratch, y }, 3),
            [
                Op::Linear { x, y: q, weight: wq, strategy: ColumnParallel },
                Op::Linear { x: x1, y: k, weight: wk, strategy: ColumnParallel },
                Op::Linear { x: x2, y: v, weight: wv, strategy: ColumnParallel },
                Op::Rope { x: rotated_q },
                Op::Rope { x: rotated_k },
                Op::StoreKv { layer, k: stored_k, v: stored_v },
                ..,
            ] if (x1, x2, rotated_q, rotated_k, stored_k, stored_v) == (x, x, q, k, k, v) => {
                (Step::Qkv { x, weights: [wq, wk, wv], q, k, v, layer }, 6)
            }
            [Op::Linear { x, strategy: ColumnParallel, .. }, ..] => {
                let of_x = |op: &Op| match *op {
                    Op::Linear { x: same, y, weight, strategy: ColumnParallel } if same == x => Some((weight, y)),
                    _ => None,
                };
                let to: Vec<_> = ops.iter().map_while(of_x).collect();
                let taken = to.len();
                (Step::Linear { x, to, sum: false }, taken)
            }
            [Op::Linear { x, y, weight, strategy: RowParallel }, ..] => (Step::Linear { x, to: vec![(weight, y)], sum: true }, 1),
            _ => (Step::Op(first), 1),
        };
        steps.push(step);
        ops = &ops[taken..];
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::model::mistral;

    #[test]
    fn a_layer_is_seven_steps_on_one_place_and_no_step_crosses_a_segment() {
        let config = Config {
            vocab_size: 50,
            hidden_size: 32,
            intermediate_size: 64,
            n_layers: 3,
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 8,
            rms_norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: None,
            max_position_embeddings: 128,
            sliding_window: None,
            tie_word_embeddings: false,
        };
        let one = mistral::record(&config, 0..3, false);
        let steps = lower(&one.ops);
        let of = |kind: fn(&Step) -> bool| steps.iter().filter(|s| kind(s)).count();
        assert_eq!(of(|s| matches!(s, Step::Norm { add: Some(_), .. })), 5, "every add but the last is followed by a norm");
        assert_eq!(of(|s| matches!(s, Step::Norm { add: None, .. })), 2);
        assert_eq!(of(|s| matches!(s, Step::GatedLinear { .. })), 3);
        assert_eq!(of(|s| matches!(s, Step::Qkv { .. })), 3);
        assert_eq!(of(|s| matches!(s, Step::Linear { sum: true, .. })), 6);
        assert_eq!(steps.len(), 3 * 7 + 4, "the last add, the wanted rows, the last norm and the head");
        let cut = mistral::record(&config, 0..3, true);
        for segment in &cut.segments {
            lower(&cut.ops[segment.ops.clone()]);
        }
        let steps = cut.segments.iter().flat_map(|s| lower(&cut.ops[s.ops.clone()]));
        assert_eq!(
            steps.filter(|s| matches!(s, Step::Norm { add: Some(_), .. })).count(),
            5,
            "a sum from the host is added by the next norm"
        );
    }
}
