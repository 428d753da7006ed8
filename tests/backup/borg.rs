//! Real machines to a borg repository, by way of the segment view.

use crate::rig::{Bus, Format, Io, Kind, LoadPlan, MIB, Run, Site, Style, VmBuilder, old_qemu};
use std::{fs, path::PathBuf, process::Command, time::Duration};

/// Two disks, and the default target in a new borg repository.
fn site(kind: Kind) -> Option<Site> {
    if kind == Kind::Proxmox && old_qemu() {
        eprintln!("skipped: Proxmox VE's QEMU with backup access is 9.2 or newer");
        return None;
    }
    for needed in ["/usr/bin/borg", "/dev/fuse"] {
        if !PathBuf::from(needed).exists() {
            eprintln!("skipped: there is no {needed}");
            return None;
        }
    }
    let style = if kind == Kind::Proxmox { Style::Proxmox } else { Style::Blockdev };
    let vm = VmBuilder::new().disk("scsi0", 24 * MIB, Bus::VirtioScsi, style, Format::Raw, Io::Main).disk(
        "virtio1",
        16 * MIB + 512,
        Bus::VirtioBlk,
        style,
        Format::Qcow2,
        Io::Main,
    );
    let site = Site::new(kind, vm);
    let dir = site.program.dir().to_owned();
    fs::write(dir.join("passphrase"), "correct horse\n").unwrap();
    site.program.configure(&format!(
        "[defaults]\ntarget = 'attic'\n[target.attic]\nprovider = 'borg'\nrepository = '{0}/attic'\n\
         passphrase-file = '{0}/passphrase'\nlock-wait = '1s'\ncompression = 'zstd,1'\n",
        dir.display()
    ));
    site.backup(&[]).code(10);
    site.program.run(&["target", "init"]).ok();
    Some(site)
}

fn nothing_mounted(site: &Site) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(site.program.dir().to_str().unwrap()), "{mounts}");
    site.assert_nothing_left();
}

fn all(run: &Run, action: &str) {
    for disk in ["scsi0", "virtio1"] {
        assert_eq!(run.plan(disk).0, action, "{disk}: {}", run.plan(disk).1);
    }
}

/// Full, incrementals under load, idle, cache lost, archive lost, repository replaced.
fn history(kind: Kind, rounds: u64) {
    let Some(site) = site(kind) else { return };
    let (vm, program) = (&site.vm, &site.program);
    let disks = ["scsi0", "virtio1"];
    for disk in disks {
        vm.write(disk, 0, 4 * MIB, 0x11);
        vm.write(disk, 9 * MIB + 512, MIB, 0x21);
        vm.write_zeroes(disk, 2 * MIB, MIB);
    }
    let run = site.backup(&[]).ok();
    all(&run, "new");
    site.assert_restores_now(&disks);

    for round in 0..rounds {
        let load = vm.load(LoadPlan::seeded(round).pause(Duration::from_millis(5)));
        load.wait_for(5);
        let start = vm.mark();
        let run = site.backup(&["--require-incremental"]).ok();
        let end = vm.mark();
        load.stop();
        assert_eq!(run.summary()["incremental"], true);
        if round % 4 == 3 {
            site.assert_restores(&disks, start..=end);
        }
    }
    nothing_mounted(&site);

    site.backup(&["--require-incremental"]).ok();
    let run = site.backup(&["--require-incremental"]).ok();
    assert_eq!(run.read_bytes(), 0, "an idle disk is read");
    site.assert_restores_now(&disks);

    // borg's cache is gone: full by itself, and incremental again.
    vm.write("scsi0", 5 * MIB, MIB, 0x31);
    fs::remove_dir_all(program.state().join("borg/attic/cache")).unwrap();
    let run = site.backup(&[]).ok();
    assert_eq!(run.summary()["incremental"], false);
    assert!(run.plan("scsi0").1.contains("files cache"), "{}", run.plan("scsi0").1);
    site.assert_restores_now(&disks);
    vm.write("virtio1", 5 * MIB, MIB, 0x32);
    site.backup(&["--require-incremental"]).ok();
    site.assert_restores_now(&disks);

    // The last archive is gone.
    let name = program.run(&["info", "latest", "--guest", site.guest(), "--json"]).ok().stdout;
    let name: serde_json::Value = serde_json::from_str(name.lines().next().unwrap()).unwrap();
    let name = name["manifest"]["archive"].as_str().unwrap();
    borg(&site, &["delete", &format!("{}::{name}", program.dir().join("attic").display())]);
    let run = site.backup(&[]).ok();
    assert!(run.plan("scsi0").1.contains("not in the repository"), "{}", run.plan("scsi0").1);
    site.assert_restores_now(&disks);

    // The repository is another one.
    fs::remove_dir_all(program.dir().join("attic")).unwrap();
    program.run(&["target", "init"]).ok();
    let run = site.backup(&[]).ok();
    assert_eq!(run.summary()["incremental"], false);
    site.assert_restores_now(&disks);
    nothing_mounted(&site);
    for disk in disks {
        vm.assert_disk_intact(disk);
    }
}

fn borg(site: &Site, arguments: &[&str]) {
    let output = Command::new("borg")
        .args(arguments)
        .env("BORG_BASE_DIR", site.program.dir().join("user"))
        .env("BORG_PASSPHRASE", "correct horse")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn stock_history_into_borg() {
    history(Kind::Stock, 10);
}

#[test]
fn proxmox_history_into_borg() {
    history(Kind::Proxmox, 4);
}

#[test]
fn retention_in_borg() {
    let Some(site) = site(Kind::Stock) else { return };
    let mut all = Vec::new();
    for byte in 1..5 {
        site.vm.write("scsi0", MIB, MIB, byte);
        let more: &[&str] = if byte < 4 { &[] } else { &["--require-incremental", "--prune-backups", "keep-last=2"] };
        all.push(site.backup(more).ok().summary()["archive"].as_str().unwrap().to_owned());
    }
    let listed = || {
        let list = site.program.run(&["list", "--json"]).ok();
        list.events().iter().map(|line| line["archive"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(listed(), all[2..]);
    let run = site.program.run(&["prune"]).code(2);
    assert!(run.stderr.contains("prune-backups"), "{}", run.stderr);
    site.program.run(&["prune", "--prune-backups", "keep-last=1", "--dry-run"]).ok();
    assert_eq!(listed(), all[2..]);
    site.program.run(&["prune", "--prune-backups", "keep-last=1"]).ok();
    assert_eq!(listed(), all[3..]);
    borg(&site, &["check", &site.program.dir().join("attic").display().to_string()]);
    site.vm.write("virtio1", MIB, MIB, 9);
    site.backup(&["--require-incremental"]).ok();
    site.assert_restores_now(&["scsi0", "virtio1"]);
    nothing_mounted(&site);
}

#[test]
fn what_stands_in_the_way_of_borg_is_told() {
    let Some(site) = site(Kind::Stock) else { return };
    let dir = site.program.dir().to_owned();
    site.vm.write("scsi0", 0, MIB, 0x11);
    site.backup(&[]).ok();

    let mut holder = Command::new("borg")
        .args(["with-lock", &dir.join("attic").display().to_string(), "sleep", "6"])
        .env("BORG_BASE_DIR", dir.join("user"))
        .env("BORG_PASSPHRASE", "correct horse")
        .spawn()
        .unwrap();
    while !dir.join("attic/lock.exclusive").exists() {
        std::thread::sleep(Duration::from_millis(20));
    }
    site.backup(&[]).code(11);
    holder.wait().unwrap();

    fs::write(dir.join("passphrase"), "battery staple\n").unwrap();
    let run = site.backup(&[]).code(12);
    assert!(!run.stderr.contains("staple"), "{}", run.stderr);
    fs::write(dir.join("passphrase"), "correct horse\n").unwrap();

    let program = std::env::var("PATH").unwrap();
    let without = site.program.command(&["target", "test"]).env("PATH", "/nowhere").output().unwrap();
    assert_eq!(without.status.code(), Some(1), "PATH was {program}");
    let text = String::from_utf8_lossy(&without.stderr).into_owned();
    assert!(text.contains("`borg` is not installed"), "{text}");
    nothing_mounted(&site);
    site.backup(&["--require-incremental"]).ok();
    site.assert_restores_now(&["scsi0"]);
}

/// Killed while borg reads: borg may even finish, but what it makes is no archive, and the next run is right.
#[test]
fn a_run_that_is_killed_leaves_no_archive_in_borg() {
    let Some(site) = site(Kind::Stock) else { return };
    for disk in ["scsi0", "virtio1"] {
        site.vm.write(disk, 0, 12 * MIB, 0x41);
    }
    let mut child = site.start_backup(&["--bwlimit", "2MiB"]);
    let view = site.program.state().join("borg/attic/view/guest");
    while !fs::read_to_string("/proc/self/mountinfo").unwrap().contains(view.to_str().unwrap()) {
        assert!(child.try_wait().unwrap().is_none(), "it ended too soon");
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_millis(1500));
    child.kill().unwrap();
    child.wait().unwrap();
    // borg goes on without us, and holds the repository until it is done.
    std::thread::sleep(Duration::from_secs(3));
    let list = site.program.run(&["list", "--json"]).ok();
    assert!(!list.stdout.contains("pve-qemu-"), "{}", list.stdout);
    site.vm.write("scsi0", MIB, MIB, 0x42);
    let run = site.backup(&[]).code(3);
    assert!(run.stdout.contains("undone") || run.stderr.contains("undo"), "{}{}", run.stdout, run.stderr);
    site.assert_restores_now(&["scsi0", "virtio1"]);
    nothing_mounted(&site);
    site.backup(&["--require-incremental"]).ok();
    site.assert_restores_now(&["scsi0", "virtio1"]);
}
