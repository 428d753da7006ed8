//! Answers to what readers ask of images: in time, or with an error and its reason in the log.

use super::{
    ahead::Turn,
    device::{Device, head},
    image::{Image, ImageError, ViewOptions},
};
use crate::{nbd::Pipe, report::Events};
use fuser::{Errno, ReplyData};
use std::{
    fmt::{self, Display, Write},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::{runtime::Handle, time::timeout};

/// So many failures are told in [`LOG_PERIOD`]; the others are counted. A reader that goes on after errors has thousands.
const LOG_BURST: u32 = 16;
const LOG_PERIOD: Duration = Duration::from_secs(10);

/// What the answers need.
pub(super) struct Shared {
    pub options: ViewOptions,
    pub runtime: Handle,
    complaints: Complaints,
}

impl Shared {
    pub fn new(options: ViewOptions) -> Self {
        Self { options, runtime: Handle::current(), complaints: Complaints::default() }
    }

    pub fn complain(&self, image: &dyn Image, doing: Doing, error: &ImageError) {
        if !matches!(error, ImageError::NotSupported) {
            self.complaints.tell(&self.options.events, image.name(), doing, error);
        }
    }

    pub async fn in_time<T>(
        &self,
        begun: Instant,
        work: impl Future<Output = Result<T, ImageError>>,
    ) -> Result<T, ImageError> {
        let deadline = self.options.deadline;
        let left = deadline.saturating_sub(begun.elapsed());
        timeout(left, work).await.unwrap_or(Err(ImageError::TimedOut(deadline)))
    }
}

/// Where a read is answered. The reader gets an error if nobody ever does.
pub(super) enum Reply {
    /// By fuser.
    Fuser(ReplyData),
    /// By ourselves.
    Device(DeviceReply),
}

pub(super) struct DeviceReply {
    device: Arc<Device>,
    /// Absent once it is answered.
    unique: Option<u64>,
}

impl Reply {
    pub fn device(device: Arc<Device>, unique: u64) -> Self {
        Self::Device(DeviceReply { device, unique: Some(unique) })
    }

    pub fn data(self, bytes: &[u8]) {
        match self {
            Self::Fuser(reply) => reply.data(bytes),
            Self::Device(mut reply) => reply.give(Ok(&[bytes])),
        }
    }

    /// Bytes that lie in several places.
    pub fn parts(self, parts: &[&[u8]]) {
        match self {
            Self::Fuser(reply) => reply.data(&parts.concat()),
            Self::Device(mut reply) => reply.give(Ok(parts)),
        }
    }

    pub fn error(self, errno: Errno) {
        match self {
            Self::Fuser(reply) => reply.error(errno),
            Self::Device(mut reply) => reply.give(Err(errno)),
        }
    }
}

impl DeviceReply {
    fn pour(&mut self, pipe: &mut Pipe) {
        if let Some(unique) = self.unique.take() {
            self.device.pour(unique, pipe);
        }
    }

    fn give(&mut self, answer: Result<&[&[u8]], Errno>) {
        if let Some(unique) = self.unique.take() {
            self.device.answer(unique, answer);
        }
    }
}

impl Drop for DeviceReply {
    fn drop(&mut self) {
        self.give(Err(Errno::EIO));
    }
}

/// A read that waits for its answer.
pub struct ReadAnswer {
    pub(super) shared: Arc<Shared>,
    pub(super) image: Arc<dyn Image>,
    pub(super) offset: u64,
    pub(super) len: usize,
    pub(super) reply: Reply,
    pub(super) begun: Instant,
    /// Held until the answer, and not longer: the next read may come before we know that this one was answered.
    pub(super) turn: Option<Turn>,
}

impl ReadAnswer {
    /// Here they are.
    pub(super) fn data(self, bytes: &[u8]) {
        drop(self.turn);
        self.reply.data(bytes);
    }

    /// What the kernel wants before the bytes, if they are to come through a pipe. Nothing where that is not possible.
    pub(super) fn head(&self) -> Option<Vec<u8>> {
        match self.reply {
            Reply::Device(DeviceReply { unique: Some(unique), .. }) => Some(head(unique, 0, self.len).into()),
            _ => None,
        }
    }

    /// Here they are, behind their head.
    pub(super) fn piped(self, pipe: &mut Pipe) {
        drop(self.turn);
        match self.reply {
            Reply::Device(mut reply) => reply.pour(pipe),
            Reply::Fuser(reply) => reply.error(Errno::EIO),
        }
    }

    /// Here they are, in several places.
    pub(super) fn parts(self, parts: &[&[u8]]) {
        drop(self.turn);
        self.reply.parts(parts);
    }

    /// It cannot be read: the reader gets an error and the log the reason.
    pub(super) fn fail(self, error: &ImageError) {
        self.shared.complain(&*self.image, Doing::Reading(self.offset, self.len), error);
        drop(self.turn);
        self.reply.error(error.errno());
    }

    /// Reads in a task.
    pub(super) fn by_task(self) {
        let (shared, image) = (self.shared.clone(), self.image.clone());
        self.shared.runtime.clone().spawn(async move {
            match shared.in_time(self.begun, image.read(self.offset, self.len)).await {
                Ok(bytes) => self.data(&bytes),
                Err(error) => self.fail(&error),
            }
        });
    }
}

/// What the log calls it.
#[derive(Clone, Copy)]
pub(super) enum Doing {
    Reading(u64, usize),
    Discarding(u64, u64),
}

impl Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reading(offset, len) => write!(f, "reading {len} bytes at {offset}"),
            Self::Discarding(offset, len) => write!(f, "discarding {len} bytes at {offset}"),
        }
    }
}

/// Failures on their way to the log, not more than anybody reads.
#[derive(Default)]
struct Complaints(Mutex<Option<Told>>);

struct Told {
    since: Instant,
    count: u32,
}

impl Complaints {
    fn tell(&self, events: &Events, disk: &str, doing: Doing, error: &ImageError) {
        let mut left_out = 0;
        {
            let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match told.as_mut() {
                Some(told) if told.since.elapsed() < LOG_PERIOD => {
                    told.count = told.count.saturating_add(1);
                    if told.count > LOG_BURST {
                        return;
                    }
                }
                other => {
                    left_out = other.map_or(0, |told| told.count.saturating_sub(LOG_BURST));
                    *told = Some(Told { since: Instant::now(), count: 1 });
                }
            }
        }
        let mut text = format!("disk `{disk}`: {doing} fails: {error}");
        let mut cause = std::error::Error::source(error);
        while let Some(next) = cause {
            let _ = write!(text, ": {next}");
            cause = next.source();
        }
        if left_out > 0 {
            let _ = write!(text, " ({left_out} failures before it are not listed)");
        }
        events.warn(text);
    }
}
