//! The rig's own QMP client: blocking, untyped, independent of the library under test.

use serde_json::{Value, json};
use std::{
    fmt,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

/// How long the rig waits for an answer of QEMU's.
pub const ANSWER_LIMIT: Duration = Duration::from_mins(1);

/// A stream of JSON values, however they are cut into packets.
pub struct JsonStream {
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl JsonStream {
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, buffer: Vec::new() }
    }

    pub fn socket(&self) -> &UnixStream {
        &self.stream
    }

    /// The next value; `None` at the end of the stream. Without a limit it waits for ever.
    pub fn next(&mut self, limit: Option<Duration>) -> io::Result<Option<Value>> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        loop {
            let mut values = serde_json::Deserializer::from_slice(&self.buffer).into_iter::<Value>();
            match values.next() {
                Some(Ok(value)) => {
                    let used = values.byte_offset();
                    self.buffer.drain(..used);
                    return Ok(Some(value));
                }
                Some(Err(error)) if !error.is_eof() => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
                _ => {}
            }
            let wait = match deadline {
                None => None,
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    Some(left)
                }
            };
            self.stream.set_read_timeout(wait)?;
            let mut chunk = vec![0; 64 * 1024];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Ok(None),
                Ok(length) => self.buffer.extend_from_slice(&chunk[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Sends one value, as a line.
pub fn send(mut stream: &UnixStream, value: &Value) -> io::Result<()> {
    let mut line = value.to_string();
    line.push_str("\r\n");
    stream.write_all(line.as_bytes())
}

/// Why an exchange failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QmpFailure {
    /// QEMU's error.
    Refused { class: String, desc: String },
    /// No answer: the connection or QEMU is gone, or it took too long.
    Lost(String),
}

impl QmpFailure {
    pub fn generic(desc: impl Into<String>) -> Self {
        Self::Refused { class: "GenericError".into(), desc: desc.into() }
    }

    pub fn desc(&self) -> &str {
        match self {
            Self::Refused { desc, .. } | Self::Lost(desc) => desc,
        }
    }

    /// As QEMU puts it on the wire.
    pub fn to_wire(&self) -> Value {
        match self {
            Self::Refused { class, desc } => json!({"class": class, "desc": desc}),
            Self::Lost(desc) => json!({"class": "GenericError", "desc": desc}),
        }
    }
}

impl fmt::Display for QmpFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { class, desc } => write!(f, "{class}: {desc}"),
            Self::Lost(what) => write!(f, "no answer: {what}"),
        }
    }
}

/// A negotiated session with one of QEMU's monitors.
pub struct QmpClient {
    stream: JsonStream,
    greeting: Value,
    events: Vec<Value>,
}

impl QmpClient {
    /// Connects, waiting for the socket to appear and for the greeting, `limit` in all.
    pub fn connect(socket: &Path, limit: Duration) -> io::Result<Self> {
        let deadline = Instant::now() + limit;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        let mut stream = JsonStream::new(stream);
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let greeting = stream.next(Some(left))?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let mut client = Self { stream, greeting, events: Vec::new() };
        client
            .execute("qmp_capabilities", json!({}))
            .map_err(|failure| io::Error::other(format!("capabilities are refused: {failure}")))?;
        Ok(client)
    }

    pub fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// One command.
    #[allow(clippy::needless_pass_by_value, reason = "calls read better with json!({…}) as the argument")]
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpFailure> {
        let lost = |error: io::Error| QmpFailure::Lost(format!("{command}: {error}"));
        send(self.stream.socket(), &json!({"execute": command, "arguments": arguments})).map_err(lost)?;
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(mut value) = self.stream.next(Some(left)).map_err(lost)? else {
                return Err(QmpFailure::Lost(format!("{command}: connection closed")));
            };
            if value.get("event").is_some() {
                self.events.push(value);
            } else if let Some(error) = value.get("error") {
                let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
                return Err(QmpFailure::Refused { class: text("class"), desc: text("desc") });
            } else if value.get("return").is_some() {
                return Ok(value["return"].take());
            }
        }
    }

    /// One command that has to succeed.
    #[allow(clippy::needless_pass_by_value, reason = "calls read better with json!({…}) as the argument")]
    pub fn ok(&mut self, command: &str, arguments: Value) -> Value {
        match self.execute(command, arguments.clone()) {
            Ok(value) => value,
            Err(failure) => panic!("{command} {arguments}: {failure}"),
        }
    }

    /// Events that came so far, and no more than come within `limit`.
    pub fn events(&mut self, limit: Duration) -> Vec<Value> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.stream.next(Some(left)) {
                Ok(Some(value)) if value.get("event").is_some() => self.events.push(value),
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return std::mem::take(&mut self.events),
            }
        }
    }
}
