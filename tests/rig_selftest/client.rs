//! A backup's client of Proxmox VE's commands.

use crate::rig::*;
use serde_json::{Value, json};
use std::{fs, process::Command, time::Duration};

/// What the client calls its target.
pub const STORE: &str = "snapshot-access:store1";

/// A client's steps around an access on a Proxmox machine.
pub struct Client<'a> {
    vm: &'a Vm,
    pub qmp: QmpClient,
}

impl<'a> Client<'a> {
    pub fn new(vm: &'a Vm) -> Self {
        Self { vm, qmp: QmpClient::connect(&vm.qmp_socket(), Duration::from_secs(5)).unwrap() }
    }

    pub fn add_fleecing(&mut self, disk: &str, size: u64) {
        let file = self.vm.dir().join(format!("fleece-{disk}.raw"));
        fs::File::create(&file).unwrap().set_len(size).unwrap();
        self.qmp.ok(
            "blockdev-add",
            json!({"driver": "raw", "node-name": format!("drive-{disk}-fleecing"), "discard": "unmap",
                "file": {"driver": "file", "filename": file, "discard": "unmap"}}),
        );
    }

    pub fn set_up(&mut self, target: &str, devices: &[(&str, &str)]) -> Result<Value, QmpFailure> {
        let devices: Vec<Value> = devices
            .iter()
            .map(|(disk, mode)| json!({"device": format!("drive-{disk}"), "bitmap-mode": mode}))
            .collect();
        self.qmp.execute("backup-access-setup", json!({"target-id": target, "devices": devices}))
    }

    pub fn tear_down(&mut self, target: &str, success: bool) -> Result<Value, QmpFailure> {
        self.qmp.execute("backup-access-teardown", json!({"target-id": target, "success": success}))
    }

    pub fn export(&mut self, access: &Value) {
        let socket = self.vm.dir().join("nbd.sock");
        self.qmp.ok("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}}));
        for disk in access.as_array().unwrap() {
            let mut export = json!({"type": "nbd", "id": disk["device"], "name": disk["device"],
                "node-name": disk["node-name"], "writable": true});
            if disk.get("bitmap-name").is_some() {
                export["bitmaps"] = json!([{"node": disk["bitmap-node-name"], "name": disk["bitmap-name"]}]);
            }
            self.qmp.ok("block-export-add", export);
        }
    }

    pub fn uri(&self, disk: &str) -> String {
        format!("nbd+unix:///drive-{disk}?socket={}", self.vm.dir().join("nbd.sock").display())
    }

    /// `qemu-io` on the export: whether all commands succeed (patterns included), and what it prints.
    pub fn io(&self, disk: &str, commands: &[&str]) -> (bool, String) {
        let mut qemu_io = Command::new("qemu-io");
        qemu_io.args(["-f", "raw"]);
        for command in commands {
            qemu_io.args(["-c", command]);
        }
        let output = qemu_io.arg(self.uri(disk)).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        (output.status.success() && !text.contains("failed"), text)
    }

    /// The dirty ranges, in MiB.
    pub fn dirty(&self, disk: &str, target: &str) -> Vec<(u64, u64)> {
        let options = format!(
            "driver=nbd,server.type=unix,server.path={},export=drive-{disk},x-dirty-bitmap=qemu:dirty-bitmap:{target}",
            self.vm.dir().join("nbd.sock").display()
        );
        let output =
            Command::new("qemu-img").args(["map", "--output=json", "--image-opts", &options]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let map: Value = serde_json::from_slice(&output.stdout).unwrap();
        // With this option QEMU's client shows dirty ranges as holes.
        let dirty = map.as_array().unwrap().iter().filter(|extent| extent["data"] == false);
        dirty
            .map(|extent| (extent["start"].as_u64().unwrap() / MIB, extent["length"].as_u64().unwrap() / MIB))
            .collect()
    }

    pub fn bitmaps(&self) -> Vec<(String, String, u64, bool)> {
        let state = BlockState::of(self.vm);
        state.bitmaps.into_iter().map(|bitmap| (bitmap.node, bitmap.name, bitmap.count, bitmap.recording)).collect()
    }
}
