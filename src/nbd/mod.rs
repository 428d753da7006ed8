//! The NBD client: fixed newstyle over a unix socket, structured and extended replies, many requests in flight.
//!
//! It must not know what the bytes mean: which ranges are dirty, what may be trimmed when, and what an unreadable range says
//! about the snapshot is the business of the copy. What it promises: whatever the server sends, a caller gets either the
//! bytes the server vouched for, completely, or an error.
//!
//! One connection is two tasks: the *receiver* reads the socket and nothing else, straight into the callers' buffers; the
//! *keeper* watches the deadlines and sends what the socket did not take at once. Callers write their own requests. A [`Lane`] is a
//! connection without tasks, for a thread that has nothing else to do.
//!
//! Protocol facts are those of the NBD project's `proto.md`; QEMU's behaviour was observed on 10.0.2.

mod client;
mod connection;
mod connections;
mod coverage;
mod error;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod handshake;
mod lane;
mod option;
mod pipe;
mod receive;
mod wire;

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod lane_tests;
#[cfg(test)]
mod qemu_tests;
#[cfg(test)]
mod scripted_server;
#[cfg(test)]
mod scripted_tests;

pub use client::{Client, ConnectOptions, MAX_EXTENTS};
pub use connection::MAX_IN_FLIGHT;
pub use connections::Connections;
pub use error::NbdError;
pub use handshake::ExportInfo;
pub use lane::{Brought, Lane};
pub use pipe::Pipe;
pub use wire::{Command, Framing, StatusExtent};
