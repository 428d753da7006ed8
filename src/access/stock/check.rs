//! What can be refused before anything is touched.

use super::{Features, StockAccess, Way};
use crate::{
    access::{
        AccessError, Fleecing,
        fleecing::{FleecingImages, Floor, Owner},
        graph::{Graph, is_ours},
        recover::qemu::listens,
    },
    guest::{Disk, DiskKind},
    journal::ProcessIdentity,
    qmp::{
        Session,
        command::block::{BlockNode, QomGet, QueryIothreads, QueryMigrate, QueryStatus},
        schema::Schema,
    },
};
use std::{collections::HashSet, os::unix::ffi::OsStrExt, path::Path};

/// QEMU's node names have at most 31 characters: `pvb-` + generation + `-snap` + number.
const MAX_DISKS: usize = 256;
/// `sun_path` of a unix socket has 108 bytes with the final zero.
const SOCKET_PATH: usize = 107;
/// QEMU's block layer does locking per I/O thread before this; 7.2 dies of a filter or an export on such a disk.
const IOTHREADS_SAFE: (u32, u32, u32) = (9, 0, 0);
/// Before this the time-out of a copy is counted in 32 bits of nanoseconds (seen in 7.2, gone in 10.0).
const LONG_TIMEOUTS: (u32, u32, u32) = (10, 0, 0);
/// What then fits.
const SHORT_TIMEOUT: u32 = 4;

impl StockAccess {
    /// See [`crate::access::SnapshotAccess::check`].
    pub(super) async fn look(&mut self) -> Result<(Features, FleecingImages), AccessError> {
        self.check_plan()?;
        let total = self.plan.disks.iter().map(|d| d.disk.size).fold(0, u64::saturating_add);
        let images = match &self.plan.fleecing {
            Fleecing::Directory { path, format } => FleecingImages::new(path, *format)?,
            Fleecing::Storage(storage) => {
                return Err(AccessError::Refused {
                    reason: format!(
                        "fleecing images on a Proxmox storage (`{storage}`) need Proxmox VE's QEMU; name a directory"
                    ),
                    disk: None,
                });
            }
        };
        let floor = self.floor.unwrap_or_else(|| Floor::of(total));
        self.warnings.extend(images.check_room(floor, self.plan.disks.len())?);

        let mut session = self.session().await?;
        let features = self.features(&mut session).await?;
        refuse_migration(&mut session).await?;
        let graph = read(&mut session).await?;
        self.roots(&graph)?;
        if listens(session.peer_pid(), &self.socket()) {
            return Err(AccessError::Busy {
                by: format!("somebody listens on {}", self.socket().display()),
                disk: None,
            });
        }
        if session.version() < IOTHREADS_SAFE {
            refuse_iothreads(&mut session, self.plan.disks.iter().map(|d| &d.disk)).await?;
        }
        Ok((features, images))
    }

    fn check_plan(&self) -> Result<(), AccessError> {
        let refused = |reason: String| Err(AccessError::Refused { reason, disk: None });
        let disks = &self.plan.disks;
        if disks.is_empty() || disks.len() > MAX_DISKS {
            return refused(format!("{} disks; there must be 1 to {MAX_DISKS}", disks.len()));
        }
        let generation = &self.plan.generation;
        if !(1..=16).contains(&generation.len()) || !generation.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return refused(format!("`{generation}` is no generation id"));
        }
        let target = &self.plan.target;
        if !(1..=512).contains(&target.len()) || !target.bytes().all(|b| b.is_ascii_graphic()) {
            return refused("the target id cannot be part of a bitmap's name".into());
        }
        let socket = self.socket();
        if socket.as_os_str().as_bytes().len() > SOCKET_PATH || !socket.is_absolute() || socket.to_str().is_none() {
            return refused(format!("{} cannot be the path of a socket", socket.display()));
        }
        let mut exports = HashSet::new();
        let mut devices = HashSet::new();
        for disk in disks.iter().map(|d| &d.disk) {
            let refused =
                |reason: &str| Err(AccessError::Refused { reason: reason.to_owned(), disk: Some(disk.name.clone()) });
            if disk.kind == DiskKind::Tpm {
                return refused(
                    "TPM state is no block device of QEMU; only Proxmox VE's QEMU can attach it for a backup",
                );
            }
            if disk.qdev.is_empty() {
                return refused("QEMU names no device for it");
            }
            if !devices.insert(disk.qdev.as_str()) || !exports.insert(super::export_name(disk)) {
                return refused("the plan names it twice");
            }
            if disk.size == 0 {
                return refused("its size is zero");
            }
        }
        Ok(())
    }

    /// Finds every disk's root node as it is now, and refuses what is not as planned.
    pub(super) fn roots<'g>(&self, graph: &'g Graph) -> Result<Vec<&'g BlockNode>, AccessError> {
        if let Some(export) = graph.foreign_nbd_exports().next() {
            let what = format!("the NBD server with export `{export}`");
            return Err(AccessError::Foreign { what, disk: None });
        }
        let mut seen = HashSet::new();
        let mut roots = Vec::new();
        for disk in self.plan.disks.iter().map(|d| &d.disk) {
            let root = root(graph, disk)?;
            let name = root.node_name.as_deref().unwrap_or_default();
            if !seen.insert(name) {
                let reason = format!("node `{name}` belongs to another disk too");
                return Err(AccessError::Refused { reason, disk: Some(disk.name.clone()) });
            }
            roots.push(root);
        }
        Ok(roots)
    }

    async fn features(&self, session: &mut Session) -> Result<Features, AccessError> {
        let schema = Schema::query(session).await.map_err(AccessError::qmp("cannot read the QMP schema", None))?;
        let missing = |what: &str| Err(AccessError::FeatureMissing { what: what.to_owned(), disk: None });
        if !schema.variant_has("blockdev-add", "copy-before-write", "on-cbw-error")
            || !schema.variant_has("blockdev-add", "copy-before-write", "cbw-timeout")
        {
            return missing("the filter `copy-before-write` with `on-cbw-error` and `cbw-timeout` (QEMU 7.1)");
        }
        if !schema.variant_has("blockdev-add", "snapshot-access", "file") {
            return missing("the node `snapshot-access` (QEMU 7.0)");
        }
        if !schema.variant_has("block-export-add", "nbd", "bitmaps") {
            return missing("bitmaps of NBD exports (QEMU 6.0)");
        }
        let on_cbw_error = schema.command_has("blockdev-backup", "on-cbw-error");
        let way = self.way.unwrap_or(if on_cbw_error { Way::Transaction } else { Way::MicroPause });
        // Rounded up: a limit below a second would become none at all.
        let wanted = self.plan.cbw_timeout.as_secs() + u64::from(self.plan.cbw_timeout.subsec_nanos() > 0);
        let longest = if session.version() < LONG_TIMEOUTS { SHORT_TIMEOUT } else { 3600 };
        Ok(Features {
            way,
            on_cbw_error,
            cbw_timeout: u32::try_from(wanted).unwrap_or(u32::MAX).clamp(1, longest),
            qemu: session.peer_pid().and_then(|pid| ProcessIdentity::of(pid).ok()),
            owner: session.peer_pid().and_then(Owner::of),
        })
    }
}

pub(super) async fn read(session: &mut Session) -> Result<Graph, AccessError> {
    Graph::read(session).await.map_err(AccessError::qmp("cannot read the block graph", None))
}

fn root<'g>(graph: &'g Graph, disk: &Disk) -> Result<&'g BlockNode, AccessError> {
    let refused = |reason: String| AccessError::Refused { reason, disk: Some(disk.name.clone()) };
    let device = graph
        .device(&disk.qdev, &disk.device)
        .ok_or_else(|| refused(format!("QEMU has no block device `{}` (any more)", disk.qdev)))?;
    let node = device.inserted.as_ref().ok_or_else(|| refused("no medium is inserted".into()))?;
    let name = node.node_name.as_deref().unwrap_or_default();
    if name.is_empty() {
        return Err(refused("its node has no name".into()));
    }
    if is_ours(name) {
        return Err(refused(format!("node `{name}` of a dead run is still above it; `recover` removes that")));
    }
    if node.ro {
        return Err(refused("it is read-only".into()));
    }
    if node.image.virtual_size != disk.size {
        return Err(refused(format!("it has {} bytes now, not {}", node.image.virtual_size, disk.size)));
    }
    match graph.in_the_way(name) {
        Some(what) => Err(AccessError::Foreign { what, disk: Some(disk.name.clone()) }),
        None => Ok(node),
    }
}

/// Filters have not been tried under a live migration, and the images may belong to the other side.
async fn refuse_migration(session: &mut Session) -> Result<(), AccessError> {
    let busy = |by: String| Err(AccessError::Busy { by, disk: None });
    let status =
        session.execute(&QueryStatus {}).await.map_err(AccessError::qmp("cannot read the guest's run state", None))?;
    if matches!(status.status.as_str(), "inmigrate" | "postmigrate" | "finish-migrate" | "save-vm" | "restore-vm") {
        return busy(format!("its run state is `{}`", status.status));
    }
    let migration =
        session.execute(&QueryMigrate {}).await.map_err(AccessError::qmp("cannot ask about migration", None))?;
    match migration.status.as_deref() {
        None | Some("none" | "completed" | "failed" | "cancelled") => Ok(()),
        Some(state) => busy(format!("a migration is `{state}`")),
    }
}

/// On an old QEMU an export or a filter on a disk with an I/O thread kills the guest.
async fn refuse_iothreads(session: &mut Session, disks: impl Iterator<Item = &Disk>) -> Result<(), AccessError> {
    let threads =
        session.execute(&QueryIothreads {}).await.map_err(AccessError::qmp("cannot list the I/O threads", None))?;
    if threads.is_empty() {
        return Ok(());
    }
    let (major, minor, micro) = session.version();
    for disk in disks {
        if let Some(thread) = iothread_of(session, disk).await? {
            return Err(AccessError::Refused {
                reason: format!(
                    "QEMU {major}.{minor}.{micro} dies of a snapshot access to a disk with an I/O thread ({thread})"
                ),
                disk: Some(disk.name.clone()),
            });
        }
    }
    Ok(())
}

/// The I/O thread that serves a disk: that of the device, or of the controller that its bus belongs to.
async fn iothread_of(session: &mut Session, disk: &Disk) -> Result<Option<String>, AccessError> {
    let path = super::qom_path(&disk.qdev);
    let mut objects = vec![path.clone()];
    if let Some(device) = path.strip_suffix("/virtio-backend") {
        objects.push(device.to_owned());
    }
    if let Some(bus) = get(session, &path, "parent_bus", disk).await?
        && let Some((controller, _)) = bus.split_once("/virtio-backend")
    {
        objects.push(controller.to_owned());
    }
    for object in objects {
        if let Some(thread) = get(session, &object, "iothread", disk).await? {
            return Ok(Some(thread));
        }
    }
    Ok(None)
}

/// A property's text; `None` when there is no such property or it is empty.
async fn get(session: &mut Session, path: &str, property: &str, disk: &Disk) -> Result<Option<String>, AccessError> {
    match session.execute(&QomGet { path: path.to_owned(), property: property.to_owned() }).await {
        Ok(value) => Ok(value.as_str().filter(|text| !text.is_empty()).map(str::to_owned)),
        Err(crate::qmp::QmpError::Refused { .. }) => Ok(None),
        Err(error) => Err(AccessError::qmp("cannot find the disk's I/O thread", Some(&disk.name))(error)),
    }
}

/// A directory that QEMU may enter, if it runs as somebody else than we.
pub(super) fn adopt_dir(path: &Path, owner: Option<Owner>) -> Result<(), AccessError> {
    std::fs::File::open(path).and_then(|dir| Owner::adopt(owner, &dir)).map_err(|source| AccessError::Io {
        path: path.to_owned(),
        doing: "given to QEMU",
        source,
    })
}
