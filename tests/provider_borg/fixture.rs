//! Repositories in temporary directories, and disks to put into them.

pub use crate::borg::{possible, program};
use bytes::Bytes;
use jiff::{Timestamp, ToSpan};
use pvebackup::{
    archive::{ArchiveId, ArchiveName, Consistency, DiskEntry, FineEntry, Manifest},
    provider::{
        BackupInput, DiskInput, DiskQuery, Expected, Incremental, Outcome, Provider, ProviderError, SourceError,
        Stored,
        borg::{BorgOptions, BorgProvider, Passphrase},
    },
    segment::{DiskTables, Segment, SegmentData, SegmentLen, SegmentTable},
};
use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
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
pub fn segment_bytes(seed: u64, index: u64) -> Vec<u8> {
    let mut bytes = vec![0; segment_len().range(index, SIZE).unwrap().1 as usize];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(&index.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// What becomes of a segment.
#[derive(Clone, Debug)]
pub enum Change {
    Data(Vec<u8>),
    /// Zero, as QEMU's allocation says.
    Zero,
    /// Zero, as only reading tells.
    FoundZero,
    Failure,
}

pub struct Disk {
    pub name: &'static str,
    pub base: Option<(ArchiveId, SegmentTable)>,
    pub changes: BTreeMap<u64, Change>,
}

impl Disk {
    pub fn full(name: &'static str, content: &Content) -> Self {
        Self { name, base: None, changes: content.iter().map(|(i, b)| (*i, Change::Data(b.clone()))).collect() }
    }
}

pub struct Fixture {
    pub dir: TempDir,
    pub options: BorgOptions,
    pub provider: BorgProvider,
    pub clock: Timestamp,
    /// Segments that borg has read, and that were given up.
    pub stored: Arc<AtomicU64>,
    pub dropped: Arc<AtomicU64>,
    pub cancel: CancellationToken,
}

pub fn options(dir: &Path) -> BorgOptions {
    fs::write(dir.join("passphrase"), "correct horse\nsecond line\n").unwrap();
    let repository = dir.join("repository").display().to_string();
    let mut options = BorgOptions::new(repository, Passphrase::File(dir.join("passphrase")), dir.join("state"));
    options.program = program();
    options.lock_wait = std::time::Duration::from_secs(1);
    options
}

/// `PATH` with that borg in front.
pub fn path_with_borg() -> OsString {
    let mut path = program().parent().unwrap_or(Path::new("")).as_os_str().to_owned();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    path
}

/// Every process that has `directory` in its environment: id, arguments, environment.
pub fn processes_of(directory: &Path) -> Vec<(i32, Vec<String>, Vec<String>)> {
    let words = |text: Vec<u8>| {
        let text = String::from_utf8_lossy(&text).into_owned();
        text.split_terminator('\0').map(str::to_owned).collect::<Vec<_>>()
    };
    let ours = format!("BORG_BASE_DIR={}", directory.display());
    let of = |pid: i32| {
        let environment = words(fs::read(format!("/proc/{pid}/environ")).ok()?);
        let arguments = words(fs::read(format!("/proc/{pid}/cmdline")).ok()?);
        environment.contains(&ours).then_some((pid, arguments, environment))
    };
    let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter_map(of).collect()
}

impl Fixture {
    /// A new repository; `None` where there is no borg or no FUSE.
    pub fn new() -> Option<Self> {
        possible().then(|| {
            let dir = tempfile::tempdir().unwrap();
            let options = options(dir.path());
            Self::with(dir, options)
        })
    }

    pub fn with(dir: TempDir, options: BorgOptions) -> Self {
        let mut provider = BorgProvider::init(options.clone()).unwrap();
        let clock = "2026-01-31T02:00:07Z".parse().unwrap();
        provider.job_init(clock).unwrap();
        Self {
            dir,
            options,
            provider,
            clock,
            stored: Arc::default(),
            dropped: Arc::default(),
            cancel: CancellationToken::new(),
        }
    }

    pub fn repository(&self) -> PathBuf {
        self.dir.path().join("repository")
    }

    /// borg with the user's own directories, as anybody would run it.
    pub fn borg(&self, arguments: &[&str]) -> Output {
        let output = Command::new(program())
            .args(arguments)
            .env("BORG_BASE_DIR", self.dir.path().join("user"))
            .env("BORG_PASSPHRASE", "correct horse")
            .env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes")
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output
    }

    pub fn names(&self) -> Vec<String> {
        let output = self.borg(&["list", "--short", &self.repository().display().to_string()]);
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
    }

    pub fn backup(&mut self, disks: Vec<Disk>) -> Result<Stored, ProviderError> {
        self.clock = self.clock.checked_add(1.hour()).unwrap();
        let name = self.provider.backup_init("100", self.clock)?;
        let stored = self.provider.backup(self.input(name, disks));
        let outcome = stored.as_ref().map_or_else(|e| Outcome::Failure(e.to_string()), |_| Outcome::Success);
        self.provider.backup_cleanup(&outcome)?;
        stored
    }

    /// The same, with something done before each segment that borg asks for; it gets how many there were before.
    pub fn backup_while(
        &mut self,
        disk: Disk,
        mut meanwhile: impl FnMut(u64) + Send + 'static,
    ) -> Result<Stored, ProviderError> {
        self.clock = self.clock.checked_add(1.hour()).unwrap();
        let name = self.provider.backup_init("100", self.clock)?;
        let mut input = self.input(name, vec![disk]);
        let mut changed = std::mem::replace(&mut input.disks[0].changed, Box::new(std::iter::empty()));
        let mut before = 0;
        input.disks[0].changed = Box::new(std::iter::from_fn(move || {
            meanwhile(before);
            before += 1;
            changed.next()
        }));
        self.provider.backup(input)
    }

    pub fn input(&self, archive: ArchiveName, disks: Vec<Disk>) -> BackupInput {
        let instant = self.clock.checked_add(250.microseconds()).unwrap();
        let shapes: Vec<_> = disks.iter().map(|d| (d.name.to_owned(), SIZE, segment_len())).collect();
        let make = {
            let archive = archive.clone();
            move |tables: &[DiskTables]| manifest(archive, instant, &shapes, tables)
        };
        let disks = disks.into_iter().map(|disk| {
            let expected: Vec<Expected> = disk
                .changes
                .iter()
                .filter(|(_, change)| disk.base.is_some() || !matches!(change, Change::Zero))
                .map(|(index, change)| Expected { index: *index, zero: matches!(change, Change::Zero) })
                .collect();
            let (stored, dropped) = (self.stored.clone(), self.dropped.clone());
            let full = disk.base.is_none();
            let changes = disk.changes.into_iter().filter(move |(_, c)| !(full && matches!(c, Change::Zero)));
            let changed = changes.map(move |(index, change)| {
                let data = match change {
                    Change::Data(bytes) => {
                        let (stored, dropped) = (stored.clone(), dropped.clone());
                        Some(SegmentData::new(Bytes::from(bytes), move |was_stored| {
                            let count = if was_stored { &stored } else { &dropped };
                            count.fetch_add(1, Ordering::Relaxed);
                        }))
                    }
                    Change::Zero | Change::FoundZero => None,
                    Change::Failure => return Err(SourceError { disk: "scsi0".into(), message: "export gone".into() }),
                };
                Ok(Segment { index, data })
            });
            DiskInput {
                name: disk.name.into(),
                size: SIZE,
                segment_len: segment_len(),
                base: disk.base,
                expected,
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
        // Every backup asks this first.
        self.provider.repository_id().unwrap();
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

    /// What an archive has of a disk; segments of zeroes are as good as none.
    pub fn restored(&mut self, archive: &ArchiveId, name: &str) -> Content {
        let reader = self.provider.open(archive).unwrap();
        let manifest = Manifest::from_bytes(&reader.member("manifest.json", 1 << 20).unwrap()).unwrap();
        let table = SegmentTable::from_bytes(&reader.table(name, 1 << 20).unwrap(), segment_len(), SIZE).unwrap();
        assert_eq!(table.digest_hex(), manifest.disk(name).expect("disk").digest, "table and manifest belong together");
        let segment = |index: u64, digest: [u8; 32]| {
            let len = segment_len().range(index, SIZE).unwrap().1;
            let bytes = reader.segment(name, index, len).unwrap();
            assert_eq!(*blake3::hash(&bytes).as_bytes(), digest);
            (index, bytes.to_vec())
        };
        let all = table.records().iter().map(|r| segment(r.index, r.digest));
        all.filter(|(_, bytes)| bytes.iter().any(|b| *b != 0)).collect()
    }

    /// After a failure: no archive, nothing mounted, and the repository good for the next backup.
    pub fn assert_nothing_stored(&mut self, archives: usize) {
        assert_eq!(self.names().len(), archives, "{:?}", self.names());
        assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(self.dir.path().to_str().unwrap()));
        let content: Content = [(3, segment_bytes(99, 3))].into();
        let good = self.backup(vec![Disk::full("scsi0", &content)]).unwrap();
        assert_eq!(self.restored(&good.id, "scsi0"), content);
    }
}

/// Of disks with these names, sizes and segments.
pub fn manifest(
    archive: ArchiveName,
    instant: Timestamp,
    shapes: &[(String, u64, SegmentLen)],
    tables: &[DiskTables],
) -> Manifest {
    let disks = shapes.iter().zip(tables).map(|((name, size, len), tables)| DiskEntry {
        name: name.clone(),
        device: format!("drive-{name}"),
        size: *size,
        segment_len: len.bytes(),
        data_bytes: tables.data_bytes(*len, *size),
        fine: FineEntry::of(&tables.fine),
        digest: tables.segments.digest_hex(),
        bitmap_action: "new".into(),
        reason: "test".into(),
        generation: None,
        read_bytes: 0,
    });
    let empty = Manifest {
        version: Manifest::VERSION,
        program: "test".into(),
        archive,
        guest_kind: "plain".into(),
        guest_name: None,
        instant,
        consistency: Consistency::default(),
        disks: Vec::new(),
        skipped: Vec::new(),
        firewall: true,
    };
    empty.with_disks(disks.collect())
}

pub fn random(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut reader = blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof();
    move |below| {
        let mut word = [0; 8];
        reader.fill(&mut word);
        u64::from_le_bytes(word) % below
    }
}
