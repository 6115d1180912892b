//! [`Row`]: what is shown of a kernel on a family.

use serde_json::{Value, json};

use crate::assembly::{self, Loop};
use crate::manifest::Kernel;
use crate::vulkan::Compiled;

pub const HEAD: &str = "\
| kernel | family | subgroup | VGPRs | SGPRs | spilled VGPRs | spilled SGPRs | scratch, bytes | LDS, bytes | code, bytes | \
subgroups per SIMD | latency | inverse throughput | inner loop | VALU | SALU | VMEM + SMEM | LDS | control | instructions per weight |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|";

pub struct Row<'a> {
    kernel: &'a Kernel,
    family: &'a str,
    compiled: Compiled,
    /// As [`assembly::inner_loops`] orders them.
    inner_loops: Vec<Loop>,
}

impl<'a> Row<'a> {
    pub fn new(kernel: &'a Kernel, family: &'a str, compiled: Compiled) -> Self {
        let inner_loops = assembly::inner_loops(&compiled.assembly);
        Self { kernel, family, compiled, inner_loops }
    }

    /// Says what is wrong if there are any, or nobody knows.
    pub fn spills(&self) -> Option<String> {
        let spilled = |registers| self.compiled.statistics.get(registers).copied();
        match (spilled("Spilled VGPRs"), spilled("Spilled SGPRs")) {
            (Some(0), Some(0)) => None,
            (Some(vgprs), Some(sgprs)) => Some(format!("it spills {vgprs} VGPRs and {sgprs} SGPRs")),
            _ => Some("the driver doesn't say whether it spills".into()),
        }
    }

    pub fn markdown(&self) -> String {
        let Compiled { subgroup_size, subgroups_per_simd, most_subgroups_per_simd, .. } = &self.compiled;
        let statistic = |name| self.compiled.statistics.get(name).map_or("-".into(), u64::to_string);
        let registers = ["VGPRs", "SGPRs", "Spilled VGPRs", "Spilled SGPRs", "Scratch size", "LDS size", "Code size"].map(statistic);
        let estimates = ["Latency", "Inverse Throughput"].map(statistic);
        let instructions = self.inner_loops.first().map(|inner| inner.instructions);
        let counts = match instructions {
            Some(i) => [i.total(), i.valu, i.salu, i.vmem + i.smem, i.lds, i.control].map(|count| count.to_string()),
            None => [(); 6].map(|()| "-".into()),
        };
        let per_weight = self.per_weight().map_or("-".into(), |count| format!("{count:.2}"));
        format!(
            "| {} | {} | {subgroup_size} | {} | {subgroups_per_simd} of {most_subgroups_per_simd} | {} | {} | {per_weight} |",
            self.kernel.name.replace('|', "\\|"),
            self.family,
            registers.join(" | "),
            estimates.join(" | "),
            counts.join(" | "),
        )
    }

    /// Everything but the assembly.
    pub fn json(&self) -> Value {
        json!({
            "kernel": self.kernel.name,
            "family": self.family,
            "subgroup_size": self.compiled.subgroup_size,
            "subgroups_per_simd": self.compiled.subgroups_per_simd,
            "most_subgroups_per_simd": self.compiled.most_subgroups_per_simd,
            "statistics": self.compiled.statistics,
            "inner_loops": self.inner_loops,
            "instructions_per_weight": self.per_weight(),
        })
    }

    pub fn file_name(&self) -> String {
        format!("{}.{}.s", self.kernel.file_stem(), self.family)
    }

    pub fn assembly(&self) -> &str {
        &self.compiled.assembly
    }

    fn per_weight(&self) -> Option<f64> {
        let total = self.inner_loops.first()?.instructions.total();
        Some(f64::from(total) / f64::from(self.kernel.weights_per_iteration?))
    }
}
