//! The backup of one guest, from finding it to the summary.
//!
//! What happens in which order is the commit protocol's matter ([`crate::protocol`]; [`crate::generation`] has what a death
//! between two effects leaves). `flow` carries its effects out, with `plan` for what each disk builds on, `transfer` for the
//! copy, `leftover` for what a dead run left, and `retain` for the archives that no rule keeps.

mod flow;
mod leftover;
mod plan;
mod provider_thread;
mod retain;
mod transfer;

pub use plan::{Baseline, FullNeeded, Selection};
pub use provider_thread::ProviderThread;
pub use retain::{Judged, prune};
pub use transfer::MEMORY;

pub(crate) use leftover::{committed, recover_leftover};
pub(crate) use plan::target_id;

use crate::{
    access::{Fleecing, FreezeMode},
    archive::Retention,
    config::Dirs,
    guest::Guest,
    provider::Outcome,
    report::{Event, Events, RunLog, Summary},
    segment::SegmentLens,
};
use anyhow::Result;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

/// What is wanted for every guest of a run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The program's directories.
    pub dirs: Dirs,
    /// Name of the target.
    pub target: String,
    /// Disks to take or to leave.
    pub selection: Selection,
    /// Read everything, whatever bitmaps say.
    pub full: bool,
    /// Fail rather than read a disk in full.
    pub require_incremental: bool,
    /// Freeze.
    pub freeze: FreezeMode,
    /// Limit of a freeze.
    pub freeze_limit: Duration,
    /// Fleecing images.
    pub fleecing: Fleecing,
    /// How long a guest write may wait for fleecing.
    pub cbw_timeout: Duration,
    /// How long QEMU may take to answer a request to an export.
    pub nbd_timeout: Duration,
    /// How long to wait for another client of the QMP socket.
    pub lock_wait: Duration,
    /// Segment length for disks without a base, or by the disk's size.
    pub segment_lens: SegmentLens,
    /// Bytes a second to read at most.
    pub rate: Option<u64>,
    /// Which archives of the guest are kept after a backup; all if not set.
    pub retention: Option<Retention>,
    /// Program that manages Proxmox storages.
    pub pvesm: std::path::PathBuf,
}

/// Backs up one guest. The summary is sent as an event too, also after a failure.
///
/// # Errors
/// When no archive was made, or when something was left behind that the journal keeps for the next run.
pub async fn run(
    guest: &Guest,
    options: &Options,
    provider: &mut ProviderThread,
    events: &Events,
    cancel: &CancellationToken,
) -> Result<Summary> {
    let start = Instant::now();
    let log = Arc::new(RunLog::new());
    let events = &events.also_to(log.clone());
    let reports = events.clone();
    // A provider that was lost says so at the next call.
    let told = provider.run(move |p| {
        p.report_to(&reports);
        Ok(())
    });
    told.await.ok();
    let mut summary = Summary { guest: guest.id.to_string(), name: guest.name.clone(), ..Summary::default() };
    let result = flow::run(guest, options, provider, events, cancel, &mut summary).await;
    if let (Ok(()), Some(rules)) = (&result, &options.retention) {
        let made = summary.archive_id.as_ref();
        retain::after_backup(guest.id.as_str(), rules, provider, made, events, cancel).await;
    }
    summary.duration = start.elapsed();
    summary.ok = result.is_ok();
    summary.error = result.as_ref().err().map(|error| format!("{error:#}"));
    let outcome = match &summary.error {
        None => Outcome::Success,
        Some(error) => Outcome::Failure(error.clone()),
    };
    if let Err(error) = provider.run(move |p| p.backup_cleanup(&outcome)).await {
        events.warn(format!("the provider's clean-up fails: {error:#}"));
    }
    events.send(Event::Summary(Box::new(summary.clone())));
    let text = log.text();
    if let Err(error) = provider.run(move |p| p.handle_log(&text)).await {
        events.warn(format!("the log cannot be kept: {error:#}"));
    }
    result.map(|()| summary)
}

/// The run was stopped by a signal.
#[derive(Debug, thiserror::Error)]
#[error("stopped by a signal")]
pub struct Cancelled;

/// Something could not be undone.
#[derive(Debug, thiserror::Error)]
#[error(
    "left behind: {}{}; run `pvebackup recover`",
    what.join(", "),
    archive.as_ref().map(|a| format!(" (archive {a} is complete)")).unwrap_or_default()
)]
pub struct LeftBehind {
    /// What is left.
    pub what: Vec<String>,
    /// The archive, if it was stored.
    pub archive: Option<String>,
}
