//! Removing the archives that no rule keeps.

use super::ProviderThread;
use crate::{
    archive::{ArchiveId, ArchiveName, Retention, Verdict},
    provider::{ArchiveInfo, PruneRequest, Pruned},
    report::Events,
};
use anyhow::Result;
use jiff::tz::TimeZone;
use tokio_util::sync::CancellationToken;

/// One archive under the rules.
#[derive(Clone, Debug)]
pub struct Judged {
    /// The archive.
    pub archive: ArchiveInfo,
    /// What the rules say.
    pub verdict: Verdict,
    /// What became of it, or would have; `None` if it is kept.
    pub pruned: Option<Pruned>,
}

/// Removes the archives of one guest that the rules do not keep, oldest first in the answer. Days are those of this host. `made`
/// stays whatever the rules say: after the host's clock was set back it is not the newest by its name.
///
/// # Errors
/// When the archives cannot be listed, or the repository is in use. An archive that could not be removed is no error.
pub async fn prune(
    guest: &str,
    rules: &Retention,
    provider: &mut ProviderThread,
    made: Option<&ArchiveId>,
    dry_run: bool,
    cancel: &CancellationToken,
) -> Result<Vec<Judged>> {
    let name = guest.to_owned();
    let archives = provider.run(move |p| p.list(Some(&name))).await?;
    let names: Vec<ArchiveName> = archives.iter().map(|archive| archive.name.clone()).collect();
    let verdicts = rules.judge(&names, &TimeZone::system());
    let mut judged: Vec<Judged> = archives
        .into_iter()
        .zip(verdicts)
        .map(|(archive, verdict)| Judged { archive, verdict, pruned: None })
        .collect();
    if let Some(one) = judged.iter_mut().find(|one| Some(&one.archive.id) == made)
        && one.verdict == Verdict::Remove
    {
        one.verdict = Verdict::Keep("newest");
    }
    let unwanted: Vec<&mut Judged> = judged.iter_mut().filter(|one| one.verdict == Verdict::Remove).collect();
    if unwanted.is_empty() {
        return Ok(judged);
    }
    let request = PruneRequest {
        guest: guest.to_owned(),
        remove: unwanted.iter().map(|one| one.archive.id.clone()).collect(),
        dry_run,
        cancel: cancel.clone(),
    };
    let fates = provider.run(move |p| p.prune(request)).await?;
    for (one, fate) in unwanted.into_iter().zip(fates) {
        one.pruned = Some(fate);
    }
    Ok(judged)
}

/// The same after a backup, which it cannot fail any more.
pub(super) async fn after_backup(
    guest: &str,
    rules: &Retention,
    provider: &mut ProviderThread,
    made: Option<&ArchiveId>,
    events: &Events,
    cancel: &CancellationToken,
) {
    match prune(guest, rules, provider, made, false, cancel).await {
        Ok(judged) => {
            for one in judged {
                match one.pruned {
                    None => {}
                    Some(Pruned::Removed) => events.info(format!("archive {} was removed", one.archive.name)),
                    Some(Pruned::Merged) => events
                        .info(format!("archive {} was removed; later ones took over what they need", one.archive.name)),
                    Some(Pruned::Kept(why)) => {
                        events.warn(format!("archive {} was to be removed and is kept: {why}", one.archive.name));
                    }
                }
            }
        }
        Err(error) => events.warn(format!("archives that no rule keeps could not be removed: {error:#}")),
    }
}
