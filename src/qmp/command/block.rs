//! The block layer: nodes, bitmaps, jobs, exports, the NBD server, and the guest's run state.
//!
//! Names and shapes are those of QEMU's `qapi/block-core.json`, `block-export.json`, `job.json`, `run-state.json` and
//! `qom.json`. Own types rather than the `qapi` crate's, whose schema is that of one release: a member that it knows as
//! mandatory may be missing in an older QEMU.

use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;
use std::path::PathBuf;

/// Ties a type to the command that it is the arguments of.
macro_rules! command {
    ($($arguments:ident $name:literal -> $answer:ty;)+) => {
        $(impl qapi::Command for $arguments {
            type Ok = $answer;
            const NAME: &'static str = $name;
            const ALLOW_OOB: bool = false;
        })+
    };
}

/// A command without arguments.
macro_rules! bare {
    ($($(#[$doc:meta])+ $type:ident;)+) => {
        $($(#[$doc])+ #[derive(Clone, Copy, Debug, Serialize)] pub struct $type {})+
    };
}

/// An answer of which nothing is used: `{}`.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Done {}

bare! {
    /// Whether the guest runs.
    QueryStatus;
    /// Pauses the guest: requests in flight are finished and the disks flushed.
    Stop;
    /// Lets the guest run.
    Cont;
    /// Devices and what is inserted in them.
    QueryBlock;
    /// All nodes and edges of the block graph. Unstable by name, unchanged since QEMU 4.
    QueryBlockGraph;
    /// Exports of all kinds.
    QueryBlockExports;
    /// Jobs of all kinds.
    QueryJobs;
    /// I/O threads.
    QueryIothreads;
    /// Whether a migration is under way.
    QueryMigrate;
    /// Ends the NBD server, and every export on it, whosever it is.
    NbdServerStop;
}

/// All named nodes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct QueryNamedBlockNodes {
    /// Leave the backing chain out of each node's image.
    pub flat: bool,
}

impl Default for QueryNamedBlockNodes {
    fn default() -> Self {
        Self { flat: true }
    }
}

command! {
    QueryStatus "query-status" -> Status;
    Stop "stop" -> Done;
    Cont "cont" -> Done;
    QueryBlock "query-block" -> Vec<BlockDevice>;
    QueryNamedBlockNodes "query-named-block-nodes" -> Vec<BlockNode>;
    QueryBlockGraph "x-debug-query-block-graph" -> BlockGraph;
    QueryBlockExports "query-block-exports" -> Vec<BlockExport>;
    QueryJobs "query-jobs" -> Vec<Job>;
    QueryIothreads "query-iothreads" -> Vec<Iothread>;
    QueryMigrate "query-migrate" -> Migration;
    NbdServerStop "nbd-server-stop" -> Done;
    BlockdevAdd "blockdev-add" -> Done;
    BlockdevDel "blockdev-del" -> Done;
    Transaction "transaction" -> Done;
    BlockJobCancel "block-job-cancel" -> Done;
    JobDismiss "job-dismiss" -> Done;
    QomGet "qom-get" -> Value;
    QomSet "qom-set" -> Done;
    QomList "qom-list" -> Vec<QomProperty>;
    NbdServerStart "nbd-server-start" -> Done;
    BlockExportAdd "block-export-add" -> Done;
    BlockExportDel "block-export-del" -> Done;
    HumanMonitorCommand "human-monitor-command" -> String;
}

/// Answer of `query-status`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Status {
    /// Whether the processors run.
    pub running: bool,
    /// `running`, `paused`, `prelaunch`, `io-error`, `suspended`, …
    pub status: String,
}

/// A device as `query-block` tells it.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct BlockDevice {
    /// Name given with `-drive`; empty with `-blockdev`.
    #[serde(default)]
    pub device: String,
    /// Device id or QOM path.
    #[serde(default)]
    pub qdev: Option<String>,
    /// Whether the medium can be changed.
    #[serde(default)]
    pub removable: bool,
    /// Only drives with a tray have it.
    #[serde(default)]
    pub tray_open: Option<bool>,
    /// What is inserted.
    #[serde(default)]
    pub inserted: Option<BlockNode>,
}

/// A node as `query-block` (`inserted`) and `query-named-block-nodes` tell it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockNode {
    /// Its name.
    #[serde(default)]
    pub node_name: Option<String>,
    /// Its driver.
    #[serde(default)]
    pub drv: String,
    /// Whether it is read-only.
    #[serde(default)]
    pub ro: bool,
    /// File name.
    #[serde(default)]
    pub file: String,
    /// The image.
    #[serde(default)]
    pub image: Image,
    /// Bitmaps on it; internal ones have no name.
    #[serde(default)]
    pub dirty_bitmaps: Vec<DirtyBitmap>,
}

/// An image.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Image {
    /// File name.
    #[serde(default)]
    pub filename: String,
    /// Size in bytes that the guest sees.
    #[serde(default)]
    pub virtual_size: u64,
}

/// A dirty bitmap.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct DirtyBitmap {
    /// Its name, unless it is an internal one.
    #[serde(default)]
    pub name: Option<String>,
    /// Dirty bytes.
    #[serde(default)]
    pub count: u64,
    /// Bytes that a bit stands for.
    pub granularity: u64,
    /// Whether it records.
    #[serde(default)]
    pub recording: bool,
    /// Whether something uses it.
    #[serde(default)]
    pub busy: bool,
    /// Whether the image keeps it.
    #[serde(default)]
    pub persistent: bool,
    /// Whether it was not closed properly, so that its content is unknown.
    #[serde(default)]
    pub inconsistent: bool,
}

/// Answer of `x-debug-query-block-graph`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct BlockGraph {
    /// Nodes, devices and jobs.
    pub nodes: Vec<GraphNode>,
    /// Who uses whom.
    pub edges: Vec<GraphEdge>,
}

/// Something in the block graph.
#[derive(Clone, Debug, Deserialize)]
pub struct GraphNode {
    /// Identifies it within the answer.
    pub id: u64,
    /// `block-backend`, `block-job`, `block-driver`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Node name, job id, or what names the device.
    pub name: String,
}

/// One uses another.
#[derive(Clone, Debug, Deserialize)]
pub struct GraphEdge {
    /// The user.
    pub parent: u64,
    /// The used.
    pub child: u64,
    /// As what: `root`, `file`, `backing`, `target`, …
    pub name: String,
}

/// An export.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockExport {
    /// Its id.
    pub id: String,
    /// `nbd`, `fuse`, `vhost-user-blk`, …
    #[serde(rename = "type")]
    pub kind: String,
    /// The exported node.
    #[serde(default)]
    pub node_name: String,
}

/// A job.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Job {
    /// Its id.
    pub id: String,
    /// `backup`, `mirror`, `commit`, …
    #[serde(rename = "type")]
    pub kind: String,
    /// `running`, `concluded`, …
    #[serde(default)]
    pub status: String,
}

/// An I/O thread.
#[derive(Clone, Debug, Deserialize)]
pub struct Iothread {
    /// Its id.
    pub id: String,
}

/// Answer of `query-migrate`; empty when there never was a migration.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Migration {
    /// `setup`, `active`, `completed`, …
    #[serde(default)]
    pub status: Option<String>,
}

/// A property of a QOM object.
#[derive(Clone, Debug, Deserialize)]
pub struct QomProperty {
    /// Its name.
    pub name: String,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: String,
}

/// Adds a node.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevAdd {
    /// Name of the node, at most 31 characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// Whether discards go through.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discard: Option<Discard>,
    /// Whether it is opened for reading only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_only: Option<bool>,
    /// Caching.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<Cache>,
    /// The driver and its options.
    #[serde(flatten)]
    pub driver: Driver,
}

/// What a node does with discards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Discard {
    /// Drops them.
    Ignore,
    /// Passes them on.
    Unmap,
}

/// Caching of a node.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Cache {
    /// Bypass the host's page cache.
    pub direct: bool,
    /// Ignore flushes: for content that nobody needs after a crash.
    pub no_flush: bool,
}

/// A driver and its options.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "driver", rename_all = "kebab-case")]
pub enum Driver {
    /// Raw format.
    Raw {
        /// What it is on.
        file: NodeRef,
        /// Size in bytes, when it is less than the file's.
        #[serde(skip_serializing_if = "Option::is_none")]
        size: Option<u64>,
    },
    /// qcow2 without a backing file.
    Qcow2 {
        /// What it is on.
        file: NodeRef,
    },
    /// A file.
    File {
        /// Its path.
        filename: PathBuf,
    },
    /// A block device of the host.
    HostDevice {
        /// Its path.
        filename: PathBuf,
    },
    /// Copies what is about to be overwritten.
    #[serde(rename_all = "kebab-case")]
    CopyBeforeWrite {
        /// The node below.
        file: NodeRef,
        /// Where old blocks go.
        target: NodeRef,
        /// What fails when the copy fails.
        on_cbw_error: OnCbwError,
        /// Limit of a copy in seconds; 0 is none.
        cbw_timeout: u32,
    },
    /// The disk at the instant when the filter came in.
    SnapshotAccess {
        /// The filter.
        file: NodeRef,
    },
}

/// A node by name, or one that is added along with its user.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum NodeRef {
    /// By name.
    Name(String),
    /// With its options.
    Inline(Box<BlockdevAdd>),
}

/// What fails when the copy before a write fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnCbwError {
    /// The snapshot; the guest notices nothing.
    BreakSnapshot,
    /// The guest's write.
    BreakGuestWrite,
}

impl BlockdevAdd {
    /// A node with default options.
    pub fn new(node_name: impl Into<String>, driver: Driver) -> Self {
        Self { node_name: Some(node_name.into()), discard: None, read_only: None, cache: None, driver }
    }

    /// Lets discards through.
    #[must_use]
    pub fn unmap(mut self) -> Self {
        self.discard = Some(Discard::Unmap);
        self
    }
}

/// Removes a node that was added by name.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevDel {
    /// Its name.
    pub node_name: String,
}

/// Several actions at one instant, all or none.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Transaction {
    /// The actions.
    pub actions: Vec<Action>,
}

/// An action of a transaction. Those on the same node keep their order.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", content = "data")]
pub enum Action {
    /// Starts a bitmap.
    #[serde(rename = "block-dirty-bitmap-add")]
    BitmapAdd(BitmapAdd),
    /// Removes a bitmap.
    #[serde(rename = "block-dirty-bitmap-remove")]
    BitmapRemove(Bitmap),
    /// Lets a bitmap record.
    #[serde(rename = "block-dirty-bitmap-enable")]
    BitmapEnable(Bitmap),
    /// Stops a bitmap.
    #[serde(rename = "block-dirty-bitmap-disable")]
    BitmapDisable(Bitmap),
    /// Adds the bits of some bitmaps to another.
    #[serde(rename = "block-dirty-bitmap-merge")]
    BitmapMerge(BitmapMerge),
    /// Starts a backup job.
    #[serde(rename = "blockdev-backup")]
    Backup(Backup),
}

/// A bitmap to be started.
#[derive(Clone, Debug, Serialize)]
pub struct BitmapAdd {
    /// Node that carries it.
    pub node: String,
    /// Its name.
    pub name: String,
    /// Bytes that a bit stands for; a power of two, at least 512.
    pub granularity: u32,
    /// Whether it does not record writes.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub disabled: bool,
}

/// A bitmap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Bitmap {
    /// Node that carries it.
    pub node: String,
    /// Its name.
    pub name: String,
}

/// Bitmaps to be merged.
#[derive(Clone, Debug, Serialize)]
pub struct BitmapMerge {
    /// Node that carries the one that takes the bits.
    pub node: String,
    /// Its name.
    pub target: String,
    /// The ones that give theirs.
    pub bitmaps: Vec<Bitmap>,
}

/// A backup job.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Backup {
    /// Its id.
    pub job_id: String,
    /// The node that is backed up.
    pub device: String,
    /// The node that takes the copies.
    pub target: String,
    /// `none`: copy only what is about to be overwritten.
    pub sync: &'static str,
    /// Name of the filter that the job puts above the node.
    pub filter_node_name: String,
    /// What fails when a copy fails (QEMU 10.1 or later).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_cbw_error: Option<OnCbwError>,
}

/// Cancels a job.
#[derive(Clone, Debug, Serialize)]
pub struct BlockJobCancel {
    /// Its id.
    pub device: String,
    /// Also when it is paused.
    pub force: bool,
}

/// Forgets a concluded job.
#[derive(Clone, Debug, Serialize)]
pub struct JobDismiss {
    /// Its id.
    pub id: String,
}

/// Reads a property.
#[derive(Clone, Debug, Serialize)]
pub struct QomGet {
    /// Path of the object.
    pub path: String,
    /// The property.
    pub property: String,
}

/// Sets a property.
#[derive(Clone, Debug, Serialize)]
pub struct QomSet {
    /// Path of the object.
    pub path: String,
    /// The property.
    pub property: String,
    /// Its new value.
    pub value: Value,
}

/// Lists an object's properties.
#[derive(Clone, Debug, Serialize)]
pub struct QomList {
    /// Path of the object.
    pub path: String,
}

/// Starts the NBD server, of which a QEMU has one at most.
#[derive(Clone, Debug, Serialize)]
pub struct NbdServerStart {
    /// Unix socket to listen on.
    #[serde(rename = "addr", serialize_with = "unix_address")]
    pub socket: PathBuf,
}

/// A unix socket in the old shape that this command still wants.
fn unix_address<S: Serializer>(path: &std::path::Path, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Data<'a> {
        path: &'a std::path::Path,
    }
    #[derive(Serialize)]
    struct Address<'a> {
        r#type: &'static str,
        data: Data<'a>,
    }
    Address { r#type: "unix", data: Data { path } }.serialize(serializer)
}

/// Adds an NBD export.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockExportAdd {
    /// `nbd`.
    pub r#type: &'static str,
    /// Its id.
    pub id: String,
    /// The exported node.
    pub node_name: String,
    /// Name that clients ask for.
    pub name: String,
    /// Whether it takes writes, and trims.
    pub writable: bool,
    /// Bitmaps that are shown as meta contexts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bitmaps: Vec<Bitmap>,
}

/// Removes an export.
#[derive(Clone, Debug, Serialize)]
pub struct BlockExportDel {
    /// Its id.
    pub id: String,
    /// `hard`: clients are dropped.
    pub mode: &'static str,
}

/// A command of the human monitor.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct HumanMonitorCommand {
    /// The line.
    pub command_line: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{json, to_value};

    #[test]
    fn a_fleecing_node_is_added_with_its_file() {
        let file = BlockdevAdd { node_name: None, ..BlockdevAdd::new("", Driver::File { filename: "/f".into() }) };
        let add =
            BlockdevAdd::new("pvb-fl0", Driver::Raw { file: NodeRef::Inline(Box::new(file)), size: None }).unmap();
        assert_eq!(
            to_value(add).unwrap(),
            json!({"node-name": "pvb-fl0", "driver": "raw", "discard": "unmap",
                   "file": {"driver": "file", "filename": "/f"}})
        );
    }

    #[test]
    fn the_nbd_server_wants_the_old_shape_of_addresses() {
        let start = NbdServerStart { socket: "/run/s".into() };
        assert_eq!(to_value(start).unwrap(), json!({"addr": {"type": "unix", "data": {"path": "/run/s"}}}));
    }

    #[test]
    fn a_job_names_its_error_policy_only_where_qemu_knows_it() {
        let mut job = Backup {
            job_id: "j".into(),
            device: "n".into(),
            target: "t".into(),
            sync: "none",
            filter_node_name: "f".into(),
            on_cbw_error: None,
        };
        let plain = json!({"type": "blockdev-backup", "data":
            {"job-id": "j", "device": "n", "target": "t", "sync": "none", "filter-node-name": "f"}});
        assert_eq!(to_value(Action::Backup(job.clone())).unwrap(), plain);
        job.on_cbw_error = Some(OnCbwError::BreakSnapshot);
        assert_eq!(to_value(Action::Backup(job)).unwrap()["data"]["on-cbw-error"], "break-snapshot");
    }

    #[test]
    fn an_anonymous_bitmap_and_unknown_members_are_read() {
        let node: BlockNode = serde_json::from_value(json!({"node-name": "#block1", "drv": "raw", "news": 1,
            "dirty-bitmaps": [{"granularity": 65536, "count": 0, "recording": false, "busy": false}]}))
        .unwrap();
        assert_eq!(node.dirty_bitmaps[0].name, None);
        assert_eq!(node.image.virtual_size, 0);
    }
}
