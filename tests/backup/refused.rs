//! Bad input and what stands in the way: a clear error, its exit code, and nothing changed.

use crate::rig::{Bus, Format, Io, Kind, MIB, Program, Site, SmallFs, Style, VmBuilder};
use serde_json::json;

fn site(kind: Kind) -> Site {
    let style = if kind == Kind::Proxmox { Style::Proxmox } else { Style::Blockdev };
    let vm = VmBuilder::new().disk("scsi0", 16 * MIB, Bus::VirtioScsi, style, Format::Raw, Io::Main);
    let site = Site::new(kind, vm);
    site.vm.write("scsi0", 0, MIB, 0x11);
    site
}

#[test]
fn unknown_guests_are_named() {
    let program = Program::new();
    let run = program.run(&["vm", "nobody"]).code(20);
    assert!(run.stderr.contains("nobody"), "{}", run.stderr);
    let run = program.run(&["vm", "4711"]).code(20);
    assert!(run.stderr.contains("4711.conf"), "{}", run.stderr);
    let run = program.run(&["vm", "../x"]).code(2);
    assert!(run.stderr.contains("no guest id"), "{}", run.stderr);
    program.run(&["vm"]).code(2);
    program.run(&["vm", "nobody", "--qmp", "/x"]).code(2);
    let run = program.run(&["vm", "--qmp", "/nowhere/x.sock"]).code(20);
    assert!(run.stderr.contains("/nowhere/x.sock"), "{}", run.stderr);
}

#[test]
fn a_guest_that_does_not_run_is_told() {
    let mut site = site(Kind::Proxmox);
    site.vm.kill();
    let run = site.program.run(&["vm", "100"]).code(20);
    assert!(run.stderr.contains("not running"), "{}", run.stderr);
}

#[test]
fn unknown_disks_and_an_empty_choice_never_reach_qemu() {
    for kind in [Kind::Stock, Kind::Proxmox] {
        let site = site(kind);
        let run = site.backup(&["--disk", "scsi7"]).code(20);
        assert!(run.stderr.contains("scsi7") && run.stderr.contains("scsi0"), "{}", run.stderr);
        let run = site.backup(&["--skip-disk", "scsi0"]).code(20);
        assert!(run.stderr.contains("no disk to back up"), "{}", run.stderr);
        let commands: Vec<String> = site.vm.seen_commands().into_iter().map(|c| c.name).collect();
        let harmless = |name: &str| {
            name.starts_with("query-") || matches!(name, "qmp_capabilities" | "qom-get" | "x-debug-query-block-graph")
        };
        assert!(commands.iter().all(|name| harmless(name)), "{commands:?}");
        site.assert_nothing_left();
    }
}

#[test]
fn somebody_elses_nbd_server_is_not_touched() {
    for kind in [Kind::Stock, Kind::Proxmox] {
        let site = site(kind);
        let socket = site.vm.dir().join("foreign.sock");
        site.vm.qmp("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}}));
        let run = site.backup(&[]).code(11);
        assert!(run.stderr.contains("NBD server"), "{}", run.stderr);
        assert!(socket.exists());
        site.vm.qmp("nbd-server-stop", json!({}));
        site.assert_nothing_left();
        site.backup(&[]).ok();
        site.assert_restores_now(&["scsi0"]);
    }
}

#[test]
fn a_busy_qmp_socket_is_waited_for_and_told() {
    let site = site(Kind::Stock);
    let other = crate::rig::QmpClient::connect(&site.vm.qmp_socket(), std::time::Duration::from_secs(5)).unwrap();
    let run = site.backup(&["--lockwait", "1s"]).code(11);
    assert!(run.stderr.contains("busy"), "{}", run.stderr);
    let run = std::thread::scope(|scope| {
        let run = scope.spawn(|| site.backup(&["--lockwait", "30s"]));
        std::thread::sleep(std::time::Duration::from_secs(1));
        drop(other);
        run.join().unwrap()
    });
    run.ok();
}

#[test]
fn no_space_for_fleecing_is_noticed_before_anything_is_touched() {
    let site = site(Kind::Stock);
    let Some(small) = SmallFs::or_skip(site.program.dir().join("small"), 1) else { return };
    let run = site.backup(&["--fleecing", &format!("dir={}", small.path().display())]).code(23);
    assert!(run.stderr.contains("fleecing"), "{}", run.stderr);
    site.assert_nothing_left();
}

#[test]
fn targets_and_passwords() {
    let site = site(Kind::Stock);
    let run = site.backup(&["--target", "nowhere"]).code(2);
    assert!(run.stderr.contains("nowhere") && run.stderr.contains("local"), "{}", run.stderr);
    let dir = site.program.dir().join("repository");
    site.program.configure(&format!(
        "[target.mine]\nprovider = 'restic'\nrepository = '{}'\npassword-file = '{}.key'\n",
        dir.display(),
        dir.display()
    ));
    let run = site.backup(&["--target", "mine"]).code(10);
    assert!(run.stderr.contains("repository"), "{}", run.stderr);
    site.program.run(&["target", "init", "mine"]).ok();
    site.backup(&["--target", "mine"]).ok();
    let keys: Vec<_> = std::fs::read_dir(dir.join("keys")).unwrap().map(|key| key.unwrap().path()).collect();
    assert_eq!(keys.len(), 1);
    // Its password is random, so nothing is gained by deriving its key slowly; restic takes the cost from the file.
    assert!(std::fs::read_to_string(&keys[0]).unwrap().contains("\"N\":16384"));
    let key = dir.with_extension("key");
    match std::process::Command::new("restic")
        .args(["-r".as_ref(), dir.as_os_str(), "-p".as_ref(), key.as_os_str(), "check".as_ref()])
        .output()
    {
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => eprintln!("skipped: no restic to look at the repository ({error})"),
    }
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&key).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    std::fs::write(&key, "wrong\n").unwrap();
    let run = site.backup(&["--target", "mine"]).code(12);
    assert!(!run.stderr.contains("wrong\n"), "{}", run.stderr);
    site.assert_nothing_left();
}

#[test]
fn archives_and_restore_targets() {
    let site = site(Kind::Stock);
    site.backup(&[]).ok();
    let program = &site.program;
    let out = program.dir().join("out");
    let to = out.display().to_string();
    program.run(&["restore", "latest~7", "--guest", "guest", "--to-dir", &to]).code(20);
    program.run(&["restore", "pve-qemu-guest-2001-01-01T00:00:00Z", "--to-dir", &to]).code(20);
    program.run(&["restore", "what", "--to-dir", &to]).code(2);
    program.run(&["restore", "latest", "--guest", "guest"]).code(2);
    assert!(!out.exists());
    let file = program.dir().join("existing.raw");
    std::fs::write(&file, b"precious").unwrap();
    let disk = format!("scsi0={}", file.display());
    program.run(&["restore", "latest", "--guest", "guest", "--disk", &disk]).code(2);
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    program.run(&["restore", "latest", "--guest", "guest", "--disk", &format!("scsi9={to}")]).code(20);
    program.run(&["restore", "latest", "--guest", "guest", "--disk", &disk, "--overwrite"]).ok();
    site.vm.assert_equals_now("scsi0", &file);
}

#[test]
fn a_damaged_repository_is_noticed_and_never_makes_an_archive() {
    let site = site(Kind::Stock);
    let noise: Vec<u8> = (0..4 * MIB)
        .scan(1u32, |n, _| {
            *n = n.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            Some((*n >> 24) as u8)
        })
        .collect();
    for (at, byte) in noise.iter().step_by(64 * 1024).enumerate() {
        site.vm.write("scsi0", at as u64 * 64 * 1024, 64 * 1024, *byte);
    }
    site.backup(&[]).ok();
    let packs = site.program.state().join("repository/data");
    let mut files = Vec::new();
    for shard in std::fs::read_dir(packs).unwrap() {
        files.extend(std::fs::read_dir(shard.unwrap().path()).unwrap().map(|file| file.unwrap().path()));
    }
    let pack = files.into_iter().max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let content = std::fs::read(&pack).unwrap();
    std::fs::remove_file(&pack).unwrap();

    let run = site.backup(&["--require-incremental"]).code(24);
    assert!(run.stderr.contains("does not exist"), "{}", run.stderr);
    let run = site.backup(&[]).code(1);
    assert!(run.stderr.contains("would not be complete"), "{}", run.stderr);
    site.assert_nothing_left();
    assert_eq!(site.program.run(&["list"]).ok().stdout.matches("pve-qemu-guest").count(), 1);
    let to = site.program.dir().join("out").display().to_string();
    let run = site.program.run(&["restore", "latest", "--guest", "guest", "--to-dir", &to]).code(25);
    assert!(run.stderr.contains("cannot be read") && run.stderr.lines().count() == 1, "{}", run.stderr);

    // Back again, but with a flipped bit.
    let mut flipped = content.clone();
    flipped[content.len() / 2] ^= 1;
    std::fs::write(&pack, flipped).unwrap();
    let run = site.program.run(&["restore", "latest", "--guest", "guest", "--to-dir", &to]).code(25);
    assert!(run.stderr.contains("cannot be read") && run.stderr.lines().count() == 1, "{}", run.stderr);
    assert!(!std::fs::exists(std::path::Path::new(&to).join("scsi0.raw")).unwrap());
    std::fs::write(&pack, content).unwrap();
    site.backup(&["--require-incremental"]).ok();
    site.assert_restores_now(&["scsi0"]);
}
