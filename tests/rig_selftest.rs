//! The rig tests itself: what it says about a backup is worth no more than what it is worth itself.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "these are tests")]

mod rig;

use rig::*;
use serde_json::{Value, json};
use std::{fs, process::Command, time::Duration};

/// A copy of the disk as it is on the host, for comparison.
fn copy(vm: &Vm, disk: &str, name: &str) -> std::path::PathBuf {
    let target = vm.dir().join(name);
    fs::copy(vm.image(disk), &target).unwrap();
    target
}

#[test]
fn guests_of_every_bus_and_style_hold_what_was_written() {
    let vm = VmBuilder::new()
        .disk("virtio0", 4 * MIB, Bus::VirtioBlk, Style::Blockdev, Format::Raw, Io::Main)
        .disk("virtio1", 4 * MIB, Bus::VirtioBlk, Style::Drive, Format::Qcow2, Io::Thread)
        .disk("virtio2", 4 * MIB, Bus::VirtioBlk, Style::Proxmox, Format::Raw, Io::Thread)
        .disk("scsi0", 4 * MIB, Bus::VirtioScsi, Style::Blockdev, Format::Qcow2, Io::Thread)
        .disk("scsi1", 4 * MIB, Bus::VirtioScsi, Style::Drive, Format::Raw, Io::Main)
        .disk("scsi2", 4 * MIB, Bus::VirtioScsi, Style::Proxmox, Format::Qcow2, Io::Main)
        .disk("ide0", 4 * MIB, Bus::Ide, Style::Blockdev, Format::Raw, Io::Main)
        .disk("sata0", 4 * MIB + 512, Bus::Sata, Style::Drive, Format::Raw, Io::Main)
        .start();
    assert_eq!(vm.status(), "running");
    for (number, disk) in vm.disks().enumerate() {
        let byte = 0x10 + number as u8;
        vm.write(disk, MIB, MIB, byte);
        vm.write_zeroes(disk, MIB + 1024, 4096);
        vm.discard(disk, 2 * MIB - 65536, 65536);
        assert!(vm.reads(disk, MIB, 1024, byte), "{disk}");
        assert!(!vm.reads(disk, MIB, 4096, byte), "{disk}");
        vm.assert_disk_intact(disk);
    }
}

#[test]
fn a_busy_guest_is_followed_operation_by_operation() {
    let vm = VmBuilder::new()
        .disk("scsi0", 8 * MIB, Bus::VirtioScsi, Style::Blockdev, Format::Raw, Io::Main)
        .disk("scsi1", 8 * MIB, Bus::VirtioScsi, Style::Blockdev, Format::Raw, Io::Main)
        .paused()
        .start();
    let load = vm.load(LoadPlan::seeded(1).operations(100).pause(Duration::ZERO));
    load.wait_for(100);
    let middle = vm.mark();
    let (first, second) = (copy(&vm, "scsi0", "first.raw"), copy(&vm, "scsi1", "second.raw"));
    assert_eq!(load.stop(), 100);
    let load = vm.load(LoadPlan::seeded(2).operations(100).pause(Duration::ZERO));
    load.wait_for(100);
    load.stop();
    assert_eq!(vm.mark(), 200);
    let late = copy(&vm, "scsi1", "late.raw");

    assert!(vm.matching_prefix("scsi0", &first).unwrap() >= middle);
    assert!(vm.matching_prefix_between("scsi0", &first, 0..=middle).unwrap() <= middle);
    assert_eq!(vm.matching_instant(&[("scsi0", &first), ("scsi1", &second)], 0..=200).unwrap(), middle);
    let torn = vm.matching_instant(&[("scsi0", &first), ("scsi1", &late)], 0..=200).unwrap_err();
    assert!(torn.disks.iter().all(|(_, found)| found.is_ok()), "{torn}");
    vm.assert_equals_now("scsi1", &late);
    vm.assert_disk_intact("scsi0");

    let mut bytes = fs::read(&first).unwrap();
    bytes[3 * 65536 + 17] ^= 1;
    fs::write(&first, bytes).unwrap();
    let difference = vm.matching_prefix("scsi0", &first).unwrap_err();
    assert_eq!((difference.offset, difference.blocks), (Some(3 * 65536 + 17), 1), "{difference}");
    let short = vm.dir().join("short.raw");
    fs::write(&short, vec![0; 4096]).unwrap();
    assert!(vm.matching_prefix("scsi1", &short).is_err());
}

#[test]
fn a_seed_makes_the_same_load_again() {
    let run = || {
        let vm = VmBuilder::new().disk_spec(DiskSpec::new("scsi0", 4 * MIB)).paused().start();
        let load = vm.load(LoadPlan::seeded(3).operations(30).pause(Duration::ZERO));
        load.wait_for(30);
        load.stop();
        vm.writer().with_oracle(|oracle| oracle.log().to_vec())
    };
    assert_eq!(run(), run());
}

#[test]
fn an_error_that_the_guest_sees_is_told() {
    let vm = VmBuilder::new().disk_spec(DiskSpec::new("scsi0", MIB)).paused().start();
    vm.write("scsi0", 0, 512, 1);
    assert!(vm.writer().write("scsi0", 2 * MIB, 512, 1).unwrap_err().contains("failed"));
    vm.write("scsi0", 512, 512, 2);
    vm.assert_disk_intact("scsi0");
}

#[test]
fn clients_of_the_monitor_see_qemu_itself() {
    let vm = VmBuilder::new().disk_spec(DiskSpec::new("scsi0", MIB)).start();
    let stream = std::os::unix::net::UnixStream::connect(vm.qmp_socket()).unwrap();
    let peer = rustix::net::sockopt::socket_peercred(&stream).unwrap();
    assert_eq!(peer.pid.as_raw_nonzero().get(), vm.pid());
    let mut first = JsonStream::new(stream);
    assert!(first.next(Some(Duration::from_secs(5))).unwrap().unwrap()["QMP"].is_object());
    let mut second = JsonStream::new(std::os::unix::net::UnixStream::connect(vm.qmp_socket()).unwrap());
    assert!(second.next(Some(Duration::from_millis(300))).is_err(), "a second client waits");
    drop(first);
    assert!(second.next(Some(Duration::from_secs(5))).unwrap().unwrap()["QMP"].is_object());
    drop(second);
    let mut client = QmpClient::connect(&vm.qmp_socket(), Duration::from_secs(5)).unwrap();
    assert_eq!(client.ok("query-status", json!({}))["status"], "running");
    assert_eq!(client.execute("no-such", json!({})).unwrap_err().to_wire()["class"], "CommandNotFound");
    let seen: Vec<_> = vm.seen_commands().into_iter().map(|command| command.name).collect();
    assert_eq!(seen, ["qmp_capabilities", "query-status", "no-such"]);
}

#[test]
fn a_stopped_guest_does_not_write_and_goes_on_when_it_is_continued() {
    let vm = VmBuilder::new().disk_spec(DiskSpec::new("scsi0", 4 * MIB)).start();
    let load = vm.load(LoadPlan::seeded(4));
    load.wait_for(5);
    let mut client = QmpClient::connect(&vm.qmp_socket(), Duration::from_secs(5)).unwrap();
    client.ok("stop", json!({}));
    let mark = vm.mark();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(vm.mark(), mark);
    client.ok("cont", json!({}));
    load.wait_for(mark + 5);
    load.stop();
    vm.assert_disk_intact("scsi0");
}

#[test]
fn faults_hit_the_command_they_are_meant_for() {
    let vm = VmBuilder::new().disk_spec(DiskSpec::new("scsi0", MIB)).paused().start();
    let connect = || QmpClient::connect(&vm.qmp_socket(), Duration::from_secs(5)).unwrap();
    let add = json!({"driver": "null-co", "node-name": "n", "read-zeroes": true});
    let exists = || vm.qmp("query-named-block-nodes", json!({"flat": true})).to_string().contains("null-co");

    vm.fault("blockdev-add", 2, Fault::CloseBefore);
    vm.fault("blockdev-add", 1, Fault::Refuse(QmpFailure::generic("no")));
    let mut client = connect();
    assert_eq!(client.execute("blockdev-add", add.clone()), Err(QmpFailure::generic("no")));
    assert!(matches!(client.execute("blockdev-add", add.clone()), Err(QmpFailure::Lost(_))));
    assert!(!exists());
    vm.fault("blockdev-add", 1, Fault::CloseAfter);
    assert!(matches!(connect().execute("blockdev-add", add.clone()), Err(QmpFailure::Lost(_))));
    assert!(exists());
    connect().ok("blockdev-del", json!({"node-name": "n"}));
}

#[test]
fn leftovers_are_found_and_restarts_keep_the_disks() {
    let mut vm = VmBuilder::new().disk_spec(DiskSpec::new("scsi0", 4 * MIB)).paused().start();
    vm.write("scsi0", 0, MIB, 7);
    let before = BlockState::of(&vm);
    vm.assert_pristine(&before, &BitmapRule::None);
    vm.qmp("block-dirty-bitmap-add", json!({"node": vm.root_node("scsi0"), "name": "left"}));
    let panics = |what: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(what)).is_err();
    assert!(panics(&|| vm.assert_pristine(&before, &BitmapRule::Same)));
    vm.assert_pristine(&before, &BitmapRule::Where(&|bitmap| bitmap.name == "left"));
    vm.qmp("blockdev-add", json!({"driver": "null-co", "node-name": "left"}));
    assert!(panics(&|| vm.assert_pristine(&before, &BitmapRule::Where(&|_| true))));
    assert!(panics(&|| no_files_left(vm.dir())));

    assert!(vm.quit().success());
    vm.start_again();
    vm.assert_pristine(&before, &BitmapRule::None);
    vm.resize("scsi0", 6 * MIB);
    vm.write("scsi0", 5 * MIB, MIB, 9);
    vm.assert_disk_intact("scsi0");
    vm.kill();
    vm.start_again();
    vm.assert_disk_intact("scsi0");
}

#[test]
fn no_qemu_outlives_its_machine() {
    let vm = VmBuilder::new().disk_spec(DiskSpec::new("scsi0", MIB)).start();
    let dir = vm.dir().to_owned();
    let text = dir.display().to_string();
    assert_eq!(processes_about(&text, &[]).len(), 1);
    assert!(processes_about(&text, &[vm.pid()]).is_empty());
    let panicked = std::thread::spawn(move || {
        let _vm = vm;
        panic!("on purpose");
    });
    assert!(panicked.join().is_err());
    assert!(processes_about(&text, &[]).is_empty());
    assert!(!dir.exists());
}

/// A client's steps around an access on a Proxmox machine.
struct Client<'a> {
    vm: &'a Vm,
    qmp: QmpClient,
}

impl<'a> Client<'a> {
    fn new(vm: &'a Vm) -> Self {
        Self { vm, qmp: QmpClient::connect(&vm.qmp_socket(), Duration::from_secs(5)).unwrap() }
    }

    fn add_fleecing(&mut self, disk: &str, size: u64) {
        let file = self.vm.dir().join(format!("fleece-{disk}.raw"));
        fs::File::create(&file).unwrap().set_len(size).unwrap();
        self.qmp.ok(
            "blockdev-add",
            json!({"driver": "raw", "node-name": format!("drive-{disk}-fleecing"), "discard": "unmap",
                "file": {"driver": "file", "filename": file, "discard": "unmap"}}),
        );
    }

    fn set_up(&mut self, target: &str, devices: &[(&str, &str)]) -> Result<Value, QmpFailure> {
        let devices: Vec<Value> = devices
            .iter()
            .map(|(disk, mode)| json!({"device": format!("drive-{disk}"), "bitmap-mode": mode}))
            .collect();
        self.qmp.execute("backup-access-setup", json!({"target-id": target, "devices": devices}))
    }

    fn tear_down(&mut self, target: &str, success: bool) -> Result<Value, QmpFailure> {
        self.qmp.execute("backup-access-teardown", json!({"target-id": target, "success": success}))
    }

    fn export(&mut self, access: &Value) {
        let socket = self.vm.dir().join("nbd.sock");
        self.qmp.ok("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}}));
        for disk in access.as_array().unwrap() {
            let mut export = json!({"type": "nbd", "id": disk["device"], "name": disk["device"],
                "node-name": disk["node-name"], "writable": true});
            if disk.get("bitmap-name").is_some() {
                export["bitmaps"] = json!([{"node": disk["bitmap-node-name"], "name": disk["bitmap-name"]}]);
            }
            self.qmp.ok("block-export-add", export);
        }
    }

    fn uri(&self, disk: &str) -> String {
        format!("nbd+unix:///drive-{disk}?socket={}", self.vm.dir().join("nbd.sock").display())
    }

    /// `qemu-io` on the export: whether all commands succeed (patterns included), and what it prints.
    fn io(&self, disk: &str, commands: &[&str]) -> (bool, String) {
        let mut qemu_io = Command::new("qemu-io");
        qemu_io.args(["-f", "raw"]);
        for command in commands {
            qemu_io.args(["-c", command]);
        }
        let output = qemu_io.arg(self.uri(disk)).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        (output.status.success() && !text.contains("failed"), text)
    }

    /// The dirty ranges, in MiB.
    fn dirty(&self, disk: &str, target: &str) -> Vec<(u64, u64)> {
        let options = format!(
            "driver=nbd,server.type=unix,server.path={},export=drive-{disk},x-dirty-bitmap=qemu:dirty-bitmap:{target}",
            self.vm.dir().join("nbd.sock").display()
        );
        let output =
            Command::new("qemu-img").args(["map", "--output=json", "--image-opts", &options]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let map: Value = serde_json::from_slice(&output.stdout).unwrap();
        // With this option QEMU's client shows dirty ranges as holes.
        let dirty = map.as_array().unwrap().iter().filter(|extent| extent["data"] == false);
        dirty
            .map(|extent| (extent["start"].as_u64().unwrap() / MIB, extent["length"].as_u64().unwrap() / MIB))
            .collect()
    }

    fn bitmaps(&self) -> Vec<(String, String, u64, bool)> {
        let state = BlockState::of(self.vm);
        state.bitmaps.into_iter().map(|bitmap| (bitmap.node, bitmap.name, bitmap.count, bitmap.recording)).collect()
    }
}

fn sorted<T: Ord>(mut items: Vec<T>) -> Vec<T> {
    items.sort();
    items
}

const STORE: &str = "snapshot-access:store1";
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

#[test]
fn tiny_guest_keeps_the_order_between_disks() {
    let Some(kit) = TinyKit::or_skip() else { return };
    let task = TinyTask::Litmus { first: "vda".into(), second: "vdb".into(), slots: 4 };
    let vm = VmBuilder::new()
        .disk("virtio0", 4 * MIB, Bus::VirtioBlk, Style::Blockdev, Format::Raw, Io::Main)
        // No I/O thread: the machine is stopped and continued.
        .disk("virtio1", 4 * MIB, Bus::VirtioBlk, Style::Blockdev, Format::Raw, Io::Main)
        .tiny(kit, &task)
        .start();
    vm.wait_for_line("rig: litmus slot 0 at 256", BOOT_LIMIT);
    vm.qmp("stop", json!({}));
    let (first, second) = (copy(&vm, "virtio0", "first.raw"), copy(&vm, "virtio1", "second.raw"));
    let numbers = litmus(&first, &second, 4).unwrap();
    assert!(numbers.iter().any(|(_, b)| *b >= 255), "{numbers:?}");
    vm.qmp("cont", json!({}));
    vm.wait_for_new_line("rig: litmus slot 0", BOOT_LIMIT);
    vm.qmp("stop", json!({}));
    let late = copy(&vm, "virtio1", "late.raw");
    assert!(litmus(&first, &late, 4).is_err());
    let mut hole = fs::read(&first).unwrap();
    hole[17 * 4096..18 * 4096].fill(0);
    fs::write(&first, hole).unwrap();
    assert!(litmus(&first, &second, 4).unwrap_err().what.contains("missing"));
}

#[test]
fn tiny_guest_files_survive_a_copy_and_the_agent_freezes_them() {
    let Some(kit) = TinyKit::or_skip() else { return };
    let source = tempfile::tempdir().unwrap();
    let (content, image) = (source.path().join("content"), source.path().join("ext4.raw"));
    fs::create_dir(&content).unwrap();
    fs::write(content.join("marker"), "restored\n").unwrap();
    make_ext4(&image, 64 * MIB, Some(&content));
    let disk =
        |content: &std::path::Path| DiskSpec { content: Some(content.to_owned()), ..DiskSpec::new("scsi0", 64 * MIB) };
    let vm =
        VmBuilder::new().disk_spec(disk(&image)).agent().tiny(kit, &TinyTask::Files { disk: "sda".into() }).start();
    vm.wait_for_line("rig: files 16", BOOT_LIMIT);

    let mut agent = JsonStream::new(std::os::unix::net::UnixStream::connect(vm.agent_socket()).unwrap());
    let mut ask = |command: &str| {
        send(agent.socket(), &json!({"execute": command})).unwrap();
        agent.next(Some(BOOT_LIMIT)).unwrap().unwrap()["return"].clone()
    };
    assert_eq!(ask("guest-ping"), json!({}));
    assert_eq!(ask("guest-fsfreeze-freeze"), 1);
    assert_eq!(ask("guest-fsfreeze-status"), "frozen");
    let frozen = copy(&vm, "scsi0", "frozen.raw");
    std::thread::sleep(Duration::from_millis(200));
    assert!(fs::read(&frozen).unwrap() == fs::read(vm.image("scsi0")).unwrap(), "a frozen guest wrote");
    assert_eq!(ask("guest-fsfreeze-thaw"), 1);
    vm.wait_for_new_line("rig: files", BOOT_LIMIT);

    vm.qmp("stop", json!({}));
    let running = copy(&vm, "scsi0", "running.raw");
    drop(vm.qmp("cont", json!({})));
    for image in [&frozen, &running] {
        assert_ext4_sound(image);
    }
    let mut again =
        VmBuilder::new().disk_spec(disk(&running)).tiny(kit, &TinyTask::Check { disk: "sda".into() }).start();
    let checked = again.wait_for_line("rig: checked", BOOT_LIMIT);
    assert!(checked.ends_with(" 0 bad") && !checked.contains("checked 0 good"), "{checked}");
    // md5 of "restored\n"
    again.wait_for_line("rig: marker 59ec69fccca64cd638f1a7bf443b435c", Duration::from_secs(5));
    assert!(again.wait_end().success());
}

#[test]
fn proxmox_access_leaves_a_real_guest_with_iothreads_alone() {
    proxmox_access_leaves_a_real_guest_alone(Io::Thread, "new");
}

#[test]
fn proxmox_access_with_a_used_bitmap_leaves_a_real_guest_alone() {
    proxmox_access_leaves_a_real_guest_alone(Io::Main, "use");
}

/// The disks are as large as a granule, so that all of them is dirty, and readable, whenever the guest writes.
fn proxmox_access_leaves_a_real_guest_alone(io: Io, mode: &str) {
    let Some(kit) = TinyKit::or_skip() else { return };
    let task = TinyTask::Litmus { first: "vda".into(), second: "vdb".into(), slots: 4 };
    let mut vm = VmBuilder::new()
        .proxmox(100)
        .disk("virtio0", 4 * MIB, Bus::VirtioBlk, Style::Proxmox, Format::Raw, io)
        .disk("virtio1", 4 * MIB, Bus::VirtioBlk, Style::Proxmox, Format::Raw, io)
        .tiny(kit, &task)
        .start();
    vm.wait_for_line("rig: ready", BOOT_LIMIT);
    let before = BlockState::of(&vm);
    {
        let mut client = Client::new(&vm);
        for disk in ["virtio0", "virtio1"] {
            client.add_fleecing(disk, 4 * MIB);
        }
        for _ in 0..5 {
            let access = client.set_up(STORE, &[("virtio0", mode), ("virtio1", mode)]).unwrap();
            client.export(&access);
            let mut images = Vec::new();
            for disk in ["virtio0", "virtio1"] {
                let image = vm.dir().join(format!("snapshot-{disk}.raw"));
                let convert = ["convert", "-q", "-f", "raw", "-O", "raw", &client.uri(disk), image.to_str().unwrap()];
                assert!(Command::new("qemu-img").args(convert).status().unwrap().success());
                images.push(image);
            }
            // Proxmox sets its disks up one after the other, so they may differ by what was written in between; each by itself
            // is of one instant, and the second, which came later, is never behind.
            if let Err(torn) = litmus(&images[0], &images[1], 4) {
                assert!(torn.what.contains("on the second"), "{torn}");
            }
            client.qmp.ok("nbd-server-stop", json!({}));
            client.tear_down(STORE, true).unwrap();
            std::thread::sleep(Duration::from_millis(200));
        }
        for disk in ["virtio0", "virtio1"] {
            client.qmp.ok("blockdev-del", json!({"node-name": format!("drive-{disk}-fleecing")}));
        }
    }
    vm.wait_for_new_line("rig: litmus slot", BOOT_LIMIT);
    vm.assert_pristine(&before, &BitmapRule::Where(&|bitmap| bitmap.name == STORE));
    assert!(vm.is_alive() && !vm.serial().contains("litmus ended"), "{}{}", vm.serial(), vm.stderr());
    assert!(!vm.seen_commands().iter().any(|command| command.name == "stop"));
}
