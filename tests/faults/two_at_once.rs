//! Two runs at once: on one guest, and of two guests into one target.

use crate::{
    bench::{Bench, DISKS, fails_with, in_the_middle, machine, said},
    rig::{Kind, MIB, Run, Site},
};
use std::{cell::RefCell, thread};

const KINDS: [Kind; 2] = [Kind::Stock, Kind::Proxmox];

fn succeeds(run: &Run) {
    assert!(matches!(run.code, Some(0 | 3)), "{}", said(run));
}

#[test]
fn two_runs_on_one_guest() {
    for kind in KINDS {
        let Some(mut bench) = Bench::new("two runs on one guest", "restic", kind) else { return };
        let second = RefCell::new(None);
        bench.case(
            "two runs",
            |site| in_the_middle(site, |site, _| drop(second.replace(Some(site.backup(&[]))))),
            |run| {
                succeeds(run);
                fails_with(second.borrow().as_ref().unwrap(), 11, &["another run of guest"]);
            },
        );
        // Both at the same moment: one does the work, and the other one says that it does.
        bench.case(
            "at the same moment",
            |site| {
                thread::scope(|scope| {
                    let other = scope.spawn(|| site.backup(&[]));
                    let mut runs = [site.backup(&[]), other.join().unwrap()];
                    runs.sort_by_key(|run| run.code);
                    let [first, second] = runs;
                    // They may as well have come one after the other.
                    if second.code == Some(0) { second } else { busy(&second, first) }
                })
            },
            succeeds,
        );
        bench.verdict();
    }
}

fn busy(run: &Run, other: Run) -> Run {
    fails_with(run, 11, &["another run of guest"]);
    other
}

/// A second guest with a program of its own, whose target is the bench's.
fn neighbour(bench: &Bench, kind: Kind) -> Site {
    let mut site = Site::new(Kind::Stock, machine(kind));
    site.program = bench.site.program.beside();
    site.name = "neighbour";
    for disk in DISKS {
        site.vm.write(disk, 0, 6 * MIB, 0x21);
    }
    site
}

#[test]
fn two_guests_into_one_target() {
    for provider in ["restic", "borg", "directory"] {
        for kind in KINDS {
            let Some(mut bench) = Bench::new("two guests into one target", provider, kind) else { return };
            let neighbour = neighbour(&bench, Kind::Stock);
            for round in 0..2 {
                neighbour.vm.write("scsi0", round * MIB, 2 * MIB, 0x31);
                let other = RefCell::new(None);
                bench.case(
                    &format!("{provider}: both at once"),
                    |site| {
                        thread::scope(|scope| {
                            let second = scope.spawn(|| neighbour.backup(&[]));
                            let run = site.backup(&[]);
                            other.replace(Some(second.join().unwrap()));
                            run
                        })
                    },
                    |run| {
                        // borg lets one write at a time, and the other one waits for as long as it was told.
                        let other = other.borrow();
                        for run in [run, other.as_ref().unwrap()] {
                            match run.code {
                                Some(0 | 3) => {}
                                _ => fails_with(run, 11, &["lock"]),
                            }
                        }
                    },
                );
                if matches!(other.borrow().as_ref().unwrap().code, Some(0 | 3)) {
                    neighbour.assert_restores_now(&DISKS);
                }
            }
            bench.verdict();
        }
    }
}
