//! Reading what an archive says about itself, and checking all of it.

use super::{Destination, DiskSelection, RestoreError};
use crate::{
    archive::{DiskEntry, Manifest},
    provider::{ArchiveReader, ErrorKind},
    segment::{DiskTables, SegmentLen, SegmentRecord, SegmentTable, TableError, layers::Layer},
};
use bytes::{Bytes, BytesMut};
use std::collections::HashSet;

/// Far more than 256 disks need.
const MAX_MANIFEST: u64 = 4 << 20;
/// The configurations of guests have some kilobytes.
const MAX_MEMBER: u64 = 4 << 20;
/// For the tables of all disks together: 20 TiB of data in segments of 1 MiB. They are held in memory.
const MAX_TABLES: u64 = 1 << 30;
/// A segment table's bytes besides its records, and of each record; see [`SegmentTable::to_bytes`].
const TABLE_HEAD: u64 = 8;
const TABLE_RECORD: u64 = 48;

/// What is wanted of an archive, checked.
#[derive(Debug)]
pub(super) struct Archived {
    pub(super) manifest: Manifest,
    pub(super) disks: Vec<ArchivedDisk>,
    /// File names and content.
    pub(super) members: Vec<(&'static str, Vec<u8>)>,
    /// Members that the archive should have.
    pub(super) missing: Vec<String>,
}

/// A disk in an archive. Its tables agree with its manifest entry.
#[derive(Debug)]
pub(crate) struct ArchivedDisk {
    /// A plain file name.
    pub(crate) name: String,
    /// Bytes.
    pub(crate) size: u64,
    pub(crate) segment_len: SegmentLen,
    /// Bytes of the segments of which anything is stored.
    pub(crate) data_bytes: u64,
    pub(crate) tables: DiskTables,
}

impl ArchivedDisk {
    /// Reads a segment of which anything is stored. What is stored is compared with its digest.
    pub(crate) fn segment(&self, reader: &dyn ArchiveReader, index: u64) -> Result<Bytes, RestoreError> {
        let (start, len) = self.range(self.segment_len, index)?;
        let whole = self.tables.segments.get(index);
        let whole = whole.map(|record| self.stored(reader, &self.name, self.segment_len, record)).transpose()?;
        let fine = self.tables.fine_of(self.segment_len, index);
        if let (Some(whole), []) = (&whole, fine) {
            return Ok(whole.clone());
        }
        let mut content = whole.map_or_else(|| BytesMut::zeroed(len as usize), BytesMut::from);
        let name = Layer::Fine.name(&self.name);
        for record in fine {
            let (offset, _) = self.range(SegmentLen::FINE, record.index)?;
            let bytes = self.stored(reader, &name, SegmentLen::FINE, record)?;
            let at = (offset - start) as usize;
            content[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        Ok(content.freeze())
    }

    fn range(&self, len: SegmentLen, index: u64) -> Result<(u64, u64), RestoreError> {
        let behind = || RestoreError::Table { disk: self.name.clone(), source: TableError::Range(index) };
        len.range(index, self.size).ok_or_else(behind)
    }

    /// Reads what is stored under `name`, in segments of `len`.
    fn stored(
        &self,
        reader: &dyn ArchiveReader,
        name: &str,
        len: SegmentLen,
        record: &SegmentRecord,
    ) -> Result<Bytes, RestoreError> {
        let disk = || self.name.clone();
        let (offset, len) = self.range(len, record.index)?;
        let bytes = reader.segment(name, record.index, len).map_err(|source| RestoreError::Segment {
            disk: disk(),
            offset,
            len,
            source,
        })?;
        if bytes.len() as u64 != len {
            return Err(RestoreError::SegmentLength { disk: disk(), offset, expected: len, found: bytes.len() as u64 });
        }
        if blake3::hash(&bytes) != blake3::Hash::from_bytes(record.digest) {
            return Err(RestoreError::SegmentDigest { disk: disk(), offset, len });
        }
        Ok(bytes)
    }
}

/// Reads the manifest and all disks' segment tables.
pub(crate) fn read_disks(reader: &dyn ArchiveReader) -> Result<(Manifest, Vec<ArchivedDisk>), RestoreError> {
    let manifest = Manifest::from_bytes(&member(reader, "manifest.json", MAX_MANIFEST)?)?;
    let disks = tables(reader, &manifest.disks.iter().collect::<Vec<_>>())?;
    Ok((manifest, disks))
}

/// Reads manifest, the wanted disks' segment tables and, for a directory, the other members.
pub(super) fn read(reader: &dyn ArchiveReader, destination: &Destination) -> Result<Archived, RestoreError> {
    let bytes = member(reader, "manifest.json", MAX_MANIFEST)?;
    let manifest = Manifest::from_bytes(&bytes)?;
    let wanted: Vec<&DiskEntry> = match destination {
        Destination::Directory { disks: DiskSelection::All, .. } => manifest.disks.iter().collect(),
        Destination::Directory { disks: DiskSelection::Only(names), .. } => {
            entries(&manifest, names.iter().map(String::as_str))?
        }
        Destination::Disks(paths) => entries(&manifest, paths.iter().map(|(name, _)| name.as_str()))?,
    };
    let disks = tables(reader, &wanted)?;
    let (mut members, mut missing) = (Vec::new(), Vec::new());
    if let Destination::Directory { .. } = destination {
        for (name, promised) in [("guest.conf", true), ("firewall.conf", manifest.firewall)] {
            match member(reader, name, MAX_MEMBER) {
                _ if !promised => {}
                Ok(bytes) => members.push((name, bytes)),
                Err(RestoreError::Read { source, .. }) if source.kind == ErrorKind::NotFound => {
                    missing.push(name.to_owned());
                }
                Err(error) => return Err(error),
            }
        }
        members.push(("manifest.json", bytes));
    }
    Ok(Archived { manifest, disks, members, missing })
}

fn tables(reader: &dyn ArchiveReader, wanted: &[&DiskEntry]) -> Result<Vec<ArchivedDisk>, RestoreError> {
    if wanted.is_empty() {
        return Err(RestoreError::NoDisks);
    }
    let mut budget = MAX_TABLES;
    let mut disks = Vec::with_capacity(wanted.len());
    for entry in wanted {
        disks.push(read_disk(reader, entry, &mut budget)?);
    }
    Ok(disks)
}

fn entries<'m, 'n>(
    manifest: &'m Manifest,
    names: impl Iterator<Item = &'n str>,
) -> Result<Vec<&'m DiskEntry>, RestoreError> {
    let mut seen = HashSet::new();
    names
        .map(|name| {
            if !seen.insert(name) {
                return Err(RestoreError::DiskTwice(name.to_owned()));
            }
            manifest.disk(name).ok_or_else(|| RestoreError::NoDisk {
                disk: name.to_owned(),
                archive: manifest.archive.clone(),
                known: manifest.disks.iter().map(|d| d.name.clone()).collect(),
            })
        })
        .collect()
}

fn member(reader: &dyn ArchiveReader, name: &str, limit: u64) -> Result<Vec<u8>, RestoreError> {
    let read = |source| RestoreError::Read { what: format!("`{name}`"), source };
    let bytes = reader.member(name, limit).map_err(read)?;
    if bytes.len() as u64 > limit {
        let too_long = crate::provider::ProviderError::new(
            ErrorKind::Damaged,
            format!("`{name}` has {} bytes, at most {limit} are read", bytes.len()),
        );
        return Err(read(too_long));
    }
    Ok(bytes)
}

/// No more records than segments, nor than the disk's data fills; all but the last segment are full.
fn read_disk(reader: &dyn ArchiveReader, entry: &DiskEntry, budget: &mut u64) -> Result<ArchivedDisk, RestoreError> {
    let segment_len = entry.segments()?;
    let most = segment_len.count(entry.data_bytes).saturating_add(1);
    let segments = read_table(reader, entry, &entry.name, (segment_len, most), &entry.digest, budget)?;
    let fine = match &entry.fine {
        None => SegmentTable::new(),
        Some(fine) => {
            let name = Layer::Fine.name(&entry.name);
            read_table(reader, entry, &name, (SegmentLen::FINE, fine.segments), &fine.digest, budget)?
        }
    };
    let tables = DiskTables { segments, fine };
    let data_bytes = tables.data_bytes(segment_len, entry.size);
    if data_bytes != entry.data_bytes {
        return Err(RestoreError::DataBytes {
            disk: entry.name.clone(),
            expected: entry.data_bytes,
            found: data_bytes,
        });
    }
    Ok(ArchivedDisk { name: entry.name.clone(), size: entry.size, segment_len, data_bytes, tables })
}

/// Reads the table that is stored under `name`, of segments of a length, at most so many.
fn read_table(
    reader: &dyn ArchiveReader,
    entry: &DiskEntry,
    name: &str,
    (len, most): (SegmentLen, u64),
    digest: &str,
    budget: &mut u64,
) -> Result<SegmentTable, RestoreError> {
    let disk = || entry.name.clone();
    let limit = TABLE_HEAD.saturating_add(len.count(entry.size).min(most).saturating_mul(TABLE_RECORD));
    let Some(rest) = budget.checked_sub(limit) else {
        return Err(RestoreError::TableSize { disk: disk(), bytes: limit, limit: *budget });
    };
    *budget = rest;
    let bytes = reader
        .table(name, limit)
        .map_err(|source| RestoreError::Read { what: format!("segment table of disk `{name}`"), source })?;
    if bytes.len() as u64 > limit {
        return Err(RestoreError::TableSize { disk: disk(), bytes: bytes.len() as u64, limit });
    }
    let table = SegmentTable::from_bytes(&bytes, len, entry.size)
        .map_err(|source| RestoreError::Table { disk: disk(), source })?;
    let found = table.digest_hex();
    if found != digest {
        let expected = digest.chars().take(64).collect();
        return Err(RestoreError::TableDigest { disk: disk(), expected, found });
    }
    Ok(table)
}
