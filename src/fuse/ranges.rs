//! A set of byte ranges.

use std::collections::BTreeMap;

/// Disjoint ranges, start to end, that do not touch each other.
#[derive(Debug, Default)]
pub(super) struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// Adds `start..end`, which is not empty, and returns the range that it belongs to now.
    pub fn insert(&mut self, start: u64, end: u64) -> (u64, u64) {
        let (mut start, mut end) = (start, end);
        if let Some((before, until)) = self.0.range(..start).next_back().map(|(s, e)| (*s, *e))
            && until >= start
        {
            start = before;
        }
        while let Some((next, until)) = self.0.range(start..=end).next().map(|(s, e)| (*s, *e)) {
            self.0.remove(&next);
            end = end.max(until);
        }
        self.0.insert(start, end);
        (start, end)
    }

    /// The end of the range that has the byte at `offset`.
    pub fn end_at(&self, offset: u64) -> Option<u64> {
        self.0.range(..=offset).next_back().map(|(_, end)| *end).filter(|end| *end > offset)
    }

    /// Where the first range at or behind `offset` starts.
    pub fn start_from(&self, offset: u64) -> Option<u64> {
        self.0.range(offset..).next().map(|(start, _)| *start)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_set_has_every_byte_that_was_added_and_no_other(list in prop::collection::vec((0u64..200, 1u64..30), 0..40)) {
            let (mut ranges, mut bytes) = (Ranges::default(), vec![false; 240]);
            for (start, len) in list {
                let (from, to) = ranges.insert(start, start + len);
                prop_assert!(from <= start && to >= start + len);
                bytes[start as usize..(start + len) as usize].fill(true);
                prop_assert!(bytes[from as usize..to as usize].iter().all(|b| *b));
                prop_assert!(from == 0 || !bytes[from as usize - 1], "joined with what is before it");
                prop_assert!(!bytes[to as usize], "joined with what is behind it");
            }
            for (at, set) in bytes.iter().enumerate() {
                let end = bytes[at..].iter().position(|b| !b).map(|n| (at + n) as u64);
                prop_assert_eq!(ranges.end_at(at as u64), end.filter(|_| *set));
            }
        }
    }
}
