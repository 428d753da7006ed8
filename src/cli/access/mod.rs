//! `pvebackup access`: look at a guest's disks by hand.

mod grid;
mod map;
mod mount;
mod show;

use super::{Context, exit, print, vm};
use crate::{
    access::{ExportMode, FreezeMode, Teardown, by_hand::Kept},
    backup::{LeftBehind, Selection},
    by_hand::{self, Bitmap, MountState, Options, State},
    config::Dirs,
    guest::{self, GuestId},
    provider::least_segment,
    report::Events,
    rights::Confinement,
};
use anyhow::Result;
use std::{path::PathBuf, time::Duration};

#[derive(Debug, clap::Subcommand)]
pub(super) enum AccessCommand {
    /// Set up a snapshot access that stays, and print where the disks can be read
    ///
    /// The disks can be read with any NBD client (`nbdinfo`, `nbdcopy`, `qemu-img`), at the URIs that are printed, as they were
    /// at one instant. The guest goes on; blocks that it overwrites go to fleecing images first. When these run out of space,
    /// the access breaks, never the guest.
    Setup(SetupArgs),
    /// Show what a disk of an access holds: extents, dirty bytes, and a picture
    Map(map::MapArgs),
    /// Show the disks of an access as files
    ///
    /// `DIR/DISK` is the disk as it was when the access was set up, for qemu-img, dd, guestmount, loop devices. With `--view
    /// segment` it is a directory of segments, `DIR/DISK/00000a/000000a031`: those that changed have the time of the access, those
    /// that did not 1970, and those of zeroes are missing. Only root, or whoever mounts, can look there. A process in the
    /// background serves the files until they are unmounted (`pvebackup umount`) or the access ends. After `access setup --trim`,
    /// `fallocate --punch-hole` on an image discards that range: it frees fleecing space, and cannot be read again.
    Mount(mount::MountArgs),
    /// End an access
    ///
    /// Unmounts what shows it (programs that read there get errors), and removes exports, filters and fleecing images. Dirty bitmaps are given back with all writes since, so that backups go on
    /// as if the access had never been.
    Teardown(TeardownArgs),
    /// Show who is at work on guests, and what is left
    ///
    /// Exit code 26: something is left that `pvebackup recover` undoes.
    Status {
        /// Guest; all that have a recovery journal if none is given
        #[arg(value_name = "GUEST")]
        guest: Option<GuestId>,
    },
}

impl AccessCommand {
    /// What a command may keep that only talks with QEMU's NBD server. The others start Proxmox VE's storage tools.
    pub(super) fn confinement(&self, dirs: &Dirs) -> Option<Confinement> {
        match self {
            Self::Map(_) => {
                Some(Confinement::Files { writable: vec![dirs.state.clone(), dirs.run.clone()], network: false })
            }
            Self::Mount(_) => Some(Confinement::Mount),
            Self::Setup(_) | Self::Teardown(_) | Self::Status { .. } => None,
        }
    }
}

#[derive(clap::Args, Debug)]
pub(super) struct SetupArgs {
    /// VMID of a Proxmox VE guest, or name of a guest in the configuration
    #[arg(value_name = "GUEST")]
    guest: GuestId,
    /// QMP socket of a guest that is not configured; GUEST names it from then on
    #[arg(long, value_name = "SOCKET")]
    qmp: Option<PathBuf>,
    /// Its guest agent's socket
    #[arg(long, requires = "qmp", value_name = "SOCKET")]
    agent: Option<PathBuf>,
    /// Only these disks
    #[arg(long, value_name = "DISK", value_delimiter = ',')]
    disk: Vec<String>,
    /// Leave these disks out
    #[arg(long, value_name = "DISK", value_delimiter = ',')]
    skip_disk: Vec<String>,
    /// Dirty bitmap of its own: `none`; `new` starts one, which `teardown --success` keeps; `use` shows what changed since
    #[arg(long, value_name = "MODE", default_value = "none", conflicts_with = "target")]
    bitmap: BitmapWord,
    /// Show what the next backup to this target would read; the target's bitmaps are given back at the end
    #[arg(long, short, value_name = "NAME")]
    target: Option<String>,
    /// Let clients discard (TRIM) what they have read, which frees fleecing space; it cannot be read again
    #[arg(long)]
    trim: bool,
    /// Freeze file systems through the guest agent: auto, require or off [default: auto]
    #[arg(long, value_name = "MODE", value_parser = vm::parse_freeze)]
    freeze: Option<FreezeMode>,
    /// Fleecing images: `enabled=1,storage=ID` on Proxmox VE, or `dir=PATH[,format=raw|qcow2]`
    #[arg(long, value_name = "OPTIONS")]
    fleecing: Option<String>,
    /// How long to wait for another client of the QMP socket: minutes, or with a unit (90s)
    #[arg(long, value_name = "TIME", value_parser = vm::parse_wait)]
    lockwait: Option<Duration>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum BitmapWord {
    None,
    New,
    Use,
}

#[derive(clap::Args, Debug)]
pub(super) struct TeardownArgs {
    /// Guest
    #[arg(value_name = "GUEST")]
    guest: GuestId,
    /// What was shown is copied: keep the bitmaps with the writes since the access began, and only these
    ///
    /// After `--bitmap new` or `use`, the next access with `--bitmap use` shows what changed since this one. After `--target`,
    /// the next backup of the disks to that target is full: pvebackup does not build on copies that it did not make. Refused
    /// while files of `access mount` are open.
    #[arg(long)]
    success: bool,
    /// How long to wait for another client of the QMP socket: minutes, or with a unit (90s)
    #[arg(long, value_name = "TIME", value_parser = vm::parse_wait)]
    lockwait: Option<Duration>,
}

pub(super) async fn run(command: AccessCommand, context: Context) -> Result<u8> {
    match command {
        AccessCommand::Setup(args) => set_up(args, context).await,
        AccessCommand::Map(args) => map::run(args, context).await,
        AccessCommand::Mount(args) => mount::run(args, context).await,
        AccessCommand::Teardown(args) => tear_down(args, context).await,
        AccessCommand::Status { guest } => status(guest.as_ref(), &context),
    }
}

async fn set_up(args: SetupArgs, context: Context) -> Result<u8> {
    let guest = match args.qmp {
        Some(socket) => guest::plain::find(args.guest, socket, args.agent)?,
        None => vm::find_guest(args.guest.as_str(), &context)?,
    };
    let mut segment_lens = context.config.segment_lens()?;
    let bitmap = match (args.target, args.bitmap) {
        (Some(name), _) => {
            let (name, table) = context.config.target(Some(&name), &context.dirs.state)?;
            segment_lens = segment_lens.at_least(least_segment(&table));
            Bitmap::Target(name)
        }
        (None, BitmapWord::None) => Bitmap::None,
        (None, BitmapWord::New) => Bitmap::New,
        (None, BitmapWord::Use) => Bitmap::Use,
    };
    let defaults = &context.config.defaults;
    let options = Options {
        dirs: context.dirs.clone(),
        selection: Selection { only: args.disk, skip: args.skip_disk },
        bitmap,
        exports: if args.trim { ExportMode::Trim } else { ExportMode::Read },
        freeze: args.freeze.or(defaults.freeze).unwrap_or(FreezeMode::Auto),
        freeze_limit: defaults.freeze_timeout.unwrap_or(Duration::from_secs(30)),
        fleecing: vm::fleecing(args.fleecing.as_deref(), &context)?,
        cbw_timeout: defaults.cbw_timeout.unwrap_or(Duration::from_secs(45)),
        lock_wait: lock_wait(args.lockwait, &context),
        segment_lens,
        pvesm: vm::pvesm(),
    };
    let events = Events::new(guest.id.as_str(), context.monitor.clone());
    let kept = by_hand::set_up(&guest, &options, &events, context.stop.token()).await?;
    let mut dirty = Vec::new();
    for disk in &kept.disks {
        // The access is there, also when a look at it fails.
        dirty.push(match by_hand::dirty_bytes(&kept, disk).await {
            Ok(bytes) => Some(bytes),
            Err(error) => {
                let error = anyhow::Error::new(error);
                events.warn(format!("the dirty bytes of disk `{}` are not known: {error:#}", disk.name));
                None
            }
        });
    }
    if let Some(limit) = kept.disks.iter().find_map(|disk| disk.largest_request) {
        events.warn(format!(
            "this QEMU may answer reads, or a block status, across a boundary of {limit} bytes with newer content: \
             `nbdcopy --no-extents --request-size={limit}` reads right"
        ));
    }
    print(&if context.json {
        show::access_line(&guest.id, &kept, &dirty)?
    } else {
        show::access_text(&guest.id, &kept, &dirty)
    });
    Ok(exit::OK)
}

fn lock_wait(asked: Option<Duration>, context: &Context) -> Duration {
    asked.or(context.config.defaults.lockwait).unwrap_or(Duration::from_mins(1))
}

async fn tear_down(args: TeardownArgs, context: Context) -> Result<u8> {
    let how = if args.success { Teardown::Success } else { Teardown::Failure };
    let lock_wait = lock_wait(args.lockwait, &context);
    let ended = by_hand::tear_down(&context.dirs, &args.guest, how, lock_wait).await?;
    print(&if context.json { show::ended_line(&args.guest, &ended)? } else { show::ended_text(&args.guest, &ended) });
    if ended.left_behind.is_empty() {
        return Ok(exit::OK);
    }
    Err(LeftBehind { what: ended.left_behind, archive: None }.into())
}

fn status(guest: Option<&GuestId>, context: &Context) -> Result<u8> {
    let list = by_hand::status(&context.dirs, guest)?;
    for standing in &list {
        print(&if context.json { show::standing_line(standing)? } else { show::standing_text(standing) });
    }
    if list.is_empty() && !context.json {
        print("no guest was ever backed up, or looked at by hand, from here");
    }
    let left = |state: &State| matches!(state, State::LeftBehind { .. } | State::ByHand { qemu_gone: true, .. });
    let dead = |standing: &by_hand::Standing| standing.mounts.iter().any(|mount| mount.state == MountState::Dead);
    Ok(if list.iter().any(|standing| left(&standing.state) || dead(standing)) { exit::LEFT_BEHIND } else { exit::OK })
}

/// A disk of an access by name.
fn disk_of<'k>(kept: &'k Kept, name: &str) -> Result<&'k crate::access::DiskAccess> {
    kept.disks.iter().find(|disk| disk.name == name).ok_or_else(|| {
        let known = kept.disks.iter().map(|disk| disk.name.clone()).collect();
        guest::GuestError::NoSuchDisk { name: name.to_owned(), known }.into()
    })
}
