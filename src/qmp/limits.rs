//! How long a command may take.

use std::time::Duration;

/// For commands that the table does not name.
const DEFAULT: u64 = 10;

/// Seconds by command. They follow Proxmox VE's client where it has a value; the others are commands that drain or flush
/// block devices, which takes as long as the storage does.
const SECONDS: &[(&str, u64)] = &[
    ("backup-access-setup", 60),
    ("backup-access-teardown", 60),
    ("backup-cancel", 600),
    ("block-dirty-bitmap-add", 60),
    ("block-dirty-bitmap-merge", 60),
    ("block-dirty-bitmap-remove", 60),
    ("block-export-add", 60),
    ("block-export-del", 600),
    ("block-job-cancel", 60),
    ("blockdev-add", 60),
    ("blockdev-backup", 60),
    ("blockdev-del", 600),
    ("blockdev-reopen", 60),
    ("cont", 45),
    ("device_add", 60),
    ("human-monitor-command", 60),
    ("job-cancel", 60),
    ("job-dismiss", 60),
    ("nbd-server-stop", 25),
    ("object-add", 60),
    ("object-del", 60),
    ("qom-set", 60),
    ("query-backup", 600),
    ("query-block", 60),
    ("query-named-block-nodes", 60),
    ("quit", 60),
    ("stop", 60),
    ("system_powerdown", 30),
    ("transaction", 60),
];

/// How long to wait for the answer to a QMP command. QEMU goes on with it afterwards: a limit that passes says nothing about
/// the outcome.
pub fn limit_of(command: &str) -> Duration {
    Duration::from_secs(SECONDS.iter().find(|(name, _)| *name == command).map_or(DEFAULT, |(_, limit)| *limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_that_drain_get_longer_than_others() {
        assert_eq!(limit_of("backup-access-setup"), Duration::from_mins(1));
        assert_eq!(limit_of("query-status"), Duration::from_secs(10));
        assert!(SECONDS.is_sorted_by(|a, b| a.0 < b.0));
    }
}
