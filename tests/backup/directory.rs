//! The target `directory`: {Proxmox, stock} × {full and incremental under load, idle}, each archive restored twice, by the
//! program and by nothing but `qemu-img convert`.

use crate::rig::{Bus, Format, Io, Kind, LoadPlan, MIB, Site, Style, VmBuilder, old_qemu};
use std::{
    ops::RangeInclusive,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

struct DirectorySite {
    site: Site,
    root: PathBuf,
    disks: Vec<String>,
}

impl DirectorySite {
    fn new(kind: Kind, vm: VmBuilder, more: &str) -> Self {
        let site = Site::new(kind, vm);
        let root = site.program.dir().join("repository");
        site.program.configure(&format!(
            "[defaults]\ntarget = 'images'\n[target.images]\nprovider = 'directory'\npath = '{}'\n{more}\n",
            root.display()
        ));
        let run = site.backup(&[]).code(10);
        assert!(run.stderr.contains("repository"), "{}", run.stderr);
        site.program.run(&["target", "init"]).ok();
        let disks: Vec<String> = site.vm.disks().map(str::to_owned).collect();
        for (number, disk) in disks.iter().enumerate() {
            site.vm.write(disk, 0, 4 * MIB, 0x11 + number as u8);
            site.vm.write(disk, 9 * MIB + 512, MIB, 0x21);
        }
        Self { site, root, disks }
    }

    fn disks(&self) -> Vec<&str> {
        self.disks.iter().map(String::as_str).collect()
    }

    /// Directories of the guest's archives, oldest first, and of failed backups.
    fn archives(&self) -> (Vec<PathBuf>, Vec<PathBuf>) {
        let mut all: Vec<PathBuf> = std::fs::read_dir(self.root.join(self.site.guest()))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.is_dir())
            .collect();
        all.sort();
        assert!(all.iter().all(|path| !path.display().to_string().ends_with(".partial")), "{all:?}");
        all.into_iter().partition(|path| path.extension().is_none())
    }

    /// The newest archive, by `pvebackup restore` and by `qemu-img convert`.
    #[track_caller]
    fn assert_restores(&self, window: RangeInclusive<usize>) {
        let disks = self.disks();
        self.site.assert_restores(&disks, window.clone());
        self.assert_converts(self.archives().0.last().unwrap(), window);
    }

    #[track_caller]
    fn assert_converts(&self, archive: &Path, window: RangeInclusive<usize>) {
        let out = tempfile::tempdir().unwrap();
        let images: Vec<(&str, PathBuf)> = self
            .disks()
            .into_iter()
            .map(|disk| {
                let (from, to) = (archive.join(format!("{disk}.qcow2")), out.path().join(format!("{disk}.raw")));
                let check = Command::new("qemu-img").arg("check").arg(&from).output().unwrap();
                assert!(check.status.success(), "{check:?}");
                let convert =
                    Command::new("qemu-img").args(["convert", "-O", "raw"]).args([&from, &to]).output().unwrap();
                assert!(convert.status.success(), "{convert:?}");
                (disk, to)
            })
            .collect();
        let pairs: Vec<(&str, &Path)> = images.iter().map(|(disk, path)| (*disk, path.as_path())).collect();
        if let Err(torn) = self.site.vm.matching_instant(&pairs, window) {
            panic!("{}: {torn}", archive.display());
        }
    }
}

fn two_disks(kind: Kind) -> VmBuilder {
    let style = if kind == Kind::Proxmox { Style::Proxmox } else { Style::Blockdev };
    VmBuilder::new().disk("scsi0", 48 * MIB, Bus::VirtioScsi, style, Format::Raw, Io::Main).disk(
        "sata1",
        32 * MIB + 512,
        Bus::Sata,
        style,
        Format::Qcow2,
        Io::Main,
    )
}

fn skipped(kind: Kind) -> bool {
    let skip = kind == Kind::Proxmox && old_qemu();
    if skip {
        eprintln!("skipped: Proxmox VE's QEMU with backup access is 9.2 or newer");
    }
    skip
}

fn history(kind: Kind) {
    if skipped(kind) {
        return;
    }
    let it = DirectorySite::new(kind, two_disks(kind), "");
    let (site, vm) = (&it.site, &it.site.vm);
    let mut windows = Vec::new();
    for seed in 1..6 {
        let load = vm.load(LoadPlan::seeded(seed).pause(Duration::from_millis(5)));
        load.wait_for(5);
        let start = vm.mark();
        let run = site.backup(if seed == 1 { &[] } else { &["--require-incremental"] }).ok();
        let end = vm.mark();
        load.stop();
        let expected = if seed == 1 { "new" } else { "used" };
        assert!(it.disks.iter().all(|disk| run.plan(disk).0 == expected), "{}", run.stdout);
        it.assert_restores(start..=end);
        site.assert_nothing_left();
        windows.push(start..=end);
    }
    // Zeroes over data must not let the backing file show through.
    for disk in it.disks() {
        vm.write_zeroes(disk, 0, 3 * MIB);
        vm.discard(disk, 9 * MIB, 2 * MIB);
    }
    site.backup(&["--require-incremental"]).ok();
    it.assert_restores(vm.mark()..=vm.mark());

    let run = site.backup(&["--require-incremental"]).ok();
    assert_eq!(run.read_bytes(), 0, "an idle disk is read");
    it.assert_restores(vm.mark()..=vm.mark());

    // Every archive still is what it was, and keeps its log.
    let (archives, failed) = it.archives();
    assert_eq!((archives.len(), failed.len()), (7, 0));
    for (archive, window) in archives.iter().zip(windows) {
        it.assert_converts(archive, window);
        let log = std::fs::read_to_string(archive.join("backup.log")).unwrap();
        assert!(log.contains("scsi0") && log.contains("ok"), "{log}");
    }
    let list = site.program.run(&["list", site.guest(), "--json"]).ok();
    assert_eq!(list.stdout.lines().count(), 7, "{}", list.stdout);
    let name = archives[0].file_name().unwrap().to_str().unwrap();
    let id = format!("{}/{name}", site.guest());
    site.program.run(&["info", &id]).ok();

    // A link is gone: a full backup, which is told.
    std::fs::remove_dir_all(&archives[2]).unwrap();
    site.backup(&["--require-incremental"]).code(24);
    let run = site.backup(&[]).ok();
    assert!(run.plan("scsi0").1.contains("there is no archive"), "{}", run.plan("scsi0").1);
    it.assert_restores(vm.mark()..=vm.mark());
    vm.write("scsi0", MIB, 4096, 0x77);
    site.backup(&["--require-incremental"]).ok();
    it.assert_restores(vm.mark()..=vm.mark());
    site.assert_nothing_left();
}

#[test]
fn stock_history_in_a_directory() {
    history(Kind::Stock);
}

#[test]
fn proxmox_history_in_a_directory() {
    history(Kind::Proxmox);
}

/// Incrementals forever, of which the newest three stay.
fn retention(kind: Kind) {
    if skipped(kind) {
        return;
    }
    let it = DirectorySite::new(kind, two_disks(kind), "prune-backups = 'keep-last=3'");
    let (site, vm) = (&it.site, &it.site.vm);
    let mut windows = Vec::new();
    for seed in 1..8 {
        let load = vm.load(LoadPlan::seeded(seed).pause(Duration::from_millis(5)));
        load.wait_for(5);
        let start = vm.mark();
        let run = site.backup(if seed == 1 { &[] } else { &["--require-incremental"] }).ok();
        windows.push(start..=vm.mark());
        load.stop();
        assert_eq!(run.stdout.contains("was removed"), seed > 3, "{}", run.stdout);
        let (archives, _) = it.archives();
        let first = windows.len().saturating_sub(3);
        assert_eq!(archives.len(), windows.len() - first);
        for (archive, window) in archives.iter().zip(&windows[first..]) {
            it.assert_converts(archive, window.clone());
        }
        site.assert_restores(&it.disks(), windows.last().unwrap().clone());
        site.assert_nothing_left();
    }
    let (archives, _) = it.archives();
    let info = |archive: &Path| {
        let output = Command::new("qemu-img").arg("info").arg(archive.join("scsi0.qcow2")).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(!info(&archives[0]).contains("backing file"), "the oldest needs no other");
    assert!(info(&archives[1]).contains("backing file"));
    let log = std::fs::read_to_string(archives[2].join("backup.log")).unwrap();
    assert!(log.contains("was removed"), "{log}");

    // By hand, with other rules.
    let by_hand = |more: &[&str]| site.program.run(&[&["prune", "--prune-backups", "keep-last=1"], more].concat());
    let run = by_hand(&["--dry-run"]).ok();
    assert_eq!(run.stdout.matches("would be merged").count(), 2, "{}", run.stdout);
    assert_eq!(it.archives().0.len(), 3);
    let run = by_hand(&[site.guest(), "--json"]).ok();
    let fates: Vec<String> = run.events().iter().map(|line| line["fate"].as_str().unwrap().to_owned()).collect();
    assert_eq!(fates, ["merged", "merged", "kept"]);
    assert_eq!(it.archives().0, archives[2..]);
    it.assert_restores(windows.last().unwrap().clone());
    assert!(!info(&archives[2]).contains("backing file"));
    vm.write("scsi0", MIB, 4096, 0x77);
    site.backup(&["--require-incremental", "--prune-backups", "keep-last=1"]).ok();
    assert_eq!(it.archives().0.len(), 1);
    it.assert_restores(vm.mark()..=vm.mark());
    site.program.run(&["prune", "--prune-backups", "keep-first=1"]).code(2);
    site.program.run(&["prune", "101"]).code(20);
}

#[test]
fn stock_retention_in_a_directory() {
    retention(Kind::Stock);
}

#[test]
fn proxmox_retention_in_a_directory() {
    retention(Kind::Proxmox);
}

#[test]
fn full_mode_reads_everything_every_time() {
    let it = DirectorySite::new(Kind::Stock, two_disks(Kind::Stock), "mode = 'full'");
    for _ in 0..2 {
        let run = it.site.backup(&[]).ok();
        assert_eq!(run.plan("scsi0").0, "new");
        it.site.vm.write("scsi0", MIB, 4096, 0x77);
    }
    let (archives, _) = it.archives();
    std::fs::remove_dir_all(&archives[0]).unwrap();
    it.site.backup(&[]).ok();
    it.assert_restores(it.site.vm.mark()..=it.site.vm.mark());
}

#[test]
fn a_backup_that_is_killed_or_stopped_costs_nothing_but_itself() {
    for kind in [Kind::Stock, Kind::Proxmox] {
        if skipped(kind) {
            continue;
        }
        let it = DirectorySite::new(kind, two_disks(kind), "");
        let (site, vm) = (&it.site, &it.site.vm);
        site.backup(&[]).ok();
        vm.write("scsi0", 4 * MIB, 16 * MIB, 0x41);
        let mut child = site.start_backup(&["--bwlimit", "4MiB"]);
        let partial = || {
            let entries = std::fs::read_dir(it.root.join(site.guest())).unwrap();
            entries.filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|e| e == "partial")).count()
        };
        while partial() == 0 {
            assert_eq!(child.try_wait().unwrap(), None, "it was to be killed");
            std::thread::sleep(Duration::from_millis(5));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        site.backup(&[]).code(3); // with the warning that the last run died
        assert_eq!(partial(), 0);
        it.assert_restores(vm.mark()..=vm.mark());
        site.assert_nothing_left();

        // Stopped by a signal: the log stays, no image does.
        vm.write("scsi0", 4 * MIB, 16 * MIB, 0x42);
        let child = site.start_backup(&["--bwlimit", "4MiB"]);
        while partial() == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{output:?}");
        let (_, failed) = it.archives();
        assert_eq!(failed.len(), 1, "{failed:?}");
        let left: Vec<_> = std::fs::read_dir(&failed[0]).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["backup.log"]);
        assert!(std::fs::read_to_string(failed[0].join("backup.log")).unwrap().contains("signal"));
        site.backup(&["--require-incremental"]).ok();
        it.assert_restores(vm.mark()..=vm.mark());
        site.assert_nothing_left();
    }
}
