//! Monitors for programs: one that keeps events, one that hands them to several.

use super::{Event, Monitor};
use std::sync::{Arc, Mutex, PoisonError};

/// Keeps every event.
#[derive(Debug, Default)]
pub struct Collector {
    events: Mutex<Vec<(String, Event)>>,
}

impl Collector {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// What was sent so far: guest and event.
    pub fn events(&self) -> Vec<(String, Event)> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The warnings so far.
    pub fn warnings(&self) -> Vec<String> {
        self.texts(|event| if let Event::Warning { message } = event { Some(message) } else { None })
    }

    /// The information lines so far.
    pub fn infos(&self) -> Vec<String> {
        self.texts(|event| if let Event::Info { message } = event { Some(message) } else { None })
    }

    fn texts(&self, pick: impl Fn(Event) -> Option<String>) -> Vec<String> {
        self.events().into_iter().filter_map(|(_, event)| pick(event)).collect()
    }
}

impl Monitor for Collector {
    fn event(&self, guest: &str, event: Event) {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).push((guest.to_owned(), event));
    }
}

/// Hands every event to several monitors, in order: bars for the terminal and a log for the archive.
pub struct Fanout {
    monitors: Vec<Arc<dyn Monitor>>,
}

impl Fanout {
    /// To all of `monitors`.
    pub fn new(monitors: Vec<Arc<dyn Monitor>>) -> Self {
        Self { monitors }
    }
}

impl Monitor for Fanout {
    fn event(&self, guest: &str, event: Event) {
        let Some((last, others)) = self.monitors.split_last() else { return };
        for monitor in others {
            monitor.event(guest, event.clone());
        }
        last.event(guest, event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Events;

    #[test]
    fn every_monitor_gets_every_event() {
        let (one, two) = (Arc::new(Collector::new()), Arc::new(Collector::new()));
        let events = Events::new("100", Arc::new(Fanout::new(vec![one.clone(), two.clone()])));
        events.info("a");
        events.warn("b");
        for collector in [one, two] {
            assert_eq!(collector.infos(), ["a"]);
            assert_eq!(collector.warnings(), ["b"]);
            assert!(collector.events().iter().all(|(guest, _)| guest == "100"));
        }
        Events::new("100", Arc::new(Fanout::new(Vec::new()))).info("nobody listens");
    }
}
