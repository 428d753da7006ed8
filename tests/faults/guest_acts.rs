//! What the guest's operator does in the middle of a run.

use crate::{
    bench::{Bench, in_the_middle, said},
    rig::{Kind, Run, Site},
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
