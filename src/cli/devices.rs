//! `torchless devices`: what a rank can live on.

use serde_json::{Value, json};
use torchless::{Device, DeviceLimits, devices};

use super::Outcome;
use super::output::{bytes, print, print_json, table};

#[derive(clap::Args)]
pub struct Args {
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Outcome {
    let devices = devices();
    if args.json {
        return print_json(&json!({"devices": devices.iter().map(document).collect::<Vec<_>>()}));
    }
    let header = ["device", "name", "kind", "backend", "driver", "largest binding", "features"];
    let rows = devices.iter().map(|d| {
        let limits = d.limits();
        let binding = limits.map_or(String::new(), |l| bytes(l.largest_binding));
        let driver = format!("{} {}", d.driver(), d.driver_info());
        [d.label(), d.name(), kind(d), d.backend().to_owned(), driver.trim().to_owned(), binding, limits.map_or(String::new(), features)]
    });
    let rows: Vec<Vec<String>> = std::iter::once(header.map(str::to_owned)).chain(rows).map(Vec::from).collect();
    print(&table(&rows))
}

fn document(device: &Device) -> Value {
    json!({
        "device": device.label(),
        "name": device.name(),
        "kind": device.kind(),
        "software": device.is_software(),
        "conformant": device.is_conformant(),
        "backend": device.backend(),
        "driver": device.driver(),
        "driver_info": device.driver_info(),
        "limits": device.limits(),
    })
}

fn kind(device: &Device) -> String {
    let doubt = if device.is_conformant() { "" } else { " (not conformant)" };
    format!("{}{doubt}", device.kind().name())
}

fn features(limits: DeviceLimits) -> String {
    let subgroups = limits
        .subgroup_sizes
        .map(|(least, most)| if least == most { format!("subgroups of {least}") } else { format!("subgroups of {least} to {most}") });
    let named = [(limits.f16, "f16"), (limits.mappable_primary_buffers, "mappable buffers"), (limits.timestamps, "timestamps")];
    subgroups.into_iter().chain(named.into_iter().filter(|(has, _)| *has).map(|(_, name)| name.to_owned())).collect::<Vec<_>>().join(", ")
}
