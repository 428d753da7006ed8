//! Guests that run code, and what they tell of their disks.

use crate::{
    client::{Client, STORE},
    copy,
    rig::*,
};
use serde_json::json;
use std::{fs, process::Command, time::Duration};

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
    assert_boots(kit, disk(&running));
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
