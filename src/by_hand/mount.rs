//! The disks of an access by hand as files.
//!
//! The process that mounts serves the files until somebody unmounts them or ends the access. It holds the journal's lock only while
//! it notes that it begins, and that it has ended: the commands that end the access find the mount there, and end the process first.

use super::{ByHandError, Kept, NBD_DEADLINE, connection, find, map, open_journal};
use crate::{
    access::DiskAccess,
    config::Dirs,
    copy::{CopyError, DiskMap},
    fuse::{
        FuseError, Image, ImageView, Mount, MountOptions, Unmounted, ViewOptions, Wanted,
        export::{ExportImage, ExportOptions, LONGEST_READ},
        mounts,
        segments::{
            MAX_DISKS, MAX_SEGMENTS,
            images::{CutImage, CutView},
        },
    },
    guest::GuestId,
    journal::{Journal, ProcessIdentity, Step},
    nbd::{Client, ConnectOptions, Lane},
    report::Events,
    segment::{Content, SegmentLens},
};
use anyhow::{Context, Result, bail};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::task::spawn_blocking;

/// Connections to each export. A reader of one file has many reads under way when it reads ahead.
const CONNECTIONS: usize = 4;
/// Of these as well, for small reads. With more of them fewer requests meet in one.
const LANES: usize = 2;
/// The smallest unit that QEMU discards, bytes: the filter's cluster.
const CLUSTER: u64 = 64 << 10;

/// How disks are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// A file each.
    Image,
    /// A directory of segments each.
    Segment,
}

/// A disk that is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShownDisk {
    /// Name.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// Bytes that can be read.
    pub readable: u64,
    /// Segments with a file, and those of them that changed; in the segment view.
    pub segments: Option<(u64, u64)>,
}

/// Files that are served by this process.
pub struct Shown {
    /// The disks.
    pub disks: Vec<ShownDisk>,
    mount: Mount,
    step: Step,
    clients: Vec<Client>,
    journals: PathBuf,
    guest: GuestId,
}

/// What is wanted.
#[derive(Clone, Debug)]
pub struct Showing {
    /// An empty directory.
    pub dir: PathBuf,
    /// How.
    pub view: View,
    /// The configured length of segments.
    pub segment_lens: SegmentLens,
    /// This process's log, which goes with the mount.
    pub log: Option<PathBuf>,
}

/// Shows the disks of the access by hand to `guest` as files.
///
/// # Errors
/// [`ByHandError`]; when another command is at work on the guest, QEMU's NBD server does not answer, or it cannot be mounted
/// ([`FuseError`]). Nothing is left then.
pub async fn mount(dirs: &Dirs, guest: &GuestId, wanted: Showing, events: Events) -> Result<Shown> {
    // A journal is not made for a guest that never had one.
    find(dirs, guest)?;
    let journals = dirs.journals();
    let journal = open_journal(dirs, guest).await?;
    let Some(kept) = Kept::of(&journal.leftover()) else {
        bail!(ByHandError::None { guest: guest.clone(), leftover: !journal.leftover().is_empty() });
    };
    let mut opened = Vec::with_capacity(kept.disks.len());
    for disk in &kept.disks {
        opened.push(Opened::of(&kept, disk).await?);
    }
    let clients = opened.iter().flat_map(|disk| disk.clients.clone()).collect();

    let options = ViewOptions { deadline: NBD_DEADLINE, time: kept.since.into(), events };
    let mut disks = Vec::with_capacity(opened.len());
    let server = ProcessIdentity::of(nix::unistd::getpid().as_raw()).context("cannot read /proc")?;
    let Showing { dir, view, segment_lens, log } = wanted;
    let path = spawn_blocking(move || mounts::absolute(&dir)).await??;
    let step = Step::Served { path: path.clone(), server, log };
    let mount = match view {
        View::Image => {
            let mut images = Vec::with_capacity(opened.len());
            for disk in opened {
                disks.push(disk.shown(None));
                let lanes = disk.lanes(&kept.socket).await?;
                images.push(disk.image(lanes));
            }
            let view = ImageView::new(images, options);
            start(&journal, &step, move || Mount::start_images(&path, view, MountOptions::of_export())).await?
        }
        View::Segment => {
            if opened.len() > MAX_DISKS {
                bail!("a guest with more than {MAX_DISKS} disks has no segment view");
            }
            let mut cut = Vec::with_capacity(opened.len());
            for disk in opened {
                let len = segment_lens.of(disk.access.size);
                if len.count(disk.access.size) > MAX_SEGMENTS {
                    bail!("disk `{}` has too many segments; configure longer ones", disk.access.name);
                }
                let part = CutImage::new(disk.image(Vec::new()), len, &disk.shown.content, &disk.changed.content)?;
                disks.push(disk.shown(Some(part.counts())));
                cut.push(part);
            }
            let (view, mounting) = (CutView::new(cut, options), MountOptions { read_only: true, ..Default::default() });
            start(&journal, &step, move || Mount::start(&path, view, mounting)).await?
        }
    };
    Ok(Shown { disks, mount, step, clients, journals, guest: guest.clone() })
}

/// Mounts; in the journal before it is done.
async fn start(
    journal: &Journal,
    step: &Step,
    mount: impl FnOnce() -> Result<Mount, FuseError> + Send + 'static,
) -> Result<Mount> {
    journal.record(step)?;
    match spawn_blocking(mount).await? {
        Ok(mount) => Ok(mount),
        Err(error) => {
            journal.undone(step)?;
            bail!(error);
        }
    }
}

/// A disk, connected.
struct Opened {
    access: DiskAccess,
    clients: Vec<Client>,
    /// What changed.
    changed: DiskMap,
    /// What can be read: the whole disk where QEMU lets clean ranges be read.
    shown: DiskMap,
}

impl Opened {
    async fn of(kept: &Kept, disk: &DiskAccess) -> Result<Self, CopyError> {
        let changed = map(kept, disk).await?;
        let shown = if disk.clean_readable && disk.dirty_context.is_some() {
            map(kept, &DiskAccess { dirty_context: None, ..disk.clone() }).await?
        } else {
            changed.clone()
        };
        let options = connection(&kept.socket, disk, Vec::new());
        let nbd = |source| CopyError::Nbd { disk: disk.name.clone(), source };
        let mut clients = vec![Client::connect(&options).await.map_err(nbd)?];
        while clients.len() < CONNECTIONS && clients[0].can_multi_conn() {
            clients.push(Client::connect(&options).await.map_err(nbd)?);
        }
        Ok(Self { access: disk.clone(), clients, changed, shown })
    }

    /// Connections for small reads, and for reading ahead.
    async fn lanes(&self, socket: &Path) -> Result<Vec<Lane<Wanted>>, CopyError> {
        let options = connection(socket, &self.access, Vec::new());
        let options = ConnectOptions { longest_read: options.longest_read.min(LONGEST_READ), ..options };
        let lanes = Lane::several(&options, LANES).await;
        lanes.map_err(|source| CopyError::Nbd { disk: self.access.name.clone(), source })
    }

    fn image(&self, lanes: Vec<Lane<Wanted>>) -> Arc<dyn Image> {
        let options =
            ExportOptions { grain: self.access.granularity.max(CLUSTER), largest_request: self.access.largest_request };
        let (name, content) = (self.access.name.clone(), self.shown.content.clone());
        Arc::new(ExportImage::new(name, content, self.clients.clone(), options).with_lanes(lanes))
    }

    fn shown(&self, segments: Option<(u64, u64)>) -> ShownDisk {
        ShownDisk {
            name: self.access.name.clone(),
            size: self.access.size,
            readable: self.shown.content.bytes_where(|content| content != Content::Clean),
            segments,
        }
    }
}

impl Shown {
    /// Where, without links.
    pub fn path(&self) -> &Path {
        self.mount.path()
    }

    /// Returns when nobody serves the files any more: they were unmounted.
    pub async fn ended(&self) {
        self.mount.ended().await;
    }

    /// Unmounts. When files are open, their readers get an error.
    ///
    /// # Errors
    /// [`FuseError`]: it may still be mounted, and is in the journal.
    pub async fn end(self) -> Result<Unmounted> {
        let Self { mount, step, clients, journals, guest, .. } = self;
        let how = spawn_blocking(move || mount.umount()).await??;
        for client in clients {
            client.disconnect().await.ok();
        }
        if let Step::Served { log: Some(log), .. } = &step {
            let _ = fs::remove_file(log);
        }
        // Whoever holds the lock ends the access, and knows of the mount. By then the journal may be another access's.
        if let Ok(journal) = Journal::open(&journals, guest.as_str())
            && journal.leftover().contains(&step)
        {
            journal.undone(&step)?;
        }
        Ok(how)
    }
}
