//! What runs that died have left, whatever became of their journals, of the guest and of its QEMU meanwhile; and what somebody
//! else has set up, which is never touched.

use crate::rig::{
    BlockState, Bus, Fault, Format, Io, Kind, MIB, QmpClient, Site, Style, VmBuilder, no_files_left, old_qemu,
};
use serde_json::{Value, json};
use std::{
    fs,
    path::PathBuf,
    process::Child,
    time::{Duration, Instant},
};

const DISKS: [&str; 2] = ["scsi0", "virtio1"];

fn site(kind: Kind) -> Site {
    let style = if kind == Kind::Proxmox { Style::Proxmox } else { Style::Blockdev };
    let io = if old_qemu() { Io::Main } else { Io::Thread };
    let vm = VmBuilder::new().disk("scsi0", 32 * MIB, Bus::VirtioScsi, style, Format::Raw, io).disk(
        "virtio1",
        16 * MIB,
        Bus::VirtioBlk,
        style,
        Format::Qcow2,
        Io::Main,
    );
    let site = Site::new(kind, vm);
    site.vm.write("scsi0", 0, 24 * MIB, 0x31);
    site.vm.write("virtio1", 0, 8 * MIB, 0x32);
    site.backup(&[]).ok();
    site.vm.write("scsi0", 0, 16 * MIB, 0x41);
    site
}

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[track_caller]
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_mins(1);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A run that was killed while it read: everything is set up.
fn dead_run(site: &Site) {
    let child = site.start_backup(&["--bwlimit", "2MiB"]);
    wait_until("no exports", || BlockState::of(&site.vm).exports.len() == DISKS.len());
    std::thread::sleep(Duration::from_millis(200));
    kill(child);
}

fn journal(site: &Site) -> PathBuf {
    site.program.state().join(format!("journal/{}.journal", site.guest()))
}

fn count(site: &Site, command: &str) -> usize {
    site.vm.seen_commands().iter().filter(|seen| seen.name == command).count()
}

/// Lines of noise, and one that was half written when the power went, keep nothing from being undone. Noise may have been a step,
/// so that it is told.
fn damaged(kind: Kind) {
    let site = site(kind);
    dead_run(&site);
    let path = journal(&site);
    let text = fs::read(&path).unwrap();
    let mut damaged = Vec::new();
    for (number, line) in text.split_inclusive(|byte| *byte == b'\n').enumerate() {
        damaged.extend_from_slice(line);
        if number % 2 == 0 {
            damaged.extend_from_slice(b"\0\xff\xfe{not a step\n{\"step\":\"unheard-of\",\"name\":\"x\"}\n");
        }
    }
    damaged.extend_from_slice(b"{\"step\":\"filter\",\"name\":\"pvb-");
    fs::write(&path, damaged).unwrap();
    let run = site.program.run(&["recover", "--dry-run"]).code(26);
    assert!(run.stdout.contains("would undo: export") && run.stdout.contains("lines make no sense"), "{}", run.stdout);
    let status = site.program.run(&["access", "status"]).code(26);
    assert!(status.stdout.contains("lines make no sense"), "{}", status.stdout);
    let run = site.program.run(&["recover"]).code(3);
    assert!(run.stdout.contains("undone: export") && run.stdout.contains("lines make no sense"), "{}", run.stdout);
    site.assert_nothing_left();
    let run = site.program.run(&["recover"]).ok();
    assert!(run.stdout.contains("nothing is left"), "{}", run.stdout);
    site.backup(&["--require-incremental"]).ok();
    site.assert_restores_now(&DISKS);
}

#[test]
fn a_damaged_journal_is_undone_on_stock_qemu() {
    damaged(Kind::Stock);
}

#[test]
fn a_damaged_journal_is_undone_on_proxmox() {
    damaged(Kind::Proxmox);
}

/// A step that is not known any more: what it told of stays, the run that finds it says so, and the next archive is right.
#[test]
fn a_destroyed_step_is_told_and_its_effect_stays() {
    let site = site(Kind::Stock);
    dead_run(&site);
    let text = fs::read_to_string(journal(&site)).unwrap();
    let lost = text.lines().find(|line| line.contains("fleecing-file")).expect("a fleecing image");
    fs::write(journal(&site), text.replacen(lost, &"\0".repeat(lost.len()), 1)).unwrap();
    let run = site.backup(&["--require-incremental"]).code(3);
    assert!(run.stdout.contains("1 line makes no sense in the recovery journal"), "{}", run.stdout);
    assert_eq!(fs::read_dir(site.program.fleecing()).unwrap().count(), 1, "nobody knows whose the image is");
    let image = fs::read_dir(site.program.fleecing()).unwrap().next().unwrap().unwrap().path();
    assert!(fs::read_to_string(journal(&site).with_extension("journal.damaged")).unwrap().contains('\0'));
    fs::remove_file(image).unwrap();
    site.assert_nothing_left();
    site.assert_restores_now(&DISKS);
    site.backup(&["--require-incremental"]).ok();
}

/// Destroys the line that says whose the journal is.
fn destroy_begin(site: &Site) {
    let text = fs::read_to_string(journal(site)).unwrap();
    let begin = text.lines().next().filter(|line| line.contains(r#""begin""#)).expect("the first line");
    fs::write(journal(site), text.replacen(begin, &"\0".repeat(begin.len()), 1)).unwrap();
}

/// On Proxmox VE, where names in QEMU are not ours alone, the NBD server's socket tells that the access is ours.
#[test]
fn a_journal_that_has_lost_whose_it_is_is_undone_where_our_server_listens() {
    let site = site(Kind::Proxmox);
    dead_run(&site);
    destroy_begin(&site);
    let run = site.program.run(&["recover"]).code(3);
    assert!(run.stdout.contains("undone: access") && run.stdout.contains("makes no sense"), "{}", run.stdout);
    site.assert_nothing_left();
    site.backup(&["--require-incremental"]).ok();
    site.assert_restores_now(&DISKS);
}

/// In another QEMU what has the same names is left alone, and when nothing has them there is nothing to undo there.
#[test]
fn a_journal_that_has_lost_whose_it_is_ends_nothing_in_another_qemu() {
    let mut site = site(Kind::Proxmox);
    dead_run(&site);
    destroy_begin(&site);
    site.vm.kill();
    site.vm.start_again();
    site.before = BlockState::of(&site.vm);
    let image = site.vm.dir().join("theirs.raw");
    fs::File::create(&image).unwrap().set_len(32 * MIB).unwrap();
    let theirs =
        json!({"driver": "raw", "node-name": "drive-scsi0-fleecing", "file": {"driver": "file", "filename": image}});
    site.vm.qmp("blockdev-add", theirs);
    let before = BlockState::of(&site.vm);
    let run = site.program.run(&["recover"]).code(26);
    assert!(run.stdout.contains("still there: node drive-scsi0-fleecing: the journal has lost"), "{}", run.stdout);
    assert_eq!(BlockState::of(&site.vm), before, "their node was touched");
    site.vm.qmp("blockdev-del", json!({"node-name": "drive-scsi0-fleecing"}));
    let run = site.program.run(&["recover"]).code(3);
    assert!(run.stdout.contains("undone: fleecing"), "{}", run.stdout);
    site.assert_nothing_left();
    site.backup(&[]).ok();
    site.assert_restores_now(&DISKS);
}

/// The journal's QEMU has the process id and the start time of the one that runs now, in another boot.
fn same_process_of_another_boot(site: &Site) {
    let text = fs::read_to_string(journal(site)).unwrap();
    let lines = text.lines().map(|line| {
        let mut step: Value = serde_json::from_str(line).unwrap();
        if step["step"] == "begin" {
            // Elsewhere it is the one behind the socket, which is the rig's own and lives on.
            if site.kind == Kind::Proxmox {
                let stat = fs::read_to_string(format!("/proc/{}/stat", site.vm.pid())).unwrap();
                let start = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap();
                step["qemu"]["pid"] = json!(site.vm.pid());
                step["qemu"]["start_time"] = json!(start.parse::<u64>().unwrap());
            }
            step["qemu"]["boot_id"] = json!("9c3f7e52-0000-4000-8000-57a1e0b007ed");
        }
        format!("{step}\n")
    });
    fs::write(journal(site), lines.collect::<String>()).unwrap();
}

/// The host went down and came up again, and QEMU has the process id and the start time that it had before.
fn another_boot(kind: Kind) {
    for by_backup in [false, true] {
        let mut site = site(kind);
        let pid_path = site.vm.qmp_socket().with_extension("pid");
        let note_pid = |site: &Site| {
            if kind == Kind::Proxmox {
                fs::write(&pid_path, format!("{}\n", site.vm.pid())).unwrap();
            }
        };
        note_pid(&site);
        dead_run(&site);
        site.vm.kill();
        site.vm.start_again();
        note_pid(&site);
        site.before = BlockState::of(&site.vm);
        fs::remove_dir_all(site.program.run_dir()).unwrap();
        same_process_of_another_boot(&site);
        if by_backup {
            let run = site.backup(&[]);
            assert!(matches!(run.code, Some(0 | 3)), "{}\n{}", run.stdout, run.stderr);
            assert!(run.stdout.contains("undone: fleecing"), "{}", run.stdout);
        } else {
            let run = site.program.run(&["recover"]).ok();
            assert!(run.stdout.contains("undone: fleecing"), "{}", run.stdout);
            let changes =
                ["block-export-del", "backup-access-teardown", "blockdev-del", "nbd-server-stop", "transaction"];
            assert_eq!(changes.map(|command| count(&site, command)), [0; 5], "the new QEMU was changed");
            site.assert_nothing_left();
            let run = site.backup(&[]).ok();
            assert_eq!(run.summary()["incremental"], false, "{}", run.stdout);
        }
        site.assert_restores_now(&DISKS);
        site.assert_nothing_left();
        site.backup(&["--require-incremental"]).ok();
    }
}

#[test]
fn the_journal_of_another_boot_is_undone_on_stock_qemu() {
    another_boot(Kind::Stock);
}

#[test]
fn the_journal_of_another_boot_is_undone_on_proxmox() {
    another_boot(Kind::Proxmox);
}

/// A journal that is gone altogether: what is there is not touched, since nobody knows whose it is, and named.
#[test]
fn without_its_journal_what_a_dead_run_left_is_named_and_not_touched() {
    let site = site(Kind::Stock);
    dead_run(&site);
    let text = fs::read(journal(&site)).unwrap();
    fs::write(journal(&site), "").unwrap();
    let before = BlockState::of(&site.vm);
    let run = site.backup(&[]);
    assert_ne!(run.code, Some(0));
    assert!(run.stderr.contains("dead run"), "{}", run.stderr);
    assert_eq!(BlockState::of(&site.vm), before);
    fs::write(journal(&site), text).unwrap();
    site.program.run(&["recover"]).ok();
    site.assert_nothing_left();
}

/// The journal of an earlier QEMU process, while somebody else has an access to the new one whose nodes and exports have the
/// very same names, as Proxmox VE's devices give them.
#[test]
fn an_old_journal_does_not_end_what_somebody_else_has_set_up_since() {
    for (pid_file, boot) in [(false, false), (true, false), (true, true)] {
        let mut site = site(Kind::Proxmox);
        let pid_path = site.vm.qmp_socket().with_extension("pid");
        if pid_file {
            fs::write(&pid_path, format!("{}\n", site.vm.pid())).unwrap();
        }
        dead_run(&site);
        site.vm.kill();
        site.vm.start_again();
        if pid_file {
            fs::write(&pid_path, format!("{}\n", site.vm.pid())).unwrap();
        }
        if boot {
            same_process_of_another_boot(&site);
        }

        let image = site.vm.dir().join("theirs.raw");
        fs::File::create(&image).unwrap().set_len(32 * MIB).unwrap();
        let socket = site.vm.dir().join("theirs.sock");
        let mut theirs = QmpClient::connect(&site.vm.qmp_socket(), Duration::from_secs(10)).unwrap();
        let mut say = |command: &str, arguments: Value| {
            theirs.execute(command, arguments).unwrap_or_else(|error| panic!("{command}: {}", error.desc()))
        };
        say(
            "blockdev-add",
            json!({"driver": "raw", "node-name": "drive-scsi0-fleecing", "file": {"driver": "file", "filename": image}}),
        );
        let answer = say(
            "backup-access-setup",
            json!({"target-id": "snap-other", "devices": [{"device": "drive-scsi0", "bitmap-mode": "none"}]}),
        );
        say("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}}));
        say(
            "block-export-add",
            json!({"type": "nbd", "id": "drive-scsi0", "name": "drive-scsi0", "node-name": answer[0]["node-name"]}),
        );
        drop(theirs);
        let before = BlockState::of(&site.vm);
        assert_eq!(before.exports.iter().collect::<Vec<_>>(), ["drive-scsi0"]);

        let run = site.program.run(&["recover"]).ok();
        assert!(run.stdout.contains("undone: fleecing"), "{}", run.stdout);
        let run = site.backup(&[]).code(11);
        assert!(run.stderr.contains("snapshot access") && run.stderr.contains("drive-scsi0"), "{}", run.stderr);
        assert_eq!(BlockState::of(&site.vm), before, "their access was touched");
        assert_eq!(site.vm.proxmox_fatal(), None);
        no_files_left(&site.program.run_dir());
        no_files_left(&site.program.fleecing());

        let mut theirs = QmpClient::connect(&site.vm.qmp_socket(), Duration::from_secs(10)).unwrap();
        let mut say = |command: &str, arguments: Value| {
            theirs.execute(command, arguments).unwrap_or_else(|error| panic!("{command}: {}", error.desc()))
        };
        say("block-export-del", json!({"id": "drive-scsi0", "mode": "hard"}));
        say("nbd-server-stop", json!({}));
        say("backup-access-teardown", json!({"target-id": "snap-other", "success": false}));
        say("blockdev-del", json!({"node-name": "drive-scsi0-fleecing"}));
        drop(theirs);
        site.backup(&[]).ok();
        site.assert_restores_now(&DISKS);
        site.assert_nothing_left();
    }
}

/// Killed between `stop` and `cont`: the guest runs on without any command of ours, and is resumed once.
fn paused_by_us(kind: Kind, inside: &str) {
    let site = site(kind);
    site.vm.fault(inside, 1, Fault::Stall(Duration::from_secs(3)));
    let (before, conts) = (count(&site, inside), count(&site, "cont"));
    let child = site.start_backup(&[]);
    wait_until("the set-up never came", || count(&site, inside) > before);
    kill(child);
    let start = Instant::now();
    wait_until("nobody resumes the guest", || site.vm.status() == "running");
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert_eq!(count(&site, "cont"), conts + 1);
    // The run's own pause is in its journal. The guest runs, so recovery leaves it alone.
    let run = site.program.run(&["recover"]).ok();
    assert!(run.stdout.contains("undone: paused"), "{}", run.stdout);
    assert_eq!((site.vm.status().as_str(), count(&site, "cont")), ("running", conts + 1));
    site.assert_nothing_left();
    site.backup(&["--require-incremental"]).ok();
    site.assert_restores_now(&DISKS);
}

#[test]
fn a_guest_that_we_paused_runs_on_when_we_are_killed() {
    paused_by_us(Kind::Proxmox, "backup-access-setup");
}

/// A guest that somebody else has paused stays so, whatever happens to us.
fn paused_by_others(kind: Kind) {
    let site = site(kind);
    let conts = count(&site, "cont");
    site.vm.pause();
    site.backup(&["--require-incremental"]).ok();
    assert_eq!(site.vm.status(), "paused");
    let child = site.start_backup(&["--full", "--bwlimit", "2MiB"]);
    wait_until("no exports", || BlockState::of(&site.vm).exports.len() == DISKS.len());
    kill(child);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(site.vm.status(), "paused");
    site.program.run(&["recover"]).ok();
    assert_eq!((site.vm.status().as_str(), count(&site, "cont")), ("paused", conts));
    site.vm.resume();
    site.assert_nothing_left();
    site.backup(&["--require-incremental"]).ok();
    site.assert_restores_now(&DISKS);
}

#[test]
fn a_guest_that_others_paused_stays_paused_on_stock_qemu() {
    paused_by_others(Kind::Stock);
}

#[test]
fn a_guest_that_others_paused_stays_paused_on_proxmox() {
    paused_by_others(Kind::Proxmox);
}
