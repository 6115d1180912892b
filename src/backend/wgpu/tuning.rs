//! [`Tuning`]: which variant of its kernels an adapter runs.

use serde::{Deserialize, Serialize};

use super::adapters::Adapter;
use crate::backend::Numerics;

/// How a workgroup reduces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Reduce {
    /// Through workgroup memory; every adapter can.
    Workgroup,
    /// By subgroup operations, which need [`wgpu::Features::SUBGROUP`].
    Subgroup,
}

/// A workgroup of `shaders/linear.wgsl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Few {
    /// Tiles of 16 outputs.
    pub tiles: u32,
    /// Rows of activations.
    pub rows: u32,
    /// Parts that the columns are cut into, 16 invocations each.
    pub slices: u32,
}

/// A workgroup of `shaders/linear_tile.wgsl` or `linear_int8.wgsl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Tile {
    /// It has this many invocations, squared.
    pub side: u32,
    /// Rows and outputs that each computes.
    pub down: u32,
    /// Even.
    pub across: u32,
}

/// How a linear layer is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Linear {
    /// For one row.
    pub one: Few,
    /// For several.
    pub few: Few,
    /// For many: from how many on.
    pub many: Option<(usize, Tile)>,
    /// For as many in fast numerics, by int8 activations.
    pub int8: Option<(usize, Tile)>,
}

/// Bytes of a workgroup's memory that the levels of iq4_nl take.
const LEVELS: u32 = 64;

impl Tile {
    /// Of a workgroup's memory: both operands, and the levels.
    pub(super) fn bytes(self) -> u32 {
        self.side * (self.down + self.across) * 8 * 16 + LEVELS
    }

    /// The same of `linear_int8.wgsl`: two blocks of columns of both, with their scales.
    pub(super) fn int8_bytes(self) -> u32 {
        self.side * (self.down + self.across) * 2 * (2 * 16 + 4) + LEVELS
    }

    /// Workgroups for so many rows and outputs.
    pub(super) fn groups(self, rows: usize, out: usize) -> usize {
        rows.div_ceil((self.side * self.down) as usize) * out.div_ceil((self.side * self.across) as usize)
    }

    fn is_sane(self, bytes: u32, workgroup: u32) -> bool {
        let Self { side, down, across } = self;
        [8, 16].contains(&side) && (1..=8).contains(&down) && [2, 4, 6, 8].contains(&across) && bytes <= workgroup
    }
}

impl Linear {
    /// Whether kernels can be made so: workgroups of at most 256 with so many bytes of memory, and code of bounded length.
    pub(super) fn is_sane(&self, workgroup: u32) -> bool {
        let few = [self.one, self.few].into_iter().all(|Few { tiles, rows, slices }| {
            [tiles, rows, slices].iter().all(|n| (1..=16).contains(n))
                && tiles * rows <= 32
                && slices.is_power_of_two()
                && 4 * 16 * tiles * rows * slices + LEVELS <= workgroup.min(8 << 10)
        });
        let many = self.many.is_none_or(|(_, tile)| tile.is_sane(tile.bytes(), workgroup));
        let int8 = self.int8.is_none_or(|(_, tile)| tile.is_sane(tile.int8_bytes(), workgroup));
        few && many && int8 && self.one.rows == 1
    }

    /// By which workgroups so many rows of int8 activations are multiplied, if they are.
    pub(super) fn int8_for(&self, rows: usize, numerics: Numerics) -> Option<Tile> {
        self.int8.filter(|&(least, _)| numerics == Numerics::Fast && rows >= least).map(|(_, tile)| tile)
    }
}

/// What is chosen for an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tuning {
    pub reduce: Reduce,
    /// Invocations that share a reduction over a row; a power of two, at least 4.
    pub lanes: u32,
    /// Whether the levels of iq4_nl are computed and not looked up.
    pub computed_levels: bool,
    /// Whether the loop over the columns of a block is written out.
    pub unrolled: bool,
    /// Positions, a multiple of 64, in each of the spans that attention is split into where a batch has few rows; `None` never splits.
    pub span: Option<u32>,
    pub linear: Linear,
}

impl Tuning {
    pub(super) fn of(adapter: &Adapter) -> Self {
        // Software adapters run a workgroup on one core: a lane beyond its vector's width only adds barriers. Loads cost them as much
        // as ten operations on a vector, so that a lane takes as many outputs and rows as it can. Long code is compiled for seconds and
        // runs no faster.
        if adapter.is_software() {
            return Self {
                reduce: Reduce::Workgroup,
                lanes: 8,
                computed_levels: true,
                unrolled: false,
                // A row has more heads than there are cores.
                span: None,
                linear: Linear {
                    one: Few { tiles: 4, rows: 1, slices: 1 },
                    few: Few { tiles: 4, rows: 4, slices: 1 },
                    many: None,
                    int8: None,
                },
            };
        }
        let mut tuning = Self::HARDWARE;
        if !adapter.features.contains(wgpu::Features::SUBGROUP) {
            tuning.reduce = Reduce::Workgroup;
        }
        // Its tiles take a little more than the 16 KiB that every implementation of WebGPU has.
        if adapter.limits.max_compute_workgroup_storage_size < 20 << 10 {
            tuning.linear.many = Some((9, Tile { side: 8, down: 4, across: 4 }));
        }
        tuning
    }

    /// What a card runs that nothing is known of but that it has subgroups.
    pub(super) const HARDWARE: Self = Self {
        reduce: Reduce::Subgroup,
        lanes: 256,
        computed_levels: false,
        unrolled: true,
        span: Some(512),
        linear: Linear {
            one: Few { tiles: 1, rows: 1, slices: 8 },
            few: Few { tiles: 1, rows: 4, slices: 8 },
            many: Some((9, Tile { side: 16, down: 4, across: 4 })),
            // Not every card multiplies packed int8 in one instruction, and wgpu doesn't say which: measuring does.
            int8: None,
        },
    };
}
