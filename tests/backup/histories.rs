//! Long histories: incremental backups of a guest that writes, discards and grows its disks, with backups in between that fail,
//! are stopped, and are killed. At the end *every* archive is compared, byte for byte, for one instant of all its disks.
//!
//! `PVEBACKUP_FAULTS_SEED`, which is printed, repeats one. Ten times as long, on larger disks:
//! `PVEBACKUP_FAULTS=long cargo nextest run --profile faults --test backup histories`.

use crate::rig::{Bus, Format, GIB, Io, Kind, LoadPlan, MIB, Random, Run, Site, Style, VmBuilder, borg, old_qemu};
use serde_json::Value;
use std::{
    fs::{self, File},
    ops::RangeInclusive,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Incremental backups in a history.
const INCREMENTALS: usize = 30;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Target {
    Restic,
    Borg,
    Directory,
}

/// An archive, and between which of the guest's operations its instant lies.
struct Archived {
    id: String,
    window: RangeInclusive<usize>,
}

struct History {
    site: Site,
    target: Target,
    disks: [&'static str; 2],
    random: Random,
    archives: Vec<Archived>,
    incrementals: usize,
    failures: usize,
    /// Whether the last run was killed.
    died: bool,
    resizes: usize,
}

fn long() -> bool {
    std::env::var("PVEBACKUP_FAULTS").is_ok_and(|value| value == "long")
}

fn seed() -> u64 {
    if let Ok(text) = std::env::var("PVEBACKUP_FAULTS_SEED") {
        return text.parse().expect("PVEBACKUP_FAULTS_SEED is a number");
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    now.as_nanos() as u64 % 1_000_000_007
}

fn missing(kind: Kind, target: Target) -> bool {
    if kind == Kind::Proxmox && old_qemu() {
        eprintln!("skipped: Proxmox VE's QEMU with backup access is 9.2 or newer");
        return true;
    }
    target == Target::Borg && !borg::possible()
}

fn history(kind: Kind, target: Target) {
    if missing(kind, target) {
        return;
    }
    let seed = seed();
    println!("PVEBACKUP_FAULTS_SEED={seed}");
    let mut history = History::begin(kind, target, seed);
    history.go(match (long(), target, kind) {
        (true, ..) => 10 * INCREMENTALS,
        // Some 90 s of processor time less in every test run; borg sees nothing of the kind of access.
        (false, Target::Borg, Kind::Proxmox) => INCREMENTALS / 3,
        _ => INCREMENTALS,
    });
    history.compare();
}

impl History {
    fn begin(kind: Kind, target: Target, seed: u64) -> Self {
        let style = if kind == Kind::Proxmox { Style::Proxmox } else { Style::Blockdev };
        let size = if long() { 32 * MIB } else { 8 * MIB };
        // The second ends in the middle of a segment, and is no whole number of clusters.
        let vm = VmBuilder::new().disk("scsi0", size, Bus::VirtioScsi, style, Format::Raw, Io::Main).disk(
            "virtio1",
            size + MIB / 8 + 512,
            Bus::VirtioBlk,
            style,
            Format::Qcow2,
            Io::Main,
        );
        let site = Site::new(kind, vm);
        let dir = site.program.dir().display().to_string();
        fs::write(site.program.dir().join("passphrase"), "correct horse\n").unwrap();
        let table = match target {
            Target::Restic => format!("provider = 'restic'\nrepository = '{dir}/r'\npassword-file = '{dir}/key'\n"),
            Target::Borg => format!(
                "provider = 'borg'\nrepository = '{dir}/r'\npassphrase-file = '{dir}/passphrase'\nlock-wait = '20s'\n"
            ),
            Target::Directory => format!("provider = 'directory'\npath = '{dir}/r'\n"),
        };
        // borg stores small changes of long segments by themselves.
        let segment = if target == Target::Borg { "512KiB" } else { "64KiB" };
        site.program.configure(&format!("[defaults]\ntarget = 't'\nsegment-size = '{segment}'\n[target.t]\n{table}"));
        site.program.run(&["target", "init"]).ok();
        let disks = ["scsi0", "virtio1"];
        for disk in disks {
            site.vm.write(disk, 0, 2 * MIB, 0x11);
            site.vm.write(disk, 4 * MIB + 512, MIB, 0x21);
        }
        let random = Random::new(seed);
        Self {
            site,
            target,
            disks,
            random,
            archives: Vec::new(),
            incrementals: 0,
            failures: 0,
            died: false,
            resizes: 0,
        }
    }

    fn go(&mut self, incrementals: usize) {
        self.step(false);
        let mut steps = 1;
        while self.incrementals < incrementals {
            // In every history, each of them; when, says chance.
            match steps % 10 {
                3 => self.fail(),
                8 => self.killed(),
                6 => self.cancelled(),
                9 => self.resize(),
                _ => {}
            }
            if self.random.below(4) == 0 {
                self.discard();
            }
            let under_load = self.random.below(3) > 0;
            self.step(under_load);
            steps += 1;
        }
        self.site.assert_nothing_left();
        let (failures, resizes) = (self.failures, self.resizes);
        let enough = failures >= 3 * incrementals / 10 && resizes >= incrementals / 10;
        assert!(enough, "{failures} failures, {resizes} resizes");
    }

    /// A backup under load, or with the changes of a moment before.
    fn step(&mut self, under_load: bool) {
        let vm = &self.site.vm;
        let plan = LoadPlan::seeded(self.random.next());
        let load = if under_load {
            let load = vm.load(plan.pause(Duration::from_millis(4)));
            load.wait_for(3);
            Some(load)
        } else {
            let operations = self.random.below(6) as usize;
            vm.load(plan.operations(operations)).wait_for(operations);
            None
        };
        let start = vm.mark();
        let run = self.site.backup(&[]).code(if self.died { 3 } else { 0 });
        self.died = false;
        let end = vm.mark();
        if let Some(load) = load {
            load.stop();
        }
        self.keep(&run, start..=end);
    }

    fn keep(&mut self, run: &Run, window: RangeInclusive<usize>) {
        let summary = run.summary();
        let used = self.disks.iter().filter(|disk| run.plan(disk).0 == "used").count();
        // Only a resize, and the beginning, are reasons to read a disk in full.
        for disk in self.disks {
            let (action, reason) = run.plan(disk);
            let expected = self.archives.is_empty() || reason.contains("resized");
            assert!(action == "used" || expected, "{disk}: {action}: {reason}");
        }
        self.incrementals += usize::from(used == self.disks.len());
        self.archives.push(Archived { id: summary["archive"].as_str().unwrap().to_owned(), window });
    }

    fn discard(&mut self) {
        let size = self.site.vm.writer().size("scsi0");
        let offset = self.random.below(size / MIB) * MIB;
        self.site.vm.discard("scsi0", offset, (MIB / 2 + self.random.below(MIB / 512) * 512).min(size - offset));
    }

    fn resize(&mut self) {
        let disk = self.disks[self.random.below(2) as usize];
        let size = self.site.vm.writer().size(disk) + (1 + self.random.below(4)) * (MIB / 4) + 512;
        self.site.vm.resize(disk, size);
        if self.random.below(2) == 0 {
            self.site.vm.write(disk, size - MIB / 8, MIB / 8, 0x5a);
        }
        self.resizes += 1;
    }

    fn busy(&self) {
        for disk in self.disks {
            self.site.vm.write(disk, MIB, 3 * MIB, 1 + (self.archives.len() % 250) as u8);
        }
    }

    /// Stopped by a signal in the middle of the copy.
    fn cancelled(&mut self) {
        self.busy();
        let child = self.site.start_backup(&["--bwlimit", "1MiB"]);
        self.wait_for_exports(&child);
        std::thread::sleep(Duration::from_millis(200 + self.random.below(400)));
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(143), "{}", String::from_utf8_lossy(&output.stdout));
        self.failures += 1;
    }

    fn wait_for_exports(&self, child: &Child) {
        let socket = self.site.program.run_dir().join(self.site.guest()).join("nbd.sock");
        for _ in 0..3000 {
            if socket.exists() {
                return;
            }
            assert!(Path::new(&format!("/proc/{}", child.id())).exists(), "it ended too soon");
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the copy did not begin in 30 s");
    }

    /// What the provider writes to goes away under the running backup.
    fn fail(&mut self) {
        self.busy();
        let repository = self.site.program.dir().join("r");
        let child = self.site.start_backup(&["--bwlimit", "2MiB"]);
        self.wait_for_exports(&child);
        let (data, away) = (repository.join("data"), repository.join("data.away"));
        if self.target == Target::Directory {
            let guest = repository.join(self.site.guest());
            let partial = || {
                let mut entries = fs::read_dir(&guest).unwrap().map(|entry| entry.unwrap().path());
                entries.find(|path| path.extension().is_some_and(|ending| ending == "partial"))
            };
            let found = std::iter::repeat_with(partial).find_map(|found| {
                std::thread::sleep(Duration::from_millis(5));
                found
            });
            // It may still be making files there.
            while fs::remove_dir_all(found.as_ref().unwrap()).is_err() {}
        } else {
            fs::rename(&data, &away).unwrap();
            fs::write(&data, b"").unwrap();
        }
        let output = child.wait_with_output().unwrap();
        if self.target != Target::Directory {
            fs::remove_file(&data).unwrap();
            fs::rename(&away, &data).unwrap();
        }
        assert!(!output.status.success(), "{:?}: {}", self.target, String::from_utf8_lossy(&output.stdout));
        self.failures += 1;
    }

    /// Killed in the middle of the copy; the next run says that it found that.
    fn killed(&mut self) {
        self.busy();
        let mut child = self.site.start_backup(&["--bwlimit", "1MiB"]);
        self.wait_for_exports(&child);
        std::thread::sleep(Duration::from_millis(self.random.below(400)));
        child.kill().unwrap();
        child.wait().unwrap();
        self.died = true;
        self.failures += 1;
    }

    /// Gets an archive's disks back with nothing but borg: its segments, each at its place, and the fine ones over them.
    fn extract(&self, archive: &str) -> PathBuf {
        let (dir, repository) = (self.site.program.dir().join("extracted"), self.site.program.dir().join("r"));
        fs::create_dir(&dir).unwrap();
        let output = Command::new("borg")
            .args(["extract", &format!("{}::{archive}", repository.display())])
            .current_dir(&dir)
            .env("BORG_BASE_DIR", self.site.program.dir().join("user"))
            .env("BORG_PASSPHRASE", "correct horse")
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let manifest: Value = serde_json::from_slice(&fs::read(dir.join("manifest.json")).unwrap()).unwrap();
        for disk in manifest["disks"].as_array().unwrap() {
            let name = disk["name"].as_str().unwrap();
            let image = File::create(dir.join(format!("{name}.raw"))).unwrap();
            image.set_len(disk["size"].as_u64().unwrap()).unwrap();
            let entries = |dir: &Path| {
                let entries = fs::read_dir(dir).into_iter().flatten().map(|entry| entry.unwrap().path());
                entries.collect::<Vec<_>>()
            };
            let layers = [(name.to_owned(), disk["segment_len"].as_u64().unwrap()), (format!("{name}+64k"), 64 << 10)];
            for (layer, len) in layers {
                let layer = dir.join("disks").join(layer);
                for segment in entries(&layer).iter().flat_map(|shard| entries(shard)) {
                    let index = u64::from_str_radix(segment.file_name().unwrap().to_str().unwrap(), 16).unwrap();
                    image.write_all_at(&fs::read(segment).unwrap(), index * len).unwrap();
                }
            }
        }
        dir
    }

    /// Every archive there is, each against the guest's whole history.
    fn compare(&self) {
        let list = self.site.program.run(&["list", self.site.guest(), "--json"]).ok();
        let mut listed: Vec<String> =
            list.events().iter().map(|line| line["archive"].as_str().unwrap().to_owned()).collect();
        let mut known: Vec<String> = self.archives.iter().map(|archive| archive.id.clone()).collect();
        listed.sort();
        known.sort();
        assert_eq!(listed, known, "all archives, and no others");
        for (number, archive) in self.archives.iter().enumerate() {
            // A restore starts borg many times, so most archives are read by borg itself.
            let dir = if self.target == Target::Borg && number % 8 != 7 {
                self.extract(&archive.id)
            } else {
                self.site.program.restore(self.site.guest(), &archive.id)
            };
            let images = self.disks.map(|disk| dir.join(format!("{disk}.raw")));
            let pairs = [(self.disks[0], images[0].as_path()), (self.disks[1], images[1].as_path())];
            if let Err(torn) = self.site.vm.matching_instant(&pairs, archive.window.clone()) {
                panic!("{}: {torn}", archive.id);
            }
            fs::remove_dir_all(dir).unwrap();
        }
        for disk in self.disks {
            self.site.vm.assert_disk_intact(disk);
        }
        println!(
            "{} archives right, {} of them incremental, {} failed runs, {} resizes, {} operations",
            self.archives.len(),
            self.incrementals,
            self.failures,
            self.resizes,
            self.site.vm.mark()
        );
    }
}

#[test]
fn every_archive_of_a_long_history_stock_restic() {
    history(Kind::Stock, Target::Restic);
}

#[test]
fn every_archive_of_a_long_history_proxmox_restic() {
    history(Kind::Proxmox, Target::Restic);
}

#[test]
fn every_archive_of_a_long_history_stock_borg() {
    history(Kind::Stock, Target::Borg);
}

#[test]
fn every_archive_of_a_long_history_proxmox_borg() {
    history(Kind::Proxmox, Target::Borg);
}

#[test]
fn every_archive_of_a_long_history_stock_directory() {
    history(Kind::Stock, Target::Directory);
}

#[test]
fn every_archive_of_a_long_history_proxmox_directory() {
    history(Kind::Proxmox, Target::Directory);
}

/// The second backup of a large disk that nobody wrote to meanwhile.
fn idle(kind: Kind) {
    if missing(kind, Target::Borg) {
        return;
    }
    let style = if kind == Kind::Proxmox { Style::Proxmox } else { Style::Blockdev };
    let vm = VmBuilder::new().disk("scsi0", 4 * GIB, Bus::VirtioScsi, style, Format::Raw, Io::Main);
    let site = Site::new(kind, vm);
    let dir = site.program.dir().display().to_string();
    site.program.configure(&format!(
        "[target.borg]\nprovider = 'borg'\nrepository = '{dir}/b'\nencryption = 'none'\nlock-wait = '20s'\n\
         [target.images]\nprovider = 'directory'\npath = '{dir}/i'\n"
    ));
    for at in 0..16 {
        site.vm.write("scsi0", at * GIB / 4, 2 * MIB, 1 + at as u8);
    }
    for target in ["borg", "images"] {
        site.program.run(&["target", "init", target]).ok();
        site.backup(&["--target", target]).ok();
        let run = site.backup(&["--target", target, "--require-incremental"]).ok();
        assert_eq!(run.read_bytes(), 0, "{target}: an idle disk is read");
        let seconds = run.summary()["duration"].as_f64().unwrap();
        println!("{target}: {seconds} s");
        assert!(seconds < 30.0, "{target}: {seconds} s for nothing");
        // And the one after a single write reads no more than that.
        site.vm.write("scsi0", GIB + MIB, 4096, 0x77);
        let run = site.backup(&["--target", target, "--require-incremental"]).ok();
        assert!((4096..=4 * MIB).contains(&run.read_bytes()), "{target}: {} bytes for one write", run.read_bytes());
    }
    site.assert_nothing_left();
}

#[test]
fn an_idle_disk_of_4_gib_is_not_read_stock() {
    idle(Kind::Stock);
}

#[test]
fn an_idle_disk_of_4_gib_is_not_read_proxmox() {
    idle(Kind::Proxmox);
}
