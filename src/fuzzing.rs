//! Everything that reads what a peer, an archive or a file left by a crash may say, as functions over bytes.
//!
//! The fuzzers (`fuzz/`, `scripts/fuzz`) call them with whatever they can think of, the tests with the collected corpus. A
//! function asserts what must hold whatever the bytes are, and tells whether they were understood: seeds that are not would
//! fuzz nothing but the first check.

use crate::{
    archive::{ArchiveName, Manifest},
    generation::{Facts, Record},
    guest::{Disk, DiskKind, proxmox_config},
    journal::{self, ProcessIdentity, Step},
    nbd, provider, qmp,
    segment::{SegmentLen, SegmentTable},
};
use std::future::Future;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

/// A function over bytes, and its name: that of its corpus.
pub struct Target {
    /// Its name.
    pub name: &'static str,
    /// Does what the program does with such bytes. `true` when they were understood.
    pub run: fn(&[u8]) -> bool,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "archive-name", run: archive_name },
    Target { name: "generation-record", run: generation_record },
    Target { name: "guest-agent", run: qmp::fuzzing::agent },
    Target { name: "journal", run: journal },
    Target { name: "manifest", run: manifest },
    Target { name: "nbd-handshake", run: nbd::fuzzing::handshake },
    Target { name: "nbd-replies", run: nbd::fuzzing::replies },
    Target { name: "qcow2-header", run: provider::directory::fuzz_header },
    Target { name: "qmp-graph", run: qmp::fuzzing::graph },
    Target { name: "qmp-proxmox", run: qmp::fuzzing::proxmox },
    Target { name: "qmp-schema", run: qmp::fuzzing::schema },
    Target { name: "segment-table", run: segment_table },
    Target { name: "vm-config", run: vm_config },
];

/// Runs the target of this name.
///
/// # Panics
/// When there is none, and when an assertion does not hold.
pub fn run(name: &str, bytes: &[u8]) -> bool {
    let target = TARGETS.iter().find(|target| target.name == name);
    (target.unwrap_or_else(|| panic!("no fuzz target `{name}`")).run)(bytes)
}

/// Runs a conversation, with a clock that jumps to the next time limit as soon as both sides wait for each other.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    runtime.unwrap_or_else(|error| panic!("no runtime: {error}")).block_on(future)
}

/// A peer that sends `bytes`, whatever it is told, and hangs up.
pub(crate) async fn send_and_leave(mut stream: UnixStream, bytes: Vec<u8>) {
    let (mut from, mut to) = stream.split();
    let ignore = async {
        let mut sink = [0; 4096];
        while from.read(&mut sink).await.is_ok_and(|read| read > 0) {}
    };
    let send = async {
        let _ = to.write_all(&bytes).await;
        let _ = to.shutdown().await;
    };
    tokio::join!(ignore, send);
}

fn archive_name(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let Ok(name) = text.parse::<ArchiveName>() else { return false };
    assert_eq!(name.to_string(), text, "a name has one spelling");
    assert!(!text.contains(['/', '\0', '\n']) && !text.starts_with('.'));
    true
}

fn manifest(bytes: &[u8]) -> bool {
    let Ok(manifest) = Manifest::from_bytes(bytes) else { return false };
    let again = manifest.to_bytes().ok().and_then(|bytes| Manifest::from_bytes(&bytes).ok());
    assert_eq!(again.as_ref(), Some(&manifest));
    for disk in &manifest.disks {
        assert!(!disk.name.contains(['/', '\0']) && !disk.name.starts_with('.'), "{:?}", disk.name);
    }
    true
}

/// The first nine bytes are the power of the segment length and the disk's size.
fn segment_table(bytes: &[u8]) -> bool {
    let Some((&[power, ref size @ ..], table)) = bytes.split_first_chunk::<9>() else { return false };
    let Some(len) = SegmentLen::new(1u64.checked_shl(power.into()).unwrap_or_default()) else { return false };
    let size = u64::from_be_bytes(*size) & i64::MAX as u64;
    let Ok(parsed) = SegmentTable::from_bytes(table, len, size) else { return false };
    assert_eq!(parsed.to_bytes(), table);
    for record in parsed.records() {
        assert!(len.range(record.index, size).is_some_and(|(offset, len)| offset + len <= size));
    }
    assert!(parsed.data_bytes(len, size) <= size);
    true
}

fn journal(bytes: &[u8]) -> bool {
    let steps = journal::parse(bytes).steps;
    let open = journal::not_undone(&steps);
    assert!(open.len() <= steps.len() && open.iter().all(|step| !matches!(step, Step::Undone { .. })));
    for step in &open {
        assert!(!step.label().is_empty());
    }
    !open.is_empty()
}

fn generation_record(bytes: &[u8]) -> bool {
    let Ok(record) = Record::parse(bytes) else { return false };
    let disk = Disk {
        name: "scsi0".into(),
        device: "drive-scsi0".into(),
        kind: DiskKind::Drive,
        qdev: "scsi0".into(),
        node: "disk0".into(),
        driver: "qcow2".into(),
        size: 1 << 30,
        identity: "file /disk0".into(),
        volume: None,
    };
    let qemu = ProcessIdentity { pid: 7, start_time: 1, boot_id: "b".into() };
    let Some(len) = SegmentLen::new(256 << 10) else { return false };
    match record.judge(&disk, len, &Facts { repository: "r", qemu: &qemu }) {
        Ok(old) => {
            assert!(
                old.qemu == qemu && old.repository == "r" && old.size == disk.size && old.identity == disk.identity
            );
            true
        }
        Err(reason) => {
            assert!(!reason.is_empty());
            false
        }
    }
}

fn vm_config(bytes: &[u8]) -> bool {
    let Ok(config) = proxmox_config::ProxmoxConfig::parse(bytes) else { return false };
    let drives: Vec<_> = config.drives.iter().collect();
    let archived = proxmox_config::archived(bytes, &drives);
    assert!(proxmox_config::ProxmoxConfig::parse(&archived).is_ok(), "the archived form is not understood");
    !drives.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::BTreeSet, fs, path::Path};

    fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
        let files = fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())).map(Result::unwrap);
        files.map(|file| (file.path().display().to_string(), fs::read(file.path()).unwrap())).collect()
    }

    /// `seed-*` are good bytes, whatever else is there was found by a fuzzer.
    #[test]
    fn the_corpus_is_survived_and_its_seeds_are_understood() {
        for target in TARGETS {
            let inputs = corpus(target.name);
            let mut seeds = 0;
            for (path, bytes) in &inputs {
                let understood = (target.run)(bytes);
                if path.contains("/seed-") {
                    assert!(understood, "{path} is not understood");
                    seeds += 1;
                }
            }
            assert!(seeds > 0, "no seed for {}", target.name);
        }
    }

    /// A quick look around every seed, so that not only a fuzzer's run finds what is near.
    #[test]
    fn seeds_that_are_cut_or_changed_are_survived() {
        for target in TARGETS {
            for (_, seed) in
                corpus(target.name).iter().filter(|(path, bytes)| path.contains("/seed-") && bytes.len() < 8192)
            {
                for at in (0..seed.len()).step_by(seed.len().div_ceil(64)) {
                    (target.run)(&seed[..at]);
                    for byte in [0, 0xff, b'"', b'9', seed[at] ^ 1] {
                        let mut changed = seed.clone();
                        changed[at] = byte;
                        (target.run)(&changed);
                    }
                }
            }
        }
    }

    #[test]
    fn every_target_has_a_fuzzer() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/fuzz_targets");
        let files = fs::read_dir(dir).unwrap().map(|file| file.unwrap().path());
        let fuzzers: BTreeSet<String> = files.map(|f| f.file_stem().unwrap().to_str().unwrap().to_owned()).collect();
        assert_eq!(fuzzers, TARGETS.iter().map(|target| target.name.to_owned()).collect());
    }
}
