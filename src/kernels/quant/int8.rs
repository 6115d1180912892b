//! [`Int8Rows`]: activations as the integer kernels take them.

use super::Isa;
use super::format::BLOCK;
use crate::kernels::pool::{Scatter, for_each};

/// The most rows that a kernel takes at once.
pub(super) const GROUP: usize = 16;

/// The widths that kernels exist for: zero rows fill a group up.
pub(super) const WIDTHS: [usize; 6] = [1, 2, 4, 8, 12, GROUP];

/// The scale of a block of a row, and -128 times the sum of its values: what weights that are stored 128 too large are off by.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Measure {
    pub scale: f32,
    pub correction: i32,
    /// Of the first half of the values.
    first: i32,
}

impl Measure {
    /// The correction of either half.
    #[inline(always)]
    pub fn half(self, half: usize) -> i32 {
        if half == 0 { self.first } else { self.correction - self.first }
    }

    /// What the block's values sum up to.
    #[inline(always)]
    pub fn sum(self) -> f32 {
        self.scale * (self.correction / -128) as f32
    }
}

/// Activation rows in blocks of 32 columns: int8 values in -127..=127 times an f32 scale, max |x| / 127.
///
/// The rows lie in groups of 16, the last one of as many as are left. A group holds block by block the values of its rows.
/// A block with a NaN or an infinity has a scale of NaN; one that is all below 1e-30 is zero.
pub(crate) struct Int8Rows {
    rows: usize,
    cols: usize,
    lead: usize,
    values: Vec<[i8; BLOCK]>,
    measures: Vec<Measure>,
}

impl Int8Rows {
    /// Quantises rows of equal length, for weights with `lead` columns in front of their first; on the threads of the pool that
    /// this is called in.
    ///
    /// # Panics
    /// If the rows' lengths differ.
    pub(crate) fn quantise(xs: &[&[f32]], lead: usize) -> Self {
        let cols = xs.first().map_or(0, |x| x.len());
        assert!(xs.iter().all(|x| x.len() == cols), "rows of different lengths");
        let blocks = (lead + cols).div_ceil(BLOCK);
        let places = xs.chunks(GROUP).map(|xs| blocks * width(xs.len())).sum();
        let (mut values, mut measures) = (vec![[0; BLOCK]; places], vec![Measure::default(); places]);
        let (to_values, to_measures) = (Scatter::new(&mut values), Scatter::new(&mut measures));
        for_each(xs.len().div_ceil(GROUP), |group, _| {
            let xs = &xs[group * GROUP..xs.len().min((group + 1) * GROUP)];
            let (first, width) = (group * GROUP * blocks, width(xs.len()));
            // SAFETY: a group's places are one task's.
            let (values, measures) =
                unsafe { (to_values.range(first..first + blocks * width), to_measures.range(first..first + blocks * width)) };
            match Isa::best() {
                // SAFETY: the CPU has AVX2.
                #[cfg(target_arch = "x86_64")]
                Isa::Vnni | Isa::Avx512 | Isa::Avx2 => unsafe { fill_avx2(xs, lead, values, measures) },
                _ => fill(xs, lead, values, measures),
            }
        });
        Self { rows: xs.len(), cols, lead, values, measures }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    pub(crate) fn lead(&self) -> usize {
        self.lead
    }

    /// The rows of group i, their width in storage, their values and measures.
    pub(super) fn group(&self, i: usize) -> (usize, usize, &[[i8; BLOCK]], &[Measure]) {
        let blocks = (self.lead + self.cols).div_ceil(BLOCK);
        let rows = GROUP.min(self.rows - i * GROUP);
        let (first, width) = (i * GROUP * blocks, width(rows));
        (rows, width, &self.values[first..][..blocks * width], &self.measures[first..][..blocks * width])
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn fill_avx2(xs: &[&[f32]], lead: usize, values: &mut [[i8; BLOCK]], measures: &mut [Measure]) {
    fill(xs, lead, values, measures);
}

/// Writes a group, of which `xs` are the rows that aren't zero.
#[inline(always)]
fn fill(xs: &[&[f32]], lead: usize, values: &mut [[i8; BLOCK]], measures: &mut [Measure]) {
    let width = width(xs.len());
    for (i, x) in xs.iter().enumerate() {
        for (b, at) in (i..values.len()).step_by(width).enumerate() {
            (values[at], measures[at]) = block(&block_of(x, lead, b));
        }
    }
}

fn width(rows: usize) -> usize {
    WIDTHS.into_iter().find(|&w| w >= rows).unwrap_or(GROUP)
}

/// Block b of a row with `lead` columns in front of it; what the row doesn't have is zero.
#[inline(always)]
pub(super) fn block_of(x: &[f32], lead: usize, b: usize) -> [f32; BLOCK] {
    let mut out = [0.0; BLOCK];
    let (start, end) = (b * BLOCK, (b + 1) * BLOCK);
    if start >= lead && end <= lead + x.len() {
        out.copy_from_slice(&x[start - lead..end - lead]);
    } else {
        let skip = lead.saturating_sub(start).min(BLOCK);
        let from = &x[(start + skip - lead).min(x.len())..end.saturating_sub(lead).min(x.len())];
        out[skip..skip + from.len()].copy_from_slice(from);
    }
    out
}

#[inline(always)]
fn block(x: &[f32; BLOCK]) -> ([i8; BLOCK], Measure) {
    let amax = f32::from_bits(x.iter().fold(0, |m, v| m.max(v.to_bits() & 0x7fff_ffff)));
    if !amax.is_finite() {
        return ([0; BLOCK], Measure { scale: f32::NAN, ..Measure::default() });
    }
    if amax < 1e-30 {
        return ([0; BLOCK], Measure::default());
    }
    let inverse = 127.0 / amax;
    // Adding 1.5 * 2^23 rounds to an integer, ties to even, in the lowest bits: the same everywhere, and it vectorises.
    const ROUND: f32 = 12_582_912.0;
    let values = x.map(|x| (x * inverse + ROUND).to_bits() as i32 - ROUND.to_bits() as i32);
    let first: i32 = -128 * values[..BLOCK / 2].iter().sum::<i32>();
    let second: i32 = -128 * values[BLOCK / 2..].iter().sum::<i32>();
    (values.map(|v| v as i8), Measure { scale: amax / 127.0, correction: first + second, first })
}
