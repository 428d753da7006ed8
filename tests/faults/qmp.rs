//! The monitor's socket: closed before a command and after it, garbage in place of an answer, stalled.

use crate::{
    bench::{Bench, long, points, said},
    rig::{ANY, Fault, Kind, Run, Site},
};
use std::time::Duration;

/// Commands of a run that nothing disturbs.
fn commands(bench: &Bench) -> usize {
    let before = bench.site.vm.seen_commands().len();
    bench.site.backup(&[]).ok();
    bench.site.vm.seen_commands().len() - before
}

fn run_with(site: &Site, command: &str, nth: usize, fault: Fault) -> Run {
    site.vm.fault(command, nth, fault);
    let run = site.backup(&[]);
    site.vm.no_more_faults();
    run
}

/// A run whose monitor fails gets over it, or fails and says so.
fn gets_over_it_or_tells(run: &Run) {
    match run.code {
        Some(0 | 3) => {}
        Some(1 | 11 | 22) => {
            let told = ["QMP", "QEMU", "no answer to"].iter().any(|word| run.stderr.contains(word));
            assert!(told && run.stderr.contains("guest"), "{}", said(run));
        }
        _ => panic!("{}", said(run)),
    }
}

/// The fault at about `few` of the commands of a run, at all in a long run.
fn at_commands(kind: Kind, class: &str, few: usize, fault: impl Fn() -> Fault) {
    let Some(mut bench) = Bench::new(class, "restic", kind) else { return };
    let count = commands(&bench);
    for nth in points(count, few, class.len()) {
        let label = format!("{class} {nth} of {count}");
        bench.case(&label, |site| run_with(site, ANY, nth, fault()), gets_over_it_or_tells);
    }
    bench.verdict();
}

const GARBAGE: &[u8] = b"\x00\xffHTTP/1.1 400 Bad Request\r\n\r\n";

#[test]
fn qmp_closed_before_a_command_on_stock_qemu() {
    at_commands(Kind::Stock, "QMP closed before a command", 6, || Fault::CloseBefore);
}

#[test]
fn qmp_closed_before_a_command_on_proxmox() {
    at_commands(Kind::Proxmox, "QMP closed before a command", 6, || Fault::CloseBefore);
}

#[test]
fn qmp_closed_after_a_command_on_stock_qemu() {
    at_commands(Kind::Stock, "QMP closed after a command", 6, || Fault::CloseAfter);
}

#[test]
fn qmp_closed_after_a_command_on_proxmox() {
    at_commands(Kind::Proxmox, "QMP closed after a command", 6, || Fault::CloseAfter);
}

#[test]
fn qmp_garbage_on_stock_qemu() {
    at_commands(Kind::Stock, "QMP garbage", 6, || Fault::Garbage(GARBAGE.to_vec()));
}

#[test]
fn qmp_garbage_on_proxmox() {
    at_commands(Kind::Proxmox, "QMP garbage", 6, || Fault::Garbage(GARBAGE.to_vec()));
}

/// The guest was paused for the instant, and runs on: nothing of that is left, and nobody has to be told.
#[test]
fn qmp_garbage_in_place_of_the_answer_to_cont() {
    let Some(mut bench) = Bench::new("QMP garbage", "restic", Kind::Proxmox) else { return };
    let run = |site: &Site| run_with(site, "cont", 1, Fault::Garbage(GARBAGE.to_vec()));
    bench.case("QMP garbage at cont", run, |run| assert!(matches!(run.code, Some(0 | 3)), "{}", said(run)));
    bench.verdict();
}

/// Longer than a command may take, where that is ten seconds; a long run has it at every command.
fn stalled(kind: Kind, command: &str) {
    const STALL: Duration = Duration::from_millis(10_500);
    if long() {
        at_commands(kind, "QMP stalled", 1, || Fault::Stall(STALL));
        return;
    }
    let Some(mut bench) = Bench::new("QMP stalled", "restic", kind) else { return };
    for nth in [2, 4] {
        let fault = Fault::Stall(STALL);
        bench.case(&format!("{command} {nth}"), |site| run_with(site, command, nth, fault), gets_over_it_or_tells);
    }
    bench.verdict();
}

#[test]
fn qmp_stalled_on_stock_qemu() {
    stalled(Kind::Stock, "query-block-exports");
}

#[test]
fn qmp_stalled_on_proxmox() {
    stalled(Kind::Proxmox, "query-block-exports");
}
