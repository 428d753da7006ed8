//! The instant as one transaction of backup jobs: no pause, and all or nothing.

use super::{Features, StockAccess, Subject, bitmap};
use crate::{
    access::AccessError,
    journal::Step,
    qmp::{
        Session,
        command::block::{Action, Backup, OnCbwError, Transaction},
    },
};
use jiff::Timestamp;

impl StockAccess {
    /// Switches bitmaps and starts a job with a filter on every disk.
    pub(super) async fn transact(
        &self,
        session: &mut Session,
        subjects: &[Subject],
        features: &Features,
    ) -> Result<Timestamp, AccessError> {
        let mut actions = Vec::new();
        for subject in subjects {
            self.record(&subject.bitmap_step())?;
            self.record(&Step::Job { id: subject.job.clone() })?;
            actions.extend(bitmap::switch(&subject.root, &subject.bitmap, subject.granularity));
            actions.push(Action::Backup(Backup {
                job_id: subject.job.clone(),
                device: subject.root.clone(),
                target: subject.fleecing.clone(),
                // Copy what is about to be overwritten, and nothing else.
                sync: "none",
                filter_node_name: subject.filter.clone(),
                on_cbw_error: features.on_cbw_error.then_some(OnCbwError::BreakSnapshot),
            }));
        }
        let instant = Timestamp::now();
        session
            .execute(&Transaction { actions })
            .await
            .map_err(AccessError::qmp("cannot start the snapshot of all disks", None))?;
        self.point()?;
        Ok(instant)
    }
}

impl Subject {
    /// What the journal says about the switch of bitmaps.
    pub(super) fn bitmap_step(&self) -> Step {
        Step::Bitmap { node: self.root.clone(), name: self.bitmap.new.clone(), replaces: self.bitmap.old.clone() }
    }
}
