//! [`Kernel`]: what `kernels.json` says of a kernel, with its SPIR-V.

use std::collections::HashSet;
use std::fs::{self, File};
use std::hash::Hash;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    pub name: String,
    file: PathBuf,
    pub entry: String,
    /// Weights that an iteration of the inner loop uses.
    pub weights_per_iteration: Option<u32>,
    #[serde(default)]
    pub bindings: Vec<Binding>,
    #[serde(default)]
    pub push_constant_bytes: u32,
    /// Specialization constants: id and value.
    #[serde(default)]
    pub spec: Vec<(u32, u32)>,
    /// The subgroup size to require; a family without it compiles for its own.
    pub subgroup: Option<u32>,
    /// With robustBufferAccess2, as on wgpu's devices. It forbids joining some loads.
    #[serde(default)]
    pub robust: bool,
    #[serde(skip)]
    pub spirv: Vec<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Binding {
    pub set: u32,
    pub binding: u32,
    pub kind: Kind,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Uniform,
    Storage,
}

/// All kernels of `directory`.
pub fn load(directory: &Path) -> Result<Vec<Kernel>> {
    let path = directory.join("kernels.json");
    let text = fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))?;
    let mut kernels: Vec<Kernel> = serde_json::from_str(&text).with_context(|| format!("{} is not a list of kernels", path.display()))?;
    ensure!(!kernels.is_empty(), "{} lists no kernels", path.display());
    for kernel in &mut kernels {
        kernel.check().and_then(|()| kernel.read(directory)).with_context(|| format!("kernel \"{}\"", kernel.name))?;
    }
    if let Some(stem) = twice(kernels.iter().map(Kernel::file_stem)) {
        bail!("two kernels have the file name \"{stem}\"");
    }
    Ok(kernels)
}

impl Kernel {
    /// The name as part of a file's.
    pub fn file_stem(&self) -> String {
        self.name.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' }).collect()
    }

    /// What Vulkan takes for granted, as far as it doesn't depend on the device.
    fn check(&self) -> Result<()> {
        if let Some((set, binding)) = twice(self.bindings.iter().map(|binding| (binding.set, binding.binding))) {
            bail!("binding {binding} of set {set} is there twice");
        }
        if let Some(id) = twice(self.spec.iter().map(|(id, _)| id)) {
            bail!("specialization constant {id} is there twice");
        }
        ensure!(self.push_constant_bytes.is_multiple_of(4), "{} bytes of push constants are no multiple of 4", self.push_constant_bytes);
        ensure!(matches!(self.subgroup, None | Some(32 | 64)), "the subgroup size is 32, 64 or null");
        ensure!(self.weights_per_iteration != Some(0), "an iteration uses some weights, or it is null");
        Ok(())
    }

    fn read(&mut self, directory: &Path) -> Result<()> {
        let path = directory.join(&self.file);
        let mut file = File::open(&path).with_context(|| format!("{} cannot be opened", path.display()))?;
        self.spirv = ash::util::read_spv(&mut file).with_context(|| format!("{} is not SPIR-V", path.display()))?;
        Ok(())
    }
}

/// The first item that has been there before.
fn twice<T: Hash + Eq + Clone>(items: impl IntoIterator<Item = T>) -> Option<T> {
    let mut seen = HashSet::new();
    items.into_iter().find(|item| !seen.insert(item.clone()))
}
