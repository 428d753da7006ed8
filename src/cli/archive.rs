//! Which archive a command is about.

use super::{Context, Usage};
use crate::{
    archive::{ArchiveName, NameError, Selector},
    backup::ProviderThread,
    provider::ArchiveInfo,
    restore,
};
use anyhow::Result;

/// How an archive is named on the command line.
#[derive(clap::Args, Debug)]
pub(super) struct ArchiveArgs {
    /// Archive name, the beginning of its id, `latest` or `latest~N`
    #[arg(value_name = "ARCHIVE")]
    archive: String,
    /// Guest whose latest archive is meant
    #[arg(long, value_name = "GUEST")]
    guest: Option<String>,
    /// Target [default: the configuration's, or `local`]
    #[arg(long, short, value_name = "NAME")]
    target: Option<String>,
}

impl ArchiveArgs {
    /// The target as it was named.
    pub fn target(&self) -> Option<&str> {
        self.target.as_deref()
    }

    /// Opens the target and finds the archive.
    pub async fn find(&self, context: &Context) -> Result<(ProviderThread, ArchiveInfo)> {
        let selector: Selector = self.archive.parse().map_err(|e: NameError| Usage(e.to_string()))?;
        let mut provider = super::target::open(self.target.as_deref(), context).await?;
        // The name tells the guest; the others are not read.
        let guest = match &selector {
            Selector::Name(name) => Some(ArchiveName::guest(name).to_owned()),
            _ => self.guest.clone(),
        };
        let list = provider.run(move |p| p.list(guest.as_deref())).await?;
        let info = restore::resolve(&selector, &list, self.guest.as_deref())?;
        Ok((provider, info))
    }
}
