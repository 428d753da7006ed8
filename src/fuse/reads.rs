//! Reads of images, taken from the kernel and answered by one thread: everything else it hands to fuser, over a socket.
//!
//! A read of a few KiB costs less than waking up a thread for it. So one thread does it all, in turns: it takes the reads that
//! are there, has their requests sent together, and gives the kernel the bytes as they lie in the buffer of the NBD connection.
//! What is read in order is fetched before it is asked for. Reads that are not that simple are answered by tasks.
//!
//! Where being woken up for each answer costs more than the read, the thread looks by itself again and again ([`super::pace`]).

use super::{
    ahead::{Ahead, Fetch},
    answer::{ReadAnswer, Reply},
    device::{BESIDE_WRITE, Device, FAREWELL, Request, answered, farewell},
    image::{ImageError, ImageView, Span},
    mounts,
    pace::{NAP, Pace},
    session::LARGEST_REQUEST,
};
use crate::nbd::{Brought, Lane};
use fuser::Errno;
use nix::{
    errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl::set_timerslack,
        socket::{MsgFlags, recv, send},
    },
};
use std::{
    collections::HashMap,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

/// Reads that are taken in one turn.
const AT_ONCE: usize = 16;

/// QEMU works on so many requests of one connection at a time. A connection that has less to do gets the next one: the more requests
/// meet in one, the fewer times both sides wake up.
const SERVED_AT_ONCE: usize = 16;

/// From so many bytes on an answer is worth the steps that leading it past us takes.
const LONG: usize = 32 << 10;

/// So many reads under way are many.
const MANY: usize = 8;

/// How often a thread that never waits looks for reads that have waited too long.
const LOOK: Duration = Duration::from_millis(100);

/// For fuser to say goodbye, milliseconds.
const PATIENCE_AT_END: u16 = 1000;

/// The largest answer of fuser: a page of a directory.
const LARGEST_OTHER: usize = 128 << 10;

/// What a request to an export is for.
pub enum Wanted {
    /// A read's answer.
    Read(ReadAnswer),
    /// A read that will follow.
    Ahead(Fetch),
}

/// The connections of one image.
pub(super) struct Lanes(Vec<Lane<Wanted>>);

impl Lanes {
    pub fn new(lanes: Vec<Lane<Wanted>>) -> Self {
        Self(lanes)
    }

    /// Asks for what `answer` waits for; it comes back when that is not one request, or not possible here.
    fn ask(&mut self, answer: ReadAnswer) -> Result<(), ReadAnswer> {
        let len = answer.len as u64;
        if answer.image.span(answer.offset, len) != Some(Span::Data(len)) {
            return Err(answer);
        }
        let busy = |lane: &&mut Lane<_>| (lane.has_ended(), lane.in_flight());
        let idle = self.0.iter().position(|lane| !lane.has_ended() && lane.in_flight() < SERVED_AT_ONCE);
        let lane = match idle {
            Some(at) => self.0.get_mut(at),
            None => self.0.iter_mut().min_by_key(busy),
        };
        let Some(lane) = lane else { return Err(answer) };
        match lane.ask(answer.offset, answer.len, answer.begun, Wanted::Read(answer)) {
            Err(Wanted::Read(answer)) => Err(answer),
            _ => Ok(()),
        }
    }

    /// As [`Lanes::ask`], for what the kernel reads ahead: a long answer goes to it without a copy of ours. The last connection has
    /// these.
    fn ask_piped(&mut self, answer: ReadAnswer) -> Result<(), ReadAnswer> {
        let len = answer.len as u64;
        if answer.len < LONG || answer.image.span(answer.offset, len) != Some(Span::Data(len)) {
            return self.ask(answer);
        }
        let head = answer.head();
        let (Some(lane), Some(head)) = (self.last(), head) else { return Err(answer) };
        match lane.ask_piped(answer.offset, answer.len, answer.begun, Wanted::Read(answer), head) {
            Err(Wanted::Read(answer)) => Err(answer),
            _ => Ok(()),
        }
    }

    fn last(&mut self) -> Option<&mut Lane<Wanted>> {
        self.0.iter_mut().rev().find(|lane| !lane.has_ended())
    }

    /// Asks for as many bytes as `place` has. The last connection has these, as long as others live.
    pub fn ask_into(&mut self, offset: u64, place: Vec<u8>, begun: Instant, wanted: Wanted) -> Result<(), Wanted> {
        match self.last() {
            Some(lane) => lane.ask_into(offset, place, begun, wanted),
            None => Err(wanted),
        }
    }
}

/// A file that is read ahead of, and which of the images it is.
type Aheads = HashMap<u64, (usize, Ahead)>;

/// Hands bytes to where they are wanted, or what failed to those who know what to make of failures.
fn finish(wanted: Wanted, brought: Brought<'_>, aheads: &mut Aheads) {
    match (wanted, brought) {
        (Wanted::Read(answer), Brought::Bytes(bytes)) => answer.data(&bytes),
        (Wanted::Read(answer), Brought::Piped(pipe)) => answer.piped(pipe),
        (Wanted::Read(answer), Brought::Nothing) => answer.by_task(),
        (Wanted::Ahead(fetch), brought) => {
            let bytes = if let Brought::Bytes(bytes) = brought { Some(bytes) } else { None };
            if let Some((_, ahead)) = aheads.get_mut(&fetch.handle) {
                ahead.came(fetch, bytes);
            }
        }
    }
}

/// What serves one mount.
pub(super) struct Reads {
    device: Arc<Device>,
    /// Where fuser reads requests and writes answers, one to a packet.
    fuser: OwnedFd,
    view: ImageView,
    lanes: Vec<Lanes>,
    /// By the handle.
    aheads: Aheads,
    pace: Pace,
    looked: Instant,
    /// Whether readers run while we do.
    several_processors: bool,
}

/// How the thread goes on.
enum Turn {
    Busy,
    Idle,
}

/// Nothing is mounted any more, or cannot be served.
enum End {
    Unmounted,
    Failed,
}

impl Reads {
    /// Serves `view`, mounted as `device`, together with the session of fuser at the other end of `fuser`.
    pub fn new(device: Device, fuser: OwnedFd, view: ImageView) -> Self {
        let lanes = view.take_lanes();
        let several_processors = thread::available_parallelism().is_ok_and(|processors| processors.get() > 1);
        let (device, aheads, looked) = (Arc::new(device), HashMap::new(), Instant::now());
        Self { device, fuser, view, lanes, aheads, pace: Pace::new(looked), looked, several_processors }
    }

    /// Serves until nothing is mounted any more. When it cannot be served it is ended: `connection` is its number.
    pub fn run(mut self, connection: u64) {
        let mut buffer = vec![0; LARGEST_REQUEST as usize + BESIDE_WRITE];
        // Of this thread alone. Otherwise its naps are 50 µs longer.
        let _ = set_timerslack(1);
        let end = loop {
            match self.turn(&mut buffer) {
                Ok(Turn::Busy) => {}
                Ok(Turn::Idle) if self.expects_more() => {}
                Ok(Turn::Idle) if self.naps_pay() => thread::sleep(NAP),
                Ok(Turn::Idle) => {
                    if let Err(end) = self.wait() {
                        break end;
                    }
                }
                Err(end) => break end,
            }
        };
        if matches!(end, End::Failed) {
            mounts::abort(connection);
        }
        // Before fuser ends, which says that all is over.
        self.lanes.clear();
        self.end_fuser(&mut buffer);
    }

    /// Whether the next read may come before this thread could be woken up for it.
    fn expects_more(&self) -> bool {
        self.several_processors && self.aheads.values().any(|(_, ahead)| ahead.expects_more())
    }

    /// Whether it is better not to be woken up for the next answer.
    fn naps_pay(&self) -> bool {
        let lanes = || self.lanes.iter().flat_map(|lanes| &lanes.0);
        // Whoever reads in order can do nothing before his answer.
        let in_order = || self.aheads.values().any(|(_, ahead)| ahead.is_in_use());
        self.pace.naps(Instant::now()) && lanes().map(Lane::in_flight).sum::<usize>() >= MANY && !in_order()
    }

    /// Tells fuser that nothing is mounted any more. Without an answer to that it would only see a broken connection.
    fn end_fuser(&self, buffer: &mut [u8]) {
        let fuser = self.fuser.as_raw_fd();
        let told = send(fuser, &farewell(), MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL).is_ok();
        let mut answer = [PollFd::new(self.fuser.as_fd(), PollFlags::POLLIN)];
        while told && poll(&mut answer, PATIENCE_AT_END).is_ok_and(|ready| ready > 0) {
            match recv(fuser, buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(len) if len > 0 && answered(&buffer[..len]) != FAREWELL => {}
                _ => return,
            }
        }
    }

    fn turn(&mut self, buffer: &mut [u8]) -> Result<Turn, End> {
        let mut turn = Turn::Idle;
        for _ in 0..AT_ONCE {
            match self.device.next(buffer) {
                Ok(Some(len)) => self.request(&buffer[..len])?,
                Ok(None) => break,
                Err(errno::Errno::ENODEV) => return Err(End::Unmounted),
                Err(_) => return Err(End::Failed),
            }
            turn = Turn::Busy;
        }
        let (mut answers, mut connections) = (0, 0);
        for lane in self.lanes.iter_mut().flat_map(|lanes| &mut lanes.0) {
            lane.send();
            let before = lane.in_flight();
            if before > 0 && lane.receive(|wanted, brought| finish(wanted, brought, &mut self.aheads)) {
                let answered = before - lane.in_flight();
                answers += answered;
                connections += usize::from(answered > 0);
                turn = Turn::Busy;
            }
        }
        for (index, ahead) in self.aheads.values_mut() {
            if let Some(lanes) = self.lanes.get_mut(*index) {
                ahead.give(lanes);
            }
        }
        if self.pass_answers(buffer)? {
            turn = Turn::Busy;
        }
        let now = Instant::now();
        if answers > 0 {
            self.pace.came(answers, connections, now);
        }
        if now.duration_since(self.looked) >= LOOK {
            self.expire(now);
        }
        Ok(turn)
    }

    fn request(&mut self, message: &[u8]) -> Result<(), End> {
        match Request::of(message) {
            Request::Read { unique, node, handle, offset, size } => {
                let reply = Reply::device(self.device.clone(), unique);
                if let Some((index, answer)) = self.view.read_image(node, offset, size, reply) {
                    self.read(index, handle, answer);
                }
            }
            Request::Release { unique, handle } => {
                self.aheads.remove(&handle);
                self.pass_request(unique, message)?;
            }
            // Images only have holes punched, and what would be written may be too long for the way to fuser.
            Request::Write { unique } => self.device.answer(unique, Err(Errno::EROFS)),
            Request::Other { unique } => self.pass_request(unique, message)?,
        }
        Ok(())
    }

    fn read(&mut self, index: usize, handle: u64, answer: ReadAnswer) {
        let Some(lanes) = self.lanes.get_mut(index) else { return answer.by_task() };
        let left = if ImageView::kernel_reads_ahead(handle) {
            lanes.ask_piped(answer).err()
        } else {
            let new = || (index, Ahead::new(handle, answer.image.clone()));
            let left = self.aheads.entry(handle).or_insert_with(new).1.take(answer, lanes);
            left.and_then(|answer| lanes.ask(answer).err())
        };
        if let Some(answer) = left {
            answer.by_task();
        }
    }

    fn pass_request(&self, unique: u64, message: &[u8]) -> Result<(), End> {
        loop {
            match send(self.fuser.as_raw_fd(), message, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(errno::Errno::EINTR) => {}
                Err(errno::Errno::EAGAIN) => {
                    // It may wait for us just as well.
                    self.pass_answers(&mut vec![0; LARGEST_OTHER])?;
                    let mut fuser = [PollFd::new(self.fuser.as_fd(), PollFlags::POLLIN | PollFlags::POLLOUT)];
                    let _ = poll(&mut fuser, PollTimeout::NONE);
                }
                Err(errno::Errno::EMSGSIZE) => {
                    self.device.answer(unique, Err(Errno::EIO));
                    return Ok(());
                }
                Err(_) => return Err(End::Failed),
            }
        }
    }

    /// Hands fuser's answers on; tells whether there were some.
    fn pass_answers(&self, buffer: &mut [u8]) -> Result<bool, End> {
        let mut some = false;
        loop {
            match recv(self.fuser.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
                // It has ended.
                Ok(0) => return Err(End::Failed),
                Ok(len) => self.device.pass_on(&buffer[..len]),
                Err(errno::Errno::EAGAIN) => return Ok(some),
                Err(errno::Errno::EINTR) => {}
                Err(_) => return Err(End::Failed),
            }
            some = true;
        }
    }

    /// Waits until there is something to do.
    fn wait(&mut self) -> Result<(), End> {
        let now = Instant::now();
        let lanes = || self.lanes.iter().flat_map(|lanes| &lanes.0).filter(|lane| lane.in_flight() > 0);
        let timeout = lanes().filter_map(Lane::oldest).min().map_or(PollTimeout::NONE, |oldest| {
            let left = self.view.deadline().saturating_sub(now.duration_since(oldest));
            PollTimeout::try_from(left.saturating_add(Duration::from_millis(1))).unwrap_or(PollTimeout::MAX)
        });
        let mut wanted = vec![
            PollFd::new(self.device.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.fuser.as_fd(), PollFlags::POLLIN),
        ];
        wanted.extend(lanes().map(|lane| {
            let unsent = if lane.has_unsent() { PollFlags::POLLOUT } else { PollFlags::empty() };
            PollFd::new(lane.as_fd(), PollFlags::POLLIN | unsent)
        }));
        match poll(&mut wanted, timeout) {
            Ok(_) | Err(errno::Errno::EINTR) => Ok(()),
            Err(_) => Err(End::Failed),
        }
    }

    fn expire(&mut self, now: Instant) {
        self.looked = now;
        let patience = self.view.deadline();
        let late = ImageError::TimedOut(patience);
        for lane in self.lanes.iter_mut().flat_map(|lanes| &mut lanes.0) {
            lane.expire(now, patience, |wanted, is_late| match wanted {
                Wanted::Read(answer) if is_late => answer.fail(&late),
                wanted => finish(wanted, Brought::Nothing, &mut self.aheads),
            });
        }
    }
}
