//! Log lines, as vzdump writes them: for logs, for cron, for terminals without bars.

use super::{
    Event, Monitor, Phase,
    output::Output,
    summary_line,
    throttle::Throttle,
    wording::{self, Level},
};
use jiff::Zoned;
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How much is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// Errors only.
    Errors,
    /// Warnings, errors and one summary line for a guest; what cron should mail.
    Short,
    /// Everything, with progress now and then.
    Full,
}

type Clock = Box<dyn Fn() -> (Zoned, Duration) + Send + Sync>;

/// Writes `2026-11-24 06:40:01 INFO: …` lines in local time.
pub struct Plain {
    detail: Detail,
    clock: Clock,
    state: Mutex<State>,
}

struct State {
    log: Output,
    results: Option<Output>,
    phases: HashMap<String, Phase>,
    throttle: Throttle,
}

impl Plain {
    /// Lines to `log`.
    pub fn new(log: Output, detail: Detail) -> Self {
        let start = Instant::now();
        Self::with_clock(log, detail, Box::new(move || (Zoned::now(), start.elapsed())))
    }

    fn with_clock(log: Output, detail: Detail, clock: Clock) -> Self {
        let throttle = Throttle::new(Duration::from_secs(3), 10, Duration::from_secs(30));
        Self { detail, clock, state: Mutex::new(State { log, results: None, phases: HashMap::new(), throttle }) }
    }

    /// Summaries of successful runs go to `results`, bare, instead of to the log.
    #[must_use]
    pub fn results_to(mut self, results: Output) -> Self {
        self.state.get_mut().unwrap_or_else(PoisonError::into_inner).results = Some(results);
        self
    }

    fn shows(&self, level: Level, event: &Event) -> bool {
        match self.detail {
            Detail::Errors => level >= Level::Error,
            Detail::Short => level >= Level::Warning || matches!(event, Event::Summary(_)),
            Detail::Full => true,
        }
    }
}

impl Monitor for Plain {
    fn event(&self, guest: &str, event: Event) {
        let (time, now) = (self.clock)();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { log, results, phases, throttle } = &mut *state;
        let lines = match &event {
            Event::Progress { disk, done, todo } => {
                let verb = wording::verb(phases.get(guest).copied());
                let step = throttle.step(guest, disk, *done, *todo, now);
                step.map(|step| (Level::Info, wording::progress(disk, *done, *todo, step, verb))).into_iter().collect()
            }
            Event::DiskDone { disk } => vec![(Level::Info, wording::disk_done(disk, throttle.end(guest, disk, now)))],
            Event::Summary(summary) if summary.ok && self.detail != Detail::Errors && results.is_some() => {
                if let Some(results) = results {
                    results.line(&summary_line(summary));
                }
                Vec::new()
            }
            _ => wording::lines(guest, &event),
        };
        for (level, line) in lines {
            if self.shows(level, &event) {
                log.line(&format!("{} {}: {line}", time.strftime("%Y-%m-%d %H:%M:%S"), level.word()));
            }
        }
        match event {
            Event::Phase { phase } => {
                phases.insert(guest.to_owned(), phase);
            }
            Event::Summary(_) => {
                phases.remove(guest);
                throttle.forget(guest);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Summary, output::capture::Capture};
    use std::sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    };

    struct Bench {
        log: Capture,
        results: Capture,
        seconds: Arc<AtomicU64>,
        plain: Plain,
    }

    fn bench(detail: Detail, with_results: bool) -> Bench {
        let (log, results, seconds) = (Capture::default(), Capture::default(), Arc::new(AtomicU64::new(0)));
        let ticks = seconds.clone();
        let clock: Clock = Box::new(move || {
            let passed = ticks.load(Ordering::Relaxed);
            let start: jiff::Timestamp = "2026-11-24T06:40:01Z".parse().expect("time");
            let time = start + jiff::SignedDuration::from_secs(passed as i64);
            (time.to_zoned(jiff::tz::TimeZone::UTC), Duration::from_secs(passed))
        });
        let mut plain = Plain::with_clock(Output::new(log.clone()), detail, clock);
        if with_results {
            plain = plain.results_to(Output::new(results.clone()));
        }
        Bench { log, results, seconds, plain }
    }

    fn story(bench: &Bench, ok: bool) {
        let send = |event| bench.plain.event("100", event);
        send(Event::Phase { phase: Phase::Copy });
        send(Event::DiskPlan {
            disk: "scsi0".into(),
            size: 64 << 30,
            todo: 4 << 30,
            action: "used",
            reason: String::new(),
        });
        send(Event::DiskPlan {
            disk: "efidisk0".into(),
            size: 528 << 10,
            todo: 528 << 10,
            action: "new",
            reason: "first backup".into(),
        });
        for step in 0..=1000u64 {
            bench.seconds.store(step / 25, Ordering::Relaxed); // 40 seconds in all
            send(Event::Progress { disk: "scsi0".into(), done: (4 << 30) / 1000 * step, todo: 4 << 30 });
        }
        send(Event::DiskDone { disk: "scsi0".into() });
        send(Event::Info { message: "two\nlines\u{7}".into() });
        send(Event::Warning { message: "fleecing is slow".into() });
        send(Event::Summary(Box::new(Summary {
            guest: "100".into(),
            ok,
            error: Some("cannot copy\nnext: try again".into()).filter(|_| !ok),
            duration: Duration::from_secs(40),
            ..Summary::default()
        })));
    }

    #[test]
    fn everything_is_written_as_vzdump_does() {
        let bench = bench(Detail::Full, false);
        story(&bench, true);
        let lines = bench.log.lines();
        assert_eq!(lines[0], "2026-11-24 06:40:01 INFO: vm 100: copying");
        assert_eq!(lines[1], "2026-11-24 06:40:01 INFO: scsi0: dirty-bitmap status: OK (4.0 GiB of 64.0 GiB dirty)");
        assert_eq!(lines[2], "2026-11-24 06:40:01 INFO: efidisk0: dirty-bitmap status: created new");
        assert_eq!(lines[3], "2026-11-24 06:40:01 INFO: efidisk0: first backup");
        assert_eq!(lines[4], "2026-11-24 06:40:05 INFO: scsi0: 10% (413.7 MiB of 4.0 GiB) in 4s, read: 103.4 MiB/s");
        let progress = lines.iter().filter(|l| l.contains('%')).count();
        assert!((5..=10).contains(&progress), "{progress} progress lines");
        let tail: Vec<&str> = lines[lines.len() - 5..].iter().map(|l| &l[20..]).collect();
        assert_eq!(
            tail,
            [
                "INFO: scsi0: done in 40s",
                "INFO: two",
                "INFO: lines\\u{7}",
                "WARN: vm 100: fleecing is slow",
                "INFO: vm 100: ok, 0 disks, read 0 B of 0 B (full), 40s",
            ]
        );
    }

    #[test]
    fn cron_gets_warnings_and_the_summary() {
        let good = bench(Detail::Short, true);
        story(&good, true);
        assert_eq!(good.log.lines(), ["2026-11-24 06:40:41 WARN: vm 100: fleecing is slow"]);
        assert_eq!(good.results.lines(), ["vm 100: ok, 0 disks, read 0 B of 0 B (full), 40s"]);
        let bad = bench(Detail::Short, true);
        story(&bad, false);
        let lines = bad.log.lines();
        assert_eq!(lines[1], "2026-11-24 06:40:41 ERROR: vm 100: failed after 40s: cannot copy");
        assert_eq!(lines[2], "2026-11-24 06:40:41 ERROR: next: try again");
        assert_eq!(bad.results.text(), "");
    }

    #[test]
    fn quiet_means_errors_only() {
        let good = bench(Detail::Errors, true);
        story(&good, true);
        assert_eq!(good.log.text() + &good.results.text(), "");
        let bad = bench(Detail::Errors, true);
        story(&bad, false);
        assert!(bad.log.lines().iter().all(|l| l.contains(" ERROR: ")));
        assert_eq!(bad.log.lines().len(), 2);
    }
}
