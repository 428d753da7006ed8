//! What borg says while it works (`--progress --log-json`): where it stands, and which file it gives up.

use super::outcome::Message;
use serde::Deserialize;
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// A line that is no message.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Line {
    /// While `create` goes through the files.
    ArchiveProgress {
        #[serde(default)]
        nfiles: u64,
    },
    /// A step of borg's own: reading and saving its caches, its index.
    ProgressMessage {
        #[serde(default)]
        message: Option<String>,
    },
    /// The same, with a percentage in its text.
    ProgressPercent {
        #[serde(default)]
        message: Option<String>,
    },
}

/// Where borg stands, shared by who reads its lines and who tells of it.
#[derive(Clone, Debug)]
pub(super) struct Progress(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    /// Between two tellings.
    pause: Duration,
    told: Instant,
    files: u64,
    step: String,
    /// Whether there is something that was not told.
    news: bool,
    /// Paths that must all be stored.
    paths: Vec<String>,
    lost: Option<Message>,
}

impl Progress {
    /// Tells something every `pause` at most, and nothing in the first. All files below `paths` must be stored.
    pub(super) fn new(pause: Duration, paths: Vec<String>) -> Self {
        let state =
            State { pause, told: Instant::now(), files: 0, step: String::new(), news: false, paths, lost: None };
        Self(Arc::new(Mutex::new(state)))
    }

    /// Takes a message. borg goes on when a file cannot be stored, even when its repository is full.
    pub(super) fn look_at(&self, message: &Message) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.lost.is_none()
            && message.level == "WARNING"
            && state.paths.iter().any(|path| message.text.starts_with(path.as_str()))
        {
            state.lost = Some(message.clone());
        }
    }

    /// The first message about a file that was not stored as it is.
    pub(super) fn lost(&self) -> Option<Message> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).lost.clone()
    }

    /// Takes a line of borg's, if it is one about progress.
    pub(super) fn take(&self, line: &str) -> bool {
        // Every line of borg's is looked at; messages have another type.
        let Ok(line) = serde_json::from_str::<Line>(line) else { return false };
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match line {
            Line::ArchiveProgress { nfiles } if nfiles > 0 => {
                state.files = nfiles;
                state.step.clear();
                state.news = true;
            }
            Line::ProgressMessage { message: Some(text) } | Line::ProgressPercent { message: Some(text) } => {
                state.step = text;
                state.news = true;
            }
            // The end of something.
            _ => {}
        }
        true
    }

    /// What to tell now.
    pub(super) fn news(&self) -> Option<String> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.news || state.told.elapsed() < state.pause {
            return None;
        }
        state.told = Instant::now();
        state.news = false;
        if state.step.is_empty() {
            return Some(format!("borg has gone through {} files", state.files));
        }
        Some(format!("borg: {}", state.step.trim().chars().take(200).collect::<String>()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_about_progress_are_no_messages() {
        let progress = Progress::new(Duration::ZERO, vec!["disks".into()]);
        assert!(!progress.take(r#"{"type": "log_message", "message": "m", "levelname": "WARNING"}"#));
        assert!(!progress.take("Traceback (most recent call last):"));
        assert_eq!(progress.news(), None);
        assert!(progress.take(r#"{"type": "archive_progress", "nfiles": 17, "path": "x", "finished": false}"#));
        assert_eq!(progress.news().as_deref(), Some("borg has gone through 17 files"));
        assert_eq!(progress.news(), None, "told once");
        assert!(progress.take(r#"{"type": "archive_progress", "finished": true}"#));
        assert_eq!(progress.news(), None);
        assert!(progress.take(r#"{"type": "progress_message", "message": "Saving files cache", "finished": false}"#));
        assert_eq!(progress.news().as_deref(), Some("borg: Saving files cache"));
        assert!(progress.take(r#"{"type": "progress_percent", "finished": true}"#));
        assert_eq!(progress.news(), None);
    }

    #[test]
    fn a_file_that_is_given_up_is_noticed_at_once() {
        let progress = Progress::new(Duration::ZERO, vec!["disks".into()]);
        let say = |line: &str| progress.look_at(&Message::of_line(line));
        say(r#"{"message": "disks/a/000000/0000000001: read: [Errno 5]", "levelname": "INFO"}"#);
        say(r#"{"message": "the clock is wrong", "levelname": "WARNING"}"#);
        assert!(progress.lost().is_none());
        say(
            r#"{"message": "disks/a/000000/0000000001: write: [Errno 28] No space left on device", "levelname": "WARNING"}"#,
        );
        say(r#"{"message": "disks/a/000000/0000000002: file changed while we backed it up", "levelname": "WARNING"}"#);
        assert!(progress.lost().expect("a file").text.contains("0000000001"));
    }

    #[test]
    fn what_comes_too_often_is_told_later() {
        let progress = Progress::new(Duration::from_hours(1), Vec::new());
        assert!(progress.take(r#"{"type": "archive_progress", "nfiles": 17}"#));
        assert_eq!(progress.news(), None);
    }
}
