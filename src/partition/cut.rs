//! Cuts rows of like things into contiguous ranges: by shares, or so that the costliest is cheap.

use std::ops::Range;

/// Cuts `n` items into contiguous ranges in proportion to `shares`, each of at least `least` items.
///
/// The largest remainders take the items that are left, the earlier of equals first, so that equal shares give
/// [`super::TensorParallelConfig::local_range`].
pub(super) fn split(n: usize, shares: &[f64], least: usize) -> Vec<Range<usize>> {
    let total: f64 = shares.iter().sum();
    let spare = n - least * shares.len();
    // What is fixed by `least` counts towards a rank's share.
    let mut sizes = vec![least; shares.len()];
    let wanted: Vec<f64> = shares.iter().map(|s| (n as f64 * (s / total) - least as f64).max(0.0)).collect();
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
    ranges(sizes)
}

/// Ranges of these sizes, one behind the other.
pub(super) fn ranges(sizes: Vec<usize>) -> Vec<Range<usize>> {
    let mut start = 0;
    sizes
        .into_iter()
        .map(|size| {
            start += size;
            start - size..start
        })
        .collect()
}

/// How many of `n` layers each stage has, where a stage costs its layers by its weight and the last has a head of so many layers to carry.
///
/// Every stage begins with one layer, and each further layer goes to the stage that is cheapest with it, the earliest of equals:
/// as layers cost the same, that makes the costliest stage as cheap as can be. Instead of layer by layer, it is done up to the last
/// layers at once, by bisection for the cost that those reach.
pub(super) fn stage_sizes(n: usize, weights: &[f64], head: f64) -> Vec<usize> {
    let heaviest = weights.iter().copied().fold(0.0, f64::max);
    let stages: Vec<(f64, f64)> =
        weights.iter().enumerate().map(|(s, w)| (w / heaviest, if s + 1 == weights.len() { head } else { 0.0 })).collect();
    let sizes_within = |cost: f64| stages.iter().map(move |(weight, extra)| ((cost * weight - extra) as usize).clamp(1, n));

    // Within `low` at most all layers are done, within `high` all or more.
    let (mut low, mut high) = (0.0, n as f64 + head);
    let mut middle = high / 2.0;
    while low < middle && middle < high {
        let done = sizes_within(middle).fold(0, usize::saturating_add);
        *if done <= n { &mut low } else { &mut high } = middle;
        middle = f64::midpoint(low, high);
    }
    let mut sizes: Vec<usize> = sizes_within(low).collect();
    let rest = n - sizes.iter().sum::<usize>();
    let with_one_more = |s: usize| (sizes[s] as f64 + 1.0 + stages[s].1) / stages[s].0;
    let mut order: Vec<(usize, f64)> = (0..sizes.len()).map(|s| (s, with_one_more(s))).collect();
    order.sort_by(|(_, a), (_, b)| a.total_cmp(b));
    for &(stage, _) in order.iter().cycle().take(rest) {
        sizes[stage] += 1;
    }
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::partition::TensorParallelConfig;

    #[test]
    fn equal_shares_are_local_ranges() {
        for n in (0..300).chain([4096, 14336, 32000, 131_072, 1_000_003]) {
            for world in 1..=17 {
                let local: Vec<_> = (0..world).map(|rank| TensorParallelConfig::new(world, rank).local_range(n)).collect();
                for share in [1.0, 0.1, 1e307, f64::MIN_POSITIVE] {
                    assert_eq!(split(n, &vec![share; world], 0), local, "{n} over {world} shares of {share}");
                    if n >= world {
                        assert_eq!(split(n, &vec![share; world], 1), local, "{n} over {world} shares of {share}, at least 1");
                    }
                }
            }
        }
    }

    /// What the costliest stage costs, in layers by weight.
    fn costliest(sizes: &[usize], weights: &[f64], head: f64) -> f64 {
        let last = sizes.len() - 1;
        let cost = |s: usize| (sizes[s] as f64 + if s == last { head } else { 0.0 }) / weights[s];
        (0..sizes.len()).map(cost).fold(0.0, f64::max)
    }

    /// Every way to cut `n` layers into so many stages of at least one.
    fn cuts(n: usize, stages: usize) -> Vec<Vec<usize>> {
        if stages == 1 {
            return vec![vec![n]];
        }
        let firsts = 1..=n - (stages - 1);
        firsts.flat_map(|first| cuts(n - first, stages - 1).into_iter().map(move |rest| [vec![first], rest].concat())).collect()
    }

    #[test]
    fn the_costliest_stage_is_as_cheap_as_any_cut_makes_it() {
        let weights: [&[f64]; 9] = [
            &[1.0],
            &[1.0; 2],
            &[1.0; 4],
            &[3.0, 1.0],
            &[1.0, 3.0],
            &[0.1, 0.2, 0.7],
            &[5.0, 1.0, 1.0, 2.0],
            &[1e300, 1e-300],
            &[1.0, 1e3, 1.0],
        ];
        for (weights, head) in weights.iter().flat_map(|w| [0.0, 1e-9, 0.4, 1.0, 2.5, 7.0, 1e9].map(|head| (w, head))) {
            for n in weights.len()..=10 {
                let sizes = stage_sizes(n, weights, head);
                let (found, case) =
                    (costliest(&sizes, weights, head), format!("{n} layers, weights {weights:?}, a head of {head}: {sizes:?}"));
                assert!(sizes.iter().all(|&size| size >= 1) && sizes.iter().sum::<usize>() == n, "{case}");
                let best = cuts(n, weights.len()).iter().map(|cut| costliest(cut, weights, head)).fold(f64::INFINITY, f64::min);
                assert!(found <= best * (1.0 + 1e-12), "{case} costs {found}, {best} can be had");
            }
        }
    }

    #[test]
    fn a_hostile_number_of_layers_is_cut_at_once_and_well() {
        for (n, weights, head) in [
            (u32::MAX as usize, vec![1.0; 7], 0.5),
            (u32::MAX as usize, vec![3.0, 1.0, 0.3], 1e6),
            (u32::MAX as usize - 1, vec![1e-300, 1e300], 1e12),
            (1_000_003, vec![1.0; 1000], 17.0),
            (100_000, vec![1.0; 100_000], 3.0),
        ] {
            let sizes = stage_sizes(n, &weights, head);
            assert_eq!(sizes.iter().sum::<usize>(), n);
            let last = sizes.len() - 1;
            let cost = |s: usize, more: f64| (sizes[s] as f64 + more + if s == last { head } else { 0.0 }) / weights[s];
            let most = (0..sizes.len()).filter(|&s| sizes[s] > 1).map(|s| cost(s, 0.0)).fold(0.0, f64::max);
            let next = (0..sizes.len()).map(|s| cost(s, 1.0)).fold(f64::INFINITY, f64::min);
            assert!(most <= next * (1.0 + 1e-12), "{n} layers over {}: one that costs {most} could cost {next} elsewhere", sizes.len());
        }
    }
}
