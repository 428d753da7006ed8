//! Finding a guest and its disks.

mod disks;
mod error;
pub mod plain;
mod process;
pub mod proxmox;
pub mod proxmox_config;
pub mod query;

pub use disks::{Found, disks, select};
pub use error::GuestError;
pub use process::{process, process_in_pid_file};

use serde::{Deserialize, Serialize};
use std::{fmt, path::PathBuf, str::FromStr};
use thiserror::Error;

/// A guest's id: the VMID on Proxmox VE, else the name from the configuration or the command line.
/// Letters, digits, `-`, `_`, `.`; at most 64; begins with a letter or digit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GuestId(String);

/// Why a text is no guest id.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("`{0}` is no guest id: at most 64 letters, digits, `-`, `_` and `.`, beginning with a letter or digit")]
pub struct GuestIdError(String);

impl GuestId {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for GuestId {
    type Err = GuestIdError;

    fn from_str(text: &str) -> Result<Self, GuestIdError> {
        let valid = (1..=64).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
            && text.as_bytes()[0].is_ascii_alphanumeric();
        if valid { Ok(Self(text.to_owned())) } else { Err(GuestIdError(text.chars().take(80).collect())) }
    }
}

impl TryFrom<String> for GuestId {
    type Error = GuestIdError;

    fn try_from(text: String) -> Result<Self, GuestIdError> {
        text.parse()
    }
}

impl From<GuestId> for String {
    fn from(id: GuestId) -> Self {
        id.0
    }
}

impl fmt::Display for GuestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a guest was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestKind {
    /// A VM of Proxmox VE: `VMID.conf`, sockets below `/run/qemu-server`.
    Proxmox,
    /// A QEMU process with a QMP socket.
    Plain,
}

/// A guest as found before QEMU is asked.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Its id.
    pub id: GuestId,
    /// Its own name, if known.
    pub name: Option<String>,
    /// Where it was found.
    pub kind: GuestKind,
    /// Its QMP socket.
    pub qmp: PathBuf,
    /// Its guest agent's socket, if an agent is configured.
    pub agent: Option<PathBuf>,
    /// Its configuration as archived (`guest.conf`).
    pub config: Vec<u8>,
    /// Its firewall configuration, if any (`firewall.conf`).
    pub firewall: Option<Vec<u8>>,
}

/// What a disk is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskKind {
    /// An ordinary disk.
    Drive,
    /// UEFI variables.
    Efi,
    /// TPM state; QEMU has no device for it, it is attached for the backup only.
    Tpm,
}

/// A disk of a running guest that will be backed up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Name as shown: `scsi0`.
    pub name: String,
    /// QEMU's name, which is also the export's: `drive-scsi0`; `drive-tpmstate0-backup`.
    pub device: String,
    /// What it is for.
    pub kind: DiskKind,
    /// `qdev` of `query-block`: a device id or a QOM path; empty for TPM state.
    pub qdev: String,
    /// Root node: `inserted.node-name` of `query-block`; may be generated (`#block147`).
    pub node: String,
    /// Driver of the root node (`drv`).
    pub driver: String,
    /// Size in bytes (`image.virtual-size`).
    pub size: u64,
    /// What identifies the disk's content across runs: the image's file name as QEMU tells it.
    pub identity: String,
    /// Path or Proxmox volume id of the volume, for TPM state only, which QEMU has not opened.
    pub volume: Option<PathBuf>,
}
