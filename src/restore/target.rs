//! Files and devices that a restore writes to: what may be touched, and what becomes of it when the restore fails.
//!
//! | | before | while writing | at success | at failure |
//! |---|---|---|---|---|
//! | new file | must not exist | `NAME.partial`, locked | synced, then linked to its name, which must still be free | removed |
//! | existing file | regular, no link, unused | emptied, then written | synced | emptied, told |
//! | block device | unused, large enough | written | synced | left as it is, told |
//!
//! Every open target carries the locks that QEMU takes for writing and sharing an image (`file-posix.c`: open file
//! description locks on bytes 100 and 200 onwards, one for each permission), so that neither QEMU nor another restore
//! opens it meanwhile, and so that an image which QEMU has open is refused.

use super::{ImageFormat, Overwrite, RestoreError, RestoreRequest, source::ArchivedDisk};
use crate::{
    config::create_private_dir,
    report::{Events, printable, sizes::short_bytes},
};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    libc,
    sys::statvfs::statvfs,
};
use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File, FileType, Metadata, OpenOptions},
    io::{self, ErrorKind, Seek, SeekFrom, Write},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// What a target is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    New,
    Existing,
    Device,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// Nothing was changed, except that a new file is there.
    Opened,
    /// Being written.
    Begun,
    /// All is written and durable.
    Synced,
    /// A new file has its name.
    Placed,
    /// Nothing is undone any more.
    Kept,
}

/// An open target.
#[derive(Debug)]
pub(super) struct Target {
    path: PathBuf,
    /// Where a new file is until it is placed; else `path`.
    partial: PathBuf,
    file: File,
    kind: Kind,
    stage: Stage,
}

fn describe(kind: FileType) -> &'static str {
    match () {
        () if kind.is_symlink() => "a symbolic link",
        () if kind.is_dir() => "a directory",
        () if kind.is_file() => "a regular file",
        () if kind.is_block_device() => "a block device",
        () => "a special file",
    }
}

fn metadata_if_any(path: &Path, found: io::Result<Metadata>) -> Result<Option<Metadata>, RestoreError> {
    match found {
        Ok(metadata) => Ok(Some(metadata)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(RestoreError::io("look at", path, source)),
    }
}

/// The target must not exist, not even as a dangling link.
pub(super) fn check_new(path: &Path) -> Result<(), RestoreError> {
    match metadata_if_any(path, path.symlink_metadata())? {
        None => Ok(()),
        Some(_) => Err(RestoreError::TargetExists { path: path.to_owned() }),
    }
}

/// The directory is one, or is missing.
pub(super) fn check_directory(path: &Path) -> Result<(), RestoreError> {
    match metadata_if_any(path, path.metadata())? {
        Some(metadata) if !metadata.is_dir() => Err(RestoreError::TargetKind {
            path: path.to_owned(),
            found: describe(metadata.file_type()),
            expected: "a directory",
        }),
        _ => Ok(()),
    }
}

/// What a path that somebody named is.
fn classify(path: &Path) -> Result<Kind, RestoreError> {
    let Some(metadata) = metadata_if_any(path, path.symlink_metadata())? else { return Ok(Kind::New) };
    // Names of volumes (`/dev/pve/vm-100-disk-0`) are links to devices; links to files are followed by nobody.
    let is_device = |m: &Metadata| m.file_type().is_block_device();
    if is_device(&metadata) || metadata.is_symlink() && path.metadata().is_ok_and(|m| is_device(&m)) {
        return Ok(Kind::Device);
    }
    if metadata.is_file() {
        return Ok(Kind::Existing);
    }
    Err(RestoreError::TargetKind {
        path: path.to_owned(),
        found: describe(metadata.file_type()),
        expected: "a block device, a regular file or a new name",
    })
}

/// Whether a disk can be restored to a path that somebody named.
pub(super) fn check_named(path: &Path, disk: &ArchivedDisk, request: &RestoreRequest) -> Result<(), RestoreError> {
    let kind = classify(path)?;
    if kind != Kind::New && request.overwrite == Overwrite::Refused {
        return Err(RestoreError::TargetExists { path: path.to_owned() });
    }
    match kind {
        Kind::Existing => Ok(()),
        Kind::New => {
            let parent = parent(path);
            match metadata_if_any(parent, parent.metadata())? {
                Some(_) => check_directory(parent),
                None => Err(RestoreError::io("open", parent, ErrorKind::NotFound.into())),
            }
        }
        Kind::Device => {
            if request.format == ImageFormat::Qcow2 {
                return Err(RestoreError::Qcow2OnDevice { path: path.to_owned() });
            }
            let file = File::open(path).map_err(|source| RestoreError::io("open", path, source))?;
            device_size(file, path, disk).map(drop)
        }
    }
}

/// No two disks may go to the same place.
pub(super) fn check_distinct(disks: &[(&ArchivedDisk, PathBuf)]) -> Result<(), RestoreError> {
    let mut seen: BTreeMap<(u64, u64, OsString), &str> = BTreeMap::new();
    for (disk, path) in disks {
        let place = match metadata_if_any(path, path.metadata())? {
            Some(m) if m.file_type().is_block_device() => (m.rdev(), u64::MAX, OsString::new()),
            Some(m) => (m.dev(), m.ino(), OsString::new()),
            None => {
                let parent = parent(path);
                let m = parent.metadata().map_err(|source| RestoreError::io("look at", parent, source))?;
                (m.dev(), m.ino(), path.file_name().unwrap_or_default().to_owned())
            }
        };
        if let Some(first) = seen.insert(place, &disk.name) {
            let (first, second) = (first.to_owned(), disk.name.clone());
            return Err(RestoreError::SameTarget { path: path.clone(), first, second });
        }
    }
    Ok(())
}

/// Whether the bytes fit the file systems of their targets. What existing files hold counts as free: they are emptied.
pub(super) fn check_space(needs: &[(&Path, u64)]) -> Result<(), RestoreError> {
    struct Need<'a> {
        path: &'a Path,
        bytes: u64,
        freed: u64,
    }
    let mut by_device: BTreeMap<u64, Need<'_>> = BTreeMap::new();
    for (path, bytes) in needs {
        let mut freed = 0;
        let mut place = *path;
        let metadata = loop {
            match metadata_if_any(place, place.metadata())? {
                Some(metadata) => break metadata,
                None => place = parent(place),
            }
        };
        if metadata.file_type().is_block_device() {
            continue;
        }
        if metadata.is_file() {
            freed = metadata.blocks().saturating_mul(512);
        }
        let need = by_device.entry(metadata.dev()).or_insert(Need { path: place, bytes: 0, freed: 0 });
        need.bytes = need.bytes.saturating_add(*bytes);
        need.freed = need.freed.saturating_add(freed);
    }
    for need in by_device.into_values() {
        let stat = statvfs(need.path).map_err(|e| RestoreError::io("look at", need.path, e.into()))?;
        let available = stat.blocks_available().saturating_mul(stat.fragment_size()).saturating_add(need.freed);
        if need.bytes > available {
            return Err(RestoreError::NoSpace { path: need.path.to_owned(), needed: need.bytes, available });
        }
    }
    Ok(())
}

/// Directory of a path; the root's is the root.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None if path.as_os_str().is_empty() => Path::new("."),
        None => path,
    }
}

fn device_size(mut file: File, path: &Path, disk: &ArchivedDisk) -> Result<(File, u64), RestoreError> {
    let size = file.seek(SeekFrom::End(0)).map_err(|source| RestoreError::io("find the size of", path, source))?;
    if size < disk.size {
        return Err(RestoreError::TargetTooSmall {
            path: path.to_owned(),
            size,
            disk: disk.name.clone(),
            needed: disk.size,
        });
    }
    Ok((file, size))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lock {
    Held,
    Unsupported,
}

/// Takes QEMU's image locks, all of them; see the module's text.
fn lock(file: &File, path: &Path) -> Result<Lock, RestoreError> {
    let all = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 100,
        l_len: 200,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&all)) {
        Ok(_) => Ok(Lock::Held),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(RestoreError::TargetBusy { path: path.to_owned() }),
        Err(Errno::EINVAL | Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(Lock::Unsupported),
        Err(errno) => Err(RestoreError::io("lock", path, errno.into())),
    }
}

fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match path.symlink_metadata() {
        Ok(there) => Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino())),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// Removes what a restore that died left, unless it is alive after all.
fn remove_stale(partial: &Path) -> Result<(), RestoreError> {
    let exists = || RestoreError::TargetExists { path: partial.to_owned() };
    let io = |source| RestoreError::io("open", partial, source);
    let file =
        match OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(partial)
        {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            // A link is none of ours.
            Err(e) if e.raw_os_error() == Some(libc::ELOOP) => return Err(exists()),
            Err(e) => return Err(io(e)),
        };
    if !file.metadata().map_err(io)?.is_file() || lock(&file, partial)? == Lock::Unsupported {
        return Err(exists());
    }
    if is_at(&file, partial).map_err(io)? {
        fs::remove_file(partial).map_err(|source| RestoreError::io("remove", partial, source))?;
    }
    Ok(())
}

impl Target {
    /// Makes a new file, which has its name only after [`Target::place`].
    pub(super) fn create(path: &Path, events: &Events) -> Result<Self, RestoreError> {
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let io = |source| RestoreError::io("create", &partial, source);
        // A second round after removing a stale file, a third when another restore did the same at the same time.
        for _ in 0..3 {
            match OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&partial) {
                Ok(file) => {
                    let target = Self {
                        path: path.to_owned(),
                        partial: partial.clone(),
                        file,
                        kind: Kind::New,
                        stage: Stage::Opened,
                    };
                    lock(&target.file, &target.partial)?;
                    // Before it was locked, another restore may have taken it for a stale one.
                    if is_at(&target.file, &target.partial).map_err(io)? {
                        return Ok(target);
                    }
                }
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                    remove_stale(&partial)?;
                    events.info(format!(
                        "removed {}, left by a restore that did not end",
                        printable(&partial.display().to_string())
                    ));
                }
                Err(e) => return Err(io(e)),
            }
        }
        Err(RestoreError::TargetBusy { path: partial })
    }

    /// Opens what somebody named; see [`check_named`], all of which is checked again.
    pub(super) fn open(
        path: &Path,
        disk: &ArchivedDisk,
        request: &RestoreRequest,
        events: &Events,
    ) -> Result<Self, RestoreError> {
        let kind = classify(path)?;
        if kind != Kind::New && request.overwrite == Overwrite::Refused {
            return Err(RestoreError::TargetExists { path: path.to_owned() });
        }
        let io = |source| RestoreError::io("open", path, source);
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let file = match kind {
            Kind::New => return Self::create(path, events),
            Kind::Existing => {
                let file = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path).map_err(io)?;
                if !file.metadata().map_err(io)?.is_file() {
                    return Err(RestoreError::TargetBusy { path: path.to_owned() });
                }
                file
            }
            Kind::Device => {
                let device = path.canonicalize().map_err(io)?;
                // O_EXCL without O_CREAT: fails when the kernel uses the device (mounted, swap, part of a volume group).
                let opened = options.custom_flags(libc::O_EXCL | libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&device);
                let file = opened.map_err(|e| match e.kind() {
                    ErrorKind::ResourceBusy => RestoreError::TargetBusy { path: path.to_owned() },
                    _ => io(e),
                })?;
                if !file.metadata().map_err(io)?.file_type().is_block_device() {
                    return Err(RestoreError::TargetBusy { path: path.to_owned() });
                }
                let (file, size) = device_size(file, path, disk)?;
                if size > disk.size {
                    events.info(format!(
                        "{} is {} larger than disk `{}`; what lies behind is left as it is",
                        printable(&path.display().to_string()),
                        short_bytes(size - disk.size),
                        disk.name
                    ));
                }
                file
            }
        };
        if lock(&file, path)? == Lock::Unsupported {
            events.warn(format!(
                "{} cannot be locked: nothing keeps QEMU from opening it during the restore",
                printable(&path.display().to_string())
            ));
        }
        Ok(Self { path: path.to_owned(), partial: path.to_owned(), file, kind, stage: Stage::Opened })
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// The file to write to; an existing file loses its content now.
    pub(super) fn begin(&mut self) -> Result<File, RestoreError> {
        let file = self.file.try_clone().map_err(|source| RestoreError::io("open", &self.path, source))?;
        self.stage = Stage::Begun;
        if self.kind == Kind::Existing {
            self.file.set_len(0).map_err(|source| RestoreError::io("truncate", &self.path, source))?;
        }
        Ok(file)
    }

    /// Writes a small new file.
    pub(super) fn write_all(&mut self, bytes: &[u8]) -> Result<(), RestoreError> {
        self.begin()?.write_all(bytes).map_err(|source| RestoreError::io("write to", &self.path, source))?;
        self.sync()
    }

    /// All is written: makes it durable.
    pub(super) fn sync(&mut self) -> Result<(), RestoreError> {
        self.file.sync_all().map_err(|source| RestoreError::io("sync", &self.path, source))?;
        self.stage = Stage::Synced;
        Ok(())
    }

    /// Gives a new file its name, if nobody else took it meanwhile.
    pub(super) fn place(&mut self) -> Result<(), RestoreError> {
        if self.kind != Kind::New {
            return Ok(());
        }
        let io = |source: io::Error| match source.kind() {
            ErrorKind::AlreadyExists => RestoreError::TargetExists { path: self.path.clone() },
            _ => RestoreError::io("create", &self.path, source),
        };
        if !is_at(&self.file, &self.partial).map_err(io)? {
            return Err(RestoreError::TargetBusy { path: self.partial.clone() });
        }
        match fs::hard_link(&self.partial, &self.path) {
            Ok(()) => {
                self.stage = Stage::Placed;
                fs::remove_file(&self.partial).map_err(|source| RestoreError::io("remove", &self.partial, source))
            }
            // File systems without links: the check and the rename are two steps there.
            Err(e)
                if matches!(e.raw_os_error(), Some(libc::EPERM | libc::EOPNOTSUPP | libc::ENOSYS | libc::EMLINK)) =>
            {
                check_new(&self.path)?;
                fs::rename(&self.partial, &self.path).map_err(io)?;
                self.stage = Stage::Placed;
                Ok(())
            }
            Err(e) => Err(io(e)),
        }
    }

    /// Makes the name durable.
    pub(super) fn sync_directory(&self) -> Result<(), RestoreError> {
        if self.kind == Kind::New { sync_directory(parent(&self.path)) } else { Ok(()) }
    }

    /// From here on nothing is undone.
    pub(super) fn keep(&mut self) {
        self.stage = Stage::Kept;
    }

    /// Undoes what can be undone, and adds to `error` what cannot.
    pub(super) fn abandon(&mut self, error: RestoreError) -> RestoreError {
        let stage = std::mem::replace(&mut self.stage, Stage::Kept);
        match (self.kind, stage) {
            (_, Stage::Kept) => error,
            (Kind::New, _) => match self.remove(stage) {
                Ok(()) => error,
                Err((path, undo)) => RestoreError::Undo { path, undo, source: Box::new(error) },
            },
            // Empty, so that nothing takes it for a disk.
            (Kind::Existing, Stage::Begun) => {
                let source = Box::new(error);
                match self.file.set_len(0) {
                    Ok(()) => RestoreError::TargetSpoilt { path: self.path.clone(), source },
                    Err(undo) => RestoreError::Undo { path: self.path.clone(), undo, source },
                }
            }
            (Kind::Device, Stage::Begun) => {
                RestoreError::TargetSpoilt { path: self.path.clone(), source: Box::new(error) }
            }
            (Kind::Existing | Kind::Device, _) => error,
        }
    }

    fn remove(&self, stage: Stage) -> Result<(), (PathBuf, io::Error)> {
        // Between link and removal a file has both names.
        let names = [Some(&self.partial), (stage >= Stage::Placed).then_some(&self.path)];
        for name in names.into_iter().flatten() {
            let removed = is_at(&self.file, name).and_then(|ours| if ours { fs::remove_file(name) } else { Ok(()) });
            removed.map_err(|e| (name.clone(), e))?;
        }
        Ok(())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if self.kind == Kind::New && self.stage != Stage::Kept {
            // Only reached when the flow itself died; the next restore to this place removes what is left.
            let _ = self.remove(self.stage);
        }
    }
}

fn sync_directory(path: &Path) -> Result<(), RestoreError> {
    let synced = File::open(path).and_then(|directory| directory.sync_all());
    synced.map_err(|source| RestoreError::io("sync", path, source))
}

/// Directories that were made for a restore; dropping it removes them, if they are empty.
#[derive(Debug)]
pub(super) struct NewDirectory {
    /// Innermost first.
    made: Vec<PathBuf>,
}

/// Makes the directory and its missing parents, for us alone. `None` when it exists.
pub(super) fn create_directory(path: &Path) -> Result<Option<NewDirectory>, RestoreError> {
    let mut made = Vec::new();
    let mut place = path;
    while metadata_if_any(place, place.metadata())?.is_none() {
        made.push(place.to_owned());
        place = parent(place);
    }
    if made.is_empty() {
        return Ok(None);
    }
    let made = NewDirectory { made };
    create_private_dir(path).map_err(|source| RestoreError::io("create", path, source))?;
    for directory in &made.made {
        sync_directory(parent(directory))?;
    }
    Ok(Some(made))
}

impl NewDirectory {
    /// The directories stay.
    pub(super) fn keep(mut self) {
        self.made.clear();
    }
}

impl Drop for NewDirectory {
    fn drop(&mut self) {
        for directory in &self.made {
            // Fails when somebody put something there, which then stays.
            if fs::remove_dir(directory).is_err() {
                break;
            }
        }
    }
}
