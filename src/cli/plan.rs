//! `torchless plan`: how a model would be split, read off the checkpoint's headers.

use std::ops::Range;

use serde_json::{Value, json};
use torchless::{Parameters, RankInfo, plan_summary};

use super::Outcome;
use super::grid::GridArgs;
use super::output::{bytes, print, print_json, table};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    grid: GridArgs,
}

pub fn run(args: &Args) -> Outcome {
    let devices = args.grid.devices()?;
    let params = Parameters::load(&args.grid.model)?;
    let config = args.grid.config(&params, params.config().max_position_embeddings);
    let plan = plan_summary(&params, &config, &devices)?;
    if args.grid.json {
        return print_json(&json!({
            "ranks": plan.ranks.iter().map(document).collect::<Vec<_>>(),
            "ops_per_token": plan.ops_per_token,
            "submissions_per_token": plan.submissions_per_token,
            "collectives_per_token": plan.collectives_per_token,
            "weight_bytes_per_token": plan.weight_bytes_per_token,
        }));
    }
    let (ops, submissions, collectives) = (plan.ops_per_token, plan.submissions_per_token, plan.collectives_per_token);
    let read = bytes(plan.weight_bytes_per_token);
    print(&format!(
        "{}\na token: {ops} ops, {submissions} submissions, {collectives} collectives, {read} of weights\n",
        partition(&plan.ranks)
    ))
}

/// Who owns what, as a table.
fn partition(ranks: &[RankInfo]) -> String {
    let header = ["stage", "rank", "device", "layers", "heads", "KV heads", "channels", "vocabulary", "weights"].map(str::to_owned);
    let range = |r: &Range<usize>| format!("{}..{}", r.start, r.end);
    let rows = ranks.iter().map(|r| {
        let p = &r.partition;
        let owned = [&r.layers, &p.heads, &p.kv_heads, &p.channels, &p.vocab].map(range);
        let mut row = vec![r.stage.to_string(), r.rank.to_string(), r.device.clone()];
        row.extend(owned);
        row.push(bytes(r.weight_bytes));
        row
    });
    table(&std::iter::once(header.to_vec()).chain(rows).collect::<Vec<_>>())
}

fn document(rank: &RankInfo) -> Value {
    let range = |r: &Range<usize>| [r.start, r.end];
    let p = &rank.partition;
    json!({
        "stage": rank.stage,
        "rank": rank.rank,
        "device": rank.device,
        "layers": range(&rank.layers),
        "heads": range(&p.heads),
        "kv_heads": range(&p.kv_heads),
        "channels": range(&p.channels),
        "vocab": range(&p.vocab),
        "weight_bytes": rank.weight_bytes,
    })
}
