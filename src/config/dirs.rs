//! Where configuration, state and sockets are.

use std::{
    env, fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

/// The program's directories.
///
/// Each comes from a flag, else the environment (`PVEBACKUP_*`, then systemd's `*_DIRECTORY`), else the system's place. With
/// all of them set a user needs no right on anything else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dirs {
    /// `config.toml` and `conf.d/`.
    pub config: PathBuf,
    /// Generations, recovery journals, the default repository.
    pub state: PathBuf,
    /// Sockets of running backups, emptied by a reboot.
    pub run: PathBuf,
    /// Fleecing images, where nothing else is configured.
    pub fleecing: PathBuf,
    /// What Proxmox VE's paths (`/etc/pve`, `/run/qemu-server`) are below; `/` but in tests.
    pub pve_root: PathBuf,
}

impl Dirs {
    /// The directories of a system-wide installation, as the environment changes them.
    pub fn from_env() -> Self {
        Self::from_vars(|name| env::var_os(name).map(PathBuf::from).filter(|p| !p.as_os_str().is_empty()))
    }

    fn from_vars(var: impl Fn(&str) -> Option<PathBuf>) -> Self {
        let dir = |own: &str, systemd: &str, default: &str| {
            // systemd joins several directories with colons; ours is the first.
            let first = |list: PathBuf| list.to_string_lossy().split(':').next().map(PathBuf::from);
            var(own).or_else(|| var(systemd).and_then(first)).unwrap_or_else(|| default.into())
        };
        let state = dir("PVEBACKUP_STATE_DIR", "STATE_DIRECTORY", "/var/lib/pvebackup");
        Self {
            config: dir("PVEBACKUP_CONFIG_DIR", "CONFIGURATION_DIRECTORY", "/etc/pvebackup"),
            run: dir("PVEBACKUP_RUN_DIR", "RUNTIME_DIRECTORY", "/run/pvebackup"),
            fleecing: var("PVEBACKUP_FLEECING_DIR").unwrap_or_else(|| state.join("fleecing")),
            pve_root: var("PVEBACKUP_PVE_ROOT").unwrap_or_else(|| "/".into()),
            state,
        }
    }

    /// Recovery journals, one per guest.
    pub fn journals(&self) -> PathBuf {
        self.state.join("journal")
    }

    /// Records of the processes that serve archives as files.
    pub fn mounts(&self) -> PathBuf {
        self.run.join("mounts")
    }

    /// Generation records, one per target and guest.
    pub fn generations(&self) -> PathBuf {
        self.state.join("generations")
    }
}

/// Creates a directory, and its parents, that only we may enter.
///
/// # Errors
/// As `mkdir` does.
pub fn create_private_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn own_variables_win_over_systemd_over_defaults() {
        let vars: HashMap<&str, &str> =
            [("PVEBACKUP_STATE_DIR", "/own"), ("STATE_DIRECTORY", "/systemd"), ("RUNTIME_DIRECTORY", "/run/a:/run/b")]
                .into();
        let dirs = Dirs::from_vars(|name| vars.get(name).map(PathBuf::from));
        assert_eq!(dirs.state, Path::new("/own"));
        assert_eq!(dirs.run, Path::new("/run/a"));
        assert_eq!(dirs.config, Path::new("/etc/pvebackup"));
        assert_eq!(dirs.fleecing, Path::new("/own/fleecing"));
    }
}
