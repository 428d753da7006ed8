//! The machine of Proxmox VE: its commands answer as its QEMU does, and die where it dies.

use crate::{
    client::{Client, STORE},
    rig::*,
};
use serde_json::{Value, json};
use std::{fs, process::Command, time::Duration};

fn sorted<T: Ord>(mut items: Vec<T>) -> Vec<T> {
    items.sort();
    items
}

const SCSI0: &str = "fcd04be4259153b8293415fefa2a84c";

/// The machine of the recorded exchanges.
fn proxmox() -> VmBuilder {
    VmBuilder::new()
        .proxmox(8006)
        .disk_spec(DiskSpec { style: Style::Proxmox, format: Format::Qcow2, ..DiskSpec::new("scsi0", 64 * MIB) })
        .disk_spec(DiskSpec { style: Style::Proxmox, format: Format::Raw, ..DiskSpec::new("scsi1", 30 * MIB) })
}

fn desc(result: Result<Value, QmpFailure>) -> String {
    let failure = result.unwrap_err();
    assert_eq!(failure.to_wire()["class"], "GenericError");
    failure.desc().to_owned()
}

#[test]
fn proxmox_new_then_use_reads_what_the_guest_wrote_in_between() {
    let vm = proxmox().start();
    vm.write("scsi0", 0, 64 * MIB, 0x11);
    vm.write("scsi1", 0, 30 * MIB, 0x22);
    let before = BlockState::of(&vm);
    let mut client = Client::new(&vm);
    assert_eq!(client.qmp.greeting()["QMP"]["version"]["package"], "pve-qemu-kvm_10.0.2-4");
    assert_eq!(client.qmp.ok("query-proxmox-support", json!({}))["backup-access-api"], true);
    assert_eq!(client.qmp.ok("query-backup", json!({})), json!({"finishing": false}));
    assert_eq!(client.qmp.ok("query-pbs-bitmap-info", json!({})), json!([]));
    client.add_fleecing("scsi0", 64 * MIB);
    client.add_fleecing("scsi1", 30 * MIB);

    let access = client.set_up(STORE, &[("scsi0", "new"), ("scsi1", "new")]).unwrap();
    let below = access[1]["bitmap-node-name"].clone();
    for (number, (device, size)) in [("drive-scsi0", 64 * MIB), ("drive-scsi1", 30 * MIB)].into_iter().enumerate() {
        let mut entry = access[number].clone();
        assert!(entry["node-name"].take().as_str().unwrap().starts_with("#block"));
        let node = if number == 0 { json!(SCSI0) } else { below.clone() };
        assert_eq!(
            entry,
            json!({"device": device, "node-name": null, "bitmap-action": "new", "size": size,
                "bitmap-node-name": node, "bitmap-name": STORE})
        );
    }
    assert_eq!(
        client.qmp.ok("query-pbs-bitmap-info", json!({})),
        json!([{"dirty": 64 * MIB, "size": 64 * MIB, "drive": "drive-scsi0", "action": "new"},
            {"dirty": 30 * MIB, "size": 30 * MIB, "drive": "drive-scsi1", "action": "new"}])
    );
    let mut status = client.qmp.ok("query-backup", json!({}));
    assert!(status["start-time"].take().as_u64().is_some());
    assert_eq!(
        status,
        json!({"total": 94 * MIB, "zero-bytes": 0, "finishing": false, "uuid": "", "status": "active", "dirty": 94 * MIB,
            "reused": 0, "transferred": 0, "start-time": null})
    );
    let graph = client.qmp.ok("query-named-block-nodes", json!({"flat": true}));
    let node = |name: &Value| graph.as_array().unwrap().iter().find(|node| node["node-name"] == *name).unwrap().clone();
    let snapshot = node(&access[0]["node-name"]);
    assert_eq!(snapshot["drv"], "snapshot-access");
    let filter = node(&snapshot["children"][0]["node-name"]);
    assert_eq!(filter["drv"], "copy-before-write");
    assert_eq!(node(&json!("drive-scsi0"))["children"], json!([{"child": "file", "node-name": filter["node-name"]}]));
    let background = "backup-access-background-bitmap".to_owned();
    let expected = |node: &str, all: u64| {
        [(node.to_owned(), background.clone(), 0, true), (node.to_owned(), STORE.to_owned(), all, false)]
    };
    let below = below.as_str().unwrap();
    assert_eq!(client.bitmaps(), sorted([expected(below, 32 * MIB), expected(SCSI0, 64 * MIB)].concat()));

    client.export(&access);
    vm.write("scsi0", 4 * MIB, 64 * KIB, 0xaa);
    vm.write("scsi0", 20 * MIB, MIB, 0xab);
    vm.write("scsi1", 29 * MIB, 512 * KIB, 0xac);
    assert_eq!(client.dirty("scsi0", STORE), [(0, 64)]);
    assert_eq!(client.dirty("scsi1", STORE), [(0, 30)]);
    assert!(client.io("scsi0", &["read -P 0x11 0 64M"]).0);
    assert!(client.io("scsi1", &["read -P 0x22 0 30M"]).0);
    assert!(vm.reads("scsi0", 4 * MIB, 64 * KIB, 0xaa));
    let (_, text) = client.io("scsi0", &["discard 0 8M", "read 0 64k", "read 8M 64k", "write 32M 64k"]);
    assert!(
        text.contains("read failed: Invalid argument") && text.contains("write failed: Operation not supported"),
        "{text}"
    );
    let access_node = access[0]["node-name"].as_str().unwrap();
    assert_eq!(
        desc(client.qmp.execute("blockdev-del", json!({"node-name": access_node}))),
        format!("Node {access_node} is not owned by the monitor")
    );
    client.qmp.ok("nbd-server-stop", json!({}));
    assert_eq!(client.tear_down(STORE, true), Ok(json!({})));
    let recording = |scsi1: u64, scsi0: u64| {
        sorted(vec![
            (below.to_owned(), STORE.to_owned(), scsi1, true),
            (SCSI0.to_owned(), STORE.to_owned(), scsi0, true),
        ])
    };
    assert_eq!(client.bitmaps(), recording(4 * MIB, 8 * MIB));
    assert_eq!(client.qmp.ok("query-backup", json!({}))["status"], "done");

    vm.write("scsi0", 40 * MIB, 64 * KIB, 0xbb);
    let access = client.set_up(STORE, &[("scsi0", "use"), ("scsi1", "use")]).unwrap();
    assert_eq!(access[0]["bitmap-action"], "used");
    assert_eq!(
        client.qmp.ok("query-pbs-bitmap-info", json!({})),
        json!([{"dirty": 12 * MIB, "size": 64 * MIB, "drive": "drive-scsi0", "action": "used"},
            {"dirty": 4 * MIB, "size": 30 * MIB, "drive": "drive-scsi1", "action": "used"}])
    );
    assert_eq!(client.qmp.ok("query-backup", json!({}))["reused"], 94 * MIB - 16 * MIB);
    client.export(&access);
    assert_eq!(client.dirty("scsi0", STORE), [(4, 4), (20, 4), (40, 4)]);
    assert_eq!(client.dirty("scsi1", STORE), [(28, 2)]);
    vm.write("scsi0", 56 * MIB, 64 * KIB, 0xcc);
    vm.write("scsi0", 40 * MIB, 128 * KIB, 0xcd);
    assert!(client.io("scsi0", &["read -P 0xaa 4M 64k", "read -P 0x11 4160k 64k", "read -P 0xbb 40M 64k"]).0);
    for clean in ["read 0 64k", "read 7M 2M", "read 56M 64k"] {
        assert!(client.io("scsi0", &[clean]).1.contains("read failed: Invalid argument"));
    }
    client.qmp.ok("nbd-server-stop", json!({}));
    assert_eq!(client.tear_down(STORE, false), Ok(json!({})));
    assert_eq!(client.bitmaps(), recording(4 * MIB, 16 * MIB));
    client.set_up(STORE, &[("scsi0", "use"), ("scsi1", "use")]).unwrap();
    assert_eq!(client.tear_down(STORE, true), Ok(json!({})));
    assert_eq!(client.bitmaps(), recording(0, 0));

    let events = client.qmp.events(Duration::from_millis(200));
    let names: Vec<_> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(names, ["BLOCK_EXPORT_DELETED"; 4]);
    client.qmp.ok("blockdev-del", json!({"node-name": "drive-scsi0-fleecing"}));
    client.qmp.ok("blockdev-del", json!({"node-name": "drive-scsi1-fleecing"}));
    vm.assert_pristine(&before, &BitmapRule::Where(&|bitmap| bitmap.name == STORE));
    vm.assert_disk_intact("scsi0");
    vm.assert_disk_intact("scsi1");
    assert_eq!(vm.proxmox_fatal(), None);
}

#[test]
fn proxmox_bitmaps_follow_the_mode_that_was_asked_for() {
    let vm = proxmox().paused().start();
    let mut client = Client::new(&vm);
    client.add_fleecing("scsi0", 64 * MIB);
    client.add_fleecing("scsi1", 30 * MIB);
    let mut round = |modes: &[(&str, &str)], between: &dyn Fn()| {
        let access = client.set_up(STORE, modes).unwrap();
        let infos = client.qmp.ok("query-pbs-bitmap-info", json!({}));
        between();
        client.tear_down(STORE, true).unwrap();
        let each = |value: &Value, key: &str| -> Vec<String> {
            value.as_array().unwrap().iter().map(|entry| entry[key].as_str().unwrap_or("absent").to_owned()).collect()
        };
        (each(&access, "bitmap-action"), each(&infos, "action"))
    };
    let same = |actions: [&str; 2]| (actions.map(str::to_owned).to_vec(), actions.map(str::to_owned).to_vec());
    let nothing = || ();
    assert_eq!(round(&[("scsi0", "use"), ("scsi1", "new")], &nothing), same(["missing-recreated", "new"]));
    vm.write("scsi1", 0, 512, 1);
    let (access, infos) = round(&[("scsi0", "none"), ("scsi1", "use")], &|| vm.write("scsi1", 8 * MIB, 512, 1));
    assert_eq!((access, infos), (vec!["absent".into(), "used".into()], vec!["not-used-removed".into(), "used".into()]));
    assert_eq!(round(&[("scsi0", "none"), ("scsi1", "new")], &nothing).1, ["not-used", "new"]);

    let names = |bitmaps: Vec<(String, String, u64, bool)>| {
        bitmaps.into_iter().map(|(_, name, count, _)| (name, count)).collect::<Vec<_>>()
    };
    assert_eq!(names(client.bitmaps()), [(STORE.to_owned(), 0)]);
    // Another target has its own, and the first one's goes on.
    client.set_up("snapshot-access:store2", &[("scsi1", "new")]).unwrap();
    vm.write("scsi1", 16 * MIB, 512, 1);
    client.tear_down("snapshot-access:store2", true).unwrap();
    assert_eq!(names(client.bitmaps()), [(STORE.to_owned(), 4 * MIB), ("snapshot-access:store2".to_owned(), 4 * MIB)]);
    // A disk that has grown keeps its bitmap; the new part is clean.
    vm.resize("scsi1", 40 * MIB);
    assert_eq!(
        desc(client.set_up(STORE, &[("scsi1", "use")])),
        "Size mismatch for 'drive-scsi1-fleecing' - sector count 61440 != 81920"
    );
    client.qmp.ok("blockdev-del", json!({"node-name": "drive-scsi1-fleecing"}));
    client.add_fleecing("scsi1", 40 * MIB);
    let access = client.set_up(STORE, &[("scsi1", "use")]).unwrap();
    assert_eq!((&access[0]["bitmap-action"], &access[0]["size"]), (&json!("used"), &json!(40 * MIB)));
    client.export(&access);
    assert_eq!(client.dirty("scsi1", STORE), [(16, 4)]);
    client.qmp.ok("nbd-server-stop", json!({}));
    client.tear_down(STORE, true).unwrap();
}

#[test]
fn proxmox_refuses_what_proxmox_refuses() {
    let vm = proxmox().paused().start();
    let mut client = Client::new(&vm);
    let not_found = |what: &str| {
        Err(QmpFailure::Refused { class: "DeviceNotFound".into(), desc: format!("Device '{what}' not found") })
    };
    assert_eq!(client.tear_down(STORE, true), Ok(json!({})));
    assert_eq!(client.set_up(STORE, &[("scsi0", "new")]), not_found("drive-scsi0-fleecing"));
    client.add_fleecing("scsi0", 64 * MIB);
    assert_eq!(client.set_up(STORE, &[("scsi0", "new"), ("scsi9", "new")]), not_found("drive-scsi9"));
    let mut setup = |arguments: Value| desc(client.qmp.execute("backup-access-setup", arguments));
    let device = |device: Value| json!({"target-id": STORE, "devices": [device]});
    for (arguments, text) in [
        (
            device(json!({"device": "drive-scsi0", "bitmap-mode": "reuse"})),
            "Parameter 'bitmap-mode' does not accept value 'reuse'",
        ),
        (
            device(json!({"device": "drive-scsi0", "bitmap-mode": null})),
            "Invalid parameter type for 'devices[0].bitmap-mode', expected: string",
        ),
        (device(json!("drive-scsi0")), "Invalid parameter type for 'devices[0]', expected: object"),
        (device(json!({"device": "drive-scsi0", "size": 1})), "Parameter 'devices[0].size' is unexpected"),
        (json!({"target-id": STORE}), "Parameter 'devices' is missing"),
        (json!({"devices": [{"device": "drive-scsi0"}]}), "Parameter 'target-id' is missing"),
        (json!({"target-id": 7, "devices": []}), "Invalid parameter type for 'target-id', expected: string"),
        (
            json!({"target-id": STORE, "devices": [{"device": "drive-scsi0"}], "timeout": 60}),
            "Parameter 'timeout' is unexpected",
        ),
    ] {
        assert_eq!(setup(arguments), text);
    }
    assert_eq!(
        desc(client.set_up(&"x".repeat(1024), &[("scsi0", "new")])).split(':').next(),
        Some("Bitmap name too long")
    );
    assert!(client.bitmaps().is_empty());

    client.set_up(STORE, &[("scsi0", "new")]).unwrap();
    for again in [STORE, "snapshot-access:store2"] {
        assert_eq!(
            desc(client.set_up(again, &[("scsi9", "use")])),
            format!("previous backup for target '{STORE}' not finished")
        );
    }
    assert_eq!(
        desc(client.tear_down("snapshot-access:store2", true)),
        format!("cannot teardown backup access - got target snapshot-access:store2 instead of {STORE}")
    );
    client.qmp.ok("backup-cancel", json!({}));
    assert_eq!(client.qmp.ok("query-backup", json!({}))["status"], "active");
    assert!(desc(client.qmp.execute("blockdev-del", json!({"node-name": "drive-scsi0-fleecing"}))).contains("in use"));
    client.tear_down(STORE, true).unwrap();
    let status = client.qmp.ok("query-backup", json!({}));
    assert_eq!((&status["status"], &status["errmsg"]), (&json!("error"), &json!("backup canceled")));
    assert_eq!(client.tear_down(STORE, false), Ok(json!({})));

    vm.stand_in().begin_regular_backup();
    assert_eq!(desc(client.set_up(STORE, &[("scsi0", "use")])), "previous backup for target 'Proxmox' not finished");
    vm.stand_in().end_regular_backup();
    assert_eq!(
        desc(client.tear_down(STORE, true)),
        format!("cannot teardown backup access - got target {STORE} instead of Proxmox")
    );
    assert_eq!(client.set_up(STORE, &[("scsi0", "use")]).unwrap()[0]["bitmap-action"], "used");
    assert_eq!(vm.proxmox_fatal(), None);
}

#[test]
fn proxmox_setup_that_fails_late_leaves_its_filters() {
    let vm = proxmox().paused().start();
    let mut client = Client::new(&vm);
    client.add_fleecing("scsi0", 64 * MIB);
    let file = vm.dir().join("read-only.raw");
    fs::File::create(&file).unwrap().set_len(30 * MIB).unwrap();
    client.qmp.ok(
        "blockdev-add",
        json!({"node-name": "drive-scsi1-fleecing", "driver": "raw", "read-only": true,
            "file": {"driver": "file", "filename": file, "read-only": true}}),
    );
    assert_eq!(
        desc(client.set_up(STORE, &[("scsi0", "new"), ("scsi1", "new")])),
        "drive-scsi1 - setting up snapshot access failed: appending cbw node for fleecing failed: \
         Could not create node: Block node is read-only"
    );
    assert_eq!(client.qmp.ok("query-backup", json!({}))["status"], "active");
    assert_eq!(client.tear_down(STORE, false), Ok(json!({})));
    let counts: Vec<_> =
        client.bitmaps().into_iter().map(|(_, name, count, recording)| (name, count, recording)).collect();
    assert_eq!(sorted(counts), [(STORE.to_owned(), 32 * MIB, true), (STORE.to_owned(), 64 * MIB, true)]);
    assert!(client.qmp.execute("blockdev-del", json!({"node-name": "drive-scsi0-fleecing"})).is_err());
    vm.write("scsi0", 0, MIB, 5);
    vm.assert_disk_intact("scsi0");
}

#[test]
fn proxmox_snapshot_breaks_without_a_word_when_fleecing_space_runs_out() {
    let vm = proxmox().paused().start();
    vm.write("scsi0", 0, 64 * MIB, 0x11);
    let mut client = Client::new(&vm);
    // A fleecing image whose every write fails stands for a full file system.
    client.qmp.ok(
        "blockdev-add",
        json!({"driver": "blkdebug", "node-name": "drive-scsi0-fleecing", "discard": "unmap",
            "inject-error": [{"event": "none", "iotype": "write", "errno": 28, "once": false}],
            "image": {"driver": "null-co", "size": 64 * MIB, "read-zeroes": true}}),
    );
    let access = client.set_up(STORE, &[("scsi0", "new")]).unwrap();
    client.export(&access);
    assert!(client.io("scsi0", &["read -P 0x11 0 64k"]).0);
    vm.write("scsi0", 0, MIB, 0x99);
    for range in ["read 0 64k", "read 32M 64k"] {
        assert!(client.io("scsi0", &[range]).1.contains("read failed: Invalid argument"));
    }
    assert_eq!(client.dirty("scsi0", STORE), [(0, 64)]);
    assert_eq!(client.qmp.ok("query-backup", json!({}))["status"], "active");
    client.qmp.ok("nbd-server-stop", json!({}));
    client.tear_down(STORE, false).unwrap();
    vm.assert_disk_intact("scsi0");
}

#[test]
fn proxmox_machines_of_the_older_layout_and_tpm_states_are_served() {
    let vm = VmBuilder::new()
        .proxmox(100)
        .disk("scsi0", 16 * MIB, Bus::VirtioScsi, Style::Drive, Format::Raw, Io::Main)
        .disk("virtio1", 16 * MIB, Bus::VirtioBlk, Style::Drive, Format::Qcow2, Io::Thread)
        .disk("virtio2", 16 * MIB, Bus::VirtioBlk, Style::Proxmox, Format::Raw, Io::Thread)
        .start();
    for disk in vm.disks() {
        vm.write(disk, 0, 16 * MIB, 0x11);
    }
    let before = BlockState::of(&vm);
    let mut client = Client::new(&vm);
    let tpm = vm.dir().join("tpm.raw");
    fs::write(&tpm, vec![0x77; 4 * MIB as usize]).unwrap();
    client.qmp.ok(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "drive-tpmstate0-backup", "read-only": true,
            "file": {"driver": "file", "node-name": "tpmstate0-backup-file", "filename": tpm, "read-only": true}}),
    );
    for (disk, size) in [("scsi0", 16), ("virtio1", 16), ("virtio2", 16), ("tpmstate0-backup", 4)] {
        client.add_fleecing(disk, size * MIB);
    }
    let modes = [("scsi0", "use"), ("virtio1", "use"), ("virtio2", "use"), ("tpmstate0-backup", "use")];
    let access = client.set_up(STORE, &modes).unwrap();
    let root = before.roots["scsi0"].as_str();
    assert!(root.starts_with("#block"));
    assert_eq!(access[0]["bitmap-node-name"], root);
    assert_eq!(access[3]["bitmap-node-name"], "drive-tpmstate0-backup");
    client.export(&access);
    for disk in vm.disks() {
        vm.write(disk, 4 * MIB, 4 * MIB, 0x22);
        assert!(client.io(disk, &["read -P 0x11 0 16M"]).0, "{disk}");
    }
    assert!(client.io("tpmstate0-backup", &["read -P 0x77 0 4M"]).0);
    client.qmp.ok("nbd-server-stop", json!({}));
    client.tear_down(STORE, true).unwrap();
    let access = client.set_up(STORE, &modes[..3]).unwrap();
    client.export(&access);
    for disk in vm.disks() {
        assert_eq!(client.dirty(disk, STORE), [(4, 4)], "{disk}");
        assert!(client.io(disk, &["read -P 0x22 4M 4M"]).0, "{disk}");
    }
    client.qmp.ok("nbd-server-stop", json!({}));
    client.tear_down(STORE, true).unwrap();
    for node in [
        "drive-scsi0-fleecing",
        "drive-virtio1-fleecing",
        "drive-virtio2-fleecing",
        "drive-tpmstate0-backup-fleecing",
        "drive-tpmstate0-backup",
    ] {
        client.qmp.ok("blockdev-del", json!({"node-name": node}));
    }
    vm.assert_pristine(&before, &BitmapRule::Where(&|bitmap| bitmap.name == STORE));
    assert_eq!(vm.proxmox_fatal(), None);
}

#[test]
fn what_would_abort_proxmoxs_qemu_aborts_this_one() {
    type Step = (&'static str, &'static dyn Fn(&mut Client<'_>));
    let steps: [Step; 7] = [
        ("empty device list", &|client| drop(client.set_up(STORE, &[]))),
        ("names drive-scsi0 twice", &|client| drop(client.set_up(STORE, &[("scsi0", "new"), ("scsi0", "new")]))),
        ("target id 'Proxmox'", &|client| drop(client.set_up("Proxmox", &[("scsi0", "new")]))),
        ("while drive-scsi0 is exported", &|client| {
            let access = client.set_up(STORE, &[("scsi0", "new")]).unwrap();
            client.export(&access);
            drop(client.tear_down(STORE, true));
        }),
        ("bitmap of an active access is removed", &|client| {
            client.set_up(STORE, &[("scsi0", "new")]).unwrap();
            drop(client.qmp.execute("block-dirty-bitmap-remove", json!({"node": SCSI0, "name": STORE})));
        }),
        ("unplugged while its access is active", &|client| {
            client.set_up(STORE, &[("scsi0", "new")]).unwrap();
            drop(client.qmp.execute("device_del", json!({"id": "scsi0"})));
        }),
        ("resized while its bitmap is exported", &|client| {
            let access = client.set_up(STORE, &[("scsi0", "new")]).unwrap();
            client.export(&access);
            drop(client.qmp.execute("block_resize", json!({"node-name": "drive-scsi0", "size": 65 * MIB})));
        }),
    ];
    for (reason, step) in steps {
        let mut vm = proxmox().paused().start();
        {
            let mut client = Client::new(&vm);
            client.add_fleecing("scsi0", 64 * MIB);
            step(&mut client);
        }
        let fatal = vm.proxmox_fatal().unwrap_or_else(|| panic!("nothing happened: {reason}"));
        assert!(fatal.contains(reason), "{fatal}");
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&vm.wait_end()), Some(6));
    }
}

#[test]
fn proxmox_snapshots_of_a_busy_guest_are_of_one_instant_per_disk() {
    let vm = proxmox().start();
    let mut client = Client::new(&vm);
    client.add_fleecing("scsi0", 64 * MIB);
    client.add_fleecing("scsi1", 30 * MIB);
    // Few and short requests, so that most of the disk is clean and a write that a bitmap misses shows.
    let load = vm.load(LoadPlan { longest: 4096, ..LoadPlan::seeded(5) }.pause(Duration::from_millis(3)));
    let mut images = Vec::new();
    for disk in ["scsi0", "scsi1"] {
        let image = vm.dir().join(format!("restored-{disk}.raw"));
        fs::File::create(&image).unwrap().set_len(vm.writer().size(disk)).unwrap();
        images.push((disk, image));
    }
    for round in 0..6 {
        load.wait_for(load.done() + 5);
        let first = vm.mark();
        let access = client.set_up(STORE, &[("scsi0", "use"), ("scsi1", "use")]).unwrap();
        let last = vm.mark();
        client.export(&access);
        load.wait_for(load.done() + 5);
        for (disk, image) in &images {
            for (start, length) in client.dirty(disk, STORE) {
                let part = vm.dir().join("part.raw");
                let output = Command::new("qemu-img")
                    .args([
                        "dd",
                        "-f",
                        "raw",
                        "-O",
                        "raw",
                        "bs=1M",
                        &format!("skip={start}"),
                        &format!("count={}", start + length),
                    ])
                    .args([format!("if={}", client.uri(disk)), format!("of={}", part.display())])
                    .output()
                    .unwrap();
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
                let bytes = fs::read(&part).unwrap();
                let file = fs::OpenOptions::new().write(true).open(image).unwrap();
                std::os::unix::fs::FileExt::write_all_at(&file, &bytes, start * MIB).unwrap();
            }
            let found = vm.matching_prefix_between(disk, image, first..=last);
            assert!(found.is_ok(), "round {round}: {}", found.unwrap_err());
        }
        client.qmp.ok("nbd-server-stop", json!({}));
        client.tear_down(STORE, true).unwrap();
    }
    load.stop();
}

#[test]
fn proxmox_files_are_where_proxmox_has_them() {
    let vm = proxmox().config("[special:fleecing]\nfleecing-images: ").start();
    let root = vm.proxmox_root();
    let config = fs::read_to_string(root.path().join("etc/pve/qemu-server/8006.conf")).unwrap();
    assert!(config.contains("\nscsi0: local:8006/vm-8006-disk-0.qcow2,discard=on,size=64M\n"), "{config}");
    assert!(config.ends_with("[special:fleecing]\nfleecing-images: \n"));
    assert_eq!(fs::read_to_string(root.runtime("pid")).unwrap().trim(), vm.pid().to_string());
    let pvesm = |arguments: &[&str]| {
        let output = Command::new(root.pvesm()).args(arguments).output().unwrap();
        (
            output.status.success(),
            String::from_utf8(output.stdout).unwrap().lines().last().unwrap_or_default().to_owned(),
        )
    };
    assert_eq!(pvesm(&["path", vm.volid("scsi0")]), (true, vm.image("scsi0").display().to_string()));
    assert!(fs::metadata(vm.image("scsi0")).is_ok());
    let volid = "local:8006/vm-8006-fleece-0.raw";
    let made = (true, format!("successfully created '{volid}'"));
    assert_eq!(pvesm(&["alloc", "local", "8006", "vm-8006-fleece-0.raw", "30720", "--format", "raw"]), made);
    assert!(!pvesm(&["alloc", "local", "8006", "vm-8006-fleece-0.raw", "30720"]).0);
    let (_, path) = pvesm(&["path", volid]);
    assert_eq!(fs::metadata(&path).unwrap().len(), 30 * MIB);
    assert_eq!(pvesm(&["free", volid]), (true, format!("Removed volume '{volid}'")));
    assert!(!fs::exists(&path).unwrap());
    assert!(pvesm(&["alloc", "local-lvm", "8006", "vm-8006-fleece-0", "30000"]).0);
    assert_eq!(fs::metadata(pvesm(&["path", "local-lvm:vm-8006-fleece-0"]).1).unwrap().len(), 32 * MIB);
    assert_eq!(root.pvesm_calls().len(), 7);
}
