//! A repository on another machine: borg on both sides of SSH.

use crate::{
    fixture::{Change, Content, Disk, Fixture, options, possible, segment_bytes},
    sshd::Sshd,
};
use pvebackup::provider::{
    ErrorKind, Provider,
    borg::{BorgOptions, BorgProvider},
};
use std::sync::atomic::Ordering;
use tempfile::TempDir;

/// A server, and options for a repository behind it.
fn behind_ssh() -> Option<(Sshd, TempDir, BorgOptions)> {
    if !possible() {
        return None;
    }
    let server = match Sshd::start() {
        Ok(server) => server,
        Err(reason) => {
            eprintln!("skipped: {reason}");
            return None;
        }
    };
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path());
    options.repository = server.url(&dir.path().join("repository"));
    options.ssh_key = Some(server.file("user"));
    options.known_hosts = Some(server.known_hosts());
    options.remote_path = std::env::var("PVEBACKUP_TEST_BORG").ok();
    Some((server, dir, options))
}

#[test]
fn a_repository_behind_ssh_works_like_a_local_one() {
    let Some((server, dir, options)) = behind_ssh() else { return };
    let mut stranger = options.clone();
    stranger.known_hosts = Some(server.file("nobody"));
    let stranger = BorgProvider::open(stranger).unwrap().repository_id().unwrap_err();
    // borg does not always wait for what ssh has to say.
    assert!(stranger.kind == ErrorKind::Credentials || stranger.message.contains("Connection closed"), "{stranger}");
    let missing = BorgProvider::open(options.clone()).unwrap().repository_id().unwrap_err();
    assert_eq!(missing.kind, ErrorKind::RepositoryMissing, "{missing}");

    let mut f = Fixture::with(dir, options);
    let mut content: Content = (0..200).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    let base = Some(f.use_base(&first, "scsi0"));
    let changes = [(3, Change::Data(segment_bytes(2, 3))), (4, Change::Zero)].into();
    let second = f.backup(vec![Disk { name: "scsi0", base, changes }]).unwrap().id;
    content.insert(3, segment_bytes(2, 3));
    content.remove(&4);
    assert!(f.restored(&second, "scsi0") == content);

    // The user's own public key stands for the key of somebody who is in the middle.
    server.trust("user.pub");
    let changed = f.provider.repository_id().unwrap_err();
    assert!(changed.kind == ErrorKind::Credentials || changed.message.contains("Connection closed"), "{changed}");
    assert!(f.backup(vec![Disk::full("scsi0", &content)]).is_err());
    server.trust("host.pub");
    assert!(f.backup(vec![Disk { name: "scsi0", base: None, changes: [(1, Change::Failure)].into() }]).is_err());
    f.assert_nothing_stored(2);
}

#[test]
fn a_connection_that_breaks_in_the_middle_leaves_no_archive() {
    let Some((server, dir, options)) = behind_ssh() else { return };
    let mut f = Fixture::with(dir, options);
    let content: Content = (0..600).map(|i| (i, segment_bytes(1, i))).collect();
    let pid = server.pid();
    let broken = f.backup_while(Disk::full("scsi0", &content), move |before| {
        if before == 200 {
            Sshd::cut_off(pid);
        }
    });
    let error = broken.unwrap_err();
    assert!(error.message.contains("onnection") || error.message.contains("Remote"), "{error}");
    assert!(f.stored.load(Ordering::Relaxed) < 600, "it ended before everything was read");
    f.assert_nothing_stored(0);
}
