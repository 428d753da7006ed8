//! The backup of one guest, from finding it to the summary.
//!
//! The order of the calls below is the commit protocol (see [`crate::generation`] for what a death between two of them
//! leaves): journal → access → copy → provider says durable → generation record → teardown → journal cleared.

mod plan;
mod provider_thread;
mod retain;

pub use plan::{Baseline, FullNeeded, Selection};
pub use provider_thread::ProviderThread;
pub use retain::{Judged, prune};

use crate::{
    access::{
        self, AccessPlan, ActiveAccess, BitmapAction, BitmapMode, DiskPlan, Fleecing, FreezeMode, SnapshotAccess,
        Teardown, proxmox::ProxmoxAccess, stock::StockAccess,
    },
    archive::{ArchiveName, DiskEntry, Manifest, Retention, SkippedDisk},
    config::Dirs,
    copy::{self, Budget, CopyError, Counters, DiskMap, DiskReader, RateLimit, Settings, Source},
    generation::{DiskGeneration, Record},
    guest::{Disk, Guest, GuestError, GuestId, GuestKind},
    journal::{Journal, ProcessIdentity, Step},
    nbd::{Client, ConnectOptions},
    provider::{BackupInput, DiskInput, Expected, MakeManifest, Outcome, Stored},
    qmp::Qmp,
    report::{Event, Events, Phase, RunLog, Summary},
    segment::{SegmentLen, SegmentTable, tasks},
};
use anyhow::{Context, Result, anyhow, bail};
use jiff::Timestamp;
use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

/// Bytes of disk content in memory at most, besides what the provider needs.
pub const MEMORY: u64 = 32 << 20;
/// Limit for an answer of QEMU's NBD server. Above the 45 s after which QEMU gives up a stalled fleecing image.
const NBD_DEADLINE: Duration = Duration::from_mins(2);
/// Largest read: more gained nothing on a unix socket.
const REQUEST: u64 = 1 << 20;
/// Reads in flight per disk.
const IN_FLIGHT: usize = 8;
/// Connections per export.
const CONNECTIONS: usize = 2;

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
    /// How long to wait for another client of the QMP socket.
    pub lock_wait: Duration,
    /// Segment length for disks without a base, or by the disk's size.
    pub segment_len: Option<SegmentLen>,
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
    let mut summary = Summary { guest: guest.id.to_string(), name: guest.name.clone(), ..Summary::default() };
    let result = guarded(guest, options, provider, events, cancel, &mut summary).await;
    if let (Ok(()), Some(rules)) = (&result, &options.retention) {
        retain::after_backup(guest.id.as_str(), rules, provider, events, cancel).await;
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

/// Everything under the guest's lock, which is the journal's.
async fn guarded(
    guest: &Guest,
    options: &Options,
    provider: &mut ProviderThread,
    events: &Events,
    cancel: &CancellationToken,
    summary: &mut Summary,
) -> Result<()> {
    let qmp = Qmp { socket: guest.qmp.clone(), lock_wait: options.lock_wait };
    let journal = Journal::open(&options.dirs.journals(), guest.id.as_str())?;
    recover_leftover(&journal, &qmp, &options.dirs.generations(), &guest.id, events).await?;

    events.phase(Phase::Prepare);
    let mut session = qmp.session().await.map_err(|error| GuestError::of_qmp(guest, error))?;
    let qemu = crate::guest::process(guest, &session);
    let found = crate::guest::disks(guest, &mut session).await?;
    drop(session);
    let found = options.selection.apply(found)?;
    let (disks, skipped) = (found.disks, found.skipped);
    let guest = &Guest { name: found.name.or_else(|| guest.name.clone()), config: found.config, ..guest.clone() };
    summary.name.clone_from(&guest.name);
    for (disk, reason) in &skipped {
        events.send(Event::DiskSkipped { disk: disk.clone(), reason: reason.clone() });
    }
    if disks.is_empty() {
        // QEMU of Proxmox VE aborts, and the guest with it, when it is asked for an access to no disks.
        bail!(GuestError::NoDisks { skipped });
    }

    let repository = provider.run(|p| p.repository_id()).await?;
    let (record, no_record) = Record::load(&options.dirs.generations(), &options.target, guest.id.as_str());
    let baselines = plan::baselines(&disks, &record, no_record, &repository, qemu.as_ref(), options, provider).await?;
    if options.require_incremental
        && let Some((disk, reason)) = plan::first_full(&disks, &baselines)
    {
        bail!(FullNeeded { disk, reason });
    }
    let start = Timestamp::now();
    let id = guest.id.to_string();
    let name = provider.run(move |p| p.backup_init(&id, start)).await?;

    let run_dir = options.dirs.run.join(guest.id.as_str());
    let plan = access_plan(guest, options, &disks, &baselines, run_dir);
    let generation = plan.generation.clone();
    let mut access: Box<dyn SnapshotAccess> = match guest.kind {
        GuestKind::Proxmox => Box::new(ProxmoxAccess::new(plan, qmp.clone(), journal.clone(), events.clone())),
        GuestKind::Plain => Box::new(StockAccess::new(plan, qmp.clone(), journal.clone())),
    };
    access.check().await?;
    for warning in access.take_warnings() {
        events.warn(warning);
    }
    if cancel.is_cancelled() {
        bail!(Cancelled);
    }

    events.phase(Phase::SetUp);
    journal.record(&Step::Begin {
        guest: guest.id.to_string(),
        qmp: guest.qmp.clone(),
        agent: guest.agent.clone(),
        qemu: qemu.clone(),
        target: options.target.clone(),
        generation: generation.clone(),
    })?;
    let active = match access.set_up().await {
        Ok(active) => active,
        Err(error) => {
            // An access that left nothing leaves an empty journal too.
            let settled = |step: &Step| matches!(step, Step::Begin { .. });
            if journal.leftover().iter().all(settled) {
                journal.clear()?;
            }
            bail!(error);
        }
    };
    let run = Run { guest, options, events, cancel, journal: &journal, name, repository, qemu, generation, skipped };
    let stored = run.store(&active, &disks, baselines, record, provider, access.as_mut(), summary).await;

    events.phase(Phase::TearDown);
    let how = if stored.is_ok() { Teardown::Success } else { Teardown::Failure };
    let torn_down = access.tear_down(how).await;
    for warning in access.take_warnings() {
        events.warn(warning);
    }
    if let Ok(report) = &torn_down {
        summary.fleecing_peak_bytes = summary.fleecing_peak_bytes.max(report.fleecing_peak_bytes);
        for what in &report.left_behind {
            events.warn(format!("{what} could not be removed; it stays in the recovery journal"));
        }
        if report.left_behind.is_empty() {
            journal.clear()?;
        }
    }
    match (stored, torn_down) {
        (Ok(()), Ok(report)) if report.left_behind.is_empty() => Ok(()),
        (Ok(()), Ok(report)) => Err(anyhow!(LeftBehind { what: report.left_behind, archive: summary.archive.clone() })),
        (Ok(()), Err(error)) => Err(anyhow!(error)
            .context(LeftBehind { what: vec!["the snapshot access".into()], archive: summary.archive.clone() })),
        (Err(error), Ok(_)) => Err(error),
        (Err(error), Err(undo)) => {
            // QEMU may be gone, and then nothing but files is left; recovery knows the difference.
            match access::recover(&journal, &qmp, None).await {
                Ok(_) => Err(error),
                Err(again) => {
                    events.warn(format!("undoing fails, too: {undo:#}; and recovery: {again:#}"));
                    Err(error.context(LeftBehind { what: vec!["the snapshot access".into()], archive: None }))
                }
            }
        }
    }
}

/// Undoes what a dead run of this guest left. An access by hand is nobody's leftover, unless its QEMU has ended.
pub(crate) async fn recover_leftover(
    journal: &Journal,
    qmp: &Qmp,
    generations: &Path,
    guest: &GuestId,
    events: &Events,
) -> Result<()> {
    let leftover = journal.leftover();
    if leftover.is_empty() {
        return Ok(());
    }
    let by_hand = access::by_hand::Kept::of(&leftover);
    if let Some(kept) = by_hand.as_ref().filter(|kept| !kept.qemu_is_gone()) {
        bail!(kept.in_the_way(guest));
    }
    events.phase(Phase::Recover);
    let dead = leftover.iter().find_map(|step| match step {
        Step::Begin { target, generation, .. } => Some((target.clone(), generation.clone())),
        _ => None,
    });
    let recorded = dead
        .filter(|(target, generation)| Record::load(generations, target, guest.as_str()).0.has_generation(generation));
    let recorded = recorded.map(|(_, generation)| generation);
    events.warn(match by_hand {
        Some(kept) => format!("the access by hand of {} ended with its QEMU; removing what it left", kept.since),
        None => "the last run of this guest died; undoing what it left".to_owned(),
    });
    let report = access::recover(journal, qmp, recorded.as_deref())
        .await
        .context("what the last run left cannot be undone; nothing else was changed in the guest")?;
    for line in report.undone {
        events.info(format!("undone: {line}"));
    }
    if report.left_behind.is_empty() {
        Ok(())
    } else {
        Err(anyhow!(LeftBehind { what: report.left_behind, archive: None }))
    }
}

fn access_plan(
    guest: &Guest,
    options: &Options,
    disks: &[Disk],
    baselines: &[Baseline],
    run_dir: std::path::PathBuf,
) -> AccessPlan {
    let disks = disks.iter().zip(baselines).map(|(disk, baseline)| DiskPlan {
        disk: disk.clone(),
        bitmap: match baseline {
            Baseline::Archive { bitmap, .. } => BitmapMode::Use(bitmap.clone()),
            Baseline::Full { .. } => BitmapMode::New,
        },
        granularity: baseline_len(baseline, disk, options).bytes() as u32,
    });
    AccessPlan {
        guest: guest.clone(),
        disks: disks.collect(),
        target: target_id(guest.kind, &options.target),
        generation: new_generation(),
        run_dir,
        fleecing: options.fleecing.clone(),
        freeze: options.freeze,
        freeze_limit: options.freeze_limit,
        cbw_timeout: options.cbw_timeout,
        exports: access::ExportMode::Trim,
        pvesm: options.pvesm.clone(),
    }
}

/// What QEMU knows a target as.
pub(crate) fn target_id(kind: GuestKind, target: &str) -> String {
    match kind {
        // The target id is also the name of the bitmap, which users see beside those of other tools.
        GuestKind::Proxmox => format!("pvebackup-{target}"),
        GuestKind::Plain => target.to_owned(),
    }
}

fn baseline_len(baseline: &Baseline, disk: &Disk, options: &Options) -> SegmentLen {
    match baseline {
        Baseline::Archive { segment_len, .. } => *segment_len,
        Baseline::Full { .. } => plan::segment_len(disk, options),
    }
}

/// 16 hex digits that no other run has: the hasher's keys are random for every process and call.
pub(crate) fn new_generation() -> String {
    use std::hash::{BuildHasher, Hasher, RandomState};
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.write_i128(Timestamp::now().as_nanosecond());
    format!("{:016x}", hasher.finish())
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

/// What does not change while a guest is copied.
struct Run<'a> {
    guest: &'a Guest,
    options: &'a Options,
    events: &'a Events,
    cancel: &'a CancellationToken,
    journal: &'a Journal,
    name: ArchiveName,
    repository: String,
    qemu: Option<ProcessIdentity>,
    generation: String,
    skipped: Vec<(String, String)>,
}

/// One disk on its way.
struct DiskRun {
    map: DiskMap,
    base: Option<(crate::archive::ArchiveId, SegmentTable)>,
    segment_len: SegmentLen,
    reason: String,
    clients: Vec<Client>,
    counters: Arc<Counters>,
}

impl Run<'_> {
    /// Copies all disks, and writes the generation record when the archive is durable.
    #[allow(clippy::too_many_arguments)]
    async fn store(
        &self,
        active: &ActiveAccess,
        disks: &[Disk],
        baselines: Vec<Baseline>,
        record: Record,
        provider: &mut ProviderThread,
        access: &mut dyn SnapshotAccess,
        summary: &mut Summary,
    ) -> Result<()> {
        self.events.phase(Phase::Copy);
        summary.paused_micros = active.consistency.paused_micros;
        summary.frozen_millis = active.consistency.frozen_millis;
        summary.disks = disks.len();
        summary.size_bytes = active.disks.iter().map(|d| d.size).sum();

        let mut runs = Vec::new();
        for ((disk, baseline), access) in disks.iter().zip(baselines).zip(&active.disks) {
            let run = self.prepare_disk(disk, baseline, access, active).await?;
            self.events.send(Event::DiskPlan {
                disk: disk.name.clone(),
                size: access.size,
                todo: run.map.dirty_bytes,
                action: access.action.as_str(),
                reason: run.reason.clone(),
            });
            runs.push(run);
        }
        summary.incremental = runs.iter().all(|r| r.base.is_some());
        let stored = self.copy(active, disks, &mut runs, provider, access, summary).await;
        summary.read_bytes = runs.iter().map(|r| r.counters.read.load(Ordering::Relaxed)).sum();
        summary.discarded_bytes = runs.iter().map(|r| r.counters.discarded.load(Ordering::Relaxed)).sum();
        for client in runs.iter().flat_map(|r| &r.clients) {
            // Every reply has to be read before the export goes: QEMU spins on a client that does not listen.
            if let Err(error) = client.disconnect().await {
                tracing::debug!("disconnecting: {error}");
            }
        }
        let stored = stored?;

        self.events.phase(Phase::Commit);
        self.journal.record(&Step::Stored { archive: stored.id.0.clone() })?;
        self.commit(active, disks, &runs, record, &stored)?;
        summary.archive = Some(self.name.to_string());
        summary.archive_id = Some(stored.id);
        summary.stored_bytes = stored.added_bytes;
        Ok(())
    }

    /// Connects, and finds out what has to be read.
    async fn prepare_disk(
        &self,
        disk: &Disk,
        baseline: Baseline,
        access: &access::DiskAccess,
        active: &ActiveAccess,
    ) -> Result<DiskRun> {
        let connect = async |contexts: Vec<String>| -> Result<Client> {
            let options = ConnectOptions {
                socket: active.socket.clone(),
                export: access.export.clone(),
                contexts,
                deadline: NBD_DEADLINE,
                longest_read: access.largest_request.unwrap_or(ConnectOptions::LONGEST_READ),
            };
            Client::connect(&options)
                .await
                .map_err(|source| anyhow!(CopyError::Nbd { disk: disk.name.clone(), source }))
        };
        let dirty = match &access.dirty_context {
            Some(context) => Some(connect(vec![context.clone()]).await?),
            None => None,
        };
        let allocation = connect(vec!["base:allocation".into()]).await?;
        let map = copy::read_map(access, dirty.as_ref(), &allocation).await?;
        let segment_len = baseline_len(&baseline, disk, self.options);
        let (base, reason) = match (baseline, access.action) {
            (Baseline::Archive { archive, table, .. }, BitmapAction::Used) => {
                (Some((archive, table)), access.reason.clone())
            }
            (Baseline::Archive { .. }, _) => (None, access.reason.clone()),
            (Baseline::Full { reason }, _) => (None, reason),
        };
        if base.is_none() && map.dirty_bytes != access.size {
            bail!("disk `{}`: QEMU shows {} of {} bytes, but all are needed", disk.name, map.dirty_bytes, access.size);
        }
        if !access.clean_readable && access.granularity < segment_len.bytes() {
            bail!(
                "disk `{}`: the dirty bitmap's granularity of {} bytes is below the segment length of {}, and clean ranges \
                 cannot be read; a full backup (`--full`) starts a new bitmap",
                disk.name,
                access.granularity,
                segment_len.bytes()
            );
        }
        let mut clients = vec![allocation];
        if clients[0].can_multi_conn() {
            for _ in 1..CONNECTIONS {
                clients.push(connect(Vec::new()).await?);
            }
        }
        if let Some(client) = dirty {
            client.disconnect().await.ok();
        }
        Ok(DiskRun { map, base, segment_len, reason, clients, counters: Arc::default() })
    }

    /// Streams everything into the provider; returns when the archive is durable.
    async fn copy(
        &self,
        active: &ActiveAccess,
        disks: &[Disk],
        runs: &mut [DiskRun],
        provider: &mut ProviderThread,
        access: &mut dyn SnapshotAccess,
        summary: &mut Summary,
    ) -> Result<Stored> {
        // Changed segments are told from unchanged ones by their time, so it must be later than any in a base archive, also
        // when the host's clock was set back since.
        let newest =
            runs.iter().filter_map(|r| r.base.as_ref()).flat_map(|(_, t)| t.records()).map(|r| r.stored_at).max();
        let stored_at = active.instant.as_microsecond().max(newest.map_or(i64::MIN, |n| n.saturating_add(1)));
        let instant = Timestamp::from_microsecond(stored_at).context("the clock shows an impossible time")?;

        let stop = self.cancel.child_token();
        let failed: Arc<Mutex<Option<CopyError>>> = Arc::default();
        let discards: Arc<Mutex<Vec<tokio::task::JoinHandle<()>>>> = Arc::default();
        let settings = Settings {
            request: REQUEST,
            in_flight: IN_FLIGHT,
            limit: self.options.rate.map(|r| Arc::new(RateLimit::new(r))),
            budget: Budget::new(MEMORY),
            grain: 64 << 10,
        };
        let mut order: Vec<usize> = (0..disks.len()).collect();
        order.sort_by(|a, b| disks[*a].name.cmp(&disks[*b].name));
        let mut inputs = Vec::new();
        for index in &order {
            let (run, access) = (&runs[*index], &active.disks[*index]);
            let source = Source {
                disk: disks[*index].name.clone(),
                segment_len: run.segment_len,
                content: run.map.content.clone(),
                tell_zeroes: run.base.is_some(),
                discard_clean: access.clean_readable && run.base.is_some(),
                clients: run.clients.clone(),
                counters: run.counters.clone(),
            };
            let expected = tasks(&run.map.content, run.segment_len).filter(|task| !task.zero || source.tell_zeroes);
            let expected = expected.map(|task| Expected { index: task.index, zero: task.zero }).collect();
            let reader = DiskReader::new(
                source,
                Settings { grain: access.granularity.max(64 << 10), ..settings.clone() },
                self.events.clone(),
                stop.clone(),
                failed.clone(),
                discards.clone(),
            );
            inputs.push(DiskInput {
                name: disks[*index].name.clone(),
                size: access.size,
                segment_len: run.segment_len,
                base: run.base.clone(),
                expected,
                changed: Box::new(reader),
            });
        }
        let mut members = vec![("guest.conf".to_owned(), self.guest.config.clone())];
        members.extend(self.guest.firewall.clone().map(|text| ("firewall.conf".to_owned(), text)));
        let input = BackupInput {
            archive: self.name.clone(),
            instant,
            members,
            disks: inputs,
            manifest: self.manifest(active, disks, runs, &order),
            cancel: stop.clone(),
        };
        let job = provider.run(move |p| p.backup(input));
        tokio::pin!(job);
        let result = loop {
            tokio::select! {
                result = &mut job => break result,
                () = tokio::time::sleep(Duration::from_secs(1)) => {
                    summary.fleecing_peak_bytes = summary.fleecing_peak_bytes.max(access.fleecing_bytes());
                }
            }
        };
        summary.fleecing_peak_bytes = summary.fleecing_peak_bytes.max(access.fleecing_bytes());
        stop.cancel();
        let discards = std::mem::take(&mut *discards.lock().unwrap_or_else(PoisonError::into_inner));
        for task in discards {
            task.await.ok();
        }
        let cause = failed.lock().unwrap_or_else(PoisonError::into_inner).take();
        match (result, cause) {
            (Ok(stored), None) => Ok(stored),
            (_, Some(cause)) => Err(anyhow!(cause)),
            (Err(_), None) if self.cancel.is_cancelled() => Err(anyhow!(Cancelled)),
            (Err(error), None) => Err(error),
        }
    }

    fn manifest(&self, active: &ActiveAccess, disks: &[Disk], runs: &[DiskRun], order: &[usize]) -> MakeManifest {
        let template = Manifest {
            version: Manifest::VERSION,
            program: env!("CARGO_PKG_VERSION").into(),
            archive: self.name.clone(),
            guest_kind: match self.guest.kind {
                GuestKind::Proxmox => "proxmox".into(),
                GuestKind::Plain => "plain".into(),
            },
            guest_name: self.guest.name.clone(),
            instant: active.instant,
            consistency: active.consistency.clone(),
            disks: Vec::new(),
            skipped: self
                .skipped
                .iter()
                .map(|(name, reason)| SkippedDisk { name: name.clone(), reason: reason.clone() })
                .collect(),
            firewall: self.guest.firewall.is_some(),
        };
        let facts: Vec<(DiskEntry, SegmentLen, Arc<Counters>)> = order
            .iter()
            .map(|index| {
                let (disk, run, access) = (&disks[*index], &runs[*index], &active.disks[*index]);
                let entry = DiskEntry {
                    name: disk.name.clone(),
                    device: disk.device.clone(),
                    size: access.size,
                    segment_len: run.segment_len.bytes(),
                    data_bytes: 0,
                    digest: String::new(),
                    bitmap_action: access.action.as_str().into(),
                    reason: run.reason.clone(),
                    generation: Some(self.generation.clone()),
                    read_bytes: 0,
                };
                (entry, run.segment_len, run.counters.clone())
            })
            .collect();
        Box::new(move |tables| {
            let entries = facts.into_iter().zip(tables).map(|((entry, len, counters), table)| DiskEntry {
                data_bytes: table.data_bytes(len, entry.size),
                digest: blake3::Hash::from_bytes(table.digest()).to_hex().to_string(),
                read_bytes: counters.read.load(Ordering::Relaxed),
                ..entry
            });
            Manifest { disks: entries.collect(), ..template }
        })
    }

    /// The archive is durable: what starts now is relative to it.
    fn commit(
        &self,
        active: &ActiveAccess,
        disks: &[Disk],
        runs: &[DiskRun],
        mut record: Record,
        stored: &Stored,
    ) -> Result<()> {
        for ((disk, access), run) in disks.iter().zip(&active.disks).zip(runs) {
            match (&access.next_bitmap, &access.bitmap_node, &self.qemu) {
                (Some(bitmap), Some(node), Some(qemu)) => record.set(
                    &disk.name,
                    DiskGeneration {
                        generation: self.generation.clone(),
                        repository: self.repository.clone(),
                        archive: stored.id.clone(),
                        qemu: qemu.clone(),
                        device: disk.device.clone(),
                        identity: disk.identity.clone(),
                        node: node.clone(),
                        size: access.size,
                        segment_len: run.segment_len.bytes(),
                        bitmap: bitmap.clone(),
                        granularity: access.granularity,
                    },
                ),
                _ => record.forget(&disk.name),
            }
        }
        record.store(&self.options.dirs.generations(), &self.options.target, self.guest.id.as_str())?;
        Ok(())
    }
}
