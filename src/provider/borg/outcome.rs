//! How a borg has ended: exit codes, and messages with ids.
//!
//! borg 1.4 has an exit code for every kind of failure when it is asked for them (`BORG_EXIT_CODES=modern`): 3 … 99 for errors,
//! 100 … 127 for warnings. borg 1.2 knows 1 for warnings and 2 for errors only. Both write each failure as a JSON line with a
//! message id, which comes first here; the codes tell what has no id, or was cut off.

use crate::provider::{ErrorKind, ProviderError};
use serde::Deserialize;
use std::{os::unix::process::ExitStatusExt, process::ExitStatus};

/// Message ids, modern exit codes (borg 1.4's documentation, "Return codes" and "Message IDs") and what they mean to us.
const FAILURES: &[(&str, i32, ErrorKind)] = &[
    ("Repository.DoesNotExist", 13, ErrorKind::RepositoryMissing),
    ("Repository.InvalidRepository", 15, ErrorKind::RepositoryMissing),
    ("Repository.ParentPathDoesNotExist", 18, ErrorKind::RepositoryMissing),
    ("Repository.PathPermissionDenied", 21, ErrorKind::RepositoryMissing),
    ("LockError", 70, ErrorKind::Locked),
    ("LockErrorT", 71, ErrorKind::Locked),
    ("LockTimeout", 73, ErrorKind::Locked),
    ("KeyfileInvalidError", 40, ErrorKind::Credentials),
    ("KeyfileMismatchError", 41, ErrorKind::Credentials),
    ("KeyfileNotFoundError", 42, ErrorKind::Credentials),
    ("RepoKeyNotFoundError", 44, ErrorKind::Credentials),
    ("NoPassphraseFailure", 50, ErrorKind::Credentials),
    ("PasscommandFailure", 51, ErrorKind::Credentials),
    ("PassphraseWrong", 52, ErrorKind::Credentials),
    ("PasswordRetriesExceeded", 53, ErrorKind::Credentials),
    ("Cache.CacheInitAbortedError", 60, ErrorKind::Credentials),
    ("PathNotAllowed", 83, ErrorKind::Credentials),
    ("Archive.DoesNotExist", 31, ErrorKind::NotFound),
    ("Repository.InsufficientFreeSpaceError", 14, ErrorKind::NoSpace),
    ("Repository.StorageQuotaExceeded", 20, ErrorKind::NoSpace),
    ("Repository.CheckNeeded", 12, ErrorKind::Damaged),
    ("Repository.InvalidRepositoryConfig", 16, ErrorKind::Damaged),
    ("Repository.ObjectNotFound", 17, ErrorKind::Damaged),
    ("NoManifestError", 26, ErrorKind::Damaged),
    ("Cache.EncryptionMethodMismatch", 61, ErrorKind::Damaged),
    ("IntegrityError", 90, ErrorKind::Damaged),
    ("FileIntegrityError", 91, ErrorKind::Damaged),
    ("DecompressionError", 92, ErrorKind::Damaged),
    ("ArchiveTAMInvalid", 95, ErrorKind::Damaged),
    ("ArchiveTAMRequiredError", 96, ErrorKind::Damaged),
    ("TAMInvalid", 97, ErrorKind::Damaged),
    ("TAMRequiredError", 98, ErrorKind::Damaged),
    ("TAMUnsupportedSuiteError", 99, ErrorKind::Damaged),
];
/// The repository is older than what borg has seen of it: message ids and modern exit codes, encrypted and not.
const OLDER: [(&str, i32); 2] = [("Cache.RepositoryReplay", 64), ("Cache.RepositoryIDNotUnique", 63)];
/// How ssh begins when the host key is not the known one, or the private key is open to others. borg does not wait for the rest.
const SSH_BANNER: &str = "Remote: @@@@@@@@";
/// What to tell instead.
const SSH_BANNER_MEANS: &str =
    "ssh refuses: the server's host key has changed, or others can read the private key; `ssh` by hand says which";

/// What borg would ask about, and what to do: message id, modern exit code.
const ASKED: [(&str, i32, &str); 2] = [
    (
        "Cache.CacheInitAbortedError",
        60,
        "the repository is not encrypted, which the target's `encryption` does not say",
    ),
    (
        "Cache.RepositoryAccessAborted",
        62,
        "if the repository has moved, run `BORG_RELOCATED_REPO_ACCESS_IS_OK=yes pvebackup target test` once",
    ),
];
/// A file was not stored, or not as it is: it changed (100), or could not be read (102 and later; 101 is about patterns).
const NOT_STORED: [i32; 10] = [100, 102, 103, 104, 105, 106, 107, 108, 109, 110];
/// A name that was asked for is not in the archive.
const NEVER_MATCHED: i32 = 101;

/// A message of borg's (`--log-json`).
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Message {
    #[serde(default, rename = "levelname")]
    pub(super) level: String,
    #[serde(default, rename = "message")]
    pub(super) text: String,
    #[serde(default, rename = "msgid")]
    pub(super) id: Option<String>,
}

impl Message {
    pub(super) fn of_line(line: &str) -> Self {
        // What is no JSON comes from Python itself, or from a program that borg runs.
        serde_json::from_str(line).unwrap_or_else(|_| Self { text: line.to_owned(), ..Self::default() })
    }

    /// The line that tells most: of a Python traceback the exception.
    fn headline(&self) -> &str {
        let mut lines = self.text.lines().map(str::trim).filter(|line| !line.is_empty());
        let first = lines.next().unwrap_or_default();
        if !first.starts_with("Traceback ") {
            return first;
        }
        // Behind the exception borg tells what it runs on. Those of borg's own come with their modules' names.
        let is_class =
            |name: &str| name.rsplit_once('.').is_some_and(|(_, class)| class.starts_with(char::is_uppercase));
        let exception = |line: &&str| {
            line.split_once(": ").is_some_and(|(name, _)| {
                name.ends_with("Error") || name.ends_with("Exception") || (is_class(name) && !name.contains(' '))
            })
        };
        lines.rfind(exception).unwrap_or(first)
    }

    fn has_id(&self, id: &str) -> bool {
        self.id.as_deref() == Some(id)
    }

    pub(super) fn kind(&self) -> Option<ErrorKind> {
        let says = |words: &str| self.text.contains(words);
        // What the system says about a lock that cannot be made comes before its id.
        if says("No space left on device") || says("Disk quota exceeded") {
            return Some(ErrorKind::NoSpace);
        }
        if says("Permission denied (") || says("Host key verification failed") || says(SSH_BANNER) {
            return Some(ErrorKind::Credentials);
        }
        FAILURES.iter().find(|failure| self.has_id(failure.0)).map(|failure| failure.2)
    }
}

/// What a command has left.
pub(super) struct Finished {
    pub(super) status: ExitStatus,
    pub(super) output: Vec<u8>,
    pub(super) messages: Vec<Message>,
}

impl Finished {
    /// Whether it has done what it was told, perhaps with warnings.
    pub(super) fn ran(&self) -> bool {
        matches!(self.status.code(), Some(0 | 1 | 100..=127))
    }

    /// Whether its exit code says that a file was not stored as it is.
    pub(super) fn left_out(&self) -> bool {
        self.status.code().is_some_and(|code| NOT_STORED.contains(&code))
    }

    /// Whether there was nothing of the name that was asked for.
    pub(super) fn never_matched(&self) -> bool {
        self.status.code() == Some(NEVER_MATCHED) || self.messages.iter().any(|m| m.text.contains("never matched"))
    }

    /// Whether borg refuses the repository because it has seen a newer state of it.
    pub(super) fn older(&self) -> bool {
        OLDER.iter().any(|(id, code)| self.failed_with(id, *code))
    }

    fn failed_with(&self, id: &str, code: i32) -> bool {
        self.status.code() == Some(code) || self.messages.iter().any(|m| m.has_id(id))
    }

    fn kind(&self) -> ErrorKind {
        let told = self.messages.iter().find_map(Message::kind);
        let code = self.status.code();
        told.or_else(|| FAILURES.iter().find(|failure| Some(failure.1) == code).map(|failure| failure.2))
            .unwrap_or(ErrorKind::Other)
    }

    /// The messages' own words for what went wrong.
    pub(super) fn error(&self, what: &str) -> ProviderError {
        let said = self.messages.iter().rev().find(|m| m.level == "ERROR" || m.level == "CRITICAL");
        // SSH's own words come before borg's, who only knows that it was left alone.
        let remote = self.messages.iter().find(|m| m.text.starts_with("Remote: "));
        let mut text: Vec<&str> = Vec::new();
        text.extend(
            remote.iter().map(|m| if m.text.starts_with(SSH_BANNER) { SSH_BANNER_MEANS } else { m.headline() }),
        );
        text.extend(said.iter().map(|m| m.headline()));
        if text.is_empty() {
            text.extend(self.messages.last().map(|m| m.text.trim()));
        }
        text.extend(ASKED.iter().filter(|asked| self.failed_with(asked.0, asked.1)).map(|asked| asked.2));
        let text: String = text.join("; ").chars().take(1000).collect();
        let end = match (self.status.code(), self.status.signal()) {
            (Some(code), _) => format!("exit code {code}"),
            (None, Some(signal)) => format!("signal {signal}"),
            (None, None) => self.status.to_string(),
        };
        ProviderError::new(self.kind(), format!("{what}: borg ended with {end}: {text}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finished(code: i32, line: &str) -> Finished {
        Finished { status: ExitStatus::from_raw(code << 8), output: Vec::new(), messages: vec![Message::of_line(line)] }
    }

    #[test]
    fn failures_are_told_apart_by_borgs_message_ids() {
        let kind = |line: &str| finished(2, line).error("x").kind;
        let json = |id: &str| format!(r#"{{"levelname": "ERROR", "message": "m", "msgid": "{id}"}}"#);
        assert_eq!(kind(&json("Repository.DoesNotExist")), ErrorKind::RepositoryMissing);
        assert_eq!(kind(&json("LockTimeout")), ErrorKind::Locked);
        assert_eq!(kind(&json("PassphraseWrong")), ErrorKind::Credentials);
        assert_eq!(kind(&json("Archive.DoesNotExist")), ErrorKind::NotFound);
        assert_eq!(kind(&json("Else")), ErrorKind::Other);
        assert_eq!(kind("OSError: [Errno 28] No space left on device"), ErrorKind::NoSpace);
        assert_eq!(kind(r#"{"message": "Remote: Host key verification failed."}"#), ErrorKind::Credentials);
        let banner = r#"{"message": "Remote: @@@@@@@@@@@@@@@@@@@@@@@@@@@@@@", "levelname": "WARNING"}"#;
        assert_eq!(kind(banner), ErrorKind::Credentials);
        assert!(finished(2, banner).error("x").message.contains("host key has changed"));
        let lock = r#"{"message": "Failed to create the lock /r/lock ([Errno 28] No space left on device).", "msgid": "LockFailed"}"#;
        assert_eq!(kind(lock), ErrorKind::NoSpace);
    }

    #[test]
    fn of_a_traceback_the_exception_is_told() {
        let told = |exception: &str| {
            let text = format!(
                "Traceback (most recent call last):\n  File \"/usr/lib/borg/locking.py\", line 143, in acquire\n    raise X\n\
                 {exception}\n\nPlatform: Linux vm 6.1\nBorg: 1.4.0  Python: CPython 3.11.2\nsys.argv: ['/usr/bin/borg']\n"
            );
            let line = serde_json::json!({"levelname": "ERROR", "message": text}).to_string();
            finished(72, &line).error("x").message
        };
        let lock = "borg.locking.LockFailed: Failed to create/acquire the lock /r/lock.exclusive ([Errno 30] Read-only file system).";
        for exception in [lock, "OSError: [Errno 30] Read-only file system: '/r/data'"] {
            assert_eq!(told(exception), format!("x: borg ended with exit code 72: {exception}"));
        }
    }

    #[test]
    fn modern_exit_codes_tell_what_has_no_message() {
        let of = |code| finished(code, "words");
        assert_eq!(of(13).error("x").kind, ErrorKind::RepositoryMissing);
        assert_eq!(of(73).error("x").kind, ErrorKind::Locked);
        assert_eq!(of(52).error("x").kind, ErrorKind::Credentials);
        assert_eq!(of(31).error("x").kind, ErrorKind::NotFound);
        assert_eq!(of(14).error("x").kind, ErrorKind::NoSpace);
        assert_eq!(of(90).error("x").kind, ErrorKind::Damaged);
        assert_eq!(of(80).error("x").kind, ErrorKind::Other);
        assert!(of(62).error("x").message.contains("BORG_RELOCATED_REPO_ACCESS_IS_OK"));
        assert!(of(64).older() && of(63).older() && !of(2).older());
        for (code, ran, left_out) in [(0, true, false), (1, true, false), (2, false, false), (3, false, false)] {
            assert_eq!((of(code).ran(), of(code).left_out()), (ran, left_out), "{code}");
        }
        for (code, ran, left_out) in [(99, false, false), (100, true, true), (101, true, false), (106, true, true)] {
            assert_eq!((of(code).ran(), of(code).left_out()), (ran, left_out), "{code}");
        }
        assert!(of(101).never_matched() && !of(130).ran() && !of(143).ran());
    }

    #[test]
    fn no_code_and_no_id_stands_for_two_things() {
        for (at, (id, code, _)) in FAILURES.iter().enumerate() {
            assert!(!FAILURES[at + 1..].iter().any(|other| other.0 == *id || other.1 == *code), "{id}");
        }
    }
}
