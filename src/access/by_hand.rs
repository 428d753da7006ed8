//! An access that stays when the process that set it up has ended: an operator looks at the disks by hand.
//!
//! It is in the journal like that of any run. [`Step::ByHand`] behind its other steps says that nobody has died: runs of the
//! guest refuse until the access is ended, or recovered.

use super::{AccessError, DiskAccess, graph::Graph, stock::bitmap};
use crate::{
    guest::{Disk, GuestId, GuestKind},
    journal::{ProcessIdentity, Step},
};
use jiff::Timestamp;
use std::path::PathBuf;

/// Name under which accesses by hand have bitmaps of their own; no configured target may be called so.
pub const TARGET: &str = "by-hand";

/// An access by hand, as its journal tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The instant that the disks show.
    pub since: Timestamp,
    /// The NBD server's unix socket.
    pub socket: PathBuf,
    /// Configured target whose dirty bitmaps are looked at.
    pub target: Option<String>,
    /// The disks.
    pub disks: Vec<DiskAccess>,
    /// Whether clients may discard what they have read.
    pub trim: bool,
    /// Where files show it, each with the process that serves them.
    pub mounts: Vec<(PathBuf, ProcessIdentity)>,
    /// The guest's QMP socket.
    pub qmp: PathBuf,
    /// The QEMU process.
    pub qemu: Option<ProcessIdentity>,
}

impl Kept {
    /// The access by hand among the steps of a journal.
    pub fn of(steps: &[Step]) -> Option<Self> {
        let (since, socket, target, disks, trim) = steps.iter().rev().find_map(|step| match step {
            Step::ByHand { since, socket, target, disks, trim } => Some((*since, socket, target, disks, *trim)),
            _ => None,
        })?;
        let mounts = steps.iter().filter_map(|step| match step {
            Step::Served { path, server, .. } => Some((path.clone(), server.clone())),
            _ => None,
        });
        let (qmp, qemu) = steps.iter().find_map(|step| match step {
            Step::Begin { qmp, qemu, .. } => Some((qmp.clone(), qemu.clone())),
            _ => None,
        })?;
        Some(Self {
            since,
            socket: socket.clone(),
            target: target.clone(),
            disks: disks.clone(),
            trim,
            mounts: mounts.collect(),
            qmp,
            qemu,
        })
    }

    /// Whether the QEMU process is known to have ended, and the access with it.
    pub fn qemu_is_gone(&self) -> bool {
        self.qemu.as_ref().is_some_and(|qemu| !qemu.lives())
    }

    /// Why nothing else may be done to `guest` now.
    pub fn in_the_way(&self, guest: &GuestId) -> AccessError {
        AccessError::Busy {
            by: format!(
                "an access by hand is set up since {}; `pvebackup access teardown {guest}` ends it",
                self.since
            ),
            disk: None,
        }
    }
}

/// The target id of accesses by hand. One without a bitmap of its own has another on Proxmox, where QEMU would delete the
/// bitmap that `--success` kept.
pub fn target_id(kind: GuestKind, has_bitmap: bool) -> String {
    match (kind, has_bitmap) {
        (GuestKind::Plain, _) => TARGET.into(),
        (GuestKind::Proxmox, true) => format!("pvebackup-{TARGET}"),
        // No configured target has a dot in its name.
        (GuestKind::Proxmox, false) => format!("pvebackup-{TARGET}.none"),
    }
}

/// The bitmap that an earlier access by hand kept on a disk. On Proxmox only QEMU's answer to the setup shows.
pub fn own_bitmap(kind: GuestKind, graph: &Graph, disk: &Disk) -> Option<String> {
    match kind {
        GuestKind::Plain => bitmap::of_target(graph, &disk.node, TARGET).map(str::to_owned),
        GuestKind::Proxmox => Some(target_id(kind, true)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin() -> Step {
        Step::Begin {
            guest: "100".into(),
            qmp: "/q".into(),
            agent: None,
            qemu: Some(ProcessIdentity { pid: 1, start_time: 0, boot_id: "another boot".into() }),
            target: TARGET.into(),
            generation: "0123456789abcdef".into(),
        }
    }

    #[test]
    fn an_access_by_hand_is_told_from_what_a_dead_run_left() {
        assert_eq!(Kept::of(&[]), None);
        assert_eq!(Kept::of(&[begin(), Step::Export { id: "e".into() }]), None);
        let step = Step::ByHand {
            since: Timestamp::UNIX_EPOCH,
            socket: "/run/nbd.sock".into(),
            target: Some("nas".into()),
            disks: Vec::new(),
            trim: false,
        };
        // As it comes back from the file.
        let step = serde_json::from_str(&serde_json::to_string(&step).unwrap()).unwrap();
        let kept = Kept::of(&[begin(), Step::Export { id: "e".into() }, step]).unwrap();
        assert_eq!((kept.target.as_deref(), kept.qmp.to_str()), (Some("nas"), Some("/q")));
        assert!(kept.qemu_is_gone());
        let text = kept.in_the_way(&"100".parse().unwrap()).to_string();
        assert!(text.contains("by hand is set up since 1970-01-01") && text.contains("access teardown 100"), "{text}");
    }
}
