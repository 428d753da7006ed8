//! `pvebackup target`: create or test a target.

use super::{Context, exit, print};
use crate::backup::ProviderThread;
use anyhow::Result;

#[derive(Debug, clap::Subcommand)]
pub(super) enum TargetCommand {
    /// Create the target's repository and, if it does not exist, its password file
    Init {
        /// Target [default: the configuration's, or `local`]
        name: Option<String>,
    },
    /// List the targets
    List,
    /// Open the target's repository and count its archives
    Test {
        /// Target [default: the configuration's, or `local`]
        name: Option<String>,
    },
}

pub(super) async fn run(command: TargetCommand, context: Context) -> Result<u8> {
    match command {
        TargetCommand::Init { name } => {
            let (name, table) = context.config.target(name.as_deref(), &context.dirs.state)?;
            let dirs = context.dirs.clone();
            let id = tokio::task::spawn_blocking(move || crate::provider::init_target(&name, &table, &dirs)).await??;
            print(&format!("created repository {id}"));
        }
        TargetCommand::List => {
            let mut names: Vec<&str> = context.config.target.keys().map(String::as_str).collect();
            if !names.contains(&"local") {
                names.push("local");
            }
            let default = context.config.defaults.target.as_deref().unwrap_or("local");
            for name in names {
                print(&if name == default { format!("{name} (default)") } else { name.to_owned() });
            }
        }
        TargetCommand::Test { name } => {
            let mut provider = open(name.as_deref(), &context).await?;
            let id = provider.run(|p| p.repository_id()).await?;
            let count = provider.run(|p| p.list(None)).await?.len();
            print(&format!("repository {id}: {count} archives"));
        }
    }
    Ok(exit::OK)
}

/// The target's provider, for reading archives.
pub(super) async fn open(name: Option<&str>, context: &Context) -> Result<ProviderThread> {
    let (name, table) = context.config.target(name, &context.dirs.state)?;
    let dirs = context.dirs.clone();
    let provider = tokio::task::spawn_blocking(move || crate::provider::for_target(&name, &table, &dirs)).await??;
    Ok(ProviderThread::new(provider))
}
