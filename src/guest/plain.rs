//! A QEMU process with a QMP socket, and nothing else known about it.

use super::{Guest, GuestError, GuestId, GuestKind, query};
use crate::qmp::{QmpError, Session, command::block::BlockDevice};
use serde::Serialize;
use serde_json::{Value, json};
use std::path::PathBuf;

/// A guest that is known by its QMP socket only.
///
/// # Errors
/// [`GuestError::NotRunning`] when there is no such socket.
pub fn find(id: GuestId, qmp: PathBuf, agent: Option<PathBuf>) -> Result<Guest, GuestError> {
    if !qmp.try_exists().unwrap_or(false) {
        return Err(GuestError::NotRunning { id, socket: qmp });
    }
    Ok(Guest { id, name: None, kind: GuestKind::Plain, qmp, agent, config: Vec::new(), firewall: None })
}

/// What QEMU tells about itself: what a person needs to build a machine like it.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Description {
    /// `-name`.
    pub name: Option<String>,
    /// `10.0.2`.
    pub qemu: String,
    /// Package, as the distribution words it.
    pub package: String,
    /// QOM type of the machine: `pc-q35-10.0-machine`.
    pub machine: Option<String>,
    /// Number of virtual processors.
    pub processors: Option<usize>,
    /// QOM type of the first processor: `host-x86_64-cpu`.
    pub processor: Option<String>,
    /// Memory at start in bytes.
    pub memory_bytes: Option<u64>,
    /// Memory plugged in since, in bytes.
    pub plugged_memory_bytes: Option<u64>,
    /// `query-block`, the members that matter.
    pub block_devices: Vec<Value>,
}

impl Description {
    /// Asks QEMU. What it does not know is left out.
    pub async fn ask(session: &mut Session, fronts: &[BlockDevice]) -> Result<Self, QmpError> {
        let name = query::if_known(session, "query-name", Value::Null).await?;
        let type_of_machine = json!({"path": "/machine", "property": "type"});
        let machine = query::if_known(session, "qom-get", type_of_machine).await?;
        let processors = query::if_known(session, "query-cpus-fast", Value::Null).await?;
        let processors = processors.as_ref().and_then(Value::as_array);
        let memory = query::if_known(session, "query-memory-size-summary", Value::Null).await?;
        let bytes = |member| memory.as_ref().and_then(|m| m.get(member)).and_then(Value::as_u64);
        let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
        let (major, minor, micro) = session.version();
        Ok(Self {
            name: text(name.as_ref().and_then(|n| n.get("name"))).filter(|n| !n.is_empty()),
            qemu: format!("{major}.{minor}.{micro}"),
            package: session.package().to_owned(),
            machine: text(machine.as_ref()),
            processors: processors.map(Vec::len),
            processor: text(processors.and_then(|p| p.first()).and_then(|p| p.get("qom-type"))),
            memory_bytes: bytes("base-memory"),
            plugged_memory_bytes: bytes("plugged-memory"),
            block_devices: fronts.iter().map(block_device).collect(),
        })
    }

    /// As archived (`guest.conf`).
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec_pretty(self).unwrap_or_default();
        text.push(b'\n');
        text
    }
}

fn block_device(front: &BlockDevice) -> Value {
    let medium = front.inserted.as_ref().map(|inserted| {
        json!({
            "node": inserted.node_name, "driver": inserted.drv, "read-only": inserted.ro,
            "size": inserted.image.virtual_size, "image": super::disks::identity(&inserted.file),
        })
    });
    json!({"device": front.device, "qdev": front.qdev, "removable": front.removable, "medium": medium})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_socket_means_that_the_guest_is_not_running() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp.sock");
        assert!(matches!(
            find("web".parse().unwrap(), socket.clone(), None),
            Err(GuestError::NotRunning { socket: at, .. }) if at == socket
        ));
        std::fs::write(&socket, "").unwrap();
        assert_eq!(find("web".parse().unwrap(), socket, None).unwrap().kind, GuestKind::Plain);
    }
}
