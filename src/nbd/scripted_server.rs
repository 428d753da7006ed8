//! A server that speaks the real wire format over a socket pair and does exactly what a test says.

use super::{Client, ConnectOptions, Framing, wire};
use bytes::BytesMut;
use std::{future::Future, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

pub(super) const MIB: u64 = 1 << 20;
pub(super) const BASE: &str = "base:allocation";
pub(super) const DIRTY: &str = "qemu:dirty-bitmap:store1";
pub(super) const CAN_TRIM: u16 = 1 | 1 << 5;

#[derive(Clone)]
pub(super) struct Offer {
    pub(super) framing: Option<Framing>,
    pub(super) size: u64,
    pub(super) flags: u16,
    pub(super) blocks: Option<[u32; 3]>,
    /// Number and name of the contexts that are selected when asked for.
    pub(super) contexts: Vec<(u32, &'static str)>,
}

impl Offer {
    pub(super) fn of(framing: Framing) -> Self {
        let contexts = vec![(7, BASE), (3, DIRTY)];
        Self { framing: Some(framing), size: 64 * MIB, flags: CAN_TRIM, blocks: Some([1, 4096, 32 << 20]), contexts }
    }
}

pub(super) fn options(contexts: &[&str]) -> ConnectOptions {
    let contexts = contexts.iter().map(|name| (*name).to_owned()).collect();
    ConnectOptions {
        socket: "/nowhere".into(),
        export: "disk".into(),
        contexts,
        deadline: Duration::from_secs(30),
        longest_read: ConnectOptions::LONGEST_READ,
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) flags: u16,
    pub(super) kind: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) len: u64,
}

pub(super) struct Server {
    pub(super) stream: UnixStream,
    pub(super) framing: Framing,
}

impl Server {
    pub(super) async fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).await.unwrap();
        bytes
    }

    pub(super) async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    pub(super) async fn option_reply(&mut self, option: u32, kind: u32, data: &[u8]) {
        let mut reply = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
        for field in [option, kind, data.len() as u32] {
            reply.extend(field.to_be_bytes());
        }
        reply.extend(data);
        self.send(&reply).await;
    }

    pub(super) async fn greet(stream: UnixStream) -> Self {
        let mut server = Self { stream, framing: Framing::Compact };
        server.send(b"NBDMAGICIHAVEOPT\0\x03").await;
        assert_eq!(server.bytes(4).await, [0, 0, 0, 3]);
        server
    }

    pub(super) async fn next_option(&mut self) -> (u32, Vec<u8>) {
        let header = self.bytes(16).await;
        assert_eq!(header[..8], *b"IHAVEOPT");
        let data = self.bytes(wire::u32_at(&header, 12) as usize).await;
        (wire::u32_at(&header, 8), data)
    }

    /// The handshake up to the transmission phase.
    pub(super) async fn accept(stream: UnixStream, offer: &Offer) -> Self {
        let mut server = Self::greet(stream).await;
        loop {
            let (option, data) = server.next_option().await;
            match option {
                11 if offer.framing == Some(Framing::Extended) => {
                    server.framing = Framing::Extended;
                    server.option_reply(option, 1, &[]).await;
                }
                8 if offer.framing == Some(Framing::Compact) => server.option_reply(option, 1, &[]).await,
                10 => {
                    for (id, name) in &offer.contexts {
                        if data.windows(name.len()).any(|window| window == name.as_bytes()) {
                            server.option_reply(option, 4, &[&id.to_be_bytes(), name.as_bytes()].concat()).await;
                        }
                    }
                    server.option_reply(option, 1, &[]).await;
                }
                7 => {
                    assert_eq!(data, b"\0\0\0\x04disk\0\x01\0\x03");
                    let mut info = vec![0, 0];
                    info.extend(offer.size.to_be_bytes());
                    info.extend(offer.flags.to_be_bytes());
                    server.option_reply(option, 3, &info).await;
                    if let Some(blocks) = offer.blocks {
                        let sizes = blocks.iter().flat_map(|size| size.to_be_bytes());
                        let info: Vec<u8> = [0, 3].into_iter().chain(sizes).collect();
                        server.option_reply(option, 3, &info).await;
                    }
                    server.option_reply(option, 1, &[]).await;
                    return server;
                }
                _ => server.option_reply(option, 0x8000_0001, b"what?").await,
            }
        }
    }

    pub(super) async fn request(&mut self) -> Request {
        let extended = self.framing == Framing::Extended;
        let header = self.bytes(if extended { 32 } else { 28 }).await;
        assert_eq!(wire::u32_at(&header, 0), if extended { 0x21e4_1c71 } else { 0x2560_9513 });
        Request {
            flags: wire::u16_at(&header, 4),
            kind: wire::u16_at(&header, 6),
            cookie: wire::u64_at(&header, 8),
            offset: wire::u64_at(&header, 16),
            len: if extended { wire::u64_at(&header, 24) } else { wire::u32_at(&header, 24).into() },
        }
    }

    pub(super) async fn chunk(&mut self, to: &Request, last: bool, kind: u16, payload: &[u8]) {
        let header = self.header(to, last, kind, payload.len() as u64);
        self.send(&[&header, payload].concat()).await;
    }

    pub(super) fn header(&self, to: &Request, last: bool, kind: u16, len: u64) -> Vec<u8> {
        let extended = self.framing == Framing::Extended;
        let mut out = if extended { 0x6e8a_278c_u32 } else { 0x668e_33ef }.to_be_bytes().to_vec();
        out.extend(u16::from(last).to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend(to.cookie.to_be_bytes());
        if extended {
            out.extend(to.offset.to_be_bytes());
            out.extend(len.to_be_bytes());
        } else {
            out.extend((len as u32).to_be_bytes());
        }
        out
    }

    pub(super) async fn data(&mut self, to: &Request, last: bool, offset: u64, len: u64) {
        self.chunk(to, last, 1, &[&offset.to_be_bytes()[..], &pattern(offset, len)].concat()).await;
    }

    pub(super) async fn hole(&mut self, to: &Request, last: bool, offset: u64, len: u32) {
        self.chunk(to, last, 2, &[&offset.to_be_bytes()[..], &len.to_be_bytes()].concat()).await;
    }

    pub(super) async fn error(&mut self, to: &Request, last: bool, errno: u32, text: &str) {
        let len = (text.len() as u16).to_be_bytes();
        self.chunk(to, last, 0x8001, &[&errno.to_be_bytes()[..], &len, text.as_bytes()].concat()).await;
    }

    pub(super) async fn simple(&mut self, to: &Request, errno: u32) {
        let magic = 0x6744_6698_u32.to_be_bytes();
        self.send(&[&magic[..], &errno.to_be_bytes(), &to.cookie.to_be_bytes()].concat()).await;
    }

    pub(super) async fn status(&mut self, to: &Request, last: bool, context: u32, extents: &[(u64, u64)]) {
        let mut payload = context.to_be_bytes().to_vec();
        if self.framing == Framing::Extended {
            payload.extend((extents.len() as u32).to_be_bytes());
        }
        for (len, flags) in extents {
            for field in [*len, *flags] {
                match self.framing {
                    Framing::Compact => payload.extend((field as u32).to_be_bytes()),
                    Framing::Extended => payload.extend(field.to_be_bytes()),
                }
            }
        }
        let kind = if self.framing == Framing::Extended { 6 } else { 5 };
        self.chunk(to, last, kind, &payload).await;
    }

    /// Nothing comes in a second, and the client did not hang up.
    pub(super) async fn hears_nothing(&mut self) {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let heard = self.stream.try_read(&mut [0]);
        assert!(heard.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock), "{heard:?}");
    }

    /// Waits for the client to hang up.
    pub(super) async fn hung_up(mut self) {
        let mut rest = Vec::new();
        // A reset tells the same: the client left answers unread.
        let _ = self.stream.read_to_end(&mut rest).await;
    }
}

pub(super) fn pattern(offset: u64, len: u64) -> Vec<u8> {
    (offset..offset + len).map(|at| (at % 251) as u8 + 1).collect()
}

/// A buffer that was used before.
pub(super) fn used(len: u64) -> BytesMut {
    BytesMut::from(&vec![0xee; len as usize][..])
}

pub(super) async fn pair(offer: &Offer, contexts: &[&str]) -> (Client, Server) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let options = options(contexts);
    let (client, server) = tokio::join!(Client::start(ours, &options), Server::accept(theirs, offer));
    (client.unwrap(), server)
}

/// Runs `test` with both framings.
pub(super) fn with_both<F: Future<Output = ()>>(test: impl Fn(Offer) -> F) {
    for framing in [Framing::Compact, Framing::Extended] {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(test(Offer::of(framing)));
    }
}
