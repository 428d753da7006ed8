//! Everything around the protocol, as small as it can be: a QEMU with two disks of one block each, the bitmaps of two targets,
//! what is on this host (journal, generation records), and the archives that the records name.
//!
//! One block a disk is enough: every rule treats a block like any other, so a write that is missed in one is missed. Contents
//! and generations are numbers that only have to be told from each other; they are renumbered after every step, so that
//! any number of writes and runs leads to finitely many worlds.

use crate::rules::Machine;
use pvebackup::protocol::{
    Effect,
    bitmap::{Change, Seen},
};
use std::sync::LazyLock;

pub const DISKS: usize = 2;
pub const TARGETS: usize = 2;
/// More bitmaps than this on a disk are a leak.
pub const MAX_BITMAPS: usize = 7;
/// The content of a block whose archive is gone.
pub const MISSING: u8 = u8::MAX;
/// The generation of a bitmap that is all generations'.
pub const EVERY: u8 = u8::MAX;
/// Until it is renumbered.
const FRESH: u8 = 200;

/// How the snapshot access works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Stock QEMU: one transaction.
    Transaction,
    /// Stock QEMU: filters and bitmaps change during a micro-pause.
    MicroPause,
    /// Proxmox VE's QEMU.
    Proxmox,
}

/// A dirty bitmap for the only block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Bitmap {
    pub target: u8,
    /// Part of its name on stock QEMU; [`EVERY`] on Proxmox's.
    pub generation: u8,
    pub recording: bool,
    pub dirty: bool,
}

/// A disk and what QEMU has on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Disk {
    pub content: u8,
    /// What the snapshot shows, while there is one.
    pub snapshot: Option<u8>,
    /// Bits of Proxmox's background bitmap, while there is an access.
    pub background: Option<bool>,
    pub exported: bool,
    bitmaps: [Option<Bitmap>; MAX_BITMAPS],
}

impl Disk {
    pub fn bitmaps(&self) -> impl Iterator<Item = Bitmap> + '_ {
        self.bitmaps.iter().flatten().copied()
    }

    pub fn bitmap(&mut self, target: u8, generation: u8) -> Option<&mut Bitmap> {
        self.bitmaps.iter_mut().flatten().find(|b| (b.target, b.generation) == (target, generation))
    }

    pub fn add(&mut self, bitmap: Bitmap) -> Result<(), String> {
        if self.bitmap(bitmap.target, bitmap.generation).is_some() {
            return Err("QEMU refuses a second bitmap of the same name".into());
        }
        let free = self.bitmaps.iter_mut().find(|b| b.is_none()).ok_or("bitmaps pile up in QEMU")?;
        *free = Some(bitmap);
        Ok(())
    }

    pub fn remove(&mut self, target: u8, generation: u8) {
        for place in &mut self.bitmaps {
            if place.is_some_and(|b| (b.target, b.generation) == (target, generation)) {
                *place = None;
            }
        }
    }

    fn write(&mut self) {
        self.content = FRESH;
        for bitmap in self.bitmaps.iter_mut().flatten().filter(|b| b.recording) {
            bitmap.dirty = true;
        }
        self.background = self.background.map(|_| true);
    }
}

static NAMES: LazyLock<Vec<Vec<String>>> = LazyLock::new(|| {
    (0..TARGETS).map(|target| (0..=u8::MAX).map(|generation| format!("pvb-{target}-{generation}")).collect()).collect()
});

pub fn name(target: u8, generation: u8) -> &'static str {
    &NAMES[usize::from(target)][usize::from(generation)]
}

fn named(name: &str) -> (u8, u8) {
    let mut parts = name.split('-').skip(1).map(|part| part.parse().unwrap());
    (parts.next().unwrap(), parts.next().unwrap())
}

pub fn seen(bitmap: Bitmap) -> Seen {
    Seen { recording: bitmap.recording, inconsistent: false, busy: false, granularity: 1 << 20 }
}

/// What QEMU makes of changes in one transaction.
pub fn transact(disk: &mut Disk, changes: &[Change<'_>]) -> Result<(), String> {
    for change in changes {
        let missing = || format!("QEMU refuses {change:?}: there is no such bitmap");
        match *change {
            Change::Add(new) => {
                let (target, generation) = named(new);
                disk.add(Bitmap { target, generation, recording: true, dirty: false })?;
            }
            Change::Remove(old) => {
                let (target, generation) = named(old);
                disk.bitmap(target, generation).ok_or_else(missing)?;
                disk.remove(target, generation);
            }
            Change::Enable(bitmap) | Change::Disable(bitmap) => {
                let (target, generation) = named(bitmap);
                let bitmap = disk.bitmap(target, generation).ok_or_else(missing)?;
                bitmap.recording = matches!(change, Change::Enable(_));
            }
            Change::Merge { from, into } => {
                let (target, generation) = named(from);
                let dirty = disk.bitmap(target, generation).ok_or_else(missing)?.dirty;
                let (target, generation) = named(into);
                disk.bitmap(target, generation).ok_or_else(missing)?.dirty |= dirty;
            }
        }
    }
    Ok(())
}

/// What a generation record says about a disk, and what has become of the archive that it names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Entry {
    pub generation: u8,
    /// Content of the archive.
    pub content: u8,
    /// Whether the repository has it now.
    pub present: bool,
    /// Whether the target's repository is the one of then.
    pub same_repository: bool,
    /// Whether QEMU is the process of then.
    pub same_qemu: bool,
    /// Its writer was told that it failed: it may name a bitmap that is gone.
    pub doubtful: bool,
}

/// The recovery journal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Journal {
    pub begun: Option<Begun>,
    pub paused: bool,
    pub frozen: bool,
    pub export: bool,
    /// Jobs or filters; on Proxmox's QEMU the access. With the target's id.
    pub access: Option<u8>,
    /// For every disk: the switch to this run's bitmap, and what it replaces.
    pub switched: [Option<Switch>; DISKS],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Begun {
    pub target: u8,
    pub generation: u8,
    pub same_qemu: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Switch {
    pub target: u8,
    pub generation: u8,
    pub replaces: Option<u8>,
}

/// A process that runs a backup.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Run {
    pub machine: Machine,
    pub target: u8,
    pub chosen: [bool; DISKS],
    pub full: bool,
    pub generation: u8,
    /// Whether QEMU is the process that it looked at.
    pub same_qemu: bool,
    /// Place within the effect that is due.
    pub at: u8,
    /// An effect was caused and is not yet noted in the journal.
    pub unnoted: bool,
    /// The set-up failed and is being undone.
    pub unwinding: bool,
    /// What recovery read from the generation record.
    pub recorded: bool,
    /// The guest is held by a freeze rather than a pause.
    pub freezes: bool,
    pub watched: bool,
    /// Archive that a disk builds on.
    pub base: [Option<u8>; DISKS],
    /// The generation whose bitmap that takes.
    pub old: [Option<u8>; DISKS],
    /// Whether QEMU had that bitmap.
    pub used: [bool; DISKS],
    /// What was stored.
    pub archive: [Option<u8>; DISKS],
    /// Whether the provider has it.
    pub durable: bool,
}

impl Run {
    /// Forgets, between two effects, what no later one asks for. Fewer worlds differ then in nothing that matters.
    pub fn forget(&mut self) {
        (self.at, self.unnoted, self.unwinding, self.recorded) = (0, false, false, false);
        match self.machine.really_due() {
            Effect::Recover | Effect::Look => {}
            Effect::Confirm | Effect::Check | Effect::Begin | Effect::SetUp => self.full = false,
            Effect::Copy => self.freezes = false,
            Effect::NoteStored | Effect::Record => {
                (self.base, self.old, self.used) = ([None; DISKS], [None; DISKS], [false; DISKS]);
            }
            Effect::TearDown(_) | Effect::UndoAgain | Effect::Clear | Effect::End(_) => {
                (self.full, self.freezes, self.durable) = (false, false, false);
                (self.base, self.old, self.used) = ([None; DISKS], [None; DISKS], [false; DISKS]);
                self.archive = [None; DISKS];
            }
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub disks: [Disk; DISKS],
    pub paused: bool,
    pub frozen: bool,
    pub records: [[Option<Entry>; DISKS]; TARGETS],
    pub journal: Journal,
    /// A watchdog whose run has died, or given up, while the guest was held.
    pub watchdog: bool,
    pub run: Option<Run>,
}

impl World {
    pub fn new() -> Self {
        let disk = Disk { content: 0, snapshot: None, background: None, exported: false, bitmaps: [None; MAX_BITMAPS] };
        Self {
            disks: [disk; DISKS],
            paused: false,
            frozen: false,
            records: [[None; DISKS]; TARGETS],
            journal: Journal::default(),
            watchdog: false,
            run: None,
        }
    }

    /// Whether the guest can write.
    pub fn guest_runs(&self) -> bool {
        !self.paused && !self.frozen
    }

    pub fn write(&mut self, disk: usize) {
        self.disks[disk].write();
    }

    /// The generation of a run that begins.
    pub fn fresh_generation() -> u8 {
        FRESH
    }

    pub fn qemu_restarts(&mut self) {
        for disk in &mut self.disks {
            *disk = Disk { content: disk.content, ..Self::new().disks[0] };
        }
        (self.paused, self.frozen) = (false, false);
        for entry in self.records.iter_mut().flatten().flatten() {
            entry.same_qemu = false;
        }
        if let Some(begun) = &mut self.journal.begun {
            begun.same_qemu = false;
        }
        if let Some(run) = &mut self.run {
            run.same_qemu = false;
        }
    }

    /// Renumbers generations and contents by their first appearance, and sorts the bitmaps.
    pub fn canonical(mut self) -> Self {
        let mut names = Names::default();
        for entry in self.records.iter_mut().flatten().flatten() {
            names.rename(&mut entry.generation);
        }
        if let Some(begun) = &mut self.journal.begun {
            names.rename(&mut begun.generation);
        }
        for switch in self.journal.switched.iter_mut().flatten() {
            names.rename(&mut switch.generation);
            switch.replaces.iter_mut().for_each(|g| names.rename(g));
        }
        if let Some(run) = &mut self.run {
            names.rename(&mut run.generation);
            run.old.iter_mut().flatten().for_each(|g| names.rename(g));
        }
        for disk in &mut self.disks {
            // What is left has no other name than its place.
            disk.bitmaps.sort_unstable_by_key(|b| b.map(|b| (names.known(b.generation), b)));
            disk.bitmaps.iter_mut().flatten().for_each(|b| names.rename(&mut b.generation));
            disk.bitmaps.sort_unstable();
        }
        for (place, disk) in self.disks.iter_mut().enumerate() {
            let mut names = Names::default();
            names.rename(&mut disk.content);
            disk.snapshot.iter_mut().for_each(|c| names.rename(c));
            for entry in self.records.iter_mut().filter_map(|r| r[place].as_mut()) {
                names.rename(&mut entry.content);
            }
            if let Some(run) = &mut self.run {
                run.base[place].iter_mut().for_each(|c| names.rename(c));
                run.archive[place].iter_mut().for_each(|c| names.rename(c));
            }
        }
        self
    }
}

#[derive(Default)]
struct Names {
    seen: [u8; 16],
    count: u8,
}

impl Names {
    fn known(&self, name: u8) -> Option<u8> {
        (0..self.count).find(|n| self.seen[usize::from(*n)] == name)
    }

    fn rename(&mut self, name: &mut u8) {
        if *name == u8::MAX {
            return;
        }
        *name = self.known(*name).unwrap_or_else(|| {
            self.seen[usize::from(self.count)] = *name;
            self.count += 1;
            self.count - 1
        });
    }
}
