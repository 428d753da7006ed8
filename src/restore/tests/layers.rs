//! Disks with fine segments over their segments.

use super::*;

/// Segments of 512 KiB: noise, a hole, noise, and one that is not full. Over them lie fine segments: other noise in the first and the
/// last, zeroes in the third, and the only content of the hole.
const FINE: [u64; 5] = [3, 9, 16, 17, 26];

fn long() -> SegmentLen {
    SegmentLen::new(512 << 10).expect("valid")
}

fn before_and_now() -> (Model, Model) {
    let noise = |seed: Option<u8>| [seed; 8];
    let seeds = [noise(Some(1)), noise(None), noise(Some(2)), noise(Some(3))].concat();
    let before = model("scsi0", &seeds[..27], 512);
    let mut now = before.clone();
    for index in FINE {
        let start = index as usize * SEGMENT;
        let end = (start + SEGMENT).min(now.content.len());
        let zero = index == 16 || index == 17;
        now.content[start..end].iter_mut().for_each(|byte| *byte = if zero { 0 } else { !*byte });
    }
    (before, now)
}

fn overlaid() -> Memory {
    let (before, now) = before_and_now();
    Memory::of(&[before], long()).overlaid(&now, long(), &FINE)
}

#[test]
fn fine_segments_overwrite_what_they_lie_over() {
    let temp = temp();
    for format in [ImageFormat::Raw, ImageFormat::Qcow2] {
        let directory = temp.path().join(format!("{format:?}"));
        let report = run(overlaid(), &to_directory(&directory, format)).done();
        assert_eq!(report.disks.len(), 1);
        let raw = match format {
            ImageFormat::Raw => directory.join("scsi0.raw"),
            ImageFormat::Qcow2 => {
                let raw = temp.path().join("converted");
                let converted = Command::new("qemu-img")
                    .args(["convert", "-O", "raw"])
                    .args([&directory.join("scsi0.qcow2"), &raw])
                    .status();
                if !converted.is_ok_and(|status| status.success()) {
                    eprintln!("skipped: qemu-img is not usable here");
                    continue;
                }
                raw
            }
        };
        let found = fs::read(&raw).expect("restored");
        assert!(found[..before_and_now().1.content.len()] == before_and_now().1.content, "{format:?}");
    }
}

#[test]
fn a_disk_that_held_other_things_holds_only_the_archive() {
    let temp = temp();
    let path = temp.path().join("disk");
    let (_, now) = before_and_now();
    fs::write(&path, vec![0xaa; now.content.len()]).expect("written");
    run(overlaid(), &to_path("scsi0", &path, Overwrite::Allowed)).done();
    assert!(fs::read(&path).expect("restored") == now.content);
}

#[test]
fn no_damaged_fine_segment_becomes_a_file() {
    use RestoreErrorKind::{Damaged, Mismatch};
    // The fine segment 9 begins at 576 KiB.
    let cases = [
        (Fault::Corrupt, Mismatch, "content of 65536 bytes at 589824 of disk `scsi0` differs from what was stored"),
        (Fault::Short, Mismatch, "archive returns 65535 instead of 65536 bytes at 589824 of disk `scsi0`"),
        (Fault::Withhold, Damaged, "cannot read 65536 bytes at 589824 of disk `scsi0`"),
    ];
    let temp = temp();
    for (fault, kind, text) in cases {
        let error =
            run(overlaid().fault("scsi0+64k", 9, fault), &to_directory(&temp.path().join("new"), ImageFormat::Raw));
        let error = error.failed();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().starts_with(text), "{fault:?}: {error}");
        assert_eq!(names(temp.path()), [""; 0]);
    }
}

#[test]
fn hostile_tables_of_fine_segments_are_refused_before_anything_is_written() {
    use RestoreErrorKind::{Damaged, Mismatch};
    let temp = temp();
    let refuse = |change: &dyn Fn(&mut Memory)| {
        let mut memory = overlaid();
        change(&mut memory);
        let error = run(memory, &to_directory(&temp.path().join("new"), ImageFormat::Raw)).failed();
        assert_eq!(names(temp.path()), [""; 0], "after {error}");
        error.kind()
    };
    let table = |memory: &mut Memory, change: &dyn Fn(&mut Vec<u8>)| {
        change(memory.tables.get_mut("scsi0+64k").expect("there"));
    };
    let fine = |memory: &mut Memory, change: &dyn Fn(&mut crate::archive::FineEntry)| {
        change(memory.manifest.disks[0].fine.as_mut().expect("there"));
    };
    assert_eq!(refuse(&|m| drop(m.tables.remove("scsi0+64k"))), Damaged);
    assert_eq!(refuse(&|m| table(m, &|t| t.truncate(t.len() - 48))), Mismatch, "one less");
    assert_eq!(refuse(&|m| table(m, &|t| t[40] ^= 1)), Mismatch, "another digest of a segment");
    assert_eq!(refuse(&|m| table(m, &|t| t[8] = 200)), Damaged, "out of order");
    assert_eq!(refuse(&|m| fine(m, &|f| f.segments = 4)), Damaged, "more than the manifest says");
    assert_eq!(refuse(&|m| fine(m, &|f| f.digest = "00".repeat(32))), Mismatch);
    assert_eq!(refuse(&|m| m.manifest.disks[0].fine = None), Mismatch, "less data than the manifest says");
    // The table is not even asked for: it would not fit.
    let far = i64::MAX as u64;
    assert_eq!(
        refuse(&|m| (m.manifest.disks[0].size, m.manifest.disks[0].fine.as_mut().unwrap().segments) = (far, far)),
        Damaged
    );
    assert_eq!(refuse(&|m| m.manifest.version = 1), Damaged, "a version without fine segments");
}
