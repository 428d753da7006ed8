//! Repositories in temporary directories, and disks to put into them.

use bytes::Bytes;
use jiff::{Timestamp, ToSpan};
use pvebackup::{
    archive::{ArchiveId, ArchiveName, Consistency, DiskEntry, Manifest},
    provider::{
        ArchiveReader, BackupInput, DiskInput, DiskQuery, Incremental, Outcome, Provider, ProviderError, SourceError,
        Stored,
        restic::{Password, ResticOptions, ResticProvider},
    },
    segment::{DiskTables, Segment, SegmentData, SegmentLen, SegmentTable},
};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

pub const LEN: u64 = 64 << 10;
/// An odd size: the last segment is short.
pub const SIZE: u64 = 700 * LEN + 512;

pub fn segment_len() -> SegmentLen {
    SegmentLen::new(LEN).unwrap()
}

/// A disk as the guest sees it: content by segment; what is not there is zero.
pub type Content = BTreeMap<u64, Vec<u8>>;

/// Bytes that do not compress and are different for every seed.
pub fn noise(seed: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

pub fn segment_bytes(seed: u64, index: u64) -> Vec<u8> {
    noise(seed ^ (index << 32), segment_len().range(index, SIZE).unwrap().1)
}

#[derive(Clone, Default)]
pub struct Watch {
    pub stored: Arc<AtomicU64>,
    pub dropped: Arc<AtomicU64>,
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

pub struct Fixture {
    pub dir: Directory,
    pub provider: ResticProvider,
    pub clock: Timestamp,
    pub watch: Watch,
    pub cancel: CancellationToken,
}

/// A directory that goes away, or one that belongs to somebody else.
pub enum Directory {
    Own(TempDir),
    Given(PathBuf),
}

impl Directory {
    pub fn path(&self) -> &Path {
        match self {
            Self::Own(dir) => dir.path(),
            Self::Given(path) => path,
        }
    }
}

/// A test of this program, to be run in a process of its own.
pub fn child(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "--nocapture", test]);
    command
}

impl Fixture {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let provider = ResticProvider::init(&options(dir.path())).unwrap();
        Self::with(Directory::Own(dir), provider)
    }

    /// The repository of another fixture.
    pub fn in_directory(path: PathBuf) -> Self {
        let provider = ResticProvider::open(&options(&path)).unwrap();
        Self::with(Directory::Given(path), provider)
    }

    fn with(dir: Directory, provider: ResticProvider) -> Self {
        Self {
            dir,
            provider,
            clock: "2026-01-31T02:00:07Z".parse().unwrap(),
            watch: Watch::default(),
            cancel: CancellationToken::new(),
        }
    }

    pub fn repository(&self) -> PathBuf {
        self.dir.path().join("repository")
    }

    pub fn snapshots(&self) -> usize {
        fs::read_dir(self.repository().join("snapshots")).unwrap().count()
    }

    pub fn files(&self, below: &str) -> Vec<PathBuf> {
        files(&self.repository().join(below))
    }

    pub fn backup(&mut self, disks: Vec<Disk>) -> Result<Stored, ProviderError> {
        self.clock = self.clock.checked_add(1.hour()).unwrap();
        let name = self.provider.backup_init("100", self.clock)?;
        let stored = self.provider.backup(self.input(name, disks));
        let outcome = stored.as_ref().map_or_else(|e| Outcome::Failure(e.to_string()), |_| Outcome::Success);
        self.provider.backup_cleanup(&outcome)?;
        stored
    }

    pub fn input(&self, archive: ArchiveName, disks: Vec<Disk>) -> BackupInput {
        let instant = self.clock.checked_add(250.microseconds()).unwrap();
        let names: Vec<&str> = disks.iter().map(|d| d.name).collect();
        let make = {
            let archive = archive.clone();
            let names: Vec<String> = names.iter().map(ToString::to_string).collect();
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

    pub fn use_base(&mut self, base: &ArchiveId, name: &str) -> (ArchiveId, SegmentTable) {
        match self.query(base, name) {
            Incremental::Use(tables) => (base.clone(), tables.segments),
            Incremental::New(reason) => panic!("not confirmed: {reason}"),
        }
    }

    pub fn refused(&mut self, base: &ArchiveId, name: &str) -> String {
        match self.query(base, name) {
            Incremental::Use(_) => panic!("must not be confirmed"),
            Incremental::New(reason) => reason,
        }
    }

    pub fn restored(&mut self, archive: &ArchiveId, name: &str) -> Content {
        restored(self.provider.open(archive).unwrap().as_ref(), name)
    }

    /// After a failure: nothing listed, and the repository still good for the next backup.
    pub fn assert_nothing_stored(&mut self, snapshots: usize) {
        assert_eq!(self.snapshots(), snapshots);
        assert_eq!(self.provider.list(None).unwrap().len(), snapshots);
        let content: Content = [(3, segment_bytes(99, 3))].into();
        let good = self.backup(vec![Disk::full("scsi0", &content)]).unwrap();
        assert_eq!(self.restored(&good.id, "scsi0"), content);
    }
}

pub fn options(dir: &Path) -> ResticOptions {
    let repository = dir.join("repository").display().to_string();
    ResticOptions::new(repository, Password::File(dir.join("secrets/key")))
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

pub fn random(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut reader = blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof();
    move |below| {
        let mut word = [0; 8];
        reader.fill(&mut word);
        u64::from_le_bytes(word) % below
    }
}

/// All files below a directory.
pub fn files(below: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![below.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { open.push(path) } else { found.push(path) }
        }
    }
    found.sort();
    found
}
