//! Setting an access up, operation by operation in the order of `src/access`.

use crate::{
    acts::{Act, Model, Next},
    rules::{self, Mutation},
    undo::{Undo, Undoing},
    world::{Bitmap, DISKS, EVERY, Kind, Run, Switch, World, name, seen, transact},
};
use pvebackup::protocol::{
    Ended, Teardown,
    bitmap::{Change, flaw},
};

/// One operation of a set-up, in the order of `src/access`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Op {
    NoteFrozen,
    Freeze,
    NotePaused,
    Stop,
    /// Jobs or filters, and the switch of bitmaps.
    NoteAccess,
    Switch,
    Snapshot(usize),
    SwitchAndSnapshot,
    OldStops,
    NewStartsAndSnapshot,
    ProxmoxSetUp,
    Continue,
    NoteResumed,
    Thaw,
    NoteThawed,
    NoteExport,
    Export,
}

impl Op {
    fn label(self) -> &'static str {
        match self {
            Self::NoteFrozen => "journal: frozen",
            Self::Freeze => "the guest is frozen",
            Self::NotePaused => "journal: paused",
            Self::Stop => "the guest is paused",
            Self::NoteAccess => "journal: bitmaps and access",
            Self::Switch => "the bitmaps switch",
            Self::Snapshot(0) => "the filter of disk 0 goes in",
            Self::Snapshot(_) => "the filter of disk 1 goes in",
            Self::SwitchAndSnapshot => "one transaction: bitmaps switch, snapshots begin",
            Self::OldStops => "the old bitmaps stop",
            Self::NewStartsAndSnapshot => "the new bitmaps start, snapshots begin",
            Self::ProxmoxSetUp => "backup-access-setup",
            Self::Continue => "the guest continues",
            Self::NoteResumed => "journal: resumed",
            Self::Thaw => "the guest is thawed",
            Self::NoteThawed => "journal: thawed",
            Self::NoteExport => "journal: exports",
            Self::Export => "the snapshots are exported",
        }
    }

    /// Those on the journal need no QEMU.
    fn needs_qemu(self) -> bool {
        !matches!(
            self,
            Self::NoteFrozen
                | Self::NotePaused
                | Self::NoteAccess
                | Self::NoteResumed
                | Self::NoteThawed
                | Self::NoteExport
        )
    }
}

impl Model {
    pub fn set_up(&self, world: &World, run: &Run, next: &mut Vec<Next>) {
        if run.unwinding {
            match self.undo(world, run, Undoing::Teardown(Teardown::Failure)) {
                Undo::Step(label, after) => {
                    next.push((Act::Step(label), after));
                    next.push((Act::Fails(label), self.ended(world.clone(), Ended::Left)));
                }
                Undo::Finished => {
                    next.push((Act::Step("the set-up is undone"), self.ended(world.clone(), Ended::Failed)));
                }
            }
            return;
        }
        let ops = self.ops(run);
        let op = ops[usize::from(run.at)];
        let unwound = |mut world: World| {
            if let Some(run) = &mut world.run {
                run.unwinding = true;
            }
            world
        };
        // Stock access compares the process with the one that it checked.
        let other_qemu = !run.same_qemu && (self.kind != Kind::Proxmox || run.at > 0);
        if !(other_qemu && op.needs_qemu()) {
            match self.operate(world, run, op) {
                Ok(after) => {
                    let done = usize::from(run.at) + 1 == ops.len();
                    let mut on = after.clone();
                    if let Some(run) = &mut on.run {
                        run.at += 1;
                    }
                    next.push((Act::Step(op.label()), if done { self.ended(on, Ended::Done) } else { Ok(on) }));
                    if op.needs_qemu() {
                        next.push((Act::Fails("the answer of QEMU"), Ok(unwound(after))));
                    }
                }
                Err(broken) => next.push((Act::Step(op.label()), Err(broken))),
            }
        }
        next.push((Act::Fails(op.label()), Ok(unwound(world.clone()))));
    }

    fn ops(&self, run: &Run) -> Vec<Op> {
        let freeze: &[Op] = if run.freezes { &[Op::NoteFrozen, Op::Freeze] } else { &[] };
        let thaw: &[Op] = if run.freezes { &[Op::Thaw, Op::NoteThawed] } else { &[] };
        let pause: &[Op] = &[Op::NotePaused, Op::Stop];
        let resume: &[Op] = &[Op::Continue, Op::NoteResumed];
        let several = run.chosen.iter().filter(|chosen| **chosen).count() > 1;
        let access: Vec<&[Op]> = match self.kind {
            Kind::Transaction if self.mutation == Some(Mutation::SwitchInTwoSteps) => {
                vec![freeze, &[Op::NoteAccess, Op::OldStops, Op::NewStartsAndSnapshot], thaw]
            }
            Kind::Transaction => vec![freeze, &[Op::NoteAccess, Op::SwitchAndSnapshot], thaw],
            Kind::MicroPause => {
                let filters: &[Op] = if self.disks == 1 {
                    &[Op::Switch, Op::Snapshot(0)]
                } else {
                    &[Op::Switch, Op::Snapshot(0), Op::Snapshot(1)]
                };
                vec![freeze, &[Op::NoteAccess], pause, filters, resume, thaw]
            }
            Kind::Proxmox if run.freezes => vec![freeze, &[Op::NoteAccess, Op::ProxmoxSetUp], thaw],
            Kind::Proxmox if several => vec![pause, &[Op::NoteAccess, Op::ProxmoxSetUp], resume],
            Kind::Proxmox => vec![&[Op::NoteAccess, Op::ProxmoxSetUp]],
        };
        let mut export = [Op::NoteExport, Op::Export];
        if self.mutation == Some(Mutation::NoteAfterEffect) {
            export.reverse();
        }
        [&access.concat()[..], &export].concat()
    }

    fn operate(&self, world: &World, run: &Run, op: Op) -> Result<World, String> {
        let (mut after, mut r) = (world.clone(), run.clone());
        let target = self.bitmaps_of(run.target);
        let watched = self.mutation != Some(Mutation::NoWatchdog);
        let chosen: Vec<usize> = (0..DISKS).filter(|place| run.chosen[*place]).collect();
        match op {
            Op::NoteFrozen => (after.journal.frozen, r.watched) = (true, watched),
            Op::NotePaused => (after.journal.paused, r.watched) = (true, watched),
            Op::Freeze => after.frozen = true,
            Op::Stop => after.paused = true,
            Op::Continue => after.paused = false,
            Op::Thaw => after.frozen = false,
            Op::NoteResumed => (after.journal.paused, r.watched) = (false, watched && after.journal.frozen),
            Op::NoteThawed => (after.journal.frozen, r.watched) = (false, watched && after.journal.paused),
            Op::NoteAccess => {
                after.journal.access = Some(target);
                for place in chosen.into_iter().filter(|_| self.kind != Kind::Proxmox) {
                    // Whether the old one is of any use is looked up before the instant.
                    let old = run.base[place].and(run.old[place]);
                    let disk = &mut after.disks[place];
                    let usable = |old: &u8| disk.bitmap(target, *old).is_some_and(|b| flaw(seen(*b)).is_none());
                    let replaces = old.filter(usable);
                    r.used[place] = replaces.is_some();
                    after.journal.switched[place] = Some(Switch { target, generation: r.generation, replaces });
                }
            }
            Op::Switch | Op::SwitchAndSnapshot | Op::OldStops | Op::NewStartsAndSnapshot => {
                for place in chosen {
                    let old = world.journal.switched[place].and_then(|switch| switch.replaces);
                    let (new, old) = (name(target, r.generation), old.map(|old| name(target, old)));
                    let mut changes = rules::switching(self.mutation, new, old);
                    match op {
                        Op::OldStops => changes.retain(|change| !matches!(change, Change::Add(_))),
                        Op::NewStartsAndSnapshot => changes.retain(|change| matches!(change, Change::Add(_))),
                        _ => {}
                    }
                    let disk = &mut after.disks[place];
                    // What is read of the old one is read through its export, so it has to be kept for the copy.
                    if changes.iter().any(|change| matches!(change, Change::Remove(_))) {
                        r.used[place] = false;
                    }
                    transact(disk, &changes)?;
                    if matches!(op, Op::SwitchAndSnapshot | Op::NewStartsAndSnapshot) {
                        disk.snapshot = Some(disk.content);
                    }
                }
            }
            Op::Snapshot(place) => {
                let disk = &mut after.disks[place];
                disk.snapshot = run.chosen[place].then_some(disk.content);
            }
            Op::ProxmoxSetUp => {
                for place in chosen {
                    let disk = &mut after.disks[place];
                    let existing = disk.bitmap(target, EVERY).copied();
                    r.used[place] = run.base[place].is_some() && existing.is_some_and(|b| flaw(seen(b)).is_none());
                    if !r.used[place] {
                        disk.remove(target, EVERY);
                        let all = Bitmap { target, generation: EVERY, recording: false, dirty: true };
                        disk.add(all)?;
                    } else if let Some(bitmap) = disk.bitmap(target, EVERY) {
                        bitmap.recording = false;
                    }
                    disk.background = Some(false);
                    disk.snapshot = Some(disk.content);
                }
            }
            Op::NoteExport => after.journal.export = true,
            Op::Export => {
                for place in chosen {
                    after.disks[place].exported = true;
                }
            }
        }
        after.run = Some(r);
        Ok(after)
    }
}
