//! A repository on another machine, over SFTP.

use crate::{
    fixture::{Content, Disk, Fixture, child, segment_bytes},
    sshd::Sshd,
};
use pvebackup::provider::{
    ErrorKind, Provider, SourceError,
    restic::{Password, ResticOptions, ResticProvider},
};
use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command};

fn options(port: &str, directory: &Path) -> ResticOptions {
    let mut options = ResticOptions::new("opendal:sftp", Password::File(directory.join("password")));
    let user = Command::new("id").arg("-un").output().unwrap().stdout;
    let values = [
        ("endpoint", format!("ssh://127.0.0.1:{port}")),
        ("root", directory.join("remote").display().to_string()),
        ("user", String::from_utf8(user).unwrap().trim().to_owned()),
        ("key", directory.join("user").display().to_string()),
        ("known_hosts_strategy", "strict".into()),
    ];
    options.options.extend(values.map(|(key, value)| (key.to_owned(), value.into())));
    options.cache_dir = Some(directory.join("cache"));
    options
}

/// Processes of `ssh` that use the key in this directory.
fn connections(directory: &Path) -> usize {
    let key = directory.join("user").display().to_string();
    let processes =
        fs::read_dir("/proc").unwrap().filter_map(|entry| fs::read(entry.unwrap().path().join("cmdline")).ok());
    processes.filter(|line| line.split(|b| *b == 0).any(|word| word == key.as_bytes())).count()
}

/// Names the server's directory and its port for [`ssh_child`].
const SERVER: &str = "PVEBACKUP_TEST_SSH_SERVER";

#[test]
fn a_repository_behind_ssh_works_like_a_local_one() {
    let server = match Sshd::start() {
        Ok(server) => server,
        Err(reason) => {
            eprintln!("skipped: {reason}");
            return;
        }
    };
    let directory = server.dir();
    // opendal runs `ssh`, and has no option for the file of known hosts. The user's own file is none of our business.
    let bin = directory.join("bin");
    fs::create_dir(&bin).unwrap();
    let wrapper = bin.join("ssh");
    let known = directory.join("known_hosts");
    let key = fs::read_to_string(directory.join("host.pub")).unwrap();
    fs::write(&known, format!("[127.0.0.1]:{} {key}", server.port())).unwrap();
    let script = format!("#!/bin/sh\nexec /usr/bin/ssh -o UserKnownHostsFile={} \"$@\"\n", known.display());
    fs::write(&wrapper, script).unwrap();
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o700)).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
    let place = format!("{} {}", server.port(), directory.display());
    let output = child("ssh::ssh_child").env("PATH", path).env(SERVER, place).output().unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(connections(directory), 0, "no ssh process stays behind");

    if Command::new("restic").arg("version").output().is_ok() {
        let output = Command::new("restic")
            .args(["--no-cache", "check", "--read-data", "--repo"])
            .arg(directory.join("remote"))
            .arg("--password-file")
            .arg(directory.join("password"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
#[ignore = "runs as a child of the test above, which starts the server"]
fn ssh_child() {
    let place = std::env::var(SERVER).unwrap();
    let (port, directory) = place.split_once(' ').unwrap();
    let options = options(port, Path::new(directory));
    assert_eq!(ResticProvider::open(&options).err().unwrap().kind, ErrorKind::RepositoryMissing);
    assert_eq!(connections(Path::new(directory)), 0, "an error leaves none");
    let mut f = Fixture::new();
    f.provider = ResticProvider::init(&options).unwrap();
    f.provider.job_init(f.clock).unwrap();
    let mut content: Content = (0..200).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    f.provider = ResticProvider::open(&options).unwrap();
    let base = Some(f.use_base(&first, "scsi0"));
    let disk = Disk { name: "scsi0", base, changes: vec![Ok((3, Some(segment_bytes(2, 3)))), Ok((4, None))] };
    let second = f.backup(vec![disk]).unwrap().id;
    content.insert(3, segment_bytes(2, 3));
    content.remove(&4);
    assert!(f.restored(&second, "scsi0") == content);
    assert_eq!(f.provider.list(None).unwrap().len(), 2);
    let error = vec![Err(SourceError { disk: "scsi0".into(), message: "gone".into() })];
    assert!(f.backup(vec![Disk { name: "scsi0", base: None, changes: error }]).is_err());
    assert_eq!(f.provider.list(None).unwrap().len(), 2);
    f.provider.job_cleanup().unwrap();
}
