//! `torchless plan`: how a model would be split, read off the checkpoint's headers; and how fast it would be, by running a few of its layers.

use std::ops::Range;

use serde_json::{Value, json};
use torchless::{
    Choice, Device, DeviceMemory, ParallelConfig, Parameters, Prediction, RankInfo, choose, foresee, forget_predictions, plan_summary,
};

use super::Outcome;
use super::grid::{GridArgs, SLOWER, distinct, labels};
use super::output::{bytes, print, print_json, table};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    grid: GridArgs,

    /// Predict how fast the model would be on the devices, on each alone and on the fastest together, by running a few layers there, and do so anew. Of several devices that is done
    /// anyhow, but what was measured before is not measured again
    #[arg(long, conflicts_with = "no_predict")]
    predict: bool,

    /// Predict nothing of devices that are named, and open none
    #[arg(long)]
    no_predict: bool,

    /// Sequences that step together, for what is predicted
    #[arg(long, value_name = "B", default_value = "1", value_parser = clap::value_parser!(u16).range(1..=4096))]
    batch: u16,
}

pub fn run(args: &Args) -> Outcome {
    let candidates = args.grid.candidates()?;
    let params = Parameters::load(args.grid.model.path()?)?;
    let config = args.grid.config(&params, params.config().max_position_embeddings);
    if args.predict {
        forget_predictions(&params, &config);
    }
    let wanted = args.predict || (!args.no_predict && distinct(&candidates).len() > 1);
    let forecast = if wanted { Some(Forecast::of(args, &params, &config, &candidates)?) } else { None };
    let (devices, config) = match &forecast {
        Some(Forecast { asked: None, choice }) => {
            let best = &choice.predictions[choice.chosen];
            (best.devices.clone(), best.shares.iter().fold(config, |config, shares| config.with_shares(shares.clone())))
        }
        Some(_) => (candidates, config),
        None => args.grid.chosen(&params, config)?,
    };
    let plan = plan_summary(&params, &config, &devices)?;
    if args.grid.json {
        return print_json(&json!({
            "forecast": forecast.as_ref().map(Forecast::document),
            "ranks": plan.ranks.iter().map(document).collect::<Vec<_>>(),
            "ops_per_token": plan.ops_per_token,
            "submissions_per_token": plan.submissions_per_token,
            "collectives_per_token": plan.collectives_per_token,
            "weight_bytes_per_token": plan.weight_bytes_per_token,
            "memory": plan.memory.iter().map(|d| json!({
                "device": d.device, "weight_bytes": d.weights, "cache_bytes": d.cache, "workspace_bytes": d.workspace, "memory_bytes": d.has,
            })).collect::<Vec<_>>(),
        }));
    }
    let (ops, submissions, collectives) = (plan.ops_per_token, plan.submissions_per_token, plan.collectives_per_token);
    let read = bytes(plan.weight_bytes_per_token);
    print(&format!(
        "{}\n{}\na token: {ops} ops, {submissions} submissions, {collectives} collectives, {read} of weights\n{}",
        partition(&plan.ranks),
        memory(&plan.memory),
        forecast.map_or(String::new(), |forecast| forecast.text())
    ))
}

/// What the devices were predicted to do.
struct Forecast {
    /// The grid that was asked for; `None` where the choice was left to us.
    asked: Option<Prediction>,
    choice: Choice,
}

impl Forecast {
    fn of(args: &Args, params: &Parameters, config: &ParallelConfig, devices: &[Device]) -> Outcome<Self> {
        let batch = usize::from(args.batch);
        let choice = choose(params, config, &distinct(devices), batch)?;
        let only_one = devices.len() == 1 && config.shares.is_none();
        let asked = if args.grid.is_left_to_us() || only_one { None } else { Some(foresee(params, config, devices, batch)?) };
        Ok(Self { asked, choice })
    }

    fn text(&self) -> String {
        let mut rows = vec![["devices", "shares", "tokens/s", ""].map(str::to_owned).to_vec()];
        let mut row = |prediction: &Prediction, what: &str| {
            rows.push(vec![labels(&prediction.devices), shares(prediction), format!("{:.2}", prediction.tokens_per_second()), what.into()]);
        };
        if let Some(asked) = &self.asked {
            row(asked, "as asked");
        }
        let Choice { predictions, chosen, failed, .. } = &self.choice;
        for (i, prediction) in predictions.iter().enumerate() {
            row(prediction, if i == *chosen { "chosen" } else { "" });
        }
        let mut text = format!("\npredicted:\n{}", table(&rows));
        for (devices, error) in failed {
            text += &format!("{} can't: {error}\n", labels(devices));
        }
        text + &self.reason() + "\n"
    }

    /// Why the chosen one is, and what is wrong with the one that was asked for.
    fn reason(&self) -> String {
        let best = &self.choice.predictions[self.choice.chosen];
        let ratio = |other: &Prediction| best.tokens_per_second() / other.tokens_per_second();
        if let Some(asked) = self.asked.as_ref().filter(|asked| ratio(asked) > SLOWER) {
            return format!("{} would be {:.2} times as fast as {}", labels(&best.devices), ratio(asked), labels(&asked.devices));
        }
        let split = self.choice.predictions.iter().find(|p| p.devices.len() > 1);
        let single = self.choice.predictions.iter().find(|p| p.devices.len() == 1);
        match (split, single) {
            (Some(_), Some(single)) if best.devices.len() > 1 => {
                format!(
                    "splitting over {} is {:.2} times as fast as {} alone",
                    labels(&best.devices),
                    ratio(single),
                    labels(&single.devices)
                )
            }
            (Some(_), None) => format!("no device can run it alone: {} can together", labels(&best.devices)),
            (Some(split), _) => {
                let of = 1.0 / ratio(split);
                format!("{} alone: the best split, over {}, would give {of:.2} of its speed", labels(&best.devices), labels(&split.devices))
            }
            _ if self.choice.predictions.len() == 1 && self.choice.failed.is_empty() => {
                format!("{} is the only device", labels(&best.devices))
            }
            _ => format!("{} is the fastest of those that can", labels(&best.devices)),
        }
    }

    fn document(&self) -> Value {
        let names = |devices: &[Device]| devices.iter().map(Device::label).collect::<Vec<_>>();
        let prediction = |p: &Prediction| {
            json!({
                "devices": names(&p.devices), "shares": p.shares,
                "tokens_per_s": p.tokens_per_second(), "batch": p.batch,
            })
        };
        json!({
            "asked": self.asked.as_ref().map(prediction),
            "predictions": self.choice.predictions.iter().map(prediction).collect::<Vec<_>>(),
            "chosen": self.choice.chosen,
            "failed": self.choice.failed.iter().map(|(d, e)| json!({"devices": names(d), "why": e.to_string()})).collect::<Vec<_>>(),
            "reason": self.reason(),
        })
    }
}

/// In parts of the smallest.
fn shares(prediction: &Prediction) -> String {
    let Some(shares) = &prediction.shares else { return String::new() };
    let least = shares.iter().copied().fold(f64::INFINITY, f64::min);
    shares.iter().map(|share| format!("{:.1}", share / least)).collect::<Vec<_>>().join(":")
}

/// What each device holds of how much, as a table.
fn memory(devices: &[DeviceMemory]) -> String {
    let header = ["device", "weights", "cache, when full", "workspace", "of"].map(str::to_owned).to_vec();
    let row = |d: &DeviceMemory| {
        let has = d.has.map_or("unknown".into(), bytes);
        [vec![d.device.clone()], [d.weights, d.cache, d.workspace].map(bytes).to_vec(), vec![has]].concat()
    };
    table(&std::iter::once(header).chain(devices.iter().map(row)).collect::<Vec<_>>())
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
