//! Typed commands: what we send and the members of the answers that we use.
//!
//! Answers are read tolerantly: QEMU adds members with every release, and leaves out what it has nothing to say about.

pub mod block;
pub mod proxmox;
