//! Two layers of segments, for providers whose cost is one per segment.
//!
//! Those want long segments, and a small write would cost a long one. So *fine segments* of 64 KiB ([`SegmentLen::FINE`]) can lie
//! over a disk's segments: where only a little of a segment changed, the fine segments that changed are stored, and the segment
//! stays as it was. The disk is the content of its segments (zeroes where none is stored), overwritten by that of its fine
//! segments. In the fine layer zeroes are content like any other, and stored.
//!
//! When a segment is stored again, or becomes zero, its fine segments go. That happens when all of it changed, or when it would
//! have too many fine ones: each costs something in every backup from then on.

use super::{Content, SegmentLen, SegmentRecord, SegmentTable, tasks};
use crate::extent::{Extent, Extents, ExtentsError};

/// Fine segments are at most this part of a segment, where all of it can be read.
const LARGEST_PART: u64 = 4;

/// Which of a disk's segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// The segments.
    Segments,
    /// The fine segments that lie over them.
    Fine,
}

impl Layer {
    /// What archives call this layer of a disk. No disk has the name of another's fine layer: [`crate::archive::Manifest`] refuses
    /// it.
    pub fn name(self, disk: &str) -> String {
        match self {
            Self::Segments => disk.to_owned(),
            Self::Fine => format!("{disk}{FINE_SUFFIX}"),
        }
    }

    /// How long its segments are, where the disk's are `segment_len` long.
    pub fn len(self, segment_len: SegmentLen) -> SegmentLen {
        match self {
            Self::Segments => segment_len,
            Self::Fine => SegmentLen::FINE,
        }
    }

    /// The layer with this name, and the disk that it is of.
    pub fn of(name: &str) -> (Self, &str) {
        name.strip_suffix(FINE_SUFFIX).map_or((Self::Segments, name), |disk| (Self::Fine, disk))
    }
}

const FINE_SUFFIX: &str = "+64k";

/// What an archive holds of one disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskTables {
    /// The disk's segments.
    pub segments: SegmentTable,
    /// What lies over them.
    pub fine: SegmentTable,
}

impl From<SegmentTable> for DiskTables {
    /// A disk without fine segments.
    fn from(segments: SegmentTable) -> Self {
        Self { segments, fine: SegmentTable::new() }
    }
}

impl DiskTables {
    /// The first segment at or behind `index` of which anything is stored, in either layer.
    pub fn next_stored(&self, len: SegmentLen, index: u64) -> Option<u64> {
        let next = |table: &SegmentTable, index: u64| {
            let records = table.records();
            records.get(records.partition_point(|record| record.index < index)).map(|record| record.index)
        };
        let fine = next(&self.fine, index.saturating_mul(units(len))).map(|fine| fine / units(len));
        [next(&self.segments, index), fine].into_iter().flatten().min()
    }

    /// All segments of which anything is stored, in order.
    pub fn stored(&self, len: SegmentLen) -> impl Iterator<Item = u64> + Send + '_ {
        let mut from = Some(0u64);
        std::iter::from_fn(move || {
            let index = self.next_stored(len, from?)?;
            from = index.checked_add(1);
            Some(index)
        })
    }

    /// The fine segments of segment `index`.
    pub fn fine_of(&self, len: SegmentLen, index: u64) -> &[SegmentRecord] {
        let records = self.fine.records();
        let at = |index: u64| records.partition_point(|record| record.index / units(len) < index);
        &records[at(index)..at(index.saturating_add(1))]
    }

    /// Bytes of the segments of which anything is stored, on a disk of `size` bytes.
    pub fn data_bytes(&self, len: SegmentLen, size: u64) -> u64 {
        if self.fine.records().is_empty() {
            return self.segments.data_bytes(len, size);
        }
        self.stored(len).filter_map(|index| len.range(index, size)).map(|(_, bytes)| bytes).sum()
    }
}

/// Fine segments in a whole segment.
fn units(len: SegmentLen) -> u64 {
    len.bytes() / SegmentLen::FINE.bytes()
}

/// What a backup does with each layer.
#[derive(Clone, Debug)]
pub struct Division {
    /// What to look at for the segments.
    pub segments: Extents<Content>,
    /// What to read for the fine ones.
    pub fine: Extents<Content>,
    /// The fine segments of the base archive that stay, or are replaced by fine ones.
    pub kept: SegmentTable,
}

/// Divides what changed since a base archive, which has `fine` segments, between the layers. What is clean is read only where
/// `clean_readable`; then no byte of a fine segment that changed may be clean.
///
/// # Errors
/// None that a map of a disk can cause.
pub fn divide(
    content: &Extents<Content>,
    len: SegmentLen,
    fine: &SegmentTable,
    clean_readable: bool,
) -> Result<Division, ExtentsError> {
    let most = units(len) / LARGEST_PART;
    let base = DiskTables { segments: SegmentTable::new(), fine: fine.clone() };
    let mut changes = tasks(content, SegmentLen::FINE).peekable();
    let (mut whole, mut in_parts, mut parts) = (Vec::new(), Ranges::default(), Ranges::default());
    for segment in tasks(content, len) {
        let changed: Vec<_> =
            std::iter::from_fn(|| changes.next_if(|change| change.index / units(len) == segment.index)).collect();
        let replaced = |record: &&SegmentRecord| changed.binary_search_by_key(&record.index, |c| c.index).is_ok();
        let kept = base.fine_of(len, segment.index).iter().filter(|record| !replaced(record)).count();
        let all = SegmentLen::FINE.count(segment.len) == changed.len() as u64;
        if all || (clean_readable && (changed.len() + kept) as u64 > most) {
            whole.push(segment.index);
            continue;
        }
        in_parts.push(segment.offset, segment.len);
        for change in changed {
            parts.push(change.offset, change.len);
        }
    }
    let in_parts = in_parts.over(content.size())?;
    let parts = parts.over(content.size())?;
    let mut kept = base.fine;
    kept.retain(|record| whole.binary_search(&(record.index / units(len))).is_err());
    Ok(Division {
        segments: content.zip(&in_parts, |content, in_parts| if in_parts { Content::Clean } else { content })?,
        fine: parts.map(|part| if part { Content::Data } else { Content::Clean }),
        kept,
    })
}

/// Ordered ranges of a disk.
#[derive(Default)]
struct Ranges(Vec<Extent<bool>>);

impl Ranges {
    fn push(&mut self, offset: u64, len: u64) {
        let behind = self.0.last().map_or(0, Extent::end);
        if offset > behind {
            self.0.push(Extent { offset: behind, len: offset - behind, state: false });
        }
        match self.0.last_mut() {
            Some(last) if last.state && last.end() == offset => last.len += len,
            _ => self.0.push(Extent { offset, len, state: true }),
        }
    }

    /// A map of the disk: whether a byte is in a range.
    fn over(mut self, size: u64) -> Result<Extents<bool>, ExtentsError> {
        let behind = self.0.last().map_or(0, Extent::end);
        if size > behind {
            self.0.push(Extent { offset: behind, len: size - behind, state: false });
        }
        Extents::from_ordered(size, self.0)
    }
}

/// Offset and length of what no task is about, in order; tasks may come in any order.
pub fn untouched(size: u64, tasks: impl Iterator<Item = super::Task>) -> Vec<(u64, u64)> {
    let mut touched: Vec<(u64, u64)> = tasks.map(|task| (task.offset, task.len)).collect();
    touched.sort_unstable();
    touched.push((size, 0));
    let mut done = 0;
    let mut gaps = Vec::new();
    for (offset, len) in touched {
        if offset > done {
            gaps.push((done, offset - done));
        }
        done = done.max(offset + len);
    }
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::Task;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const UNIT: u64 = 64 << 10;

    fn len() -> SegmentLen {
        SegmentLen::new(8 * UNIT).expect("valid")
    }

    fn table(indices: impl Iterator<Item = u64>) -> SegmentTable {
        let mut table = SegmentTable::new();
        for index in indices {
            table.push(SegmentRecord { index, stored_at: 1, digest: [0; 32] }).expect("ordered");
        }
        table
    }

    /// A unit of the disk: what its segment holds, what its fine segment holds, and what it became.
    #[derive(Clone, Debug)]
    struct Unit {
        segment: u8,
        fine: Option<u8>,
        change: (Content, u8),
    }

    fn unit() -> impl Strategy<Value = Unit> {
        let change = prop_oneof![
            6 => Just((Content::Clean, 0)),
            2 => (0u8..4).prop_map(|value| (Content::Data, value)),
            1 => Just((Content::Zero, 0)),
        ];
        // 0 is zeroes, also as what is read, or stored in a fine segment.
        (0u8..4, prop::option::weighted(0.1, 0u8..4), change).prop_map(|(segment, fine, change)| Unit {
            segment,
            fine,
            change,
        })
    }

    proptest! {
        #[test]
        fn both_layers_together_are_the_changed_disk(
            units in prop::collection::vec(unit(), 1..60),
            tail in 0..UNIT,
            clean_readable: bool,
        ) {
            let size = units.len() as u64 * UNIT - tail;
            let range = |unit: u64| SegmentLen::FINE.range(unit, size).expect("inside");
            let content = Extents::from_ordered(size, (0..).zip(&units).map(|(at, unit)| {
                let (offset, len) = range(at);
                Extent { offset, len, state: unit.change.0 }
            })).expect("covers");
            let now: Vec<u8> = units.iter().map(|unit| match unit.change {
                (Content::Clean, _) => unit.fine.unwrap_or(unit.segment),
                (_, value) => value,
            }).collect();
            let old_fine = table((0..).zip(&units).filter(|(_, unit)| unit.fine.is_some()).map(|(at, _)| at));

            let division = divide(&content, len(), &old_fine, clean_readable).expect("a map");

            let mut segments: Vec<u8> = units.iter().map(|unit| unit.segment).collect();
            let whole: Vec<Task> = tasks(&division.segments, len()).collect();
            for task in &whole {
                for at in task.index * 8..((task.index + 1) * 8).min(units.len() as u64) {
                    segments[at as usize] = if task.zero { 0 } else { now[at as usize] };
                    prop_assert!(clean_readable || units[at as usize].change.0 != Content::Clean, "unit {} is read", at);
                }
            }
            let mut fine: BTreeMap<u64, u8> = BTreeMap::new();
            for record in division.kept.records() {
                fine.insert(record.index, units[record.index as usize].fine.expect("from the base"));
            }
            let parts: Vec<Task> = tasks(&division.fine, SegmentLen::FINE).collect();
            for task in &parts {
                prop_assert!(!task.zero, "zeroes are content");
                prop_assert!(units[task.index as usize].change.0 != Content::Clean, "unit {} is read", task.index);
                fine.insert(task.index, now[task.index as usize]);
            }
            for (at, value) in &fine {
                segments[*at as usize] = *value;
            }
            prop_assert_eq!(segments, now);

            if clean_readable {
                for task in tasks(&content, len()) {
                    let count = fine.keys().filter(|at| *at / 8 == task.index).count();
                    prop_assert!(count <= 2, "{} fine segments of segment {}", count, task.index);
                }
            }
            let mut covered = untouched(size, parts.iter().chain(&whole).copied());
            covered.extend(whole.iter().chain(&parts).map(|task| (task.offset, task.len)));
            covered.sort_unstable();
            let end = covered.iter().try_fold(0, |end, (offset, len)| (end == *offset).then_some(offset + len));
            prop_assert_eq!(end, Some(size), "every byte is read by one layer or by none");
        }

        #[test]
        fn a_segment_is_stored_when_either_layer_has_some_of_it(
            segments in prop::collection::btree_set(0u64..20, 0..10),
            fine in prop::collection::btree_set(0u64..160, 0..20),
        ) {
            let tables = DiskTables { segments: table(segments.iter().copied()), fine: table(fine.iter().copied()) };
            let expected: std::collections::BTreeSet<u64> =
                segments.into_iter().chain(fine.iter().map(|index| index / 8)).collect();
            prop_assert_eq!(tables.stored(len()).collect::<Vec<_>>(), expected.iter().copied().collect::<Vec<_>>());
            let size = 160 * UNIT - 512;
            let bytes: u64 = expected.iter().map(|index| len().range(*index, size).expect("inside").1).sum();
            prop_assert_eq!(tables.data_bytes(len(), size), bytes);
            for index in 0..20 {
                let found: Vec<u64> = tables.fine_of(len(), index).iter().map(|record| record.index).collect();
                prop_assert_eq!(found, fine.iter().copied().filter(|fine| fine / 8 == index).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn segments_as_short_as_fine_ones_have_none() {
        let content = Extents::from_ordered(
            4 * UNIT,
            [(0, Content::Clean), (UNIT, Content::Data), (2 * UNIT, Content::Clean), (3 * UNIT, Content::Zero)]
                .map(|(offset, state)| Extent { offset, len: UNIT, state }),
        )
        .expect("covers");
        let division = divide(&content, SegmentLen::FINE, &SegmentTable::new(), true).expect("a map");
        assert_eq!(division.segments, content);
        assert_eq!(division.fine, Extents::uniform(4 * UNIT, Content::Clean));
    }
}
