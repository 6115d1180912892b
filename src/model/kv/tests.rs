use std::collections::{BTreeMap, BTreeSet};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::*;

const PAGE: usize = 64;

fn pool(total: usize) -> Arc<PagePool> {
    Arc::new(PagePool::new(total))
}

fn lease(pool: &Arc<PagePool>) -> Lease {
    Lease::new(pool.clone(), KvType::F32)
}

/// Reserves up to `end`, as if a batch then wrote it.
fn grow(lease: &mut Lease, end: usize) {
    lease.reserve(end, usize::MAX).unwrap();
    lease.commit(end, 0);
}

fn grown(pool: &Arc<PagePool>, end: usize) -> Lease {
    let mut lease = lease(pool);
    grow(&mut lease, end);
    lease
}

#[test]
fn a_fork_at_a_page_border_shares_pages_and_copies_none() {
    let pool = pool(4);
    let mut donor = grown(&pool, 2 * PAGE + 1);
    let mut fork = donor.fork(2 * PAGE, 0).unwrap();
    assert_eq!(fork.seq().pages, donor.seq().pages[..2]);
    assert_eq!((fork.stored(), pool.held(), pool.total() - pool.held(), pool.total()), (2 * PAGE, 3, 1, 4));
    fork.reserve(3 * PAGE, usize::MAX).unwrap();
    assert!(fork.copies().is_empty());
    donor.reserve(3 * PAGE, usize::MAX).unwrap();
    assert!(donor.copies().is_empty());
    drop(donor);
    assert_eq!(pool.held(), 3, "what the fork holds stays");
    drop(fork);
    assert_eq!(pool.held(), 0);
}

#[test]
fn the_first_to_write_a_shared_page_copies_it_and_the_last_writes_it_in_place() {
    let pool = pool(8);
    let mut donor = grown(&pool, 70);
    let mut fork = donor.fork(70, 0).unwrap();
    fork.reserve(71, usize::MAX).unwrap();
    let [from, to] = fork.copies()[..].try_into().map(|[copy]: [_; 1]| copy).unwrap();
    assert_eq!((from, fork.seq().pages[1]), (donor.seq().pages[1], to));
    assert_ne!(from, to);
    fork.commit(71, 0);
    assert!(fork.copies().is_empty());
    donor.reserve(71, usize::MAX).unwrap();
    assert!(donor.copies().is_empty(), "nobody else holds it now");
    assert_eq!(pool.held(), 3);
}

#[test]
fn where_both_write_before_either_has_copied_both_copy_what_neither_writes() {
    let pool = pool(8);
    let mut donor = grown(&pool, 70);
    let mut fork = donor.fork(66, 0).unwrap();
    fork.reserve(67, usize::MAX).unwrap();
    donor.reserve(71, usize::MAX).unwrap();
    let (a, b) = (donor.copies()[0], fork.copies()[0]);
    assert!(a[0] == b[0] && a[1] != b[1] && a[0] != a[1] && a[0] != b[1]);
    assert_eq!(pool.held(), 4);
    donor.commit(71, 0);
    assert_eq!(pool.held(), 4, "the fork has not copied it yet");
    fork.commit(67, 0);
    assert_eq!(pool.held(), 3);
}

#[test]
fn a_page_outlives_its_donor_until_it_is_copied() {
    let pool = pool(8);
    let donor = grown(&pool, 10);
    let mut fork = donor.fork(5, 0).unwrap();
    fork.reserve(6, usize::MAX).unwrap();
    let [from, to] = fork.copies()[0];
    drop(donor);
    let other = grown(&pool, PAGE);
    assert!(![from, to].contains(&other.seq().pages[0]), "it is not given out meanwhile");
    fork.commit(6, 0);
    assert_eq!(grown(&pool, 1).seq().pages, [from], "but afterwards");
}

#[test]
fn a_fork_of_a_fork_shares_what_is_stored_and_not_what_is_still_to_be_copied() {
    let pool = pool(8);
    let donor = grown(&pool, 70);
    let mut fork = donor.fork(69, 0).unwrap();
    fork.reserve(70, usize::MAX).unwrap();
    let second = fork.fork(68, 0).unwrap();
    assert_eq!(second.seq().pages, donor.seq().pages);
    drop((donor, fork));
    assert_eq!(pool.held(), 2);
}

#[test]
fn a_truncated_lease_writes_no_page_that_a_fork_holds() {
    let pool = pool(8);
    let mut donor = grown(&pool, 200);
    let fork = donor.fork(150, 0).unwrap();
    assert!(donor.truncate(100, 0));
    donor.reserve(130, usize::MAX).unwrap();
    assert_eq!(donor.copies(), [[fork.seq().pages[1], donor.seq().pages[1]]]);
    // Page 2 was given back, so that a fresh one took its place.
    assert_ne!(donor.seq().pages[2], fork.seq().pages[2]);
    assert_eq!(donor.seq().pages[0], fork.seq().pages[0]);
}

#[test]
fn a_truncation_takes_copies_back_that_were_never_made() {
    let pool = pool(8);
    let donor = grown(&pool, 70);
    let mut fork = donor.fork(70, 0).unwrap();
    let before = fork.seq().clone();
    fork.reserve(300, usize::MAX).unwrap();
    assert!(fork.truncate(70, 0));
    assert_eq!((fork.seq(), fork.copies(), pool.held()), (&before, &[][..], 2));
}

#[test]
fn a_full_cache_changes_nothing() {
    let pool = pool(3);
    let donor = grown(&pool, 70);
    let mut fork = donor.fork(70, 0).unwrap();
    let before = fork.seq().clone();
    let error = fork.reserve(2 * PAGE + 1, usize::MAX).unwrap_err();
    assert!(matches!(error, Error::CacheFull { wanted: 2, free: 1, total: 3, page_len: PAGE }), "{error}");
    assert_eq!((fork.seq(), fork.copies(), pool.held()), (&before, &[][..], 2));
    fork.reserve(2 * PAGE, usize::MAX).unwrap();
    assert_eq!(fork.copies().len(), 1);
}

#[test]
fn a_fork_needs_what_its_rows_see_and_no_more() {
    let pool = pool(8);
    let mut donor = lease(&pool);
    donor.reserve(200, usize::MAX).unwrap();
    donor.commit(200, 130);
    assert_eq!(pool.held(), 2);
    assert!(donor.fork(200, 127).is_none(), "page 1 was freed");
    assert!(donor.fork(201, 140).is_none(), "position 200 is not stored");
    let fork = donor.fork(192, 128).unwrap();
    assert_eq!((fork.seq().first_page, &fork.seq().pages[..]), (2, &donor.seq().pages[..1]));
}

/// A lease with the values that its sequence should have, a number a position.
struct Sequence {
    lease: Lease,
    values: Vec<u64>,
}

/// Pages as a place holds them, and sequences that write and read through them.
struct Model {
    pool: Arc<PagePool>,
    window: Option<usize>,
    memory: BTreeMap<PageId, Vec<u64>>,
    written: u64,
    sequences: Vec<Sequence>,
}

impl Model {
    fn seen(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// What a batch does that stores up to `end`.
    fn store(&mut self, which: usize, end: usize) {
        let Self { memory, written, sequences, .. } = self;
        let Sequence { lease, values } = &mut sequences[which];
        let page_len = lease.kv.page_len();
        for [from, to] in lease.copies() {
            let page = memory[from].clone();
            memory.insert(*to, page);
        }
        for position in lease.stored()..end {
            *written += 1;
            let page = lease.seq().pages[position / page_len - lease.seq().first_page as usize];
            memory.entry(page).or_insert_with(|| vec![0; 2 * PAGE])[position % page_len] = *written;
            values.push(*written);
        }
    }

    fn step(&mut self, random: &mut ChaCha8Rng) {
        let mut below = |n: usize| random.next_u32() as usize % n.max(1);
        if self.sequences.is_empty() || below(12) == 0 {
            let kv = [KvType::F32, KvType::F16][below(2)];
            self.sequences.push(Sequence { lease: Lease::new(self.pool.clone(), kv), values: Vec::new() });
            return;
        }
        let which = below(self.sequences.len());
        let stored = self.sequences[which].lease.stored();
        let end = stored + 1 + below(100);
        match below(10) {
            0 => drop(self.sequences.swap_remove(which)),
            1 | 2 => {
                let n = below(stored + 1);
                let Sequence { lease, values } = &self.sequences[which];
                let fork = lease.fork(n, self.seen(n));
                assert!(fork.is_some() || self.window.is_some());
                let values = values[..n].to_vec();
                self.sequences.extend(fork.map(|lease| Sequence { lease, values }));
            }
            3 => {
                let (n, seen) = (below(stored + 1), self.seen(stored));
                let seen = seen.min(self.seen(n));
                let sequence = &mut self.sequences[which];
                match sequence.lease.truncate(n, seen) {
                    true => sequence.values.truncate(n),
                    false => drop(self.sequences.swap_remove(which)),
                }
            }
            // A batch that fails, before or after it has written.
            4 if self.sequences[which].lease.reserve(end, usize::MAX).is_ok() => {
                if below(2) == 0 {
                    self.store(which, end);
                }
                let seen = self.seen(stored);
                let sequence = &mut self.sequences[which];
                assert!(sequence.lease.truncate(stored, seen));
                sequence.values.truncate(stored);
            }
            _ => {
                let before = (self.sequences[which].lease.seq().clone(), self.pool.held());
                match self.sequences[which].lease.reserve(end, usize::MAX) {
                    Ok(()) => {
                        self.store(which, end);
                        let seen = self.seen(end);
                        self.sequences[which].lease.commit(end, seen);
                    }
                    Err(_) => assert_eq!((self.sequences[which].lease.seq().clone(), self.pool.held()), before),
                }
            }
        }
    }

    fn check(&self) {
        let mut held = BTreeSet::new();
        for Sequence { lease, values } in &self.sequences {
            let (seq, page_len) = (lease.seq(), lease.kv.page_len());
            held.extend(seq.pages.iter().copied());
            assert_eq!(lease.stored(), values.len());
            for (position, value) in values.iter().enumerate().skip(self.seen(values.len())) {
                let page = seq.pages[position / page_len - seq.first_page as usize];
                assert_eq!(self.memory[&page][position % page_len], *value, "position {position}");
            }
        }
        assert_eq!(self.pool.held(), held.len(), "pages are held exactly while a sequence has them");
        assert_eq!(self.pool.held(), held.len());
    }
}

#[test]
fn whatever_sequences_do_each_reads_what_it_wrote_and_every_page_comes_back() {
    for seed in 0..30 {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let window = [None, Some(1), Some(50), Some(200)][seed as usize % 4];
        let mut model = Model { pool: pool(40), window, memory: BTreeMap::new(), written: 0, sequences: Vec::new() };
        for _ in 0..400 {
            model.step(&mut random);
            model.check();
        }
        model.sequences.clear();
        assert_eq!(model.pool.held(), 0, "seed {seed}");
    }
}
