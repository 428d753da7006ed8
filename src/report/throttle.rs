//! Keeps progress from flooding a log.

use super::sizes::percent;
use std::{collections::HashMap, time::Duration};

/// Decides which progress of which disk is worth a line.
#[derive(Debug)]
pub(super) struct Throttle {
    /// Never sooner than this after the last line.
    gap: Duration,
    /// A line when it moved on by so many percent …
    step: u64,
    /// … or when this much time has passed.
    at_latest: Duration,
    marks: HashMap<(String, String), Mark>,
}

#[derive(Clone, Copy, Debug)]
struct Mark {
    began: Duration,
    last: Duration,
    done: u64,
    percent: u64,
}

/// What to write about a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    /// Since the disk's first progress.
    pub(super) elapsed: Duration,
    /// Bytes since the last line.
    pub(super) bytes: u64,
    /// Time since the last line.
    pub(super) time: Duration,
}

impl Throttle {
    pub(super) fn new(gap: Duration, step: u64, at_latest: Duration) -> Self {
        Self { gap, step, at_latest, marks: HashMap::new() }
    }

    /// Progress at `now`; the first only starts the clock.
    pub(super) fn step(&mut self, guest: &str, disk: &str, done: u64, todo: u64, now: Duration) -> Option<Step> {
        let percent = percent(done, todo);
        let fresh = Mark { began: now, last: now, done, percent };
        let mark = self.marks.entry((guest.to_owned(), disk.to_owned())).or_insert(fresh);
        // The disk is begun, or begun once more.
        if done == 0 || done < mark.done {
            *mark = fresh;
        }
        let time = now.saturating_sub(mark.last);
        let moved = percent.saturating_sub(mark.percent);
        if time < self.gap || (moved < self.step && time < self.at_latest) {
            return None;
        }
        let step = Step { elapsed: now.saturating_sub(mark.began), bytes: done - mark.done, time };
        *mark = Mark { began: mark.began, last: now, done, percent };
        Some(step)
    }

    /// The disk is done: how long it took, if it ever made progress.
    pub(super) fn end(&mut self, guest: &str, disk: &str, now: Duration) -> Option<Duration> {
        let mark = self.marks.remove(&(guest.to_owned(), disk.to_owned()))?;
        Some(now.saturating_sub(mark.began))
    }

    /// Forgets a guest.
    pub(super) fn forget(&mut self, guest: &str) {
        self.marks.retain(|(of, _), _| of != guest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_line_needs_time_and_a_step() {
        let mut throttle = Throttle::new(secs(3), 10, secs(30));
        let mut at = |done, now| throttle.step("100", "scsi0", done, 100, now);
        assert_eq!(at(0, secs(0)), None);
        assert_eq!(at(50, secs(2)), None, "too soon");
        assert_eq!(at(50, secs(3)), Some(Step { elapsed: secs(3), bytes: 50, time: secs(3) }));
        assert_eq!(at(55, secs(10)), None, "too little");
        assert_eq!(at(55, secs(33)), Some(Step { elapsed: secs(33), bytes: 5, time: secs(30) }));
        assert_eq!(at(1, secs(34)), None, "starts again");
        assert_eq!(at(11, secs(37)), Some(Step { elapsed: secs(3), bytes: 10, time: secs(3) }));
        assert_eq!(throttle.end("100", "scsi0", secs(40)), Some(secs(6)));
        assert_eq!(throttle.end("100", "scsi0", secs(40)), None);
    }
}
