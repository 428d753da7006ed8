//! The rules: those of the program, which are called, wrapped so that a test can break one; and those that every world has to
//! obey.

use crate::{
    acts::Model,
    world::{Bitmap, DISKS, Entry, Journal, Kind, Run, World},
};
use pvebackup::{
    archive::ArchiveId,
    generation::{DiskGeneration, Facts, Record},
    guest::{Disk, DiskKind},
    journal::ProcessIdentity,
    protocol::{
        BitmapPer, Effect, End, Ended, Protocol, Teardown, after_death,
        bitmap::{Change, Seen, settle, switch},
    },
    segment::SegmentLen,
};

/// One rule broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// A failed run tears down with success: the old bits go before anything is committed.
    SuccessWithoutCommit,
    /// The old bitmap is removed, rather than stopped, when the new one begins.
    OldGoesAtTheInstant,
    /// The generation record is written before the archive is durable.
    RecordBeforeDurable,
    /// The access is torn down with success before the generation record is written.
    TeardownBeforeRecord,
    /// A record that cannot be written counts as written.
    FailedRecordCounts,
    /// A matching record is trusted without asking the provider for the archive.
    TrustUnasked,
    /// The journal is cleared before the teardown.
    ClearBeforeTeardown,
    /// The journal is told of the exports when they are there.
    NoteAfterEffect,
    /// What a dead run left is not undone.
    NoRecovery,
    /// The bits of the new bitmap are dropped instead of merged when a run fails.
    DropInsteadOfMerge,
    /// The old bitmap stops a moment before the new one starts.
    SwitchInTwoSteps,
    /// Recovery takes a dead run for committed, whatever the record says.
    RecoveryTakesAllForCommitted,
    /// Recovery takes a dead run for failed, whatever the record says.
    RecoveryTakesAllForFailed,
    /// Success removes the bitmaps of other targets, too.
    SuccessRemovesAll,
    /// The guest is held without a watchdog.
    NoWatchdog,
    /// Two records explain one bitmap: it is called the same for both.
    OneNameForTwoRecords,
}

/// The program's state machine, or one that a mutation has got into.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Machine {
    inner: Protocol,
    /// The effect that the mutation wants early was caused.
    early: bool,
}

impl Machine {
    pub fn new(leftover: bool) -> Self {
        Self { inner: Protocol::new(leftover), early: false }
    }

    /// The effect that a mutation puts before the one that is due.
    fn early(&self, mutation: Option<Mutation>) -> Option<Effect> {
        let wanted = match (mutation?, self.inner.due()) {
            (Mutation::RecordBeforeDurable, Effect::Copy) => Effect::Record,
            (Mutation::TeardownBeforeRecord, Effect::Record) => Effect::TearDown(Teardown::Success),
            (Mutation::ClearBeforeTeardown, Effect::TearDown(_)) => Effect::Clear,
            _ => return None,
        };
        (!self.early).then_some(wanted)
    }

    /// Whether a mutation leaves the effect that is due out.
    fn left_out(&self, mutation: Option<Mutation>) -> bool {
        matches!(
            (mutation, self.inner.due(), self.early),
            (Some(Mutation::NoRecovery), Effect::Recover, _)
                | (Some(Mutation::RecordBeforeDurable), Effect::Record, true)
                | (Some(Mutation::TeardownBeforeRecord), Effect::TearDown(_), true)
        )
    }

    pub fn due(&self, mutation: Option<Mutation>) -> Effect {
        if let Some(early) = self.early(mutation) {
            return early;
        }
        match (mutation, self.inner.due()) {
            (Some(Mutation::SuccessWithoutCommit), Effect::TearDown(_)) => Effect::TearDown(Teardown::Success),
            (_, due) => due,
        }
    }

    /// What is due without a mutation.
    pub fn really_due(&self) -> Effect {
        self.inner.due()
    }

    pub fn ended(&mut self, mutation: Option<Mutation>, mut how: Ended) {
        if self.early(mutation).is_some() {
            self.early = how == Ended::Done;
            if how != Ended::Done {
                self.inner.ended(how);
            }
        } else {
            if mutation == Some(Mutation::FailedRecordCounts) && self.inner.due() == Effect::Record {
                how = Ended::Done;
            }
            self.inner.ended(how);
        }
        self.leave_out(mutation);
    }

    pub fn leave_out(&mut self, mutation: Option<Mutation>) {
        while self.left_out(mutation) {
            self.inner.ended(Ended::Done);
        }
    }
}

/// How recovery ends an access.
pub fn ending(mutation: Option<Mutation>, bitmaps: BitmapPer, recorded: bool) -> Teardown {
    match mutation {
        Some(Mutation::RecoveryTakesAllForCommitted) => Teardown::Success,
        Some(Mutation::RecoveryTakesAllForFailed) => after_death(bitmaps, false),
        _ => after_death(bitmaps, recorded),
    }
}

/// What happens to bitmaps at the instant.
pub fn switching<'a>(mutation: Option<Mutation>, new: &'a str, old: Option<&'a str>) -> Vec<Change<'a>> {
    let mut changes = switch(new, old);
    for change in &mut changes {
        if let (Some(Mutation::OldGoesAtTheInstant), Change::Disable(old)) = (mutation, *change) {
            *change = Change::Remove(old);
        }
    }
    changes
}

/// What happens to bitmaps at the end. `now` are all on the disk, those of other targets with `false`.
pub fn settling<'a>(
    mutation: Option<Mutation>,
    now: &[(&'a str, Seen, bool)],
    new: &'a str,
    replaces: Option<&'a str>,
    how: Teardown,
) -> Vec<Change<'a>> {
    let all = mutation == Some(Mutation::SuccessRemovesAll);
    let concerned: Vec<_> =
        now.iter().filter(|(_, _, ours)| *ours || all).map(|(name, seen, _)| (*name, *seen)).collect();
    let mut changes = settle(&concerned, new, replaces, how);
    if mutation == Some(Mutation::DropInsteadOfMerge) {
        changes.retain(|change| !matches!(change, Change::Merge { .. }));
    }
    changes
}

fn process(same: bool) -> ProcessIdentity {
    ProcessIdentity { pid: 1, start_time: u64::from(!same), boot_id: "boot".into() }
}

fn segment_len() -> SegmentLen {
    SegmentLen::new(1 << 20).unwrap()
}

/// The program's record for what the model knows of it.
pub fn record(entries: &[Option<Entry>; DISKS]) -> Record {
    let mut record = Record::default();
    for (place, entry) in entries.iter().enumerate() {
        let Some(entry) = entry else { continue };
        record.set(
            DISK_NAMES[place],
            DiskGeneration {
                generation: entry.generation.to_string(),
                repository: if entry.same_repository { "this" } else { "another" }.into(),
                archive: ArchiveId(entry.generation.to_string()),
                qemu: process(entry.same_qemu),
                device: DISK_NAMES[place].into(),
                identity: "image".into(),
                node: "node".into(),
                size: 1 << 20,
                segment_len: segment_len().bytes(),
                bitmap: "bitmap".into(),
                granularity: 1 << 20,
            },
        );
    }
    record
}

const DISK_NAMES: [&str; DISKS] = ["scsi0", "virtio1"];

/// Whether the program's record matches the present for a disk.
pub fn judged(record: &Record, place: usize) -> bool {
    let disk = Disk {
        name: DISK_NAMES[place].into(),
        device: DISK_NAMES[place].into(),
        kind: DiskKind::Drive,
        qdev: DISK_NAMES[place].into(),
        node: "node".into(),
        driver: "raw".into(),
        size: 1 << 20,
        identity: "image".into(),
        volume: None,
    };
    record.judge(&disk, segment_len(), &Facts { repository: "this", qemu: &process(true) }).is_ok()
}

/// What must be true of an archive that is durable: every disk is what the snapshot shows.
pub fn archive_is_right(world: &World, run: &Run) -> Result<(), String> {
    for place in 0..DISKS {
        if run.chosen[place] && run.archive[place] != world.disks[place].snapshot {
            let which = if run.used[place] { "an incremental misses a write" } else { "a full archive is wrong" };
            return Err(format!("{which}: disk {place} in the archive is not the disk at the instant"));
        }
    }
    Ok(())
}

/// What must be true at the end of a run that committed and left nothing.
pub fn commit_is_right(world: &World, run: &Run, end: End, model: &Model) -> Result<(), String> {
    if end != End::Committed || !run.same_qemu {
        return Ok(());
    }
    for place in (0..DISKS).filter(|place| run.chosen[*place]) {
        let mut bitmaps = world.disks[place].bitmaps().filter(|b| b.target == model.bitmaps_of(run.target));
        let only = bitmaps.next();
        let right = |b: &Bitmap| model.kind == Kind::Proxmox || b.generation == run.generation;
        if !only.as_ref().is_some_and(right) || bitmaps.next().is_some() {
            return Err(format!("after a commit disk {place} has other bitmaps than the generation's: {only:?}"));
        }
    }
    Ok(())
}

/// What must be true of every world.
pub fn check(world: &World, model: &Model) -> Result<(), String> {
    let journal = &world.journal;
    let unjournaled = |what: &str| Err(format!("{what} in QEMU, but the journal does not tell"));
    for disk in &world.disks {
        if disk.snapshot.is_some() && journal.access.is_none() {
            return unjournaled("a snapshot access is");
        }
        if disk.exported && !journal.export {
            return unjournaled("an export is");
        }
    }
    if world.run.is_none() && !world.watchdog && !world.guest_runs() {
        return Err("the guest is left paused or frozen, and nobody is there to release it".into());
    }
    if world.paused && !journal.paused || world.frozen && !journal.frozen {
        return unjournaled("a pause or freeze is");
    }
    if world.run.is_some() || *journal != Journal::default() {
        return Ok(());
    }
    // Nothing is under way, and nothing is left to recover.
    for (place, disk) in world.disks.iter().enumerate() {
        if let Some(bitmap) = disk.bitmaps().find(|b| !b.recording) {
            return Err(format!("a bitmap of disk {place} is left stopped: {bitmap:?}"));
        }
        for (target, entries) in world.records.iter().enumerate() {
            let Some(entry) = entries[place].filter(|e| e.same_qemu && !e.doubtful) else { continue };
            let named = |b: Bitmap| {
                b.target == model.bitmaps_of(target as u8)
                    && (model.kind == Kind::Proxmox || b.generation == entry.generation)
            };
            if !disk.bitmaps().any(named) {
                return Err(format!(
                    "the generation record of disk {place} in target {target} names a bitmap that is gone: a full backup for nothing"
                ));
            }
        }
    }
    Ok(())
}
