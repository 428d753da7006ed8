//! Undoing a snapshot access of Proxmox's QEMU: what the journal says was set up, in the order that keeps the guest alive.
//!
//! A teardown while one of its bitmaps is exported ends the QEMU process; so exports go first, and nothing is torn down
//! before QEMU says that they are gone.

use super::BACKGROUND_BITMAP;
use crate::{
    access::{
        AccessError, Teardown, fleecing,
        fleecing_volume::Storage,
        graph::Graph,
        recover::{ATTEMPTS, PAUSE, qemu::remove_socket},
    },
    guest::GuestId,
    journal::{Journal, Step},
    qmp::{
        Qmp, QmpError, Session,
        command::{
            block::{BlockExportDel, BlockdevDel, NbdServerStop, QueryBlockExports},
            proxmox::BackupAccessTeardown,
        },
    },
    report::spelled_out,
};
use std::{io, path::Path, time::Duration};
use tokio::time::{Instant, sleep};

/// An export ends when its last request is answered.
const EXPORTS_GONE: Duration = if cfg!(test) { Duration::from_millis(300) } else { Duration::from_secs(30) };
const POLL: Duration = Duration::from_millis(50);

/// What undoing came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Undone {
    /// What is still there, and why. It stays in the journal.
    pub left_behind: Vec<String>,
    /// What else should be known.
    pub warnings: Vec<String>,
}

/// Notes that a step was undone. A journal that cannot be written is no reason to leave the guest as it is: what is undone
/// without a note is found gone the next time.
fn note(journal: &Journal, step: &Step) {
    if let Err(error) = journal.undone(step) {
        tracing::warn!(%error, "what was undone is not noted");
    }
}

/// Undoes the steps of a Proxmox access that are open in the journal; other steps are left alone. Idempotent. A guest that
/// is still paused or frozen has to be released before.
///
/// # Errors
/// When it cannot go on without risk to the guest, or QEMU cannot be asked. The journal keeps what is not undone.
pub async fn undo(qmp: &Qmp, journal: &Journal, guest: &GuestId, how: Teardown) -> Result<Undone, AccessError> {
    let mut undone = Undone::default();
    let steps = journal.leftover();
    let in_qemu = |step: &Step| {
        matches!(step, Step::Export { .. } | Step::NbdServer { .. } | Step::Access { .. } | Step::Node { .. })
    };
    if steps.iter().any(in_qemu) {
        let mut attempt = 1;
        let ended = loop {
            if qemu_is_gone(&steps) {
                break true;
            }
            let error = match qmp.session().await {
                Ok(mut session) => match undo_in_qemu(&mut session, journal, how, &mut undone).await {
                    Ok(()) => break false,
                    Err(error) => error,
                },
                Err(error) if nobody_listens(&error) => break true,
                Err(error) => AccessError::qmp("cannot undo the snapshot access", None)(error),
            };
            // QEMU may be about to end; else only the connection did, and every step can be taken once more.
            let hung_up = matches!(&error, AccessError::Qmp { source, .. } if source.outcome_unknown());
            if !hung_up || attempt == ATTEMPTS {
                return Err(error);
            }
            attempt += 1;
            undone.left_behind.clear();
            sleep(PAUSE).await;
        };
        if ended {
            undone.warnings.push("QEMU has ended, and the snapshot access with it".into());
            for step in journal.leftover().iter().filter(|step| in_qemu(step)) {
                if let Step::NbdServer { socket } = step {
                    // Nobody else removes the file when QEMU ends.
                    remove_socket(socket);
                }
                note(journal, step);
            }
        }
    }
    if undone.left_behind.is_empty() {
        remove_images(journal, guest, &mut undone).await?;
    }
    Ok(undone)
}

/// Whether the QEMU process that the last run began with has ended. Another one may answer in its place by now, and what is in
/// that one is not ours, although it may have the same names.
fn qemu_is_gone(steps: &[Step]) -> bool {
    let begun = steps.iter().rev().find_map(|step| match step {
        Step::Begin { qemu, .. } => Some(qemu.as_ref()),
        _ => None,
    });
    begun.flatten().is_some_and(|qemu| !qemu.lives())
}

fn nobody_listens(error: &QmpError) -> bool {
    matches!(error, QmpError::Connect { source, .. }
        if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused))
}

/// The part of [`undo`] that happens in QEMU, in the only order that does not end the process, and the guest with it: exports,
/// NBD server, access, nodes.
pub(in crate::access) async fn undo_in_qemu(
    session: &mut Session,
    journal: &Journal,
    how: Teardown,
    undone: &mut Undone,
) -> Result<(), AccessError> {
    let steps = journal.leftover();
    remove_exports(session, journal, &steps).await?;
    stop_server(session, journal, &steps, undone).await?;
    tear_down(session, journal, &steps, how, undone).await?;
    // The newest first: fleecing nodes, then TPM state that was attached before them.
    for step in steps.iter().rev() {
        let Step::Node { name } = step else { continue };
        match session.execute(&BlockdevDel { node_name: name.clone() }).await {
            Ok(_) => note(journal, step),
            Err(QmpError::Refused { desc, .. }) if desc.contains("Failed to find node") => note(journal, step),
            Err(QmpError::Refused { desc, .. }) => undone.left_behind.push(format!("node `{name}`: {desc}")),
            Err(error) => return Err(AccessError::qmp("cannot remove a node", None)(error)),
        }
    }
    Ok(())
}

async fn remove_exports(session: &mut Session, journal: &Journal, steps: &[Step]) -> Result<(), AccessError> {
    let ids: Vec<&str> =
        steps.iter().filter_map(|step| if let Step::Export { id } = step { Some(id.as_str()) } else { None }).collect();
    for id in &ids {
        match session.execute(&BlockExportDel { id: (*id).to_owned(), mode: "hard" }).await {
            // Not there, or already on its way out.
            Ok(_) | Err(QmpError::Refused { .. }) => {}
            Err(error) => return Err(AccessError::qmp("cannot remove an export", None)(error)),
        }
    }
    let started = Instant::now();
    loop {
        let exports = session
            .execute(&QueryBlockExports {})
            .await
            .map_err(AccessError::qmp("cannot ask whether the exports are gone", None))?;
        let Some(export) = exports.iter().find(|export| ids.contains(&export.id.as_str())) else { break };
        if started.elapsed() >= EXPORTS_GONE {
            return Err(AccessError::Stuck { what: format!("export `{}`", export.id), waited: started.elapsed() });
        }
        sleep(POLL).await;
    }
    for step in steps.iter().filter(|step| matches!(step, Step::Export { .. })) {
        note(journal, step);
    }
    Ok(())
}

async fn stop_server(
    session: &mut Session,
    journal: &Journal,
    steps: &[Step],
    undone: &mut Undone,
) -> Result<(), AccessError> {
    for step in steps {
        let Step::NbdServer { socket } = step else { continue };
        // When nobody listens on our socket, the server that may be running is not ours: ours never came up, or ended.
        if listens(session.peer_pid(), socket) {
            let exports = session
                .execute(&QueryBlockExports {})
                .await
                .map_err(AccessError::qmp("cannot ask for exports of others", None))?;
            if let Some(export) = exports.iter().find(|e| e.kind == "nbd") {
                // Stopping the server would end the exports of others too.
                undone.left_behind.push(format!("NBD server at {}: export `{}` is on it", socket.display(), export.id));
                continue;
            }
            match session.execute(&NbdServerStop {}).await {
                Ok(_) => {}
                Err(QmpError::Refused { desc, .. }) if desc.contains("not running") => {}
                Err(QmpError::Refused { desc, .. }) => {
                    undone.left_behind.push(format!("NBD server at {}: {desc}", socket.display()));
                    continue;
                }
                Err(error) => return Err(AccessError::qmp("cannot stop the NBD server", None)(error)),
            }
        }
        remove_socket(socket);
        note(journal, step);
    }
    Ok(())
}

/// Whether anybody listens on a unix socket, seen from here or from QEMU's network namespace.
fn listens(qemu: Option<i32>, socket: &Path) -> bool {
    let ours = procfs::net::unix().unwrap_or_default();
    let process = qemu.and_then(|pid| procfs::process::Process::new(pid).ok());
    let theirs = process.and_then(|process| process.unix().ok()).unwrap_or_default();
    ours.into_iter().chain(theirs).any(|entry| entry.path.as_deref() == Some(socket))
}

async fn tear_down(
    session: &mut Session,
    journal: &Journal,
    steps: &[Step],
    how: Teardown,
    undone: &mut Undone,
) -> Result<(), AccessError> {
    for step in steps {
        let Step::Access { target_id } = step else { continue };
        let fleecing: Vec<&str> =
            steps.iter().filter_map(|s| if let Step::Node { name } = s { Some(name.as_str()) } else { None }).collect();
        match obstacle(session, target_id, &fleecing).await? {
            Obstacle::None => {}
            Obstacle::InUse(what) => return Err(AccessError::Stuck { what, waited: Duration::ZERO }),
            Obstacle::Stays(what) => {
                undone.left_behind.push(what);
                continue;
            }
        }
        let command = BackupAccessTeardown { target_id: target_id.clone(), success: how == Teardown::Success };
        match session.execute(&command).await {
            Ok(_) => {}
            // Another QEMU than the one that set it up.
            Err(error) if error.is_command_not_found() => {}
            // Somebody else's backup came after, so ours is over.
            Err(QmpError::Refused { desc, .. }) if desc.contains("cannot teardown backup access") => {
                undone.warnings.push(format!("the snapshot access was over before it was torn down: {desc}"));
            }
            Err(error) => return Err(AccessError::qmp("cannot tear the snapshot access down", None)(error)),
        }
        note(journal, step);
    }
    Ok(())
}

enum Obstacle {
    None,
    /// May go away.
    InUse(String),
    /// Stays until QEMU ends.
    Stays(String),
}

/// What would make a teardown end the QEMU process.
async fn obstacle(session: &mut Session, target: &str, fleecing: &[&str]) -> Result<Obstacle, AccessError> {
    let graph = Graph::read(session).await.map_err(AccessError::qmp("cannot read the block graph", None))?;
    for node in &graph.nodes {
        let name = node.node_name.as_deref().unwrap_or_default();
        if graph.bitmaps(name).any(|(bitmap, state)| bitmap == target && state.busy) {
            return Ok(Obstacle::InUse(format!("an export of bitmap `{target}` on node `{name}`")));
        }
        if node.drv == "snapshot-access"
            && let Some(export) = graph.exports.iter().find(|export| export.node_name == name)
        {
            return Ok(Obstacle::InUse(format!("export `{}` of node `{name}`", export.id)));
        }
    }
    for node in graph.nodes.iter().filter(|n| n.drv == "copy-before-write") {
        let filter = node.node_name.as_deref().unwrap_or_default();
        let ours = graph.child(filter, "target").is_some_and(|target| fleecing.contains(&target));
        // TPM state has nothing above its filter to begin with.
        let tpm = graph.child(filter, "file").is_some_and(|file| fleecing.contains(&file));
        // What is above the filter although no device uses it: the snapshot, and the throttle node of a device that is gone.
        let idle = |name: &str| {
            graph
                .node(name)
                .is_some_and(|n| n.drv == "snapshot-access" || (n.drv == "throttle" && graph.users(name).is_empty()))
        };
        if ours && !tpm && graph.users(filter).iter().all(|user| user.kind == "block-driver" && idle(user.name)) {
            let disk = graph.child(filter, "target").unwrap_or(filter);
            return Ok(Obstacle::Stays(format!(
                "the snapshot access: the disk of `{disk}` was unplugged, and tearing down now would end the QEMU process; it \
                 goes when the VM is stopped"
            )));
        }
        let carrier = graph.child(filter, "file").filter(|file| graph.bitmap(file, BACKGROUND_BITMAP).is_some());
        if let Some(carrier) = carrier.filter(|node| ours && graph.bitmap(node, target).is_none()) {
            return Ok(Obstacle::Stays(format!(
                "the snapshot access: somebody removed bitmap `{target}` of node `{carrier}`, and tearing down now would end the \
                 QEMU process; it goes when the VM is stopped"
            )));
        }
    }
    Ok(Obstacle::None)
}

async fn remove_images(journal: &Journal, guest: &GuestId, undone: &mut Undone) -> Result<(), AccessError> {
    for step in journal.leftover() {
        let removed = match &step {
            Step::FleecingFile { path } => fleecing::remove(path).await.map_err(|e| format!("{}: {e}", path.display())),
            Step::FleecingVolume { volume, pvesm } => match Storage::of_volume(pvesm, volume) {
                Ok(storage) => storage.free(guest.as_str(), volume).await.map_err(|e| spelled_out(&e)),
                Err(error) => Err(error.to_string()),
            },
            _ => continue,
        };
        match removed {
            Ok(()) => note(journal, &step),
            Err(why) => undone.left_behind.push(format!("fleecing image {why}")),
        }
    }
    Ok(())
}
