//! Archives as files: what other programs make of them, and what is left when the server dies.

use crate::rig::{Bus, DiskSpec, Format, Io, Kind, MIB, Site, Style, VmBuilder, borg, make_ext4, no_files_left, stop};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount as mount_device, umount2},
    sys::signal::{Signal, kill},
    unistd::{Pid, Whence, lseek},
};
use std::{
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// A serving process, and where.
struct Served {
    child: Child,
    dir: PathBuf,
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = umount2(&self.dir, MntFlags::MNT_DETACH);
    }
}

impl Served {
    fn file(&self, disk: &str) -> PathBuf {
        self.dir.join(disk)
    }

    #[track_caller]
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), signal).unwrap();
    }

    #[track_caller]
    fn ends_with(&mut self, code: i32) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert_eq!(status.code(), Some(code));
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("the server does not end");
    }
}

/// Whether anything is mounted there, by the kernel's list: a dead mount cannot be asked.
fn is_mounted(dir: &Path) -> bool {
    let dir = dir.parent().unwrap().canonicalize().unwrap().join(dir.file_name().unwrap());
    let escaped = dir.to_str().unwrap().replace(' ', r"\040");
    fs::read_to_string("/proc/mounts").unwrap().lines().any(|line| line.split(' ').nth(1) == Some(&escaped))
}

/// Mounts the latest archive; see [`mount_from`].
fn mount(site: &Site, dir: &Path) -> Option<Served> {
    mount_from(site, dir, &[])
}

/// Mounts the latest archive of a target; `None`, with the reason printed, where nothing can be mounted.
fn mount_from(site: &Site, dir: &Path, more: &[&str]) -> Option<Served> {
    if !Path::new("/dev/fuse").exists() {
        eprintln!("skipped: there is no /dev/fuse");
        return None;
    }
    let place = dir.display().to_string();
    let words = [&["mount", "latest", &place, "--guest", site.guest()], more].concat();
    let mut child = site.program.spawn(&words);
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    if !line.is_empty() {
        assert!(line.starts_with("pve-qemu-guest-") && line.contains("(scsi0, virtio1)"), "{line}");
        return Some(Served { child, dir: dir.to_owned() });
    }
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("fusermount3"), "{text}");
    eprintln!("skipped: {text}");
    None
}

/// A machine with data and holes on two disks, and two archives of it; the second is incremental.
fn site() -> Site {
    let site = Site::new(
        Kind::Stock,
        VmBuilder::new().disk("scsi0", 64 * MIB, Bus::VirtioScsi, Style::Blockdev, Format::Raw, Io::Main).disk(
            "virtio1",
            32 * MIB + 4096,
            Bus::VirtioBlk,
            Style::Blockdev,
            Format::Qcow2,
            Io::Main,
        ),
    );
    site.vm.write("scsi0", 4 * MIB, 20 * MIB, 0x51);
    site.vm.write("virtio1", 0, 8 * MIB, 0x52);
    site.vm.write("virtio1", 32 * MIB, 4096, 0x53);
    site.backup(&[]).ok();
    site.vm.write("scsi0", 20 * MIB, MIB, 0x54);
    site.vm.write("scsi0", 50 * MIB, MIB, 0x55);
    site.backup(&["--require-incremental"]).ok();
    site
}

fn mount_point(site: &Site) -> PathBuf {
    let dir = site.program.dir().join("a mount");
    fs::create_dir(&dir).unwrap();
    dir
}

/// Runs a program that must succeed.
#[track_caller]
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// For reads past the page cache.
fn open_direct(path: &Path) -> File {
    OpenOptions::new().read(true).custom_flags(nix::libc::O_DIRECT).open(path).unwrap()
}

fn read_direct(file: &File, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
    let mut buffer = vec![0u8; len + 4096];
    let at = buffer.as_ptr().align_offset(4096);
    file.read_exact_at(&mut buffer[at..at + len], offset)?;
    Ok(buffer[at..at + len].to_vec())
}

#[test]
fn a_mounted_archive_is_what_a_restore_writes() {
    let site = site();
    let dir = mount_point(&site);
    let Some(mut served) = mount(&site, &dir) else { return };
    let restored = site.program.restore(site.guest(), "latest");
    let image = |disk: &str| restored.join(format!("{disk}.raw"));
    for disk in ["scsi0", "virtio1"] {
        let (file, image) = (served.file(disk).display().to_string(), image(disk).display().to_string());
        run("cmp", &[&file, &image]);
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &file, &image]);
        let converted = site.program.dir().join(format!("{disk}.qcow2")).display().to_string();
        run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &file, &converted]);
        run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", &converted, &image]);
        let info = run("qemu-img", &["info", "-f", "raw", "--output=json", &file]);
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["virtual-size"].as_u64(), Some(fs::metadata(&image).unwrap().len()));
        // Programs see that the file is sparse, and do not read the holes.
        let copy = site.program.dir().join(format!("{disk}.copy")).display().to_string();
        run("cp", &["--sparse=auto", &file, &copy]);
        run("cmp", &[&copy, &image]);
    }

    // Data where the guest wrote, to the segment, and nowhere else.
    let scsi0 = File::open(served.file("scsi0")).unwrap();
    let mib = |n: u64| i64::try_from(n * MIB).unwrap();
    let seek = |at, whence| lseek(&scsi0, at, whence);
    assert_eq!(seek(0, Whence::SeekData), Ok(mib(4)));
    assert_eq!(seek(mib(4), Whence::SeekHole), Ok(mib(24)));
    assert_eq!(seek(mib(24), Whence::SeekData), Ok(mib(50)));
    assert_eq!(seek(mib(50), Whence::SeekHole), Ok(mib(51)));
    assert_eq!(seek(mib(51), Whence::SeekData), Err(Errno::ENXIO));
    drop(scsi0);

    let whole = fs::read(image("scsi0")).unwrap();
    for offset in [0, 4 * MIB - 4096, 20 * MIB + 8192, 63 * MIB] {
        let (at, len) = (usize::try_from(offset).unwrap(), MIB as usize);
        let read = read_direct(&open_direct(&served.file("scsi0")), offset, len).unwrap();
        assert!(read == whole[at..at + len], "O_DIRECT at {offset}");
    }
    thread::scope(|scope| {
        for number in 0..24u64 {
            let (path, whole) = (served.file("scsi0"), &whole);
            scope.spawn(move || {
                for round in 0..12u64 {
                    let offset = (number * 11 + round * 17) % 63 * MIB + number * 4096;
                    let (at, len) = (usize::try_from(offset).unwrap(), 300 << 10);
                    let mut buffer = vec![0; len];
                    File::open(&path).unwrap().read_exact_at(&mut buffer, offset).unwrap();
                    assert!(buffer == whole[at..at + len], "reader {number} at {offset}");
                }
            });
        }
    });

    let write = OpenOptions::new().write(true).open(served.file("scsi0")).unwrap_err();
    assert_eq!(write.raw_os_error(), Some(Errno::EROFS as i32));

    // Somebody who has a file open keeps the mount, unless it is forced away.
    let path = dir.display().to_string();
    let open = open_direct(&served.file("scsi0"));
    let refused = site.program.run(&["umount", &path]).code(11);
    assert!(refused.stderr.contains("busy"), "{}", refused.stderr);
    site.program.run(&["umount", "--force", &path]).ok();
    assert!(read_direct(&open, 4 * MIB, 4096).is_err());
    served.ends_with(0);
    assert!(!is_mounted(&dir));
    site.program.run(&["umount", &path]).code(2);
}

#[test]
fn the_mount_goes_away_on_every_way_out() {
    let site = site();
    let dir = mount_point(&site);
    for (signal, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143), (Signal::SIGHUP, 129)] {
        let Some(mut served) = mount(&site, &dir) else { return };
        served.signal(signal);
        served.ends_with(code);
        assert!(!is_mounted(&dir), "{signal}");
    }
    let Some(mut served) = mount(&site, &dir) else { return };
    let open = open_direct(&served.file("scsi0"));
    assert!(is_mounted(&dir));
    served.signal(Signal::SIGTERM);
    served.ends_with(143);
    assert!(!is_mounted(&dir), "although a file is open");
    assert!(read_direct(&open, 4 * MIB, 4096).is_err());

    let Some(mut served) = mount(&site, &dir) else { return };
    site.program.run(&["mount", "latest", &dir.display().to_string()]).code(2);
    site.program.run(&["umount", &dir.display().to_string()]).ok();
    served.ends_with(0);
    assert!(!is_mounted(&dir));

    fs::write(dir.join("file"), "").unwrap();
    let refused = site.program.run(&["mount", "latest", &dir.display().to_string()]).code(2);
    assert!(refused.stderr.contains("not empty"), "{}", refused.stderr);
}

#[test]
fn a_killed_server_gives_errors_and_the_next_mount_clears_what_it_left() {
    let site = site();
    let dir = mount_point(&site);
    let Some(mut served) = mount(&site, &dir) else { return };
    let path = served.file("scsi0");
    let open = open_direct(&path);
    let reader = thread::spawn(move || {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(30) {
            if read_direct(&open, 5 * MIB, 1 << 20).is_err() && File::open(&path).is_err() {
                return true;
            }
        }
        false
    });
    served.signal(Signal::SIGKILL);
    served.child.wait().unwrap();
    assert!(reader.join().unwrap(), "a reader goes on without a server");
    assert!(is_mounted(&dir), "nobody is left to unmount");
    assert_eq!(fs::read_dir(&dir).unwrap_err().raw_os_error(), Some(Errno::ENOTCONN as i32));

    let mut again = mount(&site, &dir).expect("the dead mount is cleared");
    assert!(File::open(again.file("scsi0")).is_ok());
    again.signal(Signal::SIGKILL);
    again.child.wait().unwrap();
    let link = site.program.dir().join("link");
    std::os::unix::fs::symlink("a mount", &link).unwrap();
    site.program.run(&["umount", &link.display().to_string()]).ok();
    assert!(!is_mounted(&dir));

    let mut third = mount(&site, &dir).expect("nothing is there");
    let run = site.program.run(&["recover"]).ok();
    assert!(!run.stdout.contains("mount") && is_mounted(&dir), "it lives: {}", run.stdout);
    third.signal(Signal::SIGKILL);
    third.child.wait().unwrap();
    let run = site.program.run(&["recover", "--dry-run"]).code(26);
    assert!(run.stdout.contains(&format!("would undo: dead mount at {}", dir.display())), "{}", run.stdout);
    assert!(is_mounted(&dir));
    let run = site.program.run(&["recover"]).ok();
    assert!(run.stdout.contains(&format!("undone: dead mount at {}", dir.display())), "{}", run.stdout);
    assert!(!is_mounted(&dir));
    no_files_left(&site.program.run_dir());
}

#[test]
fn a_server_that_hangs_does_not_keep_its_mount() {
    let site = site();
    let dir = mount_point(&site);
    let Some(mut served) = mount(&site, &dir) else { return };
    let open = open_direct(&served.file("scsi0"));
    stop(i32::try_from(served.child.id()).unwrap());
    let reader = thread::spawn(move || read_direct(&open, 5 * MIB, 4096).is_err());
    thread::sleep(Duration::from_millis(300));
    assert!(!reader.is_finished(), "nobody answers");
    site.program.run(&["umount", "--force", &dir.display().to_string()]).ok();
    assert!(reader.join().unwrap(), "the reader is freed with an error");
    assert!(!is_mounted(&dir));
    served.signal(Signal::SIGCONT);
    served.ends_with(0);
}

/// Ends a loop device, and the file system on it.
struct Loop {
    device: String,
    mounted: Option<PathBuf>,
}

impl Drop for Loop {
    fn drop(&mut self) {
        if let Some(path) = &self.mounted {
            let _ = umount2(path, MntFlags::MNT_DETACH);
        }
        let _ = Command::new("losetup").args(["-d", &self.device]).status();
    }
}

const KEPT: &str = "what the guest keeps\n";

/// By the kernel: the image as a block device, and its file system.
fn check_loop_mount(file: &str, image: &Path, room: &Path) {
    let mut losetup = Command::new("losetup");
    losetup.args(["--read-only", "--find", "--show", file]).stderr(Stdio::piped());
    let device = match losetup.output() {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        Ok(output) => return eprintln!("skipped: no loop device: {}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => return eprintln!("skipped: no losetup: {error}"),
    };
    let mut device = Loop { device, mounted: None };
    run("e2fsck", &["-fn", &device.device]);
    run("cmp", &[&device.device, &image.display().to_string()]);
    let place = room.join("loop");
    fs::create_dir_all(&place).unwrap();
    match mount_device(Some(device.device.as_str()), &place, Some("ext4"), MsFlags::MS_RDONLY, Some("noload")) {
        Ok(()) => {
            device.mounted = Some(place.clone());
            assert_eq!(fs::read_to_string(place.join("file")).unwrap(), KEPT);
        }
        Err(error) => eprintln!("skipped: loop devices cannot be mounted here: {error}"),
    }
}

/// By libguestfs, which boots a small guest of its own for it.
fn check_guestmount(file: &str, room: &Path) {
    if fs::read_dir("/lib/modules").map_or(0, Iterator::count) == 0 {
        return eprintln!("skipped: guestmount needs a kernel with its modules on this host");
    }
    let place = room.join("files");
    fs::create_dir_all(&place).unwrap();
    // Not a pipe: what stays in the background keeps it open.
    let log = room.join("guestmount.log");
    let mut guestmount = Command::new("guestmount");
    let pid = room.join("guestmount.pid");
    guestmount.args(["--ro", "--format=raw", "-a", file, "-m", "/dev/sda", "--pid-file"]).args([&pid, &place]);
    guestmount
        .env("LIBGUESTFS_BACKEND", "direct")
        .env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")
        // What it builds for its guest, and keeps.
        .env("LIBGUESTFS_CACHEDIR", room)
        .stdout(Stdio::null())
        .stderr(File::create(&log).unwrap());
    match guestmount.status() {
        Ok(status) => assert!(status.success(), "{}", fs::read_to_string(log).unwrap()),
        Err(error) => return eprintln!("skipped: no guestmount (libguestfs-tools): {error}"),
    }
    let kept = fs::read_to_string(place.join("file"));
    let pid = fs::read_to_string(pid).unwrap();
    run("guestunmount", &["--retry=20", &place.display().to_string()]);
    // Until then its guest has the file open.
    while Path::new("/proc").join(pid.trim()).exists() {
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(kept.unwrap(), KEPT);
}

/// What `qemu-img`, `e2fsck`, `debugfs` and the kernel's loop device make of an archive's disk, whose content is `image`.
fn check_programs(file: &Path, image: &Path, room: &Path) {
    let [file, original, converted] =
        [file, image, &room.join("converted.qcow2")].map(|path| path.display().to_string());
    let info = run("qemu-img", &["info", "--output=json", &file]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["format"].as_str(), Some("raw"));
    assert_eq!(info["virtual-size"].as_u64(), Some(fs::metadata(image).unwrap().len()));
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &file, &converted]);
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", &converted, &original]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &file, &original]);
    run("e2fsck", &["-fn", &file]);
    assert_eq!(run("debugfs", &["-R", "cat /file", &file]), KEPT);
    check_loop_mount(&file, image, room);
}

#[test]
fn a_file_system_in_a_mounted_archive_of_every_provider_is_sound() {
    let room = tempfile::tempdir().unwrap();
    let (tree, image) = (room.path().join("tree"), room.path().join("ext4.raw"));
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), KEPT).unwrap();
    make_ext4(&image, 64 * MIB, Some(&tree));
    let scsi0 = DiskSpec { content: Some(image.clone()), ..DiskSpec::new("scsi0", 64 * MIB) };
    let virtio1 = DiskSpec::new("virtio1", 8 * MIB);
    let site = Site::new(Kind::Stock, VmBuilder::new().disk_spec(scsi0).disk_spec(virtio1));
    let root = site.program.dir().display().to_string();
    site.program.configure(&format!(
        "[target.images]\nprovider = 'directory'\npath = '{root}/images'\n\
         [target.attic]\nprovider = 'borg'\nrepository = '{root}/attic'\nencryption = 'none'\n"
    ));
    let dir = mount_point(&site);
    for target in ["local", "images", "attic"] {
        if target == "attic" && !borg::possible() {
            continue;
        }
        site.program.run(&["target", "init", target]).ok();
        // Twice, so that what is mounted comes from two archives.
        site.backup(&["-t", target]).ok();
        site.vm.write("virtio1", 2 * MIB, MIB, 0x61);
        // So little that borg gets it by itself.
        site.vm.write("virtio1", 5 * MIB, 4096, 0x62);
        site.backup(&["-t", target, "--require-incremental"]).ok();
        let Some(mut served) = mount_from(&site, &dir, &["-t", target]) else { return };
        check_programs(&served.file("scsi0"), &image, room.path());
        if target == "local" {
            check_guestmount(&served.file("scsi0").display().to_string(), room.path());
        }
        let virtio1 = fs::read(served.file("virtio1")).unwrap();
        let expected = (0..8 * MIB).map(|at| match at {
            at if at / MIB == 2 => 0x61,
            at if at / 4096 == 5 * MIB / 4096 => 0x62,
            _ => 0,
        });
        assert!(virtio1.into_iter().eq(expected), "{target}");
        site.program.run(&["umount", &dir.display().to_string()]).ok();
        served.ends_with(0);
    }
    site.assert_nothing_left();
}
