//! Where room ends: huge disks, and fleecing images that fill up.

use crate::rig::{Bus, Format, Image, Io, Kind, LoadPlan, MIB, Site, SmallFs, Style, VmBuilder};
use std::os::unix::fs::MetadataExt;

const TIB: u64 = 1 << 40;

#[test]
fn a_disk_of_10_tib_that_is_nearly_empty_is_backed_up_and_restored() {
    let vm = VmBuilder::new().disk("scsi0", 10 * TIB, Bus::VirtioScsi, Style::Blockdev, Format::Raw, Io::Main);
    let site = Site::new(Kind::Stock, vm);
    let places = [0, 5 * TIB + 512, 10 * TIB - MIB];
    for (byte, offset) in (1..).zip(places) {
        site.vm.write("scsi0", offset, MIB, byte);
    }
    site.backup(&[]);
    site.vm.write("scsi0", 7 * TIB, MIB, 9);
    let run = site.backup(&["--require-incremental"]);
    assert!(matches!(run.code, Some(0 | 3)), "{}\n{}", run.stdout, run.stderr);
    assert_eq!(run.read_bytes(), 4 * MIB);
    let image = site.program.restore("guest", "latest").join("scsi0.raw");
    assert!(image.metadata().unwrap().blocks() * 512 < 64 * MIB, "holes are filled");
    let restored = Image::open(&image).unwrap();
    let mut buffer = vec![0; MIB as usize];
    for (byte, offset) in (1..).zip(places).chain([(9, 7 * TIB)]) {
        restored.read(offset, &mut buffer);
        assert!(buffer.iter().all(|b| *b == byte), "at {offset}");
    }
    restored.read(TIB, &mut buffer);
    assert!(buffer.iter().all(|b| *b == 0));
    site.assert_nothing_left();
}

/// The guest overwrites more than the fleecing images have room for: the backup breaks, the guest does not notice.
fn fleecing_fills_up(kind: Kind) {
    let style = if kind == Kind::Proxmox { Style::Proxmox } else { Style::Blockdev };
    let vm = VmBuilder::new().disk("scsi0", 512 * MIB, Bus::VirtioScsi, style, Format::Raw, Io::Main);
    let site = Site::new(kind, vm);
    site.vm.write("scsi0", 0, 400 * MIB, 0x31);
    site.backup(&[]).ok();
    site.vm.write("scsi0", 0, 400 * MIB, 0x32);
    let Some(small) = SmallFs::or_skip(site.program.dir().join("small"), 280) else { return };
    let fleecing = format!("dir={}", small.path().display());
    // Slow enough to be overtaken by the guest, which writes from the far end.
    let child = site.start_backup(&["--fleecing", &fleecing, "--bwlimit", "4MiB"]);
    while site.vm.qmp("query-block-exports", serde_json::json!({})).as_array().is_none_or(Vec::is_empty) {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    for part in (20..100).rev() {
        site.vm.write("scsi0", part * 4 * MIB, 4 * MIB, 0x33);
    }
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(23), "{text}");
    assert!(text.contains("snapshot of disk `scsi0` is lost"), "{text}");
    drop(small);
    site.vm.assert_disk_intact("scsi0");
    site.assert_nothing_left();

    // Nothing is missing from the next one, which is incremental all the same.
    let load = site.vm.load(LoadPlan::seeded(5));
    let start = site.vm.mark();
    site.backup(&["--require-incremental"]).ok();
    let end = site.vm.mark();
    load.stop();
    site.assert_restores(&["scsi0"], start..=end);
}

#[test]
fn fleecing_that_fills_up_breaks_the_backup_and_not_the_guest_on_stock_qemu() {
    fleecing_fills_up(Kind::Stock);
}

#[test]
fn fleecing_that_fills_up_breaks_the_backup_and_not_the_guest_on_proxmox() {
    fleecing_fills_up(Kind::Proxmox);
}
