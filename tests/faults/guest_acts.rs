//! What the guest's operator does in the middle of a run: reset, resize.

use crate::{
    bench::{Bench, in_the_middle, said},
    rig::{Kind, MIB, Run, Site},
};
use serde_json::json;

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

/// The run goes on with the size of its instant, or says that the snapshot is lost; QEMU lives.
#[test]
fn a_disk_is_resized() {
    // Proxmox's own QEMU ends when a disk is resized whose bitmap is exported; there the guest's configuration has to be locked.
    let Some(mut bench) = Bench::new("disk resized", "restic", Kind::Stock) else { return };
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
