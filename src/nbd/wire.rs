//! The transmission phase as bytes: requests out, replies in, and what a reply may be given its request. Pure: no socket, no
//! clock. All integers are big-endian.

use std::{fmt, ops::Range};

const MAGIC_REQUEST: u32 = 0x2560_9513;
const MAGIC_REQUEST_EXTENDED: u32 = 0x21e4_1c71;
const MAGIC_SIMPLE: u32 = 0x6744_6698;
const MAGIC_STRUCTURED: u32 = 0x668e_33ef;
const MAGIC_EXTENDED: u32 = 0x6e8a_278c;

/// The longest reply header.
pub(super) const MAX_HEADER: usize = 32;

const FLAG_LAST: u16 = 1;
/// The request's length counts a payload that follows, not the range it is about.
const FLAG_PAYLOAD: u16 = 1 << 5;

const CHUNK_NONE: u16 = 0;
const CHUNK_DATA: u16 = 1;
const CHUNK_HOLE: u16 = 2;
const CHUNK_STATUS: u16 = 5;
const CHUNK_STATUS_EXTENDED: u16 = 6;
/// Every type with this bit is an error of the same shape; 0x8001 and 0x8002 (with an offset) are in use.
const CHUNK_ERROR_BIT: u16 = 1 << 15;

/// The largest read that is sent as one request, bytes: what every server must accept, and QEMU's maximum.
pub(super) const MAX_READ: u32 = 32 << 20;
/// The largest block status chunk that is accepted, bytes. QEMU stops at 131,072 extents, which are 2 MiB in extended form.
pub(super) const MAX_STATUS_PAYLOAD: u64 = 4 << 20;
/// The largest error chunk that is accepted: its message's length has 16 bits.
pub(super) const MAX_ERROR_PAYLOAD: u64 = 6 + 0xffff + 8;
/// What is kept of a server's message, bytes.
const MAX_TEXT: usize = 4096;

/// What is asked of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read.
    Read,
    /// Leave. Has no reply.
    Disconnect,
    /// Discard.
    Trim,
    /// What the meta contexts say about a range.
    BlockStatus,
}

impl Command {
    fn number(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Disconnect => 2,
            Self::Trim => 4,
            Self::BlockStatus => 7,
        }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Disconnect => "disconnect",
            Self::Trim => "trim",
            Self::BlockStatus => "block status",
        })
    }
}

/// The form of the headers, agreed in the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// Structured replies, lengths of 32 bits.
    Compact,
    /// Extended headers, lengths of 64 bits (QEMU 8.2 and newer).
    Extended,
}

impl Framing {
    /// Bytes before the data of a chunk: its header and an offset.
    pub(super) fn data_header(self) -> usize {
        match self {
            Self::Compact => 20 + 8,
            Self::Extended => MAX_HEADER + 8,
        }
    }

    /// The longest trim or block status, bytes. In compact form it ends at a multiple of 64 KiB, so that pieces of a long range
    /// stay aligned to every block size a server may insist on.
    pub(super) fn max_len(self) -> u64 {
        match self {
            Self::Compact => 0xffff_0000,
            Self::Extended => u64::MAX,
        }
    }
}

/// A piece of a block status answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// Bytes.
    pub len: u64,
    /// Flags as the context defines them: `base:allocation` bit 0 hole, bit 1 zero; dirty bitmap bit 0 dirty.
    pub flags: u64,
}

/// What the protocol forbids and a server did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Violation(pub(super) String);

macro_rules! violation {
    ($($text:tt)*) => { Err(Violation(format!($($text)*))) };
}

/// A request, as far as its replies are judged by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) command: Command,
    pub(super) offset: u64,
    pub(super) len: u64,
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} bytes at {}", self.command, self.len, self.offset)
    }
}

/// A request as bytes, without an allocation.
pub(super) struct RequestBytes {
    bytes: [u8; 32 + 12],
    len: usize,
}

impl RequestBytes {
    fn put<const N: usize>(&mut self, field: [u8; N]) {
        self.bytes[self.len..self.len + N].copy_from_slice(&field);
        self.len += N;
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// Encodes a request. `only_context` narrows a block status to one meta context; it needs extended headers and a server that
/// announces `NBD_FLAG_BLOCK_STATUS_PAYLOAD`.
pub(super) fn encode_request(framing: Framing, cookie: u64, asked: &Asked, only_context: Option<u32>) -> RequestBytes {
    let mut out = RequestBytes { bytes: [0; 44], len: 0 };
    let number = asked.command.number();
    match (framing, only_context) {
        (Framing::Compact, _) => {
            // Longer ranges are split by the caller; cut here, a trim or a map would silently be of another range.
            assert!(u32::try_from(asked.len).is_ok(), "a compact request has a length of 32 bits, not {}", asked.len);
            out.put(MAGIC_REQUEST.to_be_bytes());
            out.put(0u16.to_be_bytes());
            out.put(number.to_be_bytes());
            out.put(cookie.to_be_bytes());
            out.put(asked.offset.to_be_bytes());
            out.put((asked.len as u32).to_be_bytes());
        }
        (Framing::Extended, only_context) => {
            out.put(MAGIC_REQUEST_EXTENDED.to_be_bytes());
            let flags = if only_context.is_some() { FLAG_PAYLOAD } else { 0 };
            out.put(flags.to_be_bytes());
            out.put(number.to_be_bytes());
            out.put(cookie.to_be_bytes());
            out.put(asked.offset.to_be_bytes());
            if let Some(context) = only_context {
                out.put(12u64.to_be_bytes());
                out.put(asked.len.to_be_bytes());
                out.put(context.to_be_bytes());
            } else {
                out.put(asked.len.to_be_bytes());
            }
        }
    }
    out
}

/// The header of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    Simple { errno: u32, cookie: u64 },
    Chunk(Chunk),
}

/// The header of a structured or extended chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) last: bool,
    kind: u16,
    pub(super) cookie: u64,
    /// Only in extended form; repeats the request's.
    offset: Option<u64>,
    /// Of the payload, bytes.
    pub(super) len: u64,
}

/// The first `N` bytes at `at`; zeros where there are none, which no caller relies on.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(field(bytes, at))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(field(bytes, at))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(field(bytes, at))
}

/// The length of the header that begins with these four bytes.
pub(super) fn header_len(framing: Framing, magic: u32) -> Result<usize, Violation> {
    match (framing, magic) {
        (Framing::Compact, MAGIC_SIMPLE) => Ok(16),
        (Framing::Compact, MAGIC_STRUCTURED) => Ok(20),
        (Framing::Extended, MAGIC_EXTENDED) => Ok(32),
        (_, magic) => violation!("a reply begins with {magic:#010x}, which {framing:?} framing does not know"),
    }
}

/// Decodes a header of [`header_len`] bytes.
pub(super) fn decode_header(header: &[u8]) -> Reply {
    match u32_at(header, 0) {
        MAGIC_SIMPLE => Reply::Simple { errno: u32_at(header, 4), cookie: u64_at(header, 8) },
        magic => {
            let extended = magic == MAGIC_EXTENDED;
            Reply::Chunk(Chunk {
                last: u16_at(header, 4) & FLAG_LAST != 0,
                kind: u16_at(header, 6),
                cookie: u64_at(header, 8),
                offset: extended.then(|| u64_at(header, 16)),
                len: if extended { u64_at(header, 24) } else { u32_at(header, 16).into() },
            })
        }
    }
}

/// What follows a chunk's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Payload {
    Nothing,
    /// An offset of 8 bytes, then this many bytes of data.
    Data(usize),
    /// 12 bytes: offset and length.
    Hole,
    /// This many bytes for [`decode_status`].
    Status(usize),
    /// This many bytes for [`decode_error`].
    Error(usize),
}

/// Judges a chunk's header by the request it answers; lengths in the result are bounded.
pub(super) fn expect_payload(framing: Framing, chunk: &Chunk, asked: &Asked) -> Result<Payload, Violation> {
    if chunk.offset.is_some_and(|offset| offset != asked.offset) {
        return violation!("a chunk for {asked} names offset {}", chunk.offset.unwrap_or_default());
    }
    let len = chunk.len as usize;
    match (chunk.kind, asked.command, framing) {
        (CHUNK_NONE, _, _) if chunk.last && chunk.len == 0 => Ok(Payload::Nothing),
        (CHUNK_DATA, Command::Read, _) if chunk.len > 8 && chunk.len - 8 <= asked.len => Ok(Payload::Data(len - 8)),
        (CHUNK_HOLE, Command::Read, _) if chunk.len == 12 => Ok(Payload::Hole),
        (CHUNK_STATUS, Command::BlockStatus, Framing::Compact)
            if (12..=MAX_STATUS_PAYLOAD).contains(&chunk.len) && (chunk.len - 4).is_multiple_of(8) =>
        {
            Ok(Payload::Status(len))
        }
        (CHUNK_STATUS_EXTENDED, Command::BlockStatus, Framing::Extended)
            if (24..=MAX_STATUS_PAYLOAD).contains(&chunk.len) && (chunk.len - 8).is_multiple_of(16) =>
        {
            Ok(Payload::Status(len))
        }
        (kind, _, _) if kind & CHUNK_ERROR_BIT != 0 && (6..=MAX_ERROR_PAYLOAD).contains(&chunk.len) => {
            Ok(Payload::Error(len))
        }
        (kind, _, _) => violation!("a chunk of type {kind:#06x} with {} bytes does not answer {asked}", chunk.len),
    }
}

/// Where in the caller's buffer a piece belongs.
pub(super) fn place(asked: &Asked, offset: u64, len: u64) -> Result<Range<usize>, Violation> {
    let start = offset.checked_sub(asked.offset);
    match start.and_then(|start| Some((start, start.checked_add(len)?))) {
        Some((start, end)) if end <= asked.len => Ok(start as usize..end as usize),
        _ => violation!("{len} bytes at {offset} do not lie inside {asked}"),
    }
}

/// Offset and length of a hole.
pub(super) fn decode_hole(payload: &[u8; 12]) -> (u64, u64) {
    (u64_at(payload, 0), u32_at(payload, 8).into())
}

/// The number and the message of an error chunk. A message is shown, never trusted: cut, and without control characters.
pub(super) fn decode_error(payload: &[u8]) -> Result<(u32, String), Violation> {
    let (errno, len) = (u32_at(payload, 0), usize::from(u16_at(payload, 4)));
    let Some(text) = payload.get(6..6 + len) else {
        return violation!("an error's message of {len} bytes is longer than its chunk of {}", payload.len());
    };
    if errno == 0 {
        return violation!("an error chunk carries error 0");
    }
    Ok((errno, shown(text)))
}

/// A server's words, fit for a terminal.
pub(super) fn shown(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(&text[..text.len().min(MAX_TEXT)]);
    text.trim_end_matches('\0').chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// The context's number and its extents: at least one, none empty.
pub(super) fn decode_status(framing: Framing, payload: &[u8]) -> Result<(u32, Vec<StatusExtent>), Violation> {
    let context = u32_at(payload, 0);
    let extents: Vec<StatusExtent> = match framing {
        Framing::Compact => (payload.get(4..).unwrap_or_default().chunks_exact(8))
            .map(|extent| StatusExtent { len: u32_at(extent, 0).into(), flags: u32_at(extent, 4).into() })
            .collect(),
        Framing::Extended => {
            let extents = payload.get(8..).unwrap_or_default();
            let count = u32_at(payload, 4) as usize;
            if extents.len() != count.saturating_mul(16) {
                return violation!("a block status announces {count} extents in {} bytes", extents.len());
            }
            let extents = extents.chunks_exact(16);
            extents.map(|extent| StatusExtent { len: u64_at(extent, 0), flags: u64_at(extent, 8) }).collect()
        }
    };
    if extents.is_empty() || extents.iter().any(|extent| extent.len == 0) {
        return violation!("a block status for context {context} has no extent, or an empty one");
    }
    Ok((context, extents))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CHUNK_ERROR: u16 = 0x8001;
    const CHUNK_ERROR_OFFSET: u16 = 0x8002;
    const READ: Asked = Asked { command: Command::Read, offset: 0x1000, len: 0x2000 };
    const STATUS: Asked = Asked { command: Command::BlockStatus, offset: 0, len: 1 << 20 };

    fn header(framing: Framing, chunk: &Chunk) -> Vec<u8> {
        let mut out = match framing {
            Framing::Compact => MAGIC_STRUCTURED,
            Framing::Extended => MAGIC_EXTENDED,
        }
        .to_be_bytes()
        .to_vec();
        out.extend(u16::from(chunk.last).to_be_bytes());
        out.extend(chunk.kind.to_be_bytes());
        out.extend(chunk.cookie.to_be_bytes());
        match framing {
            Framing::Compact => out.extend((chunk.len as u32).to_be_bytes()),
            Framing::Extended => {
                out.extend(chunk.offset.unwrap_or_default().to_be_bytes());
                out.extend(chunk.len.to_be_bytes());
            }
        }
        out
    }

    #[test]
    fn requests_have_the_specified_bytes() {
        let trim = Asked { command: Command::Trim, offset: 0x0102_0304_0506_0708, len: 0x1122_3344 };
        let compact = encode_request(Framing::Compact, 0xa1a2_a3a4_a5a6_a7a8, &trim, None);
        let cookie_and_offset =
            [0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7, 0xa8, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08];
        let mut bytes = vec![0x25, 0x60, 0x95, 0x13, 0, 0, 0, 4];
        bytes.extend(cookie_and_offset);
        bytes.extend([0x11, 0x22, 0x33, 0x44]);
        assert_eq!(compact.as_slice(), bytes);

        let extended = encode_request(Framing::Extended, 0xa1a2_a3a4_a5a6_a7a8, &trim, None);
        let mut bytes = vec![0x21, 0xe4, 0x1c, 0x71, 0, 0, 0, 4];
        bytes.extend(cookie_and_offset);
        bytes.extend([0, 0, 0, 0, 0x11, 0x22, 0x33, 0x44]);
        assert_eq!(extended.as_slice(), bytes);
    }

    #[test]
    fn a_status_of_one_context_carries_its_length_in_the_payload() {
        let bytes = encode_request(Framing::Extended, 1, &STATUS, Some(9));
        assert_eq!(bytes.as_slice()[4..8], [0, 32, 0, 7]);
        assert_eq!(bytes.as_slice()[24..], [0, 0, 0, 0, 0, 0, 0, 12, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 9]);
    }

    #[test]
    fn pieces_must_lie_inside_the_read() {
        assert_eq!(place(&READ, 0x1000, 0x2000).unwrap(), 0..0x2000);
        assert_eq!(place(&READ, 0x2fff, 1).unwrap(), 0x1fff..0x2000);
        for (offset, len) in [(0xfff, 1), (0xfff, 2), (0x3000, 1), (0x2fff, 2), (u64::MAX, 2), (0x1001, u64::MAX)] {
            place(&READ, offset, len).unwrap_err();
        }
    }

    #[test]
    fn chunks_must_suit_their_request() {
        let chunk = |kind, len| Chunk { last: true, kind, cookie: 1, offset: None, len };
        let judge = |asked: &Asked, kind, len| expect_payload(Framing::Compact, &chunk(kind, len), asked);
        assert_eq!(judge(&READ, CHUNK_DATA, 8 + 0x2000), Ok(Payload::Data(0x2000)));
        for (asked, kind, len) in [
            (&READ, CHUNK_DATA, 8),
            (&READ, CHUNK_DATA, 8 + 0x2001),
            (&READ, CHUNK_HOLE, 11),
            (&READ, CHUNK_STATUS, 12),
            (&READ, CHUNK_NONE, 1),
            (&READ, 77, 0),
            (&READ, CHUNK_ERROR, 5),
            (&READ, CHUNK_ERROR, MAX_ERROR_PAYLOAD + 1),
            (&STATUS, CHUNK_DATA, 9),
            (&STATUS, CHUNK_STATUS, 4),
            (&STATUS, CHUNK_STATUS, 13),
            (&STATUS, CHUNK_STATUS, 4 + (MAX_STATUS_PAYLOAD & !7)),
            (&STATUS, CHUNK_STATUS_EXTENDED, 24),
        ] {
            judge(asked, kind, len).unwrap_err();
        }
        let elsewhere = Chunk { offset: Some(0), ..chunk(CHUNK_NONE, 0) };
        expect_payload(Framing::Extended, &elsewhere, &READ).unwrap_err();
        let going_on = Chunk { last: false, ..chunk(CHUNK_NONE, 0) };
        expect_payload(Framing::Compact, &going_on, &READ).unwrap_err();
    }

    #[test]
    fn every_type_with_the_error_bit_is_an_error_even_with_an_offset() {
        let mut payload = 5u32.to_be_bytes().to_vec();
        payload.extend(3u16.to_be_bytes());
        payload.extend(b"no\x1b");
        payload.extend(7u64.to_be_bytes());
        assert_eq!(decode_error(&payload), Ok((5, "no\u{fffd}".into())));
        for kind in [CHUNK_ERROR, CHUNK_ERROR_OFFSET, 0xffff] {
            let chunk = Chunk { last: false, kind, cookie: 1, offset: None, len: 17 };
            assert_eq!(expect_payload(Framing::Compact, &chunk, &READ), Ok(Payload::Error(17)));
        }
    }

    proptest! {
        #[test]
        fn chunk_headers_survive_the_wire(
            extended: bool, last: bool, kind: u16, cookie: u64, offset: u64, len: u32, high in 0u64..1 << 32,
        ) {
            let framing = if extended { Framing::Extended } else { Framing::Compact };
            let (offset, len) =
                if extended { (Some(offset), u64::from(len) | high << 32) } else { (None, len.into()) };
            let chunk = Chunk { last, kind, cookie, offset, len };
            let bytes = header(framing, &chunk);
            prop_assert_eq!(header_len(framing, u32_at(&bytes, 0)), Ok(bytes.len()));
            prop_assert_eq!(decode_header(&bytes), Reply::Chunk(chunk));
        }

        #[test]
        fn hostile_payloads_are_decoded_or_refused_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = decode_header(&bytes);
            let _ = decode_error(&bytes);
            for framing in [Framing::Compact, Framing::Extended] {
                if let Ok((_, extents)) = decode_status(framing, &bytes) {
                    prop_assert!(extents.len() <= bytes.len() / 8);
                    prop_assert!(extents.iter().all(|extent| extent.len > 0));
                }
            }
        }
    }
}
