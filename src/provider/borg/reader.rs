//! Reading an archive.
//!
//! Starting borg takes some tenths of a second, too long for every segment. A disk is therefore read as one stream: `borg
//! extract --stdout` writes the contents of all its segments one after the other, in the order of the segment table, which says
//! how long each is. Its fine segments are another stream. Threads that restore ask in about that order; what comes too early
//! for one is kept for a while. Whatever does not fit is extracted by itself, fine segments with those behind them.

use super::{
    MAX_MANIFEST,
    command::{Borg, Call, Running},
};
use crate::{
    archive::{ArchiveName, DiskEntry, Manifest},
    fuse::segments::{DISKS, MANIFEST, segment_name, segment_path, table_path},
    provider::{ArchiveReader, ErrorKind, ProviderError},
    segment::{SegmentTable, layers::Layer},
};
use bytes::Bytes;
use nix::poll::{PollFd, PollFlags, poll};
use std::{
    collections::HashMap,
    io::Read,
    os::fd::AsFd,
    process::ChildStdout,
    sync::{Arc, Mutex, PoisonError},
};

/// Bytes of segments that are kept because they were not asked for yet, for each disk.
const WINDOW: u64 = 64 << 20;
/// Fine segments that are extracted together: with the first of a segment come the others.
const TOGETHER: usize = 64;

/// How long the next borg is not started because one that writes a stream has written nothing yet, in milliseconds.
const PATIENCE: u16 = 10_000;

/// One archive.
pub(super) struct Reader {
    borg: Borg,
    name: ArchiveName,
    /// Manifest and segment tables, by path.
    kept: Mutex<HashMap<String, Bytes>>,
    streams: Mutex<HashMap<String, Arc<Mutex<Stream>>>>,
    /// Held while a borg is on its way to the repository's lock: who meets another there sleeps for a tenth of `lock-wait`.
    starting: Mutex<()>,
}

/// The contents of a disk as borg writes them.
struct Stream {
    layer: Layer,
    /// Index and length of all segments.
    segments: Vec<(u64, u64)>,
    /// The next one that borg writes.
    next: usize,
    early: HashMap<u64, Bytes>,
    early_bytes: u64,
    /// What came along with the last one that was extracted by itself.
    beside: HashMap<u64, Bytes>,
    /// `None` before it was started and after it has failed.
    output: Option<(Running, ChildStdout)>,
}

impl Reader {
    pub(super) fn new(borg: Borg, name: ArchiveName) -> Self {
        Self { borg, name, kept: Mutex::default(), streams: Mutex::default(), starting: Mutex::default() }
    }

    fn damaged(&self, what: impl std::fmt::Display) -> ProviderError {
        ProviderError::new(ErrorKind::Damaged, format!("archive {}: {what}", self.name))
    }

    fn start(&self, patterns: Vec<String>) -> Result<Running, ProviderError> {
        self.borg.start(&Call {
            verb: "extract",
            options: vec!["--stdout".into()],
            archive: Some(&self.name.to_string()),
            arguments: patterns,
            ..Call::default()
        })
    }

    fn extract(&self, path: &str, limit: u64) -> Result<Vec<u8>, ProviderError> {
        self.extract_all(path, vec![format!("pp:{path}")], limit)
    }

    /// What the patterns match, in the archive's order; `path` is for messages.
    fn extract_all(&self, path: &str, patterns: Vec<String>, limit: u64) -> Result<Vec<u8>, ProviderError> {
        let what = format!("`{path}` of archive {}", self.name);
        let _starting = self.starting.lock().unwrap_or_else(PoisonError::into_inner);
        let finished = self.start(patterns)?.finish(&format!("borg extract {path}"), limit)?;
        if !finished.ran() {
            return Err(finished.error(&format!("{what} cannot be read")));
        }
        if finished.status.success() {
            return Ok(finished.output);
        }
        let kind = if finished.never_matched() { ErrorKind::NotFound } else { ErrorKind::Damaged };
        Err(ProviderError { kind, ..finished.error(&format!("{what} cannot be read")) })
    }

    /// A small file that is asked for more than once.
    fn kept(&self, path: &str, limit: u64) -> Result<Bytes, ProviderError> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = kept.get(path).filter(|bytes| bytes.len() as u64 <= limit) {
            return Ok(bytes.clone());
        }
        let bytes = Bytes::from(self.extract(path, limit)?);
        kept.insert(path.to_owned(), bytes.clone());
        Ok(bytes)
    }

    pub(super) fn manifest(&self) -> Result<Manifest, ProviderError> {
        let bytes = self.kept(MANIFEST, MAX_MANIFEST)?;
        Manifest::from_bytes(&bytes).map_err(|e| {
            ProviderError::caused_by(ErrorKind::Damaged, format!("archive {} cannot be used", self.name), e)
        })
    }

    /// The segment table of a layer of a disk, compared with the manifest.
    pub(super) fn checked_table(&self, entry: &DiskEntry, layer: Layer) -> Result<SegmentTable, ProviderError> {
        let wrong = |e: &dyn std::error::Error| self.damaged(format!("disk `{}`: {e}", entry.name));
        let digest = match (layer, &entry.fine) {
            (Layer::Segments, _) => &entry.digest,
            (Layer::Fine, Some(fine)) => &fine.digest,
            (Layer::Fine, None) => return Ok(SegmentTable::new()),
        };
        let len = layer.len(entry.segments().map_err(|e| wrong(&e))?);
        let name = layer.name(&entry.name);
        let bytes = self.kept(&table_path(&name), SegmentTable::longest(len, entry.size))?;
        let table = SegmentTable::from_bytes(&bytes, len, entry.size).map_err(|e| wrong(&e))?;
        if table.digest_hex() != *digest {
            return Err(self.damaged(format!("the segment table of disk `{name}` does not belong to the manifest")));
        }
        Ok(table)
    }

    /// `name` is that of a layer.
    fn stream(&self, name: &str) -> Result<Arc<Mutex<Stream>>, ProviderError> {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stream) = streams.get(name) {
            return Ok(Arc::clone(stream));
        }
        let manifest = self.manifest()?;
        let (layer, disk) = Layer::of(name);
        let entry = manifest.disk(disk).ok_or_else(|| self.damaged(format!("it has no disk `{disk}`")))?;
        let len = layer.len(entry.segments().map_err(|e| self.damaged(e))?);
        let table = self.checked_table(entry, layer)?;
        let mut segments: Vec<(u64, u64)> = Vec::with_capacity(table.records().len());
        segments.extend(table.records().iter().filter_map(|r| Some((r.index, len.range(r.index, entry.size)?.1))));
        let starting = self.starting.lock().unwrap_or_else(PoisonError::into_inner);
        let mut running = self.start(vec![format!("pp:{DISKS}/{name}")])?;
        let output = running.take_output().map(|output| (running, output));
        if let Some((_, output)) = &output {
            // It has the lock by then. What is wrong is seen by who reads.
            let _ = poll(&mut [PollFd::new(output.as_fd(), PollFlags::POLLIN)], PATIENCE);
        }
        drop(starting);
        let stream =
            Stream { layer, segments, next: 0, early: HashMap::new(), early_bytes: 0, beside: HashMap::new(), output };
        let stream = Arc::new(Mutex::new(stream));
        streams.insert(name.to_owned(), Arc::clone(&stream));
        Ok(stream)
    }

    /// A segment that does not come soon. `name` is that of a layer.
    fn beside_the_stream(
        &self,
        name: &str,
        index: u64,
        len: u64,
        stream: &Mutex<Stream>,
    ) -> Result<Bytes, ProviderError> {
        let wanted = {
            let stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
            let first = stream.segments.partition_point(|(known, _)| *known < index);
            let together = if stream.layer == Layer::Fine { TOGETHER } else { 1 };
            let rest = stream.segments[first..].iter().take(together);
            let wanted: Vec<(u64, u64)> = rest.copied().collect();
            if wanted.first() == Some(&(index, len)) { wanted } else { vec![(index, len)] }
        };
        let pattern = |index: u64| match wanted.len() {
            // Archives of earlier versions have other directories.
            1 => format!("sh:{DISKS}/{name}/*/{}", segment_name(index)),
            // Every other kind is compared with every file of the archive.
            _ => format!("pf:{}", segment_path(name, index)),
        };
        let patterns = wanted.iter().map(|(index, _)| pattern(*index));
        let total = wanted.iter().map(|(_, len)| len).sum();
        let mut bytes = Bytes::from(self.extract_all(&segment_path(name, index), patterns.collect(), total)?);
        if bytes.len() as u64 != total {
            return Err(self.damaged(format!(
                "segment {index} of `{name}` (and {} behind it) has {} bytes instead of {total}",
                wanted.len() - 1,
                bytes.len()
            )));
        }
        let first = bytes.split_to(len as usize);
        let rest = wanted[1..].iter().map(|(index, len)| (*index, bytes.split_to(*len as usize))).collect();
        stream.lock().unwrap_or_else(PoisonError::into_inner).beside = rest;
        Ok(first)
    }
}

impl Stream {
    /// The segment, if it is among what was read already or comes soon.
    fn take(&mut self, index: u64) -> Option<Bytes> {
        if let Some(bytes) = self.early.remove(&index) {
            self.early_bytes -= bytes.len() as u64;
            return Some(bytes);
        }
        if let Some(bytes) = self.beside.remove(&index) {
            return Some(bytes);
        }
        let mut ahead = self.early_bytes;
        let mut soon = self.segments[self.next..].iter().take_while(|(_, len)| {
            let fits = ahead <= WINDOW;
            ahead += len;
            fits
        });
        if !soon.any(|(coming, _)| *coming == index) {
            return None;
        }
        loop {
            let (next, len) = *self.segments.get(self.next)?;
            self.next += 1;
            let mut bytes = vec![0; len as usize];
            if self.output.as_mut().is_none_or(|(_, output)| output.read_exact(&mut bytes).is_err()) {
                // Whoever asks gets borg's own words by asking for the one file.
                self.output = None;
                self.next = self.segments.len();
                return None;
            }
            if self.next == self.segments.len()
                && let Some((running, _)) = self.output.take()
            {
                // Nothing comes any more, so this is only borg's way out.
                running.finish("borg extract", 0).ok();
            }
            if next == index {
                return Some(bytes.into());
            }
            self.early_bytes += len;
            self.early.insert(next, bytes.into());
        }
    }
}

impl ArchiveReader for Reader {
    fn member(&self, name: &str, limit: u64) -> Result<Vec<u8>, ProviderError> {
        if name == MANIFEST { self.kept(name, limit).map(Vec::from) } else { self.extract(name, limit) }
    }

    fn table(&self, disk: &str, limit: u64) -> Result<Vec<u8>, ProviderError> {
        self.kept(&table_path(disk), limit).map(Vec::from)
    }

    fn segment(&self, disk: &str, index: u64, len: u64) -> Result<Bytes, ProviderError> {
        let stream = self.stream(disk)?;
        let streamed = stream.lock().unwrap_or_else(PoisonError::into_inner).take(index);
        let bytes = match streamed {
            Some(bytes) => bytes,
            None => self.beside_the_stream(disk, index, len, &stream)?,
        };
        if bytes.len() as u64 != len {
            return Err(
                self.damaged(format!("segment {index} of disk `{disk}` has {} bytes instead of {len}", bytes.len()))
            );
        }
        Ok(bytes)
    }
}
