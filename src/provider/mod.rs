//! Providers: code that stores archives in a repository.
//!
//! The trait follows Proxmox VE's backup provider API in meaning. A job is one run of the program and may back up several
//! guests; the calls come in this order, and only in this order:
//!
//! `job_init` → for each guest: `backup_init` → `query_incremental` → `backup` → `backup_cleanup` → `handle_log` →
//! `job_cleanup`.
//!
//! Providers are blocking code and run on a thread of their own. They must not know where the data comes from: no QEMU,
//! no NBD, no bitmaps.

pub mod borg;
pub mod directory;
pub mod null;
mod reach;
#[cfg(feature = "restic")]
pub mod restic;
mod target;

pub use reach::Reach;
pub use target::{for_target, init_target, least_segment};

use crate::{
    archive::{ArchiveId, ArchiveName, Manifest},
    report::Events,
    segment::{DiskTables, Segment, SegmentLen, SegmentTable},
};
use jiff::Timestamp;
use std::path::PathBuf;
use thiserror::Error;
use tokio_util::sync::CancellationToken;

/// How a provider takes the disks of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mechanism {
    /// As a stream of segments, see [`DiskInput`].
    Segments,
    /// As two, of segments and of the fine segments that lie over them ([`crate::segment::layers`]).
    Layers,
}

/// A disk for which an incremental backup is asked for.
#[derive(Clone, Debug)]
pub struct DiskQuery {
    /// Name as shown: `scsi0`.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// Segment length that the backup will have.
    pub segment_len: SegmentLen,
    /// The archive that the disk's dirty bitmap is relative to.
    pub base: ArchiveId,
}

/// Answer to a [`DiskQuery`].
#[derive(Clone, Debug)]
pub enum Incremental {
    /// The base archive exists now and holds the disk completely; these are its segment tables.
    Use(DiskTables),
    /// The disk has to be read in full, and why.
    New(String),
}

/// One disk of a backup.
pub struct DiskInput {
    /// Name as shown; a plain file name.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// Segment length.
    pub segment_len: SegmentLen,
    /// Archive and table that unchanged segments are taken from; `None` for a full backup.
    pub base: Option<(ArchiveId, SegmentTable)>,
    /// What `changed` is going to deliver, in its order.
    pub expected: Vec<Expected>,
    /// The changed segments, ordered by index; blocks while the copy engine reads. An error ends it and the backup.
    pub changed: Box<dyn Iterator<Item = Result<Segment, SourceError>> + Send>,
    /// The layer of fine segments; only with a base, and only for a provider that takes [`Mechanism::Layers`].
    pub fine: Option<FineInput>,
}

/// The fine segments of a disk. Here zeroes are content, and stored.
pub struct FineInput {
    /// Those of the base archive that stay where none is delivered.
    pub base: SegmentTable,
    /// Positions of those that `changed` is going to deliver.
    pub expected: Vec<u64>,
    /// The changed ones, ordered by index; to be read behind the disk's [`DiskInput::changed`].
    pub changed: Box<dyn Iterator<Item = Result<Segment, SourceError>> + Send>,
}

/// A segment that will be delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Position on the disk, in segments.
    pub index: u64,
    /// Whether it is known beforehand that it is zero. Others can turn out to be.
    pub zero: bool,
}

/// The disk could not be read to its end. The cause has been reported by the copy engine.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("disk `{disk}` could not be read: {message}")]
pub struct SourceError {
    /// The disk.
    pub disk: String,
    /// What happened.
    pub message: String,
}

/// Makes the manifest from the finished segment tables.
pub type MakeManifest = Box<dyn FnOnce(&[DiskTables]) -> Manifest + Send>;

/// Everything that goes into one archive.
pub struct BackupInput {
    /// The archive's name, as `backup_init` chose it.
    pub archive: ArchiveName,
    /// The instant of the snapshot access; becomes the time of every changed segment. Later than that of every base.
    pub instant: Timestamp,
    /// Members besides manifest and disks: file name and content (`guest.conf`, `firewall.conf`).
    pub members: Vec<(String, Vec<u8>)>,
    /// The disks, ordered by name.
    pub disks: Vec<DiskInput>,
    /// Makes the manifest from the finished segment tables, in the order of `disks`. Called once, after the last segment.
    pub manifest: MakeManifest,
    /// Set when the backup is to stop: the provider returns soon, with an error, and leaves no archive.
    pub cancel: CancellationToken,
}

/// A durable archive.
#[derive(Clone, Debug)]
pub struct Stored {
    /// The repository's id of it.
    pub id: ArchiveId,
    /// Bytes that the repository grew by, if it knows.
    pub added_bytes: Option<u64>,
}

/// How a backup of a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The archive is durable.
    Success,
    /// It failed, and why.
    Failure(String),
}

/// An archive in a list.
#[derive(Clone, Debug)]
pub struct ArchiveInfo {
    /// The repository's id.
    pub id: ArchiveId,
    /// Its name.
    pub name: ArchiveName,
    /// Names of the disks, if the list knows them without reading every archive.
    pub disks: Vec<String>,
    /// Bytes that its disks have together (size, not data), if known.
    pub size: Option<u64>,
    /// Bytes that the repository grew by for it, if known.
    pub added_bytes: Option<u64>,
}

/// Archives of one guest to be removed, because no retention rule keeps them.
#[derive(Clone, Debug)]
pub struct PruneRequest {
    /// The guest.
    pub guest: String,
    /// Its archives to remove; never its newest.
    pub remove: Vec<ArchiveId>,
    /// Change nothing, only find out what would happen.
    pub dry_run: bool,
    /// Set when it is to stop: between two archives, or in the middle of one, which then stays.
    pub cancel: CancellationToken,
}

/// What became of an archive that was to be removed, or would become of it in a dry run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pruned {
    /// It is gone.
    Removed,
    /// It is gone, and later archives took over what they need of it.
    Merged,
    /// It is still there, complete, and why.
    Kept(String),
}

/// What kind of failure, for exit codes and for the decision to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The repository does not exist.
    RepositoryMissing,
    /// Somebody else holds the repository.
    Locked,
    /// Password or key is wrong or missing.
    Credentials,
    /// No such archive or member.
    NotFound,
    /// The target has no space left.
    NoSpace,
    /// The repository is damaged, or holds something that we did not write.
    Damaged,
    /// The source failed (see [`SourceError`]) or the backup was cancelled.
    Source,
    /// What was stored is not what was planned.
    Incomplete,
    /// Anything else.
    Other,
}

/// A provider's failure.
#[derive(Debug, Error)]
#[error("{message}")]
pub struct ProviderError {
    /// For decisions.
    pub kind: ErrorKind,
    /// For people: what failed, with the names in it.
    pub message: String,
    /// The cause.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl ProviderError {
    /// A failure without a cause.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// A failure with its cause.
    pub fn caused_by(
        kind: ErrorKind,
        message: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { kind, message: message.into(), source: Some(source.into()) }
    }
}

/// Stores archives in one repository.
pub trait Provider: Send {
    /// Kind of provider: `restic`, `borg`, …
    fn kind(&self) -> &'static str;

    /// Where to send, from now on, what somebody should know while it works; without it that goes to the program's log.
    fn report_to(&mut self, _events: &Events) {}

    /// Identity of the repository, the same as long as it is the same repository, whatever its path. Opens it.
    fn repository_id(&mut self) -> Result<String, ProviderError>;

    /// A job begins. Opens the repository.
    fn job_init(&mut self, start: Timestamp) -> Result<(), ProviderError>;

    /// The job is over; called once, also after failures.
    fn job_cleanup(&mut self) -> Result<(), ProviderError>;

    /// A guest's backup begins: chooses the archive's name, which no other archive of the repository has.
    fn backup_init(&mut self, guest: &str, start: Timestamp) -> Result<ArchiveName, ProviderError>;

    /// How the disks are wanted.
    fn mechanism(&self) -> Mechanism {
        Mechanism::Segments
    }

    /// Where a backup of `guest` mounts something while it runs, for the recovery journal.
    fn mountpoint(&self, _guest: &str) -> Option<PathBuf> {
        None
    }

    /// For every disk: does its base archive exist now, complete, with this size and segment length? An answer of
    /// [`Incremental::Use`] must come from the repository, not from memory. Same order as `disks`.
    fn query_incremental(&mut self, disks: &[DiskQuery]) -> Result<Vec<Incremental>, ProviderError>;

    /// Stores one archive; returns only when it is durable: flushed, listed, and what was planned is what is stored. On an
    /// error no archive is left. Calls [`crate::segment::SegmentData::stored`] for every segment taken over.
    fn backup(&mut self, input: BackupInput) -> Result<Stored, ProviderError>;

    /// A guest's backup is over. Must not touch an archive that `backup` returned. Returns the archive's size if known.
    fn backup_cleanup(&mut self, outcome: &Outcome) -> Result<Option<u64>, ProviderError>;

    /// The run's log, after `backup_cleanup`; for providers that keep it.
    fn handle_log(&mut self, _log: &str) -> Result<(), ProviderError> {
        Ok(())
    }

    /// Archives in the repository, oldest first, of one guest or of all.
    fn list(&mut self, guest: Option<&str>) -> Result<Vec<ArchiveInfo>, ProviderError>;

    /// Removes archives of one guest; at every point the others are what they were. Not between `backup_init` and
    /// `backup_cleanup` of another guest. Same order as [`PruneRequest::remove`].
    fn prune(&mut self, _request: PruneRequest) -> Result<Vec<Pruned>, ProviderError> {
        let message = format!("a {} target removes no archives", self.kind());
        Err(ProviderError::new(ErrorKind::Other, message))
    }

    /// Opens an archive for reading.
    fn open(&mut self, archive: &ArchiveId) -> Result<Box<dyn ArchiveReader>, ProviderError>;
}

/// Reads one archive, from many threads. What it returns is not trusted by the caller.
pub trait ArchiveReader: Send + Sync {
    /// A member by its file name: `manifest.json`, `guest.conf`, `firewall.conf`. At most `limit` bytes.
    fn member(&self, name: &str, limit: u64) -> Result<Vec<u8>, ProviderError>;

    /// The segment table of a disk, or of its fine segments ([`crate::segment::layers::Layer::name`]), as stored, at most `limit`
    /// bytes.
    fn table(&self, disk: &str, limit: u64) -> Result<Vec<u8>, ProviderError>;

    /// One stored segment of a disk, or of its fine segments: exactly `len` bytes, or an error.
    fn segment(&self, disk: &str, index: u64, len: u64) -> Result<bytes::Bytes, ProviderError>;
}
