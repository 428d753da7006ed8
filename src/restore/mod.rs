//! Restoring disks from an archive.
//!
//! The archive is not trusted. Everything it says about itself is read and checked before the first byte is written
//! (`source`); every segment is compared with its digest before it counts (`segments`). Names of files come from the
//! checked manifest and go into the directory that the caller named, or the caller names every path himself (`target`).
//!
//! New files are written as `NAME.partial` and get their names when all of them are complete and durable: a directory
//! holds a complete restore or nothing. What we die over stays as `.partial`, which the next restore to the same place
//! removes. Files and devices that are overwritten cannot have that; a failure there is told to leave an incomplete disk.

mod error;
mod image;
mod segments;
mod select;
mod source;
mod target;
#[cfg(test)]
pub(crate) mod tests;

pub use error::{RestoreError, RestoreErrorKind};
pub use select::resolve;
pub(crate) use source::{ArchivedDisk, read_disks};

use crate::{
    archive::ArchiveName,
    provider::ArchiveReader,
    report::{Event, Events, Phase, printable, sizes},
};
use image::{DeviceDisk, DiskImage, Qcow2Disk, RawDisk};
use serde::Serialize;
use source::Archived;
use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use target::{Kind, Target};
use tokio_util::sync::CancellationToken;

/// Which disks are wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskSelection {
    /// All that the archive has.
    All,
    /// These, by the names that the manifest gives them.
    Only(Vec<String>),
}

/// Where disks go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// Into a directory: `DISK.raw` or `DISK.qcow2`, `guest.conf`, `firewall.conf`, `manifest.json`. It is made if it is
    /// missing, with permissions for us alone; none of the files may exist.
    Directory {
        /// The directory.
        path: PathBuf,
        /// Disks that are wanted.
        disks: DiskSelection,
    },
    /// Each disk to a path: a new file, or with [`Overwrite::Allowed`] an existing file or a block device.
    Disks(Vec<(String, PathBuf)>),
}

/// What a restored disk is written as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageFormat {
    /// Byte for byte; holes of files stay holes.
    #[default]
    Raw,
    /// QEMU's format, version 3, clusters of 64 KiB, without a backing file.
    Qcow2,
}

impl ImageFormat {
    /// `raw` or `qcow2`: QEMU's name, and the file name's extension.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Whether targets named by [`Destination::Disks`] may lose what they hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overwrite {
    /// An existing file or device is an error.
    #[default]
    Refused,
    /// It is overwritten.
    Allowed,
}

/// What is wanted of a restore.
#[derive(Clone, Debug)]
pub struct RestoreRequest {
    /// Where to.
    pub destination: Destination,
    /// As what.
    pub format: ImageFormat,
    /// Whether existing targets are overwritten.
    pub overwrite: Overwrite,
}

/// A disk that was restored. Sizes in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RestoredDisk {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// As what.
    pub format: ImageFormat,
    /// Its size.
    pub size_bytes: u64,
    /// Written from the archive, each byte verified.
    pub written_bytes: u64,
    /// Zeroes: holes of a file, cleared ranges of a device.
    pub zero_bytes: u64,
}

/// How a restore ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RestoreReport {
    /// The archive.
    pub archive: ArchiveName,
    /// The disks, ordered as in the manifest or as asked for.
    pub disks: Vec<RestoredDisk>,
    /// Other files that were written.
    pub files: Vec<PathBuf>,
    /// Members that the archive should have and has not. The disks are complete all the same.
    pub missing: Vec<String>,
    /// From start to end, in seconds when serialised.
    #[serde(serialize_with = "crate::report::seconds")]
    pub duration: Duration,
}

impl RestoreReport {
    /// One line for people, without its end.
    pub fn line(&self) -> String {
        let sum =
            |f: fn(&RestoredDisk) -> u64| sizes::short_bytes(self.disks.iter().map(f).fold(0, u64::saturating_add));
        format!(
            "{}: restored {} disk{}, {}, {} of data, {}",
            self.archive,
            self.disks.len(),
            if self.disks.len() == 1 { "" } else { "s" },
            sum(|d| d.size_bytes),
            sum(|d| d.written_bytes),
            sizes::duration(self.duration)
        )
    }
}

/// Restores disks of the archive that `reader` has open. Blocks; asynchronous callers give it a thread of its own.
///
/// Returns when everything is durable. Cancelling is noticed between two segments and ends in
/// [`RestoreError::Cancelled`].
///
/// # Errors
/// Every error leaves no new file. Files and devices that were to be overwritten may be incomplete then:
/// [`RestoreError::TargetSpoilt`] says so.
pub fn restore(
    reader: &dyn ArchiveReader,
    request: &RestoreRequest,
    events: &Events,
    cancel: &CancellationToken,
) -> Result<RestoreReport, RestoreError> {
    let start = Instant::now();
    events.phase(Phase::Prepare);
    let archived = source::read(reader, &request.destination)?;
    for name in &archived.missing {
        events
            .warn(format!("archive {} has no `{name}`; the disks are restored without it", archived.manifest.archive));
    }
    let plan = plan(&archived, request)?;
    target::check_space(&plan.needs())?;
    if cancel.is_cancelled() {
        return Err(RestoreError::Cancelled);
    }

    events.phase(Phase::Restore);
    let mut targets = Targets::default();
    let result = write(reader, &plan, &mut targets, request, events, cancel);
    let disks = match result {
        Ok(disks) => disks,
        Err(error) => return Err(targets.abandon(error)),
    };
    Ok(RestoreReport {
        archive: archived.manifest.archive.clone(),
        disks,
        files: plan.files.iter().map(|(path, _)| path.clone()).collect(),
        missing: archived.missing,
        duration: start.elapsed(),
    })
}

/// What goes where.
struct Plan<'a> {
    directory: Option<&'a Path>,
    disks: Vec<(&'a ArchivedDisk, PathBuf)>,
    files: Vec<(PathBuf, &'a [u8])>,
}

fn plan<'a>(archived: &'a Archived, request: &'a RestoreRequest) -> Result<Plan<'a>, RestoreError> {
    match &request.destination {
        Destination::Directory { path, .. } => {
            let plan = Plan {
                directory: Some(path),
                disks: (archived.disks.iter())
                    .map(|disk| (disk, path.join(format!("{}.{}", disk.name, request.format.name()))))
                    .collect(),
                files: (archived.members.iter()).map(|(name, bytes)| (path.join(name), bytes.as_slice())).collect(),
            };
            target::check_directory(path)?;
            for path in plan.disks.iter().map(|(_, p)| p).chain(plan.files.iter().map(|(p, _)| p)) {
                target::check_new(path)?;
            }
            Ok(plan)
        }
        Destination::Disks(paths) => {
            let disks: Vec<_> =
                archived.disks.iter().zip(paths).map(|(disk, (_, path))| (disk, path.clone())).collect();
            for (disk, path) in &disks {
                target::check_named(path, disk, request)?;
            }
            target::check_distinct(&disks)?;
            Ok(Plan { directory: None, disks, files: Vec::new() })
        }
    }
}

impl Plan<'_> {
    /// Paths with the bytes that will be written there.
    fn needs(&self) -> Vec<(&Path, u64)> {
        let disks = self.disks.iter().map(|(disk, path)| (path.as_path(), disk.data_bytes));
        disks.chain(self.files.iter().map(|(path, bytes)| (path.as_path(), bytes.len() as u64))).collect()
    }
}

fn write(
    reader: &dyn ArchiveReader,
    plan: &Plan<'_>,
    targets: &mut Targets,
    request: &RestoreRequest,
    events: &Events,
    cancel: &CancellationToken,
) -> Result<Vec<RestoredDisk>, RestoreError> {
    if let Some(path) = plan.directory {
        targets.directory = target::create_directory(path)?;
    }
    // All are opened before the first is written: what can be refused is refused early.
    for (disk, path) in &plan.disks {
        let target = match plan.directory {
            Some(_) => Target::create(path, events),
            None => Target::open(path, disk, request, events),
        }?;
        targets.open.push(target);
    }
    // All at once, so that the total is known from the beginning.
    for ((disk, _), target) in plan.disks.iter().zip(&targets.open) {
        let todo = if target.kind() == Kind::Device { disk.size } else { disk.data_bytes };
        events.send(Event::Progress { disk: disk.name.clone(), done: 0, todo });
    }
    let mut restored = Vec::with_capacity(plan.disks.len());
    for ((disk, path), target) in plan.disks.iter().zip(&mut targets.open) {
        restored.push(write_disk(reader, disk, path, target, request.format, events, cancel)?);
    }
    for (path, bytes) in &plan.files {
        let target = Target::create(path, events)?;
        targets.open.push(target);
        if let Some(target) = targets.open.last_mut() {
            target.write_all(bytes)?;
        }
    }
    if cancel.is_cancelled() {
        return Err(RestoreError::Cancelled);
    }
    for target in &mut targets.open {
        target.place()?;
    }
    for target in &targets.open {
        target.sync_directory()?;
    }
    targets.keep();
    Ok(restored)
}

fn write_disk(
    reader: &dyn ArchiveReader,
    disk: &ArchivedDisk,
    path: &Path,
    target: &mut Target,
    format: ImageFormat,
    events: &Events,
    cancel: &CancellationToken,
) -> Result<RestoredDisk, RestoreError> {
    events.info(format!(
        "restoring `{}` ({}, {} of data) to {}",
        disk.name,
        sizes::short_bytes(disk.size),
        sizes::short_bytes(disk.data_bytes),
        printable(&path.display().to_string())
    ));
    let file = target.begin()?;
    let io = |source| RestoreError::io("create image", path, source);
    let image: Box<dyn DiskImage> = match (format, target.kind()) {
        (ImageFormat::Raw, Kind::New | Kind::Existing) => Box::new(RawDisk::create(file, disk.size).map_err(io)?),
        (ImageFormat::Raw, Kind::Device) => Box::new(DeviceDisk::new(file)),
        (ImageFormat::Qcow2, _) => Box::new(Qcow2Disk::create(file, disk.size).map_err(io)?),
    };
    let written_bytes = segments::write(reader, disk, image.as_ref(), path, events, cancel)?;
    image.finish().map_err(|source| RestoreError::io("flush", path, source))?;
    target.sync()?;
    events.send(Event::DiskDone { disk: disk.name.clone() });
    Ok(RestoredDisk {
        name: disk.name.clone(),
        path: path.to_owned(),
        format,
        size_bytes: disk.size,
        written_bytes,
        zero_bytes: disk.size - written_bytes,
    })
}

/// What a restore has opened. Dropping it removes what is not kept.
#[derive(Default)]
struct Targets {
    open: Vec<Target>,
    directory: Option<target::NewDirectory>,
}

impl Targets {
    fn keep(&mut self) {
        for target in &mut self.open {
            target.keep();
        }
        if let Some(directory) = self.directory.take() {
            directory.keep();
        }
    }

    /// Removes what was made, and tells what could not be undone.
    fn abandon(mut self, error: RestoreError) -> RestoreError {
        let mut error = error;
        for mut target in self.open.drain(..) {
            error = target.abandon(error);
        }
        error
    }
}
