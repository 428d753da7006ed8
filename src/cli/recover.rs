//! `pvebackup recover`: undo what a run that died has left.

use super::{Context, exit, print, vm::find_guest};
use crate::{
    access::{self, by_hand::Kept},
    backup::committed,
    by_hand,
    fuse::served,
    journal::{Journal, JournalError, Step, destroyed_text},
    qmp::Qmp,
    report::{printable, spelled_out},
};
use anyhow::{Context as _, Result};
use tokio::task::spawn_blocking;

#[derive(clap::Args, Debug)]
pub(super) struct RecoverArgs {
    /// Guests; all that have a recovery journal if none is given
    #[arg(value_name = "GUEST")]
    guests: Vec<String>,
    /// Only list what is left
    #[arg(long)]
    dry_run: bool,
}

pub(super) async fn run(args: RecoverArgs, context: Context) -> Result<u8> {
    let dir = context.dirs.journals();
    let mut left = args.guests.is_empty() && archives(args.dry_run, &context).await?;
    let mut unknown = false;
    let guests = if args.guests.is_empty() {
        Journal::guests(&dir).with_context(|| format!("cannot list {}", dir.display()))?
    } else {
        args.guests
    };
    for guest in guests {
        let id: crate::guest::GuestId = guest.parse()?;
        let journal = match by_hand::open_journal(&context.dirs, &id).await {
            Err(JournalError::Busy { .. }) => {
                print(&format!("{guest}: a run is at work; nothing to recover"));
                continue;
            }
            other => other?,
        };
        let leftover = journal.leftover();
        if leftover.is_empty() && journal.destroyed() == 0 {
            print(&format!("{guest}: nothing is left"));
            continue;
        }
        if args.dry_run {
            for step in leftover.iter().rev().filter(|s| !matches!(s, Step::Begin { .. } | Step::Stored { .. })) {
                print(&format!("{guest}: would undo: {}", step.label()));
            }
            if journal.destroyed() > 0 {
                print(&format!("{guest}: {}", destroyed_text(journal.destroyed())));
            }
            left = true;
            continue;
        }
        if let Some(told) = journal.set_destroyed_aside()? {
            print(&format!("{guest}: {}", printable(&told)));
            unknown = true;
            if leftover.is_empty() {
                journal.clear()?;
                continue;
            }
        }
        let qmp = leftover.iter().find_map(|step| match step {
            Step::Begin { qmp, .. } => Some(qmp.clone()),
            _ => None,
        });
        let qmp = match qmp {
            Some(qmp) => qmp,
            None => find_guest(&guest, &context)?.qmp,
        };
        if let Some(kept) = Kept::of(&leftover) {
            print(&format!("{guest}: ending the access by hand of {}", kept.since));
        }
        let committed = committed(&context.dirs.generations(), &id, &leftover);
        let report = access::recover(&journal, &Qmp::new(qmp), committed.as_deref()).await.with_context(|| {
            format!(
                "cannot undo everything in guest `{guest}`; the journal is kept, run `pvebackup recover {guest}` again"
            )
        })?;
        for line in report.undone {
            print(&format!("{guest}: undone: {line}"));
        }
        for path in report.cut_off {
            let path = path.display().to_string();
            print(&format!("{guest}: {} was in use: its readers get errors", printable(&path)));
        }
        for line in report.left_behind {
            print(&format!("{guest}: still there: {line}"));
            left = true;
        }
    }
    Ok(match (left, unknown) {
        (true, _) => exit::LEFT_BEHIND,
        (false, true) => exit::WARNINGS,
        (false, false) => exit::OK,
    })
}

/// Clears mounts of archives whose process was killed. Whether any is left.
async fn archives(dry_run: bool, context: &Context) -> Result<bool> {
    let dir = context.dirs.mounts();
    let mut left = false;
    for dead in spawn_blocking(move || served::dead(&dir)).await?? {
        let text = dead.path.display().to_string();
        let text = printable(&text);
        if dry_run {
            print(&format!("would undo: dead mount at {text}"));
            left = true;
            continue;
        }
        match spawn_blocking(move || dead.clear()).await? {
            Ok(()) => print(&format!("undone: dead mount at {text}")),
            Err(error) => {
                print(&format!("still there: dead mount at {text}: {}", spelled_out(&error)));
                left = true;
            }
        }
    }
    Ok(left)
}
