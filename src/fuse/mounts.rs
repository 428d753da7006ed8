//! What is mounted where, asked without touching a mount: a file system whose server hangs would take us with it.

use super::FuseError;
use nix::{
    errno::Errno,
    mount::{MntFlags, umount2},
    unistd::geteuid,
};
use std::{
    ffi::OsString,
    fs,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
    process::Stdio,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

/// What our mounts are called in the first column of `mount`'s output.
pub(super) const SOURCE: &str = "pvebackup";
/// The helper that mounts and unmounts for users without privileges (libfuse 3, then 2).
const HELPERS: [&str; 2] = ["fusermount3", "fusermount"];
/// It only does one system call.
const HELPER_PATIENCE: Duration = Duration::from_secs(10);
/// A living server answers at once.
const PROBE_PATIENCE: Duration = Duration::from_secs(2);
/// More dead mounts than this over each other are not our doing.
const MOST_STACKED: usize = 16;

/// A mounted file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountPoint {
    /// The kernel's number of the mount.
    pub id: u64,
    /// Device number, minor part. For FUSE it is the connection's number too.
    pub minor: u64,
    /// Where.
    pub path: PathBuf,
    /// `ext4`, `fuse`, `fuse.sshfs`, …
    pub fs_type: String,
    /// What is mounted.
    pub source: String,
}

impl MountPoint {
    /// Whether a run of this program mounted it.
    pub fn is_ours(&self) -> bool {
        (self.fs_type == "fuse" || self.fs_type.starts_with("fuse.")) && self.source == SOURCE
    }

    /// `ID PARENT MAJOR:MINOR ROOT PATH OPTIONS [TAGS…] - TYPE SOURCE OPTIONS` (`proc_pid_mountinfo(5)`).
    fn parse(line: &str) -> Option<Self> {
        let (mount, file_system) = line.split_once(" - ")?;
        let mount: Vec<&str> = mount.split(' ').collect();
        let mut file_system = file_system.split(' ');
        Some(Self {
            id: mount.first()?.parse().ok()?,
            minor: mount.get(2)?.split_once(':')?.1.parse().ok()?,
            path: unescape(mount.get(4)?),
            fs_type: file_system.next()?.to_owned(),
            source: file_system.next()?.to_owned(),
        })
    }
}

/// The kernel writes blank, tab, line feed and backslash as three octal digits.
fn unescape(text: &str) -> PathBuf {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let code = (*first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        if let Some(byte) = code {
            out.push(byte);
            rest = &tail[3..];
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    OsString::from_vec(out).into()
}

/// The path without links, though its last part may be a mount whose server is dead.
///
/// # Errors
/// [`FuseError::Io`] when it cannot be found.
pub fn absolute(path: &Path) -> Result<PathBuf, FuseError> {
    let io = |source| FuseError::io("find", path, source);
    match path.file_name() {
        // A link to a directory is followed, unless that fails.
        Some(name) => {
            let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let plain = fs::canonicalize(parent).map_err(io)?.join(name);
            if at(&plain)?.is_some() {
                return Ok(plain);
            }
            match fs::canonicalize(&plain) {
                // It is a link to a dead mount.
                Err(error) if error.raw_os_error() == Some(Errno::ENOTCONN as i32) => {
                    let target = fs::read_link(&plain).map_err(io)?;
                    absolute(&plain.with_file_name(target))
                }
                found => found.map_err(io),
            }
        }
        None => fs::canonicalize(path).map_err(io),
    }
}

/// What is mounted at `path`, which is absolute: the uppermost mount.
///
/// # Errors
/// [`FuseError::Io`] when `/proc` cannot be read.
pub fn at(path: &Path) -> Result<Option<MountPoint>, FuseError> {
    let file = Path::new("/proc/self/mountinfo");
    let list = fs::read(file).map_err(|source| FuseError::io("read", file, source))?;
    let list = String::from_utf8_lossy(&list);
    Ok(list.lines().filter_map(MountPoint::parse).rfind(|mount| mount.path == path))
}

/// What is to happen to those who still have files open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Busy {
    /// They keep the mount.
    Refuse,
    /// The mount goes away at once, and they get an error from every further read.
    Abort,
}

/// Takes away a mount of ours.
///
/// # Errors
/// [`FuseError::NotMounted`], [`FuseError::Foreign`], [`FuseError::Busy`] (only with [`Busy::Refuse`]), [`FuseError::Unmount`].
pub fn unmount(path: &Path, busy: Busy) -> Result<(), FuseError> {
    let path = absolute(path)?;
    match at(&path)? {
        None => Err(FuseError::NotMounted(path)),
        Some(mount) if !mount.is_ours() => Err(FuseError::Foreign { path, fs_type: mount.fs_type }),
        Some(mount) => detach(&mount, busy),
    }
}

/// Takes away `mount` if it is still there.
pub(super) fn detach(mount: &MountPoint, busy: Busy) -> Result<(), FuseError> {
    let path = &mount.path;
    if at(path)?.as_ref() != Some(mount) {
        return Ok(());
    }
    if busy == Busy::Abort {
        // Before the path is gone; whoever waits for an answer gets ECONNABORTED.
        abort(mount.minor);
    }
    let flags = match busy {
        Busy::Refuse => MntFlags::empty(),
        // MNT_FORCE makes FUSE abort the connection, also where /sys/fs/fuse/connections is not mounted.
        Busy::Abort => MntFlags::MNT_FORCE | MntFlags::MNT_DETACH,
    };
    match umount2(path, flags | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(Errno::EBUSY) => Err(FuseError::Busy(path.clone())),
        Err(Errno::EPERM) if !geteuid().is_root() => detach_with_helper(path, busy),
        // Somebody else was faster.
        Err(Errno::EINVAL) if at(path)?.as_ref() != Some(mount) => Ok(()),
        Err(source) => Err(FuseError::Unmount { path: path.clone(), source: source.into() }),
    }
}

/// Ends a FUSE connection: every request that waits for its server fails. It needs the control file system, which systemd mounts.
pub(super) fn abort(connection: u64) -> bool {
    fs::write(format!("/sys/fs/fuse/connections/{connection}/abort"), "1").is_ok()
}

fn detach_with_helper(path: &Path, busy: Busy) -> Result<(), FuseError> {
    for helper in HELPERS {
        let mut command = crate::rights::command(helper);
        command.arg("-u").args((busy == Busy::Abort).then_some("-z")).arg("--").arg(path);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(source) => return Err(FuseError::Unmount { path: path.to_owned(), source }),
        };
        let start = Instant::now();
        loop {
            match child.try_wait() {
                Ok(Some(status)) if status.success() => return Ok(()),
                Ok(Some(_)) if busy == Busy::Refuse => return Err(FuseError::Busy(path.to_owned())),
                Ok(Some(status)) => {
                    let source = std::io::Error::other(format!("`{helper}` ends with {status}"));
                    return Err(FuseError::Unmount { path: path.to_owned(), source });
                }
                Ok(None) if start.elapsed() < HELPER_PATIENCE => thread::sleep(Duration::from_millis(10)),
                Ok(None) | Err(_) => {
                    let _ = child.kill();
                    let _ = child.wait();
                    let source = std::io::Error::other(format!("`{helper}` does not end"));
                    return Err(FuseError::Unmount { path: path.to_owned(), source });
                }
            }
        }
    }
    Err(FuseError::NoHelper)
}

/// Takes away mounts at `path` that a run of ours left when it was killed, and tells how many there were. A mount that is
/// served, or not ours, stays.
///
/// # Errors
/// [`FuseError::Unmount`], [`FuseError::NoHelper`], [`FuseError::Io`].
pub fn clear_dead(path: &Path) -> Result<usize, FuseError> {
    let path = absolute(path)?;
    for cleared in 0..MOST_STACKED {
        match at(&path)? {
            Some(mount) if mount.is_ours() && is_dead(&path) => detach(&mount, Busy::Abort)?,
            _ => return Ok(cleared),
        }
    }
    Ok(MOST_STACKED)
}

/// Whether the uppermost mount at `path`, which is absolute, is ours and nobody serves it.
pub(super) fn is_dead_at(path: &Path) -> Result<bool, FuseError> {
    Ok(at(path)?.is_some_and(|mount| mount.is_ours()) && is_dead(path))
}

/// Whether nobody serves the mount any more. A server that does not answer lives.
fn is_dead(path: &Path) -> bool {
    let path = path.to_owned();
    let (tell, told) = mpsc::channel();
    // The thread may wait for longer than we do; it then ends with the connection.
    let probe = thread::Builder::new().name("fuse-probe".into()).spawn(move || {
        let answer = nix::sys::statfs::statfs(&path).map(drop);
        let _ = tell.send(matches!(answer, Err(Errno::ENOTCONN | Errno::ECONNABORTED)));
    });
    probe.is_ok() && told.recv_timeout(PROBE_PATIENCE).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_is_taken_apart() {
        let line = r"812 25 0:61 / /mnt/a\040b\134c rw,nosuid shared:4 master:1 - fuse pvebackup rw,user_id=0";
        let mount = MountPoint::parse(line).expect("a mount");
        assert_eq!((mount.id, mount.minor), (812, 61));
        assert_eq!(mount.path, Path::new(r"/mnt/a b\c"));
        assert!(mount.is_ours());
        let of = |text: &str| MountPoint::parse(&line.replace("- fuse pvebackup", text)).expect("a mount").is_ours();
        assert!(of("- fuse.pvebackup pvebackup"));
        assert!(!of("- fuse sshfs"));
        assert!(!of("- ext4 pvebackup"));
    }

    #[test]
    fn nonsense_is_no_mount() {
        for line in ["", "1 2 3", "1 2 0:1 / /a rw", "x 2 0:1 / /a rw - fuse a rw", "1 2 01 / /a rw - fuse a rw"] {
            assert_eq!(MountPoint::parse(line), None, "{line}");
        }
        assert_eq!(unescape(r"\04"), Path::new(r"\04"));
        assert_eq!(unescape(r"\999x"), Path::new(r"\999x"));
    }

    #[test]
    fn the_root_is_mounted_and_an_empty_directory_is_not() {
        assert!(at(Path::new("/")).expect("mountinfo").is_some());
        let dir = tempfile::tempdir().expect("directory");
        assert_eq!(at(&absolute(dir.path()).expect("path")).expect("mountinfo"), None);
        assert!(matches!(unmount(dir.path(), Busy::Abort), Err(FuseError::NotMounted(_))));
        assert!(matches!(unmount(Path::new("/proc"), Busy::Abort), Err(FuseError::Foreign { .. })));
        assert_eq!(clear_dead(Path::new("/proc")).expect("nothing to do"), 0);
    }
}
