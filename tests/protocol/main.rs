//! The commit protocol under every interleaving of runs, deaths, faults and guest writes.
//!
//! The program's state machine and bitmap rules (`pvebackup::protocol`) and its judgement over records run in a model of what
//! is around them. The model's worlds are finitely many however many runs and writes there are, so the search sees all of them.
//! That the search would find a mistake is shown by making mistakes: each mutation has a test that wants its counterexample.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod acts;
mod rules;
mod search;
mod set_up;
mod undo;
mod world;

use acts::Model;
use rules::Mutation;
use search::{Broken, Searched, search};
use world::Kind;

const KINDS: [Kind; 3] = [Kind::Transaction, Kind::MicroPause, Kind::Proxmox];

/// Searches everything, and wants more than so many worlds of it.
fn holds(model: Model, more_than: usize) {
    let Searched { states, transitions, depth, runs, archives, incremental, deaths, broken } = search(&model);
    let Model { kind, disks, targets, .. } = model;
    println!(
        "{kind:?}, {disks} disk(s), {targets} target(s): {states} states, {transitions} transitions, up to {depth} steps and {runs} \
         runs from the first; {archives} archives compared, {incremental} of them incremental; {deaths} deaths"
    );
    if let Some(Broken { trace, .. }) = broken {
        panic!("a rule is broken:\n{trace}");
    }
    assert!(states > more_than, "only {states} states: the search does not see what it should");
    assert!(runs >= 3 && incremental >= 10 && deaths > states / 4, "hardly anything happened");
}

/// One disk and one target, with every fault there is.
#[test]
fn no_interleaving_misses_a_write() {
    for (kind, more_than) in [(Kind::Transaction, 65_000), (Kind::MicroPause, 110_000), (Kind::Proxmox, 30_000)] {
        holds(Model { kind, disks: 1, targets: 1, calm: false, mutation: None }, more_than);
    }
}

/// Targets leave each other's bitmaps alone.
#[test]
fn nor_does_one_of_two_targets() {
    for (kind, more_than) in [(Kind::Transaction, 50_000), (Kind::MicroPause, 140_000), (Kind::Proxmox, 15_000)] {
        holds(Model { kind, disks: 1, targets: 2, calm: true, mutation: None }, more_than);
    }
}

/// Disks may be in different archives, or in none.
#[test]
fn nor_does_one_of_two_disks() {
    for (kind, more_than) in [(Kind::Transaction, 190_000), (Kind::Proxmox, 90_000)] {
        holds(Model { kind, disks: 2, targets: 1, calm: true, mutation: None }, more_than);
    }
}

/// The same where it takes longer: `cargo test --release --test protocol -- --ignored --nocapture`.
#[test]
#[ignore = "as long as all others together: `scripts/faults` runs it"]
fn nor_does_one_of_two_disks_with_a_micro_pause() {
    holds(Model { kind: Kind::MicroPause, disks: 2, targets: 1, calm: true, mutation: None }, 590_000);
}

/// Wants a counterexample that ends with this rule.
fn found(mutation: Mutation, kinds: &[Kind], rule: &str) {
    for kind in kinds {
        let of_two = matches!(mutation, Mutation::SuccessRemovesAll | Mutation::OneNameForTwoRecords);
        let targets = if of_two { 2 } else { 1 };
        let calm = targets > 1;
        let model = Model { kind: *kind, disks: 1, targets, calm, mutation: Some(mutation) };
        let Some(broken) = search(&model).broken else { panic!("{mutation:?} on {kind:?} is not found") };
        println!("{mutation:?} on {kind:?}, {} steps:\n{}", broken.steps, broken.trace);
        assert!(broken.rule.contains(rule), "{mutation:?} on {kind:?} is found for another reason: {}", broken.rule);
    }
}

/// A test for every mutation: it is found, on these kinds of access, for this reason.
macro_rules! mutations {
    ($($name:ident: $mutation:ident on $kinds:expr => $rule:expr;)*) => {
        $(
            #[test]
            fn $name() {
                found(Mutation::$mutation, &$kinds, $rule);
            }
        )*
    };
}

const STOCK: [Kind; 2] = [Kind::Transaction, Kind::MicroPause];
const PROXMOX: [Kind; 1] = [Kind::Proxmox];
const MISSES: &str = "an incremental misses a write";
/// What costs a full backup on stock QEMU, where a bitmap's name tells its generation, costs data on Proxmox's.
const GONE: &str = "names a bitmap that is gone";

mutations! {
    success_without_commit_on_stock: SuccessWithoutCommit on STOCK => GONE;
    success_without_commit_on_proxmox: SuccessWithoutCommit on PROXMOX => MISSES;
    the_old_bitmap_goes_at_the_instant: OldGoesAtTheInstant on STOCK => GONE;
    the_record_is_written_before_the_archive_is_durable: RecordBeforeDurable on KINDS => "never stored";
    the_teardown_comes_before_the_record_on_stock: TeardownBeforeRecord on STOCK => GONE;
    the_teardown_comes_before_the_record_on_proxmox: TeardownBeforeRecord on PROXMOX => MISSES;
    a_record_that_failed_counts_on_stock: FailedRecordCounts on STOCK => GONE;
    a_record_that_failed_counts_on_proxmox: FailedRecordCounts on PROXMOX => MISSES;
    a_bitmap_is_trusted_without_asking_the_provider: TrustUnasked on KINDS => MISSES;
    the_journal_is_cleared_before_the_teardown: ClearBeforeTeardown on KINDS => "the journal does not tell";
    the_journal_is_told_after_the_effect: NoteAfterEffect on KINDS => "the journal does not tell";
    what_a_dead_run_left_is_not_undone: NoRecovery on KINDS => "does not clean up and commit";
    bits_are_dropped_instead_of_merged: DropInsteadOfMerge on STOCK => MISSES;
    bitmaps_switch_in_two_steps: SwitchInTwoSteps on [Kind::Transaction] => MISSES;
    recovery_takes_every_run_for_committed_on_stock: RecoveryTakesAllForCommitted on STOCK => GONE;
    recovery_takes_every_run_for_committed_on_proxmox: RecoveryTakesAllForCommitted on PROXMOX => MISSES;
    recovery_takes_every_run_for_failed: RecoveryTakesAllForFailed on STOCK => GONE;
    success_removes_other_targets_bitmaps: SuccessRemovesAll on STOCK => GONE;
    two_records_explain_one_bitmap: OneNameForTwoRecords on PROXMOX => MISSES;
    the_guest_is_held_without_a_watchdog: NoWatchdog on KINDS => "left paused or frozen";
}
