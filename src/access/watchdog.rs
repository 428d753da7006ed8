//! Thaws and resumes the guest when we cannot any more.
//!
//! A child process holds the reading end of a pipe. Over it we say what we are about to do to the guest and what we have
//! undone; when the pipe closes before the word `done`, because we were killed or gave up, the child undoes the rest. It does
//! nothing that it was not told of, so it neither thaws nor resumes what somebody else froze or paused.

use crate::qmp::{
    Qmp, QmpError,
    agent::{Agent, AgentError, FsfreezeStatus},
};
use crate::report::spelled_out;
use serde_json::Value;
use std::{
    ffi::OsStr,
    fmt, io,
    io::Write,
    os::fd::AsFd,
    path::PathBuf,
    process::{ExitStatus, Stdio},
    time::Duration,
};
use thiserror::Error;
use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    net::unix::pipe,
    process::{Child, ChildStdin, Command},
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep, timeout},
};

/// The hidden subcommand that has to call [`run_child`]; its options are `--agent SOCKET` and `--qmp SOCKET`.
pub const SUBCOMMAND: &str = "__thaw-watchdog";

/// How long the child may take to come up, and to leave when it is not needed any more.
const CHILD_LIMIT: Duration = Duration::from_secs(10);
/// How long the child tries to help a guest that does not answer.
const RESCUE_LIMIT: Duration = Duration::from_mins(15);
const RESCUE_PAUSE: Duration = Duration::from_secs(1);
/// One attempt at the agent. A thaw that waits behind a freeze takes as long as that.
const THAW_LIMIT: Duration = Duration::from_mins(1);
/// More words than this are none of ours.
const WORDS: u64 = 64 << 10;

/// What the child is told, a word a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    Freeze,
    Thawed,
    Pause,
    Resumed,
    Done,
}

impl Word {
    const ALL: [(Self, &'static str); 5] = [
        (Self::Freeze, "freeze"),
        (Self::Thawed, "thawed"),
        (Self::Pause, "pause"),
        (Self::Resumed, "resumed"),
        (Self::Done, "done"),
    ];

    fn of(line: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, text)| *text == line.trim()).map(|(word, _)| *word)
    }

    fn text(self) -> &'static str {
        Self::ALL.iter().find(|(word, _)| *word == self).map_or("", |(_, text)| text)
    }
}

/// Written by the child when it listens.
const READY: &str = "pvebackup-watchdog-ready";

/// Why there is no watchdog. The guest must then be neither frozen nor paused.
#[derive(Debug, Error)]
pub enum WatchdogError {
    /// The child process cannot be started.
    #[error("cannot start the thaw watchdog")]
    Spawn(#[source] io::Error),
    /// It did not come up.
    #[error("the thaw watchdog does not come up within {limit:?}")]
    NotReady {
        /// The limit.
        limit: Duration,
    },
    /// It is gone.
    #[error("the thaw watchdog is gone")]
    Gone(#[source] io::Error),
}

/// The watchdog, as seen from the process that it watches. Dropping it without [`Watchdog::disarm`] sets it off.
#[derive(Debug)]
pub struct Watchdog {
    child: Child,
    pipe: ChildStdin,
}

impl Watchdog {
    /// Starts a watchdog over a guest: `agent` for thawing, `qmp` for resuming. It knows of nothing to undo yet.
    ///
    /// # Errors
    /// See [`WatchdogError`].
    pub async fn arm(agent: Option<PathBuf>, qmp: Option<PathBuf>) -> Result<Self, WatchdogError> {
        // Unlike the path of our program this finds it even after it was replaced by an update.
        let mut command = Command::from(crate::rights::command("/proc/self/exe"));
        command.arg0("pvebackup").arg(SUBCOMMAND);
        for (option, socket) in [("--agent", &agent), ("--qmp", &qmp)] {
            if let Some(socket) = socket {
                // The child leaves our working directory.
                let socket = std::path::absolute(socket).map_err(WatchdogError::Spawn)?;
                command.args([OsStr::new(option), socket.as_os_str()]);
            }
        }
        Self::start(command).await
    }

    pub(super) async fn start(mut command: Command) -> Result<Self, WatchdogError> {
        // A process group of its own: Ctrl-C on the terminal is for us, who then end in an orderly way.
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .current_dir("/")
            .process_group(0)
            .spawn()
            .map_err(WatchdogError::Spawn)?;
        let (Some(pipe), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(WatchdogError::Spawn(io::ErrorKind::BrokenPipe.into()));
        };
        let mut lines = BufReader::new(stdout.take(WORDS)).lines();
        let ready = async {
            while let Some(line) = lines.next_line().await? {
                if line == READY {
                    return Ok(());
                }
            }
            Err(io::ErrorKind::UnexpectedEof.into())
        };
        match timeout(CHILD_LIMIT, ready).await {
            Ok(Ok(())) => Ok(Self { child, pipe }),
            Ok(Err(error)) => Err(WatchdogError::Gone(error)),
            Err(_) => Err(WatchdogError::NotReady { limit: CHILD_LIMIT }),
        }
    }

    /// To be called before the agent is asked to freeze.
    pub async fn before_freeze(&mut self) -> Result<(), WatchdogError> {
        self.say(Word::Freeze).await
    }

    /// The file systems are thawed again.
    pub async fn after_thaw(&mut self) -> Result<(), WatchdogError> {
        self.say(Word::Thawed).await
    }

    /// To be called before `stop`, and only when the guest runs: the pause is ours from now on.
    pub async fn before_pause(&mut self) -> Result<(), WatchdogError> {
        self.say(Word::Pause).await
    }

    /// The guest runs again, or the pause is not ours to end any more.
    pub async fn after_resume(&mut self) -> Result<(), WatchdogError> {
        self.say(Word::Resumed).await
    }

    async fn say(&mut self, word: Word) -> Result<(), WatchdogError> {
        // A pipe holds more than we ever say: this does not block.
        self.pipe.write_all(format!("{}\n", word.text()).as_bytes()).await.map_err(WatchdogError::Gone)?;
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(WatchdogError::Gone(io::Error::other(status.to_string()))),
            Err(error) => Err(WatchdogError::Gone(error)),
        }
    }

    /// Nothing is left to undo: sends the watchdog away and waits for it.
    pub async fn disarm(mut self) {
        let _ = self.say(Word::Done).await;
        let Self { mut child, pipe } = self;
        drop(pipe);
        let left: Result<io::Result<ExitStatus>, _> = timeout(CHILD_LIMIT, child.wait()).await;
        if !matches!(left, Ok(Ok(status)) if status.success()) {
            tracing::debug!(?left, "thaw watchdog did not leave well");
        }
    }
}

/// What a watchdog had to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rescue {
    /// Nothing.
    NotNeeded,
    /// It put the guest right.
    Done,
    /// It could not, within its time.
    Failed,
}

/// The child's whole life, over this process's own standard input and output: for the hidden subcommand.
///
/// # Errors
/// When the signals that must not end it cannot be caught, or when standard input and output are no pipes.
pub async fn run_child(agent: Option<PathBuf>, qmp: Option<PathBuf>) -> io::Result<Rescue> {
    // A service manager that stops us sends these to every process of the unit.
    let _caught = [
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
        signal(SignalKind::hangup())?,
        signal(SignalKind::quit())?,
    ];
    let words = pipe::Receiver::from_owned_fd(io::stdin().as_fd().try_clone_to_owned()?)?;
    let ready = pipe::Sender::from_owned_fd(io::stdout().as_fd().try_clone_to_owned()?)?;
    Ok(watch(BufReader::new(words), ready, agent, qmp).await)
}

async fn watch(
    words: impl AsyncBufRead + Unpin,
    mut ready: impl AsyncWrite + Unpin,
    agent: Option<PathBuf>,
    qmp: Option<PathBuf>,
) -> Rescue {
    let (mut frozen, mut paused) = (false, false);
    if ready.write_all(format!("{READY}\n").as_bytes()).await.is_err() || ready.flush().await.is_err() {
        return Rescue::NotNeeded;
    }
    // An error on the pipe is its end. A line that was cut by the end still counts: better to thaw once too often.
    let mut lines = words.take(WORDS).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        match Word::of(&line) {
            Some(Word::Freeze) => frozen = true,
            Some(Word::Thawed) => frozen = false,
            Some(Word::Pause) => paused = true,
            Some(Word::Resumed) => paused = false,
            Some(Word::Done) => return Rescue::NotNeeded,
            None => {}
        }
    }
    let (agent, qmp) = (agent.filter(|_| frozen), qmp.filter(|_| paused));
    if agent.is_none() && qmp.is_none() {
        return Rescue::NotNeeded;
    }
    report(format_args!("the backup ended without cleaning up: putting the guest right"));
    // Both at once: a paused guest cannot thaw, but a QMP socket that others hold must not keep a running one frozen.
    let resuming = async {
        let Some(qmp) = qmp.map(Qmp::new) else { return true };
        insist("resume", async || resume(&qmp).await, |e| matches!(e, QmpError::Connect { .. })).await
    };
    let thawing = async {
        let Some(mut agent) = agent.map(Agent::new) else { return true };
        insist(
            "thaw",
            async || thaw(&mut agent).await,
            |e| {
                matches!(e, AgentError::Connect { source, .. }
                if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused))
            },
        )
        .await
    };
    let (resumed, thawed) = tokio::join!(resuming, thawing);
    if resumed && thawed { Rescue::Done } else { Rescue::Failed }
}

/// Repeats an attempt until it succeeds, QEMU is gone, or the time is over; `false` in the last case.
async fn insist<E: std::error::Error>(
    doing: &str,
    mut attempt: impl AsyncFnMut() -> Result<&'static str, E>,
    gone: impl Fn(&E) -> bool,
) -> bool {
    let deadline = Instant::now() + RESCUE_LIMIT;
    loop {
        match attempt().await {
            Ok(done) => {
                report(format_args!("{done}"));
                return true;
            }
            Err(error) if gone(&error) => {
                report(format_args!("no need to {doing} the guest: QEMU is gone"));
                return true;
            }
            Err(error) if Instant::now() >= deadline => {
                report(format_args!("giving up: cannot {doing} the guest: {}", spelled_out(&error)));
                return false;
            }
            Err(error) => report(format_args!("cannot {doing} the guest yet: {}", spelled_out(&error))),
        }
        sleep(RESCUE_PAUSE).await;
    }
}

/// Resumes a guest that is paused. Any other state is not ours to change.
async fn resume(qmp: &Qmp) -> Result<&'static str, QmpError> {
    let mut session = qmp.session().await?;
    let status = session.execute_value("query-status", Value::Null).await?;
    if status["status"] == "paused" {
        session.execute_value("cont", Value::Null).await?;
        Ok("resumed the guest")
    } else {
        Ok("the guest is not paused")
    }
}

/// Thaws. An agent that refuses because nothing is frozen counts as having thawed.
async fn thaw(agent: &mut Agent) -> Result<&'static str, AgentError> {
    match agent.fsfreeze_thaw(THAW_LIMIT).await {
        Ok(()) => Ok("thawed the guest's file systems"),
        Err(refused @ AgentError::Refused { .. }) => match agent.fsfreeze_status(THAW_LIMIT).await {
            Ok(FsfreezeStatus::Thawed) => Ok("the guest's file systems are thawed"),
            _ => Err(refused),
        },
        Err(error) => Err(error),
    }
}

/// The terminal may be gone with the process that we watched, which must not stop us.
fn report(what: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "pvebackup thaw watchdog: {what}");
}

#[cfg(test)]
mod tests;
