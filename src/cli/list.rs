//! `pvebackup list`: the archives of a target.

use super::{Context, exit, print};
use crate::report;
use anyhow::Result;

#[derive(clap::Args, Debug)]
pub(super) struct ListArgs {
    /// Only archives of this guest
    #[arg(value_name = "GUEST")]
    guest: Option<String>,
    /// Target [default: the configuration's, or `local`]
    #[arg(long, short, value_name = "NAME")]
    target: Option<String>,
}

impl ListArgs {
    pub(super) fn target(&self) -> Option<&str> {
        self.target.as_deref()
    }
}

pub(super) async fn run(args: ListArgs, context: Context) -> Result<u8> {
    let mut provider = super::target::open(args.target.as_deref(), &context).await?;
    let list = provider.run(move |p| p.list(args.guest.as_deref())).await?;
    print(&if context.json { report::archive_lines(&list)? } else { report::archive_table(&list) });
    Ok(exit::OK)
}
