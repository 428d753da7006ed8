//! The hidden child that thaws and resumes a guest when we die.

use crate::access::watchdog::{Rescue, run_child};
use std::{path::PathBuf, process::ExitCode};

#[derive(clap::Args, Debug)]
pub(super) struct WatchdogArgs {
    /// Guest agent socket
    #[arg(long)]
    agent: Option<PathBuf>,
    /// QMP socket
    #[arg(long)]
    qmp: Option<PathBuf>,
}

pub(super) fn run(args: WatchdogArgs) -> ExitCode {
    // One thread is enough, and less can go wrong while a guest is waiting.
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return ExitCode::FAILURE;
    };
    match runtime.block_on(run_child(args.agent, args.qmp)) {
        Ok(Rescue::NotNeeded | Rescue::Done) => ExitCode::SUCCESS,
        Ok(Rescue::Failed) | Err(_) => ExitCode::FAILURE,
    }
}
