//! The program killed with SIGKILL: at steps of its recovery journal, at its effects, and at random instants, on guests under
//! load. After each kill the guest must be unharmed, recovery must leave nothing, and the next archive must be right.
//!
//! A few of the cases run with the other tests; `scripts/faults` runs all of them: `PVEBACKUP_FAULTS=long` makes every step of
//! the journal a case, `PVEBACKUP_FAULTS_CASES` says how many effects and how many random instants are tried in every cell, and
//! `PVEBACKUP_FAULTS_SEED`, which is printed, is where randomness comes from.
#![cfg(feature = "restic")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

mod backups;
mod cell;
mod commands;
#[path = "../rig/mod.rs"]
mod rig;

use cell::{Cell, Provider, Then, access_name, possible};
use rig::{Kind, Tally, Verdict};

/// How much is tried.
#[derive(Clone, Copy, Debug)]
struct Scale {
    seed: u64,
    /// Random instants in every cell.
    instants: u64,
    /// Whether every step is tried, or some.
    every: bool,
}

impl Scale {
    fn of_environment() -> Self {
        let number =
            |name| std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text}")));
        let every = std::env::var("PVEBACKUP_FAULTS").is_ok_and(|value| value == "long");
        let instants = number("PVEBACKUP_FAULTS_CASES").unwrap_or(if every { 30 } else { 2 });
        let seed = number("PVEBACKUP_FAULTS_SEED").unwrap_or_else(|| u64::from(std::process::id()));
        println!("PVEBACKUP_FAULTS_SEED={seed}");
        Self { seed, instants, every }
    }

    /// Which of `count` points are tried: all, or `some`.
    fn points(&self, count: usize, some: usize) -> Vec<usize> {
        self.spread(count, if self.every { count } else { some })
    }

    /// `some` of `count` points, evenly spread from a random beginning.
    fn spread(&self, count: usize, some: usize) -> Vec<usize> {
        let some = some.min(count);
        let first = (self.seed % count as u64) as usize;
        (0..some).map(|number| 1 + (first + number * count / some) % count).collect()
    }
}

/// The cases of one class in one cell. A guest on which something went wrong is replaced by a new one.
struct Cases {
    provider: Provider,
    kind: Kind,
    scale: Scale,
    cell: Cell,
    /// Since the guest was new.
    age: u32,
    number: u32,
    failed: u32,
}

/// Cases on one guest: comparing gets slower with every operation that the rig remembers.
const OLD: u32 = 40;
/// So many failures tell enough.
const ENOUGH: u32 = 5;

impl Cases {
    fn new(provider: Provider, kind: Kind) -> Self {
        let scale = Scale::of_environment();
        let cell = Cell::new(provider, kind, scale.seed);
        Self { provider, kind, scale, cell, age: 0, number: 0, failed: 0 }
    }

    fn tally(&self, class: &str) -> Tally {
        Tally::new(class, self.provider.name(), access_name(self.kind))
    }

    /// Every other case recovers by hand.
    fn then(&mut self) -> Then {
        self.number += 1;
        if self.number.is_multiple_of(2) { Then::Backup } else { Then::Recover }
    }

    /// A case has ended.
    fn ended(&mut self, tally: &mut Tally, verdict: Verdict) {
        self.age += 1;
        tally.ended(verdict);
        let good = verdict.unharmed && verdict.clean && verdict.right;
        if !good {
            self.failed += 1;
            assert!(self.failed < ENOUGH, "{ENOUGH} cases failed");
        }
        if !good || self.age >= OLD {
            if good {
                self.finish();
            }
            self.cell = Cell::new(self.provider, self.kind, self.scale.seed.wrapping_add(u64::from(self.number)));
            self.age = 0;
        }
    }

    /// What was ever listed restores, still.
    fn finish(&mut self) {
        let most = if self.scale.every { usize::MAX } else { 6 };
        if self.age > 0 && !self.cell.all_restore(most) {
            self.failed += 1;
        }
    }

    fn all_good(mut self) {
        self.finish();
        assert_eq!(self.failed, 0, "cases failed; see above");
    }
}
