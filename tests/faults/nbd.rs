//! The exports' connections: dropped, cut short, stalled, and with flipped bits in every field of a reply's header.

use crate::{
    bench::{Bench, fails_with, points, said},
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

/// A length that grew has the client wait for bytes that never come; this is how long.
const PATIENCE: Duration = Duration::from_secs(10);

/// A guest whose backups wait for an answer for [`PATIENCE`].
fn impatient(class: &str, kind: Kind) -> Option<Bench> {
    Bench::with(class, "restic", kind, None, &format!("nbd-timeout = '{}s'", PATIENCE.as_secs()))
}

fn at_replies(kind: Kind, class: &str, few: usize, fault: NbdFault) {
    let Some(mut bench) = impatient(class, kind) else { return };
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
    let Some(mut bench) = impatient("NBD stalled for good", Kind::Stock) else { return };
    for nth in [12, 40] {
        bench.case(
            &format!("reply {nth}"),
            |site| {
                let _proxy = NbdProxy::before_next_server(&site.vm, Some((nth, NbdFault::Stall(2 * PATIENCE))));
                site.backup(&[])
            },
            |run| fails_with(run, 1, &["disk `", "within 10s"]),
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
