//! One JSON object a line.

use super::{Event, Monitor, output::Output, throttle::Throttle};
use jiff::Timestamp;
use serde::Serialize;
use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Number of the form of every JSON output; rises when members change their meaning or go away, not when some are added.
pub const SCHEMA: u32 = 1;

/// Writes every event as a line: `{"schema":1,"time":"…","guest":"100","type":"phase","phase":"copy"}`. Progress comes at
/// most once a second for a disk.
pub struct Json {
    start: Instant,
    state: Mutex<State>,
}

struct State {
    out: Output,
    throttle: Throttle,
}

#[derive(Serialize)]
struct Line<'a> {
    schema: u32,
    time: Timestamp,
    // A summary has it already, and no member may come twice.
    #[serde(skip_serializing_if = "Option::is_none")]
    guest: Option<&'a str>,
    #[serde(flatten)]
    event: &'a Event,
}

impl Json {
    /// Lines to `out`.
    pub fn new(out: Output) -> Self {
        let throttle = Throttle::new(Duration::from_secs(1), 0, Duration::from_secs(1));
        Self { start: Instant::now(), state: Mutex::new(State { out, throttle }) }
    }
}

impl Monitor for Json {
    fn event(&self, guest: &str, event: Event) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { out, throttle } = &mut *state;
        match &event {
            Event::Progress { disk, done, todo } => {
                let due = throttle.step(guest, disk, *done, *todo, self.start.elapsed()).is_some();
                if !due && done < todo {
                    return;
                }
            }
            Event::Summary(_) => throttle.forget(guest),
            _ => {}
        }
        let named = !matches!(event, Event::Summary(_));
        let line = Line { schema: SCHEMA, time: Timestamp::now(), guest: named.then_some(guest), event: &event };
        if let Ok(text) = serde_json::to_string(&line) {
            out.line(&text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        archive::ArchiveId,
        report::{Phase, Summary, output::capture::Capture},
    };
    use serde_json::{Value, json};

    fn lines(events: Vec<Event>) -> (String, Vec<Value>) {
        let capture = Capture::default();
        let monitor = Json::new(Output::new(capture.clone()));
        for event in events {
            monitor.event("100", event);
        }
        let text = capture.text();
        let values = text.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
        (text, values)
    }

    #[test]
    fn every_kind_of_event_is_one_line_with_schema_time_guest_and_type() {
        let (text, values) = lines(vec![
            Event::Phase { phase: Phase::SetUp },
            Event::DiskPlan { disk: "scsi0".into(), size: 2, todo: 1, action: "used", reason: "r".into() },
            Event::DiskSkipped { disk: "scsi1".into(), reason: "backup=0".into() },
            Event::Progress { disk: "scsi0".into(), done: 1, todo: 1 },
            Event::DiskDone { disk: "scsi0".into() },
            Event::Info { message: "a\nb".into() },
            Event::Warning { message: "w".into() },
            Event::Summary(Box::new(Summary {
                guest: "100".into(),
                ok: true,
                duration: Duration::from_millis(1500),
                archive_id: Some(ArchiveId("ab12".into())),
                ..Summary::default()
            })),
        ]);
        let types: Vec<&str> = values.iter().filter_map(|v| v["type"].as_str()).collect();
        assert_eq!(
            types,
            ["phase", "disk-plan", "disk-skipped", "progress", "disk-done", "info", "warning", "summary"]
        );
        for (line, value) in text.lines().zip(&values) {
            assert_eq!(value["schema"], 1);
            assert_eq!(value["guest"], "100");
            assert_eq!(line.matches("\"guest\"").count(), 1, "{line}");
            let time = value["time"].as_str().expect("text");
            assert!(time.ends_with('Z') && time.parse::<Timestamp>().is_ok(), "{time}");
        }
        assert_eq!(values[0]["phase"], "set-up");
        assert_eq!(values[7]["duration"], json!(1.5));
        assert_eq!(values[7]["archive_id"], "ab12");
    }

    #[test]
    fn progress_does_not_flood_but_the_end_is_always_told() {
        let mut events: Vec<Event> =
            (0..1000).map(|done| Event::Progress { disk: "scsi0".into(), done, todo: 1000 }).collect();
        events.push(Event::Progress { disk: "scsi0".into(), done: 1000, todo: 1000 });
        let (_, values) = lines(events);
        assert!(values.len() < 20, "{} lines", values.len());
        assert_eq!(values.last().expect("a line")["done"], 1000);
    }
}
