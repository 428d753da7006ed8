//! borg repositories, by an unmodified `borg` (1.2 or a later 1.x).
//!
//! borg knows nothing of dirty bitmaps, but it does not read a file whose path, size and modification time it has seen before
//! (`--files-cache=mtime,size`). So each backup is one `borg create` on the *segment view* ([`crate::fuse::segments`]), in which
//! a segment that did not change has the time that it had, and is skipped.
//!
//! # What must never be wrong
//!
//! What borg skips must be what did not change, and the other way round. The view sees what borg reads: an unchanged segment
//! that is read, or a changed one that is not, fails the backup, and makes the next one a full one. `known` says which archive
//! of a guest the files cache belongs to, and has its segment tables with their digests; without that, or without the files cache, a full backup is asked for at once.
//!
//! # When an archive counts
//!
//! `borg create` returns success-with-warnings, and leaves an archive, when files could not be read; and it may survive us. So it
//! works under a name that is no archive's (`NAME.incomplete`); only when it has ended well, the view is complete, and borg
//! has counted as many files as there are, the archive is renamed. What was left incomplete is deleted by the guest's next
//! backup. A backup makes no checkpoints.
//!
//! That the chunks of unchanged segments are still there is what borg's own index says; `borg check` looks at the repository.
//!
//! # A repository that is older than it was
//!
//! borg refuses a repository that is older than what it has seen of it, for example one that was restored from a copy. Such a
//! repository is taken, with a warning, and everything that we know of it is forgotten, so that the next backup of every guest
//! is a full one. What borg remembers for its encryption (the nonces that it has used up) stays.
//!
//! # Zeroes
//!
//! A changed segment that turns out to be zero only when it is read has a file all the same, since borg had seen its name by
//! then. The next archive does not have it any more.

mod command;
mod environment;
mod options;
mod outcome;
mod progress;
mod reader;
mod store;

pub use options::{BorgOptions, Passphrase};

use super::{
    ArchiveInfo, ArchiveReader, BackupInput, DiskQuery, ErrorKind, Incremental, Mechanism, Outcome, Provider,
    ProviderError, PruneRequest, Pruned, Stored,
};
use crate::{
    archive::{ArchiveId, ArchiveName},
    config::create_private_dir,
    fuse::{Mount, mounts, segments::SHARD_BITS},
    report::{Events, spelled_out},
    segment::{DiskTables, layers::Layer},
};
use command::{Borg, Call};
use jiff::Timestamp;
use outcome::Finished;
use reader::Reader;
use serde::Deserialize;
use std::{collections::HashMap, fs, io, path::PathBuf};
use store::Known;

/// Ending of the name of an archive that is not complete.
const INCOMPLETE: &str = ".incomplete";
/// Largest manifest that is read.
const MAX_MANIFEST: u64 = 16 << 20;

/// Stores archives in a borg repository.
pub struct BorgProvider {
    borg: Borg,
    /// The repository's last answer, for who asks next: starting borg takes some tenths of a second, over SSH more than that.
    listed: Option<Listing>,
    added: Option<u64>,
    events: Option<Events>,
}

/// The answer to `borg list --json`.
#[derive(Deserialize)]
struct Listing {
    repository: Repository,
    archives: Vec<Listed>,
}

#[derive(Deserialize)]
struct Repository {
    id: String,
}

#[derive(Deserialize)]
struct Listed {
    id: String,
    name: String,
}

impl Listing {
    /// The name of an archive of ours.
    fn name(&self, id: &ArchiveId) -> Option<ArchiveName> {
        self.archives.iter().find(|archive| archive.id == id.0)?.name.parse().ok()
    }
}

impl BorgProvider {
    /// Prepares; the repository is opened by the first call that needs it.
    ///
    /// # Errors
    /// When there is no borg that we know, or its directories cannot be made.
    pub fn open(options: BorgOptions) -> Result<Self, ProviderError> {
        let borg = Borg::new(options);
        borg.check_version()?;
        let options = borg.options();
        for directory in [options.cache(), options.directory.join("view"), options.known_dir()] {
            create_private_dir(&directory).map_err(|e| {
                ProviderError::caused_by(ErrorKind::Other, format!("cannot create {}", directory.display()), e)
            })?;
        }
        Ok(Self { borg, listed: None, added: None, events: None })
    }

    /// Creates the repository.
    ///
    /// # Errors
    /// When there is one already, or it cannot be created.
    pub fn init(options: BorgOptions) -> Result<Self, ProviderError> {
        let provider = Self::open(options)?;
        let encryption = provider.borg.options().encryption.clone();
        let finished = provider.borg.run(&Call {
            verb: "init",
            options: vec!["--encryption".into(), encryption],
            ..Call::default()
        })?;
        provider.succeeded(&finished, "the repository cannot be created")?;
        Ok(provider)
    }

    fn succeeded(&self, finished: &Finished, what: &str) -> Result<(), ProviderError> {
        if finished.ran() {
            return Ok(());
        }
        Err(finished.error(&format!("{what} (repository {})", self.borg.options().repository)))
    }

    fn warn(&self, text: impl Into<String>) {
        if let Some(events) = &self.events {
            events.warn(text);
        } else {
            tracing::warn!("{}", text.into());
        }
    }

    fn inform(&self, text: impl Into<String>) {
        if let Some(events) = &self.events {
            events.info(text);
        } else {
            tracing::info!("{}", text.into());
        }
    }

    /// The repository's id, and those of its archives that can be ours.
    fn listing(&self) -> Result<Listing, ProviderError> {
        let what = "the archives cannot be listed";
        let list = || {
            let options = ["--json", "--glob-archives", "pve-qemu-*"].map(str::to_owned).into();
            self.borg.run(&Call { verb: "list", options, ..Call::default() })
        };
        let mut finished = list()?;
        if finished.older() {
            self.forget_newer()?;
            finished = list()?;
        }
        self.succeeded(&finished, what)?;
        serde_json::from_slice(&finished.output).map_err(|e| ProviderError::caused_by(ErrorKind::Other, what, e))
    }

    /// What was listed a moment ago for the step before, else a new list. Archives that others remove meanwhile are missed by
    /// borg itself.
    fn just_listed(&mut self) -> Result<Listing, ProviderError> {
        self.listed.take().map_or_else(|| self.listing(), Ok)
    }

    /// Makes borg take a repository that is older than what it has seen of it.
    fn forget_newer(&self) -> Result<(), ProviderError> {
        let options = self.borg.options();
        self.warn(format!(
            "repository {} is older than it was when this host used it last: an older copy of it was put in its place; what \
             was known of it is forgotten, and the next backup of every guest is a full one",
            options.repository
        ));
        let forget = || -> io::Result<()> {
            for directory in [options.known_dir(), options.cache()] {
                fs::remove_dir_all(&directory)?;
                create_private_dir(&directory)?;
            }
            for repository in fs::read_dir(options.security())? {
                // Not removed: borg would take the repository for one that it has never seen.
                let seen = repository?.path().join("manifest-timestamp");
                if seen.exists() {
                    fs::write(seen, "1970-01-01T00:00:00.000000")?;
                }
            }
            Ok(())
        };
        let what = || format!("what borg knows of repository {} cannot be forgotten", options.repository);
        forget().map_err(|e| ProviderError::caused_by(ErrorKind::Other, what(), e))
    }

    /// Makes the directory that a guest's view is mounted at, and looks whether that will work. Returns its path.
    fn prepare_view(&self, guest: &str) -> Result<PathBuf, ProviderError> {
        let directory = self.borg.options().view(guest);
        // The last run's mount may be there, and dead: then it can neither be made nor looked at.
        let made = mounts::clear_dead(&directory).map(drop).or_else(|_| create_private_dir(&directory));
        made.map_err(|e| {
            ProviderError::caused_by(ErrorKind::Other, format!("cannot create {}", directory.display()), e)
        })?;
        let checked = Mount::check(&directory);
        checked.map_err(|e| ProviderError::caused_by(ErrorKind::Other, "the segments cannot be shown to borg", e))
    }

    fn delete(&self, name: &str) -> Result<(), ProviderError> {
        let finished = self.borg.run(&Call { verb: "delete", archive: Some(name), ..Call::default() })?;
        self.succeeded(&finished, &format!("archive `{name}` cannot be deleted"))
    }

    /// Looks whether borg can skip what did not change since a base archive; the error is the reason for a full backup.
    fn known_base(&self, listing: &Listing, query: &DiskQuery) -> Result<(ArchiveName, Known), String> {
        let gone = || format!("archive {} is not in the repository", query.base);
        let name = listing.name(&query.base).ok_or_else(gone)?;
        let (options, guest) = (self.borg.options(), name.guest());
        let known = Known::load(options, guest);
        if known.repository != listing.repository.id
            || known.disks.get(&query.name).is_none_or(|disk| disk.archive != query.base)
        {
            return Err("borg's files cache does not belong to the base archive".into());
        }
        let view = options.view(guest);
        if known.view != view {
            return Err(format!("borg's files cache knows the disks in another place than {}", view.display()));
        }
        if known.shard_bits != SHARD_BITS {
            return Err("borg's files cache knows the segments in the directories of an earlier version".into());
        }
        if !options.cache().join(&listing.repository.id).join(store::files_cache(guest)).is_file() {
            return Err("borg's files cache is gone".into());
        }
        Ok((name, known))
    }
}

/// A disk's segment tables as its base archive has them; the error is the reason for a full backup.
fn base_tables(reader: &Reader, query: &DiskQuery) -> Result<DiskTables, String> {
    let manifest = reader.manifest().map_err(|e| e.to_string())?;
    let entry = manifest.disk(&query.name).ok_or("the base archive does not have the disk")?;
    if (entry.size, entry.segment_len) != (query.size, query.segment_len.bytes()) {
        return Err(format!(
            "the disk has {} bytes in segments of {}, it had {} in segments of {} in the base archive",
            query.size,
            query.segment_len.bytes(),
            entry.size,
            entry.segment_len
        ));
    }
    let table = |layer| reader.checked_table(entry, layer).map_err(|e| e.to_string());
    Ok(DiskTables { segments: table(Layer::Segments)?, fine: table(Layer::Fine)? })
}

impl Provider for BorgProvider {
    fn kind(&self) -> &'static str {
        "borg"
    }

    fn report_to(&mut self, events: &Events) {
        self.events = Some(events.clone());
    }

    fn repository_id(&mut self) -> Result<String, ProviderError> {
        let listing = self.listing()?;
        let id = listing.repository.id.clone();
        self.listed = Some(listing);
        Ok(id)
    }

    fn job_init(&mut self, _start: Timestamp) -> Result<(), ProviderError> {
        // What runs that were killed have left.
        for entry in fs::read_dir(self.borg.options().directory.join("view")).into_iter().flatten().flatten() {
            if let Err(error) = mounts::clear_dead(&entry.path()) {
                self.warn(error.to_string());
            }
        }
        Ok(())
    }

    fn job_cleanup(&mut self) -> Result<(), ProviderError> {
        Ok(())
    }

    fn backup_init(&mut self, guest: &str, start: Timestamp) -> Result<ArchiveName, ProviderError> {
        self.added = None;
        self.prepare_view(guest)?;
        // A name that somebody takes meanwhile makes borg fail.
        let listing = self.just_listed()?;
        for archive in &listing.archives {
            let left = archive.name.strip_suffix(INCOMPLETE).and_then(|name| name.parse::<ArchiveName>().ok());
            if left.is_some_and(|name| name.guest() == guest) {
                self.inform(format!("deleting `{}`, which a run that died has left", archive.name));
                self.delete(&archive.name)?;
            }
        }
        let taken: Vec<ArchiveName> = listing.archives.iter().filter_map(|a| a.name.parse().ok()).collect();
        ArchiveName::after(guest, start, &taken)
            .ok_or_else(|| ProviderError::new(ErrorKind::Other, "no time is left for an archive's name"))
    }

    fn mechanism(&self) -> Mechanism {
        Mechanism::Layers
    }

    fn mountpoint(&self, guest: &str) -> Option<PathBuf> {
        Some(self.borg.options().view(guest))
    }

    fn query_incremental(&mut self, disks: &[DiskQuery]) -> Result<Vec<Incremental>, ProviderError> {
        let listing = self.just_listed()?;
        let mut readers: HashMap<ArchiveName, Reader> = HashMap::new();
        let mut tables = |query: &DiskQuery| {
            let (name, known) = self.known_base(&listing, query)?;
            if let Some(tables) = known.tables(self.borg.options(), name.guest(), query) {
                return Ok(tables);
            }
            base_tables(readers.entry(name.clone()).or_insert_with(|| Reader::new(self.borg.clone(), name)), query)
        };
        let answers = disks.iter().map(|query| tables(query).map_or_else(Incremental::New, Incremental::Use)).collect();
        self.listed = Some(listing);
        Ok(answers)
    }

    fn backup(&mut self, input: BackupInput) -> Result<Stored, ProviderError> {
        self.listed = None;
        let stored = self.store(input)?;
        self.added = stored.added_bytes;
        Ok(stored)
    }

    fn backup_cleanup(&mut self, outcome: &Outcome) -> Result<Option<u64>, ProviderError> {
        Ok(self.added.take().filter(|_| *outcome == Outcome::Success))
    }

    fn list(&mut self, guest: Option<&str>) -> Result<Vec<ArchiveInfo>, ProviderError> {
        let listing = self.listing()?;
        let mut archives: Vec<ArchiveInfo> = listing
            .archives
            .iter()
            .filter_map(|archive| {
                let name: ArchiveName = archive.name.parse().ok()?;
                let wanted = guest.is_none_or(|guest| name.guest() == guest);
                let id = ArchiveId(archive.id.clone());
                wanted.then_some(ArchiveInfo { id, name, disks: Vec::new(), size: None, added_bytes: None })
            })
            .collect();
        archives.sort_by(|a, b| (a.name.time(), &a.name).cmp(&(b.name.time(), &b.name)));
        self.listed = Some(listing);
        Ok(archives)
    }

    fn prune(&mut self, request: PruneRequest) -> Result<Vec<Pruned>, ProviderError> {
        let listing = self.listing()?;
        let mut fates = Vec::with_capacity(request.remove.len());
        for id in &request.remove {
            let name = listing.name(id).filter(|name| name.guest() == request.guest);
            fates.push(match name {
                None => Pruned::Kept("it is no archive of this guest".into()),
                Some(_) if request.dry_run => Pruned::Removed,
                Some(_) if request.cancel.is_cancelled() => Pruned::Kept("stopped by a signal".into()),
                Some(name) => {
                    self.delete(&name.to_string()).map_or_else(|e| Pruned::Kept(spelled_out(&e)), |()| Pruned::Removed)
                }
            });
        }
        // Only this frees space.
        if fates.contains(&Pruned::Removed) && !request.dry_run && !request.cancel.is_cancelled() {
            let finished = self.borg.run(&Call { verb: "compact", ..Call::default() })?;
            self.succeeded(&finished, "the space of removed archives cannot be freed")?;
        }
        Ok(fates)
    }

    fn open(&mut self, archive: &ArchiveId) -> Result<Box<dyn ArchiveReader>, ProviderError> {
        let name = self.just_listed()?.name(archive).ok_or_else(|| {
            let message = format!("archive {archive} is not in repository {}", self.borg.options().repository);
            ProviderError::new(ErrorKind::NotFound, message)
        })?;
        Ok(Box::new(Reader::new(self.borg.clone(), name)))
    }
}
