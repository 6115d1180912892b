//! [`Dispatch`]: one kernel with everything bound, ready to be encoded for any batch.

use super::shaders::ELEMENTS;
use super::tuning::Linear;
use super::weights::TILE;
use crate::backend::{Batch, KvType};
use crate::plan::Rows;

/// How many workgroups a dispatch needs.
#[derive(Debug, Clone, Copy)]
pub(super) enum Size {
    /// So many a row.
    Groups(usize),
    /// One for every [`ELEMENTS`] invocations, of which a row needs so many.
    Elements(usize),
    /// A linear layer's, with so many rows of its weight.
    Linear(usize, Linear),
}

pub(super) struct Dispatch {
    pub rows: Rows,
    pub size: Size,
    /// For either type of keys and values. Each of a linear layer: for one row, for few and for many; of the others, one.
    pub pipelines: [Vec<wgpu::ComputePipeline>; 2],
    pub bind: wgpu::BindGroup,
}

impl Size {
    /// Which of its pipelines takes so many rows, and in how many workgroups.
    pub(super) fn for_rows(self, rows: usize) -> (usize, usize) {
        match self {
            Self::Groups(n) => (0, rows * n),
            Self::Elements(n) => (0, (rows * n).div_ceil(ELEMENTS as usize)),
            Self::Linear(out, Linear { many: Some((least, tile)), .. }) if rows >= least => {
                (2, rows.div_ceil((tile.side * tile.down) as usize) * out.div_ceil((tile.side * tile.across) as usize))
            }
            Self::Linear(out, Linear { one, few, .. }) => {
                let (i, variant) = if rows == 1 { (0, one) } else { (1, few) };
                (i, rows.div_ceil(variant.rows as usize) * out.div_ceil(TILE).div_ceil(variant.tiles as usize))
            }
        }
    }
}

impl Dispatch {
    /// Encodes it, unless the batch has none of its rows. Answers whether it did.
    ///
    /// `most`: workgroups in one dimension of a grid.
    pub(super) fn encode(&self, pass: &mut wgpu::ComputePass<'_>, batch: &Batch, most: u32) -> bool {
        let rows = self.rows.of(batch);
        if rows == 0 {
            return false;
        }
        let (pipeline, groups) = self.size.for_rows(rows);
        let (x, y) = fold(groups, most as usize);
        pass.set_pipeline(&self.pipelines[usize::from(batch.kv == KvType::F16)][pipeline]);
        pass.set_bind_group(0, &self.bind, &[]);
        pass.dispatch_workgroups(x, y, 1);
        true
    }
}
/// A grid of two dimensions that holds `groups`, neither above `most`, with less than a row of it to spare.
pub(super) fn fold(groups: usize, most: usize) -> (u32, u32) {
    let y = groups.div_ceil(most).max(1);
    (groups.div_ceil(y) as u32, y as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grids_beyond_a_dimension_are_folded_without_losing_a_group() {
        for groups in [1, 4, 65_535, 65_536, 100_001, 1 << 24] {
            let (x, y) = fold(groups, 65_535);
            assert!(x <= 65_535 && y <= 65_535, "{groups}: {x} x {y}");
            let spare = x as usize * y as usize - groups;
            assert!(spare < y as usize, "{groups}: {x} x {y}");
        }
    }
}
