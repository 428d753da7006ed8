//! Finding a Proxmox VM and its snapshot access, against the stand-in for Proxmox's QEMU.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod rig;

use pvebackup::{
    access::{
        AccessError, AccessPlan, ActiveAccess, BitmapAction, BitmapMode, DiskPlan, Fleecing, FleecingFormat,
        FreezeMode, SnapshotAccess, Teardown,
        proxmox::{ProxmoxAccess, undo},
    },
    guest::{self, Found, Guest, GuestError},
    journal::{Journal, Step},
    qmp::Qmp,
    report::{Event, Events, Monitor},
};
use rig::{BitmapRule, BlockState, Bus, Fault, Format, Io, LoadPlan, MIB, Style, Vm, VmBuilder, no_files_left};
use std::{
    fs,
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

const TARGET: &str = "pvebackup:main";

struct Silent;

impl Monitor for Silent {
    fn event(&self, _guest: &str, _event: Event) {}
}

struct Run {
    guest: Guest,
    found: Found,
    journal: Journal,
    directory: PathBuf,
    pvesm: PathBuf,
}

impl Run {
    async fn new(vm: &Vm) -> Self {
        let root = vm.proxmox_root();
        let guest = guest::proxmox::find(root.path(), &root.vmid().to_string().parse().unwrap()).unwrap();
        let mut session = Qmp::new(&guest.qmp).session().await.unwrap();
        let found = guest::disks(&guest, &mut session).await.unwrap();
        let found = guest::select(found, &[], &[]).unwrap();
        let directory = vm.dir().join("pvb");
        fs::create_dir_all(directory.join("fleecing")).unwrap();
        let journal = Journal::open(&directory.join("journal"), guest.id.as_str()).unwrap();
        Self { guest, found, journal, directory, pvesm: root.pvesm() }
    }

    fn plan(&self, bitmap: &BitmapMode, fleecing: Option<&str>, generation: &str) -> AccessPlan {
        let images = self.directory.join("fleecing");
        let directory = Fleecing::Directory { path: images, format: FleecingFormat::Raw };
        let plan = |disk: &guest::Disk| DiskPlan { disk: disk.clone(), bitmap: bitmap.clone(), granularity: 1 << 16 };
        AccessPlan {
            guest: self.guest.clone(),
            disks: self.found.disks.iter().map(plan).collect(),
            target: TARGET.into(),
            generation: generation.into(),
            run_dir: self.directory.join("run"),
            fleecing: fleecing.map_or(directory, |storage| Fleecing::Storage(storage.into())),
            freeze: FreezeMode::Auto,
            freeze_limit: Duration::from_secs(5),
            cbw_timeout: Duration::from_secs(45),
            exports: pvebackup::access::ExportMode::Trim,
            pvesm: self.pvesm.clone(),
        }
    }

    fn access(&self, plan: AccessPlan) -> ProxmoxAccess {
        let qmp = Qmp::new(&self.guest.qmp);
        ProxmoxAccess::new(plan, qmp, self.journal.clone(), Events::new("guest", Arc::new(Silent)))
    }

    fn assert_nothing_left(&self) {
        assert_eq!(self.journal.leftover(), []);
        no_files_left(&self.directory.join("fleecing"));
        assert!(!self.directory.join("run/nbd.sock").exists());
    }
}

fn ok(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Reads a range of an export into the same place of an image.
fn copy(socket: &Path, export: &str, offset: u64, length: u64, image: &Path) {
    let part = image.with_extension("part");
    let source = format!(
        "driver=raw,offset={offset},size={length},file.driver=nbd,file.server.type=unix,file.server.path={},file.export={export}",
        socket.display()
    );
    ok(Command::new("qemu-img").args(["convert", "--image-opts", &source, "-O", "raw"]).arg(&part));
    let mut bytes = Vec::new();
    fs::File::open(&part).unwrap().read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, length);
    let mut image = fs::OpenOptions::new().write(true).create(true).truncate(false).open(image).unwrap();
    image.seek(SeekFrom::Start(offset)).unwrap();
    image.write_all(&bytes).unwrap();
}

/// Brings the images up to the access: everything, or what is dirty.
fn read_all(active: &ActiveAccess, directory: &Path) -> Vec<(String, PathBuf, u64)> {
    let mut images = Vec::new();
    for disk in &active.disks {
        let image = directory.join(format!("{}.raw", disk.name));
        let mut read = 0;
        match &disk.dirty_context {
            None => {
                copy(&active.socket, &disk.export, 0, disk.size, &image);
                read = disk.size;
            }
            Some(context) => {
                let uri = format!("nbd+unix:///{}?socket={}", disk.export, active.socket.display());
                for line in ok(Command::new("nbdinfo").arg(format!("--map={context}")).arg(uri)).lines() {
                    let numbers: Vec<u64> = line.split_whitespace().take(3).map(|n| n.parse().unwrap()).collect();
                    if numbers[2] & 1 == 1 {
                        copy(&active.socket, &disk.export, numbers[0], numbers[1], &image);
                        read += numbers[1];
                    }
                }
            }
        }
        images.push((disk.name.clone(), image, read));
    }
    images
}

fn vm() -> VmBuilder {
    VmBuilder::new()
        .proxmox(100)
        .disk("scsi0", 32 * MIB, Bus::VirtioScsi, Style::Proxmox, Format::Qcow2, Io::Main)
        .disk("virtio1", 18 * MIB, Bus::VirtioBlk, Style::Proxmox, Format::Raw, Io::Main)
}

fn use_bitmap() -> BitmapMode {
    BitmapMode::Use(TARGET.into())
}

/// Writes between and during accesses; the images are those of the instants, and the second access reads only what changed.
async fn generations(vm: Vm, storage: Option<&str>) {
    for disk in ["scsi0", "virtio1"] {
        vm.write(disk, 0, vm.spec(disk).size, 0x11);
    }
    let run = Run::new(&vm).await;
    let before = BlockState::of(&vm);
    let images = vm.dir().join("pvb");
    for (round, bitmap) in [BitmapMode::New, use_bitmap(), use_bitmap()].iter().enumerate() {
        let mut access = run.access(run.plan(bitmap, storage, &format!("000000000000000{round}")));
        access.check().await.unwrap();
        let first = vm.mark();
        let active = access.set_up().await.unwrap();
        let last = vm.mark();
        assert!(active.consistency.was_paused);
        vm.write("scsi0", 4 * MIB, MIB, 0x20 + round as u8);
        vm.write("virtio1", 17 * MIB, MIB, 0x30 + round as u8);
        assert!(access.fleecing_bytes() >= 2 * MIB, "old blocks are in the fleecing images");
        let read = read_all(&active, &images);
        for (name, image, bytes) in &read {
            vm.matching_prefix_between(name, image, first..=last).unwrap();
            let expected = match (round, name.as_str()) {
                (0, _) => vm.spec(name).size,
                (_, "scsi0") => 4 * MIB,
                // The last granule is a short one.
                _ => 2 * MIB,
            };
            assert_eq!(*bytes, expected, "{name} in round {round}");
        }
        let action = if round == 0 { BitmapAction::New } else { BitmapAction::Used };
        assert!(active.disks.iter().all(|d| d.action == action && d.clean_readable == (round == 0)));
        let report = access.tear_down(Teardown::Success).await.unwrap();
        assert_eq!(report.left_behind, Vec::<String>::new());
        assert!(report.fleecing_peak_bytes >= 2 * MIB);
        run.assert_nothing_left();
        vm.assert_pristine(&before, &BitmapRule::Where(&|bitmap| bitmap.name == TARGET));
    }
    for disk in ["scsi0", "virtio1"] {
        vm.assert_disk_intact(disk);
    }
    assert_eq!(vm.proxmox_fatal(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn generations_with_fleecing_files() {
    generations(vm().paused().start(), None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn generations_with_fleecing_volumes() {
    let vm = vm().paused().start();
    generations(vm, Some("local-lvm")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn generations_of_the_older_layout() {
    let vm = VmBuilder::new()
        .proxmox(100)
        .disk("scsi0", 32 * MIB, Bus::VirtioScsi, Style::Drive, Format::Raw, Io::Main)
        .disk("virtio1", 18 * MIB, Bus::VirtioBlk, Style::Drive, Format::Qcow2, Io::Thread)
        .paused()
        .start();
    generations(vm, Some("local")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_backup_keeps_every_write_in_the_bitmap() {
    let vm = vm().paused().start();
    let run = Run::new(&vm).await;
    let images = vm.dir().join("pvb");
    for (how, bitmap) in
        [(Teardown::Success, BitmapMode::New), (Teardown::Failure, use_bitmap()), (Teardown::Success, use_bitmap())]
    {
        let mut access = run.access(run.plan(&bitmap, None, "00000000000000aa"));
        access.check().await.unwrap();
        let active = access.set_up().await.unwrap();
        vm.write("scsi0", 8 * MIB, 4096, 0x55);
        if how == Teardown::Success {
            let read = read_all(&active, &images);
            if bitmap == use_bitmap() {
                assert_eq!(read[0].2, 8 * MIB, "written during the first, and during the failed one and after");
            }
        }
        access.tear_down(how).await.unwrap();
        vm.write("scsi0", 20 * MIB, 4096, if how == Teardown::Failure { 0x66 } else { 0x77 });
        run.assert_nothing_left();
    }
    assert_eq!(vm.proxmox_fatal(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_disk_of_a_busy_guest_is_cut_at_one_instant() {
    let vm = VmBuilder::new()
        .proxmox(100)
        .disk("scsi0", 32 * MIB, Bus::VirtioScsi, Style::Proxmox, Format::Raw, Io::Thread)
        .start();
    let run = Run::new(&vm).await;
    let before = BlockState::of(&vm);
    let load = vm.load(LoadPlan::seeded(11));
    for bitmap in [BitmapMode::New, use_bitmap(), use_bitmap()] {
        let mut access = run.access(run.plan(&bitmap, None, "00000000000000bb"));
        access.check().await.unwrap();
        let first = vm.mark();
        let active = access.set_up().await.unwrap();
        let last = vm.mark() + 1;
        assert!(!active.consistency.was_paused);
        for (name, image, _) in read_all(&active, &vm.dir().join("pvb")) {
            vm.matching_prefix_between(&name, &image, first..=last).unwrap();
        }
        access.tear_down(Teardown::Success).await.unwrap();
        run.assert_nothing_left();
    }
    load.stop();
    vm.assert_pristine(&before, &BitmapRule::Where(&|bitmap| bitmap.name == TARGET));
    vm.assert_disk_intact("scsi0");
    assert_eq!(vm.proxmox_fatal(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn tpm_state_is_read_along() {
    let vm = vm().paused().start();
    let tpm = vm.dir().join("tpm.raw");
    fs::write(&tpm, vec![0x77; 4 * MIB as usize]).unwrap();
    let config = vm.proxmox_root().config();
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, format!("{text}tpmstate0: {},size=4M,version=v2.0\n", tpm.display())).unwrap();
    let run = Run::new(&vm).await;
    assert!(String::from_utf8_lossy(&run.found.config).ends_with(
        "#qmdump#map:tpmstate0:drive-tpmstate0-backup::raw:\n#qmdump#map:virtio1:drive-virtio1:local:raw:\n"
    ));
    let before = BlockState::of(&vm);
    for (bitmap, expected) in [(BitmapMode::New, BitmapAction::New), (use_bitmap(), BitmapAction::Used)] {
        let mut access = run.access(run.plan(&bitmap, None, "00000000000000cc"));
        access.check().await.unwrap();
        let active = access.set_up().await.unwrap();
        assert_eq!((active.disks[0].action, active.disks[2].action), (expected, BitmapAction::New));
        let read = read_all(&active, &vm.dir().join("pvb"));
        assert_eq!(fs::read(&read[2].1).unwrap(), vec![0x77; 4 * MIB as usize]);
        access.tear_down(Teardown::Success).await.unwrap();
        run.assert_nothing_left();
        vm.assert_pristine(&before, &BitmapRule::Where(&|bitmap| bitmap.name == TARGET));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bitmap_that_somebody_stopped_is_not_used() {
    let vm = vm().paused().start();
    let run = Run::new(&vm).await;
    for (turn, expected) in [BitmapAction::New, BitmapAction::New].into_iter().enumerate() {
        let bitmap = if turn == 0 { BitmapMode::New } else { use_bitmap() };
        let mut access = run.access(run.plan(&bitmap, None, "00000000000000dd"));
        access.check().await.unwrap();
        let active = access.set_up().await.unwrap();
        assert_eq!(active.disks[0].action, expected, "{}", active.disks[0].reason);
        let node = active.disks[0].bitmap_node.clone().unwrap();
        access.tear_down(Teardown::Success).await.unwrap();
        if turn == 0 {
            vm.qmp("block-dirty-bitmap-disable", serde_json::json!({"node": node, "name": TARGET}));
            vm.write("scsi0", MIB, 4096, 0x99);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_died_is_undone_from_its_journal() {
    let vm = vm().paused().start();
    let run = Run::new(&vm).await;
    let before = BlockState::of(&vm);
    let mut access = run.access(run.plan(&BitmapMode::New, Some("local-lvm"), "00000000000000ee"));
    access.check().await.unwrap();
    access.set_up().await.unwrap();
    drop(access);
    let error = run.access(run.plan(&BitmapMode::New, None, "00000000000000ef")).check().await.unwrap_err();
    assert!(matches!(&error, AccessError::Busy { by, .. } if by.contains(TARGET)), "{error}");
    let qmp = Qmp::new(&run.guest.qmp);
    let undone = undo(&qmp, &run.journal, &run.guest.id, Teardown::Failure).await.unwrap();
    assert_eq!(undone.left_behind, Vec::<String>::new());
    run.assert_nothing_left();
    vm.assert_pristine(&before, &BitmapRule::Where(&|bitmap| bitmap.name == TARGET));
    assert_eq!(vm.proxmox_fatal(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_answers_are_taken_for_done() {
    for command in ["backup-access-setup", "blockdev-add", "nbd-server-start", "block-export-add"] {
        for fault in [|| Fault::CloseBefore, || Fault::CloseAfter] {
            let vm = vm().paused().start();
            let run = Run::new(&vm).await;
            let before = BlockState::of(&vm);
            let mut access = run.access(run.plan(&BitmapMode::New, None, "00000000000000ff"));
            access.check().await.unwrap();
            vm.fault(command, 1, fault());
            let error = access.set_up().await.expect_err(command);
            assert_eq!(vm.proxmox_fatal(), None, "{command}: {error}");
            run.assert_nothing_left();
            vm.assert_pristine(&before, &BitmapRule::Where(&|bitmap| bitmap.name == TARGET));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_backed_up_is_told_before_qemu_is_asked() {
    let vm = vm().paused().config("lock: migrate").start();
    let root = vm.proxmox_root();
    let find = || guest::proxmox::find(root.path(), &"100".parse().unwrap());
    assert!(matches!(find(), Err(GuestError::Locked { lock, .. }) if lock == "migrate"));
    assert!(vm.seen_commands().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_regular_backup_is_in_the_way_and_not_disturbed() {
    let vm = vm().paused().start();
    let run = Run::new(&vm).await;
    let mut access = run.access(run.plan(&BitmapMode::New, None, "0000000000000011"));
    access.check().await.unwrap();
    vm.stand_in().begin_regular_backup();
    let error = access.set_up().await.unwrap_err();
    assert!(matches!(error, AccessError::Busy { .. }), "{error}");
    assert!(matches!(access.check().await, Err(AccessError::Busy { .. })));
    assert!(!vm.seen_commands().iter().any(|seen| seen.name == "backup-access-teardown"));
    run.assert_nothing_left();
    vm.stand_in().end_regular_backup();
    assert!(!run.journal.leftover().contains(&Step::Paused));
}
