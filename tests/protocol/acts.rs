//! Everything that can happen next in a world: a step of the run, its failure, its death, and what others do.

use crate::{
    rules::{self, Machine, Mutation},
    undo::{Undo, Undoing},
    world::{Begun, DISKS, Disk, EVERY, Entry, Journal, Kind, MISSING, Run, World},
};
use pvebackup::protocol::{Effect, End, Ended};
use std::fmt;

/// What happened.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Act {
    Start { target: usize, chosen: [bool; DISKS], full: bool, freezes: bool },
    Step(&'static str),
    Fails(&'static str),
    Dies,
    GuestWrites(usize),
    QemuRestarts,
    WatchdogReleases,
    ArchiveGoes(usize, usize),
    ArchiveReturns(usize, usize),
    AnotherRepository(usize, usize),
    RepositoryReturns(usize, usize),
    RecordIsLost(usize),
}

impl fmt::Display for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Start { target, chosen, full, freezes } => {
                let disks: Vec<String> = (0..DISKS).filter(|d| chosen[*d]).map(|d| d.to_string()).collect();
                write!(f, "a backup of disk {} to target {target} starts", disks.join("+"))?;
                write!(f, "{}{}", if *full { ", full" } else { "" }, if *freezes { ", with a freeze" } else { "" })
            }
            Self::Step(what) => write!(f, "  {what}"),
            Self::Fails(what) => write!(f, "  {what}: fails"),
            Self::Dies => write!(f, "THE RUN IS KILLED"),
            Self::GuestWrites(disk) => write!(f, "the guest writes to disk {disk}"),
            Self::QemuRestarts => write!(f, "QEMU ends, and another starts"),
            Self::WatchdogReleases => write!(f, "the watchdog releases the guest"),
            Self::ArchiveGoes(target, disk) => {
                write!(f, "the last archive of disk {disk} in target {target} is deleted")
            }
            Self::ArchiveReturns(target, disk) => write!(f, "the archive of disk {disk} is in target {target} again"),
            Self::AnotherRepository(target, disk) => {
                write!(f, "target {target} is another repository (disk {disk})")
            }
            Self::RepositoryReturns(target, disk) => {
                write!(f, "target {target} is the former repository again (disk {disk})")
            }
            Self::RecordIsLost(target) => write!(f, "the generation record of target {target} is lost"),
        }
    }
}

/// The step after which the archive is compared with the disks.
pub const COPIED: &str = "everything is copied, and durable";

/// A world that can follow, or the rule that is broken on the way.
pub type Next = (Act, Result<World, String>);

/// What is searched.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    pub kind: Kind,
    pub disks: usize,
    pub targets: usize,
    /// Leaves out what befalls one disk and one target like several: freezes, full backups on demand, another QEMU, lost
    /// archives and records. What is left is what several can do to each other.
    pub calm: bool,
    pub mutation: Option<Mutation>,
}

impl Model {
    /// Everything that can happen next. What a run does if all goes well comes first.
    pub fn next(&self, world: &World) -> Vec<Next> {
        let mut next = Vec::new();
        if let Some(run) = &world.run {
            self.run(world, run, &mut next);
            let mut dead = world.clone();
            dead.run = None;
            dead.watchdog |= run.watched && !world.guest_runs();
            next.push((Act::Dies, Ok(dead)));
        } else {
            for target in 0..self.targets {
                for chosen in self.choices() {
                    let ways = [(false, false), (false, true), (true, false)];
                    for (full, freezes) in ways.into_iter().take(if self.calm { 1 } else { 3 }) {
                        next.push(self.start(world, target, chosen, full, freezes));
                    }
                }
            }
        }
        self.others(world, &mut next);
        next
    }

    /// What a target's bitmaps are called after.
    pub fn bitmaps_of(&self, target: u8) -> u8 {
        if self.mutation == Some(Mutation::OneNameForTwoRecords) { 0 } else { target }
    }

    fn choices(&self) -> Vec<[bool; DISKS]> {
        if self.disks == 1 { vec![[true, false]] } else { vec![[true, true], [true, false], [false, true]] }
    }

    /// A run to every target that nothing befalls: whatever was left does not stand in its way, and it leaves nothing.
    ///
    /// # Errors
    /// The rule that is broken, and the acts that lead there.
    pub fn undisturbed(&self, world: &World) -> Result<(), (String, Vec<Act>)> {
        for target in 0..self.targets {
            let chosen = std::array::from_fn(|place| place < self.disks);
            let mut acts = Vec::new();
            let mut next = Some(self.start(world, target, chosen, false, false));
            let mut world = world.clone();
            while let Some((act, after)) = next {
                acts.push(act);
                let checked = after.and_then(|after| rules::check(&after, self).map(|()| after));
                match checked {
                    Ok(after) => world = after,
                    Err(rule) => return Err((rule, acts)),
                }
                next = world.run.as_ref().and_then(|_| self.next(&world).into_iter().next());
            }
            let committed = world.records[target].iter().take(self.disks).all(|e| e.is_some_and(|e| e.present));
            if !committed || world.journal != Journal::default() {
                return Err(("the next run does not clean up and commit, although nothing befalls it".into(), acts));
            }
        }
        Ok(())
    }

    fn start(&self, world: &World, target: usize, chosen: [bool; DISKS], full: bool, freezes: bool) -> Next {
        let mut next = world.clone();
        let mut machine = Machine::new(world.journal != Journal::default());
        machine.leave_out(self.mutation);
        next.run = Some(Run {
            machine,
            target: target as u8,
            chosen,
            full,
            generation: World::fresh_generation(),
            same_qemu: true,
            at: 0,
            unnoted: false,
            unwinding: false,
            recorded: false,
            freezes,
            watched: false,
            base: [None; DISKS],
            old: [None; DISKS],
            used: [false; DISKS],
            archive: [None; DISKS],
            durable: false,
        });
        (Act::Start { target, chosen, full, freezes }, Ok(next))
    }

    /// Guest, QEMU, watchdog, and whoever has a hand on repository and records.
    fn others(&self, world: &World, next: &mut Vec<Next>) {
        let mut push = |act, change: &dyn Fn(&mut World)| {
            let mut other = world.clone();
            change(&mut other);
            next.push((act, Ok(other)));
        };
        let due = world.run.as_ref().map(|run| run.machine.due(self.mutation));
        if world.guest_runs() {
            for disk in 0..self.disks {
                push(Act::GuestWrites(disk), &|w| w.write(disk));
            }
        }
        // The set-up has QEMU's only monitor.
        if world.watchdog && due != Some(Effect::SetUp) {
            push(Act::WatchdogReleases, &|w| (w.watchdog, w.paused, w.frozen) = (false, false, false));
        }
        if self.calm {
            return;
        }
        push(Act::QemuRestarts, &|w| {
            w.qemu_restarts();
            if due == Some(Effect::SetUp)
                && let Some(run) = w.run.as_mut().filter(|run| run.at > 0)
            {
                run.unwinding = true;
            }
        });
        for target in 0..self.targets {
            for disk in 0..self.disks {
                let Some(entry) = world.records[target][disk] else { continue };
                let act = if entry.present { Act::ArchiveGoes } else { Act::ArchiveReturns };
                push(act(target, disk), &|w| {
                    w.records[target][disk] = Some(Entry { present: !entry.present, ..entry });
                });
                if world.run.is_none() {
                    let act = if entry.same_repository { Act::AnotherRepository } else { Act::RepositoryReturns };
                    push(act(target, disk), &|w| {
                        let same_repository = !entry.same_repository;
                        w.records[target][disk] = Some(Entry { same_repository, ..entry });
                    });
                }
            }
            if world.run.is_none() && world.records[target].iter().any(Option::is_some) {
                push(Act::RecordIsLost(target), &|w| w.records[target] = [None; DISKS]);
            }
        }
    }

    /// The run's own steps.
    fn run(&self, world: &World, run: &Run, next: &mut Vec<Next>) {
        let simple = |label: &'static str, change: &dyn Fn(&mut World, &mut Run), next: &mut Vec<Next>| {
            let (mut after, mut r) = (world.clone(), run.clone());
            change(&mut after, &mut r);
            after.run = Some(r);
            next.push((Act::Step(label), self.ended(after, Ended::Done)));
            next.push((Act::Fails(label), self.ended(world.clone(), Ended::Failed)));
        };
        match run.machine.due(self.mutation) {
            Effect::Recover | Effect::UndoAgain if run.at == 0 => {
                let due = run.machine.due(self.mutation);
                let mut after = world.clone();
                let recorded = due == Effect::Recover
                    && world.journal.begun.is_some_and(|begun| {
                        let record = rules::record(&world.records[usize::from(begun.target)]);
                        record.has_generation(&begun.generation.to_string())
                    });
                if let Some(r) = &mut after.run {
                    (r.at, r.recorded) = (1, recorded);
                }
                let label = if recorded { "recovery: the dead run had committed" } else { "recovery: it had not" };
                next.push((Act::Step(label), Ok(after)));
            }
            Effect::Recover | Effect::UndoAgain => match self.undo(world, run, Undoing::Recovery) {
                Undo::Step(label, after) => {
                    next.push((Act::Step(label), after));
                    next.push((Act::Fails(label), self.ended(world.clone(), Ended::Failed)));
                }
                Undo::Finished => {
                    simple("journal: cleared", &|w, _| w.journal = Journal::default(), next);
                }
            },
            Effect::Look => {
                let record = rules::record(&world.records[usize::from(run.target)]);
                simple(
                    "the record is compared with the present",
                    &|w, r| {
                        r.same_qemu = true;
                        for place in (0..DISKS).filter(|place| run.chosen[*place] && !run.full) {
                            let entry = w.records[usize::from(run.target)][place];
                            if let Some(entry) = entry.filter(|_| rules::judged(&record, place)) {
                                (r.base[place], r.old[place]) = (Some(entry.content), Some(entry.generation));
                            }
                        }
                    },
                    next,
                );
            }
            Effect::Confirm => simple(
                "the provider is asked for the archives",
                &|w, r| {
                    for place in 0..DISKS {
                        let there = w.records[usize::from(run.target)][place]
                            .is_some_and(|entry| entry.present && entry.same_repository);
                        if there || r.base[place].is_none() {
                            continue;
                        }
                        if self.mutation == Some(Mutation::TrustUnasked) {
                            r.base[place] = Some(MISSING);
                        } else {
                            (r.base[place], r.old[place]) = (None, None);
                        }
                    }
                },
                next,
            ),
            Effect::Check => {
                let in_the_way = |disk: &Disk| disk.snapshot.is_some() || disk.background.is_some() || disk.exported;
                if world.disks.iter().any(in_the_way) {
                    next.push((Act::Fails("the check"), self.ended(world.clone(), Ended::Failed)));
                } else {
                    simple("the check finds nothing in the way", &|_, _| {}, next);
                }
            }
            Effect::Begin => simple(
                "journal: begun",
                &|w, r| {
                    let begun = Begun { target: r.target, generation: r.generation, same_qemu: r.same_qemu };
                    w.journal.begun = Some(begun);
                },
                next,
            ),
            Effect::SetUp => self.set_up(world, run, next),
            Effect::Copy => self.copy(world, run, next),
            Effect::NoteStored => simple("journal: the archive is durable", &|_, _| {}, next),
            Effect::Record => self.record(world, run, next),
            Effect::TearDown(how) => match self.undo(world, run, Undoing::Teardown(how)) {
                Undo::Step(label, after) => {
                    next.push((Act::Step(label), after));
                    next.push((Act::Fails(label), self.ended(world.clone(), Ended::Failed)));
                    next.push((Act::Fails("something is left behind"), self.ended(world.clone(), Ended::Left)));
                }
                Undo::Finished => {
                    next.push((Act::Step("the teardown is done"), self.ended(world.clone(), Ended::Done)));
                }
            },
            Effect::Clear => simple("journal: cleared", &|w, _| w.journal = Journal::default(), next),
            Effect::End(_) => unreachable!("a run at its end is gone"),
        }
    }

    /// The effect that was due has ended.
    pub fn ended(&self, mut world: World, how: Ended) -> Result<World, String> {
        let Some(mut run) = world.run.take() else { return Ok(world) };
        run.machine.ended(self.mutation, how);
        run.forget();
        if let Effect::End(end) = run.machine.due(self.mutation) {
            self.finished(&mut world, &run, end)?;
        } else {
            world.run = Some(run);
        }
        Ok(world)
    }

    fn finished(&self, world: &mut World, run: &Run, end: End) -> Result<(), String> {
        world.watchdog |= run.watched && !world.guest_runs();
        rules::commit_is_right(world, run, end, self)
    }

    /// Every disk from its snapshot, or from the archive that it builds on where the bitmap says that it is the same.
    fn copy(&self, world: &World, run: &Run, next: &mut Vec<Next>) {
        if run.at == 1 {
            next.push((Act::Step("the provider says that it is durable"), self.ended(world.clone(), Ended::Done)));
            next.push((Act::Fails("the provider, after that"), self.ended(world.clone(), Ended::Failed)));
            return;
        }
        let mut after = world.clone();
        let mut r = run.clone();
        let mut readable = true;
        for place in (0..DISKS).filter(|place| run.chosen[*place]) {
            let disk = &mut after.disks[place];
            readable &= disk.exported && disk.snapshot.is_some();
            let generation = if self.kind == Kind::Proxmox { Some(EVERY) } else { run.old[place] };
            let old = generation.and_then(|generation| disk.bitmap(self.bitmaps_of(run.target), generation).copied());
            let clean = run.used[place] && old.is_some_and(|old| !old.dirty);
            r.archive[place] = if clean { run.base[place] } else { disk.snapshot };
        }
        if readable {
            r.durable = true;
            r.at = 1;
            let right = rules::archive_is_right(&after, &r);
            after.run = Some(r.clone());
            next.push((Act::Step(COPIED), right.map(|()| after.clone())));
            // A repository that lies, or loses it at once.
            r.durable = false;
            after.run = Some(r);
            if !self.calm {
                next.push((Act::Step("the provider claims that it is durable"), self.ended(after, Ended::Done)));
            }
        }
        next.push((Act::Fails("the copy"), self.ended(world.clone(), Ended::Failed)));
    }

    fn record(&self, world: &World, run: &Run, next: &mut Vec<Next>) {
        let write = |doubtful: bool| {
            let mut after = world.clone();
            for place in (0..DISKS).filter(|place| run.chosen[*place]) {
                let content = run.archive[place].ok_or("the record names an archive that was never stored")?;
                after.records[usize::from(run.target)][place] = Some(Entry {
                    generation: run.generation,
                    content,
                    present: run.durable,
                    same_repository: true,
                    same_qemu: run.same_qemu,
                    doubtful,
                });
            }
            Ok(after)
        };
        let label = "the generation record is written";
        next.push((Act::Step(label), write(false).and_then(|after| self.ended(after, Ended::Done))));
        next.push((Act::Fails(label), self.ended(world.clone(), Ended::Failed)));
        // The new file is in place, but the directory cannot be flushed.
        let label = "the flush of the generation record's directory";
        next.push((Act::Fails(label), write(true).and_then(|after| self.ended(after, Ended::Failed))));
    }
}
