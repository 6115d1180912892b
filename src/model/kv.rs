//! Pages of the KV cache: who holds which. Their memory belongs to the places, under the same numbers.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use crate::backend::{KvType, PageId, Seq};
use crate::error::{Error, Result};

/// The pages of one loaded model.
#[derive(Debug)]
pub(crate) struct PagePool {
    pages: Mutex<Pages>,
    total: usize,
}

#[derive(Debug, Default)]
struct Pages {
    /// How many leases hold each page that was ever given out.
    holders: Vec<u32>,
    /// Those of them that nobody holds. The lowest goes first, so that places use no more memory than they must.
    returned: BTreeSet<PageId>,
}

impl Pages {
    fn held(&self) -> usize {
        self.holders.len() - self.returned.len()
    }
}

impl PagePool {
    pub(crate) fn new(total: usize) -> Self {
        Self { pages: Mutex::default(), total: total.min(PageId::MAX as usize) }
    }

    fn pages(&self) -> std::sync::MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pages that there are.
    pub(crate) fn total(&self) -> usize {
        self.total
    }

    /// Pages that somebody holds.
    pub(crate) fn held(&self) -> usize {
        self.pages().held()
    }

    fn take(&self, wanted: usize, page_len: usize, most: usize) -> Result<Vec<PageId>> {
        let mut pages = self.pages();
        let total = self.total.min(most);
        let free = total.saturating_sub(pages.held());
        if wanted > free {
            return Err(Error::CacheFull { wanted, free, total, page_len });
        }
        let take = |_| {
            let page = pages.returned.pop_first().unwrap_or_else(|| {
                pages.holders.push(0);
                (pages.holders.len() - 1) as PageId
            });
            pages.holders[page as usize] = 1;
            page
        };
        Ok((0..wanted).map(take).collect())
    }

    /// Adds a holder to each page, which somebody holds already.
    fn share(&self, shared: &[PageId]) {
        let mut pages = self.pages();
        shared.iter().for_each(|&page| pages.holders[page as usize] += 1);
    }

    fn is_shared(&self, page: PageId) -> bool {
        self.pages().holders[page as usize] > 1
    }

    /// Takes a holder from each page.
    fn give(&self, given: impl IntoIterator<Item = PageId>) {
        let pages = &mut *self.pages();
        for page in given {
            let holders = &mut pages.holders[page as usize];
            *holders -= 1;
            if *holders == 0 {
                pages.returned.insert(page);
            }
        }
    }
}

/// The pages of one sequence in one loaded model. Dropping it gives them back.
///
/// Sequences of one prefix may hold the same pages ([`Self::fork`]). A page that another lease holds too is never written: the
/// writer takes a fresh page in its place and has the old one copied to it.
#[derive(Debug)]
pub(crate) struct Lease {
    pool: Arc<PagePool>,
    kv: KvType,
    seq: Seq,
    /// Positions whose keys and values are stored, or were before their page was freed.
    stored: usize,
    /// `[from, to]`: `to` is in `seq`, `from` is held until it has been copied, so that nobody writes it before.
    copies: Vec<[PageId; 2]>,
}

impl Lease {
    pub(crate) fn new(pool: Arc<PagePool>, kv: KvType) -> Self {
        Self { pool, kv, seq: Seq::default(), stored: 0, copies: Vec::new() }
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

    /// What the batch that writes the reserved positions must copy first, `[from, to]` in order.
    pub(crate) fn copies(&self) -> &[[PageId; 2]] {
        &self.copies
    }

    /// A lease of the first `n` positions, which shares the pages of those from `seen` on: what a row at `n` sees.
    ///
    /// `None` if they are not all stored, or a page of theirs was freed.
    pub(crate) fn fork(&self, n: usize, seen: usize) -> Option<Self> {
        if n > self.stored {
            return None;
        }
        let page_len = self.kv.page_len();
        let first_page = seen / page_len;
        let mut pages = Vec::new();
        for page in first_page..n.div_ceil(page_len) {
            let page = *self.seq.pages.get(page.checked_sub(self.seq.first_page as usize)?)?;
            // What is still to be copied lies where it did.
            let copy = self.copies.iter().find(|[_, to]| *to == page);
            pages.push(copy.map_or(page, |&[from, _]| from));
        }
        self.pool.share(&pages);
        let seq = Seq { pages, first_page: first_page as u32 };
        Some(Self { pool: self.pool.clone(), kv: self.kv, seq, stored: n, copies: Vec::new() })
    }

    /// Holds pages for all positions before `end`; those from [`Self::stored`] on may be written once [`Self::copies`] are made. No more
    /// than `most` pages of the pool are then held in all.
    ///
    /// # Errors
    /// [`Error::CacheFull`], and nothing has changed.
    pub(crate) fn reserve(&mut self, end: usize, most: usize) -> Result<()> {
        if end <= self.stored {
            return Ok(());
        }
        let page_len = self.kv.page_len();
        let first_page = self.seq.first_page as usize;
        let (held, wanted) = (self.seq.pages.len(), end.div_ceil(page_len).saturating_sub(first_page));
        let written = (self.stored / page_len).saturating_sub(first_page)..held.min(wanted);
        // Nobody else can come to share a page of this lease meanwhile: that takes the lease.
        let shared: Vec<usize> = written.filter(|&i| self.pool.is_shared(self.seq.pages[i])).collect();
        let mut fresh = self.pool.take(shared.len() + wanted.saturating_sub(held), page_len, most)?;
        let added = fresh.split_off(shared.len());
        for (i, to) in shared.into_iter().zip(fresh) {
            let from = std::mem::replace(&mut self.seq.pages[i], to);
            self.copies.push([from, to]);
        }
        self.seq.pages.extend(added);
        Ok(())
    }

    /// Positions before `end` are stored, all copies made; those before `seen` will not be looked at again, and pages of nothing
    /// else are freed.
    pub(crate) fn commit(&mut self, end: usize, seen: usize) {
        self.stored = end;
        self.pool.give(self.copies.drain(..).map(|[from, _]| from));
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
        // What was to be copied and may not have been is shared again.
        for [from, to] in self.copies.drain(..) {
            self.seq.pages.iter_mut().filter(|page| **page == to).for_each(|page| *page = from);
            self.pool.give([to]);
        }
        self.stored = self.stored.min(end);
        let keep = end.div_ceil(page_len).saturating_sub(self.seq.first_page as usize).min(self.seq.pages.len());
        self.pool.give(self.seq.pages.drain(keep..));
        true
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let copied = self.copies.drain(..).map(|[from, _]| from);
        self.pool.give(self.seq.pages.drain(..).chain(copied));
    }
}

#[cfg(test)]
mod tests;
