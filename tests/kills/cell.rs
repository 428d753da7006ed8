//! One provider on one kind of access: a guest under load, its archives, and the checks after a run was killed.

use crate::rig::{
    BlockState, Bus, Format, Io, Kind, Load, LoadPlan, MIB, Run, Site, Style, Verdict, VmBuilder, borg, old_qemu,
};
use serde_json::Value;
use std::{
    fs,
    ops::RangeInclusive,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    time::{Duration, Instant},
};

/// How long the watchdog may take to let the guest go on, and children of a killed run to end.
const AFTERMATH: Duration = Duration::from_secs(20);

pub const DISKS: [&str; 2] = ["scsi0", "virtio1"];
const SIZE: u64 = 8 * MIB;

/// Where to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Provider {
    Restic,
    Borg,
    Directory,
}

impl Provider {
    pub fn name(self) -> &'static str {
        match self {
            Self::Restic => "restic",
            Self::Borg => "borg",
            Self::Directory => "directory",
        }
    }
}

/// How a case goes on after the kill.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Then {
    /// `pvebackup recover`, then the next backup.
    Recover,
    /// The next backup, which has to recover by itself.
    Backup,
}

pub struct Cell {
    pub site: Site,
    seed: u64,
    /// Archives, and between which of the guest's operations their instants lie.
    archives: Vec<(String, RangeInclusive<usize>)>,
}

pub fn access_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Stock => "stock",
        Kind::Proxmox => "proxmox",
    }
}

/// Whether the cell can be tried here.
pub fn possible(provider: Provider, kind: Kind) -> bool {
    if kind == Kind::Proxmox && old_qemu() {
        eprintln!("skipped: Proxmox VE's QEMU with backup access is 9.2 or newer");
        return false;
    }
    provider != Provider::Borg || borg::possible()
}

impl Cell {
    /// A guest with two small disks, and its first backup.
    pub fn new(provider: Provider, kind: Kind, seed: u64) -> Self {
        let style = if kind == Kind::Proxmox { Style::Proxmox } else { Style::Blockdev };
        let vm = VmBuilder::new().disk(DISKS[0], SIZE, Bus::VirtioScsi, style, Format::Raw, Io::Main).disk(
            DISKS[1],
            SIZE,
            Bus::VirtioBlk,
            style,
            Format::Qcow2,
            Io::Main,
        );
        let site = Site::new(kind, vm);
        let dir = site.program.dir().display().to_string();
        // A restic repository is the default.
        let target = match provider {
            Provider::Restic => None,
            Provider::Borg => Some(format!(
                "provider = 'borg'\nrepository = '{dir}/attic'\nencryption = 'none'\nlock-wait = '2s'\ncompression = 'none'\n"
            )),
            Provider::Directory => Some(format!("provider = 'directory'\npath = '{dir}/attic'\n")),
        };
        if let Some(target) = target {
            site.program.configure(&format!("[defaults]\ntarget = 'attic'\n[target.attic]\n{target}"));
            site.program.run(&["target", "init"]).ok();
        }
        for (number, disk) in DISKS.into_iter().enumerate() {
            site.vm.write(disk, 0, 3 * MIB, 0x11 + number as u8);
            site.vm.write(disk, 5 * MIB + 512, MIB, 0x21);
        }
        let mut cell = Self { site, seed, archives: Vec::new() };
        cell.backup_now();
        cell
    }

    /// A backup of a guest that does not write.
    fn backup_now(&mut self) {
        let mark = self.site.vm.mark();
        let run = self.site.backup(&[]).ok();
        self.archives.push((archive(&run), mark..=mark));
    }

    /// A run has ended well, whose `--json` output this is; the guest had completed `from` operations when it began.
    pub fn made(&mut self, output: &str, from: usize) {
        let run = Run { code: Some(0), stdout: output.to_owned(), stderr: String::new() };
        self.archives.push((archive(&run), from..=self.site.vm.mark()));
    }

    /// Guest-side changes, and a load that goes on.
    pub fn load(&mut self) -> Load {
        self.seed = self.seed.wrapping_add(1);
        let at = self.seed % 6;
        self.site.vm.write(DISKS[0], at * MIB, MIB, 1 + (self.seed % 255) as u8);
        self.site.vm.write(DISKS[1], (at + 1) * MIB, MIB / 2, 1 + (self.seed % 255) as u8);
        let plan = LoadPlan { longest: 64 * 1024, ..LoadPlan::seeded(self.seed) };
        let load = self.site.vm.load(plan.pause(Duration::from_millis(4)));
        load.wait_for(3);
        load
    }

    /// Everything that has to hold after a run was killed. `from`: the guest's operations before that run began.
    pub fn aftermath(&mut self, what: &str, load: Load, from: usize, then: Then) -> Verdict {
        let mut verdict = Verdict { unharmed: true, clean: true, right: true };
        let killed = from..=self.site.vm.mark();

        verdict.unharmed &= holds(what, || self.runs_on(load));
        if then == Then::Recover {
            verdict.clean &= holds(what, || {
                self.site.program.run(&["recover"]).ok();
                self.nothing_left();
            });
            verdict.unharmed &= holds(what, || self.unharmed());
        }

        let load = self.load();
        let start = self.site.vm.mark();
        let run = self.site.backup(&[]);
        let next = start..=self.site.vm.mark();
        verdict.unharmed &= holds(what, || self.runs_on(load));
        verdict.clean &= holds(what, || self.nothing_left());
        verdict.right &= holds(what, || {
            // Whoever recovers says so, which is a warning.
            let allowed: &[i32] = if then == Then::Recover { &[0] } else { &[0, 3] };
            assert!(
                run.code.is_some_and(|code| allowed.contains(&code)),
                "{:?}\n{}\n{}",
                run.code,
                run.stdout,
                run.stderr
            );
            let name = archive(&run);
            let listed = self.listed();
            assert!(listed.contains(&name), "{name} is not listed: {listed:?}");
            for known in &self.archives {
                assert!(listed.contains(&known.0), "{} is not listed any more", known.0);
            }
            let new: Vec<_> =
                listed.into_iter().filter(|name| self.archives.iter().all(|known| known.0 != *name)).collect();
            assert!(new.len() <= 2, "two runs made {new:?}");
            for archive in new {
                let window = if archive == name { next.clone() } else { killed.clone() };
                self.restores(&archive, window.clone());
                self.archives.push((archive, window));
            }
        });
        verdict
    }

    /// All archives restore, of more than `most` some, and none but complete ones are listed.
    pub fn all_restore(&self, most: usize) -> bool {
        holds("in the end", || {
            let mut known: Vec<_> = self.archives.iter().map(|known| known.0.clone()).collect();
            let mut listed = self.listed();
            known.sort();
            listed.sort();
            assert_eq!(listed, known);
            for (archive, window) in self.archives.iter().step_by(self.archives.len().div_ceil(most)) {
                self.restores(archive, window.clone());
            }
        })
    }

    fn listed(&self) -> Vec<String> {
        let run = self.site.program.run(&["list", "--json"]).ok();
        run.events().iter().map(|line| line["archive"].as_str().expect("a name").to_owned()).collect()
    }

    fn restores(&self, archive: &str, window: RangeInclusive<usize>) {
        let dir = self.site.program.restore(self.site.guest(), archive);
        let images: Vec<_> = DISKS.iter().map(|disk| dir.join(format!("{disk}.raw"))).collect();
        let pairs: Vec<(&str, &Path)> = DISKS.into_iter().zip(images.iter().map(std::path::PathBuf::as_path)).collect();
        if let Err(torn) = self.site.vm.matching_instant(&pairs, window) {
            panic!("{archive}: {torn}");
        }
        fs::remove_dir_all(dir).unwrap();
    }

    /// The guest, perhaps after a moment, runs, and has seen no error until `load` ends.
    fn runs_on(&self, load: Load) {
        let deadline = Instant::now() + AFTERMATH;
        while self.site.vm.status() != "running" {
            assert!(Instant::now() < deadline, "the guest is {} after {AFTERMATH:?}", self.site.vm.status());
            std::thread::sleep(Duration::from_millis(20));
        }
        let done = load.done();
        load.wait_for(done + 2);
        load.stop();
        self.unharmed();
    }

    fn unharmed(&self) {
        assert_eq!(self.site.vm.proxmox_fatal(), None, "Proxmox's QEMU would have been killed");
        assert_eq!(self.site.vm.status(), "running");
        for disk in DISKS {
            self.site.vm.assert_reads_back(disk);
        }
    }

    /// Nothing of the program's is left but its archives, its state, and one bitmap a disk.
    fn nothing_left(&self) {
        let deadline = Instant::now() + AFTERMATH;
        // Children of the killed run end by themselves.
        loop {
            let processes = processes_of(self.site.program.dir());
            if processes.is_empty() {
                break;
            }
            assert!(Instant::now() < deadline, "processes were left: {processes:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(self.site.program.dir().to_str().unwrap()), "mounts were left: {mounts}");
        self.site.assert_nothing_left();
        let bitmaps = BlockState::of(&self.site.vm).bitmaps;
        for bitmap in &bitmaps {
            let same = bitmaps.iter().filter(|other| other.node == bitmap.node).count();
            assert_eq!(same, 1, "more than one bitmap on a node: {bitmaps:?}");
        }
        let journals = self.site.program.state().join("journal");
        for entry in fs::read_dir(&journals).into_iter().flatten().filter_map(Result::ok) {
            assert_eq!(entry.metadata().unwrap().len(), 0, "{} is not empty", entry.path().display());
        }
    }
}

/// The archive that a backup made.
fn archive(run: &Run) -> String {
    run.summary()["archive"].as_str().unwrap_or_else(|| panic!("no archive: {}\n{}", run.stdout, run.stderr)).to_owned()
}

/// Whether a check holds; what does not hold is printed, and the next check follows.
fn holds(what: &str, check: impl FnOnce()) -> bool {
    let result = catch_unwind(AssertUnwindSafe(check));
    if result.is_err() {
        eprintln!("^ {what}");
    }
    result.is_ok()
}

/// Processes whose command line or environment speaks of an installation's directory.
fn processes_of(dir: &Path) -> Vec<String> {
    let wanted = dir.to_str().unwrap();
    let own = std::process::id().to_string();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok) {
        let Some(pid) = entry.file_name().to_str().filter(|name| name.parse::<u32>().is_ok()).map(str::to_owned) else {
            continue;
        };
        if pid == own {
            continue;
        }
        let text = |file: &str| {
            let bytes = fs::read(entry.path().join(file)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).replace('\0', " ")
        };
        let line = text("cmdline");
        if line.contains(wanted) || text("environ").contains(wanted) {
            found.push(format!("{pid} {line}"));
        }
    }
    found
}

/// A name of an access by hand that is still there, by `access status`.
pub fn access_by_hand(site: &Site) -> Option<Value> {
    let run = site.program.run(&["access", "status", site.guest(), "--json"]);
    run.stdout.lines().find_map(|line| serde_json::from_str(line).ok())
}
