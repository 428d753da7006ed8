//! Room that ends: the fleecing file system full or stalled, its images cut by somebody; the state directory full, lost,
//! read-only.

use crate::{
    bench::{Bench, Small, fails_with, in_the_middle, long, said, slow_run_at},
    rig::{Fault, Kind, MIB, Run, Site, SmallFs},
};
use serde_json::{Value, json};
use std::{
    fs::{self, File},
    path::PathBuf,
    time::{Duration, Instant},
};

const KINDS: [Kind; 2] = [Kind::Stock, Kind::Proxmox];

/// The guest overwrites much of what a run has still to read.
fn overwrite(site: &Site) {
    for part in (0..6).rev() {
        site.vm.write("scsi0", part * MIB, MIB, 0x61 + u8::try_from(part).unwrap());
    }
}

#[test]
fn fleecing_that_is_full() {
    for kind in KINDS {
        let Some(mut bench) = Bench::with("fleecing full", "restic", kind, Some((Small::Fleecing, 32)), "") else {
            return;
        };
        let times = if long() { 6 } else { 1 };
        for _ in 0..times {
            let ballast = bench.small().path().join("ballast");
            let act = |site: &Site, _: &_| {
                bench_fill(&ballast);
                overwrite(site);
            };
            bench.case(
                "fleecing full",
                |site| {
                    let run = in_the_middle(site, act);
                    fs::remove_file(&ballast).unwrap();
                    run
                },
                |run| fails_with(run, 23, &["guest", "snapshot of disk `scsi0` is lost", "fleecing"]),
            );
        }
        bench.verdict();
    }
}

/// Fills the file system of `ballast`.
fn bench_fill(ballast: &std::path::Path) {
    use std::io::Write;
    let mut file = File::create(ballast).unwrap();
    let block = vec![0xb5; 64 * 1024];
    while file.write_all(&block).is_ok() {}
}

/// The storage of the next fleecing image of `scsi0`, as a throttle node below it.
fn throttle_fleecing(site: &Site) {
    site.vm.qmp("object-add", json!({"qom-type": "throttle-group", "id": "storage", "limits": {}}));
    let below = |request: &mut Value| {
        let file = request["arguments"]["file"].take();
        request["arguments"]["file"] = json!({"driver": "throttle", "throttle-group": "storage", "file": file});
    };
    site.vm.fault("blockdev-add", 1, Fault::Rewrite(Box::new(below)));
}

/// It takes next to nothing any more.
fn stall(site: &Site) {
    let storage = json!({"path": "/objects/storage", "property": "limits", "value": {"bps-write": 1}});
    site.vm.qmp("qom-set", storage);
}

/// It takes everything again.
fn go_on(site: &Site) {
    let storage = json!({"path": "/objects/storage", "property": "limits", "value": {"bps-write": 0}});
    site.vm.qmp("qom-set", storage);
    // A throttle node lets go of what it holds when it is drained.
    site.vm.pause();
    site.vm.resume();
}

/// The guest's writes wait for no longer than the limit for that, and then go on without the snapshot. The run fails, and waits
/// for the storage to take up the requests that are under way: until then an export does not end.
#[test]
fn fleecing_that_stalls() {
    for kind in KINDS {
        let Some(mut bench) = Bench::with("fleecing stalled", "restic", kind, None, "cbw-timeout = '2s'") else {
            return;
        };
        if kind == Kind::Proxmox {
            bench.site.vm.stand_in().cbw_timeout(2);
        }
        let mut waited = Duration::ZERO;
        bench.case(
            "fleecing stalled",
            |site| {
                throttle_fleecing(site);
                let child = slow_run_at(site, "1MiB");
                stall(site);
                let start = Instant::now();
                overwrite(site);
                waited = start.elapsed();
                go_on(site);
                let run = Run::of(&child.wait_with_output().unwrap());
                site.vm.qmp("object-del", json!({"id": "storage"}));
                run
            },
            |run| fails_with(run, 23, &["guest", "snapshot of disk `scsi0` is lost", "stalled"]),
        );
        assert!((Duration::from_secs(1)..Duration::from_secs(6)).contains(&waited), "the guest waited for {waited:?}");
        bench.verdict();
    }
}

/// The fleecing image of `scsi0`, which is the larger disk.
fn fleecing_image(site: &Site) -> PathBuf {
    let files = fs::read_dir(site.program.fleecing()).unwrap().map(|entry| entry.unwrap().path());
    files.max_by_key(|path| path.metadata().unwrap().len()).expect("a fleecing image")
}

/// Somebody cuts the fleecing image, from which the archive would get zeroes.
#[test]
fn a_fleecing_image_that_somebody_cuts() {
    for kind in KINDS {
        let Some(mut bench) = Bench::new("fleecing image cut", "restic", kind) else { return };
        for length in [0, 5 * MIB] {
            let act = |site: &Site, _: &_| {
                overwrite(site);
                let image = File::options().write(true).open(fleecing_image(site)).unwrap();
                image.set_len(length).unwrap();
            };
            bench.case(
                &format!("cut to {length}"),
                |site| in_the_middle(site, act),
                |run| fails_with(run, 1, &["guest", "fleecing image", "disk `scsi0`"]),
            );
        }
        bench.verdict();
    }
}

/// QEMU has the image open, so that what happens to its name changes nothing.
#[test]
fn a_fleecing_image_that_somebody_replaces() {
    for kind in KINDS {
        let Some(mut bench) = Bench::new("fleecing image replaced", "restic", kind) else { return };
        let act = |site: &Site, _: &_| {
            overwrite(site);
            let image = fleecing_image(site);
            fs::remove_file(&image).unwrap();
            fs::write(&image, b"another's").unwrap();
        };
        bench.case(
            "replaced",
            |site| {
                let run = in_the_middle(site, act);
                for entry in fs::read_dir(site.program.fleecing()).unwrap() {
                    fs::remove_file(entry.unwrap().path()).unwrap();
                }
                run
            },
            |run| fails_with(run, 1, &["guest", "fleecing image", "disk `scsi0`"]),
        );
        bench.verdict();
    }
}

#[test]
fn a_state_directory_that_is_full() {
    for kind in KINDS {
        let Some(mut bench) = Bench::with("state full", "restic", kind, Some((Small::State, 16)), "") else { return };
        // From the start, and from the middle on.
        for late in [false, true] {
            let ballast = bench.small().path().join("ballast");
            let run = |site: &Site| {
                if late {
                    return in_the_middle(site, |_, _| bench_fill(&ballast));
                }
                bench_fill(&ballast);
                site.backup(&[])
            };
            bench.case_between(
                &format!("state full, late: {late}"),
                run,
                |run| fails_with(run, 23, &["guest", "state"]),
                |site| {
                    fs::remove_file(site.program.state().join("ballast")).unwrap();
                },
            );
        }
        bench.verdict();
    }
}

#[test]
fn a_state_directory_that_is_lost() {
    for kind in KINDS {
        let Some(mut bench) = Bench::new("state lost", "restic", kind) else { return };
        let lose = |site: &Site| fs::remove_dir_all(site.program.state()).unwrap();
        bench.case(
            "between two runs",
            |site| {
                lose(site);
                site.backup(&[])
            },
            |run| assert!(matches!(run.code, Some(0 | 3)), "{}", said(run)),
        );
        bench.case(
            "during a run",
            |site| in_the_middle(site, |site, _| lose(site)),
            // What it has opened it has, and it makes the directory anew for what it keeps.
            |run| assert!(matches!(run.code, Some(0 | 3)), "{}", said(run)),
        );
        bench.verdict();
    }
}

#[test]
fn a_state_directory_that_is_read_only() {
    for kind in KINDS {
        let Some(mut bench) = Bench::with("state read-only", "restic", kind, Some((Small::State, 16)), "") else {
            return;
        };
        let path = bench.small().path().to_owned();
        bench.small().read_only();
        bench.case_between(
            "state read-only",
            |site| site.backup(&[]),
            |run: &Run| fails_with(run, 1, &["guest", "state", "ead-only"]),
            |_| SmallFs::writable_at(&path),
        );
        bench.verdict();
    }
}
