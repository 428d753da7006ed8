//! Fleecing images in a directory: where old blocks go while the guest overwrites them.

use super::{AccessError, FleecingFormat};
use crate::qmp::command::block::{BlockdevAdd, Cache, Driver, NodeRef};
use nix::sys::statvfs::statvfs;
use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt, fchown},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tokio::{process::Command, task::spawn_blocking, time::timeout};

/// How long a directory may take to make or remove an image. A store that is slower than that would break every snapshot.
const LIMIT: Duration = Duration::from_mins(1);
/// Inodes that must be free beyond those of the images.
const SPARE_INODES: u64 = 16;

/// User and group of the QEMU process, which has to open what we make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

impl Owner {
    /// The effective user and group of process `pid`; `None` when they cannot be read.
    pub fn of(pid: i32) -> Option<Self> {
        let status = procfs::process::Process::new(pid).ok()?.status().ok()?;
        Some(Self { uid: status.euid, gid: status.egid })
    }

    /// Gives a file or directory to QEMU if it is somebody else than we and we may.
    pub(super) fn adopt(owner: Option<Self>, file: &fs::File) -> io::Result<()> {
        match owner {
            Some(owner) if nix::unistd::geteuid().is_root() && owner.uid != 0 => {
                fchown(file, Some(owner.uid), Some(owner.gid))
            }
            _ => Ok(()),
        }
    }
}

/// Free space below which nothing is begun, and below which the user is warned, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Floor {
    /// Refuse below this, or below the disks' size if that is less.
    pub refuse: u64,
    /// Warn below this, or below the disks' size if that is less.
    pub warn: u64,
}

impl Floor {
    /// 256 MiB at least; a warning below a twentieth of the disks, at least 4 GiB and at most 32 GiB.
    pub fn of(disks: u64) -> Self {
        Self { refuse: disks.min(256 << 20), warn: disks.min((disks / 20).clamp(4 << 30, 32 << 30)) }
    }
}

/// What a file system has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Room {
    bytes: u64,
    /// `None` where the file system does not count them.
    inodes: Option<u64>,
}

impl Room {
    fn judge(self, place: &Path, floor: Floor, images: usize) -> Result<Option<String>, AccessError> {
        let short = |available, needed, unit| AccessError::NoSpace {
            place: place.display().to_string(),
            available,
            needed,
            unit,
        };
        if self.bytes < floor.refuse {
            return Err(short(self.bytes, floor.refuse, "bytes"));
        }
        let needed = images as u64 + SPARE_INODES;
        if let Some(inodes) = self.inodes.filter(|free| *free < needed) {
            return Err(short(inodes, needed, "inodes"));
        }
        Ok((self.bytes < floor.warn).then(|| {
            format!(
                "only {} MiB are free for fleecing images in {}: if the guest writes more than that, the backup breaks",
                self.bytes >> 20,
                place.display()
            )
        }))
    }
}

/// How a fleecing image was when QEMU opened it. Old blocks that were in it would read as zeroes once somebody has cut it, and
/// QEMU would not notice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Witness {
    path: PathBuf,
    device: u64,
    inode: u64,
    length: u64,
}

impl Witness {
    /// Of the file at `path`; `None` for what is no file, which cannot be cut.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub fn of(path: &Path) -> io::Result<Option<Self>> {
        let now = fs::metadata(path)?;
        let witness = Self { path: path.to_owned(), device: now.dev(), inode: now.ino(), length: now.len() };
        Ok(now.is_file().then_some(witness))
    }

    /// Bytes that the image takes up now.
    pub fn bytes(&self) -> u64 {
        fs::symlink_metadata(&self.path).map_or(0, |meta| meta.blocks().saturating_mul(512))
    }

    /// What became of the image, when it is not the one that it was: for people.
    pub fn harm(&self) -> Option<String> {
        let image = self.path.display();
        match fs::metadata(&self.path) {
            Err(error) => Some(format!("fleecing image {image} is gone ({error})")),
            Ok(now) if (now.dev(), now.ino()) != (self.device, self.inode) => {
                Some(format!("fleecing image {image} was replaced"))
            }
            Ok(now) if now.len() < self.length => {
                Some(format!("fleecing image {image} was cut from {} to {} bytes", self.length, now.len()))
            }
            Ok(_) => None,
        }
    }
}

/// Bytes behind the disk's end in a raw image. Nobody writes there, so an image that was cut stays shorter than it was, however
/// much QEMU puts into it afterwards.
const TAIL: u64 = 4096;

/// The fleecing images of a run.
#[derive(Debug)]
pub struct FleecingImages {
    directory: PathBuf,
    format: FleecingFormat,
    witnesses: Vec<Option<Witness>>,
}

impl FleecingImages {
    /// Images to be made in `directory`, which must exist. QEMU and `qemu-img` get absolute paths.
    ///
    /// # Errors
    /// When the directory is not there.
    pub fn new(directory: &Path, format: FleecingFormat) -> Result<Self, AccessError> {
        let fleecing = |source| AccessError::Fleecing {
            image: directory.display().to_string(),
            disk: None,
            doing: "made in this directory",
            source,
        };
        let directory = directory.canonicalize().map_err(fleecing)?;
        if !directory.is_dir() {
            return Err(fleecing(io::Error::from(io::ErrorKind::NotADirectory)));
        }
        if directory.to_str().is_none() {
            return Err(fleecing(io::Error::new(io::ErrorKind::InvalidInput, "the path is not UTF-8")));
        }
        Ok(Self { directory, format, witnesses: Vec::new() })
    }

    /// Whether `images` images have room. Returns a warning when there is little.
    ///
    /// # Errors
    /// [`AccessError::NoSpace`] below the floor.
    pub fn check_room(&self, floor: Floor, images: usize) -> Result<Option<String>, AccessError> {
        let space = statvfs(&self.directory).map_err(|errno| AccessError::Fleecing {
            image: self.directory.display().to_string(),
            disk: None,
            doing: "given any room: the file system does not answer",
            source: errno.into(),
        })?;
        let room = Room {
            bytes: space.blocks_available().saturating_mul(space.fragment_size()),
            inodes: (space.files() > 0).then(|| space.files_available()),
        };
        room.judge(&self.directory, floor, images)
    }

    /// Path of an image that is about to be made.
    pub fn path(&self, name: &str) -> PathBuf {
        let extension = match self.format {
            FleecingFormat::Raw => "raw",
            FleecingFormat::Qcow2 => "qcow2",
        };
        self.directory.join(format!("{name}.{extension}"))
    }

    /// Makes an image for `size` bytes of `disk`. Never opens a file that is there already.
    ///
    /// # Errors
    /// [`AccessError::Fleecing`]; a file that was begun is removed again.
    pub async fn create(
        &mut self,
        path: &Path,
        disk: &str,
        size: u64,
        owner: Option<Owner>,
    ) -> Result<(), AccessError> {
        let fleecing = |source| AccessError::Fleecing {
            image: path.display().to_string(),
            disk: Some(disk.to_owned()),
            doing: "created",
            source,
        };
        let format = self.format;
        let target = path.to_owned();
        let made = move || -> io::Result<fs::File> {
            let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&target)?;
            let sized = if format == FleecingFormat::Raw { file.set_len(size.saturating_add(TAIL)) } else { Ok(()) };
            match sized.and_then(|()| Owner::adopt(owner, &file)) {
                Ok(()) => Ok(file),
                Err(error) => {
                    // A file that nobody will ever use; the error that is told is the first one.
                    let _ = fs::remove_file(&target);
                    Err(error)
                }
            }
        };
        within(spawn_blocking(made)).await.map_err(fleecing)?;
        if self.format == FleecingFormat::Qcow2
            && let Err(error) = format_qcow2(path, size).await
        {
            let _ = fs::remove_file(path);
            return Err(fleecing(error));
        }
        self.witnesses.push(Witness::of(path).map_err(fleecing)?);
        Ok(())
    }

    /// The images as they were made, in that order.
    pub fn witnesses(&self) -> &[Option<Witness>] {
        &self.witnesses
    }

    /// The node of exactly `size` bytes that writes to an image.
    pub fn node(&self, name: &str, path: &Path, size: u64) -> BlockdevAdd {
        let file = BlockdevAdd {
            node_name: None,
            discard: None,
            read_only: None,
            cache: None,
            driver: Driver::File { filename: path.to_owned() },
        };
        let file = NodeRef::Inline(Box::new(file));
        let driver = match self.format {
            FleecingFormat::Raw => Driver::Raw { file, size: Some(size) },
            FleecingFormat::Qcow2 => Driver::Qcow2 { file },
        };
        let mut node = BlockdevAdd::new(name, driver).unmap();
        // Nobody reads the image after a crash, so `stop` need not wait for its flush.
        node.cache = Some(Cache { direct: false, no_flush: true });
        node
    }

    /// Bytes that the images take up now.
    pub fn bytes(&self) -> u64 {
        self.witnesses.iter().flatten().map(Witness::bytes).sum()
    }
}

/// Removes an image; one that is gone already is no error.
pub async fn remove(path: &Path) -> io::Result<()> {
    let path = path.to_owned();
    let removed = spawn_blocking(move || match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    });
    within(removed).await
}

/// Waits for file work, but not for ever: a store that hangs does so in the kernel.
async fn within<T>(work: tokio::task::JoinHandle<io::Result<T>>) -> io::Result<T> {
    timeout(LIMIT, work).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?.map_err(io::Error::other)?
}

async fn format_qcow2(path: &Path, size: u64) -> io::Result<()> {
    let mut command = Command::from(crate::rights::command("qemu-img"));
    // TRIMs are aligned to 64 KiB, so the clusters must not be larger.
    command.args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=65536"]).arg(path).arg(size.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let output = timeout(LIMIT, command.output()).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    if output.status.success() {
        return Ok(());
    }
    let text =
        String::from_utf8_lossy(&output.stderr[..output.stderr.len().min(500)]).trim().escape_debug().to_string();
    Err(io::Error::other(format!("qemu-img ends with {}: {text}", output.status)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn a_raw_image_is_sparse_private_and_never_replaces_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut images = FleecingImages::new(dir.path(), FleecingFormat::Raw).unwrap();
        let path = images.path("pvb-x-fl0");
        images.create(&path, "scsi0", 64 << 20, None).await.unwrap();
        let meta = fs::metadata(&path).unwrap();
        assert_eq!((meta.len(), meta.blocks(), meta.permissions().mode() & 0o777), ((64 << 20) + TAIL, 0, 0o600));
        assert_eq!(images.bytes(), 0);
        fs::write(&path, vec![1; 8192]).unwrap();
        assert_eq!(images.bytes(), 8192);

        let again = images.create(&path, "scsi0", 64 << 20, None).await.unwrap_err();
        assert!(
            matches!(again, AccessError::Fleecing { ref source, .. } if source.kind() == io::ErrorKind::AlreadyExists)
        );
        assert_eq!(fs::metadata(&path).unwrap().len(), 8192);

        remove(&path).await.unwrap();
        remove(&path).await.unwrap();
        assert_eq!(images.bytes(), 0);
    }

    #[tokio::test]
    async fn an_image_that_was_cut_or_replaced_shows_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut images = FleecingImages::new(dir.path(), FleecingFormat::Raw).unwrap();
        let path = images.path("x");
        images.create(&path, "d", 8192, None).await.unwrap();
        let witness = images.witnesses()[0].clone().unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        let write = |offset| std::os::unix::fs::FileExt::write_all_at(&file, &[1; 4096], offset).unwrap();
        write(4096);
        assert_eq!(witness.harm(), None);
        // Filling it to the disk's end does not hide it.
        file.set_len(0).unwrap();
        write(4096);
        assert!(witness.harm().unwrap().contains("was cut from 12288 to 8192 bytes"));
        fs::rename(&path, dir.path().join("aside")).unwrap();
        assert!(witness.harm().unwrap().contains("is gone"));
        fs::write(&path, [0; 12288]).unwrap();
        assert!(witness.harm().unwrap().contains("was replaced"));
        assert_eq!(Witness::of(Path::new("/dev/null")).unwrap(), None);
    }

    #[tokio::test]
    async fn a_link_in_the_place_of_the_image_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let mut images = FleecingImages::new(dir.path(), FleecingFormat::Raw).unwrap();
        let path = images.path("x");
        std::os::unix::fs::symlink(dir.path().join("victim"), &path).unwrap();
        assert!(images.create(&path, "d", 4096, None).await.is_err());
        assert!(!dir.path().join("victim").exists());
    }

    #[tokio::test]
    async fn a_qcow2_image_has_exactly_the_size_of_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let mut images = FleecingImages::new(dir.path(), FleecingFormat::Qcow2).unwrap();
        let path = images.path("x");
        images.create(&path, "d", 540_672, None).await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let info = std::process::Command::new("qemu-img").args(["info", "--output=json"]).arg(&path).output().unwrap();
        let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
        assert_eq!((&info["virtual-size"], &info["cluster-size"]), (&540_672.into(), &65536.into()));
    }

    #[test]
    fn too_little_room_is_refused_and_little_room_is_told() {
        let place = Path::new("/fleecing");
        let floor = Floor::of(100 << 30);
        assert_eq!(floor, Floor { refuse: 256 << 20, warn: 5 << 30 });
        assert_eq!(Floor::of(64 << 20), Floor { refuse: 64 << 20, warn: 64 << 20 });
        let judge = |bytes, inodes| Room { bytes, inodes }.judge(place, floor, 2);
        assert!(matches!(judge(255 << 20, None), Err(AccessError::NoSpace { unit: "bytes", .. })));
        assert!(matches!(judge(1 << 40, Some(3)), Err(AccessError::NoSpace { unit: "inodes", needed: 18, .. })));
        assert!(judge(1 << 30, None).unwrap().unwrap().contains("only 1024 MiB"));
        assert_eq!(judge(6 << 30, Some(18)).unwrap(), None);
    }

    #[test]
    fn the_directory_must_be_one() {
        assert!(FleecingImages::new(Path::new("/no/such/directory"), FleecingFormat::Raw).is_err());
        assert!(FleecingImages::new(Path::new("/proc/version"), FleecingFormat::Raw).is_err());
    }
}
