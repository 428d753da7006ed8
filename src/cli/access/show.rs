//! How accesses and guests are shown.

use crate::{
    access::{DiskAccess, by_hand::Kept},
    by_hand::{Ended, MountState, Standing, State},
    guest::GuestId,
    report::{SCHEMA, printable, sizes},
};
use jiff::Timestamp;
use serde_json::{Value, json};
use std::{
    fmt::Write as _,
    os::unix::ffi::OsStrExt,
    path::Path,
    time::{Duration, SystemTime},
};

/// `nbd+unix:///EXPORT?socket=PATH`, as the NBD project's `uri.md` has it.
pub(super) fn uri(socket: &Path, disk: &DiskAccess) -> String {
    let mut uri = String::from("nbd+unix:///");
    escape(&mut uri, disk.export.as_bytes());
    uri.push_str("?socket=");
    escape(&mut uri, socket.as_os_str().as_bytes());
    uri
}

/// Percent-encodes all but what is nowhere special in a URI.
fn escape(uri: &mut String, bytes: &[u8]) {
    for byte in bytes {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => uri.push(char::from(*byte)),
            _ => {
                let _ = write!(uri, "%{byte:02X}");
            }
        }
    }
}

fn disks(kept: &Kept, dirty: &[Option<u64>]) -> Vec<Value> {
    let disk = |(at, disk): (usize, &DiskAccess)| {
        json!({
            "name": disk.name, "export": disk.export, "uri": uri(&kept.socket, disk), "size": disk.size,
            "dirty_bytes": dirty.get(at).copied().flatten(), "context": disk.dirty_context,
            "action": disk.action.as_str(), "reason": disk.reason, "largest_request": disk.largest_request,
        })
    };
    kept.disks.iter().enumerate().map(disk).collect()
}

pub(super) fn access_line(guest: &GuestId, kept: &Kept, dirty: &[Option<u64>]) -> serde_json::Result<String> {
    serde_json::to_string(&json!({
        "schema": SCHEMA, "type": "access", "guest": guest, "since": kept.since, "socket": kept.socket,
        "target": kept.target, "trim": kept.trim, "disks": disks(kept, dirty),
    }))
}

pub(super) fn access_text(guest: &GuestId, kept: &Kept, dirty: &[Option<u64>]) -> String {
    let mut text = format!("{guest}: the disks as of {}, until `pvebackup access teardown {guest}`\n", kept.since);
    for (disk, dirty) in kept.disks.iter().zip(dirty) {
        let dirty = match (dirty, &disk.dirty_context) {
            (_, None) => "no dirty bitmap".to_owned(),
            (Some(dirty), Some(_)) => format!("{} dirty", sizes::short_bytes(*dirty)),
            (None, Some(_)) => "dirty bytes not known".to_owned(),
        };
        let _ = writeln!(
            text,
            "  {}  {}  {dirty} ({})\n    {}",
            printable(&disk.name),
            sizes::short_bytes(disk.size),
            printable(&disk.reason),
            uri(&kept.socket, disk)
        );
        if let Some(context) = &disk.dirty_context {
            let _ = writeln!(text, "    context {}", printable(context));
        }
    }
    text
}

pub(super) fn ended_line(guest: &GuestId, ended: &Ended) -> serde_json::Result<String> {
    serde_json::to_string(&json!({
        "schema": SCHEMA, "type": "access-ended", "guest": guest, "since": ended.kept.since, "qemu_gone": ended.qemu_gone,
        "forgotten": ended.forgotten, "cut_off": ended.cut_off, "left_behind": ended.left_behind,
    }))
}

pub(super) fn ended_text(guest: &GuestId, ended: &Ended) -> String {
    let mut text = format!("{guest}: the access by hand of {} ", ended.kept.since);
    text.push_str(match (ended.left_behind.is_empty(), ended.qemu_gone) {
        (false, _) => "is not quite ended",
        (true, true) => "is ended; QEMU had ended before",
        (true, false) => "is ended",
    });
    for target in &ended.forgotten {
        let _ = write!(text, "\n{guest}: the next backup of its disks to `{target}` is full");
    }
    for path in &ended.cut_off {
        let _ =
            write!(text, "\n{guest}: {} was in use: its readers get errors", printable(&path.display().to_string()));
    }
    for what in &ended.left_behind {
        let _ = write!(text, "\n{guest}: still there: {}", printable(what));
    }
    text
}

pub(super) fn standing_line(standing: &Standing) -> serde_json::Result<String> {
    let images: Vec<Value> =
        standing.fleecing.iter().map(|image| json!({"name": image.name, "bytes": image.bytes})).collect();
    let mounts: Vec<Value> = standing
        .mounts
        .iter()
        .map(|mount| json!({"path": mount.path, "pid": mount.pid, "served": mount.state == MountState::Served}))
        .collect();
    let mut line = json!({
        "schema": SCHEMA, "type": "access-status", "mounts": mounts, "guest": standing.guest,
        "fleecing_bytes": standing.fleecing_bytes(), "fleecing": images,
    });
    let more = match &standing.state {
        State::Idle => json!({"state": "idle"}),
        State::Running { pid } => json!({"state": "running", "pid": pid}),
        State::ByHand { kept, qemu_gone } => json!({
            "state": "by-hand", "since": kept.since, "qemu_gone": qemu_gone, "socket": kept.socket, "target": kept.target,
            "disks": kept.disks.iter().map(|disk| json!({
                "name": disk.name, "export": disk.export, "uri": uri(&kept.socket, disk), "size": disk.size,
                "context": disk.dirty_context, "action": disk.action.as_str(),
            })).collect::<Vec<_>>(),
        }),
        State::LeftBehind { what } => json!({"state": "left-behind", "what": what}),
    };
    if let (Value::Object(line), Value::Object(more)) = (&mut line, more) {
        line.extend(more);
    }
    serde_json::to_string(&line)
}

pub(super) fn standing_text(standing: &Standing) -> String {
    let guest = printable(&standing.guest);
    let mut text = match &standing.state {
        State::Idle => return format!("{guest}: nothing is set up, nothing is left"),
        State::Running { pid } => format!("{guest}: a run is at work (process {pid})"),
        State::ByHand { kept, qemu_gone: false } => {
            format!(
                "{guest}: access by hand since {}{}; `pvebackup access teardown {guest}` ends it",
                kept.since,
                ago(kept.since)
            )
        }
        State::ByHand { kept, qemu_gone: true } => format!(
            "{guest}: the access by hand of {} ended with its QEMU; `pvebackup access teardown {guest}` removes what is left",
            kept.since
        ),
        State::LeftBehind { .. } => {
            format!("{guest}: a run died and left something; `pvebackup recover {guest}` undoes it")
        }
    };
    match &standing.state {
        State::ByHand { kept, qemu_gone: false } => {
            for disk in &kept.disks {
                let _ = write!(
                    text,
                    "\n  {}  {}  {}",
                    printable(&disk.name),
                    sizes::short_bytes(disk.size),
                    uri(&kept.socket, disk)
                );
            }
        }
        State::LeftBehind { what } => {
            for what in what {
                let _ = write!(text, "\n  {}", printable(what));
            }
        }
        _ => {}
    }
    for mount in &standing.mounts {
        let path = mount.path.display().to_string();
        let path = printable(&path);
        let _ = match mount.state {
            MountState::Served => write!(text, "\n  mounted at {path} (process {})", mount.pid),
            MountState::Dead => write!(
                text,
                "\n  dead mount at {path}: process {} was killed; `pvebackup umount {path}` removes it",
                mount.pid
            ),
        };
    }
    for image in &standing.fleecing {
        let bytes = image.bytes.map_or_else(|| "(the storage knows its size)".into(), sizes::short_bytes);
        let _ = write!(text, "\n  fleecing image {}  {bytes}", printable(&image.name));
    }
    text
}

/// ` (2h05m00s ago)`; nothing when the clock was set back.
fn ago(since: Timestamp) -> String {
    let past = SystemTime::now().duration_since(since.into()).ok();
    past.map(|past| format!(" ({} ago)", sizes::duration(past.max(Duration::from_secs(1))))).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::BitmapAction;

    #[test]
    fn a_uri_leads_to_the_export_whatever_the_names_are() {
        let disk = DiskAccess {
            name: "scsi0".into(),
            export: "drive-scsi0".into(),
            size: 1,
            dirty_context: None,
            action: BitmapAction::NotUsed,
            reason: String::new(),
            clean_readable: true,
            largest_request: None,
            granularity: 65536,
            next_bitmap: None,
            bitmap_node: None,
        };
        let plain = uri(Path::new("/run/pvebackup/100/nbd.sock"), &disk);
        assert_eq!(plain, "nbd+unix:///drive-scsi0?socket=/run/pvebackup/100/nbd.sock");
        let odd = uri(Path::new("/a b/ü&x"), &DiskAccess { export: "#block 1?".into(), ..disk });
        assert_eq!(odd, "nbd+unix:///%23block%201%3F?socket=/a%20b/%C3%BC%26x");
    }
}
