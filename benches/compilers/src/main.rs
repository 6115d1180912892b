//! What AMD's Vulkan compiler makes of compute kernels: registers, occupancy, and the instructions of the inner loop. It is ACO, within
//! Mesa's RADV (Debian's mesa-vulkan-drivers), which compiles for GPUs that aren't there.

mod assembly;
mod families;
mod manifest;
mod pipeline;
mod table;
mod vulkan;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde_json::json;
use table::Row;

/// Compiles compute kernels with RADV, without a GPU, and counts what they need.
#[derive(Parser)]
struct Arguments {
    /// Where `kernels.json` and the SPIR-V files are.
    directory: PathBuf,
    /// GPUs to compile for, by RADV's names.
    #[arg(long, value_delimiter = ',', default_values = ["polaris10", "vega10", "navi10", "navi21", "gfx1100"])]
    families: Vec<String>,
    /// Prints one document with all of the driver's statistics instead of the table.
    #[arg(long)]
    json: bool,
    /// Writes the assembly of each kernel and family into this directory.
    #[arg(long, value_name = "DIRECTORY")]
    asm: Option<PathBuf>,
    /// Only shows the kernels that spill registers, and doesn't fail.
    #[arg(long)]
    allow_spills: bool,
    /// RADV's description for the Vulkan loader.
    #[arg(long, value_name = "FILE", default_value_t = format!("/usr/share/vulkan/icd.d/radeon_icd.{}.json", std::env::consts::ARCH))]
    driver: String,
    /// Compiles from this kernel on, for the family that is in the environment.
    #[arg(long, hide = true)]
    child_from: Option<usize>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let Arguments { directory, driver, .. } = arguments;
    if let Some(first) = arguments.child_from {
        families::serve(directory, first)?;
        return Ok(ExitCode::SUCCESS);
    }
    let kernels = manifest::load(directory)?;
    ensure!(fs::exists(driver).unwrap_or(false), "{driver} is not there: install mesa-vulkan-drivers, or name RADV's with --driver");
    if let Some(asm) = &arguments.asm {
        fs::create_dir_all(asm).with_context(|| format!("{} cannot be made", asm.display()))?;
    }

    let (mut rows, mut failures) = (Vec::new(), Vec::new());
    for family in &arguments.families {
        let results = families::compile(&kernels, directory, driver, family).with_context(|| format!("family {family}"))?;
        for (kernel, result) in kernels.iter().zip(results) {
            let failure = match result {
                Err(why) => Some(why),
                Ok(compiled) => {
                    let row = Row::new(kernel, family, compiled);
                    if let Some(asm) = &arguments.asm {
                        let path = asm.join(row.file_name());
                        fs::write(&path, row.assembly()).with_context(|| format!("{} cannot be written", path.display()))?;
                    }
                    let spills = row.spills().filter(|_| !arguments.allow_spills);
                    rows.push(row);
                    spills
                }
            };
            if let Some(why) = failure {
                eprintln!("error: kernel \"{}\" on {family}: {why}", kernel.name);
                failures.push(json!({"kernel": kernel.name, "family": family, "why": why}));
            }
        }
    }

    let code = if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    if arguments.json {
        let rows: Vec<_> = rows.iter().map(Row::json).collect();
        println!("{:#}", json!({"kernels": rows, "failures": failures}));
    } else if !rows.is_empty() {
        println!("{}", table::HEAD);
        rows.iter().for_each(|row| println!("{}", row.markdown()));
    }
    Ok(code)
}
