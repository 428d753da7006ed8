//! One connection, as its users see it.

use super::{
    connection::{Connection, Pending, Work},
    coverage::Coverage,
    error::NbdError,
    handshake::{ExportInfo, negotiate},
    wire::{Asked, Command, StatusExtent},
};
use bytes::BytesMut;
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    net::UnixStream,
    time::{Instant, timeout},
};

/// Extents that one [`Client::block_status`] collects at most (256 MiB of memory): a disk of 2 TiB in which every second
/// 64 KiB are dirty stays below.
pub const MAX_EXTENTS: usize = 16 << 20;
/// Requests that one [`Client::block_status`] sends at most. QEMU answers up to 131,072 extents to each.
const MAX_STATUS_REQUESTS: usize = 1 << 20;
/// How many deadlines a whole [`Client::block_status`] may take, however many requests it needs.
const STATUS_DEADLINES: u32 = 10;
/// Longer deadlines are cut to this, so that points in time can be computed.
const LONGEST_DEADLINE: Duration = Duration::from_hours(365 * 24);

/// How to connect.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// The unix socket.
    pub socket: PathBuf,
    /// The export's name.
    pub export: String,
    /// Meta contexts that must be there: `base:allocation`, `qemu:dirty-bitmap:NAME`.
    ///
    /// Without [`ExportInfo::can_select_context`] (QEMU before 8.2) every block status asks all of them, and fails when one
    /// fails: ask for the bitmap on a connection of its own there.
    pub contexts: Vec<String>,
    /// Limit for the handshake and for every request, from the moment it is sent to its last byte.
    pub deadline: Duration,
    /// Reads are sent in pieces of this many bytes at most, [`ConnectOptions::LONGEST_READ`] unless the server is known to
    /// need smaller ones. Pieces start at multiples of it when the reads do.
    pub longest_read: u32,
}

impl ConnectOptions {
    /// Two connections with two reads of 4 MiB each brought half of what the same amount in flight brings in requests of 1 MiB
    /// (QEMU 10.0.2, page cache, two cores).
    pub const LONGEST_READ: u32 = 1 << 20;
}

/// Connects, and has what follows done on the stream, within the deadline.
pub(super) async fn dial<T>(
    options: &ConnectOptions,
    start: impl AsyncFnOnce(UnixStream) -> Result<T, NbdError>,
) -> Result<T, NbdError> {
    let connect = async {
        let stream = UnixStream::connect(&options.socket).await;
        start(stream.map_err(|error| NbdError::io("connect to", error))?).await
    };
    let timed_out = |_| Err(NbdError::TimedOut { doing: "the handshake".into(), after: options.deadline });
    timeout(options.deadline, connect).await.unwrap_or_else(timed_out)
}

/// Ends the connection when the last clone of its [`Client`] is gone.
struct Handle(Arc<Connection>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

/// A connected client; clones share the connection, which closes with the last of them. Must be used inside the tokio runtime
/// in which it was connected.
///
/// Up to [`super::MAX_IN_FLIGHT`] requests are under way at a time, in any order; further ones wait for their turn, and their
/// deadline begins with it. Every future may be dropped at any time; its request is then finished in the background.
///
/// Memory a server can make the client use: 64 KiB for the connection, 12 MiB for a block status chunk (4 MiB of payload and its
/// extents), 16 KiB of pieces for a read that is answered out of order, and [`MAX_EXTENTS`] extents for a block status. Buffers of reads are the caller's.
#[derive(Clone)]
pub struct Client {
    handle: Arc<Handle>,
    longest_read: u32,
}

impl Client {
    /// Connects and negotiates: fixed newstyle, extended headers or else structured replies, all meta contexts, the export.
    ///
    /// # Errors
    /// [`NbdError::Io`] (no server), [`NbdError::NoExport`], [`NbdError::ContextMissing`], [`NbdError::NotOffered`] (a server
    /// without structured replies), [`NbdError::OptionRefused`], [`NbdError::ShuttingDown`], [`NbdError::Protocol`],
    /// [`NbdError::Closed`], [`NbdError::TimedOut`].
    pub async fn connect(options: &ConnectOptions) -> Result<Self, NbdError> {
        dial(options, async |stream| Self::start(stream, options).await).await
    }

    /// Negotiates on a stream that is connected already.
    pub(super) async fn start(mut stream: UnixStream, options: &ConnectOptions) -> Result<Self, NbdError> {
        let info = negotiate(&mut stream, &options.export, &options.contexts).await?;
        let connection = Connection::start(stream, info, options.deadline.min(LONGEST_DEADLINE));
        Ok(Self::of(connection, options.longest_read))
    }

    pub(super) fn of(connection: Arc<Connection>, longest_read: u32) -> Self {
        Self { handle: Arc::new(Handle(connection)), longest_read }
    }

    fn connection(&self) -> &Connection {
        &self.handle.0
    }

    #[cfg(test)]
    pub(super) fn watch(&self) -> std::sync::Weak<Connection> {
        Arc::downgrade(&self.handle.0)
    }

    /// What the server said about the export.
    pub fn info(&self) -> &ExportInfo {
        &self.connection().info
    }

    /// The export's size in bytes.
    pub fn size(&self) -> u64 {
        self.info().size
    }

    /// Whether several connections to the export see the same data (flag `CAN_MULTI_CONN`).
    pub fn can_multi_conn(&self) -> bool {
        self.info().can_multi_conn()
    }

    /// Whether TRIM is offered.
    pub fn can_trim(&self) -> bool {
        self.info().can_trim()
    }

    /// Whether the export is read-only.
    pub fn is_read_only(&self) -> bool {
        self.info().is_read_only()
    }

    fn asked(&self, command: Command, offset: u64, len: u64) -> Result<Asked, NbdError> {
        if !self.info().has(offset, len) {
            let &ExportInfo { size, min_block: block, .. } = self.info();
            return Err(NbdError::OutOfBounds { command, offset, len, size, block });
        }
        Ok(Asked { command, offset, len })
    }

    /// Reads `buffer.len()` bytes at `offset` into `buffer`, which is returned. The flag tells that the server sent holes
    /// only: every byte is zero.
    ///
    /// The bytes go from the socket straight into the buffer, whose old content does not matter: use it again for the next
    /// read. A new one is cheapest as [`BytesMut::zeroed`], which takes large zeros from the kernel. A read of
    /// more than [`ConnectOptions::longest_read`] or [`ExportInfo::max_block`] becomes several requests at once.
    ///
    /// # Errors
    /// [`NbdError::Refused`] (see [`NbdError::is_unreadable`]), [`NbdError::ShuttingDown`], [`NbdError::OutOfBounds`], and those
    /// of a lost connection: [`NbdError::TimedOut`], [`NbdError::Closed`], [`NbdError::Protocol`], [`NbdError::Io`]. The
    /// buffer is lost then.
    pub async fn read(&self, offset: u64, mut buffer: BytesMut) -> Result<(BytesMut, bool), NbdError> {
        self.asked(Command::Read, offset, buffer.len() as u64)?;
        let longest = self.longest_read().max(1) as usize;
        let rest = (buffer.len() > longest).then(|| buffer.split_off(longest));
        if buffer.is_empty() {
            return Ok((buffer, true));
        }
        let first = self.submit_read(offset, buffer).await?;
        let mut others = Vec::new();
        if let Some(mut rest) = rest {
            let mut at = offset + longest as u64;
            while !rest.is_empty() {
                let piece = rest.split_to(longest.min(rest.len()));
                let len = piece.len() as u64;
                others.push(self.submit_read(at, piece).await?);
                at += len;
            }
        }
        let (mut whole, mut holes) = self.finish_read(first).await?;
        for other in others {
            let (piece, only_holes) = self.finish_read(other).await?;
            // The pieces are neighbours in memory, so this moves nothing.
            whole.unsplit(piece);
            holes &= only_holes;
        }
        Ok((whole, holes))
    }

    /// The longest read that is sent as one request, bytes.
    pub fn longest_read(&self) -> u32 {
        self.info().max_block.min(self.longest_read)
    }

    async fn submit_read(&self, offset: u64, buffer: BytesMut) -> Result<Pending, NbdError> {
        let asked = Asked { command: Command::Read, offset, len: buffer.len() as u64 };
        let covered = Coverage::new(buffer.len());
        self.connection().submit(asked, Work::Read { buffer, covered, data: false }).await
    }

    async fn finish_read(&self, pending: Pending) -> Result<(BytesMut, bool), NbdError> {
        match self.connection().result(pending).await? {
            Work::Read { buffer, data, .. } => Ok((buffer, !data)),
            Work::Status { .. } | Work::Trim => Err(self.connection().closed()),
        }
    }

    /// What `context` says about `offset..offset+len`: extents from `offset` on that cover exactly `len` bytes, asked for in as
    /// many requests as needed. Neighbours with equal flags are joined.
    ///
    /// # Errors
    /// As [`Self::read`], and [`NbdError::ContextMissing`] when `context` was not among those asked for when connecting;
    /// [`NbdError::Protocol`] also for a map of more than [`MAX_EXTENTS`] extents, [`NbdError::TimedOut`] also when the whole
    /// takes ten times the deadline.
    pub async fn block_status(&self, context: &str, offset: u64, len: u64) -> Result<Vec<StatusExtent>, NbdError> {
        let Some(&(id, _)) = self.info().contexts.iter().find(|(_, name)| name == context) else {
            return Err(NbdError::ContextMissing(context.to_owned()));
        };
        let whole = self.asked(Command::BlockStatus, offset, len)?;
        let begun = Instant::now();
        let patience = self.connection().deadline().saturating_mul(STATUS_DEADLINES);
        let mut map: Vec<StatusExtent> = Vec::new();
        let (mut at, mut left) = (offset, len);
        for _ in 0..MAX_STATUS_REQUESTS {
            if left == 0 {
                return Ok(map);
            }
            if begun.elapsed() >= patience {
                return Err(NbdError::TimedOut { doing: whole.to_string(), after: patience });
            }
            let asked = Asked { offset: at, len: left.min(self.info().framing.max_len()), ..whole };
            for extent in self.status_once(id, asked).await? {
                // The last extent may reach beyond what was asked.
                let len = extent.len.min(left);
                if len == 0 {
                    break;
                }
                let full = map.len() == MAX_EXTENTS;
                match map.last_mut() {
                    Some(last) if last.flags == extent.flags => last.len += len,
                    _ if full => {
                        return Err(NbdError::Protocol(format!("{whole} has more than {MAX_EXTENTS} extents")));
                    }
                    _ => map.push(StatusExtent { len, flags: extent.flags }),
                }
                at += len;
                left -= len;
            }
        }
        Err(NbdError::Protocol(format!("{whole} is not answered in {MAX_STATUS_REQUESTS} requests")))
    }

    async fn status_once(&self, context: u32, asked: Asked) -> Result<Vec<StatusExtent>, NbdError> {
        let work = Work::Status { context, extents: None, contexts_seen: Vec::new() };
        let pending = self.connection().submit(asked, work).await?;
        match self.connection().result(pending).await? {
            Work::Status { extents: Some(extents), .. } => Ok(extents),
            Work::Read { .. } | Work::Status { .. } | Work::Trim => Err(self.connection().closed()),
        }
    }

    /// Discards a range.
    ///
    /// # Errors
    /// As [`Self::read`], and [`NbdError::NotOffered`]. After an error a part may be discarded.
    pub async fn trim(&self, offset: u64, len: u64) -> Result<(), NbdError> {
        let whole = self.asked(Command::Trim, offset, len)?;
        if !self.can_trim() {
            return Err(NbdError::NotOffered { what: "TRIM", text: String::new() });
        }
        let (mut at, mut left) = (offset, len);
        while left > 0 {
            let asked = Asked { offset: at, len: left.min(self.info().framing.max_len()), ..whole };
            let pending = self.connection().submit(asked, Work::Trim).await?;
            self.connection().result(pending).await?;
            at += asked.len;
            left -= asked.len;
        }
        Ok(())
    }

    /// Waits for the requests that were sent, disconnects in order, and waits (shortly) until the server hung up, so that the export
    /// can be deleted afterwards. Those that wait for their turn, or come later, get [`NbdError::Closed`]. A second call is fine.
    ///
    /// # Errors
    /// Those of a lost connection; it is closed in any case.
    pub async fn disconnect(&self) -> Result<(), NbdError> {
        self.connection().disconnect().await
    }
}
