//! Why an NBD exchange failed.

use super::wire::{Command, Violation};
use std::{io, sync::Arc, time::Duration};
use thiserror::Error;

/// `EINVAL` as the protocol numbers it.
const EINVAL: u32 = 22;

/// Why an NBD exchange failed. Cheap to clone: one lost connection is told to every request that was under way.
#[derive(Clone, Debug, Error)]
pub enum NbdError {
    /// The server answered the request with an error; the connection goes on.
    #[error("nbd server refuses {command} of {len} bytes at {offset}: error {errno} `{text}`")]
    Refused {
        /// What was asked.
        command: Command,
        /// Where it began, bytes.
        offset: u64,
        /// Its length, bytes.
        len: u64,
        /// The protocol's number, which is Linux's for all that QEMU sends.
        errno: u32,
        /// The server's words; empty when it sent none.
        text: String,
    },
    /// The server is about to stop (`ESHUTDOWN`, 108, or the handshake's equivalent): leave, and do not come back.
    #[error("nbd server is shutting down: `{text}`")]
    ShuttingDown {
        /// The server's words.
        text: String,
    },
    /// The connection is gone: the server hung up, or it was given up because of `cause`.
    #[error("connection to the nbd server is closed")]
    Closed {
        /// What ended it, when it was not a plain end of the stream.
        #[source]
        cause: Option<Arc<NbdError>>,
    },
    /// No complete answer within the deadline. The state of the request is unknown, so the connection was closed.
    #[error("nbd server does not finish {doing} within {after:?}")]
    TimedOut {
        /// What was waited for.
        doing: String,
        /// The deadline.
        after: Duration,
    },
    /// The server sent what the protocol forbids; the connection was closed.
    #[error("nbd server breaks the protocol: {0}")]
    Protocol(String),
    /// The server has no such export.
    #[error("nbd server has no export `{export}`: `{text}`")]
    NoExport {
        /// The name asked for.
        export: String,
        /// The server's words.
        text: String,
    },
    /// A meta context was not selected by the server, or not asked for when connecting.
    #[error("meta context `{0}` is not available on this nbd connection")]
    ContextMissing(String),
    /// The server does not offer what is needed.
    #[error("nbd server does not offer {what}: `{text}`")]
    NotOffered {
        /// The feature.
        what: &'static str,
        /// The server's words; empty when it sent none.
        text: String,
    },
    /// The server refused an option of the handshake for another reason than the above.
    #[error("nbd server refuses {option} with {code:#010x}: `{text}`")]
    OptionRefused {
        /// The option's name in the specification.
        option: &'static str,
        /// The reply type.
        code: u32,
        /// The server's words.
        text: String,
    },
    /// Our request cannot be sent: it leaves the export, or the blocks the server insists on.
    #[error("{command} of {len} bytes at {offset} does not fit an export of {size} bytes in blocks of {block}")]
    OutOfBounds {
        /// What was asked.
        command: Command,
        /// Where it began, bytes.
        offset: u64,
        /// Its length, bytes.
        len: u64,
        /// The export's size, bytes.
        size: u64,
        /// The server's minimum block size, bytes.
        block: u32,
    },
    /// The socket failed.
    #[error("cannot {doing} the nbd server")]
    Io {
        /// `connect to`, `read from`, `write to`.
        doing: &'static str,
        /// The cause.
        #[source]
        source: Arc<io::Error>,
    },
}

impl NbdError {
    /// Whether the server said that this range cannot be read (`EINVAL` to a read or a block status). QEMU's snapshot access
    /// answers so for ranges outside its bitmap, for discarded ranges and after the snapshot broke, all with this number, so
    /// what it means depends on what the caller discarded. Reading again never helps.
    pub fn is_unreadable(&self) -> bool {
        matches!(self, Self::Refused { command: Command::Read | Command::BlockStatus, errno: EINVAL, .. })
    }

    /// Whether the connection is unusable after this error. Otherwise only the one request failed.
    pub fn is_fatal(&self) -> bool {
        !matches!(
            self,
            Self::Refused { .. } | Self::OutOfBounds { .. } | Self::ContextMissing(_) | Self::NotOffered { .. }
        )
    }

    pub(super) fn io(doing: &'static str, source: io::Error) -> Self {
        Self::Io { doing, source: Arc::new(source) }
    }
}

impl From<Violation> for NbdError {
    fn from(violation: Violation) -> Self {
        Self::Protocol(violation.0)
    }
}
