//! `pvebackup prune`: remove archives that no rule keeps.

use super::{Context, Usage, exit, print};
use crate::{
    archive::{Retention, Verdict},
    backup::{self, Judged},
    provider::{ErrorKind, ProviderError, Pruned},
    report::SCHEMA,
};
use anyhow::Result;
use serde_json::json;
use std::collections::BTreeSet;

#[derive(clap::Args, Debug)]
pub(super) struct PruneArgs {
    /// Guests; all that have archives in the target if none is given
    #[arg(value_name = "GUEST")]
    guests: Vec<String>,
    /// Target [default: the configuration's, or `local`]
    #[arg(long, short, value_name = "NAME")]
    target: Option<String>,
    /// What to keep, as in vzdump [default: the target's `prune-backups`]
    #[arg(long, value_name = "RULES")]
    prune_backups: Option<Retention>,
    /// Only show what would be done
    #[arg(long)]
    dry_run: bool,
}

impl PruneArgs {
    pub(super) fn target(&self) -> Option<&str> {
        self.target.as_deref()
    }
}

pub(super) async fn run(args: PruneArgs, context: Context) -> Result<u8> {
    let (name, table) = context.config.target(args.target.as_deref(), &context.dirs.state)?;
    if let Some(how) = table.retention_elsewhere() {
        return Err(Usage(format!("pvebackup removes no archives of target `{name}`: use {how}")).into());
    }
    let rules = args.prune_backups.or_else(|| table.retention().cloned()).ok_or_else(|| {
        Usage(format!("target `{name}` has no `prune-backups`; give rules, such as --prune-backups keep-last=7"))
    })?;
    let mut provider = super::target::open(Some(&name), &context).await?;
    let guests: Vec<String> = if args.guests.is_empty() {
        let archives = provider.run(|p| p.list(None)).await?;
        let guests: BTreeSet<String> = archives.iter().map(|archive| archive.name.guest().to_owned()).collect();
        guests.into_iter().collect()
    } else {
        args.guests
    };
    let mut kept = false;
    for guest in guests {
        let judged = backup::prune(&guest, &rules, &mut provider, None, args.dry_run, context.stop.token()).await?;
        if judged.is_empty() {
            let message = format!("target `{name}` has no archives of guest `{guest}`");
            return Err(ProviderError::new(ErrorKind::NotFound, message).into());
        }
        for one in judged {
            kept |= matches!(one.pruned, Some(Pruned::Kept(_)));
            print(&if context.json { line(&one, args.dry_run) } else { text(&one, args.dry_run) });
        }
        if context.stop.token().is_cancelled() {
            return Ok(context.stop.code());
        }
    }
    Ok(if kept { exit::WARNINGS } else { exit::OK })
}

fn text(one: &Judged, dry_run: bool) -> String {
    let would = if dry_run { "would be " } else { "" };
    let fate = match (&one.verdict, &one.pruned) {
        (Verdict::Keep(rule), _) => format!("kept by {rule}"),
        (Verdict::Remove, Some(Pruned::Merged)) => {
            format!("{would}removed; later ones need it: {would}merged into them")
        }
        (Verdict::Remove, Some(Pruned::Kept(why))) => format!("no rule keeps it, but it stays: {why}"),
        (Verdict::Remove, _) => format!("{would}removed"),
    };
    format!("{}  {fate}", one.archive.name)
}

fn line(one: &Judged, dry_run: bool) -> String {
    let (rule, fate, reason) = match (&one.verdict, &one.pruned) {
        (Verdict::Keep(rule), _) => (Some(*rule), "kept", None),
        (Verdict::Remove, Some(Pruned::Merged)) => (None, "merged", None),
        (Verdict::Remove, Some(Pruned::Kept(why))) => (None, "kept", Some(why)),
        (Verdict::Remove, _) => (None, "removed", None),
    };
    let (archive, id) = (one.archive.name.to_string(), &one.archive.id);
    json!({ "schema": SCHEMA, "type": "pruned", "archive": archive, "id": id, "rule": rule, "fate": fate, "reason": reason, "dry_run": dry_run })
        .to_string()
}
