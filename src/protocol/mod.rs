//! The commit protocol: what a backup does, in which order, and what becomes of the dirty bitmaps. Pure: no I/O.
//!
//! [`Protocol`] is the state machine of one run. It says which [`Effect`] is due; `backup` causes it and says how that ended.
//! [`bitmap`] decides over the bitmaps of QEMUs that leave it to us, and [`after_death`] how recovery ends the access of a run
//! that died. `tests/protocol` drives the same code through a model of everything around it, and searches all
//! interleavings of runs, deaths, faults and guest writes for an archive that misses a write.

pub mod bitmap;
mod run;

pub use run::{Effect, End, Ended, Protocol};

/// How an access ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Teardown {
    /// The archive is durable and recorded: the new generation counts.
    Success,
    /// It is not: the old generation goes on, with all writes since.
    Failure,
}

impl Teardown {
    /// The new generation counts if it is recorded, and only then.
    pub fn of(recorded: bool) -> Self {
        if recorded { Self::Success } else { Self::Failure }
    }
}

/// What a dirty bitmap is named after, which decides what it means when a run dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BitmapPer {
    /// One for every generation (stock QEMU): its name says which archive it belongs to.
    Generation,
    /// One for all generations of a target (Proxmox VE's QEMU): only what was done to it says which archive it belongs to.
    Target,
}

/// How recovery ends the access of a dead run. `recorded`: the generation record on disk is that run's.
///
/// A bitmap per target keeps all its bits. They are a superset of what changed since either archive, whatever the run, or an
/// earlier recovery, had done to the access already.
pub fn after_death(bitmaps: BitmapPer, recorded: bool) -> Teardown {
    match bitmaps {
        BitmapPer::Generation => Teardown::of(recorded),
        BitmapPer::Target => Teardown::Failure,
    }
}
