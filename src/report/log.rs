//! The log of one run, for the archive.

use super::{Detail, Event, Monitor, Output, Plain};
use std::{
    io::{self, Write},
    sync::{Arc, Mutex, PoisonError},
};

/// Largest log. A run that has more to say repeats itself.
const MAX: usize = 1 << 20;

/// Keeps the lines that [`Plain`] would write, at most 1 MiB of them.
pub struct RunLog {
    lines: Lines,
    plain: Plain,
}

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Whole lines only, so that it stays text.
        if lines.len() + bytes.len() <= MAX {
            lines.extend_from_slice(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl RunLog {
    /// An empty log.
    pub fn new() -> Self {
        let lines = Lines::default();
        Self { plain: Plain::new(Output::new(lines.clone()), Detail::Full), lines }
    }

    /// The lines so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.lines.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }
}

impl Default for RunLog {
    fn default() -> Self {
        Self::new()
    }
}

impl Monitor for RunLog {
    fn event(&self, guest: &str, event: Event) {
        self.plain.event(guest, event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Collector, Events};

    #[test]
    fn the_log_has_what_happened_and_an_end() {
        let (log, outside) = (Arc::new(RunLog::new()), Arc::new(Collector::new()));
        let events = Events::new("100", outside.clone()).also_to(log.clone());
        events.warn("the disk is old");
        assert!(log.text().contains("the disk is old"), "{}", log.text());
        assert_eq!(outside.warnings(), ["the disk is old"]);
        for _ in 0..300 {
            events.info("x".repeat(8000));
        }
        assert!(log.text().len() <= MAX && log.text().ends_with('\n'));
    }
}
