//! What the official restic thinks of our repositories.

use crate::fixture::{Content, Disk, Fixture, segment_bytes};
use pvebackup::provider::Provider;
use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
};

/// The official restic on a repository.
struct Restic {
    repository: PathBuf,
    key: PathBuf,
}

impl Restic {
    /// `None`, with the reason printed, when restic is not installed.
    fn of(f: &Fixture) -> Option<Self> {
        if Command::new("restic").arg("version").output().is_err() {
            eprintln!("skipped: restic is not installed");
            return None;
        }
        Some(Self { repository: f.repository(), key: f.dir.path().join("secrets/key") })
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new("restic");
        command.arg("--repo").arg(&self.repository).arg("--password-file").arg(&self.key).arg("--no-cache");
        command.args(arguments).output().unwrap()
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "restic {arguments:?}: {text}");
        text
    }
}

#[test]
fn the_official_restic_checks_lists_and_restores_what_we_wrote() {
    let mut f = Fixture::new();
    let Some(restic) = Restic::of(&f) else { return };
    let content: Content = (0..300).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    let base = Some(f.use_base(&first, "scsi0"));
    let disk = Disk { name: "scsi0", base, changes: vec![Ok((700, Some(segment_bytes(2, 700))))] };
    let second = f.backup(vec![disk]).unwrap().id;

    restic.ok(&["check"]);
    let text = restic.ok(&["check", "--read-data"]);
    assert!(text.contains("no errors were found"), "{text}");
    let text = restic.ok(&["ls", &second.0]);
    for path in [
        "/guest.conf",
        "/manifest.json",
        "/disks/scsi0.segments",
        "/disks/scsi0/000001/000000012b",
        "/disks/scsi0/000002/00000002bc",
    ] {
        assert!(text.lines().any(|line| line == path), "{path} in {text}");
    }
    let target = f.dir.path().join("restored");
    restic.ok(&["restore", &second.0, "--target", target.to_str().unwrap()]);
    assert_eq!(fs::read(target.join("disks/scsi0/000000/0000000005")).unwrap(), content[&5]);
    assert_eq!(fs::read(target.join("disks/scsi0/000002/00000002bc")).unwrap(), segment_bytes(2, 700));

    // What restic itself writes into the repository is none of ours, and does no harm.
    restic.ok(&["backup", target.to_str().unwrap()]);
    assert_eq!(f.provider.list(None).unwrap().len(), 2);
    restic.ok(&["forget", "--prune", &first.0]);
    assert_eq!(f.provider.list(None).unwrap().len(), 1);
    assert_eq!(f.restored(&second, "scsi0").len(), 301);
    f.use_base(&second, "scsi0");
}

#[test]
fn the_official_restic_does_not_prune_during_a_job_and_nobody_backs_up_during_its_prune() {
    let mut f = Fixture::new();
    let Some(restic) = Restic::of(&f) else { return };
    let content: Content = (0..10).map(|i| (i, segment_bytes(1, i))).collect();
    f.provider.job_init(f.clock).unwrap();
    let id = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    let output = restic.run(&["prune"]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("already locked"), "{text}");
    // Must neither remove the lock nor send us a signal.
    restic.ok(&["unlock"]);
    assert!(!restic.run(&["prune"]).status.success(), "still locked");
    f.provider.job_cleanup().unwrap();
    restic.ok(&["prune"]);
    assert!(f.restored(&id, "scsi0") == content);
}
