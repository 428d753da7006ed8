#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]
//! pvebackup: incremental backups of running QEMU/KVM virtual machines.
//!
//! The data goes one way, and the rooms are named after its stations:
//!
//! [`guest`] finds a virtual machine and its disks → [`access`] asks QEMU for a snapshot access to them (speaking
//! [`qmp`]) → [`nbd`] reads the exports → [`copy`] turns dirty [`extent`]s into [`segment`]s with many reads in flight →
//! a [`provider`] stores them as an [`archive`] → [`generation`] records what the next incremental backup may build on.
//! Across all of it run the commit [`protocol`], the recovery [`journal`] and the event stream ([`report`]).
//!
//! [`backup`], [`restore`] and [`by_hand`] are the flows, readable from top to bottom.

pub mod access;
pub mod archive;
pub mod backup;
pub mod by_hand;
pub mod cli;
pub mod config;
pub mod copy;
pub mod extent;
pub mod fuse;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod generation;
pub mod guest;
pub mod journal;
pub mod nbd;
pub mod protocol;
pub mod provider;
mod qcow2;
pub mod qmp;
pub mod report;
pub mod restore;
pub mod rights;
pub mod segment;
