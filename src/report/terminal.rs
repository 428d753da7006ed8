//! Bars on a terminal, with log lines above them.

use super::{
    Event, Monitor,
    output::{Output, printable},
    summary_line,
    wording::{self, Level},
};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, PoisonError},
    time::Duration,
};

const TICK: Duration = Duration::from_millis(120);
const WAITING: &str = "{spinner} {prefix}: {msg}";
const TOTAL: &str = "{spinner} {prefix}: {msg} {percent:>3}% [{wide_bar}] \
                     {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} eta {eta}";
const DISK: &str = "  {prefix:10} {percent:>3}% [{wide_bar}] \
                    {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} eta {eta}";

/// One bar for a guest, with its phase and the total, and one for each disk that is worked on. They are gone when the
/// guest's summary comes, and when this is dropped.
pub struct Terminal {
    bars: MultiProgress,
    state: Mutex<State>,
}

struct State {
    log: Output,
    results: Output,
    guests: HashMap<String, Guest>,
}

struct Guest {
    total: ProgressBar,
    has_length: bool,
    disks: BTreeMap<String, Disk>,
}

struct Disk {
    bar: ProgressBar,
    done: u64,
    todo: u64,
}

impl Terminal {
    /// Bars on stderr; log lines to `log`, which is on the same terminal, summaries of successful runs to `results`.
    pub fn new(log: Output, results: Output) -> Self {
        Self::on(ProgressDrawTarget::stderr(), log, results)
    }

    fn on(target: ProgressDrawTarget, log: Output, results: Output) -> Self {
        Self {
            bars: MultiProgress::with_draw_target(target),
            state: Mutex::new(State { log, results, guests: HashMap::new() }),
        }
    }

    fn guest<'a>(&self, guests: &'a mut HashMap<String, Guest>, name: &str) -> &'a mut Guest {
        guests.entry(name.to_owned()).or_insert_with(|| {
            let total = self.bars.add(
                ProgressBar::no_length()
                    .with_style(style(WAITING))
                    .with_prefix(format!("vm {}", printable(name)))
                    .with_message("starting"),
            );
            total.enable_steady_tick(TICK);
            Guest { total, has_length: false, disks: BTreeMap::new() }
        })
    }

    fn progress(&self, guest: &mut Guest, disk: String, done: u64, todo: u64) {
        let Guest { total, has_length, disks } = guest;
        let entry = disks.entry(disk).or_insert_with_key(|disk| {
            let bar = ProgressBar::new(todo).with_style(style(DISK)).with_prefix(printable(disk).into_owned());
            // Disks stand above the total, which stays the last line.
            Disk { bar: self.bars.insert_before(total, bar), done: 0, todo }
        });
        if entry.todo != todo {
            entry.bar.set_length(todo);
        }
        (entry.done, entry.todo) = (done.min(todo), todo);
        entry.bar.set_position(entry.done);
        let (done, todo) = disks
            .values()
            .fold((0u64, 0u64), |(done, todo), disk| (done.saturating_add(disk.done), todo.saturating_add(disk.todo)));
        if !*has_length {
            *has_length = true;
            total.set_style(style(TOTAL));
            total.reset_eta();
        }
        total.set_length(todo);
        total.set_position(done);
    }

    fn clear(&self, guest: &Guest) {
        for disk in guest.disks.values() {
            disk.bar.finish_and_clear();
            self.bars.remove(&disk.bar);
        }
        guest.total.disable_steady_tick();
        guest.total.finish_and_clear();
        self.bars.remove(&guest.total);
    }
}

fn style(template: &str) -> ProgressStyle {
    // The templates are constants, and the tests below draw each of them.
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
        .tick_chars("|/-\\ ")
}

impl Monitor for Terminal {
    fn event(&self, guest: &str, event: Event) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { log, results, guests } = &mut *state;
        let lines = match &event {
            Event::Phase { .. } | Event::Progress { .. } | Event::DiskDone { .. } => Vec::new(),
            _ => wording::lines(guest, &event),
        };
        match event {
            Event::Phase { phase } => self.guest(guests, guest).total.set_message(wording::phase(phase)),
            Event::DiskPlan { disk, todo, .. } => self.progress(self.guest(guests, guest), disk, 0, todo),
            Event::Progress { disk, done, todo } => self.progress(self.guest(guests, guest), disk, done, todo),
            Event::DiskDone { disk } => {
                if let Some(disk) = self.guest(guests, guest).disks.get(&disk) {
                    disk.bar.finish_and_clear();
                }
            }
            Event::Summary(summary) => {
                if let Some(bars) = guests.remove(guest) {
                    self.clear(&bars);
                }
                if summary.ok {
                    self.bars.suspend(|| results.line(&summary_line(&summary)));
                    return;
                }
            }
            Event::DiskSkipped { .. } | Event::Info { .. } | Event::Warning { .. } => {}
        }
        if !lines.is_empty() {
            self.bars.suspend(|| {
                for (level, line) in lines {
                    match level {
                        Level::Info => log.line(&line),
                        _ => log.line(&format!("{}: {line}", level.word())),
                    }
                }
            });
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, guest) in state.guests.drain() {
            self.clear(&guest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Phase, Summary, output::capture::Capture};
    use indicatif::TermLike;
    use std::io::{self, Write};

    /// A terminal that only remembers what was written, with cursor movements as text.
    #[derive(Debug)]
    struct Paper(Capture);

    impl Paper {
        fn put(&self, text: &str) -> io::Result<()> {
            self.0.clone().write_all(text.as_bytes())
        }
    }

    impl TermLike for Paper {
        fn width(&self) -> u16 {
            100
        }
        fn move_cursor_up(&self, n: usize) -> io::Result<()> {
            if n > 0 { self.put(&format!("<up {n}>")) } else { Ok(()) }
        }
        fn move_cursor_down(&self, n: usize) -> io::Result<()> {
            if n > 0 { self.put(&format!("<down {n}>")) } else { Ok(()) }
        }
        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn write_line(&self, text: &str) -> io::Result<()> {
            self.put(text).and_then(|()| self.put("\n"))
        }
        fn write_str(&self, text: &str) -> io::Result<()> {
            self.put(text)
        }
        fn clear_line(&self) -> io::Result<()> {
            self.put("<clear>")
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    fn terminal() -> (Terminal, Capture, Capture) {
        let (paper, results) = (Capture::default(), Capture::default());
        let target = ProgressDrawTarget::term_like_with_hz(Box::new(Paper(paper.clone())), 200);
        (Terminal::on(target, Output::new(paper.clone()), Output::new(results.clone())), paper, results)
    }

    fn progress(disk: &str, done: u64) -> Event {
        Event::Progress { disk: disk.into(), done, todo: 4 << 30 }
    }

    #[test]
    fn bars_show_phase_disks_and_total_and_are_gone_at_the_end() {
        let (terminal, paper, results) = terminal();
        terminal.event("100", Event::Phase { phase: Phase::Copy });
        for step in 1..=4 {
            std::thread::sleep(Duration::from_millis(20));
            terminal.event("100", progress("scsi0", step << 30));
            terminal.event("100", progress("scsi1", (step << 30) / 2));
        }
        std::thread::sleep(Duration::from_millis(300));
        let text = paper.text();
        assert!(text.contains("vm 100: copying"), "{text}");
        assert!(text.contains("scsi0") && text.contains("scsi1"), "{text}");
        assert!(text.contains("6.00 GiB/8.00 GiB") && text.contains(" 75% ["), "total of both disks: {text}");
        assert!(text.contains("/s eta"), "{text}");

        terminal.event("100", Event::Warning { message: "slow\u{1b}[2J".into() });
        assert!(paper.text().contains("WARN: vm 100: slow\\u{1b}[2J\n"));
        terminal.event("100", Event::DiskDone { disk: "scsi0".into() });
        let summary = Summary { guest: "100".into(), ok: true, ..Summary::default() };
        terminal.event("100", Event::Summary(Box::new(summary)));
        assert_eq!(results.lines().len(), 1);
        let before = paper.text().len();
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(paper.text().len(), before, "nothing is drawn after the summary");
        let text = paper.text();
        let last_bar = text.rfind("vm 100:").expect("a bar");
        assert!(text[last_bar..].contains("<clear>"), "the last bar was cleared: {text}");
    }

    #[test]
    fn dropping_the_terminal_clears_the_bars() {
        let (terminal, paper, _) = terminal();
        terminal.event("100", Event::Phase { phase: Phase::Restore });
        std::thread::sleep(Duration::from_millis(300));
        drop(terminal);
        let text = paper.text();
        let last_bar = text.rfind("vm 100: restoring").expect("a bar");
        assert!(text[last_bar..].contains("<clear>"), "{text}");
    }

    #[test]
    fn a_failure_is_told_in_full_on_the_log() {
        let (terminal, paper, results) = terminal();
        let summary =
            Summary { guest: "100".into(), error: Some("no space\nnext: grow it".into()), ..Summary::default() };
        terminal.event("100", Event::Summary(Box::new(summary)));
        assert!(paper.text().contains("ERROR: vm 100: failed after 0 ms: no space\nERROR: next: grow it\n"));
        assert_eq!(results.text(), "");
    }
}
