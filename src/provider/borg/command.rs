//! Running borg.

use super::{
    BorgOptions,
    outcome::{Finished, Message},
    progress::Progress,
};
use crate::{
    provider::{ErrorKind, ProviderError},
    rights,
};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use std::{
    collections::VecDeque,
    env, fs,
    io::{self, BufRead, BufReader, Read, Write as _},
    os::unix::{fs::MetadataExt, process::CommandExt},
    path::Path,
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// How long a command may take that stores no archive. The first one after other clients have used the repository reads the
/// index of all their archives.
const DEADLINE: Duration = Duration::from_hours(3);
/// How long borg may take to give its locks back when it is told to end.
const END_PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of messages that are kept of one command: the first ones. The last [`LAST`] are kept besides.
const MAX_LOG: usize = 4 << 20;
/// Messages at the end that are kept of one command, however many there are: what went wrong comes last.
const LAST: usize = 64;
/// Bytes of one message.
const MAX_LINE: u64 = 64 << 10;
/// Bytes of an answer: a list of a million archives is smaller.
pub(super) const MAX_OUTPUT: u64 = 256 << 20;

/// Commands that store something; only these have borg test itself first.
const STORES: [&str; 2] = ["init", "create"];

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
    /// Where to keep what it says about progress.
    pub(super) progress: Option<Progress>,
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
        let mut command = rights::command(&self.0.program);
        command.envs(self.0.environment()).arg(verb);
        // A third of the time that borg takes to start. What it reads is compared with our digests.
        if !STORES.contains(&verb) {
            command.env("BORG_SELFTEST", "disabled");
        }
        // A process group of its own: a Ctrl-C is for us, who end borg in order.
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        command
    }

    /// Starts a command on the repository.
    pub(super) fn start(&self, call: &Call<'_>) -> Result<Running, ProviderError> {
        let mut command = self.command(call.verb);
        command.args(["--log-json", "--lock-wait", &whole_seconds(self.0.lock_wait).to_string()]);
        if call.progress.is_some() {
            command.arg("--progress");
        }
        command.args(&call.options).arg(self.place(call.archive)).args(&call.arguments);
        if let Some(directory) = call.directory {
            command.current_dir(directory);
        }
        if let Some(guest) = call.files_cache {
            command.env("BORG_FILES_CACHE_SUFFIX", guest);
        }
        tracing::debug!(?command, "running borg");
        Running::spawn(command, self.0.given_passphrase(), call.progress.clone())
    }

    /// Runs a command to its end.
    pub(super) fn run(&self, call: &Call<'_>) -> Result<Finished, ProviderError> {
        self.start(call)?.finish(&format!("borg {}", call.verb), MAX_OUTPUT)
    }

    /// Looks whether there is a borg, and one that we know. A program file that was found to be one is not asked again until it
    /// is replaced.
    pub(super) fn check_version(&self) -> Result<(), ProviderError> {
        let (file, known) = (program_file(&self.0.program), self.0.known_program());
        if file.is_some() && fs::read_to_string(&known).ok() == file {
            return Ok(());
        }
        let finished = Running::spawn(self.command("--version"), None, None)?.finish("borg --version", 1 << 10)?;
        let text = String::from_utf8_lossy(&finished.output).trim().to_owned();
        if finished.status.success() && is_known(&text) {
            if let Some(Err(error)) = file.map(|file| fs::write(&known, file)) {
                tracing::debug!("{}: {error}", known.display());
            }
            return Ok(());
        }
        let program = self.0.program.display();
        Err(ProviderError::new(
            ErrorKind::Other,
            format!("`{program}` says `{text}`, but borg 1.2 or a later 1.x is needed; nothing was done"),
        ))
    }
}

/// As borg takes times; 0 would be not to wait at all.
fn whole_seconds(time: Duration) -> u128 {
    time.as_millis().div_ceil(1000)
}

/// What tells a program's file from any other, also from one that takes its place.
fn program_file(program: &Path) -> Option<String> {
    let path = if program.components().count() > 1 {
        program.to_owned()
    } else {
        env::split_paths(&env::var_os("PATH")?).map(|directory| directory.join(program)).find(|path| path.is_file())?
    };
    let file = fs::metadata(&path).ok()?;
    let changed = (file.ctime(), file.ctime_nsec());
    Some(format!("{} {} {} {} {changed:?}", path.display(), file.dev(), file.ino(), file.len()))
}

/// Whether `borg --version` has printed a version that we know: 1.2 or a later 1.x.
fn is_known(text: &str) -> bool {
    let number = text.rsplit(' ').next().unwrap_or_default();
    let mut parts = number.split('.').map(|part| part.parse::<u32>().ok());
    matches!((parts.next().flatten(), parts.next().flatten()), (Some(1), Some(2..)))
}

/// A borg at work. Dropping it ends it.
pub(super) struct Running {
    child: Child,
    stdout: Option<ChildStdout>,
    log: Option<JoinHandle<Vec<Message>>>,
    status: Option<ExitStatus>,
}

impl Running {
    /// `secret` is what borg finds on its standard input.
    fn spawn(mut command: Command, secret: Option<&str>, progress: Option<Progress>) -> Result<Self, ProviderError> {
        if secret.is_some() {
            command.stdin(Stdio::piped());
        }
        let mut child = command.spawn().map_err(|error| {
            let program = command.get_program().display();
            let what = match error.kind() {
                io::ErrorKind::NotFound => format!("`{program}` is not installed, or not in PATH"),
                _ => format!("`{program}` cannot be started"),
            };
            ProviderError::caused_by(ErrorKind::Other, what, error)
        })?;
        if let (Some(secret), Some(mut stdin)) = (secret, child.stdin.take()) {
            // It is far smaller than a pipe. A borg that does not want it is not our concern.
            let _ = stdin.write_all(secret.as_bytes());
        }
        let stdout = child.stdout.take();
        let log = child.stderr.take().map(|stderr| thread::spawn(move || read_log(stderr, progress.as_ref())));
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

/// Reads messages to their end: borg must not wait for a reader.
fn read_log(stderr: impl Read, progress: Option<&Progress>) -> Vec<Message> {
    let mut first = Vec::new();
    let mut last = VecDeque::new();
    let mut bytes = 0;
    let mut reader = BufReader::new(stderr);
    let mut line = Vec::new();
    while matches!(reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line), Ok(1..)) {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        line.clear();
        if progress.is_some_and(|progress| progress.take(&text)) {
            continue;
        }
        tracing::debug!("borg: {text}");
        bytes += text.len();
        let message = Message::of_line(&text);
        if let Some(progress) = progress {
            progress.look_at(&message);
        }
        if bytes < MAX_LOG {
            first.push(message);
        } else {
            last.push_back(message);
            if last.len() > LAST {
                last.pop_front();
            }
        }
    }
    first.extend(last);
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_of_less_than_a_second_is_not_none() {
        let seconds = [0, 1, 500, 1000, 1001].map(|millis| whole_seconds(Duration::from_millis(millis)));
        assert_eq!(seconds, [0, 1, 1, 1, 2]);
    }

    #[test]
    fn borgs_from_1_2_on_are_known() {
        for known in ["borg 1.2.4", "borg 1.4.0", "borg 1.4.0rc1", "borg 1.10.0"] {
            assert!(is_known(known), "{known}");
        }
        for unknown in ["borg 1.1.18", "borg 2.0.0b14", "borg", "", "attic 0.16", "borg 1"] {
            assert!(!is_known(unknown), "{unknown}");
        }
    }

    #[test]
    fn a_program_that_takes_the_place_of_another_is_another() {
        let directory = tempfile::tempdir().expect("directory");
        let program = directory.path().join("borg");
        assert_eq!(program_file(&program), None);
        fs::write(&program, "a").expect("written");
        let first = program_file(&program).expect("there");
        assert_eq!(program_file(&program).as_ref(), Some(&first));
        let next = directory.path().join("next");
        fs::write(&next, "b").expect("written");
        fs::rename(&next, &program).expect("renamed");
        assert_ne!(program_file(&program), Some(first));
        assert!(program_file(Path::new("sh")).expect("in PATH").contains("/sh "));
    }

    #[test]
    fn the_end_of_a_long_log_is_kept_and_its_size_bounded() {
        let mut log = "x".repeat(2 * MAX_LINE as usize) + "\n";
        log += &"a line of about a hundred bytes, so that there is more of them than what is kept in all, a lot more\n"
            .repeat(100_000);
        log += r#"{"levelname": "ERROR", "message": "the end", "msgid": "LockTimeout"}"#;
        let messages = read_log(log.as_bytes(), None);
        assert!(messages.len() < 60_000, "{}", messages.len());
        assert_eq!(messages.last().expect("some").text, "the end");
        assert_eq!(messages[0].text.len() as u64, MAX_LINE);
    }
}
