//! Reading one disk: many requests in flight, segments in order.

use super::{
    Budget, CopyError,
    discard::{Discard, Ranges, Stored},
};
use crate::{
    access::fleecing::Witness,
    extent::Extents,
    nbd::Client,
    provider::SourceError,
    report::{Event, Events, spelled_out},
    segment::{Content, Segment, SegmentData, SegmentLen, Task, tasks},
};
use bytes::{Bytes, BytesMut};
use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, mpsc, mpsc::UnboundedSender},
    task::JoinHandle,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

/// What was done with one disk, in bytes.
#[derive(Debug, Default)]
pub struct Counters {
    /// Read from the export.
    pub read: AtomicU64,
    /// Dealt with, of what the map said there is to do.
    pub done: AtomicU64,
    /// Discarded from the snapshot access.
    pub discarded: AtomicU64,
}

/// How to read.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Largest read in bytes; at least one segment is read at a time.
    pub request: u64,
    /// Reads in flight per disk.
    pub in_flight: usize,
    /// Bytes a second, for all disks of the guest together.
    pub limit: Option<Arc<RateLimit>>,
    /// Memory.
    pub budget: Budget,
    /// Copy-before-write cluster: what discards are aligned to, in bytes.
    pub grain: u64,
}

/// Spreads reads over time.
#[derive(Debug)]
pub struct RateLimit {
    bytes_per_second: u64,
    free_at: Mutex<Instant>,
}

impl RateLimit {
    /// A limit in bytes a second, at least one.
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), free_at: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` more may be read.
    async fn wait(&self, bytes: u64) {
        let until = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            let start = (*free_at).max(Instant::now());
            *free_at = start + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
            start
        };
        tokio::time::sleep_until(until.into()).await;
    }
}

/// Reads a disk's changed segments; what a provider is given as [`crate::provider::DiskInput::changed`]. Starts with the
/// first `next`, so that the disks of a guest are read one after the other.
pub struct DiskReader {
    disk: String,
    state: State,
}

enum State {
    Waiting(Box<dyn FnOnce() -> mpsc::Receiver<Result<Segment, SourceError>> + Send>),
    Reading(mpsc::Receiver<Result<Segment, SourceError>>),
    Ended,
}

/// One disk to be read.
pub struct Source {
    /// Name as shown.
    pub disk: String,
    /// Segment length.
    pub segment_len: SegmentLen,
    /// What to look at.
    pub content: Extents<Content>,
    /// Whether a base archive is overwritten: only then zeroes have to be told.
    pub tell_zeroes: bool,
    /// What is read in no layer, offset and length: discarded at once, so that guest writes there need no copy.
    pub untouched: Vec<(u64, u64)>,
    /// Bytes that there are to do of the disk, in all its layers.
    pub todo: u64,
    /// Whether nothing of the disk is to be read behind this.
    pub last: bool,
    /// Connections to the export.
    pub clients: Vec<Client>,
    /// The fleecing image, which has to be unharmed when everything is read.
    pub fleecing: Option<Witness>,
    /// Where the counts go.
    pub counters: Arc<Counters>,
}

impl DiskReader {
    /// Prepares to read `source`; `failed` gets the error that ends it, for whoever wants more than its text. The returned
    /// slot holds the discard task once reading has started, to be awaited before the connections are closed.
    pub fn new(
        source: Source,
        settings: Settings,
        events: Events,
        cancel: CancellationToken,
        failed: Arc<Mutex<Option<CopyError>>>,
        discards: Arc<Mutex<Vec<JoinHandle<()>>>>,
    ) -> Self {
        let runtime = Handle::current();
        let disk = source.disk.clone();
        let start = move || {
            let (sender, receiver) = mpsc::channel(64);
            let _guard = runtime.enter();
            tokio::spawn(read_disk(source, settings, events, cancel, failed, discards, sender));
            receiver
        };
        Self { disk, state: State::Waiting(Box::new(start)) }
    }
}

impl Iterator for DiskReader {
    type Item = Result<Segment, SourceError>;

    /// Blocks; must not be called on a runtime's thread.
    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match std::mem::replace(&mut self.state, State::Ended) {
                State::Waiting(start) => self.state = State::Reading(start()),
                State::Reading(mut receiver) => {
                    let item = receiver.blocking_recv()?;
                    if item.is_ok() {
                        self.state = State::Reading(receiver);
                    }
                    return Some(item);
                }
                State::Ended => return None,
            }
        }
    }
}

impl std::fmt::Debug for DiskReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DiskReader({})", self.disk)
    }
}

/// Segments of zeroes in one batch: 4 GiB even of the smallest.
const MOST_ZEROES: usize = 1 << 16;

/// Neighbouring segments: in one read, or all known to be zero.
struct Batch {
    offset: u64,
    len: u64,
    segments: Vec<Task>,
}

/// Joins neighbouring segments of one kind: data up to `most` bytes, zeroes up to [`MOST_ZEROES`] segments.
fn batches(tasks: impl Iterator<Item = Task>, most: u64) -> impl Iterator<Item = Batch> {
    let mut tasks = tasks.peekable();
    std::iter::from_fn(move || {
        let first = tasks.next()?;
        let mut batch = Batch { offset: first.offset, len: first.len, segments: vec![first] };
        let fits = |batch: &Batch, next: &Task| {
            if first.zero { batch.segments.len() < MOST_ZEROES } else { batch.len + next.len <= most }
        };
        while let Some(next) =
            tasks.next_if(|t| t.zero == first.zero && t.offset == batch.offset + batch.len && fits(&batch, t))
        {
            batch.len += next.len;
            batch.segments.push(next);
        }
        Some(batch)
    })
}

async fn read_disk(
    source: Source,
    settings: Settings,
    events: Events,
    cancel: CancellationToken,
    failed: Arc<Mutex<Option<CopyError>>>,
    discards: Arc<Mutex<Vec<JoinHandle<()>>>>,
    sender: mpsc::Sender<Result<Segment, SourceError>>,
) {
    let (stored, orders) = mpsc::unbounded_channel();
    if let Some(client) = source.clients.first().filter(|c| c.can_trim()) {
        let discard = Discard {
            disk: source.disk.clone(),
            size: source.content.size(),
            grain: settings.grain,
            client: client.clone(),
            counters: source.counters.clone(),
            events: events.clone(),
            waiting: Ranges::default(),
        };
        discards.lock().unwrap_or_else(PoisonError::into_inner).push(tokio::spawn(discard.run(orders)));
    }
    for (offset, len) in &source.untouched {
        let _ = stored.send(Stored { offset: *offset, len: *len });
    }
    let disk = source.disk.clone();
    let mut send_failure = None;
    let result = tokio::select! {
        biased;
        () = cancel.cancelled() => Err("cancelled".to_owned()),
        result = pump(&source, &settings, &events, &stored, &sender) => result.map_err(|error| {
            let text = spelled_out(&error);
            send_failure = Some(error);
            text
        }),
    };
    if let Some(error) = send_failure {
        failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }
    match result {
        Ok(()) if source.last => events.send(Event::DiskDone { disk }),
        Ok(()) => {}
        // A provider that has gone away knows why.
        Err(message) => drop(sender.send(Err(SourceError { disk, message })).await),
    }
}

type Flight = VecDeque<AbortOnDropHandle<Result<Vec<Segment>, CopyError>>>;

/// Whether the provider is still there.
#[derive(PartialEq)]
enum Provider {
    Listening,
    Gone,
}

/// Reads the whole disk. Ends early, with success, when the provider has gone away: it knows why.
async fn pump(
    source: &Source,
    settings: &Settings,
    events: &Events,
    stored: &UnboundedSender<Stored>,
    sender: &mpsc::Sender<Result<Segment, SourceError>>,
) -> Result<(), CopyError> {
    let todo = source.todo;
    let mut flight = Flight::new();
    let mut clients = source.clients.iter().cycle();
    let buffers = Arc::new(Buffers { most: settings.in_flight, ..Buffers::default() });
    let mut progress = Progress { disk: &source.disk, todo, counters: &source.counters, events, told: Instant::now() };
    progress.send();
    for batch in batches(tasks(&source.content, source.segment_len), settings.request) {
        if batch.segments[0].zero {
            source.counters.done.fetch_add(batch.len, Ordering::Relaxed);
            let _ = stored.send(Stored { offset: batch.offset, len: batch.len });
            if source.tell_zeroes {
                flight.push_back(AbortOnDropHandle::new(tokio::spawn(async move {
                    Ok(batch.segments.into_iter().map(|t| Segment { index: t.index, data: None }).collect())
                })));
            }
        } else {
            if let Some(limit) = &settings.limit {
                limit.wait(batch.len).await;
            }
            // What is in flight holds a part of the budget, and gives it back only when it is handed over.
            let share = loop {
                if let Some(share) = settings.budget.try_take(batch.len) {
                    break share;
                }
                if flight.is_empty() {
                    let Some(share) = settings.budget.take(batch.len).await else { return Ok(()) };
                    break share;
                }
                if hand_over(source, &mut flight, sender).await? == Provider::Gone {
                    return Ok(());
                }
            };
            let Some(client) = clients.next() else { return Ok(()) };
            let read = read_batch(
                source.disk.clone(),
                client.clone(),
                batch,
                share,
                buffers.clone(),
                source.counters.clone(),
                stored.clone(),
            );
            flight.push_back(AbortOnDropHandle::new(tokio::spawn(read)));
        }
        while flight.len() >= settings.in_flight {
            if hand_over(source, &mut flight, sender).await? == Provider::Gone {
                return Ok(());
            }
        }
        progress.tell();
    }
    while !flight.is_empty() {
        if hand_over(source, &mut flight, sender).await? == Provider::Gone {
            return Ok(());
        }
        progress.tell();
    }
    if source.last {
        events.send(Event::Progress { disk: source.disk.clone(), done: todo, todo });
    }
    Ok(())
}

struct Progress<'a> {
    disk: &'a str,
    todo: u64,
    counters: &'a Counters,
    events: &'a Events,
    told: Instant,
}

impl Progress<'_> {
    fn tell(&mut self) {
        if self.told.elapsed() >= Duration::from_millis(100) {
            self.told = Instant::now();
            self.send();
        }
    }

    fn send(&self) {
        let done = self.counters.done.load(Ordering::Relaxed).min(self.todo);
        self.events.send(Event::Progress { disk: self.disk.to_owned(), done, todo: self.todo });
    }
}

/// Hands the oldest read over; the last one only if the fleecing image is unharmed.
async fn hand_over(
    source: &Source,
    flight: &mut Flight,
    sender: &mpsc::Sender<Result<Segment, SourceError>>,
) -> Result<Provider, CopyError> {
    let Some(oldest) = flight.pop_front() else { return Ok(Provider::Listening) };
    let segments = match oldest.await {
        Ok(result) => result?,
        // The runtime is shutting down.
        Err(_) => return Ok(Provider::Gone),
    };
    if flight.is_empty()
        && let Some(harm) = source.fleecing.as_ref().and_then(Witness::harm)
    {
        return Err(CopyError::Fleecing { disk: source.disk.clone(), harm });
    }
    for segment in segments {
        if sender.send(Ok(segment)).await.is_err() {
            return Ok(Provider::Gone);
        }
    }
    Ok(Provider::Listening)
}

/// Memory of reads, used again: fresh pages cost more than what is read into them.
#[derive(Debug, Default)]
struct Buffers {
    free: Mutex<Vec<BytesMut>>,
    /// How many are kept.
    most: usize,
}

impl Buffers {
    /// A buffer of `len` bytes with any content.
    fn take(&self, len: usize) -> BytesMut {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut buffer = free.unwrap_or_default();
        buffer.resize(len, 0);
        buffer
    }
}

/// The bytes of one read. When the last segment of it is dropped, the memory is used again and its share of the budget free.
struct ReadBytes {
    buffer: BytesMut,
    buffers: Arc<Buffers>,
    _share: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for ReadBytes {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for ReadBytes {
    fn drop(&mut self) {
        let mut free = self.buffers.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < self.buffers.most {
            free.push(std::mem::take(&mut self.buffer));
        }
    }
}

async fn read_batch(
    disk: String,
    client: Client,
    batch: Batch,
    share: OwnedSemaphorePermit,
    buffers: Arc<Buffers>,
    counters: Arc<Counters>,
    stored: UnboundedSender<Stored>,
) -> Result<Vec<Segment>, CopyError> {
    let buffer = buffers.take(batch.len as usize);
    let (buffer, holes) =
        client.read(batch.offset, buffer).await.map_err(|source| CopyError::reading(&disk, batch.offset, source))?;
    counters.read.fetch_add(batch.len, Ordering::Relaxed);
    let mut rest = Bytes::from_owner(ReadBytes { buffer, buffers, _share: share });
    let mut segments = Vec::with_capacity(batch.segments.len());
    for task in batch.segments {
        let bytes = rest.split_to(task.len as usize);
        counters.done.fetch_add(task.len, Ordering::Relaxed);
        let range = Stored { offset: task.offset, len: task.len };
        if holes || is_zero(&bytes) {
            let _ = stored.send(range);
            segments.push(Segment { index: task.index, data: None });
            continue;
        }
        let stored = stored.clone();
        let data = SegmentData::new(bytes, move |was_stored| {
            if was_stored {
                let _ = stored.send(range);
            }
        });
        segments.push(Segment { index: task.index, data: Some(data) });
    }
    Ok(segments)
}

/// Whether every byte is zero: the first is, and each equals its neighbour (one `memcmp`).
fn is_zero(bytes: &Bytes) -> bool {
    bytes.first().is_none_or(|b| *b == 0) && bytes[1.min(bytes.len())..] == bytes[..bytes.len().saturating_sub(1)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_are_seen_wherever_they_end() {
        assert!(is_zero(&Bytes::new()));
        assert!(is_zero(&Bytes::from(vec![0; 1])));
        assert!(is_zero(&Bytes::from(vec![0; 4097])));
        for at in [0, 1, 2000, 4096] {
            let mut bytes = vec![0; 4097];
            bytes[at] = 1;
            assert!(!is_zero(&bytes.into()), "{at}");
        }
        assert!(!is_zero(&Bytes::from(vec![1; 2])));
    }

    #[test]
    fn neighbours_are_read_together_up_to_the_limit() {
        let task = |index: u64, zero| Task { index, offset: index * 10, len: 10, zero };
        let list = [
            task(0, false),
            task(1, false),
            task(2, false),
            task(3, true),
            task(4, true),
            task(6, false),
            task(8, false),
        ];
        let found: Vec<(u64, u64)> = batches(list.into_iter(), 20).map(|b| (b.offset, b.len)).collect();
        assert_eq!(found, [(0, 20), (20, 10), (30, 20), (60, 10), (80, 10)]);
    }
}
