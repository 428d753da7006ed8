//! What becomes of dirty bitmaps on a QEMU that leaves it to us: there is one per generation.
//!
//! At the instant the next generation's begins and the last one's stops. If the backup is committed, the last one goes; else
//! it goes on, with the bits of the new one merged in. So at any time the bitmaps of a target together hold every write since
//! its last archive.

use super::Teardown;

/// A bitmap as it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// It gets the guest's writes.
    pub recording: bool,
    /// QEMU says that its content is worth nothing.
    pub inconsistent: bool,
    /// An export or a job uses it.
    pub busy: bool,
    /// Bytes that a bit stands for.
    pub granularity: u64,
}

/// A change of bitmaps. Those in one list belong into one transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change<'a> {
    /// An empty one begins to record.
    Add(&'a str),
    /// It goes.
    Remove(&'a str),
    /// It records again.
    Enable(&'a str),
    /// It gets no more writes.
    Disable(&'a str),
    /// `into` gets the bits of `from`, too.
    Merge {
        /// The source; it stays as it is.
        from: &'a str,
        /// The target.
        into: &'a str,
    },
}

/// What is wrong with a bitmap, so that it may not have every write.
pub fn flaw(bitmap: Seen) -> Option<&'static str> {
    if bitmap.inconsistent {
        Some("is inconsistent: QEMU was not shut down properly")
    } else if bitmap.busy {
        Some("is in use by another operation")
    } else if !bitmap.recording {
        Some("does not record")
    } else if !bitmap.granularity.is_power_of_two() {
        Some("has no plausible granularity")
    } else {
        None
    }
}

/// At the instant: `new` begins where `old`, which is read, stops.
pub fn switch<'a>(new: &'a str, old: Option<&'a str>) -> Vec<Change<'a>> {
    [Change::Add(new)].into_iter().chain(old.map(Change::Disable)).collect()
}

/// At the end of a run that switched from `replaces` to `new`, given what is there `now`: the target's bitmaps by name, and
/// whatever else is called like these two. Empty when there is nothing (left) to do.
pub fn settle<'a>(now: &[(&'a str, Seen)], new: &'a str, replaces: Option<&'a str>, how: Teardown) -> Vec<Change<'a>> {
    if how == Teardown::Success {
        return now.iter().filter(|(name, _)| *name != new).map(|(name, _)| Change::Remove(name)).collect();
    }
    let find = |name: &str| now.iter().find(|(n, _)| *n == name).map(|(_, seen)| *seen);
    // Without the new one the switch was not made, or was undone already.
    let Some(ours) = find(new) else { return Vec::new() };
    let mut changes = Vec::new();
    match replaces.and_then(|old| Some((old, find(old)?))) {
        Some((old, state)) if ours.recording && !ours.inconsistent && !state.inconsistent => {
            if !state.recording {
                changes.push(Change::Enable(old));
            }
            changes.push(Change::Merge { from: new, into: old });
        }
        // Somebody stopped ours: neither has all writes any more.
        Some((old, _)) => changes.push(Change::Remove(old)),
        None => {}
    }
    changes.push(Change::Remove(new));
    changes
}
