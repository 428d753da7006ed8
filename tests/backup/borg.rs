//! Real machines to a borg repository, by way of the segment view.

use crate::{
    rig::{Bus, Format, Io, Kind, LoadPlan, MIB, Program, Run, Site, Style, VmBuilder, borg, old_qemu},
    sshd::Sshd,
};
use serde_json::json;
use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Output},
    time::Duration,
};

/// Segment length where none is configured, of disks as small as those here, and of fine segments.
const SEGMENT: u64 = 2 << 20;
const FINE: u64 = 64 << 10;

/// A target in `dir`, with these lines more.
fn target(dir: &Path, more: &str) -> String {
    target_at(&dir.join("attic").display().to_string(), more)
}

fn target_at(repository: &str, more: &str) -> String {
    format!(
        "[defaults]\ntarget = 'attic'\n[target.attic]\nprovider = 'borg'\nrepository = '{repository}'\nprogram = '{}'\n\
         lock-wait = '1s'\ncompression = 'zstd,1'\n{more}\n",
        borg::program().display()
    )
}

/// Two disks, and the default target in a new borg repository.
fn site(kind: Kind) -> Option<Site> {
    if kind == Kind::Proxmox && old_qemu() {
        eprintln!("skipped: Proxmox VE's QEMU with backup access is 9.2 or newer");
        return None;
    }
    if !borg::possible() {
        return None;
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
    site.program.configure(&target(&dir, &format!("passphrase-file = '{}/passphrase'", dir.display())));
    site.backup(&[]).code(10);
    site.program.run(&["target", "init"]).ok();
    Some(site)
}

/// Segments have another length here than for other targets, and small changes are stored by themselves.
#[test]
fn a_look_at_the_bitmap_by_hand_finds_what_the_next_backup_reads() {
    let Some(site) = site(Kind::Stock) else { return };
    site.vm.write("scsi0", 0, 20 * MIB, 0x11);
    site.backup(&[]).ok();
    site.vm.write("scsi0", 5 * MIB, FINE, 0x41);
    let qmp = site.vm.qmp_socket().display().to_string();
    let setup = ["access", "setup", "--json", "--qmp", &qmp, site.guest(), "--target", "attic"];
    let run = site.program.run(&setup).ok();
    let access = run.events().into_iter().find(|e| e["type"] == "access").unwrap_or_else(|| panic!("{}", run.stdout));
    let scsi0 = access["disks"].as_array().unwrap().iter().find(|d| d["name"] == "scsi0").unwrap();
    assert_eq!((&scsi0["action"], &scsi0["dirty_bytes"]), (&"used".into(), &FINE.into()), "{access}");
    site.program.run(&["access", "teardown", site.guest()]).ok();
    let run = site.backup(&["--require-incremental"]).ok();
    assert_eq!(run.read_bytes(), FINE);
    site.assert_restores_now(&["scsi0", "virtio1"]);
    nothing_mounted(&site);
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
    let archive = format!("{}::{name}", program.dir().join("attic").display());
    let info: serde_json::Value = serde_json::from_slice(&borg(&site, &["info", "--json", &archive])).unwrap();
    assert_eq!(info["archives"][0]["chunker_params"], json!(["fixed", SEGMENT / 2, 0]));
    borg(&site, &["delete", &archive]);
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

fn borg(site: &Site, arguments: &[&str]) -> Vec<u8> {
    let output = Command::new(borg::program())
        .args(arguments)
        .env("BORG_BASE_DIR", site.program.dir().join("user"))
        .env("BORG_PASSPHRASE", "correct horse")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

#[test]
fn stock_history_into_borg() {
    history(Kind::Stock, 4);
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

    let mut holder = Command::new(borg::program())
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

    // In a mount namespace of its own.
    if let Some(run) = without_fuse(&site) {
        let run = run.code(1);
        let text = format!("{}{}", run.stdout, run.stderr);
        assert!(text.contains("/dev/fuse"), "{text}");
    }
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
    while !borgs(&site.program).is_empty() {
        std::thread::sleep(Duration::from_millis(50));
    }
    let list = site.program.run(&["list", "--json"]).ok();
    assert!(!list.stdout.contains("pve-qemu-"), "{}", list.stdout);
    let run = site.program.run(&["recover", "--dry-run", "guest"]).code(26);
    assert!(run.stdout.contains(&format!("would undo: mount {}", view.display())), "{}", run.stdout);
    site.vm.write("scsi0", MIB, MIB, 0x42);
    let run = site.backup(&[]).code(3);
    assert!(run.stdout.contains("undone") || run.stderr.contains("undo"), "{}{}", run.stdout, run.stderr);
    site.assert_restores_now(&["scsi0", "virtio1"]);
    nothing_mounted(&site);
    site.backup(&["--require-incremental"]).ok();
    site.assert_restores_now(&["scsi0", "virtio1"]);
}

/// A backup in a mount namespace whose `/dev` has no `fuse`.
fn without_fuse(site: &Site) -> Option<Run> {
    let command = site.program.command(&["vm", "--json", "--name", "guest", "--qmp"]);
    let script = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9 || exit 77\n\
                  exec \"$0\" \"$@\"";
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", script])
        .arg(command.get_program())
        .args(command.get_args())
        .arg(site.vm.qmp_socket())
        .envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .output();
    match output {
        Ok(output) if output.status.code() != Some(77) => Some(Run {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }),
        _ => {
            eprintln!("skipped: a namespace without /dev/fuse cannot be made");
            None
        }
    }
}

#[test]
fn what_is_wrong_with_a_borg_target_is_told_before_anything_is_done() {
    if !borg::possible() {
        return;
    }
    let program = Program::new();
    let dir = program.dir().to_owned();
    let refused = |more: &str, code: i32, words: &str| {
        program.configure(&target(&dir, more));
        let run = program.run(&["target", "init"]).code(code);
        assert!(run.stderr.contains(words), "{}", run.stderr);
        assert!(!dir.join("attic").exists() && !program.state().join("borg").exists(), "something was done");
    };
    refused("", 12, "passphrase-fd");
    refused("passphrase-credential = 'attic'", 12, "CREDENTIALS_DIRECTORY");
    refused("passphrase-fd = 77", 12, "descriptor 77");
    refused("encryption = 'rot13'\npassphrase-file = '/x'", 2, "rot13");
    refused("encryption = 'none'\nextra-arguments = ['--dry-run']", 2, "--dry-run");
    refused("encryption = 'none'\nupload-ratelimit = 0", 2, "upload-ratelimit");

    let lines = target(&dir, "encryption = 'none'");
    let ours = format!("program = '{}'", borg::program().display());
    let with = |borg: &str| lines.replace(&ours, &format!("program = '{borg}'"));
    let refused = |borg: &str, words: &str| {
        program.configure(&with(borg));
        let run = program.run(&["target", "test"]).code(1);
        assert!(run.stderr.contains(words), "{}", run.stderr);
        assert!(!program.state().join("borg").exists(), "something was done");
    };
    refused("/nowhere/borg", "`/nowhere/borg` is not installed");
    // What a borg that is too old, and one that is too new, says of itself.
    for version in ["1.1.18", "2.0.0b14"] {
        let old = dir.join("borg");
        fs::write(&old, format!("#!/bin/sh\necho borg {version}\n")).unwrap();
        Command::new("chmod").arg("+x").arg(&old).status().unwrap();
        refused(old.to_str().unwrap(), &format!("`borg {version}`, but borg 1.2 or a later 1.x is needed"));
    }
}

#[test]
fn a_passphrase_comes_by_descriptor_or_by_credential() {
    if !borg::possible() {
        return;
    }
    let program = Program::new();
    let dir = program.dir().to_owned();
    fs::write(dir.join("attic-key"), "correct horse\nsecond line\n").unwrap();
    let by_descriptor = |verb: &str| -> Output {
        let command = program.command(&["target", verb]);
        Command::new("sh")
            .args(["-c", "exec \"$0\" \"$@\" 7<\"$KEY\""])
            .arg(command.get_program())
            .args(command.get_args())
            .envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))))
            .env("KEY", dir.join("attic-key"))
            .output()
            .unwrap()
    };
    program.configure(&target(&dir, "passphrase-fd = 7"));
    let made = by_descriptor("init");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    assert!(by_descriptor("test").status.success());

    program.configure(&target(&dir, "passphrase-credential = 'attic-key'"));
    let found = program.command(&["target", "test"]).env("CREDENTIALS_DIRECTORY", &dir).output().unwrap();
    assert!(found.status.success(), "{}", String::from_utf8_lossy(&found.stderr));
    program.configure(&target(&dir, "passphrase-credential = 'attic'"));
    let missing = program.command(&["target", "test"]).env("CREDENTIALS_DIRECTORY", &dir).output().unwrap();
    assert_eq!(missing.status.code(), Some(12));
}

/// Processes of a borg that works for this installation.
fn borgs(program: &Program) -> Vec<String> {
    let ours = format!("BORG_BASE_DIR={}", program.state().join("borg/attic").display());
    let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let has = |pid: &String| {
        fs::read(format!("/proc/{pid}/environ")).is_ok_and(|text| text.split(|b| *b == 0).any(|v| v == ours.as_bytes()))
    };
    pids.filter(has).collect()
}

/// A backup, slow enough for `meanwhile`, which is called when 4 MiB are read. What it printed, and its exit code.
fn interrupted(site: &Site, meanwhile: impl FnOnce()) -> (String, Option<i32>) {
    let mut child = site.start_backup(&["--bwlimit", "2MiB"]);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut text = String::new();
    let far = |line: &str| {
        let event: serde_json::Value = serde_json::from_str(line).unwrap();
        event["type"] == "progress" && event["done"].as_u64() >= Some(4 * MIB)
    };
    for line in lines.by_ref() {
        let enough = far(&line);
        text.extend([line, "\n".into()]);
        if enough {
            break;
        }
    }
    meanwhile();
    text.extend(lines.map(|line| line + "\n"));
    (text, child.wait_with_output().unwrap().status.code())
}

/// After one that failed: what it has discarded from the snapshot, the bitmap must know still.
fn nothing_is_lost(site: &Site, text: &str) {
    nothing_mounted(site);
    let discarded = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let discarded = discarded.filter_map(|event| event["discarded_bytes"].as_u64()).max();
    assert!(discarded.is_some_and(|bytes| bytes > 0), "nothing was discarded: {text}");
    site.vm.write("scsi0", MIB, MIB, 0x43);
    let run = site.backup(&["--require-incremental"]).ok();
    assert!(run.read_bytes() >= 12 * MIB, "{}", run.read_bytes());
    site.assert_restores_now(&["scsi0", "virtio1"]);
    site.vm.assert_disk_intact("scsi0");
}

#[test]
fn a_borg_that_is_killed_leaves_the_guest_as_it_was() {
    let Some(site) = site(Kind::Stock) else { return };
    site.vm.write("scsi0", 0, 12 * MIB, 0x41);
    site.backup(&[]).ok();
    site.vm.write("scsi0", 0, 12 * MIB, 0x42);
    let (text, code) = interrupted(&site, || {
        let borgs = borgs(&site.program);
        assert!(!borgs.is_empty(), "no borg is at work");
        assert!(Command::new("kill").arg("-KILL").args(&borgs).status().unwrap().success());
    });
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("borg ended with signal 9"), "{text}");
    nothing_is_lost(&site, &text);
}

#[test]
fn a_connection_that_breaks_leaves_the_guest_as_it_was() {
    let Some(site) = site(Kind::Stock) else { return };
    let server = match Sshd::start() {
        Ok(server) => server,
        Err(reason) => {
            eprintln!("skipped: {reason}");
            return;
        }
    };
    let dir = site.program.dir();
    let mut more = format!(
        "passphrase-file = '{}/passphrase'\nssh-key = '{}'\nknown-hosts = '{}'\n",
        dir.display(),
        server.file("user").display(),
        server.known_hosts().display()
    );
    if let Ok(program) = std::env::var("PVEBACKUP_TEST_BORG") {
        more.extend(["remote-path = '", &program, "'\n"]);
    }
    site.program.configure(&target_at(&server.url(&dir.join("behind")), &more));
    site.program.run(&["target", "init"]).ok();
    site.vm.write("scsi0", 0, 12 * MIB, 0x41);
    site.backup(&[]).ok();
    site.vm.write("scsi0", 0, 12 * MIB, 0x42);
    let (text, code) = interrupted(&site, || Sshd::cut_off(server.pid()));
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("Connection closed by remote host"), "{text}");
    nothing_is_lost(&site, &text);
}
