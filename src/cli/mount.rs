//! `pvebackup mount` and `pvebackup umount`: an archive's disks as files.

use super::{Context, archive::ArchiveArgs, exit, print, say};
use crate::{
    fuse::{self, FuseError, ImageView, Mount, MountOptions, Unmounted, ViewOptions, mounts, served::Record},
    report::Events,
};
use anyhow::Result;
use serde::Serialize;
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    signal::unix::{SignalKind, signal},
    task::spawn_blocking,
};

/// Longer than the slowest repositories need for a segment; then the reader gets an error.
const DEADLINE: Duration = Duration::from_mins(2);
/// What the kernel reads ahead, KiB.
const READ_AHEAD: u32 = 4096;

#[derive(clap::Args, Debug)]
pub(super) struct MountArgs {
    #[command(flatten)]
    archive: ArchiveArgs,
    /// Empty directory to mount at
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

#[derive(clap::Args, Debug)]
pub(super) struct UmountArgs {
    /// Where it is mounted
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Also when files are open there; their readers get an error
    #[arg(long)]
    force: bool,
}

/// What `--json` says when the files are there.
#[derive(Serialize)]
struct Mounted {
    archive: String,
    path: PathBuf,
    disks: Vec<MountedDisk>,
}

#[derive(Serialize)]
struct MountedDisk {
    name: String,
    size_bytes: u64,
}

pub(super) async fn run(args: MountArgs, context: Context) -> Result<u8> {
    // A terminal that is closed must not leave a dead mount behind.
    let mut hangup = signal(SignalKind::hangup())?;
    let (mut provider, info) = args.archive.find(&context).await?;
    let id = info.id.clone();
    let reader = provider.run(move |p| p.open(&id)).await?;
    let (manifest, images) = spawn_blocking(move || fuse::archive::open(Arc::from(reader))).await??;
    let disks: Vec<MountedDisk> =
        images.iter().map(|i| MountedDisk { name: i.name().to_owned(), size_bytes: i.size() }).collect();
    let view = ImageView::new(
        images,
        ViewOptions {
            deadline: DEADLINE,
            time: manifest.instant.into(),
            events: Events::new(info.name.guest(), context.monitor.clone()),
        },
    );
    if context.stop.token().is_cancelled() {
        return Ok(context.stop.code());
    }
    let options = MountOptions { read_ahead_kib: Some(READ_AHEAD), read_only: false };
    let dir = args.dir;
    let records = context.dirs.mounts();
    let (mount, record) = spawn_blocking(move || {
        // Whoever may not write there has his mount cleared by the next `mount` or `umount` at the place.
        let record = Record::begin(&records, &dir)
            .inspect_err(|error| tracing::warn!("`recover` will not know of this mount: {error}"))
            .ok();
        match (Mount::start_images(&dir, view, options), record) {
            (Ok(mount), record) => Ok((mount, record)),
            (Err(error), record) => {
                if let Some(record) = record {
                    record.end();
                }
                Err(error)
            }
        }
    })
    .await??;
    let mounted = Mounted { archive: info.name.to_string(), path: mount.path().to_owned(), disks };
    print(&if context.json { serde_json::to_string(&mounted)? } else { mounted.line() });
    let code = tokio::select! {
        () = mount.ended() => exit::OK,
        () = context.stop.token().cancelled() => context.stop.code(),
        _ = hangup.recv() => 128 + SignalKind::hangup().as_raw_value() as u8,
    };
    if spawn_blocking(move || mount.umount()).await?? == Unmounted::Aborted {
        say("warning: files were open; their readers get an error");
    }
    if let Some(record) = record {
        record.end();
    }
    Ok(code)
}

impl Mounted {
    fn line(&self) -> String {
        let names: Vec<&str> = self.disks.iter().map(|disk| disk.name.as_str()).collect();
        format!(
            "{} is mounted at {} ({}) until `pvebackup umount` or a signal",
            self.archive,
            crate::report::printable(&self.path.display().to_string()),
            names.join(", ")
        )
    }
}

pub(super) async fn umount(args: UmountArgs) -> Result<u8> {
    let busy = if args.force { mounts::Busy::Abort } else { mounts::Busy::Refuse };
    let result = spawn_blocking(move || -> Result<(), FuseError> {
        // Nobody can have business in a dead mount.
        if mounts::clear_dead(&args.dir)? > 0 { Ok(()) } else { mounts::unmount(&args.dir, busy) }
    });
    result.await??;
    Ok(exit::OK)
}
