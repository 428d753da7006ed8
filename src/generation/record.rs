//! The record's file, and the judgement over a disk.

use crate::{archive::ArchiveId, guest::Disk, journal::ProcessIdentity, segment::SegmentLen};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};
use thiserror::Error;

/// Version of the file that is written, and the only one that is trusted.
const VERSION: u32 = 1;

/// What the last committed backup of a disk to a target left: archive and bitmap that belong together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskGeneration {
    /// Id of the run that made it.
    pub generation: String,
    /// The repository that holds the archive.
    pub repository: String,
    /// The archive.
    pub archive: ArchiveId,
    /// The process that keeps the bitmap.
    pub qemu: ProcessIdentity,
    /// QEMU's name of the device.
    pub device: String,
    /// What identifies the image ([`Disk::identity`]).
    pub identity: String,
    /// Node that carries the bitmap; another node means another image.
    pub node: String,
    /// Size in bytes.
    pub size: u64,
    /// Segment length in bytes.
    pub segment_len: u64,
    /// The bitmap.
    pub bitmap: String,
    /// Its granularity in bytes.
    pub granularity: u64,
}

/// The generation records of one guest in one target.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// By disk name.
    disks: BTreeMap<String, DiskGeneration>,
}

/// The present, which a record has to match.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// The target's repository.
    pub repository: &'a str,
    /// The QEMU process.
    pub qemu: &'a ProcessIdentity,
}

/// Why a record cannot be written. It is then removed, which means full backups.
#[derive(Debug, Error)]
#[error("generation record {path} cannot be {doing}")]
pub struct RecordError {
    path: PathBuf,
    doing: &'static str,
    #[source]
    source: io::Error,
}

impl Record {
    fn path(dir: &Path, target: &str, guest: &str) -> PathBuf {
        dir.join(target).join(format!("{guest}.json"))
    }

    /// Reads the record of `guest` in `target`. A record that is missing, damaged or of another version is an empty one and
    /// a reason: nothing in it is trusted.
    pub fn load(dir: &Path, target: &str, guest: &str) -> (Self, Option<String>) {
        let path = Self::path(dir, target, guest);
        let nothing = |why: String| (Self::default(), Some(why));
        match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => nothing("first backup to this target".into()),
            Err(error) => nothing(format!("generation record cannot be read: {error}")),
            Ok(bytes) => Self::parse(&bytes).map_or_else(nothing, |record| (record, None)),
        }
    }

    /// Reads a record's bytes, or says why they are none.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        match serde_json::from_slice::<Self>(bytes) {
            Ok(record) if record.version == VERSION => Ok(record),
            Ok(record) => Err(format!("generation record has version {}", record.version)),
            Err(error) => Err(format!("generation record is damaged: {error}")),
        }
    }

    /// Writes the record durably: to a new file, flushed, renamed, and the directory flushed.
    ///
    /// # Errors
    /// When that fails; the old record is still there then.
    pub fn store(&mut self, dir: &Path, target: &str, guest: &str) -> Result<(), RecordError> {
        self.version = VERSION;
        let path = Self::path(dir, target, guest);
        let error = |doing| {
            let path = path.clone();
            move |source| RecordError { path, doing, source }
        };
        let parent = path.parent().unwrap_or(dir);
        crate::config::create_private_dir(parent).map_err(error("created"))?;
        let mut file = tempfile::NamedTempFile::new_in(parent).map_err(error("created"))?;
        serde_json::to_writer_pretty(&mut file, self).map_err(|e| error("written")(e.into()))?;
        file.write_all(b"\n").and_then(|()| file.as_file().sync_all()).map_err(error("written"))?;
        file.persist(&path).map_err(|e| error("renamed")(e.error))?;
        File::open(parent).and_then(|d| d.sync_all()).map_err(error("flushed"))
    }

    /// Forgets, in every target, what `guest` has there that a bitmap among `bitmaps` is needed for: for each disk, its name
    /// and the bitmaps' names. The next backups of those disks are full. Returns the targets concerned.
    ///
    /// # Errors
    /// When the records cannot be listed, or one not be written.
    pub fn forget_bitmaps(dir: &Path, guest: &str, bitmaps: &[(&str, Vec<&str>)]) -> Result<Vec<String>, RecordError> {
        let listing = |source| RecordError { path: dir.to_owned(), doing: "listed", source };
        let entries = match fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(listing)?,
        };
        let mut targets = Vec::new();
        for entry in entries {
            let Ok(target) = entry.map_err(listing)?.file_name().into_string() else { continue };
            let (mut record, nothing) = Self::load(dir, &target, guest);
            let before = record.disks.len();
            record.disks.retain(|disk, generation| {
                !bitmaps.iter().any(|(name, list)| name == disk && list.contains(&generation.bitmap.as_str()))
            });
            if nothing.is_none() && record.disks.len() < before {
                record.store(dir, &target, guest)?;
                targets.push(target);
            }
        }
        targets.sort();
        Ok(targets)
    }

    /// The newest generation of any disk: what recovery compares with a dead run's.
    pub fn has_generation(&self, generation: &str) -> bool {
        self.disks.values().any(|disk| disk.generation == generation)
    }

    /// A disk's generation.
    pub fn disk(&self, name: &str) -> Option<&DiskGeneration> {
        self.disks.get(name)
    }

    /// Sets a disk's generation.
    pub fn set(&mut self, name: &str, generation: DiskGeneration) {
        self.disks.insert(name.to_owned(), generation);
    }

    /// Forgets a disk: its next backup is full.
    pub fn forget(&mut self, name: &str) {
        self.disks.remove(name);
    }

    /// The generation that an incremental backup of `disk` may build on, or why there is none. The provider has still to
    /// confirm the archive, and QEMU the bitmap.
    ///
    /// # Errors
    /// The reason for a full backup, in words.
    pub fn judge(&self, disk: &Disk, segment_len: SegmentLen, facts: &Facts<'_>) -> Result<&DiskGeneration, String> {
        let Some(old) = self.disks.get(&disk.name) else {
            return Err("first backup of this disk to this target".into());
        };
        if old.repository != facts.repository {
            return Err("the target's repository is another one than at the last backup".into());
        }
        if old.qemu.boot_id != facts.qemu.boot_id {
            return Err("the host was restarted since the last backup".into());
        }
        if old.qemu != *facts.qemu {
            return Err("the guest's QEMU process is another one than at the last backup".into());
        }
        if old.device != disk.device {
            return Err(format!("the disk's device was `{}` at the last backup", old.device));
        }
        if old.identity != disk.identity {
            return Err(format!("the disk's image was `{}` at the last backup", old.identity));
        }
        if old.size != disk.size {
            return Err(format!("the disk was resized from {} to {} bytes", old.size, disk.size));
        }
        if old.segment_len != segment_len.bytes() {
            return Err(format!("the segment length was {} bytes at the last backup", old.segment_len));
        }
        Ok(old)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::DiskKind;

    fn qemu() -> ProcessIdentity {
        ProcessIdentity { pid: 7, start_time: 1, boot_id: "b".into() }
    }

    fn disk() -> Disk {
        Disk {
            name: "scsi0".into(),
            device: "drive-scsi0".into(),
            kind: DiskKind::Drive,
            qdev: "scsi0".into(),
            node: "n".into(),
            driver: "raw".into(),
            size: 1 << 20,
            identity: "/images/a.raw".into(),
            volume: None,
        }
    }

    fn len() -> SegmentLen {
        SegmentLen::new(1 << 20).expect("valid")
    }

    fn record() -> Record {
        let mut record = Record::default();
        record.set(
            "scsi0",
            DiskGeneration {
                generation: "g1".into(),
                repository: "r".into(),
                archive: ArchiveId("a".into()),
                qemu: qemu(),
                device: "drive-scsi0".into(),
                identity: "/images/a.raw".into(),
                node: "n".into(),
                size: 1 << 20,
                segment_len: 1 << 20,
                bitmap: "pvb-t-g1".into(),
                granularity: 1 << 20,
            },
        );
        record
    }

    #[test]
    fn only_a_match_on_every_point_is_trusted() {
        let facts = Facts { repository: "r", qemu: &qemu() };
        assert!(record().judge(&disk(), len(), &facts).is_ok());
        let reason = |disk: Disk, len: SegmentLen, facts: &Facts<'_>| {
            record().judge(&disk, len, facts).expect_err("must be full")
        };
        assert!(reason(disk(), len(), &Facts { repository: "other", qemu: &qemu() }).contains("repository"));
        for (change, word) in [
            (ProcessIdentity { pid: 8, ..qemu() }, "process"),
            (ProcessIdentity { start_time: 2, ..qemu() }, "process"),
            (ProcessIdentity { boot_id: "c".into(), ..qemu() }, "host"),
        ] {
            assert!(reason(disk(), len(), &Facts { repository: "r", qemu: &change }).contains(word));
        }
        assert!(reason(Disk { name: "scsi1".into(), ..disk() }, len(), &facts).contains("first"));
        assert!(reason(Disk { device: "x".into(), ..disk() }, len(), &facts).contains("device"));
        assert!(reason(Disk { identity: "/b".into(), ..disk() }, len(), &facts).contains("image"));
        assert!(reason(Disk { size: 2 << 20, ..disk() }, len(), &facts).contains("resized"));
        assert!(reason(disk(), SegmentLen::new(1 << 21).expect("valid"), &facts).contains("segment"));
    }

    #[test]
    fn a_bitmap_that_lost_its_meaning_is_forgotten_in_every_target_and_no_other_is() {
        let dir = tempfile::tempdir().unwrap();
        let forget = |bitmaps: &[(&str, Vec<&str>)]| Record::forget_bitmaps(dir.path(), "100", bitmaps).unwrap();
        assert!(Record::forget_bitmaps(&dir.path().join("none"), "100", &[]).unwrap().is_empty());
        let mut two = record();
        two.set("scsi1", record().disk("scsi0").unwrap().clone());
        for (target, guest) in [("a", "100"), ("b", "100"), ("a", "101")] {
            two.store(dir.path(), target, guest).unwrap();
        }
        assert!(forget(&[("scsi0", vec!["pvb-t-g2"]), ("scsi2", vec!["pvb-t-g1"])]).is_empty());
        assert_eq!(forget(&[("scsi0", vec!["pvb-t-g2", "pvb-t-g1"])]), ["a", "b"]);
        for target in ["a", "b"] {
            let (left, _) = Record::load(dir.path(), target, "100");
            assert!(left.disk("scsi0").is_none() && left.disk("scsi1").is_some());
        }
        assert!(Record::load(dir.path(), "a", "101").0.disk("scsi0").is_some());
        assert!(forget(&[("scsi0", vec!["pvb-t-g1"])]).is_empty());
    }

    #[test]
    fn a_record_survives_and_damage_means_full() {
        let dir = tempfile::tempdir().expect("directory");
        assert!(Record::load(dir.path(), "t", "100").1.expect("reason").contains("first"));
        let mut stored = record();
        stored.store(dir.path(), "t", "100").expect("stored");
        assert_eq!(Record::load(dir.path(), "t", "100"), (stored.clone(), None));
        assert!(stored.has_generation("g1"));
        let path = dir.path().join("t/100.json");
        let text = fs::read_to_string(&path).expect("read");
        fs::write(&path, &text[..text.len() / 2]).expect("write");
        let (empty, reason) = Record::load(dir.path(), "t", "100");
        assert!(empty.disk("scsi0").is_none() && reason.expect("reason").contains("damaged"));
        fs::write(&path, text.replace("\"version\": 1", "\"version\": 9")).expect("write");
        assert!(Record::load(dir.path(), "t", "100").1.expect("reason").contains("version 9"));
    }
}
