//! A machine, an installation of the program, and what they go through together.

use super::{BitmapInfo, BitmapRule, BlockState, Program, Run, Vm, VmBuilder, no_files_left};
use std::{
    ops::RangeInclusive,
    path::Path,
    process::{Child, Command},
};

/// VMID of machines that are Proxmox guests.
pub const VMID: u32 = 100;

/// On which kind of QEMU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Stock,
    Proxmox,
}

/// A machine and the program beside it.
pub struct Site {
    pub vm: Vm,
    pub program: Program,
    pub kind: Kind,
    /// Its name, where it is no Proxmox guest.
    pub name: &'static str,
    /// As the machine was before anybody backed it up.
    pub before: BlockState,
}

impl Site {
    pub fn new(kind: Kind, vm: VmBuilder) -> Self {
        let vm = match kind {
            Kind::Stock => vm.start(),
            Kind::Proxmox => vm.proxmox(VMID).start(),
        };
        let program = match kind {
            Kind::Stock => Program::new(),
            Kind::Proxmox => {
                let root = vm.proxmox_root();
                Program::new().pve_root(root.path()).env("PVEBACKUP_PVESM", &root.pvesm().display().to_string())
            }
        };
        let before = BlockState::of(&vm);
        Self { vm, program, kind, name: "guest", before }
    }

    /// Id of the guest.
    pub fn guest(&self) -> &'static str {
        match self.kind {
            Kind::Stock => self.name,
            Kind::Proxmox => "100",
        }
    }

    fn arguments(&self, more: &[&str]) -> Vec<String> {
        let mut words: Vec<String> = vec!["vm".into(), "--json".into()];
        match self.kind {
            Kind::Stock => {
                words.extend([
                    "--qmp".into(),
                    self.vm.qmp_socket().display().to_string(),
                    "--name".into(),
                    self.name.into(),
                ]);
            }
            Kind::Proxmox => words.push(VMID.to_string()),
        }
        words.extend(more.iter().map(|word| (*word).to_owned()));
        words
    }

    pub fn backup(&self, more: &[&str]) -> Run {
        let words = self.arguments(more);
        let run = self.program.run(&words.iter().map(String::as_str).collect::<Vec<_>>());
        if self.kind == Kind::Proxmox {
            assert_eq!(self.vm.proxmox_fatal(), None, "Proxmox's QEMU would have been killed");
        }
        run
    }

    /// A backup, not started yet.
    pub fn backup_command(&self, more: &[&str]) -> Command {
        let words = self.arguments(more);
        self.program.command(&words.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Starts a backup and does not wait.
    pub fn start_backup(&self, more: &[&str]) -> Child {
        let words = self.arguments(more);
        self.program.spawn(&words.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Restores the latest archive, and looks for an instant within `window` that all its disks show.
    #[track_caller]
    pub fn assert_restores(&self, disks: &[&str], window: RangeInclusive<usize>) {
        let dir = self.program.restore(self.guest(), "latest");
        let images: Vec<_> = disks.iter().map(|disk| dir.join(format!("{disk}.raw"))).collect();
        let pairs: Vec<(&str, &Path)> =
            disks.iter().copied().zip(images.iter().map(std::path::PathBuf::as_path)).collect();
        if let Err(torn) = self.vm.matching_instant(&pairs, window) {
            panic!("{torn}");
        }
        std::fs::remove_dir_all(dir).unwrap();
    }

    /// Restores the latest archive, and compares it with the disks as they are now.
    #[track_caller]
    pub fn assert_restores_now(&self, disks: &[&str]) {
        self.assert_restores(disks, self.vm.mark()..=self.vm.mark());
    }

    /// Nothing of the program's is left but its bitmaps.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        let ours = |bitmap: &BitmapInfo| match self.kind {
            Kind::Stock => bitmap.name.starts_with("pvb-"),
            Kind::Proxmox => bitmap.name.starts_with("pvebackup-"),
        };
        self.vm.assert_pristine(&self.before, &BitmapRule::Where(&ours));
        no_files_left(&self.program.run_dir());
        no_files_left(&self.program.fleecing());
    }
}
