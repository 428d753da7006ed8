//! The recovery journal: what must be undone if we die.
//!
//! Everything that we are about to add outside ourselves is written here, and fsynced, *before* we add it. One file per
//! guest, one JSON object a line; an exclusive lock (flock) on it tells that the run which wrote it lives. A run clears its
//! journal when nothing is left to undo; what a dead run left is undone by the next (`recover`). An access by hand outlives the
//! process that set it up: [`Step::ByHand`] tells it from what a dead run left.

mod file;
mod look;

pub(crate) use file::destroyed_text;
pub use file::{Journal, JournalError, Leftover};
pub use look::{Glimpse, look};

#[cfg(any(test, fuzzing))]
pub(crate) use file::{not_undone, parse};

use crate::access::DiskAccess;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Who QEMU is: a pid alone may have been given to another process since.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: i32,
    /// Start time in clock ticks after boot (`/proc/PID/stat` field 22).
    pub start_time: u64,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

/// One effect outside ourselves, written before it is caused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub enum Step {
    /// First line: whose journal this is.
    Begin {
        /// Guest id.
        guest: String,
        /// Its QMP socket.
        qmp: PathBuf,
        /// Its guest agent's socket.
        agent: Option<PathBuf>,
        /// The QEMU process.
        qemu: Option<ProcessIdentity>,
        /// Target id, as in [`crate::access::AccessPlan::target`].
        target: String,
        /// Id of the generation that the run starts.
        generation: String,
    },
    /// A directory for the run's sockets.
    RunDir {
        /// Where.
        path: PathBuf,
    },
    /// A fleecing image as a file.
    FleecingFile {
        /// Where.
        path: PathBuf,
    },
    /// A fleecing image as a volume of a Proxmox storage.
    FleecingVolume {
        /// Volume id.
        volume: String,
        /// Program that frees it.
        pvesm: PathBuf,
    },
    /// A block node that we add by name (fleecing image, snapshot-access, TPM source).
    Node {
        /// Its name.
        name: String,
    },
    /// A bitmap that starts a generation on stock QEMU.
    Bitmap {
        /// Node that carries it.
        node: String,
        /// Its name.
        name: String,
        /// Bitmap that it takes over from, which is disabled for the time of the access.
        replaces: Option<String>,
    },
    /// A backup job whose filter is the snapshot (stock QEMU, `blockdev-backup` with `sync: none`).
    Job {
        /// Job id.
        id: String,
    },
    /// A copy-before-write filter inserted above a disk by `qom-set`.
    Filter {
        /// Name of the filter node.
        name: String,
        /// Object whose `drive` property was set.
        qom_path: String,
        /// Node that was there.
        below: String,
    },
    /// The guest is paused by us; resume it unless a [`Step::Resumed`] follows.
    Paused,
    /// The guest runs again.
    Resumed,
    /// The guest's file systems are frozen by us; thaw them unless a [`Step::Thawed`] follows.
    Frozen,
    /// They are thawed.
    Thawed,
    /// Proxmox's `backup-access-setup`.
    Access {
        /// Target id.
        target_id: String,
    },
    /// The NBD server.
    NbdServer {
        /// Its socket.
        socket: PathBuf,
    },
    /// A FUSE file system that the run serves. It is dead when the run is, but its place stays taken.
    Mount {
        /// Where.
        path: PathBuf,
    },
    /// An NBD export.
    Export {
        /// Its id.
        id: String,
    },
    /// The archive is durable and the generation record is about to be written.
    Stored {
        /// The archive.
        archive: String,
    },
    /// The access is set up and stays when the process ends: an operator looks at the disks by hand, and ends it himself.
    /// What has to be undone then is what the other steps say.
    ByHand {
        /// The instant that the disks show.
        since: Timestamp,
        /// The NBD server's unix socket.
        socket: PathBuf,
        /// Configured target whose dirty bitmaps are looked at.
        target: Option<String>,
        /// The disks.
        disks: Vec<DiskAccess>,
        /// Whether clients may discard what they have read.
        #[serde(default)]
        trim: bool,
    },
    /// Files that show an access by hand, or an archive.
    Served {
        /// Where.
        path: PathBuf,
        /// The process that serves them.
        server: ProcessIdentity,
        /// Its log, which goes with it.
        log: Option<PathBuf>,
    },
    /// A step that was undone again; it need not be undone a second time.
    Undone {
        /// Names the step: its kind and name, as [`Step::label`] gives it.
        label: String,
    },
}

impl Step {
    /// Kind and name, unique within a journal: `node pvb-fl-0`.
    pub fn label(&self) -> String {
        match self {
            Self::Begin { guest, .. } => format!("begin {guest}"),
            Self::RunDir { path } => format!("run-dir {}", path.display()),
            Self::FleecingFile { path } => format!("fleecing-file {}", path.display()),
            Self::FleecingVolume { volume, .. } => format!("fleecing-volume {volume}"),
            Self::Node { name } => format!("node {name}"),
            Self::Bitmap { node, name, .. } => format!("bitmap {node} {name}"),
            Self::Job { id } => format!("job {id}"),
            Self::Filter { name, .. } => format!("filter {name}"),
            Self::Paused => "paused".into(),
            Self::Resumed => "resumed".into(),
            Self::Frozen => "frozen".into(),
            Self::Thawed => "thawed".into(),
            Self::Access { target_id } => format!("access {target_id}"),
            Self::NbdServer { socket } => format!("nbd-server {}", socket.display()),
            Self::Mount { path } => format!("mount {}", path.display()),
            Self::Export { id } => format!("export {id}"),
            Self::Stored { archive } => format!("stored {archive}"),
            Self::ByHand { since, .. } => format!("by-hand {since}"),
            Self::Served { path, server, .. } => format!("served {} by process {}", path.display(), server.pid),
            Self::Undone { label } => format!("undone {label}"),
        }
    }
}

impl ProcessIdentity {
    /// Identity of the living process `pid`.
    ///
    /// # Errors
    /// When there is none, or `/proc` cannot be read.
    pub fn of(pid: i32) -> Result<Self, procfs::ProcError> {
        let stat = procfs::process::Process::new(pid)?.stat()?;
        let boot_id = procfs::sys::kernel::random::boot_id()?;
        Ok(Self { pid, start_time: stat.starttime, boot_id })
    }

    /// Whether this very process still lives. A zombie does not: its sockets and nodes are gone.
    pub fn lives(&self) -> bool {
        let state = procfs::process::Process::new(self.pid).and_then(|p| p.stat()).map(|stat| stat.state);
        !matches!(state, Err(_) | Ok('Z' | 'X' | 'x')) && Self::of(self.pid).is_ok_and(|now| now == *self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_lives_until_it_ends_even_if_nobody_reaps_it() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let identity = ProcessIdentity::of(child.id() as i32).unwrap();
        assert!(identity.lives());
        assert!(!ProcessIdentity { start_time: identity.start_time + 1, ..identity.clone() }.lives());
        child.kill().unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while identity.lives() && std::time::Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(!identity.lives());
        assert!(ProcessIdentity::of(identity.pid).is_ok(), "still a zombie");
        child.wait().unwrap();
        assert!(!identity.lives());
    }
}
