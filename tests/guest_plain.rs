//! Finding the disks of a QEMU of which only the QMP socket is known.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod rig;

use pvebackup::{
    guest::{self, DiskKind, GuestError},
    qmp::Qmp,
};
use rig::{Bus, Format, Io, MIB, Style, VmBuilder};
use std::fs;

#[tokio::test(flavor = "multi_thread")]
async fn every_disk_that_the_guest_may_write_is_found_under_the_name_people_use() {
    let extra = tempfile::tempdir().unwrap();
    for (file, size) in [("vars", 528 << 10), ("code", 3568 << 10), ("iso", 1 << 20), ("ro", 1 << 20)] {
        fs::File::create(extra.path().join(file)).unwrap().set_len(size).unwrap();
    }
    let path = |file: &str| extra.path().join(file).display().to_string();
    let mut vm = VmBuilder::new()
        .disk("scsi0", 16 * MIB, Bus::VirtioScsi, Style::Blockdev, Format::Qcow2, Io::Main)
        .disk("virtio1", 8 * MIB, Bus::VirtioBlk, Style::Blockdev, Format::Raw, Io::Thread)
        .disk("sata0", 4 * MIB, Bus::Sata, Style::Drive, Format::Raw, Io::Main)
        .paused();
    for word in [
        "-name",
        "web server",
        "-drive",
        &format!("if=pflash,unit=0,format=raw,readonly=on,file={}", path("code")),
        "-drive",
        &format!("if=pflash,unit=1,format=raw,file={}", path("vars")),
        "-drive",
        &format!("if=ide,index=4,media=cdrom,format=raw,file={}", path("iso")),
        "-drive",
        "if=ide,index=5,media=cdrom",
        "-drive",
        &format!("if=virtio,format=raw,readonly=on,file={}", path("ro")),
    ] {
        vm = vm.arg(word);
    }
    let vm = vm.start();
    let guest = guest::plain::find("web".parse().unwrap(), vm.qmp_socket(), None).unwrap();
    let mut session = Qmp::new(&guest.qmp).session().await.unwrap();
    let found = guest::disks(&guest, &mut session).await.unwrap();
    drop(session);
    let mut disks: Vec<(&str, u64, DiskKind)> = found.disks.iter().map(|d| (d.name.as_str(), d.size, d.kind)).collect();
    disks.sort_by_key(|(name, ..)| *name);
    let expected = [
        ("pflash1", 528 << 10, DiskKind::Efi),
        ("sata0", 4 * MIB, DiskKind::Drive),
        ("scsi0", 16 * MIB, DiskKind::Drive),
        ("virtio1", 8 * MIB, DiskKind::Drive),
    ];
    assert_eq!(disks, expected);
    for disk in found.disks.iter().filter(|d| d.kind == DiskKind::Drive) {
        assert_eq!(disk.identity, vm.image(&disk.name).display().to_string());
        assert_eq!(disk.node, vm.root_node(&disk.name));
    }
    let reason = |name: &str| found.skipped.iter().find(|(n, _)| n.starts_with(name)).map(|(_, r)| r.as_str());
    assert_eq!(reason("pflash0"), Some("read-only"));
    assert_eq!(reason("ide4-cd0"), Some("CD-ROM drive"), "{:?}", found.skipped);
    assert_eq!(found.skipped.iter().filter(|(_, r)| r == "no medium").count(), 1, "{:?}", found.skipped);
    assert_eq!(found.skipped.iter().filter(|(_, r)| r == "read-only").count(), 2, "{:?}", found.skipped);

    assert_eq!(found.name.as_deref(), Some("web server"));
    let config: serde_json::Value = serde_json::from_slice(&found.config).unwrap();
    assert!(config["machine"].as_str().unwrap().contains("q35"), "{config}");
    assert_eq!(config["memory-bytes"], 128 * MIB);
    assert_eq!(config["processors"], 1);
    assert_eq!(config["block-devices"].as_array().unwrap().len(), 8);

    let names = |list: &[&str]| list.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
    let chosen = guest::select(found.clone(), &names(&["scsi0", "sata0"]), &names(&["sata0"])).unwrap();
    assert_eq!(chosen.disks.len(), 1);
    assert!(matches!(guest::select(found, &[], &names(&["sdz"])), Err(GuestError::NoSuchDisk { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_ended_is_not_running() {
    let mut vm = VmBuilder::new().paused().start();
    let guest = guest::plain::find("web".parse().unwrap(), vm.qmp_socket(), None).unwrap();
    vm.quit();
    let error = match Qmp::new(&guest.qmp).session().await {
        Ok(mut session) => guest::disks(&guest, &mut session).await.unwrap_err(),
        Err(error) => GuestError::of_qmp(&guest, error),
    };
    assert!(matches!(error, GuestError::NotRunning { .. }), "{error:?}");
}
