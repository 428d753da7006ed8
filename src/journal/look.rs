//! A look at a journal without taking its lock, so that whoever looks never stands in a run's way.

use super::{
    JournalError, Leftover,
    file::{LIMIT, Parsed, not_undone, parse, path},
};
use nix::sys::stat::{major, minor};
use procfs::{Current, LockType, Locks};
use std::{
    fs::{File, Metadata},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::Path,
};

/// What a journal shows at a moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Glimpse {
    /// Its steps without those that were undone.
    pub steps: Leftover,
    /// Lines that make no sense.
    pub destroyed: usize,
    /// The process that holds its lock: its run lives.
    pub owner: Option<i32>,
}

/// Looks at the journal of `guest` in `dir`; `None` when there is none.
///
/// # Errors
/// [`JournalError::Io`] when it cannot be read, or `/proc/locks` cannot.
pub fn look(dir: &Path, guest: &str) -> Result<Option<Glimpse>, JournalError> {
    let path = path(dir, guest);
    let io_error = |doing| {
        let path = path.clone();
        move |source| JournalError::Io { path, doing, source }
    };
    let mut file = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(io_error("opened"))?,
    };
    let meta = file.metadata().map_err(io_error("read"))?;
    // Before and after: a run that ends, or begins, in between leaves steps that are no dead run's.
    let before = owner(&meta, &path).map_err(io_error("asked for its owner"))?;
    let mut text = Vec::new();
    Read::by_ref(&mut file).take(LIMIT).read_to_end(&mut text).map_err(io_error("read"))?;
    let after = owner(&meta, &path).map_err(io_error("asked for its owner"))?;
    let Parsed { steps, destroyed } = parse(&text);
    Ok(Some(Glimpse { steps: not_undone(&steps), destroyed, owner: after.or(before) }))
}

/// Who holds a flock on a file, as `/proc/locks` tells (`proc_locks(5)`).
fn owner(meta: &Metadata, path: &Path) -> io::Result<Option<i32>> {
    let locks = Locks::current().map_err(io::Error::other)?;
    let device = (major(meta.dev()), minor(meta.dev()));
    let held = locks.0.into_iter().filter(|lock| lock.lock_type == LockType::FLock && lock.inode == meta.ino());
    for lock in held {
        let Some(pid) = lock.pid else { continue };
        // Btrfs shows files another device number than locks.
        if (u64::from(lock.devmaj), u64::from(lock.devmin)) == device || has_open(pid, path) {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}

fn has_open(pid: i32, path: &Path) -> bool {
    let Ok(path) = path.canonicalize() else { return false };
    let files = procfs::process::Process::new(pid).and_then(|process| process.fd());
    files.is_ok_and(|files| {
        files
            .filter_map(Result::ok)
            .any(|file| matches!(file.target, procfs::process::FDTarget::Path(target) if target == path))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::{Journal, Step};

    #[test]
    fn a_look_shows_steps_and_owner_and_takes_no_lock() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(look(dir.path(), "100").unwrap(), None);
        let journal = Journal::open(dir.path(), "100").unwrap();
        journal.record(&Step::Frozen).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let seen = look(dir.path(), "100").unwrap().unwrap();
        assert_eq!(seen, Glimpse { steps: vec![Step::Frozen], destroyed: 0, owner: Some(own) });
        drop(journal);
        let seen = look(dir.path(), "100").unwrap().unwrap();
        assert_eq!(seen, Glimpse { steps: vec![Step::Frozen], destroyed: 0, owner: None });
        assert!(Journal::open(dir.path(), "100").is_ok());
    }
}
