//! [`inner_loops`]: the instructions of a kernel's inner loops, out of ACO's assembly.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::AddAssign;

use serde::Serialize;

/// How many instructions of each kind.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq, Serialize)]
pub struct Instructions {
    pub valu: u32,
    pub salu: u32,
    pub vmem: u32,
    pub smem: u32,
    pub lds: u32,
    /// Branches, barriers, waits and the scheduler's hints.
    pub control: u32,
}

/// From block `first` to block `last`, in the order of the text.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Loop {
    pub first: String,
    pub last: String,
    pub instructions: Instructions,
}

struct Block<'a> {
    label: &'a str,
    instructions: Instructions,
    targets: Vec<&'a str>,
}

impl Instructions {
    pub fn total(&self) -> u32 {
        self.work() + self.salu + self.smem + self.control
    }

    /// What computes and moves a kernel's data, by which loops are compared.
    fn work(&self) -> u32 {
        self.valu + self.vmem + self.lds
    }

    fn one(mnemonic: &str) -> Self {
        const CONTROL: [&str; 14] = [
            "s_barrier",
            "s_branch",
            "s_cbranch",
            "s_clause",
            "s_delay_alu",
            "s_endpgm",
            "s_inst_prefetch",
            "s_nop",
            "s_sendmsg",
            "s_set_inst_prefetch",
            "s_setprio",
            "s_sleep",
            "s_waitcnt",
            "s_wait_",
        ];
        const SMEM: [&str; 7] = ["s_load_", "s_buffer_", "s_store_", "s_dcache_", "s_gl1_inv", "s_memtime", "s_memrealtime"];
        const VMEM: [&str; 6] = ["buffer_", "tbuffer_", "global_", "flat_", "scratch_", "image_"];
        let is = |prefixes: &[&str]| prefixes.iter().any(|prefix| mnemonic.starts_with(prefix));
        let mut one = Self::default();
        let kind = if is(&["v_"]) {
            &mut one.valu
        } else if is(&VMEM) {
            &mut one.vmem
        } else if is(&["ds_"]) {
            &mut one.lds
        } else if is(&SMEM) {
            &mut one.smem
        } else if is(&["s_"]) && !is(&CONTROL) {
            &mut one.salu
        } else {
            &mut one.control
        };
        *kind = 1;
        one
    }
}

impl AddAssign for Instructions {
    fn add_assign(&mut self, other: Self) {
        self.valu += other.valu;
        self.salu += other.salu;
        self.vmem += other.vmem;
        self.smem += other.smem;
        self.lds += other.lds;
        self.control += other.control;
    }
}

/// The loops that contain no other. The inner loop of a kernel comes first: the first in the text with at least half of the work of
/// the largest, since what ends a kernel may be longer than what it repeats. The others follow by their work.
pub fn inner_loops(assembly: &str) -> Vec<Loop> {
    let blocks = blocks(assembly);
    // By the first block: a loop has one branch back for each `continue`.
    let mut loops = BTreeMap::new();
    for (last, block) in blocks.iter().enumerate() {
        for target in &block.targets {
            if let Some(first) = blocks[..=last].iter().position(|block| block.label == *target) {
                loops.insert(first, last);
            }
        }
    }
    let innermost = loops.iter().filter(|&(&first, &last)| loops.range(first + 1..).all(|(_, &inner)| inner > last));
    let mut loops: Vec<_> = innermost
        .map(|(&first, &last)| {
            let mut instructions = Instructions::default();
            blocks[first..=last].iter().for_each(|block| instructions += block.instructions);
            Loop { first: blocks[first].label.into(), last: blocks[last].label.into(), instructions }
        })
        .collect();
    let most = loops.iter().map(|inner| inner.instructions.work()).max().unwrap_or(0);
    let first = loops.iter().position(|inner| 2 * inner.instructions.work() >= most).map(|at| loops.remove(at));
    loops.sort_by_key(|inner| Reverse(inner.instructions.work()));
    first.into_iter().chain(loops).collect()
}

fn blocks(assembly: &str) -> Vec<Block<'_>> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut previous = Instructions::default();
    for line in assembly.lines().take_while(|line| !line.starts_with("/* constant data */")) {
        if let Some(label) = line.strip_suffix(':') {
            blocks.push(Block { label, instructions: Instructions::default(), targets: Vec::new() });
            continue;
        }
        let code = line.split(';').next().unwrap_or_default();
        let mut words = code.split_whitespace();
        let (Some(block), Some(mnemonic)) = (blocks.last_mut(), words.next()) else { continue };
        if let Some(times) = code.trim().strip_prefix("(then repeated ").and_then(|rest| rest.split(' ').next()?.parse().ok()) {
            (0..times).for_each(|_| block.instructions += previous);
            continue;
        }
        if mnemonic.starts_with("s_branch") || mnemonic.starts_with("s_cbranch") {
            block.targets.extend(words.next());
        }
        previous = Instructions::one(mnemonic);
        block.instructions += previous;
    }
    blocks
}

#[cfg(test)]
mod tests;
