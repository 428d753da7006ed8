//! Taking archives away.
//!
//! An archive is removed by a rename, and then its files; only when no image of another archive has one of its own as the
//! backing file. What stands in the way is either merged ([`super::merge`]) or the reason why the archive stays.

use super::{
    OnChain,
    header::Header,
    merge::{self, Merge},
    tree::{self, Dir, Epoch, failed},
};
use crate::{
    archive::ArchiveId,
    guest::GuestId,
    provider::{ErrorKind, ProviderError, PruneRequest, Pruned},
    report::spelled_out,
};
use std::{
    collections::{BTreeMap, HashMap},
    fs::{File, TryLockError},
};

/// Logs of failed backups that are kept for a guest.
const FAILED_KEPT: usize = 10;

/// A guest's archives, with the guest's lock held.
pub(super) struct Archives<'a> {
    guest: &'a GuestId,
    dir: &'a Dir,
    on_chain: OnChain,
    /// What the disks of every archive build on.
    bases: BTreeMap<Epoch, BTreeMap<String, Epoch>>,
}

impl<'a> Archives<'a> {
    /// Reads what builds on what.
    ///
    /// # Errors
    /// When that cannot be told of an image: it might need any other.
    pub(super) fn read(guest: &'a GuestId, dir: &'a Dir, on_chain: OnChain) -> Result<Self, ProviderError> {
        let names = dir.names().map_err(|e| failed(ErrorKind::Other, "cannot list", dir.path(), e))?;
        let mut bases = BTreeMap::new();
        for epoch in names.iter().filter_map(|name| Epoch::parse(name)) {
            bases.insert(epoch, bases_of(dir, epoch)?);
        }
        Ok(Self { guest, dir, on_chain, bases })
    }

    /// Removes archives, or tells what would become of them.
    pub(super) fn prune(&mut self, request: &PruneRequest) -> Vec<Pruned> {
        let epoch =
            |id: &ArchiveId| tree::parse_id(id).filter(|(guest, _)| guest == self.guest).map(|(_, epoch)| epoch);
        let mut epochs: Vec<Epoch> = request.remove.iter().filter_map(epoch).collect();
        // The newest first: what builds on an archive that goes, too, need not be merged, and the small images of the
        // newer archives are merged before the large one of the oldest.
        epochs.sort_unstable_by(|a, b| b.cmp(a));
        let mut fates: HashMap<Epoch, Pruned> = HashMap::new();
        for epoch in epochs {
            let fate = self.remove(epoch, request).unwrap_or_else(|error| Pruned::Kept(spelled_out(&error)));
            fates.insert(epoch, fate);
        }
        let unknown = || Pruned::Kept("it is no archive of this guest".into());
        request
            .remove
            .iter()
            .map(|id| tree::parse_id(id).and_then(|(_, epoch)| fates.remove(&epoch)).unwrap_or_else(unknown))
            .collect()
    }

    fn remove(&mut self, epoch: Epoch, request: &PruneRequest) -> Result<Pruned, ProviderError> {
        if request.cancel.is_cancelled() {
            return Ok(Pruned::Kept("stopped by a signal".into()));
        }
        let Some(own) = self.bases.get(&epoch).cloned() else {
            return Ok(Pruned::Kept("it is no archive of this guest".into()));
        };
        if self.bases.last_key_value().is_some_and(|(newest, _)| *newest == epoch) {
            return Ok(Pruned::Kept("it is the newest of its guest".into()));
        }
        let _unread = match unread(self.dir, epoch) {
            Ok(lock) => lock,
            Err(why) => return Ok(Pruned::Kept(why)),
        };
        let above: Vec<(Epoch, String)> = self
            .bases
            .iter()
            .flat_map(|(above, bases)| bases.iter().map(move |(disk, base)| (*above, disk.clone(), *base)))
            .filter_map(|(above, disk, base)| (base == epoch).then_some((above, disk)))
            .collect();
        if let (OnChain::Refuse, Some((above, disk))) = (self.on_chain, above.first()) {
            return Ok(Pruned::Kept(format!("disk `{disk}` of archive {above} builds on it")));
        }
        for (above, disk) in &above {
            if !request.dry_run {
                Merge::new(self.dir, self.guest, *above, disk, epoch)?.run(&request.cancel)?;
            }
            if let Some(bases) = self.bases.get_mut(above) {
                match own.get(disk) {
                    Some(base) => bases.insert(disk.clone(), *base),
                    None => bases.remove(disk),
                };
            }
        }
        if !request.dry_run {
            // What is on the disk counts, not what we remember.
            for other in self.bases.keys().filter(|other| **other != epoch) {
                if let Some((disk, _)) = bases_of(self.dir, *other)?.iter().find(|(_, base)| **base == epoch) {
                    return Ok(Pruned::Kept(format!("disk `{disk}` of archive {other} builds on it")));
                }
            }
            take_away(self.dir, epoch)?;
        }
        self.bases.remove(&epoch);
        Ok(if above.is_empty() { Pruned::Removed } else { Pruned::Merged })
    }
}

/// Which archive every disk of an archive builds on.
fn bases_of(dir: &Dir, epoch: Epoch) -> Result<BTreeMap<String, Epoch>, ProviderError> {
    let at = dir.path().join(epoch.to_string());
    let cannot = |e| failed(ErrorKind::Damaged, "cannot read", &at, e);
    let archive = dir.dir(&epoch.to_string()).map_err(cannot)?;
    let mut bases = BTreeMap::new();
    for name in archive.names().map_err(cannot)? {
        let Some(disk) = name.strip_suffix(".qcow2") else { continue };
        let unclear = |why: String| {
            let message = format!(
                "no archive of this guest can be removed: it is not clear what image {} builds on: {why}; delete its archive by \
                 hand if it is of no use",
                at.join(&name).display()
            );
            ProviderError::new(ErrorKind::Damaged, message)
        };
        let file = archive.file(&name).map_err(|e| unclear(e.to_string()))?;
        let header = Header::read(&file).map_err(|e| unclear(e.to_string()))?;
        if let Some(backing) = header.backing {
            let base = Epoch::of_backing(&backing, disk)
                .ok_or_else(|| unclear(format!("`{}` is none of this guest's images", backing.escape_debug())))?;
            bases.insert(disk.to_owned(), base);
        }
    }
    Ok(bases)
}

/// Makes sure that nobody reads an archive, as long as what is returned lives.
fn unread(dir: &Dir, epoch: Epoch) -> Result<Option<File>, String> {
    let manifest = dir.dir(&epoch.to_string()).and_then(|archive| archive.file_to_lock(tree::MANIFEST));
    // One without a manifest is read by nobody.
    let Ok(manifest) = manifest else { return Ok(None) };
    match manifest.try_lock() {
        Ok(()) => Ok(Some(manifest)),
        Err(TryLockError::WouldBlock) => Err("it is being read".into()),
        // A file system without locks.
        Err(TryLockError::Error(_)) => Ok(None),
    }
}

fn take_away(dir: &Dir, epoch: Epoch) -> Result<(), ProviderError> {
    let removed = format!("{epoch}{}", tree::REMOVED);
    let at = dir.path().join(epoch.to_string());
    let cannot = |e| failed(ErrorKind::Other, "cannot remove archive", &at, e);
    dir.rename(&epoch.to_string(), &removed).map_err(cannot)?;
    dir.sync().map_err(cannot)?;
    if let Err(error) = dir.remove(&removed) {
        // It is no archive any more, and the next backup of this guest tries again.
        tracing::warn!(path = %at.display(), %error, "a removed archive's files cannot be removed");
    }
    Ok(())
}

/// Removes what dead runs of this guest left. The guest's lock is held.
pub(super) fn clean(dir: &Dir) -> Result<(), ProviderError> {
    let names = dir.names().map_err(|e| failed(ErrorKind::Other, "cannot list", dir.path(), e))?;
    for name in names {
        let at = dir.path().join(&name);
        let left = [tree::PARTIAL, tree::REMOVED].iter().find_map(|end| name.strip_suffix(end));
        if left.and_then(Epoch::parse).is_some() {
            dir.remove(&name).map_err(|e| failed(ErrorKind::Other, "cannot remove", &at, e))?;
        } else if Epoch::parse(&name).is_some()
            && let Err(error) = dir.dir(&name).and_then(|archive| merge::settle(&archive))
        {
            // A damaged archive must not keep the guest from being backed up.
            tracing::warn!(path = %at.display(), %error, "what is left of a merge cannot be removed");
        }
    }
    Ok(())
}

/// Removes all but the newest logs of failed backups.
pub(super) fn clean_failed(dir: &Dir) -> Result<(), ProviderError> {
    let names = dir.names().map_err(|e| failed(ErrorKind::Other, "cannot list", dir.path(), e))?;
    let mut logs: Vec<Epoch> =
        names.iter().filter_map(|name| name.strip_suffix(tree::FAILED)).filter_map(Epoch::parse).collect();
    logs.sort_unstable_by(|a, b| b.cmp(a));
    for epoch in logs.into_iter().skip(FAILED_KEPT) {
        let name = format!("{epoch}{}", tree::FAILED);
        dir.remove(&name).map_err(|e| failed(ErrorKind::Other, "cannot remove", &dir.path().join(&name), e))?;
    }
    Ok(())
}
