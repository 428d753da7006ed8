//! An archive in memory: a real reader with handles to break it.

use crate::{
    archive::{Consistency, DiskEntry, FineEntry, Manifest},
    provider::{ArchiveReader, ErrorKind, ProviderError},
    segment::{DiskTables, SegmentLen, SegmentRecord, SegmentTable, layers::Layer},
};
use bytes::Bytes;
use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

/// What happens to a segment when it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// One bit is wrong.
    Corrupt,
    /// It is not there.
    Withhold,
    /// A byte is missing.
    Short,
    /// A byte too many.
    Long,
    /// The repository cannot be reached.
    Fail,
    /// The provider has a bug.
    Panic,
}

type Hook = Box<dyn Fn(usize) + Send + Sync>;

pub(crate) struct Memory {
    pub(crate) manifest: Manifest,
    pub(crate) members: BTreeMap<String, Vec<u8>>,
    pub(crate) tables: HashMap<String, Vec<u8>>,
    segments: HashMap<(String, u64), Bytes>,
    faults: HashMap<(String, u64), Fault>,
    reads: AtomicUsize,
    hook: Mutex<Option<Hook>>,
}

/// A disk of bytes.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub(crate) name: &'static str,
    pub(crate) content: Vec<u8>,
}

impl Memory {
    pub(crate) fn of(disks: &[Model], len: SegmentLen) -> Self {
        let mut memory = Self {
            manifest: Manifest {
                version: Manifest::VERSION,
                program: "0.1.0".into(),
                archive: "pve-qemu-100-2026-01-31T02:00:07Z".parse().expect("name"),
                guest_kind: "proxmox".into(),
                guest_name: None,
                instant: "2026-01-31T02:00:08Z".parse().expect("time"),
                consistency: Consistency::default(),
                disks: Vec::new(),
                skipped: Vec::new(),
                firewall: true,
            },
            members: [("guest.conf", "cores: 2\n"), ("firewall.conf", "[OPTIONS]\n")]
                .map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec()))
                .into(),
            tables: HashMap::new(),
            segments: HashMap::new(),
            faults: HashMap::new(),
            reads: AtomicUsize::new(0),
            hook: Mutex::new(None),
        };
        for disk in disks {
            let mut table = SegmentTable::new();
            for (index, bytes) in disk.content.chunks(len.bytes() as usize).enumerate() {
                if bytes.iter().any(|b| *b != 0) {
                    let digest = *blake3::hash(bytes).as_bytes();
                    table.push(SegmentRecord { index: index as u64, stored_at: 1, digest }).expect("ordered");
                    memory.segments.insert((disk.name.to_owned(), index as u64), Bytes::copy_from_slice(bytes));
                }
            }
            let size = disk.content.len() as u64;
            memory.manifest.disks.push(DiskEntry {
                name: disk.name.into(),
                device: format!("drive-{}", disk.name),
                size,
                segment_len: len.bytes(),
                data_bytes: table.data_bytes(len, size),
                fine: None,
                digest: table.digest_hex(),
                bitmap_action: "new".into(),
                reason: "first backup".into(),
                generation: None,
                read_bytes: 0,
            });
            memory.tables.insert(disk.name.to_owned(), table.to_bytes());
        }
        memory
    }

    /// Lays fine segments over a disk of the archive: those at `indices`, with what `now` has there.
    pub(crate) fn overlaid(mut self, now: &Model, len: SegmentLen, indices: &[u64]) -> Self {
        let (size, name) = (now.content.len() as u64, Layer::Fine.name(now.name));
        let segments = SegmentTable::from_bytes(&self.tables[now.name], len, size).expect("its own table");
        let mut tables = DiskTables::from(segments);
        for index in indices.iter().copied() {
            let (offset, bytes) = SegmentLen::FINE.range(index, size).expect("on the disk");
            let bytes = Bytes::copy_from_slice(&now.content[offset as usize..(offset + bytes) as usize]);
            let digest = *blake3::hash(&bytes).as_bytes();
            tables.fine.push(SegmentRecord { index, stored_at: 2, digest }).expect("ordered");
            self.segments.insert((name.clone(), index), bytes);
        }
        let entry = self.manifest.disks.iter_mut().find(|d| d.name == now.name).expect("in the archive");
        entry.data_bytes = tables.data_bytes(len, size);
        entry.fine = FineEntry::of(&tables.fine);
        self.tables.insert(name, tables.fine.to_bytes());
        let disks = self.manifest.disks.clone();
        self.manifest = self.manifest.with_disks(disks);
        self
    }

    /// Makes a disk of `size` bytes of its first segment, with variations of it all over.
    pub(crate) fn spread(&mut self, disk: &str, len: SegmentLen, size: u64, copies: u64) {
        let first = self.segments[&(disk.to_owned(), 0)].to_vec();
        self.segments.clear();
        let mut table = SegmentTable::new();
        for copy in 0..copies {
            let index = len.count(size) / copies * copy;
            let mut bytes = first.clone();
            bytes[..8].copy_from_slice(&copy.to_le_bytes());
            let digest = *blake3::hash(&bytes).as_bytes();
            table.push(SegmentRecord { index, stored_at: 1, digest }).expect("ordered");
            self.segments.insert((disk.to_owned(), index), bytes.into());
        }
        let entry = self.manifest.disks.iter_mut().find(|d| d.name == disk).expect("in the archive");
        entry.size = size;
        entry.data_bytes = table.data_bytes(len, size);
        entry.digest = table.digest_hex();
        self.tables.insert(disk.to_owned(), table.to_bytes());
    }

    pub(crate) fn fault(mut self, disk: &str, index: u64, fault: Fault) -> Self {
        assert!(self.segments.contains_key(&(disk.to_owned(), index)), "a fault of a hole would not be noticed");
        self.faults.insert((disk.to_owned(), index), fault);
        self
    }

    /// Calls `hook` before every read of a segment, with the number of reads so far.
    pub(crate) fn before_reads(self, hook: impl Fn(usize) + Send + Sync + 'static) -> Self {
        *self.hook.lock().expect("no panic") = Some(Box::new(hook));
        self
    }

    pub(crate) fn reads(&self) -> usize {
        self.reads.load(Ordering::Relaxed)
    }
}

fn limited(what: &str, bytes: Option<Vec<u8>>, limit: u64) -> Result<Vec<u8>, ProviderError> {
    let bytes = bytes.ok_or_else(|| ProviderError::new(ErrorKind::NotFound, format!("no {what}")))?;
    if bytes.len() as u64 > limit {
        return Err(ProviderError::new(ErrorKind::Damaged, format!("{what} has more than {limit} bytes")));
    }
    Ok(bytes)
}

impl ArchiveReader for Memory {
    fn member(&self, name: &str, limit: u64) -> Result<Vec<u8>, ProviderError> {
        let manifest = || self.manifest.to_bytes().ok().filter(|_| name == "manifest.json");
        limited(name, self.members.get(name).cloned().or_else(manifest), limit)
    }

    fn table(&self, disk: &str, limit: u64) -> Result<Vec<u8>, ProviderError> {
        limited("table", self.tables.get(disk).cloned(), limit)
    }

    fn segment(&self, disk: &str, index: u64, len: u64) -> Result<Bytes, ProviderError> {
        let number = self.reads.fetch_add(1, Ordering::Relaxed);
        if let Ok(hook) = self.hook.lock()
            && let Some(hook) = hook.as_ref()
        {
            hook(number);
        }
        let key = (disk.to_owned(), index);
        let missing = || ProviderError::new(ErrorKind::NotFound, format!("no segment {index} of {disk}"));
        let bytes = self.segments.get(&key).filter(|b| b.len() as u64 == len).ok_or_else(missing)?;
        let mut changed = bytes.to_vec();
        match self.faults.get(&key) {
            None => return Ok(bytes.clone()),
            Some(Fault::Corrupt) => changed[bytes.len() / 2] ^= 1,
            Some(Fault::Withhold) => return Err(missing()),
            Some(Fault::Short) => changed.truncate(bytes.len() - 1),
            Some(Fault::Long) => changed.push(0),
            Some(Fault::Fail) => return Err(ProviderError::new(ErrorKind::Other, "connection reset")),
            Some(Fault::Panic) => panic!("a bug in the provider"),
        }
        Ok(changed.into())
    }
}
