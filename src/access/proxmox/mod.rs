//! Snapshot access on QEMU with Proxmox VE's patches: `backup-access-setup` and `backup-access-teardown`.
//!
//! QEMU keeps a dirty bitmap per disk and target id, and gives a read-only view of each disk at the instant of the setup. A
//! wrong request ends the QEMU process, and with it the guest; what is refused here and the order of steps follow from that.

mod answer;
mod check;
mod fleece;
mod hold;
#[cfg(test)]
mod tests;
mod undo;

pub(super) use undo::undo_in_qemu;
pub use undo::{Undone, undo};

use super::{
    AccessError, AccessPlan, AccessReport, ActiveAccess, ExportMode, SnapshotAccess, Teardown, exported_bitmap,
    fleecing::{Owner, Witness},
    graph::Graph,
};
use crate::{
    archive::Consistency,
    journal::{Journal, Step},
    qmp::{
        Qmp, Session,
        command::{
            block::{Bitmap, BlockExportAdd, NbdServerStart},
            proxmox::{AccessBitmapMode, BackupAccessSetup, BackupAccessTeardown},
        },
    },
    report::Events,
};
use answer::{Accessed, BITMAP_GRANULARITY, Verdict};
use async_trait::async_trait;
use check::Mode;
use fleece::Place;
use hold::{ArmChild, ArmWatchdog, Held};
use jiff::Timestamp;
use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// Bitmap that QEMU keeps while an access is set up. One that was left behind makes every setup fail half-way.
const BACKGROUND_BITMAP: &str = "backup-access-background-bitmap";

/// Node that QEMU looks for beside `device`.
fn fleecing_node(device: &str) -> String {
    format!("{device}-fleecing")
}

/// Where the NBD server of a run listens.
fn socket(plan: &AccessPlan) -> PathBuf {
    plan.run_dir.join("nbd.sock")
}

/// An access to the disks of one guest.
#[derive(Debug)]
pub struct ProxmoxAccess {
    plan: AccessPlan,
    qmp: Qmp,
    journal: Journal,
    events: EventsDebug,
    arm: Arc<dyn ArmWatchdog>,
    /// Set by `check`.
    place: Option<Place>,
    /// QEMU's process id, if known.
    qemu: Option<i32>,
    peak: AtomicU64,
    report: AccessReport,
}

/// Events cannot be shown.
struct EventsDebug(Events);

impl std::fmt::Debug for EventsDebug {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Events")
    }
}

impl ProxmoxAccess {
    /// An access as planned, through `qmp`. Every step is written to `journal` before it is taken.
    pub fn new(plan: AccessPlan, qmp: Qmp, journal: Journal, events: Events) -> Self {
        Self {
            plan,
            qmp,
            journal,
            events: EventsDebug(events),
            arm: Arc::new(ArmChild),
            place: None,
            qemu: None,
            peak: AtomicU64::new(0),
            report: AccessReport::default(),
        }
    }

    async fn session(&self) -> Result<Session, AccessError> {
        self.qmp.session().await.map_err(AccessError::qmp("cannot reach QEMU", None))
    }

    async fn try_set_up(&mut self) -> Result<ActiveAccess, AccessError> {
        let Some(place) = &mut self.place else {
            return Err(AccessError::Refused { reason: "the plan was not checked".into(), disk: None });
        };
        fleece::run_dir(&self.plan.run_dir)?;
        let sizes = fleece::attach_sources(&self.plan, &self.qmp, &self.journal).await?;
        // A storage may take its time, for which others get at QEMU.
        let owner = self.qemu.and_then(Owner::of);
        let mut images = Vec::new();
        for (number, size) in sizes.iter().enumerate() {
            images.push(place.make(&self.plan, &self.journal, number, *size, owner).await?);
        }
        let mut session = self.session().await?;
        fleece::attach_images(&self.plan, &sizes, images, &mut session, &self.journal).await?;
        // Before the instant: that the server belongs to somebody else must not cost the guest a freeze.
        self.start_server(&mut session).await?;
        let (accessed, instant, consistency) = self.take_instant(&mut session, &sizes).await?;
        for disk in &accessed {
            self.export(&mut session, disk).await?;
        }
        let disks = accessed.into_iter().map(|accessed| accessed.disk).collect();
        Ok(ActiveAccess { socket: socket(&self.plan), disks, instant, consistency })
    }

    async fn start_server(&self, session: &mut Session) -> Result<(), AccessError> {
        let socket = socket(&self.plan);
        self.journal.record(&Step::NbdServer { socket: socket.clone() })?;
        match session.execute(&NbdServerStart { socket }).await {
            Err(crate::qmp::QmpError::Refused { desc, .. }) if desc.contains("already running") => {
                Err(AccessError::Foreign { what: "the NBD server".into(), disk: None })
            }
            other => other.map(drop).map_err(AccessError::qmp("cannot start the NBD server", None)),
        }
    }

    /// The setup itself, with the guest held still around it.
    async fn take_instant(
        &self,
        session: &mut Session,
        sizes: &[u64],
    ) -> Result<(Vec<Accessed>, Timestamp, Consistency), AccessError> {
        let before = Graph::read(session).await.map_err(AccessError::qmp("cannot read the block graph", None))?;
        // Once more: others were at QEMU since the check.
        check::clean(&before)?;
        let modes = check::modes(&self.plan, &before);
        let held = Held::hold(&self.plan, &self.qmp, session, &self.journal, &*self.arm).await?;
        let set_up = self.backup_access_setup(session, modes, sizes, &before).await;
        let released = held.release(session, self.plan.freeze).await;
        let (accessed, instant) = set_up?;
        Ok((accessed, instant, released?))
    }

    async fn backup_access_setup(
        &self,
        session: &mut Session,
        mut modes: Vec<Mode>,
        sizes: &[u64],
        before: &Graph,
    ) -> Result<(Vec<Accessed>, Timestamp), AccessError> {
        let target_id = self.plan.target.clone();
        let step = Step::Access { target_id: target_id.clone() };
        self.journal.record(&step)?;
        loop {
            let instant = Timestamp::now();
            let devices = modes.iter().map(|mode| mode.device.clone()).collect();
            let answer = match session.execute(&BackupAccessSetup { target_id: target_id.clone(), devices }).await {
                Ok(answer) => answer,
                Err(error) => {
                    if check::is_busy(&error) {
                        // It is not ours, and must not be torn down.
                        self.journal.undone(&step)?;
                        return Err(AccessError::Busy { by: error.to_string(), disk: None });
                    }
                    return Err(AccessError::qmp("cannot set the snapshot access up", None)(error));
                }
            };
            match answer::judge(&self.plan, sizes, &modes, before, &answer)? {
                Verdict::Good(accessed) => return Ok((accessed, instant)),
                Verdict::Distrusted(disks) => {
                    let command = BackupAccessTeardown { target_id: target_id.clone(), success: false };
                    session
                        .execute(&command)
                        .await
                        .map_err(AccessError::qmp("cannot tear an access with wrong bitmaps down", None))?;
                    // Each turn has fewer disks whose bitmap can be used.
                    for (place, why) in disks {
                        modes[place].device.bitmap_mode = AccessBitmapMode::New;
                        modes[place].why_new = Some(why);
                    }
                }
            }
        }
    }

    async fn export(&self, session: &mut Session, accessed: &Accessed) -> Result<(), AccessError> {
        let disk = &accessed.disk;
        // Only a bitmap that is read is exported.
        let mut bitmaps = Vec::new();
        if let (Some(_), Some(node)) = (&disk.dirty_context, &disk.bitmap_node) {
            let frozen = Bitmap { node: node.clone(), name: self.plan.target.clone() };
            let granularity = BITMAP_GRANULARITY as u32;
            bitmaps.push(exported_bitmap::copy(session, frozen, &accessed.node, granularity, &disk.name).await?);
        }
        self.journal.record(&Step::Export { id: disk.export.clone() })?;
        let export = BlockExportAdd {
            r#type: "nbd",
            id: disk.export.clone(),
            node_name: accessed.node.clone(),
            name: disk.export.clone(),
            // For TRIM; QEMU refuses writes to a snapshot.
            writable: self.plan.exports == ExportMode::Trim,
            bitmaps,
        };
        session
            .execute(&export)
            .await
            .map(drop)
            .map_err(AccessError::qmp("cannot export the snapshot", Some(&disk.name)))
    }

    async fn undo(&mut self, how: Teardown) -> Result<(), AccessError> {
        self.fleecing_bytes();
        let undone = undo(&self.qmp, &self.journal, &self.plan.guest.id, how).await?;
        for warning in undone.warnings {
            self.events.0.warn(warning);
        }
        for left in &undone.left_behind {
            self.events.0.warn(format!("left behind: {left}"));
        }
        self.report.left_behind = undone.left_behind;
        Ok(())
    }
}

#[async_trait]
impl SnapshotAccess for ProxmoxAccess {
    async fn check(&mut self) -> Result<(), AccessError> {
        check::plan(&self.plan)?;
        let mut session = self.session().await?;
        check::qemu(&self.plan, &mut session).await?;
        self.qemu = session.peer_pid();
        drop(session);
        self.place = Some(Place::look(&self.plan, &self.events.0).await?);
        Ok(())
    }

    async fn set_up(&mut self) -> Result<ActiveAccess, AccessError> {
        let error = match self.try_set_up().await {
            Ok(active) => return Ok(active),
            Err(error) => error,
        };
        if let Err(second) = self.undo(Teardown::Failure).await {
            self.events.0.warn(format!("the set-up could not be undone, and the journal keeps it: {second}"));
        }
        Err(error)
    }

    fn fleecing_bytes(&self) -> u64 {
        let bytes = self.place.as_ref().map_or(0, Place::bytes);
        self.peak.fetch_max(bytes, Ordering::Relaxed);
        bytes
    }

    fn fleecing_witnesses(&self) -> Vec<Option<Witness>> {
        self.place.as_ref().map_or_else(Vec::new, |place| place.witnesses().to_vec())
    }

    async fn tear_down(&mut self, how: Teardown) -> Result<AccessReport, AccessError> {
        self.undo(how).await?;
        self.report.fleecing_peak_bytes = self.peak.load(Ordering::Relaxed);
        Ok(self.report.clone())
    }
}
