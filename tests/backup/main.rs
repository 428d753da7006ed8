//! The program on real machines: backups, restores, faults, refusals. Every history is restored and compared byte for byte with
//! what the guest wrote.
#![cfg(feature = "restic")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

mod borg;
mod by_hand;
mod directory;
mod guest_os;
mod histories;
mod interrupted;
mod limits;
mod matrix;
mod mounted;
mod recovery;
mod refused;
#[path = "../rig/mod.rs"]
mod rig;
#[path = "../sshd/mod.rs"]
mod sshd;
mod two_states;
mod unprivileged;
