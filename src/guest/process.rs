//! Which process a guest's QEMU is.

use super::{Guest, GuestKind};
use crate::{journal::ProcessIdentity, qmp::Session};

/// The guest's QEMU process: by Proxmox VE's pid file, else by the peer of the QMP socket. `None` when that cannot be told,
/// as from inside another pid namespace; bitmaps are not trusted then.
pub fn process(guest: &Guest, session: &Session) -> Option<ProcessIdentity> {
    let from_file = match guest.kind {
        GuestKind::Proxmox => std::fs::read_to_string(guest.qmp.with_extension("pid")).ok(),
        GuestKind::Plain => None,
    };
    let pid = from_file.and_then(|text| text.trim().parse().ok()).or_else(|| session.peer_pid())?;
    ProcessIdentity::of(pid).ok()
}
