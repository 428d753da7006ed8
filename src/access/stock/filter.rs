//! The instant as a micro-pause: filters come in on all disks, and bitmaps switch, while the guest stands still.

use super::{Features, StockAccess, Subject, bitmap, micros, qom_path};
use crate::{
    access::{AccessError, watchdog::Watchdog},
    archive::Consistency,
    journal::Step,
    qmp::{
        QmpError, Session,
        command::block::{
            BlockdevAdd, Cont, Driver, NodeRef, OnCbwError, QomSet, QueryStatus, Status, Stop, Transaction,
        },
    },
};
use jiff::Timestamp;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How long we try to resume the guest ourselves. The watchdog goes on after that.
const RESUME_LIMIT: Duration = Duration::from_secs(30);
const RESUME_PAUSE: Duration = Duration::from_millis(100);

impl StockAccess {
    /// Adds the filters, not yet above the disks. Done before the pause, as it may fail and takes time.
    pub(super) async fn add_filters(
        &self,
        session: &mut Session,
        subjects: &[Subject],
        features: &Features,
    ) -> Result<(), AccessError> {
        for subject in subjects {
            self.record(&Step::Filter {
                name: subject.filter.clone(),
                qom_path: qom_path(&subject.disk.qdev),
                below: subject.root.clone(),
            })?;
            let driver = Driver::CopyBeforeWrite {
                file: NodeRef::Name(subject.root.clone()),
                target: NodeRef::Name(subject.fleecing.clone()),
                on_cbw_error: OnCbwError::BreakSnapshot,
                cbw_timeout: features.cbw_timeout,
            };
            session
                // The guest's own discards go on working.
                .execute(&BlockdevAdd::new(&subject.filter, driver).unmap())
                .await
                .map_err(AccessError::qmp("cannot add the filter", Some(&subject.disk.name)))?;
            self.point()?;
        }
        Ok(())
    }

    /// Pauses the guest if it runs, switches, resumes it. A guest that does not run is left as it is.
    pub(super) async fn pause_and_insert(
        &self,
        session: &mut Session,
        subjects: &[Subject],
        mut watchdog: Option<Watchdog>,
        consistency: &mut Consistency,
    ) -> Result<Timestamp, AccessError> {
        // No fsync while the guest waits.
        for subject in subjects {
            self.record(&subject.bitmap_step())?;
        }
        let before = status(session).await?;
        let instant;
        if may_run(&before) {
            if let Some(watchdog) = &mut watchdog {
                watchdog.before_pause().await?;
            }
            self.record(&Step::Paused)?;
            let since = Instant::now();
            let inserted = self.stop_and_insert(session, subjects).await;
            #[cfg(test)]
            if let Err(AccessError::Killed(_)) = inserted {
                return inserted;
            }
            let resumed = self.resume(session).await;
            consistency.paused_micros = micros(since.elapsed());
            match resumed {
                Ok(()) => {
                    if let Some(watchdog) = &mut watchdog {
                        let _ = watchdog.after_resume().await;
                    }
                    self.record(&Step::Resumed)?;
                }
                // The watchdog is dropped, which sets it off.
                Err(error) => return Err(inserted.err().unwrap_or(error)),
            }
            instant = inserted?;
        } else {
            consistency.was_paused = true;
            instant = Timestamp::now();
            self.switch(session, subjects).await?;
        }
        if let Some(watchdog) = watchdog {
            watchdog.disarm().await;
        }
        Ok(instant)
    }

    async fn stop_and_insert(&self, session: &mut Session, subjects: &[Subject]) -> Result<Timestamp, AccessError> {
        session.execute(&Stop {}).await.map_err(AccessError::qmp("cannot pause the guest", None))?;
        self.point()?;
        let instant = Timestamp::now();
        self.switch(session, subjects).await?;
        Ok(instant)
    }

    /// Bitmaps of all disks, then their filters. The guest does not run.
    async fn switch(&self, session: &mut Session, subjects: &[Subject]) -> Result<(), AccessError> {
        let actions = subjects.iter().flat_map(|s| bitmap::switch(&s.root, &s.bitmap, s.granularity)).collect();
        session
            .execute(&Transaction { actions })
            .await
            .map_err(AccessError::qmp("cannot switch the dirty bitmaps", None))?;
        self.point()?;
        for subject in subjects {
            session
                .execute(&QomSet {
                    path: qom_path(&subject.disk.qdev),
                    property: "drive".into(),
                    value: subject.filter.as_str().into(),
                })
                .await
                .map_err(AccessError::qmp("cannot insert the filter", Some(&subject.disk.name)))?;
            self.point()?;
        }
        Ok(())
    }

    /// Lets the guest run again if it is paused. Over new connections too: nothing else matters now.
    async fn resume(&self, session: &mut Session) -> Result<(), AccessError> {
        let deadline = Instant::now() + RESUME_LIMIT;
        let mut error = match resume_over(session).await {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        while Instant::now() < deadline {
            tracing::warn!(%error, "cannot resume the guest yet");
            sleep(RESUME_PAUSE).await;
            error = match self.qmp.session().await {
                Err(error) => error,
                Ok(mut fresh) => match resume_over(&mut fresh).await {
                    Ok(()) => return Ok(()),
                    Err(error) => error,
                },
            };
        }
        Err(AccessError::qmp("cannot resume the guest", None)(error))
    }
}

/// A failed `stop` is as likely to have worked as not, and the guest may have stopped for reasons of its own: only `paused` is
/// ours to end.
async fn resume_over(session: &mut Session) -> Result<(), QmpError> {
    if session.execute(&QueryStatus {}).await?.status == "paused" {
        session.execute(&Cont {}).await?;
    }
    Ok(())
}

async fn status(session: &mut Session) -> Result<Status, AccessError> {
    session.execute(&QueryStatus {}).await.map_err(AccessError::qmp("cannot read the guest's run state", None))
}

/// A suspended guest may wake up at any time.
fn may_run(status: &Status) -> bool {
    status.running || status.status == "suspended"
}
