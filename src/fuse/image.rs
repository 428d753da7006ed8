//! Disks as files: one directory, one read-only file per disk, of exactly the disk's size.
//!
//! Reads come from [`super::reads`], everything else from fuser. Neither thread waits: what takes time is answered later, by a
//! connection's lane or by a tokio task, so many requests are under way at a time, each with a deadline: whoever reads a file
//! cannot be interrupted while he waits for us.

use super::{
    answer::{Doing, ReadAnswer, Reply, Shared},
    reads::{Lanes, Wanted},
    session::{LARGEST_REQUEST, configure, directory_attributes, file_attributes},
};
use crate::{
    nbd::{Lane, NbdError},
    report::Events,
    restore::RestoreError,
};
use async_trait::async_trait;
use bytes::Bytes;
use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, KernelConfig,
    OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek,
    ReplyOpen, ReplyStatfs, Request, TimeOrNow,
};
use std::{
    ffi::OsStr,
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};
use thiserror::Error;

/// Nothing that is told about a file ever changes.
const TTL: Duration = Duration::from_hours(1);
const BLOCK: u32 = 4096;
/// `fallocate(2)`: `FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE`.
const PUNCH_HOLE: i32 = 0x3;
/// Why a file does not do what it was asked.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The archive does not give the content.
    #[error(transparent)]
    Archive(#[from] RestoreError),
    /// The export does not give it.
    #[error(transparent)]
    Nbd(#[from] NbdError),
    /// Only what changed can be read.
    #[error("byte {0} is outside of what changed since the base, where the export cannot be read")]
    Clean(u64),
    /// It was given away.
    #[error("byte {0} was discarded by punching a hole")]
    Discarded(u64),
    /// The answer takes too long.
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    /// The thread that reads died.
    #[error("reading ended unexpectedly")]
    Died,
    /// This image has no such operation.
    #[error("not supported")]
    NotSupported,
}

impl ImageError {
    pub(super) fn errno(&self) -> Errno {
        match self {
            Self::NotSupported => Errno::EOPNOTSUPP,
            _ => Errno::EIO,
        }
    }
}

/// What `lseek` looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Find {
    /// A byte that has to be read.
    Data,
    /// A byte that is zero, or cannot be read.
    Hole,
}

/// Whether the kernel may keep pages of a file, and read ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caching {
    /// It may: all of the file can be read, and never changes.
    Cached,
    /// Every read comes as the reader made it, so none fails because of what lies behind. Reads may then be short.
    Direct,
}

/// Bytes of a file that are all of one kind; their number, not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// They can be asked for in one request.
    Data(u64),
    /// They are zero.
    Zero(u64),
}

/// Whether holes can be punched into a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Punch {
    /// Yes; the file can be opened for writing then, which `fallocate` demands.
    Offered,
    /// No.
    Refused,
}

/// The content of one file.
#[async_trait]
pub trait Image: Send + Sync + 'static {
    /// A plain file name.
    fn name(&self) -> &str;

    /// Bytes.
    fn size(&self) -> u64;

    /// Bytes that are no holes, at most the size.
    fn data_bytes(&self) -> u64;

    /// How the kernel may read.
    fn caching(&self) -> Caching;

    /// How much the kernel should ask for at a time at most, bytes.
    fn longest_read(&self) -> u32 {
        LARGEST_REQUEST
    }

    /// Whether [`Image::punch`] does something.
    fn punching(&self) -> Punch;

    /// `len` bytes at `offset`, which lie inside the file; with [`Caching::Direct`] also fewer, but at least one.
    async fn read(&self, offset: u64, len: usize) -> Result<Bytes, ImageError>;

    /// Connections for what [`Image::span`] says is data; from the second call on none.
    fn take_lanes(&self) -> Vec<Lane<Wanted>> {
        Vec::new()
    }

    /// What lies at `offset` and can be had without [`Image::read`]: at most `most` bytes, which are in the file. `None` where that is
    /// not so.
    fn span(&self, _offset: u64, _most: u64) -> Option<Span> {
        None
    }

    /// Whether all of `len` bytes at `offset`, which could be read before, still can.
    fn has_still(&self, _offset: u64, _len: usize) -> bool {
        true
    }

    /// Gives away `len` bytes at `offset`, which lie inside the file. They need not be readable any more.
    async fn punch(&self, offset: u64, len: u64) -> Result<(), ImageError>;

    /// The first such byte from `offset` on, which lies inside the file.
    fn find(&self, offset: u64, what: Find) -> Option<u64>;
}

/// How to answer.
#[derive(Clone)]
pub struct ViewOptions {
    /// Requests that take longer fail with `EIO`.
    pub deadline: Duration,
    /// Time stamp of all files.
    pub time: SystemTime,
    /// Where failures are told, each with its reason.
    pub events: Events,
}

/// A directory of images. Clones show the same.
#[derive(Clone)]
pub struct ImageView {
    images: Arc<[Arc<dyn Image>]>,
    shared: Arc<Shared>,
    next_handle: Arc<AtomicU64>,
}

impl ImageView {
    /// Shows `images`, whose names differ. Requests are answered by tasks of the tokio runtime in which this is called.
    pub fn new(images: Vec<Arc<dyn Image>>, options: ViewOptions) -> Self {
        Self { images: images.into(), shared: Arc::new(Shared::new(options)), next_handle: Arc::new(AtomicU64::new(1)) }
    }

    pub(super) fn longest_read(&self) -> u32 {
        self.images.iter().map(|image| image.longest_read()).max().unwrap_or(LARGEST_REQUEST)
    }

    pub(super) fn deadline(&self) -> Duration {
        self.shared.options.deadline
    }

    /// The connections of each image, for [`ImageView::read_image`].
    pub(super) fn take_lanes(&self) -> Vec<Lanes> {
        self.images.iter().map(|image| Lanes::new(image.take_lanes())).collect()
    }

    /// Begins a read of `size` bytes at `offset` of the file `node`, and tells which image that is; answers one of no bytes.
    pub(super) fn read_image(&self, node: u64, offset: u64, size: u32, reply: Reply) -> Option<(usize, ReadAnswer)> {
        let Some(image) = self.image(INodeNo(node)) else {
            reply.error(Errno::EISDIR);
            return None;
        };
        let len = image.size().saturating_sub(offset).min(size.into()) as usize;
        if len == 0 {
            reply.data(&[]);
            return None;
        }
        let (shared, image, begun) = (self.shared.clone(), image.clone(), Instant::now());
        let answer = ReadAnswer { shared, image, offset, len, reply, begun, turn: None };
        Some(((node - FIRST) as usize, answer))
    }

    /// Whether the kernel reads ahead of whoever opened a file as `handle`.
    pub(super) fn kernel_reads_ahead(handle: u64) -> bool {
        handle == NOT_AHEAD
    }

    fn image(&self, ino: INodeNo) -> Option<&Arc<dyn Image>> {
        ino.0.checked_sub(FIRST).and_then(|index| self.images.get(index as usize))
    }

    fn attributes(&self, ino: INodeNo) -> Option<FileAttr> {
        if ino == INodeNo::ROOT {
            return Some(directory_attributes(ino, self.shared.options.time));
        }
        let image = self.image(ino)?;
        let attributes = file_attributes(ino, image.size(), self.shared.options.time);
        let perm = if image.punching() == Punch::Offered { 0o600 } else { 0o400 };
        // Programs look for holes only where a file has fewer blocks than its size needs.
        Some(FileAttr { blocks: image.data_bytes().div_ceil(512), blksize: 1 << 20, perm, ..attributes })
    }
}

/// Inode of the first image; 1 is the directory.
const FIRST: u64 = 2;
/// Handle of every file that the kernel reads ahead of.
const NOT_AHEAD: u64 = 0;

// Reads and writes do not come here, but to `reads`.

impl Filesystem for ImageView {
    fn init(&mut self, _: &Request, kernel: &mut KernelConfig) -> io::Result<()> {
        configure(kernel, self.longest_read());
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent != INodeNo::ROOT {
            return reply.error(Errno::ENOTDIR);
        }
        let found = self.images.iter().position(|image| name == image.name());
        match found.map(|index| INodeNo(index as u64 + FIRST)).and_then(|ino| self.attributes(ino)) {
            Some(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(ino) {
            Some(attributes) => reply.attr(&TTL, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let Some(image) = self.image(ino) else { return reply.error(Errno::EISDIR) };
        if flags.acc_mode() != OpenAccMode::O_RDONLY && image.punching() == Punch::Refused {
            return reply.error(Errno::EROFS);
        }
        let (handle, flags) = match image.caching() {
            Caching::Cached => (NOT_AHEAD, FopenFlags::FOPEN_KEEP_CACHE),
            Caching::Direct => (self.next_handle.fetch_add(1, Ordering::Relaxed), FopenFlags::FOPEN_DIRECT_IO),
        };
        // Closing a file, which every exec of a program that has it open does, must not wait for us.
        reply.opened(FileHandle(handle), flags | FopenFlags::FOPEN_NOFLUSH);
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let Some(image) = self.image(ino) else { return reply.error(Errno::EISDIR) };
        if mode != PUNCH_HOLE || image.punching() == Punch::Refused {
            return reply.error(Errno::EOPNOTSUPP);
        }
        let len = image.size().saturating_sub(offset).min(length);
        if len == 0 {
            return reply.ok();
        }
        let (shared, image, begun) = (self.shared.clone(), image.clone(), Instant::now());
        self.shared.runtime.spawn(async move {
            match shared.in_time(begun, image.punch(offset, len)).await {
                Ok(()) => reply.ok(),
                Err(error) => {
                    shared.complain(&*image, Doing::Discarding(offset, len), &error);
                    reply.error(error.errno());
                }
            }
        });
    }

    fn lseek(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let Some(image) = self.image(ino) else { return reply.error(Errno::EISDIR) };
        let size = image.size();
        let offset = match u64::try_from(offset) {
            Ok(offset) if offset < size => offset,
            _ => return reply.error(Errno::ENXIO),
        };
        let found = match whence {
            nix::libc::SEEK_DATA => image.find(offset, Find::Data),
            // Behind the end of every file is a hole.
            nix::libc::SEEK_HOLE => Some(image.find(offset, Find::Hole).unwrap_or(size)),
            _ => return reply.error(Errno::EINVAL),
        };
        match found.map(i64::try_from) {
            Some(Ok(found)) => reply.offset(found),
            Some(Err(_)) => reply.error(Errno::EOVERFLOW),
            None => reply.error(Errno::ENXIO),
        }
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        if ino != INodeNo::ROOT {
            return reply.error(Errno::ENOTDIR);
        }
        let dots = [".", ".."].map(|name| (INodeNo::ROOT, FileType::Directory, name));
        let files = self.images.iter().enumerate();
        let files = files.map(|(index, image)| (INodeNo(index as u64 + FIRST), FileType::RegularFile, image.name()));
        let entries = dots.into_iter().chain(files).enumerate().skip(usize::try_from(offset).unwrap_or(usize::MAX));
        for (index, (ino, kind, name)) in entries {
            if reply.add(ino, index as u64 + 1, kind, Path::new(name)) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let size = self.images.iter().map(|image| image.size()).fold(0, u64::saturating_add);
        reply.statfs(size.div_ceil(BLOCK.into()), 0, 0, self.images.len() as u64, 0, BLOCK, 255, BLOCK);
    }

    // What would change something. Without these the kernel would tell ENOSYS, which programs do not expect.

    fn setattr(
        &self,
        _: &Request,
        _: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(Errno::EROFS);
    }

    fn create(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        reply.error(Errno::EROFS);
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn rename(&self, _: &Request, _: INodeNo, _: &OsStr, _: INodeNo, _: &OsStr, _: RenameFlags, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }
}
