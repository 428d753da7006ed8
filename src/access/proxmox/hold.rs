//! Holding the guest still for the instant.
//!
//! QEMU drains disk after disk in `backup-access-setup`, so that several disks show one instant only when the guest does not
//! write meanwhile: the agent freezes its file systems, or else it is paused for the time of the command.

use crate::{
    access::{
        AccessError, AccessPlan, FreezeMode,
        freeze::{FreezeError, FreezeOutcome, Freezer},
        watchdog::{Watchdog, WatchdogError},
    },
    archive::Consistency,
    guest::Disk,
    journal::{Journal, Step},
    qmp::{
        Qmp, QmpError, Session,
        command::block::{Cont, HumanMonitorCommand, QueryStatus, Stop},
    },
};
use async_trait::async_trait;
use std::{fmt::Debug, path::PathBuf};
use tokio::time::Instant;

/// Who resumes the guest when we die.
#[async_trait]
pub trait ArmWatchdog: Debug + Send + Sync {
    /// Starts a watchdog that resumes the guest behind this QMP socket.
    async fn arm(&self, qmp: PathBuf) -> Result<Watchdog, WatchdogError>;
}

/// A child process of this program.
#[derive(Debug)]
pub struct ArmChild;

#[async_trait]
impl ArmWatchdog for ArmChild {
    async fn arm(&self, qmp: PathBuf) -> Result<Watchdog, WatchdogError> {
        Watchdog::arm(None, Some(qmp)).await
    }
}

/// A guest that is held still, or that need not be. [`Held::release`] must follow.
#[derive(Debug)]
pub struct Held {
    qmp: Qmp,
    freezer: Freezer,
    journal: Journal,
    consistency: Consistency,
    pause: Option<Pause>,
}

#[derive(Debug)]
struct Pause {
    since: Instant,
    /// When it is dropped without being disarmed it resumes the guest.
    watchdog: Watchdog,
}

impl Held {
    /// Freezes the guest, or pauses it if there is more than one disk; neither if it does not run.
    ///
    /// # Errors
    /// When a freeze is demanded and not possible, or the pause fails. The guest is then released again.
    pub async fn hold(
        plan: &AccessPlan,
        qmp: &Qmp,
        session: &mut Session,
        journal: &Journal,
        arm: &dyn ArmWatchdog,
    ) -> Result<Self, AccessError> {
        let status = session
            .execute(&QueryStatus {})
            .await
            .map_err(AccessError::qmp("cannot ask whether the guest runs", None))?;
        let freezer = Freezer::new(plan.guest.agent.clone(), plan.freeze, plan.freeze_limit, journal.clone());
        let consistency = Consistency { was_paused: !status.running, ..Consistency::default() };
        let mut held = Self { qmp: qmp.clone(), freezer, journal: journal.clone(), consistency, pause: None };
        if !status.running {
            if plan.freeze == FreezeMode::Require {
                return Err(AccessError::Freeze(FreezeError::Required {
                    reason: format!("the guest does not run ({})", status.status),
                }));
            }
            held.consistency.freeze_note = Some(format!("the guest does not run ({})", status.status));
            return Ok(held);
        }
        match held.freezer.freeze().await? {
            FreezeOutcome::Frozen { .. } => {
                held.consistency.frozen = true;
                return Ok(held);
            }
            FreezeOutcome::NotPossible(reason) | FreezeOutcome::AlreadyFrozen(reason) => {
                held.consistency.freeze_note = Some(reason);
            }
        }
        // One disk alone is cut at one instant by QEMU.
        if plan.disks.len() > 1 {
            held.pause(plan, session, arm).await?;
        }
        Ok(held)
    }

    async fn pause(
        &mut self,
        plan: &AccessPlan,
        session: &mut Session,
        arm: &dyn ArmWatchdog,
    ) -> Result<(), AccessError> {
        // `stop` flushes; what is flushed before need not be while the guest stands still.
        for planned in &plan.disks {
            if let Some(command_line) = flush(&planned.disk)
                && let Err(error) = session.execute(&HumanMonitorCommand { command_line }).await
            {
                tracing::debug!(disk = planned.disk.name, %error, "cannot flush before the pause");
            }
        }
        let watchdog_error = |error: WatchdogError| AccessError::Refused {
            reason: format!("the guest must not be paused without a watchdog: {error}"),
            disk: None,
        };
        let mut watchdog = arm.arm(plan.guest.qmp.clone()).await.map_err(watchdog_error)?;
        if let Err(error) = self.journal.record(&Step::Paused) {
            watchdog.disarm().await;
            return Err(error.into());
        }
        watchdog.before_pause().await.map_err(watchdog_error)?;
        self.pause = Some(Pause { since: Instant::now(), watchdog });
        if let Err(source) = session.execute(&Stop {}).await {
            let error = AccessError::qmp("cannot pause the guest", None)(source);
            self.resume(session).await?;
            return Err(error);
        }
        Ok(())
    }

    async fn resume(&mut self, session: &mut Session) -> Result<(), AccessError> {
        let Some(Pause { since, mut watchdog }) = self.pause.take() else { return Ok(()) };
        let resumed = match session.execute(&Cont {}).await {
            // The connection may be lost without QEMU being.
            Err(QmpError::Closed { .. }) => self.qmp.execute(&Cont {}).await,
            // What came in place of the answer, or did not come yet, says nothing about the guest.
            Err(QmpError::Protocol { .. } | QmpError::TimedOut { .. }) => session.execute(&Cont {}).await,
            other => other,
        };
        // On an error the watchdog is dropped, which sets it off.
        resumed.map_err(AccessError::qmp("cannot let the guest run again", None))?;
        let paused_for = since.elapsed();
        self.consistency.paused_micros = u64::try_from(paused_for.as_micros()).unwrap_or(u64::MAX);
        let recorded = self.journal.record(&Step::Resumed);
        let _ = watchdog.after_resume().await;
        watchdog.disarm().await;
        Ok(recorded?)
    }

    /// Lets the guest go on, and tells how it was held.
    ///
    /// # Errors
    /// When the guest cannot be resumed or thawed (the watchdog goes on trying), or when a freeze that was demanded did not last.
    pub async fn release(mut self, session: &mut Session, mode: FreezeMode) -> Result<Consistency, AccessError> {
        let resumed = self.resume(session).await;
        let thawed = self.freezer.thaw().await;
        resumed?;
        let thawed = thawed?;
        if self.consistency.frozen {
            self.consistency.frozen_millis = u64::try_from(thawed.frozen_for.as_millis()).unwrap_or(u64::MAX);
        }
        if let Some(note) = thawed.note {
            if mode == FreezeMode::Require {
                return Err(AccessError::Freeze(FreezeError::Required { reason: note }));
            }
            self.consistency.frozen = false;
            self.consistency.freeze_note = Some(note);
        }
        Ok(self.consistency)
    }
}

/// A flush of a disk through its device, as a line for the human monitor.
fn flush(disk: &Disk) -> Option<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '-' | '_' | '.' | '[' | ']');
    (!disk.qdev.is_empty() && disk.qdev.chars().all(plain)).then(|| format!("qemu-io -d {} \"flush\"", disk.qdev))
}
