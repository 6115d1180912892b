//! Who owns what: pure arithmetic from a model's sizes to the slices of each stage and rank.

use std::ops::Range;

use crate::config::Config;
use crate::error::{Error, Result};

/// One rank's place in a group that splits every matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TensorParallelConfig {
    /// Ranks in the group.
    pub world_size: usize,
    /// This rank, from 0.
    pub rank: usize,
}

impl Default for TensorParallelConfig {
    /// A group of one.
    fn default() -> Self {
        Self::new(1, 0)
    }
}

impl TensorParallelConfig {
    /// Rank `rank` of `world_size`, unchecked: every `load` validates, and so does [`Self::try_new`].
    #[must_use]
    pub const fn new(world_size: usize, rank: usize) -> Self {
        Self { world_size, rank }
    }

    /// [`Self::new`], checked.
    ///
    /// # Errors
    /// [`Error::NoRanks`] or [`Error::RankOutOfRange`].
    pub fn try_new(world_size: usize, rank: usize) -> Result<Self> {
        let config = Self::new(world_size, rank);
        config.validate().map(|()| config)
    }

    pub(crate) fn validate(&self) -> Result<()> {
        match *self {
            Self { world_size: 0, .. } => Err(Error::NoRanks),
            Self { world_size, rank } if rank >= world_size => Err(Error::RankOutOfRange { rank, world_size }),
            _ => Ok(()),
        }
    }

    /// How many of `n` items this rank owns. The first `n % world_size` ranks own one more than the others.
    ///
    /// A rank outside its world owns nothing.
    #[must_use]
    pub fn local_size(&self, n: usize) -> usize {
        if self.rank >= self.world_size {
            return 0;
        }
        n / self.world_size + usize::from(self.rank < n % self.world_size)
    }

    /// The first of the items that this rank owns.
    #[must_use]
    pub fn local_offset(&self, n: usize) -> usize {
        if self.rank >= self.world_size {
            return n;
        }
        self.rank * (n / self.world_size) + self.rank.min(n % self.world_size)
    }

    /// The items that this rank owns: from [`Self::local_offset`], [`Self::local_size`] of them.
    #[must_use]
    pub fn local_range(&self, n: usize) -> Range<usize> {
        let start = self.local_offset(n);
        start..start + self.local_size(n)
    }
}

/// How a linear layer is split over ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TensorParallelStrategy {
    /// By output features: each rank computes some of the outputs, which are then concatenated.
    ColumnParallel,
    /// By input features: each rank computes a partial sum of every output, and an all-reduce adds them.
    RowParallel,
    /// Not split: every rank holds and computes the whole.
    None,
}

/// A dimension of the model, which says how it is split over ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Dim {
    /// The residual stream: every rank has all of it.
    Hidden,
    /// Query heads x head_dim.
    Heads,
    /// Key-value heads x head_dim; a head at a border is held by both neighbours.
    KvHeads,
    /// Channels of the MLP.
    Channels,
    /// Rows of the head.
    Vocab,
}

/// What one rank owns of every layer of its stage. Ranges are in heads, channels and vocabulary rows.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RankPartition {
    /// Query heads.
    pub heads: Range<usize>,
    /// The key-value heads that those query heads need.
    pub kv_heads: Range<usize>,
    /// Channels of the MLP.
    pub channels: Range<usize>,
    /// Rows of the head.
    pub vocab: Range<usize>,
}

impl RankPartition {
    /// The elements of `dim` that this rank owns, in a model with these sizes.
    pub(crate) fn range(&self, dim: Dim, config: &Config) -> Range<usize> {
        let heads = |r: &Range<usize>| r.start * config.head_dim..r.end * config.head_dim;
        match dim {
            Dim::Hidden => 0..config.hidden_size,
            Dim::Heads => heads(&self.heads),
            Dim::KvHeads => heads(&self.kv_heads),
            Dim::Channels => self.channels.clone(),
            Dim::Vocab => self.vocab.clone(),
        }
    }

    /// Elements of `dim` that this rank owns.
    pub(crate) fn width(&self, dim: Dim, config: &Config) -> usize {
        self.range(dim, config).len()
    }
}

/// One stage: a range of layers, and what each rank owns of them.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct StagePartition {
    /// The layers of this stage.
    pub layers: Range<usize>,
    /// Its ranks.
    pub ranks: Vec<RankPartition>,
}

/// Who owns what in a grid of stages x ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Partition {
    /// The stages, in the order of their layers.
    pub stages: Vec<StagePartition>,
}

impl Partition {
    /// Splits a model over `stages` x `ranks`.
    ///
    /// With `shares`, rank i owns about `shares[i] / sum` of every dimension; without, all own the same. Query heads are whole,
    /// and every rank has at least one; channels are cut in multiples of `granule`, the block of `down_proj`'s format.
    ///
    /// # Errors
    /// No ranks, more ranks than query heads, more stages than layers, or shares that aren't one positive number a rank.
    pub fn new(config: &Config, stages: usize, ranks: usize, shares: Option<&[f64]>, granule: usize) -> Result<Self> {
        if ranks == 0 {
            return Err(Error::NoRanks);
        }
        if ranks > config.n_heads {
            return Err(Error::TooManyRanks { world_size: ranks, n_heads: config.n_heads });
        }
        if stages == 0 || stages > config.n_layers {
            let (what, right) = (format!("{} layers", config.n_layers), format!("use 1 to {}", config.n_layers));
            return Err(Error::Stages { stages, what, right });
        }
        let equal = vec![1.0; ranks];
        let shares = shares.unwrap_or(&equal);
        if shares.len() != ranks || shares.iter().any(|s| !s.is_finite() || *s <= 0.0) || !shares.iter().sum::<f64>().is_finite() {
            return Err(Error::Shares { shares: shares.to_vec(), world_size: ranks });
        }

        let group = config.n_heads / config.n_kv_heads;
        let heads = split(config.n_heads, shares, 1);
        let channels = split(config.intermediate_size.div_ceil(granule), shares, 0);
        let vocab = split(config.vocab_size, shares, 0);
        let channel = |granules: usize| (granules * granule).min(config.intermediate_size);
        let ranks = (0..ranks)
            .map(|r| RankPartition {
                heads: heads[r].clone(),
                kv_heads: heads[r].start / group..heads[r].end.div_ceil(group),
                channels: channel(channels[r].start)..channel(channels[r].end),
                vocab: vocab[r].clone(),
            })
            .collect::<Vec<_>>();
        let stages = split(config.n_layers, &vec![1.0; stages], 1)
            .into_iter()
            .map(|layers| StagePartition { layers, ranks: ranks.clone() })
            .collect();
        Ok(Self { stages })
    }
}

/// Cuts `n` items into contiguous ranges in proportion to `shares`, each of at least `least` items.
///
/// The largest remainders take the items that are left, the earlier of equals first, so that equal shares give
/// [`TensorParallelConfig::local_range`].
fn split(n: usize, shares: &[f64], least: usize) -> Vec<Range<usize>> {
    let total: f64 = shares.iter().sum();
    let spare = n - least * shares.len();
    // What is fixed by `least` counts towards a rank's share.
    let mut sizes = vec![least; shares.len()];
    let wanted: Vec<f64> = shares.iter().map(|s| (n as f64 * s / total - least as f64).max(0.0)).collect();
    let scale = spare as f64 / wanted.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    let mut rest = spare;
    let mut order: Vec<(usize, f64)> = Vec::new();
    for (rank, want) in wanted.iter().enumerate() {
        let want = want * scale;
        let whole = ((want + 1e-9).floor() as usize).min(rest);
        sizes[rank] += whole;
        rest -= whole;
        order.push((rank, want - whole as f64));
    }
    // A stable sort: among remainders equal up to rounding, the earlier rank goes first.
    order.sort_by_key(|(_, remainder)| std::cmp::Reverse((remainder * 1e6).round() as i64));
    for &(rank, _) in order.iter().cycle().take(rest) {
        sizes[rank] += 1;
    }
    let mut start = 0;
    sizes
        .into_iter()
        .map(|size| {
            start += size;
            start - size..start
        })
        .collect()
}
