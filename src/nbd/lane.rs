//! A connection for many small reads, owned by one thread: it gathers requests, sends them in one go, takes whatever has come in
//! one go, and hands the bytes on from where they came, receives them where they are to be, or leads them past this process, through
//! a pipe. No task and no other thread wakes up for it.
//!
//! It answers what a server that keeps to the protocol answers with data. Whatever else happens, an error in a reply or the end of
//! the connection, the reads go back to their owner, who asks [`super::Client`]: what to make of failures is written there, once.

use super::{
    ConnectOptions, ExportInfo, NbdError,
    client::dial,
    coverage::Coverage,
    handshake::negotiate,
    pipe::Pipe,
    receive::STAGE_BEHIND_LARGE,
    wire::{
        Asked, Chunk, Command, MAX_ERROR_PAYLOAD, MAX_HEADER, Payload, Reply, Violation, decode_header, decode_hole,
        encode_request, expect_payload, header_len, place, u32_at, u64_at,
    },
};
use std::{
    borrow::Cow,
    collections::HashMap,
    io::{self, IoSliceMut, Read, Write},
    ops::Range,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

/// So many whole replies have room where they are received: one that has come in part seldom has to be moved for the rest of it.
const STAGED: usize = 4;

/// So often at most a socket is asked for more in one go, while answers go through the pipe: header and payload come one after the
/// other.
const STEPS: usize = 8;

/// How the owner of a read wants its bytes.
enum Wish {
    /// From where they were received.
    Anywhere,
    /// In his place.
    Placed,
    /// In the pipe, behind these.
    Piped(Vec<u8>),
}

/// What a read brought.
pub enum Brought<'a> {
    /// The bytes, in their place if they have one.
    Bytes(Cow<'a, [u8]>),
    /// They are in the pipe, behind the head that was given. What is left in it afterwards is lost.
    Piped(&'a mut Pipe),
    /// It has to be asked elsewhere.
    Nothing,
}

/// One read under way.
struct Asking<T> {
    asked: Asked,
    begun: Instant,
    owner: T,
    /// Where the bytes belong. Without it, one piece that is the whole is never copied, and several are put together here.
    pieces: Option<(Vec<u8>, Coverage)>,
    wish: Wish,
    refused: bool,
}

/// A payload of which the beginning has come.
struct Filling {
    cookie: u64,
    /// What is missing, of the bytes asked for.
    rest: Range<usize>,
    last: bool,
    /// Whether what came is in the pipe.
    piped: bool,
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
    /// Received and not taken apart yet: `stage[start..end]`. Empty while `filling`.
    stage: Box<[u8]>,
    start: usize,
    end: usize,
    /// So many bytes of what is staged are missing at least.
    missing: usize,
    filling: Option<Filling>,
    /// Empty, unless `filling` is piped. Absent where there is none to be had.
    pipe: Option<Pipe>,
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
            missing: 0,
            filling: None,
            pipe: None,
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
        self.ask_for(offset, len, begun, owner, None, Wish::Anywhere)
    }

    /// As [`Lane::ask`], for as many bytes as `place` has, which are received there. For long reads; on a lane with them short
    /// ones are slower.
    ///
    /// # Errors
    /// As there; `place` is lost.
    pub fn ask_into(&mut self, offset: u64, place: Vec<u8>, begun: Instant, owner: T) -> Result<(), T> {
        self.ask_for(offset, place.len(), begun, owner, Some(place), Wish::Placed)
    }

    /// As [`Lane::ask`], for bytes that go on to a file or socket behind `head`, without a copy in this process: an answer of one
    /// piece comes as [`Brought::Piped`]. For long reads; on a lane with them short ones are slower.
    ///
    /// # Errors
    /// As there.
    pub fn ask_piped(&mut self, offset: u64, len: usize, begun: Instant, owner: T, head: Vec<u8>) -> Result<(), T> {
        if self.pipe.is_none() {
            self.pipe = Pipe::new(self.longest_read as usize).ok();
        }
        self.ask_for(offset, len, begun, owner, None, Wish::Piped(head))
    }

    fn ask_for(
        &mut self,
        offset: u64,
        len: usize,
        begun: Instant,
        owner: T,
        place: Option<Vec<u8>>,
        wish: Wish,
    ) -> Result<(), T> {
        let asked = Asked { command: Command::Read, offset, len: len as u64 };
        let fits = (1..=u64::from(self.longest_read)).contains(&asked.len) && self.info.has(offset, asked.len);
        if self.ended || !fits {
            return Err(owner);
        }
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        self.unsent.extend_from_slice(encode_request(self.info.framing, cookie, &asked, None).as_slice());
        let pieces = place.map(|place| (place, Coverage::new(len)));
        self.in_flight.insert(cookie, Asking { asked, begun, owner, pieces, wish, refused: false });
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

    /// Takes what has come, without waiting: `done` gets what each read brought that is answered. Tells whether something came.
    pub fn receive(&mut self, mut done: impl FnMut(T, Brought<'_>)) -> bool {
        let mut some = false;
        for _ in 0..STEPS {
            if self.ended {
                break;
            }
            match self.fetch() {
                Ok(0) => self.end(&mut done),
                Ok(_) => {
                    if let Err(Violation(what)) = self.take_apart(&mut done) {
                        tracing::debug!("the NBD server breaks the protocol: {what}");
                        self.end(&mut done);
                    }
                }
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => break,
                Err(_) => self.end(&mut done),
            }
            some = true;
            if !self.pipes() {
                break;
            }
        }
        some
    }

    /// Whether an answer is to go through the pipe.
    fn pipes(&self) -> bool {
        self.pipe.is_some() && self.in_flight.values().any(|asking| matches!(asking.wish, Wish::Piped(_)))
    }

    /// Receives into the pipe, or into the place of a payload or the stage, or both; the number of bytes.
    fn fetch(&mut self) -> io::Result<usize> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.stage.len() - self.start < self.stage.len() / STAGED {
            self.stage.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if let Some(filling) = &mut self.filling
            && filling.piped
            && let Some(pipe) = &mut self.pipe
        {
            match pipe.fill(&self.stream, filling.rest.len()) {
                Ok(came) => {
                    filling.rest.start += came;
                    return Ok(came);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(error),
                Err(_) => self.leave_pipe()?,
            }
        }
        if let Some(filling) = &mut self.filling
            && let Some((place, _)) = self.in_flight.get_mut(&filling.cookie).and_then(|asking| asking.pieces.as_mut())
        {
            let parts = &mut [
                IoSliceMut::new(&mut place[filling.rest.clone()]),
                IoSliceMut::new(&mut self.stage[..STAGE_BEHIND_LARGE]),
            ];
            let came = (&self.stream).read_vectored(parts)?;
            let filled = came.min(filling.rest.len());
            filling.rest.start += filled;
            self.end = came - filled;
            return Ok(came);
        }
        let room = self.stage.len() - self.end;
        let room = if self.pipes() {
            // Not a byte of a payload, which would have to be copied.
            let header = self.info.framing.data_header().saturating_sub(self.end - self.start);
            room.min(self.missing.max(header).max(1))
        } else if self.in_flight.values().any(|asking| !matches!(asking.wish, Wish::Anywhere)) {
            room.min(self.missing.max(STAGE_BEHIND_LARGE))
        } else {
            room
        };
        let came = (&self.stream).read(&mut self.stage[self.end..][..room])?;
        self.end += came;
        Ok(came)
    }

    /// The pipe takes no more, since what came lies in many small parts, or is no good: the payload goes to a place instead.
    fn leave_pipe(&mut self) -> io::Result<()> {
        let Some(mut pipe) = self.pipe.take() else { return Ok(()) };
        if let Some(filling) = &mut self.filling
            && let Some(asking) = self.in_flight.get_mut(&filling.cookie)
        {
            let len = asking.asked.len as usize;
            let (mut place, mut covered) = (vec![0; len], Coverage::new(len));
            pipe.take_back(&mut place[..filling.rest.start])?;
            covered.add(0..len).map_err(|Violation(what)| io::Error::other(what))?;
            (asking.pieces, asking.wish, filling.piped) = (Some((place, covered)), Wish::Placed, false);
        }
        Ok(())
    }

    /// Ends the connection when a read has waited for longer than `patience`. `over` gets all, and whether they are among those.
    pub fn expire(&mut self, now: Instant, patience: Duration, mut over: impl FnMut(T, bool)) {
        let is_late = |begun| now.duration_since(begun) >= patience;
        if self.oldest().is_some_and(is_late) {
            for (_, asking) in self.in_flight.drain() {
                over(asking.owner, is_late(asking.begun));
            }
            self.end(|_, _| {});
        }
    }

    /// Whether no read can be asked for here any more.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    fn end(&mut self, mut done: impl FnMut(T, Brought<'_>)) {
        self.ended = true;
        self.unsent.clear();
        self.filling = None;
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        for (_, asking) in self.in_flight.drain() {
            done(asking.owner, Brought::Nothing);
        }
    }

    fn take_apart(&mut self, done: &mut impl FnMut(T, Brought<'_>)) -> Result<(), Violation> {
        loop {
            if let Some(filling) = self.filling.take_if(|filling| filling.rest.is_empty()) {
                if filling.piped {
                    self.piped(filling.cookie, done);
                } else if filling.last {
                    self.answered(filling.cookie, done)?;
                }
            }
            if self.filling.is_some() {
                return Ok(());
            }
            self.missing = 0;
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
                    if let Payload::Data(count) = payload
                        && !matches!(asking.wish, Wish::Anywhere)
                        && rest.len() < chunk.len as usize
                    {
                        let Some((offset, data)) = rest.split_at_checked(8) else { return Ok(()) };
                        let (offset, count) = (u64_at(offset, 0), count as u64);
                        let piped = asking.is_whole(count, chunk.last)
                            && match (&asking.wish, &mut self.pipe) {
                                (Wish::Piped(head), Some(pipe)) => pipe.hold(head, data),
                                _ => false,
                            };
                        let place = if piped {
                            place(&asking.asked, offset, count)?
                        } else {
                            asking.piece(offset, count, Some(data))?
                        };
                        let rest = place.start + data.len()..place.end;
                        self.filling = Some(Filling { cookie, rest, last: chunk.last, piped });
                        self.start = self.end;
                        return Ok(());
                    }
                    // Bounded by the judgement above, so that it fits into the stage.
                    let Some(bytes) = rest.get(..chunk.len as usize) else {
                        self.missing = chunk.len as usize - rest.len();
                        return Ok(());
                    };
                    if let Some(whole) = asking.take(payload, bytes, chunk.last)? {
                        self.start += header + whole.len() + 8;
                        if let Some(asking) = self.in_flight.remove(&cookie) {
                            done(asking.owner, Brought::Bytes(whole.into()));
                        }
                        continue;
                    }
                    (chunk.last, bytes.len())
                }
            };
            self.start += header + len;
            if last {
                self.answered(cookie, done)?;
            }
        }
    }

    /// All of an answer is in the pipe.
    fn piped(&mut self, cookie: u64, done: &mut impl FnMut(T, Brought<'_>)) {
        if let (Some(asking), Some(pipe)) = (self.in_flight.remove(&cookie), &mut self.pipe) {
            done(asking.owner, Brought::Piped(pipe));
            if !pipe.is_empty() {
                self.pipe = Pipe::new(self.longest_read as usize).ok();
            }
        }
    }

    /// The last chunk of a reply was taken.
    fn answered(&mut self, cookie: u64, done: &mut impl FnMut(T, Brought<'_>)) -> Result<(), Violation> {
        let Some(Asking { asked, owner, pieces, refused, .. }) = self.in_flight.remove(&cookie) else {
            return Ok(());
        };
        let whole = pieces.filter(|(_, covered)| covered.is_complete() && !refused);
        let short = whole.is_none() && !refused;
        done(owner, whole.map_or(Brought::Nothing, |(whole, _)| Brought::Bytes(whole.into())));
        if short { Err(Violation(format!("the reply to {asked} ends too early"))) } else { Ok(()) }
    }
}

impl<T> Asking<T> {
    /// Whether a piece of `count` bytes is all of the answer.
    fn is_whole(&self, count: u64, last: bool) -> bool {
        last && self.pieces.is_none() && !self.refused && count == self.asked.len
    }

    /// Takes a chunk's payload. Bytes that are all that was asked for, and have no other place, come back.
    fn take<'a>(&mut self, payload: Payload, bytes: &'a [u8], last: bool) -> Result<Option<&'a [u8]>, Violation> {
        match payload {
            Payload::Data(count) => {
                let (offset, count) = (u64_at(bytes, 0), count as u64);
                if self.is_whole(count, last) {
                    place(&self.asked, offset, count)?;
                    return Ok(Some(&bytes[8..]));
                }
                self.piece(offset, count, Some(&bytes[8..]))?;
            }
            Payload::Hole => {
                let Some(hole) = bytes.first_chunk() else { return Err(Violation("a short hole".into())) };
                let (offset, count) = decode_hole(hole);
                self.piece(offset, count, None)?;
            }
            Payload::Error(_) => self.refused = true,
            Payload::Nothing | Payload::Status(_) => {}
        }
        Ok(None)
    }

    /// Puts a piece where it belongs, of `data` as much as has come, or zeroes; tells where that is.
    fn piece(&mut self, offset: u64, count: u64, data: Option<&[u8]>) -> Result<Range<usize>, Violation> {
        let piece = place(&self.asked, offset, count)?;
        let len = self.asked.len as usize;
        let (whole, covered) = self.pieces.get_or_insert_with(|| (vec![0; len], Coverage::new(len)));
        covered.add(piece.clone())?;
        match data {
            Some(data) => whole[piece.clone()][..data.len()].copy_from_slice(data),
            None => whole[piece.clone()].fill(0),
        }
        Ok(piece)
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
