//! A scheduler under load for a while: every text is right, nothing is lost, nothing is left over, and memory stays flat.

mod common;
#[path = "common/soak.rs"]
mod soak;

use std::time::Duration;

use common::say_skipped;

const REQUESTS: usize = 500;

/// Resident memory may grow by so much behind the first fifth of the requests, which have touched every page of the cache: 10 KiB for
/// each of the others. A lost page is 192 KiB, a lost state about 10; what the allocator and the mapped checkpoint add was up to 1.5 MB.
const GROWTH: u64 = 4 << 20;

/// One after the other, since resident memory is the whole process's.
#[test]
fn five_hundred_requests_on_two_stages_and_on_two_ranks_leave_no_trace() {
    for (stages, ranks) in [(2, 1), (1, 2)] {
        let model = soak::load(stages, ranks);
        let mut before = None;
        let tally = soak::run(&model, REQUESTS, Duration::MAX, |tally| {
            if tally.requests == REQUESTS / 5 {
                before = soak::resident();
            }
        });
        let after = soak::resident();
        eprintln!("{stages} x {ranks}: {tally:?}; resident memory {before:?} after a fifth, {after:?} at the end");

        assert_eq!((tally.requests, tally.finished + tally.cancelled + tally.dropped), (REQUESTS, REQUESTS));
        let counts = tally.counts;
        assert!(tally.cancelled > 0 && tally.dropped > 0 && counts.preemptions > 0 && counts.reused_tokens > 0, "{tally:?}");
        match before.zip(after) {
            Some((before, after)) => assert!(after <= before + GROWTH, "memory grew from {before} to {after} bytes"),
            None => say_skipped("resident memory is read from /proc, which is Linux's"),
        }
    }
}
