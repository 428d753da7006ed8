//! Why a restore fails.

use crate::{
    archive::{ArchiveName, ManifestError},
    provider::{ErrorKind, ProviderError},
    segment::TableError,
};
use std::{
    io,
    path::{Path, PathBuf},
};
use thiserror::Error;

/// What kind of failure, for exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestoreErrorKind {
    /// No such archive or disk.
    NotFound,
    /// The request cannot be done as it is: a target exists, is too small, is the wrong kind of file, a choice is
    /// ambiguous.
    Usage,
    /// Somebody else uses a target.
    Busy,
    /// What was read is not what the archive says it holds.
    Mismatch,
    /// The archive cannot be made sense of, or misses segments.
    Damaged,
    /// The target has no space.
    NoSpace,
    /// The repository could not be read.
    Provider(ErrorKind),
    /// Writing failed.
    Io,
    /// The restore was told to stop.
    Cancelled,
}

/// A failed restore.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// The selector fits no archive.
    #[error("no archive `{wanted}`{}", of_guest(guest.as_deref()))]
    NoArchive {
        /// As typed.
        wanted: String,
        /// The guest that was asked for.
        guest: Option<String>,
    },
    /// The selector fits several archives.
    #[error("`{wanted}` may be any of: {}", candidates.join(", "))]
    AmbiguousArchive {
        /// As typed.
        wanted: String,
        /// What it may be, at most a handful.
        candidates: Vec<String>,
    },
    /// The archive has no such disk.
    #[error("archive {archive} has no disk `{disk}`, only: {}", known.join(", "))]
    NoDisk {
        /// The disk.
        disk: String,
        /// The archive.
        archive: ArchiveName,
        /// Disks that it has.
        known: Vec<String>,
    },
    /// The request names a disk twice.
    #[error("disk `{0}` is asked for twice")]
    DiskTwice(String),
    /// The request or the archive has no disks.
    #[error("there is no disk to restore")]
    NoDisks,
    /// The manifest is unusable.
    #[error("archive cannot be restored")]
    Manifest(#[from] ManifestError),
    /// A segment table is unusable.
    #[error("disk `{disk}` cannot be restored")]
    Table {
        /// The disk.
        disk: String,
        /// Why.
        source: TableError,
    },
    /// The segment tables would need more memory than any plausible archive.
    #[error("segment table of disk `{disk}` may have {bytes} bytes, at most {limit} are read")]
    TableSize {
        /// The disk.
        disk: String,
        /// What the manifest lets expect.
        bytes: u64,
        /// The limit for all disks of an archive together, less those before this one.
        limit: u64,
    },
    /// The segment table is not the one that the manifest names.
    #[error("segment table of disk `{disk}` has digest {found}, the manifest says {expected:?}")]
    TableDigest {
        /// The disk.
        disk: String,
        /// Of the manifest.
        expected: String,
        /// Of the table.
        found: String,
    },
    /// Manifest and segment table disagree about the amount of data.
    #[error("segment table of disk `{disk}` lists {found} bytes of data, the manifest says {expected}")]
    DataBytes {
        /// The disk.
        disk: String,
        /// Of the manifest.
        expected: u64,
        /// Of the table.
        found: u64,
    },
    /// A member or segment table could not be read.
    #[error("cannot read {what} of the archive")]
    Read {
        /// `manifest.json`, `segment table of disk …`
        what: String,
        /// Why.
        source: ProviderError,
    },
    /// A segment could not be read.
    #[error("cannot read {len} bytes at {offset} of disk `{disk}`")]
    Segment {
        /// The disk.
        disk: String,
        /// First byte on the disk.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Why.
        source: ProviderError,
    },
    /// A segment has the wrong length.
    #[error("archive returns {found} instead of {expected} bytes at {offset} of disk `{disk}`")]
    SegmentLength {
        /// The disk.
        disk: String,
        /// First byte on the disk.
        offset: u64,
        /// Bytes wanted.
        expected: u64,
        /// Bytes that came.
        found: u64,
    },
    /// A segment's content is not what was stored.
    #[error("content of {len} bytes at {offset} of disk `{disk}` differs from what was stored (digest does not match)")]
    SegmentDigest {
        /// The disk.
        disk: String,
        /// First byte on the disk.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Less or more was written than the archive holds; a bug.
    #[error("wrote {written} bytes of disk `{disk}` instead of {expected}")]
    Incomplete {
        /// The disk.
        disk: String,
        /// Written bytes.
        written: u64,
        /// Bytes of data that the archive holds.
        expected: u64,
    },
    /// A thread that reads segments died; a bug in the provider.
    #[error("reading of disk `{0}` ended unexpectedly")]
    WorkerDied(String),
    /// The target exists.
    #[error("target `{path}` exists")]
    TargetExists {
        /// The target.
        path: PathBuf,
    },
    /// The target is nothing that can be written to.
    #[error("target `{path}` is {found}, not {expected}")]
    TargetKind {
        /// The target.
        path: PathBuf,
        /// What it is.
        found: &'static str,
        /// What it has to be.
        expected: &'static str,
    },
    /// The device is smaller than the disk.
    #[error("target `{path}` has {size} bytes, disk `{disk}` needs {needed}")]
    TargetTooSmall {
        /// The target.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// The disk.
        disk: String,
        /// The disk's size.
        needed: u64,
    },
    /// Two disks would go to the same place.
    #[error("disks `{first}` and `{second}` have the same target `{path}`")]
    SameTarget {
        /// The target.
        path: PathBuf,
        /// One disk.
        first: String,
        /// The other.
        second: String,
    },
    /// A device cannot hold this format.
    #[error("target `{path}` is a block device, which takes format raw, not qcow2")]
    Qcow2OnDevice {
        /// The target.
        path: PathBuf,
    },
    /// QEMU, another restore, or the kernel has the target open.
    #[error("target `{path}` is in use")]
    TargetBusy {
        /// The target.
        path: PathBuf,
    },
    /// It would not fit.
    #[error("file system of `{path}` has {available} bytes free, the restore needs {needed}")]
    NoSpace {
        /// A target on it.
        path: PathBuf,
        /// Bytes of data that will be written there.
        needed: u64,
        /// Bytes free for us.
        available: u64,
    },
    /// Something about a target failed.
    #[error("cannot {action} `{path}`")]
    Io {
        /// `create`, `write to`, …
        action: &'static str,
        /// The target.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The restore was told to stop.
    #[error("restore was cancelled")]
    Cancelled,
    /// A failure, after which an overwritten target is not a disk.
    #[error("target `{path}` is overwritten in part and must not be used")]
    TargetSpoilt {
        /// The target.
        path: PathBuf,
        /// What failed.
        source: Box<RestoreError>,
    },
    /// A failure, after which something could not be removed.
    #[error("cannot remove `{path}` ({undo}) after a failed restore")]
    Undo {
        /// What is left.
        path: PathBuf,
        /// Why it is left.
        undo: io::Error,
        /// What failed first.
        source: Box<RestoreError>,
    },
}

impl RestoreError {
    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }

    /// For exit codes.
    pub fn kind(&self) -> RestoreErrorKind {
        use RestoreErrorKind as Kind;
        match self {
            Self::NoArchive { .. } | Self::NoDisk { .. } => Kind::NotFound,
            Self::AmbiguousArchive { .. }
            | Self::DiskTwice(_)
            | Self::NoDisks
            | Self::TargetExists { .. }
            | Self::TargetKind { .. }
            | Self::TargetTooSmall { .. }
            | Self::SameTarget { .. }
            | Self::Qcow2OnDevice { .. } => Kind::Usage,
            Self::TargetBusy { .. } => Kind::Busy,
            Self::TableDigest { .. }
            | Self::DataBytes { .. }
            | Self::SegmentLength { .. }
            | Self::SegmentDigest { .. } => Kind::Mismatch,
            Self::Manifest(_) | Self::Table { .. } | Self::TableSize { .. } => Kind::Damaged,
            // A member or segment that has to be there and is not: the archive is damaged, nothing was mistyped.
            Self::Read { source, .. } | Self::Segment { source, .. } => match source.kind {
                ErrorKind::NotFound | ErrorKind::Damaged | ErrorKind::Incomplete => Kind::Damaged,
                kind => Kind::Provider(kind),
            },
            Self::NoSpace { .. } => Kind::NoSpace,
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::NoSpace,
                _ => Kind::Io,
            },
            Self::Incomplete { .. } | Self::WorkerDied(_) => Kind::Io,
            Self::Cancelled => Kind::Cancelled,
            Self::TargetSpoilt { source, .. } | Self::Undo { source, .. } => source.kind(),
        }
    }
}

fn of_guest(guest: Option<&str>) -> String {
    guest.map(|g| format!(" of guest `{g}`")).unwrap_or_default()
}
