//! The journal's file.

use super::Step;
use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};
use thiserror::Error;

/// Why the journal cannot be used. Nothing may be changed in QEMU then.
#[derive(Debug, Error)]
pub enum JournalError {
    /// The file cannot be read or written.
    #[error("recovery journal {path} cannot be {doing}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// Another run of this guest lives.
    #[error("another run of guest `{guest}` is at work (it holds {path})")]
    Busy {
        /// The guest.
        guest: String,
        /// The file.
        path: PathBuf,
    },
}

/// An open journal; clones write to the same file. The lock is held until the last clone is dropped.
#[derive(Clone, Debug)]
pub struct Journal {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    file: File,
    steps: Vec<Step>,
}

/// What a dead run left: its steps, in order. Empty when the last run ended well.
pub type Leftover = Vec<Step>;

/// Larger journals are not ours: a run writes some dozen short lines.
pub(super) const LIMIT: u64 = 16 << 20;

pub(super) fn path(dir: &Path, guest: &str) -> PathBuf {
    dir.join(format!("{guest}.journal"))
}

/// The steps in a journal's text. Lines that make no sense are passed over.
pub(crate) fn parse(text: &[u8]) -> Vec<Step> {
    text.split_inclusive(|b| *b == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()
}

/// Steps without those that were undone.
pub(crate) fn not_undone(steps: &[Step]) -> Leftover {
    let mut open: Vec<Step> = Vec::new();
    for step in steps {
        match step {
            Step::Undone { label } => open.retain(|s| s.label() != *label),
            Step::Resumed => open.retain(|s| *s != Step::Paused),
            Step::Thawed => open.retain(|s| *s != Step::Frozen),
            other => open.push(other.clone()),
        }
    }
    open
}

impl Journal {
    /// Opens the journal of `guest` in `dir` (made 0700 if missing) and takes its lock.
    ///
    /// # Errors
    /// [`JournalError::Busy`] when another run holds it.
    pub fn open(dir: &Path, guest: &str) -> Result<Self, JournalError> {
        let path = path(dir, guest);
        let io_error = |doing| {
            let path = path.clone();
            move |source| JournalError::Io { path, doing, source }
        };
        crate::config::create_private_dir(dir).map_err(io_error("created"))?;
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("opened"))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(JournalError::Busy { guest: guest.to_owned(), path }),
            Err(TryLockError::Error(source)) => return Err(io_error("locked")(source)),
        }
        let mut text = Vec::new();
        Read::by_ref(&mut file).take(LIMIT).read_to_end(&mut text).map_err(io_error("read"))?;
        // A last line that was cut by a crash was never acted on: the effect comes after the fsync.
        let steps = parse(&text);
        if !text.is_empty() && !text.ends_with(b"\n") {
            file.write_all(b"\n").map_err(io_error("repaired"))?;
        }
        File::open(dir).and_then(|d| d.sync_all()).map_err(io_error("flushed"))?;
        Ok(Self { inner: Arc::new(Mutex::new(Inner { path, file, steps })) })
    }

    /// The steps so far, of this run or of a dead one, without those that were undone.
    pub fn leftover(&self) -> Leftover {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        not_undone(&inner.steps)
    }

    /// Writes a step and makes it durable. The effect may follow only when this returned `Ok`.
    pub fn record(&self, step: &Step) -> Result<(), JournalError> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let write = |inner: &mut Inner| -> io::Result<()> {
            let mut line = serde_json::to_vec(step)?;
            line.push(b'\n');
            let end = inner.file.metadata()?.len();
            inner.file.write_all(&line).inspect_err(|_| {
                // A part of a line would spoil the next one. Where this fails too, what follows is spoilt, and no step follows.
                let _ = inner.file.set_len(end);
            })?;
            inner.file.sync_data()
        };
        write(&mut inner).map_err(|source| JournalError::Io { path: inner.path.clone(), doing: "written", source })?;
        inner.steps.push(step.clone());
        Ok(())
    }

    /// Notes that a step was undone.
    pub fn undone(&self, step: &Step) -> Result<(), JournalError> {
        self.record(&Step::Undone { label: step.label() })
    }

    /// Nothing is left to undo: empties the journal. The file stays, as the place of the lock.
    pub fn clear(&self) -> Result<(), JournalError> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let empty = |inner: &mut Inner| -> io::Result<()> {
            inner.file.set_len(0)?;
            inner.file.rewind()?;
            inner.file.sync_all()
        };
        empty(&mut inner).map_err(|source| JournalError::Io { path: inner.path.clone(), doing: "cleared", source })?;
        inner.steps.clear();
        Ok(())
    }

    /// Guests that have a journal in `dir`, whether something is left in it or not.
    pub fn guests(dir: &Path) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let mut guests = Vec::new();
        for entry in entries {
            let name = entry?.file_name();
            if let Some(guest) = name.to_str().and_then(|n| n.strip_suffix(".journal")) {
                guests.push(guest.to_owned());
            }
        }
        guests.sort();
        Ok(guests)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_run_leaves_its_steps_and_a_living_one_its_lock() {
        let dir = tempfile::tempdir().expect("directory");
        let node = Step::Node { name: "pvb-fl-0".into() };
        let journal = Journal::open(dir.path(), "100").expect("new");
        journal.record(&node).expect("written");
        journal.record(&Step::Paused).expect("written");
        assert!(matches!(Journal::open(dir.path(), "100"), Err(JournalError::Busy { .. })));
        drop(journal);

        let journal = Journal::open(dir.path(), "100").expect("free again");
        assert_eq!(journal.leftover(), [node.clone(), Step::Paused]);
        journal.record(&Step::Resumed).expect("written");
        assert_eq!(journal.leftover(), std::slice::from_ref(&node));
        journal.undone(&node).expect("written");
        assert!(journal.leftover().is_empty());
        journal.clear().expect("cleared");
        drop(journal);
        assert!(Journal::open(dir.path(), "100").expect("free").leftover().is_empty());
        assert_eq!(Journal::guests(dir.path()).expect("listed"), ["100"]);
    }

    #[test]
    fn a_line_cut_by_a_crash_is_passed_over() {
        let dir = tempfile::tempdir().expect("directory");
        let journal = Journal::open(dir.path(), "g").expect("new");
        journal.record(&Step::Frozen).expect("written");
        drop(journal);
        let path = dir.path().join("g.journal");
        let mut text = fs::read(&path).expect("read");
        text.extend_from_slice(br#"{"step":"node","na"#);
        fs::write(&path, text).expect("write");
        let journal = Journal::open(dir.path(), "g").expect("opens");
        assert_eq!(journal.leftover(), [Step::Frozen]);
        journal.record(&Step::Paused).expect("written");
        drop(journal);
        assert_eq!(Journal::open(dir.path(), "g").expect("opens").leftover(), [Step::Frozen, Step::Paused]);
    }
}
