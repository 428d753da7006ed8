//! Writing one archive.
//!
//! Everything goes into `qemu-EPOCH.partial`. When all of it is durable, read again and found to be what was planned, the
//! directory gets its name, and that is the commit: a backup that is killed leaves a directory that nobody takes for an
//! archive, and that the guest's next backup removes.

use super::{
    Current,
    chain::{self, Confirmed, Seal},
    header::Header,
    image::{Held, NewImage},
    tree::{self, Dir, Epoch, failed},
};
use crate::{
    archive::ArchiveId,
    provider::{BackupInput, DiskInput, DiskQuery, ErrorKind, ProviderError, Stored},
    qcow2::image_size,
    segment::{Segment, SegmentLen, SegmentRecord, SegmentTable},
};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::{fs::File, path::PathBuf};
use tokio_util::sync::CancellationToken;

/// Segments that are read again and compared before an archive counts: of those just written, and of all.
const SAMPLES: u64 = 16;

/// A changed segment that was written, as it will stand in the table; `None` for zeroes.
struct Written {
    index: u64,
    record: Option<SegmentRecord>,
}

/// Stores an archive; on an error none is left.
pub(super) fn store(current: &Current, most_images: usize, input: BackupInput) -> Result<Stored, ProviderError> {
    let partial_name = format!("{}{}", current.epoch, tree::PARTIAL);
    let at = current.dir.path().join(&partial_name);
    check_names(&input)?;
    if input.archive != current.name {
        let message = format!("archive {} was announced, not {}", current.name, input.archive);
        return Err(ProviderError::new(ErrorKind::Other, message));
    }
    let partial =
        current.dir.make(&partial_name).map_err(|e| failed(ErrorKind::Other, "cannot create directory", &at, e))?;
    let stored = Writer { current, partial: &partial, most_images }.archive(input).and_then(|()| {
        let added = partial.occupied().ok();
        commit(current, &partial_name)?;
        Ok(Stored { id: tree::archive_id(&current.guest, current.epoch), added_bytes: added })
    });
    if stored.is_err()
        && let Err(error) = current.dir.remove(&partial_name)
    {
        // The next backup of this guest tries again.
        tracing::warn!(path = %at.display(), %error, "an incomplete archive cannot be removed");
    }
    stored
}

fn check_names(input: &BackupInput) -> Result<(), ProviderError> {
    let mut taken = vec![tree::MANIFEST.to_owned(), tree::LOG.to_owned(), tree::DISKS.to_owned()];
    let disks = input.disks.iter().map(|disk| (disk.name.as_str(), tree::image_name(&disk.name)));
    let members = input.members.iter().map(|(name, _)| (name.as_str(), name.clone()));
    for (name, file) in disks.chain(members) {
        if !tree::is_plain_name(name) || taken.contains(&file) {
            return Err(ProviderError::new(ErrorKind::Other, format!("`{name}` cannot be a file in an archive")));
        }
        taken.push(file);
    }
    Ok(())
}

/// Gives the archive its name.
fn commit(current: &Current, partial_name: &str) -> Result<(), ProviderError> {
    let name = current.epoch.to_string();
    let at = current.dir.path().join(&name);
    let cannot = |e| failed(ErrorKind::Other, "cannot complete archive", &at, e);
    if current.dir.has(&name).map_err(cannot)? {
        return Err(ProviderError::new(ErrorKind::Other, format!("{} exists already", at.display())));
    }
    current.dir.sync().map_err(cannot)?;
    current.dir.rename(partial_name, &name).map_err(cannot)?;
    current.dir.sync().map_err(|error| {
        // Whether the name is durable is not known, so it must not stay.
        if let Err(back) = current.dir.rename(&name, partial_name) {
            tracing::warn!(path = %at.display(), error = %back, "an archive that may not be durable cannot be taken back");
        }
        cannot(error)
    })
}

struct Writer<'a> {
    current: &'a Current,
    partial: &'a Dir,
    most_images: usize,
}

fn cancelled() -> ProviderError {
    ProviderError::new(ErrorKind::Source, "the backup was cancelled")
}

impl Writer<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.partial.path().join(name)
    }

    fn archive(&self, input: BackupInput) -> Result<(), ProviderError> {
        let disks = self
            .partial
            .make(tree::DISKS)
            .map_err(|e| failed(ErrorKind::Other, "cannot create directory", &self.path(tree::DISKS), e))?;
        let instant = input.instant.as_microsecond();
        let mut tables = Vec::with_capacity(input.disks.len());
        let bases: Vec<(String, u64, ArchiveId)> = input
            .disks
            .iter()
            .filter_map(|disk| Some((disk.name.clone(), disk.size, disk.base.as_ref()?.0.clone())))
            .collect();
        for disk in input.disks {
            tables.push(self.disk(&disks, disk, instant, &input.cancel)?);
        }
        let tables: Vec<_> = tables.into_iter().map(Into::into).collect();
        let manifest = (input.manifest)(&tables);
        let bytes = manifest
            .to_bytes()
            .map_err(|e| ProviderError::caused_by(ErrorKind::Other, "the manifest cannot be written", e))?;
        for (name, bytes) in input.members.iter().chain([&(tree::MANIFEST.to_owned(), bytes)]) {
            self.partial
                .write(name, bytes)
                .map_err(|e| failed(ErrorKind::Other, "cannot write", &self.path(name), e))?;
        }
        if chain::manifest(self.partial, &self.current.guest, self.current.epoch)? != manifest {
            return Err(self.incomplete("the manifest is not what was written"));
        }
        disks.sync().map_err(|e| failed(ErrorKind::Other, "cannot sync", disks.path(), e))?;
        self.partial.sync().map_err(|e| failed(ErrorKind::Other, "cannot sync", self.partial.path(), e))?;
        // A backup takes hours, in which somebody may have made room.
        for (disk, size, base) in bases {
            let still = tree::parse_id(&base)
                .map(|(guest, epoch)| chain::unchanged(&self.current.dir, &guest, epoch, &disk, size));
            if let Some(Err(error)) = still {
                return Err(self.incomplete(format!("disk `{disk}` lost what it builds on: {error}")));
            }
        }
        if input.cancel.is_cancelled() {
            return Err(cancelled());
        }
        Ok(())
    }

    fn incomplete(&self, what: impl std::fmt::Display) -> ProviderError {
        ProviderError::new(ErrorKind::Incomplete, format!("archive {}: {what}", self.current.name))
    }

    /// The base once more: another program may have removed it since it was confirmed.
    fn base(&self, disk: &DiskInput) -> Result<Option<(Epoch, Confirmed)>, ProviderError> {
        let Some((id, table)) = &disk.base else { return Ok(None) };
        let query =
            DiskQuery { name: disk.name.clone(), size: disk.size, segment_len: disk.segment_len, base: id.clone() };
        let unusable = |why: String| self.incomplete(format!("disk `{}` cannot build on {id}: {why}", disk.name));
        let (guest, epoch) = tree::parse_id(id).ok_or_else(|| unusable("it is no archive".into()))?;
        if guest != self.current.guest {
            return Err(unusable("it is one of another guest".into()));
        }
        let confirmed =
            chain::confirm(&self.current.dir, &guest, epoch, &query).map_err(|e| unusable(e.to_string()))?;
        if confirmed.table != *table {
            return Err(unusable("its segment table is another one than was confirmed".into()));
        }
        if confirmed.links.len() >= self.most_images {
            return Err(unusable(format!("it consists of {} images already", confirmed.links.len())));
        }
        Ok(Some((epoch, confirmed)))
    }

    fn disk(
        &self,
        disks: &Dir,
        disk: DiskInput,
        instant: i64,
        cancel: &CancellationToken,
    ) -> Result<SegmentTable, ProviderError> {
        let base = self.base(&disk)?;
        let (name, len, size) = (disk.name, disk.segment_len, disk.size);
        let image = tree::image_name(&name);
        let at = self.path(&image);
        let cannot = |e| failed(ErrorKind::Other, "cannot write image", &at, e);

        let file = self.partial.create(&image).map_err(cannot)?;
        let backing = base.as_ref().map(|(epoch, _)| epoch.backing(&name));
        let new = NewImage::create(file.try_clone().map_err(cannot)?, size, backing.clone()).map_err(cannot)?;
        let mut written: Vec<Written> = Vec::new();
        for segment in disk.changed {
            if cancel.is_cancelled() {
                return Err(cancelled());
            }
            let segment = segment.map_err(|e| {
                ProviderError::caused_by(ErrorKind::Source, format!("disk `{name}` could not be read"), e)
            })?;
            let Segment { index, data } = segment;
            let out_of = |what: &str| {
                ProviderError::new(ErrorKind::Source, format!("disk `{name}`: segment {index} is out of {what}"))
            };
            if written.last().is_some_and(|last| last.index >= index) {
                return Err(out_of("order"));
            }
            let (offset, bytes) = len.range(index, size).ok_or_else(|| out_of("range"))?;
            let record = if let Some(data) = data {
                if data.bytes().len() as u64 != bytes {
                    return Err(out_of("shape"));
                }
                let record = SegmentRecord { index, stored_at: instant, digest: data.digest() };
                new.write(data.bytes(), offset).map_err(cannot)?;
                data.stored();
                Some(record)
            } else {
                // Without a backing file, what is not written is zero.
                if base.is_some() {
                    new.write_zeroes(offset, bytes).map_err(cannot)?;
                }
                None
            };
            written.push(Written { index, record });
        }
        new.finish().map_err(cannot)?;
        file.sync_all().map_err(cannot)?;
        // So that the comparison below reads what the target has, where the target allows it.
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).ok();
        drop(file);

        let (links, table) = match base {
            Some((_, confirmed)) => (confirmed.links, Some(confirmed.table)),
            None => (Vec::new(), None),
        };
        let table = join(table.as_ref(), &written).map_err(|e| {
            ProviderError::caused_by(ErrorKind::Other, format!("disk `{name}`: its segments cannot be listed"), e)
        })?;
        let shape = Shape { name: &name, len, size };
        let (file, header) = self.verify(shape, backing.as_deref(), &links, &written, &table)?;

        let table_name = tree::table_name(&name);
        disks
            .write(&table_name, &table.to_bytes())
            .map_err(|e| failed(ErrorKind::Other, "cannot write", &disks.path().join(&table_name), e))?;
        let seal = Seal::of(&file, &header).map_err(cannot)?.to_bytes()?;
        let seal_name = tree::seal_name(&name);
        disks
            .write(&seal_name, &seal)
            .map_err(|e| failed(ErrorKind::Other, "cannot write", &disks.path().join(&seal_name), e))?;
        Ok(table)
    }

    /// Opens the image as a reader will, compares all that it maps with what was planned, and some of its segments.
    fn verify(
        &self,
        disk: Shape<'_>,
        backing: Option<&str>,
        links: &[chain::Link],
        written: &[Written],
        table: &SegmentTable,
    ) -> Result<(File, Header), ProviderError> {
        let Shape { name, len, size } = disk;
        let wrong = |what: String| self.incomplete(format!("disk `{name}`: {what}"));
        let at = self.path(&tree::image_name(name));
        let cannot = |e| failed(ErrorKind::Incomplete, "cannot read image", &at, e);
        let file = self.partial.file(&tree::image_name(name)).map_err(cannot)?;
        let header = chain::check_header(&file, name, size).map_err(wrong)?;
        if header.backing.as_deref() != backing {
            return Err(wrong("its image builds on another one than was planned".into()));
        }
        let mut files = vec![file.try_clone().map_err(cannot)?];
        files.extend(chain::files(links)?);
        let image = chain::open(files, name)?;

        let end = image_size(size).map_err(cannot)?;
        let rest = if backing.is_some() { Held::Backing } else { Held::Zero };
        let planned = written.iter().map(|w| {
            let (offset, bytes) = len.range(w.index, size).unwrap_or((end, 0));
            let to = if offset + bytes == size { end } else { offset + bytes };
            (offset, to, if w.record.is_some() { Held::Data } else { Held::Zero })
        });
        let mut at = 0;
        for (from, to, held) in planned.chain([(end, end, rest)]) {
            for (to, expected) in [(from, rest), (to, held)] {
                while at < to {
                    let (found, bytes) = image.held(at, to - at).map_err(cannot)?;
                    if found != expected {
                        return Err(wrong(format!("its image has {found:?} at byte {at} instead of {expected:?}")));
                    }
                    at += bytes;
                }
            }
        }
        let new: Vec<SegmentRecord> = written.iter().filter_map(|w| w.record).collect();
        chain::compare(&image, &new, SAMPLES, len, size).map_err(wrong)?;
        chain::compare(&image, table.records(), SAMPLES, len, size).map_err(wrong)?;
        Ok((file, header))
    }
}

#[derive(Clone, Copy)]
struct Shape<'a> {
    name: &'a str,
    len: SegmentLen,
    size: u64,
}

/// The new archive's table: the base's, and what was written over it.
fn join(base: Option<&SegmentTable>, written: &[Written]) -> Result<SegmentTable, crate::segment::TableError> {
    let mut table = SegmentTable::new();
    let mut old = base.map_or(&[][..], SegmentTable::records).iter().peekable();
    for new in written {
        while let Some(record) = old.next_if(|record| record.index < new.index) {
            table.push(*record)?;
        }
        old.next_if(|record| record.index == new.index);
        if let Some(record) = new.record {
            table.push(record)?;
        }
    }
    old.try_for_each(|record| table.push(*record))?;
    Ok(table)
}
