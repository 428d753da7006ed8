//! A block device, which may hold anything before.

use super::DiskImage;
use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, fallocate},
};
use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicU8, Ordering},
};

static ZEROES: [u8; 1 << 20] = [0; 1 << 20];

/// Ways to clear a range, from the cheapest on. The kernel promises zeroes for both calls on block devices, or fails
/// (`blkdev_fallocate`: unmap without fallback, then zeroes without unmap).
const WAYS: [Option<FallocateFlags>; 3] = [
    Some(FallocateFlags::FALLOC_FL_PUNCH_HOLE.union(FallocateFlags::FALLOC_FL_KEEP_SIZE)),
    Some(FallocateFlags::FALLOC_FL_ZERO_RANGE.union(FallocateFlags::FALLOC_FL_KEEP_SIZE)),
    None,
];

/// A device at least as large as the disk. What lies behind the disk's end is not touched.
#[derive(Debug)]
pub(in super::super) struct DeviceDisk {
    file: File,
    /// Index of the first way that may work.
    way: AtomicU8,
}

impl DeviceDisk {
    /// Takes an open device.
    pub(in super::super) fn new(file: File) -> Self {
        Self { file, way: AtomicU8::new(0) }
    }

    /// As if the ways before `way` were known not to work.
    #[cfg(test)]
    pub(in super::super) fn from_way(file: File, way: u8) -> Self {
        Self { file, way: AtomicU8::new(way) }
    }

    fn write_zeroes(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        while len > 0 {
            let part = len.min(ZEROES.len() as u64);
            self.file.write_all_at(&ZEROES[..part as usize], offset)?;
            offset += part;
            len -= part;
        }
        Ok(())
    }
}

impl DiskImage for DeviceDisk {
    fn starts_zeroed(&self) -> bool {
        false
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn clear(&self, offset: u64, len: u64) -> io::Result<()> {
        let (Ok(from), Ok(bytes)) = (i64::try_from(offset), i64::try_from(len)) else {
            return self.write_zeroes(offset, len);
        };
        let first = usize::from(self.way.load(Ordering::Relaxed));
        for (way, flags) in WAYS.iter().enumerate().skip(first) {
            let Some(flags) = flags else { break };
            match fallocate(&self.file, *flags, from, bytes) {
                Ok(()) => return Ok(()),
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENODEV) => {
                    self.way.fetch_max(way as u8 + 1, Ordering::Relaxed);
                }
                // Not a multiple of the device's block size: true for this range only.
                Err(Errno::EINVAL) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        self.write_zeroes(offset, len)
    }

    fn finish(&self) -> io::Result<()> {
        Ok(())
    }
}
