//! Is a disk of an archive still what it was, with every image that it builds on?

use super::{
    header::Header,
    image::OpenImage,
    tree::{self, Dir, Epoch, failed},
};
use crate::{
    archive::{DiskEntry, Manifest},
    guest::GuestId,
    provider::{DiskQuery, ErrorKind, ProviderError},
    qcow2::image_size,
    segment::{SegmentLen, SegmentRecord, SegmentTable},
};
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    hash::{BuildHasher, RandomState},
    os::unix::fs::MetadataExt,
};

/// Largest manifest that is read.
const MAX_MANIFEST: u64 = 4 << 20;
const MAX_SEAL: u64 = 4096;
/// Most images that are ever opened on top of each other, whatever an archive says.
pub(super) const MAX_IMAGES: usize = 256;
/// Segments of a base archive that are read before a backup relies on it.
const SAMPLES: u64 = 8;

/// What an image was like when it was complete. It is there to notice that somebody wrote to an image or put another one
/// in its place; both would show through every later archive.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Seal {
    /// Length of the file.
    bytes: u64,
    /// When it was last written to, in seconds since the epoch: finer times do not survive every copy.
    modified: i64,
    /// See [`Header::fingerprint`].
    head: String,
}

impl Seal {
    /// Describes an image that is complete.
    pub(super) fn of(file: &File, header: &Header) -> std::io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self { bytes: metadata.len(), modified: metadata.mtime(), head: header.fingerprint(file)? })
    }

    /// As it is stored.
    pub(super) fn to_bytes(&self) -> Result<Vec<u8>, ProviderError> {
        let message = "the description of an image cannot be written";
        serde_json::to_vec(self).map_err(|e| ProviderError::caused_by(ErrorKind::Other, message, e))
    }
}

/// One image of a disk.
pub(super) struct Link {
    pub(super) archive: Dir,
    pub(super) epoch: Epoch,
    pub(super) file: File,
    pub(super) header: Header,
}

fn damaged(message: String) -> ProviderError {
    ProviderError::new(ErrorKind::Damaged, message)
}

fn link(guest: &Dir, epoch: Epoch, disk: &str, size: u64) -> Result<Link, ProviderError> {
    let at = guest.path().join(epoch.to_string());
    let archive =
        guest.dir(&epoch.to_string()).map_err(|e| failed(ErrorKind::Damaged, "there is no archive in", &at, e))?;
    let image = at.join(tree::image_name(disk));
    let file = archive
        .file(&tree::image_name(disk))
        .map_err(|e| failed(ErrorKind::Damaged, "cannot open image", &image, e))?;
    let header = check_header(&file, disk, size).map_err(|e| damaged(format!("image {}: {e}", image.display())))?;
    Ok(Link { archive, epoch, file, header })
}

/// Reads a header and checks that it can only lead to another archive of this guest.
pub(super) fn check_header(file: &File, disk: &str, size: u64) -> Result<Header, String> {
    let header = Header::read(file).map_err(|e| e.to_string())?;
    let expected = image_size(size).map_err(|e| e.to_string())?;
    if header.size != expected {
        return Err(format!("its disk has {} bytes instead of {expected}", header.size));
    }
    match &header.backing {
        Some(name) if Epoch::of_backing(name, disk).is_none() => {
            Err(format!("its backing file `{}` is none of this guest's images", name.escape_debug()))
        }
        _ => Ok(header),
    }
}

/// The images that a disk of an archive consists of, the newest first.
///
/// # Errors
/// When one is missing, is none of ours, or there is no end to them.
pub(super) fn follow(guest: &Dir, epoch: Epoch, disk: &str, size: u64) -> Result<Vec<Link>, ProviderError> {
    let mut links: Vec<Link> = Vec::new();
    let mut next = Some(epoch);
    while let Some(epoch) = next {
        if links.iter().any(|link| link.epoch == epoch) {
            return Err(damaged(format!("the images of disk `{disk}` build on each other in a circle at {epoch}")));
        }
        if links.len() == MAX_IMAGES {
            return Err(damaged(format!("disk `{disk}` consists of more than {MAX_IMAGES} images")));
        }
        let link = link(guest, epoch, disk, size)?;
        next = link.header.backing.as_deref().and_then(|name| Epoch::of_backing(name, disk));
        links.push(link);
    }
    Ok(links)
}

/// Opens images for reading, the newest first.
pub(super) fn open(files: Vec<File>, disk: &str) -> Result<OpenImage, ProviderError> {
    OpenImage::open(files).map_err(|e| {
        ProviderError::caused_by(ErrorKind::Damaged, format!("the images of disk `{disk}` cannot be opened"), e)
    })
}

/// The files of `links` once more, to be given to [`open`].
pub(super) fn files(links: &[Link]) -> Result<Vec<File>, ProviderError> {
    let again = |link: &Link| {
        link.file
            .try_clone()
            .map_err(|e| failed(ErrorKind::Other, "cannot open an image twice in", link.archive.path(), e))
    };
    links.iter().map(again).collect()
}

/// The manifest in an archive's directory, which must be that of this archive.
pub(super) fn manifest(archive: &Dir, guest: &GuestId, epoch: Epoch) -> Result<Manifest, ProviderError> {
    let at = archive.path().join(tree::MANIFEST);
    let bytes = archive
        .read(tree::MANIFEST, MAX_MANIFEST)
        .map_err(|e| failed(ErrorKind::Damaged, "cannot read manifest", &at, e))?;
    let manifest = Manifest::from_bytes(&bytes).map_err(|e| {
        ProviderError::caused_by(ErrorKind::Damaged, format!("manifest {} cannot be used", at.display()), e)
    })?;
    if epoch.name(guest).as_ref() != Some(&manifest.archive) {
        return Err(damaged(format!("manifest {} is that of archive {}", at.display(), manifest.archive)));
    }
    Ok(manifest)
}

fn seal(disks: &Dir, name: &str) -> Result<Seal, ProviderError> {
    let at = disks.path().join(name);
    let bytes = disks.read(name, MAX_SEAL).map_err(|e| failed(ErrorKind::Damaged, "cannot read", &at, e))?;
    serde_json::from_slice(&bytes)
        .map_err(|e| ProviderError::caused_by(ErrorKind::Damaged, format!("{} cannot be used", at.display()), e))
}

fn check_seal(link: &Link, disk: &str) -> Result<(), ProviderError> {
    let at = link.archive.path().join(tree::DISKS);
    let disks = link.archive.dir(tree::DISKS).map_err(|e| failed(ErrorKind::Damaged, "cannot open", &at, e))?;
    let name = tree::seal_name(disk);
    let image = link.archive.path().join(tree::image_name(disk));
    let now =
        Seal::of(&link.file, &link.header).map_err(|e| failed(ErrorKind::Damaged, "cannot read image", &image, e))?;
    // A merge that was killed after it had replaced the image left the seal beside the old one.
    if seal(&disks, &name)? != now && seal(&disks, &format!("{name}{}", tree::PARTIAL)).ok() != Some(now) {
        return Err(damaged(format!("image {} was changed since its backup", image.display())));
    }
    Ok(())
}

/// Whether the seal in the file `name` is that of the image whose seal's name is `sealed`.
pub(super) fn fits(archive: &Dir, disks: &Dir, name: &str, sealed: &str) -> bool {
    let now = sealed.strip_suffix(".image.json").and_then(|disk| {
        let file = archive.file(&tree::image_name(disk)).ok()?;
        let header = Header::read(&file).ok()?;
        Seal::of(&file, &header).ok()
    });
    now.is_some() && seal(disks, name).ok() == now
}

/// A disk of a base archive, confirmed to be there now.
pub(super) struct Confirmed {
    pub(super) table: SegmentTable,
    pub(super) links: Vec<Link>,
}

/// Checks a disk of a base archive, as far as that is possible without reading all of it: every image that it consists of,
/// its segment table, and some of its segments.
///
/// # Errors
/// The message of the error is the reason for a full backup.
pub(super) fn confirm(
    guest_dir: &Dir,
    guest: &GuestId,
    epoch: Epoch,
    query: &DiskQuery,
) -> Result<Confirmed, ProviderError> {
    let disk = &query.name;
    let at = guest_dir.path().join(epoch.to_string());
    let archive = guest_dir
        .dir(&epoch.to_string())
        .map_err(|e| failed(ErrorKind::Damaged, "the base archive is not there:", &at, e))?;
    let entry = entry(&archive, guest, epoch, disk)?;
    if entry.size != query.size {
        return Err(damaged(format!("the disk has {} bytes, it had {} in the base archive", query.size, entry.size)));
    }
    if entry.segment_len != query.segment_len.bytes() {
        return Err(damaged(format!(
            "the segment length is {}, it was {} in the base archive",
            query.segment_len.bytes(),
            entry.segment_len
        )));
    }
    let table = table(&archive, &entry, query.segment_len)?;
    let links = unchanged(guest_dir, guest, epoch, disk, query.size)?;
    let image = open(files(&links)?, disk)?;
    compare(&image, table.records(), SAMPLES, query.segment_len, query.size)
        .map_err(|what| damaged(format!("base archive {epoch}, disk `{disk}`: {what}")))?;
    Ok(Confirmed { table, links })
}

/// The images that a disk of an archive consists of, each of which is as its backup left it.
///
/// # Errors
/// When one is not.
pub(super) fn unchanged(
    guest_dir: &Dir,
    guest: &GuestId,
    epoch: Epoch,
    disk: &str,
    size: u64,
) -> Result<Vec<Link>, ProviderError> {
    let links = follow(guest_dir, epoch, disk, size)?;
    for link in &links {
        // An archive without a manifest, or with another disk of the same name, is none of the chain.
        let held = entry(&link.archive, guest, link.epoch, disk)?;
        if held.size != size {
            return Err(damaged(format!("the disk had {} bytes in archive {}", held.size, link.epoch)));
        }
        check_seal(link, disk)?;
    }
    Ok(links)
}

/// What the manifest says about a disk.
pub(super) fn entry(archive: &Dir, guest: &GuestId, epoch: Epoch, disk: &str) -> Result<DiskEntry, ProviderError> {
    let manifest = manifest(archive, guest, epoch)?;
    let found = manifest.disks.into_iter().find(|entry| entry.name == disk);
    found.ok_or_else(|| damaged(format!("archive {epoch} does not have disk `{disk}`")))
}

/// A disk's segment table, which must be the one that its manifest means.
pub(super) fn table(archive: &Dir, entry: &DiskEntry, len: SegmentLen) -> Result<SegmentTable, ProviderError> {
    let name = tree::table_name(&entry.name);
    let at = archive.path().join(tree::DISKS).join(&name);
    let limit = SegmentTable::longest(len, entry.size);
    let bytes = archive
        .dir(tree::DISKS)
        .and_then(|dir| dir.read(&name, limit))
        .map_err(|e| failed(ErrorKind::Damaged, "cannot read segment table", &at, e))?;
    let table = SegmentTable::from_bytes(&bytes, len, entry.size).map_err(|e| {
        ProviderError::caused_by(ErrorKind::Damaged, format!("segment table {} cannot be used", at.display()), e)
    })?;
    if table.digest_hex() != entry.digest {
        return Err(damaged(format!("segment table {} does not belong to its manifest", at.display())));
    }
    Ok(table)
}

/// Reads `count` of the segments, chosen at random, and compares them with their digests.
///
/// # Errors
/// In words, which segment is not what it should be.
pub(super) fn compare(
    image: &OpenImage,
    records: &[SegmentRecord],
    count: u64,
    len: SegmentLen,
    size: u64,
) -> Result<(), String> {
    if records.is_empty() {
        return Ok(());
    }
    let random = RandomState::new();
    let mut bytes = vec![0; len.bytes() as usize];
    for number in 0..count {
        let record = &records[(random.hash_one(number) % records.len() as u64) as usize];
        let (offset, len) =
            len.range(record.index, size).ok_or_else(|| format!("there is no segment {}", record.index))?;
        let bytes = &mut bytes[..len as usize];
        image.read(bytes, offset).map_err(|e| format!("segment {} cannot be read: {e}", record.index))?;
        if *blake3::hash(bytes).as_bytes() != record.digest {
            return Err(format!("segment {} has another content than its table says", record.index));
        }
    }
    Ok(())
}
