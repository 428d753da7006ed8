//! Which process a guest's QEMU is.

use super::{Guest, GuestKind};
use crate::{journal::ProcessIdentity, qmp::Session};
use std::path::Path;

/// The guest's QEMU process: by Proxmox VE's pid file, else by the peer of the QMP socket. `None` when that cannot be told,
/// as from inside another pid namespace; bitmaps are not trusted then.
pub fn process(guest: &Guest, session: &Session) -> Option<ProcessIdentity> {
    let pid = match guest.kind {
        GuestKind::Proxmox => pid_in_file(&guest.qmp),
        GuestKind::Plain => None,
    };
    ProcessIdentity::of(pid.or_else(|| session.peer_pid())?).ok()
}

/// The QEMU process of a Proxmox guest, by the pid file beside its QMP socket.
pub fn process_in_pid_file(qmp: &Path) -> Option<ProcessIdentity> {
    ProcessIdentity::of(pid_in_file(qmp)?).ok()
}

fn pid_in_file(qmp: &Path) -> Option<i32> {
    std::fs::read_to_string(qmp.with_extension("pid")).ok()?.trim().parse().ok()
}
