//! borg's variables, besides what every child of ours gets ([`crate::rights::command`]).

use super::{BorgOptions, Passphrase};
use std::{
    env,
    ffi::{OsStr, OsString},
    path::Path,
};

/// What is handed on from our own environment: what borg's documentation has for what the configuration does not have.
const HANDED_ON: [&str; 6] = [
    "BORG_RSH",
    "BORG_REMOTE_PATH",
    "BORG_KEY_FILE",
    "BORG_KEYS_DIR",
    "BORG_HOST_ID",
    "BORG_RELOCATED_REPO_ACCESS_IS_OK",
];

impl BorgOptions {
    /// Variables of a borg.
    pub(super) fn environment(&self) -> Vec<(OsString, OsString)> {
        let ours = HANDED_ON.iter().filter_map(|name| Some((OsString::from(name), env::var_os(name)?)));
        let mut all: Vec<(OsString, OsString)> = ours.collect();
        let mut set = |name: &str, value: &OsStr| {
            all.retain(|(known, _)| known != name);
            all.push((name.into(), value.into()));
        };
        set("LC_ALL", "C.UTF-8".as_ref());
        set("BORG_BASE_DIR", self.directory.as_os_str());
        set("BORG_CACHE_DIR", self.cache().as_os_str());
        set("BORG_CONFIG_DIR", self.directory.join("config").as_os_str());
        set("BORG_SECURITY_DIR", self.security().as_os_str());
        // Other guests' runs, and runs without a disk, must not make borg forget files.
        set("BORG_FILES_CACHE_TTL", "1000000000".as_ref());
        set("BORG_EXIT_CODES", "modern".as_ref());
        if let Some(directory) = &self.keys_dir {
            set("BORG_KEYS_DIR", directory.as_os_str());
        }
        if let Some(program) = &self.remote_path {
            set("BORG_REMOTE_PATH", program.as_ref());
        }
        match &self.passphrase {
            Passphrase::File(path) => {
                let words = ["head".into(), "-n".into(), "1".into(), "--".into(), text(path)];
                set("BORG_PASSCOMMAND", join(&words).as_ref());
            }
            Passphrase::Command(words) => set("BORG_PASSCOMMAND", join(words).as_ref()),
            // Its standard input, which it needs for nothing else.
            Passphrase::Given(_) => set("BORG_PASSPHRASE_FD", "0".as_ref()),
            Passphrase::None => {}
        }
        // borg asks before it sends anything to such a repository for the first time; not so to one that is encrypted as it should be.
        if self.encryption == "none" || self.encryption.starts_with("authenticated") {
            set("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes".as_ref());
        }
        if self.ssh_key.is_some() || self.known_hosts.is_some() || env::var_os("BORG_RSH").is_none() {
            set("BORG_RSH", self.ssh().as_ref());
        }
        all
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

    fn value(options: &BorgOptions, name: &str) -> Option<String> {
        let found = options.environment().into_iter().filter(|(key, _)| key == name).map(|(_, value)| value);
        let found: Vec<OsString> = found.collect();
        assert!(found.len() < 2, "{name} is there twice");
        found.first().map(|value| value.to_string_lossy().into_owned())
    }

    #[test]
    fn words_survive_the_shell() {
        assert_eq!(join(&["a b".into(), "it's".into()]), r#"'a b' 'it'"'"'s'"#);
    }

    #[test]
    fn a_passphrase_is_read_by_borg_and_ssh_trusts_only_the_given_keys() {
        let mut options = BorgOptions::new("/r", Passphrase::File("/etc/pass phrase".into()), "/state".into());
        options.known_hosts = Some("/k h".into());
        let value = |name: &str| value(&options, name);
        assert_eq!(value("BORG_PASSCOMMAND").as_deref(), Some("'head' '-n' '1' '--' '/etc/pass phrase'"));
        let ssh = value("BORG_RSH").expect("set");
        assert!(ssh.contains("'UserKnownHostsFile=\"/k h\"' '-o' 'GlobalKnownHostsFile=/dev/null'"));
        assert_eq!(value("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK"), None);
        assert_eq!(value("BORG_PASSPHRASE"), None);
    }

    #[test]
    fn a_passphrase_that_was_given_is_not_in_the_environment() {
        let options = BorgOptions::new("/r", Passphrase::given("correct horse"), "/state".into());
        assert_eq!(value(&options, "BORG_PASSPHRASE_FD").as_deref(), Some("0"));
        assert!(!format!("{:?} {options:?}", options.environment()).contains("horse"));
        assert_eq!(options.given_passphrase(), Some("correct horse"));
    }
}
