//! Repositories in temporary directories, and disks to put into them.

use bytes::Bytes;
use jiff::{Timestamp, ToSpan};
use pvebackup::{
    archive::{ArchiveId, ArchiveName, Consistency, DiskEntry, Manifest},
    provider::{
        ArchiveReader, BackupInput, DiskInput, DiskQuery, Incremental, Outcome, Provider, ProviderError, SourceError,
        Stored,
        directory::{DirectoryOptions, DirectoryProvider},
    },
    segment::{DiskTables, Segment, SegmentData, SegmentLen, SegmentTable},
};
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

pub const LEN: u64 = 128 << 10;
/// An odd size: the last segment is short, and no whole number of sectors.
pub const SIZE: u64 = 300 * LEN + 700;
pub const SEGMENTS: u64 = 301;

pub fn segment_len() -> SegmentLen {
    SegmentLen::new(LEN).unwrap()
}

/// A disk as the guest sees it: content by segment; what is not there is zero.
pub type Content = BTreeMap<u64, Vec<u8>>;

/// Bytes that are different for every seed and segment.
pub fn segment_bytes(seed: u64, index: u64) -> Vec<u8> {
    let mut bytes = vec![0; segment_len().range(index, SIZE).unwrap().1 as usize];
    blake3::Hasher::new().update(&(seed ^ (index << 32)).to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// A changed segment: its index and content, or zeroes.
pub type Change = Result<(u64, Option<Vec<u8>>), SourceError>;

/// One disk of a backup to be made.
pub struct Disk {
    pub name: &'static str,
    pub base: Option<(ArchiveId, SegmentTable)>,
    pub changes: Vec<Change>,
}

impl Disk {
    pub fn full(name: &'static str, content: &Content) -> Self {
        Self { name, base: None, changes: content.iter().map(|(i, b)| Ok((*i, Some(b.clone())))).collect() }
    }
}

/// Counts of segments: taken over, and only dropped.
#[derive(Clone, Default)]
pub struct Watch {
    pub stored: Arc<AtomicU64>,
    pub dropped: Arc<AtomicU64>,
}

pub struct Fixture {
    _dir: Option<TempDir>,
    pub root: PathBuf,
    pub provider: DirectoryProvider,
    pub clock: Timestamp,
    pub watch: Watch,
    pub cancel: CancellationToken,
}

impl Fixture {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("repository");
        let provider = DirectoryProvider::init(&DirectoryOptions::new(&root)).unwrap();
        Self::with(Some(dir), root, provider)
    }

    /// The repository of another fixture.
    pub fn opened(root: PathBuf) -> Self {
        let provider = DirectoryProvider::open(&DirectoryOptions::new(&root)).unwrap();
        Self::with(None, root, provider)
    }

    pub fn with(dir: Option<TempDir>, root: PathBuf, provider: DirectoryProvider) -> Self {
        Self {
            _dir: dir,
            root,
            provider,
            clock: "2026-01-31T02:00:07Z".parse().unwrap(),
            watch: Watch::default(),
            cancel: CancellationToken::new(),
        }
    }

    pub fn archive(&self, id: &ArchiveId) -> PathBuf {
        self.root.join(&id.0)
    }

    pub fn image(&self, id: &ArchiveId, disk: &str) -> PathBuf {
        self.archive(id).join(format!("{disk}.qcow2"))
    }

    /// Names in the guest's directory that end so.
    pub fn ending(&self, end: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.root.join("100")) else { return Vec::new() };
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name.ends_with(end));
        names.sort();
        names
    }

    pub fn begin(&mut self) -> ArchiveName {
        self.clock = self.clock.checked_add(1.hour()).unwrap();
        self.provider.backup_init("100", self.clock).unwrap()
    }

    pub fn backup(&mut self, disks: Vec<Disk>) -> Result<Stored, ProviderError> {
        let name = self.begin();
        let input = self.input(name, disks);
        self.finish(input)
    }

    pub fn finish(&mut self, input: BackupInput) -> Result<Stored, ProviderError> {
        let stored = self.provider.backup(input);
        let outcome = stored.as_ref().map_or_else(|e| Outcome::Failure(e.to_string()), |_| Outcome::Success);
        self.provider.backup_cleanup(&outcome)?;
        self.provider.handle_log(&format!("{outcome:?}\n"))?;
        stored
    }

    pub fn input(&self, archive: ArchiveName, disks: Vec<Disk>) -> BackupInput {
        let instant = self.clock.checked_add(250.microseconds()).unwrap();
        let make = {
            let archive = archive.clone();
            let names: Vec<String> = disks.iter().map(|d| d.name.to_owned()).collect();
            move |tables: &[DiskTables]| manifest(archive, instant, &names, tables)
        };
        let disks = disks.into_iter().map(|disk| {
            let watch = self.watch.clone();
            let changed = disk.changes.into_iter().map(move |change| {
                let (index, bytes) = change?;
                let data = bytes.map(|bytes| {
                    let watch = watch.clone();
                    SegmentData::new(Bytes::from(bytes), move |stored| {
                        let count = if stored { &watch.stored } else { &watch.dropped };
                        count.fetch_add(1, Ordering::Relaxed);
                    })
                });
                Ok(Segment { index, data })
            });
            DiskInput {
                name: disk.name.into(),
                size: SIZE,
                segment_len: segment_len(),
                base: disk.base,
                expected: Vec::new(),
                changed: Box::new(changed),
                fine: None,
            }
        });
        BackupInput {
            archive,
            instant,
            members: vec![("guest.conf".into(), b"cores: 2\n".to_vec()), ("firewall.conf".into(), Vec::new())],
            disks: disks.collect(),
            manifest: Box::new(make),
            cancel: self.cancel.clone(),
        }
    }

    pub fn query(&mut self, base: &ArchiveId, name: &str) -> Incremental {
        let query = DiskQuery { name: name.into(), size: SIZE, segment_len: segment_len(), base: base.clone() };
        self.provider.query_incremental(&[query]).unwrap().remove(0)
    }

    #[track_caller]
    pub fn use_base(&mut self, base: &ArchiveId, name: &str) -> (ArchiveId, SegmentTable) {
        match self.query(base, name) {
            Incremental::Use(tables) => (base.clone(), tables.segments),
            Incremental::New(reason) => panic!("not confirmed: {reason}"),
        }
    }

    #[track_caller]
    pub fn refused(&mut self, base: &ArchiveId, name: &str) -> String {
        match self.query(base, name) {
            Incremental::Use(_) => panic!("must not be confirmed"),
            Incremental::New(reason) => reason,
        }
    }

    pub fn restored(&mut self, archive: &ArchiveId, name: &str) -> Content {
        restored(self.provider.open(archive).unwrap().as_ref(), name)
    }

    /// After a failure: nothing listed, nothing half, and the repository still good for the next backup.
    #[track_caller]
    pub fn assert_nothing_stored(&mut self, archives: usize) {
        assert_eq!(self.provider.list(None).unwrap().len(), archives);
        assert!(self.ending(".partial").is_empty());
        let content: Content = [(3, segment_bytes(99, 3))].into();
        let good = self.backup(vec![Disk::full("scsi0", &content)]).unwrap();
        assert_eq!(self.restored(&good.id, "scsi0"), content);
    }
}

pub fn manifest(archive: ArchiveName, instant: Timestamp, names: &[String], tables: &[DiskTables]) -> Manifest {
    let disks = names.iter().zip(tables).map(|(name, tables)| DiskEntry {
        name: name.clone(),
        device: format!("drive-{name}"),
        size: SIZE,
        segment_len: LEN,
        data_bytes: tables.segments.data_bytes(segment_len(), SIZE),
        fine: None,
        digest: tables.segments.digest_hex(),
        bitmap_action: "new".into(),
        reason: "test".into(),
        generation: None,
        read_bytes: 0,
    });
    Manifest {
        version: Manifest::VERSION,
        program: "test".into(),
        archive,
        guest_kind: "plain".into(),
        guest_name: None,
        instant,
        consistency: Consistency::default(),
        disks: disks.collect(),
        skipped: Vec::new(),
        firewall: true,
    }
}

pub fn restored(reader: &dyn ArchiveReader, name: &str) -> Content {
    let manifest = Manifest::from_bytes(&reader.member("manifest.json", 1 << 20).unwrap()).unwrap();
    let table = SegmentTable::from_bytes(&reader.table(name, 1 << 20).unwrap(), segment_len(), SIZE).unwrap();
    assert_eq!(table.digest_hex(), manifest.disk(name).expect("disk").digest, "table and manifest belong together");
    let segment = |index: u64, digest: [u8; 32]| {
        let len = segment_len().range(index, SIZE).unwrap().1;
        let bytes = reader.segment(name, index, len).unwrap();
        assert_eq!(*blake3::hash(&bytes).as_bytes(), digest);
        (index, bytes.to_vec())
    };
    table.records().iter().map(|r| segment(r.index, r.digest)).collect()
}

/// What `qemu-img` says, without which a test has not run.
#[track_caller]
pub fn qemu_img(arguments: &[&str]) -> (bool, String) {
    let output = Command::new("qemu-img").args(arguments).output().expect("qemu-img is installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

#[track_caller]
pub fn assert_sound(image: &Path) {
    let (ok, text) = qemu_img(&["check", "-f", "qcow2", image.to_str().unwrap()]);
    assert!(ok && text.contains("No errors were found"), "{text}");
}

/// Restores an image with nothing but `qemu-img convert`, and compares it.
#[track_caller]
pub fn assert_converts_to(image: &Path, content: &Content) {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    let (ok, text) = qemu_img(&["convert", "-f", "qcow2", "-O", "raw", image.to_str().unwrap(), raw.to_str().unwrap()]);
    assert!(ok, "{text}");
    let file = fs::File::open(&raw).unwrap();
    assert_eq!(file.metadata().unwrap().len(), SIZE.next_multiple_of(512));
    for index in 0..SEGMENTS {
        let (offset, len) = segment_len().range(index, SIZE).unwrap();
        let mut bytes = vec![0; len as usize];
        file.read_exact_at(&mut bytes, offset).unwrap();
        match content.get(&index) {
            Some(expected) => assert!(bytes == *expected, "segment {index}"),
            None => assert!(bytes.iter().all(|b| *b == 0), "segment {index} is not zero"),
        }
    }
}

pub fn random(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut reader = blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof();
    move |below| {
        let mut word = [0; 8];
        reader.fill(&mut word);
        u64::from_le_bytes(word) % below
    }
}
