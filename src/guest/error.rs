//! Why a guest cannot be backed up.

use super::{Guest, GuestId};
use crate::qmp::QmpError;
use std::{io, path::PathBuf};
use thiserror::Error;

/// Why a guest or its disks cannot be found.
#[derive(Debug, Error)]
pub enum GuestError {
    /// There is no such guest.
    #[error("no guest `{id}`: looked for {}", listed(.looked.iter().map(|p| p.display())))]
    NotFound {
        /// The id.
        id: GuestId,
        /// Where.
        looked: Vec<PathBuf>,
    },
    /// The id is a container's.
    #[error("guest `{0}` is a container, not a VM")]
    Container(GuestId),
    /// The VM belongs to another node of the cluster.
    #[error("VM `{id}` is on node `{node}`, not on this one")]
    OtherNode {
        /// The id.
        id: GuestId,
        /// The node.
        node: String,
    },
    /// It does not run.
    #[error("guest `{id}` is not running: nobody answers at {socket}; start it first")]
    NotRunning {
        /// The id.
        id: GuestId,
        /// Its QMP socket.
        socket: PathBuf,
    },
    /// Something else is at work on it.
    #[error("VM `{id}` is locked ({lock})")]
    Locked {
        /// The id.
        id: GuestId,
        /// Proxmox's word for what is at work.
        lock: String,
    },
    /// A template has no snapshot access.
    #[error("VM `{0}` is a template")]
    Template(GuestId),
    /// Nothing is left to back up.
    #[error("no disk to back up; left out: {}", listed(.skipped.iter().map(|(name, reason)| format!("{name} ({reason})"))))]
    NoDisks {
        /// The disks that were left out, and why.
        skipped: Vec<(String, String)>,
    },
    /// There is no disk of that name.
    #[error("no disk `{name}`; there are: {}", listed(.known))]
    NoSuchDisk {
        /// The name.
        name: String,
        /// The names that exist.
        known: Vec<String>,
    },
    /// A disk that was asked for by name cannot be backed up.
    #[error("disk `{name}` cannot be backed up: {reason}")]
    Unsuitable {
        /// The disk.
        name: String,
        /// Why not.
        reason: String,
    },
    /// The configuration names a disk that QEMU does not have.
    #[error("disk `{name}` is in the configuration, but QEMU does not have it; exclude it to back up the others")]
    NotInQemu {
        /// The disk.
        name: String,
    },
    /// The configuration cannot be understood.
    #[error("line {line} of the configuration: {what}")]
    Config {
        /// Line, counted from 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// A file cannot be read.
    #[error("{path} cannot be read")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// QEMU cannot be asked.
    #[error("QEMU of guest `{id}` cannot be asked")]
    Qmp {
        /// The id.
        id: GuestId,
        /// The cause.
        source: QmpError,
    },
    /// QEMU tells something that cannot be.
    #[error("QEMU tells of {0}")]
    Answer(String),
}

fn listed<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    if items.is_empty() { "none".into() } else { items.join(", ") }
}

impl GuestError {
    /// A QMP error about `guest`; that nobody listens means that it is not running.
    pub fn of_qmp(guest: &Guest, error: QmpError) -> Self {
        match error {
            QmpError::Connect { socket, source }
                if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                Self::NotRunning { id: guest.id.clone(), socket }
            }
            source => Self::Qmp { id: guest.id.clone(), source },
        }
    }
}
