//! What stands between the program under test and QEMU's NBD server: cuts the server's stream into messages, counts them, and
//! breaks one on request.
//!
//! It takes the place of the server's socket file when the server has just been started; the socket itself stays QEMU's and
//! keeps its name, which is what the kernel shows to those who ask who listens.

use super::{Vm, interposer::Fault};
use std::{
    fs,
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

/// What happens to a message from the server.
#[derive(Clone, Copy, Debug)]
pub enum NbdFault {
    /// The connection ends before it.
    Drop,
    /// The connection ends in the middle of it.
    Short,
    /// It comes so much later, and everything behind it on its connection too.
    Stall(Duration),
    /// A bit of it is another one.
    Flip(NbdField),
}

/// Where a bit flips.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NbdField {
    Magic,
    /// The error of a simple reply, the error bit in the type of a structured one.
    Error,
    Cookie,
    Length,
}

/// A proxy for the next NBD server that the program has QEMU start. Ends when dropped.
pub struct NbdProxy {
    shared: Arc<Shared>,
}

struct Shared {
    fault: Option<(usize, NbdFault)>,
    messages: AtomicUsize,
    hit: AtomicBool,
    ending: AtomicBool,
    real: PathBuf,
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

impl NbdProxy {
    /// The `nth` (from 1) message of the server, over all connections in the order in which they come, meets the fault.
    pub fn before_next_server(vm: &Vm, fault: Option<(usize, NbdFault)>) -> Self {
        let shared = Arc::new(Shared {
            fault,
            messages: AtomicUsize::new(0),
            hit: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            real: vm.dir().join("real-nbd.sock"),
            acceptor: Mutex::default(),
        });
        let proxy = Arc::clone(&shared);
        let take_place = move |arguments: &serde_json::Value| {
            let path = arguments["addr"]["data"]["path"].as_str().expect("a unix socket").to_owned();
            proxy.take_place(Path::new(&path)).expect("the socket's file can be replaced");
        };
        vm.fault("nbd-server-start", 1, Fault::Then(Box::new(take_place)));
        Self { shared }
    }

    /// Messages of the server so far.
    pub fn messages(&self) -> usize {
        self.shared.messages.load(Ordering::SeqCst)
    }

    /// Whether the fault took place.
    pub fn hit(&self) -> bool {
        self.shared.hit.load(Ordering::SeqCst)
    }
}

impl Drop for NbdProxy {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::SeqCst);
        let acceptor = self.shared.acceptor.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(acceptor) = acceptor {
            let _ = acceptor.join();
        }
        let _ = fs::remove_file(&self.shared.real);
    }
}

impl Shared {
    fn take_place(self: &Arc<Self>, path: &Path) -> io::Result<()> {
        fs::rename(path, &self.real)?;
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        let shared = Arc::clone(self);
        let acceptor = std::thread::spawn(move || {
            while !shared.ending.load(Ordering::SeqCst) {
                match listener.accept() {
                    Ok((client, _)) => {
                        let shared = Arc::clone(&shared);
                        std::thread::spawn(move || shared.serve(&client));
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        *self.acceptor.lock().unwrap_or_else(PoisonError::into_inner) = Some(acceptor);
        Ok(())
    }

    fn serve(&self, client: &UnixStream) {
        let _ = client.set_nonblocking(false);
        let Ok(server) = UnixStream::connect(&self.real) else { return };
        let close = |a: &UnixStream, b: &UnixStream| {
            let _ = (a.shutdown(Shutdown::Both), b.shutdown(Shutdown::Both));
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _ = io::copy(&mut &*client, &mut &server);
                close(client, &server);
            });
            let _ = self.answers(&server, client);
            close(client, &server);
        });
    }

    /// Passes messages on until one of the two ends, or a fault ends it.
    fn answers(&self, mut server: &UnixStream, mut client: &UnixStream) -> io::Result<()> {
        let mut begun = false;
        loop {
            let mut message = message(&mut server, begun)?;
            begun = true;
            let number = self.messages.fetch_add(1, Ordering::SeqCst) + 1;
            if let Some((nth, fault)) = self.fault
                && nth == number
            {
                self.hit.store(true, Ordering::SeqCst);
                match fault {
                    NbdFault::Drop => return Ok(()),
                    NbdFault::Short => return client.write_all(&message[..message.len() / 2]),
                    NbdFault::Stall(time) => std::thread::sleep(time),
                    NbdFault::Flip(field) => flip(&mut message, field),
                }
            }
            client.write_all(&message)?;
        }
    }
}

const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const SIMPLE: u32 = 0x6744_6698;
const STRUCTURED: u32 = 0x668e_33ef;
const EXTENDED: u32 = 0x6e8a_278c;

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// The next message of the server: its greeting, the reply to an option, or a reply (or a chunk of one) to a request. Structured
/// replies have to be negotiated: then simple ones carry no data.
fn message(server: &mut impl Read, begun: bool) -> io::Result<Vec<u8>> {
    let mut message = Vec::new();
    let mut more = |message: &mut Vec<u8>, length: u64| -> io::Result<()> {
        let start = message.len();
        message.resize(start + usize::try_from(length).expect("messages fit in memory"), 0);
        server.read_exact(&mut message[start..])
    };
    if !begun {
        more(&mut message, 18)?;
        return Ok(message);
    }
    more(&mut message, 4)?;
    let magic = u32::try_from(number(&message)).expect("four bytes");
    let payload = match magic {
        SIMPLE => {
            more(&mut message, 12)?;
            0
        }
        STRUCTURED => {
            more(&mut message, 16)?;
            number(&message[16..20])
        }
        EXTENDED => {
            more(&mut message, 28)?;
            number(&message[24..32])
        }
        _ => {
            more(&mut message, 16)?;
            assert_eq!(number(&message[..8]), OPTION_REPLY, "QEMU's NBD server speaks another protocol");
            number(&message[16..20])
        }
    };
    more(&mut message, payload)?;
    Ok(message)
}

fn flip(message: &mut [u8], field: NbdField) {
    let (error, cookie, length) = match u32::try_from(number(&message[..4])).expect("four bytes") {
        SIMPLE => (7, 15, 0),
        STRUCTURED => (6, 15, 18),
        EXTENDED => (6, 15, 30),
        // An option's reply has its type and its length; the greeting is all magic.
        _ if message.len() >= 20 && number(&message[..8]) == OPTION_REPLY => (12, 11, 18),
        _ => (0, 8, 1),
    };
    let (at, bit) = match field {
        NbdField::Magic => (3, 0x10),
        NbdField::Error => (error, 0x80),
        NbdField::Cookie => (cookie, 0x04),
        NbdField::Length => (length, 0x02),
    };
    message[at] ^= bit;
}
