//! Lines of JSON over a stream: the framing that QMP and the guest agent share.

use bytes::{Buf, BytesMut};
use std::io;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Why no line could be exchanged.
#[derive(Debug, Error)]
pub(crate) enum WireError {
    /// End of stream, or an error that amounts to it.
    #[error("the connection is closed")]
    Closed(#[source] Option<io::Error>),
    /// A line is longer than we accept. No line can be read after it.
    #[error("a line is longer than {limit} bytes")]
    TooLong {
        /// What we accept.
        limit: usize,
    },
}

impl From<io::Error> for WireError {
    fn from(error: io::Error) -> Self {
        Self::Closed(Some(error))
    }
}

/// A stream of lines. Both directions survive a caller that gives up half-way: what was read of a line stays for the next
/// read, and what was not yet written of a line goes out before the next one.
#[derive(Debug)]
pub(crate) struct Wire<S> {
    stream: S,
    input: BytesMut,
    /// Bytes of `input` in which there is no line end.
    searched: usize,
    output: BytesMut,
    line_limit: usize,
    broken: bool,
}

/// Bytes asked of the kernel at a time.
const READ: usize = 64 << 10;

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    pub(crate) fn new(stream: S, line_limit: usize) -> Self {
        Self { stream, input: BytesMut::new(), searched: 0, output: BytesMut::new(), line_limit, broken: false }
    }

    pub(crate) fn stream(&self) -> &S {
        &self.stream
    }

    /// Sends bytes, after those that an abandoned call left.
    pub(crate) async fn send(&mut self, bytes: &[u8]) -> Result<(), WireError> {
        self.output.extend_from_slice(bytes);
        while !self.output.is_empty() {
            let written = self.stream.write(&self.output).await?;
            if written == 0 {
                return Err(WireError::Closed(None));
            }
            self.output.advance(written);
        }
        Ok(())
    }

    /// Passes over everything up to and including a byte.
    pub(crate) async fn skip_past(&mut self, byte: u8) -> Result<(), WireError> {
        self.broken = false;
        self.searched = 0;
        loop {
            if let Some(at) = self.input.iter().position(|b| *b == byte) {
                self.input.advance(at + 1);
                return Ok(());
            }
            self.input.clear();
            self.read().await?;
        }
    }

    async fn read(&mut self) -> Result<(), WireError> {
        self.input.reserve(READ);
        if self.stream.read_buf(&mut self.input).await? == 0 {
            return Err(WireError::Closed(None));
        }
        Ok(())
    }

    /// The next line that is not empty, without its end.
    pub(crate) async fn line(&mut self) -> Result<BytesMut, WireError> {
        loop {
            if self.broken {
                return Err(WireError::TooLong { limit: self.line_limit });
            }
            if let Some(end) = self.input[self.searched..].iter().position(|b| *b == b'\n') {
                let line = self.input.split_to(self.searched + end);
                self.input.advance(1);
                self.searched = 0;
                if line.len() > self.line_limit {
                    self.broken = true;
                } else if !line.trim_ascii().is_empty() {
                    return Ok(line);
                }
                continue;
            }
            self.searched = self.input.len();
            if self.searched > self.line_limit {
                self.broken = true;
                self.input = BytesMut::new();
                self.searched = 0;
                continue;
            }
            self.read().await?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::io::duplex;

    #[tokio::test]
    async fn lines_arrive_whole_however_they_are_cut() {
        let (mut peer, ours) = duplex(3);
        let writer = tokio::spawn(async move {
            peer.write_all(b"one\r\n\r\n\ntwo\nthr").await.unwrap();
        });
        let mut wire = Wire::new(ours, 100);
        assert_eq!(&wire.line().await.unwrap()[..], b"one\r");
        assert_eq!(&wire.line().await.unwrap()[..], b"two");
        assert!(matches!(wire.line().await, Err(WireError::Closed(None))));
        writer.await.unwrap();
    }

    #[tokio::test]
    async fn a_line_that_is_too_long_ends_the_stream_for_good() {
        let (mut peer, ours) = duplex(1 << 20);
        peer.write_all(&[b'x'; 101]).await.unwrap();
        peer.write_all(b"\nshort\n").await.unwrap();
        let mut wire = Wire::new(ours, 100);
        assert!(matches!(wire.line().await, Err(WireError::TooLong { limit: 100 })));
        assert!(matches!(wire.line().await, Err(WireError::TooLong { limit: 100 })));
    }

    #[tokio::test(start_paused = true)]
    async fn an_abandoned_write_is_finished_before_the_next() {
        let (mut peer, ours) = duplex(4);
        let mut wire = Wire::new(ours, 100);
        assert!(tokio::time::timeout(Duration::from_secs(1), wire.send(b"0123456789\n")).await.is_err());
        let reader = tokio::spawn(async move {
            let mut all = vec![0; 16];
            peer.read_exact(&mut all).await.unwrap();
            all
        });
        wire.send(b"next\n").await.unwrap();
        assert_eq!(reader.await.unwrap(), b"0123456789\nnext\n");
    }

    #[tokio::test(start_paused = true)]
    async fn an_abandoned_read_loses_nothing() {
        let (mut peer, ours) = duplex(100);
        let mut wire = Wire::new(ours, 100);
        peer.write_all(b"hal").await.unwrap();
        assert!(tokio::time::timeout(Duration::from_secs(1), wire.line()).await.is_err());
        peer.write_all(b"f\n").await.unwrap();
        assert_eq!(&wire.line().await.unwrap()[..], b"half");
    }
}
