//! Whether to wait for the next answer of a server, or to sleep shortly and look.
//!
//! A server whose threads answer one read at a time wakes who waits for each, which costs both sides more than the read; to look by
//! oneself again and again gives half as many reads more. With a server that answers many at a time it gives a tenth fewer. The two are
//! told apart by how many answers come at a time while they are waited for: naps would make that few with either.

use std::time::{Duration, Instant};

/// For so long answers are waited for and counted.
const TRIAL: Duration = Duration::from_millis(20);
/// What was found out then holds for so long.
const TERM: Duration = Duration::from_millis(500);
/// After so long without an answer it is waited for in any case: the server's disk takes its time.
const SLOW: Duration = Duration::from_micros(200);

/// How long a nap is. With 20 µs what is won elsewhere is lost by sleeping.
pub const NAP: Duration = Duration::from_micros(8);

/// What is known about the answers of one mount's servers.
pub struct Pace {
    /// Nothing while it is being found out.
    naps: Option<bool>,
    since: Instant,
    /// Since then, and at how many times they came.
    answers: usize,
    times: usize,
    last: Instant,
}

impl Pace {
    pub fn new(now: Instant) -> Self {
        Self { naps: None, since: now, answers: 0, times: 0, last: now }
    }

    /// Answers have come, on so many connections.
    pub fn came(&mut self, answers: usize, connections: usize, now: Instant) {
        self.last = now;
        self.answers += answers;
        self.times += connections;
        let until = if self.naps.is_some() { TERM } else { TRIAL };
        if now.duration_since(self.since) >= until {
            // 2 to 3 at a time with QEMU's threads, 4 to 6 with io_uring, 8 to 10 with nbdkit.
            let few = 2 * self.answers < 5 * self.times;
            self.naps = if self.naps.is_none() { Some(few) } else { None };
            (self.since, self.answers, self.times) = (now, 0, 0);
        }
    }

    /// Whether to sleep for a [`NAP`] instead of waiting.
    pub fn naps(&self, now: Instant) -> bool {
        self.naps == Some(true) && now.duration_since(self.last) < SLOW
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Twenty seconds with a server that answers so many at a time while it is waited for. The share of the answers that came to
    /// somebody who naps.
    fn napped(pace: &mut Pace, now: &mut Instant, at_a_time: usize) -> f64 {
        let (start, mut all, mut napped) = (*now, 0, 0);
        while now.duration_since(start) < Duration::from_secs(20) {
            *now += Duration::from_micros(20);
            let naps = pace.naps(*now);
            let answers = if naps { 2 } else { at_a_time };
            all += answers;
            napped += if naps { answers } else { 0 };
            pace.came(answers, 1, *now);
        }
        f64::from(napped as u32) / f64::from(all as u32)
    }

    #[test]
    fn answers_that_come_by_ones_and_twos_are_not_waited_for() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        for _ in 0..2 {
            let (few, many) = (napped(&mut pace, &mut now, 2), napped(&mut pace, &mut now, 5));
            assert!(few > 0.9 && many < 0.1, "{few} {many}");
        }
    }

    #[test]
    fn a_slow_server_is_waited_for() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        let napping = (0..100_000).any(|_| {
            now += Duration::from_micros(12);
            pace.came(1, 1, now);
            pace.naps(now)
        });
        assert!(napping && !pace.naps(now + SLOW));
    }
}
