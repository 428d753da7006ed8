//! What each disk's backup can build on.

use super::{Options, ProviderThread};
use crate::{
    archive::ArchiveId,
    generation::{Facts, Record},
    guest::{Disk, Found, GuestError},
    journal::ProcessIdentity,
    provider::{DiskQuery, Incremental},
    segment::{SegmentLen, SegmentTable},
};
use anyhow::Result;

/// Disks that the user chose.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Only these, if any are named.
    pub only: Vec<String>,
    /// Not these.
    pub skip: Vec<String>,
}

impl Selection {
    /// Moves what the user left out to the disks that are skipped.
    pub(crate) fn apply(&self, found: Found) -> Result<Found, GuestError> {
        crate::guest::select(found, &self.only, &self.skip)
    }
}

/// What a disk's backup builds on.
#[derive(Clone, Debug)]
pub enum Baseline {
    /// An archive that exists now and is complete, and the bitmap that says what changed since.
    Archive {
        /// The archive.
        archive: ArchiveId,
        /// Its segments of the disk.
        table: SegmentTable,
        /// The bitmap.
        bitmap: String,
        /// Segment length.
        segment_len: SegmentLen,
    },
    /// Nothing: the disk is read in full.
    Full {
        /// Why.
        reason: String,
    },
}

/// An incremental backup was demanded and is not possible.
#[derive(Debug, thiserror::Error)]
#[error("disk `{disk}` needs a full backup: {reason}")]
pub struct FullNeeded {
    /// The disk.
    pub disk: String,
    /// Why.
    pub reason: String,
}

/// Segment length of a disk that has no baseline.
pub(super) fn segment_len(disk: &Disk, options: &Options) -> SegmentLen {
    options.segment_len.unwrap_or_else(|| SegmentLen::for_disk(disk.size))
}

/// Judges every disk: the record must match the present, and the provider must confirm the archive.
pub(super) async fn baselines(
    disks: &[Disk],
    record: &Record,
    no_record: Option<String>,
    repository: &str,
    qemu: Option<&ProcessIdentity>,
    options: &Options,
    provider: &mut ProviderThread,
) -> Result<Vec<Baseline>> {
    let mut baselines = Vec::new();
    let mut queries = Vec::new();
    for disk in disks {
        let len = segment_len(disk, options);
        let judged = match (&no_record, qemu) {
            _ if options.full => Err("a full backup was asked for".to_owned()),
            (Some(reason), _) => Err(reason.clone()),
            (None, None) => Err("the guest's QEMU process cannot be identified".to_owned()),
            (None, Some(qemu)) => record.judge(disk, len, &Facts { repository, qemu }),
        };
        match judged {
            Ok(old) => {
                queries.push((
                    baselines.len(),
                    old.bitmap.clone(),
                    DiskQuery { name: disk.name.clone(), size: disk.size, segment_len: len, base: old.archive.clone() },
                ));
                baselines.push(Baseline::Full { reason: "the target was not asked".into() });
            }
            Err(reason) => baselines.push(Baseline::Full { reason }),
        }
    }
    if queries.is_empty() {
        return Ok(baselines);
    }
    let asked: Vec<DiskQuery> = queries.iter().map(|(_, _, query)| query.clone()).collect();
    let answers = provider.run(move |p| p.query_incremental(&asked)).await?;
    for ((index, bitmap, query), answer) in queries.into_iter().zip(answers) {
        baselines[index] = match answer {
            Incremental::Use(table) => {
                Baseline::Archive { archive: query.base, table, bitmap, segment_len: query.segment_len }
            }
            Incremental::New(reason) => Baseline::Full { reason },
        };
    }
    Ok(baselines)
}

/// The first disk that has to be read in full, and why.
pub(super) fn first_full(disks: &[Disk], baselines: &[Baseline]) -> Option<(String, String)> {
    disks.iter().zip(baselines).find_map(|(disk, baseline)| match baseline {
        Baseline::Full { reason } => Some((disk.name.clone(), reason.clone())),
        Baseline::Archive { .. } => None,
    })
}
