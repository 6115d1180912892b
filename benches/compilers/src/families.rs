//! RADV takes its family of GPUs from the environment, once a process, and dies of bad SPIR-V. So each family has processes of its own.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::env;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::manifest::{self, Kernel};
use crate::vulkan::{Compiled, Compiler};

/// What a child prints, one in a line.
#[derive(Serialize, Deserialize)]
enum Line {
    /// A device is open.
    Opened,
    /// No device can be opened, and why.
    Closed(String),
    /// The next kernel, or why it didn't compile.
    Kernel(Result<Compiled, String>),
}

/// What came of each of the kernels on `family`.
pub fn compile(kernels: &[Kernel], directory: &Path, driver: &str, family: &str) -> Result<Vec<Result<Compiled, String>>> {
    let program = env::current_exe().context("the tool doesn't find its own file")?;
    let mut results = Vec::with_capacity(kernels.len());
    // Once more for each kernel that the driver died of.
    while results.len() < kernels.len() {
        let child = Command::new(&program)
            .args(["--child-from", &results.len().to_string()])
            .arg(directory)
            .env("RADV_FORCE_FAMILY", family)
            .env("VK_DRIVER_FILES", driver)
            // What loaders before 1.3.207 read.
            .env("VK_ICD_FILENAMES", driver)
            .env("MESA_SHADER_CACHE_DISABLE", "true")
            .stderr(Stdio::inherit())
            .output()
            .context("the tool doesn't start its own file")?;
        let mut opened = false;
        for line in String::from_utf8_lossy(&child.stdout).lines() {
            match serde_json::from_str(line).with_context(|| format!("the driver prints \"{line}\""))? {
                Line::Opened => opened = true,
                Line::Closed(why) => bail!(why),
                Line::Kernel(result) => results.push(result),
            }
        }
        ensure!(opened, "RADV dies as it starts ({})", child.status);
        if let Some(Kernel { entry, .. }) = kernels.get(results.len()) {
            results.push(Err(format!(
                "RADV dies of it ({}): is its SPIR-V valid, \"{entry}\" its entry point, and is none of its bindings missing?",
                child.status
            )));
        }
    }
    Ok(results)
}

/// The child's side: compiles the kernels from `first` on.
pub fn serve(directory: &Path, first: usize) -> Result<()> {
    let ended = compile_each(directory, first);
    ended.or_else(|error| print(&Line::Closed(format!("{error:#}"))))
}

fn compile_each(directory: &Path, first: usize) -> Result<()> {
    let mut compilers = HashMap::new();
    for kernel in manifest::load(directory)?.iter().skip(first) {
        let compiler = match compilers.entry(kernel.robust) {
            Entry::Occupied(compiler) => compiler.into_mut(),
            Entry::Vacant(none) => none.insert(Compiler::open(kernel.robust)?),
        };
        print(&Line::Opened)?;
        print(&Line::Kernel(compiler.compile(kernel).map_err(|error| format!("{error:#}"))))?;
    }
    Ok(())
}

fn print(line: &Line) -> Result<()> {
    println!("{}", serde_json::to_string(line)?);
    Ok(())
}
