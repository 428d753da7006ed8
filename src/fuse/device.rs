//! The kernel's end of a mount, for what does not go through fuser. Layouts are those of `linux/fuse.h`, in the machine's byte order.

use crate::nbd::Pipe;
use fuser::Errno;
use nix::{
    errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::uio::writev,
    unistd,
};
use std::{
    io::{self, IoSlice},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// `fuse_in_header`, bytes.
const HEADER: usize = 40;
/// `fuse_read_in`, bytes.
const READ: usize = 40;
/// `fuse_out_header`, bytes.
const ANSWER: usize = 16;
/// What the kernel insists on beyond the largest write when it is read from.
pub(super) const BESIDE_WRITE: usize = 8192;

const FUSE_READ: u32 = 15;
const FUSE_WRITE: u32 = 16;
const FUSE_RELEASE: u32 = 18;
const FUSE_INIT: u32 = 26;
const FUSE_DESTROY: u32 = 38;

/// The number of our [`farewell`], which the kernel gives to no request.
pub(super) const FAREWELL: u64 = u64::MAX;

/// What the kernel asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// `FUSE_READ` of `size` bytes at `offset` of the file `node`, opened as `handle`.
    Read { unique: u64, node: u64, handle: u64, offset: u64, size: u32 },
    /// `FUSE_WRITE`.
    Write { unique: u64 },
    /// `FUSE_RELEASE`: what was opened as `handle` is closed.
    Release { unique: u64, handle: u64 },
    /// Anything else.
    Other { unique: u64 },
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |field| u32::from_ne_bytes(*field))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |field| u64::from_ne_bytes(*field))
}

impl Request {
    /// Takes apart what one read from the device brought.
    pub fn of(message: &[u8]) -> Self {
        let unique = u64_at(message, 8);
        match u32_at(message, 4) {
            FUSE_READ if message.len() >= HEADER + READ => Self::Read {
                unique,
                node: u64_at(message, 16),
                handle: u64_at(message, HEADER),
                offset: u64_at(message, HEADER + 8),
                size: u32_at(message, HEADER + 16),
            },
            FUSE_WRITE => Self::Write { unique },
            FUSE_RELEASE => Self::Release { unique, handle: u64_at(message, HEADER) },
            _ => Self::Other { unique },
        }
    }
}

/// A greeting as a kernel would send it that offers nothing: `FUSE_INIT`, version 7.31.
pub(super) fn greeting() -> Vec<u8> {
    let mut message = request(FUSE_INIT, 1, 64);
    for (at, field) in [(HEADER, 7u32), (HEADER + 4, 31)] {
        message[at..at + 4].copy_from_slice(&field.to_ne_bytes());
    }
    message
}

/// A request to end.
pub(super) fn farewell() -> Vec<u8> {
    request(FUSE_DESTROY, FAREWELL, 0)
}

fn request(opcode: u32, unique: u64, payload: usize) -> Vec<u8> {
    let mut message = vec![0; HEADER + payload];
    let len = message.len() as u32;
    message[..4].copy_from_slice(&len.to_ne_bytes());
    message[4..8].copy_from_slice(&opcode.to_ne_bytes());
    message[8..16].copy_from_slice(&unique.to_ne_bytes());
    message
}

/// What comes before the `len` bytes of an answer.
pub(super) fn head(unique: u64, error: i32, len: usize) -> [u8; ANSWER] {
    let mut head = [0; ANSWER];
    head[..4].copy_from_slice(&((ANSWER + len) as u32).to_ne_bytes());
    head[4..8].copy_from_slice(&error.to_ne_bytes());
    head[8..].copy_from_slice(&unique.to_ne_bytes());
    head
}

/// Which request an answer is to.
pub(super) fn answered(answer: &[u8]) -> u64 {
    u64_at(answer, 8)
}

/// An open `/dev/fuse`, mounted. Reading does not wait.
#[derive(Debug)]
pub(super) struct Device(OwnedFd);

impl Device {
    /// Takes over a descriptor of a mounted session; everybody who has the same one does not wait on it any more.
    pub fn new(descriptor: OwnedFd) -> io::Result<Self> {
        fcntl(&descriptor, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK))?;
        Ok(Self(descriptor))
    }

    /// The next request, if there is one; its length. `ENODEV` when nothing is mounted any more.
    pub fn next(&self, buffer: &mut [u8]) -> Result<Option<usize>, errno::Errno> {
        loop {
            match unistd::read(&self.0, buffer) {
                Ok(len) => return Ok(Some(len)),
                Err(errno::Errno::EAGAIN) => return Ok(None),
                // Interrupted, we or the asker.
                Err(errno::Errno::EINTR | errno::Errno::ENOENT) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Answers a request, with bytes that may lie in several places. Nobody is there to hear of an error: the asker was interrupted, or nothing is mounted any more.
    pub fn answer(&self, unique: u64, answer: Result<&[&[u8]], Errno>) {
        let (error, parts) = match answer {
            Ok(parts) => (0, parts),
            Err(error) => (-i32::from(error), &[][..]),
        };
        let head = head(unique, error, parts.iter().map(|part| part.len()).sum());
        let whole: Vec<_> = [&head[..]].iter().chain(parts).map(|part| IoSlice::new(part)).collect();
        let _ = writev(&self.0, &whole);
    }

    /// Answers a request with what a pipe holds: its [`head`] and the bytes.
    pub fn pour(&self, unique: u64, pipe: &mut Pipe) {
        // Whoever is not there any more hears neither of them.
        if pipe.pour(self).is_err() {
            self.answer(unique, Err(Errno::EIO));
        }
    }

    /// Hands on an answer as somebody else made it.
    pub fn pass_on(&self, answer: &[u8]) {
        let _ = unistd::write(&self.0, answer);
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A `FUSE_READ` of 4096 bytes at 64 KiB.
    fn read() -> Vec<u8> {
        let mut message = vec![0; HEADER + READ];
        let long =
            |message: &mut [u8], at: usize, value: u64| message[at..at + 8].copy_from_slice(&value.to_ne_bytes());
        message[..4].copy_from_slice(&80u32.to_ne_bytes());
        message[4..8].copy_from_slice(&15u32.to_ne_bytes());
        for (at, value) in [(8, 0x1234), (16, 2), (40, 7), (48, 64 << 10), (56, 4096)] {
            long(&mut message, at, value);
        }
        message
    }

    #[test]
    fn a_read_is_taken_apart_and_everything_else_keeps_its_number() {
        let request = Request::Read { unique: 0x1234, node: 2, handle: 7, offset: 64 << 10, size: 4096 };
        assert_eq!(Request::of(&read()), request);
        for (opcode, expected) in [(1, Request::Other { unique: 0x1234 }), (16, Request::Write { unique: 0x1234 })] {
            let mut message = read();
            message[4] = opcode;
            assert_eq!(Request::of(&message), expected);
        }
        assert_eq!(Request::of(&read()[..HEADER + 8]), Request::Other { unique: 0x1234 }, "cut off");
    }

    proptest! {
        #[test]
        fn nothing_that_comes_does_harm(message in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Request::of(&message);
        }
    }
}
