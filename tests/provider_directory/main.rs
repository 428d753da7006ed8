//! The directory provider on real directories, with `qemu-img` as a second opinion.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod durable;
mod fixture;
mod hostile;
mod retention;
#[path = "../rig/small_fs.rs"]
mod small_fs;

use fixture::*;
use jiff::{Timestamp, ToSpan};
use pvebackup::{
    archive::ArchiveId,
    provider::{
        DiskQuery, ErrorKind, Incremental, Outcome, Provider, ProviderError, SourceError,
        directory::{DirectoryOptions, DirectoryProvider, Mode},
    },
    segment::{Segment, SegmentData, SegmentLen},
};
use small_fs::SmallFs;
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{FileExt, PermissionsExt},
    path::PathBuf,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio_util::sync::CancellationToken;

#[test]
fn every_archive_of_a_history_is_the_disk_as_it_was() {
    let mut f = Fixture::new();
    let mut random = random(7);
    let mut now: Content = (0..SEGMENTS).step_by(3).map(|i| (i, segment_bytes(1, i))).collect();
    let mut history = Vec::new();
    let first = f.backup(vec![Disk::full("scsi0", &now)]).unwrap();
    history.push((first.id, now.clone()));
    for round in 2..32u64 {
        let mut changes: BTreeMap<u64, Option<Vec<u8>>> = BTreeMap::new();
        for _ in 0..random(40) {
            let index = random(SEGMENTS);
            changes.insert(index, (random(3) > 0).then(|| segment_bytes(round, index)));
        }
        // The short last segment comes and goes.
        if round % 4 == 0 {
            changes.insert(SEGMENTS - 1, (round % 8 == 0).then(|| segment_bytes(round, SEGMENTS - 1)));
        }
        let base = f.use_base(&history.last().unwrap().0, "scsi0");
        let disk = |end: Option<SourceError>| {
            let changes = changes.clone().into_iter().map(Ok).chain(end.map(Err)).collect();
            Disk { name: "scsi0", base: Some(base.clone()), changes }
        };
        if round % 5 == 0 {
            let gone = SourceError { disk: "scsi0".into(), message: "export gone".into() };
            assert_eq!(f.backup(vec![disk(Some(gone))]).unwrap_err().kind, ErrorKind::Source);
        }
        for (index, change) in &changes {
            match change {
                Some(bytes) => now.insert(*index, bytes.clone()),
                None => now.remove(index),
            };
        }
        let stored = f.watch.stored.load(Ordering::Relaxed);
        let read = changes.values().flatten().count() as u64;
        let made = f.backup(vec![disk(None)]).unwrap();
        assert_eq!(f.watch.stored.load(Ordering::Relaxed) - stored, read, "only what changed was taken");
        let added = made.added_bytes.unwrap();
        assert!(added < (read + 8) * LEN, "{added} bytes for {read} segments");
        history.push((made.id, now.clone()));
    }
    assert_eq!(f.watch.dropped.load(Ordering::Relaxed), 0);
    for (id, content) in &history {
        assert!(f.restored(id, "scsi0") == *content, "archive {id}");
        assert_sound(&f.image(id, "scsi0"));
    }
    for (id, content) in history.iter().step_by(6).chain(history.last()) {
        assert_converts_to(&f.image(id, "scsi0"), content);
    }
    let listed: Vec<ArchiveId> = f.provider.list(Some("100")).unwrap().into_iter().map(|a| a.id).collect();
    assert_eq!(listed, history.iter().map(|h| h.0.clone()).collect::<Vec<_>>(), "oldest first");
    assert!(f.provider.list(Some("101")).unwrap().is_empty());
    assert_eq!(f.ending(".failed").len(), 6);

    // The whole tree somewhere else.
    let elsewhere = f.root.with_file_name("moved");
    fs::rename(&f.root, &elsewhere).unwrap();
    let mut moved = Fixture::opened(elsewhere);
    let (id, content) = history.last().unwrap();
    assert_eq!(moved.provider.repository_id().unwrap(), f.provider.repository_id().unwrap());
    moved.use_base(id, "scsi0");
    assert!(moved.restored(id, "scsi0") == *content);
    assert_converts_to(&moved.image(id, "scsi0"), content);
}

#[test]
fn what_was_created_is_private_and_opens_again_under_the_same_identity() {
    let mut f = Fixture::new();
    let content: Content = [(0, segment_bytes(1, 0))].into();
    let id = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    let mut open = vec![f.root.clone()];
    while let Some(path) = open.pop() {
        let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o077;
        assert_eq!(mode, 0, "{}", path.display());
        if path.is_dir() {
            open.extend(fs::read_dir(path).unwrap().map(|e| e.unwrap().path()));
        }
    }
    assert_eq!(fs::read_to_string(f.archive(&id).join("backup.log")).unwrap(), "Success\n");
    let options = DirectoryOptions::new(&f.root);
    let mut again = DirectoryProvider::open(&options).unwrap();
    assert_eq!(again.repository_id().unwrap(), f.provider.repository_id().unwrap());
    let mut other = Fixture::new();
    assert_ne!(other.provider.repository_id().unwrap(), f.provider.repository_id().unwrap());
    assert_eq!(DirectoryProvider::init(&options).err().unwrap().kind, ErrorKind::Other, "there is one already");
}

#[test]
fn only_init_makes_a_repository_and_only_of_an_empty_directory() {
    let place = tempfile::tempdir().unwrap();
    let options = DirectoryOptions::new(place.path().join("r"));
    let kind = |result: Result<DirectoryProvider, ProviderError>| result.err().unwrap().kind;
    assert_eq!(kind(DirectoryProvider::open(&options)), ErrorKind::RepositoryMissing);
    fs::create_dir(&options.path).unwrap();
    assert_eq!(kind(DirectoryProvider::open(&options)), ErrorKind::RepositoryMissing, "not mounted");
    fs::write(options.path.join("holiday.jpg"), b"x").unwrap();
    assert_eq!(kind(DirectoryProvider::init(&options)), ErrorKind::Other);
    fs::remove_file(options.path.join("holiday.jpg")).unwrap();
    // An init that was killed.
    fs::write(options.path.join(".pvebackup-repository.partial"), b"12").unwrap();
    fs::create_dir(options.path.join("lost+found")).unwrap();
    let mut provider = DirectoryProvider::init(&options).unwrap();
    // What was opened is no longer there.
    fs::rename(&options.path, place.path().join("away")).unwrap();
    fs::create_dir(&options.path).unwrap();
    assert_eq!(provider.job_init(Timestamp::now()).unwrap_err().kind, ErrorKind::RepositoryMissing);
    fs::write(options.path.join(".pvebackup-repository"), b"short\n").unwrap();
    assert_eq!(kind(DirectoryProvider::open(&options)), ErrorKind::Damaged);
}

#[test]
fn disks_with_different_bases_share_an_archive() {
    let mut f = Fixture::new();
    let a: Content = (0..100).map(|i| (i, segment_bytes(1, i))).collect();
    let b: Content = (90..200).map(|i| (i, segment_bytes(2, i))).collect();
    let one =
        f.backup(vec![Disk::full("a", &a), Disk::full("b", &b), Disk::full("empty", &Content::new())]).unwrap().id;
    let two = f.backup(vec![Disk::full("b", &a)]).unwrap().id;
    let disks = vec![
        Disk {
            name: "a",
            base: Some(f.use_base(&one, "a")),
            changes: vec![Ok((5, Some(segment_bytes(4, 5)))), Ok((6, None))],
        },
        Disk { name: "b", base: Some(f.use_base(&two, "b")), changes: Vec::new() },
        Disk {
            name: "empty",
            base: Some(f.use_base(&one, "empty")),
            changes: vec![Ok((300, Some(segment_bytes(5, 300))))],
        },
        Disk { name: "new", base: None, changes: vec![Ok((1, None)), Ok((2, Some(segment_bytes(6, 2))))] },
    ];
    let three = f.backup(disks).unwrap().id;
    let mut expected = a.clone();
    expected.insert(5, segment_bytes(4, 5));
    expected.remove(&6);
    for (name, content) in [
        ("a", &expected),
        ("b", &a),
        ("empty", &[(300, segment_bytes(5, 300))].into()),
        ("new", &[(2, segment_bytes(6, 2))].into()),
    ] {
        assert!(f.restored(&three, name) == *content, "{name}");
        assert_converts_to(&f.image(&three, name), content);
        assert_sound(&f.image(&three, name));
    }
    assert!(f.restored(&one, "empty").is_empty());
    let listed = f.provider.list(None).unwrap();
    assert_eq!(listed[2].disks, ["a", "b", "empty", "new"]);
    assert_eq!(listed[2].size, Some(4 * SIZE));
}

#[test]
fn a_failed_backup_leaves_its_log_and_no_image() {
    let mut f = Fixture::new();
    let mut changes: Vec<_> = (0..50).map(|i| Ok((i, Some(segment_bytes(1, i))))).collect();
    changes.push(Err(SourceError { disk: "scsi0".into(), message: "export gone".into() }));
    let error = f.backup(vec![Disk { name: "scsi0", base: None, changes }]).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Source);
    let failed = f.ending(".failed");
    assert_eq!(failed.len(), 1);
    let left: Vec<_> = fs::read_dir(f.root.join("100").join(&failed[0])).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(left.len(), 1, "{left:?}");
    assert!(fs::read_to_string(&left[0]).unwrap().contains("could not be read"));
    f.assert_nothing_stored(0);
}

#[test]
fn a_late_failure_does_not_touch_the_archive() {
    let mut f = Fixture::new();
    let name = f.begin();
    let content: Content = [(0, segment_bytes(1, 0))].into();
    let input = f.input(name, vec![Disk::full("scsi0", &content)]);
    let id = f.provider.backup(input).unwrap().id;
    f.provider.backup_cleanup(&Outcome::Failure("an export could not be removed".into())).unwrap();
    f.provider.handle_log("late\n").unwrap();
    assert!(f.ending(".failed").is_empty());
    assert_eq!(fs::read_to_string(f.archive(&id).join("backup.log")).unwrap(), "late\n");
    assert!(f.restored(&id, "scsi0") == content);
    f.use_base(&id, "scsi0");
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
    for names in [["a", "a"], ["../x", "b"], [".x", "b"]] {
        let error = f.backup(names.map(|n| Disk::full(n, &Content::new())).into()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Other, "{error}");
    }
    let name = f.begin();
    let mut input = f.input(name, vec![Disk::full("scsi0", &Content::new())]);
    input.members.push(("manifest.json".into(), Vec::new()));
    assert_eq!(f.finish(input).unwrap_err().kind, ErrorKind::Other);
    f.assert_nothing_stored(0);
}

#[test]
fn a_cancelled_backup_leaves_no_archive() {
    let mut f = Fixture::new();
    let cancel = f.cancel.clone();
    let name = f.begin();
    let mut input = f.input(name, vec![Disk::full("scsi0", &Content::new())]);
    let taken = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&taken);
    input.disks[0].changed = Box::new((0..300).map(move |index| {
        if count.fetch_add(1, Ordering::Relaxed) == 20 {
            cancel.cancel();
        }
        Ok(Segment { index, data: Some(SegmentData::new(segment_bytes(1, index).into(), |_| {})) })
    }));
    assert_eq!(f.finish(input).unwrap_err().kind, ErrorKind::Source);
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
    record.index = 290;
    wrong.push(record).unwrap();
    let disk = |id: &ArchiveId, table| Disk { name: "scsi0", base: Some((id.clone(), table)), changes: vec![] };
    assert_eq!(f.backup(vec![disk(&first, wrong)]).unwrap_err().kind, ErrorKind::Incomplete);
    let foreign = ArchiveId(first.0.replace("100/", "101/"));
    assert_eq!(f.backup(vec![disk(&foreign, table.clone())]).unwrap_err().kind, ErrorKind::Incomplete);
    fs::rename(f.archive(&first), f.root.join("away")).unwrap();
    assert_eq!(f.backup(vec![disk(&first, table)]).unwrap_err().kind, ErrorKind::Incomplete, "removed meanwhile");
    f.assert_nothing_stored(0);
}

#[test]
fn a_base_that_vanishes_during_the_backup_fails_it() {
    let mut f = Fixture::new();
    let content: Content = (0..50).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    let base = Some(f.use_base(&first, "scsi0"));
    let name = f.begin();
    let mut input = f.input(name, vec![Disk { name: "scsi0", base, changes: Vec::new() }]);
    let gone = f.archive(&first);
    input.disks[0].changed = Box::new(std::iter::once_with(move || {
        fs::remove_dir_all(gone).unwrap();
        Ok(Segment { index: 1, data: None })
    }));
    let error = f.finish(input).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Incomplete, "{error}");
    assert!(error.message.contains("lost what it builds on"), "{error}");
    f.assert_nothing_stored(0);
}

#[test]
fn an_image_that_does_not_hold_what_was_written_fails_the_backup() {
    let mut f = Fixture::new();
    let name = f.begin();
    let mut input = f.input(name, vec![Disk::full("scsi0", &Content::new())]);
    let guest = f.root.join("100");
    let bytes = segment_bytes(1, 7);
    let written = bytes.clone();
    let first =
        std::iter::once_with(move || Ok(Segment { index: 7, data: Some(SegmentData::new(bytes.into(), |_| {})) }));
    // What the target does to it: one byte is another one.
    let second = std::iter::once_with(move || {
        let partial = fs::read_dir(guest).unwrap().map(|e| e.unwrap().path());
        let partial = partial.filter(|p| p.extension().is_some_and(|e| e == "partial")).collect::<Vec<_>>();
        let file = fs::OpenOptions::new().read(true).write(true).open(partial[0].join("scsi0.qcow2")).unwrap();
        let len = file.metadata().unwrap().len();
        let mut cluster = vec![0; 65536];
        let at = (0..len / 65536).map(|i| i * 65536).find(|at| {
            file.read_exact_at(&mut cluster, *at).unwrap();
            cluster == written[..65536]
        });
        file.write_all_at(&[!written[100]], at.unwrap() + 100).unwrap();
        Ok(Segment { index: 8, data: None })
    });
    input.disks[0].changed = Box::new(first.chain(second));
    let error = f.finish(input).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Incomplete, "{error}");
    assert!(error.message.contains("another content"), "{error}");
    f.assert_nothing_stored(0);
}

#[test]
fn a_base_that_does_not_fit_is_refused_with_the_reason() {
    let mut f = Fixture::new();
    let content: Content = (0..5).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    assert!(f.refused(&first, "scsi1").contains("does not have disk"));
    for id in ["", "latest", "100/qemu-1", "101/qemu-1", "../etc/qemu-1", "100/qemu-1.partial"] {
        assert!(f.refused(&ArchiveId(id.into()), "scsi0").contains("not in repository"), "{id}");
    }
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
    fs::remove_dir_all(f.archive(&first)).unwrap();
    assert!(f.refused(&first, "scsi0").contains("not in repository"), "deleted meanwhile");
}

#[test]
fn full_mode_makes_images_that_need_no_others() {
    let mut f = Fixture::new();
    let mut options = DirectoryOptions::new(&f.root);
    options.mode = Mode::Full;
    f.provider = DirectoryProvider::open(&options).unwrap();
    let content: Content = (0..20).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    assert!(f.refused(&first, "scsi0").contains("full backups only"));
    let second = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    fs::remove_dir_all(f.archive(&first)).unwrap();
    assert!(f.restored(&second, "scsi0") == content);
    assert_converts_to(&f.image(&second, "scsi0"), &content);
}

#[test]
fn a_chain_ends_where_it_is_told_to() {
    let mut f = Fixture::new();
    let mut options = DirectoryOptions::new(&f.root);
    options.max_chain = 3;
    f.provider = DirectoryProvider::open(&options).unwrap();
    let mut id = f.backup(vec![Disk::full("scsi0", &[(0, segment_bytes(1, 0))].into())]).unwrap().id;
    for _ in 0..2 {
        let base = Some(f.use_base(&id, "scsi0"));
        id = f.backup(vec![Disk { name: "scsi0", base, changes: Vec::new() }]).unwrap().id;
    }
    assert!(f.refused(&id, "scsi0").contains("3 images already"));
    for bad in [0, 257] {
        options.max_chain = bad;
        assert!(DirectoryProvider::open(&options).is_err());
    }
}

#[test]
fn names_of_archives_are_unique_and_a_guest_has_one_backup_at_a_time() {
    let mut f = Fixture::new();
    f.backup(vec![Disk::full("scsi0", &Content::new())]).unwrap();
    let taken = f.provider.list(None).unwrap().remove(0).name;
    let next = f.provider.backup_init("100", taken.time()).unwrap();
    assert_eq!(next.time(), taken.time().checked_add(1.second()).unwrap());
    let mut other = Fixture::opened(f.root.clone());
    assert_eq!(other.provider.backup_init("100", taken.time()).unwrap_err().kind, ErrorKind::Locked);
    assert_eq!(other.provider.backup_init("101", taken.time()).unwrap().time(), taken.time());
    f.provider.backup_cleanup(&Outcome::Failure("nothing".into())).unwrap();
    let after = other.provider.backup_init("100", taken.time()).unwrap();
    assert_eq!(after.time(), taken.time().checked_add(2.second()).unwrap(), "the failed one has its name");
}

#[test]
fn a_reader_gives_exactly_what_was_asked_for() {
    let mut f = Fixture::new();
    let content: Content = [0, 5, 299, 300].into_iter().map(|i| (i, segment_bytes(1, i))).collect();
    let id = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    let reader = f.provider.open(&id).unwrap();
    assert_eq!(reader.member("guest.conf", 100).unwrap(), b"cores: 2\n");
    assert_eq!(reader.member("firewall.conf", 0).unwrap(), b"");
    let kind = |result: Result<(), ProviderError>| result.unwrap_err().kind;
    assert_eq!(kind(reader.member("guest.conf", 8).map(drop)), ErrorKind::Damaged);
    for name in ["disks", "other", "../qemu-1/guest.conf", "disks/scsi0.segments", ".", ""] {
        assert_eq!(kind(reader.member(name, 1 << 20).map(drop)), ErrorKind::NotFound, "{name}");
    }
    assert_eq!(kind(reader.table("scsi1", 1000).map(drop)), ErrorKind::NotFound);
    assert_eq!(kind(reader.table("scsi0", 10).map(drop)), ErrorKind::Damaged);
    assert_eq!(kind(reader.segment("scsi1", 0, LEN).map(drop)), ErrorKind::NotFound);
    assert_eq!(kind(reader.segment("scsi0", 400, LEN).map(drop)), ErrorKind::NotFound);
    assert_eq!(kind(reader.segment("scsi0", 0, LEN - 1).map(drop)), ErrorKind::Damaged);
    assert_eq!(kind(reader.segment("scsi0", 300, LEN).map(drop)), ErrorKind::Damaged);
    for id in ["100/qemu-7", "102/qemu-7", "abcd"] {
        assert_eq!(kind(f.provider.open(&ArchiveId(id.into())).map(drop)), ErrorKind::NotFound);
    }
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert!(restored(reader.as_ref(), "scsi0") == content));
        }
    });
}

/// Names the directory for [`killed_child`].
const KILLED: &str = "PVEBACKUP_TEST_KILLED_DIRECTORY";

#[test]
#[ignore = "runs as a child of the next test"]
fn killed_child() {
    let mut f = Fixture::opened(PathBuf::from(std::env::var_os(KILLED).unwrap()));
    let name = f.begin();
    let content: Content = (0..300).map(|i| (i, segment_bytes(1, i))).collect();
    let mut input = f.input(name, vec![Disk::full("scsi0", &content)]);
    input.manifest = Box::new(|_| {
        let me = std::process::id().to_string();
        Command::new("kill").args(["-9", &me]).status().unwrap();
        panic!("still alive");
    });
    let _ = f.provider.backup(input);
}

#[test]
fn a_killed_run_leaves_no_archive_and_nothing_after_the_next() {
    let mut f = Fixture::new();
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "killed_child"])
        .env(KILLED, &f.root)
        .output()
        .unwrap();
    assert!(child.status.code().is_none(), "killed: {child:?}");
    let left = f.ending(".partial");
    assert_eq!(left.len(), 1, "it had begun");
    assert!(fs::metadata(f.root.join("100").join(&left[0]).join("scsi0.qcow2")).unwrap().len() > 300 * LEN);
    assert!(f.provider.list(None).unwrap().is_empty());
    f.begin();
    f.assert_nothing_stored(0);
}

#[test]
fn a_full_target_is_told_as_such_and_leaves_no_archive() {
    let dir = tempfile::tempdir().unwrap();
    let Some(room) = SmallFs::or_skip(dir.path().join("small"), 24) else { return };
    let target = room.path().to_owned();
    let provider = DirectoryProvider::init(&DirectoryOptions::new(&target)).unwrap();
    let mut f = Fixture::with(None, target, provider);
    let small: Content = (0..30).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("scsi0", &small)]).unwrap().id;
    let base = Some(f.use_base(&first, "scsi0"));
    let changes = (0..300).map(|i| Ok((i, Some(segment_bytes(2, i))))).collect();
    let error = f.backup(vec![Disk { name: "scsi0", base, changes }]).unwrap_err();
    assert_eq!(error.kind, ErrorKind::NoSpace, "{error:?}");
    assert_eq!(f.ending(".failed").len(), 1, "the log");
    f.use_base(&first, "scsi0");
    assert!(f.restored(&first, "scsi0") == small);
    f.assert_nothing_stored(1);
}
