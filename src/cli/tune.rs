//! `torchless tune`: what there is to choose on a GPU, and what is chosen.

use serde_json::json;
use torchless::Device;

use super::Outcome;
use super::output::{print, print_json, table};

#[derive(clap::Args)]
pub struct Args {
    /// GPUs, gpu:N between commas, as `torchless devices` numbers them; or auto: every hardware GPU
    #[arg(long, value_name = "LIST", default_value = "auto")]
    devices: String,

    /// How the weights are held: f32, f16, bf16, q8_0, q4_0 or iq4_nl
    #[arg(long, value_name = "FORMAT", default_value = "q4_0")]
    weights: String,

    /// Outputs of the layer
    #[arg(long, value_name = "N", default_value_t = 4096)]
    out: usize,

    /// Columns of the layer
    #[arg(long, value_name = "N", default_value_t = 4096)]
    cols: usize,

    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Outcome {
    let mut rows = vec![["device", "variant", "us", "over the best", ""].map(str::to_owned).to_vec()];
    let mut documents = Vec::new();
    for device in Device::parse_list(&args.devices)? {
        let times = device.kernel_times(&args.weights, args.out, args.cols)?;
        let us = |i: usize| times[i].time.as_secs_f64() * 1e6;
        let best = (0..times.len()).map(us).fold(f64::INFINITY, f64::min);
        for (i, time) in times.iter().enumerate() {
            let (us, over) = (us(i), us(i) / best);
            let chosen = if time.chosen { "chosen" } else { "" };
            rows.push(vec![device.label(), time.name.clone(), format!("{us:.1}"), format!("{over:.2}"), chosen.into()]);
            documents.push(json!({
                "device": device.label(), "variant": time.name, "us": us, "over_best": over, "chosen": time.chosen,
            }));
        }
    }
    if args.json {
        return print_json(&json!({"weights": args.weights, "out": args.out, "cols": args.cols, "variants": documents}));
    }
    print(&table(&rows))
}
