//! What stands between the program under test and the QEMU's monitor: passes everything on, remembers the commands, holds the
//! rig's guest while the machine is stopped, and breaks things on request. The Proxmox stand-in is plugged in here.
//!
//! The client connects to QEMU's own listening socket (taken over from QEMU), so that the peer credentials are QEMU's. As with
//! QEMU, a second client gets no greeting until the first has left. File descriptors (`getfd`) are not passed on.

use super::{
    qmp::{JsonStream, QmpFailure, send},
    writer::GuestWriter,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};
use serde_json::{Value, json};
use std::{
    fs,
    io::{self, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// A command that a client sent.
#[derive(Clone, Debug, PartialEq)]
pub struct SeenCommand {
    pub at: Instant,
    pub name: String,
    pub arguments: Value,
}

/// Stands for every command's name.
pub const ANY: &str = "*";

/// What goes wrong with a command.
pub enum Fault {
    /// The connection closes; QEMU never sees the command.
    CloseBefore,
    /// QEMU carries the command out, and the connection closes in place of the answer.
    CloseAfter,
    /// QEMU carries the command out, and these bytes come in place of the answer; the connection stays open.
    Garbage(Vec<u8>),
    /// It takes this much longer.
    Stall(Duration),
    /// QEMU never sees it, and the client gets this answer.
    Refuse(QmpFailure),
    /// This is called before the command is passed on.
    Call(Box<dyn FnOnce() + Send>),
    /// This is called, with the command's arguments, after QEMU has carried the command out and before the client knows.
    Then(Box<dyn FnOnce(&Value) + Send>),
    /// This changes the request on its way.
    Rewrite(Box<dyn FnOnce(&mut Value) + Send>),
}

/// Somebody who answers some commands in QEMU's place.
pub trait Front: Send + Sync {
    /// A client has connected.
    fn connected(&self);
    /// `None`: QEMU shall answer. [`QmpFailure::Lost`]: the connection closes without an answer.
    fn answer(&self, command: &str, arguments: &Value) -> Option<Result<Value, QmpFailure>>;
    /// Changes what goes to QEMU.
    fn to_qemu(&self, request: &mut Value);
    /// Changes what comes from QEMU: a greeting, an event, or the answer to `command`. `false`: it is kept back.
    fn to_client(&self, command: Option<&str>, message: &mut Value) -> bool;
}

struct Shared {
    upstream: PathBuf,
    writer: Arc<GuestWriter>,
    front: Option<Arc<dyn Front>>,
    ending: AtomicBool,
    seen: Mutex<Vec<SeenCommand>>,
    faults: Mutex<Vec<(String, usize, Fault)>>,
    client: Mutex<Option<UnixStream>>,
}

/// See the module.
pub struct Interposer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// Keeps QEMU from listening itself.
    _holder: UnixStream,
}

impl Interposer {
    /// Takes over the monitor socket `public` of QEMU process `pid`; clients are served by its monitor at `upstream`.
    pub fn start(
        pid: i32,
        public: &Path,
        upstream: &Path,
        writer: Arc<GuestWriter>,
        front: Option<Arc<dyn Front>>,
    ) -> io::Result<Self> {
        let mut holder = JsonStream::new(UnixStream::connect(public)?);
        holder.next(Some(Duration::from_secs(30)))?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let holder = holder.socket().try_clone()?;
        let listener = take_over_listener(pid, public)?;
        let shared = Arc::new(Shared {
            upstream: upstream.to_owned(),
            writer,
            front,
            ending: AtomicBool::new(false),
            seen: Mutex::default(),
            faults: Mutex::default(),
            client: Mutex::default(),
        });
        let accepting = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("rig-interposer".into())
            .spawn(move || accepting.accept(&listener))
            .expect("a thread starts");
        Ok(Self { shared, thread: Some(thread), _holder: holder })
    }

    pub fn seen(&self) -> Vec<SeenCommand> {
        lock(&self.shared.seen).clone()
    }

    /// The `nth` (from 1) command of this name ([`ANY`]: of whatever name) from now on meets `fault`.
    pub fn fault(&self, command: &str, nth: usize, fault: Fault) {
        lock(&self.shared.faults).push((command.into(), nth, fault));
    }

    /// Takes back the faults that no command has met. How many.
    pub fn no_more_faults(&self) -> usize {
        lock(&self.shared.faults).drain(..).count()
    }

    /// Cuts the client off, if there is one.
    pub fn disconnect_client(&self) {
        if let Some(client) = &*lock(&self.shared.client) {
            let _ = client.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Interposer {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::SeqCst);
        self.disconnect_client();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Duplicates the listening socket at `path` out of process `pid`.
fn take_over_listener(pid: i32, path: &Path) -> io::Result<UnixListener> {
    const LISTENING: &str = "00010000";
    let table = fs::read_to_string("/proc/net/unix")?;
    let inode = table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find(|words| words.len() == 8 && words[3] == LISTENING && Path::new(words[7]) == path)
        .map(|words| words[6].to_owned())
        .ok_or_else(|| io::Error::other(format!("nobody listens at {}", path.display())))?;
    let wanted = PathBuf::from(format!("socket:[{inode}]"));
    let number = fs::read_dir(format!("/proc/{pid}/fd"))?
        .filter_map(Result::ok)
        .find(|entry| fs::read_link(entry.path()).is_ok_and(|target| target == wanted))
        .and_then(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .ok_or_else(|| io::Error::other(format!("process {pid} does not hold {}", wanted.display())))?;
    let process = pidfd_open(Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?, PidfdFlags::empty())?;
    Ok(UnixListener::from(pidfd_getfd(process, number, PidfdGetfdFlags::empty())?))
}

impl Shared {
    fn accept(&self, listener: &UnixListener) {
        while !self.ending.load(Ordering::SeqCst) {
            let tenth = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
            let ready = poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&tenth));
            if !matches!(ready, Ok(1..)) {
                continue;
            }
            if let Ok((client, _)) = listener.accept()
                && let Err(error) = self.serve(client)
                && !self.ending.load(Ordering::SeqCst)
                && error.kind() != io::ErrorKind::BrokenPipe
            {
                eprintln!("rig: QMP client at {}: {error}", self.upstream.display());
            }
            *lock(&self.client) = None;
        }
    }

    fn serve(&self, client: UnixStream) -> io::Result<()> {
        client.set_nonblocking(false)?;
        let upstream = UnixStream::connect(&self.upstream)?;
        *lock(&self.client) = Some(client.try_clone()?);
        if let Some(front) = &self.front {
            front.connected();
        }
        let session = Session {
            shared: self,
            client: client.try_clone()?,
            upstream: upstream.try_clone()?,
            pending: Mutex::default(),
            answered: Condvar::new(),
        };
        std::thread::scope(|scope| {
            let answers = scope.spawn(|| session.answers(JsonStream::new(upstream)));
            let result = session.requests(JsonStream::new(client));
            session.close();
            let _ = answers.join();
            result
        })
    }

    /// The faults that this command meets.
    fn due(&self, command: &str) -> Vec<Fault> {
        let mut faults = lock(&self.faults);
        let mut due = Vec::new();
        let mut later = Vec::new();
        for (name, nth, fault) in faults.drain(..) {
            match (name == command || name == ANY, nth) {
                (true, 0 | 1) => due.push(fault),
                (true, nth) => later.push((name, nth - 1, fault)),
                (false, nth) => later.push((name, nth, fault)),
            }
        }
        *faults = later;
        due
    }
}

/// What takes the place of an answer.
enum Instead {
    Bytes(Vec<u8>),
    /// The answer follows.
    AfterCall(Box<dyn FnOnce(&Value) + Send>),
}

/// One client's stay.
struct Session<'a> {
    shared: &'a Shared,
    client: UnixStream,
    upstream: UnixStream,
    pending: Mutex<Pending>,
    answered: Condvar,
}

#[derive(Default)]
struct Pending {
    command: Option<String>,
    swallow: bool,
    /// The answer that was swallowed.
    kept: Option<Value>,
    negotiated: bool,
    refused: bool,
    closed: bool,
}

impl Session<'_> {
    fn close(&self) {
        let _ = self.client.shutdown(Shutdown::Both);
        let _ = self.upstream.shutdown(Shutdown::Both);
        lock(&self.pending).closed = true;
        self.answered.notify_all();
    }

    fn requests(&self, mut requests: JsonStream) -> io::Result<()> {
        while let Some(mut request) = requests.next(None)? {
            let command = request["execute"].as_str().unwrap_or_default().to_owned();
            let arguments = request.get("arguments").cloned().unwrap_or_else(|| json!({}));
            lock(&self.shared.seen).push(SeenCommand {
                at: Instant::now(),
                name: command.clone(),
                arguments: arguments.clone(),
            });
            let (mut swallow, mut refuse, mut instead) = (false, None, None);
            for fault in self.shared.due(&command) {
                match fault {
                    Fault::CloseBefore => return Ok(()),
                    Fault::CloseAfter => swallow = true,
                    Fault::Garbage(bytes) => instead = Some(Instead::Bytes(bytes)),
                    Fault::Then(call) => instead = Some(Instead::AfterCall(call)),
                    Fault::Rewrite(change) => change(&mut request),
                    Fault::Stall(time) => std::thread::sleep(time),
                    Fault::Refuse(failure) => refuse = Some(failure),
                    Fault::Call(call) => call(),
                }
            }
            let negotiated = lock(&self.pending).negotiated;
            let answer = match (&self.shared.front, refuse) {
                (_, Some(failure)) => Some(Err(failure)),
                (Some(front), None) if negotiated => front.answer(&command, &arguments),
                _ => None,
            };
            match answer {
                Some(Err(QmpFailure::Lost(_))) => return Ok(()),
                Some(_) if swallow => return Ok(()),
                Some(answer) => {
                    if self.put_in_place(instead, &arguments) {
                        self.reply(&request, answer)?;
                    }
                }
                None => {
                    if command == "stop" && self.is_running() {
                        self.shared.writer.stop();
                    }
                    if let Some(front) = &self.shared.front {
                        front.to_qemu(&mut request);
                    }
                    let refused = self.forward(&command, &request, swallow || instead.is_some())?;
                    match command.as_str() {
                        "cont" if !refused => self.shared.writer.resume(),
                        "qmp_capabilities" if !refused => lock(&self.pending).negotiated = true,
                        _ => {}
                    }
                    if swallow {
                        return Ok(());
                    }
                    if self.put_in_place(instead, &arguments)
                        && let Some(answer) = lock(&self.pending).kept.take()
                    {
                        send(&self.client, &answer)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// What comes in place of an answer. Whether the answer itself is to follow.
    fn put_in_place(&self, instead: Option<Instead>, arguments: &Value) -> bool {
        match instead {
            None => true,
            Some(Instead::AfterCall(call)) => {
                call(arguments);
                true
            }
            Some(Instead::Bytes(bytes)) => {
                let _order = lock(&self.pending);
                let _ = (&self.client).write_all(&bytes);
                false
            }
        }
    }

    fn is_running(&self) -> bool {
        self.shared.writer.qmp("query-status", json!({})).is_ok_and(|status| status["running"] == true)
    }

    fn reply(&self, request: &Value, answer: Result<Value, QmpFailure>) -> io::Result<()> {
        let mut reply = match answer {
            Ok(value) => json!({"return": value}),
            Err(failure) => json!({"error": failure.to_wire()}),
        };
        if let Some(id) = request.get("id") {
            reply["id"] = id.clone();
        }
        let _order = lock(&self.pending);
        send(&self.client, &reply)
    }

    /// Passes a command on and waits for its answer to pass. Whether it was an error.
    fn forward(&self, command: &str, request: &Value, swallow: bool) -> io::Result<bool> {
        {
            let mut pending = lock(&self.pending);
            pending.command = Some(command.to_owned());
            pending.swallow = swallow;
            pending.kept = None;
        }
        send(&self.upstream, request)?;
        let mut pending = lock(&self.pending);
        while pending.command.is_some() {
            if pending.closed {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            pending = self.answered.wait(pending).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(pending.refused)
    }

    fn answers(&self, mut answers: JsonStream) {
        while let Ok(Some(mut message)) = answers.next(None) {
            let is_answer = message.get("return").is_some() || message.get("error").is_some();
            let mut pending = lock(&self.pending);
            let command = if is_answer { pending.command.take() } else { None };
            if is_answer {
                pending.refused = message.get("error").is_some();
            }
            let shown =
                self.shared.front.as_ref().is_none_or(|front| front.to_client(command.as_deref(), &mut message));
            let swallowed = is_answer && pending.swallow;
            if shown && swallowed {
                pending.kept = Some(message);
            } else if shown {
                let _ = send(&self.client, &message);
            }
            drop(pending);
            self.answered.notify_all();
        }
        self.close();
    }
}
