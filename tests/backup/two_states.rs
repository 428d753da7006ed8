//! Two state directories with a target of the same name, on one guest: neither knows the other's archives.

use crate::rig::{Bus, Format, Io, Kind, MIB, Site, Style, VmBuilder};

fn two(kind: Kind, incremental: &[&str]) {
    let style = if kind == Kind::Proxmox { Style::Proxmox } else { Style::Blockdev };
    let site = Site::new(kind, VmBuilder::new().disk("scsi0", 32 * MIB, Bus::VirtioScsi, style, Format::Raw, Io::Main));
    let other = site.program.dir().join("other").display().to_string();
    site.vm.write("scsi0", 0, 8 * MIB, 0x51);
    site.backup(&[]).ok();
    // What the other one backs up is in none of the first one's archives.
    site.vm.write("scsi0", 12 * MIB, 4 * MIB, 0x52);
    site.backup(&["--state-dir", &other]).ok();
    site.vm.write("scsi0", 20 * MIB, 4 * MIB, 0x53);
    site.backup(incremental).ok();
    site.assert_restores_now(&["scsi0"]);
    site.assert_nothing_left();
}

#[test]
fn two_state_directories_share_no_bitmap_on_proxmox() {
    two(Kind::Proxmox, &["--require-incremental"]);
}

#[test]
fn two_state_directories_cost_a_full_backup_on_stock_qemu() {
    two(Kind::Stock, &[]);
}
