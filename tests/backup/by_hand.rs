//! Accesses by hand: what an operator sees is the instant, and backups go on as if he had never looked.

use crate::rig::{
    BlockState, Bus, Fault, Format, Io, Kind, LoadPlan, MIB, Run, Site, Style, VmBuilder, no_files_left, old_qemu,
};
use serde_json::{Value, json};
use std::{path::PathBuf, process::Command, time::Duration};

mod mounted;

const DISKS: [&str; 2] = ["scsi0", "virtio1"];

fn site(kind: Kind) -> Site {
    let style = if kind == Kind::Proxmox { Style::Proxmox } else { Style::Blockdev };
    let io = if old_qemu() { Io::Main } else { Io::Thread };
    let vm = VmBuilder::new().disk("scsi0", 64 * MIB, Bus::VirtioScsi, style, Format::Raw, io).disk(
        "virtio1",
        32 * MIB,
        Bus::VirtioBlk,
        style,
        Format::Qcow2,
        Io::Main,
    );
    let site = Site::new(kind, vm);
    site.vm.write("scsi0", 0, 48 * MIB, 0x31);
    site.vm.write("virtio1", 0, 24 * MIB, 0x32);
    site
}

fn set_up(site: &Site, more: &[&str]) -> Run {
    let qmp = site.vm.qmp_socket().display().to_string();
    let mut words = vec!["access", "setup", site.guest(), "--json"];
    if site.guest() == "guest" {
        words.extend(["--qmp", &qmp]);
    }
    words.extend(more);
    let run = site.program.run(&words);
    assert_eq!(site.vm.proxmox_fatal(), None, "Proxmox's QEMU would have been killed");
    run
}

fn access(site: &Site, more: &[&str]) -> Value {
    let run = set_up(site, more).ok();
    run.events().into_iter().find(|e| e["type"] == "access").unwrap_or_else(|| panic!("no access: {}", run.stdout))
}

fn of_disk<'a>(access: &'a Value, disk: &str) -> &'a Value {
    access["disks"].as_array().unwrap().iter().find(|d| d["name"] == disk).unwrap_or_else(|| panic!("{access}"))
}

fn tear_down(site: &Site, more: &[&str]) -> Run {
    let run = site.program.run(&[&["access", "teardown", site.guest()], more].concat());
    assert_eq!(site.vm.proxmox_fatal(), None, "Proxmox's QEMU would have been killed");
    run
}

fn map(site: &Site, disk: &str) -> Value {
    let run = site.program.run(&["access", "map", site.guest(), disk, "--json"]).ok();
    serde_json::from_str(&run.stdout).unwrap()
}

fn status(site: &Site, code: i32) -> Value {
    let run = site.program.run(&["access", "status", site.guest(), "--json"]).code(code);
    serde_json::from_str(&run.stdout).unwrap()
}

fn bitmaps(site: &Site) -> Vec<(String, String)> {
    BlockState::of(&site.vm).bitmaps.into_iter().map(|bitmap| (bitmap.node, bitmap.name)).collect()
}

/// Reads a disk as an operator would.
fn read(site: &Site, access: &Value, disk: &str) -> PathBuf {
    let out = site.program.dir().join(format!("{disk}.by-hand"));
    let uri = of_disk(access, disk)["uri"].as_str().unwrap();
    let output = Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "raw", uri]).arg(&out).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    out
}

fn looks(kind: Kind) {
    let site = site(kind);
    site.backup(&[]).ok();
    site.vm.write("scsi0", 20 * MIB, 4 * MIB, 0x41);
    let bitmaps_before = bitmaps(&site);

    let load = site.vm.load(LoadPlan::seeded(5).pause(Duration::from_millis(3)));
    let start = site.vm.mark();
    let access = access(&site, &[]);
    let end = site.vm.mark();
    assert_eq!(of_disk(&access, "scsi0")["size"], 64 * MIB);
    assert_eq!(of_disk(&access, "scsi0")["context"], Value::Null);
    std::thread::sleep(Duration::from_millis(500));
    // Before QEMU 10 only requests within a cluster are answered right, and qemu-img sends larger ones.
    let images: Vec<PathBuf> = DISKS.iter().filter(|_| !old_qemu()).map(|disk| read(&site, &access, disk)).collect();
    load.stop();
    let pairs: Vec<_> = DISKS.iter().copied().zip(images.iter().map(PathBuf::as_path)).collect();
    if !pairs.is_empty() {
        site.vm.matching_instant(&pairs, start..=end).unwrap_or_else(|torn| panic!("{torn}"));
    }
    // What an operator's client trims could not be read again.
    let uri = of_disk(&access, "scsi0")["uri"].as_str().unwrap();
    assert!(Command::new("nbdinfo").args(["--is", "read-only", uri]).status().unwrap().success());
    let info = Command::new("nbdinfo").arg("--size").arg(of_disk(&access, "virtio1")["uri"].as_str().unwrap()).output();
    assert_eq!(String::from_utf8_lossy(&info.unwrap().stdout).trim(), (32 * MIB).to_string());

    let seen = map(&site, "scsi0");
    assert_eq!(
        (&seen["size"], &seen["dirty_bytes"], &seen["clean_bytes"]),
        (&json!(64 * MIB), &Value::Null, &json!(0))
    );
    let sum = |key: &str| seen[key].as_u64().unwrap();
    assert_eq!(sum("data_bytes") + sum("zero_bytes"), 64 * MIB);
    assert!(sum("data_bytes") >= 40 * MIB, "{}", sum("data_bytes"));
    let run = site.program.run(&["access", "map", site.guest(), "scsi0", "--ascii"]).ok();
    assert!(
        run.stdout.is_ascii() && run.stdout.contains("a cell is 64 KiB") && run.stdout.contains("##"),
        "{}",
        run.stdout
    );
    site.program.run(&["access", "map", site.guest(), "scsi7"]).code(20);

    // Nobody else gets in, and is told why.
    for run in [site.backup(&[]), set_up(&site, &[])] {
        let run = run.code(11);
        let command = format!("pvebackup access teardown {}", site.guest());
        assert!(run.stderr.contains("by hand") && run.stderr.contains(&command), "{}", run.stderr);
    }
    let standing = status(&site, 0);
    assert_eq!((&standing["state"], &standing["qemu_gone"]), (&json!("by-hand"), &json!(false)));
    assert_eq!(standing["since"], access["since"]);
    assert!(standing["fleecing_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{standing}");

    let run = tear_down(&site, &[]).ok();
    assert!(run.stdout.contains("is ended"), "{}", run.stdout);
    site.assert_nothing_left();
    assert_eq!(bitmaps(&site), bitmaps_before);
    assert_eq!(status(&site, 0)["state"], "idle");
    tear_down(&site, &[]).code(20);

    site.backup(&["--require-incremental"]).ok();
    site.assert_restores_now(&DISKS);
    site.assert_nothing_left();
}

#[test]
fn an_operator_sees_the_instant_and_the_chain_goes_on_on_stock_qemu() {
    looks(Kind::Stock);
}

#[test]
fn an_operator_sees_the_instant_and_the_chain_goes_on_on_proxmox() {
    looks(Kind::Proxmox);
}

/// A look at a target's bitmap takes nothing from it.
fn peeks(kind: Kind) {
    let site = site(kind);
    site.backup(&[]).ok();
    let bitmaps_before = bitmaps(&site);
    site.vm.write("scsi0", 16 * MIB, 8 * MIB, 0x41);
    let access = access(&site, &["--target", "local", "--disk", "scsi0"]);
    assert_eq!(access["disks"].as_array().unwrap().len(), 1);
    assert_eq!(of_disk(&access, "scsi0")["dirty_bytes"], 8 * MIB);
    assert_eq!(of_disk(&access, "scsi0")["action"], "used");
    site.vm.write("scsi0", 40 * MIB, 4 * MIB, 0x42);
    let seen = map(&site, "scsi0");
    assert_eq!((&seen["dirty_bytes"], &seen["data_bytes"]), (&json!(8 * MIB), &json!(8 * MIB)));
    assert_eq!(
        seen["extents"],
        json!([
            {"offset": 0, "length": 16 * MIB, "state": "clean"},
            {"offset": 16 * MIB, "length": 8 * MIB, "state": "data"},
            {"offset": 24 * MIB, "length": 40 * MIB, "state": "clean"},
        ])
    );
    let run = site.program.run(&["access", "map", site.guest(), "scsi0"]).ok();
    assert!(run.stdout.contains("8 MiB dirty: 8 MiB data") && run.stdout.contains('█'), "{}", run.stdout);
    tear_down(&site, &[]).ok();
    site.assert_nothing_left();
    assert_eq!(bitmaps(&site), bitmaps_before);

    let run = site.backup(&["--require-incremental"]).ok();
    assert_eq!(run.read_bytes(), 12 * MIB);
    site.assert_restores_now(&DISKS);
}

#[test]
fn a_look_at_a_targets_bitmap_takes_nothing_from_it_on_stock_qemu() {
    peeks(Kind::Stock);
}

#[test]
fn a_look_at_a_targets_bitmap_takes_nothing_from_it_on_proxmox() {
    peeks(Kind::Proxmox);
}

/// Success with a target's bitmap: nothing is built on it any more.
fn succeeds_with_a_target(kind: Kind) {
    let site = site(kind);
    site.backup(&[]).ok();
    site.vm.write("scsi0", 0, 8 * MIB, 0x41);
    access(&site, &["--target", "local", "--disk", "scsi0"]);
    let run = tear_down(&site, &["--success"]).ok();
    assert!(run.stdout.contains("`local` is full"), "{}", run.stdout);
    site.assert_nothing_left();
    let run = site.backup(&["--require-incremental"]).code(24);
    assert!(run.stderr.contains("scsi0"), "{}", run.stderr);
    let run = site.backup(&[]).ok();
    assert_eq!(run.plan("virtio1").0, "used", "the other disk was not touched");
    site.assert_restores_now(&DISKS);
    site.vm.write("scsi0", 4 * MIB, MIB, 0x43);
    site.backup(&["--require-incremental"]).ok();
    site.assert_restores_now(&DISKS);
}

#[test]
fn success_with_a_targets_bitmap_makes_its_next_backup_full_on_stock_qemu() {
    succeeds_with_a_target(Kind::Stock);
}

#[test]
fn success_with_a_targets_bitmap_makes_its_next_backup_full_on_proxmox() {
    succeeds_with_a_target(Kind::Proxmox);
}

/// An operator's own chain, beside that of a target.
fn own_chain(kind: Kind) {
    let site = site(kind);
    site.backup(&[]).ok();
    access(&site, &["--bitmap", "new"]);
    site.vm.write("scsi0", 8 * MIB, 4 * MIB, 0x41);
    tear_down(&site, &["--success"]).ok();
    site.vm.write("scsi0", 32 * MIB, 4 * MIB, 0x42);
    // Looks without a bitmap, and ends that say failure, do not break it.
    access(&site, &[]);
    let run = tear_down(&site, &["--success"]).code(2);
    assert!(run.stderr.contains("without `--success`"), "{}", run.stderr);
    tear_down(&site, &[]).ok();
    for _ in 0..2 {
        let access = access(&site, &["--bitmap", "use"]);
        assert_eq!(of_disk(&access, "scsi0")["dirty_bytes"], 8 * MIB);
        assert_eq!(of_disk(&access, "virtio1")["dirty_bytes"], 0);
        tear_down(&site, &[]).ok();
    }
    access(&site, &["--bitmap", "use"]);
    tear_down(&site, &["--success"]).ok();
    assert_eq!(of_disk(&access(&site, &["--bitmap", "use"]), "scsi0")["dirty_bytes"], 0);
    tear_down(&site, &[]).ok();
    site.assert_nothing_left();
    let run = site.backup(&["--require-incremental"]).ok();
    assert_eq!(run.read_bytes(), 8 * MIB);
    site.assert_restores_now(&DISKS);
}

#[test]
fn an_operator_has_a_chain_of_his_own_on_stock_qemu() {
    own_chain(Kind::Stock);
}

#[test]
fn an_operator_has_a_chain_of_his_own_on_proxmox() {
    own_chain(Kind::Proxmox);
}

fn forgotten(kind: Kind) {
    let site = site(kind);
    site.backup(&[]).ok();
    site.vm.write("scsi0", 0, 4 * MIB, 0x41);
    access(&site, &["--target", "local"]);
    let run = site.program.run(&["access", "status"]).ok();
    assert!(run.stdout.contains("by hand since") && run.stdout.contains("nbd+unix:///"), "{}", run.stdout);
    let run = site.program.run(&["recover", "--dry-run"]).code(26);
    assert!(run.stdout.contains("by-hand"), "{}", run.stdout);
    site.vm.write("scsi0", 8 * MIB, 4 * MIB, 0x42);
    let run = site.program.run(&["recover"]).ok();
    assert!(run.stdout.contains("ending the access by hand"), "{}", run.stdout);
    assert_eq!(site.vm.proxmox_fatal(), None);
    site.assert_nothing_left();
    assert_eq!(status(&site, 0)["state"], "idle");
    site.program.run(&["access", "map", site.guest(), "scsi0"]).code(20);
    let run = site.backup(&["--require-incremental"]).ok();
    assert_eq!(run.read_bytes(), 8 * MIB);
    site.assert_restores_now(&DISKS);
}

#[test]
fn recover_ends_a_forgotten_access_on_stock_qemu() {
    forgotten(Kind::Stock);
}

#[test]
fn recover_ends_a_forgotten_access_on_proxmox() {
    forgotten(Kind::Proxmox);
}

fn qemu_ends(kind: Kind) {
    let mut site = site(kind);
    site.backup(&[]).ok();
    access(&site, &[]);
    site.vm.kill();
    assert_eq!(status(&site, 26)["qemu_gone"], true);
    let run = site.program.run(&["access", "status"]).code(26);
    assert!(run.stdout.contains("ended with its QEMU"), "{}", run.stdout);
    let run = site.program.run(&["access", "map", site.guest(), "scsi0"]).code(20);
    assert!(run.stderr.contains("access teardown"), "{}", run.stderr);
    let run = tear_down(&site, &[]).ok();
    assert!(run.stdout.contains("QEMU had ended before"), "{}", run.stdout);
    no_files_left(&site.program.run_dir());
    no_files_left(&site.program.fleecing());

    // Nobody has to: the next backup knows that there is nothing any more.
    site.vm.start_again();
    access(&site, &[]);
    site.vm.kill();
    site.vm.start_again();
    let run = site.backup(&[]).code(3);
    assert!(run.stdout.contains("ended with its QEMU"), "{}", run.stdout);
    site.assert_restores_now(&DISKS);
    site.assert_nothing_left();
}

#[test]
fn an_access_that_ended_with_its_qemu_leaves_files_only_on_stock_qemu() {
    qemu_ends(Kind::Stock);
}

#[test]
fn an_access_that_ended_with_its_qemu_leaves_files_only_on_proxmox() {
    qemu_ends(Kind::Proxmox);
}

#[test]
fn a_setup_that_is_killed_is_a_dead_run_and_undone_by_the_next() {
    let site = site(Kind::Stock);
    site.backup(&[]).ok();
    site.vm.fault("block-export-add", 1, Fault::Stall(Duration::from_secs(5)));
    let qmp = site.vm.qmp_socket().display().to_string();
    let mut child = site.program.spawn(&["access", "setup", "guest", "--qmp", &qmp]);
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while site.vm.seen_commands().iter().filter(|seen| seen.name == "block-export-add").count() <= 2 {
        assert!(std::time::Instant::now() < deadline, "the export never came");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(status(&site, 0)["pid"], child.id());
    child.kill().unwrap();
    child.wait().unwrap();
    let standing = status(&site, 26);
    assert_eq!(standing["state"], "left-behind");
    assert!(standing["what"].as_array().is_some_and(|what| !what.is_empty()), "{standing}");
    tear_down(&site, &[]).code(20);
    access(&site, &[]);
    tear_down(&site, &[]).ok();
    site.assert_nothing_left();
    site.backup(&["--require-incremental"]).ok();
    site.assert_restores_now(&DISKS);
}
