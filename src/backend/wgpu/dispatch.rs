//! [`Dispatch`]: one kernel with everything bound, ready to be encoded for any batch.

use super::shaders::ELEMENTS;
use crate::backend::{Batch, KvType};
use crate::plan::Rows;

/// How many workgroups a dispatch needs.
#[derive(Debug, Clone, Copy)]
pub(super) enum Size {
    /// So many a row.
    Groups(usize),
    /// One for every [`ELEMENTS`] invocations, of which a row needs so many.
    Elements(usize),
    /// A linear layer's, with so many outputs.
    Linear(usize),
}

pub(super) struct Dispatch {
    pub rows: Rows,
    pub size: Size,
    /// Of a linear layer: for few rows, and for many. Of the others: for either type of keys and values.
    pub pipelines: [wgpu::ComputePipeline; 2],
    pub bind: wgpu::BindGroup,
}

impl Dispatch {
    /// Encodes it, unless the batch has none of its rows. Answers whether it did.
    ///
    /// `most`: workgroups in one dimension of a grid; `tiled`: [`Tuning::tiled`](super::shaders::Tuning::tiled).
    pub(super) fn encode(&self, pass: &mut wgpu::ComputePass<'_>, batch: &Batch, most: u32, tiled: usize) -> bool {
        let rows = self.rows.of(batch);
        if rows == 0 {
            return false;
        }
        let by_kv = usize::from(batch.kv == KvType::F16);
        let (pipeline, groups) = match self.size {
            Size::Groups(n) => (by_kv, rows * n),
            Size::Elements(n) => (by_kv, (rows * n).div_ceil(ELEMENTS as usize)),
            Size::Linear(out) if rows < tiled => (0, rows * out.div_ceil(4)),
            Size::Linear(out) => (1, rows.div_ceil(32) * out.div_ceil(32)),
        };
        let (x, y) = fold(groups, most as usize);
        pass.set_pipeline(&self.pipelines[pipeline]);
        pass.set_bind_group(0, &self.bind, &[]);
        pass.dispatch_workgroups(x, y, 1);
        true
    }
}

/// A grid of two dimensions that holds `groups`, neither above `most`, with less than a row of it to spare.
fn fold(groups: usize, most: usize) -> (u32, u32) {
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
