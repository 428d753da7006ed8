use super::{
    Way, bitmap,
    rig::{Kind, MIB, SIZE, State, Vm, dirty, generation, run, uri},
};
use crate::{
    access::{
        AccessError, AccessPlan, BitmapAction, BitmapMode, Fleecing, FleecingFormat, FreezeMode, SnapshotAccess,
        Teardown, fleecing::Floor, freeze::FreezeError,
    },
    journal::Step,
};
use serde_json::{Value, json};
use std::{
    fs,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

mod recovery;

/// What a test does to an access.
#[derive(Debug, Default)]
pub(super) struct Trial {
    /// Points passed so far.
    pub(super) passed: AtomicUsize,
    /// The point at which the process dies.
    pub(super) dies_at: Option<usize>,
    /// No watchdog: the test's binary has no such subcommand.
    pub(super) unwatched: bool,
}

impl Trial {
    pub(super) fn point(&self) -> Result<(), AccessError> {
        let now = self.passed.fetch_add(1, Ordering::Relaxed) + 1;
        if self.dies_at == Some(now) { Err(AccessError::Killed(now)) } else { Ok(()) }
    }
}

const WAYS: [Way; 2] = [Way::Transaction, Way::MicroPause];

/// Every kind of disk; without I/O threads where QEMU is too old for them.
fn all_kinds() -> Vec<Kind> {
    let mut kinds = vec![Kind::VirtioBlockdev, Kind::ScsiDrive, Kind::Ahci, Kind::Qcow2, Kind::Pflash];
    if std::env::var_os("PVEBACKUP_TEST_QEMU").is_none() {
        kinds.extend([Kind::VirtioIothread, Kind::ScsiIothread]);
    }
    kinds
}

fn two_kinds() -> Vec<Kind> {
    if std::env::var_os("PVEBACKUP_TEST_QEMU").is_none() {
        vec![Kind::ScsiIothread, Kind::VirtioIothread]
    } else {
        vec![Kind::ScsiDrive, Kind::Qcow2]
    }
}

fn bitmap_of(n: u32) -> String {
    bitmap::name("repo-a", &generation(n))
}

/// A full backup with generation `n`, committed.
async fn full_backup(vm: &Vm, way: Way, n: u32) -> super::rig::Oracle {
    let mut access = vm.access(way, vm.plan(n, &BitmapMode::New));
    access.check().await.unwrap();
    let active = access.set_up().await.unwrap();
    let image = vm.read(&active);
    let report = access.tear_down(Teardown::Success).await.unwrap();
    assert_eq!(report.left_behind, [""; 0]);
    image
}

#[tokio::test]
async fn a_snapshot_shows_the_instant_and_leaves_nothing() {
    for way in WAYS {
        let mut vm = Vm::running(&all_kinds()).await;
        vm.scribble().await;
        let before = vm.state().await;
        let mut access = vm.access(way, vm.plan(1, &BitmapMode::New));
        access.check().await.unwrap();
        let active = access.set_up().await.unwrap();
        let instant = vm.oracle.clone();
        assert_eq!(vm.status().await, "running");
        assert_eq!(active.consistency.paused_micros > 0, way == Way::MicroPause);
        assert!(!active.consistency.was_paused);
        for (disk, planned) in active.disks.iter().zip(&vm.disks) {
            assert_eq!((disk.action, disk.size, disk.granularity), (BitmapAction::New, planned.size, 65536));
            assert_eq!(disk.bitmap_node.as_deref(), Some(planned.node.as_str()));
            assert_eq!(disk.next_bitmap, Some(bitmap_of(1)));
            assert_eq!(disk.dirty_context, None);
        }
        assert_eq!(vm.read(&active), instant);
        for _ in 0..5 {
            vm.scribble().await;
        }
        for disk in 0..vm.disks.len() {
            vm.write(disk, 0..65536, 0xee).await;
        }
        assert_eq!(vm.read(&active), instant, "{way:?}");
        assert!(access.fleecing_bytes() >= 65536);

        let report = access.tear_down(Teardown::Success).await.unwrap();
        assert_eq!(report.left_behind, [""; 0]);
        assert!(report.fleecing_peak_bytes >= 65536);
        let after = vm.state().await;
        let bitmaps = (0..vm.disks.len()).map(|n| (n, bitmap_of(1), true)).collect();
        assert_eq!(after, State { bitmaps, ..before }, "{way:?}");
        // Nothing is undone twice.
        assert_eq!(access.tear_down(Teardown::Success).await.unwrap().left_behind, [""; 0]);
        drop(access);
        let leftover = vm.journal().leftover();
        assert!(matches!(leftover.as_slice(), [Step::Begin { .. }]), "{leftover:?}");

        // The disks themselves have all that was written.
        let mut check = vm.access(way, vm.plan(2, &BitmapMode::New));
        check.check().await.unwrap();
        let active = check.set_up().await.unwrap();
        assert_eq!(vm.read(&active), vm.oracle);
        check.tear_down(Teardown::Failure).await.unwrap();
    }
}

#[tokio::test]
async fn the_way_follows_from_what_jobs_can_do_and_short_time_outs_stay_short() {
    let vm = Vm::running(&[Kind::VirtioBlockdev]).await;
    let mut access = super::StockAccess::new(vm.plan(1, &BitmapMode::New), vm.qmp.clone(), vm.journal());
    access.check().await.unwrap();
    let features = access.features.clone().unwrap();
    let way = if features.on_cbw_error { Way::Transaction } else { Way::MicroPause };
    assert_eq!(features.way, way);
    let old = std::env::var_os("PVEBACKUP_TEST_QEMU").is_some();
    assert_eq!(features.cbw_timeout, if old { 4 } else { 45 });
    assert_eq!(features.qemu.unwrap().pid, vm.child.id() as i32);
    drop(access);
    // A limit of zero would be none at all.
    let mut plan = vm.plan(1, &BitmapMode::New);
    plan.cbw_timeout = Duration::from_millis(1);
    let mut access = vm.access(Way::MicroPause, plan);
    access.check().await.unwrap();
    assert_eq!(access.features.unwrap().cbw_timeout, 1);
}

#[tokio::test]
async fn incremental_images_equal_the_disks_after_success_and_after_failure() {
    for way in WAYS {
        let mut vm = Vm::running(&all_kinds()).await;
        vm.scribble().await;
        let mut image = full_backup(&vm, way, 1).await;
        let mut base = 1;
        for n in 2..8 {
            vm.scribble().await;
            let mut access = vm.access(way, vm.plan(n, &BitmapMode::Use(bitmap_of(base))));
            access.check().await.unwrap();
            let active = access.set_up().await.unwrap();
            let instant = vm.oracle.clone();
            for (disk, planned) in active.disks.iter().zip(&vm.disks) {
                assert_eq!(disk.action, BitmapAction::Used, "{}: {}", planned.name, disk.reason);
                assert!(disk.clean_readable);
            }
            vm.scribble().await;
            let ok = n % 3 != 0;
            let mut attempt = image.clone();
            let bytes = vm.update(&active, &mut attempt);
            assert!(bytes < vm.oracle.0.iter().map(Vec::len).sum::<usize>() / 2, "{bytes} dirty bytes");
            assert_eq!(attempt, instant, "{way:?}, generation {n} on {base}");
            access.tear_down(if ok { Teardown::Success } else { Teardown::Failure }).await.unwrap();
            if ok {
                image = attempt;
                base = n;
            }
            let bitmaps = (0..vm.disks.len()).map(|n| (n, bitmap_of(base), true)).collect();
            assert_eq!(vm.state().await.bitmaps, bitmaps);
        }
    }
}

#[tokio::test]
async fn a_bitmap_that_misses_writes_is_not_used_but_started_anew() {
    let mut vm = Vm::running(&two_kinds()).await;
    full_backup(&vm, Way::MicroPause, 1).await;
    let node = vm.disks[1].node.clone();
    vm.say("block-dirty-bitmap-disable", json!({"node": node, "name": bitmap_of(1)})).await;
    let mut access = vm.access(Way::MicroPause, vm.plan(2, &BitmapMode::Use(bitmap_of(1))));
    access.check().await.unwrap();
    let active = access.set_up().await.unwrap();
    assert_eq!(active.disks[0].action, BitmapAction::Used);
    assert_eq!(active.disks[1].action, BitmapAction::MissingRecreated);
    assert!(active.disks[1].reason.contains("does not record"), "{}", active.disks[1].reason);
    assert_eq!(active.disks[1].dirty_context, None);
    assert_eq!(vm.read(&active), vm.oracle);
    access.tear_down(Teardown::Success).await.unwrap();
    // What was of no use is gone as well.
    let bitmaps = (0..2).map(|n| (n, bitmap_of(2), true)).collect();
    assert_eq!(vm.state().await.bitmaps, bitmaps);
}

#[tokio::test]
async fn merging_bitmaps_of_different_granularity_loses_nothing() {
    let mut vm = Vm::running(&[Kind::VirtioBlockdev]).await;
    let node = vm.disks[0].node.clone();
    vm.say("block-dirty-bitmap-add", json!({"node": node, "name": bitmap_of(1), "granularity": 512 << 10})).await;
    vm.write(0, 3 * MIB..3 * MIB + 512, 1).await;
    let mut access = vm.access(Way::MicroPause, vm.plan(2, &BitmapMode::Use(bitmap_of(1))));
    access.check().await.unwrap();
    let active = access.set_up().await.unwrap();
    assert_eq!(active.disks[0].granularity, 512 << 10);
    vm.write(0, 6 * MIB..6 * MIB + 512, 2).await;
    let report = access.tear_down(Teardown::Failure).await.unwrap();
    assert_eq!(report.left_behind, [""; 0]);
    drop(access);
    let mut access = vm.access(Way::MicroPause, vm.plan(3, &BitmapMode::Use(bitmap_of(1))));
    access.check().await.unwrap();
    let active = access.set_up().await.unwrap();
    assert_eq!(dirty(&active, &active.disks[0]), [3 * MIB..3 * MIB + (512 << 10), 6 * MIB..6 * MIB + (512 << 10)]);
    access.tear_down(Teardown::Failure).await.unwrap();
}

#[tokio::test]
async fn a_guest_that_does_not_run_is_neither_paused_nor_resumed() {
    for way in WAYS {
        let mut vm = Vm::start(&two_kinds()).await;
        for status in ["prelaunch", "paused"] {
            if status == "paused" {
                vm.say("cont", Value::Null).await;
                vm.say("stop", Value::Null).await;
            }
            let mut access = vm.access(way, vm.plan(1, &BitmapMode::New));
            access.check().await.unwrap();
            let active = access.set_up().await.unwrap();
            assert_eq!(vm.status().await, status);
            if way == Way::MicroPause {
                assert!(active.consistency.was_paused);
                assert_eq!(active.consistency.paused_micros, 0);
            }
            assert_eq!(vm.read(&active), vm.oracle);
            access.tear_down(Teardown::Failure).await.unwrap();
            assert_eq!(vm.status().await, status);
        }
    }
}

#[tokio::test]
async fn a_set_up_that_fails_leaves_everything_as_it_was() {
    for way in WAYS {
        let mut vm = Vm::running(&two_kinds()).await;
        vm.scribble().await;
        full_backup(&vm, way, 1).await;
        let plan = |vm: &Vm, n| vm.plan(n, &BitmapMode::Use(bitmap_of(1)));

        // The second disk's image is there already.
        let before = vm.state().await;
        let mut access = vm.access(way, plan(&vm, 3));
        access.check().await.unwrap();
        let stray = vm.dir.path().join("fleecing").join(format!("pvb-{}-fl1.raw", generation(3)));
        fs::write(&stray, "not ours").unwrap();
        let error = access.set_up().await.unwrap_err();
        assert!(matches!(error, AccessError::Fleecing { .. }), "{error}");
        drop(access);
        // The journal cannot tell that the file was another's; its name has a generation in it that is never used twice.
        let _ = fs::remove_file(&stray);
        assert_eq!(vm.state().await, before, "{way:?}");

        // The second disk refuses its bitmap, after the first took its own.
        let (first, second) = (vm.disks[0].node.clone(), vm.disks[1].node.clone());
        vm.say("block-dirty-bitmap-add", json!({"node": second, "name": bitmap_of(5)})).await;
        let before = vm.state().await;
        let mut access = vm.access(way, plan(&vm, 5));
        access.check().await.unwrap();
        let error = access.set_up().await.unwrap_err();
        assert!(matches!(error, AccessError::Qmp { .. }), "{error}");
        drop(access);
        let mut after = vm.state().await;
        assert_eq!(after.status, "running");
        assert!(!after.bitmaps.contains(&(0, bitmap_of(5), true)), "{first}");
        // A bitmap that has the name of this run's is taken for this run's, and nothing is lost with it.
        after.bitmaps.insert((1, bitmap_of(5), true));
        assert_eq!(after, before, "{way:?}");

        // Somebody runs the NBD server, which nobody can see before.
        let socket = vm.dir.path().join("theirs");
        vm.say("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}})).await;
        let before = vm.state().await;
        let mut access = vm.access(way, plan(&vm, 7));
        access.check().await.unwrap();
        let error = access.set_up().await.unwrap_err();
        assert!(matches!(error, AccessError::Foreign { .. }), "{error}");
        assert_eq!(vm.state().await, before);
        vm.say("nbd-server-stop", Value::Null).await;
        drop(access);
        assert!(matches!(vm.journal().leftover().as_slice(), [Step::Begin { .. }, ..]));
    }
}

#[tokio::test]
async fn what_is_in_the_way_is_named_before_anything_is_touched() {
    let mut vm = Vm::running(&[Kind::VirtioBlockdev, Kind::ScsiDrive]).await;
    let before = vm.state().await;
    let refusal = async |vm: &Vm, change: &dyn Fn(&mut AccessPlan)| {
        let mut plan = vm.plan(1, &BitmapMode::New);
        change(&mut plan);
        vm.access(Way::MicroPause, plan).check().await.unwrap_err()
    };
    let error = refusal(&vm, &|p| p.disks.clear()).await;
    assert!(error.to_string().contains("0 disks"), "{error}");
    let error = refusal(&vm, &|p| p.disks.push(p.disks[0].clone())).await;
    assert!(error.to_string().contains("twice"), "{error}");
    let error = refusal(&vm, &|p| p.disks[1].disk.size += 512).await;
    assert_eq!(error.to_string(), format!("refused of disk `disk1`: it has {SIZE} bytes now, not {}", SIZE + 512));
    let error = refusal(&vm, &|p| p.disks[1].disk.qdev = "scsi9".into()).await;
    assert!(error.to_string().contains("no block device `scsi9`"), "{error}");
    let error = refusal(&vm, &|p| p.generation = "../x".into()).await;
    assert!(matches!(error, AccessError::Refused { .. }), "{error}");
    let error = refusal(&vm, &|p| p.run_dir = format!("/tmp/{}", "x".repeat(100)).into()).await;
    assert!(error.to_string().contains("path of a socket"), "{error}");
    let error = refusal(&vm, &|p| p.fleecing = Fleecing::Storage("local".into())).await;
    assert!(matches!(error, AccessError::Refused { .. }), "{error}");
    let mut access = vm.access(Way::MicroPause, vm.plan(1, &BitmapMode::New));
    access = access.with_floor(Floor { refuse: 1 << 60, warn: 1 << 60 });
    assert!(matches!(access.check().await, Err(AccessError::NoSpace { .. })));
    drop(access);

    // A job, a filter, an export, all of somebody else's.
    let target = json!({"driver": "null-co", "node-name": "sink", "size": SIZE});
    vm.say("blockdev-add", target).await;
    let (first, second) = (vm.disks[0].node.clone(), vm.disks[1].node.clone());
    vm.say("blockdev-backup", super::rig::foreign_job(&first, "sink")).await;
    let error = refusal(&vm, &|_| ()).await;
    assert!(matches!(&error, AccessError::Foreign { disk: Some(d), .. } if d == "disk0"), "{error}");
    assert!(error.to_string().contains("filter `copy-before-write`"), "{error}");
    vm.say("block-job-cancel", json!({"device": "theirs"})).await;
    while vm.state().await.jobs > 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    vm.say("blockdev-del", json!({"node-name": "sink"})).await;

    let socket = vm.dir.path().join("theirs");
    vm.say("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}})).await;
    vm.say("block-export-add", json!({"type": "nbd", "id": "theirs", "node-name": second})).await;
    let error = refusal(&vm, &|_| ()).await;
    assert!(error.to_string().contains("NBD server with export `theirs`"), "{error}");
    vm.say("nbd-server-stop", Value::Null).await;
    assert_eq!(vm.state().await, before);
    vm.access(Way::MicroPause, vm.plan(1, &BitmapMode::New)).check().await.unwrap();
}

/// A file system of 2 MiB.
struct SmallStore(std::path::PathBuf);

impl SmallStore {
    fn mount(path: std::path::PathBuf) -> Self {
        fs::create_dir(&path).unwrap();
        run("mount", &["-t", "tmpfs", "-o", "size=2m", "tmpfs", path.to_str().unwrap()]);
        Self(path)
    }
}

impl Drop for SmallStore {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test]
async fn a_full_fleecing_store_breaks_the_backup_and_not_the_guest() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("only root can mount a small file system");
        return;
    }
    let mut vm = Vm::running(&two_kinds()).await;
    let mounted = SmallStore::mount(vm.dir.path().join("small"));
    let store = mounted.0.clone();
    let mut plan = vm.plan(1, &BitmapMode::New);
    plan.fleecing = Fleecing::Directory { path: store.clone(), format: FleecingFormat::Raw };
    let mut access = vm.access(Way::MicroPause, plan);
    assert!(matches!(access.check().await, Err(AccessError::NoSpace { unit: "bytes", .. })));
    let mut access = access.with_floor(Floor { refuse: MIB as u64, warn: 4 * MIB as u64 });
    access.check().await.unwrap();
    assert!(access.take_warnings()[0].contains("only 2 MiB are free"));
    let active = access.set_up().await.unwrap();
    for disk in 0..2 {
        vm.write(disk, 0..4 * MIB, 0x55).await;
    }
    assert_eq!(vm.status().await, "running");
    assert!(access.fleecing_bytes() <= 2 * MIB as u64);
    // The snapshot is gone, and says so to its reader.
    let broken =
        std::process::Command::new("nbdcopy").args([&uri(&active, &active.disks[0].export), "null:"]).output().unwrap();
    assert!(!broken.status.success());
    let report = access.tear_down(Teardown::Failure).await.unwrap();
    assert_eq!(report.left_behind, [""; 0]);
    drop(access);
    drop(mounted);
    // No write was lost.
    let mut access = vm.access(Way::MicroPause, vm.plan(3, &BitmapMode::New));
    access.check().await.unwrap();
    let active = access.set_up().await.unwrap();
    assert_eq!(vm.read(&active), vm.oracle);
    access.tear_down(Teardown::Failure).await.unwrap();
}

#[tokio::test]
async fn a_qemu_that_runs_as_somebody_else_can_open_what_we_make() {
    use std::os::unix::fs::PermissionsExt;
    if !nix::unistd::geteuid().is_root() {
        eprintln!("only root can start a QEMU for somebody else");
        return;
    }
    let old = std::env::var_os("PVEBACKUP_TEST_QEMU").is_some();
    let somebody = if old { ["-runas", "nobody"] } else { ["-run-with", "user=nobody"] };
    let mut vm = Vm::start_with(&[Kind::VirtioBlockdev, Kind::ScsiDrive], &somebody).await;
    vm.say("cont", Value::Null).await;
    fs::set_permissions(vm.dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
    for n in [1, 2] {
        let mut access = vm.access(Way::MicroPause, vm.plan(n, &BitmapMode::New));
        access.check().await.unwrap();
        let active = access.set_up().await.unwrap();
        vm.scribble().await;
        let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(active.socket.parent().unwrap()), 0o700);
        for file in vm.files().iter().filter(|f| f.is_file()) {
            assert_eq!(mode(file), 0o600);
        }
        vm.read(&active);
        access.tear_down(Teardown::Success).await.unwrap();
        assert!(vm.files().is_empty());
    }
}

#[tokio::test]
async fn without_an_agent_a_freeze_is_left_out_or_fails_the_set_up_if_demanded() {
    for way in WAYS {
        let mut vm = Vm::running(&[Kind::VirtioBlockdev]).await;
        let before = vm.state().await;
        let mut plan = vm.plan(1, &BitmapMode::New);
        plan.freeze = FreezeMode::Require;
        let mut access = vm.access(way, plan.clone());
        access.check().await.unwrap();
        let error = access.set_up().await.unwrap_err();
        assert!(matches!(error, AccessError::Freeze(FreezeError::Required { .. })), "{error}");
        assert_eq!(vm.state().await, before);
        drop(access);

        plan.freeze = FreezeMode::Auto;
        plan.generation = generation(2);
        let mut access = vm.access(way, plan);
        access.check().await.unwrap();
        let active = access.set_up().await.unwrap();
        assert!(!active.consistency.frozen);
        assert!(active.consistency.freeze_note.is_some());
        access.tear_down(Teardown::Failure).await.unwrap();
    }
}

#[tokio::test]
async fn trims_give_fleecing_space_back() {
    for way in WAYS {
        let mut vm = Vm::running(&[Kind::VirtioBlockdev]).await;
        vm.write(0, 0..SIZE, 7).await;
        for n in [1, 2] {
            let mut access = vm.access(way, vm.plan(n, &BitmapMode::New));
            access.check().await.unwrap();
            let active = access.set_up().await.unwrap();
            let export = uri(&active, &active.disks[0].export);
            vm.write(0, 0..2 * MIB, n as u8).await;
            let full = access.fleecing_bytes();
            assert!(full >= 2 * MIB as u64, "{full}");
            run("qemu-io", &["-f", "raw", "-d", "unmap", "-c", &format!("discard 0 {MIB}"), &export]);
            let less = access.fleecing_bytes();
            assert!(less <= full - MIB as u64, "{way:?} {n}: {less} of {full}");
            // What was trimmed is not copied any more.
            run("qemu-io", &["-f", "raw", "-d", "unmap", "-c", &format!("discard {} {MIB}", 4 * MIB), &export]);
            vm.write(0, 4 * MIB..5 * MIB, 9).await;
            assert_eq!(access.fleecing_bytes(), less);
            access.tear_down(Teardown::Success).await.unwrap();
        }
    }
}

#[tokio::test]
async fn an_old_qemu_is_not_touched_when_a_disk_has_an_iothread() {
    let vm = Vm::running(&[Kind::VirtioBlockdev]).await;
    if vm.qmp.session().await.unwrap().version() >= (9, 0, 0) {
        eprintln!("skipped: this QEMU is not old; `scripts/test` runs this once more on an old one");
        return;
    }
    drop(vm);
    for kind in [Kind::VirtioIothread, Kind::ScsiIothread] {
        let mut vm = Vm::running(&[Kind::VirtioBlockdev, kind]).await;
        let error = vm.access(Way::MicroPause, vm.plan(1, &BitmapMode::New)).check().await.unwrap_err();
        assert!(matches!(&error, AccessError::Refused { disk: Some(d), .. } if d == "disk1"), "{error}");
        assert_eq!(vm.status().await, "running");
        let mut plan = vm.plan(1, &BitmapMode::New);
        plan.disks.pop();
        vm.access(Way::MicroPause, plan).check().await.unwrap();
    }
}
