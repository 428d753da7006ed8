//! One QMP connection.

use super::{
    limits::limit_of,
    wire::{Wire, WireError},
};
use serde_json::{Map, Value, json};
use std::{
    collections::VecDeque,
    io::ErrorKind,
    path::PathBuf,
    process,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};
use thiserror::Error;
use tokio::{
    net::UnixStream,
    time::{Instant, sleep, timeout, timeout_at},
};

/// Longest line accepted, in bytes. The largest answer known, that of `query-qmp-schema`, has 236 kB.
const LINE_LIMIT: usize = 16 << 20;
/// Events kept for [`Session::wait_event`]; older ones are dropped.
const EVENTS: usize = 1024;
/// Pause before a socket that refused us because it is busy is tried again; Proxmox VE's clients do the same.
const RETRY: Duration = Duration::from_millis(100);
/// An idle QEMU greets within milliseconds, but even without any wait for others it needs some time.
const GREETING_AT_LEAST: Duration = Duration::from_secs(1);
/// How long a socket that was busy may refuse connections before its server counts as gone.
const REFUSED_AT_MOST: Duration = Duration::from_secs(2);
/// Lines before the greeting that are passed over: what QEMU still had to say to the client before us.
const STALE_LINES: usize = 64;

/// Counts commands over all sessions of this process, so that an answer meant for an earlier session is never taken for ours.
static COMMANDS: AtomicU64 = AtomicU64::new(1);

/// Where a QMP server listens and how long to wait for it.
#[derive(Clone, Debug)]
pub struct Qmp {
    /// The socket.
    pub socket: PathBuf,
    /// How long to wait while another client holds the socket (a QMP socket serves one client at a time).
    pub lock_wait: Duration,
}

/// An event as QEMU sent it.
#[derive(Clone, Debug)]
pub struct Event {
    /// `BLOCK_EXPORT_DELETED`, …
    pub name: String,
    /// Its `data`, `null` if it has none.
    pub data: Value,
}

/// Why a QMP exchange failed.
#[derive(Debug, Error)]
pub enum QmpError {
    /// The socket cannot be connected.
    #[error("cannot connect to QMP socket {socket}")]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// Somebody else holds the socket.
    #[error("QMP socket {socket} is busy: another client held it for {waited:?}")]
    Busy {
        /// The socket.
        socket: PathBuf,
        /// How long we waited.
        waited: Duration,
    },
    /// QEMU refused the command.
    #[error("QEMU refuses `{command}`: {desc}")]
    Refused {
        /// The command.
        command: String,
        /// Error class: `GenericError`, `DeviceNotFound`, `CommandNotFound`, …
        class: String,
        /// QEMU's text.
        desc: String,
    },
    /// No answer in time. Whether QEMU carried the command out is unknown.
    #[error("no answer to `{command}` within {limit:?}; whether it took effect is unknown")]
    TimedOut {
        /// The command.
        command: String,
        /// The limit.
        limit: Duration,
    },
    /// The connection ended. Whether QEMU carried the command out is unknown.
    #[error("QEMU closed the connection during `{command}`")]
    Closed {
        /// The command.
        command: String,
    },
    /// The peer sent something that is no QMP, or an answer of another shape. The command may have taken effect.
    #[error("unexpected answer to `{command}`: {what}")]
    Protocol {
        /// The command.
        command: String,
        /// What was wrong.
        what: String,
    },
}

impl QmpError {
    /// Whether the command may have taken effect although it failed.
    pub fn outcome_unknown(&self) -> bool {
        matches!(self, Self::TimedOut { .. } | Self::Closed { .. } | Self::Protocol { .. })
    }

    /// Whether QEMU does not know the command.
    pub fn is_command_not_found(&self) -> bool {
        matches!(self, Self::Refused { class, .. } if class == "CommandNotFound")
    }
}

impl Qmp {
    /// A server at `socket`; waits up to 60 s while another client holds it.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), lock_wait: Duration::from_mins(1) }
    }

    /// Connects, reads the greeting, negotiates. Dropping the session disconnects.
    ///
    /// A socket that accepts the connection but sends no greeting is held by another client; we stay in its queue for up to
    /// [`Qmp::lock_wait`].
    ///
    /// # Errors
    /// [`QmpError::Connect`] at once when there is no socket or nobody listens; [`QmpError::Busy`] when others held it all the
    /// time (or QEMU's main loop is stuck: from outside this looks the same).
    pub async fn session(&self) -> Result<Session, QmpError> {
        let started = Instant::now();
        let deadline = started + self.lock_wait.max(GREETING_AT_LEAST);
        let busy = || QmpError::Busy { socket: self.socket.clone(), waited: started.elapsed() };
        let mut seen_busy = false;
        let mut refused_since = None;
        let (wire, greeting) = loop {
            let connected = timeout_at(deadline, UnixStream::connect(&self.socket)).await.map_err(|_| busy())?;
            match connected {
                Ok(stream) => {
                    refused_since = None;
                    let mut wire = Wire::new(stream, LINE_LIMIT);
                    match timeout_at(deadline, greeting(&mut wire)).await.map_err(|_| busy())?? {
                        Some(greeting) => break (wire, greeting),
                        None => seen_busy = true,
                    }
                }
                // The queue of waiting clients is full.
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    seen_busy = true;
                }
                Err(error)
                    if seen_busy
                        && error.kind() == ErrorKind::ConnectionRefused
                        && refused_since.get_or_insert_with(Instant::now).elapsed() < REFUSED_AT_MOST => {}
                Err(source) => return Err(QmpError::Connect { socket: self.socket.clone(), source }),
            }
            if Instant::now() + RETRY >= deadline {
                return Err(busy());
            }
            sleep(RETRY).await;
        };
        Session::negotiate(wire, greeting).await
    }

    /// One command in a session of its own.
    pub async fn execute<C: qapi::Command>(&self, command: &C) -> Result<C::Ok, QmpError> {
        self.session().await?.execute(command).await
    }
}

/// Waits for the greeting. `None` when the connection ends without one.
async fn greeting(wire: &mut Wire<UnixStream>) -> Result<Option<Greeting>, QmpError> {
    let mut first_stranger = None;
    for _ in 0..STALE_LINES {
        // Somebody who talks but does not greet is not waiting for another client.
        let line = if first_stranger.is_none() {
            wire.line().await
        } else {
            timeout(GREETING_AT_LEAST, wire.line()).await.unwrap_or(Err(WireError::Closed(None)))
        };
        match line {
            Ok(line) => match serde_json::from_slice::<Value>(&line) {
                Ok(message) if message.get("QMP").is_some() => return Ok(Some(Greeting::of(&message["QMP"]))),
                _ => {
                    first_stranger.get_or_insert_with(|| excerpt(&line));
                }
            },
            Err(WireError::Closed(_)) if first_stranger.is_none() => return Ok(None),
            Err(WireError::Closed(_)) => break,
            Err(error @ WireError::TooLong { .. }) => {
                return Err(QmpError::Protocol { command: GREETING.into(), what: error.to_string() });
            }
        }
    }
    let what = format!("no QMP greeting but {}", first_stranger.unwrap_or_default());
    Err(QmpError::Protocol { command: GREETING.into(), what })
}

/// Stands for a command's name in errors before the first command.
const GREETING: &str = "greeting";
/// Stands for a command's name in errors while waiting for an event.
const EVENT: &str = "event";

/// The start of a strange line, fit for a message.
fn excerpt(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(&line[..line.len().min(80)]).escape_debug().to_string();
    if line.len() > 80 { format!("`{text}…`") } else { format!("`{text}`") }
}

#[derive(Debug)]
struct Greeting {
    version: (u32, u32, u32),
    package: String,
}

impl Greeting {
    fn of(greeting: &Value) -> Self {
        let version = &greeting["version"];
        let number = |part| version["qemu"][part].as_u64().and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
        Self {
            version: (number("major"), number("minor"), number("micro")),
            package: version["package"].as_str().unwrap_or_default().to_owned(),
        }
    }
}

/// A connected, negotiated QMP session. One command at a time.
///
/// After [`QmpError::TimedOut`] the session stays usable: the late answer is dropped when it comes. QEMU still works on that
/// command, though, and answers the next one only after it.
#[derive(Debug)]
pub struct Session {
    wire: Wire<UnixStream>,
    peer_pid: Option<i32>,
    greeting: Greeting,
    events: VecDeque<Event>,
}

/// What a line turned out to be.
enum Message {
    Return {
        id: Value,
        value: Value,
    },
    Error {
        id: Value,
        class: String,
        desc: String,
    },
    /// It is in the queue.
    Event,
    Unknown,
}

impl Session {
    async fn negotiate(wire: Wire<UnixStream>, greeting: Greeting) -> Result<Self, QmpError> {
        let peer_pid = wire.stream().peer_cred().ok().and_then(|peer| peer.pid()).filter(|pid| *pid > 0);
        let mut session = Self { wire, peer_pid, greeting, events: VecDeque::new() };
        session.execute_value("qmp_capabilities", Value::Null).await?;
        Ok(session)
    }

    /// A session with a peer that is connected already.
    #[cfg(any(test, fuzzing))]
    pub(super) async fn over(stream: UnixStream) -> Result<Self, QmpError> {
        let mut wire = Wire::new(stream, LINE_LIMIT);
        let closed = || QmpError::Closed { command: GREETING.into() };
        let greeting =
            timeout(GREETING_AT_LEAST, greeting(&mut wire)).await.map_err(|_| closed())??.ok_or_else(closed)?;
        Self::negotiate(wire, greeting).await
    }

    /// Sends a command and waits for its answer, for at most the command's time limit ([`limit_of`]).
    ///
    /// # Errors
    /// See [`QmpError`]; whether the command may have taken effect all the same is told by [`QmpError::outcome_unknown`].
    pub async fn execute<C: qapi::Command>(&mut self, command: &C) -> Result<C::Ok, QmpError> {
        let protocol = |what: String| QmpError::Protocol { command: C::NAME.into(), what };
        let arguments =
            serde_json::to_value(command).map_err(|e| protocol(format!("arguments cannot be written: {e}")))?;
        let value = self.execute_value(C::NAME, arguments).await?;
        serde_json::from_value(value).map_err(|e| protocol(e.to_string()))
    }

    /// [`Session::execute`] for a command that is known by name only. `arguments` is an object, or `null` for none.
    ///
    /// # Errors
    /// As with [`Session::execute`].
    pub async fn execute_value(&mut self, name: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_within(name, arguments, limit_of(name)).await
    }

    /// [`Session::execute_value`] with another time limit than the command's usual one.
    ///
    /// # Errors
    /// As with [`Session::execute`].
    pub async fn execute_within(&mut self, name: &str, arguments: Value, limit: Duration) -> Result<Value, QmpError> {
        let deadline = Instant::now() + limit;
        let exchange = self.exchange(name, arguments);
        timeout_at(deadline, exchange)
            .await
            .unwrap_or_else(|_| Err(QmpError::TimedOut { command: name.to_owned(), limit }))
    }

    async fn exchange(&mut self, name: &str, arguments: Value) -> Result<Value, QmpError> {
        // Unique beyond this process too: QEMU may hand the answer to a slow command to whoever is connected by then.
        let our_id = json!(format!("pvebackup:{}:{}", process::id(), COMMANDS.fetch_add(1, Ordering::Relaxed)));
        let mut request = Map::new();
        request.insert("execute".into(), name.into());
        request.insert("id".into(), our_id.clone());
        if !arguments.is_null() {
            request.insert("arguments".into(), arguments);
        }
        let line = format!("{}\n", Value::Object(request));
        tracing::trace!(command = name, "QMP");
        self.wire.send(line.as_bytes()).await.map_err(|e| wire_error(name, &e))?;
        loop {
            match self.message(name).await? {
                Message::Return { id, value } if id == our_id => return Ok(value),
                Message::Error { id, class, desc } if id == our_id => {
                    return Err(QmpError::Refused { command: name.to_owned(), class, desc });
                }
                // QEMU answers so when it could not make out the request, or the rest of one that was cut.
                Message::Error { id, desc, .. } if id.is_null() => {
                    return Err(QmpError::Protocol { command: name.to_owned(), what: desc });
                }
                Message::Return { id, .. } | Message::Error { id, .. } => {
                    tracing::debug!(%id, "late QMP answer dropped");
                }
                Message::Event | Message::Unknown => {}
            }
        }
    }

    /// Reads one message. Events go to the queue.
    async fn message(&mut self, command: &str) -> Result<Message, QmpError> {
        let line = self.wire.line().await.map_err(|e| wire_error(command, &e))?;
        let no_qmp = || QmpError::Protocol { command: command.to_owned(), what: format!("no QMP: {}", excerpt(&line)) };
        let Ok(Value::Object(mut message)) = serde_json::from_slice::<Value>(&line) else { return Err(no_qmp()) };
        let id = message.remove("id").unwrap_or_default();
        if let Some(value) = message.remove("return") {
            return Ok(Message::Return { id, value });
        }
        if let Some(error) = message.remove("error") {
            let text = |member| error[member].as_str().unwrap_or_default().to_owned();
            return Ok(Message::Error { id, class: text("class"), desc: text("desc") });
        }
        if let Some(Value::String(name)) = message.remove("event") {
            if self.events.len() >= EVENTS {
                self.events.pop_front();
            }
            self.events.push_back(Event { name, data: message.remove("data").unwrap_or_default() });
            return Ok(Message::Event);
        }
        Ok(Message::Unknown)
    }

    /// Waits for an event, also one that came while a command was under way. `None` when it did not come in time.
    ///
    /// The event is taken out of the queue; those passed over stay for later calls. The queue is bounded, so an event may be
    /// missed: whoever waits for one has to look at the state as well.
    ///
    /// # Errors
    /// [`QmpError::Closed`] or [`QmpError::Protocol`] when the connection is of no use any more.
    pub async fn wait_event(
        &mut self,
        mut wanted: impl FnMut(&Event) -> bool,
        limit: Duration,
    ) -> Result<Option<Event>, QmpError> {
        let deadline = Instant::now() + limit;
        // Counted from the end, as the oldest may be dropped meanwhile.
        let mut unseen = self.events.len();
        loop {
            let seen = self.events.len() - unseen;
            if let Some(found) = self.events.iter().skip(seen).position(&mut wanted) {
                return Ok(self.events.remove(seen + found));
            }
            let Ok(message) = timeout_at(deadline, self.message(EVENT)).await else { return Ok(None) };
            unseen = usize::from(matches!(message?, Message::Event));
        }
    }

    /// The process id at the other end, from the socket's credentials: that of the process which began to listen. `None` when
    /// the kernel does not tell.
    pub fn peer_pid(&self) -> Option<i32> {
        self.peer_pid
    }

    /// QEMU's version from the greeting: major, minor, micro. Zeros when the greeting has none.
    pub fn version(&self) -> (u32, u32, u32) {
        self.greeting.version
    }

    /// QEMU's package from the greeting (`pve-qemu-kvm_10.0.2-4`), empty when there is none.
    pub fn package(&self) -> &str {
        &self.greeting.package
    }
}

fn wire_error(command: &str, error: &WireError) -> QmpError {
    match error {
        WireError::Closed(cause) => {
            tracing::debug!(command, ?cause, "QMP connection closed");
            QmpError::Closed { command: command.to_owned() }
        }
        WireError::TooLong { .. } => QmpError::Protocol { command: command.to_owned(), what: error.to_string() },
    }
}

#[cfg(test)]
pub(crate) mod tests;
