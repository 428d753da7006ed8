//! The borg provider with a real borg, on local repositories and on one behind a real SSH server.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

#[path = "../rig/borg.rs"]
mod borg;
mod faults;
mod fixture;
mod layers;
mod lost;
mod secrets;
#[path = "../rig/small_fs.rs"]
mod small_fs;
mod ssh;
#[path = "../sshd/mod.rs"]
mod sshd;

use fixture::*;
use jiff::ToSpan;
use layers::{LONG, LONG_SIZE, LongDisk, backup};
use pvebackup::{
    archive::ArchiveId,
    provider::{ErrorKind, Provider},
};
use std::{collections::BTreeMap, fs, os::unix::fs::MetadataExt, process::Command, sync::atomic::Ordering};

#[test]
fn every_archive_of_a_history_is_the_disk_as_it_was() {
    let Some(mut f) = Fixture::new() else { return };
    let mut random = random(7);
    let mut now: Content = (0..701).step_by(3).map(|i| (i, segment_bytes(1, i))).collect();
    let mut history = Vec::new();
    let first = f.backup(vec![Disk::full("scsi0", &now)]).unwrap();
    history.push((first.id, now.clone()));
    for round in 2..12u64 {
        let mut changes: BTreeMap<u64, Change> = BTreeMap::new();
        for _ in 0..random(40) {
            let index = random(701);
            let change = match random(6) {
                0 => Change::Zero,
                1 => Change::FoundZero,
                _ => Change::Data(segment_bytes(round, index)),
            };
            changes.insert(index, change);
        }
        for (index, change) in &changes {
            match change {
                Change::Data(bytes) => now.insert(*index, bytes.clone()),
                _ => now.remove(index),
            };
        }
        let stored = f.stored.load(Ordering::Relaxed);
        let base = Some(f.use_base(&history.last().unwrap().0, "scsi0"));
        let data = changes.values().filter(|c| matches!(c, Change::Data(_))).count() as u64;
        let made = f.backup(vec![Disk { name: "scsi0", base, changes }]).unwrap();
        assert_eq!(f.stored.load(Ordering::Relaxed) - stored, data, "borg has read what changed");
        history.push((made.id, now.clone()));
    }
    assert_eq!(f.dropped.load(Ordering::Relaxed), 0);
    for (id, content) in &history {
        assert!(f.restored(id, "scsi0") == *content, "archive {id}");
    }
    let listed: Vec<ArchiveId> = f.provider.list(Some("100")).unwrap().into_iter().map(|a| a.id).collect();
    assert_eq!(listed, history.iter().map(|h| h.0.clone()).collect::<Vec<_>>(), "oldest first");
    assert!(f.provider.list(Some("101")).unwrap().is_empty());
    f.borg(&["check", "--verify-data", &f.repository().display().to_string()]);
}

/// The commands in docs/formats.md, with this archive's names and numbers for those of the example.
#[test]
fn the_documented_commands_get_a_disk_back_without_us() {
    let Some(mut f) = Fixture::new() else { return };
    let mut disk = LongDisk::new();
    (0..6).for_each(|segment| (0..8).for_each(|unit| disk.write(segment * 8 + unit, 1)));
    let (first, ..) = backup(&mut f, &mut disk, None);
    disk.write(5, 2);
    disk.clear(10, true);
    disk.clear(11, false);
    (24..32).for_each(|index| disk.clear(index, true));
    disk.write(100, 3);
    let (_, read, read_fine) = backup(&mut f, &mut disk, Some(&first));
    assert_eq!((read, read_fine), (0, 4));

    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/formats.md")).unwrap();
    let chapter = text.split("## Getting a disk back with borg").nth(1).expect("the chapter");
    let script = chapter.split("```").nth(1).and_then(|block| block.strip_prefix("sh\n")).expect("its commands");
    let dir = f.dir.path().display().to_string();
    let replaced = [
        ("/etc/pvebackup/attic.passphrase", format!("{dir}/passphrase")),
        ("/mnt/attic", f.repository().display().to_string()),
        ("::NAME", format!("::{}", f.names()[1])),
        ("34359738368", LONG_SIZE.to_string()),
        ("n=32", format!("n={}", LONG / LEN)),
    ];
    let script = replaced.iter().fold(script.to_owned(), |script, (example, ours)| {
        assert!(script.contains(example), "{example}");
        script.replace(example, ours)
    });
    let output = Command::new("sh")
        .args(["-euc", &script])
        .env("PATH", path_with_borg())
        .current_dir(f.dir.path())
        .env("BORG_BASE_DIR", f.dir.path().join("user"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let image = fs::read(f.dir.path().join("out/scsi0.raw")).unwrap();
    assert!(image == disk.content);
    let blocks = fs::metadata(f.dir.path().join("out/scsi0.raw")).unwrap().blocks();
    assert!(blocks * 512 < LONG_SIZE / 2, "it is not sparse: {blocks} blocks");
    assert!(f.dir.path().join("out/manifest.json").exists());
}

#[test]
fn zeroes_that_only_reading_tells_have_a_file_once() {
    let Some(mut f) = Fixture::new() else { return };
    let content: Content = [(0, segment_bytes(1, 0))].into();
    let first = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    let base = Some(f.use_base(&first, "scsi0"));
    let second = f.backup(vec![Disk { name: "scsi0", base, changes: [(700, Change::FoundZero)].into() }]).unwrap().id;
    let base = Some(f.use_base(&second, "scsi0"));
    assert_eq!(base.as_ref().unwrap().1.records().len(), 2);
    let third = f.backup(vec![Disk { name: "scsi0", base, changes: BTreeMap::new() }]).unwrap().id;
    assert_eq!(f.use_base(&third, "scsi0").1.records().len(), 1);
    assert_eq!(f.restored(&third, "scsi0"), content);
}

#[test]
fn disks_with_different_bases_share_an_archive_and_two_guests_a_repository() {
    let Some(mut f) = Fixture::new() else { return };
    let a: Content = (0..300).map(|i| (i, segment_bytes(1, i))).collect();
    let b: Content = (200..600).map(|i| (i, segment_bytes(2, i))).collect();
    let one =
        f.backup(vec![Disk::full("a", &a), Disk::full("a-b", &b), Disk::full("empty", &Content::new())]).unwrap().id;
    let two = f.backup(vec![Disk::full("a-b", &a)]).unwrap().id;
    // Another guest, whose disk has the same name.
    f.clock = f.clock.checked_add(1.hour()).unwrap();
    let name = f.provider.backup_init("web", f.clock).unwrap();
    let other = f.provider.backup(f.input(name, vec![Disk::full("a", &b)])).unwrap().id;

    let disks = vec![
        Disk { name: "a", base: Some(f.use_base(&one, "a")), changes: [(5, Change::Data(segment_bytes(4, 5)))].into() },
        Disk { name: "a-b", base: Some(f.use_base(&two, "a-b")), changes: [(6, Change::Zero)].into() },
        Disk { name: "new", base: None, changes: [(700, Change::Data(segment_bytes(5, 700)))].into() },
    ];
    let stored = f.stored.load(Ordering::Relaxed);
    let three = f.backup(disks).unwrap().id;
    assert_eq!(f.stored.load(Ordering::Relaxed) - stored, 2);
    let mut expected = a.clone();
    expected.insert(5, segment_bytes(4, 5));
    assert!(f.restored(&three, "a") == expected);
    let mut expected = a;
    expected.remove(&6);
    assert!(f.restored(&three, "a-b") == expected);
    assert_eq!(f.restored(&three, "new").len(), 1);
    assert!(f.restored(&one, "empty").is_empty());
    assert!(f.restored(&other, "a") == b);
    assert!(f.refused(&one, "a-b").contains("files cache"), "the files cache is that of a later archive");
}

#[test]
fn a_source_that_fails_leaves_no_archive_and_the_next_backup_is_incremental() {
    let Some(mut f) = Fixture::new() else { return };
    let content: Content = (0..50).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    let base = Some(f.use_base(&first, "scsi0"));
    let mut changes: BTreeMap<u64, Change> = (10..20).map(|i| (i, Change::Data(segment_bytes(2, i)))).collect();
    changes.insert(30, Change::Failure);
    let error = f.backup(vec![Disk { name: "scsi0", base, changes }]).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Source, "{error}");
    assert!(f.stored.load(Ordering::Relaxed) >= 60, "what came before was read");
    let base = Some(f.use_base(&first, "scsi0"));
    let changes = (10..21).map(|i| (i, Change::Data(segment_bytes(3, i)))).collect();
    let second = f.backup(vec![Disk { name: "scsi0", base, changes }]).unwrap().id;
    let expected =
        content.into_iter().map(|(i, b)| if (10..21).contains(&i) { (i, segment_bytes(3, i)) } else { (i, b) });
    assert!(f.restored(&second, "scsi0") == expected.collect());
    f.assert_nothing_stored(2);
}

#[test]
fn a_source_that_breaks_the_contract_leaves_no_archive() {
    let Some(mut f) = Fixture::new() else { return };
    let mut short = Disk::full("scsi0", &[(0, segment_bytes(1, 0))].into());
    short.changes.insert(1, Change::Data(vec![1; 100]));
    assert_eq!(f.backup(vec![short]).unwrap_err().kind, ErrorKind::Source);
    let behind = Disk { name: "scsi0", base: None, changes: [(9000, Change::FoundZero)].into() };
    assert_eq!(f.backup(vec![behind]).unwrap_err().kind, ErrorKind::Source);
    for names in [["a", "a"], ["a", "a.segments"], ["../x", "b"]] {
        let error = f.backup(names.map(|n| Disk::full(n, &Content::new())).into()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Other, "{error}");
    }
    f.clock = f.clock.checked_add(1.hour()).unwrap();
    let name = f.provider.backup_init("100", f.clock).unwrap();
    let mut input = f.input(name, vec![Disk::full("scsi0", &[(0, segment_bytes(1, 0))].into())]);
    input.disks[0].changed = Box::new(std::iter::empty());
    let error = f.provider.backup(input).unwrap_err();
    assert!(error.kind == ErrorKind::Source && error.message.contains("does not come"), "{error}");
    f.assert_nothing_stored(0);
}

#[test]
fn a_changed_segment_that_borg_takes_for_unchanged_fails_the_backup() {
    let Some(mut f) = Fixture::new() else { return };
    let content: Content = (0..50).map(|i| (i, segment_bytes(1, i))).collect();
    f.backup(vec![Disk::full("scsi0", &content)]).unwrap();
    // A clock that shows the very same instant again, and no base that would tell.
    f.clock = f.clock.checked_sub(1.hour()).unwrap();
    let other: Content = (0..50).map(|i| (i, segment_bytes(2, i))).collect();
    let error = f.backup(vec![Disk::full("scsi0", &other)]).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Incomplete, "{error}");
    assert!(error.message.contains("was not read"), "{error}");
    f.assert_nothing_stored(1);
}
