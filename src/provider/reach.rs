//! What reading the archives of a target touches outside of this process.

use crate::config::{Dirs, TargetTable};
use std::{env, path::PathBuf};

/// Where reading from a target writes to, and whether it needs the network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Locks, caches, temporary files.
    pub writable: Vec<PathBuf>,
    /// The repository is on another host.
    pub network: bool,
}

impl Reach {
    /// That of reading from a target. No provider is opened, and nothing asked.
    pub fn of(table: &TargetTable, dirs: &Dirs) -> Self {
        let mut writable = vec![dirs.state.clone(), dirs.run.clone(), env::temp_dir()];
        let (repository, command, remote_cache) = match table {
            TargetTable::Null => return Self { writable, network: false },
            // Reading takes a lock there.
            TargetTable::Directory { path, .. } => (path.to_string_lossy().into_owned(), false, false),
            TargetTable::Restic { repository, password_command, .. } => {
                (repository.clone(), password_command.is_some(), true)
            }
            TargetTable::Borg { repository, passphrase_command, .. } => {
                (repository.clone(), passphrase_command.is_some(), false)
            }
        };
        let path = repository.strip_prefix("local:").unwrap_or(&repository);
        // An address has a colon before the first slash: `rest:https://…`, `ssh://…`, `host:path`.
        let network = !path.starts_with(['/', '.']) && path.split('/').next().is_some_and(|first| first.contains(':'));
        let variable = |name: &str| env::var_os(name).map(PathBuf::from);
        if !network {
            writable.push(path.into());
        } else if remote_cache {
            writable.extend(variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache"))));
        }
        if command {
            // Password stores and their agents keep state of their own.
            writable.extend(["HOME", "XDG_RUNTIME_DIR", "GNUPGHOME"].into_iter().filter_map(variable));
        }
        Self { writable, network }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restic(repository: &str) -> Reach {
        let mut table = TargetTable::local("/state".as_ref());
        if let TargetTable::Restic { repository: place, .. } = &mut table {
            *place = repository.into();
        }
        Reach::of(&table, &Dirs::from_env())
    }

    #[test]
    fn a_repository_on_this_host_needs_no_network() {
        for local in ["/srv/repo", "local:/srv/repo", "./repo", "repo", "/srv/with:colon"] {
            let reach = restic(local);
            let path = PathBuf::from(local.trim_start_matches("local:"));
            assert!(!reach.network && reach.writable.contains(&path), "{local}: {reach:?}");
        }
        for remote in ["rest:https://host/", "opendal:s3", "ssh://host/repo", "user@host:repo"] {
            assert!(restic(remote).network, "{remote}");
        }
    }
}
