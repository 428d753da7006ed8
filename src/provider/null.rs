//! A provider that stores nothing: for measuring the way from QEMU to here. It never confirms an archive.

use super::{
    ArchiveInfo, ArchiveReader, BackupInput, DiskQuery, ErrorKind, Incremental, Outcome, Provider, ProviderError,
    Stored,
};
use crate::{
    archive::{ArchiveId, ArchiveName},
    segment::{DiskItem, SegmentTable, merge},
};
use jiff::Timestamp;

/// Takes everything and keeps nothing but counts.
#[derive(Debug, Default)]
pub struct NullProvider {
    segments: u64,
    bytes: u64,
}

impl NullProvider {
    /// A provider that has seen nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Changed segments with data that were taken so far.
    pub fn segments(&self) -> u64 {
        self.segments
    }

    /// Bytes of these.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Provider for NullProvider {
    fn kind(&self) -> &'static str {
        "null"
    }

    fn repository_id(&mut self) -> Result<String, ProviderError> {
        Ok("null".into())
    }

    fn job_init(&mut self, _start: Timestamp) -> Result<(), ProviderError> {
        Ok(())
    }

    fn job_cleanup(&mut self) -> Result<(), ProviderError> {
        Ok(())
    }

    fn backup_init(&mut self, guest: &str, start: Timestamp) -> Result<ArchiveName, ProviderError> {
        Ok(ArchiveName::new(guest, start))
    }

    fn query_incremental(&mut self, disks: &[DiskQuery]) -> Result<Vec<Incremental>, ProviderError> {
        Ok(disks.iter().map(|_| Incremental::New("the null provider keeps no archives".into())).collect())
    }

    fn backup(&mut self, input: BackupInput) -> Result<Stored, ProviderError> {
        let stored_at = input.instant.as_microsecond();
        let mut tables = Vec::with_capacity(input.disks.len());
        for disk in input.disks {
            let failed = |e| ProviderError::caused_by(ErrorKind::Source, format!("disk `{}` failed", disk.name), e);
            let mut table = SegmentTable::new();
            for item in merge(disk.base.map(|(_, table)| table), disk.changed, stored_at) {
                if input.cancel.is_cancelled() {
                    return Err(ProviderError::new(ErrorKind::Source, "the backup was cancelled"));
                }
                let item = item.map_err(failed)?;
                table.push(*item.record()).map_err(|e| {
                    ProviderError::caused_by(ErrorKind::Source, format!("disk `{}` came out of order", disk.name), e)
                })?;
                if let DiskItem::Changed(_, data) = item {
                    self.segments += 1;
                    self.bytes += data.bytes().len() as u64;
                    data.stored();
                }
            }
            tables.push(table);
        }
        let tables: Vec<_> = tables.into_iter().map(Into::into).collect();
        (input.manifest)(&tables);
        Ok(Stored { id: ArchiveId(input.archive.to_string()), added_bytes: Some(0) })
    }

    fn backup_cleanup(&mut self, _outcome: &Outcome) -> Result<Option<u64>, ProviderError> {
        Ok(None)
    }

    fn list(&mut self, _guest: Option<&str>) -> Result<Vec<ArchiveInfo>, ProviderError> {
        Ok(Vec::new())
    }

    fn open(&mut self, archive: &ArchiveId) -> Result<Box<dyn ArchiveReader>, ProviderError> {
        Err(ProviderError::new(
            ErrorKind::NotFound,
            format!("the null provider keeps no archives, so not {archive} either"),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        archive::Manifest,
        provider::{DiskInput, SourceError},
        segment::{Segment, SegmentData, SegmentLen},
    };
    use std::sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    };
    use tokio_util::sync::CancellationToken;

    fn input(stored: &Arc<AtomicU64>, fail_at: Option<u64>) -> BackupInput {
        let stored = Arc::clone(stored);
        let changed = (0..4).map(move |index| {
            if fail_at == Some(index) {
                return Err(SourceError { disk: "scsi0".into(), message: "gone".into() });
            }
            let stored = Arc::clone(&stored);
            let release = move |done: bool| {
                stored.fetch_add(u64::from(done), Ordering::Relaxed);
            };
            let data = (index != 2).then(|| SegmentData::new(vec![1; 100].into(), release));
            Ok(Segment { index, data })
        });
        let name: ArchiveName = "pve-qemu-1-2026-01-31T02:00:07Z".parse().expect("name");
        BackupInput {
            archive: name.clone(),
            instant: name.time(),
            members: Vec::new(),
            disks: vec![DiskInput {
                name: "scsi0".into(),
                size: 4 << 20,
                segment_len: SegmentLen::new(1 << 20).expect("length"),
                base: None,
                expected: (0..4).map(|index| crate::provider::Expected { index, zero: false }).collect(),
                changed: Box::new(changed),
                fine: None,
            }],
            manifest: Box::new(move |tables| {
                assert_eq!(tables[0].segments.records().len(), 3);
                Manifest {
                    version: Manifest::VERSION,
                    program: String::new(),
                    archive: name,
                    guest_kind: "plain".into(),
                    guest_name: None,
                    instant: Timestamp::UNIX_EPOCH,
                    consistency: crate::archive::Consistency::default(),
                    disks: Vec::new(),
                    skipped: Vec::new(),
                    firewall: false,
                }
            }),
            cancel: CancellationToken::new(),
        }
    }

    #[test]
    fn everything_is_taken_and_counted() {
        let stored = Arc::new(AtomicU64::new(0));
        let mut provider = NullProvider::new();
        provider.backup(input(&stored, None)).expect("taken");
        assert_eq!((provider.segments(), provider.bytes(), stored.load(Ordering::Relaxed)), (3, 300, 3));
        assert!(provider.list(None).expect("list").is_empty());
    }

    #[test]
    fn a_failing_source_fails_the_backup() {
        let stored = Arc::new(AtomicU64::new(0));
        let error = NullProvider::new().backup(input(&stored, Some(1))).expect_err("must fail");
        assert_eq!(error.kind, ErrorKind::Source);
    }
}
