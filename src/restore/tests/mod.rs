//! Whole restores of archives in memory.

mod damage;
mod layers;
pub(crate) mod memory;
mod targets;

use super::{
    Destination, DiskSelection, ImageFormat, Overwrite, RestoreError, RestoreErrorKind, RestoreReport, RestoreRequest,
    restore,
};
use crate::{
    report::{Collector, Event, Events},
    segment::SegmentLen,
};
use memory::{Fault, Memory, Model};
use proptest::prelude::*;
use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

const SEGMENT: usize = 64 << 10;

fn segment_len() -> SegmentLen {
    SegmentLen::new(SEGMENT as u64).expect("valid")
}

/// A disk whose segments are holes or noise, by seed.
fn model(name: &'static str, seeds: &[Option<u8>], tail: usize) -> Model {
    let mut content = Vec::with_capacity(seeds.len() * SEGMENT);
    for (index, seed) in seeds.iter().enumerate() {
        let mut state = seed.map_or(0, |s| (index as u64) << 8 | u64::from(s) | 1 << 40);
        content.extend((0..SEGMENT).map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        }));
    }
    content.truncate(content.len() - tail);
    Model { name, content }
}

/// Holes at both ends and in the middle, and a last segment that is not full.
fn disks() -> Vec<Model> {
    let scsi0 = [None, Some(1), Some(2), None, None, Some(3), Some(4), None];
    vec![model("scsi0", &scsi0, 0), model("efidisk0", &[Some(9), Some(8)], SEGMENT - 4096)]
}

fn archive() -> Memory {
    Memory::of(&disks(), segment_len())
}

fn to_directory(path: &Path, format: ImageFormat) -> RestoreRequest {
    let destination = Destination::Directory { path: path.to_owned(), disks: DiskSelection::All };
    RestoreRequest { destination, format, overwrite: Overwrite::Refused }
}

fn to_path(disk: &str, path: &Path, overwrite: Overwrite) -> RestoreRequest {
    let destination = Destination::Disks(vec![(disk.to_owned(), path.to_owned())]);
    RestoreRequest { destination, format: ImageFormat::Raw, overwrite }
}

struct Run {
    result: Result<RestoreReport, RestoreError>,
    log: Arc<Collector>,
}

impl Run {
    fn done(self) -> RestoreReport {
        self.result.expect("restores")
    }

    fn failed(self) -> RestoreError {
        self.result.expect_err("must fail")
    }
}

fn run(memory: Memory, request: &RestoreRequest) -> Run {
    run_with(&Arc::new(memory), request, &CancellationToken::new())
}

fn run_with(memory: &Arc<Memory>, request: &RestoreRequest, cancel: &CancellationToken) -> Run {
    let log = Arc::new(Collector::new());
    let result = restore(memory.as_ref(), request, &Events::new("100", log.clone()), cancel);
    Run { result, log }
}

fn temp() -> TempDir {
    tempfile::tempdir().expect("temporary directory")
}

fn names(directory: &Path) -> Vec<String> {
    let Ok(list) = fs::read_dir(directory) else { return Vec::new() };
    let mut names: Vec<String> = list.map(|e| e.expect("entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn has_program(name: &str, argument: &str) -> bool {
    let found = Command::new(name).arg(argument).output().is_ok_and(|o| o.status.success());
    if !found {
        eprintln!("skipped: {name} is not usable here");
    }
    found
}

fn qemu_img(arguments: &[&str], paths: &[&Path]) {
    let output = Command::new("qemu-img").args(arguments).args(paths).output().expect("qemu-img");
    assert!(
        output.status.success(),
        "qemu-img {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn a_directory_holds_the_disks_and_the_other_members() {
    let temp = temp();
    let directory = temp.path().join("deep/er");
    let run = run(archive(), &to_directory(&directory, ImageFormat::Raw));
    let progress: Vec<(String, u64, u64)> = (run.log.events().into_iter())
        .filter_map(|(_, e)| if let Event::Progress { disk, done, todo } = e { Some((disk, done, todo)) } else { None })
        .collect();
    let report = run.done();
    assert_eq!(names(&directory), ["efidisk0.raw", "firewall.conf", "guest.conf", "manifest.json", "scsi0.raw"]);
    for disk in disks() {
        let path = directory.join(format!("{}.raw", disk.name));
        assert!(fs::read(&path).expect("disk") == disk.content, "{}", disk.name);
        let last = progress.iter().rfind(|(name, ..)| name == disk.name).expect("progress");
        assert_eq!(last.1, last.2);
    }
    assert_eq!(fs::read(directory.join("guest.conf")).expect("file"), b"cores: 2\n");
    assert_eq!(fs::read(directory.join("manifest.json")).expect("file"), archive().manifest.to_bytes().expect("json"));
    let mode = |path: &Path| path.metadata().expect("there").permissions().mode() & 0o777;
    assert_eq!(mode(&directory), 0o700);
    for name in names(&directory) {
        assert_eq!(mode(&directory.join(name)), 0o600);
    }
    assert_eq!(report.disks[0].written_bytes, 4 * SEGMENT as u64);
    assert_eq!(report.disks[0].zero_bytes, 4 * SEGMENT as u64);
    assert_eq!(report.disks[1].size_bytes, SEGMENT as u64 + 4096);
    assert_eq!(report.files.len(), 3);
    assert!(report.line().starts_with("pve-qemu-100-2026-01-31T02:00:07Z: restored 2 disks, 580 KiB, "), "{report:?}");
}

#[test]
fn chosen_disks_are_the_only_ones() {
    let temp = temp();
    let only = |names: &[&str]| RestoreRequest {
        destination: Destination::Directory {
            path: temp.path().to_owned(),
            disks: DiskSelection::Only(names.iter().map(|n| (*n).to_owned()).collect()),
        },
        format: ImageFormat::Raw,
        overwrite: Overwrite::Refused,
    };
    let error = run(archive(), &only(&["scsi9"])).failed();
    assert_eq!(error.kind(), RestoreErrorKind::NotFound);
    assert!(error.to_string().ends_with("has no disk `scsi9`, only: scsi0, efidisk0"), "{error}");
    assert!(matches!(run(archive(), &only(&["scsi0", "scsi0"])).failed(), RestoreError::DiskTwice(_)));
    assert!(matches!(run(archive(), &only(&[])).failed(), RestoreError::NoDisks));
    assert_eq!(names(temp.path()), [""; 0]);
    run(archive(), &only(&["efidisk0"])).done();
    assert_eq!(names(temp.path()), ["efidisk0.raw", "firewall.conf", "guest.conf", "manifest.json"]);
}

#[test]
fn a_missing_configuration_does_not_keep_the_disks_back() {
    let temp = temp();
    let mut memory = archive();
    memory.members.clear();
    let run = run(memory, &to_directory(temp.path(), ImageFormat::Raw));
    assert_eq!(run.log.warnings().len(), 2);
    assert_eq!(run.done().missing, ["guest.conf", "firewall.conf"]);
    assert_eq!(names(temp.path()), ["efidisk0.raw", "manifest.json", "scsi0.raw"]);
}

#[test]
fn a_disk_without_bytes_is_a_disk() {
    let temp = temp();
    let memory = Memory::of(&[Model { name: "scsi0", content: Vec::new() }], segment_len());
    run(memory, &to_directory(temp.path(), ImageFormat::Raw)).done();
    assert_eq!(temp.path().join("scsi0.raw").metadata().expect("there").len(), 0);
}

fn seeds() -> impl Strategy<Value = Vec<Option<u8>>> {
    prop::collection::vec(prop::option::of(any::<u8>()), 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn a_raw_disk_is_the_model_and_its_holes_are_holes(seeds in seeds(), tail in 0..SEGMENT) {
        let temp = temp();
        let disk = model("scsi0", &seeds, tail);
        let report = run(Memory::of(std::slice::from_ref(&disk), segment_len()), &to_directory(temp.path(), ImageFormat::Raw));
        let report = report.done();
        let path = temp.path().join("scsi0.raw");
        prop_assert!(fs::read(&path).expect("disk") == disk.content);
        let written = report.disks[0].written_bytes;
        prop_assert!(path.metadata().expect("there").blocks() * 512 <= written + 8192);
        prop_assert_eq!(written + report.disks[0].zero_bytes, disk.content.len() as u64);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]

    #[test]
    fn a_qcow2_disk_is_the_model(seeds in seeds(), tail in 0..SEGMENT) {
        if !has_program("qemu-img", "--version") {
            return Ok(());
        }
        let temp = temp();
        let disk = model("scsi0", &seeds, tail);
        run(Memory::of(std::slice::from_ref(&disk), segment_len()), &to_directory(temp.path(), ImageFormat::Qcow2)).done();
        let path = temp.path().join("scsi0.qcow2");
        let back = temp.path().join("back.raw");
        qemu_img(&["check", "-f", "qcow2"], &[&path]);
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw"], &[&path, &back]);
        let mut expected = disk.content.clone();
        expected.resize(expected.len().next_multiple_of(512), 0);
        prop_assert!(fs::read(&back).expect("converted") == expected);
    }
}

#[test]
fn large_qcow2_images_with_many_writers_are_sound() {
    if !has_program("qemu-img", "--version") {
        return;
    }
    // 40 GiB of mostly nothing in segments of 1 MiB: several L1 entries, L2 tables allocated by many threads at once.
    let temp = temp();
    let len = SegmentLen::new(1 << 20).expect("valid");
    let small = model("scsi0", &[Some(5); 16], 0);
    let mut memory = Memory::of(&[Model { name: "scsi0", content: small.content }], len);
    memory.spread("scsi0", len, 40 << 30, 32);
    let memory = Arc::new(memory);
    run_with(&memory, &to_directory(temp.path(), ImageFormat::Qcow2), &CancellationToken::new()).done();
    run_with(&memory, &to_directory(&temp.path().join("raw"), ImageFormat::Raw), &CancellationToken::new()).done();
    let (qcow2, raw) = (temp.path().join("scsi0.qcow2"), temp.path().join("raw/scsi0.raw"));
    qemu_img(&["check", "-f", "qcow2"], &[&qcow2]);
    qemu_img(&["compare", "-f", "qcow2", "-F", "raw"], &[&qcow2, &raw]);
    assert!(raw.metadata().expect("there").blocks() * 512 < 64 << 20, "sparse");
}
