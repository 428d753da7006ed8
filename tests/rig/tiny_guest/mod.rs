//! A real, tiny guest: Debian's kernel and a static busybox, under TCG. It is there for what only a real guest has: its own order
//! of writes, file systems, an agent.
//!
//! Do not give it [`Io::Thread`](super::Io::Thread) disks where the machine is stopped and continued: under TCG on QEMU 10.0.2 the
//! guest then hangs for ever every few dozen times, with nothing but `stop` and `cont` sent. Draining (transactions, `qom-set`,
//! `blockdev-reopen`) does no harm.

mod kit;

pub use kit::TinyKit;

use super::{
    disk::DiskSpec,
    vm::{Vm, VmBuilder},
};
use std::{
    collections::BTreeSet,
    fmt, fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

/// How long a boot may take; 5 s on an idle machine.
pub const BOOT_LIMIT: Duration = Duration::from_mins(2);

/// What the guest does. Disks are named as Linux names them: `vda`, `sdb`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TinyTask {
    /// Rising numbers to the first disk, then the second; see [`litmus`].
    Litmus { first: String, second: String, slots: u32 },
    /// Mounts the ext4 on the disk and writes, checksums and removes files without end.
    Files { disk: String },
    /// Mounts the ext4, verifies the checksums of [`TinyTask::Files`], says `rig: checked N good, M bad` (and `rig: marker SUM`
    /// of the file `marker`) and powers off.
    Check { disk: String },
    /// Nothing.
    Idle,
}

impl VmBuilder {
    /// Boots the tiny guest; with [`VmBuilder::agent`] it runs the guest agent. It says `rig: ready` when the task begins.
    pub fn tiny(self, kit: &TinyKit, task: &TinyTask) -> Self {
        let words = match task {
            TinyTask::Litmus { first, second, slots } => {
                format!("rig=litmus rig_disk={first} rig_second={second} rig_slots={slots}")
            }
            TinyTask::Files { disk } => format!("rig=files rig_disk={disk}"),
            TinyTask::Check { disk } => format!("rig=check rig_disk={disk}"),
            TinyTask::Idle => "rig=idle".to_owned(),
        };
        let agent = if self.has_agent() { " rig_agent=1" } else { "" };
        let console = "console=ttyS0 quiet panic=-1 tsc=unstable random.trust_cpu=on";
        self.memory_mib(256)
            .arg("-no-reboot")
            .arg("-kernel")
            .arg(kit.kernel.display().to_string())
            .arg("-initrd")
            .arg(kit.initramfs.display().to_string())
            .arg("-append")
            .arg(format!("{console} {words}{agent}"))
            .arg("-serial")
            .arg("file:serial.log")
    }
}

impl Vm {
    /// What the guest said on its serial console (since the machine's first start).
    pub fn serial(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.dir().join("serial.log")).unwrap_or_default()).replace('\r', "")
    }

    /// Waits for a whole line of the serial console that contains `pattern`.
    pub fn wait_for_line(&self, pattern: &str, limit: Duration) -> String {
        let deadline = Instant::now() + limit;
        loop {
            let serial = self.serial();
            let whole = serial.rsplit_once('\n').map_or("", |(whole, _)| whole);
            if let Some(line) = whole.lines().find(|line| line.contains(pattern)) {
                return line.to_owned();
            }
            assert!(Instant::now() < deadline, "the guest did not say `{pattern}` within {limit:?}, but:\n{serial}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits for a line that is not there yet.
    pub fn wait_for_new_line(&self, pattern: &str, limit: Duration) {
        let count = |serial: &str| serial.lines().filter(|line| line.contains(pattern)).count();
        let (before, deadline) = (count(&self.serial()), Instant::now() + limit);
        while count(&self.serial()) <= before {
            assert!(
                Instant::now() < deadline,
                "the guest did not say `{pattern}` again within {limit:?}:\n{}",
                self.serial()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Why two images are not of one instant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TornLitmus {
    pub slot: u64,
    pub what: String,
}

impl fmt::Display for TornLitmus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {}: {}", self.slot, self.what)
    }
}

/// Judges raw images of the two disks of [`TinyTask::Litmus`]: per slot the last numbers on both. In every true instant the first
/// disk is at the second one's number or one ahead, and no number before it is missing.
pub fn litmus(first: &Path, second: &Path, slots: u32) -> Result<Vec<(u64, u64)>, TornLitmus> {
    let (first, second) = (fs::read(first).unwrap(), fs::read(second).unwrap());
    let mut found = Vec::new();
    for slot in 0..u64::from(slots) {
        let (a, b) = (last_number(&first, slot)?, last_number(&second, slot)?);
        if a != b && a != b + 1 {
            return Err(TornLitmus { slot, what: format!("{a} on the first disk, {b} on the second") });
        }
        found.push((a, b));
    }
    Ok(found)
}

/// The last number of a slot; its ring holds the ones before it too.
fn last_number(image: &[u8], slot: u64) -> Result<u64, TornLitmus> {
    const BLOCK: usize = 4096;
    const RING: u64 = 64;
    let torn = |what: String| TornLitmus { slot, what };
    let mut numbers = BTreeSet::new();
    for place in 0..RING {
        let block = &image[(slot * RING + place) as usize * BLOCK..][..BLOCK];
        let word = |index: usize| u64::from_le_bytes(block[index * 8..][..8].try_into().unwrap());
        if block.iter().all(|byte| *byte == 0) {
            continue;
        }
        let number = word(2);
        if &block[..8] != b"rigslot\0" || word(1) != slot || (3..BLOCK / 8).any(|index| word(index) != number) {
            return Err(torn(format!("a block of mixed content near number {number}")));
        }
        if number % RING != place {
            return Err(torn(format!("number {number} in place {place}")));
        }
        numbers.insert(number);
    }
    let last = numbers.last().copied().unwrap_or(0);
    match (last.saturating_sub(RING - 1).max(1)..=last).find(|number| !numbers.contains(number)) {
        Some(missing) => Err(torn(format!("number {missing} is missing before {last}"))),
        None => Ok(last),
    }
}

/// Makes a raw image with an ext4 that holds the files of `content` (a directory).
pub fn make_ext4(image: &Path, size: u64, content: Option<&Path>) {
    fs::File::create(image).unwrap().set_len(size).unwrap();
    let mut command = Command::new("mke2fs");
    command.args(["-q", "-F", "-t", "ext4", "-E", "root_owner=0:0"]);
    if let Some(content) = content {
        command.arg("-d").arg(content);
    }
    run(command.arg(image));
}

/// Replays the journal of a copy of the image and checks the file system.
pub fn assert_ext4_sound(image: &Path) {
    let copy = image.with_extension("fsck");
    fs::copy(image, &copy).unwrap();
    run(Command::new("e2fsck").args(["-E", "journal_only", "-p"]).arg(&copy));
    run(Command::new("e2fsck").args(["-f", "-n"]).arg(&copy));
    fs::remove_file(copy).unwrap();
}

/// Boots a guest that finds every file of [`TinyTask::Files`] on `disk` as it was written, and in `marker` the line `restored`.
pub fn assert_boots(kit: &TinyKit, disk: DiskSpec) {
    let mut vm = VmBuilder::new().disk_spec(disk).tiny(kit, &TinyTask::Check { disk: "sda".into() }).start();
    let checked = vm.wait_for_line("rig: checked", BOOT_LIMIT);
    assert!(checked.ends_with(" 0 bad") && !checked.contains("checked 0 good"), "{checked}");
    // md5 of "restored\n"
    vm.wait_for_line("rig: marker 59ec69fccca64cd638f1a7bf443b435c", Duration::from_secs(5));
    assert!(vm.wait_end().success());
}

fn run(command: &mut Command) {
    let output = command.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").output().expect("the program runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}: {said}", output.status);
}
