//! Other commands that journal what they do, killed: `recover`, and accesses by hand.

use crate::{
    Cases, Kind, Provider,
    cell::access_by_hand,
    possible,
    rig::{Points, run_traced},
};
use std::process::Command;

/// `recover` of a run that died with everything set up, killed at its steps, and begun again.
fn recover_killed(kind: Kind) {
    if !possible(Provider::Restic, kind) {
        return;
    }
    let mut cases = Cases::new(Provider::Restic, kind);
    let mut tally = cases.tally("SIGKILL of recover at a journal step");
    let cell = &mut cases.cell;
    let from = cell.site.vm.mark();
    let backup = run_traced(&cell.site.backup_command(&[]), Points::Journal, None);
    assert_eq!(backup.code, Some(0), "{}", backup.stderr);
    cell.made(&backup.stdout, from);
    let stored = backup.points.iter().position(|point| point.what.starts_with("{\"step\":\"stored\"")).unwrap() + 1;

    let killed_with_everything = |cases: &mut Cases| {
        let load = cases.cell.load();
        let run = run_traced(&cases.cell.site.backup_command(&[]), Points::Journal, Some(stored));
        assert!(run.killed, "{}", run.stderr);
        load.stop();
    };
    let from = cases.cell.site.vm.mark();
    killed_with_everything(&mut cases);
    let recover = run_traced(&cases.cell.site.program.command(&["recover"]), Points::Journal, None);
    assert_eq!(recover.code, Some(0), "{}", recover.stderr);
    let load = cases.cell.load();
    assert!(cases.cell.aftermath("recover, undisturbed", load, from, crate::Then::Backup).right);
    let count = recover.points.len();
    assert!(count > 10, "{:?}", recover.points);

    for point in cases.scale.points(count, 5) {
        let from = cases.cell.site.vm.mark();
        killed_with_everything(&mut cases);
        let load = cases.cell.load();
        tally.begins();
        let run = run_traced(&cases.cell.site.program.command(&["recover"]), Points::Journal, Some(point));
        let at = run.points.last().map(ToString::to_string).unwrap_or_default();
        let then = cases.then();
        let what = format!("recover: point {point} of {count}, {at}, then {then:?}");
        println!("{what}");
        let verdict = cases.cell.aftermath(&what, load, from, then);
        cases.ended(&mut tally, verdict);
    }
    cases.all_good();
}

fn set_up(cases: &Cases, to_target: bool) -> Command {
    let site = &cases.cell.site;
    let qmp = site.vm.qmp_socket().display().to_string();
    let mut words = vec!["access", "setup", site.guest(), "--json"];
    if cases.kind == Kind::Stock {
        words.extend(["--qmp", &qmp]);
    }
    if to_target {
        words.extend(["--target", "local"]);
    }
    site.program.command(&words)
}

/// What an operator does about an access that is still there.
fn ended_by_hand(cases: &Cases) {
    let site = &cases.cell.site;
    if access_by_hand(site).is_some_and(|standing| standing["state"] == "by-hand") {
        site.backup(&[]).code(11);
        site.program.run(&["access", "teardown", site.guest()]).ok();
    }
}

/// `access setup` and `access teardown`, killed at their steps.
fn by_hand_killed(kind: Kind) {
    if !possible(Provider::Restic, kind) {
        return;
    }
    let mut cases = Cases::new(Provider::Restic, kind);
    for to_target in [false, true] {
        let mut tally = cases.tally("SIGKILL of access by hand at a journal step");
        let set = run_traced(&set_up(&cases, to_target), Points::Journal, None);
        assert_eq!(set.code, Some(0), "{}", set.stderr);
        let words = ["access", "teardown", cases.cell.site.guest()];
        let torn = run_traced(&cases.cell.site.program.command(&words), Points::Journal, None);
        assert_eq!(torn.code, Some(0), "{}", torn.stderr);
        for (count, tear_down) in [(set.points.len(), false), (torn.points.len(), true)] {
            for point in cases.scale.points(count, 3) {
                let from = cases.cell.site.vm.mark();
                let load = cases.cell.load();
                if tear_down {
                    assert!(set_up(&cases, to_target).output().unwrap().status.success());
                }
                let words = ["access", "teardown", cases.cell.site.guest()];
                let command =
                    if tear_down { cases.cell.site.program.command(&words) } else { set_up(&cases, to_target) };
                tally.begins();
                let run = run_traced(&command, Points::Journal, Some(point));
                let at = run.points.last().map(ToString::to_string).unwrap_or_default();
                let then = cases.then();
                let name = if tear_down { "teardown" } else { "setup" };
                let what =
                    format!("access {name}, to the target {to_target}: point {point} of {count}, {at}, then {then:?}");
                println!("{what}");
                ended_by_hand(&cases);
                let verdict = cases.cell.aftermath(&what, load, from, then);
                cases.ended(&mut tally, verdict);
            }
        }
    }
    cases.all_good();
}

#[test]
fn recover_on_stock_qemu() {
    recover_killed(Kind::Stock);
}

#[test]
fn recover_on_proxmox() {
    recover_killed(Kind::Proxmox);
}

#[test]
fn by_hand_on_stock_qemu() {
    by_hand_killed(Kind::Stock);
}

#[test]
fn by_hand_on_proxmox() {
    by_hand_killed(Kind::Proxmox);
}
