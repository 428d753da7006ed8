//! A snapshot access's export as an image: what changed can be read, and given away by punching holes.

use super::{
    buffers::Buffers,
    image::{Caching, Find, Image, ImageError, Punch, Span},
    ranges::Ranges,
    reads::Wanted,
    session::LARGEST_REQUEST,
};
use crate::{
    extent::{Extent, Extents},
    nbd::{Client, Lane, NbdError},
    segment::Content,
};
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicUsize, Ordering},
};
use tokio::task::JoinSet;

/// Holes that wait for their neighbours until clusters are complete. When there are more they are forgotten, which costs space in
/// the fleecing image.
const MOST_WAITING: usize = 1 << 16;

/// Bytes of the longest read that an export should be asked for on behalf of readers of files. From 128 KiB on QEMU takes the buffer
/// from the system and gives it back, which costs it half as much work again; a backup reads more at a time and gets more for it.
pub const LONGEST_READ: u32 = 96 << 10;

/// Bytes of buffers that are kept for the next reads.
const IDLE_BUFFERS: usize = 2 << 20;

/// What is particular about an export.
#[derive(Clone, Copy, Debug)]
pub struct ExportOptions {
    /// What discards have to be aligned to, bytes: [`crate::access::DiskAccess::granularity`], 64 KiB at least. QEMU 7.2
    /// aborts when asked for part of a cluster.
    pub grain: u64,
    /// [`crate::access::DiskAccess::largest_request`]; the clients have it as [`crate::nbd::ConnectOptions::longest_read`].
    pub largest_request: Option<u32>,
}

/// A disk of a snapshot access.
pub struct ExportImage {
    name: String,
    content: Extents<Content>,
    clients: Vec<Client>,
    lanes: Mutex<Vec<Lane<Wanted>>>,
    next: AtomicUsize,
    options: ExportOptions,
    buffers: Arc<Buffers>,
    punched: Mutex<Punched>,
}

#[derive(Default)]
struct Punched {
    /// As asked for.
    asked: Ranges,
    /// Whole clusters, which QEMU has been told about: they cannot be read any more.
    discarded: Ranges,
}

impl ExportImage {
    /// Shows the disk `name` that `clients` are connected to. What `content` says is clean is refused, what it says is zero is
    /// not read.
    pub fn new(name: String, content: Extents<Content>, clients: Vec<Client>, options: ExportOptions) -> Self {
        let options = ExportOptions { grain: options.grain.max(1), ..options };
        Self {
            name,
            content,
            clients,
            lanes: Mutex::default(),
            next: AtomicUsize::new(0),
            options,
            buffers: Buffers::new(IDLE_BUFFERS),
            punched: Mutex::default(),
        }
    }

    /// Reads of few bytes, and of what will be read next, go over `lanes`, where the file is mounted as an image.
    #[must_use]
    pub fn with_lanes(self, lanes: Vec<Lane<Wanted>>) -> Self {
        Self { lanes: Mutex::new(lanes), ..self }
    }

    /// The extents from the one that has `offset` on.
    fn from(&self, offset: u64) -> &[Extent<Content>] {
        let extents = self.content.iter().as_slice();
        &extents[extents.partition_point(|extent| extent.end() <= offset)..]
    }

    /// How far from `offset` on, at most to `end`, the disk can be read.
    fn readable_until(&self, offset: u64, end: u64) -> Result<u64, ImageError> {
        let mut until = end;
        for extent in self.from(offset) {
            if extent.offset >= end {
                break;
            }
            if extent.state == Content::Clean {
                until = extent.offset;
                break;
            }
        }
        if until <= offset {
            return Err(ImageError::Clean(offset));
        }
        let punched = self.punched.lock().unwrap_or_else(PoisonError::into_inner);
        if punched.discarded.end_at(offset).is_some() {
            return Err(ImageError::Discarded(offset));
        }
        Ok(punched.discarded.start_from(offset).map_or(until, |start| until.min(start)))
    }

    /// The parts of `offset..end` that have to be read, as they may be asked for.
    fn parts(&self, offset: u64, end: u64) -> Vec<(u64, u64)> {
        let mut parts = Vec::new();
        for extent in self.from(offset) {
            let (mut start, stop) = (extent.offset.max(offset), extent.end().min(end));
            if start >= stop {
                break;
            }
            if extent.state != Content::Data {
                continue;
            }
            if let Some(largest) = self.largest_request() {
                // The client cuts reads into pieces of this length, from their beginning on.
                let border = start.next_multiple_of(largest).min(stop);
                if border > start {
                    parts.push((start, border));
                    start = border;
                }
            }
            if start < stop {
                parts.push((start, stop));
            }
        }
        parts
    }

    /// [`ExportOptions::largest_request`]; requests do not cross its multiples.
    fn largest_request(&self) -> Option<u64> {
        self.options.largest_request.map(u64::from).filter(|largest| *largest > 0)
    }

    /// The connections, the next one first; a lost one is passed over.
    fn clients(&self) -> Vec<Client> {
        let first = self.next.fetch_add(1, Ordering::Relaxed) % self.clients.len().max(1);
        self.clients.iter().cycle().skip(first).take(self.clients.len()).cloned().collect()
    }
}

/// Reads `start..end` over the first connection that lives.
async fn read_part(clients: Vec<Client>, buffers: Arc<Buffers>, start: u64, end: u64) -> Result<Bytes, ImageError> {
    let mut lost = ImageError::Died;
    for client in clients {
        let block = u64::from(client.info().min_block.max(1));
        let from = start / block * block;
        let to = end.next_multiple_of(block).min(client.size());
        match client.read(from, buffers.take((to - from) as usize)).await {
            Ok((bytes, _)) => return Ok(buffers.freeze(bytes).slice((start - from) as usize..(end - from) as usize)),
            Err(error) if is_lost(&error) => lost = error.into(),
            Err(error) => return Err(error.into()),
        }
    }
    Err(lost)
}

/// Whether another connection may still live.
fn is_lost(error: &NbdError) -> bool {
    error.is_fatal() && !matches!(error, NbdError::TimedOut { .. })
}

#[async_trait]
impl Image for ExportImage {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.content.size()
    }

    fn data_bytes(&self) -> u64 {
        self.content.bytes_where(|content| content == Content::Data)
    }

    fn caching(&self) -> Caching {
        // Where something cannot be read, now or after a discard, the kernel would read ahead into that, and cut the file short
        // where a read is.
        let whole = self.content.iter().all(|extent| extent.state != Content::Clean);
        if whole && self.punching() == Punch::Refused { Caching::Cached } else { Caching::Direct }
    }

    fn longest_read(&self) -> u32 {
        // Where the kernel reads ahead, each answer can be used while the next is under way.
        match self.largest_request() {
            _ if self.caching() == Caching::Direct => LARGEST_REQUEST,
            // The kernel aligns what it asks for to its length.
            Some(largest) => LONGEST_READ.min(largest as u32),
            None => LONGEST_READ,
        }
    }

    fn punching(&self) -> Punch {
        if self.clients.iter().all(Client::can_trim) { Punch::Offered } else { Punch::Refused }
    }

    async fn read(&self, offset: u64, len: usize) -> Result<Bytes, ImageError> {
        let end = self.readable_until(offset, offset + len as u64)?;
        let parts = self.parts(offset, end);
        if let [(start, stop)] = parts[..]
            && (start, stop) == (offset, end)
        {
            return read_part(self.clients(), self.buffers.clone(), start, stop).await;
        }
        let mut whole = BytesMut::zeroed((end - offset) as usize);
        let mut wanted = JoinSet::new();
        for (start, stop) in parts {
            let (clients, buffers) = (self.clients(), self.buffers.clone());
            wanted.spawn(async move { (start, read_part(clients, buffers, start, stop).await) });
        }
        while let Some(read) = wanted.join_next().await {
            let (start, bytes) = read.map_err(|_| ImageError::Died)?;
            let (at, bytes) = ((start - offset) as usize, bytes?);
            whole[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        Ok(whole.freeze())
    }

    fn take_lanes(&self) -> Vec<Lane<Wanted>> {
        std::mem::take(&mut *self.lanes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn span(&self, offset: u64, most: u64) -> Option<Span> {
        let extent = self.from(offset).first()?;
        let until = self.readable_until(offset, extent.end().min(offset + most)).ok()?;
        match extent.state {
            Content::Clean => None,
            Content::Zero => Some(Span::Zero(until - offset)),
            Content::Data => {
                let border = self.largest_request().map_or(until, |largest| (offset + 1).next_multiple_of(largest));
                Some(Span::Data(until.min(border) - offset))
            }
        }
    }

    fn has_still(&self, offset: u64, len: usize) -> bool {
        let end = offset + len as u64;
        self.readable_until(offset, end).is_ok_and(|until| until == end)
    }

    async fn punch(&self, offset: u64, len: u64) -> Result<(), ImageError> {
        let (grain, size, end) = (self.options.grain, self.size(), offset + len);
        let (start, end) = {
            let mut punched = self.punched.lock().unwrap_or_else(PoisonError::into_inner);
            let (first, last) = punched.asked.insert(offset, end);
            if punched.asked.len() > MOST_WAITING {
                punched.asked.clear();
            }
            // The clusters that this hole touches and that are complete now, with the holes beside it. The disk's last cluster
            // may be short.
            let start = first.next_multiple_of(grain).max(offset / grain * grain);
            let whole = if last == size { size } else { last / grain * grain };
            let end = whole.min(end.next_multiple_of(grain));
            if start >= end {
                return Ok(());
            }
            punched.discarded.insert(start, end);
            (start, end)
        };
        let mut lost = ImageError::Died;
        for client in self.clients() {
            match client.trim(start, end - start).await {
                Ok(()) => return Ok(()),
                Err(error) if is_lost(&error) => lost = error.into(),
                Err(error) => return Err(error.into()),
            }
        }
        Err(lost)
    }

    fn find(&self, offset: u64, what: Find) -> Option<u64> {
        let punched = self.punched.lock().unwrap_or_else(PoisonError::into_inner);
        for extent in self.from(offset) {
            let (mut at, end) = (extent.offset.max(offset), extent.end());
            if extent.state != Content::Data {
                if what == Find::Hole {
                    return Some(at);
                }
                continue;
            }
            match what {
                Find::Data => {
                    while let Some(behind) = punched.discarded.end_at(at) {
                        at = behind;
                    }
                    if at < end {
                        return Some(at);
                    }
                }
                Find::Hole if punched.discarded.end_at(at).is_some() => return Some(at),
                Find::Hole => {
                    if let Some(start) = punched.discarded.start_from(at).filter(|start| *start < end) {
                        return Some(start);
                    }
                }
            }
        }
        None
    }
}
