//! [`Collective`]: what joins this process to the others of its group.

use crate::error::{Error, Result};

/// Joins the processes (or threads) that each host one rank.
///
/// Methods are called from one thread at a time, the one that loads and then the engine's, in the same order by all members. An implementation decides how long
/// it waits for the others; when a member fails or leaves, it returns [`Error::Collective`] to the rest, which never
/// get a sum without it.
pub trait Collective: Send + Sync {
    /// This member, from 0.
    fn rank(&self) -> usize;

    /// Members of the group.
    fn size(&self) -> usize;

    /// Concatenates what all members give, in rank order: `counts[r]` values of rank r. `local` are this member's, `all` holds
    /// the sum of `counts`. An all-reduce is this and a sum in rank order.
    ///
    /// # Errors
    /// If a member failed or left, or the lengths don't fit.
    fn all_gather(&self, local: &[f32], counts: &[usize], all: &mut [f32]) -> Result<()>;

    /// Copies `bytes` of member `root` to all others.
    ///
    /// # Errors
    /// As [`Collective::all_gather`].
    fn broadcast(&self, root: usize, bytes: &mut [u8]) -> Result<()>;
}

/// The group of one.
#[derive(Debug, Clone, Copy, Default)]
pub struct Alone;

impl Collective for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_gather(&self, local: &[f32], counts: &[usize], all: &mut [f32]) -> Result<()> {
        if counts != [local.len()] || all.len() != local.len() {
            return Err(Error::Collective(format!("{} values gathered as {counts:?} into {}", local.len(), all.len())));
        }
        all.copy_from_slice(local);
        Ok(())
    }

    fn broadcast(&self, _: usize, _: &mut [u8]) -> Result<()> {
        Ok(())
    }
}
