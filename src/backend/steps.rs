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
    Qkv { x: Buf, parts: [Projection; 3], layer: usize },
    /// `y = silu(x gate^T) * (x up^T)`; `scratch` takes the second product.
    GatedLinear { x: Buf, gate: Weight, up: Weight, scratch: Buf, y: Buf },
    /// An op alone.
    Op(Op),
}

/// A linear layer to heads, and what is done to them before they are rotated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Projection {
    pub weight: Weight,
    pub bias: Option<Weight>,
    pub norm: Option<Weight>,
    pub y: Buf,
}

impl Projection {
    /// The projection of x that ops begin with, and what follows it.
    fn first(ops: &[Op]) -> Option<(Buf, Self, &[Op])> {
        let (&Op::Linear { x, y, weight, strategy: ColumnParallel }, rest) = ops.split_first()? else { return None };
        let (bias, rest) = match rest {
            [Op::AddBias { x, bias }, rest @ ..] if *x == y => (Some(*bias), rest),
            _ => (None, rest),
        };
        Some((x, Self { weight, bias, norm: None, y }, rest))
    }

    /// Takes the norm of its heads, where that is what follows.
    fn take_norm<'a>(&mut self, ops: &'a [Op]) -> &'a [Op] {
        match ops {
            [Op::HeadNorm { x, weight }, rest @ ..] if *x == self.y => {
                self.norm = Some(*weight);
                rest
            }
            _ => ops,
        }
    }
}

/// The step that ops begin with if they are those of [`Step::Qkv`], and how many they are.
fn qkv(ops: &[Op]) -> Option<(Step, usize)> {
    let (x, mut q, rest) = Projection::first(ops)?;
    let (of_k, mut k, rest) = Projection::first(rest)?;
    let (of_v, v, rest) = Projection::first(rest)?;
    let rest = k.take_norm(q.take_norm(rest));
    match *rest {
        [Op::Rope { x: rotated_q }, Op::Rope { x: rotated_k }, Op::StoreKv { layer, k: stored_k, v: stored_v }, ..]
            if (of_k, of_v, rotated_q, rotated_k, stored_k, stored_v) == (x, x, q.y, k.y, k.y, v.y) =>
        {
            Some((Step::Qkv { x, parts: [q, k, v], layer }, ops.len() - rest.len() + 3))
        }
        _ => None,
    }
}

/// The steps of a segment's ops, in their order.
pub(crate) fn lower(mut ops: &[Op]) -> Vec<Step> {
    let mut steps = Vec::new();
    while let Some(&first) = ops.first() {
        if let Some((step, taken)) = qkv(ops) {
            steps.push(step);
            ops = &ops[taken..];
            continue;
        }
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
    use crate::partition::tests::sizes;

    #[test]
    fn biases_and_norms_of_heads_are_part_of_the_projections() {
        for (qkv_bias, qk_norm) in [(true, false), (false, true), (true, true)] {
            let config = Config { qkv_bias, qk_norm, ..sizes(4, 2) };
            let plan = mistral::record(&config, 0..2, false);
            assert_eq!(plan.ops.len(), 2 * (16 + 3 * usize::from(qkv_bias) + 2 * usize::from(qk_norm)));
            let steps = lower(&plan.ops);
            assert_eq!(steps.len(), 2 * 7 + 1);
            for step in steps {
                let Step::Qkv { parts: [q, k, v], .. } = step else { continue };
                let has = |p: Projection| (p.bias.is_some(), p.norm.is_some());
                assert_eq!([has(q), has(k), has(v)], [(qkv_bias, qk_norm), (qkv_bias, qk_norm), (qkv_bias, false)]);
                for (part, name) in [(q, "q"), (k, "k"), (v, "v")] {
                    let named = |weight: Weight| plan.weights[weight.0].name.split_once("self_attn.").unwrap().1.to_owned();
                    assert_eq!(named(part.weight), format!("{name}_proj.weight"));
                    part.bias.iter().for_each(|bias| assert_eq!(named(*bias), format!("{name}_proj.bias")));
                    part.norm.iter().for_each(|norm| assert_eq!(named(*norm), format!("{name}_norm.weight")));
                }
            }
        }
    }

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
            qkv_bias: false,
            qk_norm: false,
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
