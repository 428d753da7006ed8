//! The test rig: real virtual machines, a guest that remembers what it wrote, a stand-in for Proxmox's QEMU, and a look at
//! what is left behind. It knows nothing of the library under test and shares no code with it.
//!
//! ```ignore
//! let vm = VmBuilder::new().disk("scsi0", 64 * MIB, Bus::VirtioScsi, Style::Blockdev, Format::Raw, Io::Main).start();
//! vm.write("scsi0", 0, 4 * MIB, 0x11);
//! let before = BlockState::of(&vm);
//! let load = vm.load(LoadPlan::seeded(7));
//! let first = vm.mark();
//! /* … the backup … */
//! load.stop();
//! vm.matching_prefix_between("scsi0", &image, first..=last).unwrap();
//! vm.assert_pristine(&before, BitmapRule::Same);
//! ```
//!
//! Everything blocks; nothing needs an async runtime. A [`Vm`] that goes out of scope (also by panic) takes its QEMU and its
//! directory with it; if the test process is killed, the kernel kills QEMU.

#![allow(dead_code, unused_imports, reason = "every integration test uses a part of the rig")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a rig that cannot go on fails the test")]

pub mod borg;
mod disk;
mod image;
mod interposer;
mod leftovers;
mod load;
mod nbd_proxy;
mod oracle;
mod process;
mod program;
mod proxmox_root;
mod proxmox_standin;
mod qmp;
mod site;
mod small_fs;
mod tally;
mod tiny_guest;
mod tracer;
mod vm;
mod writer;

pub use disk::{Bus, DiskSpec, Format, Io, Style};
pub use image::{Image, make_image};
pub use interposer::{ANY, Fault, SeenCommand};
pub use leftovers::{BitmapInfo, BitmapRule, BlockState, no_files_left, processes_about};
pub use load::{Load, LoadPlan, LoadReport, Random};
pub use nbd_proxy::{NbdFault, NbdField, NbdProxy};
pub use oracle::{Change, FirstDifference, Torn};
pub use process::stop;
pub use program::{Program, Run};
pub use proxmox_root::ProxmoxRoot;
pub use proxmox_standin::StandIn;
pub use qmp::{JsonStream, QmpClient, QmpFailure, send};
pub use site::{Kind, Site, VMID};
pub use small_fs::SmallFs;
pub use tally::{Tally, Verdict};
pub use tiny_guest::{BOOT_LIMIT, TinyKit, TinyTask, TornLitmus, assert_boots, assert_ext4_sound, litmus, make_ext4};
pub use tracer::{Point, Points, Traced, run_traced};
pub use vm::{Accel, Vm, VmBuilder, old_qemu};
pub use writer::GuestWriter;

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
