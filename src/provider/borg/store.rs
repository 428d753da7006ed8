//! Making an archive.

use super::{
    BorgOptions, BorgProvider, INCOMPLETE,
    command::{Call, MAX_OUTPUT},
    options::CHUNKER_PARAMS,
    outcome::{Finished, Message},
    progress::Progress,
};
use crate::{
    archive::{ArchiveId, ArchiveName},
    config::create_private_dir,
    fuse::{
        LARGEST_REQUEST, Mount, MountOptions,
        segments::{
            DiskPlan, MANIFEST, MAX_DISKS, MAX_SEGMENTS, SHARD_BITS, Seen, SeenTable, SegmentView, ViewFailure,
        },
    },
    provider::{BackupInput, DiskInput, DiskQuery, ErrorKind, FineInput, ProviderError, Stored},
    segment::{DiskTables, SegmentLen, SegmentRecord, SegmentTable, layers::Layer},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

/// The kernel fetches a segment with one request, and looks at no time of reading, which would be one more.
const VIEW: MountOptions = MountOptions { read_ahead_kib: Some(LARGEST_REQUEST >> 10), read_only: true };

/// What borg says where a guest has no files cache yet. Where it should have one the view fails the backup.
const NO_FILES_CACHE: [&str; 2] = ["The files cache can't be read.", "Continuing without files cache"];

/// Which archives a guest's files cache belongs to.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Known {
    pub(super) repository: String,
    /// Where the view was mounted; borg knows files by their whole path.
    #[serde(default)]
    pub(super) view: PathBuf,
    /// The view's [`SHARD_BITS`]; 0 for those of versions that did not note it.
    #[serde(default)]
    pub(super) shard_bits: u32,
    /// The last archive of every disk.
    pub(super) disks: BTreeMap<String, KnownDisk>,
}

/// A disk in its last archive.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct KnownDisk {
    pub(super) archive: ArchiveId,
    size: u64,
    segment_len: u64,
    /// BLAKE3 of the copy of its segment table that is kept here: to ask borg for it would be one more start.
    table: String,
    /// The same of its fine segments, if it has any.
    #[serde(default)]
    fine: Option<String>,
}

impl Known {
    /// What is known; nothing when that cannot be read.
    pub(super) fn load(options: &BorgOptions, guest: &str) -> Self {
        fs::read(options.known(guest)).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
    }

    /// The kept segment tables of a disk; `None` when they are lost, or are not those of the disk as it is.
    pub(super) fn tables(&self, options: &BorgOptions, guest: &str, query: &DiskQuery) -> Option<DiskTables> {
        let disk = self.disks.get(&query.name)?;
        if (disk.size, disk.segment_len) != (query.size, query.segment_len.bytes()) {
            return None;
        }
        let kept = |layer: Layer, len, hash: &str| {
            let bytes = fs::read(options.known_table(guest, &layer.name(&query.name))).ok()?;
            let whole = blake3::hash(&bytes).to_hex().as_str() == hash;
            SegmentTable::from_bytes(&bytes, len, query.size).ok().filter(|_| whole)
        };
        let segments = kept(Layer::Segments, query.segment_len, &disk.table)?;
        let fine = match &disk.fine {
            None => SegmentTable::new(),
            Some(hash) => kept(Layer::Fine, SegmentLen::FINE, hash)?,
        };
        Some(DiskTables { segments, fine })
    }

    /// Takes note of a disk's last archive. Of its layers the fine one comes last.
    fn learn(&mut self, options: &BorgOptions, guest: &str, seen: &SeenTable, archive: &ArchiveId) {
        let path = options.known_table(guest, &seen.layer.name(&seen.disk));
        let directory = path.parent().unwrap_or(&path);
        if let Err(error) = create_private_dir(directory).and_then(|()| replace(&path, &seen.bytes)) {
            tracing::debug!("{}: {error}", path.display());
        }
        let (size, segment_len) = (seen.size, seen.segment_len.bytes());
        let table = blake3::hash(&seen.bytes).to_hex().to_string();
        if let (Layer::Fine, Some(disk)) = (seen.layer, self.disks.get_mut(&seen.disk)) {
            disk.fine = Some(table);
        } else {
            let disk = KnownDisk { archive: archive.clone(), size, segment_len, table, fine: None };
            self.disks.insert(seen.disk.clone(), disk);
        }
    }

    /// Not synced: losing it costs a full backup.
    fn store(&self, options: &BorgOptions, guest: &str) -> io::Result<()> {
        replace(&options.known(guest), &serde_json::to_vec(self)?)
    }

    fn forget(options: &BorgOptions, guest: &str) {
        if let Err(error) = fs::remove_file(options.known(guest))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("{}: {error}", options.known(guest).display());
        }
    }
}

/// Writes a file that is there as it was, or as it is now.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(path))?;
    file.write_all(bytes)?;
    file.persist(path)?;
    Ok(())
}

/// Name of a guest's files cache.
pub(super) fn files_cache(guest: &str) -> String {
    format!("files.{guest}")
}

/// The answer to `borg create --json`.
#[derive(Deserialize)]
struct Created {
    archive: CreatedArchive,
}

#[derive(Deserialize)]
struct CreatedArchive {
    stats: Stats,
}

#[derive(Deserialize)]
struct Stats {
    nfiles: u64,
    deduplicated_size: u64,
}

fn incomplete(what: impl Into<String>) -> ProviderError {
    ProviderError::new(ErrorKind::Incomplete, format!("the archive is not complete: {}", what.into()))
}

impl BorgProvider {
    pub(super) fn store(&mut self, input: BackupInput) -> Result<Stored, ProviderError> {
        let (archive, guest) = (input.archive.clone(), input.archive.guest().to_owned());
        let temporary = format!("{archive}{INCOMPLETE}");
        let created = self.create(input, &temporary);
        let renamed = created.and_then(|created| Ok((self.rename(&temporary, &archive)?, created)));
        let ((repository, id), (tables, added)) = match renamed {
            Ok(stored) => stored,
            Err(error) => {
                if self.listing().is_ok_and(|l| l.archives.iter().any(|a| a.name == temporary))
                    && let Err(error) = self.delete(&temporary)
                {
                    // The next backup of the guest tries again.
                    self.warn(error.to_string());
                }
                return Err(error);
            }
        };
        let options = self.borg.options();
        let mut known = Known::load(options, &guest);
        let view = options.view(&guest);
        if known.repository != repository || known.view != view || known.shard_bits != SHARD_BITS {
            known = Known { repository, view, shard_bits: SHARD_BITS, disks: BTreeMap::new() };
        }
        for table in &tables {
            known.learn(options, &guest, table, &id);
        }
        if let Err(error) = known.store(options, &guest) {
            self.warn(format!("the next backup will be a full one: {}: {error}", options.known(&guest).display()));
            Known::forget(options, &guest);
        }
        Ok(Stored { id, added_bytes: Some(added) })
    }

    /// Runs `borg create` on the view. Returns the segment tables, and the bytes that the repository grew by.
    fn create(&self, input: BackupInput, name: &str) -> Result<(Vec<SeenTable>, u64), ProviderError> {
        let options = self.borg.options();
        let guest = input.archive.guest().to_owned();
        let instant = input.instant.as_microsecond();
        check_names(&input)?;
        let mut plans = Vec::with_capacity(input.disks.len());
        for mut disk in input.disks {
            let fine = disk.fine.take();
            let (name, size) = (disk.name.clone(), disk.size);
            plans.push(plan(disk, instant)?);
            // Fine segments have no files where there are none.
            plans.extend(
                fine.map(|fine| plan_fine(&name, size, fine, instant)).transpose()?.filter(|p| !p.records.is_empty()),
            );
        }
        // Shorter chunks would cost every backup more: borg has all of the repository's in memory, and one length counts for all
        // disks.
        let longest = plans.iter().map(|plan| plan.segment_len.bytes()).max().unwrap_or(SegmentLen::MAX);
        let chunk_len = (longest / 2).max(SegmentLen::MIN);
        let mut paths: Vec<String> = input.members.iter().map(|member| member.0.clone()).collect();
        paths.extend(["disks".into(), MANIFEST.into()]);
        let view = SegmentView::new(input.members, plans, input.manifest, instant);

        let directory = self.prepare_view(&guest)?;
        let mount = Mount::start(&directory, view.clone(), VIEW)
            .map_err(|e| ProviderError::caused_by(ErrorKind::Other, "the segments cannot be shown to borg", e))?;
        let progress = Progress::new(options.progress_pause, paths.clone());
        let call = Call {
            verb: "create",
            options: self.create_options(chunk_len),
            archive: Some(name),
            arguments: paths.clone(),
            directory: Some(mount.path()),
            files_cache: Some(&guest),
            progress: Some(progress.clone()),
        };
        let repository = self.borg.options().repository.clone();
        let result = self.borg.start(&call).and_then(|running| {
            running.finish_unless("borg create", MAX_OUTPUT, || {
                if let Some(news) = progress.news() {
                    self.inform(news);
                }
                if input.cancel.is_cancelled() {
                    return Some(ProviderError::new(ErrorKind::Source, "the backup was cancelled"));
                }
                view.failure()
                    .map(|failure| failed(failure.clone()))
                    .or_else(|| progress.lost().map(|m| given_up(m, &repository)))
            })
        });
        if let Err(error) = mount.umount() {
            self.warn(error.to_string());
        }
        let complete = view.finish();
        let ran = result.as_ref().is_ok_and(Finished::ran);
        let gap = view.failure().or_else(|| complete.as_ref().err().filter(|_| ran));
        if let Some(ViewFailure::Unchanged { .. } | ViewFailure::NotRead { .. }) = gap {
            // borg's files cache is not what it should be.
            Known::forget(options, &guest);
        }
        let finished = result?;
        if let Some(gap) = gap {
            // The view knows why; borg only saw an input/output error.
            return Err(failed(gap.clone()));
        }
        self.succeeded(&finished, "the archive cannot be stored")?;
        if let Some(message) = progress.lost() {
            return Err(given_up(message, &repository));
        }
        for message in finished.messages.iter().filter(|m| m.level == "WARNING") {
            if NO_FILES_CACHE.iter().any(|words| message.text.starts_with(words)) {
                continue;
            }
            self.warn(format!("borg: {}", message.text));
        }
        if finished.left_out() {
            return Err(incomplete(format!("borg ended with {}", finished.status)));
        }
        let Seen { files, segments, tables } = complete.map_err(failed)?;
        let created: Created = serde_json::from_slice(&finished.output)
            .map_err(|e| ProviderError::caused_by(ErrorKind::Other, "borg's answer cannot be read", e))?;
        let stats = created.archive.stats;
        if stats.nfiles != files {
            return Err(incomplete(format!("{files} files were planned, {} were stored", stats.nfiles)));
        }
        tracing::debug!(files, segments, "borg has read what changed");
        Ok((tables, stats.deduplicated_size))
    }

    /// `chunk_len` is in bytes, and counts where the user has not said how chunks are cut.
    fn create_options(&self, chunk_len: u64) -> Vec<String> {
        let options = self.borg.options();
        let mut how: Vec<String> = [
            "--json",
            "--files-cache=mtime,size",
            // What is the same in every file, and costs a system call each.
            "--noctime",
            "--noflags",
            "--noacls",
            "--noxattrs",
            "--checkpoint-interval",
            "0",
        ]
        .map(str::to_owned)
        .into();
        if options.chunker_params().is_none() {
            how.extend([CHUNKER_PARAMS.into(), format!("fixed,{chunk_len}")]);
        }
        if let Some(compression) = &options.compression {
            how.extend(["--compression".into(), compression.clone()]);
        }
        if let Some(rate) = options.upload_ratelimit {
            how.extend(["--upload-ratelimit".into(), rate.to_string()]);
        }
        how.extend(options.extra().filter_map(|(name, value)| Some(format!("{name}={}", value?))));
        how
    }

    /// Gives the archive its name. Returns the repository's id and the archive's.
    fn rename(&self, from: &str, to: &ArchiveName) -> Result<(String, ArchiveId), ProviderError> {
        let finished = self.borg.run(&Call {
            verb: "rename",
            archive: Some(from),
            arguments: vec![to.to_string()],
            ..Call::default()
        })?;
        self.succeeded(&finished, "the archive cannot be given its name")?;
        let listing = self.listing()?;
        let name = to.to_string();
        let found = listing.archives.iter().find(|archive| archive.name == name);
        let id = found.map(|archive| ArchiveId(archive.id.clone()));
        Ok((listing.repository.id, id.ok_or_else(|| incomplete("it is not in the repository's list"))?))
    }
}

/// borg has given up a file.
fn given_up(message: Message, repository: &str) -> ProviderError {
    // Where the system says why, that is no matter of the file.
    match message.kind() {
        Some(kind) => ProviderError::new(
            kind,
            format!("the archive cannot be stored (repository {repository}): {}", message.text),
        ),
        None => incomplete(message.text),
    }
}

fn failed(failure: ViewFailure) -> ProviderError {
    match failure {
        ViewFailure::Source(error) => ProviderError::caused_by(ErrorKind::Source, "the backup's source failed", error),
        ViewFailure::Contract { .. } => ProviderError::new(ErrorKind::Source, failure.to_string()),
        ViewFailure::Unchanged { .. } | ViewFailure::NotRead { .. } => incomplete(format!(
            "{failure}: borg's files cache is not that of the last backup; the next backup will be a full one"
        )),
    }
}

/// Names must be files' names in one tree, each its own.
fn check_names(input: &BackupInput) -> Result<(), ProviderError> {
    let plain = |name: &str| {
        (1..=128).contains(&name.len())
            && !name.starts_with(['.', '-'])
            && name.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b'\\' | b'"'))
    };
    let mut names = HashSet::new();
    let layers = |disk: &DiskInput| [Layer::Segments, Layer::Fine].map(|layer| layer.name(&disk.name));
    let disks = input.disks.iter().flat_map(layers).flat_map(|name| [format!("{name}.segments"), name]);
    let fits = input.disks.len() <= MAX_DISKS && input.members.len() < 64;
    let mut top: HashSet<&str> = ["disks", MANIFEST].into();
    if !fits
        || !disks.into_iter().all(|name| plain(&name) && names.insert(name))
        || !input.members.iter().all(|(name, _)| plain(name) && top.insert(name))
    {
        return Err(ProviderError::new(ErrorKind::Other, "the names of the disks and members exclude each other"));
    }
    Ok(())
}

/// The segments of the new archive: the base's, overwritten by what is expected. Segments that are known to be zero are left
/// out, and so are those that the base only has because it did not know that.
fn plan(disk: DiskInput, instant: i64) -> Result<DiskPlan, ProviderError> {
    let mut zero: HashMap<u64, [u8; 32]> = HashMap::new();
    let mut is_zero = |record: &SegmentRecord| {
        let len = disk.segment_len.range(record.index, disk.size).map_or(0, |(_, len)| len);
        *zero.entry(len).or_insert_with(|| *blake3::hash(&vec![0; len as usize]).as_bytes()) == record.digest
    };
    let mut base = disk.base.map(|(_, table)| table).unwrap_or_default();
    base.retain(|record| !is_zero(record));
    let expected = disk.expected.iter().map(|expected| (expected.index, expected.zero));
    let count = disk.segment_len.count(disk.size);
    let records = overwritten(&base, expected, count, instant).map_err(|what| wrong(&disk.name, what))?;
    Ok(DiskPlan {
        layer: Layer::Segments,
        name: disk.name,
        size: disk.size,
        segment_len: disk.segment_len,
        records,
        changed: disk.changed,
    })
}

/// The same for a disk's fine segments, which may well be zero.
fn plan_fine(disk: &str, size: u64, fine: FineInput, instant: i64) -> Result<DiskPlan, ProviderError> {
    let expected = fine.expected.iter().map(|index| (*index, false));
    let records =
        overwritten(&fine.base, expected, SegmentLen::FINE.count(size), instant).map_err(|e| wrong(disk, e))?;
    Ok(DiskPlan {
        layer: Layer::Fine,
        name: Layer::Fine.name(disk),
        size,
        segment_len: SegmentLen::FINE,
        records,
        changed: fine.changed,
    })
}

fn wrong(disk: &str, what: &str) -> ProviderError {
    ProviderError::new(ErrorKind::Source, format!("disk `{disk}`: {what}"))
}

/// The base's records, overwritten by what is expected, each with whether it is zero and thus left out.
fn overwritten(
    base: &SegmentTable,
    expected: impl Iterator<Item = (u64, bool)>,
    count: u64,
    instant: i64,
) -> Result<Vec<SegmentRecord>, &'static str> {
    if count > MAX_SEGMENTS {
        return Err("it has too many segments");
    }
    if base.records().iter().any(|record| record.stored_at >= instant) {
        return Err("the base archive has segments that are not older than this backup: the clock went back");
    }
    let mut old = base.records().iter().peekable();
    let mut records = Vec::with_capacity(base.records().len());
    let mut next = 0;
    for (index, zero) in expected {
        if index < next || index >= count {
            return Err("what will change is out of order");
        }
        next = index + 1;
        while let Some(record) = old.next_if(|record| record.index < index) {
            records.push(*record);
        }
        old.next_if(|record| record.index == index);
        if !zero {
            records.push(SegmentRecord { index, stored_at: instant, digest: [0; 32] });
        }
    }
    records.extend(old);
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provider::Expected;

    #[test]
    fn the_plan_is_the_base_overwritten_without_zeroes() {
        let segment_len = SegmentLen::new(64 << 10).expect("length");
        let zeroes = *blake3::hash(&vec![0; 64 << 10]).as_bytes();
        let mut table = SegmentTable::new();
        for (index, digest) in [(0, [1; 32]), (1, zeroes), (2, [2; 32]), (3, [3; 32]), (9, zeroes)] {
            table.push(SegmentRecord { index, stored_at: 1, digest }).expect("ordered");
        }
        let expected = [(2, false), (3, true), (5, false)].map(|(index, zero)| Expected { index, zero });
        let disk = |instant: i64| {
            let disk = DiskInput {
                name: "a".into(),
                size: 10 * (64 << 10),
                segment_len,
                base: Some((ArchiveId("x".into()), table.clone())),
                expected: expected.to_vec(),
                changed: Box::new(std::iter::empty()),
                fine: None,
            };
            plan(disk, instant)
        };
        let found: Vec<(u64, i64)> = disk(7).expect("plan").records.iter().map(|r| (r.index, r.stored_at)).collect();
        assert_eq!(found, [(0, 1), (2, 7), (5, 7)]);
        assert!(disk(1).is_err(), "as old as the base");
    }
}
