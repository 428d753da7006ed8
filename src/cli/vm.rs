//! `pvebackup vm`: back up virtual machines.

use super::{Context, Usage, exit, say};
use crate::{
    access::{Fleecing, FleecingFormat, FreezeMode},
    archive::Retention,
    backup::{self, Options, ProviderThread, Selection},
    config::{TargetTable, create_private_dir, size},
    guest::{self, Guest, GuestError, GuestId},
    provider::{for_target, least_segment},
    report::{Event, Events, Monitor},
};
use anyhow::{Context as _, Result};
use clap::Args;
use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

#[derive(Args, Debug)]
pub(super) struct VmArgs {
    /// VMIDs of Proxmox VE guests, or names of guests in the configuration
    #[arg(value_name = "GUEST", required_unless_present = "qmp")]
    guests: Vec<String>,
    /// QMP socket of a guest that is not configured
    #[arg(long, value_name = "SOCKET", conflicts_with = "guests")]
    qmp: Option<PathBuf>,
    /// Its name
    #[arg(long, requires = "qmp", value_name = "NAME")]
    name: Option<String>,
    /// Its guest agent's socket
    #[arg(long, requires = "qmp", value_name = "SOCKET")]
    agent: Option<PathBuf>,
    /// Where to back up to [default: the configuration's, or `local`]
    #[arg(long, short, value_name = "NAME")]
    target: Option<String>,
    /// Back up only these disks
    #[arg(long, value_name = "DISK", value_delimiter = ',')]
    disk: Vec<String>,
    /// Leave these disks out
    #[arg(long, value_name = "DISK", value_delimiter = ',')]
    skip_disk: Vec<String>,
    /// Read everything, whatever the dirty bitmaps say
    #[arg(long, conflicts_with = "require_incremental")]
    full: bool,
    /// Fail with exit code 24 rather than read a disk in full
    #[arg(long)]
    require_incremental: bool,
    /// Freeze file systems through the guest agent: auto, require or off [default: auto]
    #[arg(long, value_name = "MODE", value_parser = parse_freeze)]
    freeze: Option<FreezeMode>,
    /// Fleecing images: `enabled=1,storage=ID` on Proxmox VE, or `dir=PATH[,format=raw|qcow2]`
    #[arg(long, value_name = "OPTIONS")]
    fleecing: Option<String>,
    /// Read at most so much a second: KiB, or with a unit (200MiB)
    #[arg(long, value_name = "RATE")]
    bwlimit: Option<String>,
    /// What to keep of the guest's archives afterwards, as in vzdump: keep-last=3,keep-daily=7 [default: the target's]
    #[arg(long, value_name = "RULES")]
    prune_backups: Option<Retention>,
    /// How long to wait for another client of the QMP socket: minutes, or with a unit (90s)
    #[arg(long, value_name = "TIME", value_parser = parse_wait)]
    lockwait: Option<Duration>,
}

/// As in vzdump, a number alone means minutes.
pub(super) fn parse_wait(text: &str) -> Result<Duration, humantime::DurationError> {
    match text.parse::<u32>() {
        Ok(minutes) => Ok(Duration::from_secs(60 * u64::from(minutes))),
        Err(_) => humantime::parse_duration(text),
    }
}

pub(super) fn parse_freeze(text: &str) -> Result<FreezeMode, String> {
    match text {
        "auto" => Ok(FreezeMode::Auto),
        "require" => Ok(FreezeMode::Require),
        "off" => Ok(FreezeMode::Off),
        _ => Err("not one of auto, require, off".into()),
    }
}

pub(super) async fn run(args: VmArgs, context: Context) -> Result<u8> {
    let guests = find_guests(&args, &context)?;
    let (target, table) = context.config.target(args.target.as_deref(), &context.dirs.state)?;
    let options = options(&args, &context, target.clone(), &table)?;
    let dirs = context.dirs.clone();
    let warnings = Arc::new(Counting { inner: context.monitor.clone(), warnings: AtomicUsize::new(0) });
    let provider = tokio::task::spawn_blocking(move || for_target(&target, &table, &dirs)).await??;
    let mut provider = ProviderThread::new(provider);
    provider.run(|p| p.job_init(jiff::Timestamp::now())).await?;

    let mut failed = 0;
    let mut last = None;
    let count = guests.len();
    for guest in guests {
        let events = Events::new(guest.id.as_str(), warnings.clone());
        match backup::run(&guest, &options, &mut provider, &events, context.stop.token()).await {
            Ok(_) => {}
            Err(error) => {
                failed += 1;
                if count > 1 && context.json {
                    say(&format!("vm {}: {}", guest.id, super::render(&error)));
                }
                last = Some(error.context(format!("the backup of guest `{}` failed", guest.id)));
            }
        }
        if context.stop.token().is_cancelled() {
            break;
        }
    }
    let cleanup = provider.run(|p| p.job_cleanup()).await;
    match last {
        Some(_) if context.stop.token().is_cancelled() && count > 1 => Ok(context.stop.code()),
        // In text the summary has told it already.
        Some(error) if count == 1 && context.json => Err(error),
        Some(error) if count == 1 => Ok(match exit::code_of(&error) {
            exit::INTERRUPTED => context.stop.code(),
            code => code,
        }),
        Some(_) if failed < count => Ok(exit::SOME_FAILED),
        Some(_) => Ok(exit::FAILED),
        None => {
            cleanup?;
            Ok(if warnings.warnings.load(Ordering::Relaxed) > 0 { exit::WARNINGS } else { exit::OK })
        }
    }
}

fn find_guests(args: &VmArgs, context: &Context) -> Result<Vec<Guest>> {
    if let Some(qmp) = &args.qmp {
        let name = args.name.clone().or_else(|| Some(qmp.file_stem()?.to_str()?.to_owned())).unwrap_or_default();
        let id: GuestId = name.parse().map_err(|e| Usage(format!("{e}; give one with --name")))?;
        return Ok(vec![guest::plain::find(id, qmp.clone(), args.agent.clone())?]);
    }
    args.guests.iter().map(|name| find_guest(name, context)).collect()
}

/// A guest by configured name or VMID.
pub(super) fn find_guest(name: &str, context: &Context) -> Result<Guest> {
    let id: GuestId = name.parse().map_err(|e: guest::GuestIdError| Usage(e.to_string()))?;
    if let Some(table) = context.config.guest.get(name) {
        return Ok(guest::plain::find(id, table.qmp.clone(), table.agent.clone())?);
    }
    if name.bytes().all(|b| b.is_ascii_digit()) {
        return Ok(guest::proxmox::find(&context.dirs.pve_root, &id)?);
    }
    Err(GuestError::NotFound { id, looked: vec![context.dirs.config.join("config.toml")] }.into())
}

fn options(args: &VmArgs, context: &Context, target: String, table: &TargetTable) -> Result<Options> {
    if let (Some(_), Some(how)) = (&args.prune_backups, table.retention_elsewhere()) {
        return Err(
            Usage(format!("--prune-backups: pvebackup removes no archives of target `{target}`: use {how}")).into()
        );
    }
    let defaults = &context.config.defaults;
    Ok(Options {
        dirs: context.dirs.clone(),
        target,
        selection: Selection { only: args.disk.clone(), skip: args.skip_disk.clone() },
        full: args.full,
        require_incremental: args.require_incremental,
        freeze: args.freeze.or(defaults.freeze).unwrap_or(FreezeMode::Auto),
        freeze_limit: defaults.freeze_timeout.unwrap_or(Duration::from_secs(30)),
        fleecing: fleecing(args.fleecing.as_deref(), context)?,
        cbw_timeout: defaults.cbw_timeout.unwrap_or(Duration::from_secs(45)),
        // Above the 45 s after which QEMU gives up a stalled fleecing image.
        nbd_timeout: defaults.nbd_timeout.unwrap_or(Duration::from_mins(2)),
        lock_wait: args.lockwait.or(defaults.lockwait).unwrap_or(Duration::from_mins(1)),
        segment_lens: context.config.segment_lens()?.at_least(least_segment(table)),
        rate: args
            .bwlimit
            .as_deref()
            .map(size::parse_rate)
            .transpose()
            .map_err(|e| Usage(format!("--bwlimit: {e}")))?
            .flatten()
            .map(std::num::NonZeroU64::get),
        retention: args.prune_backups.clone().or_else(|| table.retention().cloned()),
        pvesm: pvesm(),
    })
}

/// Program that manages Proxmox storages.
pub(super) fn pvesm() -> PathBuf {
    std::env::var_os("PVEBACKUP_PVESM").map_or_else(|| "pvesm".into(), PathBuf::from)
}

/// Where fleecing images go: as asked for, else as configured.
pub(super) fn fleecing(asked: Option<&str>, context: &Context) -> Result<Fleecing> {
    let defaults = &context.config.defaults;
    let format = defaults.fleecing_format.unwrap_or(FleecingFormat::Raw);
    let fleecing = match (asked, &defaults.fleecing_storage) {
        (Some(text), _) => parse_fleecing(text, format)?,
        (None, Some(storage)) => Some(Fleecing::Storage(storage.clone())),
        (None, None) => None,
    };
    let directory = match (&fleecing, &defaults.fleecing_dir) {
        (None, None) => {
            // Only the default is made: a configured one that is missing may be a file system that is not mounted.
            create_private_dir(&context.dirs.fleecing)
                .with_context(|| format!("cannot create {}", context.dirs.fleecing.display()))?;
            context.dirs.fleecing.clone()
        }
        (_, configured) => configured.clone().unwrap_or_default(),
    };
    Ok(fleecing.unwrap_or(Fleecing::Directory { path: directory, format }))
}

/// vzdump's property string, and our own `dir=`.
fn parse_fleecing(text: &str, mut format: FleecingFormat) -> Result<Option<Fleecing>, Usage> {
    let bad = |why: &str| Usage(format!("--fleecing {text}: {why}"));
    let (mut storage, mut dir, mut enabled) = (None, None, true);
    for item in text.split(',') {
        match item.split_once('=').unwrap_or(("enabled", item)) {
            ("enabled", "1" | "on" | "yes" | "true") => {}
            ("enabled", "0" | "off" | "no" | "false") => enabled = false,
            ("storage", id) => storage = Some(id.to_owned()),
            ("dir", path) => dir = Some(PathBuf::from(path)),
            ("format", "raw") => format = FleecingFormat::Raw,
            ("format", "qcow2") => format = FleecingFormat::Qcow2,
            _ => return Err(bad("known are enabled=, storage=, dir=, format=raw|qcow2")),
        }
    }
    if !enabled {
        return Err(bad(
            "a snapshot access always needs fleecing images; leave the option out for files below the state directory",
        ));
    }
    match (storage, dir) {
        (Some(_), Some(_)) => Err(bad("storage= and dir= exclude each other")),
        (Some(id), None) => Ok(Some(Fleecing::Storage(id))),
        (None, Some(path)) => Ok(Some(Fleecing::Directory { path, format })),
        (None, None) => Ok(None),
    }
}

/// Counts warnings on their way, for the exit code.
struct Counting {
    inner: Arc<dyn Monitor>,
    warnings: AtomicUsize,
}

impl Monitor for Counting {
    fn event(&self, guest: &str, event: Event) {
        if matches!(event, Event::Warning { .. }) {
            self.warnings.fetch_add(1, Ordering::Relaxed);
        }
        self.inner.event(guest, event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fleecing_takes_vzdumps_words() {
        let parse = |text| parse_fleecing(text, FleecingFormat::Raw).map_err(|e| e.to_string());
        assert_eq!(parse("enabled=1,storage=local-lvm"), Ok(Some(Fleecing::Storage("local-lvm".into()))));
        assert_eq!(parse("1,storage=x"), Ok(Some(Fleecing::Storage("x".into()))));
        assert_eq!(
            parse("dir=/f,format=qcow2"),
            Ok(Some(Fleecing::Directory { path: "/f".into(), format: FleecingFormat::Qcow2 }))
        );
        assert!(parse("enabled=0").is_err());
        assert!(parse("dir=/f,storage=x").is_err());
        assert!(parse("speed=1").is_err());
    }
}
