//! Where a repository is, and how to reach it.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    time::Duration,
};

/// Where the repository's passphrase comes from. borg asks for it itself, so that it is in no argument and no environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Passphrase {
    /// The first line of a file.
    File(PathBuf),
    /// Standard output of a program and its arguments; no shell.
    Command(Vec<String>),
    /// The repository is not encrypted.
    None,
}

/// A repository and how to reach it.
#[derive(Clone, Debug)]
pub struct BorgOptions {
    /// A path, or `ssh://user@host:port/path`.
    pub repository: String,
    /// The passphrase.
    pub passphrase: Passphrase,
    /// SSH key file.
    pub ssh_key: Option<PathBuf>,
    /// File with the host keys that are trusted, instead of the user's own.
    pub known_hosts: Option<PathBuf>,
    /// As `borg create --compression` takes it; borg's own default is `lz4`.
    pub compression: Option<String>,
    /// As `borg init --encryption` takes it.
    pub encryption: String,
    /// How long to wait for another client of the repository.
    pub lock_wait: Duration,
    /// KiB a second.
    pub upload_ratelimit: Option<u64>,
    /// More arguments for `borg create`.
    pub extra_arguments: Vec<String>,
    /// Our own directory of this target: borg's caches, and the views.
    pub directory: PathBuf,
}

impl BorgOptions {
    /// A repository with defaults for all else.
    pub fn new(repository: impl Into<String>, passphrase: Passphrase, directory: PathBuf) -> Self {
        Self {
            repository: repository.into(),
            passphrase,
            ssh_key: None,
            known_hosts: None,
            compression: None,
            encryption: "repokey-blake2".into(),
            lock_wait: Duration::from_mins(1),
            upload_ratelimit: None,
            extra_arguments: Vec::new(),
            directory,
        }
    }

    /// The repository as borg takes it. borg runs in another directory than we do.
    pub(super) fn location(&self) -> String {
        if self.repository.contains(':') {
            return self.repository.clone();
        }
        std::path::absolute(&self.repository).map_or_else(|_| self.repository.clone(), |p| p.display().to_string())
    }

    /// borg's caches, shared by all guests of the target: each would else have to keep an index of all chunks up to date.
    pub(super) fn cache(&self) -> PathBuf {
        self.directory.join("cache")
    }

    /// Where a guest's view is mounted: in every run at the same path, which is what borg's files cache knows files by.
    pub(super) fn view(&self, guest: &str) -> PathBuf {
        self.directory.join("view").join(guest)
    }

    /// Which archives the files cache of a guest belongs to.
    pub(super) fn known(&self, guest: &str) -> PathBuf {
        self.directory.join("known").join(format!("{guest}.json"))
    }

    /// Variables that are set, and those that must not reach borg.
    pub(super) fn environment(&self) -> (Vec<(&'static str, OsString)>, &'static [&'static str]) {
        let directory = |name: &str| self.directory.join(name).into_os_string();
        let mut set: Vec<(&'static str, OsString)> = vec![
            ("LC_ALL", "C.UTF-8".into()),
            ("BORG_BASE_DIR", self.directory.clone().into()),
            ("BORG_CACHE_DIR", self.cache().into()),
            ("BORG_CONFIG_DIR", directory("config")),
            ("BORG_SECURITY_DIR", directory("security")),
            // Other guests' runs, and runs without a disk, must not make borg forget files.
            ("BORG_FILES_CACHE_TTL", "1000000000".into()),
            ("BORG_EXIT_CODES", "legacy".into()),
        ];
        let command = match &self.passphrase {
            Passphrase::File(path) => Some(join(&["head".into(), "-n".into(), "1".into(), "--".into(), text(path)])),
            Passphrase::Command(words) => Some(join(words)),
            Passphrase::None => None,
        };
        match command {
            Some(command) => set.push(("BORG_PASSCOMMAND", command.into())),
            None => set.push(("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes".into())),
        }
        if self.ssh_key.is_some() || self.known_hosts.is_some() || env::var_os("BORG_RSH").is_none() {
            set.push(("BORG_RSH", self.ssh().into()));
        }
        (set, &["BORG_REPO", "BORG_PASSPHRASE", "BORG_PASSPHRASE_FD", "BORG_PASSCOMMAND", "BORG_NEW_PASSPHRASE"])
    }

    fn ssh(&self) -> String {
        let mut words: Vec<String> = vec!["ssh".into()];
        let mut option = |text: String| words.extend(["-o".into(), text]);
        option("BatchMode=yes".into());
        option("ServerAliveInterval=30".into());
        option("ServerAliveCountMax=10".into());
        if let Some(file) = &self.known_hosts {
            option(format!("UserKnownHostsFile=\"{}\"", file.display()));
            option("GlobalKnownHostsFile=/dev/null".into());
            option("StrictHostKeyChecking=yes".into());
        }
        if let Some(key) = &self.ssh_key {
            option("IdentitiesOnly=yes".into());
            words.extend(["-i".into(), text(key)]);
        }
        join(&words)
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Words as borg splits them again (Python's `shlex.split`).
fn join(words: &[String]) -> String {
    let quoted: Vec<String> = words.iter().map(|word| format!("'{}'", word.replace('\'', "'\"'\"'"))).collect();
    quoted.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell() {
        assert_eq!(join(&["a b".into(), "it's".into()]), r#"'a b' 'it'"'"'s'"#);
    }

    #[test]
    fn a_passphrase_is_read_by_borg_and_ssh_trusts_only_the_given_keys() {
        let mut options = BorgOptions::new("/r", Passphrase::File("/etc/pass phrase".into()), "/state".into());
        options.known_hosts = Some("/k h".into());
        let (set, unset) = options.environment();
        let value = |name: &str| {
            let found = set.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string_lossy().into_owned());
            found.unwrap_or_default()
        };
        assert_eq!(value("BORG_PASSCOMMAND"), "'head' '-n' '1' '--' '/etc/pass phrase'");
        assert!(value("BORG_RSH").contains("'UserKnownHostsFile=\"/k h\"' '-o' 'GlobalKnownHostsFile=/dev/null'"));
        assert!(unset.contains(&"BORG_PASSPHRASE"));
        assert!(value("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK").is_empty());
    }

    #[test]
    fn only_paths_are_made_absolute() {
        let location = |text: &str| BorgOptions::new(text, Passphrase::None, "/s".into()).location();
        assert_eq!(location("ssh://b@h:2/./x"), "ssh://b@h:2/./x");
        assert_eq!(location("b@h:x"), "b@h:x");
        assert_eq!(location("/a/b"), "/a/b");
        assert!(Path::new(&location("a")).is_absolute());
    }
}
