//! The state of one connection in its transmission phase: what is in flight, what is not sent yet, and how it ends.
//!
//! A dropped caller leaves its request, buffer included, here; the receiver finishes it and throws it away, so that the stream
//! stays in step.

use super::{
    coverage::Coverage,
    error::NbdError,
    handshake::ExportInfo,
    wire::{Asked, Command, StatusExtent, Violation, encode_request},
};
use bytes::BytesMut;
use nix::sys::socket::{Shutdown, shutdown};
use std::{
    collections::HashMap,
    io,
    os::fd::AsRawFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    net::UnixStream,
    sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot},
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

/// Requests in flight on one connection; further ones wait. QEMU works on 16 of a client's requests at a time, the others hide
/// the way to it.
pub const MAX_IN_FLIGHT: usize = 64;

/// Chunks for finished requests that are skipped before the connection is given up. QEMU sends at most one for every further
/// context of a block status that failed.
const MAX_STRAYS: u32 = 4096;

/// How long an orderly leave waits for the server to hang up, so that its export is free when we say so.
const FAREWELL: Duration = Duration::from_secs(2);

/// `ESHUTDOWN` as the protocol numbers it.
const ESHUTDOWN: u32 = 108;

/// A request's result while it grows.
#[derive(Debug)]
pub(super) enum Work {
    Read { buffer: BytesMut, covered: Coverage, data: bool },
    Status { context: u32, extents: Option<Vec<StatusExtent>>, contexts_seen: Vec<u32> },
    Trim,
}

impl Work {
    /// Whether the server may end its reply here without an error.
    fn finished(&self, asked: &Asked) -> Result<(), Violation> {
        match self {
            Self::Read { covered, .. } if !covered.is_complete() => {
                Err(Violation(format!("the reply to {asked} ends without byte {}", covered.first_missing())))
            }
            Self::Status { extents: None, context, .. } => {
                Err(Violation(format!("the reply to {asked} says nothing about context {context}")))
            }
            _ => Ok(()),
        }
    }
}

/// Where the result of a request arrives.
pub(super) type Pending = oneshot::Receiver<Result<Work, NbdError>>;

struct InFlight {
    asked: Asked,
    /// Absent while the receiver works on it.
    work: Option<Work>,
    failure: Option<(u32, String)>,
    sent: Instant,
    answer: oneshot::Sender<Result<Work, NbdError>>,
    _permit: OwnedSemaphorePermit,
}

struct State {
    in_flight: HashMap<u64, InFlight>,
    /// Cookies count up and are never used twice, so that a late chunk is told from one that was never asked for.
    next_cookie: u64,
    strays: u32,
    leaving: bool,
    end: Option<NbdError>,
}

pub(super) struct Connection {
    pub(super) stream: UnixStream,
    pub(super) info: ExportInfo,
    deadline: Duration,
    state: Mutex<State>,
    /// What the socket did not take at once; bounded by the requests in flight.
    unsent: Mutex<Vec<u8>>,
    unsent_grew: Notify,
    /// Nothing is in flight, or nothing is unsent, any more.
    settled: Notify,
    ended: CancellationToken,
    permits: Arc<Semaphore>,
}

/// A lock held over no await and no foreign code: a panic in between would be a bug, and the data are still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Connection {
    /// Takes over a stream on which `info` was negotiated, and starts the two tasks. They end with the connection.
    pub(super) fn start(stream: UnixStream, info: ExportInfo, deadline: Duration) -> Arc<Self> {
        let state = State { in_flight: HashMap::new(), next_cookie: 1, strays: 0, leaving: false, end: None };
        let connection = Arc::new(Self {
            stream,
            info,
            deadline,
            state: Mutex::new(state),
            unsent: Mutex::default(),
            unsent_grew: Notify::new(),
            settled: Notify::new(),
            ended: CancellationToken::new(),
            permits: Arc::new(Semaphore::new(MAX_IN_FLIGHT)),
        });
        let (receiver, keeper) = (Arc::clone(&connection), Arc::clone(&connection));
        tokio::spawn(async move {
            let ended = receiver.ended.clone();
            tokio::select! {
                () = ended.cancelled() => {}
                end = receiver.receive() => receiver.fail(&end),
            }
        });
        tokio::spawn(async move { keeper.keep().await });
        connection
    }

    /// Sends a request. The receiver of the result may be dropped at any time.
    pub(super) async fn submit(&self, asked: Asked, work: Work) -> Result<Pending, NbdError> {
        let permit = Arc::clone(&self.permits).acquire_owned().await.map_err(|_| self.closed())?;
        let only_context = match work {
            Work::Status { context, .. } if self.info.contexts.len() > 1 && self.info.can_select_context() => {
                Some(context)
            }
            _ => None,
        };
        let (answer, result) = oneshot::channel();
        let cookie = {
            let mut state = lock(&self.state);
            if state.end.is_some() || state.leaving {
                drop(state);
                return Err(self.closed());
            }
            let cookie = state.next_cookie;
            state.next_cookie += 1;
            let sent = Instant::now();
            let entry = InFlight { asked, work: Some(work), failure: None, sent, answer, _permit: permit };
            state.in_flight.insert(cookie, entry);
            cookie
        };
        self.send(encode_request(self.info.framing, cookie, &asked, only_context).as_slice());
        Ok(result)
    }

    pub(super) fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Waits for the result of a request.
    pub(super) async fn result(&self, result: Pending) -> Result<Work, NbdError> {
        result.await.unwrap_or_else(|_| Err(self.closed()))
    }

    /// What a request is told that comes too late.
    pub(super) fn closed(&self) -> NbdError {
        match &lock(&self.state).end {
            None => NbdError::Closed { cause: None },
            Some(closed @ NbdError::Closed { .. }) => closed.clone(),
            Some(cause) => NbdError::Closed { cause: Some(Arc::new(cause.clone())) },
        }
    }

    /// Writes without waiting; the keeper sends what does not go through. A caller that is dropped can thus never leave half a
    /// request on the wire.
    fn send(&self, bytes: &[u8]) {
        let mut unsent = lock(&self.unsent);
        let written = if unsent.is_empty() { self.stream.try_write(bytes) } else { Ok(0) };
        match written {
            Ok(written) if written == bytes.len() => return,
            Ok(written) => unsent.extend_from_slice(&bytes[written..]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => unsent.extend_from_slice(bytes),
            Err(error) => {
                drop(unsent);
                return self.write_failed(error);
            }
        }
        drop(unsent);
        self.unsent_grew.notify_one();
    }

    #[cfg(test)]
    pub(super) fn unsent_bytes(&self) -> usize {
        lock(&self.unsent).len()
    }

    fn flush(&self) {
        let mut unsent = lock(&self.unsent);
        if unsent.is_empty() {
            return;
        }
        match self.stream.try_write(&unsent) {
            Ok(written) => {
                unsent.drain(..written);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                unsent.clear();
                drop(unsent);
                return self.write_failed(error);
            }
        }
        if unsent.is_empty() {
            self.settled.notify_waiters();
        }
    }

    fn write_failed(&self, error: io::Error) {
        match error.kind() {
            // The server hung up, and the receiver may still find out why: its last answers can be unread in the socket.
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {}
            _ => self.fail(&NbdError::io("write to", error)),
        }
    }

    /// Sends the unsent and watches the deadlines, which needs no timer per request: they are all equally long, so a look at
    /// the oldest one says how long to sleep, and what comes later expires later.
    async fn keep(&self) {
        loop {
            let Some(next) = self.expire() else { return };
            let unsent = !lock(&self.unsent).is_empty();
            tokio::select! {
                () = self.ended.cancelled() => return,
                () = sleep_until(next) => {}
                () = self.unsent_grew.notified() => {}
                ready = self.stream.writable(), if unsent => match ready {
                    Ok(()) => self.flush(),
                    Err(error) => self.fail(&NbdError::io("write to", error)),
                },
            }
        }
    }

    /// Ends the connection when a request is overdue, else says when to look again.
    fn expire(&self) -> Option<Instant> {
        let oldest = {
            let state = lock(&self.state);
            state.in_flight.values().min_by_key(|entry| entry.sent).map(|entry| (entry.sent, entry.asked))
        };
        let now = Instant::now();
        match oldest {
            Some((sent, asked)) if now >= sent + self.deadline => {
                self.fail(&NbdError::TimedOut { doing: asked.to_string(), after: self.deadline });
                None
            }
            Some((sent, _)) => Some(sent + self.deadline),
            None => Some(now + self.deadline),
        }
    }

    /// Ends the connection; the first cause stays. Every request under way hears of it.
    fn fail(&self, end: &NbdError) {
        let orphans = {
            let mut state = lock(&self.state);
            if state.end.is_some() {
                return;
            }
            state.end = Some(end.clone());
            std::mem::take(&mut state.in_flight)
        };
        self.permits.close();
        let now = Instant::now();
        for (_, entry) in orphans {
            let told = match end {
                NbdError::TimedOut { after, .. } if now >= entry.sent + self.deadline => {
                    NbdError::TimedOut { doing: entry.asked.to_string(), after: *after }
                }
                NbdError::TimedOut { .. } => NbdError::Closed { cause: Some(Arc::new(end.clone())) },
                end => end.clone(),
            };
            // A caller that is gone needs no answer.
            let _ = entry.answer.send(Err(told));
        }
        self.ended.cancel();
        self.settled.notify_waiters();
        // The descriptor lives as long as the last clone; the server shall know now. It may have closed first.
        let _ = shutdown(self.stream.as_raw_fd(), Shutdown::Both);
    }

    /// See [`super::Client::disconnect`].
    pub(super) async fn disconnect(&self) -> Result<(), NbdError> {
        let first = {
            let mut state = lock(&self.state);
            let first = !std::mem::replace(&mut state.leaving, true);
            if first && state.end.is_some() {
                drop(state);
                return Err(self.closed());
            }
            first
        };
        self.permits.close();
        if first {
            let asked = Asked { command: Command::Disconnect, offset: 0, len: 0 };
            let leave = async {
                self.settle(|| self.is_idle()).await?;
                self.send(encode_request(self.info.framing, 0, &asked, None).as_slice());
                self.settle(|| lock(&self.unsent).is_empty()).await
            };
            let left = timeout(self.deadline, leave).await.unwrap_or_else(|_| {
                Err(NbdError::TimedOut { doing: Command::Disconnect.to_string(), after: self.deadline })
            });
            if let Err(error) = left {
                self.fail(&error);
                return Err(error);
            }
        }
        let patience = if first { FAREWELL.min(self.deadline) } else { self.deadline.saturating_add(FAREWELL) };
        let _ = timeout(patience, self.ended.cancelled()).await;
        self.fail(&NbdError::Closed { cause: None });
        Ok(())
    }

    /// Whether the connection stands and nothing is in flight.
    fn is_idle(&self) -> bool {
        let state = lock(&self.state);
        state.end.is_none() && state.in_flight.is_empty()
    }

    async fn settle(&self, settled: impl Fn() -> bool) -> Result<(), NbdError> {
        loop {
            let woken = self.settled.notified();
            // In this order: a server may hang up before we look whether it got everything.
            if settled() {
                return Ok(());
            }
            if self.ended.is_cancelled() {
                return Err(self.closed());
            }
            woken.await;
        }
    }

    /// The last user is gone: tell the server if that needs no waiting, and end the tasks.
    pub(super) fn abandon(&self) {
        let leaving = lock(&self.state).leaving;
        if !leaving && self.is_idle() {
            let asked = Asked { command: Command::Disconnect, offset: 0, len: 0 };
            self.send(encode_request(self.info.framing, 0, &asked, None).as_slice());
        }
        self.fail(&NbdError::Closed { cause: None });
    }

    /// Lends a request's result to the receiver; `None` for a request that is finished already.
    pub(super) fn take(&self, cookie: u64) -> Result<Option<(Asked, Work)>, Violation> {
        let mut state = lock(&self.state);
        if let Some(entry) = state.in_flight.get_mut(&cookie) {
            return match entry.work.take() {
                Some(work) => Ok(Some((entry.asked, work))),
                None => Err(Violation(format!("a chunk for {} inside another of its chunks", entry.asked))),
            };
        }
        if cookie == 0 || cookie >= state.next_cookie {
            return Err(Violation(format!("a reply to request {cookie}, which was never sent")));
        }
        // QEMU ends a block status with an error when one of its contexts fails, and yet sends the others.
        state.strays += 1;
        if state.strays > MAX_STRAYS {
            return Err(Violation(format!("more than {MAX_STRAYS} chunks for requests that were answered before")));
        }
        Ok(None)
    }

    /// Gives back what [`Self::take`] lent. `failure` is an error that the server reported; the first one counts.
    pub(super) fn put(
        &self,
        cookie: u64,
        work: Work,
        failure: Option<(u32, String)>,
        last: bool,
    ) -> Result<(), Violation> {
        let mut state = lock(&self.state);
        if !last {
            if let Some(entry) = state.in_flight.get_mut(&cookie) {
                entry.work = Some(work);
                entry.failure = entry.failure.take().or(failure);
            }
            return Ok(());
        }
        // Absent when the connection ended meanwhile, and then the caller knows.
        let Some(entry) = state.in_flight.remove(&cookie) else { return Ok(()) };
        if state.in_flight.is_empty() && state.leaving {
            self.settled.notify_waiters();
        }
        drop(state);

        let Asked { command, offset, len } = entry.asked;
        let (result, verdict) = match entry.failure.or(failure) {
            Some((ESHUTDOWN, text)) => (Err(NbdError::ShuttingDown { text }), Ok(())),
            Some((errno, text)) => (Err(NbdError::Refused { command, offset, len, errno, text }), Ok(())),
            None => match work.finished(&entry.asked) {
                Ok(()) => (Ok(work), Ok(())),
                Err(violation) => (Err(violation.clone().into()), Err(violation)),
            },
        };
        let _ = entry.answer.send(result);
        verdict
    }
}
