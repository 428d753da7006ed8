//! The guest: operations through the front-end devices, as a guest would do them, and a record of each.

use super::{
    disk::Format,
    image::Image,
    oracle::{Change, Content, Oracle},
    qmp::{QmpClient, QmpFailure},
};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::PathBuf,
    sync::{Condvar, Mutex, MutexGuard},
    time::{Duration, Instant},
};

/// How long an operation may wait for a guest that is held (stopped or drained).
const HELD_LIMIT: Duration = Duration::from_mins(2);

/// Lets the guest's operations through, one at a time, unless the guest is held. `qemu-io` writes no matter whether the machine
/// runs, so the rig itself has to see to it that a stopped guest does not write.
#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    stopped: bool,
    drained: usize,
    under_way: bool,
    broken: bool,
}

/// A guest machine's side of the disks.
pub struct GuestWriter {
    gate: Gate,
    line: Mutex<Line>,
}

struct Line {
    control: Option<QmpClient>,
    stdout: Option<File>,
    oracle: Oracle,
    disks: BTreeMap<String, Target>,
}

#[derive(Clone)]
struct Target {
    qdev: String,
    image: PathBuf,
    format: Format,
}

/// Keeps the guest's requests out, as QEMU's drained sections do, until dropped.
pub struct Drained<'a>(&'a GuestWriter);

impl Drop for Drained<'_> {
    fn drop(&mut self) {
        let mut state = self.0.gate.lock();
        state.drained -= 1;
        self.0.gate.changed.notify_all();
    }
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn enter(&self) -> Result<(), String> {
        let deadline = Instant::now() + HELD_LIMIT;
        let mut state = self.lock();
        loop {
            if state.broken {
                return Err("the machine is gone".into());
            }
            if !state.stopped && state.drained == 0 && !state.under_way {
                state.under_way = true;
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("the guest was held for {HELD_LIMIT:?}"));
            }
            state = self.changed.wait_timeout(state, left).unwrap().0;
        }
    }

    fn leave(&self) {
        self.lock().under_way = false;
        self.changed.notify_all();
    }

    fn hold(&self, how: impl FnOnce(&mut GateState)) {
        let mut state = self.lock();
        how(&mut state);
        while state.under_way {
            state = self.changed.wait(state).unwrap();
        }
    }
}

impl GuestWriter {
    pub fn new() -> Self {
        let line = Line { control: None, stdout: None, oracle: Oracle::default(), disks: BTreeMap::new() };
        Self { gate: Gate::default(), line: Mutex::new(line) }
    }

    pub fn add_disk(&self, name: &str, qdev: String, image: PathBuf, format: Format, content: Content) {
        let mut line = self.line();
        line.oracle.add_disk(name, content);
        line.disks.insert(name.into(), Target { qdev, image, format });
    }

    /// Takes over a QEMU that has just started.
    pub fn attach(&self, control: QmpClient, stdout: File) {
        let mut line = self.line();
        line.control = Some(control);
        line.stdout = Some(stdout);
        drop(line);
        let mut state = self.gate.lock();
        *state = GateState { drained: state.drained, ..GateState::default() };
        self.gate.changed.notify_all();
    }

    /// The machine is gone; operations fail until the next [`GuestWriter::attach`].
    pub fn detach(&self) {
        self.gate.lock().broken = true;
        self.gate.changed.notify_all();
        self.line().control = None;
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Waits for the operation under way and keeps further ones out, until [`GuestWriter::resume`].
    pub fn stop(&self) {
        self.gate.hold(|state| state.stopped = true);
    }

    pub fn resume(&self) {
        self.gate.lock().stopped = false;
        self.gate.changed.notify_all();
    }

    /// Waits for the operation under way and keeps further ones out, as long as the guard lives.
    pub fn drain(&self) -> Drained<'_> {
        self.gate.hold(|state| state.drained += 1);
        Drained(self)
    }

    /// A command on the rig's own monitor.
    pub fn qmp(&self, command: &str, arguments: Value) -> Result<Value, QmpFailure> {
        match &mut self.line().control {
            Some(control) => control.execute(command, arguments),
            None => Err(QmpFailure::Lost(format!("{command}: the machine is gone"))),
        }
    }

    /// Events that came on the rig's own monitor, waiting for more until `limit`.
    pub fn events(&self, limit: Duration) -> Vec<Value> {
        self.line().control.as_mut().map_or_else(Vec::new, |control| control.events(limit))
    }

    /// Operations completed so far, over all disks.
    pub fn mark(&self) -> usize {
        self.line().oracle.len()
    }

    pub fn with_oracle<T>(&self, look: impl FnOnce(&Oracle) -> T) -> T {
        look(&self.line().oracle)
    }

    pub fn size(&self, disk: &str) -> u64 {
        self.line().oracle.now(disk).size()
    }

    pub fn format(&self, disk: &str) -> Format {
        self.line().target(disk).format
    }

    /// Writes `byte`, which QEMU sees as one request.
    pub fn write(&self, disk: &str, offset: u64, length: u64, byte: u8) -> Result<(), String> {
        self.operate(disk, &format!("write -q -P {byte:#04x} {offset} {length}"), |_, _| Change::Fill {
            offset,
            length,
            byte,
        })
    }

    /// Write-zeroes request that may deallocate.
    pub fn write_zeroes(&self, disk: &str, offset: u64, length: u64) -> Result<(), String> {
        self.operate(disk, &format!("write -q -z -u {offset} {length}"), |_, _| Change::Fill {
            offset,
            length,
            byte: 0,
        })
    }

    /// Discard request. What the range reads afterwards is QEMU's choice: it is looked up in the raw image. For qcow2, where it
    /// cannot be looked up, a write-zeroes request that may deallocate is sent instead.
    pub fn discard(&self, disk: &str, offset: u64, length: u64) -> Result<(), String> {
        if self.format(disk) == Format::Qcow2 {
            return self.write_zeroes(disk, offset, length);
        }
        self.operate(disk, &format!("discard -q {offset} {length}"), |target, _| {
            let mut data = vec![0; length as usize];
            Image::open(&target.image).expect("the disk's image opens").read(offset, &mut data);
            Change::Bytes { offset, data }
        })
    }

    pub fn flush(&self, disk: &str) -> Result<(), String> {
        let mut line = self.line();
        let qdev = line.target(disk).qdev;
        line.qemu_io(&qdev, "flush")
    }

    /// Whether the guest reads `byte` all over the range.
    pub fn reads(&self, disk: &str, offset: u64, length: u64, byte: u8) -> bool {
        let mut line = self.line();
        let qdev = line.target(disk).qdev;
        match line.qemu_io(&qdev, &format!("read -q -P {byte:#04x} {offset} {length}")) {
            Ok(()) => true,
            Err(text) if text.contains("Pattern verification failed") => false,
            Err(text) => panic!("the guest cannot read {disk} at offset {offset}: {text}"),
        }
    }

    /// Grows or shrinks the disk, as its operator would.
    pub fn resize(&self, disk: &str, node: &str, size: u64) -> Result<(), QmpFailure> {
        let mut line = self.line();
        let control = line.control.as_mut().ok_or_else(|| QmpFailure::Lost("the machine is gone".into()))?;
        control.execute("block_resize", json!({"node-name": node, "size": size}))?;
        line.oracle.record(disk, Change::Resize { size });
        Ok(())
    }

    fn operate(
        &self,
        disk: &str,
        command: &str,
        change: impl FnOnce(&Target, &Oracle) -> Change,
    ) -> Result<(), String> {
        self.gate.enter()?;
        let result = {
            let mut line = self.line();
            let target = line.target(disk);
            line.qemu_io(&target.qdev, command).map(|()| {
                let change = change(&target, &line.oracle);
                line.oracle.record(disk, change);
            })
        };
        self.gate.leave();
        result
    }
}

impl Line {
    fn target(&self, disk: &str) -> Target {
        self.disks.get(disk).unwrap_or_else(|| panic!("no disk `{disk}`")).clone()
    }

    /// Anything that qemu-io has to say (it is told to be quiet) is an error that the guest saw.
    fn qemu_io(&mut self, qdev: &str, command: &str) -> Result<(), String> {
        let control = self.control.as_mut().ok_or("the machine is gone")?;
        let arguments = json!({"command-line": format!("qemu-io -d {qdev} \"{command}\"")});
        let said =
            control.execute("human-monitor-command", arguments).map_err(|failure| format!("{command}: {failure}"))?;
        let mut text = said.as_str().unwrap_or_default().to_owned();
        self.stdout
            .as_mut()
            .expect("QEMU's output is open")
            .read_to_string(&mut text)
            .map_err(|error| error.to_string())?;
        if text.trim().is_empty() { Ok(()) } else { Err(format!("{command}: {}", text.trim())) }
    }
}
