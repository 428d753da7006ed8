//! Several connections to one export.

use super::{Client, ConnectOptions, NbdError, StatusExtent};
use bytes::BytesMut;
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// Several connections to one export, used in turn. Clones share them.
#[derive(Clone)]
pub struct Connections {
    clients: Arc<[Client]>,
    turn: Arc<AtomicUsize>,
}

impl Connections {
    /// Opens `count` connections, at least one, and only one to a server that does not promise that several see the same data.
    ///
    /// # Errors
    /// As [`Client::connect`]; [`NbdError::Protocol`] when the connections are told different sizes.
    pub async fn open(options: &ConnectOptions, count: usize) -> Result<Self, NbdError> {
        let first = Client::connect(options).await?;
        let count = if first.can_multi_conn() { count } else { 1 };
        let mut clients = vec![first];
        while clients.len() < count {
            let next = Client::connect(options).await?;
            let (known, told) = (clients[0].size(), next.size());
            if known != told {
                return Err(NbdError::Protocol(format!("export `{}` has {known} and {told} bytes", options.export)));
            }
            clients.push(next);
        }
        Ok(Self { clients: clients.into(), turn: Arc::default() })
    }

    /// The first connection, for everything that is asked once.
    pub fn first(&self) -> &Client {
        &self.clients[0]
    }

    /// The connection whose turn it is.
    pub fn next(&self) -> &Client {
        &self.clients[self.turn.fetch_add(1, Ordering::Relaxed) % self.clients.len()]
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.clients.len()
    }

    /// [`Client::read`] on the next connection.
    ///
    /// # Errors
    /// As there.
    pub async fn read(&self, offset: u64, buffer: BytesMut) -> Result<(BytesMut, bool), NbdError> {
        self.next().read(offset, buffer).await
    }

    /// [`Client::block_status`] on the first connection.
    ///
    /// # Errors
    /// As there.
    pub async fn block_status(&self, context: &str, offset: u64, len: u64) -> Result<Vec<StatusExtent>, NbdError> {
        self.first().block_status(context, offset, len).await
    }

    /// [`Client::trim`] on the next connection.
    ///
    /// # Errors
    /// As there.
    pub async fn trim(&self, offset: u64, len: u64) -> Result<(), NbdError> {
        self.next().trim(offset, len).await
    }

    /// Disconnects all; the first error is returned after the last attempt.
    ///
    /// # Errors
    /// As [`Client::disconnect`].
    pub async fn disconnect(&self) -> Result<(), NbdError> {
        let mut result = Ok(());
        for client in self.clients.iter() {
            result = result.and(client.disconnect().await);
        }
        result
    }
}
