//! What a machine and a directory look like before and after.

use super::vm::Vm;
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    time::{Duration, Instant},
};

/// A named dirty bitmap.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BitmapInfo {
    pub node: String,
    pub name: String,
    /// Dirty bytes.
    pub count: u64,
    pub granularity: u64,
    pub recording: bool,
    pub busy: bool,
    pub persistent: bool,
}

/// The block layer of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockState {
    /// Node names with their drivers.
    pub nodes: BTreeMap<String, String>,
    /// Front-end devices with their root nodes.
    pub roots: BTreeMap<String, String>,
    pub exports: BTreeSet<String>,
    pub jobs: BTreeSet<String>,
    pub bitmaps: Vec<BitmapInfo>,
    pub status: String,
}

/// Which named bitmaps may be there afterwards.
pub enum BitmapRule<'a> {
    /// Those that were there before (their counts may differ).
    Same,
    /// None at all.
    None,
    /// Those of which this is true.
    Where(&'a dyn Fn(&BitmapInfo) -> bool),
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn each(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

impl BlockState {
    pub fn of(vm: &Vm) -> Self {
        let nodes = vm.qmp("query-named-block-nodes", json!({"flat": true}));
        let mut bitmaps = Vec::new();
        for node in each(&nodes) {
            for bitmap in each(&node["dirty-bitmaps"]).filter(|bitmap| bitmap.get("name").is_some()) {
                bitmaps.push(BitmapInfo {
                    node: text(&node["node-name"]),
                    name: text(&bitmap["name"]),
                    count: bitmap["count"].as_u64().unwrap_or_default(),
                    granularity: bitmap["granularity"].as_u64().unwrap_or_default(),
                    recording: bitmap["recording"] == true,
                    busy: bitmap["busy"] == true,
                    persistent: bitmap["persistent"] == true,
                });
            }
        }
        bitmaps.sort();
        let ids = |value: Value| each(&value).map(|item| text(&item["id"])).collect();
        Self {
            nodes: each(&nodes).map(|node| (text(&node["node-name"]), text(&node["drv"]))).collect(),
            roots: each(&vm.qmp("query-block", json!({})))
                .map(|block| (text(&block["qdev"]), text(&block["inserted"]["node-name"])))
                .collect(),
            exports: ids(vm.qmp("query-block-exports", json!({}))),
            jobs: ids(vm.qmp("query-jobs", json!({}))),
            bitmaps,
            status: vm.status(),
        }
    }

    /// Bitmaps of this name, by node.
    pub fn bitmaps_named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a BitmapInfo> {
        self.bitmaps.iter().filter(move |bitmap| bitmap.name == name)
    }
}

impl Vm {
    /// Nothing is left in QEMU: nodes, roots, exports, jobs and run state are as before, no NBD server runs, the bitmaps are
    /// those expected, all recording and none busy.
    pub fn assert_pristine(&self, before: &BlockState, bitmaps: &BitmapRule<'_>) {
        let after = BlockState::of(self);
        assert_eq!(after.roots, before.roots, "root nodes of the devices");
        assert_eq!(after.nodes, before.nodes, "block nodes");
        assert_eq!(after.exports, before.exports, "exports");
        assert_eq!(after.jobs, before.jobs, "jobs");
        assert_eq!(after.status, before.status, "run state");
        let server = self.try_qmp("nbd-server-stop", json!({}));
        assert!(
            server.is_err_and(|failure| failure.desc() == "NBD server not running"),
            "an NBD server was left running"
        );
        for bitmap in &after.bitmaps {
            let expected = match bitmaps {
                BitmapRule::None => false,
                BitmapRule::Same => before.bitmaps_named(&bitmap.name).any(|old| old.node == bitmap.node),
                BitmapRule::Where(expected) => expected(bitmap),
            };
            assert!(expected, "a bitmap was left: {bitmap:?}");
            assert!(bitmap.recording && !bitmap.busy, "a bitmap does not record, or is busy: {bitmap:?}");
        }
        if matches!(bitmaps, BitmapRule::Same) {
            assert_eq!(
                after.bitmaps.len(),
                before.bitmaps.len(),
                "a bitmap is missing: {:?}, before {:?}",
                after.bitmaps,
                before.bitmaps
            );
        }
    }
}

/// No file, socket or link is left below `dir` (directories may be).
pub fn no_files_left(dir: &Path) {
    let mut left = Vec::new();
    let mut directories = vec![dir.to_owned()];
    while let Some(directory) = directories.pop() {
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        for entry in entries.filter_map(Result::ok) {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => directories.push(entry.path()),
                _ => left.push(entry.path()),
            }
        }
    }
    assert!(left.is_empty(), "left below {}: {left:?}", dir.display());
}

/// Command lines of the processes that mention `text`, but for those of the pids in `besides` and the test itself.
pub fn processes_about(text: &str, besides: &[i32]) -> Vec<String> {
    let own = i32::try_from(std::process::id()).unwrap();
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| *pid != own && !besides.contains(pid))
        .filter_map(|pid| fs::read(format!("/proc/{pid}/cmdline")).ok())
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .filter(|line| line.contains(text))
        .collect()
}
