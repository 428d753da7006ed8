//! A guest, a target, and what is the same in every case.

use crate::rig::{
    Bus, Format, Io, Kind, LoadPlan, LoadReport, MIB, Run, Site, SmallFs, Style, Tally, Verdict, VmBuilder, borg,
    old_qemu, processes_about,
};
use std::{
    env, fs,
    ops::RangeInclusive,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    process::Child,
    time::{Duration, Instant},
};

pub const DISKS: [&str; 2] = ["scsi0", "virtio1"];

/// Whether every point is to be tried.
pub fn long() -> bool {
    env::var("PVEBACKUP_FAULTS").is_ok_and(|value| value == "long")
}

/// Of the points `1..=count` those that this run tries: all, or about `few`, spread over them. `seed` says where to begin, so
/// that different faults meet different points.
pub fn points(count: usize, few: usize, seed: usize) -> impl Iterator<Item = usize> {
    let step = if long() { 1 } else { count.div_ceil(few.max(1)).max(1) };
    (1 + seed % step..=count).step_by(step)
}

/// Where a small file system is to be mounted, below the program's directory.
#[derive(Clone, Copy, Debug)]
pub enum Small {
    Repository,
    State,
    Fleecing,
}

impl Small {
    fn name(self) -> &'static str {
        match self {
            Self::Repository => "repository",
            Self::State => "state",
            Self::Fleecing => "fleecing",
        }
    }
}

/// A guest with its target, and the cases that they go through.
pub struct Bench {
    /// Goes before the directory in which it is mounted.
    pub small: Option<SmallFs>,
    pub site: Site,
    tally: Tally,
    seed: u64,
    wrong: Vec<String>,
}

/// A case under way.
#[must_use]
pub struct Begun(());

/// The guest of the cases, of a disk of 16 MiB and one of 8 MiB.
pub fn machine(kind: Kind) -> VmBuilder {
    let style = if kind == Kind::Proxmox { Style::Proxmox } else { Style::Blockdev };
    VmBuilder::new().disk("scsi0", 16 * MIB, Bus::VirtioScsi, style, Format::Raw, Io::Main).disk(
        "virtio1",
        8 * MIB,
        Bus::VirtioBlk,
        style,
        Format::Qcow2,
        Io::Main,
    )
}

impl Bench {
    /// A guest whose backups go to `provider`. `None`, and why, where this machine cannot have it.
    pub fn new(class: &str, provider: &'static str, kind: Kind) -> Option<Self> {
        Self::with(class, provider, kind, None, "")
    }

    /// The same with a small file system of so many MiB, and with more lines among the configuration's defaults.
    pub fn with(
        class: &str,
        provider: &'static str,
        kind: Kind,
        small: Option<(Small, u64)>,
        defaults: &str,
    ) -> Option<Self> {
        if kind == Kind::Proxmox && old_qemu() {
            println!("skipped: Proxmox VE's QEMU with backup access is 9.2 or newer");
            return None;
        }
        if provider == "borg" && !borg::possible() {
            return None;
        }
        let mut site = Site::new(kind, machine(kind));
        let dir = site.program.dir().to_owned();
        let small = match small {
            None => None,
            Some((place, mib)) => Some(SmallFs::or_skip(dir.join(place.name()), mib)?),
        };
        // Stands before the system's programs, for those who want to put one in their place.
        fs::create_dir(dir.join("bin")).unwrap();
        let path = format!("{}/bin:{}", dir.display(), env::var("PATH").unwrap_or_default());
        site.program = site.program.env("PATH", &path);
        let shown = dir.display();
        let more = match provider {
            "borg" => {
                fs::write(dir.join("passphrase"), "correct horse\n").unwrap();
                format!(
                    "repository = '{shown}/repository/borg'\npassphrase-file = '{shown}/passphrase'\nlock-wait = '1s'\n\
                     compression = 'zstd,1'"
                )
            }
            "directory" => format!("path = '{shown}/repository'"),
            "restic" => format!("repository = '{shown}/repository'\npassword-file = '{shown}/repository.key'"),
            other => panic!("no provider `{other}`"),
        };
        fs::create_dir_all(dir.join("repository")).unwrap();
        site.program.configure(&format!(
            "[defaults]\ntarget = 'attic'\n{defaults}\n[target.attic]\nprovider = '{provider}'\n{more}\n"
        ));
        site.program.run(&["target", "init"]).ok();
        for (disk, byte) in DISKS.into_iter().zip(1..) {
            site.vm.write(disk, 0, 6 * MIB, byte);
        }
        let run = site.backup(&[]);
        assert!(matches!(run.code, Some(0 | 3)), "{}", said(&run));
        let access = if kind == Kind::Proxmox { "proxmox" } else { "stock" };
        Some(Self { small, tally: Tally::new(class, provider, access), site, seed: 0, wrong: Vec::new() })
    }

    /// Where the target's repository is.
    pub fn repository(&self) -> PathBuf {
        self.site.program.dir().join("repository")
    }

    pub fn small(&self) -> &SmallFs {
        self.small.as_ref().expect("the bench has a small file system")
    }

    /// Runs `check`; what it panics with is remembered, and fails the test in the end.
    pub fn expect(&mut self, label: &str, check: impl FnOnce(&Site)) -> bool {
        let site = &self.site;
        let outcome = catch_unwind(AssertUnwindSafe(|| check(site)));
        if let Err(panic) = outcome {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            self.wrong.push(format!("{label}: {}", text.unwrap_or_default()));
            return false;
        }
        true
    }

    /// The guest writes, the run that `fault` disturbs takes place, `judge` looks at it, and the next run has to be right.
    pub fn case(&mut self, label: &str, fault: impl FnOnce(&Site) -> Run, judge: impl FnOnce(&Run)) {
        self.case_between(label, fault, judge, |_| {});
    }

    /// The same, with something between the two runs.
    pub fn case_between(
        &mut self,
        label: &str,
        fault: impl FnOnce(&Site) -> Run,
        judge: impl FnOnce(&Run),
        between: impl FnOnce(&Site),
    ) {
        let case = self.begin();
        let (report, start, run, end) = self.disturbed(fault);
        let mut verdict = Verdict {
            unharmed: self.expect(label, |site| unharmed(site, &report)),
            clean: self.expect(label, |_| judge(&run)),
            right: true,
        };
        let made = matches!(run.code, Some(0 | 3));
        if made {
            verdict.right &= self.expect(&format!("{label}, its own archive"), |site| restores(site, start..=end));
        }
        // A run that says nothing else has to have cleaned up.
        if run.code != Some(26) {
            verdict.clean &= self.expect(&format!("{label}, after it"), nothing_left);
        }
        verdict.clean &= self.expect(&format!("{label}, between the runs"), between);
        let next = format!("{label}, the next run after {:?} {}", run.code, run.stderr.trim());
        self.ends(case, &next, [verdict.unharmed, verdict.clean, verdict.right]);
    }

    /// A case begins; [`Bench::ends`] has to follow.
    pub fn begin(&mut self) -> Begun {
        self.tally.begins();
        Begun(())
    }

    /// The case ends with a run that nothing disturbs. `so_far`: unharmed, clean, right.
    pub fn ends(&mut self, _case: Begun, label: &str, so_far: [bool; 3]) {
        let (unharmed, clean, right) = self.next_run(label);
        let [was_unharmed, was_clean, was_right] = so_far;
        self.tally.ended(Verdict {
            unharmed: unharmed & was_unharmed,
            clean: clean & was_clean,
            right: right & was_right,
        });
    }

    /// A run under load.
    fn disturbed(&mut self, fault: impl FnOnce(&Site) -> Run) -> (LoadReport, usize, Run, usize) {
        self.seed += 2;
        let vm = &self.site.vm;
        let seed = self.seed;
        for disk in DISKS {
            vm.write(disk, (seed % 6) * MIB, 3 * MIB, 1 + (seed % 250) as u8);
        }
        let load = vm.load(LoadPlan::seeded(seed).pause(Duration::from_millis(4)));
        let start = vm.mark();
        let run = fault(&self.site);
        let end = self.site.vm.mark();
        (load.end(), start, run, end)
    }

    /// A run that nothing disturbs: whether the guest is unharmed, nothing is left, and the archive right.
    fn next_run(&mut self, label: &str) -> (bool, bool, bool) {
        let vm = &self.site.vm;
        let load = vm.load(LoadPlan::seeded(self.seed + 1).pause(Duration::from_millis(4)));
        let start = vm.mark();
        let run = self.site.backup(&[]);
        let end = self.site.vm.mark();
        let report = load.end();
        let succeeded = self.expect(label, |_| {
            assert!(matches!(run.code, Some(0 | 3)), "{:?}: {}\n{}", run.code, run.stdout, run.stderr);
        });
        let right = succeeded && self.expect(label, |site| restores(site, start..=end));
        (self.expect(label, |site| unharmed(site, &report)), self.expect(label, nothing_left), right)
    }

    /// Ends the test: fails it if anything was wrong.
    #[track_caller]
    pub fn verdict(self) {
        let Self { wrong, tally, .. } = self;
        drop(tally);
        assert!(wrong.is_empty(), "{} checks failed:\n{}", wrong.len(), wrong.join("\n"));
    }
}

/// The guest runs, saw no error, and its disks hold what it wrote.
pub fn unharmed(site: &Site, report: &LoadReport) {
    assert_eq!(report.failed, None, "the guest saw an error after {} operations", report.operations);
    assert_eq!(site.vm.status(), "running");
    for disk in DISKS {
        site.vm.assert_disk_intact(disk);
    }
}

fn restores(site: &Site, window: RangeInclusive<usize>) {
    site.assert_restores(&DISKS, window);
}

/// Nothing in QEMU but our bitmaps, no file of a run, no mount, no process.
pub fn nothing_left(site: &Site) {
    site.assert_nothing_left();
    let dir = site.program.dir().to_str().unwrap();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let fuse: Vec<_> = mounts.lines().filter(|line| line.contains(dir) && line.contains("fuse")).collect();
    assert!(fuse.is_empty(), "mounts are left: {fuse:?}");
    let processes = processes_about(dir, &[site.vm.pid()]);
    assert!(processes.is_empty(), "processes are left: {processes:?}");
}

/// Waits until the run has exports.
pub fn wait_for_exports(site: &Site) {
    let deadline = Instant::now() + Duration::from_mins(1);
    while site.vm.qmp("query-block-exports", serde_json::json!({})).as_array().is_none_or(Vec::is_empty) {
        assert!(Instant::now() < deadline, "no exports within 60 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A run that is slow enough to be caught in its middle, and is there.
pub fn slow_run(site: &Site) -> Child {
    slow_run_at(site, "6MiB")
}

/// The same, so slow.
pub fn slow_run_at(site: &Site, limit: &str) -> Child {
    for (disk, length) in DISKS.into_iter().zip([12 * MIB, 6 * MIB]) {
        site.vm.write(disk, 0, length, 0x1d);
    }
    let child = site.start_backup(&["--bwlimit", limit]);
    wait_for_exports(site);
    std::thread::sleep(Duration::from_millis(300));
    child
}

/// A run that is slow enough for something to happen in its middle: when it has exports, `act` happens, and its end is awaited.
pub fn in_the_middle(site: &Site, act: impl FnOnce(&Site, &Child)) -> Run {
    let child = slow_run(site);
    act(site, &child);
    Run::of(&child.wait_with_output().unwrap())
}

/// The process whose command line has all these words, once there is one.
pub fn process_with(words: &[&str]) -> nix::unistd::Pid {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        for pid in pids {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            if words.iter().all(|word| line.contains(word)) {
                return nix::unistd::Pid::from_raw(pid);
            }
        }
        assert!(Instant::now() < deadline, "no process with {words:?} within 30 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The run failed with this code, and its message has all these words.
#[track_caller]
pub fn fails_with(run: &Run, code: i32, words: &[&str]) {
    assert_eq!(run.code, Some(code), "{}", said(run));
    let missing: Vec<_> = words.iter().filter(|word| !run.stderr.contains(**word)).collect();
    assert!(missing.is_empty(), "the message lacks {missing:?}: {}", said(run));
}

/// The text of a run's error.
pub fn said(run: &Run) -> String {
    format!("exit code {:?}\n{}\n{}", run.code, run.stderr, run.stdout)
}
