//! A scripted QMP peer: keeps the little state that the order of commands depends on, and notes what a real QEMU with
//! Proxmox's patches would have died of.

use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    os::unix::net::UnixListener as StdUnixListener,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    task::JoinHandle,
};

const GRANULARITY: u64 = 4 << 20;
pub const BACKGROUND: &str = "backup-access-background-bitmap";

#[derive(Clone, Debug)]
pub struct Bitmap {
    pub name: String,
    pub recording: bool,
    pub granularity: u64,
}

impl Bitmap {
    pub fn new(name: &str) -> Self {
        Self { name: name.into(), recording: true, granularity: GRANULARITY }
    }
}

#[derive(Clone, Debug, Default)]
pub struct Node {
    pub drv: String,
    pub size: u64,
    pub ro: bool,
    pub children: Vec<(&'static str, String)>,
    pub bitmaps: Vec<Bitmap>,
}

/// What is wrong with fleecing nodes when they were added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WrongFleecing {
    /// They are larger than asked for.
    Larger,
    /// They are read-only.
    ReadOnly,
    /// They are not there.
    Missing,
}

/// What goes wrong with a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is refused.
    Refuse,
    /// The connection ends before it takes effect.
    CloseBefore,
    /// It takes effect, and the connection ends.
    CloseAfter,
}

#[derive(Default)]
pub struct State {
    pub log: Vec<(String, Value)>,
    pub devices: Vec<Value>,
    pub nodes: BTreeMap<String, Node>,
    /// Device node → format node.
    pub below: BTreeMap<String, String>,
    /// id → (node, bitmap).
    pub exports: BTreeMap<String, (String, Option<(String, String)>)>,
    pub server: Option<(PathBuf, StdUnixListener)>,
    pub active: Option<String>,
    pub last_target: Option<String>,
    pub regular_backup: bool,
    pub support: Value,
    pub running: bool,
    /// What would have killed QEMU, and the guest.
    pub fatal: Option<String>,
    /// The `n`th command, counted over all connections, meets the fault.
    pub fault: Option<(usize, Fault)>,
    /// Exports stay although they were deleted.
    pub clinging_exports: bool,
    /// The second device fails in the setup, after the first was done.
    pub late_failure: bool,
    /// What is wrong with fleecing nodes.
    pub fleecing: Option<WrongFleecing>,
    /// A bitmap of the target appears just before the setup looks for it.
    pub sudden_bitmap: bool,
    generated: usize,
}

#[derive(Clone)]
pub struct Peer {
    state: Arc<Mutex<State>>,
    listener: Arc<JoinHandle<()>>,
}

enum Outcome {
    Return(Value),
    Error(&'static str, String),
    Die,
}

fn generic(desc: impl Into<String>) -> Outcome {
    Outcome::Error("GenericError", desc.into())
}

impl Peer {
    pub fn start(socket: &Path) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let state = Arc::new(Mutex::new(State {
            support: json!({"backup-access-api": true, "backup-fleecing": true}),
            ..State::default()
        }));
        let serving = Arc::clone(&state);
        let listener = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                serve(stream, &serving).await;
            }
        });
        Self { state, listener: Arc::new(listener) }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The QEMU process ends.
    pub fn end(&self) {
        self.listener.abort();
    }

    pub fn add_disk(&self, key: &str, size: u64) {
        let mut state = self.state();
        let (device, format) = (format!("drive-{key}"), format!("f-{key}"));
        state.devices.push(json!({"device": "", "qdev": key, "removable": false,
            "inserted": {"node-name": device, "drv": "throttle", "image": {"virtual-size": size}}}));
        state.nodes.insert(format.clone(), Node { drv: "raw".into(), size, ..Node::default() });
        let children = vec![("file", format.clone())];
        state.nodes.insert(device.clone(), Node { drv: "throttle".into(), size, children, ..Node::default() });
        state.below.insert(device, format);
    }

    /// Names of the commands so far, without those that only ask.
    pub fn changes(&self) -> Vec<String> {
        let state = self.state();
        let asks =
            |name: &str| name.starts_with("query-") || name.starts_with("x-debug-") || name == "qmp_capabilities";
        state.log.iter().filter(|(name, _)| !asks(name)).map(|(name, _)| name.clone()).collect()
    }

    pub fn sent(&self, name: &str) -> Vec<Value> {
        self.state().log.iter().filter(|(n, _)| n == name).map(|(_, arguments)| arguments.clone()).collect()
    }
}

async fn serve(stream: UnixStream, state: &Mutex<State>) {
    let (read, mut out) = stream.into_split();
    let mut lines = BufReader::new(read).lines();
    let hello = json!({"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "pve-qemu-kvm_10.0.2-4"}, "capabilities": []}});
    let _ = out.write_all(format!("{hello}\r\n").as_bytes()).await;
    while let Ok(Some(line)) = lines.next_line().await {
        let request: Value = serde_json::from_str(&line).unwrap();
        let name = request["execute"].as_str().unwrap().to_owned();
        let answer = {
            let mut state = state.lock().unwrap();
            let number = state.log.len();
            state.log.push((name.clone(), request["arguments"].clone()));
            let fault = state.fault.filter(|(at, _)| *at == number).map(|(_, fault)| fault);
            match fault {
                Some(Fault::Refuse) if name != "qmp_capabilities" => generic("refused by the test"),
                Some(Fault::CloseBefore) => Outcome::Die,
                Some(Fault::CloseAfter) => {
                    state.carry_out(&name, &request["arguments"]);
                    Outcome::Die
                }
                _ => state.carry_out(&name, &request["arguments"]),
            }
        };
        let answer = match answer {
            Outcome::Return(value) => json!({"return": value, "id": request["id"]}),
            Outcome::Error(class, desc) => json!({"error": {"class": class, "desc": desc}, "id": request["id"]}),
            Outcome::Die => return,
        };
        let _ = out.write_all(format!("{answer}\r\n").as_bytes()).await;
    }
}

impl State {
    fn generate(&mut self) -> String {
        self.generated += 1;
        format!("#block{:03}", self.generated)
    }

    fn busy(&self, node: &str, bitmap: &str) -> bool {
        self.exports.values().any(|(_, b)| b.as_ref().is_some_and(|(n, b)| n == node && b == bitmap))
    }

    fn carry_out(&mut self, name: &str, arguments: &Value) -> Outcome {
        let text = |member: &str| arguments[member].as_str().unwrap_or_default().to_owned();
        let done = Outcome::Return(json!({}));
        match name {
            "qmp_capabilities" | "human-monitor-command" => {}
            "query-proxmox-support" if self.support.is_null() => {
                return Outcome::Error("CommandNotFound", "The command has not been found".into());
            }
            "query-proxmox-support" => return Outcome::Return(self.support.clone()),
            "query-backup" => {
                let active = self.active.is_some() || self.regular_backup;
                let uuid = if self.regular_backup { "e7c64e9f" } else { "" };
                return Outcome::Return(if active {
                    json!({"status": "active", "uuid": uuid, "finishing": false})
                } else {
                    json!({"finishing": false})
                });
            }
            "query-pbs-bitmap-info" => {
                return Outcome::Return(json!([{"drive": "drive-scsi7", "action": "new", "size": 1, "dirty": 1}]));
            }
            "query-status" => {
                let status = if self.running { "running" } else { "paused" };
                return Outcome::Return(json!({"running": self.running, "status": status}));
            }
            "stop" => self.running = false,
            "cont" => self.running = true,
            "query-block" => return Outcome::Return(self.devices.clone().into()),
            "query-block-exports" => {
                let exports =
                    self.exports.iter().map(|(id, (node, _))| json!({"id": id, "type": "nbd", "node-name": node}));
                return Outcome::Return(exports.collect());
            }
            "query-named-block-nodes" => {
                let nodes = self.nodes.iter().map(|(name, node)| {
                    let bitmaps: Vec<Value> = node.bitmaps.iter().map(|b| json!({"name": b.name, "granularity": b.granularity,
                        "count": 0, "recording": b.recording, "busy": self.busy(name, &b.name), "persistent": false})).collect();
                    json!({"node-name": name, "drv": node.drv, "ro": node.ro, "file": "", "image": {"virtual-size": node.size},
                           "dirty-bitmaps": bitmaps})
                });
                return Outcome::Return(nodes.collect());
            }
            "x-debug-query-block-graph" => return Outcome::Return(self.graph()),
            "blockdev-add" => return self.blockdev_add(arguments),
            "blockdev-del" => {
                let name = text("node-name");
                if !self.nodes.contains_key(&name) {
                    return generic(format!("Failed to find node with node-name='{name}'"));
                }
                if self.nodes.values().any(|node| node.children.iter().any(|(_, child)| *child == name)) {
                    return generic(format!("Block device {name} is in use"));
                }
                self.nodes.remove(&name);
            }
            "nbd-server-start" => {
                if self.server.is_some() {
                    return generic("NBD server already running");
                }
                let path = PathBuf::from(arguments["addr"]["data"]["path"].as_str().unwrap());
                let listener = StdUnixListener::bind(&path).unwrap();
                self.server = Some((path, listener));
            }
            "nbd-server-stop" => {
                let Some((path, listener)) = self.server.take() else { return generic("NBD server not running") };
                drop(listener);
                let _ = std::fs::remove_file(path);
                self.exports.clear();
            }
            "block-export-add" => {
                let bitmap = arguments["bitmaps"].get(0);
                let bitmap = bitmap.map(|b| (b["node"].as_str().unwrap().into(), b["name"].as_str().unwrap().into()));
                self.exports.insert(text("id"), (text("node-name"), bitmap));
            }
            "block-export-del" => {
                if !self.exports.contains_key(&text("id")) {
                    return generic("Export is not found");
                }
                if !self.clinging_exports {
                    self.exports.remove(&text("id"));
                }
            }
            "transaction" => {
                for action in arguments["actions"].as_array().unwrap() {
                    let (data, node) = (&action["data"], action["data"]["node"].as_str().unwrap());
                    match action["type"].as_str().unwrap() {
                        "block-dirty-bitmap-add" => {
                            let recording = data["disabled"] != true;
                            let bitmap = Bitmap { recording, ..Bitmap::new(data["name"].as_str().unwrap()) };
                            self.nodes.get_mut(node).unwrap().bitmaps.push(bitmap);
                        }
                        "block-dirty-bitmap-merge" => {
                            let source = &data["bitmaps"][0];
                            if self.busy(source["node"].as_str().unwrap(), source["name"].as_str().unwrap()) {
                                return generic("Bitmap is currently in use by another operation and cannot be used");
                            }
                        }
                        other => panic!("action {other}"),
                    }
                }
            }
            "backup-access-setup" => return self.set_up(&text("target-id"), arguments["devices"].as_array().unwrap()),
            "backup-access-teardown" => return self.tear_down(&text("target-id")),
            other => return Outcome::Error("CommandNotFound", format!("The command {other} has not been found")),
        }
        done
    }

    fn graph(&self) -> Value {
        let mut nodes = Vec::new();
        let mut edges = Vec::new();
        let ids: BTreeMap<&String, usize> = self.nodes.keys().zip(1..).collect();
        for (name, id) in &ids {
            nodes.push(json!({"id": id, "type": "block-driver", "name": name}));
            for (role, child) in &self.nodes[*name].children {
                edges.push(json!({"parent": id, "child": ids[child], "name": role, "perm": [], "shared-perm": []}));
            }
        }
        for (number, device) in self.devices.iter().enumerate() {
            let Some(root) = device["inserted"]["node-name"].as_str().and_then(|n| ids.get(&n.to_owned())) else {
                continue;
            };
            let id = 1000 + number;
            nodes.push(json!({"id": id, "type": "block-backend", "name": device["qdev"]}));
            edges.push(json!({"parent": id, "child": root, "name": "root", "perm": [], "shared-perm": []}));
        }
        json!({"nodes": nodes, "edges": edges})
    }

    fn blockdev_add(&mut self, arguments: &Value) -> Outcome {
        let name = arguments["node-name"].as_str().unwrap();
        if name.len() > 31 || self.nodes.contains_key(name) {
            return generic("Invalid node-name");
        }
        let file = arguments["file"]["filename"].as_str().unwrap();
        let Ok(meta) = std::fs::metadata(file) else { return generic(format!("Could not open '{file}'")) };
        let size = arguments["size"].as_u64().unwrap_or(meta.len());
        let wrong = self.fleecing.filter(|_| name.ends_with("-fleecing"));
        if wrong == Some(WrongFleecing::Missing) {
            return Outcome::Return(json!({}));
        }
        let ro = arguments["read-only"] == json!(true) || wrong == Some(WrongFleecing::ReadOnly);
        let size = if wrong == Some(WrongFleecing::Larger) { size + 512 } else { size };
        let drv = arguments["driver"].as_str().unwrap().to_owned();
        self.nodes.insert(name.into(), Node { drv, size, ro, ..Node::default() });
        Outcome::Return(json!({}))
    }

    fn set_up(&mut self, target: &str, devices: &[Value]) -> Outcome {
        if devices.is_empty() {
            self.fatal = Some("setup without devices".into());
            return Outcome::Die;
        }
        if self.active.is_some() || self.regular_backup {
            let by = if self.regular_backup { "Proxmox" } else { self.last_target.as_deref().unwrap_or_default() };
            return generic(format!("previous backup for target '{by}' not finished"));
        }
        let mut answer = Vec::new();
        for (number, device) in devices.iter().enumerate() {
            let name = device["device"].as_str().unwrap();
            let Some(source) = self.nodes.get(name) else {
                return Outcome::Error("DeviceNotFound", format!("Device '{name}' not found"));
            };
            let size = source.size;
            let fleecing = format!("{name}-fleecing");
            match self.nodes.get(&fleecing) {
                None => return Outcome::Error("DeviceNotFound", format!("Device '{fleecing}' not found")),
                Some(node) if node.size != size => return generic(format!("Size mismatch for '{fleecing}'")),
                Some(_) => {}
            }
            self.last_target = Some(target.into());
            self.active = Some(target.into());
            if self.late_failure && number == 1 {
                self.last_target = Some(target.into());
                return generic(format!("{name} - setting up snapshot access failed: appending cbw node failed"));
            }
            let carrier = self.below.get(name).cloned().unwrap_or_else(|| name.to_owned());
            if self.sudden_bitmap {
                self.sudden_bitmap = false;
                self.nodes.get_mut(&carrier).unwrap().bitmaps.push(Bitmap::new(target));
            }
            let bitmaps = &mut self.nodes.get_mut(&carrier).unwrap().bitmaps;
            let known = bitmaps.iter().position(|b| b.name == target);
            let action = match (device["bitmap-mode"].as_str().unwrap(), known) {
                ("use", Some(_)) => "used",
                ("use", None) => "missing-recreated",
                ("new", _) => "new",
                (other, _) => panic!("bitmap mode {other}"),
            };
            if action != "used" {
                bitmaps.retain(|b| b.name != target);
                bitmaps.push(Bitmap::new(target));
            }
            bitmaps.iter_mut().filter(|b| b.name == target).for_each(|b| b.recording = false);
            bitmaps.push(Bitmap::new(BACKGROUND));
            let (filter, snapshot) = (self.generate(), self.generate());
            let children = vec![("file", carrier.clone()), ("target", fleecing)];
            self.nodes
                .insert(filter.clone(), Node { drv: "copy-before-write".into(), size, children, ..Node::default() });
            if self.below.contains_key(name) {
                self.nodes.get_mut(name).unwrap().children = vec![("file", filter.clone())];
            }
            let children = vec![("file", filter)];
            self.nodes
                .insert(snapshot.clone(), Node { drv: "snapshot-access".into(), size, children, ..Node::default() });
            answer.push(json!({"node-name": snapshot, "device": name, "size": size, "bitmap-node-name": carrier,
                "bitmap-name": target, "bitmap-action": action}));
        }
        Outcome::Return(answer.into())
    }

    fn tear_down(&mut self, target: &str) -> Outcome {
        if let Some(last) = self.last_target.as_deref().filter(|last| *last != target) {
            return generic(format!("cannot teardown backup access - got target {target} instead of {last}"));
        }
        if self.exports.values().any(|(_, bitmap)| bitmap.is_some()) {
            self.fatal = Some("teardown while a bitmap is exported".into());
            return Outcome::Die;
        }
        if self.below.keys().any(|device| !self.nodes.contains_key(device)) {
            self.fatal = Some("teardown after an unplug".into());
            return Outcome::Die;
        }
        let lost = |node: &Node| {
            let has = |name: &str| node.bitmaps.iter().any(|bitmap| bitmap.name == name);
            has(BACKGROUND) && !has(target)
        };
        if self.active.is_some() && self.nodes.values().any(lost) {
            self.fatal = Some("teardown after the bitmap was removed".into());
            return Outcome::Die;
        }
        // After a setup that failed late the list of devices is gone, and the filters stay.
        if self.active.take().is_some() && !self.late_failure {
            self.nodes.retain(|_, node| !matches!(node.drv.as_str(), "copy-before-write" | "snapshot-access"));
            for (device, format) in &self.below {
                self.nodes.get_mut(device).unwrap().children = vec![("file", format.clone())];
            }
        }
        for node in self.nodes.values_mut() {
            node.bitmaps.retain(|b| b.name != BACKGROUND);
            node.bitmaps.iter_mut().filter(|b| b.name == target).for_each(|b| b.recording = true);
        }
        Outcome::Return(json!({}))
    }
}
