//! What the guest and its operator do in the middle of a run: reset, power-off, resize, hot-unplug, a live snapshot; and a QEMU
//! that is killed.

use crate::{
    bench::{Bench, DISKS, fails_with, in_the_middle, nothing_left, said, slow_run},
    rig::{BlockState, Kind, MIB, Run, Site, Vm, no_files_left},
};
use serde_json::json;
use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

const KINDS: [Kind; 2] = [Kind::Stock, Kind::Proxmox];

fn succeeds(run: &Run) {
    assert!(matches!(run.code, Some(0 | 3)), "{}", said(run));
}

#[test]
fn the_guest_is_reset() {
    for kind in KINDS {
        let Some(mut bench) = Bench::new("guest reset", "restic", kind) else { return };
        let act = |site: &Site, _: &_| drop(site.vm.qmp("system_reset", json!({})));
        bench.case("reset", |site| in_the_middle(site, act), succeeds);
        bench.verdict();
    }
}

/// The process that Proxmox VE's files name.
fn note_pid(site: &Site) {
    if site.kind == Kind::Proxmox {
        fs::write(site.vm.qmp_socket().with_extension("pid"), format!("{}\n", site.vm.pid())).unwrap();
    }
}

/// QEMU ends in the middle of a run: the run says so and leaves nothing, whether another QEMU is there by then or not; and the
/// next one reads everything.
fn qemu_ends(class: &'static str, end: impl Fn(&mut Vm)) {
    for kind in KINDS {
        let Some(mut bench) = Bench::new(class, "restic", kind) else { return };
        for again in [false, true] {
            let label = format!("{class}, started again at once: {again}");
            let case = bench.begin();
            note_pid(&bench.site);
            let child = slow_run(&bench.site);
            end(&mut bench.site.vm);
            if again {
                bench.site.vm.start_again();
                note_pid(&bench.site);
            }
            let run = Run::of(&child.wait_with_output().unwrap());
            let clean = bench.expect(&label, |site| {
                fails_with(&run, 1, &["guest", "disk `"]);
                assert!(!run.stderr.contains("left behind"), "{}", said(&run));
                no_files_left(&site.program.run_dir());
                no_files_left(&site.program.fleecing());
            });
            if !again {
                bench.site.vm.start_again();
            }
            bench.site.before = BlockState::of(&bench.site.vm);
            let unharmed = bench.expect(&label, |site| {
                for disk in DISKS {
                    site.vm.assert_disk_intact(disk);
                }
                let journal = site.program.run(&["recover"]).ok();
                assert!(journal.stdout.contains("nothing is left"), "{}", said(&journal));
            });
            bench.ends(case, &label, [unharmed, clean, true]);
        }
        bench.verdict();
    }
}

#[test]
fn the_guest_is_powered_off() {
    qemu_ends("guest powered off", |vm| assert!(vm.quit().success()));
}

#[test]
fn qemu_is_killed() {
    qemu_ends("QEMU killed", Vm::kill);
}

/// Plugs `scsi0` in again, as it was.
fn plug_in(site: &Site) {
    let root = &site.before.roots["scsi0"];
    site.vm.qmp(
        "device_add",
        json!({"driver": "scsi-hd", "bus": "scsihw0.0", "channel": 0, "scsi-id": 0, "lun": 0, "drive": root, "id": "scsi0",
               "werror": "report", "rerror": "report"}),
    );
}

/// The disk's front-end goes. Stock QEMU can be cleaned up; on Proxmox VE the access stays until the disk is back.
#[test]
fn a_disk_is_unplugged() {
    for kind in KINDS {
        let Some(mut bench) = Bench::new("disk unplugged", "restic", kind) else { return };
        let case = bench.begin();
        let act = |site: &Site, _: &_| drop(site.vm.qmp("device_del", json!({"id": "scsi0"})));
        let run = in_the_middle(&bench.site, act);
        let told = bench.expect("unplugged", |_| match kind {
            Kind::Stock => succeeds(&run),
            // To end the access now would end Proxmox's QEMU.
            Kind::Proxmox => {
                fails_with(&run, 26, &["guest", "disk of `drive-scsi0-fleecing` was unplugged", "recover"]);
            }
        });
        let unharmed = bench.expect("unplugged", |site| {
            assert_eq!(site.vm.status(), "running");
            site.vm.write("virtio1", MIB, MIB, 0x55);
            site.vm.assert_disk_intact("virtio1");
            // Nor does the next run.
            if kind == Kind::Proxmox {
                fails_with(&site.backup(&[]), 26, &["guest", "unplugged"]);
                assert_eq!(site.vm.proxmox_fatal(), None);
            }
        });
        bench.expect("unplugged", plug_in);
        bench.ends(case, "unplugged", [unharmed, told, true]);
        bench.verdict();
    }
}

/// As Proxmox VE unplugs a disk: its throttle node goes, too, and what is left of the access goes when the VM is stopped.
#[test]
fn a_disk_is_unplugged_with_its_nodes() {
    let Some(mut bench) = Bench::new("disk unplugged", "restic", Kind::Proxmox) else { return };
    let case = bench.begin();
    note_pid(&bench.site);
    let act = |site: &Site, _: &_| {
        site.vm.qmp("device_del", json!({"id": "scsi0"}));
        // QEMU lets go of the node a moment after the device.
        let deadline = Instant::now() + Duration::from_secs(10);
        while let Err(failure) = site.vm.try_qmp("blockdev-del", json!({"node-name": "drive-scsi0"})) {
            assert!(Instant::now() < deadline, "{}", failure.desc());
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    let run = in_the_middle(&bench.site, act);
    let told = bench.expect("unplugged", |site| {
        fails_with(&run, 26, &["guest", "disk of `drive-scsi0-fleecing` was unplugged", "goes when the VM is stopped"]);
        fails_with(&site.backup(&[]), 26, &["guest", "unplugged"]);
        assert_eq!(site.vm.proxmox_fatal(), None);
    });
    let unharmed = bench.expect("unplugged", |site| {
        assert_eq!(site.vm.status(), "running");
        site.vm.write("virtio1", MIB, MIB, 0x55);
        site.vm.assert_disk_intact("virtio1");
    });
    bench.site.vm.kill();
    bench.site.vm.start_again();
    note_pid(&bench.site);
    bench.site.before = BlockState::of(&bench.site.vm);
    bench.ends(case, "unplugged", [unharmed, told, true]);
    bench.verdict();
}

/// The run goes on with the size of its instant, or says that the snapshot is lost; QEMU lives.
#[test]
fn a_disk_is_resized() {
    for kind in KINDS {
        let Some(mut bench) = Bench::new("disk resized", "restic", kind) else { return };
        let act = |site: &Site, _: &_| {
            let node = site.vm.root_node("scsi0");
            if let Err(refusal) = site.vm.writer().resize("scsi0", &node, 20 * MIB) {
                println!("QEMU refuses the resize: {}", refusal.desc());
            }
        };
        bench.case(
            "resized",
            |site| in_the_middle(site, act),
            |run| {
                assert!(matches!(run.code, Some(0 | 1 | 3)), "{}", said(run));
            },
        );
        // It can be resized afterwards, whatever came of it in the middle.
        bench.site.vm.resize("scsi0", 24 * MIB);
        bench.case("after a resize", |site| site.backup(&[]), succeeds);
        bench.verdict();
    }
}

/// A live external snapshot: an overlay takes the place of a node of `scsi0`.
fn snapshot(site: &Site, node: &str) {
    let overlay = site.vm.dir().join("overlay.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .args([overlay.as_os_str(), site.vm.spec("scsi0").size.to_string().as_ref()])
        .status();
    assert!(made.unwrap().success());
    let file = json!({"driver": "file", "filename": overlay});
    site.vm.qmp("blockdev-add", json!({"driver": "qcow2", "node-name": "overlay", "file": file, "backing": null}));
    site.vm.qmp("blockdev-snapshot", json!({"node": node, "overlay": "overlay"}));
    site.vm.write("scsi0", 0, MIB, 0x5e);
}

/// Commits the overlay into the node below, as `virsh blockcommit --active --pivot` does.
fn commit(site: &Site, base: &str) {
    let device = if site.kind == Kind::Proxmox { "drive-scsi0" } else { "overlay" };
    let arguments = json!({"job-id": "commit", "device": device, "top-node": "overlay", "base-node": base});
    site.vm.qmp("block-commit", arguments);
    let wait = |over: &dyn Fn(Option<&serde_json::Value>) -> bool| {
        for _ in 0..1000 {
            let jobs = site.vm.qmp("query-block-jobs", json!({}));
            if over(jobs.as_array().into_iter().flatten().find(|job| job["device"] == "commit")) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the commit does not end");
    };
    wait(&|job| job.is_some_and(|job| job["ready"] == true));
    site.vm.qmp("block-job-complete", json!({"device": "commit"}));
    wait(&|job| job.is_none());
    site.vm.qmp("blockdev-del", json!({"node-name": "overlay"}));
}

/// A snapshot of the disk's own node, as libvirt and Proxmox VE take it: the overlay comes below our filter, and the run goes
/// on.
#[test]
fn a_live_snapshot_is_taken() {
    for kind in KINDS {
        let Some(mut bench) = Bench::new("live snapshot", "restic", kind) else { return };
        let node = match kind {
            Kind::Stock => bench.site.before.roots["scsi0"].clone(),
            Kind::Proxmox => format_node(&bench.site),
        };
        let case = bench.begin();
        let run = in_the_middle(&bench.site, |site, _| snapshot(site, &node));
        let window = 0..=bench.site.vm.mark();
        let told = bench.expect("live snapshot", |site| {
            succeeds(&run);
            site.assert_restores(&DISKS, window);
        });
        // What was written above is in the next archive, before the overlay is committed and after that.
        let right = bench.expect("live snapshot, overlay", |site| {
            succeeds(&site.backup(&[]));
            site.assert_restores_now(&DISKS);
        });
        let unharmed = bench.expect("live snapshot", |site| {
            assert_eq!(site.vm.status(), "running");
            commit(site, &node);
            for disk in DISKS {
                site.vm.assert_disk_intact(disk);
            }
        });
        bench.ends(case, "live snapshot", [unharmed, told, right]);
        bench.verdict();
    }
}

/// The node below the throttle node of `scsi0`, which alone has this format.
fn format_node(site: &Site) -> String {
    let (node, _) = site.before.nodes.iter().find(|(node, driver)| node.starts_with('f') && *driver == "raw").unwrap();
    node.clone()
}

/// A snapshot of the device's uppermost node puts the overlay above our filter on stock QEMU, which then can only go when the
/// overlay does: the run says so, and what to do.
#[test]
fn a_live_snapshot_is_taken_above_the_filter() {
    let Some(mut bench) = Bench::new("live snapshot above", "restic", Kind::Stock) else { return };
    let case = bench.begin();
    let mut filter = String::new();
    let run = in_the_middle(&bench.site, |site, _| {
        filter = site.vm.root_node("scsi0");
        snapshot(site, &filter);
    });
    let told = bench.expect("live snapshot", |_| {
        fails_with(&run, 26, &["guest", "overlay", &format!("base-node `{filter}`")]);
    });
    let unharmed = bench.expect("live snapshot", |site| {
        commit(site, &filter);
        for disk in DISKS {
            site.vm.assert_disk_intact(disk);
        }
        site.program.run(&["recover"]).ok();
        nothing_left(site);
    });
    bench.ends(case, "live snapshot", [unharmed, told, true]);
    bench.verdict();
}
