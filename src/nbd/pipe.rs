//! A way past this process: what a server sent goes from its socket to somebody else's file without a copy of ours.

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd,
};
use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

/// A pipe that holds one answer, or none: a head, which its receiver needs, and the bytes that were asked for. Neither end ever
/// waits.
#[derive(Debug)]
pub struct Pipe {
    output: OwnedFd,
    input: OwnedFd,
    /// Bytes in it.
    held: usize,
    /// Of these, not from the server.
    head: usize,
}

impl Pipe {
    /// One that is large enough for `longest` bytes as a socket has them: some KiB to a part, of which a pipe has one for every
    /// page of its size. Where the user may not have so many (`fs.pipe-user-pages-soft`) it is smaller.
    pub(super) fn new(longest: usize) -> io::Result<Self> {
        let (output, input) = unistd::pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
        let size = i32::try_from(longest.next_power_of_two().saturating_mul(2)).unwrap_or(i32::MAX);
        let _ = fcntl(&input, FcntlArg::F_SETPIPE_SZ(size));
        Ok(Self { output, input, held: 0, head: 0 })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.held == 0
    }

    /// Begins an answer with `head` and what has come of its bytes. `false`, and none is begun, if there is no room for them.
    pub(super) fn hold(&mut self, head: &[u8], bytes: &[u8]) -> bool {
        let begin = [head, bytes].concat();
        if !self.is_empty() || begin.len() > nix::libc::PIPE_BUF {
            return false;
        }
        // So few are written all or not at all (pipe(7)).
        let written = unistd::write(&self.input, &begin).is_ok();
        if written {
            (self.held, self.head) = (begin.len(), head.len());
        }
        written
    }

    /// Moves up to `len` bytes in; how many.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when the socket has none, [`io::ErrorKind::StorageFull`] when the pipe takes none, and others of
    /// `splice(2)`.
    pub(super) fn fill(&mut self, socket: impl AsFd, len: usize) -> io::Result<usize> {
        for _ in 0..2 {
            match splice(&socket, None, &self.input, None, len, SpliceFFlags::SPLICE_F_NONBLOCK) {
                Ok(came) => {
                    self.held += came;
                    return Ok(came);
                }
                // Either of them. The socket may have got something meanwhile.
                Err(Errno::EAGAIN) => {
                    let mut readable = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
                    if poll(&mut readable, PollTimeout::ZERO)? == 0 {
                        return Err(io::ErrorKind::WouldBlock.into());
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::ErrorKind::StorageFull.into())
    }

    /// Copies the bytes behind the head, which are exactly as many as there is room for, into this process after all.
    pub(super) fn take_back(&mut self, mut into: &mut [u8]) -> io::Result<()> {
        unistd::read(&self.output, &mut vec![0; self.head])?;
        while !into.is_empty() {
            match unistd::read(&self.output, into)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => into = &mut into[read..],
            }
        }
        self.held = 0;
        Ok(())
    }

    /// Gives all that is held to `receiver`, in one go.
    ///
    /// # Errors
    /// Those of `splice(2)`; what is held then is lost.
    pub fn pour(&mut self, receiver: impl AsFd) -> io::Result<()> {
        let poured = splice(&self.output, None, receiver, None, self.held, SpliceFFlags::SPLICE_F_NONBLOCK)?;
        self.held -= poured.min(self.held);
        if self.is_empty() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }
}
