//! QEMU's block graph: what is where now.
//!
//! Everything that changes the graph asks here first, and not its memory: an external snapshot or a hot-plug may have changed
//! it since.

use crate::qmp::{
    QmpError, Session,
    command::block::{
        BlockDevice, BlockExport, BlockGraph, BlockNode, DirtyBitmap, QueryBlock, QueryBlockExports, QueryBlockGraph,
        QueryNamedBlockNodes,
    },
};

/// What the names of all our nodes, jobs, exports and bitmaps begin with.
pub const PREFIX: &str = "pvb-";

/// Drivers that hold a disk's data. Any other at the top of a disk is a filter that somebody put there.
const FORMATS: &[&str] = &[
    "file",
    "gluster",
    "host_cdrom",
    "host_device",
    "http",
    "https",
    "io_uring",
    "iscsi",
    "luks",
    "nbd",
    "nfs",
    "null-aio",
    "null-co",
    "nvme",
    "nvme-io_uring",
    "parallels",
    "qcow",
    "qcow2",
    "qed",
    "raw",
    "rbd",
    "ssh",
    "vdi",
    "vhdx",
    "virtio-blk-vfio-pci",
    "virtio-blk-vhost-user",
    "virtio-blk-vhost-vdpa",
    "vmdk",
    "vpc",
];

/// Whether a name is one that we give.
pub fn is_ours(name: &str) -> bool {
    name.starts_with(PREFIX)
}

/// The block graph at one moment, with the exports on it.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    /// Devices.
    pub devices: Vec<BlockDevice>,
    /// Named nodes; all nodes have a name.
    pub nodes: Vec<BlockNode>,
    /// Who uses whom.
    pub edges: BlockGraph,
    /// Exports.
    pub exports: Vec<BlockExport>,
}

/// Who uses a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User<'a> {
    /// `block-backend` (a device, or an export), `block-job` or `block-driver`.
    pub kind: &'a str,
    /// Its name.
    pub name: &'a str,
    /// As what it uses the node: `root`, `file`, `backing`, …
    pub role: &'a str,
}

impl Graph {
    /// Asks QEMU.
    ///
    /// # Errors
    /// Any of the four queries' errors.
    pub async fn read(session: &mut Session) -> Result<Self, QmpError> {
        Ok(Self {
            devices: session.execute(&QueryBlock {}).await?,
            nodes: session.execute(&QueryNamedBlockNodes::default()).await?,
            edges: session.execute(&QueryBlockGraph {}).await?,
            exports: session.execute(&QueryBlockExports {}).await?,
        })
    }

    /// The device with this `qdev`, or with this name when it has no `qdev`.
    pub fn device(&self, qdev: &str, name: &str) -> Option<&BlockDevice> {
        if qdev.is_empty() {
            return self.devices.iter().find(|d| !name.is_empty() && d.device == name);
        }
        self.devices.iter().find(|d| d.qdev.as_deref() == Some(qdev))
    }

    /// A node by name.
    pub fn node(&self, name: &str) -> Option<&BlockNode> {
        self.nodes.iter().find(|n| n.node_name.as_deref() == Some(name))
    }

    fn id(&self, node: &str) -> Option<u64> {
        self.edges.nodes.iter().find(|n| n.kind == "block-driver" && n.name == node).map(|n| n.id)
    }

    /// Who uses a node.
    pub fn users(&self, node: &str) -> Vec<User<'_>> {
        let Some(id) = self.id(node) else { return Vec::new() };
        self.edges
            .edges
            .iter()
            .filter(|e| e.child == id)
            .filter_map(|edge| {
                let parent = self.edges.nodes.iter().find(|n| n.id == edge.parent)?;
                Some(User { kind: &parent.kind, name: &parent.name, role: &edge.name })
            })
            .collect()
    }

    /// The node that a node uses as `role`.
    pub fn child(&self, node: &str, role: &str) -> Option<&str> {
        let id = self.id(node)?;
        let edge = self.edges.edges.iter().find(|e| e.parent == id && e.name == role)?;
        self.edges.nodes.iter().find(|n| n.id == edge.child).map(|n| n.name.as_str())
    }

    /// The first node that is not ours on the way down from `node`: what a device gets back when our filters go.
    pub fn first_foreign(&self, node: &str) -> Option<&str> {
        // Bounded, although a graph of QEMU's has no cycles.
        let mut at = self.edges.nodes.iter().find(|n| n.kind == "block-driver" && n.name == node)?.name.as_str();
        for _ in 0..self.edges.nodes.len() {
            if !is_ours(at) {
                return Some(at);
            }
            at = self.child(at, "file")?;
        }
        None
    }

    /// Named bitmaps on a node.
    pub fn bitmaps(&self, node: &str) -> impl Iterator<Item = (&str, &DirtyBitmap)> {
        self.node(node).into_iter().flat_map(|n| &n.dirty_bitmaps).filter_map(|b| Some((b.name.as_deref()?, b)))
    }

    /// A named bitmap on a node.
    pub fn bitmap(&self, node: &str, name: &str) -> Option<&DirtyBitmap> {
        self.bitmaps(node).find(|(n, _)| *n == name).map(|(_, b)| b)
    }

    /// What of somebody else's stands in the way of a filter on `root`, in words.
    pub fn in_the_way(&self, root: &str) -> Option<String> {
        let driver = self.node(root).map_or("", |n| n.drv.as_str());
        if !FORMATS.contains(&driver) {
            return Some(format!("filter `{driver}` (node `{root}`)"));
        }
        let mut at = Some(root);
        for _ in 0..self.edges.nodes.len() {
            let Some(node) = at else { break };
            if let Some(export) = self.exports.iter().find(|e| e.node_name == node && !is_ours(&e.id)) {
                return Some(format!("{} export `{}` of node `{node}`", export.kind, export.id));
            }
            at = self.child(node, "file");
        }
        let mut devices = 0;
        for user in self.users(root) {
            match user.kind {
                "block-job" => return Some(format!("block job `{}` on node `{root}`", user.name)),
                "block-driver" => return Some(format!("node `{}` above node `{root}`", user.name)),
                _ => devices += 1,
            }
        }
        (devices > 1).then(|| format!("a second user of node `{root}`"))
    }

    /// NBD exports that are not ours: there is one NBD server in a QEMU, and theirs is running.
    pub fn foreign_nbd_exports(&self) -> impl Iterator<Item = &str> {
        self.exports.iter().filter(|e| e.kind == "nbd" && !is_ours(&e.id)).map(|e| e.id.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// scsi0 → filter → disk → file, and an overlay that somebody put between filter and disk.
    fn graph() -> Graph {
        Graph {
            devices: serde_json::from_value(json!([
                {"device": "drive-scsi0", "qdev": "scsi0", "inserted": {"node-name": "pvb-1-cbw0", "drv": "copy-before-write"}},
                {"device": "", "qdev": "/machine/peripheral/v/virtio-backend", "inserted": {"node-name": "b", "drv": "raw"}},
            ]))
            .unwrap(),
            nodes: serde_json::from_value(json!([
                {"node-name": "pvb-1-cbw0", "drv": "copy-before-write"},
                {"node-name": "overlay", "drv": "qcow2"},
                {"node-name": "disk", "drv": "raw", "dirty-bitmaps": [
                    {"granularity": 65536}, {"name": "x", "granularity": 65536, "recording": true}]},
                {"node-name": "b", "drv": "raw"},
                {"node-name": "t", "drv": "throttle"},
            ]))
            .unwrap(),
            edges: serde_json::from_value(json!({
                "nodes": [
                    {"id": 1, "type": "block-backend", "name": "drive-scsi0"},
                    {"id": 2, "type": "block-driver", "name": "pvb-1-cbw0"},
                    {"id": 3, "type": "block-driver", "name": "overlay"},
                    {"id": 4, "type": "block-driver", "name": "disk"},
                    {"id": 5, "type": "block-driver", "name": "b"},
                    {"id": 6, "type": "block-job", "name": "mirror0"},
                    {"id": 7, "type": "block-driver", "name": "b-file"},
                ],
                "edges": [
                    {"parent": 1, "child": 2, "name": "root"},
                    {"parent": 2, "child": 3, "name": "file"},
                    {"parent": 3, "child": 4, "name": "backing"},
                    {"parent": 6, "child": 5, "name": "main node"},
                    {"parent": 5, "child": 7, "name": "file"},
                ],
            }))
            .unwrap(),
            exports: Vec::new(),
        }
    }

    #[test]
    fn below_our_filter_is_what_somebody_put_there_meanwhile() {
        let graph = graph();
        assert_eq!(graph.first_foreign("pvb-1-cbw0"), Some("overlay"));
        assert_eq!(graph.first_foreign("disk"), Some("disk"));
        assert_eq!(graph.first_foreign("pvb-gone"), None);
        assert_eq!(graph.users("pvb-1-cbw0"), [User { kind: "block-backend", name: "drive-scsi0", role: "root" }]);
    }

    #[test]
    fn internal_bitmaps_are_passed_over() {
        let graph = graph();
        assert_eq!(graph.bitmaps("disk").map(|(n, _)| n).collect::<Vec<_>>(), ["x"]);
        assert!(graph.bitmap("disk", "x").unwrap().recording);
        assert!(graph.bitmap("gone", "x").is_none());
    }

    #[test]
    fn filters_jobs_and_exports_of_others_are_in_the_way() {
        let mut graph = graph();
        assert_eq!(graph.in_the_way("t").unwrap(), "filter `throttle` (node `t`)");
        assert_eq!(graph.in_the_way("b").unwrap(), "block job `mirror0` on node `b`");
        assert_eq!(graph.in_the_way("disk").unwrap(), "node `overlay` above node `disk`");
        graph.exports =
            serde_json::from_value(json!([{"id": "theirs", "type": "fuse", "node-name": "b-file"}])).unwrap();
        assert_eq!(graph.in_the_way("b").unwrap(), "fuse export `theirs` of node `b-file`");
        assert_eq!(graph.foreign_nbd_exports().count(), 0);
    }

    #[test]
    fn devices_are_found_by_qdev_and_only_without_one_by_name() {
        let graph = graph();
        assert_eq!(graph.device("scsi0", "").unwrap().device, "drive-scsi0");
        assert_eq!(graph.device("", "drive-scsi0").unwrap().qdev.as_deref(), Some("scsi0"));
        assert!(graph.device("", "").is_none());
        assert!(graph.device("scsi1", "drive-scsi0").is_none());
    }
}
