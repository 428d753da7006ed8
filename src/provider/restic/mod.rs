//! restic repositories, through rustic: the default target.
//!
//! An archive is a snapshot whose label is the archive's name; `layout` has the names in it. The official restic (0.14 and
//! later) can list, check, restore and prune such a repository; it is of version 2, and its chunks are of a fixed size,
//! which restic only meets as blobs.
//!
//! # When an archive counts
//!
//! rustic's `archive` returns success and writes a snapshot although files failed. A backup here is therefore accepted
//! only when the source has recorded no failure, rustic has counted the files and bytes that were handed out, and the stored trees, read again with a fresh index and a fresh list of packs, match the new segment tables.
//! Until then the snapshot file is held back in memory (`backend`): there is nothing to delete after a failure, and a
//! run that is killed leaves packs that the next prune removes, but never an archive.
//!
//! # Durable
//!
//! Local repositories: every file is synced and renamed, and its directory synced, before the next kind of file (pack, index,
//! snapshot) is written. Remote ones: what the server acknowledged; nothing more can be asked of SFTP, S3 or REST.
//!
//! # Locks
//!
//! rustic takes no locks; its own prune only marks packs, and deletes them a day later. The official restic's prune deletes at
//! once and relies on lock files, so `lock` keeps one (not exclusive) in local repositories from job start to job end,
//! and refuses to start while somebody holds an exclusive one. rustic's interface has no way to write a lock file to a
//! *remote* repository: there, do not run the official `restic prune` during a backup. (`rustic prune` is safe.) What a
//! prune has already removed when a backup ends is noticed by the check above.
//!
//! # Memory and time
//!
//! With N processors: 2 N + 2 changed segments that wait to be read; about 3 N + 4 copies of segments in rustic's pipeline
//! (hashed, compressed, encrypted, verified) with up to three working copies for N of them; some six packs of 32 MiB; the
//! index with 48 bytes for every blob of the repository; the segment tables (48 bytes a segment; old and new). Measured
//! with two processors: 200 MiB with segments of 1 MiB, 300 MiB with 4 MiB, besides index and tables.
//!
//! An unchanged segment costs about 12 µs of one processor in every backup, and a changed one rewrites the directory of
//! its 256 neighbours (26 KiB). A full backup of data that does not compress costs 3.5 s of processor time for a GiB: SHA-256
//! (twice: blob and pack) and Poly1305 above all, and an eighth of it for decrypting again what was encrypted, which stays on.
//!
//! # Time limits
//!
//! The REST backend gives up after 10 minutes for each try, and five tries; opendal's services have limits of their own, SFTP
//! has none but SSH's: set `ServerAliveInterval` in `ssh_config`. (A run that is killed leaves an `ssh` process behind, which
//! ends with its connection.) A cancelled backup ends when the write in flight does.

mod backend;
mod error;
mod key;
mod layout;
mod lock;
mod open;
mod options;
mod reader;
mod seal;
mod source;
mod store;
mod verify;

pub use options::{Password, ResticOptions};

use super::{
    ArchiveInfo, ArchiveReader, BackupInput, DiskQuery, ErrorKind, Incremental, Outcome, Provider, ProviderError,
    Stored,
};
use crate::{
    archive::{ArchiveId, ArchiveName, Manifest},
    segment::{SegmentLen, SegmentTable},
};
use backend::{Farewell, GuardedBackend};
use error::{Secrets, wrap};
use jiff::Timestamp;
use layout::Shape;
use rustic_core::{
    BlobId, Credentials, FileType, Id, IndexedFullStatus, OpenStatus, ReadBackend as _, Repository, RepositoryBackends,
    RepositoryOptions, RusticError, WriteBackend,
    repofile::{BlobType, ConfigFile, Node, SnapshotFile, SnapshotId},
};
use serde::{Deserialize, Serialize};
use std::{collections::HashMap, sync::Arc};
use verify::{DiskFound, Gap, Inventory};

/// Chunk size of new repositories: a segment is never cut.
const CHUNK: u64 = SegmentLen::MAX;
/// Size of packs. Larger ones mean fewer files, but rustic holds some six of them in memory.
const PACK: u64 = 32 << 20;
/// Largest manifest that is read.
const MAX_MANIFEST: u64 = 16 << 20;

/// What a snapshot's description holds, so that a list need not read every archive.
#[derive(Serialize, Deserialize)]
struct Description {
    disks: Vec<DescribedDisk>,
}

#[derive(Serialize, Deserialize)]
struct DescribedDisk {
    name: String,
    size: u64,
}

/// A disk of a base archive that [`Provider::query_incremental`] has confirmed.
struct Confirmed {
    shape: Shape,
    table: SegmentTable,
    found: DiskFound,
}

/// Stores archives in a restic repository.
pub struct ResticProvider {
    shown: String,
    secrets: Secrets,
    backend: Arc<GuardedBackend>,
    how: RepositoryOptions,
    repository: Repository<OpenStatus>,
    local: Option<std::path::PathBuf>,
    /// The index as `query_incremental` read it; used up by `backup`.
    indexed: Option<Repository<IndexedFullStatus>>,
    confirmed: HashMap<(ArchiveId, String), Confirmed>,
    lock: Option<lock::Lock>,
    added: Option<u64>,
    farewell: Option<Arc<Farewell>>,
}

impl ResticProvider {
    fn failed(&self, kind: ErrorKind, what: &str, error: &RusticError) -> ProviderError {
        wrap(&self.secrets, kind, format!("{what} (repository {})", self.shown), error)
    }

    /// Reads the index, as it is now.
    fn index(&self) -> Result<Repository<IndexedFullStatus>, ProviderError> {
        // An open repository cannot be cloned, and reading the index consumes it; opening it by key costs next to nothing.
        let shared: Arc<dyn WriteBackend> = Arc::<GuardedBackend>::clone(&self.backend);
        Repository::new(&self.how, &RepositoryBackends::new(shared, None))
            .and_then(|repository| repository.open(&Credentials::Masterkey(self.repository.key())))
            .and_then(Repository::to_indexed)
            .map_err(|e| self.failed(ErrorKind::Damaged, "the index cannot be read", &e))
    }

    /// The snapshot of an archive, which must be in the repository's list now.
    fn snapshot(&self, archive: &ArchiveId) -> Result<SnapshotFile, ProviderError> {
        let not_found = || {
            ProviderError::new(ErrorKind::NotFound, format!("archive {archive} is not in repository {}", self.shown))
        };
        let id: SnapshotId = archive.0.parse::<Id>().map_err(|_| not_found())?.into();
        if !self.is_listed(*id)? {
            return Err(not_found());
        }
        let mut snapshot: SnapshotFile = self
            .repository
            .get_file(&id)
            .map_err(|e| self.failed(ErrorKind::Damaged, &format!("archive {archive} cannot be read"), &e))?;
        snapshot.id = id;
        Ok(snapshot)
    }

    fn is_listed(&self, id: Id) -> Result<bool, ProviderError> {
        let ids = self.backend_list(FileType::Snapshot)?;
        Ok(ids.contains(&id))
    }

    fn backend_list(&self, kind: FileType) -> Result<Vec<Id>, ProviderError> {
        self.backend.list(kind).map_err(|e| self.failed(ErrorKind::Other, "the repository cannot be listed", &e))
    }

    /// Checks one disk of a base archive; the error is the reason for a full backup.
    fn confirm(
        &self,
        inventory: &Inventory<'_>,
        repository: &Repository<IndexedFullStatus>,
        query: &DiskQuery,
    ) -> Result<Confirmed, Gap> {
        let gap = |text: String| Gap::Missing(text);
        let snapshot = self.snapshot(&query.base).map_err(|e| gap(e.message))?;
        let root = inventory.tree(snapshot.tree)?;
        let read = |node: Option<&Node>, what: &str, limit: u64| -> Result<Vec<u8>, Gap> {
            let node = node.ok_or_else(|| gap(format!("the base archive has no {what}")))?;
            if node.meta.size > limit {
                return Err(gap(format!("the base archive's {what} has {} bytes", node.meta.size)));
            }
            inventory.file(node, &mut DiskFound::empty())?;
            let mut bytes = Vec::with_capacity(node.meta.size as usize);
            for id in node.content.iter().flatten() {
                bytes.extend_from_slice(&repository.get_blob_cached(&BlobId::from(*id), BlobType::Data)?);
            }
            Ok(bytes)
        };
        let name = &query.name;
        let bytes = read(verify::child(&root, layout::MANIFEST), "manifest", MAX_MANIFEST)?;
        let manifest = Manifest::from_bytes(&bytes).map_err(|e| gap(format!("the base archive's {e}")))?;
        let entry = manifest.disk(name).ok_or_else(|| gap("the base archive does not have the disk".into()))?;
        if entry.size != query.size {
            return Err(gap(format!("the disk has {} bytes, it had {} in the base archive", query.size, entry.size)));
        }
        if entry.segment_len != query.segment_len.bytes() {
            return Err(gap(format!(
                "the segment length is {}, it was {} in the base archive",
                query.segment_len.bytes(),
                entry.segment_len
            )));
        }
        let disks = verify::subtree(&root, layout::DISKS).ok_or_else(|| gap("the base archive has no disks".into()))?;
        let disks = inventory.tree(disks)?;
        let limit = SegmentTable::longest(query.segment_len, query.size);
        let bytes = read(verify::child(&disks, &layout::table_name(name)), "segment table", limit)?;
        let table = SegmentTable::from_bytes(&bytes, query.segment_len, query.size)
            .map_err(|e| gap(format!("the base archive's {e}")))?;
        if table.digest_hex() != entry.digest {
            return Err(gap("the base archive's segment table does not belong to its manifest".into()));
        }
        let directory =
            verify::subtree(&disks, name).ok_or_else(|| gap("the base archive has no segments of the disk".into()))?;
        let shape = Shape { size: query.size, segment_len: query.segment_len };
        let found = inventory.disk(directory, &table, shape, None)?;
        Ok(Confirmed { shape, table, found })
    }

    /// Snapshots that are archives of ours, oldest first; anything else in the repository is passed over.
    fn archives(&self) -> Result<Vec<(ArchiveName, SnapshotFile)>, ProviderError> {
        let ids: Vec<SnapshotId> = self.backend_list(FileType::Snapshot)?.into_iter().map(Into::into).collect();
        let files = self
            .repository
            .stream_files_list::<SnapshotFile>(ids)
            .map_err(|e| self.failed(ErrorKind::Other, "the archives cannot be listed", &e))?;
        let mut archives = Vec::new();
        for file in files {
            match file {
                Ok((id, mut snapshot)) => {
                    if let Ok(name) = snapshot.label.parse::<ArchiveName>() {
                        snapshot.id = id;
                        archives.push((name, snapshot));
                    }
                }
                // Half a snapshot, left by a broken connection, must not hide the others.
                Err(e) => tracing::warn!(
                    repository = self.shown,
                    error = self.secrets.redact(&e.display_log()),
                    "snapshot cannot be read"
                ),
            }
        }
        archives.sort_by(|a, b| (a.0.time(), &a.0, a.1.id).cmp(&(b.0.time(), &b.0, b.1.id)));
        Ok(archives)
    }
}

impl Provider for ResticProvider {
    fn kind(&self) -> &'static str {
        "restic"
    }

    fn repository_id(&mut self) -> Result<String, ProviderError> {
        let config: &ConfigFile = self.repository.config();
        Ok(config.id.to_hex().to_string())
    }

    fn job_init(&mut self, _start: Timestamp) -> Result<(), ProviderError> {
        if self.backend_list(FileType::Config)?.is_empty() {
            let message = format!("there is no repository at {} any more", self.shown);
            return Err(ProviderError::new(ErrorKind::RepositoryMissing, message));
        }
        if let Some(path) = &self.local {
            self.lock = Some(lock::Lock::take(path, &self.repository.key())?);
        }
        Ok(())
    }

    fn job_cleanup(&mut self) -> Result<(), ProviderError> {
        self.indexed = None;
        self.confirmed.clear();
        match self.lock.take() {
            Some(lock) => lock.release(),
            None => Ok(()),
        }
    }

    fn backup_init(&mut self, guest: &str, start: Timestamp) -> Result<ArchiveName, ProviderError> {
        self.added = None;
        let taken: Vec<ArchiveName> = self.archives()?.into_iter().map(|(name, _)| name).collect();
        ArchiveName::after(guest, start, &taken)
            .ok_or_else(|| ProviderError::new(ErrorKind::Other, "no time is left for an archive's name"))
    }

    fn query_incremental(&mut self, disks: &[DiskQuery]) -> Result<Vec<Incremental>, ProviderError> {
        self.indexed = None;
        self.confirmed.clear();
        if disks.is_empty() {
            return Ok(Vec::new());
        }
        let repository = self.index()?;
        let inventory = Inventory::new(&repository, self.backend.as_ref());
        let mut answers = Vec::with_capacity(disks.len());
        let mut confirmed = HashMap::new();
        for query in disks {
            let inventory = match &inventory {
                Ok(inventory) => inventory,
                Err(gap) => {
                    answers.push(Incremental::New(self.reason(gap)));
                    continue;
                }
            };
            answers.push(match self.confirm(inventory, &repository, query) {
                Ok(disk) => {
                    let table = disk.table.clone();
                    confirmed.insert((query.base.clone(), query.name.clone()), disk);
                    Incremental::Use(table.into())
                }
                Err(gap) => Incremental::New(self.reason(&gap)),
            });
        }
        drop(inventory);
        self.confirmed = confirmed;
        self.indexed = Some(repository);
        Ok(answers)
    }

    fn backup(&mut self, input: BackupInput) -> Result<Stored, ProviderError> {
        let stored = self.store(input);
        self.indexed = None;
        self.confirmed.clear();
        stored
    }

    fn backup_cleanup(&mut self, outcome: &Outcome) -> Result<Option<u64>, ProviderError> {
        self.indexed = None;
        self.confirmed.clear();
        Ok(self.added.take().filter(|_| *outcome == Outcome::Success))
    }

    fn list(&mut self, guest: Option<&str>) -> Result<Vec<ArchiveInfo>, ProviderError> {
        let archives = self.archives()?.into_iter().filter(|(name, _)| guest.is_none_or(|guest| name.guest() == guest));
        Ok(archives
            .map(|(name, snapshot)| {
                let described: Option<Description> =
                    snapshot.description.as_deref().and_then(|text| serde_json::from_str(text).ok());
                ArchiveInfo {
                    id: ArchiveId(snapshot.id.to_hex().to_string()),
                    name,
                    size: described.as_ref().map(|d| d.disks.iter().fold(0u64, |sum, d| sum.saturating_add(d.size))),
                    disks: described.map(|d| d.disks.into_iter().map(|d| d.name).collect()).unwrap_or_default(),
                    added_bytes: snapshot.summary.as_ref().map(|s| s.data_added_packed),
                }
            })
            .collect())
    }

    fn open(&mut self, archive: &ArchiveId) -> Result<Box<dyn ArchiveReader>, ProviderError> {
        let snapshot = self.snapshot(archive)?;
        Ok(Box::new(reader::Reader::new(self.index()?, self.secrets.clone(), snapshot.tree, self.farewell.clone())?))
    }
}

impl ResticProvider {
    fn reason(&self, gap: &Gap) -> String {
        match gap {
            Gap::Missing(text) => text.clone(),
            Gap::Rustic(e) => self.failed(ErrorKind::Damaged, "the base archive cannot be read", e).to_string(),
        }
    }
}
