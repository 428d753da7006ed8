//! A repository on another machine: borg on both sides of SSH.

use crate::fixture::{Change, Content, Disk, Fixture, options, possible, segment_bytes};
use pvebackup::provider::{
    ErrorKind, Provider,
    borg::{BorgOptions, BorgProvider},
};
use std::{fs, path::Path, process::Command, sync::atomic::Ordering};
use tempfile::TempDir;

/// A real SSH server on the loopback, for one user key, in a temporary directory.
struct Sshd {
    dir: TempDir,
    child: std::process::Child,
    port: u16,
}

impl Sshd {
    fn start() -> Result<Self, String> {
        let program = "/usr/sbin/sshd";
        for needed in [program, "/usr/bin/ssh", "/usr/bin/ssh-keygen"] {
            if !Path::new(needed).exists() {
                return Err(format!("{needed} is not installed"));
            }
        }
        // Its privilege separation directory exists only where the service has run before.
        if fs::create_dir_all("/run/sshd").is_err() {
            return Err("/run/sshd cannot be created".into());
        }
        let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
        let path = |name: &str| dir.path().join(name);
        for name in ["host", "user"] {
            let made =
                Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(path(name)).status();
            if !made.is_ok_and(|s| s.success()) {
                return Err("ssh-keygen failed".into());
            }
        }
        fs::copy(path("user.pub"), path("authorized")).map_err(|e| e.to_string())?;
        let port =
            std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).map_err(|e| e.to_string())?.port();
        let config = format!(
            "ListenAddress 127.0.0.1\nHostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nUsePAM no\nPidFile none\n\
             PasswordAuthentication no\nPermitRootLogin prohibit-password\n",
            path("host").display(),
            path("authorized").display()
        );
        fs::write(path("config"), config).map_err(|e| e.to_string())?;
        let child = Command::new(program)
            .args(["-D", "-e", "-p", &port.to_string(), "-f"])
            .arg(path("config"))
            .stderr(fs::File::create(path("log")).map_err(|e| e.to_string())?)
            .spawn()
            .map_err(|e| e.to_string())?;
        let server = Self { dir, child, port };
        for _ in 0..100 {
            if std::net::TcpStream::connect(("127.0.0.1", port)).is_ok() {
                return Ok(server);
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        Err(format!("sshd does not answer: {}", fs::read_to_string(server.dir.path().join("log")).unwrap_or_default()))
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Sshd {
    /// A server whose host key is trusted, and options for a repository behind it.
    fn with_options() -> Option<(Self, TempDir, BorgOptions)> {
        if !possible() {
            return None;
        }
        let server = match Self::start() {
            Ok(server) => server,
            Err(reason) => {
                eprintln!("skipped: {reason}");
                return None;
            }
        };
        let path = |name: &str| server.dir.path().join(name);
        server.trust("host.pub");
        let dir = tempfile::tempdir().unwrap();
        let mut options = options(dir.path());
        let user = String::from_utf8(Command::new("id").arg("-un").output().unwrap().stdout).unwrap();
        let repository = dir.path().join("repository").display().to_string();
        options.repository = format!("ssh://{}@127.0.0.1:{}{repository}", user.trim(), server.port);
        options.ssh_key = Some(path("user"));
        options.known_hosts = Some(path("known hosts"));
        options.remote_path = std::env::var("PVEBACKUP_TEST_BORG").ok();
        Some((server, dir, options))
    }

    /// Makes the public key in `file` the one that is known of the server.
    fn trust(&self, file: &str) {
        let key = fs::read_to_string(self.dir.path().join(file)).unwrap();
        fs::write(self.dir.path().join("known hosts"), format!("[127.0.0.1]:{} {key}", self.port)).unwrap();
    }

    /// Processes of the server: one for every session, and what it runs.
    fn sessions(server: u32) -> Vec<u32> {
        let children = |pid: u32| {
            let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
            list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>()
        };
        let mut all = children(server);
        let mut at = 0;
        while at < all.len() {
            all.extend(children(all[at]));
            at += 1;
        }
        all
    }
}

#[test]
fn a_repository_behind_ssh_works_like_a_local_one() {
    let Some((server, dir, options)) = Sshd::with_options() else { return };
    let mut stranger = options.clone();
    stranger.known_hosts = Some(server.dir.path().join("nobody"));
    let stranger = BorgProvider::open(stranger).unwrap().repository_id().unwrap_err();
    // borg does not always wait for what ssh has to say.
    assert!(stranger.kind == ErrorKind::Credentials || stranger.message.contains("Connection closed"), "{stranger}");
    let missing = BorgProvider::open(options.clone()).unwrap().repository_id().unwrap_err();
    assert_eq!(missing.kind, ErrorKind::RepositoryMissing, "{missing}");

    let mut f = Fixture::with(dir, options);
    let mut content: Content = (0..200).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    let base = Some(f.use_base(&first, "scsi0"));
    let changes = [(3, Change::Data(segment_bytes(2, 3))), (4, Change::Zero)].into();
    let second = f.backup(vec![Disk { name: "scsi0", base, changes }]).unwrap().id;
    content.insert(3, segment_bytes(2, 3));
    content.remove(&4);
    assert!(f.restored(&second, "scsi0") == content);

    // The user's own public key stands for the key of somebody who is in the middle.
    server.trust("user.pub");
    let changed = f.provider.repository_id().unwrap_err();
    assert!(changed.kind == ErrorKind::Credentials || changed.message.contains("Connection closed"), "{changed}");
    assert!(f.backup(vec![Disk::full("scsi0", &content)]).is_err());
    server.trust("host.pub");
    assert!(f.backup(vec![Disk { name: "scsi0", base: None, changes: [(1, Change::Failure)].into() }]).is_err());
    f.assert_nothing_stored(2);
}

#[test]
fn a_connection_that_breaks_in_the_middle_leaves_no_archive() {
    let Some((server, dir, options)) = Sshd::with_options() else { return };
    let mut f = Fixture::with(dir, options);
    let content: Content = (0..600).map(|i| (i, segment_bytes(1, i))).collect();
    let pid = server.child.id();
    let broken = f.backup_while(Disk::full("scsi0", &content), move |before| {
        if before == 200 {
            let sessions = Sshd::sessions(pid);
            assert!(!sessions.is_empty(), "nobody is connected");
            for pid in sessions {
                let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
            }
        }
    });
    let error = broken.unwrap_err();
    assert!(error.message.contains("onnection") || error.message.contains("Remote"), "{error}");
    assert!(f.stored.load(Ordering::Relaxed) < 600, "it ended before everything was read");
    f.assert_nothing_stored(0);
}
