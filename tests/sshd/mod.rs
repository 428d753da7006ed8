//! A real SSH server on the loopback.

#![allow(dead_code, reason = "every integration test uses a part")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;

/// A real SSH server on the loopback, for one user key, in a temporary directory.
pub struct Sshd {
    dir: TempDir,
    child: std::process::Child,
    port: u16,
}

impl Sshd {
    /// Starts one whose host key is in the file of known hosts.
    pub fn start() -> Result<Self, String> {
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
             PasswordAuthentication no\nPermitRootLogin prohibit-password\n\
             Subsystem sftp internal-sftp\n",
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
                server.trust("host.pub");
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
    /// The server's directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A file of the server's directory: the keys `host` and `user`, `known hosts`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What is known of it.
    pub fn known_hosts(&self) -> PathBuf {
        self.file("known hosts")
    }

    /// A directory of this machine, seen through the server.
    pub fn url(&self, path: &Path) -> String {
        let user = String::from_utf8(Command::new("id").arg("-un").output().unwrap().stdout).unwrap();
        format!("ssh://{}@127.0.0.1:{}{}", user.trim(), self.port, path.display())
    }

    /// Makes the public key in `file` the one that is known of the server.
    pub fn trust(&self, file: &str) {
        let key = fs::read_to_string(self.file(file)).unwrap();
        fs::write(self.known_hosts(), format!("[127.0.0.1]:{} {key}", self.port)).unwrap();
    }

    /// The process that listens.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills every session of the server with that process, and what runs in it.
    pub fn cut_off(server: u32) {
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
        assert!(!all.is_empty(), "nobody is connected");
        for pid in all {
            let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
        }
    }
}
