//! A real virtual machine.

use super::{
    disk::{self, Bus, DiskSpec, Format, Io, Style},
    image::make_image,
    interposer::{Fault, Front, Interposer, SeenCommand},
    load::{Load, LoadPlan},
    oracle::{Content, FirstDifference, Torn},
    process::Guarded,
    proxmox_root::ProxmoxRoot,
    proxmox_standin::StandIn,
    qmp::{QmpClient, QmpFailure},
    writer::GuestWriter,
};
use serde_json::{Value, json};
use std::{
    env, fs,
    fs::File,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};
use tempfile::TempDir;

const START_LIMIT: Duration = Duration::from_mins(1);

/// What executes the guest's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    Tcg,
    Kvm,
}

/// A machine to be started.
pub struct VmBuilder {
    disks: Vec<DiskSpec>,
    accel: Accel,
    memory_mib: u32,
    paused: bool,
    agent: bool,
    direct: bool,
    vmid: u32,
    proxmox: bool,
    config: Vec<String>,
    arguments: Vec<String>,
}

impl Default for VmBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl VmBuilder {
    /// q35, 128 MiB, TCG, no disk, running (its firmware finds nothing to boot).
    pub fn new() -> Self {
        Self {
            disks: Vec::new(),
            accel: Accel::Tcg,
            memory_mib: 128,
            paused: false,
            agent: false,
            direct: false,
            vmid: 100,
            proxmox: false,
            config: Vec::new(),
            arguments: Vec::new(),
        }
    }

    pub fn disk(self, name: &str, size: u64, bus: Bus, style: Style, format: Format, io: Io) -> Self {
        self.disk_spec(DiskSpec { bus, style, format, io, ..DiskSpec::new(name, size) })
    }

    pub fn disk_spec(mut self, disk: DiskSpec) -> Self {
        self.disks.push(disk);
        self
    }

    /// Not started (`-S`).
    pub fn paused(mut self) -> Self {
        self.paused = true;
        self
    }

    pub fn accel(mut self, accel: Accel) -> Self {
        self.accel = accel;
        self
    }

    pub fn memory_mib(mut self, memory: u32) -> Self {
        self.memory_mib = memory;
        self
    }

    /// With a guest agent's channel, at [`Vm::agent_socket`].
    pub fn agent(mut self) -> Self {
        self.agent = true;
        self
    }

    pub(super) fn has_agent(&self) -> bool {
        self.agent
    }

    /// Clients talk to QEMU without anything between; the rig's guest then writes on while the machine is stopped.
    pub fn direct_qmp(mut self) -> Self {
        self.direct = true;
        self
    }

    /// A machine of a Proxmox VE node: the stand-in answers Proxmox's commands, and the node's files lie below
    /// [`Vm::proxmox_root`].
    pub fn proxmox(mut self, vmid: u32) -> Self {
        self.vmid = vmid;
        self.proxmox = true;
        self
    }

    /// A further line (or section) of the Proxmox configuration.
    pub fn config(mut self, line: impl Into<String>) -> Self {
        self.config.push(line.into());
        self
    }

    /// A further word on QEMU's command line.
    pub fn arg(mut self, word: impl Into<String>) -> Self {
        self.arguments.push(word.into());
        self
    }

    /// Makes the images and starts QEMU.
    pub fn start(self) -> Vm {
        let directory = machine_directory();
        let dir = directory.path().to_owned();
        let volid = |(number, disk)| format!("local:{}/{}", self.vmid, disk::volume_name(disk, number, self.vmid));
        let volids: Vec<String> = self.disks.iter().enumerate().map(volid).collect();
        let images: Vec<PathBuf> = self
            .disks
            .iter()
            .enumerate()
            .map(|(number, disk)| disk::image_path(&dir, disk, number, self.vmid))
            .collect();
        let writer = Arc::new(GuestWriter::new());
        for (disk, image) in self.disks.iter().zip(&images) {
            if disk.image.as_ref().is_none_or(|image| !image.exists()) {
                make_image(image, disk);
            }
            let content = match (&disk.content, &disk.image, disk.format) {
                (Some(content), _, _) => Content::of_image(content),
                (None, Some(image), Format::Raw) => Content::of_image(image),
                (None, _, _) => Content::empty(disk.size),
            };
            writer.add_disk(&disk.name, disk.qdev(), image.clone(), disk.format, content);
        }
        let root = self.proxmox.then(|| {
            let root = ProxmoxRoot::create(&dir.join("pve"), self.vmid, &dir.join("vz"));
            root.write_config(&self.disks, &volids, self.agent, self.memory_mib, &self.config);
            root
        });
        let disks = self.disks.clone();
        let mut vm = Vm { running: None, writer, disks, images, volids, root, builder: self, starts: 0, directory };
        vm.start_again();
        vm
    }
}

/// Short, because a unix socket's path has at most 107 bytes.
fn machine_directory() -> TempDir {
    let base = env::temp_dir();
    let base = if base.as_os_str().len() > 40 { PathBuf::from("/tmp") } else { base };
    tempfile::Builder::new().prefix("rig-").tempdir_in(base).expect("a temporary directory")
}

/// QEMU and, where it needs them, its first arguments: `PVEBACKUP_TEST_QEMU="/old/qemu-system-x86_64 -L /old/firmware"`.
fn qemu_program() -> (PathBuf, Vec<String>) {
    let line = env::var("PVEBACKUP_TEST_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".into());
    let mut words = line.split_whitespace().map(str::to_owned);
    (words.next().expect("PVEBACKUP_TEST_QEMU names a program").into(), words.collect())
}

/// Major version of the QEMU that the tests run on. The first call says which it is.
fn qemu_major() -> u32 {
    static MAJOR: OnceLock<u32> = OnceLock::new();
    *MAJOR.get_or_init(|| {
        let (binary, _) = qemu_program();
        let output = Command::new(&binary).arg("--version").output();
        let output = output.unwrap_or_else(|error| panic!("{} does not run: {error}", binary.display()));
        let text = String::from_utf8_lossy(&output.stdout);
        eprintln!("rig: {}", text.lines().next().unwrap_or_default());
        let number = text.split("version ").nth(1).and_then(|rest| rest.split('.').next());
        number.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("no version in {text:?}"))
    })
}

/// Whether this QEMU is from before 8: there a disk with an iothread must not be exported.
pub fn old_qemu() -> bool {
    qemu_major() < 8
}

/// What exists as long as QEMU runs. Fields are dropped in this order.
struct Running {
    stand_in: Option<Arc<StandIn>>,
    interposer: Option<Interposer>,
    qemu: Guarded,
}

/// A virtual machine; QEMU and its directory go when it is dropped.
pub struct Vm {
    running: Option<Running>,
    writer: Arc<GuestWriter>,
    disks: Vec<DiskSpec>,
    images: Vec<PathBuf>,
    volids: Vec<String>,
    root: Option<ProxmoxRoot>,
    builder: VmBuilder,
    starts: u32,
    directory: TempDir,
}

impl Vm {
    /// The machine's directory; anything may be put there.
    pub fn dir(&self) -> &Path {
        self.directory.path()
    }

    /// The monitor for the program under test.
    pub fn qmp_socket(&self) -> PathBuf {
        self.runtime("qmp")
    }

    pub fn agent_socket(&self) -> PathBuf {
        self.runtime("qga")
    }

    fn runtime(&self, kind: &str) -> PathBuf {
        self.root.as_ref().map_or_else(|| self.dir().join(format!("{kind}.sock")), |root| root.runtime(kind))
    }

    /// The pretended Proxmox VE node.
    pub fn proxmox_root(&self) -> &ProxmoxRoot {
        self.root.as_ref().expect("the machine is one of Proxmox VE's")
    }

    /// The Proxmox part of its QEMU.
    pub fn stand_in(&self) -> &StandIn {
        self.running().stand_in.as_ref().expect("the machine is one of Proxmox VE's")
    }

    /// What a client did that would have ended Proxmox's QEMU (and did end this one).
    pub fn proxmox_fatal(&self) -> Option<String> {
        fs::read_to_string(self.dir().join("fatal")).ok()
    }

    /// Proxmox volume id of the disk.
    pub fn volid(&self, disk: &str) -> &str {
        &self.volids[self.number(disk)]
    }

    pub fn image(&self, disk: &str) -> &Path {
        &self.images[self.number(disk)]
    }

    pub fn spec(&self, disk: &str) -> &DiskSpec {
        &self.disks[self.number(disk)]
    }

    pub fn disks(&self) -> impl Iterator<Item = &str> {
        self.disks.iter().map(|disk| disk.name.as_str())
    }

    fn number(&self, disk: &str) -> usize {
        self.disks.iter().position(|spec| spec.name == disk).unwrap_or_else(|| panic!("no disk `{disk}`"))
    }

    fn running(&self) -> &Running {
        self.running.as_ref().expect("the machine runs")
    }

    pub fn pid(&self) -> i32 {
        self.running().qemu.pid()
    }

    fn output(&self, name: &str) -> PathBuf {
        self.dir().join(format!("{name}.{}", self.starts))
    }

    /// What QEMU printed to its standard error since it started.
    pub fn stderr(&self) -> String {
        fs::read_to_string(self.output("stderr")).unwrap_or_default()
    }

    /// Starts QEMU (anew, after [`Vm::quit`] or [`Vm::kill`]), with the same disks.
    pub fn start_again(&mut self) {
        assert!(self.running.is_none(), "the machine runs already");
        self.starts += 1;
        let stdout = self.output("stdout");
        let _ = qemu_major();
        let (binary, words) = qemu_program();
        let mut command = Guarded::command(&binary);
        command
            .args(words)
            .args(self.command_line())
            .current_dir(self.dir())
            .stdin(std::process::Stdio::null())
            .stdout(File::create(&stdout).unwrap())
            .stderr(File::create(self.output("stderr")).unwrap());
        let mut qemu = Guarded::spawn(command).expect("setpriv runs");
        let control = self.connect(&mut qemu, "ctl.sock");
        self.writer.attach(control, File::open(stdout).unwrap());
        let stand_in = self.root.is_some().then(|| {
            let control = self.connect(&mut qemu, "pve.sock");
            Arc::new(StandIn::new(control, Arc::clone(&self.writer), qemu.pid(), self.dir().join("fatal")))
        });
        let interposer = (!self.builder.direct).then(|| {
            let (public, upstream) = (self.qmp_socket(), self.dir().join("mon.sock"));
            let front = stand_in.clone().map(|stand_in| stand_in as Arc<dyn Front>);
            Interposer::start(qemu.pid(), &public, &upstream, Arc::clone(&self.writer), front)
                .unwrap_or_else(|error| panic!("QEMU's monitor cannot be taken over: {error}"))
        });
        self.running = Some(Running { stand_in, interposer, qemu });
    }

    fn connect(&self, qemu: &mut Guarded, socket: &str) -> QmpClient {
        let (path, deadline) = (self.dir().join(socket), Instant::now() + START_LIMIT);
        loop {
            if let Some(status) = qemu.ended() {
                panic!("QEMU ended at its start ({status}): {}", self.stderr());
            }
            match QmpClient::connect(&path, Duration::from_millis(200)) {
                Ok(client) => return client,
                Err(error) => assert!(Instant::now() < deadline, "no answer from QEMU: {error}; {}", self.stderr()),
            }
        }
    }

    fn command_line(&self) -> Vec<String> {
        let builder = &self.builder;
        let mut words: Vec<String> =
            ["-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35"].map(str::to_owned).into();
        let mut push = |option: &str, value: String| words.extend([option.to_owned(), value]);
        if let Some(root) = &self.root {
            push("-name", format!("rig{},debug-threads=on", builder.vmid));
            push("-pidfile", root.runtime("pid").display().to_string());
        }
        push("-m", builder.memory_mib.to_string());
        match builder.accel {
            Accel::Tcg => push("-accel", "tcg".into()),
            Accel::Kvm => {
                push("-accel", "kvm".into());
                push("-cpu", "host,-arch-capabilities".into());
            }
        }
        for id in ["qmp", "mon", "ctl", "pve"] {
            let path = if id == "qmp" { self.qmp_socket() } else { self.dir().join(format!("{id}.sock")) };
            push("-chardev", format!("socket,id={id},path={},server=on,wait=off", path.display()));
            push("-mon", format!("chardev={id},mode=control"));
        }
        if builder.agent {
            push("-chardev", format!("socket,id=qga0,path={},server=on,wait=off", self.agent_socket().display()));
            push("-device", "virtio-serial-pci,id=qga0-bus".into());
            push("-device", "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0".into());
        }
        words.extend(disk::arguments(&self.disks, &self.images, &self.volids));
        if builder.paused {
            words.push("-S".into());
        }
        words.extend(builder.arguments.iter().cloned());
        words
    }

    /// Whether QEMU is alive.
    pub fn is_alive(&mut self) -> bool {
        self.running.as_mut().is_some_and(|running| running.qemu.ended().is_none())
    }

    /// Asks QEMU to quit and waits for its end.
    pub fn quit(&mut self) -> ExitStatus {
        let _ = self.writer.qmp("quit", json!({}));
        self.wait_end()
    }

    /// Waits for QEMU's end, whatever causes it.
    pub fn wait_end(&mut self) -> ExitStatus {
        let status = self.running.as_mut().expect("the machine runs").qemu.wait();
        self.writer.detach();
        self.running = None;
        status
    }

    /// Kills QEMU, as a power failure would.
    pub fn kill(&mut self) {
        self.running.as_mut().expect("the machine runs").qemu.kill();
        self.wait_end();
    }

    /// A command on the rig's own monitor that has to succeed.
    #[allow(clippy::needless_pass_by_value, reason = "calls read better with json!({…}) as the argument")]
    pub fn qmp(&self, command: &str, arguments: Value) -> Value {
        match self.writer.qmp(command, arguments.clone()) {
            Ok(value) => value,
            Err(failure) => panic!("{command} {arguments}: {failure}"),
        }
    }

    /// A command on the rig's own monitor.
    pub fn try_qmp(&self, command: &str, arguments: Value) -> Result<Value, QmpFailure> {
        self.writer.qmp(command, arguments)
    }

    /// Events since the last call, waiting for more until `limit`.
    pub fn events(&self, limit: Duration) -> Vec<Value> {
        self.writer.events(limit)
    }

    /// `running`, `paused`, `prelaunch`, …
    pub fn status(&self) -> String {
        self.qmp("query-status", json!({}))["status"].as_str().unwrap_or_default().to_owned()
    }

    /// Stops the machine, as its operator would.
    pub fn pause(&self) {
        self.writer.stop();
        self.qmp("stop", json!({}));
    }

    pub fn resume(&self) {
        self.qmp("cont", json!({}));
        self.writer.resume();
    }

    /// The guest's side.
    pub fn writer(&self) -> &Arc<GuestWriter> {
        &self.writer
    }

    /// Commands that came from clients since QEMU started.
    pub fn seen_commands(&self) -> Vec<SeenCommand> {
        self.interposer().seen()
    }

    /// The `nth` (from 1) command of this name from now on meets `fault`.
    pub fn fault(&self, command: &str, nth: usize, fault: Fault) {
        self.interposer().fault(command, nth, fault);
    }

    /// Takes back the faults that no command has met. How many.
    pub fn no_more_faults(&self) -> usize {
        self.interposer().no_more_faults()
    }

    /// Cuts off the client that is connected, if one is.
    pub fn disconnect_client(&self) {
        self.interposer().disconnect_client();
    }

    fn interposer(&self) -> &Interposer {
        self.running().interposer.as_ref().expect("the machine's monitor is not direct")
    }

    /// The guest writes `byte` over a range; a guest-visible error fails the test.
    pub fn write(&self, disk: &str, offset: u64, length: u64, byte: u8) {
        self.writer
            .write(disk, offset, length, byte)
            .unwrap_or_else(|error| panic!("the guest saw an error on {disk}: {error}"));
    }

    pub fn write_zeroes(&self, disk: &str, offset: u64, length: u64) {
        self.writer
            .write_zeroes(disk, offset, length)
            .unwrap_or_else(|error| panic!("the guest saw an error on {disk}: {error}"));
    }

    pub fn discard(&self, disk: &str, offset: u64, length: u64) {
        self.writer
            .discard(disk, offset, length)
            .unwrap_or_else(|error| panic!("the guest saw an error on {disk}: {error}"));
    }

    pub fn flush(&self, disk: &str) {
        self.writer.flush(disk).unwrap_or_else(|error| panic!("the guest saw an error on {disk}: {error}"));
    }

    /// Whether the guest reads `byte` all over the range.
    pub fn reads(&self, disk: &str, offset: u64, length: u64, byte: u8) -> bool {
        self.writer.reads(disk, offset, length, byte)
    }

    /// Resizes the disk, as its operator would.
    pub fn resize(&self, disk: &str, size: u64) {
        let node = self.root_node(disk);
        self.writer.resize(disk, &node, size).unwrap_or_else(|failure| panic!("resize of {disk} to {size}: {failure}"));
    }

    /// The node below the front-end device.
    pub fn root_node(&self, disk: &str) -> String {
        let qdev = self.spec(disk).qdev();
        let blocks = self.qmp("query-block", json!({}));
        let block = blocks.as_array().into_iter().flatten().find(|block| block["qdev"] == qdev.as_str());
        let node = block.and_then(|block| block["inserted"]["node-name"].as_str());
        node.unwrap_or_else(|| panic!("{qdev} has no node: {blocks}")).to_owned()
    }

    /// Random operations in the background, on all disks unless the plan names some.
    pub fn load(&self, mut plan: LoadPlan) -> Load {
        if plan.disks.is_empty() {
            plan.disks = self.disks().map(str::to_owned).collect();
        }
        Load::start(Arc::clone(&self.writer), plan)
    }

    /// Operations that the guest has completed so far, on all disks.
    pub fn mark(&self) -> usize {
        self.writer.mark()
    }

    /// The number of operations after which `disk` was byte for byte like the raw image.
    pub fn matching_prefix(&self, disk: &str, image: &Path) -> Result<usize, FirstDifference> {
        self.matching_prefix_between(disk, image, 0..=self.mark())
    }

    /// The same, where the number has to lie in `window` (marks taken before and after the instant).
    pub fn matching_prefix_between(
        &self,
        disk: &str,
        image: &Path,
        window: RangeInclusive<usize>,
    ) -> Result<usize, FirstDifference> {
        let found = self.writer.with_oracle(|oracle| oracle.matching(disk, image, window))?;
        Ok(*found.last().expect("a match or a difference"))
    }

    /// The number of operations after which all these disks were like their raw images *at once*. The guest's operations are one
    /// sequence over all disks, so images of one instant have such a number.
    pub fn matching_instant(&self, images: &[(&str, &Path)], window: RangeInclusive<usize>) -> Result<usize, Torn> {
        self.writer.with_oracle(|oracle| oracle.matching_instant(images, window))
    }

    /// The raw image holds what the disk holds now.
    pub fn assert_equals_now(&self, disk: &str, image: &Path) {
        let now = self.mark();
        if let Err(difference) = self.matching_prefix_between(disk, image, now..=now) {
            panic!("{}: {difference}", image.display());
        }
    }

    /// What the guest reads from the disk, through QEMU, is what it wrote. It must not write meanwhile.
    pub fn assert_reads_back(&self, disk: &str) {
        const SECTOR: usize = 512;
        let size = self.writer.size(disk);
        let content = self.writer.with_oracle(|oracle| oracle.now(disk).bytes(0, size));
        let sectors: Vec<&[u8]> = content.chunks(SECTOR).collect();
        let mut offset = 0;
        for same in sectors.chunk_by(|one, next| one == next) {
            // The guest writes whole sectors of one byte, as a rule.
            let runs: Vec<&[u8]> = if same[0].iter().all(|byte| *byte == same[0][0]) {
                content[offset..offset + same.iter().map(|sector| sector.len()).sum::<usize>()]
                    .chunks(1 << 20)
                    .collect()
            } else {
                same.iter().flat_map(|sector| sector.chunk_by(|one, next| one == next)).collect()
            };
            for run in runs {
                assert!(
                    self.reads(disk, offset as u64, run.len() as u64, run[0]),
                    "the guest reads from {disk}, {} bytes at offset {offset}, something else than {:#04x}",
                    run.len(),
                    run[0]
                );
                offset += run.len();
            }
        }
        assert_eq!(offset as u64, size);
    }

    /// The disk itself holds what the guest wrote.
    pub fn assert_disk_intact(&self, disk: &str) {
        self.flush(disk);
        let copy = self.dir().join(format!("intact-{disk}.raw"));
        let format = self.spec(disk).format.as_str();
        let output = Command::new("qemu-img")
            .args(["convert", "-q", "-U", "-f", format, "-O", "raw"])
            .args([self.image(disk), &copy])
            .output()
            .expect("qemu-img runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        self.assert_equals_now(disk, &copy);
        fs::remove_file(copy).unwrap();
    }
}
