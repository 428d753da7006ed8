//! A real QEMU for the tests: no guest in it, its disks are written through the monitor as a guest would.

use super::{StockAccess, Way};
use crate::{
    access::{AccessPlan, ActiveAccess, BitmapMode, DiskPlan, Fleecing, FleecingFormat, FreezeMode, graph::Graph},
    guest::{Disk, DiskKind, Guest, GuestKind},
    journal::{Journal, JournalError},
    qmp::{
        Qmp, Session,
        command::block::{HumanMonitorCommand, QueryJobs, QueryStatus},
    },
};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    fs,
    ops::Range,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tempfile::TempDir;

pub(super) const MIB: usize = 1 << 20;
/// Every disk of the tests.
pub(super) const SIZE: usize = 8 * MIB;
/// A size that is no multiple of a cluster: that of UEFI variables.
pub(super) const VARS: usize = 540_672;

/// A disk as it is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// `-blockdev` raw, virtio-blk.
    VirtioBlockdev,
    /// The same with an I/O thread.
    VirtioIothread,
    /// `-drive` raw, virtio-scsi, the way Proxmox VE and libvirt of old do.
    ScsiDrive,
    /// The same with an I/O thread for the controller.
    ScsiIothread,
    /// `-drive` qcow2 on AHCI, without an id.
    Ahci,
    /// `-blockdev` qcow2, virtio-blk without an id.
    Qcow2,
    /// UEFI variables.
    Pflash,
}

/// What the disks hold, kept beside QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Oracle(pub(super) Vec<Vec<u8>>);

/// A QEMU with disks.
pub(super) struct Vm {
    pub(super) dir: TempDir,
    pub(super) child: Child,
    pub(super) qmp: Qmp,
    monitor: Session,
    pub(super) disks: Vec<Disk>,
    pub(super) oracle: Oracle,
    steps: u64,
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Everything in QEMU that an access may leave behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct State {
    pub(super) status: String,
    pub(super) roots: Vec<String>,
    pub(super) nodes: BTreeSet<String>,
    pub(super) exports: usize,
    pub(super) jobs: usize,
    /// Node, name, whether it records.
    pub(super) bitmaps: BTreeSet<(usize, String, bool)>,
    pub(super) fleecing: Vec<PathBuf>,
}

/// QEMU under test: `PVEBACKUP_TEST_QEMU` may name another one, with arguments for its firmware.
fn qemu() -> Command {
    let line = std::env::var("PVEBACKUP_TEST_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".into());
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().unwrap());
    command.args(words);
    command
}

pub(super) fn generation(n: u32) -> String {
    format!("{n:016x}")
}

impl Vm {
    /// A running guest.
    pub(super) async fn running(kinds: &[Kind]) -> Self {
        let mut vm = Self::start(kinds).await;
        vm.say("cont", Value::Null).await;
        vm
    }

    /// A guest that was never started.
    pub(super) async fn start(kinds: &[Kind]) -> Self {
        Self::start_with(kinds, &[]).await
    }

    pub(super) async fn start_with(kinds: &[Kind], options: &[&str]) -> Self {
        let dir = tempfile::Builder::new().prefix("pvb").tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        fs::create_dir(dir.path().join("fleecing")).unwrap();
        let mut command = qemu();
        command.args(["-machine", "q35", "-accel", "tcg", "-nodefaults", "-display", "none", "-S"]).args(options);
        for socket in ["qmp", "monitor"] {
            command.args(["-qmp", &format!("unix:{},server=on,wait=off", at(socket))]);
        }
        let iothread = kinds.iter().any(|k| matches!(k, Kind::VirtioIothread | Kind::ScsiIothread));
        if iothread {
            command.args(["-object", "iothread,id=io0"]);
        }
        let mut names = Vec::new();
        for (n, kind) in kinds.iter().enumerate() {
            let format = if matches!(kind, Kind::Ahci | Kind::Qcow2) { "qcow2" } else { "raw" };
            let file = at(&format!("disk{n}"));
            let size = if *kind == Kind::Pflash { VARS } else { SIZE };
            assert!(
                Command::new("qemu-img")
                    .args(["create", "-q", "-f", format, &file, &size.to_string()])
                    .status()
                    .unwrap()
                    .success()
            );
            let thread = if matches!(kind, Kind::VirtioIothread | Kind::ScsiIothread) { ",iothread=io0" } else { "" };
            let drive = format!("if=none,id=drive-{n},format={format},discard=unmap,file={file}");
            let blockdev = format!(
                "driver={format},node-name=node-{n},discard=unmap,file.driver=file,file.discard=unmap,file.filename={file}"
            );
            let (option, backend, devices, qdev) = match kind {
                Kind::VirtioBlockdev | Kind::VirtioIothread => (
                    "-blockdev",
                    blockdev,
                    vec![format!("virtio-blk-pci,id=virtio{n},drive=node-{n}{thread}")],
                    format!("/machine/peripheral/virtio{n}/virtio-backend"),
                ),
                Kind::Qcow2 => ("-blockdev", blockdev, vec![format!("virtio-blk-pci,drive=node-{n}")], String::new()),
                Kind::ScsiDrive | Kind::ScsiIothread => (
                    "-drive",
                    drive,
                    vec![
                        format!("virtio-scsi-pci,id=scsihw{n}{thread}"),
                        format!("scsi-hd,id=scsi{n},bus=scsihw{n}.0,drive=drive-{n}"),
                    ],
                    format!("scsi{n}"),
                ),
                Kind::Ahci => ("-drive", drive, vec![format!("ide-hd,drive=drive-{n}")], String::new()),
                Kind::Pflash => (
                    "-drive",
                    format!("if=pflash,unit=0,format=raw,file={file}"),
                    Vec::new(),
                    "/machine/system.flash0".into(),
                ),
            };
            command.args([option, &backend]);
            for device in devices {
                command.args(["-device", &device]);
            }
            names.push((n, qdev, file, size));
        }
        let log = fs::File::create(dir.path().join("log")).unwrap();
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let mut vm = {
            let monitor = connect(&dir.path().join("monitor"), &dir.path().join("log")).await;
            let mut qmp = Qmp::new(dir.path().join("qmp"));
            qmp.lock_wait = Duration::from_secs(10);
            let oracle = Oracle(names.iter().map(|(.., size)| vec![0; *size]).collect());
            Self { dir, child, qmp, monitor, disks: Vec::new(), oracle, steps: 0 }
        };
        let graph = vm.graph().await;
        for (n, qdev, file, size) in names {
            let device = graph.devices.iter().find(|d| {
                let named = d.qdev.as_deref() == Some(qdev.as_str());
                named || d.inserted.as_ref().is_some_and(|i| i.file == file)
            });
            let device = device.unwrap();
            let node = device.inserted.as_ref().unwrap();
            vm.disks.push(Disk {
                name: format!("disk{n}"),
                device: device.device.clone(),
                kind: DiskKind::Drive,
                qdev: device.qdev.clone().unwrap(),
                node: node.node_name.clone().unwrap(),
                driver: node.drv.clone(),
                size: size as u64,
                identity: file,
                volume: None,
            });
        }
        vm
    }

    /// A command over the tests' own monitor.
    pub(super) async fn say(&mut self, command: &str, arguments: Value) -> Value {
        self.try_say(command, arguments).await.unwrap_or_else(|e| panic!("{e}"))
    }

    pub(super) async fn try_say(&mut self, command: &str, arguments: Value) -> Result<Value, crate::qmp::QmpError> {
        self.monitor.execute_value(command, arguments).await
    }

    pub(super) async fn graph(&mut self) -> Graph {
        Graph::read(&mut self.monitor).await.unwrap()
    }

    pub(super) async fn status(&mut self) -> String {
        self.monitor.execute(&QueryStatus {}).await.unwrap().status
    }

    pub(super) async fn state(&mut self) -> State {
        let graph = self.graph().await;
        let roots = self.disks.iter().map(|d| {
            let device = graph.device(&d.qdev, &d.device).unwrap();
            device.inserted.as_ref().unwrap().node_name.clone().unwrap()
        });
        let roots: Vec<String> = roots.collect();
        let bitmaps = self.disks.iter().enumerate().flat_map(|(n, d)| {
            graph.bitmaps(&d.node).map(move |(name, b)| (n, name.to_owned(), b.recording)).collect::<Vec<_>>()
        });
        State {
            bitmaps: bitmaps.collect(),
            roots,
            nodes: graph.nodes.iter().filter_map(|n| n.node_name.clone()).collect(),
            exports: graph.exports.len(),
            jobs: self.monitor.execute(&QueryJobs {}).await.unwrap().len(),
            status: self.status().await,
            fleecing: self.files(),
        }
    }

    /// Fleecing images and what is in run directories.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        for dir in [self.dir.path().to_owned(), self.dir.path().join("fleecing")] {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_str().unwrap();
                if name.starts_with("pvb-") || name.starts_with("run-") {
                    files.push(path);
                }
            }
        }
        files.sort();
        files
    }

    /// Writes as the guest would, and remembers.
    pub(super) async fn write(&mut self, disk: usize, range: Range<usize>, byte: u8) {
        let qdev = self.disks[disk].qdev.clone();
        let line = format!("qemu-io -d {qdev} \"write -q -P {byte} {} {}\"", range.start, range.len());
        let answer = self.monitor.execute(&HumanMonitorCommand { command_line: line }).await.unwrap();
        assert_eq!(answer, "", "write to {qdev}");
        self.oracle.0[disk][range].fill(byte);
    }

    /// A write here and there on every disk; other places and bytes with every call. The first cluster of a disk is left
    /// alone.
    pub(super) async fn scribble(&mut self) {
        self.steps += 1;
        for disk in 0..self.disks.len() {
            let size = self.oracle.0[disk].len();
            for n in 0..4 {
                // A congruential walk: no two calls write the same, and every run does.
                let walk = (self.steps * 4 + n).wrapping_mul(6_364_136_223_846_793_005).wrapping_add(disk as u64 * 977);
                let start = 65536 + (walk >> 20) as usize % (size - 65536 - 4096) / 512 * 512;
                let len = [512, 4096, 2048, 1024][n as usize];
                self.write(disk, start..start + len, 1 + (walk >> 8) as u8 % 255).await;
            }
        }
    }

    pub(super) fn plan(&self, n: u32, bitmap: &BitmapMode) -> AccessPlan {
        let disks =
            self.disks.iter().map(|disk| DiskPlan { disk: disk.clone(), bitmap: bitmap.clone(), granularity: 65536 });
        AccessPlan {
            guest: Guest {
                id: "test".parse().unwrap(),
                name: None,
                kind: GuestKind::Plain,
                qmp: self.qmp.socket.clone(),
                agent: None,
                config: Vec::new(),
                firewall: None,
            },
            disks: disks.collect(),
            target: "repo-a".into(),
            generation: generation(n),
            run_dir: self.dir.path().join(format!("run-{n}")),
            fleecing: Fleecing::Directory {
                path: self.dir.path().join("fleecing"),
                format: if n.is_multiple_of(2) { FleecingFormat::Qcow2 } else { FleecingFormat::Raw },
            },
            freeze: FreezeMode::Off,
            freeze_limit: Duration::from_secs(5),
            cbw_timeout: Duration::from_secs(45),
            exports: crate::access::ExportMode::Trim,
            pvesm: "pvesm".into(),
        }
    }

    pub(super) fn journal(&self) -> Journal {
        // A program that another test is just starting has our lock too, until it is loaded.
        let started = Instant::now();
        loop {
            match Journal::open(&self.dir.path().join("journal"), "test") {
                Err(JournalError::Busy { .. }) if started.elapsed() < Duration::from_secs(5) => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                other => return other.unwrap(),
            }
        }
    }

    pub(super) fn access(&self, way: Way, plan: AccessPlan) -> StockAccess {
        let mut access = StockAccess::new(plan, self.qmp.clone(), self.journal()).with_way(way);
        access.trial.unwatched = true;
        access
    }

    /// A complete read of the snapshot.
    pub(super) fn read(&self, access: &ActiveAccess) -> Oracle {
        let read = |disk: &crate::access::DiskAccess| {
            let out = self.dir.path().join("out");
            let _ = fs::remove_file(&out);
            run("nbdcopy", &["--no-extents", &uri(access, &disk.export), out.to_str().unwrap()]);
            fs::read(&out).unwrap()
        };
        Oracle(access.disks.iter().map(read).collect())
    }

    /// Brings an older image up to date with what the dirty bitmap says changed. Returns the bytes read.
    pub(super) fn update(&self, access: &ActiveAccess, base: &mut Oracle) -> usize {
        let full = self.read(access);
        let mut bytes = 0;
        for (n, disk) in access.disks.iter().enumerate() {
            for range in dirty(access, disk) {
                bytes += range.len();
                base.0[n][range.clone()].copy_from_slice(&full.0[n][range]);
            }
        }
        bytes
    }
}

pub(super) fn uri(access: &ActiveAccess, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", access.socket.display())
}

/// Dirty ranges, from the bitmap that the export shows.
pub(super) fn dirty(access: &ActiveAccess, disk: &crate::access::DiskAccess) -> Vec<Range<usize>> {
    let context = disk.dirty_context.as_deref().unwrap();
    let map = run("nbdinfo", &["--json", &format!("--map={context}"), &uri(access, &disk.export)]);
    let map: Value = serde_json::from_str(&map).unwrap();
    let extents = map.as_array().unwrap().iter().filter(|e| e["type"] == 1);
    extents
        .map(|e| {
            let start = e["offset"].as_u64().unwrap() as usize;
            start..start + e["length"].as_u64().unwrap() as usize
        })
        .collect()
}

pub(super) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

async fn connect(socket: &Path, log: &Path) -> Session {
    let started = Instant::now();
    let log = || fs::read_to_string(log).unwrap_or_default();
    loop {
        match Qmp::new(socket).session().await {
            Ok(session) => return session,
            Err(error) => assert!(started.elapsed() < Duration::from_secs(20), "{error}: {}", log()),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A job of somebody else's.
pub(super) fn foreign_job(node: &str, target: &str) -> Value {
    json!({"job-id": "theirs", "device": node, "target": target, "sync": "none"})
}
