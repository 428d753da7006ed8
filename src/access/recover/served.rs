//! Files that show an access by hand, and the processes that serve them.

use super::{Trouble, Undo, Work};
use crate::{
    access::AccessError,
    fuse::{FuseError, mounts},
    journal::{ProcessIdentity, Step},
};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};
use tokio::{task::spawn_blocking, time::sleep};

/// How long a server may take to end when its mount was taken away, and then when it is asked to.
const IDLE_LIMIT: Duration = Duration::from_secs(2);
const ASKED_LIMIT: Duration = Duration::from_secs(6);
const KILLED_LIMIT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(10);

/// How a mount went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gone {
    /// Nobody used it.
    Quietly,
    /// Files were open.
    InUse,
}

impl Undo<'_> {
    /// Takes mounts away, and ends the processes that serve them: whoever reads there gets an error.
    pub(super) async fn unmount(&mut self, work: &Work) -> Result<(), AccessError> {
        for step in &work.served {
            let Step::Served { path, server, log } = step else { continue };
            let outcome = take_away(path, server).await;
            if matches!(outcome, Ok(Gone::InUse)) {
                self.report.cut_off.push(path.clone());
            }
            if let (Ok(_), Some(log)) = (&outcome, log) {
                // Its server has removed it, unless it was killed.
                let _ = fs::remove_file(log);
            }
            self.settle(step, outcome.map(drop).map_err(Trouble::Left))?;
        }
        Ok(())
    }
}

/// Takes a mount away unless it is in use, and waits for its server to end.
///
/// # Errors
/// [`FuseError::Busy`]: it is in use, and stays. Others when the system does not let us.
pub async fn release(path: &Path, server: &ProcessIdentity) -> Result<(), FuseError> {
    if !server.lives() {
        return clear(path).await;
    }
    let place = path.to_owned();
    let unmounted = spawn_blocking(move || mounts::unmount(&place, mounts::Busy::Refuse)).await;
    match unmounted.unwrap_or(Err(FuseError::Busy(path.to_owned()))) {
        // It lives on when somebody took the mount away although files were open.
        Ok(()) | Err(FuseError::NotMounted(_) | FuseError::Io { .. }) => {}
        Err(error) => return Err(error),
    }
    if ends(server, IDLE_LIMIT).await { Ok(()) } else { Err(FuseError::Busy(path.to_owned())) }
}

/// As [`release`], also when the mount is in use.
async fn take_away(path: &Path, server: &ProcessIdentity) -> Result<Gone, String> {
    match release(path, server).await {
        Ok(()) => return Ok(Gone::Quietly),
        // The server knows best which mount is its own.
        Err(error) => tracing::debug!("{} stays: {error}", path.display()),
    }
    for (signal, limit) in [(Signal::SIGTERM, ASKED_LIMIT), (Signal::SIGKILL, KILLED_LIMIT)] {
        if !server.lives() {
            break;
        }
        match kill(Pid::from_raw(server.pid), signal) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(format!("process {} cannot be ended: {error}", server.pid)),
        }
        if ends(server, limit).await {
            break;
        }
    }
    if server.lives() {
        return Err(format!("process {} does not end", server.pid));
    }
    clear(path).await.map(|()| Gone::InUse).map_err(|error| error.to_string())
}

/// Removes what a server that was killed left behind.
async fn clear(path: &Path) -> Result<(), FuseError> {
    let path = path.to_owned();
    let cleared = spawn_blocking(move || match mounts::clear_dead(&path) {
        Ok(_) => Ok(()),
        // The directory is gone, and with it any mount.
        Err(FuseError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    });
    cleared.await.unwrap_or(Ok(()))
}

async fn ends(server: &ProcessIdentity, limit: Duration) -> bool {
    let start = Instant::now();
    while server.lives() {
        if start.elapsed() >= limit {
            return false;
        }
        sleep(POLL).await;
    }
    true
}
