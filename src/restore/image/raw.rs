//! A raw image in a file.

use super::DiskImage;
use std::{fs::File, io, os::unix::fs::FileExt};

/// A sparse file of the disk's size.
#[derive(Debug)]
pub(in super::super) struct RawDisk {
    file: File,
}

impl RawDisk {
    /// Turns an empty file into a hole of `size` bytes.
    pub(in super::super) fn create(file: File, size: u64) -> io::Result<Self> {
        file.set_len(size)?;
        Ok(Self { file })
    }
}

impl DiskImage for RawDisk {
    fn starts_zeroed(&self) -> bool {
        true
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn clear(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn finish(&self) -> io::Result<()> {
        Ok(())
    }
}
