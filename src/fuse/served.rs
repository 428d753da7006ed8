//! Which places this installation's processes serve archives at, so that the mount of one that was killed is found.
//!
//! One file for each process, in a directory that a reboot empties, with the lock and the form of a recovery journal.

use super::{FuseError, mounts};
use crate::journal::{Journal, JournalError, ProcessIdentity, Step};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// The record that this process serves a place. Dropped without [`Record::end`] it says that the process was killed.
#[derive(Debug)]
pub struct Record {
    // Its lock says that we live.
    _journal: Journal,
    file: PathBuf,
}

impl Record {
    /// Writes below `dir` that this process is about to mount at `place`. Blocks shortly.
    ///
    /// # Errors
    /// [`JournalError::Io`] when it cannot be written.
    pub fn begin(dir: &Path, place: &Path) -> Result<Self, JournalError> {
        let unknown =
            |error| JournalError::Io { path: dir.to_owned(), doing: "named", source: io::Error::other(error) };
        let server = ProcessIdentity::of(nix::unistd::getpid().as_raw()).map_err(unknown)?;
        // A process id alone may be in a file that a dead process has left.
        let name = format!("{}-{}", server.pid, server.start_time);
        let journal = Journal::open(dir, &name)?;
        let record = Self { file: dir.join(format!("{name}.journal")), _journal: journal.clone() };
        // As the kernel will have it.
        let path = mounts::absolute(place).unwrap_or_else(|_| place.to_owned());
        journal.record(&Step::Served { path, server, log: None })?;
        Ok(record)
    }

    /// Nothing is mounted any more.
    pub fn end(self) {
        let _ = fs::remove_file(&self.file);
    }
}

/// A place whose process was killed, and whose mount is still there.
#[derive(Debug)]
pub struct Dead {
    /// Where.
    pub path: PathBuf,
    /// The process.
    pub pid: i32,
    record: Record,
}

impl Dead {
    /// Takes the mount away if it is still there and dead.
    ///
    /// # Errors
    /// [`FuseError::Unmount`], [`FuseError::NoHelper`]: it stays on record.
    pub fn clear(self) -> Result<(), FuseError> {
        mounts::clear_dead(&self.path)?;
        self.record.end();
        Ok(())
    }
}

/// Places on record below `dir` where a process that was killed has left its mount.
///
/// # Errors
/// [`FuseError::Io`] when the records, or `/proc`, cannot be read.
pub fn dead(dir: &Path) -> Result<Vec<Dead>, FuseError> {
    let mut dead = Vec::new();
    for name in Journal::guests(dir).map_err(|source| FuseError::io("list", dir, source))? {
        // Somebody holds it, or it is not for us to read.
        let Ok(journal) = Journal::open(dir, &name) else { continue };
        let record = Record { file: dir.join(format!("{name}.journal")), _journal: journal.clone() };
        let place = journal.leftover().into_iter().find_map(|step| match step {
            Step::Served { path, server, .. } => Some((path, server.pid)),
            _ => None,
        });
        match place {
            Some((path, pid)) if mounts::is_dead_at(&path)? => dead.push(Dead { path, pid, record }),
            // Somebody has cleared it.
            _ => record.end(),
        }
    }
    Ok(dead)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_stays_for_as_long_as_its_process_lives_or_its_mount_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("place");
        assert!(dead(&dir.path().join("none")).unwrap().is_empty());
        let record = Record::begin(dir.path(), &place).unwrap();
        assert!(dead(dir.path()).unwrap().is_empty(), "it lives");
        assert!(fs::read_dir(dir.path()).unwrap().next().is_some());
        drop(record);
        assert!(dead(dir.path()).unwrap().is_empty(), "nothing is mounted there");
        assert!(fs::read_dir(dir.path()).unwrap().next().is_none());
        Record::begin(dir.path(), &place).unwrap().end();
        assert!(fs::read_dir(dir.path()).unwrap().next().is_none());
    }
}
