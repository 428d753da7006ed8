//! {Proxmox, stock} × {kinds of disks} × {full, incremental under load, idle, bitmap lost, resized, new disk}.

use crate::rig::{BlockState, Bus, Format, Io, Kind, LoadPlan, MIB, Site, Style, VmBuilder, old_qemu};
use serde_json::json;
use std::time::Duration;

/// Full under load, incremental under load, idle, bitmap lost, resized, new disk. Two disks, so that every comparison is one
/// of a single instant too.
fn history(kind: Kind, vm: VmBuilder) {
    if kind == Kind::Proxmox && old_qemu() {
        eprintln!("skipped: Proxmox VE's QEMU with backup access is 9.2 or newer");
        return;
    }
    let site = Site::new(kind, vm);
    let (vm, program) = (&site.vm, &site.program);
    let disks: Vec<String> = vm.disks().map(str::to_owned).collect();
    let disks: Vec<&str> = disks.iter().map(String::as_str).collect();
    let (first, second) = (disks[0], disks[1]);
    for (number, disk) in disks.iter().enumerate() {
        vm.write(disk, 0, 4 * MIB, 0x11 + number as u8);
        vm.write(disk, 9 * MIB + 512, MIB, 0x21);
        vm.write_zeroes(disk, 2 * MIB, MIB);
    }

    // Only the first disk at first: the second is a new one later.
    let load = vm.load(LoadPlan::seeded(1));
    load.wait_for(5);
    let start = vm.mark();
    let run = site.backup(&["--disk", first]).ok();
    let end = vm.mark();
    load.stop();
    assert_eq!(run.plan(first).0, "new");
    site.assert_restores(&[first], start..=end);
    site.assert_nothing_left();

    // The first incrementally, the second in full, both at one instant.
    let load = vm.load(LoadPlan::seeded(2));
    load.wait_for(5);
    let start = vm.mark();
    let run = site.backup(&[]).ok();
    let end = vm.mark();
    load.stop();
    assert_eq!(run.plan(first).0, "used", "{}", run.plan(first).1);
    assert_eq!(run.plan(second).0, "new");
    assert!(run.plan(second).1.contains("first backup"), "{}", run.plan(second).1);
    site.assert_restores(&disks, start..=end);

    // Everything incrementally, under load.
    for seed in 3..6 {
        let load = vm.load(LoadPlan::seeded(seed).pause(Duration::from_millis(5)));
        load.wait_for(5);
        let start = vm.mark();
        let run = site.backup(&["--require-incremental"]).ok();
        let end = vm.mark();
        load.stop();
        assert_eq!(run.summary()["incremental"], true);
        site.assert_restores(&disks, start..=end);
        site.assert_nothing_left();
    }

    // Nothing is written between these two: the second reads nothing.
    site.backup(&["--require-incremental"]).ok();
    let run = site.backup(&["--require-incremental"]).ok();
    assert_eq!(run.read_bytes(), 0, "an idle disk is read");
    site.assert_restores_now(&disks);

    // A bitmap is gone: that disk in full, and only that one.
    let state = BlockState::of(vm);
    let record =
        std::fs::read_to_string(program.state().join(format!("generations/local/{}.json", site.guest()))).unwrap();
    let record: serde_json::Value = serde_json::from_str(&record).unwrap();
    let (node, name) = (&record["disks"][first]["node"], &record["disks"][first]["bitmap"]);
    assert!(state.bitmaps.iter().any(|b| *node == *b.node && *name == *b.name), "{record} {state:?}");
    vm.qmp("block-dirty-bitmap-remove", json!({"node": node, "name": name}));
    vm.write(second, 5 * MIB, 64 * 1024, 0x77);
    let run = site.backup(&[]).ok();
    assert_eq!(run.plan(first).0, "missing-recreated");
    assert_eq!(run.plan(second).0, "used");
    site.assert_restores_now(&disks);

    // The disk grows: in full again, and what is new is there.
    let size = vm.spec(first).size + 8 * MIB;
    vm.resize(first, size);
    vm.write(first, size - MIB, MIB, 0x5a);
    let run = site.backup(&[]).ok();
    assert_eq!(run.plan(first).0, "new");
    assert!(run.plan(first).1.contains("resized"), "{}", run.plan(first).1);
    site.assert_restores_now(&disks);
    vm.write(first, size - 2 * MIB, 512, 0x5b);
    site.backup(&["--require-incremental"]).ok();
    site.assert_restores_now(&disks);

    // Two archives back is still what it was then: every archive stands for itself.
    let list = program.run(&["list", site.guest(), "--json"]).ok();
    assert!(list.stdout.lines().count() >= 9, "{}", list.stdout);
    site.assert_nothing_left();
    for disk in disks {
        vm.assert_disk_intact(disk);
    }
}

fn vm() -> VmBuilder {
    VmBuilder::new()
}

/// An iothread, but on the oldest QEMU: there any NBD export of a disk with one ends the process.
fn iothread() -> Io {
    if old_qemu() { Io::Main } else { Io::Thread }
}

#[test]
fn a_disk_with_an_iothread_is_refused_on_qemu_7() {
    if !old_qemu() {
        eprintln!("skipped: this QEMU is newer");
        return;
    }
    let vm = vm().disk("scsi0", 16 * MIB, Bus::VirtioScsi, Style::Blockdev, Format::Raw, Io::Thread);
    let site = Site::new(Kind::Stock, vm);
    let run = site.backup(&[]).code(21);
    assert!(run.stderr.contains("iothread"), "{}", run.stderr);
    site.assert_nothing_left();
}

#[test]
fn stock_virtio_blk_raw_and_qcow2_with_iothread() {
    let vm = vm().disk("virtio0", 48 * MIB, Bus::VirtioBlk, Style::Blockdev, Format::Raw, Io::Main).disk(
        "virtio1",
        32 * MIB,
        Bus::VirtioBlk,
        Style::Blockdev,
        Format::Qcow2,
        iothread(),
    );
    history(Kind::Stock, vm);
}

#[test]
fn stock_virtio_scsi_with_iothread_and_virtio_blk_by_drive() {
    let vm = vm().disk("scsi0", 48 * MIB, Bus::VirtioScsi, Style::Drive, Format::Raw, iothread()).disk(
        "virtio1",
        32 * MIB,
        Bus::VirtioBlk,
        Style::Drive,
        Format::Qcow2,
        Io::Main,
    );
    history(Kind::Stock, vm);
}

#[test]
fn stock_ide_raw_and_sata_qcow2() {
    let vm = vm().disk("ide0", 32 * MIB, Bus::Ide, Style::Blockdev, Format::Raw, Io::Main).disk(
        "sata1",
        32 * MIB + 512,
        Bus::Sata,
        Style::Drive,
        Format::Qcow2,
        Io::Main,
    );
    history(Kind::Stock, vm);
}

#[test]
fn stock_virtio_scsi_qcow2_and_virtio_blk_by_drive_with_iothread() {
    let vm = vm().disk("scsi0", 32 * MIB, Bus::VirtioScsi, Style::Blockdev, Format::Qcow2, Io::Main).disk(
        "virtio1",
        48 * MIB,
        Bus::VirtioBlk,
        Style::Drive,
        Format::Raw,
        iothread(),
    );
    history(Kind::Stock, vm);
}

#[test]
fn proxmox_virtio_scsi_raw_and_virtio_blk_qcow2_with_iothread() {
    let vm = vm().disk("scsi0", 48 * MIB, Bus::VirtioScsi, Style::Proxmox, Format::Raw, Io::Main).disk(
        "virtio1",
        32 * MIB,
        Bus::VirtioBlk,
        Style::Proxmox,
        Format::Qcow2,
        iothread(),
    );
    history(Kind::Proxmox, vm);
}

#[test]
fn proxmox_older_layout_by_drive() {
    let vm = vm().disk("scsi0", 40 * MIB, Bus::VirtioScsi, Style::Drive, Format::Qcow2, iothread()).disk(
        "virtio1",
        30 * MIB,
        Bus::VirtioBlk,
        Style::Drive,
        Format::Raw,
        Io::Main,
    );
    history(Kind::Proxmox, vm);
}

#[test]
fn proxmox_ide_and_sata() {
    let vm = vm().disk("ide0", 32 * MIB, Bus::Ide, Style::Proxmox, Format::Raw, Io::Main).disk(
        "sata1",
        32 * MIB + 512,
        Bus::Sata,
        Style::Proxmox,
        Format::Qcow2,
        Io::Main,
    );
    history(Kind::Proxmox, vm);
}
