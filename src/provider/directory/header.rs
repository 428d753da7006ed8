//! The header of a qcow2 image, as far as it says what else would be opened and how much memory it would take.
//!
//! Offsets and bits are those of QEMU's `docs/interop/qcow2.rst`. imago reads the image itself; this is the gate in front of
//! it, which lets through only what this program writes.

use std::{fs::File, io, os::unix::fs::FileExt};
use thiserror::Error;

const MAGIC: u32 = 0x5146_49fb;
const CLUSTER_BITS: u32 = 16;
/// Bytes of a cluster.
pub(super) const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Bytes of the disk for every entry of the L1 table.
const L2_COVERS: u64 = CLUSTER / 8 * CLUSTER;
/// What QEMU allows (`QCOW_MAX_L1_SIZE`).
const MAX_L1: u64 = 32 << 20;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const DATA_FILE: u32 = 0x4441_5441;

/// What an image's header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Size of the disk in bytes.
    pub(super) size: u64,
    /// The backing file as it is named there; its format is qcow2.
    pub(super) backing: Option<String>,
    l1_offset: u64,
    l1_bytes: u64,
}

/// Why a file is none of our images.
#[derive(Debug, Error)]
pub(super) enum HeaderError {
    /// It cannot be read.
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    /// It has something that our images do not have.
    #[error("{0}")]
    Foreign(String),
}

fn foreign<T>(what: impl Into<String>) -> Result<T, HeaderError> {
    Err(HeaderError::Foreign(what.into()))
}

struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn part(&self, offset: usize, len: usize) -> Result<&[u8], HeaderError> {
        let part = offset.checked_add(len).and_then(|end| self.0.get(offset..end));
        part.ok_or_else(|| HeaderError::Foreign("its header is cut off".into()))
    }

    fn u32(&self, offset: usize) -> Result<u32, HeaderError> {
        Ok(self.part(offset, 4)?.iter().fold(0, |number, byte| number << 8 | u32::from(*byte)))
    }

    fn u64(&self, offset: usize) -> Result<u64, HeaderError> {
        Ok(u64::from(self.u32(offset)?) << 32 | u64::from(self.u32(offset + 4)?))
    }
}

impl Header {
    /// Reads and checks the header.
    ///
    /// # Errors
    /// When the file is no qcow2 image, or has anything that this program does not write: an external data file, encryption,
    /// compression other than zlib, other cluster sizes, internal snapshots, a mark of damage.
    pub(super) fn read(file: &File) -> Result<Self, HeaderError> {
        let len = file.metadata()?.len();
        let mut head = vec![0; len.min(CLUSTER) as usize];
        file.read_exact_at(&mut head, 0)?;
        Self::parse(&head, len)
    }

    /// `head` is the first cluster of a file of `len` bytes.
    pub(super) fn parse(head: &[u8], len: u64) -> Result<Self, HeaderError> {
        let bytes = Bytes(head);
        if bytes.u32(0)? != MAGIC {
            return foreign("it is no qcow2 image");
        }
        let (version, cluster_bits) = (bytes.u32(4)?, bytes.u32(20)?);
        if version != 3 || cluster_bits != CLUSTER_BITS {
            return foreign(format!("it has version {version} and clusters of 2^{cluster_bits} bytes"));
        }
        let incompatible = bytes.u64(72)?;
        if incompatible != 0 {
            return foreign(format!("it has incompatible features {incompatible:#x}"));
        }
        if bytes.u32(32)? != 0 {
            return foreign("it is encrypted");
        }
        if bytes.u32(60)? != 0 {
            return foreign("it has internal snapshots");
        }
        let (size, l1_entries, l1_offset) = (bytes.u64(24)?, u64::from(bytes.u32(36)?), bytes.u64(40)?);
        let l1_bytes = l1_entries * 8;
        if l1_bytes > MAX_L1 || size.div_ceil(L2_COVERS) > l1_entries {
            return foreign(format!("its L1 table has {l1_entries} entries for {size} bytes"));
        }
        let refcount_clusters = u64::from(bytes.u32(56)?);
        if refcount_clusters * CLUSTER > len {
            return foreign(format!("its refcount table has {refcount_clusters} clusters"));
        }
        if !l1_offset.is_multiple_of(CLUSTER) || l1_offset.checked_add(l1_bytes).is_none_or(|end| end > len) {
            return foreign("its L1 table lies behind its end");
        }
        let backing = match (bytes.u64(8)?, bytes.u32(16)?) {
            (0, _) => None,
            (offset, len) if len <= 1023 => {
                let name = bytes.part(usize::try_from(offset).unwrap_or(usize::MAX), len as usize)?;
                let name = std::str::from_utf8(name)
                    .map_err(|_| HeaderError::Foreign("its backing file has no name".into()))?;
                Some(name.to_owned())
            }
            (_, len) => return foreign(format!("the name of its backing file has {len} bytes")),
        };
        let format = Self::extensions(&bytes)?;
        if backing.is_some() && format.as_deref() != Some(b"qcow2") {
            return foreign("its backing file is not marked as qcow2");
        }
        Ok(Self { size, backing, l1_offset, l1_bytes })
    }

    /// Walks the header extensions; returns the backing file's format.
    fn extensions(bytes: &Bytes<'_>) -> Result<Option<Vec<u8>>, HeaderError> {
        let mut at = bytes.u32(100)? as usize;
        let mut format = None;
        loop {
            let (kind, len) = (bytes.u32(at)?, bytes.u32(at + 4)? as usize);
            match kind {
                0 => return Ok(format),
                BACKING_FORMAT => format = Some(bytes.part(at + 8, len)?.to_vec()),
                DATA_FILE => return foreign("it has an external data file"),
                _ => {}
            }
            bytes.part(at + 8, len)?;
            at += 8 + len.next_multiple_of(8);
        }
    }

    /// BLAKE3 of the first cluster and the L1 table: different for images that were written in another order or with other
    /// clusters.
    pub(super) fn fingerprint(&self, file: &File) -> io::Result<String> {
        let mut hasher = blake3::Hasher::new();
        for (offset, len) in [(0, CLUSTER), (self.l1_offset, self.l1_bytes)] {
            let mut part = vec![0; len as usize];
            file.read_exact_at(&mut part, offset)?;
            hasher.update(&part);
        }
        Ok(hasher.finalize().to_hex().to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The fields that `qemu-img create -f qcow2 -b ../b.qcow2 -F qcow2` sets, for a disk of 1 GiB.
    fn sample() -> Vec<u8> {
        let mut head = vec![0; CLUSTER as usize];
        let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC.to_be_bytes());
        put(4, &3u32.to_be_bytes());
        put(8, &200u64.to_be_bytes());
        put(16, &10u32.to_be_bytes());
        put(20, &16u32.to_be_bytes());
        put(24, &(1u64 << 30).to_be_bytes());
        put(36, &2u32.to_be_bytes());
        put(40, &(3 * CLUSTER).to_be_bytes());
        put(48, &CLUSTER.to_be_bytes());
        put(56, &1u32.to_be_bytes());
        put(96, &4u32.to_be_bytes());
        put(100, &112u32.to_be_bytes());
        put(112, &BACKING_FORMAT.to_be_bytes());
        put(116, &5u32.to_be_bytes());
        put(120, b"qcow2");
        put(200, b"../b.qcow2");
        head
    }

    const LEN: u64 = 5 * CLUSTER;

    #[test]
    fn our_own_header_is_read() {
        let header = Header::parse(&sample(), LEN).unwrap();
        assert_eq!((header.size, header.backing.as_deref()), (1 << 30, Some("../b.qcow2")));
    }

    #[test]
    fn whatever_could_lead_elsewhere_is_refused() {
        let refused = |at: usize, bytes: &[u8]| {
            let mut head = sample();
            head[at..at + bytes.len()].copy_from_slice(bytes);
            Header::parse(&head, LEN).map(drop).expect_err("must be refused").to_string()
        };
        assert!(refused(0, b"RAW ").contains("no qcow2"));
        assert!(refused(7, &[2]).contains("version 2"));
        assert!(refused(79, &[4]).contains("incompatible"), "external data file");
        assert!(refused(79, &[2]).contains("incompatible"), "marked as corrupt");
        assert!(refused(35, &[2]).contains("encrypted"));
        assert!(refused(63, &[1]).contains("snapshots"));
        assert!(refused(112, &DATA_FILE.to_be_bytes()).contains("data file"));
        assert!(refused(120, b"raw\0\0").contains("not marked"));
        assert!(refused(24, &[0x7f]).contains("L1 table"));
        assert!(refused(36, &[0xff; 4]).contains("L1 table"));
        assert!(refused(40, &[0x7f]).contains("behind its end"));
        assert!(refused(56, &[0xff; 4]).contains("refcount"));
        assert!(refused(8, &[0xff; 8]).contains("cut off"));
        assert!(refused(16, &[0xff; 4]).contains("name"));
        assert!(refused(116, &[0xff; 4]).contains("cut off"));
        assert!(Header::parse(&sample()[..90], LEN).is_err());
    }

    proptest! {
        #[test]
        fn damaged_headers_never_panic(places in prop::collection::vec((0usize..240, any::<u8>()), 1..20), cut in 0usize..300) {
            let mut head = sample();
            for (at, byte) in places {
                head[at] = byte;
            }
            let _ = Header::parse(&head, LEN);
            let _ = Header::parse(&head[..cut], LEN);
        }
    }
}
