//! Targets that exist, are in use, full, or not what they seem.

use super::*;
use nix::libc;
use std::{
    fs::{File, OpenOptions},
    io::{Read, Seek, SeekFrom},
    os::unix::fs::{FileExt, OpenOptionsExt, symlink},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

#[test]
fn whatever_exists_in_the_directory_stays_as_it_is() {
    for name in ["scsi0.raw", "efidisk0.raw", "guest.conf", "firewall.conf", "manifest.json"] {
        let temp = temp();
        let path = temp.path().join(name);
        fs::write(&path, "mine").expect("write");
        let memory = Arc::new(archive());
        let mut request = to_directory(temp.path(), ImageFormat::Raw);
        request.overwrite = Overwrite::Allowed; // is about named targets only
        let error = run_with(&memory, &request, &CancellationToken::new()).failed();
        assert_eq!(error.to_string(), format!("target `{}` exists", path.display()));
        assert_eq!(error.kind(), RestoreErrorKind::Usage);
        assert_eq!((names(temp.path()), memory.reads()), (vec![name.to_owned()], 0));
        assert_eq!(fs::read(&path).expect("read"), b"mine");
    }
}

#[test]
fn a_dangling_link_is_an_existing_target() {
    let temp = temp();
    let elsewhere = temp.path().join("elsewhere");
    let directory = temp.path().join("dir");
    fs::create_dir(&directory).expect("mkdir");
    symlink(&elsewhere, directory.join("scsi0.raw")).expect("link");
    let error = run(archive(), &to_directory(&directory, ImageFormat::Raw)).failed();
    assert!(matches!(error, RestoreError::TargetExists { .. }), "{error}");
    let error = run(archive(), &to_path("scsi0", &directory.join("scsi0.raw"), Overwrite::Allowed)).failed();
    assert!(matches!(error, RestoreError::TargetKind { found: "a symbolic link", .. }), "{error}");
    assert!(!elsewhere.exists());
}

#[test]
fn a_target_that_appears_meanwhile_is_not_replaced() {
    let temp = temp();
    let path = temp.path().join("scsi0.raw");
    let intruder = path.clone();
    let memory = archive().before_reads(move |_| fs::write(&intruder, "mine").expect("write"));
    let error = run(memory, &to_directory(temp.path(), ImageFormat::Raw)).failed();
    assert!(matches!(error, RestoreError::TargetExists { .. }), "{error}");
    assert_eq!(names(temp.path()), ["scsi0.raw"]);
    assert_eq!(fs::read(&path).expect("read"), b"mine");
}

#[test]
fn failing_to_name_the_last_file_takes_the_first_back() {
    let temp = temp();
    let path = temp.path().join("manifest.json");
    let intruder = path.clone();
    let memory = archive().before_reads(move |_| fs::write(&intruder, "mine").expect("write"));
    run(memory, &to_directory(temp.path(), ImageFormat::Raw)).failed();
    assert_eq!(names(temp.path()), ["manifest.json"]);
    assert_eq!(fs::read(&path).expect("read"), b"mine");
}

#[test]
fn a_named_new_file_needs_its_directory() {
    let temp = temp();
    let path = temp.path().join("vm.raw");
    let report = run(archive(), &to_path("scsi0", &path, Overwrite::Refused)).done();
    assert!(fs::read(&path).expect("disk") == disks()[0].content);
    assert_eq!((names(temp.path()), report.files.len()), (vec!["vm.raw".to_owned()], 0));
    let error = run(archive(), &to_path("scsi0", &temp.path().join("no/vm.raw"), Overwrite::Refused)).failed();
    assert_eq!(error.to_string(), format!("cannot open `{}`", temp.path().join("no").display()));
    let error = run(archive(), &to_path("scsi0", &path.join("vm.raw"), Overwrite::Refused)).failed();
    assert!(matches!(error, RestoreError::Io { .. } | RestoreError::TargetKind { .. }), "{error}");
}

#[test]
fn an_existing_file_is_overwritten_only_when_allowed() {
    for size in [10, 8 * SEGMENT, 100 * SEGMENT] {
        let temp = temp();
        let path = temp.path().join("vm.raw");
        fs::write(&path, vec![0xff; size]).expect("write");
        let error = run(archive(), &to_path("scsi0", &path, Overwrite::Refused)).failed();
        assert!(matches!(error, RestoreError::TargetExists { .. }), "{error}");
        assert_eq!(path.metadata().expect("there").len(), size as u64);
        run(archive(), &to_path("scsi0", &path, Overwrite::Allowed)).done();
        assert!(fs::read(&path).expect("disk") == disks()[0].content);
    }
}

#[test]
fn a_failed_overwrite_leaves_nothing_that_looks_like_a_disk() {
    let temp = temp();
    let path = temp.path().join("vm.raw");
    fs::write(&path, vec![0xff; 1000]).expect("write");
    let memory = archive().fault("scsi0", 6, Fault::Corrupt);
    let error = run(memory, &to_path("scsi0", &path, Overwrite::Allowed)).failed();
    assert_eq!(error.kind(), RestoreErrorKind::Mismatch);
    assert!(error.to_string().ends_with("is overwritten in part and must not be used"), "{error}");
    assert_eq!(path.metadata().expect("there").len(), 0);
}

#[test]
fn two_disks_cannot_share_a_target() {
    let temp = temp();
    fs::write(temp.path().join("old"), "x").expect("write");
    symlink(".", temp.path().join("same")).expect("link");
    for (first, second) in [("new", "new"), ("new", "same/new"), ("old", "same/old")] {
        let paths = [("scsi0", first), ("efidisk0", second)];
        let destination = Destination::Disks(paths.map(|(d, p)| (d.to_owned(), temp.path().join(p))).to_vec());
        let request = RestoreRequest { destination, format: ImageFormat::Raw, overwrite: Overwrite::Allowed };
        let error = run(archive(), &request).failed();
        assert!(matches!(error, RestoreError::SameTarget { .. }), "{error}");
    }
}

#[test]
fn what_a_dead_restore_left_is_replaced_but_a_live_one_is_not() {
    let temp = temp();
    let partial = temp.path().join("scsi0.raw.partial");
    fs::write(&partial, vec![0xff; 1 << 20]).expect("write");
    let run_ = run(archive(), &to_directory(temp.path(), ImageFormat::Raw));
    assert!(run_.log.infos().iter().any(|i| i.contains("left by a restore that did not end")));
    run_.done();
    assert!(fs::read(temp.path().join("scsi0.raw")).expect("disk") == disks()[0].content);

    // While one restore works, another to the same place is refused and does no harm.
    let second = tempfile::tempdir().expect("temporary directory");
    let path = second.path().to_owned();
    let other = path.clone();
    let memory = archive().before_reads(move |number| {
        if number == 0 {
            let error = run(archive(), &to_directory(&other, ImageFormat::Raw)).failed();
            assert!(matches!(error, RestoreError::TargetBusy { .. }), "{error}");
            assert_eq!(error.kind(), RestoreErrorKind::Busy);
        }
    });
    run(memory, &to_directory(&path, ImageFormat::Raw)).done();
    assert_eq!(names(&path).len(), 5);
}

#[test]
fn a_partial_name_that_is_a_link_is_not_followed() {
    let temp = temp();
    let victim = temp.path().join("victim");
    fs::write(&victim, "mine").expect("write");
    let directory = temp.path().join("dir");
    fs::create_dir(&directory).expect("mkdir");
    symlink(&victim, directory.join("scsi0.raw.partial")).expect("link");
    let error = run(archive(), &to_directory(&directory, ImageFormat::Raw)).failed();
    assert!(matches!(error, RestoreError::TargetExists { .. }), "{error}");
    assert_eq!(fs::read(&victim).expect("read"), b"mine");
}

#[test]
fn directories_and_sockets_are_no_targets() {
    let temp = temp();
    let file = temp.path().join("file");
    fs::write(&file, "").expect("write");
    let error = run(archive(), &to_directory(&file, ImageFormat::Raw)).failed();
    assert!(matches!(error, RestoreError::TargetKind { found: "a regular file", .. }), "{error}");
    let error = run(archive(), &to_path("scsi0", temp.path(), Overwrite::Allowed)).failed();
    assert!(matches!(error, RestoreError::TargetKind { found: "a directory", .. }), "{error}");
    let error = run(archive(), &to_path("scsi0", Path::new("/dev/null"), Overwrite::Allowed)).failed();
    assert!(matches!(error, RestoreError::TargetKind { found: "a special file", .. }), "{error}");
}

struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_image_that_qemu_has_open_is_in_use() {
    if !has_program("qemu-system-x86_64", "--version") {
        return;
    }
    let temp = temp();
    let path = temp.path().join("vm.raw");
    fs::write(&path, vec![0xff; 8 * SEGMENT]).expect("write");
    let pid_file = temp.path().join("pid");
    let qemu = Command::new("qemu-system-x86_64")
        .args(["-S", "-machine", "q35", "-accel", "tcg", "-nodefaults", "-display", "none"])
        .args(["-drive", &format!("file={},format=raw,if=virtio", path.display())])
        .arg("-pidfile")
        .arg(&pid_file)
        .stdin(Stdio::null())
        .spawn()
        .expect("qemu");
    let mut qemu = Qemu(qemu);
    let start = Instant::now();
    // QEMU writes the pid before it opens its drives, so the lock itself is awaited.
    let error = loop {
        let error = run(archive(), &to_path("scsi0", &path, Overwrite::Refused)).failed();
        assert!(matches!(error, RestoreError::TargetExists { .. }), "{error}");
        if is_locked(&path) {
            break run(archive(), &to_path("scsi0", &path, Overwrite::Allowed)).failed();
        }
        assert!(start.elapsed() < Duration::from_mins(1) && qemu.0.try_wait().expect("wait").is_none(), "no QEMU");
        std::thread::sleep(Duration::from_millis(50));
    };
    assert!(matches!(error, RestoreError::TargetBusy { .. }), "{error}");
    assert!(fs::read(&path).expect("read").iter().all(|b| *b == 0xff), "nothing was written");
    drop(qemu);

    // And while we write, QEMU's tools cannot open the image.
    let target = path.clone();
    let memory = archive().before_reads(move |number| {
        if number == 0 {
            let arguments = ["-f", "raw", "-c", "write 0 512"];
            let output = Command::new("qemu-io").args(arguments).arg(&target).output().expect("qemu-io");
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(text.contains("lock"), "{text}");
        }
    });
    run(memory, &to_path("scsi0", &path, Overwrite::Allowed)).done();
    assert!(fs::read(&path).expect("disk") == disks()[0].content);
}

fn is_locked(path: &Path) -> bool {
    let file = OpenOptions::new().read(true).write(true).open(path).expect("open");
    let mut probe = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 100,
        l_len: 200,
        l_pid: 0,
    };
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_GETLK(&mut probe)).expect("fcntl");
    i32::from(probe.l_type) != libc::F_UNLCK
}

/// A small file system of its own, unmounted when dropped.
struct Tmpfs(TempDir);

impl Tmpfs {
    fn mount(bytes: usize) -> Option<Self> {
        let temp = temp();
        let size = format!("size={bytes}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(temp.path()).output();
        if mounted.is_ok_and(|o| o.status.success()) {
            return Some(Self(temp));
        }
        eprintln!("skipped: a tmpfs cannot be mounted here");
        None
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).output();
    }
}

#[test]
fn a_restore_that_does_not_fit_is_refused_before_it_begins() {
    let Some(tmpfs) = Tmpfs::mount(4 * SEGMENT) else { return };
    let memory = Arc::new(archive());
    let new = tmpfs.0.path().join("new");
    let error = run_with(&memory, &to_directory(&new, ImageFormat::Raw), &CancellationToken::new()).failed();
    assert!(matches!(error, RestoreError::NoSpace { available: 262_144, .. }), "{error}");
    assert_eq!((error.kind(), memory.reads(), names(tmpfs.0.path()).len()), (RestoreErrorKind::NoSpace, 0, 0));
    // Room that the overwritten file gives back counts.
    let path = tmpfs.0.path().join("vm.raw");
    fs::write(&path, vec![1; 3 * SEGMENT]).expect("write");
    run(archive(), &to_path("scsi0", &path, Overwrite::Allowed)).done();
    assert!(fs::read(&path).expect("disk") == disks()[0].content);
}

#[test]
fn running_out_of_space_in_the_middle_leaves_nothing() {
    for format in [ImageFormat::Raw, ImageFormat::Qcow2] {
        let Some(tmpfs) = Tmpfs::mount(16 * SEGMENT) else { return };
        let ballast = tmpfs.0.path().join("ballast");
        let memory = archive().before_reads(move |number| {
            if number == 0 {
                let mut ballast = File::create(&ballast).expect("create");
                // Ends with an error, that is the point.
                let _ = std::io::copy(&mut std::io::repeat(1), &mut ballast);
            }
        });
        let error = run(memory, &to_directory(&tmpfs.0.path().join("new"), format)).failed();
        assert_eq!(error.kind(), RestoreErrorKind::NoSpace, "{error}");
        assert_eq!(names(tmpfs.0.path()), ["ballast"]);
    }
}

/// A loop device over a file of 0xff, detached when dropped.
struct Loop {
    device: PathBuf,
    _temp: TempDir,
}

impl Loop {
    fn attach(bytes: usize) -> Option<Self> {
        let temp = temp();
        let backing = temp.path().join("backing");
        fs::write(&backing, vec![0xff; bytes]).expect("write");
        let output = Command::new("losetup").args(["--find", "--show"]).arg(&backing).output();
        match output {
            Ok(output) if output.status.success() => {
                let device = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
                Some(Self { device, _temp: temp })
            }
            _ => {
                eprintln!("skipped: no loop devices here");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).output();
    }
}

#[test]
fn a_block_device_is_overwritten_where_the_disk_is_and_nowhere_else() {
    let disk = &disks()[0].content;
    let Some(device) = Loop::attach(disk.len() + SEGMENT) else { return };
    let temp = temp();
    let link = temp.path().join("vm-100-disk-0");
    symlink(&device.device, &link).expect("link");

    let error = run(archive(), &to_path("scsi0", &link, Overwrite::Refused)).failed();
    assert!(matches!(error, RestoreError::TargetExists { .. }), "{error}");
    let mut qcow2 = to_path("scsi0", &link, Overwrite::Allowed);
    qcow2.format = ImageFormat::Qcow2;
    assert!(matches!(run(archive(), &qcow2).failed(), RestoreError::Qcow2OnDevice { .. }));
    let large = Memory::of(&[model("scsi0", &[Some(1); 10], 0)], segment_len());
    let error = run(large, &to_path("scsi0", &link, Overwrite::Allowed)).failed();
    assert!(matches!(error, RestoreError::TargetTooSmall { needed: 655_360, size: 589_824, .. }), "{error}");
    {
        let claimed = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(&device.device).expect("claim");
        let error = run(archive(), &to_path("scsi0", &link, Overwrite::Allowed)).failed();
        assert!(matches!(error, RestoreError::TargetBusy { .. }), "{error}");
        drop(claimed);
    }
    let content = |path: &Path| {
        let mut bytes = Vec::new();
        let mut file = File::open(path).expect("open");
        file.seek(SeekFrom::Start(0)).expect("seek");
        file.read_to_end(&mut bytes).expect("read");
        bytes
    };
    assert!(content(&device.device).iter().all(|b| *b == 0xff), "nothing was written so far");

    let run = run(archive(), &to_path("scsi0", &link, Overwrite::Allowed));
    assert!(run.log.infos().iter().any(|i| i.contains("is 64 KiB larger than disk `scsi0`")));
    let report = run.done();
    assert_eq!(report.disks[0].zero_bytes, 4 * SEGMENT as u64);
    let found = content(&device.device);
    assert!(found[..disk.len()] == disk[..], "zeroes are zeroes, not what was there before");
    assert!(found[disk.len()..].iter().all(|b| *b == 0xff), "what lies behind is untouched");
}

#[test]
fn a_failure_on_a_block_device_says_that_it_is_spoilt() {
    let Some(device) = Loop::attach(8 * SEGMENT) else { return };
    let memory = archive().fault("scsi0", 6, Fault::Withhold);
    let error = run(memory, &to_path("scsi0", &device.device, Overwrite::Allowed)).failed();
    assert!(matches!(error, RestoreError::TargetSpoilt { .. }), "{error}");
    assert_eq!(error.kind(), RestoreErrorKind::Damaged);
}

#[test]
fn every_way_of_clearing_clears_that_range_only() {
    use super::super::image::{DeviceDisk, DiskImage};
    let temp = temp();
    for way in 0..3 {
        let path = temp.path().join(format!("device{way}"));
        fs::write(&path, vec![0xff; 3 << 20]).expect("write");
        let file = OpenOptions::new().read(true).write(true).open(&path).expect("open");
        let disk = DeviceDisk::from_way(file.try_clone().expect("clone"), way);
        disk.clear(4096, (2 << 20) + 512).expect("clears");
        let mut bytes = vec![0; 3 << 20];
        file.read_exact_at(&mut bytes, 0).expect("read");
        let end = 4096 + (2 << 20) + 512;
        assert!(bytes[4096..end].iter().all(|b| *b == 0), "way {way}");
        assert!(bytes[..4096].iter().chain(&bytes[end..]).all(|b| *b == 0xff), "way {way}");
    }
}
