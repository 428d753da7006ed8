//! The configuration file.

use crate::{
    access::{FleecingFormat, FreezeMode},
    archive::Retention,
    segment::{SegmentLen, SegmentLens},
};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};
use thiserror::Error;

/// Why the configuration cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("cannot read configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file is no valid configuration.
    #[error("configuration {path} is not valid")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A table stands in two files.
    #[error("`[{table}]` in {path} stands in another configuration file too")]
    Twice {
        /// The table.
        table: String,
        /// The second file.
        path: PathBuf,
    },
    /// A value makes no sense.
    #[error("`{what}` in the configuration: {why}")]
    Value {
        /// Table and key.
        what: String,
        /// Why not.
        why: String,
    },
}

/// The configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// What holds for every guest unless the command line says otherwise.
    #[serde(default)]
    pub defaults: Defaults,
    /// Places to back up to.
    #[serde(default)]
    pub target: BTreeMap<String, TargetTable>,
    /// Guests outside of Proxmox VE.
    #[serde(default)]
    pub guest: BTreeMap<String, GuestTable>,
}

/// `[defaults]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Defaults {
    /// Target that is used without `--target`; `local` if not set.
    pub target: Option<String>,
    /// `auto` (if not set), `require` or `off`.
    pub freeze: Option<FreezeMode>,
    /// Limit of a freeze, 30 s if not set.
    #[serde(default, deserialize_with = "duration")]
    pub freeze_timeout: Option<Duration>,
    /// Directory for fleecing images.
    pub fleecing_dir: Option<PathBuf>,
    /// Format of fleecing images, `raw` if not set.
    pub fleecing_format: Option<FleecingFormat>,
    /// Proxmox storage for fleecing images, instead of a directory.
    pub fleecing_storage: Option<String>,
    /// How long to wait for another client of the QMP socket, 60 s if not set.
    #[serde(default, deserialize_with = "duration")]
    pub lockwait: Option<Duration>,
    /// How long a guest write may wait for fleecing before the snapshot is given up, 45 s if not set.
    #[serde(default, deserialize_with = "duration")]
    pub cbw_timeout: Option<Duration>,
    /// How long QEMU may take to answer a backup's request for a disk's data, 2 minutes if not set.
    #[serde(default, deserialize_with = "duration")]
    pub nbd_timeout: Option<Duration>,
    /// Segment length for new disks: a power of two from `64KiB` to `4MiB`.
    pub segment_size: Option<String>,
}

/// `[guest.NAME]`: a QEMU process with a QMP socket.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct GuestTable {
    /// QMP socket.
    pub qmp: PathBuf,
    /// Guest agent socket.
    pub agent: Option<PathBuf>,
}

/// `[target.NAME]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "provider", deny_unknown_fields, rename_all = "kebab-case")]
pub enum TargetTable {
    /// An embedded restic repository.
    #[serde(rename_all = "kebab-case")]
    Restic {
        /// A directory, or a backend's address: `opendal:s3`, `opendal:sftp`, `rest:https://…`.
        repository: String,
        /// File with the password; made when the repository is created.
        password_file: Option<PathBuf>,
        /// Program that prints the password.
        password_command: Option<Vec<String>>,
        /// Options of the backend, for example `bucket` and `endpoint` for S3.
        #[serde(default)]
        options: BTreeMap<String, String>,
        /// Files with options of the backend that are secret: option name to path.
        #[serde(default)]
        secret_files: BTreeMap<String, PathBuf>,
        /// zstd level.
        compression: Option<i32>,
        /// Always an error, which says what to use.
        #[serde(default, deserialize_with = "retention")]
        prune_backups: Option<Retention>,
    },
    /// A borg repository, by an unmodified `borg`.
    #[serde(rename_all = "kebab-case")]
    Borg {
        /// A path, or `ssh://user@host:port/path`.
        repository: String,
        /// File with the passphrase in its first line.
        passphrase_file: Option<PathBuf>,
        /// Program that prints the passphrase.
        passphrase_command: Option<Vec<String>>,
        /// Name of a systemd credential of the service: its first line.
        passphrase_credential: Option<String>,
        /// Descriptor that the passphrase is read from, once: its first line.
        passphrase_fd: Option<u32>,
        /// borg here: a path, or a name to look for in `PATH`; `borg` if not set.
        program: Option<PathBuf>,
        /// borg on the other side of SSH.
        remote_path: Option<String>,
        /// Where the keys of the `keyfile` modes are; below the state directory if not set.
        keys_dir: Option<PathBuf>,
        /// SSH key file.
        ssh_key: Option<PathBuf>,
        /// File with the host keys that are trusted, instead of the user's own.
        known_hosts: Option<PathBuf>,
        /// As `borg create --compression` takes it; `lz4` if not set.
        compression: Option<String>,
        /// As `borg init --encryption` takes it; `repokey-blake2` if not set, `none` needs no passphrase.
        encryption: Option<String>,
        /// How long to wait for another client of the repository, 60 s if not set.
        #[serde(default, deserialize_with = "duration")]
        lock_wait: Option<Duration>,
        /// KiB a second.
        upload_ratelimit: Option<u64>,
        /// More arguments for `borg create`.
        #[serde(default)]
        extra_arguments: Vec<String>,
        /// Which archives of a guest are kept after a backup, all if not set.
        #[serde(default, deserialize_with = "retention")]
        prune_backups: Option<Retention>,
    },
    /// A directory of qcow2 images.
    #[serde(rename_all = "kebab-case")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// `incremental` (if not set) or `full`.
        #[serde(default)]
        mode: crate::provider::directory::Mode,
        /// Most images that a disk of an archive may consist of, 64 if not set.
        max_chain: Option<u16>,
        /// Which archives of a guest are kept after a backup, all if not set.
        #[serde(default, deserialize_with = "retention")]
        prune_backups: Option<Retention>,
        /// What becomes of an archive that no rule keeps while later ones build on it: `merge` (if not set) or `refuse`.
        #[serde(default)]
        on_chain: crate::provider::directory::OnChain,
    },
    /// Stores nothing; for measuring.
    Null,
}

impl Config {
    /// Reads `config.toml` and `conf.d/*.toml` in `dir`. Nothing there means the defaults.
    ///
    /// # Errors
    /// When a file cannot be read, is no valid configuration, or repeats a table.
    pub fn load(dir: &Path) -> Result<Self, ConfigError> {
        let mut files = vec![dir.join("config.toml")];
        let extra = dir.join("conf.d");
        match fs::read_dir(&extra) {
            Ok(entries) => {
                let mut more: Vec<PathBuf> = entries
                    .collect::<io::Result<Vec<_>>>()
                    .map_err(|source| ConfigError::Read { path: extra.clone(), source })?
                    .into_iter()
                    .map(|entry| entry.path())
                    .filter(|path| path.extension().is_some_and(|e| e == "toml"))
                    .collect();
                more.sort();
                files.extend(more);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(ConfigError::Read { path: extra, source }),
        }
        let mut config = Self::default();
        for path in files {
            let text = match fs::read_to_string(&path) {
                Ok(text) => text,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(ConfigError::Read { path, source }),
            };
            config.add(&text, &path)?;
        }
        config.validate()?;
        Ok(config)
    }

    fn add(&mut self, text: &str, path: &Path) -> Result<(), ConfigError> {
        let more: Self =
            toml::from_str(text).map_err(|e| ConfigError::Parse { path: path.to_owned(), source: Box::new(e) })?;
        let twice = |table: String| ConfigError::Twice { table, path: path.to_owned() };
        if more.defaults != Defaults::default() {
            if self.defaults != Defaults::default() {
                return Err(twice("defaults".into()));
            }
            self.defaults = more.defaults;
        }
        for (name, target) in more.target {
            if self.target.insert(name.clone(), target).is_some() {
                return Err(twice(format!("target.{name}")));
            }
        }
        for (name, guest) in more.guest {
            if self.guest.insert(name.clone(), guest).is_some() {
                return Err(twice(format!("guest.{name}")));
            }
        }
        Ok(())
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let bad = |what: String, why: &str| Err(ConfigError::Value { what, why: why.into() });
        for (name, table) in &self.target {
            if let (Some(_), Some(how)) = (table.retention(), table.retention_elsewhere()) {
                let why = format!("pvebackup removes no archives of such a target: use {how}");
                return bad(format!("target.{name}.prune-backups"), &why);
            }
            if !is_target_name(name) {
                return bad(format!("target.{name}"), "at most 32 letters, digits, `-`, `_`");
            }
            if name == crate::access::by_hand::TARGET {
                return bad(format!("target.{name}"), "this name is for `pvebackup access`");
            }
        }
        for name in self.guest.keys() {
            if name.parse::<crate::guest::GuestId>().is_err() {
                return bad(format!("guest.{name}"), "at most 64 letters, digits, `-`, `_`, `.`");
            }
            if name.bytes().all(|b| b.is_ascii_digit()) {
                return bad(format!("guest.{name}"), "a number is the VMID of a Proxmox VE guest");
            }
        }
        self.segment_lens().map(drop)
    }

    /// Segment lengths, as far as the configuration says.
    ///
    /// # Errors
    /// When it is no power of two between 64 KiB and 4 MiB.
    pub fn segment_lens(&self) -> Result<SegmentLens, ConfigError> {
        let Some(text) = &self.defaults.segment_size else { return Ok(SegmentLens::new(None)) };
        let bytes = super::size::parse_bytes(text).ok().and_then(SegmentLen::new);
        bytes.map(|len| SegmentLens::new(Some(len))).ok_or_else(|| ConfigError::Value {
            what: "defaults.segment-size".into(),
            why: format!("`{text}` is no power of two from 64KiB to 4MiB"),
        })
    }

    /// The target `name`, or the default one. The target `local` exists without being configured: a repository below the
    /// state directory.
    ///
    /// # Errors
    /// When there is no such target.
    pub fn target(&self, name: Option<&str>, state: &Path) -> Result<(String, TargetTable), ConfigError> {
        let name = name.or(self.defaults.target.as_deref()).unwrap_or("local");
        if let Some(target) = self.target.get(name) {
            return Ok((name.to_owned(), target.clone()));
        }
        if name == "local" {
            return Ok((name.to_owned(), TargetTable::local(state)));
        }
        let known: Vec<&str> = self.target.keys().map(String::as_str).chain(["local"]).collect();
        Err(ConfigError::Value {
            what: format!("target.{name}"),
            why: format!("there is no such target; there are: {}", known.join(", ")),
        })
    }
}

impl TargetTable {
    /// The default target: a repository in `state/repository`, its password in `state/repository.key`.
    pub fn local(state: &Path) -> Self {
        Self::Restic {
            repository: state.join("repository").to_string_lossy().into_owned(),
            password_file: Some(state.join("repository.key")),
            password_command: None,
            options: BTreeMap::new(),
            secret_files: BTreeMap::new(),
            compression: None,
            prune_backups: None,
        }
    }

    /// Which archives of a guest are kept after a backup; all if not set.
    pub fn retention(&self) -> Option<&Retention> {
        match self {
            Self::Restic { prune_backups, .. }
            | Self::Borg { prune_backups, .. }
            | Self::Directory { prune_backups, .. } => prune_backups.as_ref(),
            Self::Null => None,
        }
    }

    /// What removes archives instead of this program, if it does not do that itself.
    pub fn retention_elsewhere(&self) -> Option<String> {
        match self {
            Self::Restic { repository, .. } => Some(format!(
                "`restic forget --repo {repository} --tag pvebackup --group-by host --keep-daily 7 … --prune`"
            )),
            Self::Null => Some("nothing: it has none".into()),
            Self::Borg { .. } | Self::Directory { .. } => None,
        }
    }
}

fn is_target_name(name: &str) -> bool {
    (1..=32).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
        && name.as_bytes()[0].is_ascii_alphanumeric()
}

fn duration<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(deserializer)?;
    humantime::parse_duration(&text).map(Some).map_err(serde::de::Error::custom)
}

fn retention<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Retention>, D::Error> {
    String::deserialize(deserializer)?.parse().map(Some).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, name: &str, text: &str) {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().expect("parent")).expect("directory");
        fs::write(path, text).expect("write");
    }

    #[test]
    fn an_empty_directory_means_the_local_target() {
        let dir = tempfile::tempdir().expect("directory");
        let config = Config::load(dir.path()).expect("defaults");
        let (name, target) = config.target(None, Path::new("/s")).expect("local");
        assert_eq!(name, "local");
        assert_eq!(target, TargetTable::local(Path::new("/s")));
    }

    #[test]
    fn files_are_joined_and_repetitions_refused() {
        let dir = tempfile::tempdir().expect("directory");
        write(
            dir.path(),
            "config.toml",
            "[defaults]\ntarget = 'nas'\nfreeze-timeout = '10s'\n[guest.web]\nqmp = '/q'\n",
        );
        write(
            dir.path(),
            "conf.d/nas.toml",
            "[target.nas]\nprovider = 'restic'\nrepository = '/nas'\npassword-file='/k'\n",
        );
        let config = Config::load(dir.path()).expect("valid");
        assert_eq!(config.target(None, Path::new("/")).expect("nas").0, "nas");
        assert_eq!(config.defaults.freeze_timeout, Some(Duration::from_secs(10)));
        write(dir.path(), "conf.d/other.toml", "[guest.web]\nqmp = '/r'\n");
        assert!(matches!(Config::load(dir.path()), Err(ConfigError::Twice { table, .. }) if table == "guest.web"));
    }

    #[test]
    fn mistakes_are_named() {
        let dir = tempfile::tempdir().expect("directory");
        let fails = |text: &str| {
            write(dir.path(), "config.toml", text);
            let error = Config::load(dir.path()).expect_err("must be refused");
            format!("{error}: {}", std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default())
        };
        assert!(fails("[defaults]\ntarged = 'x'").contains("targed"));
        assert!(fails("[target.x]\nprovider = 'tape'").contains("tape"));
        assert!(fails("[target.by-hand]\nprovider = 'null'").contains("pvebackup access"));
        assert!(fails("[target.'a b']\nprovider = 'null'").contains("target.a b"));
        assert!(fails("[guest.7]\nqmp = '/q'").contains("VMID"));
        let restic = "[target.x]\nprovider = 'restic'\nrepository = '/r'\nprune-backups = 'keep-last=1'";
        assert!(fails(restic).contains("restic forget --repo /r"));
        assert!(
            fails("[target.x]\nprovider = 'borg'\nrepository = '/r'\nprune-backups = 'keep=1'").contains("keep-last")
        );
        assert!(fails("[defaults]\nsegment-size = '3MiB'").contains("power of two"));
        let config = Config::default();
        assert!(config.target(Some("nope"), Path::new("/")).expect_err("none").to_string().contains("local"));
    }
}
