//! What borg or we have lost or find changed: each is noticed, the backup is a full one, and right.

use crate::fixture::*;
use pvebackup::{
    archive::ArchiveId,
    provider::{
        ErrorKind, Provider,
        borg::{BorgProvider, Passphrase},
    },
    report::{Collector, Events},
};
use std::{collections::BTreeMap, fs, path::Path, process::Command, sync::Arc};

#[test]
fn a_lost_files_cache_means_full_and_is_said_beforehand() {
    let Some(mut f) = Fixture::new() else { return };
    let content: Content = (0..50).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    fs::remove_dir_all(f.dir.path().join("state/cache")).unwrap();
    assert!(f.refused(&first, "scsi0").contains("files cache"));
    let second = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    f.use_base(&second, "scsi0");
    assert!(f.restored(&second, "scsi0") == content);
}

#[test]
fn a_files_cache_that_has_forgotten_fails_the_backup_and_the_next_is_full() {
    let Some(mut f) = Fixture::new() else { return };
    let content: Content = (0..50).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    let base = Some(f.use_base(&first, "scsi0"));
    fs::remove_dir_all(f.dir.path().join("state/cache")).unwrap();
    let changes = [(3, Change::Data(segment_bytes(2, 3)))].into();
    let error = f.backup(vec![Disk { name: "scsi0", base, changes }]).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Incomplete);
    assert!(error.message.contains("did not change") && error.message.contains("full"), "{error}");
    assert!(f.refused(&first, "scsi0").contains("files cache"));
    f.assert_nothing_stored(1);
}

#[test]
fn a_kept_segment_table_that_is_lost_or_spoilt_is_read_from_the_archive() {
    let Some(mut f) = Fixture::new() else { return };
    let content: Content = (0..5).map(|i| (i, segment_bytes(1, i))).collect();
    let archive = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    let (_, table) = f.use_base(&archive, "scsi0");
    let kept = f.dir.path().join("state/tables/100/scsi0");
    let bytes = fs::read(&kept).unwrap();
    assert_eq!(bytes, table.to_bytes());
    // It ends like a whole one.
    fs::write(&kept, &bytes[..bytes.len() - 48]).unwrap();
    assert_eq!(f.use_base(&archive, "scsi0").1, table);
    fs::remove_file(&kept).unwrap();
    assert_eq!(f.use_base(&archive, "scsi0").1, table);
}

/// Earlier versions had 256 segments in a directory of the view, and did not note that.
#[test]
fn archives_with_other_directories_are_read_and_are_no_base() {
    let Some(mut f) = Fixture::new() else { return };
    let content: Content = (0..701).step_by(3).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    // The same archive, as such a version would have made it.
    let (repository, tree) = (f.repository().display().to_string(), f.dir.path().join("tree"));
    fs::create_dir(&tree).unwrap();
    let script = r#"
        borg extract "$R::$A" && cd disks/scsi0 && mkdir ../all && mv */* ../all && rmdir * && for file in ../all/*; do
            index=$((0x${file##*/})) && directory=$(printf %06x $((index / 256))) && mkdir -p $directory && mv $file $directory
        done && cd ../.. && rmdir disks/all && borg delete "$R::$A" &&
        { echo firewall.conf; echo guest.conf; find disks -type f | LC_ALL=C sort; echo manifest.json; } |
        borg create --paths-from-stdin "$R::$A"
    "#;
    let output = Command::new("sh")
        .args(["-euc", script])
        .current_dir(&tree)
        .env("PATH", path_with_borg())
        .env("R", &repository)
        .env("A", &f.names()[0])
        .env("BORG_BASE_DIR", f.dir.path().join("user"))
        .env("BORG_PASSPHRASE", "correct horse")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(tree.join("disks/scsi0/000002").is_dir() && !tree.join("disks/scsi0/000003").exists());
    let second = f.provider.list(None).unwrap().remove(0).id;
    assert_ne!(first, second);
    assert!(f.restored(&second, "scsi0") == content);
    let reader = f.provider.open(&second).unwrap();
    for index in [699, 0, 300, 3] {
        assert!(reader.segment("scsi0", index, LEN).unwrap() == content[&index], "{index}, out of order");
    }

    let known = f.options.directory.join("known/100.json");
    let mut noted: serde_json::Value = serde_json::from_slice(&fs::read(&known).unwrap()).unwrap();
    noted["disks"]["scsi0"]["archive"] = second.0.clone().into();
    fs::write(&known, noted.to_string()).unwrap();
    f.use_base(&second, "scsi0");
    noted.as_object_mut().unwrap().remove("shard_bits").unwrap();
    fs::write(&known, noted.to_string()).unwrap();
    assert!(f.refused(&second, "scsi0").contains("directories of an earlier version"));
    let third = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    f.use_base(&third, "scsi0");
    assert!(f.restored(&third, "scsi0") == content);
}

#[test]
fn an_archive_that_was_deleted_or_is_of_another_repository_is_no_base() {
    let Some(mut f) = Fixture::new() else { return };
    let content: Content = (0..5).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    assert!(f.refused(&first, "scsi1").contains("files cache"));
    assert!(f.refused(&ArchiveId("ab".repeat(32)), "scsi0").contains("not in the repository"));
    f.borg(&["delete", &format!("{}::{}", f.repository().display(), f.names()[0])]);
    assert!(f.refused(&first, "scsi0").contains("not in the repository"));
    let second = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    assert!(f.restored(&second, "scsi0") == content);

    let before = f.provider.repository_id().unwrap();
    fs::remove_dir_all(f.repository()).unwrap();
    assert_eq!(f.provider.repository_id().unwrap_err().kind, ErrorKind::RepositoryMissing);
    f.provider = BorgProvider::init(f.options.clone()).unwrap();
    assert_ne!(f.provider.repository_id().unwrap(), before);
    assert!(f.refused(&second, "scsi0").contains("not in the repository"));
    f.assert_nothing_stored(0);
}

#[test]
fn an_archive_that_was_renamed_is_no_base() {
    let Some(mut f) = Fixture::new() else { return };
    let content: Content = (0..50).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    f.borg(&["rename", &format!("{}::{}", f.repository().display(), f.names()[0]), "before-the-upgrade"]);
    assert!(f.refused(&first, "scsi0").contains("not in the repository"));
    let second = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    assert!(f.restored(&second, "scsi0") == content);
    assert_eq!(f.names().len(), 2, "the renamed one is still there");
    f.use_base(&second, "scsi0");
}

fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap().success());
}

/// borg itself refuses such a repository.
fn rolled_back(encryption: &str) {
    if !possible() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path());
    options.encryption = encryption.into();
    if encryption == "none" {
        options.passphrase = Passphrase::None;
    }
    let mut f = Fixture::with(dir, options);
    let mut content: Content = (0..50).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    copy(&f.repository(), &f.dir.path().join("copy"));
    let base = Some(f.use_base(&first, "scsi0"));
    let changes = [(3, Change::Data(segment_bytes(2, 3))), (60, Change::Data(segment_bytes(2, 60)))].into();
    let second = f.backup(vec![Disk { name: "scsi0", base, changes }]).unwrap().id;
    let id = f.provider.repository_id().unwrap();
    let nonces = |f: &Fixture| fs::read_to_string(f.options.directory.join("security").join(&id).join("nonce")).ok();
    let used = nonces(&f);
    assert_eq!(used.is_some(), encryption != "none");

    fs::remove_dir_all(f.repository()).unwrap();
    fs::rename(f.dir.path().join("copy"), f.repository()).unwrap();
    let events = Arc::new(Collector::new());
    f.provider.report_to(&Events::new("100", events.clone()));
    assert_eq!(f.provider.repository_id().unwrap(), id);
    assert!(events.warnings().iter().any(|w| w.contains("older")), "{:?}", events.warnings());
    assert_eq!(nonces(&f), used, "what was used for encryption is never used again");
    assert!(f.refused(&second, "scsi0").contains("not in the repository"));
    assert!(f.refused(&first, "scsi0").contains("files cache"));
    content.insert(60, segment_bytes(2, 60));
    let third = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    assert!(f.restored(&third, "scsi0") == content);
    let base = Some(f.use_base(&third, "scsi0"));
    let changes = [(7, Change::Data(segment_bytes(3, 7)))].into();
    content.insert(7, segment_bytes(3, 7));
    let fourth = f.backup(vec![Disk { name: "scsi0", base, changes }]).unwrap().id;
    assert!(f.restored(&fourth, "scsi0") == content);
    assert_eq!(events.warnings().len(), 1, "{:?}", events.warnings());
}

#[test]
fn a_repository_that_was_rolled_back_is_taken_with_a_warning() {
    rolled_back("repokey-blake2");
}

#[test]
#[ignore = "much like the other: `scripts/faults` runs it"]
fn a_repository_that_was_rolled_back_is_taken_without_encryption_too() {
    rolled_back("none");
}

#[test]
fn another_host_and_another_place_of_the_state_mean_full() {
    let Some(mut f) = Fixture::new() else { return };
    let content: Content = (0..50).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;

    // The state was copied to another place: borg does not know the files there.
    let copied = f.dir.path().join("copied");
    copy(&f.options.directory, &copied);
    f.options.directory = copied;
    f.provider = BorgProvider::open(f.options.clone()).unwrap();
    assert!(f.refused(&first, "scsi0").contains("another place"));
    let second = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    let base = Some(f.use_base(&second, "scsi0"));
    let third = f.backup(vec![Disk { name: "scsi0", base, changes: BTreeMap::new() }]).unwrap().id;
    assert!(f.restored(&third, "scsi0") == content);

    // A host without any state, which writes too.
    f.options.directory = f.dir.path().join("empty");
    f.provider = BorgProvider::open(f.options.clone()).unwrap();
    assert!(f.refused(&third, "scsi0").contains("files cache"));
    let other: Content = (0..50).map(|i| (i, segment_bytes(4, i))).collect();
    let fourth = f.backup(vec![Disk::full("scsi0", &other)]).unwrap().id;
    assert!(f.restored(&fourth, "scsi0") == other);

    // The first host goes on from its own archive, with a files cache of its own.
    f.options.directory = f.dir.path().join("copied");
    f.provider = BorgProvider::open(f.options.clone()).unwrap();
    let base = Some(f.use_base(&third, "scsi0"));
    let changes = [(3, Change::Data(segment_bytes(2, 3)))].into();
    let fifth = f.backup(vec![Disk { name: "scsi0", base, changes }]).unwrap().id;
    let mut expected = content;
    expected.insert(3, segment_bytes(2, 3));
    assert!(f.restored(&fifth, "scsi0") == expected);
}

/// borg lets files fall out of its cache that it has not seen in 20 runs, unless it is told to keep them.
#[test]
#[ignore = "half a minute of processor time: `scripts/faults` runs it"]
fn a_disk_that_was_left_out_of_many_backups_is_not_forgotten() {
    let Some(mut f) = Fixture::new() else { return };
    let content: Content = (0..50).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("a", &content), Disk::full("b", &Content::new())]).unwrap().id;
    for round in 0..24 {
        let only: Content = [(round, segment_bytes(2, round))].into();
        f.backup(vec![Disk::full("b", &only)]).unwrap();
    }
    let base = Some(f.use_base(&first, "a"));
    let stored = f.stored.load(std::sync::atomic::Ordering::Relaxed);
    let last = f.backup(vec![Disk { name: "a", base, changes: BTreeMap::new() }]).unwrap().id;
    assert_eq!(f.stored.load(std::sync::atomic::Ordering::Relaxed), stored);
    assert!(f.restored(&last, "a") == content);
}
