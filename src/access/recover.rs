//! Undoing what a journal says, in the safe order: after a crash, after a failed set-up, and at every orderly end.
//!
//! There is one way to undo, so that recovery takes the same path as every teardown. It asks QEMU what is there now rather
//! than believing the journal, which may tell of steps that were never taken, and it can be interrupted and begun again at any
//! point.

mod host;
pub(super) mod qemu;
mod served;

pub use served::release;

use super::{AccessError, Teardown, graph::is_ours};
use crate::{
    journal::{Journal, JournalError, ProcessIdentity, Step},
    protocol::{BitmapPer, after_death},
    qmp::{Qmp, QmpError},
};
use std::{path::PathBuf, time::Duration};
use tokio::time::sleep;

/// How often an undoing is begun anew when QEMU hangs up in the middle: it may be about to end.
pub(super) const ATTEMPTS: u32 = 4;
pub(super) const PAUSE: Duration = Duration::from_millis(500);

/// What an undoing did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// Steps that were undone, as [`Step::label`] names them.
    pub undone: Vec<String>,
    /// What could not be undone, and why. It stays in the journal.
    pub left_behind: Vec<String>,
    /// Whether the QEMU process was gone, so that only files were left to remove.
    pub qemu_gone: bool,
    /// Whether a guest that we had paused runs again.
    pub resumed: bool,
    /// Whether file systems that we had frozen are thawed.
    pub thawed: bool,
    /// Mounts that were in use: their readers get errors.
    pub cut_off: Vec<PathBuf>,
}

/// Undoes everything that a dead run left, on stock QEMU and on Proxmox VE's, and clears the journal when nothing is left.
///
/// `recorded` is the generation that the guest's generation record says is committed to the target. If the dead run had got
/// that far, its bitmaps count; else the ones before go on, with all writes since.
///
/// # Errors
/// When QEMU lives but cannot be asked, or the journal cannot be written. What could not be undone for other reasons is in the
/// report.
pub async fn recover(journal: &Journal, qmp: &Qmp, recorded: Option<&str>) -> Result<RecoveryReport, AccessError> {
    finish(journal, qmp, recorded, after_death(BitmapPer::Target, recorded.is_some())).await
}

/// Ends an access by hand as its operator wants it, and clears the journal when nothing is left.
///
/// With [`Teardown::Success`] the bitmaps hold nothing but the writes since the access began; whoever relied on what was in
/// them before must have been told so already.
///
/// # Errors
/// As [`recover`].
pub async fn end(journal: &Journal, qmp: &Qmp, how: Teardown) -> Result<RecoveryReport, AccessError> {
    let generation = journal.leftover().into_iter().find_map(|step| match step {
        Step::Begin { generation, .. } if how == Teardown::Success => Some(generation),
        _ => None,
    });
    finish(journal, qmp, generation.as_deref(), how).await
}

async fn finish(
    journal: &Journal,
    qmp: &Qmp,
    committed: Option<&str>,
    access: Teardown,
) -> Result<RecoveryReport, AccessError> {
    let report = undo_as(journal, qmp, committed, access).await?;
    if report.left_behind.is_empty() {
        journal.clear()?;
    }
    Ok(report)
}

/// What a journal says, sorted by kind and each kind in the order of the journal.
#[derive(Clone, Debug, Default)]
struct Work {
    /// Whether the journal says whose it is; that line may be destroyed.
    begun: bool,
    agent: Option<PathBuf>,
    qemu: Option<ProcessIdentity>,
    paused: bool,
    frozen: bool,
    exports: Vec<Step>,
    accesses: Vec<Step>,
    jobs: Vec<Step>,
    filters: Vec<Step>,
    nodes: Vec<Step>,
    bitmaps: Vec<Switch>,
    servers: Vec<Step>,
    mounts: Vec<Step>,
    fleecing: Vec<Step>,
    served: Vec<Step>,
    directories: Vec<Step>,
}

/// A switch of bitmaps, and the run that it belongs to: a journal may hold what more than one run could not undo.
#[derive(Clone, Debug)]
struct Switch {
    step: Step,
    target: Option<String>,
    generation: Option<String>,
}

impl Work {
    fn of(journal: &Journal) -> Self {
        let mut work = Self::default();
        let mut run = (None, None);
        for step in journal.leftover() {
            match step {
                Step::Begin { agent, qemu, target, generation, .. } => {
                    work.begun = true;
                    work.agent = agent;
                    work.qemu = qemu;
                    run = (Some(target), Some(generation));
                }
                Step::Paused => work.paused = true,
                Step::Frozen => work.frozen = true,
                Step::Export { .. } => work.exports.push(step),
                Step::Access { .. } => work.accesses.push(step),
                Step::Job { .. } => work.jobs.push(step),
                Step::Filter { .. } => work.filters.push(step),
                Step::Node { .. } => work.nodes.push(step),
                Step::Bitmap { .. } => {
                    let (target, generation) = run.clone();
                    work.bitmaps.push(Switch { step, target, generation });
                }
                Step::NbdServer { .. } => work.servers.push(step),
                Step::Served { .. } => work.served.push(step),
                Step::FleecingFile { .. } | Step::FleecingVolume { .. } => work.fleecing.push(step),
                Step::Mount { .. } => work.mounts.push(step),
                Step::RunDir { .. } => work.directories.push(step),
                Step::Resumed | Step::Thawed | Step::Stored { .. } | Step::ByHand { .. } | Step::Undone { .. } => {}
            }
        }
        work
    }

    /// Whether things in QEMU have names that are not ours alone, as on Proxmox VE, where devices give them.
    fn has_qemus_names(&self) -> bool {
        self.in_qemu().any(|step| match step {
            Step::Access { .. } => true,
            Step::Node { name } | Step::Export { id: name } => !is_ours(name),
            _ => false,
        })
    }

    /// What lives in QEMU and dies with it.
    fn in_qemu(&self) -> impl Iterator<Item = &Step> {
        [&self.exports, &self.accesses, &self.jobs, &self.filters, &self.nodes, &self.servers]
            .into_iter()
            .flatten()
            .chain(self.bitmaps.iter().map(|switch| &switch.step))
    }
}

/// Undoes what the journal says. The bitmaps of the generation `committed` count, those of any other are merged back. The
/// journal is not cleared.
pub(super) async fn undo(journal: &Journal, qmp: &Qmp, committed: Option<&str>) -> Result<RecoveryReport, AccessError> {
    undo_as(journal, qmp, committed, Teardown::Failure).await
}

/// [`undo`], with `access` for how accesses of Proxmox's QEMU end.
async fn undo_as(
    journal: &Journal,
    qmp: &Qmp,
    committed: Option<&str>,
    access: Teardown,
) -> Result<RecoveryReport, AccessError> {
    let mut undo = Undo { journal, access, report: RecoveryReport::default(), unrecorded: None };
    // Whoever reads through a mount has a connection to QEMU's NBD server, which must be gone before its exports.
    undo.unmount(&Work::of(journal)).await?;
    let mut attempt = 1;
    let in_use = loop {
        let work = Work::of(journal);
        if !work.paused && !work.frozen && work.in_qemu().next().is_none() {
            break Vec::new();
        }
        let error = match undo.in_qemu(&work, qmp, committed).await {
            Ok(in_use) => break in_use,
            Err(error) => error,
        };
        let hung_up = matches!(&error, AccessError::Qmp { source, .. }
            if source.outcome_unknown() || matches!(source, QmpError::Connect { .. }));
        if !hung_up || attempt == ATTEMPTS {
            return Err(error);
        }
        attempt += 1;
        undo.report.left_behind.clear();
        sleep(PAUSE).await;
    };
    undo.on_host(&Work::of(journal), &in_use).await?;
    if let Some(error) = undo.unrecorded {
        tracing::warn!(%error, "what was undone is not noted; the next undoing will find it gone");
    }
    Ok(undo.report)
}

/// An undoing under way.
struct Undo<'a> {
    journal: &'a Journal,
    /// How an access of Proxmox's QEMU ends.
    access: Teardown,
    report: RecoveryReport,
    /// The first thing that the journal could not be told. A full disk is no reason to leave the guest as it is: what is undone
    /// without a record is found gone the next time.
    unrecorded: Option<JournalError>,
}

impl Undo<'_> {
    fn done(&mut self, step: &Step) {
        self.note(&Step::Undone { label: step.label() });
        self.report.undone.push(step.label());
    }

    fn note(&mut self, step: &Step) {
        if let Err(error) = self.journal.record(step) {
            self.unrecorded.get_or_insert(error);
        }
    }

    fn left(&mut self, step: &Step, why: &str) {
        tracing::warn!("{} is left behind: {why}", step.label());
        self.report.left_behind.push(format!("{}: {why}", step.label()));
    }

    /// A step that worked is done; one that did not is left behind, unless the connection itself is lost.
    fn settle(&mut self, step: &Step, outcome: Result<(), Trouble>) -> Result<(), AccessError> {
        match outcome {
            Ok(()) => {
                self.done(step);
                Ok(())
            }
            Err(Trouble::Left(why)) => {
                self.left(step, &why);
                Ok(())
            }
            Err(Trouble::Qmp(source)) => {
                Err(AccessError::Qmp { step: format!("cannot undo `{}`", step.label()), disk: None, source })
            }
        }
    }
}

/// Why a step was not undone.
enum Trouble {
    /// It stays behind.
    Left(String),
    /// Nothing more can be said to QEMU.
    Qmp(QmpError),
}

impl From<QmpError> for Trouble {
    fn from(error: QmpError) -> Self {
        match error {
            QmpError::Refused { desc, .. } => Self::Left(desc),
            other => Self::Qmp(other),
        }
    }
}
