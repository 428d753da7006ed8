//! A backup as rustic wants to see it: files, in the order of their names, each with a reader.
//!
//! rustic reports neither a failed entry nor a failed reader to its caller: it logs a warning, leaves the file out and goes
//! on. So everything that can go wrong here is recorded in [`Progress`], which also ends the source.
//!
//! Ahead of its readers rustic takes as many entries as 2 × processors + 1 (its parallel map and the look-ahead of its
//! tree walk), and the merge looks at one more; so many [`SegmentData`] can be alive at a time. It asks for the next entry
//! before it works on the last one: whoever feeds `changed` must be able to deliver two segments while none is given back.

use super::layout::{self, Shape};
use crate::{
    provider::{BackupInput, DiskInput, ErrorKind, MakeManifest, ProviderError, SourceError},
    segment::{DiskItem, DiskTables, SegmentData, SegmentTable, merge},
};
use bytes::Bytes;
use jiff::Timestamp;
use rustic_core::{
    ErrorKind as RusticKind, ReadSource, ReadSourceEntry, ReadSourceOpen, RusticError, RusticResult, repofile::Node,
};
use std::{
    collections::VecDeque,
    io::Read,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};
use tokio_util::sync::CancellationToken;

/// What is known of a running backup; the first failure counts.
pub(super) struct Progress {
    cancel: CancellationToken,
    stopped: AtomicBool,
    failure: Mutex<Option<ProviderError>>,
    /// Files handed to rustic.
    files: AtomicU64,
    /// Bytes that these files have.
    bytes: AtomicU64,
    finished: Mutex<Option<Finished>>,
}

/// What the source found out on the way.
pub(super) struct Finished {
    /// One table for each disk, in the order of the input.
    pub(super) tables: Vec<SegmentTable>,
    /// Name and size of every file at the root.
    pub(super) members: Vec<(String, u64)>,
    /// Size of every segment table's file.
    pub(super) table_sizes: Vec<u64>,
}

impl Progress {
    pub(super) fn new(cancel: CancellationToken) -> Arc<Self> {
        Arc::new(Self {
            cancel,
            stopped: AtomicBool::new(false),
            failure: Mutex::default(),
            files: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            finished: Mutex::default(),
        })
    }

    pub(super) fn stop(&self, error: ProviderError) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.stopped.store(true, Ordering::Release);
    }

    /// Whether the backup has failed; notices a cancellation.
    pub(super) fn is_stopped(&self) -> bool {
        if !self.stopped.load(Ordering::Acquire) && self.cancel.is_cancelled() {
            self.stop(ProviderError::new(ErrorKind::Source, "the backup was cancelled"));
        }
        self.stopped.load(Ordering::Acquire)
    }

    pub(super) fn take_failure(&self) -> Option<ProviderError> {
        self.is_stopped();
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub(super) fn take_finished(&self) -> Option<Finished> {
        self.finished.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Files and bytes that were handed to rustic.
    pub(super) fn planned(&self) -> (u64, u64) {
        (self.files.load(Ordering::Acquire), self.bytes.load(Ordering::Acquire))
    }

    fn count(&self, bytes: u64) {
        self.files.fetch_add(1, Ordering::AcqRel);
        self.bytes.fetch_add(bytes, Ordering::AcqRel);
    }
}

/// How rustic gets at the content of an entry.
pub(super) enum Open {
    /// In memory.
    Bytes(Bytes),
    /// A changed segment.
    Segment(SegmentReader),
    /// An unchanged segment. rustic opens it only if the parent snapshot does not have what its table promises.
    Refused { what: String, progress: Arc<Progress> },
}

impl ReadSourceOpen for Open {
    type Reader = Box<dyn Read + Send>;

    fn open(self) -> RusticResult<Self::Reader> {
        match self {
            Self::Bytes(bytes) => Ok(Box::new(std::io::Cursor::new(bytes))),
            Self::Segment(reader) => Ok(Box::new(reader)),
            Self::Refused { what, progress } => {
                progress.stop(ProviderError::new(
                    ErrorKind::Incomplete,
                    format!("{what} is unchanged, but its base archive no longer has it in the repository; a full backup is needed"),
                ));
                Err(RusticError::new(RusticKind::InputOutput, "an unchanged segment cannot be read"))
            }
        }
    }
}

/// Reads a changed segment, and gives it back as stored as soon as its last byte was taken.
pub(super) struct SegmentReader {
    data: Option<SegmentData>,
    at: usize,
    what: String,
    progress: Arc<Progress>,
}

impl Read for SegmentReader {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        if self.progress.is_stopped() {
            return Err(std::io::Error::other("the backup has failed before"));
        }
        let Some(data) = &self.data else { return Ok(0) };
        let rest = data.bytes().get(self.at..).unwrap_or_default();
        let count = rest.len().min(buf.len());
        buf[..count].copy_from_slice(&rest[..count]);
        self.at += count;
        if count == rest.len()
            && let Some(data) = self.data.take()
        {
            data.stored();
        }
        Ok(count)
    }
}

impl Drop for SegmentReader {
    fn drop(&mut self) {
        // Also how a changed segment is noticed for which rustic took the parent's content.
        if self.data.is_some() {
            self.progress
                .stop(ProviderError::new(ErrorKind::Incomplete, format!("{} was not read to its end", self.what)));
        }
    }
}

type Entry = ReadSourceEntry<Open>;
type Items = Box<dyn Iterator<Item = Result<DiskItem, SourceError>> + Send>;

struct Disk {
    name: String,
    shape: Shape,
    items: Option<Items>,
    table: SegmentTable,
}

enum Step {
    Member(String, Bytes),
    Directory(PathBuf),
    Disk(usize),
    Table(usize),
    Manifest,
}

/// The walk over everything that goes into the archive.
pub(super) struct Entries {
    progress: Arc<Progress>,
    instant: Timestamp,
    stored_at: i64,
    disks: Vec<Disk>,
    steps: VecDeque<Step>,
    /// The disk that is being walked, and the directory that its last segment was in.
    walking: Option<(usize, Option<u64>)>,
    /// A segment that waits for its directory to be handed out.
    pending: Option<Entry>,
    manifest: Option<MakeManifest>,
    finished: Finished,
    done: bool,
}

/// An input, once, as rustic's source.
pub(super) struct Source(Mutex<Option<Entries>>);

impl Source {
    /// Also checks what rustic would misunderstand: names.
    pub(super) fn new(input: BackupInput, progress: Arc<Progress>) -> Result<Self, ProviderError> {
        let invalid = |message: String| Err(ProviderError::new(ErrorKind::Other, message));
        let BackupInput { instant, members, disks, manifest, .. } = input;
        let stored_at = instant.as_microsecond();

        let mut root: Vec<(String, Vec<Step>)> = Vec::new();
        let mut below: Vec<(String, Step)> = Vec::new();
        for (index, disk) in disks.iter().enumerate() {
            below.push((disk.name.clone(), Step::Disk(index)));
            below.push((layout::table_name(&disk.name), Step::Table(index)));
            if disk.segment_len.count(disk.size) > layout::MAX_SEGMENTS {
                return invalid(format!("disk `{}` has more than {} segments", disk.name, layout::MAX_SEGMENTS));
            }
        }
        below.sort_by(|a, b| a.0.cmp(&b.0));
        if let Some([(name, _), _]) = below.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return invalid(format!("two disks would use the name `{name}`"));
        }
        let bad = below.iter().map(|(name, _)| name).chain(members.iter().map(|(n, _)| n));
        if let Some(name) = bad.into_iter().find(|name| !layout::is_plain_name(name)) {
            return invalid(format!("`{name}` cannot be a file name in an archive"));
        }
        let steps =
            std::iter::once(Step::Directory(layout::DISKS.into())).chain(below.into_iter().map(|(_, step)| step));
        root.push((layout::DISKS.into(), steps.collect()));
        root.push((layout::MANIFEST.into(), vec![Step::Manifest]));
        for (name, content) in members {
            root.push((name.clone(), vec![Step::Member(name, content.into())]));
        }
        root.sort_by(|a, b| a.0.cmp(&b.0));
        if let Some([(name, _), _]) = root.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return invalid(format!("the archive would have two members `{name}`"));
        }

        let disks: Vec<Disk> = disks.into_iter().map(|disk| walk(disk, stored_at)).collect();
        let finished = Finished { tables: Vec::new(), members: Vec::new(), table_sizes: vec![0; disks.len()] };
        Ok(Self(Mutex::new(Some(Entries {
            progress,
            instant,
            stored_at,
            disks,
            steps: root.into_iter().flat_map(|(_, steps)| steps).collect(),
            walking: None,
            pending: None,
            manifest: Some(manifest),
            finished,
            done: false,
        }))))
    }
}

fn walk(disk: DiskInput, stored_at: i64) -> Disk {
    let DiskInput { name, size, segment_len, base, changed, .. } = disk;
    let items: Items = Box::new(merge(base.map(|(_, table)| table), changed, stored_at));
    Disk { name, shape: Shape { size, segment_len }, items: Some(items), table: SegmentTable::new() }
}

impl ReadSource for Source {
    type Open = Open;
    type Iter = Entries;

    fn size(&self) -> RusticResult<Option<u64>> {
        Ok(None)
    }

    fn entries(&self) -> Entries {
        let entries = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        entries.unwrap_or_else(Entries::nothing)
    }
}

impl Entries {
    /// For a second call, which rustic does not make.
    fn nothing() -> Self {
        Self {
            progress: Progress::new(CancellationToken::new()),
            instant: Timestamp::UNIX_EPOCH,
            stored_at: 0,
            disks: Vec::new(),
            steps: VecDeque::new(),
            walking: None,
            pending: None,
            manifest: None,
            finished: Finished { tables: Vec::new(), members: Vec::new(), table_sizes: Vec::new() },
            done: true,
        }
    }

    fn directory(path: PathBuf) -> Entry {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        ReadSourceEntry { path, node: layout::directory(&name), open: None }
    }

    fn file(&self, path: PathBuf, node: Node, open: Open) -> Entry {
        self.progress.count(node.meta.size);
        ReadSourceEntry { path, node, open: Some(open) }
    }

    fn in_memory(&self, path: PathBuf, name: &str, content: Bytes) -> Entry {
        let node = layout::file(name, content.len() as u64, self.instant);
        self.file(path, node, Open::Bytes(content))
    }

    fn advance(&mut self) -> Result<Option<Entry>, ProviderError> {
        if let Some(entry) = self.pending.take() {
            return Ok(Some(entry));
        }
        if let Some((disk, last)) = self.walking {
            if let Some(entry) = self.segment(disk, last)? {
                return Ok(Some(entry));
            }
            self.walking = None;
        }
        let Some(step) = self.steps.pop_front() else {
            if !self.done {
                self.done = true;
                let mut finished = Finished { tables: Vec::new(), members: Vec::new(), table_sizes: Vec::new() };
                std::mem::swap(&mut finished, &mut self.finished);
                finished.tables = self.disks.iter_mut().map(|disk| std::mem::take(&mut disk.table)).collect();
                *self.progress.finished.lock().unwrap_or_else(PoisonError::into_inner) = Some(finished);
            }
            return Ok(None);
        };
        Ok(Some(match step {
            Step::Member(name, content) => {
                self.finished.members.push((name.clone(), content.len() as u64));
                self.in_memory(PathBuf::from(&name), &name, content)
            }
            Step::Directory(path) => Self::directory(path),
            Step::Disk(index) => {
                self.walking = Some((index, None));
                Self::directory(Path::new(layout::DISKS).join(&self.disks[index].name))
            }
            Step::Table(index) => {
                let content: Bytes = self.disks[index].table.to_bytes().into();
                self.finished.table_sizes[index] = content.len() as u64;
                let name = layout::table_name(&self.disks[index].name);
                self.in_memory(Path::new(layout::DISKS).join(&name), &name, content)
            }
            Step::Manifest => {
                let tables: Vec<DiskTables> =
                    self.disks.iter_mut().map(|d| std::mem::take(&mut d.table).into()).collect();
                let manifest = self.manifest.take().map(|make| make(&tables).to_bytes());
                for (disk, table) in self.disks.iter_mut().zip(tables) {
                    disk.table = table.segments;
                }
                let content = match manifest {
                    Some(Ok(bytes)) => bytes,
                    Some(Err(error)) => {
                        return Err(ProviderError::caused_by(
                            ErrorKind::Other,
                            "the manifest cannot be written",
                            error,
                        ));
                    }
                    None => return Err(ProviderError::new(ErrorKind::Other, "there is no manifest")),
                };
                self.finished.members.push((layout::MANIFEST.into(), content.len() as u64));
                self.in_memory(layout::MANIFEST.into(), layout::MANIFEST, content.into())
            }
        }))
    }

    /// The next segment of a disk, or the directory that it is in.
    fn segment(&mut self, index: usize, last: Option<u64>) -> Result<Option<Entry>, ProviderError> {
        let stored_at = self.stored_at;
        let disk = &mut self.disks[index];
        let item = match disk.items.as_mut().and_then(Iterator::next) {
            None => {
                disk.items = None;
                return Ok(None);
            }
            Some(Err(error)) => {
                return Err(ProviderError::caused_by(ErrorKind::Source, format!("disk `{}` failed", disk.name), error));
            }
            Some(Ok(item)) => item,
        };
        let record = *item.record();
        let what = format!("segment {} of disk `{}`", record.index, disk.name);
        let wrong = |kind, text: &str| ProviderError::new(kind, format!("{what} {text}"));
        let len =
            disk.shape.len(record.index).ok_or_else(|| wrong(ErrorKind::Source, "lies behind the end of the disk"))?;
        let mtime =
            layout::time(record.stored_at).ok_or_else(|| wrong(ErrorKind::Damaged, "has an impossible time"))?;
        disk.table
            .push(record)
            .map_err(|e| ProviderError::caused_by(ErrorKind::Source, format!("{what} came out of order"), e))?;
        let open = match item {
            DiskItem::Unchanged(_) if record.stored_at >= stored_at => {
                // rustic would take a changed segment of the same time for unchanged.
                return Err(wrong(
                    ErrorKind::Incomplete,
                    "of the base archive is not older than this backup: the clock went back",
                ));
            }
            DiskItem::Unchanged(_) => Open::Refused { what, progress: Arc::clone(&self.progress) },
            DiskItem::Changed(_, data) if data.bytes().len() as u64 != len => {
                return Err(wrong(ErrorKind::Source, &format!("has {} instead of {len} bytes", data.bytes().len())));
            }
            DiskItem::Changed(_, data) => {
                Open::Segment(SegmentReader { data: Some(data), at: 0, what, progress: Arc::clone(&self.progress) })
            }
        };
        let shard = layout::shard(record.index);
        let directory = Path::new(layout::DISKS).join(&disk.name).join(layout::shard_name(shard));
        let name = layout::segment_name(record.index);
        let entry = self.file(directory.join(&name), layout::file(&name, len, mtime), open);
        self.walking = Some((index, Some(shard)));
        if last == Some(shard) {
            return Ok(Some(entry));
        }
        self.pending = Some(entry);
        Ok(Some(Self::directory(directory)))
    }
}

impl Iterator for Entries {
    type Item = RusticResult<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.progress.is_stopped() {
            return None;
        }
        match self.advance() {
            Ok(entry) => entry.map(Ok),
            Err(error) => {
                self.progress.stop(error);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU8;

    fn reader(progress: &Arc<Progress>, released: &Arc<AtomicU8>) -> SegmentReader {
        let released = Arc::clone(released);
        let release = move |stored: bool| released.store(1 + u8::from(stored), Ordering::Relaxed);
        let data = SegmentData::new(vec![7; 100].into(), release);
        SegmentReader { data: Some(data), at: 0, what: "segment 1 of disk `a`".into(), progress: Arc::clone(progress) }
    }

    #[test]
    fn a_segment_is_stored_with_its_last_byte_and_not_before() {
        let (progress, released) = (Progress::new(CancellationToken::new()), Arc::new(AtomicU8::new(0)));
        let mut reader = reader(&progress, &released);
        reader.read_exact(&mut [0; 99]).expect("99 bytes");
        assert_eq!(released.load(Ordering::Relaxed), 0);
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).expect("the rest");
        assert_eq!((rest.as_slice(), released.load(Ordering::Relaxed)), (&[7u8][..], 2));
        drop(reader);
        assert!(!progress.is_stopped());
    }

    #[test]
    fn a_segment_that_is_passed_over_or_cut_short_stops_the_backup() {
        for count in [0, 99] {
            let (progress, released) = (Progress::new(CancellationToken::new()), Arc::new(AtomicU8::new(0)));
            let mut reader = reader(&progress, &released);
            reader.read_exact(&mut vec![0; count]).expect("bytes");
            drop(reader);
            assert_eq!(released.load(Ordering::Relaxed), 1, "not stored");
            assert_eq!(progress.take_failure().expect("stopped").kind, ErrorKind::Incomplete);
        }
    }

    #[test]
    fn opening_an_unchanged_segment_stops_the_backup() {
        let progress = Progress::new(CancellationToken::new());
        let open = Open::Refused { what: "segment 1 of disk `a`".into(), progress: Arc::clone(&progress) };
        assert!(open.open().is_err());
        assert_eq!(progress.take_failure().expect("stopped").kind, ErrorKind::Incomplete);
    }
}
