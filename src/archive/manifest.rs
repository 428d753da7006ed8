//! What an archive says about itself: JSON, versioned.

use super::ArchiveName;
use crate::segment::{SegmentLen, SegmentTable};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Version of the format where no disk has fine segments, and where one has: who does not know those must not take the disk
/// without them.
const VERSION: u32 = 1;
const VERSION_WITH_FINE: u32 = 2;
/// No guest has more disks; QEMU's own limits are far below.
const MAX_DISKS: usize = 256;
/// 8 EiB less one byte: what fits a signed file offset.
const MAX_SIZE: u64 = i64::MAX as u64;

/// The manifest of an archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Format version, 1 or 2.
    pub version: u32,
    /// Version of the program that wrote it.
    pub program: String,
    /// The archive's own name.
    pub archive: ArchiveName,
    /// `proxmox` or `plain`.
    pub guest_kind: String,
    /// The guest's own name, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_name: Option<String>,
    /// The instant that the disks show.
    pub instant: Timestamp,
    /// What is known about the guest's state at the instant.
    pub consistency: Consistency,
    /// The disks in the archive.
    pub disks: Vec<DiskEntry>,
    /// Disks of the guest that are not in the archive, and why.
    #[serde(default)]
    pub skipped: Vec<SkippedDisk>,
    /// Whether the archive has a firewall configuration.
    #[serde(default)]
    pub firewall: bool,
}

/// How the disks were held still at the instant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Consistency {
    /// Whether the guest agent had frozen the file systems.
    pub frozen: bool,
    /// Why not, if not; or what else is worth knowing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze_note: Option<String>,
    /// How long the file systems were frozen, in milliseconds.
    #[serde(default)]
    pub frozen_millis: u64,
    /// How long the guest's processors were paused by us, in microseconds; 0 when they were not.
    #[serde(default)]
    pub paused_micros: u64,
    /// Whether the guest was already paused by somebody else.
    #[serde(default)]
    pub was_paused: bool,
}

/// One disk in an archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskEntry {
    /// Name as shown: `scsi0`.
    pub name: String,
    /// QEMU's name of the device: `drive-scsi0`.
    pub device: String,
    /// Size in bytes.
    pub size: u64,
    /// Segment length in bytes.
    pub segment_len: u64,
    /// Bytes of segments of which anything is stored (the rest is zero).
    pub data_bytes: u64,
    /// Hex BLAKE3 of the segment table, see [`crate::segment::SegmentTable::digest`].
    pub digest: String,
    /// The fine segments that lie over them, if there are any, see [`crate::segment::layers`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fine: Option<FineEntry>,
    /// What was done with the dirty bitmap: `new`, `used`, `missing-recreated`, `not-used`.
    pub bitmap_action: String,
    /// Why the disk was read in full or incrementally.
    pub reason: String,
    /// Id of the generation that this backup starts for the disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<String>,
    /// Bytes that were read from the export.
    #[serde(default)]
    pub read_bytes: u64,
}

/// The fine segments of a disk in an archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FineEntry {
    /// How many are stored.
    pub segments: u64,
    /// Hex BLAKE3 of their table, as [`DiskEntry::digest`].
    pub digest: String,
}

impl FineEntry {
    /// The entry of these; `None` for none.
    pub fn of(table: &SegmentTable) -> Option<Self> {
        let segments = table.records().len() as u64;
        (segments > 0).then(|| Self { segments, digest: table.digest_hex() })
    }
}

/// A disk of the guest that is not in the archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SkippedDisk {
    /// Name as shown.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// Why bytes are no manifest that can be acted on.
#[derive(Debug, Error)]
pub enum ManifestError {
    /// Not JSON of the right shape.
    #[error("manifest cannot be read")]
    Json(#[from] serde_json::Error),
    /// A newer format.
    #[error("manifest has version {0}, this program reads versions up to {VERSION_WITH_FINE}")]
    Version(u32),
    /// A value that no backup of ours would have.
    #[error("manifest is not plausible: {0}")]
    Implausible(String),
}

impl DiskEntry {
    /// The segment length, checked when the manifest was read.
    ///
    /// # Errors
    /// When the number is none of the allowed lengths.
    pub fn segments(&self) -> Result<SegmentLen, ManifestError> {
        SegmentLen::new(self.segment_len)
            .ok_or_else(|| ManifestError::Implausible(format!("segment length {}", self.segment_len)))
    }
}

/// Whether a name can be a file name inside a directory without meaning anything else.
fn is_plain_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && name.as_bytes()[0].is_ascii_alphanumeric()
}

impl Manifest {
    /// Number of the format where no disk has fine segments.
    pub const VERSION: u32 = VERSION;

    /// The manifest with these disks, and the number of the format that they need.
    #[must_use]
    pub fn with_disks(self, disks: Vec<DiskEntry>) -> Self {
        let fine = disks.iter().any(|disk| disk.fine.is_some());
        Self { version: if fine { VERSION_WITH_FINE } else { VERSION }, disks, ..self }
    }

    /// As stored in archives.
    ///
    /// # Errors
    /// Never in practice: all members can be written as JSON.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ManifestError> {
        let mut bytes = serde_json::to_vec_pretty(self)?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Reads a manifest from an archive, which is not trusted: version, names, sizes and counts are checked.
    ///
    /// # Errors
    /// When anything about it is not what this program writes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ManifestError> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let Version { version } = serde_json::from_slice(bytes)?;
        if !(VERSION..=VERSION_WITH_FINE).contains(&version) {
            return Err(ManifestError::Version(version));
        }
        let manifest: Self = serde_json::from_slice(bytes)?;
        let implausible = |what: String| Err(ManifestError::Implausible(what));
        if manifest.disks.len() > MAX_DISKS {
            return implausible(format!("{} disks", manifest.disks.len()));
        }
        let mut names = std::collections::HashSet::new();
        for disk in &manifest.disks {
            if !is_plain_name(&disk.name) {
                return implausible(format!("disk name {:?}", disk.name));
            }
            if !names.insert(&disk.name) {
                return implausible(format!("disk `{}` is listed twice", disk.name));
            }
            if disk.size > MAX_SIZE {
                return implausible(format!("disk `{}` has {} bytes", disk.name, disk.size));
            }
            if disk.data_bytes > disk.size {
                return implausible(format!("disk `{}` has more data than bytes", disk.name));
            }
            if disk.fine.is_some() && version < VERSION_WITH_FINE {
                return implausible(format!("fine segments of disk `{}` in version {version}", disk.name));
            }
            disk.segments()?;
        }
        Ok(manifest)
    }

    /// The entry of a disk.
    pub fn disk(&self, name: &str) -> Option<&DiskEntry> {
        self.disks.iter().find(|d| d.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn manifest() -> Manifest {
        Manifest {
            version: VERSION,
            program: "0.1.0".into(),
            archive: "pve-qemu-100-2026-01-31T02:00:07Z".parse().expect("name"),
            guest_kind: "proxmox".into(),
            guest_name: Some("web01".into()),
            instant: "2026-01-31T02:00:08Z".parse().expect("time"),
            consistency: Consistency::default(),
            disks: vec![DiskEntry {
                name: "scsi0".into(),
                device: "drive-scsi0".into(),
                size: 1 << 30,
                segment_len: 1 << 20,
                data_bytes: 1 << 20,
                digest: "00".into(),
                fine: None,
                bitmap_action: "new".into(),
                reason: "first backup".into(),
                generation: None,
                read_bytes: 0,
            }],
            skipped: Vec::new(),
            firewall: false,
        }
    }

    #[test]
    fn a_manifest_survives_the_archive_and_unknown_members() {
        let bytes = manifest().to_bytes().expect("json");
        assert_eq!(Manifest::from_bytes(&bytes).expect("ours"), manifest());
        let text = String::from_utf8(bytes).expect("utf-8").replacen('{', "{\"later\": 1,", 1);
        assert_eq!(Manifest::from_bytes(text.as_bytes()).expect("ours"), manifest());
    }

    #[test]
    fn hostile_manifests_are_refused() {
        let refuse = |change: fn(&mut Manifest)| {
            let mut bad = manifest();
            change(&mut bad);
            Manifest::from_bytes(&bad.to_bytes().expect("json")).expect_err("must be refused").to_string()
        };
        assert!(refuse(|m| m.version = 3).contains("version 3"));
        assert!(refuse(|m| m.disks[0].name = "../etc".into()).contains("disk name"));
        assert!(refuse(|m| m.disks[0].name = "/dev/sda".into()).contains("disk name"));
        assert!(refuse(|m| m.disks[0].name = ".".into()).contains("disk name"));
        assert!(refuse(|m| m.disks[0].name = String::new()).contains("disk name"));
        assert!(refuse(|m| m.disks[0].size = u64::MAX).contains("bytes"));
        assert!(
            refuse(|m| m.disks[0].fine = Some(FineEntry { segments: 1, digest: "00".into() }))
                .contains("fine segments")
        );
        assert!(refuse(|m| m.disks[0].name = "scsi0+64k".into()).contains("disk name"));
        assert!(refuse(|m| m.disks[0].segment_len = 3).contains("segment length"));
        assert!(refuse(|m| m.disks[0].data_bytes = u64::MAX).contains("more data"));
        assert!(refuse(|m| m.disks.push(m.disks[0].clone())).contains("twice"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_error_or_a_manifest(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Manifest::from_bytes(&bytes);
        }
    }
}
