//! Pages of the KV cache: who holds which. Their memory belongs to the places, under the same numbers.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use crate::backend::{KvType, PageId, Seq};
use crate::error::{Error, Result};

/// The free pages of one loaded model.
#[derive(Debug)]
pub(crate) struct PagePool {
    free: Mutex<Free>,
    total: usize,
}

#[derive(Debug, Default)]
struct Free {
    /// Given back. The lowest goes first, so that places use no more memory than they must.
    returned: BTreeSet<PageId>,
    /// This page and all above it were never given out.
    fresh: usize,
}

impl PagePool {
    pub(crate) fn new(total: usize) -> Self {
        Self { free: Mutex::default(), total: total.min(PageId::MAX as usize) }
    }

    fn free(&self) -> std::sync::MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pages given out and not given back.
    pub(crate) fn held(&self) -> usize {
        let free = self.free();
        free.fresh - free.returned.len()
    }

    fn take(&self, wanted: usize, page_len: usize) -> Result<Vec<PageId>> {
        let mut free = self.free();
        let available = free.returned.len() + self.total - free.fresh;
        if wanted > available {
            return Err(Error::CacheFull { wanted, free: available, total: self.total, page_len });
        }
        Ok((0..wanted)
            .map(|_| {
                free.returned.pop_first().unwrap_or_else(|| {
                    free.fresh += 1;
                    (free.fresh - 1) as PageId
                })
            })
            .collect())
    }

    fn give(&self, pages: impl IntoIterator<Item = PageId>) {
        self.free().returned.extend(pages);
    }
}

/// The pages of one sequence in one loaded model. Dropping it gives them back.
#[derive(Debug)]
pub(crate) struct Lease {
    pool: Arc<PagePool>,
    kv: KvType,
    seq: Seq,
    /// Positions whose keys and values are stored, or were before their page was freed.
    stored: usize,
}

impl Lease {
    pub(crate) fn new(pool: Arc<PagePool>, kv: KvType) -> Self {
        Self { pool, kv, seq: Seq::default(), stored: 0 }
    }

    pub(crate) fn is_of(&self, pool: &Arc<PagePool>) -> bool {
        Arc::ptr_eq(&self.pool, pool)
    }

    pub(crate) fn seq(&self) -> &Seq {
        &self.seq
    }

    pub(crate) fn stored(&self) -> usize {
        self.stored
    }

    pub(crate) fn pages(&self) -> usize {
        self.seq.pages.len()
    }

    /// Holds pages for all positions before `end`.
    pub(crate) fn reserve(&mut self, end: usize) -> Result<()> {
        let page_len = self.kv.page_len();
        let wanted = end.div_ceil(page_len).saturating_sub(self.seq.first_page as usize + self.seq.pages.len());
        self.seq.pages.extend(self.pool.take(wanted, page_len)?);
        Ok(())
    }

    /// Positions before `end` are stored; those before `seen` will not be looked at again, and pages of nothing else are freed.
    pub(crate) fn commit(&mut self, end: usize, seen: usize) {
        self.stored = end;
        let behind = (seen / self.kv.page_len()).saturating_sub(self.seq.first_page as usize).min(self.seq.pages.len());
        self.pool.give(self.seq.pages.drain(..behind));
        self.seq.first_page += behind as u32;
    }

    /// Takes positions from `end` back. False if what a row at `end` must see, from `seen` on, was freed: the lease is of no use then.
    pub(crate) fn truncate(&mut self, end: usize, seen: usize) -> bool {
        let page_len = self.kv.page_len();
        if seen < self.seq.first_page as usize * page_len {
            return false;
        }
        self.stored = self.stored.min(end);
        let keep = end.div_ceil(page_len).saturating_sub(self.seq.first_page as usize).min(self.seq.pages.len());
        self.pool.give(self.seq.pages.drain(keep..));
        true
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.pool.give(self.seq.pages.drain(..));
    }
}
