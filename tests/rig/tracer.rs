//! The program under a tracer, which ends it with SIGKILL exactly before or after one of its system calls.
//!
//! What a process does to the world it does by system calls; those that matter here are *points*, counted over all threads
//! in the order in which they come. A killed process has not carried out the call that it was about to begin, and has not seen
//! the result of the one that had just ended. Children of the program are not traced, and not killed.

use nix::{
    libc,
    sys::{
        ptrace,
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use std::{
    ffi::c_void,
    fmt,
    fs::{self, File},
    io::{Read, Seek, Write},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Which system calls count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Points {
    /// What makes the recovery journal: the start of every write, flush and truncation, and the end of every flush.
    Journal,
    /// Start and end of every QMP command's sending, and of every call that makes, renames, removes or flushes a file other
    /// than the journal.
    Effects,
}

/// One point.
#[derive(Clone, Debug)]
pub struct Point {
    /// `write`, `fdatasync`, …
    pub call: &'static str,
    pub ended: bool,
    /// What is written, or the file.
    pub what: String,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} of {}", if self.ended { "after" } else { "before" }, self.call, self.what)
    }
}

/// How a traced run went.
#[derive(Debug)]
pub struct Traced {
    /// All that were come by; if the run was killed, the last is where.
    pub points: Vec<Point>,
    pub killed: bool,
    /// `None` when it was killed.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub duration: Duration,
}

/// Runs a command to its end, or until its `kill_at`th point (from 1).
pub fn run_traced(command: &Command, points: Points, kill_at: Option<usize>) -> Traced {
    // A thread of its own is the only tracer that its tracees answer to, and waits for nobody else's children.
    std::thread::scope(|scope| scope.spawn(|| Tracer::run(command, points, kill_at)).join().expect("the tracer ends"))
}

struct Tracer {
    pid: Pid,
    counts: Points,
    seen: Vec<Point>,
}

impl Tracer {
    fn run(command: &Command, counts: Points, kill_at: Option<usize>) -> Traced {
        let [mut stdout, mut stderr] = [(); 2].map(|()| tempfile::tempfile().expect("a temporary file"));
        // The shell waits until it is traced, and then becomes the program.
        let mut held = Command::new("sh");
        held.args(["-c", "read -r go && exec \"$@\"", "sh"]).arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => held.env(name, value),
                None => held.env_remove(name),
            };
        }
        #[allow(clippy::zombie_processes, reason = "the tracer waits for it by its pid")]
        let mut child = held
            .stdin(Stdio::piped())
            .stdout(stdout.try_clone().unwrap())
            .stderr(stderr.try_clone().unwrap())
            .spawn()
            .expect("a shell starts");
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        let options = ptrace::Options::PTRACE_O_TRACECLONE
            | ptrace::Options::PTRACE_O_TRACESYSGOOD
            | ptrace::Options::PTRACE_O_TRACEEXEC
            | ptrace::Options::PTRACE_O_EXITKILL;
        ptrace::seize(pid, options).expect("an own child can be traced");
        ptrace::interrupt(pid).expect("it can be stopped");
        child.stdin.take().unwrap().write_all(b"go\n").unwrap();
        let start = Instant::now();
        let mut tracer = Self { pid, counts, seen: Vec::new() };
        let (code, killed) = tracer.trace(kill_at);
        let duration = start.elapsed();
        let [stdout, stderr] = [&mut stdout, &mut stderr].map(text);
        Traced { points: tracer.seen, killed, code, stdout, stderr, duration }
    }

    /// Exit code, and whether it was killed by us.
    fn trace(&mut self, kill_at: Option<usize>) -> (Option<i32>, bool) {
        let mut killed = false;
        loop {
            // Other threads' children are not ours to wait for.
            let status =
                waitpid(None, Some(WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD)).expect("there is a tracee");
            let (thread, signal) = match status {
                WaitStatus::Exited(pid, code) if pid == self.pid => return (Some(code), killed),
                WaitStatus::Signaled(pid, ..) if pid == self.pid => return (None, killed),
                WaitStatus::PtraceSyscall(thread) => {
                    if !killed && let Some(point) = self.point(thread) {
                        self.seen.push(point);
                        if kill_at == Some(self.seen.len()) {
                            kill(self.pid, Signal::SIGKILL).expect("it can be killed");
                            killed = true;
                        }
                    }
                    (thread, None)
                }
                WaitStatus::PtraceEvent(thread, ..) => (thread, None),
                WaitStatus::Stopped(thread, signal) => (thread, Some(signal)),
                _ => continue,
            };
            // It may be gone by now, or about to be.
            if !killed {
                let _ = ptrace::syscall(thread, signal);
            }
        }
    }

    fn point(&self, thread: Pid) -> Option<Point> {
        // `ptrace(2)`: PTRACE_EVENTMSG_SYSCALL_ENTRY is 1, PTRACE_EVENTMSG_SYSCALL_EXIT 2.
        let ended = ptrace::getevent(thread).ok()? == 2;
        let registers = ptrace::getregs(thread).ok()?;
        let (number, first, second) = arguments(&registers);
        let (call, journal, effect) = name(number)?;
        let what = match call {
            "write" | "sendto" => {
                let text = Self::peek(thread, second);
                if call == "write" && self.is_journal(first) {
                    return (self.counts == Points::Journal && !ended).then_some(Point { call, ended, what: text });
                }
                ["{\"execute\":", "{\"arguments\":"].iter().any(|begin| text.starts_with(begin)).then_some(text)?
            }
            "fsync" | "fdatasync" | "ftruncate" => {
                let file = self.file(first)?;
                let flush = call != "ftruncate";
                let counted = match (self.counts, file.ends_with(".journal")) {
                    (Points::Journal, true) => journal && (flush || !ended),
                    (Points::Effects, false) => effect,
                    _ => false,
                };
                return counted.then_some(Point { call, ended, what: file });
            }
            _ => String::from("a file"),
        };
        (self.counts == Points::Effects && effect).then_some(Point { call, ended, what })
    }

    fn file(&self, descriptor: u64) -> Option<String> {
        let target = fs::read_link(format!("/proc/{}/fd/{descriptor}", self.pid)).ok()?;
        Some(target.display().to_string())
    }

    fn is_journal(&self, descriptor: u64) -> bool {
        self.file(descriptor).is_some_and(|file| file.ends_with(".journal"))
    }

    /// The beginning of what lies at an address.
    fn peek(thread: Pid, address: u64) -> String {
        let words = (0..16u64).map_while(|word| ptrace::read(thread, (address + 8 * word) as *mut c_void).ok());
        let bytes: Vec<u8> = words.flat_map(i64::to_ne_bytes).collect();
        let line = bytes.split(|byte| *byte == b'\n' || *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(line).into_owned()
    }
}

fn text(file: &mut File) -> String {
    let mut bytes = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut bytes)).expect("a temporary file can be read");
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Number, first and second argument of the system call.
#[cfg(target_arch = "x86_64")]
fn arguments(registers: &libc::user_regs_struct) -> (i64, u64, u64) {
    (registers.orig_rax.cast_signed(), registers.rdi, registers.rsi)
}

#[cfg(target_arch = "aarch64")]
fn arguments(registers: &libc::user_regs_struct) -> (i64, u64, u64) {
    (registers.regs[8].cast_signed(), registers.regs[0], registers.regs[1])
}

/// Name, whether it can be a point of the journal, and of the effects.
fn name(number: i64) -> Option<(&'static str, bool, bool)> {
    Some(match number {
        libc::SYS_write => ("write", true, true),
        libc::SYS_fsync => ("fsync", true, true),
        libc::SYS_fdatasync => ("fdatasync", true, true),
        libc::SYS_ftruncate => ("ftruncate", true, false),
        libc::SYS_sendto => ("sendto", false, true),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_rename => ("rename", false, true),
        libc::SYS_renameat => ("renameat", false, true),
        libc::SYS_renameat2 => ("renameat2", false, true),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_link => ("link", false, true),
        libc::SYS_linkat => ("linkat", false, true),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_unlink => ("unlink", false, true),
        libc::SYS_unlinkat => ("unlinkat", false, true),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_mkdir => ("mkdir", false, true),
        libc::SYS_mkdirat => ("mkdirat", false, true),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_rmdir => ("rmdir", false, true),
        libc::SYS_mount => ("mount", false, true),
        libc::SYS_umount2 => ("umount", false, true),
        _ => return None,
    })
}
