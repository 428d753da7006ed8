//! Exit codes. They are an API: scripts and monitoring depend on them.

use crate::{
    access::AccessError,
    archive::ManifestError,
    backup::{Cancelled, FullNeeded, LeftBehind},
    by_hand::ByHandError,
    config::ConfigError,
    copy::CopyError,
    fuse::FuseError,
    guest::GuestError,
    journal::JournalError,
    provider::{ErrorKind, ProviderError},
    qmp::QmpError,
    restore::{RestoreError, RestoreErrorKind},
};

/// Done.
pub const OK: u8 = 0;
/// Failed.
pub const FAILED: u8 = 1;
/// Usage or configuration.
pub const USAGE: u8 = 2;
/// Done, with warnings.
pub const WARNINGS: u8 = 3;
/// Some guests failed.
pub const SOME_FAILED: u8 = 4;
/// The target does not exist.
pub const NO_TARGET: u8 = 10;
/// Locked or busy.
pub const BUSY: u8 = 11;
/// Credentials.
pub const CREDENTIALS: u8 = 12;
/// No such guest, disk or archive.
pub const NOT_FOUND: u8 = 20;
/// QEMU lacks a feature.
pub const NO_FEATURE: u8 = 21;
/// Demanded consistency was not reached.
pub const NOT_CONSISTENT: u8 = 22;
/// Out of space.
pub const NO_SPACE: u8 = 23;
/// An incremental backup was demanded, a full one is needed.
pub const FULL_NEEDED: u8 = 24;
/// What was read back is not what was stored.
pub const MISMATCH: u8 = 25;
/// State was left behind: run `pvebackup recover`.
pub const LEFT_BEHIND: u8 = 26;
/// Stopped by SIGINT, after a clean teardown. SIGTERM gives 143.
pub const INTERRUPTED: u8 = 130;

/// The table for `--help`.
pub const HELP: &str = "\
Exit codes:
  0 done                       20 no such guest, disk or archive
  1 failed                     21 QEMU lacks a feature
  2 usage or configuration     22 demanded consistency not reached
  3 done with warnings         23 out of space
  4 some guests failed         24 incremental demanded, full needed
  10 target missing            25 verification mismatch
  11 locked or busy            26 state left behind (run `pvebackup recover`)
  12 credentials               130/143 signal, after clean teardown";

/// The exit code of a failure: that of something left behind, else that of the first error in its chain that has one, and of a file
/// system without room otherwise.
pub fn code_of(error: &anyhow::Error) -> u8 {
    // As a context it is no link of the chain by itself.
    if error.is::<LeftBehind>() {
        return LEFT_BEHIND;
    }
    error.chain().find_map(code_of_one).or_else(|| error.chain().find_map(no_space)).unwrap_or(FAILED)
}

fn no_space(error: &(dyn std::error::Error + 'static)) -> Option<u8> {
    let kind = error.downcast_ref::<std::io::Error>()?.kind();
    matches!(kind, std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded).then_some(NO_SPACE)
}

fn code_of_one(error: &(dyn std::error::Error + 'static)) -> Option<u8> {
    if error.is::<Cancelled>() {
        return Some(INTERRUPTED);
    }
    if error.is::<FullNeeded>() {
        return Some(FULL_NEEDED);
    }
    if error.is::<ManifestError>() {
        return Some(MISMATCH);
    }
    if error.is::<ConfigError>() || error.is::<super::Usage>() {
        return Some(USAGE);
    }
    if let Some(error) = error.downcast_ref::<ProviderError>() {
        return code_of_provider(error.kind);
    }
    if let Some(error) = error.downcast_ref::<GuestError>() {
        return match error {
            GuestError::Locked { .. } => Some(BUSY),
            GuestError::Template(_) | GuestError::Container(_) => Some(NO_FEATURE),
            GuestError::NotFound { .. }
            | GuestError::OtherNode { .. }
            | GuestError::NotRunning { .. }
            | GuestError::NoDisks { .. }
            | GuestError::NoSuchDisk { .. }
            | GuestError::Unsuitable { .. }
            | GuestError::NotInQemu { .. } => Some(NOT_FOUND),
            GuestError::Config { .. } => Some(USAGE),
            // A busy socket, in the cause, has a code of its own.
            GuestError::Read { .. } | GuestError::Qmp { .. } | GuestError::Answer(_) => None,
        };
    }
    if let Some(error) = error.downcast_ref::<AccessError>() {
        return match error {
            AccessError::FeatureMissing { .. } | AccessError::Refused { .. } => Some(NO_FEATURE),
            AccessError::NoSpace { .. } => Some(NO_SPACE),
            AccessError::Busy { .. } | AccessError::Foreign { .. } => Some(BUSY),
            AccessError::Freeze(_) | AccessError::Watchdog(_) => Some(NOT_CONSISTENT),
            _ => None,
        };
    }
    if let Some(CopyError::SnapshotLost { .. }) = error.downcast_ref() {
        return Some(NO_SPACE);
    }
    if let Some(error) = error.downcast_ref::<ByHandError>() {
        return match error {
            ByHandError::None { .. } | ByHandError::Gone { .. } => Some(NOT_FOUND),
            ByHandError::NoBitmap { .. } => Some(USAGE),
            ByHandError::InUse { .. } => Some(BUSY),
        };
    }
    if let Some(error) = error.downcast_ref::<RestoreError>() {
        return match error.kind() {
            RestoreErrorKind::NotFound => Some(NOT_FOUND),
            RestoreErrorKind::Mismatch | RestoreErrorKind::Damaged => Some(MISMATCH),
            RestoreErrorKind::NoSpace => Some(NO_SPACE),
            RestoreErrorKind::Usage => Some(USAGE),
            RestoreErrorKind::Busy => Some(BUSY),
            RestoreErrorKind::Cancelled => Some(INTERRUPTED),
            RestoreErrorKind::Provider(kind) => code_of_provider(kind),
            RestoreErrorKind::Io => None,
        };
    }
    if let Some(error) = error.downcast_ref::<FuseError>() {
        return match error {
            FuseError::Busy(_) => Some(BUSY),
            FuseError::NotADirectory(_)
            | FuseError::NotEmpty(_)
            | FuseError::AlreadyMounted { .. }
            | FuseError::NotMounted(_)
            | FuseError::Foreign { .. } => Some(USAGE),
            FuseError::NoDevice
            | FuseError::NoHelper
            | FuseError::Mount { .. }
            | FuseError::Unmount { .. }
            | FuseError::Io { .. } => Some(FAILED),
        };
    }
    match error.downcast_ref::<JournalError>() {
        Some(JournalError::Busy { .. }) => return Some(BUSY),
        Some(JournalError::Io { .. }) | None => {}
    }
    match error.downcast_ref::<QmpError>() {
        Some(QmpError::Busy { .. }) => Some(BUSY),
        Some(QmpError::Connect { .. }) => Some(NOT_FOUND),
        _ => None,
    }
}

fn code_of_provider(kind: ErrorKind) -> Option<u8> {
    match kind {
        ErrorKind::RepositoryMissing => Some(NO_TARGET),
        ErrorKind::Locked => Some(BUSY),
        ErrorKind::Credentials => Some(CREDENTIALS),
        ErrorKind::NotFound => Some(NOT_FOUND),
        ErrorKind::NoSpace => Some(NO_SPACE),
        ErrorKind::Damaged => Some(MISMATCH),
        ErrorKind::Source | ErrorKind::Incomplete | ErrorKind::Other => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    #[test]
    fn what_is_left_behind_comes_before_what_a_run_failed_with() {
        let left = || LeftBehind { what: vec!["node n".into()], archive: None };
        let busy = || JournalError::Busy { guest: "100".into(), path: "100.journal".into() };
        assert_eq!(code_of(&anyhow!(left())), LEFT_BEHIND);
        assert_eq!(code_of(&anyhow!("it fails").context(left()).context("guest")), LEFT_BEHIND);
        assert_eq!(code_of(&anyhow!(busy()).context(left()).context("guest")), LEFT_BEHIND);
        assert_eq!(code_of(&anyhow!(busy()).context("guest")), BUSY);
        assert_eq!(code_of(&anyhow!("it fails").context("guest")), FAILED);
    }
}
