//! The last line for people.

use super::{
    Summary,
    output::printable,
    sizes::{duration, short_bytes},
};
use std::{fmt::Write as _, time::Duration};

/// `vm 100 web01: ok, 2 disks, read 7.4 GiB of 64 GiB (incremental), …`, or why it failed. One line without its end.
pub fn summary_line(summary: &Summary) -> String {
    let mut line = format!("vm {}", printable(&summary.guest));
    if let Some(name) = &summary.name {
        let _ = write!(line, " {}", printable(name));
    }
    if summary.ok {
        succeeded(&mut line, summary);
    } else {
        failed(&mut line, summary);
    }
    line
}

fn succeeded(line: &mut String, summary: &Summary) {
    line.push_str(": ok");
    if summary.warnings > 0 {
        let _ = write!(line, " with {}", count(summary.warnings, "warning"));
    }
    let _ = write!(
        line,
        ", {}, read {} of {} ({})",
        count(summary.disks, "disk"),
        short_bytes(summary.read_bytes),
        short_bytes(summary.size_bytes),
        if summary.incremental { "incremental" } else { "full" }
    );
    if let Some(stored) = summary.stored_bytes {
        let _ = write!(line, ", stored {}", short_bytes(stored));
    }
    let _ = write!(line, ", {}", duration(summary.duration));
    stillness(line, summary);
    if summary.fleecing_peak_bytes > 0 {
        let _ = write!(line, ", fleecing peak {}", short_bytes(summary.fleecing_peak_bytes));
    }
    if let Some(archive) = &summary.archive {
        let _ = write!(line, ", archive {}", printable(archive));
    }
}

fn failed(line: &mut String, summary: &Summary) {
    let _ = write!(line, ": failed after {}", duration(summary.duration));
    stillness(line, summary);
    if summary.warnings > 0 {
        let _ = write!(line, ", {}", count(summary.warnings, "warning"));
    }
    let error = summary.error.as_deref().unwrap_or("the cause is not known");
    // A message of several lines would make the line no line; the log has it in full.
    let first = error.lines().map(str::trim).find(|l| !l.is_empty()).unwrap_or("the cause is not known");
    let _ = write!(line, ": {}", printable(first));
}

fn stillness(line: &mut String, summary: &Summary) {
    if summary.frozen_millis > 0 {
        let _ = write!(line, ", frozen {}", duration(Duration::from_millis(summary.frozen_millis)));
    }
    if summary.paused_micros > 0 {
        let _ = write!(line, ", paused {}", duration(Duration::from_micros(summary.paused_micros)));
    }
}

fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary() -> Summary {
        Summary {
            guest: "100".into(),
            name: Some("web01".into()),
            ok: true,
            disks: 2,
            size_bytes: 64 << 30,
            read_bytes: 7_945_689_498,
            incremental: true,
            stored_bytes: Some(2_254_857_830),
            duration: Duration::from_secs(72),
            paused_micros: 4200,
            fleecing_peak_bytes: 212 << 20,
            archive: Some("pve-qemu-100-2026-01-31T02:00:07Z".into()),
            ..Summary::default()
        }
    }

    #[test]
    fn success_tells_the_numbers_that_count() {
        assert_eq!(
            summary_line(&summary()),
            "vm 100 web01: ok, 2 disks, read 7.4 GiB of 64 GiB (incremental), stored 2.1 GiB, 1m12s, paused 4 ms, \
             fleecing peak 212 MiB, archive pve-qemu-100-2026-01-31T02:00:07Z"
        );
    }

    #[test]
    fn what_did_not_happen_is_left_out() {
        let short = Summary {
            name: None,
            disks: 1,
            incremental: false,
            stored_bytes: None,
            paused_micros: 0,
            frozen_millis: 120,
            fleecing_peak_bytes: 0,
            archive: None,
            warnings: 1,
            ..summary()
        };
        assert_eq!(
            summary_line(&short),
            "vm 100: ok with 1 warning, 1 disk, read 7.4 GiB of 64 GiB (full), 1m12s, frozen 120 ms"
        );
    }

    #[test]
    fn failure_tells_why_in_one_line() {
        let failure = Summary {
            ok: false,
            error: Some("\ncannot freeze: \u{1b}[31mtimeout\nnow: nothing was changed".into()),
            warnings: 2,
            ..summary()
        };
        assert_eq!(
            summary_line(&failure),
            "vm 100 web01: failed after 1m12s, paused 4 ms, 2 warnings: cannot freeze: \\u{1b}[31mtimeout"
        );
        let unknown = Summary { ok: false, error: None, ..summary() };
        assert!(summary_line(&unknown).ends_with(": the cause is not known"));
    }
}
