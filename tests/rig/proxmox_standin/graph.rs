//! QEMU's block graph, and where a device's filter goes.

use super::super::qmp::QmpFailure;
use serde_json::{Value, json};

/// How the node that the filter goes over is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// By a throttle node.
    Throttle,
    /// By the device with this QOM path.
    Device(String),
    /// By nobody (the TPM state's node).
    Nothing,
}

/// A device as the setup finds it.
#[derive(Clone, Debug)]
pub struct Found {
    /// The root node.
    pub top: String,
    /// The node below the throttle node, if there is one: bitmaps are here.
    pub below: String,
    pub place: Place,
    pub size: u64,
    pub read_only: bool,
    /// QOM path or id of the front-end device.
    qdev: Option<String>,
}

impl Found {
    /// Whether the front-end device has this id.
    pub fn is_device(&self, id: &Value) -> bool {
        let qdev = self.qdev.as_deref().map(|qdev| qdev.trim_start_matches("/machine/peripheral/"));
        qdev.is_some_and(|qdev| id.as_str() == qdev.split('/').next())
    }
}

/// A look at the graph.
pub struct Graph {
    blocks: Value,
    nodes: Value,
    edges: Value,
}

fn each(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn not_found(what: &str) -> QmpFailure {
    QmpFailure::Refused { class: "DeviceNotFound".into(), desc: format!("Device '{what}' not found") }
}

impl Graph {
    pub fn query(execute: impl Fn(&str) -> Result<Value, QmpFailure>) -> Result<Self, QmpFailure> {
        Ok(Self {
            blocks: execute("query-block")?,
            nodes: execute("query-named-block-nodes")?,
            edges: execute("x-debug-query-block-graph")?,
        })
    }

    fn node(&self, name: &str) -> Option<&Value> {
        each(&self.nodes).find(|node| node["node-name"] == name)
    }

    /// A backend of this name that holds nothing.
    pub fn is_drive_without_medium(&self, device: &str) -> bool {
        each(&self.blocks).any(|block| block["device"] == device && block.get("inserted").is_none())
    }

    /// Backend, or else node.
    pub fn find(&self, device: &str) -> Result<Found, QmpFailure> {
        if let Some(block) = each(&self.blocks).find(|block| block["device"] == device && !device.is_empty()) {
            let node = text(&block["inserted"]["node-name"]);
            if node.is_empty() {
                return Err(QmpFailure::generic(format!("Device '{device}' has no medium")));
            }
            return self.found(node.clone(), node, Self::device_of(block));
        }
        let node = self.node(device).ok_or_else(|| not_found(device))?;
        let block = each(&self.blocks).find(|block| block["inserted"]["node-name"] == device);
        let front_end = block.and_then(Self::device_of);
        if node["drv"] == "throttle" {
            let below = self.child(device, "file").ok_or_else(|| not_found(device))?;
            let mut found = self.found(device.to_owned(), below, front_end)?;
            found.place = Place::Throttle;
            return Ok(found);
        }
        self.found(device.to_owned(), device.to_owned(), front_end)
    }

    fn device_of(block: &Value) -> Option<String> {
        block["qdev"].as_str().filter(|qdev| !qdev.is_empty()).map(str::to_owned)
    }

    fn found(&self, top: String, below: String, qdev: Option<String>) -> Result<Found, QmpFailure> {
        let node = self.node(&below).ok_or_else(|| not_found(&below))?;
        let size = node["image"]["virtual-size"].as_u64().ok_or_else(|| not_found(&below))?;
        let place = match &qdev {
            Some(path) if path.starts_with('/') => Place::Device(path.clone()),
            Some(id) => Place::Device(format!("/machine/peripheral/{id}")),
            None => Place::Nothing,
        };
        Ok(Found { top, read_only: node["ro"] == true, below, place, size, qdev })
    }

    /// Whether what used the device's node is still there.
    pub fn has_place(&self, found: &Found) -> bool {
        match &found.qdev {
            None => self.node(&found.below).is_some(),
            Some(qdev) => each(&self.blocks).any(|block| block["qdev"] == qdev.as_str()),
        }
    }

    /// The named bitmap of a node.
    pub fn bitmap(&self, node: &str, name: &str) -> Option<&Value> {
        each(&self.node(node)?["dirty-bitmaps"]).find(|bitmap| bitmap["name"] == name)
    }

    /// The node that a node uses as `role`.
    pub fn child(&self, parent: &str, role: &str) -> Option<String> {
        self.children(parent).into_iter().find(|(child, _)| child == role).map(|(_, node)| node)
    }

    fn children(&self, parent: &str) -> Vec<(String, String)> {
        let nodes = || each(&self.edges["nodes"]).filter(|node| node["type"] == "block-driver");
        let Some(parent) = nodes().find(|node| node["name"] == parent) else { return Vec::new() };
        each(&self.edges["edges"])
            .filter(|edge| edge["parent"] == parent["id"])
            .filter_map(|edge| {
                Some((text(&edge["name"]), text(&nodes().find(|node| node["id"] == edge["child"])?["name"])))
            })
            .collect()
    }

    /// Adds what Proxmox's build lists and some upstream versions do not: the children of every node.
    pub fn add_children(&self, nodes: &mut Value) {
        for node in nodes.as_array_mut().into_iter().flatten() {
            if node.get("children").is_none() {
                let children = self.children(node["node-name"].as_str().unwrap_or_default());
                node["children"] =
                    children.into_iter().map(|(child, name)| json!({"child": child, "node-name": name})).collect();
            }
        }
    }
}
