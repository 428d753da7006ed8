//! Names in the repository, and files below it.
//!
//! ```text
//! .pvebackup-repository             the repository's id
//! 100/.lock                         held by the backup that runs
//! 100/qemu-1769824807/              one archive; `.partial` behind it while it is written, `.removed` while it is removed,
//!                                   `.failed` when only the log is left
//!     guest.conf firewall.conf manifest.json backup.log
//!     scsi0.qcow2                   its backing file is ../qemu-EPOCH/scsi0.qcow2, or none
//!     disks/scsi0.segments          the segment table
//!     disks/scsi0.image.json        what the image looked like when it was complete
//! ```
//!
//! Whoever can write to a share could put a symbolic link where we expect a directory or a file. Below the repository's
//! own directory none is followed: every step opens one name relative to an open directory.

use crate::{
    archive::{ArchiveId, ArchiveName},
    guest::GuestId,
    provider::{ErrorKind, ProviderError},
};
use jiff::Timestamp;
use nix::{
    errno::Errno,
    fcntl::{OFlag, openat, renameat},
    sys::stat::{Mode, mkdirat},
    unistd::{UnlinkatFlags, unlinkat},
};
use std::{
    fmt, fs,
    fs::File,
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

/// The file with the repository's id.
pub(super) const MARKER: &str = ".pvebackup-repository";
/// The file whose lock a running backup holds. A file, because NFS has no exclusive locks on directories.
pub(super) const LOCK: &str = ".lock";
pub(super) const MANIFEST: &str = "manifest.json";
pub(super) const LOG: &str = "backup.log";
/// Directory of the segment tables.
pub(super) const DISKS: &str = "disks";
/// Behind the name of an archive that is being written, and of a file that is to replace another.
pub(super) const PARTIAL: &str = ".partial";
/// Behind the name of an archive that is being removed.
pub(super) const REMOVED: &str = ".removed";
/// Behind the name of a directory with nothing but a failed backup's log.
pub(super) const FAILED: &str = ".failed";
const PREFIX: &str = "qemu-";

/// Name of a disk's image.
pub(super) fn image_name(disk: &str) -> String {
    format!("{disk}.qcow2")
}

/// Name of a disk's segment table, in [`DISKS`].
pub(super) fn table_name(disk: &str) -> String {
    format!("{disk}.segments")
}

/// Name of the description of a disk's image, in [`DISKS`].
pub(super) fn seal_name(disk: &str) -> String {
    format!("{disk}.image.json")
}

/// Whether a text can be one file name that means nothing else.
pub(super) fn is_plain_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && name.as_bytes()[0].is_ascii_alphanumeric()
}

/// An archive's directory among those of its guest: `qemu-` and the second of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Epoch(u64);

impl Epoch {
    /// That of an archive's name, unless it lies before 1970.
    pub(super) fn of(name: &ArchiveName) -> Option<Self> {
        u64::try_from(name.time().as_second()).ok().map(Self)
    }

    /// Reads exactly what `Display` writes.
    pub(super) fn parse(name: &str) -> Option<Self> {
        let digits = name.strip_prefix(PREFIX)?;
        let epoch = Self(digits.parse().ok()?);
        (epoch.to_string() == name).then_some(epoch)
    }

    /// The archive's name.
    pub(super) fn name(self, guest: &GuestId) -> Option<ArchiveName> {
        let time = Timestamp::from_second(i64::try_from(self.0).ok()?).ok()?;
        Some(ArchiveName::new(guest.as_str(), time))
    }

    /// As an image's header names the image of `disk` in this archive.
    pub(super) fn backing(self, disk: &str) -> String {
        format!("../{self}/{}", image_name(disk))
    }

    /// Reads what [`Epoch::backing`] made, and nothing else.
    pub(super) fn of_backing(reference: &str, disk: &str) -> Option<Self> {
        let epoch = Self::parse(reference.strip_prefix("../")?.split_once('/')?.0)?;
        (epoch.backing(disk) == reference).then_some(epoch)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.0)
    }
}

/// `GUEST/qemu-EPOCH`.
pub(super) fn archive_id(guest: &GuestId, epoch: Epoch) -> ArchiveId {
    ArchiveId(format!("{guest}/{epoch}"))
}

/// Reads exactly what [`archive_id`] made.
pub(super) fn parse_id(id: &ArchiveId) -> Option<(GuestId, Epoch)> {
    let (guest, epoch) = id.0.split_once('/')?;
    Some((guest.parse().ok()?, Epoch::parse(epoch)?))
}

/// A failure at a path. A full target is told as such, whatever `kind` says.
pub(super) fn failed(kind: ErrorKind, what: &str, path: &Path, source: io::Error) -> ProviderError {
    let kind = match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
        _ => kind,
    };
    ProviderError::caused_by(kind, format!("{what} {}", path.display()), source)
}

/// An open directory.
#[derive(Debug)]
pub(super) struct Dir {
    file: File,
    path: PathBuf,
}

const DIRECTORY: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);

impl Dir {
    /// The repository's directory, which the configuration may name through links.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let fd = nix::fcntl::open(path, DIRECTORY, Mode::empty())?;
        Ok(Self { file: fd.into(), path: path.to_owned() })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// A directory in this one.
    pub(super) fn dir(&self, name: &str) -> io::Result<Self> {
        let fd = openat(&self.file, name, DIRECTORY | OFlag::O_NOFOLLOW, Mode::empty())?;
        Ok(Self { file: fd.into(), path: self.path.join(name) })
    }

    /// A new directory in this one, for us alone.
    pub(super) fn make(&self, name: &str) -> io::Result<Self> {
        mkdirat(&self.file, name, Mode::S_IRWXU)?;
        self.dir(name)
    }

    /// A regular file in this directory, for reading.
    pub(super) fn file(&self, name: &str) -> io::Result<File> {
        // A pipe must not hang us.
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let file: File = openat(&self.file, name, flags, Mode::empty())?.into();
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a regular file"));
        }
        Ok(file)
    }

    /// A file's content, at most `limit` bytes.
    pub(super) fn read(&self, name: &str, limit: u64) -> io::Result<Vec<u8>> {
        let file = self.file(name)?;
        let len = file.metadata()?.len();
        if len > limit {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("it has {len} bytes, at most {limit} are read"),
            ));
        }
        let mut bytes = Vec::with_capacity(len as usize);
        file.take(limit).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// A new file, for us alone.
    pub(super) fn create(&self, name: &str) -> io::Result<File> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Ok(openat(&self.file, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)?.into())
    }

    /// A new file with this content, durable once the directory is.
    pub(super) fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut file = self.create(name)?;
        file.write_all(bytes)?;
        file.sync_all()
    }

    /// A file to lock, made if it is not there.
    pub(super) fn lock_file(&self, name: &str) -> io::Result<File> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        Ok(openat(&self.file, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)?.into())
    }

    /// A file that exists, to lock it: on NFS an exclusive lock needs the right to write.
    pub(super) fn file_to_lock(&self, name: &str) -> io::Result<File> {
        let flags = OFlag::O_RDWR | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        Ok(openat(&self.file, name, flags, Mode::empty())?.into())
    }

    pub(super) fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(renameat(&self.file, from, &self.file, to)?)
    }

    /// Whether anything has this name.
    pub(super) fn has(&self, name: &str) -> io::Result<bool> {
        match fs::symlink_metadata(self.path.join(name)) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Names in this directory that are text; ours all are.
    pub(super) fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            names.extend(entry?.file_name().into_string());
        }
        names.sort();
        Ok(names)
    }

    /// Removes a directory and what is in it.
    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_dir_all(self.path.join(name))
    }

    /// Removes a file, if it is there.
    pub(super) fn remove_file(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.file, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes the names in this directory durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    /// Bytes that the files in this directory and those below it occupy.
    pub(super) fn occupied(&self) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt;
        let mut bytes = 0;
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            if metadata.is_file() {
                bytes += metadata.blocks() * 512;
            } else if metadata.is_dir()
                && let Ok(name) = entry.file_name().into_string()
            {
                bytes += self.dir(&name)?.occupied()?;
            }
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn ids_and_backing_references_have_one_form_only() {
        let (guest, epoch) = parse_id(&ArchiveId("web-1/qemu-1769824807".into())).unwrap();
        assert_eq!(archive_id(&guest, epoch).0, "web-1/qemu-1769824807");
        assert_eq!(epoch.name(&guest).unwrap().to_string(), "pve-qemu-web-1-2026-01-31T02:00:07Z");
        assert_eq!(Epoch::of(&epoch.name(&guest).unwrap()), Some(epoch));
        for id in
            ["", "1", "1/", "1/qemu-", "1/qemu-01", "1/qemu-+1", "../qemu-1", "1/qemu-1/", "1/2/qemu-1", "/qemu-1"]
        {
            assert_eq!(parse_id(&ArchiveId(id.into())), None, "{id}");
        }
        assert_eq!(Epoch::of_backing("../qemu-1769824807/scsi0.qcow2", "scsi0"), Some(epoch));
        for reference in [
            "/etc/passwd",
            "../qemu-1/scsi1.qcow2",
            "../../1/qemu-1/scsi0.qcow2",
            "../qemu-1/../qemu-1/scsi0.qcow2",
            "qemu-1/scsi0.qcow2",
            "../qemu-1.partial/scsi0.qcow2",
            "json:{}",
            "../qemu-1/scsi0.qcow2\0",
        ] {
            assert_eq!(Epoch::of_backing(reference, "scsi0"), None, "{reference}");
        }
    }

    #[test]
    fn links_are_not_followed_and_pipes_do_not_hang() {
        let place = tempfile::tempdir().unwrap();
        let dir = Dir::open(place.path()).unwrap();
        dir.write("file", b"12345").unwrap();
        dir.make("dir").unwrap();
        symlink("file", place.path().join("link")).unwrap();
        symlink("dir", place.path().join("dirlink")).unwrap();
        nix::unistd::mkfifo(&place.path().join("pipe"), Mode::S_IRWXU).unwrap();
        assert_eq!(dir.read("file", 5).unwrap(), b"12345");
        assert!(dir.read("file", 4).is_err(), "longer than allowed");
        assert!(dir.dir("dirlink").is_err());
        for name in ["link", "pipe", "dir", "none"] {
            assert!(dir.read(name, 10).is_err(), "{name}");
        }
        assert!(dir.create("file").is_err() && dir.create("link").is_err(), "only new files");
    }
}
