//! [`Speculation`]: when to draft and how much, by what has become of the drafts before.

use super::lookup::Lookup;

/// Tokens of a draft at most, whatever is asked for: a launch of more rows is no cheaper than two.
const MOST: usize = 32;
/// Rows that cost less than a launch. Measured on CPUs, a row more costs a tenth of a launch of one row, where weights come from memory,
/// to two fifths, where they are in the cache.
const ROWS_A_LAUNCH: i64 = 2;
/// What may be gained and not spent, in rows: soon after a text has ceased to repeat itself, drafts cease too.
const MOST_CREDIT: i64 = 4;
/// Launches without a draft when drafts don't pay: fewest, and most after that has happened again and again.
const REST: [u32; 2] = [4, 64];

/// Drafts by looking up the text so far. Drafts earn credit by the launches that they save and spend it by the rows that they add;
/// where it runs out there are none for a while, longer each time until they pay again. It goes by counts alone, so that the
/// members of a group, which must make the same calls, draft the same.
#[derive(Debug)]
pub(super) struct Speculation {
    lookup: Lookup,
    most: usize,
    /// In rows.
    credit: i64,
    /// Launches left without a draft.
    rest: u32,
    next_rest: u32,
}

impl Speculation {
    /// Drafts of at most `most` tokens.
    pub(super) fn new(most: usize) -> Self {
        Self { lookup: Lookup::default(), most: most.min(MOST), credit: MOST_CREDIT, rest: 0, next_rest: REST[0] }
    }

    /// Takes the next token of the text.
    pub(super) fn push(&mut self, token: u32) {
        self.lookup.push(token);
    }

    /// What the next launch may compute behind the text's last token, at most `room` tokens.
    pub(super) fn draft(&mut self, room: usize) -> Vec<u32> {
        if self.rest > 0 {
            self.rest -= 1;
            return Vec::new();
        }
        self.lookup.draft(self.most.min(room))
    }

    /// Hears what became of a draft.
    pub(super) fn judge(&mut self, drafted: usize, accepted: usize) {
        let gain = ROWS_A_LAUNCH * accepted as i64 - drafted as i64;
        self.credit = (self.credit + gain).min(MOST_CREDIT);
        if gain > 0 {
            self.next_rest = REST[0];
        }
        if self.credit < 0 {
            (self.credit, self.rest) = (0, self.next_rest);
            self.next_rest = (2 * self.next_rest).min(REST[1]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a text in a circle, so that there is always something to draft.
    fn circle(most: usize) -> Speculation {
        let mut speculation = Speculation::new(most);
        (0..200).for_each(|i| speculation.push(i % 3));
        speculation
    }

    /// What share of `launches` has a draft, where `accept` says how much of one is right.
    fn drafting(speculation: &mut Speculation, launches: usize, accept: impl Fn(usize) -> usize) -> f64 {
        let mut drafts = 0;
        for _ in 0..launches {
            let drafted = speculation.draft(usize::MAX).len();
            if drafted > 0 {
                drafts += 1;
                speculation.judge(drafted, accept(drafted));
            }
        }
        f64::from(drafts) / launches as f64
    }

    #[test]
    fn drafts_that_are_right_go_on_and_wrong_ones_become_rare() {
        for most in [1, 7, 32] {
            assert_eq!(drafting(&mut circle(most), 1000, |drafted| drafted), 1.0, "{most}");
            let wrong = drafting(&mut circle(most), 1000, |_| 0);
            assert!(wrong > 0.0 && wrong < 0.04, "{most}: {wrong}");
        }
        // One of two pays for itself.
        assert_eq!(drafting(&mut circle(2), 1000, |_| 1), 1.0);
        assert!(drafting(&mut circle(3), 1000, |_| 1) < 0.05);
    }

    #[test]
    fn it_tries_again_and_goes_on_where_drafts_are_right_again() {
        let mut speculation = circle(7);
        drafting(&mut speculation, 1000, |_| 0);
        assert!(drafting(&mut speculation, 500, |drafted| drafted) > 0.85);
        assert_eq!(drafting(&mut speculation, 500, |drafted| drafted), 1.0);
    }

    #[test]
    fn a_draft_is_no_longer_than_asked_nor_than_there_is_room() {
        for (most, room, wanted) in [(7, 100, 7), (7, 2, 2), (7, 0, 0), (0, 100, 0), (1000, 100, MOST)] {
            assert_eq!(circle(most).draft(room).len(), wanted, "{most} {room}");
        }
    }
}
