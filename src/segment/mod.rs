//! Segments: the fixed, aligned pieces of a disk that providers store.
//!
//! Segment `i` of a disk is the bytes `i * len .. min((i + 1) * len, size)`. A segment that holds only zeroes is a hole
//! and never stored. What an archive holds of a disk is described by its [`SegmentTable`]: one [`SegmentRecord`] for
//! every stored segment, ordered by index. A provider can have a second, finer layer of them ([`layers`]).

pub mod layers;
mod merge;
mod table;

pub use layers::DiskTables;
pub use merge::{DiskItem, merge};
pub use table::{SegmentRecord, SegmentTable, TableError};

use crate::extent::Extents;

/// Length of a disk's segments in bytes: a power of two from 64 KiB to 4 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SegmentLen(u32);

impl SegmentLen {
    /// Smallest length. QEMU's copy-before-write filter works in clusters of 64 KiB, so less would only cost.
    pub const MIN: u64 = 64 << 10;
    /// Largest length: one blob of the repositories that we create, and Proxmox's bitmap granularity.
    pub const MAX: u64 = 4 << 20;

    /// Length of fine segments, see [`layers`].
    pub const FINE: Self = Self(Self::MIN as u32);
    /// 2 MiB.
    pub const TWO_MIB: Self = Self(2 << 20);

    /// Checks a length in bytes.
    pub fn new(bytes: u64) -> Option<Self> {
        (bytes.is_power_of_two() && (Self::MIN..=Self::MAX).contains(&bytes)).then_some(Self(bytes as u32))
    }

    /// The length for a disk when nothing is configured: small enough that scattered writes stay cheap, large enough
    /// that a disk has at most some million segments.
    pub fn for_disk(size: u64) -> Self {
        match size {
            0..=0x10_0000_0000 => Self(256 << 10),             // up to 64 GiB
            0x10_0000_0001..=0x100_0000_0000 => Self(1 << 20), // up to 1 TiB
            _ => Self(4 << 20),
        }
    }

    /// Bytes.
    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    /// Number of segments of a disk of `size` bytes.
    pub fn count(self, size: u64) -> u64 {
        size.div_ceil(self.bytes())
    }

    /// Offset and length of segment `index` of a disk of `size` bytes; `None` behind the end.
    pub fn range(self, index: u64, size: u64) -> Option<(u64, u64)> {
        let offset = index.checked_mul(self.bytes()).filter(|o| *o < size)?;
        Some((offset, self.bytes().min(size - offset)))
    }
}

/// How long segments are on disks where no archive has settled that.
#[derive(Clone, Copy, Debug)]
pub struct SegmentLens {
    configured: Option<SegmentLen>,
    least: SegmentLen,
}

impl SegmentLens {
    /// As configured, else by the disk's size.
    pub fn new(configured: Option<SegmentLen>) -> Self {
        Self { configured, least: SegmentLen::FINE }
    }

    /// The same for a target that shorter ones than `least` do not suit, unless they are configured.
    #[must_use]
    pub fn at_least(self, least: SegmentLen) -> Self {
        Self { least, ..self }
    }

    /// For a disk of `size` bytes.
    pub fn of(self, size: u64) -> SegmentLen {
        self.configured.unwrap_or_else(|| SegmentLen::for_disk(size).max(self.least))
    }
}

/// One segment as the copy engine read it, ready to be stored.
#[derive(Debug)]
pub struct Segment {
    /// Position on the disk, in segments.
    pub index: u64,
    /// Content; `None` when every byte is zero.
    pub data: Option<SegmentData>,
}

/// The bytes of a segment. Dropping it gives its memory back to the copy engine's budget; calling
/// [`SegmentData::stored`] tells the engine besides that the provider needs the source no longer.
pub struct SegmentData {
    bytes: bytes::Bytes,
    release: Option<Box<dyn FnOnce(bool) + Send>>,
}

impl SegmentData {
    /// Wraps `bytes`. `release` runs once: with `true` when the segment was stored, with `false`
    /// when it was dropped before.
    pub fn new(bytes: bytes::Bytes, release: impl FnOnce(bool) + Send + 'static) -> Self {
        Self { bytes, release: Some(Box::new(release)) }
    }

    /// The content.
    pub fn bytes(&self) -> &bytes::Bytes {
        &self.bytes
    }

    /// BLAKE3 of the content, computed by every call.
    pub fn digest(&self) -> [u8; 32] {
        *blake3::hash(&self.bytes).as_bytes()
    }

    /// The provider has taken the content and will never ask for it again: the source range may be discarded.
    pub fn stored(mut self) {
        if let Some(release) = self.release.take() {
            release(true);
        }
    }
}

impl Drop for SegmentData {
    fn drop(&mut self) {
        if let Some(release) = self.release.take() {
            release(false);
        }
    }
}

impl std::fmt::Debug for SegmentData {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SegmentData({} bytes)", self.bytes.len())
    }
}

/// What has to be done with a piece of a segment's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Unchanged since the base archive.
    Clean,
    /// Changed, and known to read as zeroes.
    Zero,
    /// Changed: has to be read.
    Data,
}

/// One segment that a backup has to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Task {
    /// Position on the disk, in segments.
    pub index: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Whether all of it is known to be zero, so that nothing has to be read.
    pub zero: bool,
}

/// The segments that changed, in order: those with any byte that is not [`Content::Clean`].
///
/// A segment is `zero` only when every byte of it is [`Content::Zero`]. A segment that is partly clean is read as a
/// whole; whoever asks QEMU for a bitmap keeps its granularity at or above the segment length, so that this happens only
/// where the clean part can be read.
pub fn tasks(map: &Extents<Content>, len: SegmentLen) -> impl Iterator<Item = Task> + '_ {
    let size = map.size();
    let mut next = 0u64; // first segment that was not yet judged
    let mut extents = map.iter().peekable();
    std::iter::from_fn(move || {
        loop {
            let extent = **extents.peek()?;
            if extent.state == Content::Clean || extent.end() <= next.saturating_mul(len.bytes()) {
                extents.next();
                continue;
            }
            let index = next.max(extent.offset / len.bytes());
            let (offset, bytes) = len.range(index, size)?;
            next = index + 1;
            let mut zero = true;
            // Extents inside this segment; the one that crosses its end stays for the next.
            while let Some(e) = extents.peek() {
                if e.offset >= offset + bytes {
                    break;
                }
                if e.end() > offset {
                    zero &= e.state == Content::Zero;
                }
                if e.end() > offset + bytes {
                    break;
                }
                extents.next();
            }
            // Clean bytes in front of the first changed extent were passed over above.
            zero &= extent.offset <= offset;
            return Some(Task { index, offset, len: bytes, zero });
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::Extent;
    use proptest::prelude::*;

    #[test]
    fn a_targets_least_length_counts_where_none_is_configured() {
        let least = SegmentLens::new(None).at_least(SegmentLen::TWO_MIB);
        let found =
            [1 << 30, 1 << 40, 2 << 40].map(|size| (SegmentLens::new(None).of(size).bytes(), least.of(size).bytes()));
        assert_eq!(found, [(256 << 10, 2 << 20), (1 << 20, 2 << 20), (4 << 20, 4 << 20)]);
        let configured = SegmentLens::new(SegmentLen::new(64 << 10)).at_least(SegmentLen::TWO_MIB);
        assert_eq!(configured.of(1 << 40).bytes(), 64 << 10);
    }

    #[test]
    fn lengths_are_powers_of_two_between_the_bounds() {
        assert!(SegmentLen::new(64 << 10).is_some());
        assert!(SegmentLen::new(4 << 20).is_some());
        assert!(SegmentLen::new(32 << 10).is_none());
        assert!(SegmentLen::new(8 << 20).is_none());
        assert!(SegmentLen::new(3 << 20).is_none());
        assert_eq!(SegmentLen::for_disk(64 << 30).bytes(), 256 << 10);
        assert_eq!(SegmentLen::for_disk((64 << 30) + 1).bytes(), 1 << 20);
        assert_eq!(SegmentLen::for_disk(10 << 40).bytes(), 4 << 20);
    }

    #[test]
    fn the_last_segment_ends_with_the_disk() {
        let len = SegmentLen::new(64 << 10).expect("valid");
        assert_eq!(len.range(1, (64 << 10) + 512), Some((64 << 10, 512)));
        assert_eq!(len.range(2, (64 << 10) + 512), None);
        assert_eq!(len.range(u64::MAX, u64::MAX), None);
        assert_eq!(len.count((64 << 10) + 512), 2);
    }

    fn content() -> impl Strategy<Value = Content> {
        prop_oneof![Just(Content::Clean), Just(Content::Zero), Just(Content::Data)]
    }

    proptest! {
        #[test]
        fn tasks_agree_with_a_look_at_every_sector(
            list in prop::collection::vec((1u64..400, content()), 1..60),
            tail in 1u64..128,
        ) {
            // In sectors of 512 bytes; segments of 128 sectors.
            let len = SegmentLen::new(64 << 10).expect("valid");
            let mut sectors: Vec<Content> = list.iter().flat_map(|(n, c)| std::iter::repeat_n(*c, *n as usize)).collect();
            sectors.extend(std::iter::repeat_n(Content::Clean, tail as usize));
            let size = sectors.len() as u64 * 512;
            let map = Extents::from_ordered(
                size,
                sectors.iter().enumerate().map(|(i, c)| Extent { offset: i as u64 * 512, len: 512, state: *c }),
            ).expect("covers");
            let expected: Vec<Task> = sectors
                .chunks(128)
                .enumerate()
                .filter(|(_, chunk)| chunk.iter().any(|c| *c != Content::Clean))
                .map(|(i, chunk)| Task {
                    index: i as u64,
                    offset: i as u64 * (64 << 10),
                    len: chunk.len() as u64 * 512,
                    zero: chunk.iter().all(|c| *c == Content::Zero),
                })
                .collect();
            let found: Vec<Task> = tasks(&map, len).collect();
            prop_assert_eq!(found, expected);
        }
    }
}
