//! What is known before anything is changed. Some of what is refused here would end the QEMU process, and the guest with it.

use super::{BACKGROUND_BITMAP, answer::BITMAP_GRANULARITY};
use crate::{
    access::{AccessError, AccessPlan, BitmapMode, DiskPlan, graph::Graph},
    guest::DiskKind,
    qmp::{
        QmpError, Session,
        command::{
            block::{DirtyBitmap, QueryBlock},
            proxmox::{AccessBitmapMode, BackupAccessDevice, QueryBackup, QueryPbsBitmapInfo, QueryProxmoxSupport},
        },
    },
};
use std::{collections::HashSet, os::unix::ffi::OsStrExt};

/// Ids of regular backups and the background bitmap's name: with them an access cannot be torn down, or not even set up
/// without harm (recorded; see also Proxmox's `pve-backup.c`).
const FORBIDDEN_TARGETS: [&str; 3] = ["Proxmox", "Proxmox VE", BACKGROUND_BITMAP];
/// QEMU's limit for names of bitmaps, in bytes.
const MAX_TARGET: usize = 1023;
/// QEMU's limit for names of nodes, in bytes.
const MAX_NODE_NAME: usize = 31;
/// `sun_path` with its final zero.
const MAX_SOCKET_PATH: usize = 107;
const MAX_DISKS: usize = 256;

fn refused<T>(disk: Option<&str>, reason: impl Into<String>) -> Result<T, AccessError> {
    Err(AccessError::Refused { reason: reason.into(), disk: disk.map(str::to_owned) })
}

/// Judges the plan itself.
pub fn plan(plan: &AccessPlan) -> Result<(), AccessError> {
    let target = plan.target.as_str();
    if target.is_empty() || target.len() > MAX_TARGET || FORBIDDEN_TARGETS.contains(&target) || target.contains('\0') {
        return refused(None, format!("`{target:.80}` cannot be a target id"));
    }
    if plan.disks.is_empty() {
        return refused(None, "there is no disk to back up");
    }
    if plan.disks.len() > MAX_DISKS {
        return refused(None, format!("{} disks are too many", plan.disks.len()));
    }
    let mut devices = HashSet::new();
    for DiskPlan { disk, .. } in &plan.disks {
        let name = Some(disk.name.as_str());
        let device = disk.device.as_str();
        let well_formed = device.bytes().next().is_some_and(|b| b.is_ascii_alphabetic())
            && device.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
        if !well_formed || super::fleecing_node(device).len() > MAX_NODE_NAME {
            return refused(name, format!("no fleecing node can be named after device `{device:.80}`"));
        }
        if !devices.insert(device) {
            return refused(name, format!("device `{device}` is planned twice"));
        }
        if disk.size == 0 || disk.size % 512 != 0 || disk.size > i64::MAX as u64 {
            return refused(name, format!("its size of {} bytes is none of a disk", disk.size));
        }
    }
    let socket = super::socket(plan);
    if socket.as_os_str().as_bytes().len() > MAX_SOCKET_PATH {
        return refused(None, format!("the path of the NBD socket is too long: {}", socket.display()));
    }
    Ok(())
}

/// Judges QEMU: its features, what it is busy with, and every device of the plan.
pub async fn qemu(plan: &AccessPlan, session: &mut Session) -> Result<(), AccessError> {
    support(session).await?;
    let status =
        session.execute(&QueryBackup {}).await.map_err(AccessError::qmp("cannot ask for backups under way", None))?;
    let graph = Graph::read(session).await.map_err(AccessError::qmp("cannot read the block graph", None))?;
    if status.is_active() {
        let by = if status.looks_like_access() {
            let drives = session.execute(&QueryPbsBitmapInfo {}).await.unwrap_or_default();
            let drives: Vec<String> = drives.into_iter().map(|info| info.drive).collect();
            let target = active_target(&graph).map(|t| format!(" for target `{t}`")).unwrap_or_default();
            format!("a snapshot access{target} to {} is set up", drives.join(", "))
        } else {
            format!("a backup to {} is under way", status.backup_file.as_deref().unwrap_or("a backup server"))
        };
        return Err(AccessError::Busy { by, disk: None });
    }
    if let Some(export) = graph.exports.first() {
        return Err(AccessError::Foreign { what: format!("{} export `{}`", export.kind, export.id), disk: None });
    }
    clean(&graph)?;
    left_over(plan, &graph)?;
    devices(plan, session).await
}

async fn support(session: &mut Session) -> Result<(), AccessError> {
    let lacks = |what: &str| AccessError::FeatureMissing { what: what.to_owned(), disk: None };
    let support = match session.execute(&QueryProxmoxSupport {}).await {
        Err(error) if error.is_command_not_found() => return Err(lacks("Proxmox VE's backup commands")),
        other => other.map_err(AccessError::qmp("cannot ask for QEMU's features", None))?,
    };
    if !support.backup_access_api {
        // A process keeps the program that it was started with.
        return Err(lacks(
            "`backup-access-api` (pve-qemu-kvm 9.2.0-5 or later; a VM started before the update has to be stopped and started)",
        ));
    }
    if !support.backup_fleecing {
        return Err(lacks("`backup-fleecing`"));
    }
    Ok(())
}

/// The target id of an access that is set up: its bitmap is the one that does not record, beside the background bitmap.
fn active_target(graph: &Graph) -> Option<&str> {
    let has_background = |bitmaps: &[DirtyBitmap]| bitmaps.iter().any(|b| b.name.as_deref() == Some(BACKGROUND_BITMAP));
    let node = graph.nodes.iter().find(|n| has_background(&n.dirty_bitmaps))?;
    node.dirty_bitmaps.iter().find(|b| !b.recording && b.name.is_some())?.name.as_deref()
}

/// What a setup would stumble upon after it has begun to change things, or stack itself upon.
pub fn clean(graph: &Graph) -> Result<(), AccessError> {
    for node in &graph.nodes {
        let name = node.node_name.as_deref().unwrap_or_default();
        if matches!(node.drv.as_str(), "copy-before-write" | "snapshot-access") {
            let what = format!(
                "node `{name}` ({}): if no backup job is at work, it stays until the VM is stopped and started again; it",
                node.drv
            );
            return Err(AccessError::Foreign { what, disk: None });
        }
        if node.dirty_bitmaps.iter().any(|b| b.name.as_deref() == Some(BACKGROUND_BITMAP)) {
            let what = format!("bitmap `{BACKGROUND_BITMAP}` on node `{name}`");
            return Err(AccessError::Foreign { what, disk: None });
        }
    }
    Ok(())
}

/// Nodes under the names that we will use.
fn left_over(plan: &AccessPlan, graph: &Graph) -> Result<(), AccessError> {
    for DiskPlan { disk, .. } in &plan.disks {
        let fleecing = super::fleecing_node(&disk.device);
        let mut names = vec![fleecing.as_str()];
        if disk.kind == DiskKind::Tpm {
            names.push(&disk.device);
        }
        for name in names {
            if graph.node(name).is_some() || graph.devices.iter().any(|d| d.device == name) {
                return Err(AccessError::Foreign { what: format!("node `{name}`"), disk: Some(disk.name.clone()) });
            }
        }
    }
    Ok(())
}

/// Every device can be found by QEMU under the name that we will use, has a medium, and is as large as planned.
async fn devices(plan: &AccessPlan, session: &mut Session) -> Result<(), AccessError> {
    let fronts =
        session.execute(&QueryBlock {}).await.map_err(AccessError::qmp("cannot ask for block devices", None))?;
    for DiskPlan { disk, .. } in plan.disks.iter().filter(|p| p.disk.kind != DiskKind::Tpm) {
        let name = Some(disk.name.as_str());
        let front = fronts.iter().find(|front| {
            front.device == disk.device
                || front.inserted.as_ref().is_some_and(|i| i.node_name.as_ref() == Some(&disk.device))
        });
        let Some(front) = front else { return refused(name, format!("QEMU has no device `{}`", disk.device)) };
        if front.tray_open.is_some() {
            return refused(name, "it is a CD-ROM drive");
        }
        let Some(inserted) = &front.inserted else { return refused(name, "it has no medium") };
        if inserted.image.virtual_size != disk.size {
            let now = inserted.image.virtual_size;
            return refused(name, format!("it has {now} bytes now, and had {} when the backup was planned", disk.size));
        }
    }
    Ok(())
}

/// What QEMU will be asked for about a disk's bitmap, and why.
pub struct Mode {
    /// For QEMU.
    pub device: BackupAccessDevice,
    /// Why everything has to be read, when it has.
    pub why_new: Option<String>,
}

/// Whether a bitmap has seen every write since it was started, as far as it shows; else what is wrong with it. QEMU itself
/// takes any bitmap of the right name, also one that was disabled meanwhile and misses writes.
pub fn distrust(bitmap: &DirtyBitmap) -> Option<String> {
    if !bitmap.recording {
        Some("somebody stopped the dirty bitmap, so that writes are missing from it".into())
    } else if bitmap.inconsistent {
        Some("the dirty bitmap is inconsistent".into())
    } else if bitmap.busy {
        Some("the dirty bitmap is in use by something else".into())
    } else if bitmap.granularity != BITMAP_GRANULARITY {
        Some(format!("somebody else made the dirty bitmap (granularity {})", bitmap.granularity))
    } else {
        None
    }
}

/// The bitmap modes for the plan's disks, in their order.
pub fn modes(plan: &AccessPlan, graph: &Graph) -> Vec<Mode> {
    let mode = |planned: &DiskPlan| {
        let disk = &planned.disk;
        let why_new = match &planned.bitmap {
            _ if disk.kind == DiskKind::Tpm => Some("TPM state is attached anew for every backup".into()),
            BitmapMode::None => Some("no dirty bitmap was asked for".into()),
            BitmapMode::New => Some("a new bitmap was asked for".into()),
            BitmapMode::Use(name) if *name != plan.target => {
                Some(format!("bitmap `{name}` is not the one of target `{}`", plan.target))
            }
            // Below a throttle node is the one that carries the bitmap; an old -drive VM has none.
            BitmapMode::Use(name) => [Some(disk.node.as_str()), graph.child(&disk.node, "file")]
                .into_iter()
                .flatten()
                .find_map(|node| graph.bitmap(node, name))
                .and_then(distrust),
        };
        let bitmap_mode = match (&planned.bitmap, &why_new) {
            (BitmapMode::None, _) => AccessBitmapMode::None,
            (_, Some(_)) => AccessBitmapMode::New,
            (_, None) => AccessBitmapMode::Use,
        };
        Mode { device: BackupAccessDevice { device: disk.device.clone(), bitmap_mode }, why_new }
    };
    plan.disks.iter().map(mode).collect()
}

/// Whether a refused setup changed nothing because somebody else's backup or access is under way.
pub fn is_busy(error: &QmpError) -> bool {
    matches!(error, QmpError::Refused { desc, .. } if desc.starts_with("previous backup for target"))
}
