//! Images cut into segments, to be read in any order: what a snapshot access looks like to a program that wants the pieces which
//! changed.
//!
//! ```text
//! scsi0/00000a/000000a031     a segment; its directory is the index shifted right by 12 bits
//! ```
//!
//! Names and inode numbers are those of the [segment view](super). A segment of zeroes has no file. One that changed has the time of
//! the access, one that did not the epoch. Mount it read-only: it has no answer to what would change something.

use super::{Node, SHARD_BITS, segment_name, shard_name};
use crate::{
    extent::{Extent, Extents, ExtentsError},
    fuse::{
        answer::{ReadAnswer, Reply, Shared},
        image::{Caching, Image, ViewOptions},
        session::{LARGEST_REQUEST, configure, directory_attributes, file_attributes},
    },
    segment::{Content, SegmentLen},
};
use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, KernelConfig, LockOwner,
    OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEntry, ReplyOpen, ReplyStatfs, Request,
};
use std::{
    ffi::OsStr,
    io,
    sync::Arc,
    time::{Duration, Instant, UNIX_EPOCH},
};

const TTL: Duration = Duration::from_hours(1);
const BLOCK: u32 = 4096;

/// What a segment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Only zeroes: there is no file.
    Hole,
    /// Nothing in it changed.
    Old,
    /// Something in it changed, or nobody knows what changed.
    New,
}

/// An image, cut.
pub struct CutImage {
    image: Arc<dyn Image>,
    segment_len: SegmentLen,
    /// By index.
    kinds: Extents<Kind>,
}

impl CutImage {
    /// Cuts `image` into segments of `segment_len`. `shown` is what the image shows, `changed` tells besides what is clean.
    ///
    /// # Errors
    /// When the two are not of the same disk.
    pub fn new(
        image: Arc<dyn Image>,
        segment_len: SegmentLen,
        shown: &Extents<Content>,
        changed: &Extents<Content>,
    ) -> Result<Self, ExtentsError> {
        let both = shown.zip(changed, |shown, changed| (shown == Content::Zero, changed == Content::Clean))?;
        Ok(Self { image, segment_len, kinds: kinds(&both, segment_len) })
    }

    /// Segments that have a file, and how many of them changed.
    pub fn counts(&self) -> (u64, u64) {
        (self.kinds.bytes_where(|kind| kind != Kind::Hole), self.kinds.bytes_where(|kind| kind == Kind::New))
    }

    /// The runs of segments with a file from `index` on.
    fn files(&self, index: u64) -> impl Iterator<Item = (u64, u64)> {
        let runs = self.kinds.iter().as_slice();
        let runs = &runs[runs.partition_point(|run| run.end() <= index)..];
        runs.iter().filter(|run| run.state != Kind::Hole).map(move |run| (run.offset.max(index), run.end()))
    }

    fn kind(&self, index: u64) -> Kind {
        let runs = self.kinds.iter().as_slice();
        runs.get(runs.partition_point(|run| run.end() <= index)).map_or(Kind::Hole, |run| run.state)
    }

    /// The first directory at or behind `shard`.
    fn next_shard(&self, shard: u64) -> Option<u64> {
        self.files(shard.checked_shl(SHARD_BITS)?).next().map(|(index, _)| index >> SHARD_BITS)
    }

    fn range(&self, index: u64) -> Option<(u64, u64)> {
        self.segment_len.range(index, self.image.size())
    }
}

/// What the segments are, by index, from what is (zero, clean) on the disk.
fn kinds(map: &Extents<(bool, bool)>, len: SegmentLen) -> Extents<Kind> {
    let (size, bytes, count) = (map.size(), len.bytes(), len.count(map.size()));
    let kind = |zero, clean| match (zero, clean) {
        (true, _) => Kind::Hole,
        (false, true) => Kind::Old,
        (false, false) => Kind::New,
    };
    let mut runs: Vec<Extent<Kind>> = Vec::new();
    let mut push = |from: u64, to: u64, state| match runs.last_mut() {
        Some(last) if last.state == state => last.len += to - from,
        _ => runs.push(Extent { offset: from, len: to - from, state }),
    };
    // Of the segment whose beginning was passed and whose end was not.
    let mut partial = (true, true);
    for extent in map {
        let (zero, clean) = extent.state;
        let mut at = extent.offset;
        while at < extent.end() {
            let index = at / bytes;
            let segment_end = size.min((index + 1).saturating_mul(bytes));
            if at == index * bytes && extent.end() >= segment_end {
                let behind = if extent.end() == size { count } else { extent.end() / bytes };
                push(index, behind, kind(zero, clean));
                at = size.min(behind.saturating_mul(bytes));
            } else {
                partial = (partial.0 && zero, partial.1 && clean);
                at = extent.end().min(segment_end);
                if at == segment_end {
                    push(index, index + 1, kind(partial.0, partial.1));
                    partial = (true, true);
                }
            }
        }
    }
    Extents::from_ordered(count, runs).unwrap_or_else(|_| Extents::uniform(count, Kind::New))
}

/// A directory of cut images.
pub struct CutView {
    disks: Vec<CutImage>,
    shared: Arc<Shared>,
}

impl CutView {
    /// Shows `disks`, whose names differ; at most [`super::MAX_DISKS`], each with at most [`super::MAX_SEGMENTS`]. Requests are
    /// answered by tasks of the tokio runtime in which this is called.
    pub fn new(disks: Vec<CutImage>, options: ViewOptions) -> Self {
        Self { disks, shared: Arc::new(Shared::new(options)) }
    }

    fn attributes(&self, node: Node) -> Option<FileAttr> {
        let ino = INodeNo(node.inode());
        let directory = || directory_attributes(ino, UNIX_EPOCH);
        match node {
            Node::Root => Some(directory()),
            Node::Disk(at) => self.disks.get(at).map(|_| directory()),
            Node::Shard(at, shard) => {
                self.disks.get(at).filter(|disk| disk.next_shard(shard) == Some(shard)).map(|_| directory())
            }
            Node::Segment(at, index) => {
                let disk = self.disks.get(at)?;
                let (_, len) = disk.range(index)?;
                let time = match disk.kind(index) {
                    Kind::Hole => return None,
                    Kind::Old => UNIX_EPOCH,
                    Kind::New => self.shared.options.time,
                };
                Some(FileAttr { perm: 0o400, ..file_attributes(ino, len, time) })
            }
            _ => None,
        }
    }

    fn find(&self, parent: Node, name: &str) -> Option<Node> {
        let hex = |digits: usize| (name.len() == digits).then(|| u64::from_str_radix(name, 16).ok()).flatten();
        match parent {
            Node::Root => self.disks.iter().position(|disk| disk.image.name() == name).map(Node::Disk),
            Node::Disk(at) => hex(6).map(|shard| Node::Shard(at, shard)),
            Node::Shard(at, shard) => {
                hex(10).filter(|index| index >> SHARD_BITS == shard).map(|index| Node::Segment(at, index))
            }
            _ => None,
        }
    }
}

impl Filesystem for CutView {
    fn init(&mut self, _: &Request, kernel: &mut KernelConfig) -> io::Result<()> {
        configure(kernel, LARGEST_REQUEST);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = name.to_str().and_then(|name| self.find(Node::of(parent), name));
        match found.and_then(|node| self.attributes(node)) {
            Some(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(Node::of(ino)) {
            Some(attributes) => reply.attr(&TTL, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    /// Opening is cheap and always allowed: programs open a file before they ask whether they have seen it.
    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let Node::Segment(at, _) = Node::of(ino) else { return reply.error(Errno::EISDIR) };
        let Some(disk) = self.disks.get(at) else { return reply.error(Errno::ENOENT) };
        let flags = match disk.image.caching() {
            Caching::Cached => FopenFlags::FOPEN_KEEP_CACHE,
            Caching::Direct => FopenFlags::FOPEN_DIRECT_IO,
        };
        reply.opened(FileHandle(0), flags | FopenFlags::FOPEN_NOFLUSH);
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Node::Segment(at, index) = Node::of(ino) else { return reply.error(Errno::EISDIR) };
        let Some((disk, (start, len))) = self.disks.get(at).and_then(|disk| Some((disk, disk.range(index)?))) else {
            return reply.error(Errno::ENOENT);
        };
        let wanted = len.saturating_sub(offset).min(size.into());
        if wanted == 0 {
            return reply.data(&[]);
        }
        let (offset, len) = (start + offset, wanted as usize);
        let (shared, image) = (self.shared.clone(), disk.image.clone());
        let (reply, begun) = (Reply::Fuser(reply), Instant::now());
        ReadAnswer { shared, image, offset, len, reply, begun, turn: None }.by_task();
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let node = Node::of(ino);
        // An entry's offset is where the next one begins. The first two are the directory itself and its parent.
        let mut add = |next: u64, node: Node, name: &str| {
            let kind = if matches!(node, Node::Segment(..)) { FileType::RegularFile } else { FileType::Directory };
            reply.add(INodeNo(node.inode()), next, kind, name)
        };
        for (at, dot) in [".", ".."].into_iter().enumerate().skip(usize::try_from(offset).unwrap_or(usize::MAX)) {
            if add(at as u64 + 1, node, dot) {
                return reply.ok();
            }
        }
        let from = offset.saturating_sub(2);
        match node {
            Node::Root => {
                let from = usize::try_from(from).unwrap_or(usize::MAX);
                for (at, disk) in self.disks.iter().enumerate().skip(from) {
                    if add(at as u64 + 3, Node::Disk(at), disk.image.name()) {
                        break;
                    }
                }
            }
            Node::Disk(at) => {
                let Some(disk) = self.disks.get(at) else { return reply.error(Errno::ENOENT) };
                let mut from = from;
                while let Some(shard) = disk.next_shard(from) {
                    from = shard + 1;
                    if add(from + 2, Node::Shard(at, shard), &shard_name(shard)) {
                        break;
                    }
                }
            }
            Node::Shard(at, shard) => {
                let Some(disk) = self.disks.get(at) else { return reply.error(Errno::ENOENT) };
                // An entry's offset is its place in the directory, whether or not there are files before it.
                let (first, behind) = (shard << SHARD_BITS, (shard + 1) << SHARD_BITS);
                let indices = disk.files(first.saturating_add(from)).flat_map(|(start, end)| start..end.min(behind));
                for index in indices.take_while(|index| *index < behind) {
                    if add(index - first + 3, Node::Segment(at, index), &segment_name(index)) {
                        break;
                    }
                }
            }
            _ => return reply.error(Errno::ENOTDIR),
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let size = self.disks.iter().map(|disk| disk.image.size()).fold(0, u64::saturating_add);
        let files = self.disks.iter().map(|disk| disk.counts().0).fold(0, u64::saturating_add);
        reply.statfs(size.div_ceil(BLOCK.into()), 0, 0, files, 0, BLOCK, 255, BLOCK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_segment_is_what_its_bytes_are(list in prop::collection::vec((1u64..200_000, any::<bool>(), any::<bool>()), 0..30)) {
            let mut offset = 0;
            let extents: Vec<_> = list
                .iter()
                .map(|(len, zero, clean)| {
                    offset += len;
                    Extent { offset: offset - len, len: *len, state: (*zero, *clean) }
                })
                .collect();
            let map = Extents::from_ordered(offset, extents).unwrap();
            let len = SegmentLen::new(65536).unwrap();
            let kinds = kinds(&map, len);
            prop_assert_eq!(kinds.size(), len.count(offset));
            let mut seen = 0;
            for run in &kinds {
                for index in run.offset..run.end() {
                    seen += 1;
                    let (start, bytes) = len.range(index, offset).unwrap();
                    let touched = || map.iter().filter(|e| e.offset < start + bytes && e.end() > start);
                    let expected = if touched().all(|e| e.state.0) {
                        Kind::Hole
                    } else if touched().all(|e| e.state.1) {
                        Kind::Old
                    } else {
                        Kind::New
                    };
                    prop_assert_eq!(run.state, expected, "segment {}", index);
                }
            }
            prop_assert_eq!(seen, len.count(offset));
        }
    }
}
