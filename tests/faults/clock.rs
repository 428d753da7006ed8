//! The host's clock jumps back between two runs, or forward.

use crate::{
    bench::{Bench, said},
    rig::{Kind, Run, Site},
};
use std::path::Path;

const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";

fn succeeds(run: &Run) {
    assert!(matches!(run.code, Some(0 | 3)), "{}", said(run));
}

fn backup_at(site: &Site, offset: &str) -> Run {
    let mut command = site.backup_command(&[]);
    Run::of(&command.env("LD_PRELOAD", FAKETIME).env("FAKETIME", offset).output().unwrap())
}

#[test]
fn the_clock_jumps() {
    if !Path::new(FAKETIME).exists() {
        println!("skipped: there is no libfaketime");
        return;
    }
    for provider in ["restic", "borg", "directory"] {
        for kind in [Kind::Stock, Kind::Proxmox] {
            let Some(mut bench) = Bench::new("clock jumps", provider, kind) else { return };
            bench.case("two days ahead", |site| backup_at(site, "+2d"), succeeds);
            // The next run of that case was two days back already; this one is an hour before it.
            bench.case("an hour back", |site| backup_at(site, "-1h"), succeeds);
            bench.verdict();
        }
    }
}
