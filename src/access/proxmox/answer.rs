//! Judging the answer to `backup-access-setup`.

use super::check::{Mode, distrust};
use crate::{
    access::{AccessError, AccessPlan, BitmapAction, DiskAccess, graph::Graph},
    guest::DiskKind,
    qmp::{
        QmpError,
        command::proxmox::{AccessBitmapMode, BackupAccess, PbsBitmapAction},
    },
};

/// Granularity of the bitmaps that Proxmox's QEMU makes, in bytes (`PROXMOX_BACKUP_DEFAULT_CHUNK_SIZE`).
pub const BITMAP_GRANULARITY: u64 = 4 << 20;

/// A disk whose access is set up.
#[derive(Debug)]
pub struct Accessed {
    /// What is told to the outside.
    pub disk: DiskAccess,
    /// Node to export.
    pub node: String,
}

/// What an answer turned out to be.
#[derive(Debug)]
pub enum Verdict {
    /// Every disk is as it was asked for.
    Good(Vec<Accessed>),
    /// QEMU used bitmaps that cannot be trusted: these disks (by their place) need a new one, for these reasons.
    Distrusted(Vec<(usize, String)>),
}

fn unexpected(what: String, disk: &str) -> AccessError {
    let source = QmpError::Protocol { command: "backup-access-setup".into(), what };
    AccessError::Qmp {
        step: "QEMU's snapshot access is not the one asked for".into(),
        disk: Some(disk.to_owned()),
        source,
    }
}

/// Judges an answer: one entry for every disk of the plan, in its order, of its size; and a bitmap that is used only where
/// that was asked for and `before` (the graph before the setup) shows that it can be trusted.
pub fn judge(
    plan: &AccessPlan,
    sizes: &[u64],
    modes: &[Mode],
    before: &Graph,
    answer: &[BackupAccess],
) -> Result<Verdict, AccessError> {
    if answer.len() != plan.disks.len() {
        let what = format!("{} entries for {} disks", answer.len(), plan.disks.len());
        return Err(unexpected(what, &plan.disks[0].disk.name));
    }
    let mut accessed = Vec::new();
    let mut distrusted = Vec::new();
    for (place, (((planned, mode), size), entry)) in plan.disks.iter().zip(modes).zip(sizes).zip(answer).enumerate() {
        let disk = &planned.disk;
        let bad = |what: String| unexpected(what, &disk.name);
        if entry.device != disk.device {
            return Err(bad(format!("device `{:.80}` instead of `{}`", entry.device, disk.device)));
        }
        if entry.size != *size {
            return Err(bad(format!("{} bytes instead of {size}", entry.size)));
        }
        if entry.node_name.is_empty() {
            return Err(bad("it has no node".into()));
        }
        let asked = mode.device.bitmap_mode;
        let action = match (asked, &entry.bitmap_action) {
            (AccessBitmapMode::Use, Some(PbsBitmapAction::Used)) => BitmapAction::Used,
            (AccessBitmapMode::New, Some(PbsBitmapAction::New)) => BitmapAction::New,
            // Builds before the final interface said `new` for the first `use`.
            (
                AccessBitmapMode::Use,
                Some(PbsBitmapAction::New | PbsBitmapAction::MissingRecreated | PbsBitmapAction::Invalid),
            ) => BitmapAction::MissingRecreated,
            (_, None | Some(PbsBitmapAction::NotUsed | PbsBitmapAction::NotUsedRemoved)) => BitmapAction::NotUsed,
            (_, Some(action)) => return Err(bad(format!("bitmap action `{:.80}`", action.as_str()))),
        };
        let has_bitmap = action != BitmapAction::NotUsed;
        if has_bitmap
            && (entry.bitmap_name.as_deref() != Some(plan.target.as_str()) || entry.bitmap_node_name.is_none())
        {
            return Err(bad(format!("its bitmap is {:?} on {:?}", entry.bitmap_name, entry.bitmap_node_name)));
        }
        if action == BitmapAction::Used {
            let node = entry.bitmap_node_name.as_deref().unwrap_or_default();
            let seen = before.bitmap(node, &plan.target);
            let why = seen.map_or_else(|| Some("the dirty bitmap came out of nowhere".into()), distrust);
            if let Some(why) = why {
                distrusted.push((place, why));
            }
        }
        let reason = match (action, &mode.why_new) {
            (BitmapAction::Used, _) => format!("dirty bitmap of target `{}`", plan.target),
            (BitmapAction::NotUsed, Some(why)) if asked == AccessBitmapMode::None => why.clone(),
            (BitmapAction::NotUsed, _) => "QEMU keeps no dirty bitmap for it".into(),
            (_, Some(why)) => why.clone(),
            (_, None) => {
                "QEMU has no dirty bitmap for it (it is lost when the QEMU process ends or the disk is moved)".into()
            }
        };
        // TPM state's bitmap goes with its node.
        let kept = has_bitmap && disk.kind != DiskKind::Tpm;
        accessed.push(Accessed {
            disk: DiskAccess {
                name: disk.name.clone(),
                export: disk.device.clone(),
                size: *size,
                dirty_context: (action == BitmapAction::Used).then(|| format!("qemu:dirty-bitmap:{}", plan.target)),
                action,
                reason,
                clean_readable: action != BitmapAction::Used,
                largest_request: None,
                granularity: BITMAP_GRANULARITY,
                next_bitmap: kept.then(|| plan.target.clone()),
                bitmap_node: entry.bitmap_node_name.clone().filter(|_| has_bitmap),
            },
            node: entry.node_name.clone(),
        });
    }
    Ok(if distrusted.is_empty() { Verdict::Good(accessed) } else { Verdict::Distrusted(distrusted) })
}
