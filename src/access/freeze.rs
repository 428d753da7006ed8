//! Holding the guest's file systems still around the instant.

use super::{
    FreezeMode,
    watchdog::{Watchdog, WatchdogError},
};
use crate::{
    journal::{Journal, JournalError, Step},
    qmp::agent::{Agent, AgentError, FsfreezeStatus},
    report::spelled_out,
};
use std::{path::PathBuf, time::Duration};
use thiserror::Error;
use tokio::time::{Instant, sleep};

/// Limit of a look at the agent's state.
const STATUS_LIMIT: Duration = Duration::from_secs(10);
/// How long we try to thaw before the watchdog takes over.
const THAW_LIMIT: Duration = Duration::from_mins(2);
const THAW_PAUSE: Duration = Duration::from_secs(1);

/// What became of a freeze.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FreezeOutcome {
    /// The file systems are frozen by us, and have to be thawed.
    Frozen {
        /// How many.
        filesystems: u64,
    },
    /// They are not frozen, for this reason. Nothing is left to thaw.
    NotPossible(String),
    /// Somebody else had frozen them already. They are not thawed by us, and may thaw at any time.
    AlreadyFrozen(String),
}

/// How a freeze ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ThawReport {
    /// From the request to freeze to the answer to the thaw; zero when nothing was frozen.
    pub frozen_for: Duration,
    /// When the file systems may not have been frozen all the time: what the agent says. Windows thaws by itself after 10 s.
    pub note: Option<String>,
}

/// Why a freeze or a thaw failed.
#[derive(Debug, Error)]
pub enum FreezeError {
    /// A freeze is demanded but not possible.
    #[error("the guest's file systems cannot be frozen: {reason}")]
    Required {
        /// Why.
        reason: String,
    },
    /// The journal cannot be written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The guest's file systems may still be frozen. The watchdog goes on trying, and so does recovery.
    #[error("the guest's file systems may still be frozen")]
    NotThawed(#[source] AgentError),
}

/// Freezes a guest's file systems for the time of a snapshot's set-up, and thaws them under all circumstances.
///
/// When it is dropped while they are (or may be) frozen, the watchdog thaws them.
#[derive(Debug)]
pub struct Freezer {
    agent: Option<Agent>,
    mode: FreezeMode,
    limit: Duration,
    journal: Journal,
    attempt: Option<Attempt>,
}

#[derive(Debug)]
struct Attempt {
    since: Instant,
    watchdog: Option<Watchdog>,
}

impl Freezer {
    /// For the guest whose agent listens on `agent`; `limit` is for the agent's answer to the freeze.
    pub fn new(agent: Option<PathBuf>, mode: FreezeMode, limit: Duration, journal: Journal) -> Self {
        Self { agent: agent.map(Agent::new), mode, limit, journal, attempt: None }
    }

    /// Freezes, if the mode and the agent allow it. Unless the outcome is [`FreezeOutcome::Frozen`], nothing that we froze is
    /// left frozen.
    ///
    /// # Errors
    /// [`FreezeError::Required`] when the mode demands a freeze and there is none, also when somebody else had frozen already;
    /// [`FreezeError::NotThawed`] when the freeze failed and its undoing too.
    pub async fn freeze(&mut self) -> Result<FreezeOutcome, FreezeError> {
        self.freeze_with(Watchdog::arm).await
    }

    async fn freeze_with<F: Future<Output = Result<Watchdog, WatchdogError>>>(
        &mut self,
        arm: impl FnOnce(Option<PathBuf>, Option<PathBuf>) -> F,
    ) -> Result<FreezeOutcome, FreezeError> {
        let outcome = self.attempt(arm).await?;
        if let (FreezeOutcome::NotPossible(_) | FreezeOutcome::AlreadyFrozen(_), Some(agent)) =
            (&outcome, &mut self.agent)
        {
            agent.disconnect();
        }
        match &outcome {
            FreezeOutcome::NotPossible(reason) | FreezeOutcome::AlreadyFrozen(reason)
                if self.mode == FreezeMode::Require =>
            {
                Err(FreezeError::Required { reason: reason.clone() })
            }
            _ => Ok(outcome),
        }
    }

    async fn attempt<F: Future<Output = Result<Watchdog, WatchdogError>>>(
        &mut self,
        arm: impl FnOnce(Option<PathBuf>, Option<PathBuf>) -> F,
    ) -> Result<FreezeOutcome, FreezeError> {
        if self.mode == FreezeMode::Off {
            return Ok(FreezeOutcome::NotPossible("freezing is switched off".into()));
        }
        let Some(agent) = &mut self.agent else {
            return Ok(FreezeOutcome::NotPossible("the guest has no agent configured".into()));
        };
        if let Err(error) = agent.ping().await {
            return Ok(FreezeOutcome::NotPossible(spelled_out(&error)));
        }
        match agent.fsfreeze_status(STATUS_LIMIT).await {
            Ok(FsfreezeStatus::Thawed) => {}
            Ok(FsfreezeStatus::Frozen) => {
                return Ok(FreezeOutcome::AlreadyFrozen(
                    "the file systems were already frozen by somebody else".into(),
                ));
            }
            Ok(FsfreezeStatus::Other(word)) => {
                return Ok(FreezeOutcome::NotPossible(format!("the guest agent calls the file systems `{word}`")));
            }
            Err(error) => return Ok(FreezeOutcome::NotPossible(spelled_out(&error))),
        }
        let armed = match arm(Some(agent.socket().to_owned()), None).await {
            Ok(mut watchdog) => watchdog.before_freeze().await.map(|()| watchdog),
            Err(error) => Err(error),
        };
        let watchdog = match armed {
            Ok(watchdog) => watchdog,
            Err(error) => return Ok(FreezeOutcome::NotPossible(spelled_out(&error))),
        };
        if let Err(error) = self.journal.record(&Step::Frozen) {
            watchdog.disarm().await;
            return Err(error.into());
        }
        self.attempt = Some(Attempt { since: Instant::now(), watchdog: Some(watchdog) });

        let reason = match agent.fsfreeze_freeze(self.limit).await {
            Ok(0) => "the guest agent froze no file system".to_owned(),
            Ok(filesystems) => return Ok(FreezeOutcome::Frozen { filesystems }),
            Err(error) if error.outcome_unknown() => {
                // The agent answers in order: its answer tells how the freeze ended. Without one there is nothing to wait for;
                // the longer the freeze still takes, the longer the guest stands still.
                match agent.fsfreeze_status(STATUS_LIMIT).await {
                    Ok(FsfreezeStatus::Frozen) => {
                        tracing::warn!("the answer to the freeze was lost, but the file systems are frozen");
                        return Ok(FreezeOutcome::Frozen { filesystems: 0 });
                    }
                    _ => spelled_out(&error),
                }
            }
            Err(error) => spelled_out(&error),
        };
        self.thaw().await?;
        Ok(FreezeOutcome::NotPossible(reason))
    }

    /// Thaws, when a freeze was attempted; otherwise does nothing. May be called more than once.
    ///
    /// # Errors
    /// [`FreezeError::NotThawed`] when the agent does not do it in time.
    pub async fn thaw(&mut self) -> Result<ThawReport, FreezeError> {
        let (Some(attempt), Some(agent)) = (&mut self.attempt, &mut self.agent) else {
            return Ok(ThawReport::default());
        };
        let deadline = Instant::now() + THAW_LIMIT;
        let note = loop {
            let error = match agent.fsfreeze_thaw(THAW_LIMIT / 2).await {
                Ok(()) => break None,
                Err(error) => error,
            };
            // Refused because nothing is frozen any more?
            if matches!(error, AgentError::Refused { .. })
                && matches!(agent.fsfreeze_status(STATUS_LIMIT).await, Ok(FsfreezeStatus::Thawed))
            {
                break Some(spelled_out(&error));
            }
            if Instant::now() >= deadline || attempt.watchdog.is_none() {
                // Sets the watchdog off, which needs the agent for itself.
                attempt.watchdog = None;
                agent.disconnect();
                return Err(FreezeError::NotThawed(error));
            }
            tracing::warn!("cannot thaw the guest yet: {}", spelled_out(&error));
            sleep(THAW_PAUSE).await;
        };
        let frozen_for = attempt.since.elapsed();
        let watchdog = attempt.watchdog.take();
        self.attempt = None;
        let recorded = self.journal.record(&Step::Thawed);
        if let Some(mut watchdog) = watchdog {
            let _ = watchdog.after_thaw().await;
            watchdog.disarm().await;
        }
        agent.disconnect();
        recorded?;
        Ok(ThawReport { frozen_for, note })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::agent::tests::{Reply, ScriptedAgent};
    use serde_json::json;
    use tempfile::TempDir;

    const LIMIT: Duration = Duration::from_secs(30);

    fn freezer(agent: &ScriptedAgent, mode: FreezeMode) -> (TempDir, Freezer, Journal) {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path(), "guest").unwrap();
        (dir, Freezer::new(Some(agent.socket.clone()), mode, LIMIT, journal.clone()), journal)
    }

    async fn freeze(freezer: &mut Freezer) -> Result<FreezeOutcome, FreezeError> {
        freezer.freeze_with(|_, _| async { Ok(Watchdog::inert()) }).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_freeze_is_in_the_journal_until_it_is_thawed() {
        let agent = ScriptedAgent::start(|_, _| None);
        let (_dir, mut freezer, journal) = freezer(&agent, FreezeMode::Require);
        assert_eq!(freeze(&mut freezer).await.unwrap(), FreezeOutcome::Frozen { filesystems: 3 });
        assert!(agent.is_frozen());
        assert_eq!(journal.leftover(), [Step::Frozen]);
        sleep(Duration::from_millis(700)).await;
        let report = freezer.thaw().await.unwrap();
        assert!(
            report.frozen_for >= Duration::from_millis(700) && report.frozen_for < Duration::from_secs(2),
            "{report:?}"
        );
        assert_eq!(report.note, None);
        assert!(!agent.is_frozen());
        assert_eq!(journal.leftover(), []);
        assert_eq!(freezer.thaw().await.unwrap(), ThawReport::default());
        assert_eq!(agent.seen().iter().filter(|c| *c == "guest-fsfreeze-thaw").count(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn without_an_agent_that_answers_nothing_is_touched() {
        let agent = ScriptedAgent::start(|name, _| (name == "guest-ping").then_some(Reply::HangUp));
        for (mode, socket, fails) in [
            (FreezeMode::Auto, Some(agent.socket.clone()), false),
            (FreezeMode::Auto, Some(PathBuf::from("/nonexistent/qga")), false),
            (FreezeMode::Auto, None, false),
            (FreezeMode::Off, Some(agent.socket.clone()), false),
            (FreezeMode::Require, None, true),
            (FreezeMode::Require, Some(agent.socket.clone()), true),
        ] {
            let (_dir, mut freezer, journal) = freezer(&agent, mode);
            freezer.agent = socket.map(Agent::new);
            match freeze(&mut freezer).await {
                Ok(FreezeOutcome::NotPossible(_)) => assert!(!fails),
                Err(FreezeError::Required { .. }) => assert!(fails),
                other => panic!("{other:?}"),
            }
            assert_eq!(freezer.thaw().await.unwrap(), ThawReport::default());
            assert_eq!(journal.leftover(), []);
        }
        assert!(agent.seen().iter().all(|c| c == "guest-ping"));
    }

    #[tokio::test(start_paused = true)]
    async fn what_somebody_else_froze_is_not_thawed() {
        let agent = ScriptedAgent::start(|_, _| None);
        *agent.frozen.lock().unwrap() = true;
        let (_dir, mut freezer, journal) = freezer(&agent, FreezeMode::Auto);
        assert!(matches!(freeze(&mut freezer).await, Ok(FreezeOutcome::AlreadyFrozen(_))));
        freezer.thaw().await.unwrap();
        assert!(agent.is_frozen());
        assert_eq!(journal.leftover(), []);
        freezer.mode = FreezeMode::Require;
        assert!(matches!(freeze(&mut freezer).await, Err(FreezeError::Required { .. })));
        assert!(agent.is_frozen());
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_lost_answer_the_status_decides() {
        for reply in [Reply::Late(LIMIT + Duration::from_secs(4), json!(3)), Reply::HangUp, Reply::Line("?")] {
            let agent = ScriptedAgent::start(move |name, _| (name == "guest-fsfreeze-freeze").then(|| reply.clone()));
            let (_dir, mut freezer, journal) = freezer(&agent, FreezeMode::Auto);
            assert!(matches!(freeze(&mut freezer).await, Ok(FreezeOutcome::Frozen { .. })));
            assert!(agent.is_frozen());
            freezer.thaw().await.unwrap();
            assert!(!agent.is_frozen());
            assert_eq!(journal.leftover(), []);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_freeze_that_hangs_is_thawed_as_soon_as_it_is_over() {
        let late = Duration::from_mins(1);
        let agent =
            ScriptedAgent::start(move |name, _| (name == "guest-fsfreeze-freeze").then(|| Reply::Late(late, json!(3))));
        let (_dir, mut freezer, journal) = freezer(&agent, FreezeMode::Auto);
        let started = Instant::now();
        assert!(matches!(freeze(&mut freezer).await, Ok(FreezeOutcome::NotPossible(why)) if why.contains("no answer")));
        assert!(started.elapsed() >= late && started.elapsed() < late + Duration::from_secs(15));
        assert!(!agent.is_frozen());
        assert_eq!(journal.leftover(), []);
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_or_empty_freeze_is_undone() {
        for reply in [Reply::Error("failed to freeze /: busy"), Reply::Return(json!(0))] {
            let agent = ScriptedAgent::start(move |name, _| (name == "guest-fsfreeze-freeze").then(|| reply.clone()));
            let (_dir, mut freezer, journal) = freezer(&agent, FreezeMode::Auto);
            assert!(matches!(freeze(&mut freezer).await, Ok(FreezeOutcome::NotPossible(_))));
            assert!(!agent.is_frozen());
            assert_eq!(agent.seen().last().unwrap(), "guest-fsfreeze-thaw");
            assert_eq!(journal.leftover(), []);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_freeze_that_lapsed_is_told() {
        let windows = "couldn't hold writes: fsfreeze is limited up to 10 seconds: ";
        let agent =
            ScriptedAgent::start(move |name, _| (name == "guest-fsfreeze-thaw").then_some(Reply::Error(windows)));
        let (_dir, mut freezer, journal) = freezer(&agent, FreezeMode::Auto);
        freeze(&mut freezer).await.unwrap();
        let report = freezer.thaw().await.unwrap();
        assert!(report.note.unwrap().contains("10 seconds"));
        assert_eq!(journal.leftover(), []);
    }

    #[tokio::test(start_paused = true)]
    async fn thawing_is_repeated_and_at_last_left_to_the_watchdog_and_recovery() {
        let agent = ScriptedAgent::start(|name, nth| match (name, nth) {
            ("guest-fsfreeze-thaw", ..4) => Some(Reply::HangUp),
            _ => None,
        });
        let (_dir, mut patient, journal) = freezer(&agent, FreezeMode::Auto);
        freeze(&mut patient).await.unwrap();
        patient.thaw().await.unwrap();
        assert_eq!(journal.leftover(), []);

        let dead = ScriptedAgent::start(|name, _| (name == "guest-fsfreeze-thaw").then_some(Reply::Line("?")));
        let (_dir, mut freezer, journal) = freezer(&dead, FreezeMode::Auto);
        freeze(&mut freezer).await.unwrap();
        assert!(matches!(freezer.thaw().await, Err(FreezeError::NotThawed(_))));
        assert!(freezer.attempt.as_ref().unwrap().watchdog.is_none());
        assert_eq!(journal.leftover(), [Step::Frozen]);
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_watchdog_nothing_is_frozen() {
        let agent = ScriptedAgent::start(|_, _| None);
        let (_dir, mut freezer, journal) = freezer(&agent, FreezeMode::Auto);
        let arm = |_, _| async { Err(WatchdogError::NotReady { limit: LIMIT }) };
        assert!(
            matches!(freezer.freeze_with(arm).await, Ok(FreezeOutcome::NotPossible(why)) if why.contains("watchdog"))
        );
        assert!(!agent.seen().contains(&"guest-fsfreeze-freeze".to_owned()));
        assert_eq!(journal.leftover(), []);
    }
}
