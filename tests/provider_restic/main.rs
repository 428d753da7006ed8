//! The restic provider on real repositories: local ones, one behind a real SSH server, and the official restic as a second
//! opinion.
#![cfg(feature = "restic")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod fixture;
mod official;
#[path = "../rig/small_fs.rs"]
mod small_fs;
mod ssh;
#[path = "../sshd/mod.rs"]
mod sshd;

use fixture::*;
use jiff::ToSpan;
use pvebackup::{
    archive::ArchiveId,
    provider::{
        DiskQuery, ErrorKind, Incremental, Provider, ProviderError, SourceError,
        restic::{Password, ResticProvider},
    },
    segment::{Segment, SegmentData, SegmentLen},
};
use small_fs::SmallFs;
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio_util::sync::CancellationToken;

#[test]
fn every_archive_of_a_history_is_the_disk_as_it_was() {
    let mut f = Fixture::new();
    let mut random = random(7);
    let mut now: Content = (0..701).step_by(3).map(|i| (i, segment_bytes(1, i))).collect();
    let mut history = Vec::new();
    let first = f.backup(vec![Disk::full("scsi0", &now)]).unwrap();
    history.push((first.id, now.clone()));
    for round in 2..12u64 {
        let mut changes: BTreeMap<u64, Option<Vec<u8>>> = BTreeMap::new();
        for _ in 0..random(40) {
            let index = random(701);
            changes.insert(index, (random(4) > 0).then(|| segment_bytes(round, index)));
        }
        for (index, change) in &changes {
            match change {
                Some(bytes) => now.insert(*index, bytes.clone()),
                None => now.remove(index),
            };
        }
        let stored = f.watch.stored.load(Ordering::Relaxed);
        let base = Some(f.use_base(&history.last().unwrap().0, "scsi0"));
        let read = changes.values().flatten().count() as u64;
        let disk = Disk { name: "scsi0", base, changes: changes.into_iter().map(Ok).collect() };
        let made = f.backup(vec![disk]).unwrap();
        assert_eq!(f.watch.stored.load(Ordering::Relaxed) - stored, read, "only what changed was taken");
        history.push((made.id, now.clone()));
    }
    assert_eq!(f.watch.dropped.load(Ordering::Relaxed), 0);
    for (id, content) in &history {
        assert!(f.restored(id, "scsi0") == *content, "archive {id}");
    }
    let listed: Vec<ArchiveId> = f.provider.list(Some("100")).unwrap().into_iter().map(|a| a.id).collect();
    assert_eq!(listed, history.iter().map(|h| h.0.clone()).collect::<Vec<_>>(), "oldest first");
    assert!(f.provider.list(Some("101")).unwrap().is_empty());
}

#[test]
fn what_was_created_is_private_and_opens_again_under_the_same_identity() {
    let mut f = Fixture::new();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&f.repository()), 0o700);
    assert_eq!(mode(&f.dir.path().join("secrets/key")), 0o600);
    let mut again = ResticProvider::open(&options(f.dir.path())).unwrap();
    assert_eq!(again.repository_id().unwrap(), f.provider.repository_id().unwrap());
    assert_eq!(
        ResticProvider::init(&options(f.dir.path())).err().unwrap().kind,
        ErrorKind::Other,
        "there is one already"
    );
}

#[test]
fn disks_with_different_bases_and_names_that_sort_oddly_share_an_archive() {
    let mut f = Fixture::new();
    let a: Content = (0..300).map(|i| (i, segment_bytes(1, i))).collect();
    let b: Content = (200..600).map(|i| (i, segment_bytes(2, i))).collect();
    let one =
        f.backup(vec![Disk::full("a", &a), Disk::full("a-b", &b), Disk::full("empty", &Content::new())]).unwrap().id;
    // Another archive, in which both disks differ from the first one.
    let other: Content = (0..600).map(|i| (i, segment_bytes(3, i))).collect();
    let two = f.backup(vec![Disk::full("a", &other), Disk::full("a-b", &other)]).unwrap().id;

    let queries = [("a", &one), ("a-b", &two)].map(|(name, base)| DiskQuery {
        name: name.into(),
        size: SIZE,
        segment_len: segment_len(),
        base: base.clone(),
    });
    let mut answers = f.provider.query_incremental(&queries).unwrap().into_iter();
    let mut base = |id: &ArchiveId| match answers.next() {
        Some(Incremental::Use(tables)) => Some((id.clone(), tables.segments)),
        other => panic!("{other:?}"),
    };
    let disks = vec![
        Disk { name: "a", base: base(&one), changes: vec![Ok((5, Some(segment_bytes(4, 5)))), Ok((6, None))] },
        Disk { name: "a-b", base: base(&two), changes: Vec::new() },
        Disk { name: "new", base: None, changes: vec![Ok((700, Some(segment_bytes(5, 700))))] },
    ];
    let three = f.backup(disks).unwrap().id;
    let mut expected = a;
    expected.insert(5, segment_bytes(4, 5));
    expected.remove(&6);
    assert!(f.restored(&three, "a") == expected);
    assert!(f.restored(&three, "a-b") == other);
    assert_eq!(f.restored(&three, "new").len(), 1);
    assert!(f.restored(&one, "empty").is_empty());
    let listed = f.provider.list(None).unwrap();
    assert_eq!(listed[2].disks, ["a", "a-b", "new"]);
    assert_eq!(listed[2].size, Some(3 * SIZE));
}

#[test]
fn a_source_that_fails_leaves_no_archive() {
    let mut f = Fixture::new();
    let mut changes: Vec<_> = (0..50).map(|i| Ok((i, Some(segment_bytes(1, i))))).collect();
    changes.push(Err(SourceError { disk: "scsi0".into(), message: "export gone".into() }));
    let error = f.backup(vec![Disk { name: "scsi0", base: None, changes }]).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Source);
    f.assert_nothing_stored(0);
}

#[test]
fn a_source_that_breaks_the_contract_leaves_no_archive() {
    let mut f = Fixture::new();
    let cases = [
        vec![(0, Some(vec![1; 100]))],                                        // too short
        vec![(0, Some(segment_bytes(1, 0))), (9000, Some(vec![1; 512]))],     // behind the end
        vec![(7, Some(segment_bytes(1, 7))), (2, Some(segment_bytes(1, 2)))], // out of order
    ];
    for changes in cases {
        let disk = Disk { name: "scsi0", base: None, changes: changes.into_iter().map(Ok).collect() };
        assert_eq!(f.backup(vec![disk]).unwrap_err().kind, ErrorKind::Source);
    }
    for names in [["a", "a"], ["a", "a.segments"], ["../x", "b"]] {
        let error = f.backup(names.map(|n| Disk::full(n, &Content::new())).into()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Other, "{error}");
    }
    f.assert_nothing_stored(0);
}

#[test]
fn a_cancelled_backup_leaves_no_archive() {
    let mut f = Fixture::new();
    let cancel = f.cancel.clone();
    f.clock = f.clock.checked_add(1.hour()).unwrap();
    let name = f.provider.backup_init("100", f.clock).unwrap();
    let mut input = f.input(name, vec![Disk::full("scsi0", &Content::new())]);
    let taken = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&taken);
    input.disks[0].changed = Box::new((0..700).map(move |index| {
        if count.fetch_add(1, Ordering::Relaxed) == 20 {
            cancel.cancel();
        }
        let bytes = segment_bytes(1, index);
        Ok(Segment { index, data: Some(SegmentData::new(bytes.into(), |_| {})) })
    }));
    assert_eq!(f.provider.backup(input).unwrap_err().kind, ErrorKind::Source);
    assert!(taken.load(Ordering::Relaxed) < 30, "it stops soon");
    f.cancel = CancellationToken::new();
    f.assert_nothing_stored(0);
}

#[test]
fn a_base_is_only_used_as_it_was_confirmed() {
    let mut f = Fixture::new();
    let content: Content = (0..50).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    let (_, table) = f.use_base(&first, "scsi0");
    let mut wrong = table.clone();
    let mut record = table.records()[0];
    record.index = 600;
    wrong.push(record).unwrap();
    let disk = |base| Disk { name: "scsi0", base: Some((first.clone(), base)), changes: vec![] };
    let error = f.backup(vec![disk(wrong)]).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Incomplete);
    let error = f.backup(vec![disk(table)]).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Incomplete, "the confirmation was for the backup that failed");
    f.assert_nothing_stored(1);
}

#[test]
fn a_base_whose_directories_vanish_makes_the_backup_fail_and_reads_nothing_that_is_clean() {
    let mut f = Fixture::new();
    let content: Content = (0..50).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    let base = Some(f.use_base(&first, "scsi0"));
    // The smallest pack is that of the directories; rustic only warns when it cannot read its parent.
    let packs = f.files("data");
    fs::remove_file(packs.iter().min_by_key(|p| fs::metadata(p).unwrap().len()).unwrap()).unwrap();
    let disk = Disk { name: "scsi0", base, changes: vec![Ok((1, Some(segment_bytes(2, 1))))] };
    let error = f.backup(vec![disk]).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Incomplete);
    assert!(error.message.contains("a full backup is needed"), "{error}");
    f.assert_nothing_stored(1);
}

#[test]
fn a_base_whose_data_was_lost_is_refused_and_fails_a_backup_that_relies_on_it() {
    let mut f = Fixture::new();
    let content: Content = (0..50).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    let base = f.use_base(&first, "scsi0");
    // The largest pack is that of the segments.
    let packs = f.files("data");
    let pack = packs.iter().max_by_key(|p| fs::metadata(p).unwrap().len()).unwrap().clone();
    let saved = fs::read(&pack).unwrap();

    fs::remove_file(&pack).unwrap();
    assert!(f.refused(&first, "scsi0").contains("does not exist"));

    fs::write(&pack, &saved[..saved.len() / 2]).unwrap();
    assert!(f.refused(&first, "scsi0").contains("truncated"));

    // As after `rebuild-index`: the index no longer knows the blobs either.
    fs::remove_file(&pack).unwrap();
    for index in f.files("index") {
        fs::remove_file(index).unwrap();
    }
    f.refused(&first, "scsi0");
    let disk = Disk { name: "scsi0", base: Some(base), changes: vec![Ok((1, Some(segment_bytes(2, 1))))] };
    let error = f.backup(vec![disk]).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Incomplete, "{error}");
    assert_eq!(f.snapshots(), 1);
}

#[test]
fn a_data_pack_lost_after_the_query_is_noticed_before_the_archive_counts() {
    let mut f = Fixture::new();
    let content: Content = (0..50).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    let base = Some(f.use_base(&first, "scsi0"));
    let packs = f.files("data");
    let pack = packs.into_iter().max_by_key(|p| fs::metadata(p).unwrap().len()).unwrap();
    f.clock = f.clock.checked_add(1.hour()).unwrap();
    let name = f.provider.backup_init("100", f.clock).unwrap();
    let mut input = f.input(name, vec![Disk { name: "scsi0", base, changes: Vec::new() }]);
    input.disks[0].changed = Box::new(std::iter::once_with(move || {
        fs::remove_file(pack).unwrap();
        Ok(Segment { index: 1, data: None })
    }));
    let error = f.provider.backup(input).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Incomplete, "{error}");
    assert_eq!(f.snapshots(), 1);
}

#[test]
fn a_base_that_does_not_fit_is_refused_with_the_reason() {
    let mut f = Fixture::new();
    let content: Content = (0..5).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    assert!(f.refused(&first, "scsi1").contains("does not have the disk"));
    assert!(f.refused(&ArchiveId("ab".repeat(32)), "scsi0").contains("not in repository"));
    assert!(f.refused(&ArchiveId("latest".into()), "scsi0").contains("not in repository"));
    let mut query =
        DiskQuery { name: "scsi0".into(), size: SIZE + 512, segment_len: segment_len(), base: first.clone() };
    let mut reason =
        |query: &DiskQuery| match f.provider.query_incremental(std::slice::from_ref(query)).unwrap().remove(0) {
            Incremental::New(reason) => reason,
            Incremental::Use(_) => panic!("must not be confirmed"),
        };
    assert!(reason(&query).contains("the disk has"), "size");
    query.size = SIZE;
    query.segment_len = SegmentLen::new(2 * LEN).unwrap();
    assert!(reason(&query).contains("segment length"));
    for snapshot in f.files("snapshots") {
        fs::remove_file(snapshot).unwrap();
    }
    assert!(f.refused(&first, "scsi0").contains("not in repository"), "deleted meanwhile");
}

#[test]
fn a_clock_that_goes_back_fails_instead_of_mixing_contents() {
    let mut f = Fixture::new();
    let content: Content = (0..5).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    let base = Some(f.use_base(&first, "scsi0"));
    f.clock = f.clock.checked_sub(1.hour()).unwrap(); // the backup adds it again: the very same instant
    let disk = Disk { name: "scsi0", base, changes: vec![Ok((1, Some(segment_bytes(2, 1))))] };
    let error = f.backup(vec![disk]).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Incomplete);
    assert!(error.message.contains("clock"), "{error}");
    f.assert_nothing_stored(1);
}

#[test]
fn no_snapshot_exists_while_the_backup_runs() {
    let mut f = Fixture::new();
    let snapshots = f.repository().join("snapshots");
    let seen = Arc::new(Mutex::new(Vec::new()));
    f.clock = f.clock.checked_add(1.hour()).unwrap();
    let name = f.provider.backup_init("100", f.clock).unwrap();
    let mut input = f.input(name, vec![Disk::full("scsi0", &[(0, segment_bytes(1, 0))].into())]);
    let make = std::mem::replace(&mut input.manifest, Box::new(|_| unreachable!()));
    let log = Arc::clone(&seen);
    input.manifest = Box::new(move |tables| {
        log.lock().unwrap().push(fs::read_dir(snapshots).unwrap().count());
        make(tables)
    });
    f.provider.backup(input).unwrap();
    assert_eq!(*seen.lock().unwrap(), [0]);
    assert_eq!(f.snapshots(), 1);
}

#[test]
fn a_full_target_is_told_as_such_and_leaves_no_archive() {
    let dir = tempfile::tempdir().unwrap();
    let Some(small) = SmallFs::or_skip(dir.path().join("small"), 24) else { return };
    let mut f = Fixture::new();
    f.provider = ResticProvider::init(&options(small.path())).unwrap();
    let content: Content = (0..700).map(|i| (i, segment_bytes(1, i))).collect();
    let error = f.backup(vec![Disk::full("scsi0", &content)]).unwrap_err();
    assert_eq!(error.kind, ErrorKind::NoSpace, "{error:?}");
    assert!(f.provider.list(None).unwrap().is_empty());
}

#[test]
fn passwords_and_places_that_are_wrong_are_told_apart() {
    let f = Fixture::new();
    let mut bad = options(f.dir.path());
    bad.password = Password::Secret("wrong".to_owned().into());
    assert_eq!(ResticProvider::open(&bad).err().unwrap().kind, ErrorKind::Credentials);
    bad.password = Password::File(f.dir.path().join("none"));
    assert_eq!(ResticProvider::open(&bad).err().unwrap().kind, ErrorKind::Credentials);
    bad.repository = f.dir.path().join("elsewhere").display().to_string();
    assert_eq!(ResticProvider::open(&bad).err().unwrap().kind, ErrorKind::RepositoryMissing);
    assert!(!f.dir.path().join("none").exists(), "only init creates a password");
    fs::write(f.repository().join("config"), b"damaged, and long enough to be decrypted").unwrap();
    assert_eq!(ResticProvider::open(&options(f.dir.path())).err().unwrap().kind, ErrorKind::Damaged);
}

#[test]
fn an_init_that_was_killed_can_be_repeated_but_never_over_data() {
    let mut f = Fixture::new();
    let config = f.repository().join("config");
    fs::remove_file(&config).unwrap();
    f.provider = ResticProvider::init(&options(f.dir.path())).unwrap();
    ResticProvider::open(&options(f.dir.path())).expect("the old key is not in the way");
    f.backup(vec![Disk::full("scsi0", &[(0, segment_bytes(1, 0))].into())]).unwrap();
    fs::remove_file(&config).unwrap();
    assert_eq!(ResticProvider::init(&options(f.dir.path())).err().unwrap().kind, ErrorKind::Damaged);
    assert_eq!(f.files("keys").len(), 1, "the key to the data is still there");
}

#[test]
fn names_of_archives_are_unique() {
    let mut f = Fixture::new();
    f.backup(vec![Disk::full("scsi0", &Content::new())]).unwrap();
    let taken = f.provider.list(None).unwrap().remove(0).name;
    let next = f.provider.backup_init("100", taken.time()).unwrap();
    assert_eq!(next.time(), taken.time().checked_add(1.second()).unwrap());
    assert_eq!(f.provider.backup_init("101", taken.time()).unwrap().time(), taken.time());
}

#[test]
fn a_reader_gives_exactly_what_was_asked_for() {
    let mut f = Fixture::new();
    let content: Content = [0, 5, 300, 700].into_iter().map(|i| (i, segment_bytes(1, i))).collect();
    let id = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    let reader = f.provider.open(&id).unwrap();
    assert_eq!(reader.member("guest.conf", 100).unwrap(), b"cores: 2\n");
    assert_eq!(reader.member("firewall.conf", 0).unwrap(), b"");
    let kind = |result: Result<(), ProviderError>| result.unwrap_err().kind;
    assert_eq!(kind(reader.member("guest.conf", 8).map(drop)), ErrorKind::Damaged);
    assert_eq!(kind(reader.member("disks", 8).map(drop)), ErrorKind::NotFound);
    assert_eq!(kind(reader.member("other", 8).map(drop)), ErrorKind::NotFound);
    assert_eq!(kind(reader.table("scsi1", 1000).map(drop)), ErrorKind::NotFound);
    assert_eq!(kind(reader.segment("scsi0", 1, LEN).map(drop)), ErrorKind::NotFound);
    assert_eq!(kind(reader.segment("scsi0", 600, LEN).map(drop)), ErrorKind::NotFound);
    assert_eq!(kind(reader.segment("scsi1", 0, LEN).map(drop)), ErrorKind::NotFound);
    assert_eq!(kind(reader.segment("scsi0", 0, LEN - 1).map(drop)), ErrorKind::Damaged);
    assert_eq!(kind(reader.segment("scsi0", 700, LEN).map(drop)), ErrorKind::Damaged);
    assert_eq!(kind(f.provider.open(&ArchiveId("ab".repeat(32))).map(drop)), ErrorKind::NotFound);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert!(restored(reader.as_ref(), "scsi0") == content));
        }
    });
}

#[test]
fn two_bases_of_the_same_instant_never_mix() {
    let mut f = Fixture::new();
    let a: Content = (0..20).map(|i| (i, segment_bytes(1, i))).collect();
    let b: Content = (0..20).map(|i| (i, segment_bytes(2, i))).collect();
    let one = f.backup(vec![Disk::full("a", &a), Disk::full("b", &a)]).unwrap().id;
    f.clock = f.clock.checked_sub(1.hour()).unwrap();
    let two = f.backup(vec![Disk::full("a", &b), Disk::full("b", &b)]).unwrap().id;
    for (x, y) in [(&one, &two), (&two, &one)] {
        let queries = [("a", x), ("b", y)].map(|(name, base)| DiskQuery {
            name: name.into(),
            size: SIZE,
            segment_len: segment_len(),
            base: base.clone(),
        });
        let answers = f.provider.query_incremental(&queries).unwrap();
        let disks = answers.into_iter().zip(queries).zip(["a", "b"]).map(|((answer, query), name)| match answer {
            Incremental::Use(tables) => Disk { name, base: Some((query.base, tables.segments)), changes: Vec::new() },
            Incremental::New(reason) => panic!("{reason}"),
        });
        let disks = disks.collect();
        // rustic takes the first parent in an order of its own; a wrong pick must be noticed.
        match f.backup(disks) {
            Ok(stored) => {
                let (expected_a, expected_b) = if x == &one { (&a, &b) } else { (&b, &a) };
                assert!(&f.restored(&stored.id, "a") == expected_a && &f.restored(&stored.id, "b") == expected_b);
            }
            Err(error) => assert_eq!(error.kind, ErrorKind::Incomplete),
        }
    }
}

/// Names the directory for [`killed_child`].
const KILLED: &str = "PVEBACKUP_TEST_KILLED_DIRECTORY";

#[test]
#[ignore = "runs as a child of the next test"]
fn killed_child() {
    let mut f = Fixture::in_directory(PathBuf::from(std::env::var_os(KILLED).unwrap()));
    f.provider.job_init(f.clock).unwrap();
    let name = f.provider.backup_init("100", f.clock).unwrap();
    let content: Content = (0..700).map(|i| (i, segment_bytes(1, i))).collect();
    let mut input = f.input(name, vec![Disk::full("scsi0", &content)]);
    let data = f.repository().join("data");
    input.manifest = Box::new(move |_| {
        // The first pack is written by another thread.
        while files(&data).is_empty() {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let me = std::process::id().to_string();
        Command::new("kill").args(["-9", &me]).status().unwrap();
        panic!("still alive");
    });
    let _ = f.provider.backup(input);
}

#[test]
fn a_killed_run_leaves_no_archive_and_no_lock_for_long() {
    let mut f = Fixture::new();
    let child = child("killed_child").env(KILLED, f.dir.path()).output().unwrap();
    assert!(child.status.code().is_none(), "killed: {child:?}");
    assert!(!f.files("data").is_empty(), "it had begun");
    assert_eq!(f.files("locks").len(), 1);
    f.provider.job_init(f.clock).unwrap();
    assert_eq!(f.files("locks").len(), 1, "ours instead of the dead one's");
    f.assert_nothing_stored(0);
    f.provider.job_cleanup().unwrap();
    assert!(f.files("locks").is_empty());
}
