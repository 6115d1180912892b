//! [`Lookup`]: what may come next, by what came after the same tokens before.

use std::collections::HashMap;
use std::iter::{successors, zip};

/// Earlier places that are compared at most, newest first: a bound for texts that say the same over and over.
const TRIES: usize = 32;

/// A text and where each pair of tokens ended in it: about 40 bytes a token.
#[derive(Debug, Default)]
pub(super) struct Lookup {
    tokens: Vec<u32>,
    /// Behind the last of its tokens, for every pair.
    newest: HashMap<[u32; 2], u32>,
    /// For every token, where the pair that it ends was before that; 0 if it is the first.
    older: Vec<u32>,
}

impl Lookup {
    pub(super) fn push(&mut self, token: u32) {
        let pair = self.tokens.last().map(|&before| [before, token]);
        self.tokens.push(token);
        let end = self.tokens.len() as u32;
        self.older.push(pair.and_then(|pair| self.newest.insert(pair, end)).unwrap_or(0));
    }

    /// What followed the longest end of the text that was there before, the newest of equals: one token fewer than those that are
    /// equal, so that a chance likeness of two costs little, and at most `most`. None if not even the last two were there before.
    pub(super) fn draft(&self, most: usize) -> Vec<u32> {
        let tokens = &self.tokens[..];
        let older = |end: usize| Some(*self.older.get(end.checked_sub(1)?)? as usize);
        let ends = successors(older(tokens.len()), |&end| older(end)).take_while(|&end| end > 0).take(TRIES);
        let equal = |end: usize| zip(tokens[..end].iter().rev(), tokens.iter().rev()).take(most + 1).take_while(|(a, b)| a == b).count();
        let Some((equal, end)) = ends.map(|end| (equal(end), end)).reduce(|best, next| if next.0 > best.0 { next } else { best }) else {
            return Vec::new();
        };
        let mut draft = Vec::new();
        for at in end..end + most.min(equal - 1) {
            // Behind its end the text goes on with the draft: in a circle.
            draft.push(tokens.get(at).copied().unwrap_or_else(|| draft[at - tokens.len()]));
        }
        draft
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft(tokens: &[u32], most: usize) -> Vec<u32> {
        let mut lookup = Lookup::default();
        tokens.iter().for_each(|&token| lookup.push(token));
        lookup.draft(most)
    }

    #[test]
    fn a_draft_is_what_followed_the_longest_end_that_was_there_before() {
        for (tokens, most, wanted) in [
            (&[][..], 8, &[][..]),
            (&[1], 8, &[]),
            (&[1, 2], 8, &[]),
            (&[1, 2, 3, 4, 5], 8, &[]),
            // A single token says nothing, two say one, three say two.
            (&[1, 2, 3, 9, 2], 8, &[]),
            (&[1, 2, 3, 9, 1, 2], 8, &[3]),
            (&[1, 2, 3, 4, 5, 9, 1, 2, 3], 8, &[4, 5]),
            (&[1, 2, 3, 4, 5, 9, 1, 2, 3], 1, &[4]),
            (&[1, 2, 3, 4, 5, 9, 1, 2, 3], 0, &[]),
            // Three equal tokens are better than two newer ones.
            (&[7, 1, 2, 3, 4, 8, 1, 2, 5, 6, 7, 1, 2], 8, &[3, 4]),
            // Of equals the newest.
            (&[1, 2, 3, 0, 1, 2, 4, 5, 1, 2], 8, &[4]),
            // A circle goes on beyond the end of the text.
            (&[1, 2, 1, 2, 1, 2, 1, 2], 8, &[1, 2, 1, 2, 1]),
            (&[5, 5, 5, 5, 5], 8, &[5, 5, 5]),
        ] {
            assert_eq!(draft(tokens, most), wanted, "{tokens:?}, {most} at most");
        }
    }

    #[test]
    fn it_finds_what_a_search_through_the_whole_text_finds() {
        // Of three tokens, so that chains are long and ends repeat; few enough that no chain is longer than it is followed.
        let mut random = 1u32;
        let mut next = || {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            random >> 30
        };
        for _ in 0..200 {
            let tokens: Vec<u32> = (0..60).map(|_| next()).collect();
            let longest = (1..tokens.len()).rev().map(|end| {
                let equal = (0..end).take_while(|i| tokens[end - 1 - i] == tokens[tokens.len() - 1 - i]).count();
                (equal.min(7), end)
            });
            let (equal, end) = longest.reduce(|best, next| if next.0 > best.0 { next } else { best }).unwrap();
            let wanted: Vec<u32> = if equal < 2 {
                vec![]
            } else {
                let mut text = tokens.clone();
                (end..end + equal - 1).for_each(|at| text.push(text[at]));
                text[tokens.len()..].to_vec()
            };
            assert_eq!(draft(&tokens, 6), wanted, "{tokens:?}");
        }
    }
}
