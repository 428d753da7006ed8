//! Undoing what the journal tells of: in recovery, and at the end of an access.

use crate::{
    acts::Model,
    rules,
    world::{DISKS, EVERY, Kind, Run, Switch, World, name, seen, transact},
};
use pvebackup::protocol::{BitmapPer, Teardown};

/// How something is undone.
#[derive(Clone, Copy)]
pub enum Undoing {
    Recovery,
    Teardown(Teardown),
}

/// The next of an undoing.
pub enum Undo {
    Step(&'static str, Result<World, String>),
    Finished,
}

impl Model {
    /// The next of what the journal says is to be undone: the effect, then the note of it.
    pub fn undo(&self, world: &World, run: &Run, how: Undoing) -> Undo {
        let mut after = world.clone();
        let journal = &mut after.journal;
        let switched = (0..DISKS).find(|place| journal.switched[*place].is_some());
        let noting = run.unnoted;
        let (label, done) = if journal.paused {
            if noting {
                journal.paused = false;
            } else {
                after.paused = false;
            }
            ("undo: the guest continues", Ok(()))
        } else if journal.frozen {
            if noting {
                journal.frozen = false;
            } else {
                after.frozen = false;
            }
            ("undo: the guest is thawed", Ok(()))
        } else if journal.export {
            if noting {
                journal.export = false;
            } else {
                after.disks.iter_mut().for_each(|d| d.exported = false);
            }
            ("undo: exports go", Ok(()))
        } else if journal.access.is_some() {
            let done = if noting {
                journal.access = None;
                Ok(())
            } else {
                self.access_ends(&mut after, run, how)
            };
            (if self.kind == Kind::Proxmox { "undo: backup-access-teardown" } else { "undo: snapshots end" }, done)
        } else if let Some(place) = switched {
            let done = if noting {
                journal.switched[place] = None;
                Ok(())
            } else {
                self.bitmaps_settle(&mut after, run, how, place)
            };
            ("undo: bitmaps are settled", done)
        } else {
            return Undo::Finished;
        };
        if let Some(run) = &mut after.run {
            run.unnoted = !noting;
            run.watched &= after.journal.paused || after.journal.frozen;
        }
        let label = if noting { "journal: undone" } else { label };
        Undo::Step(label, done.map(|()| after))
    }

    fn access_ends(&self, world: &mut World, run: &Run, how: Undoing) -> Result<(), String> {
        let how = match how {
            Undoing::Teardown(how) => how,
            Undoing::Recovery => rules::ending(self.mutation, BitmapPer::Target, run.recorded),
        };
        let Some(target) = world.journal.access else { return Ok(()) };
        for disk in &mut world.disks {
            if disk.snapshot.take().is_some() && disk.exported {
                return Err("an access with exports is torn down, which ends QEMU".into());
            }
            if let Some(background) = disk.background.take()
                && let Some(bitmap) = disk.bitmap(target, EVERY)
            {
                bitmap.recording = true;
                bitmap.dirty = background || how == Teardown::Failure && bitmap.dirty;
            }
        }
        Ok(())
    }

    fn bitmaps_settle(&self, world: &mut World, run: &Run, how: Undoing, place: usize) -> Result<(), String> {
        let Some(Switch { target, generation, replaces }) = world.journal.switched[place] else { return Ok(()) };
        let how = match how {
            Undoing::Teardown(how) => how,
            Undoing::Recovery => rules::ending(self.mutation, BitmapPer::Generation, run.recorded),
        };
        let disk = &mut world.disks[place];
        let now: Vec<_> = disk.bitmaps().map(|b| (name(b.target, b.generation), seen(b), b.target == target)).collect();
        let new = name(target, generation);
        let replaces = replaces.map(|old| name(target, old));
        transact(disk, &rules::settling(self.mutation, &now, new, replaces, how))
    }
}
