//! The state machine of one run.

use super::Teardown;

/// What is due: one effect outside the state machine, or the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Undo what a dead run left, as the journal tells, and clear the journal.
    Recover,
    /// Look at the guest, its disks and the repository, and compare the generation record with them.
    Look,
    /// Ask the provider whether the archives that matching records name are there and complete. Only then are their bitmaps
    /// trusted.
    Confirm,
    /// Find out whatever may stand in the way, before anything is changed.
    Check,
    /// Write into the journal whose run this is.
    Begin,
    /// Set the access up: one instant for the disks' snapshots and the switch of bitmaps.
    SetUp,
    /// Copy the snapshots into the provider, until it says that the archive is durable.
    Copy,
    /// Write into the journal that the archive is durable.
    NoteStored,
    /// Write the generation record.
    Record,
    /// Tear the access down.
    TearDown(Teardown),
    /// Undo by the means of recovery what the teardown could not.
    UndoAgain,
    /// Clear the journal.
    Clear,
    /// Nothing: the run is over.
    End(End),
}

/// How a run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// The archive is committed, and nothing is left.
    Committed,
    /// The archive is committed, but the journal keeps something for recovery.
    CommittedLeft,
    /// There is no committed archive, and nothing is left, or it was reported already.
    Failed,
    /// There is no committed archive, and the journal keeps something for recovery.
    FailedLeft,
}

/// How an effect ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ended {
    /// As it should.
    Done,
    /// It failed. For [`Effect::SetUp`]: and nothing is left of it.
    Failed,
    /// Something could not be undone, and the journal keeps it.
    Left,
}

/// One run.
///
/// | due             | done            | failed                 | something left  |
/// |-----------------|-----------------|------------------------|-----------------|
/// | recover         | look            | end                    | end             |
/// | look            | confirm         | end                    |                 |
/// | confirm         | check           | end                    |                 |
/// | check           | begin           | end                    |                 |
/// | begin           | set up          | end                    |                 |
/// | set up          | copy            | clear                  | end             |
/// | copy            | note stored     | tear down, failure     |                 |
/// | note stored     | record          | tear down, failure     |                 |
/// | record          | tear down, success | tear down, failure  |                 |
/// | tear down       | clear           | success: end; failure: undo again | end  |
/// | undo again      | end             | end                    | end             |
/// | clear           | end             | end                    |                 |
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Protocol {
    due: Effect,
    recorded: bool,
}

impl Protocol {
    /// A run that finds something in the journal, or not. It holds the journal's lock.
    pub fn new(leftover: bool) -> Self {
        Self { due: if leftover { Effect::Recover } else { Effect::Look }, recorded: false }
    }

    /// What is due.
    pub fn due(&self) -> Effect {
        self.due
    }

    /// Takes note of how the effect that was due ended, and returns the next. At the end it stays there.
    #[allow(clippy::match_same_arms, reason = "in the order of the table")]
    pub fn ended(&mut self, how: Ended) -> Effect {
        self.recorded |= (self.due, how) == (Effect::Record, Ended::Done);
        self.due = match (self.due, how) {
            (Effect::Recover, Ended::Done) => Effect::Look,
            (Effect::Recover, _) | (Effect::SetUp, Ended::Left) => Effect::End(End::FailedLeft),

            (Effect::Look, Ended::Done) => Effect::Confirm,
            (Effect::Confirm, Ended::Done) => Effect::Check,
            (Effect::Check, Ended::Done) => Effect::Begin,
            (Effect::Begin, Ended::Done) => Effect::SetUp,
            (Effect::Look | Effect::Confirm | Effect::Check | Effect::Begin, _) => Effect::End(End::Failed),

            (Effect::SetUp, Ended::Done) => Effect::Copy,
            (Effect::SetUp, Ended::Failed) => Effect::Clear,

            (Effect::Copy, Ended::Done) => Effect::NoteStored,
            (Effect::NoteStored, Ended::Done) => Effect::Record,
            (Effect::Copy | Effect::NoteStored, _) => Effect::TearDown(Teardown::Failure),
            (Effect::Record, how) => Effect::TearDown(Teardown::of(how == Ended::Done)),

            (Effect::TearDown(_), Ended::Done) => Effect::Clear,
            // What an orderly failure cannot undo, recovery perhaps can: QEMU may be gone, and then nothing but files is left.
            (Effect::TearDown(Teardown::Failure), Ended::Failed) => Effect::UndoAgain,
            // After a success the bitmaps may be as they should already. The next run looks at that with a new connection.
            (Effect::TearDown(_), _) | (Effect::UndoAgain, Ended::Failed | Ended::Left) => Effect::End(self.end(true)),
            (Effect::UndoAgain, Ended::Done) => Effect::End(self.end(false)),
            (Effect::Clear, how) => Effect::End(self.end(how != Ended::Done)),
            (Effect::End(end), _) => Effect::End(end),
        };
        self.due
    }

    fn end(&self, left: bool) -> End {
        match (self.recorded, left) {
            (true, false) => End::Committed,
            (true, true) => End::CommittedLeft,
            (false, false) => End::Failed,
            (false, true) => End::FailedLeft,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn effects(leftover: bool, how: impl Fn(Effect) -> Ended) -> Vec<Effect> {
        let mut protocol = Protocol::new(leftover);
        let mut effects = vec![protocol.due()];
        while !matches!(protocol.due(), Effect::End(_)) {
            let due = protocol.due();
            effects.push(protocol.ended(how(due)));
        }
        effects
    }

    #[test]
    fn the_record_comes_between_a_durable_archive_and_a_teardown_with_success() {
        use Effect::*;
        let good = effects(true, |_| Ended::Done);
        let rest = [Look, Confirm, Check, Begin, SetUp, Copy, NoteStored, Record];
        let end = [TearDown(Teardown::Success), Clear, End(super::End::Committed)];
        assert_eq!(good[0], Recover);
        assert_eq!(good[1..], [&rest[..], &end[..]].concat());
        assert_eq!(effects(false, |_| Ended::Done), good[1..]);
    }

    #[test]
    fn only_a_written_record_lets_a_teardown_say_success() {
        for failing in [Effect::Copy, Effect::NoteStored, Effect::Record] {
            let effects = effects(false, |due| if due == failing { Ended::Failed } else { Ended::Done });
            let end = [failing, Effect::TearDown(Teardown::Failure), Effect::Clear, Effect::End(End::Failed)];
            assert!(effects.ends_with(&end), "{effects:?}");
        }
    }

    #[test]
    fn the_journal_is_cleared_only_when_nothing_is_left() {
        for how in [Ended::Failed, Ended::Left] {
            let effects = effects(false, |due| if matches!(due, Effect::TearDown(_)) { how } else { Ended::Done });
            assert_eq!(effects.last(), Some(&Effect::End(End::CommittedLeft)));
            assert!(!effects.contains(&Effect::Clear));
        }
        let left = effects(false, |due| if due == Effect::SetUp { Ended::Left } else { Ended::Done });
        assert!(left.ends_with(&[Effect::SetUp, Effect::End(End::FailedLeft)]));
        let not = effects(false, |due| if due == Effect::SetUp { Ended::Failed } else { Ended::Done });
        assert!(not.ends_with(&[Effect::SetUp, Effect::Clear, Effect::End(End::Failed)]));
    }
}
