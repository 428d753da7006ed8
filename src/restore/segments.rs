//! Many segments at once from an archive into an image.
//!
//! Threads take the next piece of the disk, read it, compare its digest and write it. Each holds at most one segment
//! (4 MiB), so memory is bounded by the number of threads. The first failure ends all of them.

use super::{RestoreError, image::DiskImage, source::ArchivedDisk};
use crate::{
    provider::ArchiveReader,
    report::{Event, Events},
};
use std::{
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

/// More threads gain nothing with the slowest repositories we know, and each may hold a segment.
const MAX_THREADS: usize = 32;
/// Longest range that is cleared in one go, so that cancelling and progress do not wait for a whole device.
const MAX_CLEAR: u64 = 1 << 30;
/// Between two progress events of a disk.
const PROGRESS: Duration = Duration::from_millis(250);

/// A piece of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Piece {
    /// A segment of which something is stored.
    Stored(u64),
    /// Zeroes.
    Zero { offset: u64, len: u64 },
}

/// The pieces of a disk in order, zeroes included.
fn pieces(disk: &ArchivedDisk) -> impl Iterator<Item = Piece> + Send + '_ {
    let mut stored = disk.tables.stored(disk.segment_len).peekable();
    let mut at = 0u64;
    std::iter::from_fn(move || {
        // Indices were checked against the size when the table was read.
        let next = stored.peek().and_then(|index| disk.segment_len.range(*index, disk.size));
        let (offset, len) = next.unwrap_or((disk.size, 0));
        if at < offset {
            let len = (offset - at).min(MAX_CLEAR);
            let piece = Piece::Zero { offset: at, len };
            at += len;
            return Some(piece);
        }
        at = offset + len;
        stored.next().map(Piece::Stored)
    })
}

struct Work<'a> {
    reader: &'a dyn ArchiveReader,
    disk: &'a ArchivedDisk,
    image: &'a dyn DiskImage,
    path: &'a Path,
    cancel: &'a CancellationToken,
    stop: AtomicBool,
    error: Mutex<Option<RestoreError>>,
    written: AtomicU64,
    progress: Progress<'a>,
}

/// Writes all stored segments of `disk`, and zeroes where `image` needs them. Returns the bytes written from the archive.
pub(super) fn write(
    reader: &dyn ArchiveReader,
    disk: &ArchivedDisk,
    image: &dyn DiskImage,
    path: &Path,
    events: &Events,
    cancel: &CancellationToken,
) -> Result<u64, RestoreError> {
    let todo = if image.starts_zeroed() { disk.data_bytes } else { disk.size };
    let work = Work {
        reader,
        disk,
        image,
        path,
        cancel,
        stop: AtomicBool::new(false),
        error: Mutex::new(None),
        written: AtomicU64::new(0),
        progress: Progress::start(events, &disk.name, todo),
    };
    let stored = disk.tables.stored(disk.segment_len).map(Piece::Stored);
    let pieces: Box<dyn Iterator<Item = Piece> + Send + '_> =
        if image.starts_zeroed() { Box::new(stored) } else { Box::new(pieces(disk)) };
    let queue = Mutex::new(pieces);
    let cpus = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let threads = (cpus * 2).clamp(4, MAX_THREADS).min(disk.segment_len.count(disk.data_bytes).max(1) as usize);
    let take = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    thread::scope(|scope| {
        let mut workers = Vec::with_capacity(threads);
        for _ in 0..threads {
            let worker = thread::Builder::new().name("restore".into()).spawn_scoped(scope, || {
                let stop_if_it_dies = StopOnPanic(&work.stop);
                while !work.stop.load(Ordering::Relaxed) {
                    let Some(piece) = take() else { break };
                    if let Err(error) = work.piece(piece) {
                        work.fail(error);
                    }
                }
                drop(stop_if_it_dies);
            });
            match worker {
                Ok(worker) => workers.push(worker),
                // Fewer threads are slower, not wrong.
                Err(_) if !workers.is_empty() => break,
                Err(source) => {
                    work.fail(RestoreError::io("start a thread for", path, source));
                    break;
                }
            }
        }
        for worker in workers {
            if worker.join().is_err() {
                work.fail(RestoreError::WorkerDied(disk.name.clone()));
            }
        }
    });
    let written = work.written.load(Ordering::Relaxed);
    if let Some(error) = work.error.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    if written != disk.data_bytes {
        return Err(RestoreError::Incomplete { disk: disk.name.clone(), written, expected: disk.data_bytes });
    }
    work.progress.end();
    Ok(written)
}

struct StopOnPanic<'a>(&'a AtomicBool);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

impl Work<'_> {
    fn fail(&self, error: RestoreError) {
        self.stop.store(true, Ordering::Relaxed);
        self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    fn piece(&self, piece: Piece) -> Result<(), RestoreError> {
        if self.cancel.is_cancelled() {
            return Err(RestoreError::Cancelled);
        }
        match piece {
            Piece::Zero { offset, len } => {
                self.image.clear(offset, len).map_err(|source| RestoreError::io("clear", self.path, source))?;
                self.progress.add(len);
            }
            Piece::Stored(index) => {
                let len = self.stored(index)?;
                self.written.fetch_add(len, Ordering::Relaxed);
                self.progress.add(len);
            }
        }
        Ok(())
    }

    fn stored(&self, index: u64) -> Result<u64, RestoreError> {
        let bytes = self.disk.segment(self.reader, index)?;
        let offset = index * self.disk.segment_len.bytes();
        self.image.write_at(&bytes, offset).map_err(|source| RestoreError::io("write to", self.path, source))?;
        Ok(bytes.len() as u64)
    }
}

struct Progress<'a> {
    events: &'a Events,
    disk: &'a str,
    todo: u64,
    state: Mutex<(u64, Instant)>,
}

impl<'a> Progress<'a> {
    fn start(events: &'a Events, disk: &'a str, todo: u64) -> Self {
        let progress = Self { events, disk, todo, state: Mutex::new((0, Instant::now())) };
        progress.send(0);
        progress
    }

    fn add(&self, bytes: u64) {
        // Sent under the lock, so that progress never goes backwards.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 += bytes;
        if state.1.elapsed() >= PROGRESS {
            state.1 = Instant::now();
            self.send(state.0);
        }
    }

    fn end(&self) {
        self.send(self.todo);
    }

    fn send(&self, done: u64) {
        self.events.send(Event::Progress { disk: self.disk.to_owned(), done, todo: self.todo });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::{DiskTables, SegmentLen, SegmentRecord, SegmentTable};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_cover_the_disk_once_and_in_order(
            indices in prop::collection::btree_set(0u64..40, 0..40),
            tail in 0u64..65536,
        ) {
            let segment_len = SegmentLen::new(64 << 10).expect("valid");
            let size = 40 * (64 << 10) - tail;
            let mut table = SegmentTable::new();
            for index in &indices {
                table.push(SegmentRecord { index: *index, stored_at: 0, digest: [0; 32] }).expect("ordered");
            }
            let data_bytes = table.data_bytes(segment_len, size);
            let disk = ArchivedDisk { name: "scsi0".into(), size, segment_len, data_bytes, tables: table.into() };
            let (mut at, mut stored) = (0, Vec::new());
            for piece in pieces(&disk) {
                let (offset, len) = match piece {
                    Piece::Zero { offset, len } => (offset, len),
                    Piece::Stored(index) => {
                        stored.push(index);
                        segment_len.range(index, size).expect("inside")
                    }
                };
                prop_assert_eq!(offset, at);
                prop_assert!(len > 0);
                at += len;
            }
            prop_assert_eq!(at, size);
            prop_assert_eq!(stored, indices.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn long_zero_ranges_come_in_bounded_pieces() {
        let segment_len = SegmentLen::new(4 << 20).expect("valid");
        let disk = ArchivedDisk {
            name: "scsi0".into(),
            size: 5 * MAX_CLEAR / 2,
            segment_len,
            data_bytes: 0,
            tables: DiskTables::default(),
        };
        let lens: Vec<u64> = pieces(&disk).map(|p| if let Piece::Zero { len, .. } = p { len } else { 0 }).collect();
        assert_eq!(lens, [MAX_CLEAR, MAX_CLEAR, MAX_CLEAR / 2]);
    }
}
