//! Carries out, effect by effect, what the commit protocol says is due.

use super::{
    Baseline, Cancelled, FullNeeded, LeftBehind, Options, ProviderThread,
    leftover::recover_leftover,
    plan::{self, Prospect},
    transfer::{Copied, Transfer},
};
use crate::{
    access::{self, AccessError, ActiveAccess, SnapshotAccess, proxmox::ProxmoxAccess, stock::StockAccess},
    archive::ArchiveName,
    generation::{DiskGeneration, Record},
    guest::{Disk, Guest, GuestError, GuestKind},
    journal::{Journal, ProcessIdentity, Step},
    protocol::{Effect, End, Ended, Protocol, Teardown},
    provider::Mechanism,
    qmp::Qmp,
    report::{Event, Events, Phase, Summary},
};
use anyhow::{Context, Error, Result, anyhow, bail};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

/// Seconds by which an archive's name may be ahead of the clock because others took the ones before.
const CLOCK_TOLERANCE: i64 = 60;

/// One backup under the guest's lock, which is the journal's.
pub(super) async fn run(
    guest: &Guest,
    options: &Options,
    provider: &mut ProviderThread,
    events: &Events,
    cancel: &CancellationToken,
    summary: &mut Summary,
) -> Result<()> {
    let qmp = Qmp { socket: guest.qmp.clone(), lock_wait: options.lock_wait };
    let journal = Journal::open(&options.dirs.journals(), guest.id.as_str())?;
    let mut protocol = Protocol::new(!journal.leftover().is_empty() || journal.destroyed() > 0);
    let mut flow = Flow {
        guest: guest.clone(),
        options,
        provider,
        events,
        cancel,
        summary,
        qmp,
        journal,
        ground: None,
        planned: None,
        active: None,
        copied: None,
        error: None,
        undoing: None,
    };
    loop {
        let ended = match protocol.due() {
            Effect::Recover => flow.recover().await,
            Effect::Look => flow.look().await,
            Effect::Confirm => flow.confirm().await,
            Effect::Check => flow.check().await,
            Effect::Begin => flow.begin(),
            Effect::SetUp => flow.set_up().await,
            Effect::Copy => flow.copy().await,
            Effect::NoteStored => flow.note_stored(),
            Effect::Record => flow.record(),
            Effect::TearDown(how) => flow.tear_down(how).await,
            Effect::UndoAgain => flow.undo_again().await,
            Effect::Clear => Ok(flow.clear()),
            Effect::End(End::Committed) => return Ok(()),
            Effect::End(_) => return Err(flow.error.unwrap_or_else(|| anyhow!("the backup failed"))),
        };
        protocol.ended(ended.unwrap_or_else(|error| flow.failed(error)));
    }
}

/// A run, and what its effects so far have come to.
struct Flow<'a> {
    guest: Guest,
    options: &'a Options,
    provider: &'a mut ProviderThread,
    events: &'a Events,
    cancel: &'a CancellationToken,
    summary: &'a mut Summary,
    qmp: Qmp,
    journal: Journal,
    ground: Option<Ground>,
    planned: Option<Planned>,
    active: Option<ActiveAccess>,
    copied: Option<Copied>,
    /// What the run fails with.
    error: Option<Error>,
    /// Why a teardown failed after that.
    undoing: Option<AccessError>,
}

/// What was found before anything was changed.
struct Ground {
    disks: Vec<Disk>,
    skipped: Vec<(String, String)>,
    qemu: Option<ProcessIdentity>,
    repository: String,
    record: Record,
    judged: Vec<Prospect>,
    baselines: Vec<Baseline>,
    mechanism: Mechanism,
}

/// What will be done.
struct Planned {
    name: ArchiveName,
    generation: String,
    access: Box<dyn SnapshotAccess>,
}

/// What an earlier effect has left for this one. The protocol's order sees to it that it is there.
fn earlier<T>(left: Option<T>) -> Result<T> {
    left.context("an effect is due before the one that it builds on")
}

impl Flow<'_> {
    /// The first failure is the run's; what fails while it is undone comes on top.
    fn failed(&mut self, error: Error) -> Ended {
        self.error.get_or_insert(error);
        Ended::Failed
    }

    /// Something stays: that is what has to be seen to first, whatever the run failed with.
    fn left_behind(&mut self, left: LeftBehind) {
        self.error = Some(match self.error.take() {
            Some(error) => error.context(left),
            None => anyhow!(left),
        });
    }

    async fn recover(&mut self) -> Result<Ended> {
        let generations = self.options.dirs.generations();
        recover_leftover(&self.journal, &self.qmp, &generations, &self.guest.id, self.events).await?;
        Ok(Ended::Done)
    }

    async fn look(&mut self) -> Result<Ended> {
        self.events.phase(Phase::Prepare);
        let guest = &self.guest;
        let mut session = self.qmp.session().await.map_err(|error| GuestError::of_qmp(guest, error))?;
        let qemu = crate::guest::process(guest, &session);
        let found = crate::guest::disks(guest, &mut session).await?;
        drop(session);
        let found = self.options.selection.apply(found)?;
        let (disks, skipped) = (found.disks, found.skipped);
        self.guest = Guest { name: found.name.or_else(|| guest.name.clone()), config: found.config, ..guest.clone() };
        self.summary.name.clone_from(&self.guest.name);
        for (disk, reason) in &skipped {
            self.events.send(Event::DiskSkipped { disk: disk.clone(), reason: reason.clone() });
        }
        if disks.is_empty() {
            // QEMU of Proxmox VE aborts, and the guest with it, when it is asked for an access to no disks.
            bail!(GuestError::NoDisks { skipped });
        }
        let repository = self.provider.run(|p| p.repository_id()).await?;
        let (record, no_record) =
            Record::load(&self.options.dirs.generations(), &self.options.target, self.guest.id.as_str());
        let judged = plan::judge(&disks, (&record, no_record), &repository, qemu.as_ref(), self.options);
        let mechanism = self.provider.run(|p| Ok(p.mechanism())).await?;
        self.ground =
            Some(Ground { disks, skipped, qemu, repository, record, judged, baselines: Vec::new(), mechanism });
        Ok(Ended::Done)
    }

    async fn confirm(&mut self) -> Result<Ended> {
        let ground = earlier(self.ground.as_mut())?;
        ground.baselines = plan::confirm(std::mem::take(&mut ground.judged), self.provider).await?;
        Ok(Ended::Done)
    }

    async fn check(&mut self) -> Result<Ended> {
        let ground = earlier(self.ground.as_ref())?;
        if self.options.require_incremental
            && let Some((disk, reason)) = plan::first_full(&ground.disks, &ground.baselines)
        {
            bail!(FullNeeded { disk, reason });
        }
        let start = Timestamp::now();
        let id = self.guest.id.to_string();
        let name = self.provider.run(move |p| p.backup_init(&id, start)).await?;
        if name.time().as_second() > start.as_second().saturating_add(CLOCK_TOLERANCE) {
            self.events.warn(format!(
                "the newest archive of this guest is from later than now ({}), so this one is named {name}: check the host's \
                 clock",
                start.strftime("%Y-%m-%dT%H:%M:%SZ"),
            ));
        }

        let run_dir = self.options.dirs.run.join(self.guest.id.as_str());
        let plan =
            plan::access_plan(&self.guest, self.options, &ground.disks, &ground.baselines, ground.mechanism, run_dir)?;
        let generation = plan.generation.clone();
        let (qmp, journal) = (self.qmp.clone(), self.journal.clone());
        let mut access: Box<dyn SnapshotAccess> = match self.guest.kind {
            GuestKind::Proxmox => Box::new(ProxmoxAccess::new(plan, qmp, journal, self.events.clone())),
            GuestKind::Plain => Box::new(StockAccess::new(plan, qmp, journal)),
        };
        access.check().await?;
        for warning in access.take_warnings() {
            self.events.warn(warning);
        }
        if self.cancel.is_cancelled() {
            bail!(Cancelled);
        }
        self.planned = Some(Planned { name, generation, access });
        Ok(Ended::Done)
    }

    fn begin(&mut self) -> Result<Ended> {
        self.events.phase(Phase::SetUp);
        self.journal.record(&Step::Begin {
            guest: self.guest.id.to_string(),
            qmp: self.guest.qmp.clone(),
            agent: self.guest.agent.clone(),
            qemu: earlier(self.ground.as_ref())?.qemu.clone(),
            target: self.options.target.clone(),
            generation: earlier(self.planned.as_ref())?.generation.clone(),
        })?;
        Ok(Ended::Done)
    }

    async fn set_up(&mut self) -> Result<Ended> {
        match earlier(self.planned.as_mut())?.access.set_up().await {
            Ok(active) => {
                self.active = Some(active);
                Ok(Ended::Done)
            }
            Err(error) => {
                // An access that left nothing leaves an empty journal too.
                let left = self.journal.leftover();
                let what: Vec<String> =
                    left.iter().filter(|step| !matches!(step, Step::Begin { .. })).map(Step::label).collect();
                if what.is_empty() {
                    self.failed(error.into());
                    return Ok(Ended::Failed);
                }
                self.failed(anyhow!(error).context(LeftBehind { what, archive: None }));
                Ok(Ended::Left)
            }
        }
    }

    async fn copy(&mut self) -> Result<Ended> {
        self.events.phase(Phase::Copy);
        let guest = self.guest.id.to_string();
        if let Some(path) = self.provider.run(move |p| Ok(p.mountpoint(&guest))).await? {
            self.journal.record(&Step::Mount { path })?;
        }
        let ground = earlier(self.ground.as_mut())?;
        let planned = earlier(self.planned.as_mut())?;
        let baselines = std::mem::take(&mut ground.baselines);
        let transfer = Transfer {
            guest: &self.guest,
            options: self.options,
            events: self.events,
            cancel: self.cancel,
            name: &planned.name,
            generation: &planned.generation,
            disks: &ground.disks,
            skipped: &ground.skipped,
            active: earlier(self.active.as_ref())?,
            mechanism: ground.mechanism,
        };
        let copied = transfer.run(baselines, self.provider, planned.access.as_mut(), self.summary).await?;
        self.copied = Some(copied);
        Ok(Ended::Done)
    }

    fn note_stored(&mut self) -> Result<Ended> {
        self.events.phase(Phase::Commit);
        let archive = earlier(self.copied.as_ref())?.stored.id.0.clone();
        self.journal.record(&Step::Stored { archive })?;
        Ok(Ended::Done)
    }

    /// What the bitmaps that started are relative to is the archive from now on.
    fn record(&mut self) -> Result<Ended> {
        let ground = earlier(self.ground.as_mut())?;
        let planned = earlier(self.planned.as_ref())?;
        let Copied { stored, segment_lens } = earlier(self.copied.as_ref())?;
        let active = earlier(self.active.as_ref())?;
        for ((disk, access), segment_len) in ground.disks.iter().zip(&active.disks).zip(segment_lens) {
            match (&access.next_bitmap, &access.bitmap_node, &ground.qemu) {
                (Some(bitmap), Some(node), Some(qemu)) => ground.record.set(
                    &disk.name,
                    DiskGeneration {
                        generation: planned.generation.clone(),
                        repository: ground.repository.clone(),
                        archive: stored.id.clone(),
                        qemu: qemu.clone(),
                        device: disk.device.clone(),
                        identity: disk.identity.clone(),
                        node: node.clone(),
                        size: access.size,
                        segment_len: segment_len.bytes(),
                        bitmap: bitmap.clone(),
                        granularity: access.granularity,
                    },
                ),
                _ => ground.record.forget(&disk.name),
            }
        }
        ground.record.store(&self.options.dirs.generations(), &self.options.target, self.guest.id.as_str())?;
        self.summary.archive = Some(planned.name.to_string());
        self.summary.archive_id = Some(stored.id.clone());
        self.summary.stored_bytes = stored.added_bytes;
        Ok(Ended::Done)
    }

    async fn tear_down(&mut self, how: Teardown) -> Result<Ended> {
        self.events.phase(Phase::TearDown);
        let access = &mut earlier(self.planned.as_mut())?.access;
        let torn_down = access.tear_down(how).await;
        for warning in access.take_warnings() {
            self.events.warn(warning);
        }
        let archive = self.summary.archive.clone();
        match torn_down {
            Ok(report) => {
                let peak = &mut self.summary.fleecing_peak_bytes;
                *peak = report.fleecing_peak_bytes.max(*peak);
                for what in &report.left_behind {
                    self.events.warn(format!("{what} could not be removed; it stays in the recovery journal"));
                }
                if report.left_behind.is_empty() {
                    return Ok(Ended::Done);
                }
                self.left_behind(LeftBehind { what: report.left_behind, archive });
                Ok(Ended::Left)
            }
            Err(error) if how == Teardown::Success => {
                bail!(anyhow!(error).context(LeftBehind { what: vec!["the snapshot access".into()], archive }))
            }
            Err(error) => {
                self.undoing = Some(error);
                Ok(Ended::Failed)
            }
        }
    }

    async fn undo_again(&mut self) -> Result<Ended> {
        match access::recover(&self.journal, &self.qmp, None).await {
            Ok(report) if report.left_behind.is_empty() => Ok(Ended::Done),
            Ok(report) => {
                self.left_behind(LeftBehind { what: report.left_behind, archive: None });
                Ok(Ended::Left)
            }
            Err(again) => {
                if let Some(undo) = self.undoing.take() {
                    self.events.warn(format!("undoing fails, too: {undo:#}; and recovery: {again:#}"));
                }
                self.left_behind(LeftBehind { what: vec!["the snapshot access".into()], archive: None });
                Ok(Ended::Failed)
            }
        }
    }

    fn clear(&mut self) -> Ended {
        if let Err(error) = self.journal.clear() {
            // The next run will believe that something is left.
            self.error = Some(match self.error.take() {
                Some(first) => first.context(error),
                None => error.into(),
            });
            return Ended::Failed;
        }
        Ended::Done
    }
}
