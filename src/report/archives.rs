//! Results of `list` and `info`: text for people, JSON lines for programs.

use super::{
    json::SCHEMA,
    output::printable,
    sizes::{duration, short_bytes},
};
use crate::{
    archive::{ArchiveId, Consistency, Manifest},
    provider::ArchiveInfo,
};
use jiff::Timestamp;
use serde::Serialize;
use std::{fmt::Write as _, time::Duration};

/// Characters of an id that are shown, as in restic's lists.
const SHORT_ID: usize = 8;

/// A table of archives, in the order given. Empty for no archives.
pub fn archive_table(archives: &[ArchiveInfo]) -> String {
    if archives.is_empty() {
        return String::new();
    }
    let mut rows = vec![["ARCHIVE", "ID", "DISKS", "SIZE", "ADDED"].map(str::to_owned)];
    let size = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), short_bytes);
    rows.extend(archives.iter().map(|archive| {
        let disks = if archive.disks.is_empty() { "-".to_owned() } else { archive.disks.join(",") };
        [
            printable(&archive.name.to_string()).into_owned(),
            printable(&archive.id.0).chars().take(SHORT_ID).collect(),
            printable(&disks).into_owned(),
            size(archive.size),
            size(archive.added_bytes),
        ]
    }));
    table(&rows, &[Align::Left, Align::Left, Align::Left, Align::Right, Align::Right])
}

#[derive(Serialize)]
struct ArchiveLine<'a> {
    schema: u32,
    r#type: &'static str,
    archive: String,
    id: &'a ArchiveId,
    guest: &'a str,
    time: Timestamp,
    disks: &'a [String],
    size_bytes: Option<u64>,
    added_bytes: Option<u64>,
}

/// One JSON object a line for every archive.
///
/// # Errors
/// Never in practice: all members can be written as JSON.
pub fn archive_lines(archives: &[ArchiveInfo]) -> serde_json::Result<String> {
    let mut out = String::new();
    for archive in archives {
        out += &serde_json::to_string(&ArchiveLine {
            schema: SCHEMA,
            r#type: "archive",
            archive: archive.name.to_string(),
            id: &archive.id,
            guest: archive.name.guest(),
            time: archive.name.time(),
            disks: &archive.disks,
            size_bytes: archive.size,
            added_bytes: archive.added_bytes,
        })?;
        out.push('\n');
    }
    Ok(out)
}

/// What an archive's manifest tells, for people.
pub fn manifest_text(id: &ArchiveId, manifest: &Manifest) -> String {
    let mut out = String::new();
    let mut field = |name: &str, value: &str| {
        let _ = writeln!(out, "{:<12} {}", format!("{name}:"), printable(value));
    };
    field("archive", &manifest.archive.to_string());
    field("id", &id.0);
    let name = manifest.guest_name.as_deref().map(|n| format!(" {n}")).unwrap_or_default();
    field("guest", &format!("{}{name} ({})", manifest.archive.guest(), manifest.guest_kind));
    field("instant", &manifest.instant.to_string());
    field("consistency", &consistency(&manifest.consistency));
    field("written by", &format!("pvebackup {}", manifest.program));
    field("firewall", if manifest.firewall { "yes" } else { "no" });
    out.push('\n');
    let mut rows = vec![["DISK", "SIZE", "DATA", "READ", "BITMAP", "REASON"].map(str::to_owned)];
    rows.extend(manifest.disks.iter().map(|disk| {
        [
            printable(&disk.name).into_owned(),
            short_bytes(disk.size),
            short_bytes(disk.data_bytes),
            short_bytes(disk.read_bytes),
            printable(&disk.bitmap_action).into_owned(),
            printable(&disk.reason).into_owned(),
        ]
    }));
    out += &table(&rows, &[Align::Left, Align::Right, Align::Right, Align::Right, Align::Left, Align::Left]);
    for skipped in &manifest.skipped {
        let _ = writeln!(out, "{}: not in the archive: {}", printable(&skipped.name), printable(&skipped.reason));
    }
    out
}

#[derive(Serialize)]
struct ManifestLine<'a> {
    schema: u32,
    r#type: &'static str,
    id: &'a ArchiveId,
    manifest: &'a Manifest,
}

/// An archive's manifest as one line of JSON.
///
/// # Errors
/// Never in practice: all members can be written as JSON.
pub fn manifest_line(id: &ArchiveId, manifest: &Manifest) -> serde_json::Result<String> {
    let line = ManifestLine { schema: SCHEMA, r#type: "manifest", id, manifest };
    serde_json::to_string(&line).map(|text| text + "\n")
}

fn consistency(state: &Consistency) -> String {
    let mut text = if state.frozen {
        format!("file systems frozen for {}", duration(Duration::from_millis(state.frozen_millis)))
    } else {
        "crash consistent".to_owned()
    };
    if state.paused_micros > 0 {
        let _ = write!(text, ", paused for {}", duration(Duration::from_micros(state.paused_micros)));
    }
    if state.was_paused {
        text.push_str(", guest was already paused");
    }
    if let Some(note) = &state.freeze_note {
        let _ = write!(text, " ({note})");
    }
    text
}

#[derive(Clone, Copy)]
enum Align {
    Left,
    Right,
}

fn table<const N: usize>(rows: &[[String; N]], align: &[Align; N]) -> String {
    let mut widths = [0usize; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for ((cell, width), align) in row.iter().zip(widths).zip(align) {
            let _ = match align {
                Align::Left => write!(line, "{cell:<width$}  "),
                Align::Right => write!(line, "{cell:>width$}  "),
            };
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::{DiskEntry, SkippedDisk};
    use serde_json::Value;

    fn archives() -> Vec<ArchiveInfo> {
        vec![
            ArchiveInfo {
                id: ArchiveId("0123456789abcdef".into()),
                name: "pve-qemu-100-2026-01-31T02:00:07Z".parse().expect("name"),
                disks: vec!["scsi0".into(), "efidisk0".into()],
                size: Some(64 << 30),
                added_bytes: Some(2_254_857_830),
            },
            ArchiveInfo {
                id: ArchiveId("ab".into()),
                name: "pve-qemu-web-2026-02-01T02:00:07Z".parse().expect("name"),
                disks: Vec::new(),
                size: None,
                added_bytes: None,
            },
        ]
    }

    fn manifest() -> Manifest {
        Manifest {
            version: Manifest::VERSION,
            program: "0.1.0".into(),
            archive: "pve-qemu-100-2026-01-31T02:00:07Z".parse().expect("name"),
            guest_kind: "proxmox".into(),
            guest_name: Some("web\u{1b}01".into()),
            instant: "2026-01-31T02:00:08Z".parse().expect("time"),
            consistency: Consistency {
                freeze_note: Some("no agent".into()),
                paused_micros: 4200,
                ..Consistency::default()
            },
            disks: vec![DiskEntry {
                name: "scsi0".into(),
                device: "drive-scsi0".into(),
                size: 32 << 30,
                segment_len: 1 << 20,
                data_bytes: 7 << 30,
                fine: None,
                digest: "00".into(),
                bitmap_action: "used".into(),
                reason: "bitmap is valid".into(),
                generation: None,
                read_bytes: 1 << 30,
            }],
            skipped: vec![SkippedDisk { name: "scsi1".into(), reason: "backup=0".into() }],
            firewall: false,
        }
    }

    #[test]
    fn a_list_is_an_aligned_table() {
        assert_eq!(
            archive_table(&archives()),
            "ARCHIVE                            ID        DISKS             SIZE    ADDED\n\
             pve-qemu-100-2026-01-31T02:00:07Z  01234567  scsi0,efidisk0  64 GiB  2.1 GiB\n\
             pve-qemu-web-2026-02-01T02:00:07Z  ab        -                    -        -\n"
        );
        assert_eq!(archive_table(&[]), "");
    }

    #[test]
    fn a_list_for_programs_has_full_ids_and_bytes() {
        let text = archive_lines(&archives()).expect("JSON");
        let values: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
        assert_eq!(values.len(), 2);
        assert_eq!(values[0]["schema"], 1);
        assert_eq!(values[0]["type"], "archive");
        assert_eq!(values[0]["id"], "0123456789abcdef");
        assert_eq!(values[0]["guest"], "100");
        assert_eq!(values[0]["time"], "2026-01-31T02:00:07Z");
        assert_eq!(values[0]["size_bytes"], 64u64 << 30);
        assert_eq!(values[1]["added_bytes"], Value::Null);
    }

    #[test]
    fn a_manifest_is_told_with_its_gaps() {
        let text = manifest_text(&ArchiveId("ab12".into()), &manifest());
        assert!(text.contains("guest:       100 web\\u{1b}01 (proxmox)\n"), "{text}");
        assert!(text.contains("consistency: crash consistent, paused for 4 ms (no agent)\n"), "{text}");
        assert!(text.contains("scsi0  32 GiB  7 GiB  1 GiB  used    bitmap is valid\n"), "{text}");
        assert!(text.ends_with("scsi1: not in the archive: backup=0\n"), "{text}");
        let line = manifest_line(&ArchiveId("ab12".into()), &manifest()).expect("JSON");
        let value: Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(value["manifest"]["disks"][0]["data_bytes"], 7u64 << 30);
        assert_eq!((&value["schema"], &value["id"]), (&Value::from(1), &Value::from("ab12")));
        assert_eq!(line.lines().count(), 1);
    }
}
