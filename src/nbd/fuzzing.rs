//! What the fuzzers do with a server's bytes.

use super::{
    Client, Framing,
    client::ConnectOptions,
    connection::Connection,
    handshake::{ExportInfo, negotiate},
    wire::MAX_READ,
};
use crate::fuzzing::{block_on, send_and_leave};
use bytes::BytesMut;
use std::time::Duration;
use tokio::net::UnixStream;

const CONTEXT: &str = "base:allocation";
const SIZE: u64 = 1 << 20;

/// A server's side of the handshake. `true` when it ends with an export.
pub(crate) fn handshake(bytes: &[u8]) -> bool {
    block_on(async {
        let mut stream = tokio::io::join(bytes, tokio::io::sink());
        let Ok(info) = negotiate(&mut stream, "disk", &[CONTEXT.to_owned()]).await else { return false };
        assert!(info.min_block.is_power_of_two() && info.max_block <= MAX_READ && info.contexts.len() == 1);
        true
    })
}

/// A server's replies to two reads, a block status and a trim (cookies 1 to 4 in this order); the first byte chooses the
/// framing. `true` when all of them succeed.
pub(crate) fn replies(bytes: &[u8]) -> bool {
    let Some((&first, bytes)) = bytes.split_first() else { return false };
    let framing = if first.is_multiple_of(2) { Framing::Compact } else { Framing::Extended };
    let info = ExportInfo {
        size: SIZE,
        flags: 1 | 1 << 5,
        min_block: 1,
        preferred_block: 4096,
        max_block: MAX_READ,
        framing,
        contexts: vec![(7, CONTEXT.into())],
    };
    block_on(async {
        let Ok((ours, theirs)) = UnixStream::pair() else { return false };
        let connection = Connection::start(ours, info, Duration::from_secs(30));
        let client = Client::of(connection, ConnectOptions::LONGEST_READ);
        let server = tokio::spawn(send_and_leave(theirs, bytes.to_vec()));
        let (head, tail, status, trim) = tokio::join!(
            client.read(0, BytesMut::zeroed(16)),
            client.read(4096, BytesMut::zeroed(32)),
            client.block_status(CONTEXT, 0, SIZE),
            client.trim(0, 512),
        );
        if let Ok(extents) = &status {
            assert_eq!(
                extents.iter().map(|extent| extent.len).sum::<u64>(),
                SIZE,
                "a status that does not cover what was asked"
            );
        }
        for (read, len) in [(&head, 16), (&tail, 32)] {
            if let Ok((buffer, holes)) = read {
                assert!(buffer.len() == len && !(*holes && buffer.iter().any(|byte| *byte != 0)));
            }
        }
        drop(client);
        server.await.ok();
        head.is_ok() && tail.is_ok() && status.is_ok() && trim.is_ok()
    })
}
