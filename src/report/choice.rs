//! Which renderer a run gets.

use super::{Detail, Json, Monitor, Output, Plain, Terminal};
use std::{
    io::{IsTerminal, stderr, stdout},
    sync::Arc,
};

/// What stderr is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stderr {
    /// A terminal: somebody is looking.
    Terminal,
    /// A file, a pipe, the journal.
    Redirected,
}

impl Stderr {
    /// Looks at this process's stderr.
    pub fn detect() -> Self {
        if stderr().is_terminal() { Self::Terminal } else { Self::Redirected }
    }
}

/// What stdout is wanted to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Text for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// How much is wanted on stderr.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verbosity {
    /// Errors only.
    Quiet,
    /// Bars on a terminal; else warnings, errors and a summary.
    Normal,
    /// Every log line.
    Verbose,
}

/// The renderer of a run. Verbose runs get log lines on terminals too, to be scrolled and copied.
pub fn monitor_for(stderr: Stderr, format: Format, verbosity: Verbosity) -> Arc<dyn Monitor> {
    let log = || Output::new(std::io::stderr());
    let results = || Output::new(stdout());
    match (format, verbosity, stderr) {
        (Format::Json, ..) => Arc::new(Json::new(results())),
        (Format::Text, Verbosity::Quiet, _) => Arc::new(Plain::new(log(), Detail::Errors)),
        (Format::Text, Verbosity::Verbose, _) => Arc::new(Plain::new(log(), Detail::Full).results_to(results())),
        (Format::Text, Verbosity::Normal, Stderr::Redirected) => {
            Arc::new(Plain::new(log(), Detail::Short).results_to(results()))
        }
        (Format::Text, Verbosity::Normal, Stderr::Terminal) => Arc::new(Terminal::new(log(), results())),
    }
}
