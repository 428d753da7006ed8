//! Reading one archive.

use super::{
    chain,
    image::OpenImage,
    tree::{self, Dir, Epoch, failed},
};
use crate::{
    archive::Manifest,
    provider::{ArchiveReader, ErrorKind, ProviderError},
};
use bytes::Bytes;
use std::{
    fs::{File, TryLockError},
    io,
    sync::{Arc, Mutex, PoisonError},
};

/// An open archive.
pub(super) struct Reader {
    pub(super) guest: Dir,
    pub(super) archive: Dir,
    pub(super) epoch: Epoch,
    pub(super) manifest: Manifest,
    /// The disk that was read last, open. Disks are read one after the other, and each may need many files.
    pub(super) open: Mutex<Option<(String, Arc<OpenImage>)>>,
    /// See [`claim`].
    pub(super) _reading: File,
}

/// Keeps an archive from being removed, as long as what is returned lives.
pub(super) fn claim(archive: &Dir) -> Result<File, ProviderError> {
    let at = archive.path().join(tree::MANIFEST);
    let file = archive.file(tree::MANIFEST).map_err(|e| failed(ErrorKind::Damaged, "cannot read", &at, e))?;
    match file.try_lock_shared() {
        Err(TryLockError::WouldBlock) => {
            let message = format!("archive {} is being removed", archive.path().display());
            Err(ProviderError::new(ErrorKind::Locked, message))
        }
        // Without locks nobody is kept from removing it, which is then noticed by what is missing.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(file),
    }
}

impl Reader {
    fn image(&self, disk: &str, size: u64) -> Result<Arc<OpenImage>, ProviderError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((name, image)) = open.as_ref()
            && name == disk
        {
            return Ok(Arc::clone(image));
        }
        *open = None;
        let links = chain::follow(&self.guest, self.epoch, disk, size)?;
        let image = Arc::new(chain::open(links.into_iter().map(|link| link.file).collect(), disk)?);
        *open = Some((disk.to_owned(), Arc::clone(&image)));
        Ok(image)
    }
}

fn read(dir: &Dir, name: &str, limit: u64) -> Result<Vec<u8>, ProviderError> {
    dir.read(name, limit).map_err(|e| {
        let kind = match e.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            _ => ErrorKind::Damaged,
        };
        failed(kind, "cannot read", &dir.path().join(name), e)
    })
}

impl ArchiveReader for Reader {
    fn member(&self, name: &str, limit: u64) -> Result<Vec<u8>, ProviderError> {
        if !tree::is_plain_name(name) || name == tree::DISKS {
            return Err(ProviderError::new(ErrorKind::NotFound, format!("an archive has no `{name}`")));
        }
        read(&self.archive, name, limit)
    }

    fn table(&self, disk: &str, limit: u64) -> Result<Vec<u8>, ProviderError> {
        if self.manifest.disk(disk).is_none() {
            return Err(ProviderError::new(ErrorKind::NotFound, format!("the archive has no disk `{disk}`")));
        }
        let disks = self
            .archive
            .dir(tree::DISKS)
            .map_err(|e| failed(ErrorKind::Damaged, "cannot open", &self.archive.path().join(tree::DISKS), e))?;
        read(&disks, &tree::table_name(disk), limit)
    }

    fn segment(&self, disk: &str, index: u64, len: u64) -> Result<Bytes, ProviderError> {
        let what = || format!("segment {index} of disk `{disk}`");
        let missing = || ProviderError::new(ErrorKind::NotFound, format!("{} is not in the archive", what()));
        let entry = self.manifest.disk(disk).ok_or_else(missing)?;
        let segment_len = entry.segments().map_err(|e| ProviderError::caused_by(ErrorKind::Damaged, what(), e))?;
        let (offset, bytes) = segment_len.range(index, entry.size).ok_or_else(missing)?;
        if bytes != len {
            let message = format!("{} has {bytes} bytes instead of {len}", what());
            return Err(ProviderError::new(ErrorKind::Damaged, message));
        }
        let image = self.image(disk, entry.size)?;
        let mut content = vec![0; len as usize];
        image
            .read(&mut content, offset)
            .map_err(|e| ProviderError::caused_by(ErrorKind::Damaged, format!("{} cannot be read", what()), e))?;
        Ok(content.into())
    }
}
