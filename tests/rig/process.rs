//! QEMU processes that do not outlive the test.

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use procfs::process::Process;
use std::{
    io,
    path::PathBuf,
    process::{Child, Command},
    sync::{Mutex, OnceLock, mpsc},
    thread,
    time::{Duration, Instant},
};

type Order = (Command, mpsc::Sender<io::Result<Child>>);

/// Starts a process from a thread that lives as long as the test process: the kernel sends the parent-death signal when the
/// *thread* that started a process ends, and tests and runtimes end their threads at will.
fn spawn_from_lasting_thread(command: Command) -> io::Result<Child> {
    static ORDERS: OnceLock<Mutex<mpsc::Sender<Order>>> = OnceLock::new();
    let orders = ORDERS.get_or_init(|| {
        let (sender, receiver) = mpsc::channel::<Order>();
        thread::Builder::new()
            .name("rig-spawner".into())
            .spawn(move || {
                for (mut command, reply) in receiver {
                    let _ = reply.send(command.spawn());
                }
            })
            .expect("a thread starts");
        Mutex::new(sender)
    });
    let (sender, receiver) = mpsc::channel();
    orders.lock().unwrap().send((command, sender)).expect("the spawner lives");
    receiver.recv().expect("the spawner answers")
}

/// Stops a process, and waits until it has: its threads do not stop at once.
pub fn stop(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGSTOP).expect("it lives");
    let stopped = || {
        let mut threads = Process::new(pid).and_then(|process| process.tasks()).expect("it lives").flatten();
        threads.all(|thread| thread.stat().is_ok_and(|stat| stat.state == 'T'))
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    while !stopped() {
        assert!(Instant::now() < deadline, "process {pid} does not stop");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A child process that is killed when dropped, and when the test process dies.
pub struct Guarded {
    child: Child,
}

impl Guarded {
    /// `command` is made from `program` and its arguments by the caller; see [`Guarded::command`].
    pub fn spawn(command: Command) -> io::Result<Self> {
        Ok(Self { child: spawn_from_lasting_thread(command)? })
    }

    /// A command line that runs `program` with line-buffered standard output (qemu-io prints there, and QEMU would hold it
    /// back) and a parent-death signal. The pid stays that of `program`: both wrappers exec.
    pub fn command(program: &PathBuf) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "stdbuf", "-oL", "--"]).arg(program);
        command
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("pids are small")
    }

    /// Whether it has ended, and how.
    pub fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().expect("the child can be waited for")
    }

    pub fn wait(&mut self) -> std::process::ExitStatus {
        self.child.wait().expect("the child can be waited for")
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.kill();
    }
}
