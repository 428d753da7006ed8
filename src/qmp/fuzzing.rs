//! What the fuzzers do with the lines of QEMU and of the guest agent.

use super::{
    Session,
    agent::Agent,
    command::{
        block::{QueryIothreads, QueryJobs, QueryMigrate, QueryStatus},
        proxmox::{BackupAccessSetup, QueryBackup, QueryPbsBitmapInfo, QueryProxmoxSupport},
    },
    schema::Schema,
};
use crate::{
    access::graph::Graph,
    fuzzing::block_on,
    guest::{Guest, GuestKind, disks},
};
use std::{future::Future, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

/// Stands in the input for the id of the request that is answered, which nobody can know beforehand.
const ID: &[u8] = b"\"@\"";

/// A peer that says one part of `script` (parts end with an empty line) after every line that it is sent, the first of them
/// unasked if it greets; then it hangs up.
async fn say(stream: UnixStream, script: &[u8], greets: bool) {
    let (mut from, mut to) = stream.into_split();
    let mut parts: Vec<&[u8]> = Vec::new();
    let mut rest = script;
    while let Some(end) = rest.windows(2).position(|pair| pair == b"\n\n") {
        parts.push(&rest[..=end]);
        rest = &rest[end + 2..];
    }
    parts.push(rest);
    let mut parts = parts.into_iter();
    if greets && to.write_all(parts.next().unwrap_or_default()).await.is_err() {
        return;
    }
    let mut asked = Vec::new();
    for part in parts {
        while !asked.contains(&b'\n') {
            if !from.read_buf(&mut asked).await.is_ok_and(|read| read > 0) {
                return;
            }
        }
        let end = asked.iter().position(|byte| *byte == b'\n').unwrap_or_default();
        let line: Vec<u8> = asked.drain(..=end).collect();
        let start = line.iter().position(|byte| *byte == b'{').unwrap_or_default();
        let request: serde_json::Value = serde_json::from_slice(&line[start..]).unwrap_or_default();
        let id = match &request["id"] {
            serde_json::Value::Null => request["arguments"]["id"].to_string(),
            id => id.to_string(),
        };
        let mut answer = Vec::new();
        let mut rest = part;
        while let Some(at) = rest.windows(ID.len()).position(|window| window == ID) {
            answer.extend_from_slice(&rest[..at]);
            answer.extend_from_slice(id.as_bytes());
            rest = &rest[at + ID.len()..];
        }
        answer.extend_from_slice(rest);
        if to.write_all(&answer).await.is_err() {
            return;
        }
    }
}

fn with_peer<F: Future<Output = bool>>(script: &[u8], greets: bool, talk: impl FnOnce(UnixStream) -> F) -> bool {
    block_on(async {
        let Ok((ours, theirs)) = UnixStream::pair() else { return false };
        tokio::join!(talk(ours), say(theirs, script, greets)).0
    })
}

fn guest(kind: GuestKind) -> Option<Guest> {
    let config = b"agent: 1\nscsi0: local:vm-100-disk-0,size=1G\nefidisk0: local:vm-100-disk-1\nbios: ovmf\n".to_vec();
    let id = "100".parse().ok()?;
    Some(Guest { id, name: None, kind, qmp: "/q".into(), agent: None, config, firewall: None })
}

/// QEMU's side of a session: greeting, the block graph, and the disks of a plain guest. `true` when all of it is understood.
pub(crate) fn graph(script: &[u8]) -> bool {
    with_peer(script, true, |stream| async {
        let Ok(mut session) = Session::over(stream).await else { return false };
        let Ok(graph) = Graph::read(&mut session).await else { return false };
        for node in &graph.nodes {
            let name = node.node_name.as_deref().unwrap_or_default();
            let _ = (graph.users(name), graph.first_foreign(name), graph.in_the_way(name), graph.bitmaps(name).count());
        }
        for device in &graph.devices {
            let _ = graph.device(device.qdev.as_deref().unwrap_or_default(), &device.device);
        }
        let _ = graph.foreign_nbd_exports().count();
        let Some(guest) = guest(GuestKind::Plain) else { return false };
        disks(&guest, &mut session).await.is_ok_and(|found| !found.disks.is_empty())
    })
}

/// QEMU's side of a session with the commands of Proxmox VE, and those about the guest's state.
pub(crate) fn proxmox(script: &[u8]) -> bool {
    with_peer(script, true, |stream| async {
        let Ok(mut session) = Session::over(stream).await else { return false };
        let setup = BackupAccessSetup { target_id: "pvebackup-t".into(), devices: Vec::new() };
        let mut good = session.execute(&QueryProxmoxSupport {}).await.is_ok();
        let Some(guest) = guest(GuestKind::Proxmox) else { return false };
        good &= disks(&guest, &mut session).await.is_ok_and(|found| !found.disks.is_empty());
        good &= session.execute(&setup).await.is_ok_and(|accesses| !accesses.is_empty());
        if let Ok(status) = session.execute(&QueryBackup {}).await {
            let _ = (status.is_active(), status.looks_like_access());
        }
        good &= session.execute(&QueryPbsBitmapInfo {}).await.is_ok();
        good &= session.execute(&QueryStatus {}).await.is_ok();
        good &= session.execute(&QueryJobs {}).await.is_ok();
        good &= session.execute(&QueryIothreads {}).await.is_ok();
        good & session.execute(&QueryMigrate {}).await.is_ok()
    })
}

/// QEMU's description of itself.
pub(crate) fn schema(script: &[u8]) -> bool {
    with_peer(script, true, |stream| async {
        let Ok(mut session) = Session::over(stream).await else { return false };
        let Ok(schema) = Schema::query(&mut session).await else { return false };
        schema.variant_has("blockdev-add", "copy-before-write", "on-cbw-error")
            & schema.command_has("block-export-add", "id")
            & schema.variant_has("blockdev-add", "snapshot-access", "file")
            & schema.enum_has("blockdev-backup", "sync", "none")
    })
}

/// The guest agent's side of a freeze, which the guest controls.
pub(crate) fn agent(script: &[u8]) -> bool {
    with_peer(script, false, |stream| async {
        let limit = Duration::from_secs(10);
        let mut agent = Agent::over(stream);
        let mut good = agent.ping().await.is_ok();
        good &= agent.fsfreeze_status(limit).await.is_ok();
        good &= agent.fsfreeze_freeze(limit).await.is_ok();
        good & agent.fsfreeze_thaw(limit).await.is_ok()
    })
}
