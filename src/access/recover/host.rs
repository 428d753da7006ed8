//! What is left on the host: mounts, fleecing images and run directories.

use super::{Trouble, Undo, Work};
use crate::{
    access::{AccessError, fleecing},
    fuse::mounts,
    journal::Step,
};
use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tokio::{process::Command, time::timeout};

/// How long a storage may take to free a volume.
const FREE_LIMIT: Duration = Duration::from_mins(5);

impl Undo<'_> {
    /// Removes mounts, files, volumes and directories, except files that a node of QEMU still has open.
    pub(super) async fn on_host(&mut self, work: &Work, in_use: &[String]) -> Result<(), AccessError> {
        for step in &work.mounts {
            if let Step::Mount { path } = step {
                let outcome = remove_mount(path.clone()).await;
                self.settle(step, outcome.map_err(Trouble::Left))?;
            }
        }
        for step in &work.fleecing {
            let outcome = match step {
                Step::FleecingFile { path } if in_use.iter().any(|file| Path::new(file) == path) => {
                    Err(Trouble::Left("QEMU still has it open".into()))
                }
                Step::FleecingFile { path } => fleecing::remove(path).await.map_err(|e| Trouble::Left(e.to_string())),
                Step::FleecingVolume { .. } if !in_use.is_empty() => {
                    Err(Trouble::Left("QEMU may still have it open".into()))
                }
                Step::FleecingVolume { volume, pvesm } => free(pvesm, volume).await.map_err(Trouble::Left),
                _ => Ok(()),
            };
            self.settle(step, outcome)?;
        }
        for step in &work.directories {
            if let Step::RunDir { path } = step {
                self.settle(step, remove_run_dir(path).map_err(|e| Trouble::Left(e.to_string())))?;
            }
        }
        Ok(())
    }
}

/// Takes away what a dead run had mounted. What is mounted there now and lives, or is somebody else's, stays.
async fn remove_mount(path: PathBuf) -> Result<(), String> {
    // A directory that was never made has no mount either.
    if matches!(fs::symlink_metadata(&path), Err(error) if error.kind() == io::ErrorKind::NotFound) {
        return Ok(());
    }
    let cleared = tokio::task::spawn_blocking(move || {
        mounts::clear_dead(&path)?;
        mounts::at(&path)
    });
    match cleared.await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())? {
        Some(mount) if mount.is_ours() => Err("it is still served".into()),
        _ => Ok(()),
    }
}

/// Removes a run's directory with the sockets and files in it, and never anything deeper.
fn remove_run_dir(path: &Path) -> io::Result<()> {
    let gone = |result: io::Result<()>| match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(entries) => {
            for entry in entries {
                let entry = entry?;
                if !entry.file_type()?.is_dir() {
                    gone(fs::remove_file(entry.path()))?;
                }
            }
        }
    }
    gone(fs::remove_dir(path))
}

/// Frees a volume of a Proxmox storage; one that is gone already counts as freed.
async fn free(pvesm: &Path, volume: &str) -> Result<(), String> {
    let mut command = Command::from(crate::rights::command(pvesm));
    command.args(["free", volume]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let output = match timeout(FREE_LIMIT, command.output()).await {
        Err(_) => return Err(format!("{} does not end within {FREE_LIMIT:?}", pvesm.display())),
        Ok(Err(error)) => return Err(format!("{} cannot be run: {error}", pvesm.display())),
        Ok(Ok(output)) => output,
    };
    if output.status.success() {
        return Ok(());
    }
    let text =
        String::from_utf8_lossy(&output.stderr[..output.stderr.len().min(500)]).trim().escape_debug().to_string();
    let absent = ["does not exist", "no such", "not found", "failed to find"];
    if absent.iter().any(|words| text.to_lowercase().contains(words)) {
        tracing::debug!(volume, "volume is gone already: {text}");
        return Ok(());
    }
    Err(format!("{} free ends with {}: {text}", pvesm.display(), output.status))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn script(dir: &Path, body: &str) -> PathBuf {
        let path = dir.join("pvesm");
        fs::write(&path, format!("#!/bin/sh\necho \"$@\" > {}/args\n{body}\n", dir.display())).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[tokio::test]
    async fn a_volume_is_freed_or_gone_or_left_with_the_storages_own_words() {
        let dir = tempfile::tempdir().unwrap();
        free(&script(dir.path(), "exit 0"), "local:vm-1-fleece-0").await.unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("args")).unwrap(), "free local:vm-1-fleece-0\n");
        free(&script(dir.path(), "echo \"volume 'x' does not exist\" >&2; exit 2"), "x").await.unwrap();
        let error = free(&script(dir.path(), "echo 'storage is offline' >&2; exit 2"), "x").await.unwrap_err();
        assert!(error.contains("storage is offline"), "{error}");
        assert!(free(Path::new("/no/pvesm"), "x").await.is_err());
    }

    #[test]
    fn a_run_directory_goes_with_its_files_but_not_with_other_directories() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        fs::create_dir(&run).unwrap();
        fs::write(run.join("nbd.sock"), "").unwrap();
        remove_run_dir(&run).unwrap();
        assert!(!run.exists());
        remove_run_dir(&run).unwrap();
        fs::create_dir_all(run.join("mounted")).unwrap();
        assert!(remove_run_dir(&run).is_err());
        assert!(run.join("mounted").exists());
    }
}
