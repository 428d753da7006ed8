//! A qcow2 image, written by imago.

use super::DiskImage;
use crate::qcow2::{block_on, image_size};
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, file::File as Storage, qcow2::Qcow2,
};
use std::{fs::File, io};

/// A new image without backing file. Dropped before [`DiskImage::finish`] its metadata is incomplete: imago keeps
/// reference counts in memory until it is told to flush.
pub(in super::super) struct Qcow2Disk {
    image: FormatAccess<Storage>,
}

impl Qcow2Disk {
    /// Makes an image for a disk of `size` bytes in an empty file. A size that is no multiple of 512 is rounded up with
    /// zeroes, as qemu-img does.
    pub(in super::super) fn create(file: File, size: u64) -> io::Result<Self> {
        let size = image_size(size)?;
        let builder = Qcow2::<Storage>::create_builder(Storage::try_from(file)?).size(size);
        let image = block_on(builder.create_open(DenyImplicitOpenGate::default(), |storage| {
            Ok(Qcow2::<Storage>::builder(storage).backing(None).write(true))
        }))?;
        Ok(Self { image: FormatAccess::new(image) })
    }
}

impl DiskImage for Qcow2Disk {
    fn starts_zeroed(&self) -> bool {
        true
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        block_on(self.image.write(bytes, offset))
    }

    fn clear(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn finish(&self) -> io::Result<()> {
        block_on(self.image.flush())
    }
}
