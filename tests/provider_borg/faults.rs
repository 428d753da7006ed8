//! What goes wrong while borg works, and what stands in its way.

use crate::{fixture::*, small_fs::SmallFs};
use pvebackup::provider::{
    ErrorKind, Provider,
    borg::{BorgProvider, Passphrase},
};
use std::{fs, process::Command, sync::atomic::Ordering, time::Duration};
use tokio_util::sync::CancellationToken;

#[test]
fn what_a_dead_run_has_left_is_deleted_by_the_next() {
    let Some(mut f) = Fixture::new() else { return };
    let place = |name: &str| format!("{}::{name}", f.repository().display());
    let file = f.dir.path().join("passphrase").display().to_string();
    f.borg(&["create", &place("pve-qemu-100-2026-01-30T02:00:07Z.incomplete"), &file]);
    f.borg(&["create", &place("pve-qemu-web-2026-01-30T02:00:07Z.incomplete"), &file]);
    f.borg(&["create", &place("somebody-elses"), &file]);
    assert!(f.provider.list(None).unwrap().is_empty());
    f.backup(vec![Disk::full("scsi0", &Content::new())]).unwrap();
    let names = f.names();
    assert!(!names.iter().any(|n| n.starts_with("pve-qemu-100") && n.ends_with(".incomplete")), "{names:?}");
    assert_eq!(names.len(), 3, "{names:?}");
}

#[test]
fn a_wrong_passphrase_a_lock_and_a_missing_repository_are_told_apart() {
    let Some(f) = Fixture::new() else { return };
    let mut provider = BorgProvider::open(f.options.clone()).unwrap();
    let mut holder = Command::new(program())
        .args(["with-lock", &f.repository().display().to_string(), "cat"])
        .env("BORG_BASE_DIR", f.dir.path().join("user"))
        .env("BORG_PASSPHRASE", "correct horse")
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    while !f.repository().join("lock.exclusive").exists() {
        std::thread::sleep(Duration::from_millis(20));
    }
    let locked = provider.repository_id().unwrap_err();
    // It ends when nobody can write to it any more.
    drop(holder.stdin.take());
    holder.wait().unwrap();
    assert_eq!(locked.kind, ErrorKind::Locked, "{locked}");

    fs::write(f.dir.path().join("passphrase"), "battery staple\n").unwrap();
    let error = provider.repository_id().unwrap_err();
    assert_eq!(error.kind, ErrorKind::Credentials, "{error}");
    assert!(!format!("{error:?}").contains("staple"));
    fs::remove_file(f.dir.path().join("passphrase")).unwrap();
    assert_eq!(provider.repository_id().unwrap_err().kind, ErrorKind::Credentials);
    assert!(BorgProvider::init(f.options.clone()).is_err(), "there is one already");

    for name in ["nothing", "something"] {
        let mut other = f.options.clone();
        other.repository = f.dir.path().join(name).display().to_string();
        other.passphrase = Passphrase::given("correct horse");
        fs::create_dir(f.dir.path().join("something")).ok();
        fs::write(f.dir.path().join("something/file"), "no repository").unwrap();
        let error = BorgProvider::open(other).unwrap().repository_id().unwrap_err();
        assert_eq!(error.kind, ErrorKind::RepositoryMissing, "{error}");
    }
}

#[test]
fn a_cancelled_backup_ends_soon_and_leaves_no_archive() {
    let Some(mut f) = Fixture::new() else { return };
    let content: Content = (0..700).map(|i| (i, segment_bytes(1, i))).collect();
    let cancel = f.cancel.clone();
    let cancelled = f.backup_while(Disk::full("scsi0", &content), move |before| {
        if before == 20 {
            cancel.cancel();
            std::thread::sleep(Duration::from_millis(300));
        }
    });
    assert_eq!(cancelled.unwrap_err().kind, ErrorKind::Source);
    assert!(f.stored.load(Ordering::Relaxed) < 700);
    f.cancel = CancellationToken::new();
    f.assert_nothing_stored(0);
}

#[test]
fn a_borg_that_is_killed_leaves_no_archive() {
    let Some(mut f) = Fixture::new() else { return };
    let content: Content = (0..200).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    let state = f.options.directory.clone();
    let base = Some(f.use_base(&first, "scsi0"));
    let changes = (0..200).map(|i| (i, Change::Data(segment_bytes(2, i)))).collect();
    let killed = f.backup_while(Disk { name: "scsi0", base, changes }, move |before| {
        if before == 100 {
            let borgs = processes_of(&state);
            assert!(borgs.iter().any(|b| b.1.iter().any(|word| word == "create")), "{borgs:?}");
            for (pid, ..) in borgs {
                let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
            }
        }
    });
    let error = killed.unwrap_err();
    assert!(error.message.contains("signal 9"), "{error}");
    // The files cache is that of the first archive still.
    let base = Some(f.use_base(&first, "scsi0"));
    let changes = (0..200).map(|i| (i, Change::Data(segment_bytes(3, i)))).collect();
    let second = f.backup(vec![Disk { name: "scsi0", base, changes }]).unwrap().id;
    assert!(f.restored(&second, "scsi0") == (0..200).map(|i| (i, segment_bytes(3, i))).collect());
    f.assert_nothing_stored(2);
}

#[test]
fn a_full_repository_is_told_and_works_again_when_there_is_space() {
    if !possible() {
        return;
    }
    let room = tempfile::tempdir().unwrap();
    let Some(small) = SmallFs::or_skip(room.path().join("small"), 20) else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path());
    options.repository = small.path().join("repository").display().to_string();
    let mut f = Fixture::with(dir, options);
    let content: Content = (0..600).map(|i| (i, segment_bytes(1, i))).collect();
    let error = f.backup(vec![Disk::full("scsi0", &content)]).unwrap_err();
    assert_eq!(error.kind, ErrorKind::NoSpace, "{error}");
    assert!(f.stored.load(Ordering::Relaxed) < 600, "it ended before everything was read");
    SmallFs::resize_at(small.path(), 200);
    let good = f.backup(vec![Disk::full("scsi0", &content)]).unwrap();
    assert!(f.restored(&good.id, "scsi0") == content);
    assert_eq!(f.provider.list(None).unwrap().len(), 1);
}

#[test]
fn a_place_that_cannot_be_mounted_at_is_told_before_the_guest_is_touched() {
    let Some(mut f) = Fixture::new() else { return };
    let view = f.options.directory.join("view/100");
    fs::create_dir_all(&view).unwrap();
    fs::write(view.join("file"), "in the way").unwrap();
    let error = f.provider.backup_init("100", f.clock).unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("view/100") && cause.contains("empty"), "{error}: {cause}");
    fs::remove_file(view.join("file")).unwrap();
    f.assert_nothing_stored(0);
}
