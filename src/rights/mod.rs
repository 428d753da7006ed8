//! What this process and its children may do and see, and what they give up.
//!
//! Three things, from the start of the program on: nothing that we make is for anybody else and no memory of ours reaches a
//! core dump ([`keep_private`]); children get only what they need of the environment ([`command`]); and what parses an archive
//! gives up, before it begins, everything that it does not need ([`Confinement`]).
//!
//! A backup is not confined: it mounts, and it starts Proxmox VE's storage tools, which need all rights. What it parses comes
//! from QEMU, the agent and the provider, in Rust, with bounds, and fuzzed.

mod child;
mod confine;

pub use child::command;
pub use confine::{Confinement, GivenUp};

use nix::sys::{
    prctl,
    resource::{Resource, setrlimit},
    stat::{Mode, umask},
};

/// Makes files private to their owner unless asked otherwise, and keeps the memory, which holds passwords and disk content,
/// out of core dumps and away from debuggers of the same user (`PR_SET_DUMPABLE`, prctl(2)).
pub fn keep_private() {
    umask(Mode::from_bits_truncate(0o077));
    // Both can only fail on kernels that do not know them.
    let _ = prctl::set_dumpable(false);
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
}
