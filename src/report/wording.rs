//! Events as log lines, in the words that vzdump's users and log parsers know.

use super::{
    Event, Phase,
    output::printable_lines,
    sizes::{bytes, duration, percent, rate},
    summary_line,
    throttle::Step,
};
use std::time::Duration;

/// How serious a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    Info,
    Warning,
    Error,
}

impl Level {
    /// As vzdump writes it.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Info => "INFO",
            Self::Warning => "WARN",
            Self::Error => "ERROR",
        }
    }
}

/// What a phase does.
pub(super) fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Recover => "undoing what an earlier run left",
        Phase::Prepare => "preparing",
        Phase::SetUp => "setting up snapshot access",
        Phase::Copy => "copying",
        Phase::Commit => "waiting for the target to be durable",
        Phase::TearDown => "tearing down snapshot access",
        Phase::Restore => "restoring",
    }
}

/// The lines of an event; none for progress, which has its own.
pub(super) fn lines(guest: &str, event: &Event) -> Vec<(Level, String)> {
    let mut out = Vec::new();
    let mut add = |level, text: &str| out.extend(printable_lines(text).map(|line| (level, line.into_owned())));
    match event {
        Event::Phase { phase: of } => add(Level::Info, &format!("vm {guest}: {}", phase(*of))),
        Event::DiskPlan { disk, size, todo, action, reason } => {
            add(Level::Info, &format!("{disk}: dirty-bitmap status: {}", bitmap_status(action, *todo, *size)));
            if !reason.is_empty() {
                add(Level::Info, &format!("{disk}: {reason}"));
            }
        }
        Event::DiskSkipped { disk, reason } => add(Level::Info, &format!("{disk}: left out: {reason}")),
        Event::Info { message } => add(Level::Info, message),
        // A warning is read on its own, in a mail: it has to say whose it is.
        Event::Warning { message } => add(Level::Warning, &format!("vm {guest}: {message}")),
        Event::Summary(summary) => {
            let level = if summary.ok { Level::Info } else { Level::Error };
            // The summary names the error's first line only.
            let more = summary.error.iter().filter(|_| !summary.ok).flat_map(|e| e.lines().skip(1));
            let mut text = summary_line(summary);
            for line in more {
                text.push('\n');
                text.push_str(line);
            }
            add(level, &text);
        }
        Event::Progress { .. } | Event::DiskDone { .. } => {}
    }
    out
}

/// `scsi0: 42% (1.7 GiB of 4.0 GiB) in 3s, read: 136.0 MiB/s`.
pub(super) fn progress(disk: &str, done: u64, todo: u64, step: Step, verb: &str) -> String {
    format!(
        "{disk}: {}% ({} of {}) in {}, {verb}: {}",
        percent(done, todo),
        bytes(done),
        bytes(todo),
        duration(step.elapsed),
        rate(step.bytes, step.time)
    )
}

/// `scsi0: done in 12s`.
pub(super) fn disk_done(disk: &str, time: Option<Duration>) -> String {
    time.map_or_else(|| format!("{disk}: done"), |time| format!("{disk}: done in {}", duration(time)))
}

/// What moves in a phase: bytes are read from guests and written when restoring.
pub(super) fn verb(phase: Option<Phase>) -> &'static str {
    if phase == Some(Phase::Restore) { "write" } else { "read" }
}

fn bitmap_status(action: &str, dirty: u64, size: u64) -> String {
    match action {
        "used" if dirty == 0 => "OK (drive clean)".into(),
        "used" => format!("OK ({} of {} dirty)", bytes(dirty), bytes(size)),
        "new" => "created new".into(),
        "missing-recreated" => "expected bitmap was missing and has been recreated".into(),
        "not-used" => "disabled".into(),
        other => other.into(),
    }
}
