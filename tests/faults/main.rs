//! Injected faults that are not kills: of the monitor, of the exports, of the provider, of the host's room and clock, and what
//! the guest's operator does meanwhile. After each: the guest lives and its disks hold what it wrote, nothing is left behind,
//! and the next archive is right byte for byte.
//!
//! The normal run tries a part of the points of every class; `PVEBACKUP_FAULTS=long` tries all of them.
#![cfg(feature = "restic")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

mod bench;
mod clock;
mod guest_acts;
mod nbd;
mod provider;
mod qmp;
#[path = "../rig/mod.rs"]
mod rig;
mod space;
mod two_at_once;
