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
    destroyed: usize,
}

/// What a dead run left: its steps, in order. Empty when the last run ended well.
pub type Leftover = Vec<Step>;

/// Larger journals are not ours: a run writes some dozen short lines.
pub(super) const LIMIT: u64 = 16 << 20;

pub(super) fn path(dir: &Path, guest: &str) -> PathBuf {
    dir.join(format!("{guest}.journal"))
}

/// What a journal's text says.
#[derive(Debug, Default)]
pub(crate) struct Parsed {
    pub(crate) steps: Vec<Step>,
    /// Lines that make no sense: steps that are not known any more, or of a later version.
    pub(crate) destroyed: usize,
}

/// Reads a journal's text.
pub(crate) fn parse(text: &[u8]) -> Parsed {
    let mut parsed = Parsed::default();
    for line in text.split_inclusive(|b| *b == b'\n') {
        match serde_json::from_slice(line) {
            Ok(step) => parsed.steps.push(step),
            // A last line that was cut by a crash was never acted on: the effect comes after the fsync.
            Err(_) if !line.ends_with(b"\n") || line.trim_ascii().is_empty() => {}
            Err(_) => parsed.destroyed += 1,
        }
    }
    parsed
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

/// What destroyed lines mean.
pub(crate) fn destroyed_text(lines: usize) -> String {
    let lines = if lines == 1 { "1 line makes".to_owned() } else { format!("{lines} lines make") };
    format!(
        "{lines} no sense in the recovery journal: what it told of may be left, in QEMU, where the next backup names it and refuses, \
         or as a file in the run or fleecing directory"
    )
}

/// The next step begins on a line of its own.
fn repair(file: &mut File, text: &[u8]) -> io::Result<()> {
    let whole = text.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
    let last = &text[whole..];
    if last.is_empty() {
        Ok(())
    } else if serde_json::from_slice::<Step>(last).is_ok() || file.metadata()?.len() > text.len() as u64 {
        file.write_all(b"\n")
    } else {
        file.set_len(whole as u64)
    }
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
        let Parsed { steps, destroyed } = parse(&text);
        repair(&mut file, &text).map_err(io_error("repaired"))?;
        File::open(dir).and_then(|d| d.sync_all()).map_err(io_error("flushed"))?;
        Ok(Self { inner: Arc::new(Mutex::new(Inner { path, file, steps, destroyed })) })
    }

    /// The steps so far, of this run or of a dead one, without those that were undone.
    pub fn leftover(&self) -> Leftover {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        not_undone(&inner.steps)
    }

    /// Lines that make no sense: what they told of may be left, and nobody knows what it is.
    pub fn destroyed(&self) -> usize {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).destroyed
    }

    /// Copies a journal with destroyed lines to a file beside it, for whoever has to find what they told of, and says so.
    /// `None` when every line makes sense.
    pub fn set_destroyed_aside(&self) -> Result<Option<String>, JournalError> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.destroyed == 0 {
            return Ok(None);
        }
        let mut copy = inner.path.clone().into_os_string();
        copy.push(".damaged");
        let copy = PathBuf::from(copy);
        let copied = || -> io::Result<()> {
            let text = fs::read(&inner.path)?;
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(true).mode(0o600).open(&copy)?.write_all(&text)
        };
        copied().map_err(|source| JournalError::Io { path: copy.clone(), doing: "written", source })?;
        Ok(Some(format!("{}; the journal is kept as {}", destroyed_text(inner.destroyed), copy.display())))
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
        inner.destroyed = 0;
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
        assert_eq!((journal.leftover(), journal.destroyed()), (vec![Step::Frozen], 0));
        assert_eq!(journal.set_destroyed_aside().expect("nothing to write"), None);
        journal.record(&Step::Paused).expect("written");
        drop(journal);
        let journal = Journal::open(dir.path(), "g").expect("opens");
        assert_eq!((journal.leftover(), journal.destroyed()), (vec![Step::Frozen, Step::Paused], 0));
    }

    #[test]
    fn a_line_that_lacks_only_its_end_counts() {
        let dir = tempfile::tempdir().expect("directory");
        fs::write(dir.path().join("g.journal"), br#"{"step":"frozen"}"#).expect("write");
        let journal = Journal::open(dir.path(), "g").expect("opens");
        journal.record(&Step::Paused).expect("written");
        drop(journal);
        assert_eq!(Journal::open(dir.path(), "g").expect("opens").leftover(), [Step::Frozen, Step::Paused]);
    }

    #[test]
    fn a_destroyed_line_is_told_until_the_journal_is_cleared() {
        let dir = tempfile::tempdir().expect("directory");
        let text =
            b"{\"step\":\"frozen\"}\n{\"step\":\"node\",\0\0\0\n\n{\"step\":\"paused\"}\n{\"step\":\"unheard-of\"}\n";
        fs::write(dir.path().join("g.journal"), text).expect("write");
        for _ in 0..2 {
            let journal = Journal::open(dir.path(), "g").expect("opens");
            assert_eq!((journal.leftover(), journal.destroyed()), (vec![Step::Frozen, Step::Paused], 2));
        }
        let journal = Journal::open(dir.path(), "g").expect("opens");
        let told = journal.set_destroyed_aside().expect("written").expect("destroyed lines");
        assert!(told.starts_with("2 lines make no sense") && told.ends_with("g.journal.damaged"), "{told}");
        assert_eq!(fs::read(dir.path().join("g.journal.damaged")).expect("read"), text);
        journal.clear().expect("cleared");
        assert_eq!(journal.destroyed(), 0);
        assert_eq!(Journal::guests(dir.path()).expect("listed"), ["g"]);
    }
}
