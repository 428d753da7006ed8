//! Archives that are broken or hostile: what is said, and that nothing is left.

use super::*;
use crate::{
    archive::Manifest,
    provider::ErrorKind,
    segment::{SegmentRecord, SegmentTable},
};
use std::error::Error;

/// Restores into a directory that does not exist yet; it must not exist afterwards.
fn fails(memory: Memory, format: ImageFormat) -> RestoreError {
    let temp = temp();
    let error = run(memory, &to_directory(&temp.path().join("new"), format)).failed();
    assert_eq!(names(temp.path()), [""; 0], "after {error}");
    error
}

#[test]
fn no_damaged_segment_becomes_a_file() {
    use RestoreErrorKind::{Damaged, Io, Mismatch, Provider};
    // Segment 5 of scsi0 begins at 320 KiB.
    let cases = [
        (Fault::Corrupt, Mismatch, "content of 65536 bytes at 327680 of disk `scsi0` differs from what was stored"),
        (Fault::Short, Mismatch, "archive returns 65535 instead of 65536 bytes at 327680 of disk `scsi0`"),
        (Fault::Long, Mismatch, "archive returns 65537 instead of 65536 bytes at 327680 of disk `scsi0`"),
        (Fault::Withhold, Damaged, "cannot read 65536 bytes at 327680 of disk `scsi0`"),
        (Fault::Fail, Provider(ErrorKind::Other), "cannot read 65536 bytes at 327680 of disk `scsi0`"),
        (Fault::Panic, Io, "reading of disk `scsi0` ended unexpectedly"),
    ];
    for format in [ImageFormat::Raw, ImageFormat::Qcow2] {
        for (fault, kind, text) in cases {
            let error = fails(archive().fault("scsi0", 5, fault), format);
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().starts_with(text), "{fault:?}: {error}");
        }
    }
}

#[test]
fn damage_of_the_last_disk_takes_all_away() {
    let error = fails(archive().fault("efidisk0", 1, Fault::Corrupt), ImageFormat::Raw);
    assert_eq!(error.to_string().split(" of disk").next(), Some("content of 4096 bytes at 65536"));
}

#[test]
fn the_first_failure_stops_the_reading() {
    let seeds = vec![Some(1); 500];
    let memory = Memory::of(&[model("scsi0", &seeds, 0)], segment_len()).fault("scsi0", 0, Fault::Fail);
    let memory = Arc::new(memory);
    let temp = temp();
    run_with(&memory, &to_directory(temp.path(), ImageFormat::Raw), &CancellationToken::new()).failed();
    assert!(memory.reads() < 250, "{} reads", memory.reads());
}

#[test]
fn hostile_manifests_are_refused_before_anything_is_written() {
    let refuse = |change: fn(&mut Manifest)| {
        let mut memory = archive();
        change(&mut memory.manifest);
        let error = fails(memory, ImageFormat::Raw);
        let cause = error.source().map(ToString::to_string).unwrap_or_default();
        (error.kind(), format!("{error}: {cause}"))
    };
    let (kind, text) = refuse(|m| m.disks[0].name = "../../etc/cron.d/x".into());
    assert_eq!((kind, text.contains("disk name")), (RestoreErrorKind::Damaged, true), "{text}");
    let (kind, text) = refuse(|m| m.disks[0].size = u64::MAX);
    assert_eq!((kind, text.contains("18446744073709551615 bytes")), (RestoreErrorKind::Damaged, true), "{text}");
    let (kind, text) = refuse(|m| m.version = 7);
    assert_eq!((kind, text.contains("version 7")), (RestoreErrorKind::Damaged, true), "{text}");
    let (kind, text) = refuse(|m| m.disks[0].digest = "00".repeat(32));
    assert_eq!((kind, text.contains("digest")), (RestoreErrorKind::Mismatch, true), "{text}");
    let (kind, text) = refuse(|m| m.disks[0].digest = "x".repeat(1 << 20));
    assert_eq!((kind, text.len() < 500), (RestoreErrorKind::Mismatch, true), "{text}");
    let (kind, text) = refuse(|m| m.disks[0].data_bytes += 512);
    assert_eq!((kind, text.contains("lists 262144 bytes")), (RestoreErrorKind::Mismatch, true), "{text}");
    // The table is not even asked for: its length could not be bounded.
    let (kind, text) = refuse(|m| (m.disks[0].size, m.disks[0].data_bytes) = (i64::MAX as u64, i64::MAX as u64));
    assert_eq!((kind, text.contains("at most 1073741824 are read")), (RestoreErrorKind::Damaged, true), "{text}");
    // The disk became shorter than its table.
    let (kind, text) = refuse(|m| (m.disks[0].size, m.disks[0].data_bytes) = (5 << 16, 2 << 16));
    assert_eq!(kind, RestoreErrorKind::Damaged, "{text}");
    let (kind, _) = refuse(|m| m.disks.clear());
    assert_eq!(kind, RestoreErrorKind::Usage);
}

#[test]
fn hostile_tables_and_members_are_refused_before_anything_is_written() {
    let with_table = |bytes: Vec<u8>| {
        let mut memory = archive();
        memory.tables.insert("scsi0".into(), bytes);
        fails(memory, ImageFormat::Raw).kind()
    };
    let table = archive().tables["scsi0"].clone();
    assert_eq!(with_table(Vec::new()), RestoreErrorKind::Damaged);
    assert_eq!(with_table(table[..table.len() - 1].to_vec()), RestoreErrorKind::Damaged);
    assert_eq!(with_table(vec![0; 1 << 20]), RestoreErrorKind::Damaged, "longer than the disk allows");
    assert_eq!(with_table(table[..table.len() - 48].to_vec()), RestoreErrorKind::Mismatch, "a record less");
    let mut changed = table.clone();
    changed[30] ^= 1;
    assert_eq!(with_table(changed), RestoreErrorKind::Mismatch, "another digest of a segment");

    // Table and manifest agree with each other about a segment behind the end.
    let mut behind = SegmentTable::new();
    behind.push(SegmentRecord { index: 8, stored_at: 0, digest: [0; 32] }).expect("first");
    let mut memory = archive();
    memory.manifest.disks[0].digest = behind.digest_hex();
    memory.manifest.disks[0].data_bytes = 0;
    memory.tables.insert("scsi0".into(), behind.to_bytes());
    let error = fails(memory, ImageFormat::Raw);
    assert_eq!(error.source().map(ToString::to_string).as_deref(), Some("segment 8 lies behind the end of the disk"));

    let mut memory = archive();
    memory.tables.remove("scsi0");
    assert_eq!(fails(memory, ImageFormat::Raw).kind(), RestoreErrorKind::Damaged);
    for (name, bytes) in [("manifest.json", b"{".to_vec()), ("guest.conf", vec![b'#'; 5 << 20])] {
        let mut memory = archive();
        memory.members.insert(name.into(), bytes);
        assert_eq!(fails(memory, ImageFormat::Raw).kind(), RestoreErrorKind::Damaged, "{name}");
    }
}

#[test]
fn cancelling_before_and_in_the_middle_leaves_nothing() {
    let temp = temp();
    let request = to_directory(&temp.path().join("new"), ImageFormat::Qcow2);
    let cancel = CancellationToken::new();
    cancel.cancel();
    let memory = Arc::new(archive());
    let error = run_with(&memory, &request, &cancel).failed();
    assert_eq!((error.kind(), memory.reads()), (RestoreErrorKind::Cancelled, 0));

    for read in [0, 3, 5] {
        let cancel = CancellationToken::new();
        let token = cancel.clone();
        let memory = archive().before_reads(move |number| {
            if number == read {
                token.cancel();
            }
        });
        let error = run_with(&Arc::new(memory), &request, &cancel).failed();
        assert!(matches!(error, RestoreError::Cancelled), "{error}");
        assert_eq!(names(temp.path()), [""; 0]);
    }
}

#[test]
fn a_disk_of_an_impossible_size_is_an_error_at_once() {
    for (format, size) in [(ImageFormat::Qcow2, i64::MAX as u64), (ImageFormat::Qcow2, (2 << 50) + 512)] {
        let mut memory = archive();
        let empty = SegmentTable::new();
        let entry = &mut memory.manifest.disks[0];
        (entry.size, entry.data_bytes) = (size, 0);
        entry.digest = empty.digest_hex();
        memory.tables.insert("scsi0".into(), empty.to_bytes());
        let error = fails(memory, format);
        assert_eq!(error.kind(), RestoreErrorKind::Io, "{error}");
    }
}
