//! Snapshot access on upstream QEMU.
//!
//! Two ways to the instant, chosen by what QEMU's schema offers: one transaction of backup jobs, where a job can break the
//! snapshot rather than the guest's write; else filters that are put above the disks while the guest is paused for a moment.
//! Everything around the instant is the same for both.

pub(in crate::access) mod bitmap;
mod check;
mod filter;
#[cfg(test)]
mod rig;
#[cfg(test)]
mod tests;
mod transaction;

use super::{
    AccessError, AccessPlan, AccessReport, ActiveAccess, BitmapAction, DiskAccess, ExportMode, SnapshotAccess,
    Teardown, exported_bitmap,
    fleecing::{FleecingImages, Floor, Owner, Witness},
    freeze::{FreezeOutcome, Freezer},
    graph::Graph,
    recover::undo,
    watchdog::Watchdog,
};
use crate::{
    archive::Consistency,
    guest::Disk,
    journal::{Journal, ProcessIdentity, Step},
    qmp::{
        Qmp, QmpError, Session,
        command::block::{Bitmap, BlockExportAdd, BlockdevAdd, Driver, HumanMonitorCommand, NbdServerStart, NodeRef},
    },
};
use async_trait::async_trait;
use bitmap::BitmapPlan;
use jiff::Timestamp;
use std::{
    fs,
    os::unix::fs::DirBuilderExt,
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Smallest unit in which a filter copies, and forgets, old blocks.
const CLUSTER: u64 = 65536;

/// How all disks come under snapshot access at one instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// One transaction of `blockdev-backup` jobs and bitmap actions. No pause.
    Transaction,
    /// `copy-before-write` filters put in by `qom-set` while the guest is paused.
    MicroPause,
}

/// Before this a request must not span clusters that were copied and others that were not (seen in 7.2, gone in 10.0; the
/// versions between were not tried).
const MIXED_REQUESTS: (u32, u32, u32) = (10, 0, 0);

/// What this QEMU offers, and who it is.
#[derive(Clone, Debug)]
struct Features {
    way: Way,
    /// Whether a backup job can break the snapshot rather than the guest's write.
    on_cbw_error: bool,
    /// Limit of a copy before a write, in seconds.
    cbw_timeout: u32,
    qemu: Option<ProcessIdentity>,
    owner: Option<Owner>,
}

/// A disk on its way to snapshot access.
#[derive(Clone, Debug)]
struct Subject {
    disk: Disk,
    /// Its root node now.
    root: String,
    /// Granularity of the bitmap that starts.
    granularity: u32,
    bitmap: BitmapPlan,
    fleecing: String,
    filter: String,
    snapshot: String,
    job: String,
    export: String,
}

/// The QOM path of a device that `query-block` calls `qdev`.
fn qom_path(qdev: &str) -> String {
    if qdev.starts_with('/') { qdev.to_owned() } else { format!("/machine/peripheral/{qdev}") }
}

/// What clients ask for: the drive's name, or ours where QEMU has none.
fn export_name(disk: &Disk) -> &str {
    if disk.device.is_empty() { &disk.name } else { &disk.device }
}

/// Snapshot access to the disks of a guest on upstream QEMU.
///
/// Dropping a future of it half way leaves what the journal says; [`SnapshotAccess::tear_down`] undoes that.
#[derive(Debug)]
pub struct StockAccess {
    plan: AccessPlan,
    qmp: Qmp,
    journal: Journal,
    way: Option<Way>,
    floor: Option<Floor>,
    features: Option<Features>,
    images: Option<FleecingImages>,
    peak: AtomicU64,
    warnings: Vec<String>,
    #[cfg(test)]
    trial: tests::Trial,
}

impl StockAccess {
    /// An access as planned, to the QEMU behind `qmp`. Steps go to `journal`.
    pub fn new(plan: AccessPlan, qmp: Qmp, journal: Journal) -> Self {
        Self {
            plan,
            qmp,
            journal,
            way: None,
            floor: None,
            features: None,
            images: None,
            peak: AtomicU64::new(0),
            warnings: Vec::new(),
            #[cfg(test)]
            trial: tests::Trial::default(),
        }
    }

    /// Takes this way, whatever the schema says. [`Way::Transaction`] lets the guest's writes fail with the fleecing image
    /// where QEMU's backup jobs lack `on-cbw-error`.
    #[must_use]
    pub fn with_way(mut self, way: Way) -> Self {
        self.way = Some(way);
        self
    }

    /// Other limits for free space than the usual ones.
    #[must_use]
    pub fn with_floor(mut self, floor: Floor) -> Self {
        self.floor = Some(floor);
        self
    }

    fn socket(&self) -> PathBuf {
        self.plan.run_dir.join("nbd.sock")
    }

    async fn session(&self) -> Result<Session, AccessError> {
        self.qmp.session().await.map_err(AccessError::qmp("cannot reach QEMU", None))
    }

    /// Makes a step durable before its effect.
    fn record(&self, step: &Step) -> Result<(), AccessError> {
        self.point()?;
        self.journal.record(step)?;
        self.point()
    }

    /// Where a test may end the run as if the process had died.
    #[cfg(not(test))]
    #[allow(clippy::unnecessary_wraps, clippy::unused_self)]
    fn point(&self) -> Result<(), AccessError> {
        Ok(())
    }

    #[cfg(test)]
    fn point(&self) -> Result<(), AccessError> {
        self.trial.point()
    }

    async fn try_set_up(&mut self) -> Result<ActiveAccess, AccessError> {
        if self.features.is_none() {
            self.check().await?;
        }
        let Some(features) = self.features.clone() else {
            return Err(AccessError::Refused { reason: "the access was not checked".into(), disk: None });
        };
        let mut session = self.session().await?;
        let now = session.peer_pid().and_then(|pid| ProcessIdentity::of(pid).ok());
        if now != features.qemu {
            let reason = "another QEMU process answers than at the check".into();
            return Err(AccessError::Refused { reason, disk: None });
        }
        self.begin(&features)?;
        self.make_run_dir(features.owner)?;

        // First what can fail because of others: a second NBD server.
        let socket = self.socket();
        self.record(&Step::NbdServer { socket: socket.clone() })?;
        match session.execute(&NbdServerStart { socket: socket.clone() }).await {
            Ok(_) => {}
            Err(QmpError::Refused { desc, .. }) if desc.contains("already running") => {
                return Err(AccessError::Foreign { what: "the NBD server that runs in QEMU".into(), disk: None });
            }
            Err(error) => return Err(AccessError::qmp("cannot start the NBD server", None)(error)),
        }
        self.point()?;

        let subjects = self.subjects(&check::read(&mut session).await?)?;
        self.add_fleecing(&mut session, &subjects, features.owner).await?;
        if features.way == Way::MicroPause {
            self.add_filters(&mut session, &subjects, &features).await?;
        }
        let (instant, consistency) = self.take_instant(&mut session, &subjects, &features).await?;
        let disks = self.export(&mut session, &subjects).await?;
        Ok(ActiveAccess { socket, disks, instant, consistency })
    }

    fn begin(&self, features: &Features) -> Result<(), AccessError> {
        let begun = self
            .journal
            .leftover()
            .iter()
            .any(|step| matches!(step, Step::Begin { generation, .. } if *generation == self.plan.generation));
        if begun {
            return Ok(());
        }
        self.record(&Step::Begin {
            guest: self.plan.guest.id.to_string(),
            qmp: self.qmp.socket.clone(),
            agent: self.plan.guest.agent.clone(),
            qemu: features.qemu.clone(),
            target: self.plan.target.clone(),
            generation: self.plan.generation.clone(),
        })
    }

    /// Makes the run's directory unless it is there, and lets QEMU put its socket there.
    fn make_run_dir(&self, owner: Option<Owner>) -> Result<(), AccessError> {
        let path = &self.plan.run_dir;
        if !path.is_dir() {
            self.record(&Step::RunDir { path: path.clone() })?;
            fs::DirBuilder::new().mode(0o700).recursive(true).create(path).map_err(|source| AccessError::Io {
                path: path.clone(),
                doing: "created",
                source,
            })?;
            self.point()?;
        }
        check::adopt_dir(path, owner)
    }

    fn subjects(&self, graph: &Graph) -> Result<Vec<Subject>, AccessError> {
        let generation = &self.plan.generation;
        let roots = self.roots(graph)?;
        Ok(self
            .plan
            .disks
            .iter()
            .zip(roots)
            .enumerate()
            .map(|(n, (plan, root))| {
                let root = root.node_name.clone().unwrap_or_default();
                let new = bitmap::name(&self.plan.target, generation);
                Subject {
                    bitmap: bitmap::plan(graph, &root, &plan.bitmap, new, plan.granularity),
                    disk: plan.disk.clone(),
                    root,
                    granularity: plan.granularity,
                    fleecing: format!("pvb-{generation}-fl{n}"),
                    filter: format!("pvb-{generation}-cbw{n}"),
                    snapshot: format!("pvb-{generation}-snap{n}"),
                    job: format!("pvb-{generation}-job{n}"),
                    export: format!("pvb-exp-{n}-{generation}"),
                }
            })
            .collect())
    }

    async fn add_fleecing(
        &mut self,
        session: &mut Session,
        subjects: &[Subject],
        owner: Option<Owner>,
    ) -> Result<(), AccessError> {
        let Some(mut images) = self.images.take() else {
            return Err(AccessError::Refused { reason: "the access was not checked".into(), disk: None });
        };
        let mut added = Ok(());
        for subject in subjects {
            added = self.add_image(session, subject, &mut images, owner).await;
            if added.is_err() {
                break;
            }
        }
        self.images = Some(images);
        added
    }

    async fn add_image(
        &self,
        session: &mut Session,
        subject: &Subject,
        images: &mut FleecingImages,
        owner: Option<Owner>,
    ) -> Result<(), AccessError> {
        let name = &subject.disk.name;
        let path = images.path(&subject.fleecing);
        self.record(&Step::FleecingFile { path: path.clone() })?;
        images.create(&path, name, subject.disk.size, owner).await?;
        self.record(&Step::Node { name: subject.fleecing.clone() })?;
        session
            .execute(&images.node(&subject.fleecing, &path, subject.disk.size))
            .await
            .map_err(AccessError::qmp("cannot add the fleecing image", Some(name)))?;
        self.point()
    }

    /// Freezes, takes the instant, thaws: the last whatever becomes of the others.
    async fn take_instant(
        &mut self,
        session: &mut Session,
        subjects: &[Subject],
        features: &Features,
    ) -> Result<(Timestamp, Consistency), AccessError> {
        let mut watchdog = None;
        if features.way == Way::MicroPause {
            // What is flushed before need not be flushed while the guest waits.
            flush(session, subjects).await?;
            watchdog = self.watchdog().await?;
        }
        let mut freezer =
            Freezer::new(self.plan.guest.agent.clone(), self.plan.freeze, self.plan.freeze_limit, self.journal.clone());
        let mut consistency = Consistency::default();
        let frozen = freezer.freeze().await;
        let taken = match &frozen {
            Err(_) => None,
            Ok(outcome) => {
                match outcome {
                    FreezeOutcome::Frozen { .. } => consistency.frozen = true,
                    FreezeOutcome::NotPossible(why) | FreezeOutcome::AlreadyFrozen(why) => {
                        consistency.freeze_note = Some(why.clone());
                    }
                }
                Some(self.hold_and_take(session, subjects, features, watchdog, &mut consistency).await)
            }
        };
        #[cfg(test)]
        if let Some(Err(AccessError::Killed(point))) = taken {
            return Err(AccessError::Killed(point));
        }
        let thawed = freezer.thaw().await;
        frozen?;
        let instant = taken.unwrap_or_else(|| Ok(Timestamp::now()))?;
        let report = thawed?;
        consistency.frozen_millis = u64::try_from(report.frozen_for.as_millis()).unwrap_or(u64::MAX);
        if let Some(note) = report.note {
            consistency.freeze_note.get_or_insert(note);
        }
        self.point()?;
        Ok((instant, consistency))
    }

    async fn hold_and_take(
        &self,
        session: &mut Session,
        subjects: &[Subject],
        features: &Features,
        watchdog: Option<Watchdog>,
        consistency: &mut Consistency,
    ) -> Result<Timestamp, AccessError> {
        match features.way {
            Way::Transaction => self.transact(session, subjects, features).await,
            Way::MicroPause => {
                if consistency.frozen {
                    // What the freeze made the guest write.
                    flush(session, subjects).await?;
                }
                self.pause_and_insert(session, subjects, watchdog, consistency).await
            }
        }
    }

    /// Somebody who resumes the guest if we die.
    async fn watchdog(&self) -> Result<Option<Watchdog>, AccessError> {
        #[cfg(test)]
        if self.trial.unwatched {
            return Ok(None);
        }
        Ok(Some(Watchdog::arm(None, Some(self.qmp.socket.clone())).await?))
    }

    /// Adds the snapshot-access nodes and exports them, and tells what came of it all.
    async fn export(&self, session: &mut Session, subjects: &[Subject]) -> Result<Vec<DiskAccess>, AccessError> {
        for subject in subjects {
            let name = Some(subject.disk.name.as_str());
            self.record(&Step::Node { name: subject.snapshot.clone() })?;
            let driver = Driver::SnapshotAccess { file: NodeRef::Name(subject.filter.clone()) };
            session
                .execute(&BlockdevAdd::new(&subject.snapshot, driver).unmap())
                .await
                .map_err(AccessError::qmp("cannot add the snapshot-access node", name))?;
            let mut bitmaps = Vec::new();
            if let Some(old) = &subject.bitmap.old {
                let old = Bitmap { node: subject.root.clone(), name: old.clone() };
                let granularity = subject.bitmap.granularity as u32;
                let (snapshot, disk) = (&subject.snapshot, &subject.disk.name);
                bitmaps.push(exported_bitmap::copy(session, old, snapshot, granularity, disk).await?);
            }
            self.record(&Step::Export { id: subject.export.clone() })?;
            session
                .execute(&BlockExportAdd {
                    r#type: "nbd",
                    id: subject.export.clone(),
                    node_name: subject.snapshot.clone(),
                    name: export_name(&subject.disk).to_owned(),
                    // It takes no writes, only the trims with which we give back what was stored.
                    writable: self.plan.exports == ExportMode::Trim,
                    bitmaps,
                })
                .await
                .map_err(AccessError::qmp("cannot export the snapshot", name))?;
            self.point()?;
        }
        let graph = check::read(session).await?;
        subjects.iter().map(|subject| describe(session, &graph, subject)).collect()
    }
}

/// What became of a disk. Looks once more at what nothing in QEMU guarantees.
fn describe(session: &Session, graph: &Graph, subject: &Subject) -> Result<DiskAccess, AccessError> {
    let disk = &subject.disk;
    let refused = |reason: String| AccessError::Refused { reason, disk: Some(disk.name.clone()) };
    let device = graph.device(&disk.qdev, &disk.device).and_then(|d| d.inserted.as_ref());
    if device.and_then(|node| node.node_name.as_deref()) != Some(subject.filter.as_str()) {
        return Err(refused("the filter is not at the top of the disk".into()));
    }
    for node in [&subject.root, &subject.filter, &subject.fleecing, &subject.snapshot] {
        let size = graph.node(node).map(|n| n.image.virtual_size);
        if size != Some(disk.size) {
            return Err(refused(format!("node `{node}` has {size:?} bytes, the disk {}", disk.size)));
        }
    }
    let new = graph.bitmap(&subject.root, &subject.bitmap.new);
    if !new.is_some_and(|b| b.recording && !b.inconsistent) {
        return Err(refused(format!("bitmap `{}` does not record", subject.bitmap.new)));
    }
    // The filter's own bitmaps tell the unit in which it copies.
    let cluster = graph.node(&subject.filter).into_iter().flat_map(|n| &n.dirty_bitmaps).map(|b| b.granularity).max();
    let old = subject.bitmap.old.as_deref();
    debug_assert_eq!(old.is_some(), subject.bitmap.action == BitmapAction::Used);
    Ok(DiskAccess {
        name: disk.name.clone(),
        export: export_name(disk).to_owned(),
        size: disk.size,
        dirty_context: old.map(|old| format!("qemu:dirty-bitmap:{old}")),
        action: subject.bitmap.action,
        reason: subject.bitmap.reason.clone(),
        clean_readable: true,
        largest_request: (session.version() < MIXED_REQUESTS).then_some(CLUSTER as u32),
        granularity: subject.bitmap.granularity.max(cluster.unwrap_or_default()).max(CLUSTER),
        next_bitmap: (subject.bitmap.action != BitmapAction::NotUsed).then(|| subject.bitmap.new.clone()),
        bitmap_node: Some(subject.root.clone()),
    })
}

/// Flushes the disks with the guest running. Only speed depends on it: `stop` flushes too.
async fn flush(session: &mut Session, subjects: &[Subject]) -> Result<(), AccessError> {
    for subject in subjects {
        let flush = HumanMonitorCommand { command_line: format!("qemu-io -d {} flush", subject.disk.qdev) };
        match session.execute(&flush).await {
            Ok(_) | Err(QmpError::Refused { .. }) => {}
            Err(error) => return Err(AccessError::qmp("cannot flush the writes", Some(&subject.disk.name))(error)),
        }
    }
    Ok(())
}

#[async_trait]
impl SnapshotAccess for StockAccess {
    async fn check(&mut self) -> Result<(), AccessError> {
        let (features, images) = self.look().await?;
        self.features = Some(features);
        self.images = Some(images);
        Ok(())
    }

    async fn set_up(&mut self) -> Result<ActiveAccess, AccessError> {
        let error = match self.try_set_up().await {
            Ok(access) => return Ok(access),
            #[cfg(test)]
            Err(error @ AccessError::Killed(_)) => return Err(error),
            Err(error) => error,
        };
        match undo(&self.journal, &self.qmp, None).await {
            Ok(report) => self.warnings.extend(report.left_behind),
            Err(undoing) => {
                tracing::warn!(%undoing, "set-up cannot be undone now; the journal keeps what is left");
                self.warnings.push(format!("what was begun is left for recovery: {undoing}"));
            }
        }
        Err(error)
    }

    fn fleecing_bytes(&self) -> u64 {
        let now = self.images.as_ref().map_or(0, FleecingImages::bytes);
        self.peak.fetch_max(now, Ordering::Relaxed);
        now
    }

    fn fleecing_witnesses(&self) -> Vec<Option<Witness>> {
        self.images.as_ref().map_or_else(Vec::new, |images| images.witnesses().to_vec())
    }

    fn take_warnings(&mut self) -> Vec<String> {
        std::mem::take(&mut self.warnings)
    }

    async fn tear_down(&mut self, how: Teardown) -> Result<AccessReport, AccessError> {
        self.fleecing_bytes();
        let committed = (how == Teardown::Success).then_some(self.plan.generation.as_str());
        let report = undo(&self.journal, &self.qmp, committed).await?;
        Ok(AccessReport { fleecing_peak_bytes: self.peak.load(Ordering::Relaxed), left_behind: report.left_behind })
    }
}

/// Microseconds, for reports.
fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
