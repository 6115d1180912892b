//! Who owns what: pure arithmetic from a model's sizes to the slices of each stage and rank.

mod cut;

use std::ops::Range;

use crate::config::Config;
use crate::error::{Error, Result};
use cut::{ranges, split, stage_sizes};

/// One rank's place in a group that splits every matrix.
///
/// ```
/// use torchless::TensorParallelConfig;
///
/// // 2-way tensor parallelism, rank 1
/// let config = TensorParallelConfig::new(2, 1);
/// assert_eq!((config.local_size(4096), config.local_offset(4096)), (2048, 2048));
///
/// // 10 over 3 is 4, 3, 3
/// assert_eq!([0, 1, 2].map(|rank| TensorParallelConfig::new(3, rank).local_size(10)), [4, 3, 3]);
/// ```
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
    /// Stages are contiguous ranges of layers, each of at least one, such that the most that a stage holds for its weight is as
    /// little as can be. The head counts for the last stage, the embedding, which stays in the file, for none. Of layers that could
    /// as well be with several stages, the earlier has the more.
    ///
    /// Of its stage, rank i owns about `shares[i] / sum` of every dimension; without shares, all own the same. Query heads are whole,
    /// and every rank has at least one; channels are cut in multiples of `granule`, the block of `down_proj`'s format. `shares` has
    /// either `ranks` entries, which hold for every stage, and stages weigh the same; or `stages * ranks`, stage after stage,
    /// and a stage weighs the sum of its own.
    ///
    /// # Errors
    /// No ranks, more ranks than query heads, more stages than layers, or shares that aren't so many positive numbers.
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
        let fit = shares.len() == ranks || ranks.checked_mul(stages) == Some(shares.len());
        if !fit || shares.iter().any(|s| !s.is_finite() || *s <= 0.0) || !shares.iter().sum::<f64>().is_finite() {
            return Err(Error::Shares { shares: shares.to_vec(), stages, world_size: ranks });
        }

        let by_stage: Vec<&[f64]> = shares.chunks(ranks).cycle().take(stages).collect();
        let weights: Vec<f64> = by_stage.iter().map(|shares| shares.iter().sum()).collect();
        let head = config.head_elements() as f64 / config.layer_elements() as f64;
        let layers = ranges(stage_sizes(config.n_layers, &weights, head));
        let stages =
            layers.into_iter().zip(by_stage).map(|(layers, shares)| StagePartition { layers, ranks: split_ranks(config, shares, granule) });
        Ok(Self { stages: stages.collect() })
    }
}

/// What each rank of a stage owns by its share.
fn split_ranks(config: &Config, shares: &[f64], granule: usize) -> Vec<RankPartition> {
    let group = config.n_heads / config.n_kv_heads;
    let heads = split(config.n_heads, shares, 1);
    let channels = split(config.intermediate_size.div_ceil(granule), shares, 0);
    let vocab = split(config.vocab_size, shares, 0);
    let channel = |granules: usize| (granules * granule).min(config.intermediate_size);
    (0..shares.len())
        .map(|r| RankPartition {
            heads: heads[r].clone(),
            kv_heads: heads[r].start / group..heads[r].end.div_ceil(group),
            channels: channel(channels[r].start)..channel(channels[r].end),
            vocab: vocab[r].clone(),
        })
        .collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A model of 6 layers with so many heads of 4 elements.
    pub(crate) fn sizes(n_heads: usize, n_kv_heads: usize) -> Config {
        Config {
            vocab_size: 103,
            hidden_size: 4 * n_heads,
            intermediate_size: 200,
            n_layers: 6,
            n_heads,
            n_kv_heads,
            head_dim: 4,
            rms_norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: None,
            max_position_embeddings: 64,
            sliding_window: None,
            tie_word_embeddings: false,
            qkv_bias: false,
            qk_norm: false,
        }
    }

    fn ranks(config: &Config, shares: &[f64], granule: usize) -> Vec<RankPartition> {
        let partition = Partition::new(config, 1, shares.len(), Some(shares), granule).unwrap();
        partition.stages.into_iter().next().unwrap().ranks
    }

    /// Panics unless the ranges are contiguous, in order, and cover 0..n.
    fn assert_covers<'a>(ranges: impl IntoIterator<Item = &'a Range<usize>>, n: usize, case: &str) {
        let end = ranges.into_iter().fold(0, |end, range| {
            assert!(range.start == end && range.end >= end, "{case}: {range:?} after {end}");
            range.end
        });
        assert_eq!(end, n, "{case}");
    }

    #[test]
    fn local_ranges_cover_and_are_balanced() {
        for n in (0..50).chain([4096, 14336, 32000, usize::MAX]) {
            for world in (1..20).chain([4096]) {
                let ranges: Vec<_> = (0..world).map(|rank| TensorParallelConfig::new(world, rank).local_range(n)).collect();
                assert_covers(&ranges, n, &format!("{n} over {world}"));
                let (least, most) = (ranges.iter().map(Range::len).min().unwrap(), ranges.iter().map(Range::len).max().unwrap());
                assert!(most - least <= 1, "{n} over {world}: {least} to {most}");
            }
        }
        let ten_over_three = [0, 1, 2].map(|rank| TensorParallelConfig::new(3, rank));
        assert_eq!(ten_over_three.map(|c| c.local_size(10)), [4, 3, 3]);
        assert_eq!(ten_over_three.map(|c| c.local_offset(10)), [0, 4, 7]);
    }

    #[test]
    fn a_rank_outside_its_world_owns_nothing_and_is_refused_by_name() {
        for (world, rank) in [(0, 0), (1, 1), (2, 7), (usize::MAX, usize::MAX)] {
            assert!(TensorParallelConfig::new(world, rank).local_range(10).is_empty(), "rank {rank} of {world}");
        }
        assert!(matches!(TensorParallelConfig::try_new(0, 0), Err(Error::NoRanks)));
        assert!(matches!(TensorParallelConfig::try_new(2, 2), Err(Error::RankOutOfRange { rank: 2, world_size: 2 })));
        assert_eq!(TensorParallelConfig::try_new(2, 1).unwrap(), TensorParallelConfig::new(2, 1));
    }

    #[test]
    fn any_shares_cover_everything_once_and_leave_every_rank_a_head() {
        let shares: [&[f64]; 9] = [
            &[1.0],
            &[3.0, 1.0],
            &[1.0, 3.0],
            &[1000.0, 1.0],
            &[1.0, 1000.0, 1.0],
            &[1e308, 1e-308],
            &[1e-300, 1e-300, 1e300, 1e-300],
            &[0.3, 0.3, 0.3, 0.1],
            &[5.0, 4.0, 3.0, 2.0, 1.0],
        ];
        for (n_heads, n_kv_heads) in [(5, 1), (5, 5), (9, 3), (32, 8), (64, 8)] {
            let config = sizes(n_heads, n_kv_heads);
            for (shares, granule) in shares.iter().flat_map(|s| [1, 32, 256].map(|g| (s, g))) {
                let case = format!("{n_heads}/{n_kv_heads} heads, shares {shares:?}, granules of {granule}");
                let ranks = ranks(&config, shares, granule);
                assert_covers(ranks.iter().map(|r| &r.heads), n_heads, &case);
                assert_covers(ranks.iter().map(|r| &r.channels), config.intermediate_size, &case);
                assert_covers(ranks.iter().map(|r| &r.vocab), config.vocab_size, &case);
                let total: f64 = shares.iter().sum();
                for (rank, share) in ranks.iter().zip(*shares) {
                    let quota = config.vocab_size as f64 * (share / total);
                    assert!((rank.vocab.len() as f64 - quota).abs() < 1.0, "{case}: {rank:?}");
                    assert!(!rank.heads.is_empty(), "{case}: {rank:?}");
                    let group = n_heads / n_kv_heads;
                    let needed = rank.heads.start / group..(rank.heads.end - 1) / group + 1;
                    assert_eq!(rank.kv_heads, needed, "{case}: {rank:?}");
                }
            }
        }
    }

    #[test]
    fn shares_weight_every_dimension() {
        let config = sizes(32, 8);
        let [a, b] = ranks(&config, &[3.0, 1.0], 1).try_into().unwrap();
        assert_eq!((a.heads, b.heads), (0..24, 24..32));
        assert_eq!((a.kv_heads, b.kv_heads), (0..6, 6..8));
        assert_eq!((a.channels, b.channels), (0..150, 150..200));
        assert_eq!((a.vocab, b.vocab), (0..77, 77..103));

        let [a, b] = ranks(&config, &[1000.0, 1.0], 1).try_into().unwrap();
        assert_eq!((a.heads, b.heads), (0..31, 31..32));
        assert_eq!((a.channels, b.channels), (0..200, 200..200));
    }

    #[test]
    fn key_value_heads_at_a_border_are_held_by_both_neighbours() {
        let kv = |n_heads, n_kv_heads, world: usize| -> Vec<Range<usize>> {
            ranks(&sizes(n_heads, n_kv_heads), &vec![1.0; world], 1).into_iter().map(|r| r.kv_heads).collect()
        };
        assert_eq!(kv(9, 3, 2), [0..2, 1..3]); // query heads 0..5, 5..9
        assert_eq!(kv(9, 3, 4), [0..1, 1..2, 1..3, 2..3]); // 0..3, 3..5, 5..7, 7..9
        assert_eq!(kv(9, 3, 9), [0..1, 0..1, 0..1, 1..2, 1..2, 1..2, 2..3, 2..3, 2..3]);
        assert_eq!(kv(8, 1, 3), [0..1, 0..1, 0..1]);
        assert_eq!(kv(6, 6, 4), [0..2, 2..4, 4..5, 5..6]);
    }

    #[test]
    fn channels_are_cut_at_granules_and_the_last_takes_the_remainder() {
        let channels = |world: usize, granule| -> Vec<Range<usize>> {
            ranks(&sizes(8, 8), &vec![1.0; world], granule).into_iter().map(|r| r.channels).collect()
        };
        assert_eq!(channels(2, 32), [0..128, 128..200]); // 6 granules of 32 and one of 8
        assert_eq!(channels(3, 32), [0..96, 96..160, 160..200]);
        assert_eq!(channels(2, 256), [0..200, 200..200]);
    }

    #[test]
    fn stages_are_contiguous_blocks_of_all_layers() {
        let config = sizes(8, 2);
        for stages in 1..=6 {
            let partition = Partition::new(&config, stages, 2, None, 1).unwrap();
            assert_covers(partition.stages.iter().map(|s| &s.layers), 6, &format!("{stages} stages"));
            assert!(partition.stages.iter().all(|s| !s.layers.is_empty() && s.ranks == partition.stages[0].ranks), "{stages} stages");
        }
    }

    #[test]
    fn stages_are_even_but_for_the_head_and_the_earlier_are_the_larger() {
        let layers = |n_layers, vocab_size, stages, shares: Option<&[f64]>| -> Vec<usize> {
            let config = Config { n_layers, vocab_size, ..sizes(8, 8) };
            let partition = Partition::new(&config, stages, 2, shares, 1).unwrap();
            partition.stages.iter().map(|stage| stage.layers.len()).collect()
        };
        // A layer has 4 * 32 * 32 + 3 * 32 * 200 + 2 * 32 = 23360 weights, so does a head of 729 rows.
        assert_eq!(layers(8, 1, 3, None), [3, 3, 2]);
        assert_eq!(layers(32, 1, 4, None), [8, 8, 8, 8]);
        assert_eq!(layers(32, 729 * 8, 4, None), [10, 10, 10, 2]);
        assert_eq!(layers(32, 729 * 100, 4, None), [11, 10, 10, 1]);
        assert_eq!(layers(8, 1, 2, Some(&[3.0, 3.0, 1.0, 1.0])), [6, 2]);
        assert_eq!(layers(8, 1, 2, Some(&[1.0, 1.0, 3.0, 3.0])), [2, 6]);
        assert_eq!(layers(8, 1, 2, Some(&[3.0, 1.0])), [4, 4], "shares of ranks leave stages alike");
        assert_eq!(layers(4, 1, 4, Some(&[1.0, 2.0, 1e9, 4.0, 5.0, 6.0, 7.0, 8.0])), [1, 1, 1, 1]);
    }

    #[test]
    fn shares_a_device_split_each_stage_by_its_own() {
        let config = Config { n_layers: 8, ..sizes(8, 2) };
        let partition = Partition::new(&config, 2, 2, Some(&[3.0, 1.0, 1.0, 1.0]), 1).unwrap();
        let heads: Vec<_> = partition.stages.iter().flat_map(|stage| stage.ranks.iter().map(|rank| rank.heads.clone())).collect();
        assert_eq!(heads, [0..6, 6..8, 0..4, 4..8]);
        assert_eq!(partition.stages[1].ranks, ranks(&config, &[1.0, 1.0], 1));
        // One rank a stage: one share holds for all of them, two are one a device.
        let layers = |shares: &[f64]| Partition::new(&config, 2, 1, Some(shares), 1).unwrap().stages[0].layers.clone();
        assert_eq!([layers(&[5.0]), layers(&[3.0, 1.0])], [0..4, 0..6]);
    }

    #[test]
    fn elements_follow_heads_channels_and_rows() {
        let config = sizes(9, 3);
        let rank = ranks(&config, &[1.0, 1.0], 1).pop().unwrap();
        let elements = [Dim::Hidden, Dim::Heads, Dim::KvHeads, Dim::Channels, Dim::Vocab].map(|dim| rank.range(dim, &config));
        assert_eq!(elements, [0..36, 20..36, 4..12, 100..200, 52..103]);
        assert_eq!(rank.width(Dim::KvHeads, &config), 8);
    }

    #[test]
    fn grids_that_cannot_be_are_refused_with_the_numbers() {
        let config = sizes(8, 2);
        for (stages, ranks, shares, words) in [
            (1, 0, None, "the world size is 0"),
            (1, 9, None, "9 ranks cannot share 8 query heads"),
            (1, usize::MAX, None, "cannot share 8 query heads"),
            (0, 1, None, "0 stages cannot share 6 layers"),
            (7, 1, None, "7 stages cannot share 6 layers"),
            (1, 2, Some(&[1.0][..]), "[1.0] do not fit 2 ranks"),
            (1, 2, Some(&[1.0, 0.0]), "[1.0, 0.0] do not fit 2 ranks"),
            (1, 2, Some(&[1.0, -1.0]), "[1.0, -1.0] do not fit 2 ranks"),
            (1, 2, Some(&[1.0, f64::NAN]), "[1.0, NaN] do not fit 2 ranks"),
            (1, 2, Some(&[f64::INFINITY, 1.0]), "[inf, 1.0] do not fit 2 ranks"),
            (1, 2, Some(&[f64::MAX, f64::MAX]), "do not fit 2 ranks"),
            (1, 2, Some(&[1.0; 3]), "give 2 finite numbers above 0, one a rank"),
            (3, 2, Some(&[]), "[] do not fit 2 ranks in each of 3 stages"),
            (3, 2, Some(&[1.0; 3]), "give 2 finite numbers above 0, one a rank of every stage, or 6, one a device"),
            (3, 2, Some(&[1.0, 1.0, 1.0, 1.0, 1.0, -1.0]), "do not fit 2 ranks in each of 3 stages"),
        ] {
            let message = Partition::new(&config, stages, ranks, shares, 1).expect_err(words).to_string();
            assert!(message.contains(words), "{message:?} should say {words:?}");
        }
    }
}
