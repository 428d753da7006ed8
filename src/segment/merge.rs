//! Base archive and changed segments, joined into the complete disk.

use super::{Segment, SegmentData, SegmentRecord, SegmentTable};
use std::borrow::Borrow;

/// One segment of the new archive. Holes are left out.
#[derive(Debug)]
pub enum DiskItem {
    /// As in the base archive; must not be read.
    Unchanged(SegmentRecord),
    /// New content.
    Changed(SegmentRecord, SegmentData),
}

impl DiskItem {
    /// Position on the disk, in segments.
    pub fn record(&self) -> &SegmentRecord {
        match self {
            Self::Unchanged(record) | Self::Changed(record, _) => record,
        }
    }
}

/// Joins the base archive's table with the changed segments (ordered by index): the items of the new archive in order.
///
/// A changed segment replaces the base's; a changed segment of zeroes removes it. `stored_at` (microseconds since the
/// epoch) becomes the time of every changed segment. An error of `changed` is handed through, and ends the iteration.
///
/// The table may be borrowed or owned (an `Arc`), as the caller's iterator needs it.
pub fn merge<E>(
    base: Option<impl Borrow<SegmentTable>>,
    changed: impl Iterator<Item = Result<Segment, E>>,
    stored_at: i64,
) -> impl Iterator<Item = Result<DiskItem, E>> {
    let mut at = 0;
    let mut old = std::iter::from_fn(move || {
        let record = base.as_ref()?.borrow().records().get(at).copied();
        at += 1;
        record
    })
    .peekable();
    let mut changed = changed.peekable();
    let mut failed = false;
    std::iter::from_fn(move || {
        loop {
            if failed {
                return None;
            }
            let next = match changed.peek() {
                None => return old.next().map(|record| Ok(DiskItem::Unchanged(record))),
                Some(Err(_)) => {
                    failed = true;
                    return changed.next()?.err().map(Err);
                }
                Some(Ok(segment)) => segment.index,
            };
            match old.peek() {
                Some(record) if record.index < next => return old.next().map(|record| Ok(DiskItem::Unchanged(record))),
                Some(record) if record.index == next => {
                    old.next();
                }
                _ => {}
            }
            if let Some(Ok(Segment { index, data: Some(data) })) = changed.next() {
                let record = SegmentRecord { index, stored_at, digest: data.digest() };
                return Some(Ok(DiskItem::Changed(record, data)));
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn digest(byte: u8) -> [u8; 32] {
        *blake3::hash(&[byte]).as_bytes()
    }

    proptest! {
        #[test]
        fn the_merge_is_the_base_overwritten(
            base in prop::collection::btree_map(0u64..50, 0u8..5, 0..30),
            changes in prop::collection::btree_map(0u64..50, prop::option::of(0u8..5), 0..30),
        ) {
            let mut table = SegmentTable::new();
            for (index, byte) in &base {
                table.push(SegmentRecord { index: *index, stored_at: 1, digest: digest(*byte) }).expect("ordered");
            }
            let mut expected: BTreeMap<u64, (i64, [u8; 32])> = base.iter().map(|(i, b)| (*i, (1, digest(*b)))).collect();
            for (index, change) in &changes {
                match change {
                    Some(byte) => { expected.insert(*index, (2, digest(*byte))); }
                    None => { expected.remove(index); }
                }
            }
            let segments = changes.iter().map(|(index, change)| Ok::<_, ()>(Segment {
                index: *index,
                data: change.map(|b| SegmentData::new(vec![b].into(), |_| {})),
            }));
            let found: BTreeMap<u64, (i64, [u8; 32])> = merge(Some(&table), segments, 2)
                .map(|item| { let r = *item.expect("no error").record(); (r.index, (r.stored_at, r.digest)) })
                .collect();
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn an_error_ends_the_disk() {
        let mut table = SegmentTable::new();
        table.push(SegmentRecord { index: 9, stored_at: 1, digest: [0; 32] }).expect("first");
        let mut items = merge(Some(&table), [Err("lost")].into_iter(), 2);
        assert_eq!(items.next().map(|r| r.map(|_| ())), Some(Err("lost")));
        assert!(items.next().is_none(), "nothing may follow an error");
    }
}
