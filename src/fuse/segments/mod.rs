//! The segment view: the disks of one backup as a tree of files, for a program that reads files and remembers which of them it
//! has seen.
//!
//! ```text
//! guest.conf  firewall.conf
//! disks/scsi0/00000a/000000a031     one stored segment; its directory is the index shifted right by 12 bits
//! disks/scsi0.segments              the segment table
//! disks/scsi0+64k/…                 fine segments, if there are any, and their table
//! manifest.json
//! ```
//!
//! Sizes and times of all segments are known at once: from the base's table and from what the copy engine is going to read.
//! The content of changed segments comes from the engine, in order, when a reader asks for it; only the last one is kept, for a
//! kernel that has dropped its pages before the reader had them. So there can be one reader only, and it has to read the changed segments in order, each once: inode numbers grow in that order, and so do
//! names, whichever a program sorts by. Segments that did not change have no content here: reading one is a failure, and ends
//! the backup. The tables and the manifest exist when everything before them was read; looking the manifest up waits for it.

pub mod images;
mod serve;

use super::session::{directory_attributes, file_attributes};
use crate::{
    provider::{MakeManifest, SourceError},
    segment::{DiskTables, Segment, SegmentData, SegmentLen, SegmentRecord, SegmentTable, layers::Layer},
};
use bytes::Bytes;
use fuser::{Errno, FileAttr, FileType, INodeNo};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use thiserror::Error;

/// Name of the manifest's file.
pub const MANIFEST: &str = "manifest.json";
/// Name of the directory of all disks.
pub const DISKS: &str = "disks";
/// Bits of a segment's index that count inside one directory.
pub const SHARD_BITS: u32 = 12;
/// Most segments of a disk: with more, directory names of six digits would no longer sort like numbers.
pub const MAX_SEGMENTS: u64 = 1 << 32;
/// Most disks, each with its layers.
pub const MAX_DISKS: usize = 256;
/// Nothing changes while it is mounted.
const TTL: Duration = Duration::from_hours(24);
/// The manifest's time is so much later than that of the changed segments. borg keeps nothing in its files cache that is as
/// new as the newest file of a run, since that could still change unnoticed.
const NEWER: Duration = Duration::from_secs(1);

/// Path of a segment's file, relative to the tree; `disk` as [`Layer::name`] has it.
pub fn segment_path(disk: &str, index: u64) -> String {
    format!("{DISKS}/{disk}/{}/{}", shard_name(index >> SHARD_BITS), segment_name(index))
}

/// Path of a segment table's file, relative to the tree.
pub fn table_path(disk: &str) -> String {
    format!("{DISKS}/{disk}.segments")
}

fn shard_name(shard: u64) -> String {
    format!("{shard:06x}")
}

/// Name of a segment's file.
pub fn segment_name(index: u64) -> String {
    format!("{index:010x}")
}

/// Why a view is not complete.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ViewFailure {
    /// The disk could not be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// What the copy engine delivers is not what was announced.
    #[error("disk `{disk}`: {what}")]
    Contract {
        /// The disk.
        disk: String,
        /// What is wrong.
        what: String,
    },
    /// The reader wants what is in the base archive.
    #[error("segment {index} of disk `{disk}` was to be read, although it did not change")]
    Unchanged {
        /// The disk.
        disk: String,
        /// The segment.
        index: u64,
    },
    /// The reader has left something out, or reads in another order.
    #[error("`{path}` was not read when its turn came")]
    NotRead {
        /// The file.
        path: String,
    },
}

/// One layer of a disk of a view.
pub struct DiskPlan {
    /// Which. The fine one stands behind the other.
    pub layer: Layer,
    /// Name as shown, [`Layer::name`]; a plain file name.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// Segment length.
    pub segment_len: SegmentLen,
    /// All segments of the new archive, ordered by index. Those with the time of the view are the changed ones; their digests
    /// come with their content.
    pub records: Vec<SegmentRecord>,
    /// The changed segments in order; others that it delivers must be zero, and are passed over.
    pub changed: Box<dyn Iterator<Item = Result<Segment, SourceError>> + Send>,
}

/// What the reader of a complete view has seen.
pub struct Seen {
    /// All files.
    pub files: u64,
    /// Changed segments among them.
    pub segments: u64,
    /// The segment tables.
    pub tables: Vec<SeenTable>,
}

/// The segment table of a layer of a disk.
pub struct SeenTable {
    /// Which.
    pub layer: Layer,
    /// The disk.
    pub disk: String,
    /// Its size in bytes.
    pub size: u64,
    /// Its segment length.
    pub segment_len: SegmentLen,
    /// The file's content.
    pub bytes: Bytes,
}

/// The tree. Cloned handles show the same one.
#[derive(Clone)]
pub struct SegmentView(Arc<Inner>);

struct Inner {
    /// Time of changed segments, µs since the epoch.
    instant: i64,
    failure: OnceLock<ViewFailure>,
    state: Mutex<State>,
}

struct State {
    members: Vec<(String, Bytes)>,
    disks: Vec<Disk>,
    make_manifest: Option<MakeManifest>,
    manifest: Bytes,
    current: Option<Current>,
    /// Bytes read of members, tables and manifest, by inode number.
    read: HashMap<u64, u64>,
    segments_read: u64,
}

struct Disk {
    plan: DiskPlan,
    /// The first record that may be a changed segment that was not delivered yet.
    next: usize,
    table: Option<Bytes>,
}

/// The changed segment that is being read.
struct Current {
    disk: usize,
    at: usize,
    bytes: Bytes,
    served: u64,
    /// Until it is settled.
    data: Option<SegmentData>,
    settled: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Node {
    Root,
    Member(usize),
    Disks,
    Disk(usize),
    Shard(usize, u64),
    Segment(usize, u64),
    Table(usize),
    Manifest,
}

const FIRST_MEMBER: u64 = 2;
const DISKS_INODE: u64 = 1 << 8;
const MANIFEST_INODE: u64 = 1 << 62;
/// Inode numbers of a disk begin at a multiple of this.
const DISK_BITS: u32 = 40;
const FIRST_SHARD: u64 = 1 << 33;
const FIRST_SEGMENT: u64 = 1 << 34;
const TABLE: u64 = 1 << 39;

impl Node {
    fn kind(self) -> FileType {
        match self {
            Self::Root | Self::Disks | Self::Disk(_) | Self::Shard(..) => FileType::Directory,
            Self::Member(_) | Self::Segment(..) | Self::Table(_) | Self::Manifest => FileType::RegularFile,
        }
    }

    fn inode(self) -> u64 {
        let disk = |disk: usize| (disk as u64 + 1) << DISK_BITS;
        match self {
            Self::Root => INodeNo::ROOT.0,
            Self::Member(at) => FIRST_MEMBER + at as u64,
            Self::Disks => DISKS_INODE,
            Self::Disk(at) => disk(at),
            Self::Shard(at, shard) => disk(at) + FIRST_SHARD + shard,
            Self::Segment(at, index) => disk(at) + FIRST_SEGMENT + index,
            Self::Table(at) => disk(at) + TABLE,
            Self::Manifest => MANIFEST_INODE,
        }
    }

    fn of(inode: INodeNo) -> Self {
        let inode = inode.0;
        let (disk, below) = (inode >> DISK_BITS, inode & ((1 << DISK_BITS) - 1));
        match (disk, inode) {
            (0, DISKS_INODE) => Self::Disks,
            (0, FIRST_MEMBER..DISKS_INODE) => Self::Member((inode - FIRST_MEMBER) as usize),
            (0, _) => Self::Root,
            (_, MANIFEST_INODE) => Self::Manifest,
            _ => {
                let at = disk as usize - 1;
                match below {
                    0 => Self::Disk(at),
                    TABLE.. => Self::Table(at),
                    FIRST_SEGMENT.. => Self::Segment(at, below - FIRST_SEGMENT),
                    _ => Self::Shard(at, below.saturating_sub(FIRST_SHARD)),
                }
            }
        }
    }
}

impl SegmentView {
    /// A view. `instant` is the time of changed segments, in µs since the epoch; later than that of any other.
    pub fn new(
        members: Vec<(String, Vec<u8>)>,
        disks: Vec<DiskPlan>,
        make_manifest: MakeManifest,
        instant: i64,
    ) -> Self {
        let state = State {
            members: members.into_iter().map(|(name, bytes)| (name, bytes.into())).collect(),
            disks: disks.into_iter().map(|plan| Disk { plan, next: 0, table: None }).collect(),
            make_manifest: Some(make_manifest),
            manifest: Bytes::new(),
            current: None,
            read: HashMap::new(),
            segments_read: 0,
        };
        Self(Arc::new(Inner { instant, failure: OnceLock::new(), state: Mutex::new(state) }))
    }

    /// The first failure, as soon as there is one.
    pub fn failure(&self) -> Option<&ViewFailure> {
        self.0.failure.get()
    }

    /// After the reader has come to its end: what it has seen.
    ///
    /// # Errors
    /// When anything failed, or anything that had to be read was not.
    pub fn finish(&self) -> Result<Seen, ViewFailure> {
        if let Some(failure) = self.failure() {
            return Err(failure.clone());
        }
        let state = self.lock();
        let mut files = 0;
        let mut always: Vec<(Node, String, u64)> = Vec::new();
        for (at, (name, bytes)) in state.members.iter().enumerate() {
            always.push((Node::Member(at), name.clone(), bytes.len() as u64));
        }
        for (at, disk) in state.disks.iter().enumerate() {
            files += disk.plan.records.len() as u64;
            always.push((Node::Table(at), table_path(&disk.plan.name), disk.table_len()));
        }
        always.push((Node::Manifest, MANIFEST.into(), (state.manifest.len() as u64).max(1)));
        files += always.len() as u64;
        for (node, path, len) in always {
            if state.read.get(&node.inode()).copied().unwrap_or(0) < len {
                return Err(ViewFailure::NotRead { path });
            }
        }
        let tables = state.disks.iter().map(|disk| SeenTable {
            layer: disk.plan.layer,
            disk: Layer::of(&disk.plan.name).1.to_owned(),
            size: disk.plan.size,
            segment_len: disk.plan.segment_len,
            bytes: disk.table.clone().unwrap_or_default(),
        });
        Ok(Seen { files, segments: state.segments_read, tables: tables.collect() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, failure: ViewFailure) -> Errno {
        tracing::debug!("segment view: {failure}");
        let _ = self.0.failure.set(failure);
        Errno::EIO
    }

    fn attributes(&self, state: &State, node: Node) -> Result<FileAttr, Errno> {
        let inode = INodeNo(node.inode());
        let file = |size: u64, micros: i64| file_attributes(inode, size, time(micros));
        let instant = self.0.instant;
        Ok(match node {
            Node::Root | Node::Disks => directory_attributes(inode, UNIX_EPOCH),
            Node::Disk(at) => {
                state.disks.get(at).map(|_| directory_attributes(inode, UNIX_EPOCH)).ok_or(Errno::ENOENT)?
            }
            Node::Shard(at, shard) => {
                let disk = state.disks.get(at).ok_or(Errno::ENOENT)?;
                if disk.shard(shard).is_empty() {
                    return Err(Errno::ENOENT);
                }
                directory_attributes(inode, UNIX_EPOCH)
            }
            Node::Segment(at, index) => {
                let disk = state.disks.get(at).ok_or(Errno::ENOENT)?;
                let record = &disk.plan.records[disk.position(index).ok_or(Errno::ENOENT)?];
                file(disk.len(index), record.stored_at)
            }
            Node::Member(at) => file(state.members.get(at).ok_or(Errno::ENOENT)?.1.len() as u64, instant),
            Node::Table(at) => file(state.disks.get(at).ok_or(Errno::ENOENT)?.table_len(), instant),
            Node::Manifest => {
                let mut attributes = file(state.manifest.len() as u64, instant);
                attributes.mtime += NEWER;
                attributes
            }
        })
    }

    fn find(&self, state: &mut State, parent: Node, name: &str) -> Result<Node, Errno> {
        let hex = |digits: usize| {
            (name.len() == digits).then(|| u64::from_str_radix(name, 16).ok()).flatten().ok_or(Errno::ENOENT)
        };
        let node = match parent {
            Node::Root if name == DISKS => Node::Disks,
            Node::Root if name == MANIFEST => {
                self.finish_manifest(state).map_err(|failure| self.fail(failure))?;
                Node::Manifest
            }
            Node::Root => Node::Member(state.members.iter().position(|m| m.0 == name).ok_or(Errno::ENOENT)?),
            Node::Disks => {
                let disk = |name: &str| state.disks.iter().position(|d| d.plan.name == name);
                let table = || name.strip_suffix(".segments").and_then(disk).map(Node::Table);
                disk(name).map(Node::Disk).or_else(table).ok_or(Errno::ENOENT)?
            }
            Node::Disk(at) => Node::Shard(at, hex(6)?),
            Node::Shard(at, shard) => {
                Node::Segment(at, hex(10).ok().filter(|i| i >> SHARD_BITS == shard).ok_or(Errno::ENOENT)?)
            }
            _ => return Err(Errno::ENOTDIR),
        };
        Ok(node)
    }

    /// Bytes at `offset`, and whether a segment has been read to its end with them.
    fn content(&self, state: &mut State, node: Node, offset: u64, size: u64) -> Result<(Bytes, bool), ViewFailure> {
        let bytes = match node {
            Node::Segment(at, index) => return self.segment(state, at, index, offset, size),
            Node::Member(at) => state.members.get(at).map(|m| m.1.clone()).unwrap_or_default(),
            Node::Table(at) => self.finish_table(state, at)?,
            _ => state.manifest.clone(),
        };
        let part = part(&bytes, offset, size);
        *state.read.entry(node.inode()).or_default() += part.len() as u64;
        Ok((part, false))
    }

    fn segment(
        &self,
        state: &mut State,
        at: usize,
        index: u64,
        offset: u64,
        size: u64,
    ) -> Result<(Bytes, bool), ViewFailure> {
        let Some(disk) = state.disks.get(at) else { return Ok((Bytes::new(), false)) };
        let Some(position) = disk.position(index) else { return Ok((Bytes::new(), false)) };
        if disk.plan.records[position].stored_at != self.0.instant {
            return Err(ViewFailure::Unchanged { disk: disk.plan.name.clone(), index });
        }
        if state.current.as_ref().is_none_or(|c| (c.disk, c.at) != (at, position)) {
            state.finish_segment()?;
            let disk = &mut state.disks[at];
            if disk.next_changed(self.0.instant) != Some(position) {
                return Err(ViewFailure::NotRead { path: disk.next_path(self.0.instant) });
            }
            state.current = Some(disk.fetch(at, position)?);
        }
        let Some(current) = &mut state.current else { return Ok((Bytes::new(), false)) };
        let part = part(&current.bytes, offset, size);
        let before = current.served;
        current.served += part.len() as u64;
        let len = current.bytes.len() as u64;
        let finished = before < len && current.served >= len;
        state.segments_read += u64::from(finished);
        Ok((part, finished))
    }

    /// The table of a disk of which everything was read.
    fn finish_table(&self, state: &mut State, at: usize) -> Result<Bytes, ViewFailure> {
        state.finish_segment()?;
        let Some(disk) = state.disks.get_mut(at) else { return Ok(Bytes::new()) };
        if let Some(table) = &disk.table {
            return Ok(table.clone());
        }
        if disk.next_changed(self.0.instant).is_some() {
            return Err(ViewFailure::NotRead { path: disk.next_path(self.0.instant) });
        }
        disk.drain()?;
        state.current = None;
        let table = Bytes::from(disk.table()?.to_bytes());
        disk.table = Some(table.clone());
        Ok(table)
    }

    fn finish_manifest(&self, state: &mut State) -> Result<(), ViewFailure> {
        let Some(make) = state.make_manifest.take() else { return Ok(()) };
        let mut tables: Vec<DiskTables> = Vec::with_capacity(state.disks.len());
        for at in 0..state.disks.len() {
            self.finish_table(state, at)?;
            let table = state.disks[at].table()?;
            match (state.disks[at].plan.layer, tables.last_mut()) {
                (Layer::Fine, Some(disk)) => disk.fine = table,
                _ => tables.push(table.into()),
            }
        }
        let bytes = make(&tables).to_bytes().map_err(|e| ViewFailure::Contract {
            disk: tables.len().to_string(),
            what: format!("the manifest cannot be written: {e}"),
        })?;
        state.manifest = bytes.into();
        Ok(())
    }
}

impl State {
    /// Takes note of a segment that was read to its end.
    fn settle(&mut self) {
        let Some(current) = self.current.as_mut().filter(|c| !c.settled && c.served >= c.bytes.len() as u64) else {
            return;
        };
        current.settled = true;
        self.disks[current.disk].plan.records[current.at].digest = *blake3::hash(&current.bytes).as_bytes();
        // The reader has no way to ask again: a second read of this file fails the backup.
        if let Some(data) = current.data.take() {
            data.stored();
        }
    }

    /// Whoever wants another file must have read the last segment to its end.
    fn finish_segment(&mut self) -> Result<(), ViewFailure> {
        self.settle();
        match self.current.as_ref().filter(|current| !current.settled) {
            Some(current) => {
                let plan = &self.disks[current.disk].plan;
                Err(ViewFailure::NotRead { path: segment_path(&plan.name, plan.records[current.at].index) })
            }
            None => Ok(()),
        }
    }
}

impl Disk {
    fn len(&self, index: u64) -> u64 {
        self.plan.segment_len.range(index, self.plan.size).map_or(0, |(_, len)| len)
    }

    fn position(&self, index: u64) -> Option<usize> {
        self.plan.records.binary_search_by_key(&index, |r| r.index).ok()
    }

    /// The records in one directory.
    fn shard(&self, shard: u64) -> &[SegmentRecord] {
        let records = &self.plan.records;
        let start = records.partition_point(|r| r.index >> SHARD_BITS < shard);
        let end = records.partition_point(|r| r.index >> SHARD_BITS <= shard);
        &records[start..end]
    }

    /// The first directory at or behind `shard`.
    fn next_shard(&self, shard: u64) -> Option<u64> {
        let records = &self.plan.records;
        let at = records.partition_point(|r| r.index >> SHARD_BITS < shard);
        records.get(at).map(|r| r.index >> SHARD_BITS)
    }

    fn next_changed(&mut self, instant: i64) -> Option<usize> {
        while self.plan.records.get(self.next).is_some_and(|r| r.stored_at != instant) {
            self.next += 1;
        }
        (self.next < self.plan.records.len()).then_some(self.next)
    }

    fn next_path(&mut self, instant: i64) -> String {
        let next = self.next_changed(instant).map(|at| self.plan.records[at].index);
        next.map_or_else(|| table_path(&self.plan.name), |index| segment_path(&self.plan.name, index))
    }

    fn table_len(&self) -> u64 {
        8 + 48 * self.plan.records.len() as u64
    }

    fn table(&self) -> Result<SegmentTable, ViewFailure> {
        let mut table = SegmentTable::new();
        for record in &self.plan.records {
            table.push(*record).map_err(|e| self.contract(e.to_string()))?;
        }
        Ok(table)
    }

    fn contract(&self, what: String) -> ViewFailure {
        ViewFailure::Contract { disk: self.plan.name.clone(), what }
    }

    /// Waits for the changed segment at `position`.
    fn fetch(&mut self, disk: usize, position: usize) -> Result<Current, ViewFailure> {
        let index = self.plan.records[position].index;
        let segment = loop {
            let Some(segment) = self.plan.changed.next() else {
                return Err(self.contract(format!("segment {index} was announced and does not come")));
            };
            let segment = segment?;
            if segment.index == index {
                break segment;
            }
            self.passes_over(&segment, position)?;
        };
        self.next = position + 1;
        let len = self.len(index);
        let bytes = match &segment.data {
            Some(data) => data.bytes().clone(),
            // That it is zero was not known before it was read, so it has a file.
            None => Bytes::from(vec![0; len as usize]),
        };
        if bytes.len() as u64 != len {
            return Err(self.contract(format!("segment {index} has {} bytes instead of {len}", bytes.len())));
        }
        Ok(Current { disk, at: position, bytes, served: 0, data: segment.data, settled: false })
    }

    /// What was known to be zero has no file; all else must come in order.
    fn passes_over(&self, segment: &Segment, before: usize) -> Result<(), ViewFailure> {
        let expected = self.plan.records.get(before).map_or(u64::MAX, |r| r.index);
        if segment.data.is_some() || segment.index > expected || self.position(segment.index).is_some() {
            return Err(self.contract(format!("segment {} comes unannounced or out of order", segment.index)));
        }
        Ok(())
    }

    fn drain(&mut self) -> Result<(), ViewFailure> {
        while let Some(segment) = self.plan.changed.next() {
            self.passes_over(&segment?, self.plan.records.len())?;
        }
        Ok(())
    }
}

fn part(bytes: &Bytes, offset: u64, size: u64) -> Bytes {
    let len = bytes.len() as u64;
    let (start, end) = (offset.min(len), offset.saturating_add(size).min(len));
    bytes.slice(start as usize..end as usize)
}

fn time(micros: i64) -> SystemTime {
    let distance = Duration::from_micros(micros.unsigned_abs());
    if micros < 0 { UNIX_EPOCH.checked_sub(distance) } else { UNIX_EPOCH.checked_add(distance) }.unwrap_or(UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inode_numbers_tell_what_they_stand_for_and_grow_like_paths() {
        let nodes = [
            Node::Root,
            Node::Member(0),
            Node::Member(1),
            Node::Disks,
            Node::Disk(0),
            Node::Shard(0, 0),
            Node::Shard(0, (MAX_SEGMENTS - 1) >> SHARD_BITS),
            Node::Segment(0, 0),
            Node::Segment(0, MAX_SEGMENTS - 1),
            Node::Table(0),
            Node::Disk(1),
            Node::Table(2 * MAX_DISKS - 1),
            Node::Manifest,
        ];
        assert!(nodes.map(Node::inode).is_sorted_by(|a, b| a < b));
        for node in nodes {
            assert_eq!(Node::of(INodeNo(node.inode())), node);
        }
    }

    #[test]
    fn times_before_the_epoch_are_times_too() {
        assert_eq!(time(1_500_000), UNIX_EPOCH + Duration::from_millis(1500));
        assert_eq!(time(-1_500_000), UNIX_EPOCH - Duration::from_millis(1500));
    }
}
