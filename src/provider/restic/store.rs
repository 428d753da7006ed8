//! Making an archive.

use super::{
    DescribedDisk, Description, ResticProvider, layout,
    layout::Shape,
    source::{Progress, Source},
    verify::{self, Base, DiskFound, Gap, Inventory},
};
use crate::{
    archive::ArchiveId,
    provider::{BackupInput, ErrorKind, ProviderError, Stored},
};
use jiff::tz::TimeZone;
use rustic_core::{
    BackupOptions, FileType, IndexedFullStatus, ParentOptions, Repository, SnapshotGroupCriterion, SnapshotOptions,
    WriteBackend as _,
    repofile::{Node, SnapshotFile},
};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

impl ResticProvider {
    /// Runs rustic. The snapshot stays held back.
    fn archive(
        &self,
        indexed: &Repository<IndexedFullStatus>,
        source: &Source,
        snapshot: SnapshotFile,
        parents: Vec<String>,
    ) -> Result<SnapshotFile, ProviderError> {
        let mut with_parents = ParentOptions::default();
        // Without parents rustic would look for one itself.
        with_parents.force = parents.is_empty();
        with_parents.parents = parents;
        with_parents.group_by = Some(SnapshotGroupCriterion::new());
        with_parents.ignore_ctime = true;
        let mut how = BackupOptions::default();
        how.no_scan = true;
        how.parent_opts = with_parents;
        // rustic and pariter assert what they believe of each other; that must not end a job with other guests in it.
        catch_unwind(AssertUnwindSafe(|| indexed.archive(&how, source, snapshot, &["/".into()])))
            .map_err(|_| ProviderError::new(ErrorKind::Other, "the repository's library has panicked"))?
            .map_err(|e| self.failed(ErrorKind::Other, "the archive cannot be stored", &e))
    }

    /// Compares what rustic has stored with what was planned.
    fn check(
        &self,
        snapshot: &SnapshotFile,
        progress: &Progress,
        disks: &[(String, Shape, Option<ArchiveId>)],
    ) -> Result<(), ProviderError> {
        let incomplete = |text: String| {
            ProviderError::new(
                ErrorKind::Incomplete,
                format!("the archive would not be complete, so it is not kept: {text}"),
            )
        };
        let finished =
            progress.take_finished().ok_or_else(|| incomplete("its source has not come to its end".into()))?;
        let planned = progress.planned();
        let summary = snapshot.summary.as_ref().map(|s| (s.total_files_processed, s.total_bytes_processed));
        if summary != Some(planned) {
            return Err(incomplete(format!("{planned:?} files and bytes were planned, {summary:?} were stored")));
        }

        let repository = self.index()?;
        let wrong = |gap: Gap| match gap {
            Gap::Missing(text) => incomplete(text),
            Gap::Rustic(e) => self.failed(ErrorKind::Incomplete, "the archive cannot be checked", &e),
        };
        let inventory = Inventory::new(&repository, self.backend.as_ref()).map_err(wrong)?;
        let root = inventory.tree(snapshot.tree).map_err(wrong)?;
        let file = |node: Option<&Node>, name: &str, size: u64| {
            let node =
                node.filter(|node| node.meta.size == size).ok_or_else(|| incomplete(format!("`{name}` is missing")))?;
            inventory.file(node, &mut DiskFound::empty()).map_err(wrong)
        };
        for (name, size) in &finished.members {
            file(verify::child(&root, name), name, *size)?;
        }
        let below = verify::subtree(&root, layout::DISKS).ok_or_else(|| incomplete("it has no disks".into()))?;
        let below = inventory.tree(below).map_err(wrong)?;
        if root.nodes.len() != finished.members.len() + 1 || below.nodes.len() != 2 * disks.len() {
            return Err(incomplete("it has more files than planned".into()));
        }
        for (((name, shape, base), table), size) in disks.iter().zip(&finished.tables).zip(&finished.table_sizes) {
            let table_name = layout::table_name(name);
            file(verify::child(&below, &table_name), &table_name, *size)?;
            let directory =
                verify::subtree(&below, name).ok_or_else(|| incomplete(format!("disk `{name}` is missing")))?;
            let base = base
                .as_ref()
                .and_then(|base| self.confirmed.get(&(base.clone(), name.clone())))
                .map(|confirmed| Base { table: &confirmed.table, found: &confirmed.found });
            inventory.disk(directory, table, *shape, base).map_err(|gap| match gap {
                Gap::Missing(text) => incomplete(format!("disk `{name}`: {text}")),
                rustic @ Gap::Rustic(_) => wrong(rustic),
            })?;
        }
        Ok(())
    }

    fn snapshot_for(&self, input: &BackupInput) -> Result<SnapshotFile, ProviderError> {
        let description = Description {
            disks: input.disks.iter().map(|d| DescribedDisk { name: d.name.clone(), size: d.size }).collect(),
        };
        let options = SnapshotOptions::default()
            .label(input.archive.to_string())
            .host(input.archive.guest().to_owned())
            .time(input.instant.to_zoned(TimeZone::UTC))
            .command("pvebackup".to_owned()) // else rustic stores the process's arguments
            .description(serde_json::to_string(&description).unwrap_or_default());
        let mut snapshot = options
            .add_tags(layout::TAG)
            .and_then(|options| options.to_snapshot())
            .map_err(|e| self.failed(ErrorKind::Other, "the archive cannot be described", &e))?;
        snapshot.program_version = concat!("pvebackup ", env!("CARGO_PKG_VERSION")).into();
        Ok(snapshot)
    }

    pub(super) fn store(&mut self, input: BackupInput) -> Result<Stored, ProviderError> {
        self.require_confirmed(&input)?;
        let parents = self.parents(&input)?;
        let snapshot = self.snapshot_for(&input)?;
        let disks: Vec<_> = input
            .disks
            .iter()
            .map(|d| {
                (
                    d.name.clone(),
                    Shape { size: d.size, segment_len: d.segment_len },
                    d.base.as_ref().map(|b| b.0.clone()),
                )
            })
            .collect();
        let progress = Progress::new(input.cancel.clone());
        let source = Source::new(input, Arc::clone(&progress))?;
        let indexed = match self.indexed.take() {
            Some(indexed) => indexed,
            None => self.index()?,
        };

        self.backend.begin_backup(Arc::clone(&progress));
        let archived = self.archive(&indexed, &source, snapshot, parents);
        let held = self.backend.end_backup();
        drop((indexed, source));
        // What the source or a write has recorded is the cause; rustic's own error is at most a consequence.
        if let Some(failure) = progress.take_failure() {
            return Err(failure);
        }
        let snapshot = archived?;
        let held = held.ok_or_else(|| ProviderError::new(ErrorKind::Incomplete, "rustic has written no snapshot"))?;
        self.check(&snapshot, &progress, &disks)?;
        if let Some(lock) = &self.lock {
            lock.still_held()?;
        }
        if let Some(failure) = progress.take_failure() {
            return Err(failure);
        }

        let id = held.id();
        let released = self
            .backend
            .release(held)
            .map_err(|e| self.failed(ErrorKind::Other, "the archive cannot be made visible", &e))
            .and_then(|()| match self.is_listed(id) {
                Ok(true) => Ok(()),
                Ok(false) => {
                    Err(ProviderError::new(ErrorKind::Incomplete, "the new archive is not in the repository's list"))
                }
                Err(error) => Err(error),
            });
        if let Err(error) = released {
            // A write that failed may still have left its file.
            let _ = self.backend.remove(FileType::Snapshot, &id, true);
            return Err(error);
        }
        let added = snapshot.summary.as_ref().map(|s| s.data_added_packed);
        self.added = added;
        Ok(Stored { id: ArchiveId(id.to_hex().to_string()), added_bytes: added })
    }

    /// What is called unchanged must be compared with the base's content afterwards, so the base has to be known.
    fn require_confirmed(&self, input: &BackupInput) -> Result<(), ProviderError> {
        for disk in &input.disks {
            let Some((base, table)) = &disk.base else { continue };
            let shape = Shape { size: disk.size, segment_len: disk.segment_len };
            let confirmed = self.confirmed.get(&(base.clone(), disk.name.clone()));
            if confirmed.is_none_or(|known| known.shape != shape || known.table != *table) {
                let message = format!("base archive {base} was not confirmed as it is given for disk `{}`", disk.name);
                return Err(ProviderError::new(ErrorKind::Incomplete, message));
            }
        }
        Ok(())
    }

    /// The base archives' snapshots. They must be older than the new one: times decide what rustic takes for unchanged.
    fn parents(&self, input: &BackupInput) -> Result<Vec<String>, ProviderError> {
        let mut parents: Vec<String> = Vec::new();
        for (base, _) in input.disks.iter().filter_map(|disk| disk.base.as_ref()) {
            if parents.contains(&base.0) {
                continue;
            }
            let snapshot = self.snapshot(base)?;
            if snapshot.time.timestamp() >= input.instant {
                let message = format!("base archive {base} is not older than the new one: the clock went back");
                return Err(ProviderError::new(ErrorKind::Incomplete, message));
            }
            parents.push(base.0.clone());
        }
        Ok(parents)
    }
}
