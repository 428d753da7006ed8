//! Reading an archive.
//!
//! Starting borg takes some tenths of a second, too long for every segment. A disk is therefore read as one stream: `borg
//! extract --stdout` writes the contents of all its segments one after the other, in the order of the segment table, which says
//! how long each is. Threads that restore ask in about that order; what comes too early for one is kept for a while. Whatever
//! does not fit is extracted by itself.

use super::{
    MAX_MANIFEST,
    command::{Borg, Call, Running},
};
use crate::{
    archive::{ArchiveName, DiskEntry, Manifest},
    fuse::segments::{DISKS, MANIFEST, segment_path, table_path},
    provider::{ArchiveReader, ErrorKind, ProviderError},
    segment::SegmentTable,
};
use bytes::Bytes;
use std::{
    collections::HashMap,
    io::Read,
    process::ChildStdout,
    sync::{Arc, Mutex, PoisonError},
};

/// Bytes of segments that are kept because they were not asked for yet, for each disk.
const WINDOW: u64 = 64 << 20;

/// One archive.
pub(super) struct Reader {
    borg: Borg,
    name: ArchiveName,
    /// Manifest and segment tables, by path.
    kept: Mutex<HashMap<String, Bytes>>,
    streams: Mutex<HashMap<String, Arc<Mutex<Stream>>>>,
}

/// The contents of a disk as borg writes them.
struct Stream {
    /// Index and length of the segments still to come, the next one last.
    coming: Vec<(u64, u64)>,
    early: HashMap<u64, Bytes>,
    early_bytes: u64,
    /// `None` before it was started and after it has failed.
    output: Option<(Running, ChildStdout)>,
}

impl Reader {
    pub(super) fn new(borg: Borg, name: ArchiveName) -> Self {
        Self { borg, name, kept: Mutex::default(), streams: Mutex::default() }
    }

    fn damaged(&self, what: impl std::fmt::Display) -> ProviderError {
        ProviderError::new(ErrorKind::Damaged, format!("archive {}: {what}", self.name))
    }

    fn start(&self, pattern: String) -> Result<Running, ProviderError> {
        self.borg.start(&Call {
            verb: "extract",
            options: vec!["--stdout".into()],
            archive: Some(&self.name.to_string()),
            arguments: vec![pattern],
            ..Call::default()
        })
    }

    fn extract(&self, path: &str, limit: u64) -> Result<Vec<u8>, ProviderError> {
        let what = format!("`{path}` of archive {}", self.name);
        let finished = self.start(format!("pp:{path}"))?.finish(&format!("borg extract {path}"), limit)?;
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

    /// The segment table of a disk, compared with the manifest.
    pub(super) fn checked_table(&self, entry: &DiskEntry) -> Result<SegmentTable, ProviderError> {
        let wrong = |e: &dyn std::error::Error| self.damaged(format!("disk `{}`: {e}", entry.name));
        let len = entry.segments().map_err(|e| wrong(&e))?;
        let bytes = self.kept(&table_path(&entry.name), SegmentTable::longest(len, entry.size))?;
        let table = SegmentTable::from_bytes(&bytes, len, entry.size).map_err(|e| wrong(&e))?;
        if blake3::Hash::from_bytes(table.digest()).to_hex().as_str() != entry.digest {
            return Err(
                self.damaged(format!("the segment table of disk `{}` does not belong to the manifest", entry.name))
            );
        }
        Ok(table)
    }

    fn stream(&self, disk: &str) -> Result<Arc<Mutex<Stream>>, ProviderError> {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stream) = streams.get(disk) {
            return Ok(Arc::clone(stream));
        }
        let manifest = self.manifest()?;
        let entry = manifest.disk(disk).ok_or_else(|| self.damaged(format!("it has no disk `{disk}`")))?;
        let len = entry.segments().map_err(|e| self.damaged(e))?;
        let table = self.checked_table(entry)?;
        let mut coming: Vec<(u64, u64)> = Vec::with_capacity(table.records().len());
        coming.extend(table.records().iter().filter_map(|r| Some((r.index, len.range(r.index, entry.size)?.1))));
        coming.reverse();
        let mut running = self.start(format!("pp:{DISKS}/{disk}"))?;
        let output = running.take_output().map(|output| (running, output));
        let stream = Arc::new(Mutex::new(Stream { coming, early: HashMap::new(), early_bytes: 0, output }));
        streams.insert(disk.to_owned(), Arc::clone(&stream));
        Ok(stream)
    }
}

impl Stream {
    /// The segment, if it is among what was read already or comes soon.
    fn take(&mut self, index: u64) -> Option<Bytes> {
        if let Some(bytes) = self.early.remove(&index) {
            self.early_bytes -= bytes.len() as u64;
            return Some(bytes);
        }
        let mut ahead = self.early_bytes;
        let mut soon = self.coming.iter().rev().take_while(|(_, len)| {
            let fits = ahead <= WINDOW;
            ahead += len;
            fits
        });
        if !soon.any(|(coming, _)| *coming == index) {
            return None;
        }
        loop {
            let (next, len) = self.coming.pop()?;
            let mut bytes = vec![0; len as usize];
            if self.output.as_mut().is_none_or(|(_, output)| output.read_exact(&mut bytes).is_err()) {
                // Whoever asks gets borg's own words by asking for the one file.
                self.output = None;
                self.coming.clear();
                return None;
            }
            if self.coming.is_empty()
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
            None => self.extract(&segment_path(disk, index), len)?.into(),
        };
        if bytes.len() as u64 != len {
            return Err(
                self.damaged(format!("segment {index} of disk `{disk}` has {} bytes instead of {len}", bytes.len()))
            );
        }
        Ok(bytes)
    }
}
