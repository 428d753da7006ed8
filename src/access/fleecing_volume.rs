//! Fleecing images as volumes of a Proxmox storage, through `pvesm`.

use super::AccessError;
use std::{
    fs, io,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tokio::{
    process::Command,
    time::{Instant, sleep, timeout},
};

/// `pvesm` waits for storage locks of its own, for up to a minute.
const LIMIT: Duration = Duration::from_mins(2);
/// A zvol's device appears only after udev has seen it.
const DEVICE_APPEARS: Duration = Duration::from_secs(10);
/// Storage types whose volumes are files with an extension, below a directory per VM.
const OF_FILES: [&str; 6] = ["dir", "nfs", "cifs", "cephfs", "glusterfs", "btrfs"];

/// `pvesm` and a storage.
#[derive(Clone, Debug)]
pub struct Storage {
    pvesm: PathBuf,
    name: String,
}

/// What `pvesm status` tells about a storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StorageStatus {
    /// `lvmthin`, `dir`, …
    pub kind: String,
    /// Bytes that are free.
    pub available: u64,
}

impl Storage {
    /// Storage `name`, asked through the program `pvesm`.
    ///
    /// # Errors
    /// [`AccessError::Refused`] when the name cannot be a storage's.
    pub fn new(pvesm: &Path, name: &str) -> Result<Self, AccessError> {
        let valid = (2..=100).contains(&name.len())
            && name.as_bytes()[0].is_ascii_alphabetic()
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if !valid {
            return Err(AccessError::Refused { reason: format!("`{name}` is no storage id"), disk: None });
        }
        Ok(Self { pvesm: pvesm.to_owned(), name: name.to_owned() })
    }

    /// The storage of a volume id.
    ///
    /// # Errors
    /// As with [`Storage::new`].
    pub fn of_volume(pvesm: &Path, volume: &str) -> Result<Self, AccessError> {
        Self::new(pvesm, volume.split_once(':').map_or("", |(storage, _)| storage))
    }

    /// Asks for type and free space.
    ///
    /// # Errors
    /// When `pvesm` does not know the storage or it is not active.
    pub async fn status(&self) -> Result<StorageStatus, AccessError> {
        let output = self
            .run(&["status", "--storage", &self.name])
            .await
            .map_err(|source| self.error(&self.name, "found", source))?;
        let unusable = |why: &str| self.error(&self.name, "used", io::Error::other(why.to_owned()));
        let columns: Vec<&str> = output
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .find(|columns| columns.first() == Some(&self.name.as_str()))
            .ok_or_else(|| unusable("pvesm status does not list it"))?;
        // Name, type, status, total, used, available, percent; sizes in KiB.
        match columns[..] {
            [_, kind, "active", _, _, available, ..] => {
                let kib: u64 = available.parse().map_err(|_| unusable("pvesm status tells no free space"))?;
                Ok(StorageStatus { kind: kind.to_owned(), available: kib.saturating_mul(1024) })
            }
            [_, _, status, ..] => Err(unusable(&format!("it is {status}"))),
            _ => Err(unusable("pvesm status answers in another form")),
        }
    }

    /// Volume id and name that an image `label` of VM `vmid` gets: known before it is made, so that the journal can have it.
    pub fn volume(&self, status: &StorageStatus, vmid: &str, label: &str) -> (String, String) {
        if OF_FILES.contains(&status.kind.as_str()) {
            let name = format!("vm-{vmid}-{label}.raw");
            (format!("{}:{vmid}/{name}", self.name), name)
        } else {
            let name = format!("vm-{vmid}-{label}");
            (format!("{}:{name}", self.name), name)
        }
    }

    /// Allocates a raw volume of at least `size` bytes.
    ///
    /// # Errors
    /// [`AccessError::Fleecing`]; the volume may be there all the same.
    pub async fn alloc(&self, vmid: &str, name: &str, volume: &str, size: u64) -> Result<(), AccessError> {
        let kib = size.div_ceil(1024).to_string();
        let output = self
            .run(&["alloc", &self.name, vmid, name, &kib, "--format", "raw"])
            .await
            .map_err(|source| self.error(volume, "allocated", source))?;
        if output.contains(&format!("'{volume}'")) {
            Ok(())
        } else {
            let what = format!("pvesm made something else: {}", excerpt(&output));
            Err(self.error(volume, "allocated", io::Error::other(what)))
        }
    }

    /// Path of a volume on this host.
    ///
    /// # Errors
    /// [`AccessError::Fleecing`] when there is none; a storage that only QEMU's own drivers reach has none.
    pub async fn path(&self, volume: &str) -> Result<PathBuf, AccessError> {
        let output = self.run(&["path", volume]).await.map_err(|source| self.error(volume, "found", source))?;
        let path = output.trim();
        if !path.starts_with('/') {
            let what = format!("its storage offers no path but {}", excerpt(path));
            return Err(self.error(volume, "used", io::Error::other(what)));
        }
        let deadline = Instant::now() + DEVICE_APPEARS;
        while !Path::new(path).try_exists().unwrap_or(false) {
            if Instant::now() >= deadline {
                return Err(self.error(volume, "found", io::Error::other(format!("{path} does not appear"))));
            }
            sleep(Duration::from_millis(50)).await;
        }
        Ok(PathBuf::from(path))
    }

    /// Frees a volume. That it is not there is as good.
    ///
    /// # Errors
    /// [`AccessError::Fleecing`] when it is still there or nobody can tell.
    pub async fn free(&self, vmid: &str, volume: &str) -> Result<(), AccessError> {
        let Err(refused) = self.run(&["free", volume]).await else { return Ok(()) };
        match self.run(&["list", &self.name, "--vmid", vmid]).await {
            Ok(list) if !list.lines().any(|line| line.split_whitespace().next() == Some(volume)) => Ok(()),
            _ => Err(self.error(volume, "freed", refused)),
        }
    }

    async fn run(&self, arguments: &[&str]) -> io::Result<String> {
        let output = Command::from(crate::rights::command(&self.pvesm))
            .args(arguments)
            .stdin(Stdio::null())
            .env("LC_ALL", "C")
            .kill_on_drop(true)
            .output();
        let output = timeout(LIMIT, output)
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, format!("pvesm {} takes too long", arguments[0])))??;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(io::Error::other(format!("pvesm {}: {}", arguments[0], excerpt(said.trim()))));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn error(&self, image: &str, doing: &'static str, source: io::Error) -> AccessError {
        tracing::debug!(storage = self.name, image, doing, "pvesm failed");
        AccessError::Fleecing { image: image.to_owned(), disk: None, doing, source }
    }
}

/// The end of what a program said, fit for a message.
fn excerpt(text: &str) -> String {
    let start = text.char_indices().rev().nth(299).map_or(0, |(at, _)| at);
    text[start..].split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether a path is a block device.
pub fn is_block_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A `pvesm` for a directory of files: as much of the real one as is called here.
    const PVESM: &str = r#"#!/bin/sh
dir=$(dirname "$0")
echo "$*" >> "$dir/calls"
case "$1 $2" in
"status --storage")
  echo "Name             Type     Status           Total            Used       Available        %"
  case "$3" in
  local) echo "local             dir     active        98559220        46346100        47160572   47.02%" ;;
  thin)  echo "thin          lvmthin     active        98559220        46346100           10000   47.02%" ;;
  off)   echo "off               nfs   inactive               0               0               0    0.00%" ;;
  esac ;;
"alloc local") : > "$dir/$4"; truncate -s "$5K" "$dir/$4"; echo "successfully created 'local:$3/$4'" ;;
"alloc thin") echo "lvcreate: no free extents" >&2; exit 5 ;;
"path local:"*) echo "$dir/${2#*/}" ;;
"path ceph:"*) echo "rbd:pool/image:conf=/etc/ceph.conf" ;;
"free local:"*) rm "$dir/${2#*/}" || exit 2 ;;
"free thin:stuck") echo "lv is in use" >&2; exit 5 ;;
"free "*) echo "no such logical volume" >&2; exit 5 ;;
"list "*) echo "Volid Format Type Size VMID"; echo "thin:stuck raw images 1 100" ;;
esac
"#;

    fn pvesm() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pvesm");
        fs::write(&path, PVESM).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        (dir, path)
    }

    #[tokio::test]
    async fn a_volume_is_made_found_and_freed_under_the_name_known_before() {
        let (dir, pvesm) = pvesm();
        let storage = Storage::new(&pvesm, "local").unwrap();
        let status = storage.status().await.unwrap();
        assert_eq!(status, StorageStatus { kind: "dir".into(), available: 47_160_572 * 1024 });
        let (volume, name) = storage.volume(&status, "100", "fleece-0");
        assert_eq!((volume.as_str(), name.as_str()), ("local:100/vm-100-fleece-0.raw", "vm-100-fleece-0.raw"));
        storage.alloc("100", &name, &volume, 540_673).await.unwrap();
        let path = storage.path(&volume).await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 529 * 1024, "whole KiB");
        storage.free("100", &volume).await.unwrap();
        assert!(!path.exists());
        storage.free("100", &volume).await.unwrap();
        let calls = fs::read_to_string(dir.path().join("calls")).unwrap();
        assert!(calls.contains("alloc local 100 vm-100-fleece-0.raw 529 --format raw\n"), "{calls}");
    }

    #[tokio::test]
    async fn a_block_storage_names_volumes_without_directory_and_its_refusal_is_told() {
        let (_dir, pvesm) = pvesm();
        let storage = Storage::new(&pvesm, "thin").unwrap();
        let status = storage.status().await.unwrap();
        let (volume, name) = storage.volume(&status, "100", "fleece-0");
        assert_eq!(volume, "thin:vm-100-fleece-0");
        let error = storage.alloc("100", &name, &volume, 1).await.unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert_eq!(cause, "pvesm alloc: lvcreate: no free extents");
        storage.free("100", &volume).await.expect("it never came to be");
        assert!(storage.free("100", "thin:stuck").await.is_err(), "a volume that is still listed is not freed");
    }

    #[tokio::test]
    async fn storages_that_cannot_be_used_are_errors() {
        let (_dir, pvesm) = pvesm();
        assert!(Storage::new(&pvesm, "off").unwrap().status().await.is_err());
        assert!(Storage::new(&pvesm, "unknown").unwrap().status().await.is_err());
        assert!(Storage::new(&pvesm, "ceph").unwrap().path("ceph:x").await.is_err());
        for bad in ["", "a", "--help", "-x", "a b", "a/b", "a:b", "ä1"] {
            assert!(Storage::new(&pvesm, bad).is_err(), "{bad}");
        }
        assert!(Storage::new(Path::new("/nonexistent/pvesm"), "local").unwrap().status().await.is_err());
        assert!(Storage::of_volume(&pvesm, "local:100/x.raw").is_ok());
        assert!(Storage::of_volume(&pvesm, "/dev/sda").is_err());
    }
}
