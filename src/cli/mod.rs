//! The command line: one file per command, thin. Arguments in, one call into the library, rendering out.

mod access;
mod archive;
mod completions;
pub mod exit;
mod info;
mod list;
mod mount;
mod prune;
mod recover;
mod restore;
mod stop;
mod target;
mod vm;
mod watchdog;

use crate::{
    config::{Config, Dirs},
    provider::Reach,
    report::{self, Monitor},
    rights::{self, Confinement},
};
use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use std::{io::Write, path::PathBuf, process::ExitCode, sync::Arc};

/// Backs up running QEMU/KVM virtual machines incrementally, and restores them.
#[derive(Debug, Parser)]
#[command(name = "pvebackup", version, about, after_help = exit::HELP, disable_help_subcommand = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// What every command understands.
#[derive(Args, Debug)]
struct Global {
    /// Directory with config.toml and conf.d/ [default: /etc/pvebackup]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Global options")]
    config_dir: Option<PathBuf>,
    /// Directory for generations, recovery journals and the target `local` [default: /var/lib/pvebackup]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Global options")]
    state_dir: Option<PathBuf>,
    /// Directory for sockets of running backups [default: /run/pvebackup]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Global options")]
    run_dir: Option<PathBuf>,
    /// One JSON object a line on standard output
    #[arg(long, global = true, help_heading = "Global options")]
    json: bool,
    /// Only warnings, errors and results
    #[arg(long, short, global = true, help_heading = "Global options")]
    quiet: bool,
    /// More lines; twice for debugging
    #[arg(long, short, global = true, action = clap::ArgAction::Count, help_heading = "Global options")]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Back up virtual machines
    Vm(vm::VmArgs),
    /// Restore an archive's disks and configuration
    Restore(restore::RestoreArgs),
    /// List the archives of a target
    List(list::ListArgs),
    /// Show what an archive holds
    Info(info::InfoArgs),
    /// Remove the archives of a target that no rule keeps
    ///
    /// The rules are vzdump's: keep-last, keep-hourly, keep-daily, keep-weekly, keep-monthly, keep-yearly. A target's own are
    /// applied after every backup, too. A guest's newest archive is never removed.
    Prune(prune::PruneArgs),
    /// Show an archive's disks as files, until unmounted or stopped
    Mount(mount::MountArgs),
    /// Unmount what `mount` mounted
    Umount(mount::UmountArgs),
    /// Undo what a run that died has left
    Recover(recover::RecoverArgs),
    /// Look at a guest's disks by hand
    ///
    /// A snapshot access that stays until it is ended: every disk, as it was at one instant, over NBD, while the guest goes on.
    /// Backups of the guest are refused meanwhile.
    #[command(subcommand)]
    Access(access::AccessCommand),
    /// Create or test a target
    #[command(subcommand)]
    Target(target::TargetCommand),
    /// Print shell completions
    Completions(completions::CompletionsArgs),
    /// Thaws or resumes a guest when its parent dies
    #[command(name = "__thaw-watchdog", hide = true)]
    Watchdog(watchdog::WatchdogArgs),
}

/// A mistake on the command line that clap cannot see.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// What commands work with.
struct Context {
    dirs: Dirs,
    config: Config,
    monitor: Arc<dyn Monitor>,
    json: bool,
    stop: stop::Stop,
}

/// Parses the command line, runs the command and turns its outcome into an exit code.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // A closed pipe behind `--help` is no failure.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { exit::USAGE } else { exit::OK });
        }
    };
    rights::keep_private();
    if let Command::Watchdog(args) = cli.command {
        return watchdog::run(args);
    }
    start_log(cli.global.verbose);
    let dirs = dirs(&cli.global);
    let config = match Config::load(&dirs.config) {
        Ok(config) => config,
        Err(error) => {
            say(&render(&error.into()));
            return ExitCode::from(exit::USAGE);
        }
    };
    // Before there is a second thread.
    if let Some(confinement) = cli.command.confinement(&dirs, &config) {
        confinement.apply();
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            say(&format!("error: cannot start: {error}"));
            return ExitCode::from(exit::FAILED);
        }
    };
    let code = runtime.block_on(run(cli, dirs, config));
    // A provider's thread that hangs must not keep us here: what it left is in the journal.
    runtime.shutdown_timeout(std::time::Duration::from_secs(5));
    ExitCode::from(code)
}

fn dirs(global: &Global) -> Dirs {
    let mut dirs = Dirs::from_env();
    if let Some(dir) = &global.config_dir {
        dirs.config.clone_from(dir);
    }
    if let Some(dir) = &global.state_dir {
        if dirs.fleecing == dirs.state.join("fleecing") {
            dirs.fleecing = dir.join("fleecing");
        }
        dirs.state.clone_from(dir);
    }
    if let Some(dir) = &global.run_dir {
        dirs.run.clone_from(dir);
    }
    dirs
}

impl Command {
    /// What a command may keep that reads what others wrote: archives, or a guest's disks. `None`: everything.
    fn confinement(&self, dirs: &Dirs, config: &Config) -> Option<Confinement> {
        let reading = |target: Option<&str>, destinations: Vec<PathBuf>| {
            // A target that does not exist is the command's to report.
            let (_, table) = config.target(target, &dirs.state).ok()?;
            let Reach { mut writable, network } = Reach::of(&table, dirs);
            writable.extend(destinations);
            Some(Confinement::Files { writable, network })
        };
        match self {
            Self::Restore(args) => reading(args.target(), args.destinations()),
            Self::List(args) => reading(args.target(), Vec::new()),
            Self::Info(args) => reading(args.target(), Vec::new()),
            Self::Prune(args) => reading(args.target(), Vec::new()),
            Self::Mount(_) => Some(Confinement::Mount),
            Self::Access(command) => command.confinement(dirs),
            _ => None,
        }
    }
}

async fn run(cli: Cli, dirs: Dirs, config: Config) -> u8 {
    let stop = stop::Stop::listen();
    let monitor = monitor(&cli.global);
    let context = Context { config, dirs, monitor, json: cli.global.json, stop: stop.clone() };
    match dispatch(cli.command, context).await {
        Ok(code) => code,
        Err(error) => {
            say(&render(&error));
            match exit::code_of(&error) {
                exit::INTERRUPTED => stop.code(),
                code => code,
            }
        }
    }
}

async fn dispatch(command: Command, context: Context) -> Result<u8> {
    match command {
        Command::Vm(args) => vm::run(args, context).await,
        Command::Restore(args) => restore::run(args, context).await,
        Command::List(args) => list::run(args, context).await,
        Command::Info(args) => info::run(args, context).await,
        Command::Prune(args) => prune::run(args, context).await,
        Command::Mount(args) => mount::run(args, context).await,
        Command::Umount(args) => mount::umount(args).await,
        Command::Recover(args) => recover::run(args, context).await,
        Command::Access(command) => access::run(command, context).await,
        Command::Target(command) => target::run(command, context).await,
        Command::Completions(args) => Ok(completions::run(&args)),
        Command::Watchdog(_) => Ok(exit::USAGE), // runs before anything else is started
    }
}

fn monitor(global: &Global) -> Arc<dyn Monitor> {
    let format = if global.json { report::Format::Json } else { report::Format::Text };
    let verbosity = match (global.quiet, global.verbose) {
        (true, _) => report::Verbosity::Quiet,
        (false, 0) => report::Verbosity::Normal,
        (false, _) => report::Verbosity::Verbose,
    };
    report::monitor_for(report::Stderr::detect(), format, verbosity)
}

/// A failure for people: the chain of causes, each once.
fn render(error: &anyhow::Error) -> String {
    let mut text = String::from("error: ");
    let mut last = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if last.contains(&cause) {
            continue;
        }
        if !last.is_empty() {
            text.push_str(": ");
        }
        text.push_str(cause.trim_end());
        last = cause;
    }
    text
}

/// Writes a line to standard error; that nobody reads it is no failure.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Writes a result to standard output; a closed pipe is a normal end.
fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes());
    if !text.ends_with('\n') {
        let _ = out.write_all(b"\n");
    }
}

/// Debugging output of this program and its libraries, to standard error.
fn start_log(verbose: u8) {
    use std::io::IsTerminal;
    let filter = tracing_subscriber::EnvFilter::try_from_env("PVEBACKUP_LOG").unwrap_or_else(|_| {
        tracing_subscriber::EnvFilter::new(match verbose {
            0 | 1 => "off",
            2 => "pvebackup=debug",
            _ => "pvebackup=trace,rustic_core=debug",
        })
    });
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .try_init();
}
