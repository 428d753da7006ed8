//! What a dead run of a guest left.

use super::LeftBehind;
use crate::{
    access,
    generation::Record,
    guest::GuestId,
    journal::{Journal, Step},
    qmp::Qmp,
    report::{Events, Phase},
};
use anyhow::{Context, Result, anyhow, bail};
use std::path::Path;

/// The generation of the dead run that left these steps, if the generation record says that it was committed.
pub(crate) fn committed(generations: &Path, guest: &GuestId, leftover: &[Step]) -> Option<String> {
    let (target, generation) = leftover.iter().find_map(|step| match step {
        Step::Begin { target, generation, .. } => Some((target, generation)),
        _ => None,
    })?;
    let (record, _) = Record::load(generations, target, guest.as_str());
    record.has_generation(generation).then(|| generation.clone())
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
    if leftover.is_empty() && journal.destroyed() == 0 {
        return Ok(());
    }
    let by_hand = access::by_hand::Kept::of(&leftover);
    if let Some(kept) = by_hand.as_ref().filter(|kept| !kept.qemu_is_gone()) {
        bail!(kept.in_the_way(guest));
    }
    events.phase(Phase::Recover);
    if let Some(told) = journal.set_destroyed_aside()? {
        events.warn(told);
    }
    let recorded = committed(generations, guest, &leftover);
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
