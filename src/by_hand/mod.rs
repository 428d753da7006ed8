//! Accesses by hand: set up, looked at and ended by an operator, one command each.
//!
//! The access is that of a backup, with the same journal; but it stays when the process ends. It never commits anything: its
//! bitmaps are of a target of their own, and where it shows the bitmap of a real target, ending it gives that bitmap back with
//! all writes since.

mod mount;
mod status;

pub use mount::{Showing, Shown, ShownDisk, View, mount};
pub use status::{Image, MountState, Mounted, Standing, State, status};

use crate::{
    access::{
        self, AccessPlan, ActiveAccess, BitmapMode, DiskAccess, DiskPlan, ExportMode, Fleecing, FreezeMode,
        SnapshotAccess, Teardown,
        by_hand::{Kept, own_bitmap, target_id},
        graph::Graph,
        proxmox::ProxmoxAccess,
        stock::StockAccess,
    },
    backup::{Cancelled, LeftBehind, Selection, recover_leftover},
    config::Dirs,
    copy::{self, CopyError, DiskMap},
    fuse::{FuseError, export::LONGEST_READ},
    generation::{self, Facts, Record},
    guest::{Disk, Guest, GuestError, GuestId, GuestKind},
    journal::{Journal, JournalError, ProcessIdentity, Step, look},
    nbd::{Client, ConnectOptions, NbdError},
    qmp::Qmp,
    report::{Event, Events, Phase},
    segment::{SegmentLen, SegmentLens},
};
use anyhow::{Context, Result, bail};
use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// Limit for an answer of QEMU's NBD server, as for backups.
const NBD_DEADLINE: Duration = Duration::from_mins(2);
/// How long a moment is for which a journal's lock is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);
const LOCK_POLL: Duration = Duration::from_millis(20);

/// Dirty bitmaps of an access by hand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bitmap {
    /// None: everything is read, and nothing is left.
    None,
    /// One of its own begins: a later access by hand may read what changed since this one.
    New,
    /// What changed since the last access by hand that was ended with success.
    Use,
    /// What the next backup to a target would read; the target's bitmap is given back at the end.
    Target(String),
}

/// What is wanted.
#[derive(Clone, Debug)]
pub struct Options {
    /// The program's directories.
    pub dirs: Dirs,
    /// Disks to take or to leave.
    pub selection: Selection,
    /// Dirty bitmaps.
    pub bitmap: Bitmap,
    /// What clients may do with the exports.
    pub exports: ExportMode,
    /// Freeze.
    pub freeze: FreezeMode,
    /// Limit of a freeze.
    pub freeze_limit: Duration,
    /// Fleecing images.
    pub fleecing: Fleecing,
    /// How long a guest write may wait for fleecing.
    pub cbw_timeout: Duration,
    /// How long to wait for another client of the QMP socket.
    pub lock_wait: Duration,
    /// Segment length of backups, if configured: bitmaps get it as granularity.
    pub segment_lens: SegmentLens,
    /// Program that manages Proxmox storages.
    pub pvesm: PathBuf,
}

/// Why something cannot be done by hand.
#[derive(Debug, thiserror::Error)]
pub enum ByHandError {
    /// There is no access by hand.
    #[error("guest `{guest}` has no access by hand{}", if *.leftover {
        format!(", but a run that died has left something; `pvebackup recover {guest}` undoes it")
    } else {
        format!("; `pvebackup access setup {guest}` sets one up")
    })]
    None {
        /// The guest.
        guest: GuestId,
        /// Whether a dead run left something.
        leftover: bool,
    },
    /// QEMU ended, and the access with it.
    #[error(
        "the QEMU process of guest `{guest}` has ended, and the access by hand with it; \
         `pvebackup access teardown {guest}` removes what is left on this host"
    )]
    Gone {
        /// The guest.
        guest: GuestId,
    },
    /// Success, while somebody reads.
    #[error(
        "`{}` is in use, so what is read there may not be complete; close the files and end the access then, \
         or end it without `--success`",
        path.display()
    )]
    InUse {
        /// Where it is mounted.
        path: PathBuf,
    },
    /// Success has no meaning for it.
    #[error("the access by hand to guest `{guest}` has no dirty bitmap that could be kept; end it without `--success`")]
    NoBitmap {
        /// The guest.
        guest: GuestId,
    },
}

/// Sets an access up that stays.
///
/// # Errors
/// When there is one already, a run is at work, or it cannot be set up; nothing is left then, or the journal says what.
pub async fn set_up(guest: &Guest, options: &Options, events: &Events, cancel: &CancellationToken) -> Result<Kept> {
    let qmp = Qmp { socket: guest.qmp.clone(), lock_wait: options.lock_wait };
    let journal = Journal::open(&options.dirs.journals(), guest.id.as_str())?;
    recover_leftover(&journal, &qmp, &options.dirs.generations(), &guest.id, events).await?;

    events.phase(Phase::Prepare);
    let mut session = qmp.session().await.map_err(|error| GuestError::of_qmp(guest, error))?;
    let qemu = crate::guest::process(guest, &session);
    let found = options.selection.apply(crate::guest::disks(guest, &mut session).await?)?;
    let graph = Graph::read(&mut session).await.context("cannot read the block graph")?;
    drop(session);
    for (disk, reason) in &found.skipped {
        events.send(Event::DiskSkipped { disk: disk.clone(), reason: reason.clone() });
    }
    if found.disks.is_empty() {
        bail!(GuestError::NoDisks { skipped: found.skipped });
    }

    let plan = plan(guest, options, &found.disks, &graph, qemu.as_ref(), events)?;
    let begin = Step::Begin {
        guest: guest.id.to_string(),
        qmp: guest.qmp.clone(),
        agent: guest.agent.clone(),
        qemu,
        target: plan.target.clone(),
        generation: plan.generation.clone(),
    };
    let mut access: Box<dyn SnapshotAccess> = match guest.kind {
        GuestKind::Proxmox => Box::new(ProxmoxAccess::new(plan, qmp.clone(), journal.clone(), events.clone())),
        GuestKind::Plain => Box::new(StockAccess::new(plan, qmp.clone(), journal.clone())),
    };
    access.check().await?;
    tell_warnings(access.as_mut(), events);
    if cancel.is_cancelled() {
        bail!(Cancelled);
    }

    events.phase(Phase::SetUp);
    journal.record(&begin)?;
    let active = access.set_up().await;
    tell_warnings(access.as_mut(), events);
    let active = match active {
        Ok(active) => active,
        Err(error) => {
            if journal.leftover().iter().all(|step| matches!(step, Step::Begin { .. })) {
                journal.clear()?;
            }
            bail!(error);
        }
    };
    match keep(&journal, active, options, cancel) {
        Ok(kept) => Ok(kept),
        Err(error) => {
            events.phase(Phase::TearDown);
            let report = access.tear_down(Teardown::Failure).await?;
            tell_warnings(access.as_mut(), events);
            if report.left_behind.is_empty() {
                journal.clear()?;
                return Err(error);
            }
            Err(error.context(LeftBehind { what: report.left_behind, archive: None }))
        }
    }
}

/// From here on the access stays when we go.
fn keep(journal: &Journal, active: ActiveAccess, options: &Options, cancel: &CancellationToken) -> Result<Kept> {
    if cancel.is_cancelled() {
        bail!(Cancelled);
    }
    let target = match &options.bitmap {
        Bitmap::Target(name) => Some(name.clone()),
        _ => None,
    };
    let ActiveAccess { socket, disks, instant, .. } = active;
    let trim = options.exports == ExportMode::Trim;
    journal.record(&Step::ByHand { since: instant, socket, target, disks, trim })?;
    Kept::of(&journal.leftover()).context("the journal lost the access by hand")
}

fn tell_warnings(access: &mut dyn SnapshotAccess, events: &Events) {
    for warning in access.take_warnings() {
        events.warn(warning);
    }
}

fn plan(
    guest: &Guest,
    options: &Options,
    disks: &[Disk],
    graph: &Graph,
    qemu: Option<&ProcessIdentity>,
    events: &Events,
) -> Result<AccessPlan> {
    let (target, record) = match &options.bitmap {
        Bitmap::Target(name) => (
            crate::backup::target_id(guest.kind, &options.dirs, name)?,
            Record::load(&options.dirs.generations(), name, guest.id.as_str()),
        ),
        other => (target_id(guest.kind, *other != Bitmap::None), (Record::default(), None)),
    };
    let disk_plan = |disk: &Disk| {
        let segment_len = options.segment_lens.of(disk.size);
        let bitmap = match &options.bitmap {
            Bitmap::None => BitmapMode::None,
            Bitmap::New => BitmapMode::New,
            Bitmap::Use => {
                if let Some(name) = own_bitmap(guest.kind, graph, disk) {
                    BitmapMode::Use(name)
                } else {
                    events.info(format!("disk `{}` has no bitmap of an access by hand; all of it is shown", disk.name));
                    BitmapMode::New
                }
            }
            Bitmap::Target(name) => match bitmap_of(&record, disk, segment_len, qemu) {
                Ok(bitmap) => BitmapMode::Use(bitmap),
                Err(reason) => {
                    events.info(format!(
                        "the next backup of disk `{}` to `{name}` is full ({reason}); all of it is shown",
                        disk.name
                    ));
                    BitmapMode::New
                }
            },
        };
        DiskPlan { disk: disk.clone(), bitmap, granularity: segment_len.bytes() as u32 }
    };
    Ok(AccessPlan {
        guest: guest.clone(),
        disks: disks.iter().map(disk_plan).collect(),
        target,
        generation: generation::new_id(),
        run_dir: options.dirs.run.join(guest.id.as_str()),
        fleecing: options.fleecing.clone(),
        freeze: options.freeze,
        freeze_limit: options.freeze_limit,
        cbw_timeout: options.cbw_timeout,
        exports: options.exports,
        pvesm: options.pvesm.clone(),
    })
}

/// The bitmap that the next backup of a disk would use if the target has its archive, or why none.
fn bitmap_of(
    (record, no_record): &(Record, Option<String>),
    disk: &Disk,
    segment_len: SegmentLen,
    qemu: Option<&ProcessIdentity>,
) -> Result<String, String> {
    if let Some(reason) = no_record {
        return Err(reason.clone());
    }
    let qemu = qemu.ok_or("the guest's QEMU process cannot be identified")?;
    // The target is not asked, so its repository is taken for what it was.
    let repository = record.disk(&disk.name).map_or("", |old| old.repository.as_str());
    record.judge(disk, segment_len, &Facts { repository, qemu }).map(|old| old.bitmap.clone())
}

/// The access by hand to `guest`. Takes no lock.
///
/// # Errors
/// [`ByHandError::None`], [`ByHandError::Gone`], or when the journal cannot be read.
pub fn find(dirs: &Dirs, guest: &GuestId) -> Result<Kept> {
    let kept = known(dirs, guest)?;
    if kept.qemu_is_gone() {
        bail!(ByHandError::Gone { guest: guest.clone() });
    }
    Ok(kept)
}

fn known(dirs: &Dirs, guest: &GuestId) -> Result<Kept> {
    let seen = look(&dirs.journals(), guest.as_str())?;
    let steps = seen.map(|glimpse| glimpse.steps).unwrap_or_default();
    match Kept::of(&steps) {
        Some(kept) => Ok(kept),
        None => bail!(ByHandError::None { guest: guest.clone(), leftover: !steps.is_empty() }),
    }
}

/// The journal of a guest with an access by hand. Those who show it as files hold its lock for moments, when they begin and when
/// they have ended; a longer holder is a command at work.
///
/// # Errors
/// [`JournalError::Busy`], or when it cannot be read.
pub async fn open_journal(dirs: &Dirs, guest: &GuestId) -> Result<Journal, JournalError> {
    let start = Instant::now();
    loop {
        match Journal::open(&dirs.journals(), guest.as_str()) {
            Err(JournalError::Busy { .. }) if start.elapsed() < LOCK_PATIENCE => sleep(LOCK_POLL).await,
            other => return other,
        }
    }
}

/// What an access by hand shows of a disk: dirty and clean, data and zeroes. What was discarded counts as data, and so does then
/// everything that is dirty.
///
/// # Errors
/// When QEMU's NBD server does not answer as it should.
pub async fn map(kept: &Kept, disk: &DiskAccess) -> Result<DiskMap, CopyError> {
    let map = map_of(kept, disk, Allocation::Asked).await;
    match map {
        // QEMU tells no allocation of ranges that were discarded.
        Err(CopyError::SnapshotLost { .. }) if kept.trim => map_of(kept, disk, Allocation::NotAsked).await,
        map => map,
    }
}

/// Whether QEMU is asked where a disk has zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Allocation {
    Asked,
    /// Everything dirty counts as data.
    NotAsked,
}

async fn map_of(kept: &Kept, disk: &DiskAccess, asked: Allocation) -> Result<DiskMap, CopyError> {
    let nbd = |source| CopyError::Nbd { disk: disk.name.clone(), source };
    let dirty = match &disk.dirty_context {
        Some(context) => Some(connect(&kept.socket, disk, context).await.map_err(nbd)?),
        None => None,
    };
    let allocation = connect(&kept.socket, disk, "base:allocation").await.map_err(nbd)?;
    let asked = Some(&allocation).filter(|_| asked == Allocation::Asked);
    let map = copy::read_map(disk, dirty.as_ref(), asked).await;
    for client in dirty.iter().chain([&allocation]) {
        // QEMU spins on a client that goes without a word.
        client.disconnect().await.ok();
    }
    map
}

/// Bytes of a disk that are dirty: all without a bitmap.
///
/// # Errors
/// As [`map`].
pub async fn dirty_bytes(kept: &Kept, disk: &DiskAccess) -> Result<u64, CopyError> {
    let Some(context) = disk.dirty_context.as_deref().filter(|_| disk.size > 0) else { return Ok(disk.size) };
    let nbd = |source| CopyError::Nbd { disk: disk.name.clone(), source };
    let client = connect(&kept.socket, disk, context).await.map_err(nbd)?;
    let answer = client.block_status(context, 0, client.size()).await;
    client.disconnect().await.ok();
    Ok(answer.map_err(nbd)?.iter().filter(|extent| extent.flags & copy::DIRTY != 0).map(|extent| extent.len).sum())
}

async fn connect(socket: &Path, disk: &DiskAccess, context: &str) -> Result<Client, NbdError> {
    Client::connect(&connection(socket, disk, vec![context.to_owned()])).await
}

fn connection(socket: &Path, disk: &DiskAccess, contexts: Vec<String>) -> ConnectOptions {
    ConnectOptions {
        socket: socket.to_owned(),
        export: disk.export.clone(),
        contexts,
        deadline: NBD_DEADLINE,
        longest_read: disk.largest_request.unwrap_or(LONGEST_READ),
    }
}

/// What ending an access by hand did.
#[derive(Clone, Debug)]
pub struct Ended {
    /// The access.
    pub kept: Kept,
    /// Whether QEMU had ended before.
    pub qemu_gone: bool,
    /// Targets for which the next backup of the disks is full.
    pub forgotten: Vec<String>,
    /// Mounts that were in use: their readers get errors.
    pub cut_off: Vec<PathBuf>,
    /// What could not be removed and stays in the journal.
    pub left_behind: Vec<String>,
}

/// Ends an access by hand. [`Teardown::Failure`] loses nothing: every bitmap is as if the access had never been.
///
/// With [`Teardown::Success`] the bitmaps hold the writes since the access began and nothing else. If they are a real
/// target's, its generation records for the disks are forgotten first: no archive of ours is what they are relative to.
///
/// # Errors
/// [`ByHandError`]; when a run is at work; when QEMU lives but cannot be asked, or a record or the journal cannot be written.
pub async fn tear_down(dirs: &Dirs, guest: &GuestId, how: Teardown, lock_wait: Duration) -> Result<Ended> {
    // A journal is not made for a guest that never had one.
    known(dirs, guest)?;
    let journal = open_journal(dirs, guest).await?;
    let Some(kept) = Kept::of(&journal.leftover()) else {
        bail!(ByHandError::None { guest: guest.clone(), leftover: !journal.leftover().is_empty() });
    };
    let mut forgotten = Vec::new();
    if how == Teardown::Success {
        if kept.disks.iter().all(|disk| disk.next_bitmap.is_none()) {
            bail!(ByHandError::NoBitmap { guest: guest.clone() });
        }
        for (path, server) in &kept.mounts {
            match access::release(path, server).await {
                Err(FuseError::Busy(path)) => bail!(ByHandError::InUse { path }),
                other => other?,
            }
        }
        let bitmaps: Vec<(&str, Vec<&str>)> =
            kept.disks.iter().map(|disk| (disk.name.as_str(), bitmaps(disk))).collect();
        forgotten = Record::forget_bitmaps(&dirs.generations(), guest.as_str(), &bitmaps)?;
    }
    let qmp = Qmp { socket: kept.qmp.clone(), lock_wait };
    let report = access::end(&journal, &qmp, how)
        .await
        .context("the access by hand cannot be ended now, and the journal keeps it; try again")?;
    Ok(Ended { kept, qemu_gone: report.qemu_gone, forgotten, cut_off: report.cut_off, left_behind: report.left_behind })
}

/// Bitmaps whose meaning changes when an access to the disk ends with success.
fn bitmaps(disk: &DiskAccess) -> Vec<&str> {
    let used = disk.dirty_context.as_deref().and_then(|context| context.strip_prefix("qemu:dirty-bitmap:"));
    used.into_iter().chain(disk.next_bitmap.as_deref()).collect()
}
