//! The order of steps, which is what keeps the guest alive.

mod peer;

use super::*;
use crate::{
    access::{
        BitmapAction, BitmapMode, DiskPlan, Fleecing, FleecingFormat, FreezeMode,
        watchdog::{Watchdog, WatchdogError},
    },
    guest::{Disk, DiskKind, Guest, GuestKind},
    report::{Event, Monitor},
};
use peer::{BACKGROUND, Bitmap as PeerBitmap, Fault, Node as PeerNode, Peer, WrongFleecing};
use serde_json::json;
use std::{path::Path, sync::Mutex, time::Duration};
use tempfile::TempDir;
use tokio::process::Command;

const MIB: u64 = 1 << 20;

#[derive(Default)]
struct Heard(Mutex<Vec<String>>);

impl Monitor for Heard {
    fn event(&self, _guest: &str, event: Event) {
        if let Event::Warning { message } = event {
            self.0.lock().unwrap().push(message);
        }
    }
}

/// A child that is told everything and does nothing.
#[derive(Debug)]
struct Onlooker;

#[async_trait]
impl ArmWatchdog for Onlooker {
    async fn arm(&self, _qmp: PathBuf) -> Result<Watchdog, WatchdogError> {
        let mut command = Command::new("sh");
        command.args(["-c", "echo pvebackup-watchdog-ready; exec cat >/dev/null"]);
        Watchdog::start(command).await
    }
}

struct Rig {
    dir: TempDir,
    peer: Peer,
    journal: Journal,
    plan: AccessPlan,
    heard: Arc<Heard>,
}

impl Rig {
    /// A guest with disks of these sizes, all planned with `bitmap`.
    fn new(disks: &[(&str, u64)], bitmap: &BitmapMode) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let qmp = dir.path().join("qmp");
        let peer = Peer::start(&qmp);
        let plan_of = |(key, size): &(&str, u64)| {
            peer.add_disk(key, *size);
            let disk = Disk {
                name: (*key).into(),
                device: format!("drive-{key}"),
                kind: DiskKind::Drive,
                qdev: (*key).into(),
                node: format!("drive-{key}"),
                driver: "throttle".into(),
                size: *size,
                identity: format!("/images/{key}"),
                volume: None,
            };
            DiskPlan { disk, bitmap: bitmap.clone(), granularity: 1 << 16 }
        };
        let disks = disks.iter().map(plan_of).collect();
        std::fs::create_dir(dir.path().join("fleecing")).unwrap();
        let guest = Guest {
            id: "100".parse().unwrap(),
            name: None,
            kind: GuestKind::Proxmox,
            qmp: qmp.clone(),
            agent: None,
            config: Vec::new(),
            firewall: None,
        };
        let plan = AccessPlan {
            guest,
            disks,
            target: "pvebackup:main".into(),
            generation: "0123456789abcdef".into(),
            run_dir: dir.path().join("run"),
            fleecing: Fleecing::Directory { path: dir.path().join("fleecing"), format: FleecingFormat::Raw },
            freeze: FreezeMode::Auto,
            freeze_limit: Duration::from_secs(1),
            cbw_timeout: Duration::from_secs(45),
            exports: ExportMode::Trim,
            pvesm: "/nonexistent/pvesm".into(),
        };
        let journal = Journal::open(&dir.path().join("journal"), "100").unwrap();
        Self { dir, peer, journal, plan, heard: Arc::default() }
    }

    fn access(&self) -> ProxmoxAccess {
        let qmp = Qmp { socket: self.plan.guest.qmp.clone(), lock_wait: Duration::from_secs(5) };
        let events = Events::new("100", Arc::clone(&self.heard) as Arc<dyn Monitor>);
        let mut access = ProxmoxAccess::new(self.plan.clone(), qmp, self.journal.clone(), events);
        access.arm = Arc::new(Onlooker);
        access
    }

    fn bitmap(&self, key: &str, bitmap: PeerBitmap) {
        self.peer.state().nodes.get_mut(&format!("f-{key}")).unwrap().bitmaps.push(bitmap);
    }

    fn images(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("fleecing")).unwrap().count()
    }

    /// Nothing of ours is anywhere.
    fn assert_clean(&self) {
        let state = self.peer.state();
        assert_eq!(state.fatal, None);
        assert!(state.exports.is_empty(), "{:?}", state.exports);
        assert!(state.server.is_none());
        assert_eq!(state.active, None);
        let strange = |name: &String| name.contains("fleecing") || name.contains("tpm") || name.starts_with('#');
        assert!(!state.nodes.keys().any(strange), "{:?}", state.nodes.keys());
        assert_eq!(self.images(), 0);
        assert_eq!(self.journal.leftover(), []);
    }
}

fn use_bitmap() -> BitmapMode {
    BitmapMode::Use("pvebackup:main".into())
}

#[tokio::test]
async fn an_access_is_set_up_and_torn_down_in_the_one_order_that_is_safe() {
    let rig = Rig::new(&[("scsi0", 64 * MIB), ("scsi1", 30 * MIB)], &use_bitmap());
    rig.bitmap("scsi0", PeerBitmap::new("pvebackup:main"));
    let mut access = rig.access();
    access.check().await.unwrap();
    assert_eq!(rig.peer.changes(), Vec::<String>::new(), "a check changes nothing");
    let active = access.set_up().await.unwrap();
    let expected = [
        "blockdev-add",
        "blockdev-add",
        "nbd-server-start",
        "backup-access-setup",
        "transaction",
        "block-export-add",
        "block-export-add",
    ];
    assert_eq!(rig.peer.changes(), expected, "a guest that does not run is neither paused nor resumed");
    assert!(active.consistency.was_paused);
    assert_eq!(
        rig.peer.sent("backup-access-setup")[0],
        json!({"target-id": "pvebackup:main", "devices": [
        {"device": "drive-scsi0", "bitmap-mode": "use"}, {"device": "drive-scsi1", "bitmap-mode": "use"}]})
    );
    let exports = rig.peer.sent("block-export-add");
    let bitmaps = json!([{"node": exports[0]["node-name"], "name": "pvebackup:main"}]);
    assert_eq!(exports[0]["bitmaps"], bitmaps, "a copy is exported, not the bitmap of the disk's own node");
    let merge = &rig.peer.sent("transaction")[0]["actions"][1]["data"];
    assert_eq!(merge["bitmaps"], json!([{"node": "f-scsi0", "name": "pvebackup:main"}]));
    assert_eq!(exports[1].get("bitmaps"), None, "a bitmap that is not read is not exported");
    assert_eq!(exports[0]["writable"], json!(true));

    let [scsi0, scsi1] = &active.disks[..] else { panic!("{active:?}") };
    assert_eq!((scsi0.action, scsi0.clean_readable), (BitmapAction::Used, false));
    assert_eq!(scsi0.dirty_context.as_deref(), Some("qemu:dirty-bitmap:pvebackup:main"));
    assert_eq!((scsi1.action, scsi1.clean_readable), (BitmapAction::MissingRecreated, true));
    assert_eq!((scsi1.dirty_context.as_deref(), scsi1.size), (None, 30 * MIB));
    assert_eq!(scsi1.next_bitmap.as_deref(), Some("pvebackup:main"));
    assert_eq!(scsi1.bitmap_node.as_deref(), Some("f-scsi1"));

    rig.peer.state().log.clear();
    let report = access.tear_down(Teardown::Success).await.unwrap();
    assert_eq!(report.left_behind, Vec::<String>::new());
    let expected = [
        "block-export-del",
        "block-export-del",
        "nbd-server-stop",
        "backup-access-teardown",
        "blockdev-del",
        "blockdev-del",
    ];
    assert_eq!(rig.peer.changes(), expected);
    let teardown = rig.peer.sent("backup-access-teardown");
    assert_eq!(teardown, [json!({"target-id": "pvebackup:main", "success": true})]);
    assert_eq!(rig.peer.sent("block-export-del")[0], json!({"id": "drive-scsi0", "mode": "hard"}));
    rig.assert_clean();
    access.tear_down(Teardown::Success).await.unwrap();
    assert_eq!(rig.peer.sent("backup-access-teardown").len(), 1, "a second teardown finds nothing to do");
}

#[tokio::test]
async fn several_disks_of_a_running_guest_are_set_up_while_it_is_paused() {
    let rig = Rig::new(&[("scsi0", 8 * MIB), ("scsi1", 8 * MIB)], &BitmapMode::New);
    rig.peer.state().running = true;
    let mut access = rig.access();
    access.check().await.unwrap();
    let active = access.set_up().await.unwrap();
    let changes = rig.peer.changes();
    let order: Vec<&str> =
        changes.iter().map(String::as_str).filter(|c| matches!(*c, "stop" | "cont" | "backup-access-setup")).collect();
    assert_eq!(order, ["stop", "backup-access-setup", "cont"]);
    assert!(rig.peer.state().running);
    assert!(active.consistency.paused_micros > 0 && !active.consistency.frozen);
    assert_eq!(active.consistency.freeze_note.as_deref(), Some("the guest has no agent configured"));
    access.tear_down(Teardown::Failure).await.unwrap();
    assert_eq!(rig.peer.sent("backup-access-teardown")[0]["success"], json!(false));
    rig.assert_clean();
}

#[tokio::test]
async fn one_disk_needs_no_pause() {
    let rig = Rig::new(&[("scsi0", 8 * MIB)], &BitmapMode::New);
    rig.peer.state().running = true;
    let mut access = rig.access();
    access.check().await.unwrap();
    access.set_up().await.unwrap();
    assert!(rig.peer.sent("stop").is_empty());
    access.tear_down(Teardown::Failure).await.unwrap();
    rig.assert_clean();
}

#[tokio::test]
async fn a_demanded_freeze_that_cannot_be_leaves_nothing() {
    let mut rig = Rig::new(&[("scsi0", 8 * MIB)], &BitmapMode::New);
    rig.plan.freeze = FreezeMode::Require;
    for running in [true, false] {
        rig.peer.state().running = running;
        let mut access = rig.access();
        access.check().await.unwrap();
        assert!(matches!(access.set_up().await, Err(AccessError::Freeze(_))));
        assert!(rig.peer.sent("backup-access-setup").is_empty());
        rig.assert_clean();
    }
}

#[tokio::test]
async fn nothing_is_torn_down_while_an_export_or_its_bitmap_is_there() {
    let rig = Rig::new(&[("scsi0", 8 * MIB)], &use_bitmap());
    rig.bitmap("scsi0", PeerBitmap::new("pvebackup:main"));
    let mut access = rig.access();
    access.check().await.unwrap();
    access.set_up().await.unwrap();
    rig.peer.state().clinging_exports = true;
    let error = access.tear_down(Teardown::Failure).await.unwrap_err();
    assert!(matches!(error, AccessError::Stuck { .. }), "{error}");
    assert!(rig.journal.leftover().contains(&Step::Access { target_id: "pvebackup:main".into() }));

    // Ours is gone, but somebody else exports the same bitmap.
    {
        let mut state = rig.peer.state();
        state.clinging_exports = false;
        let export = ("#elsewhere".into(), Some(("f-scsi0".into(), "pvebackup:main".into())));
        state.exports.insert("foreign".into(), export);
    }
    let error = access.tear_down(Teardown::Failure).await.unwrap_err();
    assert!(matches!(&error, AccessError::Stuck { what, .. } if what.contains("pvebackup:main")), "{error}");
    assert!(rig.peer.sent("backup-access-teardown").is_empty());
    assert!(rig.peer.sent("nbd-server-stop").is_empty(), "it would end the export of somebody else");

    rig.peer.state().exports.clear();
    assert!(access.tear_down(Teardown::Failure).await.unwrap().left_behind.is_empty());
    rig.assert_clean();
}

#[tokio::test]
async fn nothing_is_torn_down_after_a_disk_was_unplugged() {
    let rig = Rig::new(&[("scsi0", 8 * MIB)], &BitmapMode::New);
    let mut access = rig.access();
    access.check().await.unwrap();
    access.set_up().await.unwrap();
    // First the device goes, then its throttle node.
    rig.peer.state().devices.clear();
    let report = access.tear_down(Teardown::Failure).await.unwrap();
    assert!(report.left_behind.iter().any(|left| left.contains("unplugged")), "{report:?}");
    rig.peer.state().nodes.remove("drive-scsi0");
    let report = access.tear_down(Teardown::Failure).await.unwrap();
    assert!(report.left_behind.iter().any(|left| left.contains("unplugged")), "{report:?}");
    assert!(rig.peer.sent("backup-access-teardown").is_empty());
    assert_eq!(rig.peer.state().fatal, None);
    assert_eq!(rig.images(), 1, "a fleecing image in use is not removed");
    // With the VM stopped everything is gone but the image.
    rig.peer.end();
    tokio::task::yield_now().await;
    std::fs::remove_file(&rig.plan.guest.qmp).unwrap();
    assert!(access.tear_down(Teardown::Failure).await.unwrap().left_behind.is_empty());
    assert_eq!((rig.images(), rig.journal.leftover()), (0, Vec::new()));
}

#[tokio::test]
async fn nothing_is_torn_down_after_a_bitmap_of_the_access_was_removed() {
    let rig = Rig::new(&[("scsi0", 8 * MIB)], &BitmapMode::New);
    let mut access = rig.access();
    access.check().await.unwrap();
    access.set_up().await.unwrap();
    rig.peer.state().nodes.get_mut("f-scsi0").unwrap().bitmaps.retain(|bitmap| bitmap.name == BACKGROUND);
    let report = access.tear_down(Teardown::Success).await.unwrap();
    assert!(report.left_behind.iter().any(|left| left.contains("somebody removed bitmap")), "{report:?}");
    assert!(rig.peer.sent("backup-access-teardown").is_empty());
    assert_eq!(rig.peer.state().fatal, None);
}

#[tokio::test]
async fn what_ends_the_qemu_process_is_never_asked_for() {
    let refuse = async |change: fn(&mut Rig)| {
        let mut rig = Rig::new(&[("scsi0", 8 * MIB), ("scsi1", 8 * MIB)], &BitmapMode::New);
        change(&mut rig);
        let mut access = rig.access();
        let error = access.check().await.expect_err("must be refused");
        assert!(matches!(access.set_up().await, Err(AccessError::Refused { .. })), "unchecked");
        assert_eq!(rig.peer.changes(), Vec::<String>::new());
        error.to_string()
    };
    let forbidden = async |target: &'static str| {
        let mut rig = Rig::new(&[("scsi0", 8 * MIB)], &BitmapMode::New);
        rig.plan.target = target.into();
        rig.access().check().await.is_err()
    };
    assert!(refuse(|rig| rig.plan.disks.clear()).await.contains("no disk"));
    assert!(refuse(|rig| rig.plan.disks[1].disk.device = "drive-scsi0".into()).await.contains("twice"));
    assert!(refuse(|rig| rig.plan.target = "x".repeat(1024)).await.contains("target id"));
    assert!(
        refuse(|rig| rig.plan.disks[0].disk.device = "drive-a-name-that-is-too-long".into()).await.contains("named")
    );
    assert!(refuse(|rig| rig.plan.disks[0].disk.device = "#block1".into()).await.contains("named"));
    assert!(refuse(|rig| rig.plan.run_dir = Path::new("/").join("r".repeat(110))).await.contains("socket"));
    assert!(refuse(|rig| rig.plan.disks[0].disk.size += 512).await.contains("bytes now"));
    assert!(refuse(|rig| rig.peer.state().devices[0]["tray_open"] = json!(false)).await.contains("CD-ROM"));
    assert!(refuse(|rig| rig.peer.state().devices[0]["inserted"] = json!(null)).await.contains("no device"));
    assert!(refuse(|rig| rig.peer.state().support = json!(null)).await.contains("lacks"));
    assert!(
        refuse(|rig| rig.peer.state().support = json!({"backup-fleecing": true})).await.contains("backup-access-api")
    );
    assert!(refuse(|rig| rig.bitmap("scsi1", PeerBitmap::new(BACKGROUND))).await.contains(BACKGROUND));
    for driver in ["copy-before-write", "snapshot-access"] {
        let rig = Rig::new(&[("scsi0", 8 * MIB)], &BitmapMode::New);
        rig.peer.state().nodes.insert("left".into(), PeerNode { drv: driver.into(), ..PeerNode::default() });
        let error = rig.access().check().await.unwrap_err().to_string();
        assert!(error.contains(&format!("node `left` ({driver})")), "{error}");
        assert_eq!(rig.peer.changes(), Vec::<String>::new());
    }
    for target in ["", "Proxmox", "Proxmox VE", BACKGROUND] {
        assert!(forbidden(target).await, "{target}");
    }
}

#[tokio::test]
async fn what_others_do_in_qemu_is_named() {
    let rig = Rig::new(&[("scsi0", 8 * MIB)], &BitmapMode::New);
    rig.peer.state().active = Some("snapshot-access:bk".into());
    rig.bitmap("scsi0", PeerBitmap { recording: false, ..PeerBitmap::new("snapshot-access:bk") });
    rig.bitmap("scsi0", PeerBitmap::new(BACKGROUND));
    let error = rig.access().check().await.unwrap_err().to_string();
    assert_eq!(error, "the guest is busy: a snapshot access for target `snapshot-access:bk` to drive-scsi7 is set up");

    let rig = Rig::new(&[("scsi0", 8 * MIB)], &BitmapMode::New);
    rig.peer.state().regular_backup = true;
    assert!(rig.access().check().await.unwrap_err().to_string().contains("a backup to a backup server"));

    let rig = Rig::new(&[("scsi0", 8 * MIB)], &BitmapMode::New);
    rig.peer.state().exports.insert("migration".into(), ("drive-scsi0".into(), None));
    assert!(rig.access().check().await.unwrap_err().to_string().contains("nbd export `migration`"));
}

#[tokio::test]
async fn a_server_or_a_backup_that_came_in_meanwhile_is_not_touched() {
    let rig = Rig::new(&[("scsi0", 8 * MIB)], &BitmapMode::New);
    let mut access = rig.access();
    access.check().await.unwrap();
    let path = rig.dir.path().join("theirs");
    rig.peer.state().server = Some((path.clone(), std::os::unix::net::UnixListener::bind(&path).unwrap()));
    assert!(matches!(access.set_up().await, Err(AccessError::Foreign { .. })));
    assert!(rig.peer.sent("nbd-server-stop").is_empty());
    assert!(rig.peer.sent("backup-access-setup").is_empty());
    rig.peer.state().server = None;
    rig.assert_clean();

    access.check().await.unwrap();
    rig.peer.state().active = Some("pvebackup:main".into());
    rig.peer.state().last_target = Some("pvebackup:main".into());
    assert!(matches!(access.set_up().await, Err(AccessError::Busy { .. })));
    assert!(rig.peer.sent("backup-access-teardown").is_empty(), "it is not ours");
    rig.peer.state().active = None;
    rig.assert_clean();
}

#[tokio::test]
async fn a_bitmap_that_misses_writes_is_not_used() {
    for bad in [
        PeerBitmap { recording: false, ..PeerBitmap::new("pvebackup:main") },
        PeerBitmap { granularity: 65536, ..PeerBitmap::new("pvebackup:main") },
    ] {
        let rig = Rig::new(&[("scsi0", 8 * MIB)], &use_bitmap());
        rig.bitmap("scsi0", bad);
        let mut access = rig.access();
        access.check().await.unwrap();
        let active = access.set_up().await.unwrap();
        assert_eq!(active.disks[0].action, BitmapAction::New);
        assert!(active.disks[0].reason.contains("somebody"), "{}", active.disks[0].reason);
        access.tear_down(Teardown::Failure).await.unwrap();
        rig.assert_clean();
    }
}

#[tokio::test]
async fn a_bitmap_that_was_not_there_before_is_replaced_before_anything_is_read() {
    let rig = Rig::new(&[("scsi0", 8 * MIB)], &use_bitmap());
    rig.peer.state().sudden_bitmap = true;
    let mut access = rig.access();
    access.check().await.unwrap();
    let active = access.set_up().await.unwrap();
    assert_eq!(active.disks[0].action, BitmapAction::New);
    let setups = rig.peer.sent("backup-access-setup");
    assert_eq!(setups.len(), 2);
    assert_eq!(setups[1]["devices"][0]["bitmap-mode"], json!("new"));
    assert_eq!(rig.peer.sent("backup-access-teardown")[0]["success"], json!(false));
    access.tear_down(Teardown::Success).await.unwrap();
    rig.assert_clean();
}

#[tokio::test]
async fn the_bitmap_of_another_target_is_not_used() {
    let rig = Rig::new(&[("scsi0", 8 * MIB)], &BitmapMode::Use("other".into()));
    let mut access = rig.access();
    access.check().await.unwrap();
    let active = access.set_up().await.unwrap();
    assert_eq!(active.disks[0].action, BitmapAction::New);
    assert!(active.disks[0].reason.contains("other"));
}

#[tokio::test]
async fn a_fleecing_node_that_would_end_qemu_is_found_before_the_setup() {
    for (wrong, says) in [
        (WrongFleecing::Larger, "bytes"),
        (WrongFleecing::ReadOnly, "read-only"),
        (WrongFleecing::Missing, "does not have the node"),
    ] {
        let rig = Rig::new(&[("scsi0", 8 * MIB)], &BitmapMode::New);
        rig.peer.state().fleecing = Some(wrong);
        let mut access = rig.access();
        access.check().await.unwrap();
        match access.set_up().await {
            Err(AccessError::Fleecing { source, .. }) => assert!(source.to_string().contains(says), "{source}"),
            other => panic!("{wrong:?}: {other:?}"),
        }
        assert!(rig.peer.sent("backup-access-setup").is_empty());
        rig.assert_clean();
    }
}

#[tokio::test]
async fn a_setup_that_fails_late_is_ended_and_what_stays_is_told() {
    let rig = Rig::new(&[("scsi0", 8 * MIB), ("scsi1", 8 * MIB)], &BitmapMode::New);
    {
        let mut state = rig.peer.state();
        state.running = true;
        state.late_failure = true;
    }
    let mut access = rig.access();
    access.check().await.unwrap();
    let error = access.set_up().await.unwrap_err();
    assert!(matches!(error, AccessError::Qmp { .. }));
    assert!(rig.peer.state().running, "resumed all the same");
    assert_eq!(rig.peer.sent("backup-access-teardown").len(), 1, "query-backup stays active until one is sent");
    assert_eq!(rig.peer.state().active, None);
    assert_eq!(access.report.left_behind, ["node `drive-scsi0-fleecing`: Block device drive-scsi0-fleecing is in use"]);
    assert_eq!(rig.images(), 2, "an image that may be in use stays");
    assert!(rig.journal.leftover().contains(&Step::Node { name: "drive-scsi0-fleecing".into() }));
    assert!(!rig.journal.leftover().contains(&Step::Node { name: "drive-scsi1-fleecing".into() }));
    assert!(rig.access().check().await.unwrap_err().to_string().contains("copy-before-write"), "no stacking");
}

#[tokio::test]
async fn tpm_state_is_attached_read_only_and_always_read_in_full() {
    let mut rig = Rig::new(&[("scsi0", 8 * MIB)], &use_bitmap());
    let state = rig.dir.path().join("tpm.raw");
    std::fs::File::create(&state).unwrap().set_len(5 * MIB).unwrap();
    let disk = Disk {
        name: "tpmstate0".into(),
        device: "drive-tpmstate0-backup".into(),
        kind: DiskKind::Tpm,
        qdev: String::new(),
        node: "drive-tpmstate0-backup".into(),
        driver: "raw".into(),
        size: 4 * MIB,
        identity: "local-lvm:vm-100-disk-3".into(),
        volume: Some(state),
    };
    rig.plan.disks.push(DiskPlan { disk, bitmap: use_bitmap(), granularity: 1 << 16 });
    let mut access = rig.access();
    access.check().await.unwrap();
    let active = access.set_up().await.unwrap();
    let added = rig.peer.sent("blockdev-add");
    assert_eq!(added[0]["node-name"], json!("drive-tpmstate0-backup"));
    assert_eq!((&added[0]["read-only"], &added[0]["file"]["read-only"]), (&json!(true), &json!(true)));
    let tpm = &active.disks[1];
    assert_eq!((tpm.size, tpm.action), (5 * MIB, BitmapAction::New));
    assert_eq!((tpm.next_bitmap.as_deref(), tpm.export.as_str()), (None, "drive-tpmstate0-backup"));
    access.tear_down(Teardown::Success).await.unwrap();
    rig.assert_clean();
}

#[tokio::test]
async fn when_qemu_ends_only_the_images_are_left_to_remove() {
    let rig = Rig::new(&[("scsi0", 8 * MIB)], &BitmapMode::New);
    let mut access = rig.access();
    access.check().await.unwrap();
    access.set_up().await.unwrap();
    assert_eq!(rig.images(), 1);
    rig.peer.end();
    tokio::task::yield_now().await;
    let report = access.tear_down(Teardown::Failure).await.unwrap();
    assert!(report.left_behind.is_empty());
    assert!(rig.heard.0.lock().unwrap().iter().any(|w| w.contains("QEMU has ended")));
    assert_eq!((rig.images(), rig.journal.leftover()), (0, Vec::new()));
}

/// Refuses, or cuts the connection before or after, every single command from the first of a set-up to the last of a teardown.
#[tokio::test]
async fn whatever_command_fails_the_guest_runs_on_and_nothing_stays() {
    let mut commands = 0;
    for fault in [None, Some(Fault::Refuse), Some(Fault::CloseBefore), Some(Fault::CloseAfter)] {
        let mut at = 0;
        loop {
            let rig = Rig::new(&[("scsi0", 8 * MIB), ("scsi1", 8 * MIB)], &use_bitmap());
            rig.bitmap("scsi0", PeerBitmap::new("pvebackup:main"));
            rig.peer.state().running = true;
            let mut access = rig.access();
            access.check().await.unwrap();
            let first = rig.peer.state().log.len();
            rig.peer.state().fault = fault.map(|fault| (first + at, fault));
            let ended = match access.set_up().await {
                Ok(_) => access.tear_down(Teardown::Success).await.map(drop),
                Err(error) => Err(error),
            };
            let state = format!("{fault:?} of command {at}: {ended:?}, log {:?}", rig.peer.changes());
            assert_eq!(rig.peer.state().fatal, None, "{state}");
            if fault.is_none() {
                commands = rig.peer.state().log.len() - first;
                ended.unwrap();
                break;
            }
            // A refused `cont` is the watchdog's to repeat.
            if !rig.peer.state().running {
                assert_eq!(
                    (fault, rig.peer.state().log[first + at].0.as_str()),
                    (Some(Fault::Refuse), "cont"),
                    "{state}"
                );
                rig.peer.state().running = true;
                rig.journal.record(&Step::Resumed).unwrap();
            }
            // What an error left is undone by the next attempt, as by a recovery.
            let report = access.tear_down(Teardown::Failure).await.unwrap_or_else(|e| panic!("{state}: {e}"));
            assert_eq!(report.left_behind, Vec::<String>::new(), "{state}");
            let paused: Vec<Step> = rig.journal.leftover();
            if paused == [Step::Paused] {
                rig.journal.record(&Step::Resumed).unwrap();
            }
            rig.assert_clean();
            at += 1;
            if at == commands {
                break;
            }
        }
    }
}
