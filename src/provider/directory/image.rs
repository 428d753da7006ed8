//! Images, written and read by imago.
//!
//! imago opens a backing file itself unless it is given one. Here every image is given its backing image, or none, and the
//! gate for what it would open by itself is closed.

use super::header::CLUSTER;
use crate::qcow2::{block_on, image_size};
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, ShallowMapping,
    file::File as Storage, qcow2::Qcow2,
};
use std::{fs::File, io};

/// A new image. It is only good after [`NewImage::finish`]: imago keeps tables in memory until it is told to flush.
pub(super) struct NewImage {
    image: FormatAccess<Storage>,
    size: u64,
}

impl NewImage {
    /// Makes an image for a disk of `size` bytes in an empty file. `backing` goes into the header and is not opened, so
    /// writes must be whole clusters, or end with the disk.
    pub(super) fn create(file: File, size: u64, backing: Option<String>) -> io::Result<Self> {
        let size = image_size(size)?;
        let mut builder =
            Qcow2::<Storage>::create_builder(Storage::try_from(file)?).size(size).cluster_size(CLUSTER as usize);
        if let Some(backing) = backing {
            builder = builder.backing(backing, "qcow2".into());
        }
        let image = block_on(builder.create_open(DenyImplicitOpenGate::default(), |storage| {
            Ok(Qcow2::<Storage>::builder(storage).backing(None).write(true))
        }))?;
        Ok(Self { image: FormatAccess::new(image), size })
    }

    /// Opens a copy of a finished image, to write more into it. Its header must have been checked; its backing file is not
    /// opened, so the same holds for writes.
    pub(super) fn reopen(file: File, size: u64) -> io::Result<Self> {
        let builder = Qcow2::<Storage>::builder(Storage::try_from(file)?).backing(None).write(true);
        let image = block_on(builder.open(DenyImplicitOpenGate::default()))?;
        Ok(Self { image: FormatAccess::new(image), size: image_size(size)? })
    }

    /// Writes data. Behind the disk's end, up to the image's, zeroes are added.
    pub(super) fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let end = offset + bytes.len() as u64;
        if end < self.size && !end.is_multiple_of(CLUSTER) {
            let mut padded = bytes.to_vec();
            padded.resize((self.size - offset) as usize, 0);
            return block_on(self.image.write(&padded, offset));
        }
        block_on(self.image.write(bytes, offset))
    }

    /// Makes a range read as zeroes, whatever the backing file has there.
    pub(super) fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset + len;
        let end = if end.is_multiple_of(CLUSTER) { end } else { self.size };
        block_on(self.image.write_zeroes(offset, end - offset))
    }

    /// As [`NewImage::write_zeroes`], and gives up what the image itself has there.
    pub(super) fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        block_on(self.image.discard_to_zero(offset, len))
    }

    /// Hands everything to the operating system. Does not make it durable.
    pub(super) fn finish(self) -> io::Result<()> {
        block_on(self.image.flush())
    }
}

/// What an image itself has in a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Held {
    /// Data.
    Data,
    /// Zeroes.
    Zero,
    /// Nothing: the backing file shows through.
    Backing,
}

/// A finished image and the images that it builds on.
pub(super) struct OpenImage(FormatAccess<Storage>);

impl OpenImage {
    /// Opens images, the oldest last. Their headers must have been checked.
    pub(super) fn open(files: Vec<File>) -> io::Result<Self> {
        let mut backing = None;
        for file in files.into_iter().rev() {
            let builder = Qcow2::<Storage>::builder(Storage::try_from(file)?).backing(backing).write(false);
            backing = Some(FormatAccess::new(block_on(builder.open(DenyImplicitOpenGate::default()))?));
        }
        backing.map(Self).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no image"))
    }

    /// Reads a range of the disk.
    pub(super) fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        block_on(self.0.read(bytes, offset))
    }

    /// What the newest image has at `offset`, and for how many bytes, at most `len`.
    pub(super) fn held(&self, offset: u64, len: u64) -> io::Result<(Held, u64)> {
        let (mapping, len) = block_on(self.0.get_shallow_mapping(offset, len))?;
        let held = match mapping {
            ShallowMapping::Raw { .. } => Held::Data,
            ShallowMapping::Zero { .. } => Held::Zero,
            ShallowMapping::Indirect { .. } => Held::Backing,
            other => return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{other:?} at byte {offset}"))),
        };
        if len == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("nothing at byte {offset}")));
        }
        Ok((held, len))
    }
}
