//! `pvebackup completions`.

use super::{Cli, exit};
use clap::{CommandFactory, ValueEnum};

#[derive(clap::Args, Debug)]
pub(super) struct CompletionsArgs {
    /// bash, zsh, fish, elvish or powershell
    #[arg(value_name = "SHELL", value_parser = |text: &str| clap_complete::Shell::from_str(text, true))]
    shell: clap_complete::Shell,
}

pub(super) fn run(args: &CompletionsArgs) -> u8 {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "pvebackup", &mut text);
    super::print(&String::from_utf8_lossy(&text));
    exit::OK
}
