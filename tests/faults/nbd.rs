//! The exports' connections: dropped, cut short, stalled, and with flipped bits in every field of a reply's header.

use crate::{
    bench::{Bench, long, points, said},
    rig::{Kind, NbdFault, NbdField, NbdProxy, Run},
};
use std::time::Duration;

/// A run that reads over a broken connection has to fail: there is no second try in the middle of an archive. One that is
/// broken when everything is read may go on.
fn fails_and_names_the_disk(run: &Run) {
    match run.code {
        Some(0 | 3) => {}
        Some(1) => {
            assert!(run.stderr.contains("disk `") && run.stderr.contains("guest"), "{}", said(run));
        }
        _ => panic!("{}", said(run)),
    }
}

fn at_replies(kind: Kind, class: &str, few: usize, fault: NbdFault) {
    let Some(mut bench) = Bench::new(class, "restic", kind) else { return };
    let count = {
        for disk in crate::bench::DISKS {
            bench.site.vm.write(disk, 0, 4 << 20, 0x77);
        }
        let proxy = NbdProxy::before_next_server(&bench.site.vm, None);
        bench.site.backup(&[]).ok();
        proxy.messages()
    };
    assert!(count > 20, "{count} messages: the proxy was not used");
    let (mut hits, mut failed) = (0, 0);
    for nth in points(count, few, class.len()) {
        let label = format!("{class}, reply {nth} of {count}");
        let mut end = None;
        bench.case(
            &label,
            |site| {
                let proxy = NbdProxy::before_next_server(&site.vm, Some((nth, fault)));
                let run = site.backup(&[]);
                hits += usize::from(proxy.hit());
                site.vm.no_more_faults();
                run
            },
            |run| {
                end = run.code;
                fails_and_names_the_disk(run);
            },
        );
        failed += usize::from(end == Some(1));
    }
    assert!(hits > 0, "no reply met the fault");
    if !matches!(fault, NbdFault::Stall(_)) {
        assert!(failed > 0, "no run noticed");
    }
    bench.verdict();
}

#[test]
fn nbd_dropped_on_stock_qemu() {
    at_replies(Kind::Stock, "NBD dropped", 5, NbdFault::Drop);
}

#[test]
fn nbd_dropped_on_proxmox() {
    at_replies(Kind::Proxmox, "NBD dropped", 5, NbdFault::Drop);
}

#[test]
fn nbd_cut_short_on_stock_qemu() {
    at_replies(Kind::Stock, "NBD cut short", 5, NbdFault::Short);
}

#[test]
fn nbd_cut_short_on_proxmox() {
    at_replies(Kind::Proxmox, "NBD cut short", 5, NbdFault::Short);
}

#[test]
fn nbd_stalled_for_a_while_on_stock_qemu() {
    at_replies(Kind::Stock, "NBD stalled", 3, NbdFault::Stall(Duration::from_secs(2)));
}

#[test]
fn nbd_stalled_for_a_while_on_proxmox() {
    at_replies(Kind::Proxmox, "NBD stalled", 3, NbdFault::Stall(Duration::from_secs(2)));
}

/// Longer than an answer may take.
#[test]
fn nbd_stalled_for_good() {
    if !long() {
        println!("skipped: waiting two minutes for an answer is part of the long run");
        return;
    }
    let Some(mut bench) = Bench::new("NBD stalled for good", "restic", Kind::Stock) else { return };
    for nth in [12, 40] {
        bench.case(
            &format!("reply {nth}"),
            |site| {
                let _proxy =
                    NbdProxy::before_next_server(&site.vm, Some((nth, NbdFault::Stall(Duration::from_secs(130)))));
                site.backup(&[])
            },
            fails_and_names_the_disk,
        );
    }
    bench.verdict();
}

fn flipped(kind: Kind, few: usize) {
    for (name, field) in [
        ("NBD bit flipped: magic", NbdField::Magic),
        ("NBD bit flipped: error", NbdField::Error),
        ("NBD bit flipped: cookie", NbdField::Cookie),
        ("NBD bit flipped: length", NbdField::Length),
    ] {
        at_replies(kind, name, few, NbdFault::Flip(field));
    }
}

#[test]
fn nbd_flipped_bits_on_stock_qemu() {
    flipped(Kind::Stock, 2);
}

#[test]
fn nbd_flipped_bits_on_proxmox() {
    flipped(Kind::Proxmox, 2);
}
