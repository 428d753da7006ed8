//! A lock as the official restic knows it, for local repositories.
//!
//! It is a file below `locks/`, named by the SHA-256 of its content: JSON, encrypted like everything else. restic's `prune`
//! and `forget --prune` want an exclusive lock, and do not get it while ours is there. A lock counts as stale for `restic
//! unlock` when it is older than 30 minutes, so it is renewed every five.
//!
//! The host's name in it is not the real one on purpose: of a lock of its own host, `restic unlock` finds out whether the
//! process is alive *by sending it SIGHUP*.

use super::seal::{SealKey, cipher, seal};
use crate::provider::{ErrorKind, ProviderError};
use aes256ctr_poly1305aes::{Nonce, aead::Aead};
use jiff::{Timestamp, ToSpan};
use rustic_core::{Id, repofile::MasterKey};
use secrecy::ExposeSecret as _;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    fs::{self, DirBuilder, File},
    io::{Read, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread::JoinHandle,
    time::Duration,
};

/// How often the lock is written anew; restic's own interval.
const RENEWAL: Duration = Duration::from_mins(5);
/// Age in minutes at which restic takes a lock for abandoned.
const STALE_MINUTES: i64 = 30;
/// No lock file is nearly as long.
const MAX_FILE: u64 = 64 << 10;
/// First byte of a compressed file.
const COMPRESSED: u8 = 2;

#[derive(Serialize, Deserialize)]
struct Content {
    time: Timestamp,
    #[serde(default)]
    exclusive: bool,
    #[serde(default)]
    hostname: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    pid: i64,
    #[serde(default)]
    uid: u32,
    #[serde(default)]
    gid: u32,
}

/// A directory of locks, and the key to it.
struct Locks {
    directory: PathBuf,
    key: secrecy::SecretBox<SealKey>,
    host: String,
}

struct Held {
    path: PathBuf,
    since: Timestamp,
}

/// A lock that is held until it is released or dropped.
pub(super) struct Lock {
    held: Arc<Mutex<Held>>,
    end: Option<(mpsc::Sender<()>, JoinHandle<()>)>,
}

impl Lock {
    /// Takes a lock that is not exclusive, in the repository at `repository`.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] when somebody holds an exclusive lock.
    pub(super) fn take(repository: &Path, key: &MasterKey) -> Result<Self, ProviderError> {
        let locks = Locks::new(repository, key)?;
        let failed = |e: std::io::Error| locks.failed("cannot be created", e);
        // First our own, then a look at the others': so that of two that come at the same time at least one sees the other.
        let held = Arc::new(Mutex::new(locks.write().map_err(failed)?));
        let mut lock = Self { held, end: None };
        locks.refuse_exclusive()?;
        let (sender, receiver) = mpsc::channel();
        let held = Arc::clone(&lock.held);
        let renew = move || {
            while receiver.recv_timeout(RENEWAL) == Err(mpsc::RecvTimeoutError::Timeout) {
                match locks.write() {
                    Ok(new) => {
                        let old = std::mem::replace(&mut *held.lock().unwrap_or_else(PoisonError::into_inner), new);
                        let _ = fs::remove_file(old.path);
                    }
                    Err(error) => {
                        tracing::warn!(directory = %locks.directory.display(), %error, "lock cannot be renewed");
                    }
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("restic-lock".into())
            .spawn(renew)
            .map_err(|e| ProviderError::caused_by(ErrorKind::Other, "the lock cannot be kept", e))?;
        lock.end = Some((sender, thread));
        Ok(lock)
    }

    /// Whether nobody could take the lock for abandoned, or has removed it.
    pub(super) fn still_held(&self) -> Result<(), ProviderError> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if is_stale(held.since) || !held.path.exists() {
            let message = format!("the lock {} was lost during the backup", held.path.display());
            return Err(ProviderError::new(ErrorKind::Locked, message));
        }
        Ok(())
    }

    /// Gives the lock back.
    pub(super) fn release(mut self) -> Result<(), ProviderError> {
        self.end().map_err(|e| ProviderError::caused_by(ErrorKind::Other, "the repository's lock cannot be removed", e))
    }

    fn end(&mut self) -> std::io::Result<()> {
        if let Some((sender, thread)) = self.end.take() {
            drop(sender);
            let _ = thread.join();
        }
        match fs::remove_file(&self.held.lock().unwrap_or_else(PoisonError::into_inner).path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

fn is_stale(time: Timestamp) -> bool {
    time.checked_add(STALE_MINUTES.minutes()).is_ok_and(|end| end < Timestamp::now())
}

impl Locks {
    fn new(repository: &Path, master: &MasterKey) -> Result<Self, ProviderError> {
        let directory = repository.join("locks");
        let mut key = [0u8; 64];
        let parts = [&master.encrypt[..], &master.mac.k[..], &master.mac.r[..]].concat();
        if parts.len() != key.len() {
            return Err(ProviderError::new(ErrorKind::Damaged, "the repository's key has a wrong length"));
        }
        key.copy_from_slice(&parts);
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host = format!("{} (pvebackup)", host.trim());
        let locks = Self { directory, key: secrecy::SecretBox::new(Box::new(key)), host };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&locks.directory)
            .map_err(|e| locks.failed("cannot be created", e))?;
        Ok(locks)
    }

    fn failed(&self, what: &str, error: std::io::Error) -> ProviderError {
        let kind = match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
            _ => ErrorKind::Other,
        };
        ProviderError::caused_by(kind, format!("a lock in {} {what}", self.directory.display()), error)
    }

    fn write(&self) -> std::io::Result<Held> {
        let since = Timestamp::now();
        let content = Content {
            time: since,
            exclusive: false,
            hostname: self.host.clone(),
            username: "pvebackup".into(),
            pid: i64::from(std::process::id()),
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
        };
        let file = seal(self.key.expose_secret(), serde_json::to_vec(&content)?)?;
        let digest: [u8; 32] = Sha256::digest(&file).into();
        let name = Id::new(digest).to_hex().to_string();
        let path = self.directory.join(name);
        let mut temporary = tempfile::Builder::new().prefix(".lock-").tempfile_in(&self.directory)?;
        temporary.write_all(&file)?;
        temporary.persist(&path).map_err(|e| e.error)?;
        Ok(Held { path, since })
    }

    fn read(&self, path: &Path) -> Option<Content> {
        let mut file = Vec::new();
        File::open(path).ok()?.take(MAX_FILE).read_to_end(&mut file).ok()?;
        let (nonce, body) = file.split_at_checked(16)?;
        let mut text = cipher(self.key.expose_secret()).decrypt(Nonce::from_slice(nonce), body).ok()?;
        if text.first() == Some(&COMPRESSED) {
            let mut plain = Vec::new();
            zstd::stream::read::Decoder::new(&text[1..]).ok()?.take(MAX_FILE).read_to_end(&mut plain).ok()?;
            text = plain;
        }
        serde_json::from_slice(&text).ok()
    }

    /// Looks at all locks. Those of dead runs of ours are removed.
    fn refuse_exclusive(&self) -> Result<(), ProviderError> {
        for entry in fs::read_dir(&self.directory).map_err(|e| self.failed("cannot be listed", e))? {
            let path = entry.map_err(|e| self.failed("cannot be listed", e))?.path();
            let is_lock = path.file_name().is_some_and(|n| n.len() == 64);
            let Some(lock) = is_lock.then(|| self.read(&path)).flatten() else { continue };
            if lock.exclusive {
                let message = format!(
                    "the repository is locked by {} (process {} on {}) since {}; if that is long over, run `restic unlock`",
                    lock.username, lock.pid, lock.hostname, lock.time
                );
                return Err(ProviderError::new(ErrorKind::Locked, message));
            }
            let dead = lock.pid > 0 && !Path::new(&format!("/proc/{}", lock.pid)).exists();
            if lock.hostname == self.host && (dead || is_stale(lock.time)) {
                let _ = fs::remove_file(&path);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> MasterKey {
        MasterKey::new()
    }

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory.join("locks")).expect("locks");
        entries.map(|e| e.expect("entry").file_name().to_string_lossy().into_owned()).collect()
    }

    fn put(locks: &Locks, change: impl FnOnce(&mut Content)) {
        let held = locks.write().expect("written");
        let mut content = locks.read(&held.path).expect("readable");
        fs::remove_file(held.path).expect("removed");
        change(&mut content);
        let file = seal(locks.key.expose_secret(), serde_json::to_vec(&content).expect("json")).expect("sealed");
        let name = format!("{:064x}", file.len());
        fs::write(locks.directory.join(name), file).expect("written");
    }

    #[test]
    fn a_lock_is_there_until_it_is_released() {
        let dir = tempfile::tempdir().expect("directory");
        let key = key();
        let lock = Lock::take(dir.path(), &key).expect("taken");
        let second = Lock::take(dir.path(), &key).expect("shared");
        assert_eq!(names(dir.path()).len(), 2);
        lock.still_held().expect("held");
        lock.release().expect("released");
        drop(second);
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn a_lock_that_somebody_removed_is_noticed() {
        let dir = tempfile::tempdir().expect("directory");
        let lock = Lock::take(dir.path(), &key()).expect("taken");
        fs::remove_file(dir.path().join("locks").join(&names(dir.path())[0])).expect("removed");
        assert_eq!(lock.still_held().expect_err("lost").kind, ErrorKind::Locked);
    }

    #[test]
    fn an_exclusive_lock_is_respected_and_nothing_is_left() {
        let dir = tempfile::tempdir().expect("directory");
        let key = key();
        let locks = Locks::new(dir.path(), &key).expect("locks");
        put(&locks, |lock| lock.exclusive = true);
        let error = Lock::take(dir.path(), &key).err().expect("refused");
        assert_eq!(error.kind, ErrorKind::Locked);
        assert_eq!(names(dir.path()).len(), 1, "only the other's lock stays");
    }

    #[test]
    fn locks_of_dead_runs_of_ours_go_and_those_of_others_stay() {
        let dir = tempfile::tempdir().expect("directory");
        let key = key();
        let locks = Locks::new(dir.path(), &key).expect("locks");
        put(&locks, |lock| lock.pid = i64::from(i32::MAX));
        put(&locks, |lock| {
            lock.pid = i64::from(i32::MAX);
            lock.hostname = "elsewhere".into();
        });
        drop(Lock::take(dir.path(), &key).expect("taken"));
        assert_eq!(names(dir.path()).len(), 1);
    }
}
