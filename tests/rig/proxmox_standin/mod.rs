//! Plays the commands that Proxmox VE adds to QEMU, in front of a stock QEMU: `backup-access-setup` and `-teardown` and what
//! belongs to them, with the shapes, errors and side effects seen on a QEMU with Proxmox's patches.
//!
//! Where the patched QEMU would abort (and the guest with it), the stand-in aborts QEMU and writes the reason to the file
//! `fatal` in the machine's directory. It is stricter than the original in that it also does so where the original survives by
//! luck: a device named twice, a teardown below an export without bitmap, forbidden target ids.
//!
//! Differences to the original: an empty target id is refused with another text (QEMU's own for empty bitmap names);
//! `query-qmp-schema` does not list the commands; for each disk whose bitmap is used a running machine is stopped and continued
//! rather than drained (its `STOP` and `RESUME` events are kept from clients), and filters in front of `-drive` disks are put in
//! with `qom-set`.

mod arguments;
mod bitmaps;
mod graph;

use super::{
    interposer::Front,
    qmp::{QmpClient, QmpFailure},
    writer::GuestWriter,
};
use arguments::{BitmapMode, parse_setup, parse_teardown};
use graph::{Found, Graph, Place};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::{
    fs,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

/// The size of a chunk of the Proxmox Backup Server.
pub const GRANULARITY: u64 = 4 << 20;

const BACKGROUND: &str = "backup-access-background-bitmap";
const PACKAGE: &str = "pve-qemu-kvm_10.0.2-4";

/// Target ids that end badly.
const FORBIDDEN: [&str; 3] = ["Proxmox", "Proxmox VE", BACKGROUND];

/// See the module.
pub struct StandIn {
    control: Mutex<QmpClient>,
    writer: Arc<GuestWriter>,
    pid: i32,
    fatal: PathBuf,
    state: Mutex<State>,
    /// Names as clients see them, and as QEMU knows them.
    aliases: Mutex<Vec<(String, String)>>,
    /// `STOP` and `RESUME` events of our own doing that are still to come.
    quiet: Mutex<(u32, u32)>,
    /// Limit of a copy before a write, in seconds.
    cbw_timeout: AtomicU32,
}

/// What the patched QEMU keeps of the last backup or access.
#[derive(Default)]
struct State {
    /// Kept after the end.
    target: Option<String>,
    /// Empty when none is active.
    devices: Vec<Device>,
    regular: bool,
    start_time: u64,
    end_time: u64,
    total: u64,
    reused: u64,
    error: Option<String>,
    infos: Vec<Value>,
    /// For generated node names.
    counter: u64,
}

/// A disk under access.
struct Device {
    name: String,
    found: Found,
    /// QEMU's names of the filter and the snapshot, once they are there.
    filter: String,
    snapshot: String,
    has_bitmap: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

impl StandIn {
    /// `control` is a monitor of its own; the file `fatal` takes the reason when QEMU has to be aborted.
    pub fn new(control: QmpClient, writer: Arc<GuestWriter>, pid: i32, fatal: PathBuf) -> Self {
        Self {
            control: Mutex::new(control),
            writer,
            pid,
            fatal,
            state: Mutex::default(),
            aliases: Mutex::default(),
            quiet: Mutex::default(),
            cbw_timeout: AtomicU32::new(45),
        }
    }

    /// Copies before writes may take so many seconds from the next access on, in place of the original's 45.
    pub fn cbw_timeout(&self, seconds: u32) {
        self.cbw_timeout.store(seconds, Ordering::SeqCst);
    }

    /// A regular backup (vzdump's own) starts; accesses are refused until [`StandIn::end_regular_backup`].
    pub fn begin_regular_backup(&self) {
        let mut state = lock(&self.state);
        assert!(state.devices.is_empty(), "an access is active");
        *state = State {
            target: Some("Proxmox".into()),
            regular: true,
            start_time: now(),
            counter: state.counter,
            ..State::default()
        };
    }

    pub fn end_regular_backup(&self) {
        let mut state = lock(&self.state);
        state.regular = false;
        state.end_time = now();
    }

    /// The target id of the access that is active.
    pub fn active_target(&self) -> Option<String> {
        let state = lock(&self.state);
        if state.devices.is_empty() { None } else { state.target.clone() }
    }

    fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpFailure> {
        lock(&self.control).execute(command, arguments)
    }

    /// Ends QEMU as the patched one would end, and leaves the reason for the test.
    fn die(&self, reason: &str) -> QmpFailure {
        eprintln!("rig: Proxmox's QEMU would abort: {reason}");
        let mut text = fs::read_to_string(&self.fatal).unwrap_or_default();
        text.push_str(reason);
        text.push('\n');
        let _ = fs::write(&self.fatal, text);
        if let Some(pid) = Pid::from_raw(self.pid) {
            let _ = kill_process(pid, Signal::ABORT);
        }
        QmpFailure::Lost(reason.into())
    }

    /// Keeps the rig's guest still, as a drained section does.
    fn drained<T>(&self, work: impl FnOnce() -> T) -> T {
        let _drained = self.writer.drain();
        work()
    }

    /// Keeps a real guest still as well, if the machine runs.
    fn stopped<T>(&self, work: impl FnOnce() -> T) -> T {
        let _drained = self.writer.drain();
        let running = self.execute("query-status", json!({})).is_ok_and(|status| status["running"] == true);
        if running {
            let mut quiet = lock(&self.quiet);
            *quiet = (quiet.0 + 1, quiet.1 + 1);
            drop(quiet);
            let _ = self.execute("stop", json!({}));
        }
        let result = work();
        if running {
            let _ = self.execute("cont", json!({}));
        }
        result
    }

    fn set_up(&self, arguments: &Value) -> Result<Value, QmpFailure> {
        let request = parse_setup(arguments)?;
        let mut state = lock(&self.state);
        if state.regular || !state.devices.is_empty() {
            let target = state.target.clone().unwrap_or_default();
            return Err(QmpFailure::generic(format!("previous backup for target '{target}' not finished")));
        }
        if request.devices.is_empty() {
            return Err(self.die("backup-access-setup with an empty device list"));
        }
        if FORBIDDEN.contains(&request.target.as_str()) {
            return Err(self.die(&format!("backup-access-setup with the target id '{}'", request.target)));
        }
        for (number, (device, _)) in request.devices.iter().enumerate() {
            if request.devices[..number].iter().any(|(other, _)| other == device) {
                return Err(self.die(&format!("backup-access-setup names {device} twice")));
            }
        }

        let graph = Graph::query(|command| self.execute(command, json!({})))?;
        let mut devices = Vec::new();
        for (name, mode) in &request.devices {
            if graph.is_drive_without_medium(name) {
                return Err(self.die(&format!("backup-access-setup for {name}, which has no medium")));
            }
            let found = graph.find(name)?;
            let fleecing = graph.find(&format!("{name}-fleecing"))?;
            if fleecing.size / 512 != found.size / 512 {
                return Err(QmpFailure::generic(format!(
                    "Size mismatch for '{name}-fleecing' - sector count {} != {}",
                    fleecing.size / 512,
                    found.size / 512
                )));
            }
            devices.push((name.clone(), *mode, found, fleecing.top));
        }

        *state = State { start_time: now(), counter: state.counter, ..State::default() };
        state.target = Some(request.target.clone());
        state.total = devices.iter().map(|(_, _, found, _)| found.size).sum();
        let mut actions = Vec::new();
        for (name, mode, found, _) in &devices {
            let (action, dirty) = self.prepare_bitmap(&graph, found, &request.target, *mode)?;
            state.infos.push(json!({"drive": name, "action": action, "size": found.size, "dirty": dirty}));
            state.reused += found.size - dirty;
            actions.push(action);
        }

        let mut reply = Vec::new();
        for ((name, mode, found, fleecing), action) in devices.into_iter().zip(actions) {
            state.counter += 1;
            let number = state.counter;
            let mut device = Device {
                name: name.clone(),
                found,
                filter: format!("rig-pve-cbw-{number}"),
                snapshot: format!("rig-pve-snap-{number}"),
                has_bitmap: mode != BitmapMode::None,
            };
            // Between the freezing of the bitmap and the filter a real guest may write: harmless where the bitmap is all dirty.
            let insert = || self.insert(&device, &fleecing, &request.target);
            let inserted = if action == "used" { self.stopped(insert) } else { self.drained(insert) };
            if let Err(failure) = inserted {
                self.merge_back(&device, &request.target);
                for device in std::mem::take(&mut state.devices) {
                    self.merge_back(&device, &request.target);
                }
                return Err(failure);
            }
            let shown = self.alias(&device, number);
            let mut entry = json!({"device": name, "node-name": shown, "size": device.found.size});
            if device.has_bitmap {
                entry["bitmap-action"] = json!(action);
                entry["bitmap-node-name"] = json!(device.found.below);
                entry["bitmap-name"] = json!(request.target);
            }
            reply.push(entry);
            device.name = name;
            state.devices.push(device);
        }
        Ok(Value::Array(reply))
    }

    /// Background bitmap, filter and snapshot of one disk; the guest is held still.
    fn insert(&self, device: &Device, fleecing: &str, target: &str) -> Result<(), QmpFailure> {
        let (name, node) = (&device.name, &device.found.below);
        let failed = |what: &str, failure: &QmpFailure| {
            QmpFailure::generic(format!("{name} - {what} failed: {}", failure.desc()))
        };
        let mut filter = json!({
            "driver": "copy-before-write", "node-name": device.filter, "file": node, "target": fleecing,
            "on-cbw-error": "break-snapshot", "cbw-timeout": self.cbw_timeout.load(Ordering::SeqCst), "discard": "unmap", "read-only": device.found.read_only,
        });
        if device.has_bitmap {
            let actions = json!([
                {"type": "block-dirty-bitmap-add", "data": {"node": node, "name": BACKGROUND, "granularity": GRANULARITY}},
                {"type": "block-dirty-bitmap-disable", "data": {"node": node, "name": target}},
            ]);
            self.execute("transaction", json!({"actions": actions}))
                .map_err(|failure| failed("creating background bitmap for backup access", &failure))?;
            filter["bitmap"] = json!({"node": node, "name": target});
        }
        self.execute("blockdev-add", filter)
            .and_then(|_| {
                let inserted = self.put_root(device, &device.filter);
                if inserted.is_err() {
                    let _ = self.execute("blockdev-del", json!({"node-name": device.filter}));
                }
                inserted
            })
            .map_err(|failure| {
                let failure = QmpFailure::generic(format!("Could not create node: {}", failure.desc()));
                failed("setting up snapshot access failed: appending cbw node for fleecing", &failure)
            })?;
        let snapshot = json!({
            "driver": "snapshot-access", "node-name": device.snapshot, "file": device.filter, "discard": "unmap",
        });
        self.execute("blockdev-add", snapshot).map_err(|failure| {
            failed("setting up snapshot access failed: setting up snapshot access for fleecing", &failure)
        })?;
        Ok(())
    }

    /// Lets whatever is above the disk's node use `node` in its place.
    fn put_root(&self, device: &Device, node: &str) -> Result<Value, QmpFailure> {
        match &device.found.place {
            Place::Throttle => {
                let top = &device.found.top;
                let options = json!({
                    "driver": "throttle", "node-name": top, "throttle-group": format!("throttle-{top}"),
                    "discard": "unmap", "detect-zeroes": "unmap", "read-only": false, "file": node,
                });
                self.execute("blockdev-reopen", json!({"options": [options]}))
            }
            Place::Device(path) => self.execute("qom-set", json!({"path": path, "property": "drive", "value": node})),
            Place::Nothing => Ok(Value::Null),
        }
    }

    /// Generated names, as the patched QEMU gives them.
    fn alias(&self, device: &Device, number: u64) -> String {
        let generated = |offset: u64| format!("#block9{:04}", number * 13 + offset);
        let mut aliases = lock(&self.aliases);
        aliases.push((generated(0), device.filter.clone()));
        aliases.push((generated(6), device.snapshot.clone()));
        generated(6)
    }

    fn tear_down(&self, arguments: &Value) -> Result<Value, QmpFailure> {
        let (target, success) = parse_teardown(arguments)?;
        let mut state = lock(&self.state);
        match &state.target {
            None => return Ok(json!({})),
            Some(last) if *last != target => {
                return Err(QmpFailure::generic(format!(
                    "cannot teardown backup access - got target {target} instead of {last}"
                )));
            }
            Some(_) => {}
        }
        if state.regular {
            return Err(self.die("backup-access-teardown of a regular backup"));
        }
        let graph = Graph::query(|command| self.execute(command, json!({})))?;
        let exports = self.execute("query-block-exports", json!({}))?;
        for device in &state.devices {
            let name = &device.name;
            if exports.as_array().into_iter().flatten().any(|export| export["node-name"] == device.snapshot.as_str()) {
                return Err(self.die(&format!("backup-access-teardown while {name} is exported")));
            }
            match graph.bitmap(&device.found.below, &target) {
                None if device.has_bitmap => {
                    return Err(self.die(&format!("backup-access-teardown after the bitmap of {name} was removed")));
                }
                Some(bitmap) if bitmap["busy"] == true => {
                    return Err(self.die(&format!("backup-access-teardown while the bitmap of {name} is busy")));
                }
                _ => {}
            }
            if !graph.has_place(&device.found) {
                return Err(self.die(&format!("backup-access-teardown after {name} was unplugged")));
            }
        }
        for device in std::mem::take(&mut state.devices) {
            let removed = self.drained(|| {
                self.execute("blockdev-del", json!({"node-name": device.snapshot}))?;
                // An overlay may have come between by now.
                let below = graph.child(&device.filter, "file").unwrap_or_else(|| device.found.below.clone());
                self.put_root(&device, &below)?;
                self.execute("blockdev-del", json!({"node-name": device.filter}))?;
                if device.has_bitmap { self.end_bitmap(&device, &target, success) } else { Ok(()) }
            });
            if let Err(failure) = removed {
                return Err(self.die(&format!("the rig cannot tear {} down: {failure}", device.name)));
            }
            lock(&self.aliases).retain(|(_, inner)| *inner != device.snapshot && *inner != device.filter);
        }
        if state.end_time == 0 {
            state.end_time = now();
        }
        Ok(json!({}))
    }

    fn query_backup(&self) -> Value {
        let state = lock(&self.state);
        if state.target.is_none() {
            return json!({"finishing": false});
        }
        let mut reply = json!({
            "total": state.total, "zero-bytes": 0, "finishing": false, "uuid": "", "dirty": state.total - state.reused,
            "reused": state.reused, "transferred": 0, "start-time": state.start_time,
        });
        if state.end_time == 0 {
            reply["status"] = json!("active");
            return reply;
        }
        reply["end-time"] = json!(state.end_time);
        match &state.error {
            None => reply["status"] = json!("done"),
            Some(error) => {
                reply["status"] = json!("error");
                reply["errmsg"] = json!(error);
            }
        }
        reply
    }

    fn cancel(&self) -> Value {
        let mut state = lock(&self.state);
        if state.regular || !state.devices.is_empty() {
            state.error = Some("backup canceled".into());
        }
        if state.regular {
            state.regular = false;
            state.end_time = now();
        }
        json!({})
    }

    /// Commands of QEMU's own that would be the end of the patched one, or are answered otherwise, while an access is active.
    fn watch(&self, command: &str, arguments: &Value) -> Option<Result<Value, QmpFailure>> {
        let state = lock(&self.state);
        let target = state.target.as_deref().unwrap_or_default();
        let is_active_bitmap = |data: &Value| {
            let ours = |device: &Device| data["node"] == device.found.below.as_str() && device.has_bitmap;
            state.devices.iter().any(ours) && (data["name"] == target || data["name"] == BACKGROUND)
        };
        let removes = match command {
            "block-dirty-bitmap-remove" => is_active_bitmap(arguments),
            "transaction" => arguments["actions"]
                .as_array()
                .into_iter()
                .flatten()
                .any(|action| action["type"] == "block-dirty-bitmap-remove" && is_active_bitmap(&action["data"])),
            _ => false,
        };
        if removes {
            return Some(Err(self.die("the bitmap of an active access is removed")));
        }
        match command {
            "device_del" if state.devices.iter().any(|device| device.found.is_device(&arguments["id"])) => {
                Some(Err(self.die("a disk is unplugged while its access is active")))
            }
            "block_resize" => {
                let device = state.devices.iter().find(|device| {
                    let names = [&device.name, &device.found.top, &device.found.below];
                    names
                        .iter()
                        .any(|name| arguments["node-name"] == name.as_str() || arguments["device"] == name.as_str())
                })?;
                let graph = Graph::query(|command| self.execute(command, json!({}))).ok()?;
                let bitmap = graph.bitmap(&device.found.below, target)?;
                (bitmap["busy"] == true).then(|| Err(self.die("a disk is resized while its bitmap is exported")))
            }
            "blockdev-del" => {
                let aliases = lock(&self.aliases);
                let (shown, _) = aliases.iter().find(|(shown, _)| arguments["node-name"] == shown.as_str())?;
                Some(Err(QmpFailure::generic(format!("Node {shown} is not owned by the monitor"))))
            }
            _ => None,
        }
    }

    fn rename(&self, value: &mut Value, direction: Direction) {
        let aliases = lock(&self.aliases);
        if !aliases.is_empty() {
            rename(value, &aliases, direction);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToClient,
    ToQemu,
}

fn rename(value: &mut Value, aliases: &[(String, String)], direction: Direction) {
    match value {
        Value::String(text) => {
            for (shown, inner) in aliases {
                let (from, to) = if direction == Direction::ToClient { (inner, shown) } else { (shown, inner) };
                // Whole names only: `…-1` is the beginning of `…-12`.
                if text == from {
                    text.clone_from(to);
                } else if text.contains(&format!("'{from}'")) {
                    *text = text.replace(&format!("'{from}'"), &format!("'{to}'"));
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(|value| rename(value, aliases, direction)),
        Value::Object(members) => members.values_mut().for_each(|value| rename(value, aliases, direction)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

impl Front for StandIn {
    fn connected(&self) {
        *lock(&self.quiet) = (0, 0);
    }

    fn answer(&self, command: &str, arguments: &Value) -> Option<Result<Value, QmpFailure>> {
        match command {
            "query-proxmox-support" => Some(Ok(json!({
                "query-bitmap-info": true, "pbs-dirty-bitmap-savevm": true, "pbs-library-version": "0.0.0 (stub)",
                "pbs-dirty-bitmap": true, "backup-access-api": true, "pbs-masterkey": true, "backup-fleecing": true,
                "pbs-dirty-bitmap-migration": true, "backup-max-workers": true,
            }))),
            "backup-access-setup" => Some(self.set_up(arguments)),
            "backup-access-teardown" => Some(self.tear_down(arguments)),
            "query-backup" => Some(Ok(self.query_backup())),
            "query-pbs-bitmap-info" => Some(Ok(Value::Array(lock(&self.state).infos.clone()))),
            "backup-cancel" => Some(Ok(self.cancel())),
            "backup" => {
                let state = lock(&self.state);
                let target = state.target.clone().unwrap_or_default();
                Some(Err(QmpFailure::generic(if state.regular || !state.devices.is_empty() {
                    format!("previous backup for target '{target}' not finished")
                } else {
                    "the rig makes no regular backups".to_owned()
                })))
            }
            _ => self.watch(command, arguments),
        }
    }

    fn to_qemu(&self, request: &mut Value) {
        if let Some(arguments) = request.get_mut("arguments") {
            self.rename(arguments, Direction::ToQemu);
        }
    }

    fn to_client(&self, command: Option<&str>, message: &mut Value) -> bool {
        if let Some(version) = message.pointer_mut("/QMP/version") {
            version["package"] = json!(PACKAGE);
        }
        let mut quiet = lock(&self.quiet);
        let own = match message["event"].as_str() {
            Some("STOP") => &mut quiet.0,
            Some("RESUME") => &mut quiet.1,
            _ => &mut 0,
        };
        if *own > 0 {
            *own -= 1;
            return false;
        }
        drop(quiet);
        match command {
            Some("query-version") if message["return"].is_object() => message["return"]["package"] = json!(PACKAGE),
            Some("query-commands") => {
                let ours = ["query-proxmox-support", "backup-access-setup", "backup-access-teardown", "query-backup"];
                if let Some(commands) = message["return"].as_array_mut() {
                    commands.extend(ours.map(|name| json!({"name": name})));
                }
            }
            Some("query-named-block-nodes") => {
                if let Ok(graph) = Graph::query(|command| self.execute(command, json!({}))) {
                    graph.add_children(&mut message["return"]);
                }
            }
            _ => {}
        }
        self.rename(message, Direction::ToClient);
        true
    }
}
