//! What an archive holds of one disk.

use super::SegmentLen;
use thiserror::Error;

/// One stored segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentRecord {
    /// Position on the disk, in segments.
    pub index: u64,
    /// When the content was last stored: the instant of that backup in microseconds since the epoch.
    pub stored_at: i64,
    /// BLAKE3 of the content.
    pub digest: [u8; 32],
}

/// The stored segments of a disk, ordered by index; what is not listed is a hole.
///
/// 48 bytes a segment: 48 MiB for 1 TiB of data in segments of 1 MiB.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SegmentTable {
    records: Vec<SegmentRecord>,
}

/// Why bytes are no segment table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum TableError {
    /// Not our file.
    #[error("not a segment table of version 1")]
    Magic,
    /// The file's length is not that of a whole number of records.
    #[error("segment table is truncated")]
    Truncated,
    /// Records are out of order or listed twice.
    #[error("segment {0} is out of order")]
    Order(u64),
    /// A record lies behind the disk's end.
    #[error("segment {0} lies behind the end of the disk")]
    Range(u64),
}

const MAGIC: &[u8; 8] = b"pvbseg1\n";
const RECORD: usize = 48;

impl SegmentTable {
    /// An empty table: a disk of zeroes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes of the longest table that a disk of `size` bytes can have.
    pub fn longest(len: SegmentLen, size: u64) -> u64 {
        len.count(size).saturating_mul(RECORD as u64).saturating_add(MAGIC.len() as u64)
    }

    /// Appends a record.
    ///
    /// # Errors
    /// When its index is not above the last one.
    pub fn push(&mut self, record: SegmentRecord) -> Result<(), TableError> {
        if self.records.last().is_some_and(|last| last.index >= record.index) {
            return Err(TableError::Order(record.index));
        }
        self.records.push(record);
        Ok(())
    }

    /// Drops the records that `keep` does not want.
    pub fn retain(&mut self, keep: impl FnMut(&SegmentRecord) -> bool) {
        self.records.retain(keep);
    }

    /// The records in order.
    pub fn records(&self) -> &[SegmentRecord] {
        &self.records
    }

    /// The record of segment `index`, if it is stored.
    pub fn get(&self, index: u64) -> Option<&SegmentRecord> {
        self.records.binary_search_by_key(&index, |r| r.index).ok().map(|at| &self.records[at])
    }

    /// BLAKE3 over index and digest of every record: two tables with equal digest describe equal disks (of equal size and
    /// segment length).
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        for record in &self.records {
            hasher.update(&record.index.to_le_bytes());
            hasher.update(&record.digest);
        }
        *hasher.finalize().as_bytes()
    }

    /// [`SegmentTable::digest`] as manifests have it.
    pub fn digest_hex(&self) -> String {
        blake3::Hash::from_bytes(self.digest()).to_hex().to_string()
    }

    /// Bytes that the stored segments have on a disk of `size` bytes.
    pub fn data_bytes(&self, len: SegmentLen, size: u64) -> u64 {
        self.records.iter().filter_map(|r| len.range(r.index, size)).map(|(_, bytes)| bytes).sum()
    }

    /// As stored in archives: a magic, then records of 48 bytes (index, time, digest; integers little-endian).
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(MAGIC.len() + self.records.len() * RECORD);
        out.extend_from_slice(MAGIC);
        for record in &self.records {
            out.extend_from_slice(&record.index.to_le_bytes());
            out.extend_from_slice(&record.stored_at.to_le_bytes());
            out.extend_from_slice(&record.digest);
        }
        out
    }

    /// Reads what [`SegmentTable::to_bytes`] wrote, for a disk of `size` bytes.
    ///
    /// # Errors
    /// When the bytes are anything else: they come from an archive and are not trusted.
    pub fn from_bytes(bytes: &[u8], len: SegmentLen, size: u64) -> Result<Self, TableError> {
        let body = bytes.strip_prefix(MAGIC).ok_or(TableError::Magic)?;
        let (records, rest) = body.as_chunks::<RECORD>();
        if !rest.is_empty() {
            return Err(TableError::Truncated);
        }
        let count = len.count(size);
        let mut table = Self { records: Vec::with_capacity(records.len()) };
        for record in records {
            let number = |at: usize| {
                let mut word = [0u8; 8];
                word.copy_from_slice(&record[at..at + 8]);
                word
            };
            let mut digest = [0u8; 32];
            digest.copy_from_slice(&record[16..]);
            let index = u64::from_le_bytes(number(0));
            if index >= count {
                return Err(TableError::Range(index));
            }
            table.push(SegmentRecord { index, stored_at: i64::from_le_bytes(number(8)), digest })?;
        }
        Ok(table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(index: u64) -> SegmentRecord {
        SegmentRecord { index, stored_at: -5, digest: [index as u8; 32] }
    }

    proptest! {
        #[test]
        fn a_table_survives_the_archive(indices in prop::collection::btree_set(0u64..1000, 0..60)) {
            let mut table = SegmentTable::new();
            for index in indices {
                table.push(record(index)).expect("ordered");
            }
            let len = SegmentLen::new(64 << 10).expect("valid");
            prop_assert_eq!(SegmentTable::from_bytes(&table.to_bytes(), len, 1000 * (64 << 10)), Ok(table));
        }

        #[test]
        fn hostile_bytes_are_an_error(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let len = SegmentLen::new(64 << 10).expect("valid");
            let mut with_magic = MAGIC.to_vec();
            with_magic.extend_from_slice(&bytes);
            if let Ok(table) = SegmentTable::from_bytes(&with_magic, len, 1 << 30) {
                prop_assert!(table.records().is_sorted_by_key(|r| r.index));
            }
        }
    }

    #[test]
    fn order_and_range_are_checked() {
        let len = SegmentLen::new(64 << 10).expect("valid");
        let mut table = SegmentTable::new();
        table.push(record(3)).expect("first");
        assert_eq!(table.push(record(3)), Err(TableError::Order(3)));
        assert_eq!(SegmentTable::from_bytes(&table.to_bytes(), len, 3 * (64 << 10)), Err(TableError::Range(3)));
        assert_eq!(SegmentTable::from_bytes(b"other", len, 1), Err(TableError::Magic));
        assert_eq!(SegmentTable::from_bytes(&table.to_bytes()[..50], len, 1 << 30), Err(TableError::Truncated));
    }
}
