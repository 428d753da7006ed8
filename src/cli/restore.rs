//! `pvebackup restore`: write an archive's disks and configuration back.

use super::{Context, Usage, archive::ArchiveArgs, exit, print};
use crate::{
    report::Events,
    restore::{self, Destination, DiskSelection, ImageFormat, Overwrite, RestoreRequest},
};
use anyhow::Result;
use std::path::PathBuf;

#[derive(clap::Args, Debug)]
pub(super) struct RestoreArgs {
    #[command(flatten)]
    archive: ArchiveArgs,
    /// Write an image of every disk and the configuration files into this directory
    #[arg(long, value_name = "DIR", conflicts_with = "disk", required_unless_present = "disk")]
    to_dir: Option<PathBuf>,
    /// Write one disk to a file or block device: `scsi0=/dev/vg/vm-100-disk-0`; may be repeated
    #[arg(long, value_name = "DISK=PATH")]
    disk: Vec<String>,
    /// With --to-dir: only these disks
    #[arg(long, value_name = "DISK", value_delimiter = ',', requires = "to_dir")]
    only: Vec<String>,
    /// Format of images: raw (sparse) or qcow2
    #[arg(long, value_name = "FORMAT", default_value = "raw", value_parser = parse_format)]
    format: ImageFormat,
    /// With --disk: overwrite a block device, or a file that exists
    #[arg(long)]
    overwrite: bool,
}

impl RestoreArgs {
    pub(super) fn target(&self) -> Option<&str> {
        self.archive.target()
    }

    /// What is written to.
    pub(super) fn destinations(&self) -> Vec<PathBuf> {
        let disks = self.disk.iter().filter_map(|item| Some(PathBuf::from(item.split_once('=')?.1)));
        // A file is written under another name first; beside a device nothing is.
        let places = disks.map(|path| match path.parent() {
            Some(parent) if path.metadata().map_or(true, |meta| meta.is_file()) => parent.to_owned(),
            _ => path,
        });
        places.chain(self.to_dir.clone()).collect()
    }
}

fn parse_format(text: &str) -> Result<ImageFormat, String> {
    match text {
        "raw" => Ok(ImageFormat::Raw),
        "qcow2" => Ok(ImageFormat::Qcow2),
        _ => Err("not one of raw, qcow2".into()),
    }
}

pub(super) async fn run(args: RestoreArgs, context: Context) -> Result<u8> {
    let destination = match args.to_dir {
        Some(path) => Destination::Directory {
            path,
            disks: if args.only.is_empty() { DiskSelection::All } else { DiskSelection::Only(args.only) },
        },
        None => Destination::Disks(
            args.disk
                .iter()
                .map(|item| match item.split_once('=') {
                    Some((disk, path)) if !disk.is_empty() && !path.is_empty() => Ok((disk.to_owned(), path.into())),
                    _ => Err(Usage(format!("--disk {item}: write DISK=PATH"))),
                })
                .collect::<Result<_, _>>()?,
        ),
    };
    let (mut provider, info) = args.archive.find(&context).await?;
    let id = info.id.clone();
    let reader = provider.run(move |p| p.open(&id)).await?;
    let events = Events::new(info.name.guest(), context.monitor.clone());
    let overwrite = if args.overwrite { Overwrite::Allowed } else { Overwrite::Refused };
    let request = RestoreRequest { destination, format: args.format, overwrite };
    let cancel = context.stop.token().clone();
    // Restoring blocks, and its threads read from the archive in parallel.
    let report =
        tokio::task::spawn_blocking(move || restore::restore(reader.as_ref(), &request, &events, &cancel)).await??;
    drop(context.monitor);
    print(&if context.json { serde_json::to_string(&report)? } else { report.line() });
    Ok(if report.missing.is_empty() { exit::OK } else { exit::WARNINGS })
}
