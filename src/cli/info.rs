//! `pvebackup info`: what an archive holds.

use super::{Context, archive::ArchiveArgs, exit, print};
use crate::{archive::Manifest, report};
use anyhow::Result;

/// Manifests are some kilobytes.
const MANIFEST_LIMIT: u64 = 16 << 20;

#[derive(clap::Args, Debug)]
pub(super) struct InfoArgs {
    #[command(flatten)]
    archive: ArchiveArgs,
}

impl InfoArgs {
    pub(super) fn target(&self) -> Option<&str> {
        self.archive.target()
    }
}

pub(super) async fn run(args: InfoArgs, context: Context) -> Result<u8> {
    let (mut provider, info) = args.archive.find(&context).await?;
    let id = info.id.clone();
    let bytes = provider.run(move |p| p.open(&id)?.member("manifest.json", MANIFEST_LIMIT)).await?;
    let manifest = Manifest::from_bytes(&bytes)?;
    print(&if context.json {
        report::manifest_line(&info.id, &manifest)?
    } else {
        report::manifest_text(&info.id, &manifest)
    });
    Ok(exit::OK)
}
