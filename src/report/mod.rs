//! What a run tells the outside: one stream of events, several renderers.
//!
//! Flows send [`Event`]s to a [`Monitor`]; bars, plain lines, JSON lines and tests are implementations of it. Nothing else
//! prints.

mod archives;
mod choice;
mod collector;
mod json;
mod log;
mod output;
mod plain;
pub mod sizes;
mod summary;
mod terminal;
mod throttle;
mod wording;

pub use archives::{archive_lines, archive_table, manifest_line, manifest_text};
pub use choice::{Format, Stderr, Verbosity, monitor_for};
pub use collector::{Collector, Fanout};
pub use json::{Json, SCHEMA};
pub use log::RunLog;
pub use output::{Output, printable, write_result};
pub use plain::{Detail, Plain};
pub use summary::summary_line;
pub use terminal::Terminal;

use crate::archive::ArchiveId;
use serde::Serialize;
use std::{sync::Arc, time::Duration};

/// Where a backup or restore stands. The names are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Undoing what a dead run left.
    Recover,
    /// Finding guest, disks, base archives.
    Prepare,
    /// Freeze, snapshot access, thaw.
    SetUp,
    /// Reading and storing.
    Copy,
    /// Waiting for the target to be durable.
    Commit,
    /// Removing exports, filters, fleecing images.
    TearDown,
    /// Writing disks back.
    Restore,
}

/// Something happened.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Event {
    /// A phase begins.
    Phase {
        /// Which.
        phase: Phase,
    },
    /// What will be done with a disk.
    DiskPlan {
        /// The disk.
        disk: String,
        /// Its size in bytes.
        size: u64,
        /// Bytes that will be looked at: dirty bytes, or the size for a full backup.
        todo: u64,
        /// `new`, `used`, `missing-recreated`, `not-used`.
        action: &'static str,
        /// Why.
        reason: String,
    },
    /// A disk of the guest is left out.
    DiskSkipped {
        /// The disk.
        disk: String,
        /// Why.
        reason: String,
    },
    /// A disk moved on. Sent at most some times a second per disk.
    Progress {
        /// The disk.
        disk: String,
        /// Bytes of `todo` that are done.
        done: u64,
        /// Bytes in all.
        todo: u64,
    },
    /// A disk is done.
    DiskDone {
        /// The disk.
        disk: String,
    },
    /// Something worth a line in the log.
    Info {
        /// The line.
        message: String,
    },
    /// Something that did not stop the run but that somebody should look at.
    Warning {
        /// The line.
        message: String,
    },
    /// The run of a guest is over.
    Summary(Box<Summary>),
}

/// How a guest's run ended. Sizes in bytes.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Summary {
    /// Guest id.
    pub guest: String,
    /// Guest name, if it has one.
    pub name: Option<String>,
    /// Whether it succeeded.
    pub ok: bool,
    /// Why not.
    pub error: Option<String>,
    /// Number of disks.
    pub disks: usize,
    /// Their sizes together.
    pub size_bytes: u64,
    /// Bytes read from the exports.
    pub read_bytes: u64,
    /// Whether every disk was read incrementally.
    pub incremental: bool,
    /// Bytes that the repository grew by.
    pub stored_bytes: Option<u64>,
    /// Bytes discarded from the snapshot access after they were stored.
    pub discarded_bytes: u64,
    /// From start to end.
    #[serde(serialize_with = "seconds")]
    pub duration: Duration,
    /// How long the guest was paused by us.
    pub paused_micros: u64,
    /// How long its file systems were frozen.
    pub frozen_millis: u64,
    /// Most bytes that fleecing images held.
    pub fleecing_peak_bytes: u64,
    /// The archive's name.
    pub archive: Option<String>,
    /// The repository's id of it.
    pub archive_id: Option<ArchiveId>,
    /// Number of warnings.
    pub warnings: usize,
}

pub(crate) fn seconds<S: serde::Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64((duration.as_secs_f64() * 1000.0).round() / 1000.0)
}

/// An error with its causes, for a reason in words.
pub fn spelled_out(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Takes events; must be quick and never fail.
pub trait Monitor: Send + Sync {
    /// An event of the run of `guest`.
    fn event(&self, guest: &str, event: Event);
}

/// A monitor bound to a guest: what flows are given.
#[derive(Clone)]
pub struct Events {
    guest: Arc<str>,
    monitor: Arc<dyn Monitor>,
}

impl Events {
    /// Events of `guest`, sent to `monitor`.
    pub fn new(guest: &str, monitor: Arc<dyn Monitor>) -> Self {
        Self { guest: guest.into(), monitor }
    }

    /// The same events, sent to `monitor` too.
    #[must_use]
    pub fn also_to(&self, monitor: Arc<dyn Monitor>) -> Self {
        let both = Fanout::new(vec![monitor, Arc::clone(&self.monitor)]);
        Self { guest: Arc::clone(&self.guest), monitor: Arc::new(both) }
    }

    /// Sends an event.
    pub fn send(&self, event: Event) {
        self.monitor.event(&self.guest, event);
    }

    /// A phase begins.
    pub fn phase(&self, phase: Phase) {
        self.send(Event::Phase { phase });
    }

    /// A line for the log.
    pub fn info(&self, message: impl Into<String>) {
        self.send(Event::Info { message: message.into() });
    }

    /// A warning.
    pub fn warn(&self, message: impl Into<String>) {
        self.send(Event::Warning { message: message.into() });
    }
}
