//! Making an image independent of the one below it.
//!
//! The new image is a copy of the lower one with everything written over it that the upper one has. It is made beside the
//! upper image, synced, read again, and takes its place by a rename; the lower image is only read. Whoever is killed here
//! leaves a file that nobody opens, and readers that have the old image open go on with it.
//!
//! A copy, because the lower image still is an archive until it is removed. File systems with reflinks (`btrfs`, XFS) share the
//! blocks; others need room and time for the lower image once more.

use super::{
    chain::{self, Link, Seal},
    image::{Held, NewImage, OpenImage},
    tree::{self, Dir, Epoch, failed},
};
use crate::{
    guest::GuestId,
    provider::{ErrorKind, ProviderError},
    qcow2::image_size,
    segment::{SegmentLen, SegmentTable},
};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::{
    fs::File,
    io::{self, Read, Seek},
};
use tokio_util::sync::CancellationToken;

/// Bytes that are copied between two looks at the cancellation.
const PIECE: u64 = 64 << 20;
/// Largest read and write of what the upper image has.
const REQUEST: u64 = 1 << 20;
/// Segments of the whole disk that are compared; those of the upper image are compared all.
const SAMPLES: u64 = 64;

/// One disk of one archive, and the images that it consists of: itself, the one to be taken out, and those below.
pub(super) struct Merge<'a> {
    archive: Dir,
    disk: &'a str,
    size: u64,
    segment_len: SegmentLen,
    table: SegmentTable,
    links: Vec<Link>,
}

impl<'a> Merge<'a> {
    /// Prepares to take archive `out` from below disk `disk` of archive `epoch`.
    ///
    /// # Errors
    /// When any image that the disk consists of is not what its backup left: a merged image would look sound.
    pub(super) fn new(
        guest_dir: &Dir,
        guest: &GuestId,
        epoch: Epoch,
        disk: &'a str,
        out: Epoch,
    ) -> Result<Self, ProviderError> {
        let at = guest_dir.path().join(epoch.to_string());
        let archive =
            guest_dir.dir(&epoch.to_string()).map_err(|e| failed(ErrorKind::Damaged, "cannot open", &at, e))?;
        let entry = chain::entry(&archive, guest, epoch, disk)?;
        let damaged = |message: String| ProviderError::new(ErrorKind::Damaged, message);
        let segment_len = entry.segments().map_err(|e| damaged(e.to_string()))?;
        let table = chain::table(&archive, &entry, segment_len)?;
        let links = chain::unchanged(guest_dir, guest, epoch, disk, entry.size)?;
        if links.get(1).is_none_or(|link| link.epoch != out) {
            return Err(damaged(format!("disk `{disk}` of archive {epoch} does not build on {out}")));
        }
        Ok(Self { archive, disk, size: entry.size, segment_len, table, links })
    }

    /// Does it. On an error everything is as before.
    pub(super) fn run(&self, cancel: &CancellationToken) -> Result<(), ProviderError> {
        let image = tree::image_name(self.disk);
        let partial = format!("{image}{}", tree::PARTIAL);
        let done = self.make(&partial, cancel).and_then(|seal| self.replace(&image, &partial, &seal));
        if done.is_err()
            && let Err(error) = self.archive.remove_file(&partial)
        {
            // The next backup of this guest tries again.
            tracing::warn!(path = %self.archive.path().display(), %error, "an incomplete image cannot be removed");
        }
        done
    }

    fn make(&self, partial: &str, cancel: &CancellationToken) -> Result<Seal, ProviderError> {
        let at = self.archive.path().join(partial);
        let cannot = |e| failed(ErrorKind::Other, "cannot write image", &at, e);
        self.archive.remove_file(partial).map_err(cannot)?;
        let file = self.archive.create(partial).map_err(cannot)?;
        self.copy_lower(&file, cancel).map_err(cannot)?;
        let upper = chain::open(chain::files(&self.links)?, self.disk)?;
        self.write_upper(&upper, &file, cancel).map_err(cannot)?;
        file.sync_all().map_err(cannot)?;
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).ok();
        drop(file);
        self.verify(&upper, partial)
    }

    fn copy_lower(&self, to: &File, cancel: &CancellationToken) -> io::Result<()> {
        let mut from = &self.links[1].file;
        from.rewind()?;
        while io::copy(&mut from.take(PIECE), &mut &*to)? > 0 {
            stopped(cancel)?;
        }
        Ok(())
    }

    fn write_upper(&self, upper: &OpenImage, to: &File, cancel: &CancellationToken) -> io::Result<()> {
        let mut new = NewImage::reopen(to.try_clone()?, self.size)?;
        let mut buffer = vec![0; REQUEST as usize];
        let end = image_size(self.size)?;
        let mut at = 0;
        while at < end {
            stopped(cancel)?;
            let (held, found) = upper.held(at, end - at)?;
            let len = if held == Held::Data { found.min(REQUEST) } else { found };
            match held {
                Held::Data => {
                    let bytes = &mut buffer[..len as usize];
                    upper.read(bytes, at)?;
                    new.write(bytes, at)?;
                }
                Held::Zero => new.discard(at, len)?,
                Held::Backing => {}
            }
            at += len;
        }
        new.finish()
    }

    /// Reads the new image as a reader will: it has exactly what the two have, and everything that was written over the copy
    /// has the content that the segment table says.
    fn verify(&self, upper: &OpenImage, partial: &str) -> Result<Seal, ProviderError> {
        let disk = self.disk;
        let wrong = |what: String| {
            let at = self.archive.path().display();
            ProviderError::new(ErrorKind::Incomplete, format!("the merged image of disk `{disk}` in {at}: {what}"))
        };
        let at = self.archive.path().join(partial);
        let cannot = |e| failed(ErrorKind::Incomplete, "cannot read image", &at, e);
        let file = self.archive.file(partial).map_err(cannot)?;
        let header = chain::check_header(&file, disk, self.size).map_err(wrong)?;
        if header.backing != self.links[1].header.backing {
            return Err(wrong("it builds on another one than was planned".into()));
        }
        let lower = chain::open(chain::files(&self.links[1..])?, disk)?;
        let mut files = vec![file.try_clone().map_err(cannot)?];
        files.extend(chain::files(&self.links[2..])?);
        let merged = chain::open(files, disk)?;

        let end = image_size(self.size).map_err(cannot)?;
        let mut at = 0;
        while at < end {
            let (mut expected, mut len) = upper.held(at, end - at).map_err(cannot)?;
            if expected == Held::Backing {
                (expected, len) = lower.held(at, len).map_err(cannot)?;
            }
            let (found, len) = merged.held(at, len).map_err(cannot)?;
            if found != expected {
                return Err(wrong(format!("it has {found:?} at byte {at} instead of {expected:?}")));
            }
            at += len;
        }
        for record in self.table.records() {
            let (offset, len) = self
                .segment_len
                .range(record.index, self.size)
                .ok_or_else(|| wrong(format!("there is no segment {}", record.index)))?;
            if upper.held(offset, len).map_err(cannot)?.0 == Held::Data {
                chain::compare(&merged, std::slice::from_ref(record), 1, self.segment_len, self.size).map_err(wrong)?;
            }
        }
        chain::compare(&merged, self.table.records(), SAMPLES, self.segment_len, self.size).map_err(wrong)?;
        Seal::of(&file, &header).map_err(cannot)
    }

    /// Puts the new image in the old one's place. Until its seal is there, too, the one beside it counts ([`chain`]).
    fn replace(&self, image: &str, partial: &str, seal: &Seal) -> Result<(), ProviderError> {
        let at = self.archive.path().join(image);
        let cannot = |e| failed(ErrorKind::Other, "cannot replace image", &at, e);
        let disks = self.archive.dir(tree::DISKS).map_err(cannot)?;
        let name = tree::seal_name(self.disk);
        let new = format!("{name}{}", tree::PARTIAL);
        disks.remove_file(&new).map_err(cannot)?;
        disks.write(&new, &seal.to_bytes()?).map_err(cannot)?;
        disks.sync().map_err(cannot)?;
        self.archive.rename(partial, image).map_err(cannot)?;
        self.archive.sync().map_err(cannot)?;
        disks.rename(&new, &name).map_err(cannot)?;
        disks.sync().map_err(cannot)
    }
}

fn stopped(cancel: &CancellationToken) -> io::Result<()> {
    if cancel.is_cancelled() { Err(io::Error::new(io::ErrorKind::Interrupted, "stopped by a signal")) } else { Ok(()) }
}

/// Settles what a merge that was killed has left in an archive, or who wrote its log. The guest's lock is held.
pub(super) fn settle(archive: &Dir) -> io::Result<()> {
    for name in archive.names()?.iter().filter(|name| name.ends_with(tree::PARTIAL)) {
        archive.remove_file(name)?;
    }
    let disks = archive.dir(tree::DISKS)?;
    for name in disks.names()? {
        let Some(sealed) = name.strip_suffix(tree::PARTIAL) else { continue };
        if chain::fits(archive, &disks, &name, sealed) {
            disks.rename(&name, sealed)?;
            disks.sync()?;
        } else {
            disks.remove_file(&name)?;
        }
    }
    Ok(())
}
