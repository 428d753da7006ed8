//! What each disk's backup can build on.

use super::{Options, ProviderThread};
use crate::{
    access::{AccessPlan, BitmapMode, DiskPlan, ExportMode},
    archive::ArchiveId,
    config::Dirs,
    generation::{self, Facts, Record},
    guest::{Disk, Found, Guest, GuestError, GuestKind},
    journal::ProcessIdentity,
    provider::{DiskQuery, Incremental, Mechanism},
    segment::{DiskTables, SegmentLen},
};
use anyhow::{Context, Result};

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
        tables: DiskTables,
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
    options.segment_lens.of(disk.size)
}

/// What the record says about a disk: the archive to ask for and the bitmap, or why the disk is read in full.
pub(super) type Prospect = Result<Candidate, String>;

/// An archive and a bitmap whose record matches the present.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    bitmap: String,
    query: DiskQuery,
}

/// Compares the record with the present, disk by disk.
pub(super) fn judge(
    disks: &[Disk],
    (record, no_record): (&Record, Option<String>),
    repository: &str,
    qemu: Option<&ProcessIdentity>,
    options: &Options,
) -> Vec<Prospect> {
    let judge = |disk: &Disk| {
        let segment_len = segment_len(disk, options);
        let old = match (&no_record, qemu) {
            _ if options.full => Err("a full backup was asked for".to_owned()),
            (Some(reason), _) => Err(reason.clone()),
            (None, None) => Err("the guest's QEMU process cannot be identified".to_owned()),
            (None, Some(qemu)) => record.judge(disk, segment_len, &Facts { repository, qemu }),
        }?;
        let query = DiskQuery { name: disk.name.clone(), size: disk.size, segment_len, base: old.archive.clone() };
        Ok(Candidate { bitmap: old.bitmap.clone(), query })
    };
    disks.iter().map(judge).collect()
}

/// Asks the provider for the archives. What it does not confirm now is not built on.
pub(super) async fn confirm(judged: Vec<Prospect>, provider: &mut ProviderThread) -> Result<Vec<Baseline>> {
    let queries: Vec<DiskQuery> = judged.iter().flatten().map(|candidate| candidate.query.clone()).collect();
    let mut answers = Vec::new().into_iter();
    if !queries.is_empty() {
        answers = provider.run(move |p| p.query_incremental(&queries)).await?.into_iter();
    }
    let baseline = |prospect: Prospect| match prospect {
        Err(reason) => Baseline::Full { reason },
        Ok(Candidate { bitmap, query }) => match answers.next() {
            Some(Incremental::Use(tables)) => {
                Baseline::Archive { archive: query.base, tables, bitmap, segment_len: query.segment_len }
            }
            Some(Incremental::New(reason)) => Baseline::Full { reason },
            None => Baseline::Full { reason: "the target gave no answer".into() },
        },
    };
    Ok(judged.into_iter().map(baseline).collect())
}

/// The first disk that has to be read in full, and why.
pub(super) fn first_full(disks: &[Disk], baselines: &[Baseline]) -> Option<(String, String)> {
    disks.iter().zip(baselines).find_map(|(disk, baseline)| match baseline {
        Baseline::Full { reason } => Some((disk.name.clone(), reason.clone())),
        Baseline::Archive { .. } => None,
    })
}

/// The access that is wanted.
pub(super) fn access_plan(
    guest: &Guest,
    options: &Options,
    disks: &[Disk],
    baselines: &[Baseline],
    mechanism: Mechanism,
    run_dir: std::path::PathBuf,
) -> Result<AccessPlan> {
    let disks = disks.iter().zip(baselines).map(|(disk, baseline)| DiskPlan {
        disk: disk.clone(),
        bitmap: match baseline {
            Baseline::Archive { bitmap, .. } => BitmapMode::Use(bitmap.clone()),
            Baseline::Full { .. } => BitmapMode::New,
        },
        granularity: least_granularity(mechanism, baseline_len(baseline, disk, options)).bytes() as u32,
    });
    Ok(AccessPlan {
        guest: guest.clone(),
        disks: disks.collect(),
        target: target_id(guest.kind, &options.dirs, &options.target)?,
        generation: generation::new_id(),
        run_dir,
        fleecing: options.fleecing.clone(),
        freeze: options.freeze,
        freeze_limit: options.freeze_limit,
        cbw_timeout: options.cbw_timeout,
        exports: ExportMode::Trim,
        pvesm: options.pvesm.clone(),
    })
}

/// Segment length of a disk.
pub(super) fn baseline_len(baseline: &Baseline, disk: &Disk, options: &Options) -> SegmentLen {
    match baseline {
        Baseline::Archive { segment_len, .. } => *segment_len,
        Baseline::Full { .. } => segment_len(disk, options),
    }
}

/// The least granularity of a dirty bitmap with which nothing clean has to be read, and the one that a new bitmap gets: that of
/// what a provider stores by itself.
pub(super) fn least_granularity(mechanism: Mechanism, segment_len: SegmentLen) -> SegmentLen {
    match mechanism {
        Mechanism::Segments => segment_len,
        Mechanism::Layers => SegmentLen::FINE,
    }
}

/// What QEMU knows a target as.
///
/// On Proxmox VE's QEMU it names the one bitmap of all the target's generations. Only the records in our state directory say
/// which archive that is relative to, so another state directory must not come upon it by the same name.
pub(crate) fn target_id(kind: GuestKind, dirs: &Dirs, target: &str) -> Result<String> {
    Ok(match kind {
        // Users see it beside those of other tools.
        GuestKind::Proxmox => {
            let id = generation::state_id(&dirs.state)
                .with_context(|| format!("cannot keep an id in {}", dirs.state.display()))?;
            format!("pvebackup-{target}-{id}")
        }
        GuestKind::Plain => target.to_owned(),
    })
}
