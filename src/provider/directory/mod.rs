//! A directory of qcow2 images, which `qemu-img convert` restores without this program.
//!
//! An archive is a directory with the guest's configuration, the manifest and one image for every disk; `tree` has the names.
//! The image of an incremental backup has only what changed, and the image of the archive before as its backing file, by a
//! relative name: the tree can be moved. There is no file that says which archive is the last one; what an archive builds on
//! stands in its images.
//!
//! # When an archive counts
//!
//! It is written under another name, synced, opened again and compared with what was planned: everything that the images map,
//! and some segments by their digests. Then it is renamed (`store`).
//!
//! # When an archive can be built on
//!
//! When every image below it is there, looks as it did when it was written (length, time of the last write, fingerprint of its
//! header), and some segments have the content that the table says (`chain`). Somebody who starts a VM from such an image
//! changes all archives above it; that is noticed here, and the next backup is a full one.
//!
//! # How an archive goes
//!
//! By a rename, when no other builds on it. What builds on it is made independent of it first, or it stays (`prune`, `merge`).
//!
//! # What is not trusted
//!
//! Images that lie on a share. Their headers are read by us before imago sees them: clusters of 64 KiB, no data file, no
//! encryption, and a backing file only if it is the same disk of another archive of the same guest. No symbolic link is
//! followed.
//!
//! # Memory and time
//!
//! imago keeps up to 8 MiB of tables for every image that is open, so a disk whose archive consists of 64 images may need
//! 512 MiB to be read, if it is larger than 64 GiB and every backup changed all of it. The segment tables have 48 bytes for a
//! segment.

mod chain;
mod header;
mod image;
mod merge;
mod prune;
mod reader;
mod store;
mod tree;

use super::{
    ArchiveInfo, ArchiveReader, BackupInput, DiskQuery, ErrorKind, Incremental, Outcome, Provider, ProviderError,
    PruneRequest, Pruned, Stored,
};
use crate::{
    archive::{ArchiveId, ArchiveName},
    config::create_private_dir,
    guest::GuestId,
    report::spelled_out,
};
use jiff::Timestamp;
use reader::Reader;
use serde::Deserialize;
use std::{
    fs::{File, TryLockError},
    io::{self, Read},
    path::PathBuf,
    sync::Mutex,
};
use tree::{Dir, Epoch, failed};

/// Largest log that is kept.
const MAX_LOG: usize = 4 << 20;

/// Whether images build on each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// A backup stores what changed since the one before.
    #[default]
    Incremental,
    /// Every backup reads everything, and its images need no others.
    Full,
}

/// What becomes of an archive that is to be removed while later ones build on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnChain {
    /// What they need of it is merged into them.
    #[default]
    Merge,
    /// It stays until they go.
    Refuse,
}

/// Where and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryOptions {
    /// The repository's directory.
    pub path: PathBuf,
    /// Whether images build on each other.
    pub mode: Mode,
    /// Most images that a disk of an archive may consist of; then comes a full backup. 1 to 256.
    pub max_chain: usize,
    /// What becomes of an archive that is to be removed while later ones build on it.
    pub on_chain: OnChain,
}

impl DirectoryOptions {
    /// Images on top of each other when nothing is configured. Every one costs whoever reads the newest an open file and
    /// some memory.
    pub const MAX_CHAIN: usize = 64;

    /// The defaults for a directory.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), mode: Mode::default(), max_chain: Self::MAX_CHAIN, on_chain: OnChain::default() }
    }
}

/// The guest that is being backed up.
struct Current {
    guest: GuestId,
    dir: Dir,
    epoch: Epoch,
    name: ArchiveName,
    /// Held until the guest's backup is over.
    _lock: File,
}

/// A backup that is over, whose log may follow.
struct Ended {
    dir: Dir,
    name: String,
}

/// Stores archives in a directory.
pub struct DirectoryProvider {
    options: DirectoryOptions,
    root: Dir,
    id: String,
    current: Option<Current>,
    stored: Option<Stored>,
    ended: Option<Ended>,
}

impl DirectoryProvider {
    /// Opens a repository.
    ///
    /// # Errors
    /// [`ErrorKind::RepositoryMissing`] when there is none: the file system may not be mounted.
    pub fn open(options: &DirectoryOptions) -> Result<Self, ProviderError> {
        let path = &options.path;
        if !(1..=chain::MAX_IMAGES).contains(&options.max_chain) {
            let message = format!("`max-chain` is {}, it can be 1 to {}", options.max_chain, chain::MAX_IMAGES);
            return Err(ProviderError::new(ErrorKind::Other, message));
        }
        let root = Dir::open(path).map_err(|e| {
            let kind = match e.kind() {
                io::ErrorKind::NotFound => ErrorKind::RepositoryMissing,
                _ => ErrorKind::Other,
            };
            failed(kind, "cannot open repository", path, e)
        })?;
        let id = read_id(&root)?;
        Ok(Self { options: options.clone(), root, id, current: None, stored: None, ended: None })
    }

    /// Makes a directory a repository. It is created if it does not exist, and has to be empty.
    ///
    /// # Errors
    /// When there is a repository already, or anything else.
    pub fn init(options: &DirectoryOptions) -> Result<Self, ProviderError> {
        let path = &options.path;
        let cannot = |e| failed(ErrorKind::Other, "cannot create repository", path, e);
        create_private_dir(path).map_err(cannot)?;
        let root = Dir::open(path).map_err(cannot)?;
        let begun = format!("{}{}", tree::MARKER, tree::PARTIAL);
        let foreign = root.names().map_err(cannot)?.into_iter().find(|name| *name != "lost+found" && *name != begun);
        if let Some(name) = foreign {
            let message = if name == tree::MARKER {
                format!("there is a repository in {} already", path.display())
            } else {
                format!("{} is not empty: it has `{name}`", path.display())
            };
            return Err(ProviderError::new(ErrorKind::Other, message));
        }
        let mut id = [0; 16];
        File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut id)).map_err(cannot)?;
        let id = format!("{:032x}", u128::from_be_bytes(id));
        if root.has(&begun).map_err(cannot)? {
            std::fs::remove_file(path.join(&begun)).map_err(cannot)?;
        }
        root.write(&begun, format!("{id}\n").as_bytes()).map_err(cannot)?;
        root.rename(&begun, tree::MARKER).map_err(cannot)?;
        root.sync().map_err(cannot)?;
        Self::open(options)
    }

    fn guest_dir(&self, guest: &GuestId) -> Result<Dir, ProviderError> {
        self.root.dir(guest.as_str()).map_err(|e| {
            let kind = match e.kind() {
                io::ErrorKind::NotFound => ErrorKind::NotFound,
                _ => ErrorKind::Other,
            };
            failed(kind, "cannot open", &self.root.path().join(guest.as_str()), e)
        })
    }

    fn not_found(&self, archive: &ArchiveId) -> ProviderError {
        let message = format!("archive {archive} is not in repository {}", self.root.path().display());
        ProviderError::new(ErrorKind::NotFound, message)
    }

    /// The directory and the epoch of an archive; it exists.
    fn locate(&self, archive: &ArchiveId) -> Result<(GuestId, Dir, Epoch), ProviderError> {
        let (guest, epoch) = tree::parse_id(archive).ok_or_else(|| self.not_found(archive))?;
        let dir = match self.guest_dir(&guest) {
            Err(error) if error.kind == ErrorKind::NotFound => return Err(self.not_found(archive)),
            other => other?,
        };
        match dir.has(&epoch.to_string()) {
            Ok(true) => Ok((guest, dir, epoch)),
            Ok(false) => Err(self.not_found(archive)),
            Err(e) => Err(failed(ErrorKind::Other, "cannot look into", dir.path(), e)),
        }
    }

    fn judge(&self, query: &DiskQuery) -> Result<Incremental, ProviderError> {
        if self.options.mode == Mode::Full {
            return Ok(Incremental::New("the target makes full backups only".into()));
        }
        let (guest, dir, epoch) = self.locate(&query.base)?;
        let confirmed = chain::confirm(&dir, &guest, epoch, query)?;
        if confirmed.links.len() >= self.options.max_chain {
            let reason = format!("the base archive consists of {} images already", confirmed.links.len());
            return Ok(Incremental::New(reason));
        }
        Ok(Incremental::Use(confirmed.table.into()))
    }

    /// Holds the guest's directory for us, as long as what is returned lives, and removes what dead runs left in it.
    fn lock(dir: &Dir) -> Result<File, ProviderError> {
        let at = dir.path();
        let lock = dir.lock_file(tree::LOCK).map_err(|e| failed(ErrorKind::Other, "cannot prepare", at, e))?;
        lock.try_lock().map_err(|e| match e {
            TryLockError::WouldBlock => {
                ProviderError::new(ErrorKind::Locked, format!("another backup writes to {}", at.display()))
            }
            TryLockError::Error(e) => failed(ErrorKind::Other, "cannot lock", &at.join(tree::LOCK), e),
        })?;
        prune::clean(dir)?;
        Ok(lock)
    }

    fn info(guest: &GuestId, dir: &Dir, epoch: Epoch) -> Result<ArchiveInfo, ProviderError> {
        let at = dir.path().join(epoch.to_string());
        let archive = dir.dir(&epoch.to_string()).map_err(|e| failed(ErrorKind::Damaged, "cannot open", &at, e))?;
        let manifest = chain::manifest(&archive, guest, epoch)?;
        Ok(ArchiveInfo {
            id: tree::archive_id(guest, epoch),
            name: manifest.archive,
            size: manifest.disks.iter().try_fold(0u64, |sum, disk| sum.checked_add(disk.size)),
            disks: manifest.disks.into_iter().map(|disk| disk.name).collect(),
            added_bytes: archive.occupied().ok(),
        })
    }
}

fn read_id(root: &Dir) -> Result<String, ProviderError> {
    let at = root.path().join(tree::MARKER);
    let bytes = root.read(tree::MARKER, 64).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => ProviderError::new(
            ErrorKind::RepositoryMissing,
            format!("there is no repository in {} (or its file system is not mounted)", root.path().display()),
        ),
        _ => failed(ErrorKind::Damaged, "cannot read", &at, e),
    })?;
    let id = String::from_utf8_lossy(&bytes).trim_end().to_owned();
    if id.len() != 32 || !id.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(ProviderError::new(ErrorKind::Damaged, format!("{} has no repository id", at.display())));
    }
    Ok(id)
}

impl Provider for DirectoryProvider {
    fn kind(&self) -> &'static str {
        "directory"
    }

    fn repository_id(&mut self) -> Result<String, ProviderError> {
        Ok(self.id.clone())
    }

    fn job_init(&mut self, _start: Timestamp) -> Result<(), ProviderError> {
        let found = read_id(
            &Dir::open(&self.options.path)
                .map_err(|e| failed(ErrorKind::RepositoryMissing, "cannot open repository", &self.options.path, e))?,
        )?;
        if found != self.id {
            let message = format!("{} is another repository now", self.options.path.display());
            return Err(ProviderError::new(ErrorKind::RepositoryMissing, message));
        }
        Ok(())
    }

    fn job_cleanup(&mut self) -> Result<(), ProviderError> {
        (self.current, self.stored, self.ended) = (None, None, None);
        Ok(())
    }

    fn backup_init(&mut self, guest: &str, start: Timestamp) -> Result<ArchiveName, ProviderError> {
        (self.current, self.stored, self.ended) = (None, None, None);
        let guest: GuestId = guest.parse().map_err(|e| {
            ProviderError::caused_by(ErrorKind::Other, format!("guest `{guest}` cannot be a directory"), e)
        })?;
        let at = self.root.path().join(guest.as_str());
        let cannot = |e| failed(ErrorKind::Other, "cannot prepare", &at, e);
        if !self.root.has(guest.as_str()).map_err(cannot)? {
            self.root.make(guest.as_str()).map_err(cannot)?;
            self.root.sync().map_err(cannot)?;
        }
        let dir = self.guest_dir(&guest)?;
        let lock = Self::lock(&dir)?;

        let names = dir.names().map_err(cannot)?;
        let archives: Vec<ArchiveName> = names.iter().filter_map(|name| Epoch::parse(name)?.name(&guest)).collect();
        let mut second =
            ArchiveName::after(guest.as_str(), start, &archives).map_or(i64::MAX, |n| n.time().as_second());
        let (name, epoch) = loop {
            let time = Timestamp::from_second(second)
                .map_err(|e| ProviderError::caused_by(ErrorKind::Other, "no time is left for an archive's name", e))?;
            let name = ArchiveName::new(guest.as_str(), time);
            let epoch = Epoch::of(&name).ok_or_else(|| {
                ProviderError::new(ErrorKind::Other, format!("the clock shows {time}, which is before 1970"))
            })?;
            let taken = dir.has(&epoch.to_string()).map_err(cannot)?
                || dir.has(&format!("{epoch}{}", tree::FAILED)).map_err(cannot)?;
            if !taken {
                break (name, epoch);
            }
            second += 1;
        };
        self.current = Some(Current { guest, dir, epoch, name: name.clone(), _lock: lock });
        Ok(name)
    }

    fn query_incremental(&mut self, disks: &[DiskQuery]) -> Result<Vec<Incremental>, ProviderError> {
        let answer = |query| match self.judge(query) {
            Ok(answer) => answer,
            Err(error) => Incremental::New(spelled_out(&error)),
        };
        Ok(disks.iter().map(answer).collect())
    }

    fn backup(&mut self, input: BackupInput) -> Result<Stored, ProviderError> {
        let Some(current) = &self.current else {
            return Err(ProviderError::new(ErrorKind::Other, "no backup was announced"));
        };
        let stored = store::store(current, self.options.max_chain, input)?;
        self.stored = Some(stored.clone());
        Ok(stored)
    }

    fn backup_cleanup(&mut self, outcome: &Outcome) -> Result<Option<u64>, ProviderError> {
        let Some(current) = self.current.take() else { return Ok(None) };
        if let Some(stored) = self.stored.take() {
            self.ended = Some(Ended { dir: current.dir, name: current.epoch.to_string() });
            return Ok(stored.added_bytes);
        }
        if let Outcome::Failure(why) = outcome {
            let name = format!("{}{}", current.epoch, tree::FAILED);
            let at = current.dir.path().join(&name);
            let cannot = |e| failed(ErrorKind::Other, "cannot keep the log in", &at, e);
            let left = current.dir.make(&name).map_err(cannot)?;
            left.write(tree::LOG, format!("{why}\n").as_bytes()).map_err(cannot)?;
            prune::clean_failed(&current.dir)?;
            self.ended = Some(Ended { dir: current.dir, name });
        }
        Ok(None)
    }

    fn handle_log(&mut self, log: &str) -> Result<(), ProviderError> {
        let Some(Ended { dir, name }) = self.ended.take() else { return Ok(()) };
        let at = dir.path().join(&name);
        let cannot = |e| failed(ErrorKind::Other, "cannot keep the log in", &at, e);
        let place = dir.dir(&name).map_err(cannot)?;
        let new = format!("{}{}", tree::LOG, tree::PARTIAL);
        let log = log.as_bytes();
        // The end of a log that is too long says more than its beginning.
        place.write(&new, &log[log.len().saturating_sub(MAX_LOG)..]).map_err(cannot)?;
        place.rename(&new, tree::LOG).map_err(cannot)?;
        place.sync().map_err(cannot)
    }

    fn list(&mut self, guest: Option<&str>) -> Result<Vec<ArchiveInfo>, ProviderError> {
        let listing = |dir: &Dir| dir.names().map_err(|e| failed(ErrorKind::Other, "cannot list", dir.path(), e));
        let mut archives = Vec::new();
        for name in listing(&self.root)? {
            let Ok(id) = name.parse::<GuestId>() else { continue };
            if guest.is_some_and(|guest| guest != name) {
                continue;
            }
            // Files and links are not ours.
            let Ok(dir) = self.root.dir(&name) else { continue };
            for epoch in listing(&dir)?.iter().filter_map(|name| Epoch::parse(name)) {
                match Self::info(&id, &dir, epoch) {
                    Ok(info) => archives.push(info),
                    // One that is damaged must not hide the others.
                    Err(error) => tracing::warn!("{}", spelled_out(&error)),
                }
            }
        }
        archives.sort_by(|a, b| (a.name.time(), &a.name).cmp(&(b.name.time(), &b.name)));
        Ok(archives)
    }

    fn prune(&mut self, request: PruneRequest) -> Result<Vec<Pruned>, ProviderError> {
        let guest: GuestId = request.guest.parse().map_err(|e| {
            ProviderError::caused_by(ErrorKind::Other, format!("guest `{}` cannot be a directory", request.guest), e)
        })?;
        let on_chain = self.options.on_chain;
        if let Some(current) = self.current.as_ref().filter(|current| current.guest == guest) {
            return Ok(prune::Archives::read(&guest, &current.dir, on_chain)?.prune(&request));
        }
        let dir = self.guest_dir(&guest)?;
        let _lock = Self::lock(&dir)?;
        Ok(prune::Archives::read(&guest, &dir, on_chain)?.prune(&request))
    }

    fn open(&mut self, archive: &ArchiveId) -> Result<Box<dyn ArchiveReader>, ProviderError> {
        let (id, guest, epoch) = self.locate(archive)?;
        let at = guest.path().join(epoch.to_string());
        let archive = guest.dir(&epoch.to_string()).map_err(|e| failed(ErrorKind::Damaged, "cannot open", &at, e))?;
        let manifest = chain::manifest(&archive, &id, epoch)?;
        let reading = reader::claim(&archive)?;
        Ok(Box::new(Reader { guest, archive, epoch, manifest, open: Mutex::new(None), _reading: reading }))
    }
}

/// An image's first cluster, and how long the rest is claimed to be (first 8 bytes). `true` when it is one of ours.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz_header(bytes: &[u8]) -> bool {
    let Some((len, head)) = bytes.split_first_chunk::<8>() else { return false };
    header::Header::parse(head, u64::from_be_bytes(*len)).is_ok_and(|header| {
        assert!(header.backing.is_none_or(|name| name.len() <= 1023));
        true
    })
}
