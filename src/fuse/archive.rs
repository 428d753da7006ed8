//! An archive's disks as images.
//!
//! The archive is not trusted: its manifest and tables are checked before anything is shown, and every segment is compared with
//! its digest before a byte of it is given out.

use super::image::{Caching, Find, Image, ImageError, Punch};
use crate::{
    archive::Manifest,
    provider::ArchiveReader,
    restore::{ArchivedDisk, RestoreError, read_disks},
};
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::{
    sync::{OnceCell, Semaphore},
    task::{JoinSet, spawn_blocking},
};

/// Segments of all disks of an archive that are kept in memory, bytes.
const CACHE: u64 = 64 << 20;
/// Segments that are read at a time; as in a restore.
const MOST_READS: usize = 32;

/// Reads manifest and tables of an archive, checks them, and makes an image of every disk. Blocks.
///
/// # Errors
/// Those of a restore that concern the archive.
pub fn open(reader: Arc<dyn ArchiveReader>) -> Result<(Manifest, Vec<Arc<dyn Image>>), RestoreError> {
    let (manifest, disks) = read_disks(reader.as_ref())?;
    let longest = disks.iter().map(|disk| disk.segment_len.bytes()).max().unwrap_or(CACHE);
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let source = Arc::new(Source {
        reader,
        reads: Arc::new(Semaphore::new((cpus * 2).clamp(4, MOST_READS))),
        cache: Mutex::new(Cache { slots: HashMap::new(), most: (CACHE / longest.max(1)).max(1) as usize, uses: 0 }),
    });
    let image = |(number, disk)| -> Arc<dyn Image> {
        Arc::new(ArchiveImage { number, disk: Arc::new(disk), source: source.clone() })
    };
    Ok((manifest, disks.into_iter().enumerate().map(image).collect()))
}

/// What the images of an archive share.
struct Source {
    reader: Arc<dyn ArchiveReader>,
    reads: Arc<Semaphore>,
    cache: Mutex<Cache>,
}

/// A segment, or the place where those who want it wait for the one who reads it.
type Slot = Arc<OnceCell<Bytes>>;

/// The segments used last.
struct Cache {
    /// By number of the disk and index of the segment, each with the count of uses when it was used last.
    slots: HashMap<(usize, u64), (Slot, u64)>,
    most: usize,
    uses: u64,
}

impl Cache {
    fn slot(&mut self, key: (usize, u64)) -> Slot {
        self.uses += 1;
        let uses = self.uses;
        if let Some((slot, used)) = self.slots.get_mut(&key) {
            *used = uses;
            return slot.clone();
        }
        if self.slots.len() >= self.most
            && let Some(oldest) = self.slots.iter().min_by_key(|(_, (_, used))| *used).map(|(key, _)| *key)
        {
            self.slots.remove(&oldest);
        }
        let slot = Slot::default();
        self.slots.insert(key, (slot.clone(), uses));
        slot
    }
}

struct ArchiveImage {
    number: usize,
    disk: Arc<ArchivedDisk>,
    source: Arc<Source>,
}

/// A stored segment, from the cache or the archive.
async fn segment(source: Arc<Source>, number: usize, disk: Arc<ArchivedDisk>, index: u64) -> Result<Bytes, ImageError> {
    let slot = source.cache.lock().unwrap_or_else(PoisonError::into_inner).slot((number, index));
    let read = async {
        let permit = source.reads.clone().acquire_owned().await.map_err(|_| ImageError::Died)?;
        let reader = source.reader.clone();
        let read = spawn_blocking(move || {
            // Held to the end, also when nobody waits any more.
            let _permit = permit;
            disk.segment(reader.as_ref(), index)
        });
        Ok(read.await.map_err(|_| ImageError::Died)??)
    };
    slot.get_or_try_init(|| read).await.cloned()
}

impl ArchiveImage {
    fn next_stored(&self, index: u64) -> Option<u64> {
        self.disk.tables.next_stored(self.disk.segment_len, index)
    }
}

#[async_trait]
impl Image for ArchiveImage {
    fn name(&self) -> &str {
        &self.disk.name
    }

    fn size(&self) -> u64 {
        self.disk.size
    }

    fn data_bytes(&self) -> u64 {
        self.disk.data_bytes
    }

    fn caching(&self) -> Caching {
        Caching::Cached
    }

    fn punching(&self) -> Punch {
        Punch::Refused
    }

    async fn read(&self, offset: u64, len: usize) -> Result<Bytes, ImageError> {
        let segment_len = self.disk.segment_len.bytes();
        let end = offset + len as u64;
        let mut wanted = JoinSet::new();
        let mut next = self.next_stored(offset / segment_len);
        while let Some(index) = next.filter(|index| index * segment_len < end) {
            let segment = segment(self.source.clone(), self.number, self.disk.clone(), index);
            wanted.spawn(async move { (index * segment_len, segment.await) });
            next = self.next_stored(index + 1);
        }
        let mut whole = BytesMut::new();
        while let Some(read) = wanted.join_next().await {
            let (start, bytes) = read.map_err(|_| ImageError::Died)?;
            let bytes = bytes?;
            let (from, to) = (start.max(offset), (start + bytes.len() as u64).min(end));
            let bytes = bytes.slice((from - start) as usize..(to - start) as usize);
            if bytes.len() == len {
                return Ok(bytes);
            }
            if whole.is_empty() {
                whole = BytesMut::zeroed(len);
            }
            whole[(from - offset) as usize..(to - offset) as usize].copy_from_slice(&bytes);
        }
        Ok(if whole.is_empty() { BytesMut::zeroed(len).freeze() } else { whole.freeze() })
    }

    async fn punch(&self, _: u64, _: u64) -> Result<(), ImageError> {
        Err(ImageError::NotSupported)
    }

    fn find(&self, offset: u64, what: Find) -> Option<u64> {
        let segment_len = self.disk.segment_len.bytes();
        let mut index = offset / segment_len;
        match what {
            Find::Data => self.next_stored(index).map(|index| offset.max(index * segment_len)),
            Find::Hole => {
                while self.next_stored(index) == Some(index) {
                    index += 1;
                }
                let hole = offset.max(index.saturating_mul(segment_len));
                (hole < self.disk.size).then_some(hole)
            }
        }
    }
}
