//! The receiving half of a connection: from the socket to the callers' buffers.

use super::{
    connection::{Connection, Work},
    error::NbdError,
    wire::{
        Chunk, Command, MAX_ERROR_PAYLOAD, MAX_HEADER, MAX_READ, MAX_STATUS_PAYLOAD, Payload, Reply, Violation,
        decode_error, decode_header, decode_hole, decode_status, expect_payload, header_len, place, u32_at, u64_at,
    },
};
use std::io::{self, IoSliceMut};
use tokio::net::UnixStream;

/// Bytes read ahead while replies are small, so that one system call brings many.
const STAGE: usize = 64 << 10;
/// Bytes read ahead behind a large payload: the next header and offset, and nothing that would have to be copied.
pub(super) const STAGE_BEHIND_LARGE: usize = MAX_HEADER + 8;
/// What counts as large, bytes.
const LARGE: usize = 32 << 10;

/// The socket with a little that was read ahead.
struct Incoming<'a> {
    stream: &'a UnixStream,
    stage: Box<[u8]>,
    start: usize,
    end: usize,
    ahead: usize,
}

impl<'a> Incoming<'a> {
    fn new(stream: &'a UnixStream) -> Self {
        Self { stream, stage: vec![0; STAGE].into(), start: 0, end: 0, ahead: STAGE }
    }

    /// Waits for bytes: the first ones into `into`, what is beyond into the stage.
    async fn receive(stream: &UnixStream, into: &mut [u8], beyond: &mut [u8]) -> Result<usize, NbdError> {
        loop {
            let mut buffers = [IoSliceMut::new(into), IoSliceMut::new(beyond)];
            match stream.try_read_vectored(&mut buffers) {
                Ok(0) => return Err(NbdError::Closed { cause: None }),
                Ok(read) => return Ok(read),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    stream.readable().await.map_err(|error| NbdError::io("read from", error))?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(NbdError::Closed { cause: None });
                }
                Err(error) => return Err(NbdError::io("read from", error)),
            }
        }
    }

    /// The next `len` bytes, which are few, without consuming them.
    async fn peek(&mut self, len: usize) -> Result<&[u8], NbdError> {
        while self.end - self.start < len {
            if self.start > 0 {
                self.stage.copy_within(self.start..self.end, 0);
                self.end -= self.start;
                self.start = 0;
            }
            let until = self.ahead.max(len);
            self.end += Self::receive(self.stream, &mut self.stage[self.end..until], &mut []).await?;
        }
        Ok(&self.stage[self.start..self.start + len])
    }

    async fn take<const N: usize>(&mut self) -> Result<[u8; N], NbdError> {
        let mut taken = [0; N];
        taken.copy_from_slice(self.peek(N).await?);
        self.start += N;
        Ok(taken)
    }

    async fn fill(&mut self, into: &mut [u8]) -> Result<(), NbdError> {
        let staged = into.len().min(self.end - self.start);
        let (copied, mut rest) = into.split_at_mut(staged);
        copied.copy_from_slice(&self.stage[self.start..self.start + staged]);
        self.start += staged;
        while !rest.is_empty() {
            let read = Self::receive(self.stream, rest, &mut self.stage[..self.ahead]).await?;
            if read >= rest.len() {
                (self.start, self.end) = (0, read - rest.len());
                return Ok(());
            }
            rest = &mut rest[read..];
        }
        Ok(())
    }

    async fn skip(&mut self, mut len: u64) -> Result<(), NbdError> {
        self.ahead = STAGE;
        while len > 0 {
            let piece = len.min(STAGE as u64) as usize;
            self.peek(piece).await?;
            self.start += piece;
            len -= piece as u64;
        }
        Ok(())
    }

    async fn vec(&mut self, len: usize) -> Result<Vec<u8>, NbdError> {
        let mut bytes = vec![0; len];
        self.fill(&mut bytes).await?;
        Ok(bytes)
    }
}

impl Connection {
    /// Receives until the connection ends, and says why.
    pub(super) async fn receive(&self) -> NbdError {
        let mut incoming = Incoming::new(&self.stream);
        loop {
            if let Err(end) = self.receive_reply(&mut incoming).await {
                return end;
            }
            // A server that is always ahead would otherwise never let the callers run.
            tokio::task::consume_budget().await;
        }
    }

    async fn receive_reply(&self, incoming: &mut Incoming<'_>) -> Result<(), NbdError> {
        let len = header_len(self.info.framing, u32_at(incoming.peek(4).await?, 0))?;
        let reply = decode_header(incoming.peek(len).await?);
        incoming.start += len;
        match reply {
            Reply::Simple { errno, cookie } => Ok(self.simple(cookie, errno)?),
            Reply::Chunk(chunk) => self.chunk(incoming, &chunk).await,
        }
    }

    /// A simple reply has no payload here: what would bring one must be answered in chunks.
    fn simple(&self, cookie: u64, errno: u32) -> Result<(), Violation> {
        let Some((asked, work)) = self.take(cookie)? else { return Ok(()) };
        if errno == 0 && asked.command != Command::Trim {
            return Err(Violation(format!("a simple reply says that {asked} succeeded")));
        }
        self.put(cookie, work, (errno != 0).then(|| (errno, String::new())), true)
    }

    async fn chunk(&self, incoming: &mut Incoming<'_>, chunk: &Chunk) -> Result<(), NbdError> {
        let Some((asked, mut work)) = self.take(chunk.cookie)? else {
            let longest = (8 + u64::from(MAX_READ)).max(MAX_STATUS_PAYLOAD).max(MAX_ERROR_PAYLOAD);
            if chunk.len > longest {
                return Err(Violation(format!("a stray chunk of {} bytes", chunk.len)).into());
            }
            return incoming.skip(chunk.len).await;
        };
        let mut failure = None;
        match (expect_payload(self.info.framing, chunk, &asked)?, &mut work) {
            (Payload::Nothing, _) => {}
            (Payload::Data(len), Work::Read { buffer, covered, data }) => {
                let piece = place(&asked, u64_at(&incoming.take::<8>().await?, 0), len as u64)?;
                covered.add(piece.clone())?;
                *data = true;
                incoming.ahead = if len >= LARGE { STAGE_BEHIND_LARGE } else { STAGE };
                incoming.fill(&mut buffer[piece]).await?;
            }
            (Payload::Hole, Work::Read { buffer, covered, .. }) => {
                let (offset, len) = decode_hole(&incoming.take().await?);
                let piece = place(&asked, offset, len)?;
                covered.add(piece.clone())?;
                buffer[piece].fill(0);
            }
            (Payload::Status(len), Work::Status { context, extents, contexts_seen }) => {
                let (id, found) = decode_status(self.info.framing, &incoming.vec(len).await?)?;
                if contexts_seen.contains(&id) || !self.info.contexts.iter().any(|(known, _)| *known == id) {
                    return Err(Violation(format!("context {id} is unknown, or answers {asked} twice")).into());
                }
                contexts_seen.push(id);
                if id == *context {
                    *extents = Some(found);
                }
            }
            (Payload::Error(len), _) => failure = Some(decode_error(&incoming.vec(len).await?)?),
            // Ruled out by `expect_payload`, which knows the command.
            (payload, _) => return Err(Violation(format!("{payload:?} does not answer {asked}")).into()),
        }
        Ok(self.put(chunk.cookie, work, failure, chunk.last)?)
    }
}
