//! What a restored disk is written into.

mod device;
mod qcow2;
mod raw;

pub(super) use device::DeviceDisk;
pub(super) use qcow2::Qcow2Disk;
pub(super) use raw::RawDisk;

use std::io;

/// A disk image that is being written, from many threads, each byte at most once.
///
/// [`DiskImage::finish`] is called once, after the last write; before it the image may be unusable. When it is not
/// called, whoever owns the file throws it away.
pub(super) trait DiskImage: Sync {
    /// Whether everything that is not written reads as zeroes already.
    fn starts_zeroed(&self) -> bool;

    /// Writes all of `bytes` at `offset`.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Makes a range read as zeroes; only called when [`DiskImage::starts_zeroed`] is false.
    fn clear(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Hands everything to the operating system. Does not make it durable.
    fn finish(&self) -> io::Result<()>;
}
