//! What stands between rustic and the place where the repository is.
//!
//! Three things are added to rustic's backends:
//!
//! - A snapshot file is *held back* until [`super::verify`] has read the stored trees again. Killed before that, nothing of
//!   the backup can be listed; there is no moment at which an incomplete archive exists.
//! - In a local repository the directory is synced after the file that was renamed into it, so that the order pack → index
//!   → snapshot also holds across a power loss. (rustic syncs files, but no directories.)
//! - The first failed write ends the source: rustic on its own would read everything to the end before it tells.

use super::{error::Secrets, source::Progress};
use crate::provider::ErrorKind;
use nix::{
    sys::{
        prctl::set_child_subreaper,
        signal::{Signal, kill},
    },
    unistd::Pid,
};
use procfs::process::{Process, all_processes};
use rustic_core::{
    BytesList, ErrorKind as RusticKind, FileType, Id, ReadBackend, RusticError, RusticResult, WriteBackend,
};
use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// A snapshot file that rustic believes to be written.
pub(super) struct HeldSnapshot {
    id: Id,
    content: BytesList,
}

#[derive(Default)]
enum Mode {
    #[default]
    Through,
    Backup {
        progress: Arc<Progress>,
        held: Option<HeldSnapshot>,
    },
}

/// rustic's backend with the additions above.
pub(super) struct GuardedBackend {
    inner: Arc<dyn WriteBackend>,
    local: Option<PathBuf>,
    secrets: Secrets,
    mode: Mutex<Mode>,
}

impl GuardedBackend {
    pub(super) fn new(inner: Arc<dyn WriteBackend>, local: Option<PathBuf>, secrets: Secrets) -> Self {
        Self { inner, local, secrets, mode: Mutex::default() }
    }

    /// From now on a snapshot is held back, and a failure is recorded in `progress`.
    pub(super) fn begin_backup(&self, progress: Arc<Progress>) {
        *self.mode.lock().unwrap_or_else(PoisonError::into_inner) = Mode::Backup { progress, held: None };
    }

    /// Ends what [`Self::begin_backup`] began. Returns the snapshot, if rustic came as far as to write it.
    pub(super) fn end_backup(&self) -> Option<HeldSnapshot> {
        match std::mem::take(&mut *self.mode.lock().unwrap_or_else(PoisonError::into_inner)) {
            Mode::Backup { held, .. } => held,
            Mode::Through => None,
        }
    }

    /// Makes a held snapshot visible, and durable.
    pub(super) fn release(&self, snapshot: HeldSnapshot) -> RusticResult<()> {
        self.write_bytes(FileType::Snapshot, &snapshot.id, false, snapshot.content)
    }

    /// Makes the directories of a new local repository durable.
    fn sync_all(&self) -> RusticResult<()> {
        let Some(root) = &self.local else { return Ok(()) };
        let sync = || -> std::io::Result<()> {
            nix::unistd::syncfs(File::open(root)?).map_err(std::io::Error::from)?;
            sync_directory(root.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))
        };
        sync().map_err(|error| not_durable(root, error))
    }
}

/// The end of the SSH connections. opendal closes them by a task of its own when the backend is gone, which takes `ssh -O
/// exit`; a process that ends before leaves `ssh` running for good. To be dropped after everything that uses the backend.
pub(super) struct Farewell(Weak<GuardedBackend>);

/// How many of them there are.
static LIVE: AtomicUsize = AtomicUsize::new(0);

impl Farewell {
    /// How long the connections may take to end by themselves.
    const PATIENCE: Duration = Duration::from_secs(10);

    /// To be called before there is a connection.
    pub(super) fn new(backend: &Arc<GuardedBackend>) -> Self {
        // `ssh` goes into the background, and so its parent would be another process.
        if let Err(error) = set_child_subreaper(true) {
            tracing::debug!("ssh will not be waited for: {error}");
        }
        LIVE.fetch_add(1, Ordering::SeqCst);
        Self(Arc::downgrade(backend))
    }

    /// Our `ssh` processes that have not ended.
    fn connections() -> Vec<Pid> {
        let ours = std::process::id() as i32;
        let is_one = |process: &Process| {
            process.stat().is_ok_and(|stat| stat.ppid == ours && stat.state != 'Z')
                // Where the library keeps the sockets of its connections.
                && process.cmdline().is_ok_and(|line| line.iter().any(|word| word.contains("/.ssh-connection")))
        };
        let all = all_processes().into_iter().flatten().flatten();
        all.filter(is_one).map(|process| Pid::from_raw(process.pid)).collect()
    }
}

impl Drop for Farewell {
    fn drop(&mut self) {
        if LIVE.fetch_sub(1, Ordering::SeqCst) > 1 {
            // Whose connection is whose cannot be told: the last one sees to all.
            return;
        }
        // rustic's worker threads may hold on to the backend a moment longer than we do.
        let released = Instant::now() + Duration::from_secs(2);
        while self.0.strong_count() > 0 && Instant::now() < released {
            thread::sleep(Duration::from_millis(5));
        }
        let end = Instant::now() + Self::PATIENCE;
        while !Self::connections().is_empty() && Instant::now() < end {
            thread::sleep(Duration::from_millis(20));
        }
        for pid in Self::connections() {
            let _ = kill(pid, Signal::SIGTERM);
        }
    }
}

impl HeldSnapshot {
    pub(super) fn id(&self) -> Id {
        self.id
    }
}

fn sync_directory(path: &Path) -> std::io::Result<()> {
    File::open(path)?.sync_all()
}

fn not_durable(path: &Path, error: std::io::Error) -> Box<RusticError> {
    RusticError::with_source(RusticKind::InputOutput, "directory `{path}` cannot be synced", error)
        .attach_context("path", path.display().to_string())
}

impl ReadBackend for GuardedBackend {
    fn location(&self) -> String {
        self.inner.location()
    }

    fn list_with_size(&self, tpe: FileType) -> RusticResult<Vec<(Id, u32)>> {
        self.inner.list_with_size(tpe)
    }

    fn list(&self, tpe: FileType) -> RusticResult<Vec<Id>> {
        self.inner.list(tpe)
    }

    fn read_full(&self, tpe: FileType, id: &Id) -> RusticResult<bytes::Bytes> {
        self.inner.read_full(tpe, id)
    }

    fn read_partial(
        &self,
        tpe: FileType,
        id: &Id,
        cacheable: bool,
        offset: u32,
        length: u32,
    ) -> RusticResult<bytes::Bytes> {
        self.inner.read_partial(tpe, id, cacheable, offset, length)
    }

    fn warmup_path(&self, tpe: FileType, id: &Id) -> String {
        self.inner.warmup_path(tpe, id)
    }

    fn needs_warm_up(&self) -> bool {
        self.inner.needs_warm_up()
    }

    fn warm_up(&self, tpe: FileType, id: &Id) -> RusticResult<()> {
        self.inner.warm_up(tpe, id)
    }
}

impl WriteBackend for GuardedBackend {
    fn create(&self) -> RusticResult<()> {
        self.inner.create()?;
        self.sync_all()
    }

    fn write_bytes(&self, tpe: FileType, id: &Id, cacheable: bool, content: BytesList) -> RusticResult<()> {
        let progress = match &mut *self.mode.lock().unwrap_or_else(PoisonError::into_inner) {
            Mode::Through => None,
            Mode::Backup { progress, held } => {
                if tpe == FileType::Snapshot {
                    if progress.is_stopped() {
                        return Err(RusticError::new(RusticKind::InputOutput, "the backup has failed before"));
                    }
                    *held = Some(HeldSnapshot { id: *id, content });
                    return Ok(());
                }
                Some(Arc::clone(progress))
            }
        };
        let written = self.inner.write_bytes(tpe, id, cacheable, content).and_then(|()| {
            let Some(root) = &self.local else { return Ok(()) };
            let directory = match tpe {
                FileType::Config => root.clone(),
                FileType::Pack => root.join("data").join(&id.to_hex()[0..2]),
                _ => root.join(tpe.dirname()),
            };
            sync_directory(&directory).map_err(|error| not_durable(&directory, error))
        });
        if let (Err(error), Some(progress)) = (&written, progress) {
            let message = "the repository cannot be written";
            progress.stop(super::error::wrap(&self.secrets, ErrorKind::Other, message, error));
        }
        written
    }

    fn remove(&self, tpe: FileType, id: &Id, cacheable: bool) -> RusticResult<()> {
        self.inner.remove(tpe, id, cacheable)
    }
}
