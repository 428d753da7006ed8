//! Backups, killed.

use crate::{
    Cases, Kind, Provider, Then, possible,
    rig::{Point, Points, Random, run_traced},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::time::{Duration, Instant};

fn killed(provider: Provider, kind: Kind, steps: usize, effects: usize) {
    if !possible(provider, kind) {
        return;
    }
    let mut cases = Cases::new(provider, kind);
    at_points(&mut cases, "SIGKILL at a journal step", Points::Journal, steps);
    at_points(&mut cases, "SIGKILL at an effect", Points::Effects, effects);
    at_instants(&mut cases);
    cases.all_good();
}

/// How an undisturbed run goes.
fn undisturbed(cases: &mut Cases, points: Points) -> Vec<Point> {
    let cell = &mut cases.cell;
    let from = cell.site.vm.mark();
    let load = cell.load();
    let run = run_traced(&cell.site.backup_command(&[]), points, None);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    cell.made(&run.stdout, from);
    load.stop();
    for (number, point) in run.points.iter().enumerate() {
        println!("{points:?} {}: {point}", number + 1);
    }
    assert!(run.points.len() > 10, "{:?}", run.points);
    run.points
}

fn at_points(cases: &mut Cases, class: &str, points: Points, some: usize) {
    let mut tally = cases.tally(class);
    let seen = undisturbed(cases, points);
    let count = seen.len();
    let mut chosen = match points {
        Points::Journal => cases.scale.points(count, some),
        Points::Effects => {
            cases.scale.spread(count, if cases.scale.every { cases.scale.instants as usize } else { some })
        }
    };
    // Always: what recovery is apt to overlook, because the next backup would not mind.
    let mounted = seen.iter().position(|point| point.call == "mount" && point.ended).map(|index| index + 1);
    chosen.extend(mounted.filter(|point| !chosen.contains(point)));
    for point in chosen {
        let cell = &mut cases.cell;
        let from = cell.site.vm.mark();
        let load = cell.load();
        tally.begins();
        let run = run_traced(&cell.site.backup_command(&[]), points, Some(point));
        let at = run.points.last().map(ToString::to_string).unwrap_or_default();
        // How many there are depends on when the exports' clients come and go; the last may not be reached.
        if !run.killed {
            cell.made(&run.stdout, from);
        }
        let then = if mounted == Some(point) { Then::Recover } else { cases.then() };
        let what = format!("{class}: point {point} of {count}, {at}, then {then:?}");
        println!("{what}");
        let verdict = cases.cell.aftermath(&what, load, from, then);
        cases.ended(&mut tally, verdict);
    }
}

fn at_instants(cases: &mut Cases) {
    let class = "SIGKILL at a random instant";
    let mut tally = cases.tally(class);
    let mut random = Random::new(cases.scale.seed);
    let mut longest = Duration::ZERO;
    for number in 0..cases.scale.instants {
        if number % 20 == 0 {
            let cell = &mut cases.cell;
            let from = cell.site.vm.mark();
            let load = cell.load();
            let start = Instant::now();
            let run = cell.site.backup(&[]).ok();
            longest = longest.max(start.elapsed());
            cell.made(&run.stdout, from);
            load.stop();
        }
        let cell = &mut cases.cell;
        let from = cell.site.vm.mark();
        let load = cell.load();
        let instant = Duration::from_micros(random.below(longest.as_micros() as u64));
        let mut child = cell.site.start_backup(&[]);
        std::thread::sleep(instant);
        kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGKILL).unwrap();
        let status = child.wait().unwrap();
        let then = cases.then();
        let what = format!("{class}: {number}, after {instant:?} of {longest:?} ({status}), then {then:?}");
        println!("{what}");
        tally.begins();
        let verdict = cases.cell.aftermath(&what, load, from, then);
        cases.ended(&mut tally, verdict);
    }
}

#[test]
fn restic_on_stock_qemu() {
    killed(Provider::Restic, Kind::Stock, 8, 4);
}

#[test]
fn restic_on_proxmox() {
    killed(Provider::Restic, Kind::Proxmox, 8, 4);
}

#[test]
fn borg_on_stock_qemu() {
    killed(Provider::Borg, Kind::Stock, 3, 2);
}

#[test]
fn borg_on_proxmox() {
    killed(Provider::Borg, Kind::Proxmox, 3, 2);
}

#[test]
fn directory_on_stock_qemu() {
    killed(Provider::Directory, Kind::Stock, 6, 4);
}

#[test]
fn directory_on_proxmox() {
    killed(Provider::Directory, Kind::Proxmox, 6, 4);
}
