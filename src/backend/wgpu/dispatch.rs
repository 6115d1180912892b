//! [`Dispatch`]: one kernel with everything bound, ready to be encoded for any batch.

use super::shaders::ELEMENTS;
use super::tuning::Linear;
use super::weights::TILE;
use crate::backend::{BLOCK, Batch, KvType, Lane, Numerics, Row};
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
    /// The same linear layer's by int8 activations, of the batches that it takes them for.
    LinearInt8(usize, Linear),
    /// What makes them, of so many blocks a row.
    Quantise(usize, Linear),
    /// Attention's, with so many heads, each split into spans of positions.
    Spans(usize, Option<Split>),
    /// [`Self::Elements`] of what merges several spans.
    Merge(usize, Option<Split>),
}

/// How attention is split into spans of positions where a batch has few rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Split {
    /// In a span, a multiple of 64; more where there would be too many spans.
    pub positions: u32,
    /// Spans.
    pub most: u32,
    /// Positions that a row sees, if not all.
    pub window: Option<usize>,
}

impl Split {
    /// Batches of more rows keep a device busy as they are.
    pub(super) const ROWS: usize = 8;

    /// Spans for a batch, and the positions in each.
    pub(super) fn spans(split: Option<Self>, batch: &Batch) -> [u32; 2] {
        let Some(Self { positions, most, window }) = split.filter(|_| batch.rows.len() <= Self::ROWS) else { return [1, 0] };
        // From the first block that a row sees.
        let seen = |row: &Row| {
            let first = window.map_or(0, |window| (row.pos as usize + 1).saturating_sub(window));
            row.pos + 1 - (first / BLOCK * BLOCK) as u32
        };
        let all = batch.rows.iter().map(seen).max().unwrap_or(1);
        let span = positions.max(all.div_ceil(most).next_multiple_of(BLOCK as u32));
        [all.div_ceil(span), span]
    }
}

pub(super) struct Dispatch {
    pub rows: Rows,
    pub size: Size,
    /// For either type of keys and values. Each of a linear layer: for one row, for few and for many; of the others, one.
    pub pipelines: [Vec<wgpu::ComputePipeline>; 2],
    /// Whether computing it again changes nothing.
    pub repeats: bool,
    /// By lane.
    pub binds: Vec<wgpu::BindGroup>,
}

impl Size {
    /// Which of its pipelines takes so many rows, whose attention is split so, and in how many workgroups.
    pub(super) fn groups(self, rows: usize, spans: usize, numerics: Numerics) -> (usize, usize) {
        match self {
            Self::Groups(n) => (0, rows * n),
            Self::Spans(n, _) => (0, rows * n * spans),
            Self::Merge(..) if spans == 1 => (0, 0),
            Self::Elements(n) | Self::Merge(n, _) => (0, (rows * n).div_ceil(ELEMENTS as usize)),
            Self::Quantise(blocks, linear) => match linear.int8_for(rows, numerics) {
                Some(_) => Self::Elements(blocks).groups(rows, spans, numerics),
                None => (0, 0),
            },
            Self::LinearInt8(out, linear) => (0, linear.int8_for(rows, numerics).map_or(0, |tile| tile.groups(rows, out))),
            Self::Linear(_, linear) if linear.int8_for(rows, numerics).is_some() => (0, 0),
            Self::Linear(out, Linear { many: Some((least, tile)), .. }) if rows >= least => (2, tile.groups(rows, out)),
            Self::Linear(out, Linear { one, few, .. }) => {
                let (i, variant) = if rows == 1 { (0, one) } else { (1, few) };
                (i, rows.div_ceil(variant.rows as usize) * out.div_ceil(TILE).div_ceil(variant.tiles as usize))
            }
        }
    }
}

impl Dispatch {
    /// Encodes it, so many `times` where computing it again changes nothing. Answers how often it did: not at all where the batch has nothing for it
    /// to do.
    ///
    /// `most`: workgroups in one dimension of a grid.
    pub(super) fn encode(&self, pass: &mut wgpu::ComputePass<'_>, lane: Lane, batch: &Batch, most: u32, times: u32) -> u32 {
        let [spans, _] = if let Size::Spans(_, split) | Size::Merge(_, split) = self.size { Split::spans(split, batch) } else { [1, 0] };
        let (pipeline, groups) = self.size.groups(self.rows.of(batch), spans as usize, batch.numerics);
        if groups == 0 {
            return 0;
        }
        let (x, y) = fold(groups, most as usize);
        pass.set_pipeline(&self.pipelines[usize::from(batch.kv == KvType::F16)][pipeline]);
        pass.set_bind_group(0, &self.binds[lane], &[]);
        let times = if self.repeats { times } else { 1 };
        (0..times).for_each(|_| pass.dispatch_workgroups(x, y, 1));
        times
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
    use crate::backend::Wire;

    #[test]
    fn spans_cover_all_positions_and_are_never_too_many() {
        let batch = |rows: u32, pos: u32| {
            let rows = (0..rows).map(|i| Row { seq: 0, pos: pos + i }).collect();
            let (seqs, wanted, copies, rope) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
            Batch { number: 1, rows, seqs, wanted, copies, rope, kv: KvType::F16, numerics: Numerics::Fast, wire: Wire::F32, timed: false }
        };
        let split = Some(Split { positions: 512, most: 16, window: None });
        for (rows, pos, expected) in
            [(1, 0, [1, 512]), (1, 511, [1, 512]), (1, 512, [2, 512]), (8, 508, [2, 512]), (9, 4000, [1, 0]), (1, 99_999, [16, 6272])]
        {
            let [spans, span] = Split::spans(split, &batch(rows, pos));
            assert_eq!([spans, span], expected, "{rows} rows from {pos}");
            assert!(spans == 1 || spans * span > pos + rows - 1, "{rows} rows from {pos}");
        }
        // Of a window of 1000 positions at most one block more is looked at.
        let windowed = Some(Split { positions: 512, most: 16, window: Some(1000) });
        for (rows, pos, expected) in [(1, 511, [1, 512]), (1, 99_999, [3, 512]), (8, 99_999, [3, 512]), (1, 1023, [2, 512])] {
            assert_eq!(Split::spans(windowed, &batch(rows, pos)), expected, "{rows} rows from {pos}");
        }
        assert_eq!(Split::spans(None, &batch(1, 5000)), [1, 0]);
    }

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
