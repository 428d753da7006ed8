//! The guest agent, over its unix socket.

use super::wire::{Wire, WireError};
use serde_json::{Value, json};
use std::{
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};
use thiserror::Error;
use tokio::{
    net::UnixStream,
    time::{Instant, sleep, timeout_at},
};

/// Limit of [`Agent::ping`]; Proxmox VE's.
pub const PING_LIMIT: Duration = Duration::from_secs(3);
/// Longest line accepted, in bytes: the answers that we ask for are short, and the guest is not trusted.
const LINE_LIMIT: usize = 64 << 10;
/// No JSON text has this byte. It tells the agent to forget half a request, and starts the answer to `guest-sync-delimited`.
const DELIMITER: u8 = 0xff;
const RETRY: Duration = Duration::from_millis(100);

/// Why an exchange with the guest agent failed.
#[derive(Debug, Error)]
pub enum AgentError {
    /// The socket cannot be connected, or QEMU hung up before anything was asked. Nothing was done.
    #[error("cannot connect to guest agent socket {socket}")]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Nobody answers: the agent does not run (or is stuck, or the guest is paused, or another client holds the socket). The
    /// command was not sent.
    #[error("the guest agent does not answer within {limit:?}")]
    NotRunning {
        /// The limit.
        limit: Duration,
    },
    /// The agent refused the command.
    #[error("the guest agent refuses `{command}`: {desc}")]
    Refused {
        /// The command.
        command: &'static str,
        /// Error class.
        class: String,
        /// The agent's text.
        desc: String,
    },
    /// No answer in time. Whether the agent carried the command out, or will, is unknown.
    #[error("no answer to `{command}` within {limit:?}; whether it took effect is unknown")]
    TimedOut {
        /// The command.
        command: &'static str,
        /// The limit.
        limit: Duration,
    },
    /// The connection ended. Whether the agent carried the command out is unknown.
    #[error("the connection to the guest agent ended during `{command}`")]
    Closed {
        /// The command.
        command: &'static str,
    },
    /// An answer that makes no sense. The command may have taken effect.
    #[error("unexpected answer to `{command}`: {what}")]
    Protocol {
        /// The command.
        command: &'static str,
        /// What was wrong.
        what: String,
    },
}

impl AgentError {
    /// Whether the command may have taken effect, now or later, although it failed.
    pub fn outcome_unknown(&self) -> bool {
        matches!(self, Self::TimedOut { .. } | Self::Closed { .. } | Self::Protocol { .. })
    }
}

/// What `guest-fsfreeze-status` tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FsfreezeStatus {
    /// All file systems are writable.
    Thawed,
    /// File systems are frozen.
    Frozen,
    /// A word that we do not know.
    Other(String),
}

/// A client of one guest's agent. It connects when first used and stays connected until dropped, which keeps other clients
/// out: keep it for as long as the file systems are frozen, and not longer.
///
/// The agent works through its requests one by one. So an answer to anything sent after a command whose answer was lost
/// tells that this command is over, one way or the other.
#[derive(Debug)]
pub struct Agent {
    socket: PathBuf,
    wire: Option<Wire<UnixStream>>,
}

impl Agent {
    /// The agent behind `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), wire: None }
    }

    /// An agent that is connected already.
    #[cfg(any(test, fuzzing))]
    pub(super) fn over(stream: UnixStream) -> Self {
        Self { socket: PathBuf::new(), wire: Some(Wire::new(stream, LINE_LIMIT)) }
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Whether the agent answers, within [`PING_LIMIT`].
    ///
    /// # Errors
    /// [`AgentError::NotRunning`] when it does not.
    pub async fn ping(&mut self) -> Result<(), AgentError> {
        self.execute("guest-ping", PING_LIMIT).await.map(drop)
    }

    /// Whether file systems are frozen.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn fsfreeze_status(&mut self, limit: Duration) -> Result<FsfreezeStatus, AgentError> {
        const NAME: &str = "guest-fsfreeze-status";
        match self.execute(NAME, limit).await?.as_str() {
            Some("thawed") => Ok(FsfreezeStatus::Thawed),
            Some("frozen") => Ok(FsfreezeStatus::Frozen),
            Some(other) => Ok(FsfreezeStatus::Other(other.chars().take(40).collect())),
            None => Err(AgentError::Protocol { command: NAME, what: "no text".into() }),
        }
    }

    /// Freezes the file systems. Returns how many.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn fsfreeze_freeze(&mut self, limit: Duration) -> Result<u64, AgentError> {
        let command = "guest-fsfreeze-freeze";
        let answer = self.execute(command, limit).await?;
        answer.as_u64().ok_or_else(|| AgentError::Protocol { command, what: "no count".into() })
    }

    /// Thaws the file systems; also succeeds when they were not frozen. How many the agent says does not matter (on Windows
    /// it is no number to rely on).
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn fsfreeze_thaw(&mut self, limit: Duration) -> Result<(), AgentError> {
        self.execute("guest-fsfreeze-thaw", limit).await.map(drop)
    }

    /// Lets other clients in. The next command connects again.
    pub fn disconnect(&mut self) {
        self.wire = None;
    }

    async fn execute(&mut self, command: &'static str, limit: Duration) -> Result<Value, AgentError> {
        let deadline = Instant::now() + limit;
        let mut wire = if let Some(wire) = self.wire.take() {
            wire
        } else {
            let connect = connect(&self.socket);
            timeout_at(deadline, connect).await.unwrap_or(Err(AgentError::NotRunning { limit }))?
        };
        // An agent that is not there must not find the command when it comes up later: ask for a sign of life first.
        match timeout_at(deadline, synchronise(&mut wire)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                let source = match error {
                    WireError::Closed(Some(source)) => source,
                    WireError::Closed(None) => ErrorKind::UnexpectedEof.into(),
                    too_long @ WireError::TooLong { .. } => io::Error::new(ErrorKind::InvalidData, too_long),
                };
                return Err(AgentError::Connect { socket: self.socket.clone(), source });
            }
            Err(_) => {
                // What waits in this connection for the agent stays in order with what follows.
                self.wire = Some(wire);
                return Err(AgentError::NotRunning { limit });
            }
        }
        let request = format!("{}\n", json!({ "execute": command }));
        let exchange = async {
            wire.send(request.as_bytes()).await?;
            wire.line().await
        };
        match timeout_at(deadline, exchange).await {
            Ok(Ok(line)) => {
                self.wire = Some(wire);
                answer(command, &line)
            }
            Ok(Err(WireError::Closed(_))) => Err(AgentError::Closed { command }),
            Ok(Err(error @ WireError::TooLong { .. })) => {
                Err(AgentError::Protocol { command, what: error.to_string() })
            }
            Err(_) => {
                self.wire = Some(wire);
                Err(AgentError::TimedOut { command, limit })
            }
        }
    }
}

async fn connect(socket: &Path) -> Result<Wire<UnixStream>, AgentError> {
    loop {
        match UnixStream::connect(socket).await {
            Ok(stream) => return Ok(Wire::new(stream, LINE_LIMIT)),
            // Too many clients wait.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => sleep(RETRY).await,
            Err(source) => return Err(AgentError::Connect { socket: socket.to_owned(), source }),
        }
    }
}

/// Brings both ends to the same point of the stream: whatever was asked before, by us or by a client before us, is answered
/// or forgotten.
async fn synchronise(wire: &mut Wire<UnixStream>) -> Result<(), WireError> {
    // Any number that is not in use by an answer still under way does; JSON numbers are exact up to 2^53.
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let id = (now.as_nanos() as u64) & ((1 << 52) - 1);
    let mut request = vec![DELIMITER];
    request.extend(json!({ "execute": "guest-sync-delimited", "arguments": { "id": id } }).to_string().bytes());
    request.push(b'\n');
    wire.send(&request).await?;
    loop {
        wire.skip_past(DELIMITER).await?;
        let line = wire.line().await?;
        let message: Value = serde_json::from_slice(&line).unwrap_or_default();
        if message["return"].as_u64() == Some(id) {
            return Ok(());
        }
    }
}

fn answer(command: &'static str, line: &[u8]) -> Result<Value, AgentError> {
    let mut message: Value =
        serde_json::from_slice(line).map_err(|e| AgentError::Protocol { command, what: e.to_string() })?;
    if let Some(error) = message.get("error") {
        // The guest writes this; it ends up in our log.
        let text = |member| error[member].as_str().unwrap_or_default().chars().take(300).collect();
        return Err(AgentError::Refused { command, class: text("class"), desc: text("desc") });
    }
    match message.get_mut("return") {
        Some(value) => Ok(value.take()),
        None => Err(AgentError::Protocol { command, what: "neither `return` nor `error`".into() }),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};
    use tempfile::TempDir;
    use tokio::{
        io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
        net::UnixListener,
        task::JoinHandle,
    };

    /// How the scripted agent treats a command.
    #[derive(Clone, Debug)]
    pub(crate) enum Reply {
        Return(Value),
        Error(&'static str),
        /// Carried out, but the answer comes late.
        Late(Duration, Value),
        /// Carried out, but the connection ends instead.
        HangUp,
        Line(&'static str),
    }

    /// An agent that answers by the book unless told otherwise, one request after the other as the real one does.
    pub(crate) struct ScriptedAgent {
        pub(crate) socket: PathBuf,
        pub(crate) seen: Arc<Mutex<Vec<String>>>,
        pub(crate) frozen: Arc<Mutex<bool>>,
        _dir: TempDir,
        task: JoinHandle<()>,
    }

    impl Drop for ScriptedAgent {
        fn drop(&mut self) {
            self.task.abort();
        }
    }

    impl ScriptedAgent {
        pub(crate) fn start(script: impl Fn(&str, usize) -> Option<Reply> + Send + Sync + 'static) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let socket = dir.path().join("qga");
            let listener = UnixListener::bind(&socket).unwrap();
            let seen: Arc<Mutex<Vec<String>>> = Arc::default();
            let frozen: Arc<Mutex<bool>> = Arc::default();
            let (log, state) = (seen.clone(), frozen.clone());
            let task = tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    serve(stream, &script, &log, &state).await;
                }
            });
            Self { socket, seen, frozen, _dir: dir, task }
        }

        pub(crate) fn seen(&self) -> Vec<String> {
            self.seen.lock().unwrap().clone()
        }

        pub(crate) fn is_frozen(&self) -> bool {
            *self.frozen.lock().unwrap()
        }
    }

    async fn serve(
        stream: UnixStream,
        script: &(impl Fn(&str, usize) -> Option<Reply> + Send + Sync),
        log: &Mutex<Vec<String>>,
        frozen: &Mutex<bool>,
    ) {
        let (read, mut write) = stream.into_split();
        let mut read = BufReader::new(read);
        // As after a client that went away before its answer came.
        let _ = write.write_all(b"{\"return\": \"stale\"}\n\xff{\"return\": 17}\n").await;
        loop {
            let mut line = Vec::new();
            if !matches!(read.read_until(b'\n', &mut line).await, Ok(1..)) {
                return;
            }
            let start = line.iter().position(|b| *b == DELIMITER).map_or(0, |at| at + 1);
            let request: Value = serde_json::from_slice(&line[start..]).unwrap();
            let name = request["execute"].as_str().unwrap().to_owned();
            if name == "guest-sync-delimited" {
                assert_eq!(start, 1);
                let mut answer = vec![DELIMITER];
                answer.extend(format!("{}\n", json!({"return": request["arguments"]["id"]})).bytes());
                let _ = write.write_all(&answer).await;
                continue;
            }
            let nth = {
                let mut log = log.lock().unwrap();
                log.push(name.clone());
                log.iter().filter(|n| **n == name).count()
            };
            let by_the_book = {
                let mut frozen = frozen.lock().unwrap();
                match name.as_str() {
                    "guest-ping" => json!({}),
                    "guest-fsfreeze-status" => json!(if *frozen { "frozen" } else { "thawed" }),
                    "guest-fsfreeze-freeze" => {
                        *frozen = true;
                        json!(3)
                    }
                    "guest-fsfreeze-thaw" => json!(if std::mem::take(&mut *frozen) { 3 } else { 0 }),
                    other => panic!("unexpected {other}"),
                }
            };
            let line = match script(&name, nth).unwrap_or(Reply::Return(by_the_book)) {
                Reply::Return(value) => json!({ "return": value }).to_string(),
                Reply::Error(desc) => {
                    *frozen.lock().unwrap() = false;
                    json!({"error": {"class": "GenericError", "desc": desc}}).to_string()
                }
                Reply::Late(delay, value) => {
                    sleep(delay).await;
                    json!({ "return": value }).to_string()
                }
                Reply::HangUp => return,
                Reply::Line(line) => line.to_owned(),
            };
            let _ = write.write_all(format!("{line}\n").as_bytes()).await;
        }
    }

    const LIMIT: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn commands_are_answered_and_stale_answers_ignored() {
        let peer = ScriptedAgent::start(|_, _| None);
        let mut agent = Agent::new(&peer.socket);
        agent.ping().await.unwrap();
        assert_eq!(agent.fsfreeze_status(LIMIT).await.unwrap(), FsfreezeStatus::Thawed);
        assert_eq!(agent.fsfreeze_freeze(LIMIT).await.unwrap(), 3);
        assert_eq!(agent.fsfreeze_status(LIMIT).await.unwrap(), FsfreezeStatus::Frozen);
        agent.fsfreeze_thaw(LIMIT).await.unwrap();
        assert!(!peer.is_frozen());
        assert_eq!(peer.seen().len(), 5);
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_answer_is_not_taken_for_the_next_command() {
        let late = Duration::from_secs(7);
        let peer =
            ScriptedAgent::start(move |name, _| (name == "guest-fsfreeze-freeze").then(|| Reply::Late(late, json!(2))));
        let mut agent = Agent::new(&peer.socket);
        let error = agent.fsfreeze_freeze(LIMIT).await.unwrap_err();
        assert!(matches!(error, AgentError::TimedOut { .. }) && error.outcome_unknown());
        assert_eq!(agent.fsfreeze_status(LIMIT).await.unwrap(), FsfreezeStatus::Frozen);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_asked_of_an_agent_that_gives_no_sign_of_life() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qga");
        let listener = UnixListener::bind(&socket).unwrap();
        let error = Agent::new(&socket).fsfreeze_freeze(LIMIT).await.unwrap_err();
        assert!(matches!(error, AgentError::NotRunning { limit } if limit == LIMIT) && !error.outcome_unknown());
        let mut sent = String::new();
        let mut stream = BufReader::new(listener.accept().await.unwrap().0);
        stream.read_until(b'\n', &mut Vec::new()).await.unwrap();
        stream.read_line(&mut sent).await.unwrap();
        assert_eq!(sent, "");
    }

    #[tokio::test]
    async fn failures_are_told_apart() {
        let peer = ScriptedAgent::start(|name, nth| match (name, nth) {
            ("guest-fsfreeze-freeze", 1) => Some(Reply::Error("disabled")),
            ("guest-fsfreeze-freeze", 2) => Some(Reply::HangUp),
            ("guest-fsfreeze-freeze", 3) => Some(Reply::Line("{\"return\": -1}")),
            ("guest-fsfreeze-freeze", 4) => Some(Reply::Line("nonsense")),
            ("guest-fsfreeze-status", _) => Some(Reply::Return(json!("slushy"))),
            _ => None,
        });
        let mut agent = Agent::new(&peer.socket);
        let refused = agent.fsfreeze_freeze(LIMIT).await.unwrap_err();
        assert!(
            matches!(&refused, AgentError::Refused { desc, .. } if desc == "disabled") && !refused.outcome_unknown()
        );
        assert!(matches!(agent.fsfreeze_freeze(LIMIT).await, Err(AgentError::Closed { .. })));
        assert!(matches!(agent.fsfreeze_freeze(LIMIT).await, Err(AgentError::Protocol { .. })));
        assert!(matches!(agent.fsfreeze_freeze(LIMIT).await, Err(AgentError::Protocol { .. })));
        assert_eq!(agent.fsfreeze_freeze(LIMIT).await.unwrap(), 3);
        assert_eq!(agent.fsfreeze_status(LIMIT).await.unwrap(), FsfreezeStatus::Other("slushy".into()));
        let gone = Agent::new("/nonexistent/qga").ping().await.unwrap_err();
        assert!(matches!(gone, AgentError::Connect { source, .. } if source.kind() == ErrorKind::NotFound));
    }
}
