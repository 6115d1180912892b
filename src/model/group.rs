//! What the members of a group tell each other before they compute together.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::backend::Room;
use crate::collective::Collective;
use crate::error::{Error, Result};
use crate::model::parallel_config::ParallelConfig;
use crate::params::Parameters;
use crate::partition::Partition;

/// Everyone's numbers, in rank order.
fn gather(collective: &dyn Collective, numbers: &[u64]) -> Result<Vec<Vec<u64>>> {
    // 16 bits are exact in an f32.
    let bits = |number: &u64| [0, 16, 32, 48].map(|shift| f32::from((number >> shift) as u16));
    let mine: Vec<f32> = numbers.iter().flat_map(bits).collect();
    let mut all = vec![0.0; mine.len() * collective.size()];
    collective.all_gather(&mine, &vec![mine.len(); collective.size()], &mut all)?;
    let number = |bits: &[f32]| bits.iter().rev().fold(0, |number, bits| number << 16 | u64::from(*bits as u16));
    Ok(all.chunks(mine.len()).map(|member| member.chunks(4).map(number).collect()).collect())
}

/// Whether it is so for any member.
pub(super) fn any(collective: &dyn Collective, mine: bool) -> Result<bool> {
    Ok(gather(collective, &[u64::from(mine)])?.iter().flatten().any(|other| *other != 0))
}

/// What all members can take.
pub(super) fn least(collective: &dyn Collective, room: Room) -> Result<Room> {
    let members = gather(collective, &[room.rows, room.wanted, room.pages].map(|n| n as u64))?;
    let least = |i: usize, mine: usize| members.iter().map(|member| usize::try_from(member[i]).unwrap_or(mine)).min().unwrap_or(mine);
    Ok(Room { rows: least(0, room.rows), wanted: least(1, room.wanted), pages: least(2, room.pages) })
}

/// All members must have the same checkpoint, partition, format, wire and overlap, or their sums mean nothing. All see all, so that where one differs none goes on
/// to wait for it.
pub(super) fn agree(collective: &dyn Collective, params: &Parameters, partition: &Partition, config: &ParallelConfig) -> Result<()> {
    let mut hasher = DefaultHasher::new();
    params.fingerprint().hash(&mut hasher);
    format!("{partition:?} {:?} {:?} {}", config.weights, config.wire, config.overlap).hash(&mut hasher);
    let mine = hasher.finish();
    match gather(collective, &[mine])?.iter().position(|member| *member != [mine]) {
        None => Ok(()),
        Some(other) => {
            let rank = collective.rank();
            Err(Error::Collective(format!(
                "ranks {rank} and {other} differ in their checkpoint, their partition, the format of their weights, how sums travel or whether halves overlap"
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::Alone;

    #[test]
    fn numbers_of_any_size_arrive_whole() {
        let numbers = [0, 1, 65_535, 65_536, 1 << 24, u64::MAX - 1, u64::MAX];
        assert_eq!(gather(&Alone, &numbers).unwrap(), [numbers]);
        let room = Room { rows: 256, wanted: 64, pages: usize::MAX };
        assert_eq!(least(&Alone, room).unwrap(), room);
        assert!(any(&Alone, true).unwrap() && !any(&Alone, false).unwrap());
    }
}
