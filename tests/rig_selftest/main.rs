//! The rig tests itself: what it says about a backup is worth no more than what it is worth itself.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "these are tests")]
mod client;
mod proxmox;
#[path = "../rig/mod.rs"]
mod rig;
mod tiny_guest;

use rig::*;
use serde_json::json;
use std::{fs, time::Duration};

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
