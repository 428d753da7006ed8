//! Names inside a snapshot.
//!
//! ```text
//! disks/scsi0/00000a/0000000a31     one stored segment; its directory is the index shifted right by 8 bits
//! disks/scsi0.segments              the segment table
//! guest.conf  firewall.conf  manifest.json
//! ```
//!
//! Modification times carry the incremental logic: a segment's is the instant at which it was last stored, which is what
//! rustic (and an unmodified restic) compares with the parent snapshot's before it takes over the old content.

use crate::segment::{SegmentLen, SegmentRecord};
use jiff::Timestamp;
use rustic_core::repofile::{Metadata, Node, NodeType};
use std::ffi::OsStr;

/// Directory of all disks.
pub(super) const DISKS: &str = "disks";
/// The manifest's file name.
pub(super) const MANIFEST: &str = "manifest.json";
/// Tag of every snapshot of ours.
pub(super) const TAG: &str = "pvebackup";
/// Bits of a segment index that count inside one directory.
const SHARD_BITS: u32 = 8;
/// Most segments of a disk: with more, directory names of six digits would no longer sort like numbers. 256 TiB in the
/// smallest segments, 16 PiB in the largest.
pub(super) const MAX_SEGMENTS: u64 = 1 << 32;

/// The directory that segment `index` is in.
pub(super) fn shard(index: u64) -> u64 {
    index >> SHARD_BITS
}

/// Name of a directory of segments.
pub(super) fn shard_name(shard: u64) -> String {
    format!("{shard:06x}")
}

/// Name of a segment's file.
pub(super) fn segment_name(index: u64) -> String {
    format!("{index:010x}")
}

/// Name of a segment table's file.
pub(super) fn table_name(disk: &str) -> String {
    format!("{disk}.segments")
}

/// Whether a text can be one file name that means nothing else.
pub(super) fn is_plain_name(name: &str) -> bool {
    (1..=128).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b'\\' | b'"'))
}

/// A time in microseconds since the epoch, as a node has it.
pub(super) fn time(micros: i64) -> Option<Timestamp> {
    Timestamp::from_microsecond(micros).ok()
}

/// A directory. Its time is constant: a directory whose content is unchanged must stay the same blob.
pub(super) fn directory(name: &str) -> Node {
    let meta = Metadata {
        mode: Some(0o700),
        mtime: Some(Timestamp::UNIX_EPOCH),
        uid: Some(0),
        gid: Some(0),
        ..Metadata::default()
    };
    Node::new_node(OsStr::new(name), NodeType::Dir, meta)
}

/// A file of `size` bytes.
pub(super) fn file(name: &str, size: u64, mtime: Timestamp) -> Node {
    let meta = Metadata {
        mode: Some(0o600),
        mtime: Some(mtime),
        uid: Some(0),
        gid: Some(0),
        size,
        links: 1,
        ..Metadata::default()
    };
    Node::new_node(OsStr::new(name), NodeType::File, meta)
}

/// A disk's shape: size and segment length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) size: u64,
    pub(super) segment_len: SegmentLen,
}

impl Shape {
    /// Bytes of a segment; `None` behind the end of the disk.
    pub(super) fn len(self, index: u64) -> Option<u64> {
        self.segment_len.range(index, self.size).map(|(_, len)| len)
    }
}

/// The records of one directory at a time, with the directory's number.
pub(super) fn by_shard(records: &[SegmentRecord]) -> impl Iterator<Item = (u64, &[SegmentRecord])> {
    records
        .chunk_by(|a, b| shard(a.index) == shard(b.index))
        .filter_map(|chunk| Some((shard(chunk.first()?.index), chunk)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_sort_like_indices() {
        let indices = [0, 1, 255, 256, 4095, 65_535, 1 << 24, MAX_SEGMENTS - 1];
        assert!(indices.map(segment_name).is_sorted());
        assert_eq!(shard_name(shard(0xa31)), "00000a");
        assert!(indices.map(|i| shard_name(shard(i))).is_sorted());
    }

    #[test]
    fn names_that_mean_more_are_refused() {
        for name in ["", ".", "..", "a/b", ".hidden", "a\0", "a\\b", "a b", "ä"] {
            assert!(!is_plain_name(name), "{name:?}");
        }
        assert!(is_plain_name("scsi0") && is_plain_name("efi-disk_0.x"));
    }
}
