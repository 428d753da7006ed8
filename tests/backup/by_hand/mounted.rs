//! Accesses by hand as files.

use super::{DISKS, access, map, set_up, site, status, tear_down};
use crate::rig::{Kind, LoadPlan, MIB, Run, Site, no_files_left, processes_about, stop};
use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, fallocate},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

/// Segments of the site's disks, which are small.
const SEGMENT: u64 = 256 << 10;

/// Whether files can be shown here.
fn fuse() -> bool {
    let there = Path::new("/dev/fuse").exists();
    if !there {
        eprintln!("skipped: there is no /dev/fuse");
    }
    there
}

fn try_mount(site: &Site, dir: &Path, more: &[&str]) -> Run {
    site.program.run(&[&["access", "mount", site.guest(), &dir.display().to_string(), "--json"], more].concat())
}

/// A new directory on which the disks are shown, and what the program said.
fn mount(site: &Site, name: &str, more: &[&str]) -> (PathBuf, Value) {
    let dir = site.program.dir().join(name);
    fs::create_dir_all(&dir).unwrap();
    let run = try_mount(site, &dir, more).ok();
    (dir, run.events().pop().unwrap_or_else(|| panic!("{}", run.stdout)))
}

fn is_mounted(dir: &Path) -> bool {
    let dir = dir.parent().unwrap().canonicalize().unwrap().join(dir.file_name().unwrap());
    let dir = dir.to_str().unwrap();
    fs::read_to_string("/proc/mounts").unwrap().lines().any(|line| line.split(' ').nth(1) == Some(dir))
}

fn pid(mounted: &Value) -> i32 {
    i32::try_from(mounted["pid"].as_i64().unwrap()).unwrap()
}

fn lives(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z'))
}

#[track_caller]
fn wait_until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Every server has ended: no process knows the site's directory any more but its machine.
#[track_caller]
fn no_servers(site: &Site) {
    let own = site.program.run_dir().display().to_string();
    wait_until("a server is left", || {
        processes_about(&own, &[site.vm.pid()]).iter().all(|line| !line.contains("--background"))
    });
}

/// Who passes on what QEMU sends has given up what that does not take.
#[track_caller]
fn is_confined(pid: i32) {
    const CAP_SYS_MODULE: u64 = 1 << 16;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let value = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    if value("Uid:").starts_with("0\t") {
        assert_eq!(value("Seccomp:"), "2", "{status}");
        assert_eq!(u64::from_str_radix(&value("CapEff:"), 16).unwrap() & CAP_SYS_MODULE, 0, "{status}");
    }
}

fn read(file: &File, offset: u64, len: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(len).unwrap()];
    file.read_exact_at(&mut bytes, offset).map(|()| bytes)
}

#[track_caller]
fn unreadable(file: &File, offset: u64) {
    let error = read(file, offset, 4096).expect_err("it can be read");
    assert_eq!(error.raw_os_error(), Some(Errno::EIO as i32));
}

fn log(mounted: &Value) -> String {
    fs::read_to_string(mounted["log"].as_str().unwrap()).unwrap()
}

fn segment(dir: &Path, disk: &str, index: u64) -> PathBuf {
    dir.join(disk).join(format!("{:06x}", index >> 12)).join(format!("{index:010x}"))
}

/// Joins the segments of a disk as a shell loop would.
fn joined(site: &Site, dir: &Path, disk: &str, size: u64) -> PathBuf {
    let out = site.program.dir().join(format!("{disk}.joined"));
    let file = File::create(&out).unwrap();
    file.set_len(size).unwrap();
    for shard in fs::read_dir(dir.join(disk)).unwrap() {
        for entry in fs::read_dir(shard.unwrap().path()).unwrap() {
            let path = entry.unwrap().path();
            let index = u64::from_str_radix(path.file_name().unwrap().to_str().unwrap(), 16).unwrap();
            file.write_all_at(&fs::read(&path).unwrap(), index * SEGMENT).unwrap();
        }
    }
    out
}

fn shows(kind: Kind) {
    if !fuse() {
        return;
    }
    let site = site(kind);
    let nowhere = site.program.dir().join("nowhere");
    fs::create_dir(&nowhere).unwrap();
    let run = try_mount(&site, &nowhere, &[]).code(20);
    assert!(run.stderr.contains("access setup"), "{}", run.stderr);

    let load = site.vm.load(LoadPlan::seeded(6).pause(Duration::from_millis(3)));
    let start = site.vm.mark();
    access(&site, &[]);
    let end = site.vm.mark();
    let (images, told) = mount(&site, "images", &[]);
    let (segments, _) = mount(&site, "segments", &["--view", "segment"]);
    assert_eq!((&told["disks"][0]["name"], &told["disks"][0]["size"]), (&json!("scsi0"), &json!(64 * MIB)));
    std::thread::sleep(Duration::from_millis(300));
    let paths = DISKS.map(|disk| images.join(disk));
    let pairs: Vec<_> = DISKS.iter().copied().zip(paths.iter().map(PathBuf::as_path)).collect();
    let seen = site.vm.matching_instant(&pairs, start..=end).unwrap_or_else(|torn| panic!("{torn}"));
    let joined = [("scsi0", 64 * MIB), ("virtio1", 32 * MIB)].map(|(disk, size)| joined(&site, &segments, disk, size));
    load.stop();
    let pairs: Vec<_> = DISKS.iter().copied().zip(joined.iter().map(PathBuf::as_path)).collect();
    site.vm.matching_instant(&pairs, seen..=seen).unwrap_or_else(|torn| panic!("{torn}"));
    assert!(!segment(&segments, "scsi0", 255).exists(), "the end of the disk was never written");
    assert_eq!(fs::metadata(segment(&segments, "scsi0", 3)).unwrap().len(), SEGMENT);

    is_confined(pid(&told));
    let look = ["access", "map", site.guest(), "scsi0"];
    let looked = Run::of(&site.program.command(&look).env("PVEBACKUP_LOG", "pvebackup=debug").output().unwrap()).ok();
    assert!(looked.stderr.contains("system_calls: true"), "{}", looked.stderr);

    // Nothing can be changed, and a second mount does not hide the first.
    let writing = |path: &Path| OpenOptions::new().write(true).open(path).unwrap_err().raw_os_error();
    assert_eq!(writing(&paths[0]), Some(Errno::EROFS as i32));
    assert_eq!(writing(&segment(&segments, "scsi0", 3)), Some(Errno::EROFS as i32));
    assert_eq!(fs::create_dir(segments.join("x")).unwrap_err().raw_os_error(), Some(Errno::EROFS as i32));
    assert_eq!(fs::metadata(&images).unwrap().mode() & 0o777, 0o700);
    let run = try_mount(&site, &images, &[]).code(2);
    assert!(run.stderr.contains("is a mount point already"), "{}", run.stderr);
    let standing = status(&site, 0);
    let places: Vec<&str> = standing["mounts"].as_array().unwrap().iter().filter_map(|m| m["path"].as_str()).collect();
    assert_eq!(places, [images.to_str().unwrap(), segments.to_str().unwrap()]);

    // One goes by hand, the other with the access.
    site.program.run(&["umount", images.to_str().unwrap()]).ok();
    wait_until("the mount is still there", || status(&site, 0)["mounts"].as_array().is_some_and(|m| m.len() == 1));
    let run = tear_down(&site, &[]).ok();
    assert!(!run.stdout.contains("in use"), "{}", run.stdout);
    assert!(!is_mounted(&images) && !is_mounted(&segments));
    no_servers(&site);
    site.assert_nothing_left();
    site.backup(&[]).ok();
    site.assert_restores_now(&DISKS);
}

#[test]
fn files_show_the_instant_on_stock_qemu() {
    shows(Kind::Stock);
}

#[test]
fn files_show_the_instant_on_proxmox() {
    shows(Kind::Proxmox);
}

/// What changed can be read; the rest where QEMU lets it.
fn shows_what_changed(kind: Kind) {
    if !fuse() {
        return;
    }
    let site = site(kind);
    site.backup(&[]).ok();
    site.vm.write("scsi0", 16 * MIB, 8 * MIB, 0x41);
    let access = access(&site, &["--target", "local", "--disk", "scsi0"]);
    site.vm.write("scsi0", 16 * MIB, 4 * MIB, 0x42);
    let (images, told) = mount(&site, "images", &[]);
    let (segments, of_segments) = mount(&site, "segments", &["--view", "segment"]);
    let file = File::open(images.join("scsi0")).unwrap();
    assert!(read(&file, 16 * MIB, 8 * MIB).unwrap().iter().all(|byte| *byte == 0x41));
    let changed = segment(&segments, "scsi0", 16 * MIB / SEGMENT);
    let clean = segment(&segments, "scsi0", 0);
    assert!(fs::read(&changed).unwrap().iter().all(|byte| *byte == 0x41));
    let time = |path: &Path| fs::metadata(path).unwrap().modified().unwrap();
    let since: jiff::Timestamp = access["since"].as_str().unwrap().parse().unwrap();
    assert_eq!(time(&changed), SystemTime::from(since));
    assert_eq!(time(&clean), SystemTime::UNIX_EPOCH);
    assert_eq!(of_segments["disks"][0]["changed_segments"], 8 * MIB / SEGMENT);
    // Opening is always allowed.
    let clean = File::open(&clean).unwrap();
    if kind == Kind::Stock {
        assert_eq!(told["disks"][0]["readable_bytes"], 64 * MIB);
        assert!(read(&file, 0, 4096).unwrap().iter().all(|byte| *byte == 0x31));
        assert!(read(&clean, 0, SEGMENT).unwrap().iter().all(|byte| *byte == 0x31));
    } else {
        assert_eq!(told["disks"][0]["readable_bytes"], 8 * MIB);
        unreadable(&file, 0);
        unreadable(&file, 24 * MIB);
        unreadable(&clean, 0);
        for log in [log(&told), log(&of_segments)] {
            assert!(log.contains("reading 4096 bytes at 0") && log.contains("outside of what changed"), "{log}");
        }
        let again = site.program.dir().join("again");
        fs::create_dir(&again).unwrap();
        let run = try_mount(&site, &again, &[]).ok();
        assert!(run.stdout.contains("no image of the disk"), "{}", run.stdout);
    }
    drop((file, clean));
    tear_down(&site, &[]).ok();
    no_servers(&site);
    site.assert_nothing_left();
    let run = site.backup(&["--require-incremental"]).ok();
    assert_eq!(run.read_bytes(), 8 * MIB);
    site.assert_restores_now(&DISKS);
}

#[test]
fn files_show_what_changed_on_stock_qemu() {
    shows_what_changed(Kind::Stock);
}

#[test]
fn files_show_what_changed_on_proxmox() {
    shows_what_changed(Kind::Proxmox);
}

const HOLE: FallocateFlags = FallocateFlags::FALLOC_FL_PUNCH_HOLE.union(FallocateFlags::FALLOC_FL_KEEP_SIZE);

/// Holes that are punched into a file are discarded from the snapshot access.
fn trims(kind: Kind) {
    if !fuse() {
        return;
    }
    let site = site(kind);
    site.backup(&[]).ok();
    access(&site, &["--trim"]);
    site.vm.write("scsi0", 8 * MIB, 16 * MIB, 0x41);
    site.vm.flush("scsi0");
    let (images, _) = mount(&site, "images", &[]);
    let path = images.join("scsi0");
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    assert!(read(&file, 8 * MIB, 16 * MIB).unwrap().iter().all(|byte| *byte == 0x31));
    let space = || status(&site, 0)["fleecing_bytes"].as_u64().unwrap();
    let before = space();
    assert!(before >= 16 * MIB, "{before}");
    let allocate = |mode| fallocate(&file, mode, 8 << 20, 12 << 20);
    assert_eq!(allocate(FallocateFlags::empty()), Err(Errno::EOPNOTSUPP));
    assert!(read(&file, 8 * MIB, 4096).is_ok());
    allocate(HOLE).unwrap();
    assert!(space() <= before - 12 * MIB, "{before} before, {} now", space());
    unreadable(&file, 8 * MIB);
    assert!(read(&file, 20 * MIB, 4 * MIB).unwrap().iter().all(|byte| *byte == 0x31));
    assert!(file.write_all_at(b"x", 0).is_err());
    drop(file);

    // What was discarded stays so: for the map, which QEMU does not tell then, and for the next mount.
    let seen = map(&site, "scsi0");
    assert_eq!(seen["data_bytes"], 64 * MIB);
    site.program.run(&["umount", images.to_str().unwrap()]).ok();
    let (images, _) = mount(&site, "images again", &[]);
    let file = File::open(images.join("scsi0")).unwrap();
    unreadable(&file, 8 * MIB);
    assert!(read(&file, 0, 8 * MIB).unwrap().iter().all(|byte| *byte == 0x31));
    drop(file);
    tear_down(&site, &[]).ok();
    no_servers(&site);
    site.assert_nothing_left();
    site.backup(&["--require-incremental"]).ok();
    site.assert_restores_now(&DISKS);
}

#[test]
fn holes_free_fleecing_space_on_stock_qemu() {
    trims(Kind::Stock);
}

#[test]
fn holes_free_fleecing_space_on_proxmox() {
    trims(Kind::Proxmox);
}

#[test]
fn an_access_in_use_ends_without_success_only() {
    if !fuse() {
        return;
    }
    let site = site(Kind::Stock);
    access(&site, &["--bitmap", "new"]);
    let (images, told) = mount(&site, "images", &[]);
    let file = File::open(images.join("scsi0")).unwrap();
    let run = tear_down(&site, &["--success"]).code(11);
    assert!(run.stderr.contains("is in use"), "{}", run.stderr);
    assert!(read(&file, 0, MIB).unwrap().iter().all(|byte| *byte == 0x31), "the access has suffered");
    assert_eq!(status(&site, 0)["state"], "by-hand");
    let run = tear_down(&site, &[]).ok();
    assert!(run.stdout.contains("was in use: its readers get errors"), "{}", run.stdout);
    // The kernel may have kept what was read before.
    assert!(read(&file, 40 * MIB, MIB).is_err());
    assert!(!is_mounted(&images) && !lives(pid(&told)));
    site.assert_nothing_left();
}

#[test]
fn a_killed_server_is_told_and_its_mount_cleared() {
    if !fuse() {
        return;
    }
    let site = site(Kind::Stock);
    access(&site, &[]);
    let dead = |name: &str| {
        let (dir, told) = mount(&site, name, &[]);
        let dead = Pid::from_raw(pid(&told));
        kill(dead, Signal::SIGKILL).unwrap();
        wait_until("it is not dead", || !lives(dead.as_raw()));
        // The kernel may be about to end the connection.
        let refused = Errno::from_raw(fs::read_dir(&dir).unwrap_err().raw_os_error().unwrap());
        assert!(matches!(refused, Errno::ENOTCONN | Errno::ECONNABORTED), "{refused}");
        let mounts = status(&site, 26)["mounts"].clone();
        assert_eq!(mounts, json!([{"path": dir, "pid": dead.as_raw(), "served": false}]));
        dir
    };
    let dir = dead("one");
    site.program.run(&["umount", dir.to_str().unwrap()]).ok();
    assert_eq!(status(&site, 0)["mounts"], json!([]));
    let dir = dead("two");
    let run = site.program.run(&["access", "status"]).code(26);
    assert!(run.stdout.contains("was killed; `pvebackup umount"), "{}", run.stdout);
    let run = site.program.run(&["recover", "--dry-run", site.guest()]).code(26);
    assert!(run.stdout.contains(&format!("would undo: served {}", dir.display())), "{}", run.stdout);
    assert!(is_mounted(&dir));
    let run = site.program.run(&["recover", site.guest()]).ok();
    assert!(run.stdout.contains(&format!("undone: served {}", dir.display())), "{}", run.stdout);
    assert!(!is_mounted(&dir));
    site.assert_nothing_left();
    assert_eq!(status(&site, 0)["state"], "idle");
}

/// Files outlive neither the access nor their QEMU for long.
fn qemu_ends_below(kind: Kind) {
    if !fuse() {
        return;
    }
    let mut site = site(kind);
    for how in ["teardown", "recover", "backup"] {
        access(&site, &[]);
        let (images, told) = mount(&site, how, &[]);
        let file = File::open(images.join("scsi0")).unwrap();
        site.vm.kill();
        assert!(read(&file, 0, 4096).is_err());
        let standing = status(&site, 26);
        assert_eq!((&standing["qemu_gone"], &standing["mounts"][0]["served"]), (&json!(true), &json!(true)));
        match how {
            "teardown" => drop(tear_down(&site, &[]).ok()),
            "recover" => drop(site.program.run(&["recover"]).ok()),
            _ => {
                site.vm.start_again();
                site.backup(&[]).code(3);
                site.assert_restores_now(&DISKS);
            }
        }
        assert!(!is_mounted(&images) && !lives(pid(&told)), "{how}");
        no_files_left(&site.program.run_dir());
        no_files_left(&site.program.fleecing());
        if how != "backup" {
            site.vm.start_again();
        }
    }
    site.assert_nothing_left();
}

#[test]
fn files_go_with_their_qemu_on_stock_qemu() {
    qemu_ends_below(Kind::Stock);
}

#[test]
fn files_go_with_their_qemu_on_proxmox() {
    qemu_ends_below(Kind::Proxmox);
}

#[test]
fn a_server_in_the_foreground_ends_with_its_signal_and_leaves_the_access() {
    if !fuse() {
        return;
    }
    let site = site(Kind::Stock);
    access(&site, &[]);
    let dir = site.program.dir().join("images");
    fs::create_dir(&dir).unwrap();
    let path = dir.display().to_string();
    let mut child = site.program.spawn(&["access", "mount", site.guest(), &path, "--foreground"]);
    wait_until("nothing is mounted", || is_mounted(&dir));
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert!(!is_mounted(&dir));
    let standing = status(&site, 0);
    assert_eq!((&standing["state"], &standing["mounts"]), (&json!("by-hand"), &json!([])));
    // A server that does not answer does not keep the access.
    let (dir, told) = mount(&site, "images", &[]);
    stop(pid(&told));
    set_up(&site, &[]).code(11);
    tear_down(&site, &[]).ok();
    assert!(!is_mounted(&dir) && !lives(pid(&told)));
    site.assert_nothing_left();
}
