//! A guest with an operating system: its own order of writes, a file system, an agent.

use crate::rig::{
    BOOT_LIMIT, Bus, DiskSpec, Format, Io, Kind, MIB, Site, Style, TinyKit, TinyTask, VmBuilder, assert_boots,
    assert_ext4_sound, litmus, make_ext4,
};
use std::{fs, path::Path, time::Duration};

fn style(kind: Kind) -> Style {
    if kind == Kind::Proxmox { Style::Proxmox } else { Style::Blockdev }
}

/// The guest writes n to one disk, flushed, and then to the other: in every archive the first is at the second's number or one
/// ahead.
fn litmus_of(kind: Kind) {
    let Some(kit) = TinyKit::or_skip() else { return };
    let task = TinyTask::Litmus { first: "vda".into(), second: "vdb".into(), slots: 4 };
    let vm = VmBuilder::new()
        .disk("virtio0", 8 * MIB, Bus::VirtioBlk, style(kind), Format::Raw, Io::Main)
        .disk("virtio1", 8 * MIB, Bus::VirtioBlk, style(kind), Format::Qcow2, Io::Main)
        .tiny(kit, &task);
    let site = Site::new(kind, vm);
    site.vm.wait_for_line("rig: litmus slot 0 at 256", BOOT_LIMIT);
    let mut last = 0;
    for round in 0..6 {
        let run = site.backup(&[]).ok();
        assert_eq!(run.summary()["incremental"], round > 0);
        let dir = site.program.restore(site.guest(), "latest");
        let numbers = litmus(&dir.join("virtio0.raw"), &dir.join("virtio1.raw"), 4)
            .unwrap_or_else(|torn| panic!("round {round}: {torn}"));
        let sum: u64 = numbers.iter().map(|(a, _)| a).sum();
        assert!(sum > last, "the guest stands still: {numbers:?}");
        last = sum;
        fs::remove_dir_all(dir).unwrap();
    }
    assert_eq!(site.vm.status(), "running");
    site.vm.wait_for_new_line("rig: litmus slot 0", BOOT_LIMIT);
    site.assert_nothing_left();
}

#[test]
fn disks_of_a_writing_guest_are_of_one_instant_on_stock_qemu() {
    litmus_of(Kind::Stock);
}

#[test]
fn disks_of_a_writing_guest_are_of_one_instant_on_proxmox() {
    litmus_of(Kind::Proxmox);
}

fn files_guest(kind: Kind, kit: &TinyKit, dir: &Path) -> Site {
    let (content, image) = (dir.join("content"), dir.join("ext4.raw"));
    fs::create_dir(&content).unwrap();
    fs::write(content.join("marker"), "restored\n").unwrap();
    make_ext4(&image, 64 * MIB, Some(&content));
    let disk = DiskSpec {
        content: Some(image),
        style: style(kind),
        format: Format::Qcow2,
        ..DiskSpec::new("scsi0", 64 * MIB)
    };
    let site =
        Site::new(kind, VmBuilder::new().disk_spec(disk).agent().tiny(kit, &TinyTask::Files { disk: "sda".into() }));
    site.vm.wait_for_line("rig: files 16", BOOT_LIMIT);
    site
}

fn agent_of(site: &Site) -> String {
    site.vm.agent_socket().display().to_string()
}

/// The file system is frozen for the instant, clean in the archive, and a machine boots from what was restored.
fn file_system_of(kind: Kind) {
    let Some(kit) = TinyKit::or_skip() else { return };
    let dir = tempfile::tempdir().unwrap();
    let site = files_guest(kind, kit, dir.path());
    let agent = agent_of(&site);
    let with_agent: Vec<&str> = if kind == Kind::Stock { vec!["--agent", &agent] } else { vec![] };
    let run = site.backup(&[&["--freeze", "require"], with_agent.as_slice()].concat()).ok();
    assert!(run.summary()["frozen_millis"].as_u64().is_some_and(|millis| millis < 30_000), "{}", run.summary());
    site.vm.wait_for_new_line("rig: files", BOOT_LIMIT);
    // And once more incrementally, without a freeze: crash consistent.
    let run = site.backup(&[&["--freeze", "off", "--require-incremental"], with_agent.as_slice()].concat()).ok();
    assert_eq!(run.summary()["frozen_millis"], 0);
    site.assert_nothing_left();
    for archive in ["latest~1", "latest"] {
        let restored = site.program.restore(site.guest(), archive);
        let image = restored.join("scsi0.raw");
        let manifest = fs::read_to_string(restored.join("manifest.json")).unwrap();
        assert_eq!(manifest.contains("\"frozen\": true"), archive == "latest~1", "{manifest}");
        assert_ext4_sound(&image);
        assert_boots(kit, DiskSpec { image: Some(image), ..DiskSpec::new("scsi0", 64 * MIB) });
    }
}

#[test]
fn a_restored_file_system_is_sound_and_a_machine_boots_from_it_on_stock_qemu() {
    file_system_of(Kind::Stock);
}

#[test]
fn a_restored_file_system_is_sound_and_a_machine_boots_from_it_on_proxmox() {
    file_system_of(Kind::Proxmox);
}

/// A run that is killed while the file systems are frozen: they are thawed all the same, by the watchdog.
#[test]
fn a_guest_is_thawed_and_resumed_when_the_run_is_killed() {
    let Some(kit) = TinyKit::or_skip() else { return };
    let dir = tempfile::tempdir().unwrap();
    let site = files_guest(Kind::Stock, kit, dir.path());
    let agent = agent_of(&site);
    // The first command of the micro-pause hangs: the file systems are frozen then.
    for command in ["stop", "transaction"] {
        site.vm.fault(command, 1, crate::rig::Fault::Stall(Duration::from_secs(20)));
        let mut child = site.start_backup(&["--agent", &agent, "--freeze", "require"]);
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        while !site.vm.seen_commands().iter().any(|seen| seen.name == command) {
            assert!(std::time::Instant::now() < deadline, "`{command}` never came");
            std::thread::sleep(Duration::from_millis(10));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // Nobody but the watchdog is left; the guest writes on.
        site.vm.wait_for_new_line("rig: files", Duration::from_mins(1));
        assert_eq!(site.vm.status(), "running");
        let run = site.backup(&["--agent", &agent]);
        assert!(matches!(run.code, Some(0 | 3)), "{}\n{}", run.stdout, run.stderr);
        site.assert_nothing_left();
    }
}
