//! Fleecing images and TPM state as nodes of Proxmox's QEMU.
//!
//! A setup that finds a fleecing node missing, read-only or of another size after it has begun leaves filters that only end
//! with the QEMU process. So everything is verified before.

use crate::{
    access::{
        AccessError, AccessPlan, DiskPlan, Fleecing,
        fleecing::{FleecingImages, Floor, Owner, Witness},
        fleecing_volume::{Storage, StorageStatus, is_block_device},
    },
    guest::{Disk, DiskKind},
    journal::{Journal, Step},
    qmp::{
        Qmp, Session,
        command::block::{BlockNode, BlockdevAdd, Cache, Discard, Driver, NodeRef, QueryNamedBlockNodes},
    },
    report::Events,
};
use std::{
    io,
    path::{Path, PathBuf},
};

/// Where fleecing images come from, with what is known about it.
#[derive(Debug)]
pub enum Place {
    /// A directory.
    Directory(FleecingImages),
    /// A storage of Proxmox VE, and the volumes made so far, `None` for those that are no files.
    Storage(Storage, StorageStatus, Vec<Option<Witness>>),
}

impl Place {
    /// Looks at the place: whether it can be used and has room.
    pub async fn look(plan: &AccessPlan, events: &Events) -> Result<Self, AccessError> {
        let floor = Floor::of(plan.disks.iter().fold(0, |sum: u64, p| sum.saturating_add(p.disk.size)));
        match &plan.fleecing {
            Fleecing::Directory { path, format } => {
                let images = FleecingImages::new(path, *format)?;
                if let Some(warning) = images.check_room(floor, plan.disks.len())? {
                    events.warn(warning);
                }
                Ok(Self::Directory(images))
            }
            Fleecing::Storage(name) => {
                let storage = Storage::new(&plan.pvesm, name)?;
                let status = storage.status().await?;
                let available = status.available;
                if available < floor.refuse {
                    let (place, needed) = (name.clone(), floor.refuse);
                    return Err(AccessError::NoSpace { place, available, needed, unit: "bytes" });
                }
                if available < floor.warn {
                    events.warn(format!("only {} MiB are free for fleecing images in storage {name}", available >> 20));
                }
                Ok(Self::Storage(storage, status, Vec::new()))
            }
        }
    }

    /// Bytes that the images hold, as far as the host can tell: a volume on a block storage does not say.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Directory(images) => images.bytes(),
            Self::Storage(_, _, volumes) => volumes.iter().flatten().map(Witness::bytes).sum(),
        }
    }

    /// The images as they were made, in that order.
    pub fn witnesses(&self) -> &[Option<Witness>] {
        match self {
            Self::Directory(images) => images.witnesses(),
            Self::Storage(_, _, volumes) => volumes,
        }
    }

    /// Makes the image for disk number `number`, written to the journal before, and returns the node for it.
    pub async fn make(
        &mut self,
        plan: &AccessPlan,
        journal: &Journal,
        number: usize,
        size: u64,
        owner: Option<Owner>,
    ) -> Result<BlockdevAdd, AccessError> {
        let disk = &plan.disks[number].disk;
        let node = super::fleecing_node(&disk.device);
        match self {
            Self::Directory(images) => {
                let path = images.path(&format!("pvebackup-{}-{}-{}", plan.guest.id, plan.generation, disk.device));
                journal.record(&Step::FleecingFile { path: path.clone() })?;
                images.create(&path, &disk.name, size, owner).await?;
                Ok(images.node(&node, &path, size))
            }
            Self::Storage(storage, status, volumes) => {
                let label = format!("fleece-{}-{number}", plan.generation);
                let (volume, name) = storage.volume(status, plan.guest.id.as_str(), &label);
                journal.record(&Step::FleecingVolume { volume: volume.clone(), pvesm: plan.pvesm.clone() })?;
                storage.alloc(plan.guest.id.as_str(), &name, &volume, size).await?;
                let path = storage.path(&volume).await?;
                volumes.push(Witness::of(&path).map_err(|source| AccessError::Fleecing {
                    image: volume.clone(),
                    disk: Some(disk.name.clone()),
                    doing: "found",
                    source,
                })?);
                let file = NodeRef::Inline(Box::new(BlockdevAdd {
                    node_name: None,
                    discard: Some(Discard::Unmap),
                    read_only: None,
                    cache: None,
                    driver: file_driver(path),
                }));
                // The volume may be larger: storages round up.
                let mut node = BlockdevAdd::new(node, Driver::Raw { file, size: Some(size) }).unmap();
                node.cache = Some(Cache { direct: true, no_flush: true });
                Ok(node)
            }
        }
    }
}

fn file_driver(filename: PathBuf) -> Driver {
    if is_block_device(&filename) { Driver::HostDevice { filename } } else { Driver::File { filename } }
}

/// Adds a node, written to the journal before.
async fn add(session: &mut Session, journal: &Journal, disk: &Disk, node: BlockdevAdd) -> Result<(), AccessError> {
    let step = Step::Node { name: node.node_name.clone().unwrap_or_default() };
    journal.record(&step)?;
    session.execute(&node).await.map_err(AccessError::qmp("cannot add a node", Some(&disk.name)))?;
    Ok(())
}

/// The node for TPM state, which QEMU has not opened: read-only.
async fn tpm_node(plan: &AccessPlan, disk: &Disk) -> Result<BlockdevAdd, AccessError> {
    let missing = |why: &str| AccessError::Fleecing {
        image: disk.identity.clone(),
        disk: Some(disk.name.clone()),
        doing: "attached",
        source: io::Error::other(why.to_owned()),
    };
    let volume = disk.volume.as_deref().ok_or_else(|| missing("its volume is not known"))?;
    let path = if volume.is_absolute() {
        volume.to_owned()
    } else {
        let volume = volume.to_str().ok_or_else(|| missing("its volume id is no text"))?;
        Storage::of_volume(&plan.pvesm, volume)?.path(volume).await?
    };
    let child =
        BlockdevAdd { node_name: None, discard: None, read_only: Some(true), cache: None, driver: file_driver(path) };
    let file = NodeRef::Inline(Box::new(child));
    let driver = if disk.driver == "qcow2" { Driver::Qcow2 { file } } else { Driver::Raw { file, size: None } };
    let mut node = BlockdevAdd::new(&disk.device, driver);
    node.read_only = Some(true);
    Ok(node)
}

/// Attaches TPM state. Returns the disks' sizes, which for TPM state are known only now.
pub async fn attach_sources(plan: &AccessPlan, qmp: &Qmp, journal: &Journal) -> Result<Vec<u64>, AccessError> {
    let mut sizes: Vec<u64> = plan.disks.iter().map(|p| p.disk.size).collect();
    if plan.disks.iter().all(|p| p.disk.kind != DiskKind::Tpm) {
        return Ok(sizes);
    }
    let mut nodes = Vec::new();
    for DiskPlan { disk, .. } in plan.disks.iter().filter(|p| p.disk.kind == DiskKind::Tpm) {
        nodes.push((disk, tpm_node(plan, disk).await?));
    }
    let mut session = qmp.session().await.map_err(AccessError::qmp("cannot reach QEMU", None))?;
    for (disk, node) in nodes {
        add(&mut session, journal, disk, node).await?;
    }
    let nodes = named_nodes(&mut session).await?;
    for (DiskPlan { disk, .. }, size) in plan.disks.iter().zip(&mut sizes).filter(|(p, _)| p.disk.kind == DiskKind::Tpm)
    {
        *size = find(&nodes, &disk.device).map_or(*size, |node| node.image.virtual_size);
    }
    Ok(sizes)
}

/// Attaches the fleecing images that were made, in the order of the plan, and verifies them.
pub async fn attach_images(
    plan: &AccessPlan,
    sizes: &[u64],
    images: Vec<BlockdevAdd>,
    session: &mut Session,
    journal: &Journal,
) -> Result<(), AccessError> {
    for (DiskPlan { disk, .. }, node) in plan.disks.iter().zip(images) {
        add(session, journal, disk, node).await?;
    }
    verify(plan, sizes, &named_nodes(session).await?)
}

async fn named_nodes(session: &mut Session) -> Result<Vec<BlockNode>, AccessError> {
    session.execute(&QueryNamedBlockNodes::default()).await.map_err(AccessError::qmp("cannot ask for nodes", None))
}

fn find<'a>(nodes: &'a [BlockNode], name: &str) -> Option<&'a BlockNode> {
    nodes.iter().find(|node| node.node_name.as_deref() == Some(name))
}

/// Every fleecing node is there, can be written and is exactly as large as its disk.
fn verify(plan: &AccessPlan, sizes: &[u64], nodes: &[BlockNode]) -> Result<(), AccessError> {
    for (DiskPlan { disk, .. }, size) in plan.disks.iter().zip(sizes) {
        let name = super::fleecing_node(&disk.device);
        let wrong = |why: String| AccessError::Fleecing {
            image: name.clone(),
            disk: Some(disk.name.clone()),
            doing: "used",
            source: io::Error::other(why),
        };
        let node = find(nodes, &name).ok_or_else(|| wrong("QEMU does not have the node".into()))?;
        if node.ro {
            return Err(wrong("the node is read-only".into()));
        }
        if node.image.virtual_size != *size {
            return Err(wrong(format!("it has {} bytes, the disk {size}", node.image.virtual_size)));
        }
    }
    Ok(())
}

/// The directory of the run.
pub fn run_dir(path: &Path) -> Result<(), AccessError> {
    crate::config::create_private_dir(path).map_err(|source| AccessError::Io {
        path: path.to_owned(),
        doing: "created",
        source,
    })
}
