//! A connection for many small reads, owned by one thread: it gathers requests, sends them in one go, takes whatever has come in
//! one go, and hands the bytes on from where they came. No task and no other thread wakes up for it.
//!
//! It answers what a server that keeps to the protocol answers with data. Whatever else happens, an error in a reply or the end of
//! the connection, the reads go back to their owner, who asks [`super::Client`]: what to make of failures is written there, once.

use super::{
    ConnectOptions, ExportInfo, NbdError,
    client::dial,
    coverage::Coverage,
    handshake::negotiate,
    wire::{
        Asked, Chunk, Command, MAX_ERROR_PAYLOAD, MAX_HEADER, Payload, Reply, Violation, decode_header, decode_hole,
        encode_request, expect_payload, header_len, place, u32_at, u64_at,
    },
};
use std::{
    collections::HashMap,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

/// So many whole replies have room where they are received: one that has come in part seldom has to be moved for the rest of it.
const STAGED: usize = 4;

/// One read under way.
struct Asking<T> {
    asked: Asked,
    begun: Instant,
    owner: T,
    /// What came in pieces. One piece that is the whole is never copied.
    pieces: Option<(Vec<u8>, Coverage)>,
    refused: bool,
}

/// A connection whose reads belong to `T`s.
pub struct Lane<T> {
    stream: UnixStream,
    info: ExportInfo,
    longest_read: u32,
    in_flight: HashMap<u64, Asking<T>>,
    /// Cookies count up, so that a reply to what was never asked is told from others.
    next_cookie: u64,
    unsent: Vec<u8>,
    /// Received and not taken apart yet: `stage[start..end]`.
    stage: Box<[u8]>,
    start: usize,
    end: usize,
    ended: bool,
}

impl<T> Lane<T> {
    /// Connects and negotiates as [`super::Client::connect`] does. [`ConnectOptions::contexts`] are not needed.
    ///
    /// # Errors
    /// As there.
    pub async fn connect(options: &ConnectOptions) -> Result<Self, NbdError> {
        dial(options, async |stream| Self::start(stream, options).await).await
    }

    /// Opens `count` connections, and only one to a server that does not promise that several see the same data.
    ///
    /// # Errors
    /// As [`Lane::connect`].
    pub async fn several(options: &ConnectOptions, count: usize) -> Result<Vec<Self>, NbdError> {
        let mut lanes = vec![Self::connect(options).await?];
        while lanes.len() < count && lanes[0].info.can_multi_conn() {
            lanes.push(Self::connect(options).await?);
        }
        Ok(lanes)
    }

    /// Negotiates on a stream that is connected already.
    pub(super) async fn start(mut stream: tokio::net::UnixStream, options: &ConnectOptions) -> Result<Self, NbdError> {
        let info = negotiate(&mut stream, &options.export, &options.contexts).await?;
        // Stays non-blocking.
        let stream = stream.into_std().map_err(|error| NbdError::io("take", error))?;
        let longest_read = info.max_block.min(options.longest_read);
        let whole_reply = MAX_HEADER + 8 + (longest_read as usize).max(MAX_ERROR_PAYLOAD as usize);
        Ok(Self {
            stream,
            info,
            longest_read,
            in_flight: HashMap::new(),
            next_cookie: 1,
            unsent: Vec::new(),
            stage: vec![0; STAGED * whole_reply].into(),
            start: 0,
            end: 0,
            ended: false,
        })
    }

    /// Reads that are under way.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Whether [`Lane::send`] has something left to do, when the socket takes it.
    pub fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// When the read that waits longest began.
    pub fn oldest(&self) -> Option<Instant> {
        self.in_flight.values().map(|asking| asking.begun).min()
    }

    /// Gathers a read of `len` bytes at `offset` for the next [`Lane::send`].
    ///
    /// # Errors
    /// `owner` comes back when it cannot be asked for here: it has no bytes or too many, is out of bounds or not aligned, or the
    /// connection has ended.
    pub fn ask(&mut self, offset: u64, len: usize, begun: Instant, owner: T) -> Result<(), T> {
        let asked = Asked { command: Command::Read, offset, len: len as u64 };
        let fits = (1..=u64::from(self.longest_read)).contains(&asked.len) && self.info.has(offset, asked.len);
        if self.ended || !fits {
            return Err(owner);
        }
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        self.unsent.extend_from_slice(encode_request(self.info.framing, cookie, &asked, None).as_slice());
        self.in_flight.insert(cookie, Asking { asked, begun, owner, pieces: None, refused: false });
        Ok(())
    }

    /// Sends what was gathered, as far as the socket takes it. An error shows in [`Lane::receive`].
    pub fn send(&mut self) {
        while !self.unsent.is_empty() {
            match (&self.stream).write(&self.unsent) {
                Ok(sent) if sent == self.unsent.len() => self.unsent.clear(),
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // Its last answers may be there to be read; then it shows that it has ended.
                Err(_) => self.unsent.clear(),
            }
        }
    }

    /// Takes what has come, without waiting: `done` gets the bytes of each read that is answered, and none for one that has to be
    /// asked elsewhere. Tells whether something came.
    pub fn receive(&mut self, mut done: impl FnMut(T, Option<&[u8]>)) -> bool {
        if self.ended {
            return false;
        }
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.stage.len() - self.start < self.stage.len() / STAGED {
            self.stage.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        match (&self.stream).read(&mut self.stage[self.end..]) {
            Ok(0) => self.end(done),
            Ok(came) => {
                self.end += came;
                if let Err(Violation(what)) = self.take_apart(&mut done) {
                    tracing::debug!("the NBD server breaks the protocol: {what}");
                    self.end(done);
                }
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return false;
            }
            Err(_) => self.end(done),
        }
        true
    }

    /// Ends the connection when a read has waited for longer than `patience`. `late` gets those, `done` the others.
    pub fn expire(
        &mut self,
        now: Instant,
        patience: Duration,
        mut late: impl FnMut(T),
        mut done: impl FnMut(T, Option<&[u8]>),
    ) {
        if self.oldest().is_some_and(|begun| now.duration_since(begun) >= patience) {
            for (_, asking) in self.in_flight.drain() {
                if now.duration_since(asking.begun) >= patience {
                    late(asking.owner);
                } else {
                    done(asking.owner, None);
                }
            }
            self.end(done);
        }
    }

    /// Whether no read can be asked for here any more.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    fn end(&mut self, mut done: impl FnMut(T, Option<&[u8]>)) {
        self.ended = true;
        self.unsent.clear();
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        for (_, asking) in self.in_flight.drain() {
            done(asking.owner, None);
        }
    }

    fn take_apart(&mut self, done: &mut impl FnMut(T, Option<&[u8]>)) -> Result<(), Violation> {
        loop {
            let staged = &self.stage[self.start..self.end];
            if staged.len() < 4 {
                return Ok(());
            }
            let header = header_len(self.info.framing, u32_at(staged, 0))?;
            let Some((head, rest)) = staged.split_at_checked(header) else { return Ok(()) };
            let reply = decode_header(head);
            let (Reply::Simple { cookie, .. } | Reply::Chunk(Chunk { cookie, .. })) = reply;
            let Some(asking) = self.in_flight.get_mut(&cookie) else {
                return Err(Violation(format!("a reply to {cookie}, for which nothing was asked")));
            };
            let (last, len) = match reply {
                Reply::Simple { errno: 0, .. } => {
                    return Err(Violation(format!("a simple reply says that {} succeeded", asking.asked)));
                }
                Reply::Simple { .. } => {
                    asking.refused = true;
                    (true, 0)
                }
                Reply::Chunk(chunk) => {
                    let payload = expect_payload(self.info.framing, &chunk, &asking.asked)?;
                    // Bounded by the judgement above, so that it fits into the stage.
                    let Some(bytes) = rest.get(..chunk.len as usize) else { return Ok(()) };
                    if let Some(whole) = asking.take(payload, bytes, chunk.last)? {
                        self.start += header + whole.len() + 8;
                        if let Some(asking) = self.in_flight.remove(&cookie) {
                            done(asking.owner, Some(whole));
                        }
                        continue;
                    }
                    (chunk.last, bytes.len())
                }
            };
            self.start += header + len;
            if last && let Some(asking) = self.in_flight.remove(&cookie) {
                let Asking { asked, owner, pieces, refused, .. } = asking;
                let whole = pieces.filter(|(_, covered)| covered.is_complete() && !refused);
                done(owner, whole.as_ref().map(|(whole, _)| &whole[..]));
                if whole.is_none() && !refused {
                    return Err(Violation(format!("the reply to {asked} ends too early")));
                }
            }
        }
    }
}

impl<T> Asking<T> {
    /// Takes a chunk's payload. Bytes that are all that was asked for come back.
    fn take<'a>(&mut self, payload: Payload, bytes: &'a [u8], last: bool) -> Result<Option<&'a [u8]>, Violation> {
        let len = self.asked.len as usize;
        let (piece, data) = match payload {
            Payload::Data(count) => {
                let piece = place(&self.asked, u64_at(bytes, 0), count as u64)?;
                if last && self.pieces.is_none() && !self.refused && piece.len() == len {
                    return Ok(Some(&bytes[8..]));
                }
                (piece, Some(&bytes[8..]))
            }
            Payload::Hole => {
                let Some(hole) = bytes.first_chunk() else { return Err(Violation("a short hole".into())) };
                let (offset, count) = decode_hole(hole);
                (place(&self.asked, offset, count)?, None)
            }
            Payload::Error(_) => {
                self.refused = true;
                return Ok(None);
            }
            Payload::Nothing | Payload::Status(_) => return Ok(None),
        };
        let (whole, covered) = self.pieces.get_or_insert_with(|| (vec![0; len], Coverage::new(len)));
        covered.add(piece.clone())?;
        if let Some(data) = data {
            whole[piece].copy_from_slice(data);
        }
        Ok(None)
    }
}

impl<T> AsFd for Lane<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl<T> Drop for Lane<T> {
    fn drop(&mut self) {
        // QEMU spins on a client that goes without a word.
        if !self.ended && self.in_flight.is_empty() && self.unsent.is_empty() {
            let asked = Asked { command: Command::Disconnect, offset: 0, len: 0 };
            let _ = (&self.stream).write(encode_request(self.info.framing, 0, &asked, None).as_slice());
        }
    }
}
