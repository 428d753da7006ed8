//! Running borg.

use super::BorgOptions;
use crate::provider::{ErrorKind, ProviderError};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use serde::Deserialize;
use std::{
    io::{self, BufRead, BufReader, Read},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// Where it is looked for, in `PATH`.
const PROGRAM: &str = "borg";
/// How long a command may take that stores no archive. The first one after other clients have used the repository reads the
/// index of all their archives.
const DEADLINE: Duration = Duration::from_hours(3);
/// How long borg may take to give its locks back when it is told to end.
const END_PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of messages that are kept of one command.
const MAX_LOG: u64 = 4 << 20;
/// Bytes of an answer: a list of a million archives is smaller.
pub(super) const MAX_OUTPUT: u64 = 256 << 20;

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
    fn of_line(line: &str) -> Self {
        // What is no JSON comes from Python itself, or from a program that borg runs.
        serde_json::from_str(line).unwrap_or_else(|_| Self { text: line.to_owned(), ..Self::default() })
    }

    fn kind(&self) -> Option<ErrorKind> {
        let id = self.id.as_deref().unwrap_or_default();
        Some(match id {
            "Repository.DoesNotExist" | "Repository.InvalidRepository" | "Repository.PathPermissionDenied" => {
                ErrorKind::RepositoryMissing
            }
            "LockTimeout" | "LockErrorT" | "LockError" => ErrorKind::Locked,
            "PassphraseWrong"
            | "PasscommandFailure"
            | "PasswordRetriesExceeded"
            | "NoPassphraseFailure"
            | "KeyfileNotFoundError"
            | "KeyfileInvalidError"
            | "RepoKeyNotFoundError" => ErrorKind::Credentials,
            "Archive.DoesNotExist" => ErrorKind::NotFound,
            "Repository.InsufficientFreeSpaceError" | "Repository.StorageQuotaExceeded" => ErrorKind::NoSpace,
            "IntegrityError"
            | "FileIntegrityError"
            | "ArchiveTAMInvalid"
            | "Repository.CheckNeeded"
            | "Repository.ObjectNotFound"
            | "Manifest.NoManifestError" => ErrorKind::Damaged,
            _ if self.text.contains("No space left on device") => ErrorKind::NoSpace,
            _ if self.text.contains("Permission denied (") || self.text.contains("Host key verification failed") => {
                ErrorKind::Credentials
            }
            _ => return None,
        })
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
        matches!(self.status.code(), Some(0 | 1))
    }

    /// The messages' own words for what went wrong.
    pub(super) fn error(&self, what: &str) -> ProviderError {
        let kind = self.messages.iter().find_map(Message::kind).unwrap_or(ErrorKind::Other);
        let said = self.messages.iter().rev().find(|m| m.level == "ERROR" || m.level == "CRITICAL");
        // SSH's own words come before borg's, who only knows that it was left alone.
        let remote = self.messages.iter().find(|m| m.text.starts_with("Remote: "));
        let mut text: Vec<&str> = Vec::new();
        text.extend(remote.iter().chain(&said).map(|m| m.text.lines().next().unwrap_or_default().trim()));
        if text.is_empty() {
            text.extend(self.messages.last().map(|m| m.text.trim()));
        }
        let text: String = text.join("; ").chars().take(1000).collect();
        ProviderError::new(kind, format!("{what}: borg ended with {}: {text}", self.status))
    }
}

/// One command on the repository.
#[derive(Default)]
pub(super) struct Call<'a> {
    /// `create`, `list`, …
    pub(super) verb: &'static str,
    /// What comes before the repository.
    pub(super) options: Vec<String>,
    /// The archive in the repository.
    pub(super) archive: Option<&'a str>,
    /// What comes behind.
    pub(super) arguments: Vec<String>,
    /// Where to run, if that matters.
    pub(super) directory: Option<&'a Path>,
    /// The guest whose files cache is used.
    pub(super) files_cache: Option<&'a str>,
}

/// How to run borg for one repository.
#[derive(Clone, Debug)]
pub(super) struct Borg(Arc<BorgOptions>);

impl Borg {
    pub(super) fn new(options: BorgOptions) -> Self {
        Self(Arc::new(options))
    }

    pub(super) fn options(&self) -> &BorgOptions {
        &self.0
    }

    /// The repository, or an archive in it, as borg takes it.
    pub(super) fn place(&self, archive: Option<&str>) -> String {
        let repository = self.0.location();
        archive.map_or(repository.clone(), |archive| format!("{repository}::{archive}"))
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(PROGRAM);
        let (set, unset) = self.0.environment();
        for name in unset {
            command.env_remove(name);
        }
        command.envs(set).arg(verb);
        // A process group of its own: a Ctrl-C is for us, who end borg in order.
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        command
    }

    /// Starts a command on the repository.
    pub(super) fn start(&self, call: &Call<'_>) -> Result<Running, ProviderError> {
        let mut command = self.command(call.verb);
        command.args(["--log-json", "--lock-wait", &self.0.lock_wait.as_secs().to_string()]);
        command.args(&call.options).arg(self.place(call.archive)).args(&call.arguments);
        if let Some(directory) = call.directory {
            command.current_dir(directory);
        }
        if let Some(guest) = call.files_cache {
            command.env("BORG_FILES_CACHE_SUFFIX", guest);
        }
        tracing::debug!(?command, "running borg");
        Running::spawn(command)
    }

    /// Runs a command to its end.
    pub(super) fn run(&self, call: &Call<'_>) -> Result<Finished, ProviderError> {
        self.start(call)?.finish(&format!("borg {}", call.verb), MAX_OUTPUT)
    }

    /// Looks whether there is a borg, and one that we know.
    pub(super) fn check_version(&self) -> Result<(), ProviderError> {
        let finished = Running::spawn(self.command("--version"))?.finish("borg --version", 1 << 10)?;
        let text = String::from_utf8_lossy(&finished.output).trim().to_owned();
        let number = text.rsplit(' ').next().unwrap_or_default();
        let mut parts = number.split('.').map(|part| part.parse::<u32>().ok());
        match (parts.next().flatten(), parts.next().flatten()) {
            (Some(1), Some(2..)) => Ok(()),
            _ => Err(ProviderError::new(
                ErrorKind::Other,
                format!("`{text}` is installed, but borg 1.2 or a later 1.x is needed"),
            )),
        }
    }
}

/// A borg at work. Dropping it ends it.
pub(super) struct Running {
    child: Child,
    stdout: Option<ChildStdout>,
    log: Option<JoinHandle<Vec<Message>>>,
    status: Option<ExitStatus>,
}

impl Running {
    fn spawn(mut command: Command) -> Result<Self, ProviderError> {
        let mut child = command.spawn().map_err(|error| {
            let what = match error.kind() {
                io::ErrorKind::NotFound => format!("`{PROGRAM}` is not installed, or not in PATH"),
                _ => format!("`{PROGRAM}` cannot be started"),
            };
            ProviderError::caused_by(ErrorKind::Other, what, error)
        })?;
        let stdout = child.stdout.take();
        let log = child.stderr.take().map(|stderr| {
            thread::spawn(move || {
                let mut messages = Vec::new();
                let mut reader = BufReader::new(stderr.take(MAX_LOG));
                let mut line = Vec::new();
                while matches!(reader.read_until(b'\n', &mut line), Ok(1..)) {
                    let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                    tracing::debug!("borg: {text}");
                    messages.push(Message::of_line(&text));
                    line.clear();
                }
                // borg must not wait for a reader.
                let _ = io::copy(&mut reader.into_inner().into_inner(), &mut io::sink());
                messages
            })
        });
        Ok(Self { child, stdout, log, status: None })
    }

    /// Its output, for who reads it as it comes.
    pub(super) fn take_output(&mut self) -> Option<ChildStdout> {
        self.stdout.take()
    }

    /// How it has ended, if it has.
    pub(super) fn poll(&mut self) -> Result<Option<ExitStatus>, ProviderError> {
        if self.status.is_none() {
            let status = self.child.try_wait();
            self.status =
                status.map_err(|e| ProviderError::caused_by(ErrorKind::Other, "borg cannot be waited for", e))?;
        }
        Ok(self.status)
    }

    /// Waits for its end, [`DEADLINE`] at most.
    pub(super) fn finish(self, what: &str, limit: u64) -> Result<Finished, ProviderError> {
        let end = Instant::now() + DEADLINE;
        self.finish_unless(what, limit, || {
            (Instant::now() > end).then(|| ProviderError::new(ErrorKind::Other, format!("`{what}` does not end")))
        })
    }

    /// Waits for its end, or ends it when `stop` gives a reason. `limit` is the size of its output at most, in bytes.
    pub(super) fn finish_unless(
        mut self,
        what: &str,
        limit: u64,
        stop: impl Fn() -> Option<ProviderError>,
    ) -> Result<Finished, ProviderError> {
        // When there is too much the pipe closes, and borg ends.
        let output = self.stdout.take().map(|stdout| {
            thread::spawn(move || {
                let mut bytes = Vec::new();
                stdout.take(limit.saturating_add(1)).read_to_end(&mut bytes).map(|_| bytes)
            })
        });
        let mut pause = Duration::from_millis(1);
        let status = loop {
            if let Some(status) = self.poll()? {
                break status;
            }
            if let Some(reason) = stop() {
                self.end();
                return Err(reason);
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        };
        let cannot =
            |e| ProviderError::caused_by(ErrorKind::Other, format!("the output of `{what}` cannot be read"), e);
        let output =
            output.map_or_else(|| Ok(Vec::new()), |o| o.join().unwrap_or_else(|_| Ok(Vec::new()))).map_err(cannot)?;
        if output.len() as u64 > limit {
            return Err(ProviderError::new(ErrorKind::Damaged, format!("`{what}` writes more than {limit} bytes")));
        }
        let messages = self.log.take().and_then(|log| log.join().ok()).unwrap_or_default();
        Ok(Finished { status, output, messages })
    }

    /// Ends it and what it has started: in order, so that it gives its locks back, and if that takes too long by force.
    fn end(&mut self) {
        let group = Pid::from_raw(self.child.id() as i32);
        let _ = killpg(group, Signal::SIGTERM);
        let end = Instant::now() + END_PATIENCE;
        while matches!(self.poll(), Ok(None)) && Instant::now() < end {
            thread::sleep(Duration::from_millis(20));
        }
        if matches!(self.poll(), Ok(None)) {
            let _ = killpg(group, Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.poll(), Ok(None)) {
            self.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn failures_are_told_apart_by_borgs_message_ids() {
        let kind = |line: &str| {
            let finished = Finished {
                status: ExitStatus::from_raw(2 << 8),
                output: Vec::new(),
                messages: vec![Message::of_line(line)],
            };
            finished.error("x").kind
        };
        let json = |id: &str| format!(r#"{{"levelname": "ERROR", "message": "m", "msgid": "{id}"}}"#);
        assert_eq!(kind(&json("Repository.DoesNotExist")), ErrorKind::RepositoryMissing);
        assert_eq!(kind(&json("LockTimeout")), ErrorKind::Locked);
        assert_eq!(kind(&json("PassphraseWrong")), ErrorKind::Credentials);
        assert_eq!(kind(&json("Archive.DoesNotExist")), ErrorKind::NotFound);
        assert_eq!(kind(&json("Else")), ErrorKind::Other);
        assert_eq!(kind("OSError: [Errno 28] No space left on device"), ErrorKind::NoSpace);
        assert_eq!(kind(r#"{"message": "Remote: Host key verification failed."}"#), ErrorKind::Credentials);
    }
}
