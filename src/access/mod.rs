//! Snapshot access: QEMU's read-only view of a guest's disks at one instant.
//!
//! One trait, two implementations: `proxmox` (QEMU with Proxmox VE's patches) and `stock` (upstream QEMU). Both produce
//! the same thing: for every disk an export, its size, its bitmap context, and what was done with the bitmap and why.

pub mod by_hand;
mod exported_bitmap;
pub mod fleecing;
pub mod fleecing_volume;
pub mod freeze;
pub mod graph;
pub mod proxmox;
mod recover;
pub mod stock;
pub mod watchdog;

pub use crate::protocol::Teardown;
pub use recover::{RecoveryReport, end, recover, release};

use crate::{
    guest::{Disk, Guest},
    journal::JournalError,
    qmp::QmpError,
};
use async_trait::async_trait;
use freeze::FreezeError;
use jiff::Timestamp;
use std::{io, path::PathBuf, time::Duration};
use thiserror::Error;
use watchdog::WatchdogError;

/// What is asked for about a disk's dirty bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BitmapMode {
    /// Read everything, and leave no bitmap behind. On Proxmox QEMU deletes the target's bitmap, so the target must be one
    /// that has none.
    None,
    /// Read everything and start a new generation.
    New,
    /// Read what is dirty in this bitmap, and start a new generation. On Proxmox the name is the target id.
    Use(String),
}

/// What QEMU did about a disk's dirty bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BitmapAction {
    /// No bitmap is in use.
    NotUsed,
    /// A new bitmap was started; everything is read.
    New,
    /// The bitmap was used; only dirty ranges are read.
    Used,
    /// The bitmap was not there (or of no use) and was created anew; everything is read.
    MissingRecreated,
}

impl BitmapAction {
    /// QEMU's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotUsed => "not-used",
            Self::New => "new",
            Self::Used => "used",
            Self::MissingRecreated => "missing-recreated",
        }
    }
}

/// One disk of an access to be set up.
#[derive(Clone, Debug)]
pub struct DiskPlan {
    /// The disk.
    pub disk: Disk,
    /// What to do about its bitmap.
    pub bitmap: BitmapMode,
    /// Granularity of a bitmap that is created, in bytes (stock QEMU; Proxmox's is 4 MiB).
    pub granularity: u32,
}

/// Whether the guest agent freezes the file systems around the instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FreezeMode {
    /// If there is an agent that answers; otherwise go on without.
    Auto,
    /// Fail when it cannot be done.
    Require,
    /// Never.
    Off,
}

/// Where fleecing images come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fleecing {
    /// Sparse files in a directory.
    Directory {
        /// The directory.
        path: PathBuf,
        /// Their format.
        format: FleecingFormat,
    },
    /// Volumes of a Proxmox storage, through `pvesm`.
    Storage(String),
}

/// Format of fleecing images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FleecingFormat {
    /// Raw, sparse. The better choice wherever the file system has holes.
    Raw,
    /// qcow2.
    Qcow2,
}

/// An access to be set up.
#[derive(Clone, Debug)]
pub struct AccessPlan {
    /// The guest.
    pub guest: Guest,
    /// Its disks, at least one.
    pub disks: Vec<DiskPlan>,
    /// Id of the target, unique on this host: names bitmaps on stock QEMU and is the target id on Proxmox.
    pub target: String,
    /// Id of this run and of the generation that it starts: 16 hex digits.
    pub generation: String,
    /// Directory of this run, 0700: NBD socket.
    pub run_dir: PathBuf,
    /// Fleecing images.
    pub fleecing: Fleecing,
    /// Freeze.
    pub freeze: FreezeMode,
    /// Limit of a freeze, and of the agent's answers.
    pub freeze_limit: Duration,
    /// After how long a guest write may break the snapshot rather than wait for fleecing.
    pub cbw_timeout: Duration,
    /// What clients may do with the exports.
    pub exports: ExportMode,
    /// Program that manages Proxmox storages (`pvesm`).
    pub pvesm: PathBuf,
}

/// What clients may do with the exports. Nobody can write to a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportMode {
    /// Read, and TRIM what they need no more: it cannot be read again.
    Trim,
    /// Read only.
    Read,
}

/// A disk under snapshot access.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DiskAccess {
    /// Name as shown.
    pub name: String,
    /// The NBD export's name.
    pub export: String,
    /// Size in bytes.
    pub size: u64,
    /// NBD meta context of the dirty bitmap (`qemu:dirty-bitmap:NAME`), when only dirty ranges are to be read.
    pub dirty_context: Option<String>,
    /// What was done about the bitmap.
    pub action: BitmapAction,
    /// Why, in words.
    pub reason: String,
    /// Whether ranges that are not dirty can be read too.
    pub clean_readable: bool,
    /// Largest range in bytes that may be asked for at once, when QEMU cannot be trusted with larger ones: after a guest has
    /// discarded, 7.2 answers a read, or a block status, of clusters that were copied and others that were not from the disk
    /// as it is now. A single cluster is always answered right.
    pub largest_request: Option<u32>,
    /// Granularity of the bitmap in bytes; TRIMs have to be aligned to it (and to 64 KiB at least).
    pub granularity: u64,
    /// Bitmap that starts with this access: what the next backup may use once this one is committed.
    pub next_bitmap: Option<String>,
    /// Node that carries it.
    pub bitmap_node: Option<String>,
}

/// An access that is set up.
#[derive(Clone, Debug)]
pub struct ActiveAccess {
    /// The NBD server's unix socket.
    pub socket: PathBuf,
    /// The disks, in the order of the plan.
    pub disks: Vec<DiskAccess>,
    /// The instant that they show.
    pub instant: Timestamp,
    /// How the guest was held still.
    pub consistency: crate::archive::Consistency,
}

/// What an access did, for the summary.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AccessReport {
    /// Most bytes that the fleecing images held, as far as seen.
    pub fleecing_peak_bytes: u64,
    /// What could not be undone and stays in the journal.
    pub left_behind: Vec<String>,
}

/// A way to a snapshot access.
#[async_trait]
pub trait SnapshotAccess: Send {
    /// Everything that can be known before anything is changed. Must be called before [`SnapshotAccess::set_up`].
    async fn check(&mut self) -> Result<(), AccessError>;

    /// Sets the access up; every step is in the journal before it is taken. After an error nothing is left, or the journal
    /// says what.
    async fn set_up(&mut self) -> Result<ActiveAccess, AccessError>;

    /// Bytes that the fleecing images hold now.
    fn fleecing_bytes(&self) -> u64;

    /// The fleecing images as they were made, in the order of the plan; `None` for what is no file.
    fn fleecing_witnesses(&self) -> Vec<Option<fleecing::Witness>>;

    /// What the user should know although it stopped nothing. Each warning is handed out once.
    fn take_warnings(&mut self) -> Vec<String> {
        Vec::new()
    }

    /// Tears the access down. All NBD connections must be closed. Removes everything that was set up; what cannot be removed
    /// is reported and stays in the journal. Idempotent.
    async fn tear_down(&mut self, how: Teardown) -> Result<AccessReport, AccessError>;
}

/// Why a snapshot access failed.
#[derive(Debug, Error)]
pub enum AccessError {
    /// A QMP exchange failed.
    #[error("{step}{}", of_disk(.disk.as_deref()))]
    Qmp {
        /// What was tried, in words: `cannot add the fleecing node`.
        step: String,
        /// The disk, when it is about one.
        disk: Option<String>,
        /// QEMU's answer, or why there is none.
        #[source]
        source: QmpError,
    },
    /// This QEMU cannot do it.
    #[error("this QEMU lacks {what}{}", of_disk(.disk.as_deref()))]
    FeatureMissing {
        /// What is missing.
        what: String,
        /// The disk, when it is about one.
        disk: Option<String>,
    },
    /// A combination that is known to harm the guest, or a plan that cannot be carried out. Nothing was touched.
    #[error("refused{}: {reason}", of_disk(.disk.as_deref()))]
    Refused {
        /// Why.
        reason: String,
        /// The disk, when it is about one.
        disk: Option<String>,
    },
    /// Too little room for fleecing images. Nothing was touched.
    #[error("too little space for fleecing images in {place}: {available} {unit} are free, {needed} are needed")]
    NoSpace {
        /// The directory or storage.
        place: String,
        /// What is free.
        available: u64,
        /// What is needed at least.
        needed: u64,
        /// `bytes` or `inodes`.
        unit: &'static str,
    },
    /// A fleecing image cannot be made, found or removed.
    #[error("fleecing image {image}{} cannot be {doing}", of_disk(.disk.as_deref()))]
    Fleecing {
        /// Path or volume.
        image: String,
        /// The disk, when it is about one.
        disk: Option<String>,
        /// What was tried: `created`.
        doing: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file or directory of the run cannot be made.
    #[error("{path} cannot be {doing}")]
    Io {
        /// The path.
        path: PathBuf,
        /// What was tried: `created`.
        doing: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Somebody else is at work.
    #[error("the guest is busy: {by}{}", of_disk(.disk.as_deref()))]
    Busy {
        /// Who or what.
        by: String,
        /// The disk, when it is about one.
        disk: Option<String>,
    },
    /// Something in QEMU that is not ours stands in the way.
    #[error("{what}{} is not ours and in the way", of_disk(.disk.as_deref()))]
    Foreign {
        /// The NBD server, export, job or filter.
        what: String,
        /// The disk, when it is about one.
        disk: Option<String>,
    },
    /// The guest's file systems were not frozen although that was demanded, or may not be thawed.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// There is nobody to resume the guest if we die, so it is not paused.
    #[error("the guest cannot be paused safely")]
    Watchdog(#[from] WatchdogError),
    /// QEMU goes on with something that should have ended.
    #[error("{what} is still there after {waited:?}")]
    Stuck {
        /// Export, job or node.
        what: String,
        /// How long we waited.
        waited: Duration,
    },
    /// The journal cannot be written, so nothing more may be changed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A test ends the run here, as if the process had died.
    #[cfg(test)]
    #[error("the process dies at point {0}")]
    Killed(usize),
}

fn of_disk(disk: Option<&str>) -> String {
    disk.map(|disk| format!(" of disk `{disk}`")).unwrap_or_default()
}

impl AccessError {
    /// For `map_err`: a QMP error with the step, and the disk if it is about one.
    pub fn qmp<'a>(step: &'a str, disk: Option<&'a str>) -> impl FnOnce(QmpError) -> Self + 'a {
        move |source| Self::Qmp { step: step.to_owned(), disk: disk.map(str::to_owned), source }
    }
}
