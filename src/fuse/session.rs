//! One mount: it begins with a check of the place and ends on every way out.

use super::{
    device::{Device, greeting},
    export::LONGEST_READ,
    image::ImageView,
    mounts::{self, Busy, MountPoint},
    reads::Reads,
};
use fuser::{
    BackgroundSession, Config, FileAttr, FileType, Filesystem, INodeNo, InitFlags, KernelConfig, MountOption, Request,
    Session, SessionACL,
};
use nix::{
    sys::socket::{AddressFamily, SockFlag, SockType, socketpair},
    unistd::{self, geteuid, getgid, getuid},
};
use std::{
    fs, io,
    mem::{self, ManuallyDrop},
    os::fd::AsFd,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant, SystemTime},
};
use thiserror::Error;

const DEVICE: &str = "/dev/fuse";
/// Bytes of the largest request: the kernel's limit (`fs.fuse.max_pages_limit`, 256 pages). Larger values only cost memory: every thread of
/// the session reserves a write of this size.
pub const LARGEST_REQUEST: u32 = 1 << 20;
/// Requests that the kernel sends ahead of their answers. Its default is 16.
const MAX_BACKGROUND: u16 = 64;
/// How long the session's thread may take to notice that its connection is gone.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// How often the end of the session's thread is looked for.
const POLL: Duration = Duration::from_millis(10);

/// Why something cannot be mounted or unmounted.
#[derive(Debug, Error)]
pub enum FuseError {
    /// The kernel has no FUSE, or does not show it to us.
    #[error("no {DEVICE}: load the kernel module `fuse`, or let the container use the device")]
    NoDevice,
    /// Only root mounts without help.
    #[error("neither root nor `fusermount3` there: install the package fuse3, or run as root")]
    NoHelper,
    /// The place is no directory.
    #[error("`{0}` is no directory")]
    NotADirectory(PathBuf),
    /// Files there would be hidden.
    #[error("`{0}` is not empty")]
    NotEmpty(PathBuf),
    /// Something is mounted there already.
    #[error("`{path}` is a mount point already, of type {fs_type}")]
    AlreadyMounted {
        /// The place.
        path: PathBuf,
        /// What is there.
        fs_type: String,
    },
    /// Nothing is mounted there.
    #[error("nothing is mounted at `{0}`")]
    NotMounted(PathBuf),
    /// The mount is somebody else's.
    #[error("what is mounted at `{path}`, of type {fs_type}, is none of pvebackup's mounts")]
    Foreign {
        /// The place.
        path: PathBuf,
        /// What is there.
        fs_type: String,
    },
    /// Files are open.
    #[error("`{0}` is busy: somebody has a file open there")]
    Busy(PathBuf),
    /// Mounting failed.
    #[error("cannot mount at `{path}`")]
    Mount {
        /// The place.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Unmounting failed.
    #[error("cannot unmount `{path}`")]
    Unmount {
        /// The place.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The system does not tell about a path.
    #[error("cannot {doing} `{path}`")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

impl FuseError {
    pub(super) fn io(doing: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { doing, path: path.to_owned(), source }
    }
}

/// How to mount.
#[derive(Clone, Copy, Debug, Default)]
pub struct MountOptions {
    /// Bytes that the kernel reads ahead of a reader, in KiB; `None` leaves its 128. With 4096 a reader of one stream gets 15
    /// times as much from a backend that needs 0.5 ms. Only root can set it; for others it stays.
    pub read_ahead_kib: Option<u32>,
    /// The kernel refuses whatever would change something, instead of asking.
    pub read_only: bool,
}

impl MountOptions {
    /// What suits an export whose pages the kernel may keep: five requests at a time. More is no faster, and each KiB is one of memory.
    pub fn of_export() -> Self {
        Self { read_ahead_kib: Some((5 * LONGEST_READ) >> 10), read_only: false }
    }
}

/// How a mount ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmounted {
    /// Nobody used it.
    Cleanly,
    /// Files were open; their readers get an error.
    Aborted,
}

/// A mounted file system and the thread that serves it. Only its owner can see into it (`allow_other` is not set).
///
/// Dropping it unmounts, which may block for some seconds. When the process is killed the kernel ends the connection: readers get
/// an error, and the mount stays behind dead until [`mounts::clear_dead`].
#[derive(Debug)]
pub struct Mount {
    point: MountPoint,
    /// Never dropped. When a session of fuser 0.18 ends it unmounts its path, whatever is mounted there by then (its test for that is
    /// the wrong way round): that may be the mount of another run, which followed ours. The price is one descriptor, open for as
    /// long as we live.
    session: ManuallyDrop<BackgroundSession>,
}

impl Mount {
    /// Looks whether [`Mount::start`] would find all that it needs at `dir`, and takes dead mounts of ours there away. Returns the
    /// path without links.
    ///
    /// # Errors
    /// Those of [`Mount::start`] that can be known before.
    pub fn check(dir: &Path) -> Result<PathBuf, FuseError> {
        if !Path::new(DEVICE).exists() {
            return Err(FuseError::NoDevice);
        }
        let path = mounts::absolute(dir)?;
        mounts::clear_dead(&path)?;
        if let Some(mount) = mounts::at(&path)? {
            return Err(FuseError::AlreadyMounted { path, fs_type: mount.fs_type });
        }
        if !fs::metadata(&path).map_err(|source| FuseError::io("look at", &path, source))?.is_dir() {
            return Err(FuseError::NotADirectory(path));
        }
        if fs::read_dir(&path).map_err(|source| FuseError::io("look into", &path, source))?.next().is_some() {
            return Err(FuseError::NotEmpty(path));
        }
        Ok(path)
    }

    /// Mounts `filesystem` at `dir`, an empty directory. Dead mounts of ours there are taken away before. Blocks shortly.
    ///
    /// `filesystem` should call [`configure`] in its `init`.
    ///
    /// # Errors
    /// Every error leaves nothing mounted.
    pub fn start(dir: &Path, filesystem: impl Filesystem, options: MountOptions) -> Result<Self, FuseError> {
        let mut config = config(options);
        if thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 2) {
            config.n_threads = Some(2);
            config.clone_fd = true;
        }
        let (session, point) = mounted(dir, filesystem, &config)?;
        let session = session.spawn().map_err(|source| FuseError::Mount { path: point.path.clone(), source })?;
        Ok(Self::new(point, session, options))
    }

    /// As [`Mount::start`], for images, whose reads one thread takes and answers without fuser.
    ///
    /// # Errors
    /// Every error leaves nothing mounted.
    pub fn start_images(dir: &Path, view: ImageView, options: MountOptions) -> Result<Self, FuseError> {
        let config = config(options);
        let (kernel, point) = mounted(dir, Mounting { longest_read: view.longest_read() }, &config)?;
        let failed = |source| FuseError::Mount { path: point.path.clone(), source };
        let device = kernel.as_fd().try_clone_to_owned().and_then(Device::new).map_err(failed)?;
        let (ours, fusers) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(|error| failed(error.into()))?;
        // To fuser the socket is the kernel. What it answers to the greeting is of no interest.
        unistd::write(&ours, &greeting()).map_err(|error| failed(error.into()))?;
        let session = Session::from_fd(view.clone(), fusers, config.acl, config).map_err(failed)?;
        unistd::read(&ours, &mut [0; 4096]).map_err(|error| failed(error.into()))?;
        let session = session.spawn().map_err(failed)?;
        let (reads, connection) = (Reads::new(device, ours, view), point.minor);
        thread::Builder::new().name("fuse-reads".into()).spawn(move || reads.run(connection)).map_err(failed)?;
        // For the same reason as `Mount::session`.
        mem::forget(kernel);
        Ok(Self::new(point, session, options))
    }

    fn new(point: MountPoint, session: BackgroundSession, options: MountOptions) -> Self {
        if let Some(kib) = options.read_ahead_kib {
            let _ = fs::write(format!("/sys/class/bdi/0:{}/read_ahead_kb", point.minor), kib.to_string());
        }
        Self { point, session: ManuallyDrop::new(session) }
    }

    /// Where it is mounted, without links.
    pub fn path(&self) -> &Path {
        &self.point.path
    }

    /// Returns when nobody serves the mount any more: somebody unmounted it, or the connection was aborted.
    pub async fn ended(&self) {
        while !self.has_ended() {
            tokio::time::sleep(POLL).await;
        }
    }

    /// Unmounts. When files are open there, their readers get an error. Blocks, for some seconds at most.
    ///
    /// # Errors
    /// [`FuseError::Unmount`] and its like: the mount may still be there, but is not served beyond this process's life.
    pub fn umount(self) -> Result<Unmounted, FuseError> {
        self.end()
    }

    fn has_ended(&self) -> bool {
        self.session.guard.is_finished()
    }

    fn end(&self) -> Result<Unmounted, FuseError> {
        if self.has_ended() {
            // An aborted connection ends the thread but leaves the mount, dead. One that lives is not ours, even if the kernel has
            // given it our numbers.
            return mounts::clear_dead(&self.point.path).map(|_| Unmounted::Cleanly);
        }
        let clean = match mounts::detach(&self.point, Busy::Refuse) {
            Ok(()) => true,
            Err(FuseError::Busy(_)) => {
                mounts::detach(&self.point, Busy::Abort)?;
                false
            }
            Err(error) => return Err(error),
        };
        if clean && self.wait(END_PATIENCE) {
            return Ok(Unmounted::Cleanly);
        }
        // A detached mount is served for as long as files of it are open, which is not ours to wait for.
        if !self.wait(Duration::from_millis(100)) {
            mounts::abort(self.point.minor);
            self.wait(END_PATIENCE);
        }
        Ok(Unmounted::Aborted)
    }

    fn wait(&self, patience: Duration) -> bool {
        let start = Instant::now();
        while !self.has_ended() {
            if start.elapsed() >= patience {
                return false;
            }
            thread::sleep(POLL);
        }
        true
    }
}

fn config(options: MountOptions) -> Config {
    // Read-write for the kernel, since otherwise no hole could be punched; the views refuse to write.
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName(mounts::SOURCE.into()),
        MountOption::NoDev,
        MountOption::NoSuid,
        MountOption::NoExec,
        MountOption::NoAtime,
        MountOption::DefaultPermissions,
    ];
    if options.read_only {
        config.mount_options.push(MountOption::RO);
    }
    config.acl = SessionACL::Owner;
    config
}

/// Mounts. Dropping the session unmounts.
fn mounted<F: Filesystem>(dir: &Path, filesystem: F, config: &Config) -> Result<(Session<F>, MountPoint), FuseError> {
    let path = Mount::check(dir)?;
    let session = Session::new(filesystem, &path, config).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound if !geteuid().is_root() => FuseError::NoHelper,
        _ => FuseError::Mount { path: path.clone(), source },
    })?;
    match mounts::at(&path)?.filter(MountPoint::is_ours) {
        Some(point) => Ok((session, point)),
        None => Err(FuseError::NotMounted(path)),
    }
}

/// What the kernel agrees on everything with before [`Reads`] takes over. It is never asked anything else.
struct Mounting {
    longest_read: u32,
}

impl Filesystem for Mounting {
    fn init(&mut self, _: &Request, kernel: &mut KernelConfig) -> io::Result<()> {
        configure(kernel, self.longest_read);
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::warn!("{error}");
        }
    }
}

/// What every view wants of the kernel, which then asks for `longest_read` bytes at a time at most; for `Filesystem::init`.
///
/// Without `FUSE_ASYNC_DIO` every asynchronous `O_DIRECT` read waits for the one before (a seventh of the speed); without
/// `FUSE_DIRECT_IO_ALLOW_MMAP` (Linux 6.6) a file whose pages are not kept cannot be mapped as shared memory.
pub fn configure(kernel: &mut KernelConfig, longest_read: u32) {
    // What an old kernel does not offer is done without.
    let _ = kernel.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
    let _ = kernel.add_capabilities(InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP);
    // fuser has no other way to say it.
    let longest = longest_read.clamp(4096, LARGEST_REQUEST);
    let _ = kernel.set_max_write(longest);
    if let Err(largest) = kernel.set_max_readahead(longest) {
        let _ = kernel.set_max_readahead(largest);
    }
    let _ = kernel.set_max_background(MAX_BACKGROUND);
}

/// Attributes of a directory, mode 0700.
pub fn directory_attributes(ino: INodeNo, time: SystemTime) -> FileAttr {
    FileAttr { kind: FileType::Directory, perm: 0o700, nlink: 2, ..file_attributes(ino, 0, time) }
}

/// Attributes of a file of `size` bytes, mode 0600, whose times are all `time`.
pub fn file_attributes(ino: INodeNo, size: u64, time: SystemTime) -> FileAttr {
    FileAttr {
        ino,
        size,
        blocks: size.div_ceil(512),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: FileType::RegularFile,
        perm: 0o600,
        nlink: 1,
        uid: getuid().as_raw(),
        gid: getgid().as_raw(),
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fuser::{Errno, FileHandle, Generation, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEntry};
    use std::{ffi::OsStr, fs::File, io::Read, sync::mpsc};

    const SIZE: u64 = 4096;

    /// One file: reads succeed, or never come back.
    struct Probe {
        hang: Option<mpsc::Sender<ReplyData>>,
    }

    impl Filesystem for Probe {
        fn init(&mut self, _: &Request, kernel: &mut KernelConfig) -> io::Result<()> {
            configure(kernel, LARGEST_REQUEST);
            Ok(())
        }

        fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
            if name == "file" {
                reply.entry(&Duration::ZERO, &file_attributes(INodeNo(2), SIZE, SystemTime::UNIX_EPOCH), Generation(0));
            } else {
                reply.error(Errno::ENOENT);
            }
        }

        fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
            let time = SystemTime::UNIX_EPOCH;
            let attributes =
                if ino == INodeNo::ROOT { directory_attributes(ino, time) } else { file_attributes(ino, SIZE, time) };
            reply.attr(&Duration::ZERO, &attributes);
        }

        fn read(
            &self,
            _: &Request,
            _: INodeNo,
            _: FileHandle,
            _: u64,
            _: u32,
            _: OpenFlags,
            _: Option<LockOwner>,
            reply: ReplyData,
        ) {
            match &self.hang {
                Some(keep) => drop(keep.send(reply)),
                None => reply.data(&[7; SIZE as usize]),
            }
        }
    }

    /// `None`, with the reason printed, where nothing can be mounted.
    fn mounted(dir: &Path, hang: Option<mpsc::Sender<ReplyData>>) -> Option<Mount> {
        match Mount::start(dir, Probe { hang }, MountOptions { read_ahead_kib: Some(4096), ..MountOptions::default() })
        {
            Ok(mount) => Some(mount),
            Err(FuseError::NoDevice | FuseError::NoHelper) => {
                eprintln!("skipped: FUSE cannot be mounted here");
                None
            }
            Err(error) => panic!("{error:?}"),
        }
    }

    fn is_mounted(dir: &Path) -> bool {
        mounts::at(&mounts::absolute(dir).expect("path")).expect("mountinfo").is_some()
    }

    #[test]
    fn what_is_mounted_is_read_and_goes_away_again() {
        let dir = tempfile::tempdir().expect("directory");
        let Some(mount) = mounted(dir.path(), None) else { return };
        assert_eq!(fs::read(dir.path().join("file")).expect("read"), [7; SIZE as usize]);
        assert!(matches!(
            Mount::start(dir.path(), Probe { hang: None }, MountOptions::default()),
            Err(FuseError::AlreadyMounted { .. })
        ));
        assert_eq!(mounts::clear_dead(dir.path()).expect("it lives"), 0);
        assert!(is_mounted(dir.path()));
        assert_eq!(mount.umount().expect("unmounted"), Unmounted::Cleanly);
        assert!(!is_mounted(dir.path()));
    }

    #[test]
    fn open_files_do_not_keep_a_mount() {
        let dir = tempfile::tempdir().expect("directory");
        let Some(mount) = mounted(dir.path(), None) else { return };
        let mut file = File::open(dir.path().join("file")).expect("open");
        assert!(matches!(mounts::unmount(dir.path(), Busy::Refuse), Err(FuseError::Busy(_))));
        assert_eq!(mount.umount().expect("unmounted"), Unmounted::Aborted);
        assert!(!is_mounted(dir.path()));
        assert!(file.read(&mut [0; 512]).is_err());
    }

    #[test]
    fn a_reader_whose_answer_never_comes_is_freed() {
        let dir = tempfile::tempdir().expect("directory");
        let (keep, kept) = mpsc::channel();
        let Some(mount) = mounted(dir.path(), Some(keep)) else { return };
        let path = dir.path().join("file");
        let reader = thread::spawn(move || fs::read(path));
        let _unanswered = kept.recv().expect("the read arrives");
        drop(mount);
        assert!(reader.join().expect("no panic").is_err());
        assert!(!is_mounted(dir.path()));
    }

    #[tokio::test]
    async fn a_mount_that_somebody_took_away_has_ended() {
        let dir = tempfile::tempdir().expect("directory");
        let Some(mount) = mounted(dir.path(), None) else { return };
        mounts::unmount(dir.path(), Busy::Refuse).expect("nobody uses it");
        tokio::time::timeout(END_PATIENCE, mount.ended()).await.expect("it ends");
        assert_eq!(mount.umount().expect("nothing left to do"), Unmounted::Cleanly);
    }

    #[tokio::test]
    async fn the_end_of_a_mount_leaves_its_successor_alone() {
        let dir = tempfile::tempdir().expect("directory");
        let Some(first) = mounted(dir.path(), None) else { return };
        let open = File::open(dir.path().join("file")).expect("open");
        // Its session goes on until the file is closed.
        nix::mount::umount2(dir.path(), nix::mount::MntFlags::MNT_DETACH).expect("root");
        let Some(second) = mounted(dir.path(), None) else { return };
        drop(open);
        first.ended().await;
        assert_eq!(first.umount().expect("nothing left to do"), Unmounted::Cleanly);
        assert_eq!(fs::read(dir.path().join("file")).expect("the second serves"), [7; SIZE as usize]);
        assert_eq!(second.umount().expect("unmounted"), Unmounted::Cleanly);
    }

    #[test]
    fn files_are_not_hidden_by_a_mount() {
        let dir = tempfile::tempdir().expect("directory");
        fs::write(dir.path().join("a"), "b").expect("write");
        let start =
            |path: &Path| Mount::start(path, Probe { hang: None }, MountOptions::default()).expect_err("refused");
        if Path::new(DEVICE).exists() {
            assert!(matches!(start(dir.path()), FuseError::NotEmpty(_)));
            assert!(matches!(start(&dir.path().join("a")), FuseError::NotADirectory(_)));
            assert!(matches!(start(&dir.path().join("c")), FuseError::Io { .. }));
        }
    }
}
