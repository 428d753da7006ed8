//! Runs that are stopped: by signals, and by SIGKILL.

use crate::rig::{Bus, Format, Io, Kind, LoadPlan, MIB, Site, Style, VmBuilder, old_qemu};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    process::Child,
    time::{Duration, Instant},
};

fn site(kind: Kind) -> Site {
    let style = if kind == Kind::Proxmox { Style::Proxmox } else { Style::Blockdev };
    let site = Site::new(
        kind,
        VmBuilder::new()
            .disk(
                "scsi0",
                64 * MIB,
                Bus::VirtioScsi,
                style,
                Format::Raw,
                if old_qemu() { Io::Main } else { Io::Thread },
            )
            .disk("virtio1", 64 * MIB, Bus::VirtioBlk, style, Format::Qcow2, Io::Main),
    );
    for (disk, byte) in [("scsi0", 0x31), ("virtio1", 0x32)] {
        site.vm.write(disk, 0, 48 * MIB, byte);
    }
    site.backup(&[]).ok();
    site
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
}

/// Waits until the run has a snapshot access with exports.
fn wait_for_exports(site: &Site) {
    let deadline = Instant::now() + Duration::from_mins(1);
    while site.vm.qmp("query-block-exports", serde_json::json!({})).as_array().is_none_or(Vec::is_empty) {
        assert!(Instant::now() < deadline, "no exports within 60 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn dirty(site: &Site) {
    site.vm.write("scsi0", 8 * MIB, 24 * MIB, 0x41);
    site.vm.write("virtio1", 0, 16 * MIB, 0x42);
}

fn stopped_by(kind: Kind, stop: Signal, code: i32) {
    let site = site(kind);
    dirty(&site);
    let load = site.vm.load(LoadPlan::seeded(11));
    // Slow enough to be caught in the middle.
    let child = site.start_backup(&["--bwlimit", "4MiB"]);
    wait_for_exports(&site);
    std::thread::sleep(Duration::from_millis(300));
    signal(&child, stop);
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(code), "{text}");
    load.stop();
    site.assert_nothing_left();

    // Nothing was committed, so the next backup has everything since the first, and is incremental all the same.
    let run = site.backup(&["--require-incremental"]).ok();
    assert!(run.read_bytes() >= 40 * MIB, "{}", run.read_bytes());
    site.assert_restores_now(&["scsi0", "virtio1"]);
    site.assert_nothing_left();
}

#[test]
fn sigint_tears_down_and_keeps_the_bitmaps_on_stock_qemu() {
    stopped_by(Kind::Stock, Signal::SIGINT, 130);
}

#[test]
fn sigterm_tears_down_and_keeps_the_bitmaps_on_proxmox() {
    stopped_by(Kind::Proxmox, Signal::SIGTERM, 143);
}

fn killed(kind: Kind, delays: &[u64]) {
    let site = site(kind);
    for delay in delays {
        dirty(&site);
        let load = site.vm.load(LoadPlan::seeded(*delay).pause(Duration::from_millis(3)));
        let mut child = site.start_backup(&["--bwlimit", "16MiB"]);
        std::thread::sleep(Duration::from_millis(*delay));
        signal(&child, Signal::SIGKILL);
        child.wait().unwrap();
        load.stop();
        for disk in ["scsi0", "virtio1"] {
            site.vm.assert_disk_intact(disk);
        }
        // The next run cleans up by itself, says so, and its archive is right.
        let load = site.vm.load(LoadPlan::seeded(delay + 1).pause(Duration::from_millis(5)));
        let start = site.vm.mark();
        let run = site.backup(&[]);
        let end = site.vm.mark();
        load.stop();
        assert!(matches!(run.code, Some(0 | 3)), "killed after {delay} ms: {}\n{}", run.stdout, run.stderr);
        site.assert_restores(&["scsi0", "virtio1"], start..=end);
        site.assert_nothing_left();
    }
}

#[test]
fn a_killed_run_is_cleaned_up_by_the_next_on_stock_qemu() {
    killed(Kind::Stock, &[120, 250, 400, 700, 1100, 1900]);
}

#[test]
fn a_killed_run_is_cleaned_up_by_the_next_on_proxmox() {
    killed(Kind::Proxmox, &[120, 250, 400, 700, 1100, 1900]);
}

#[test]
fn recover_undoes_what_a_killed_run_left() {
    let site = site(Kind::Stock);
    dirty(&site);
    let mut child = site.start_backup(&["--bwlimit", "4MiB"]);
    wait_for_exports(&site);
    let run = site.program.run(&["recover", "--dry-run"]).ok();
    assert!(run.stdout.contains("a run is at work"), "{}", run.stdout);
    let run = site.backup(&[]).code(11);
    assert!(run.stderr.contains("another run"), "{}", run.stderr);
    signal(&child, Signal::SIGKILL);
    child.wait().unwrap();
    let run = site.program.run(&["recover", "--dry-run"]).code(26);
    assert!(run.stdout.contains("would undo"), "{}", run.stdout);
    let run = site.program.run(&["recover", "guest"]).ok();
    assert!(run.stdout.contains("undone"), "{}", run.stdout);
    site.assert_nothing_left();
    let run = site.program.run(&["recover"]).ok();
    assert!(run.stdout.contains("nothing is left"), "{}", run.stdout);
    site.backup(&["--require-incremental"]).ok();
    site.assert_restores_now(&["scsi0", "virtio1"]);
}

#[test]
fn qemu_killed_in_the_middle_leaves_no_files_and_the_next_backup_is_full() {
    let mut site = site(Kind::Stock);
    dirty(&site);
    let child = site.start_backup(&["--bwlimit", "4MiB"]);
    wait_for_exports(&site);
    site.vm.kill();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    crate::rig::no_files_left(&site.program.fleecing());
    site.vm.start_again();
    let run = site.backup(&[]).ok();
    assert!(run.plan("scsi0").1.contains("process"), "{}", run.plan("scsi0").1);
    site.assert_restores_now(&["scsi0", "virtio1"]);
}
