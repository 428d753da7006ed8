//! From a configured target to its provider.

use super::{
    ErrorKind, Provider, ProviderError,
    borg::{BorgOptions, BorgProvider, Passphrase},
    directory::{DirectoryOptions, DirectoryProvider},
    null::NullProvider,
};
use crate::{
    config::{ConfigError, Dirs, TargetTable},
    segment::SegmentLen,
};
use std::{
    fs,
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

/// The provider of a target.
///
/// The target `local` needs no preparation: its repository is created when neither it nor its password file exists. Any
/// other combination is an error, because a repository that is only not mounted must not be replaced by a new one.
///
/// # Errors
/// When the repository is not there or cannot be opened.
pub fn for_target(name: &str, table: &TargetTable, dirs: &Dirs) -> Result<Box<dyn Provider>, ProviderError> {
    match table {
        TargetTable::Null => Ok(Box::new(NullProvider::new())),
        TargetTable::Directory { .. } => Ok(Box::new(DirectoryProvider::open(&directory(name, table)?)?)),
        TargetTable::Restic { .. } => open_restic(name, table, dirs),
        TargetTable::Borg { .. } => Ok(Box::new(BorgProvider::open(borg_options(name, table, dirs)?)?)),
    }
}

/// The shortest segments that suit a target, where none are configured. borg has a file for each, which costs it some 0.1 ms in every
/// backup, read or not, and small changes go into fine segments there.
pub fn least_segment(table: &TargetTable) -> SegmentLen {
    match table {
        TargetTable::Borg { .. } => SegmentLen::TWO_MIB,
        TargetTable::Null | TargetTable::Directory { .. } | TargetTable::Restic { .. } => SegmentLen::for_disk(0),
    }
}

/// Creates a target's repository. Returns its id.
///
/// # Errors
/// When there is one already, or it cannot be created.
pub fn init_target(name: &str, table: &TargetTable, dirs: &Dirs) -> Result<String, ProviderError> {
    match table {
        TargetTable::Null => Err(ProviderError::new(ErrorKind::Other, format!("target `{name}` needs no repository"))),
        TargetTable::Directory { .. } => DirectoryProvider::init(&directory(name, table)?)?.repository_id(),
        TargetTable::Restic { .. } => init_restic(name, table),
        TargetTable::Borg { .. } => BorgProvider::init(borg_options(name, table, dirs)?)?.repository_id(),
    }
}

fn borg_options(name: &str, table: &TargetTable, dirs: &Dirs) -> Result<BorgOptions, ProviderError> {
    let TargetTable::Borg {
        repository,
        passphrase_file,
        passphrase_command,
        passphrase_credential,
        passphrase_fd,
        program,
        remote_path,
        keys_dir,
        ssh_key,
        known_hosts,
        compression,
        encryption,
        lock_wait,
        upload_ratelimit,
        extra_arguments,
        ..
    } = table
    else {
        return Err(ProviderError::new(ErrorKind::Other, format!("target `{name}` is no borg repository")));
    };
    let passphrase = match (passphrase_file, passphrase_command, passphrase_credential, passphrase_fd) {
        (Some(file), None, None, None) => Passphrase::File(file.clone()),
        (None, Some(command), None, None) if !command.is_empty() => Passphrase::Command(command.clone()),
        (None, None, Some(credential), None) => Passphrase::File(credential_file(name, credential)?),
        (None, None, None, Some(fd)) => Passphrase::given(&first_line(name, *fd)?),
        (None, None, None, None) if encryption.as_deref() == Some("none") => Passphrase::None,
        _ => {
            let message = format!(
                "target `{name}` needs one of `passphrase-file`, `passphrase-command`, `passphrase-credential`, \
                 `passphrase-fd` and `encryption = \"none\"`"
            );
            return Err(ProviderError::new(ErrorKind::Credentials, message));
        }
    };
    // The same path in every run, however the directory is called: borg knows files by it.
    let state = std::path::absolute(&dirs.state).unwrap_or_else(|_| dirs.state.clone());
    let mut options = BorgOptions::new(repository.clone(), passphrase, state.join("borg").join(name));
    options.remote_path.clone_from(remote_path);
    options.keys_dir.clone_from(keys_dir);
    options.ssh_key.clone_from(ssh_key);
    options.known_hosts.clone_from(known_hosts);
    options.compression.clone_from(compression);
    if let Some(program) = program {
        options.program.clone_from(program);
    }
    if let Some(encryption) = encryption {
        options.encryption.clone_from(encryption);
    }
    if let Some(wait) = lock_wait {
        options.lock_wait = *wait;
    }
    options.upload_ratelimit = *upload_ratelimit;
    options.extra_arguments.clone_from(extra_arguments);
    options.check().map_err(|(key, why)| {
        let cause = ConfigError::Value { what: format!("target.{name}.{key}"), why };
        ProviderError::caused_by(ErrorKind::Other, format!("target `{name}` cannot be used"), cause)
    })?;
    Ok(options)
}

/// The file of a systemd credential (`LoadCredential=` and its like).
fn credential_file(target: &str, name: &str) -> Result<PathBuf, ProviderError> {
    let failed = |why: String| {
        let message = format!("target `{target}`: there is no credential `{name}`: {why}");
        ProviderError::new(ErrorKind::Credentials, message)
    };
    if name.is_empty() || name.starts_with('.') || name.contains('/') {
        return Err(failed("it is no file name".into()));
    }
    let directory = std::env::var_os("CREDENTIALS_DIRECTORY").ok_or_else(|| {
        failed("CREDENTIALS_DIRECTORY is not set; systemd sets it for services with credentials".into())
    })?;
    let file = Path::new(&directory).join(name);
    if file.is_file() {
        return Ok(file);
    }
    Err(failed(format!("{} is no file", file.display())))
}

/// The first line of what a descriptor that we have inherited gives.
fn first_line(target: &str, fd: u32) -> Result<String, ProviderError> {
    let failed = |e: io::Error| {
        let message = format!("target `{target}`: the passphrase cannot be read from descriptor {fd}");
        ProviderError::caused_by(ErrorKind::Credentials, message, e)
    };
    let file = fs::File::open(format!("/proc/self/fd/{fd}")).map_err(failed)?;
    let mut line = String::new();
    // Far more than a passphrase, and less than fits into a pipe.
    BufReader::new(file.take(4096)).read_line(&mut line).map_err(failed)?;
    match line.trim_end_matches('\n') {
        "" => Err(failed(io::Error::other("there is nothing in its first line"))),
        line => Ok(line.to_owned()),
    }
}

fn directory(name: &str, table: &TargetTable) -> Result<DirectoryOptions, ProviderError> {
    let TargetTable::Directory { path, mode, max_chain, on_chain, .. } = table else {
        return Err(ProviderError::new(ErrorKind::Other, format!("target `{name}` is no directory")));
    };
    let mut options = DirectoryOptions::new(path);
    options.mode = *mode;
    options.on_chain = *on_chain;
    if let Some(images) = max_chain {
        options.max_chain = usize::from(*images);
    }
    Ok(options)
}

#[cfg(feature = "restic")]
mod with_restic {
    use super::{Dirs, ErrorKind, Provider, ProviderError, TargetTable};
    use crate::provider::restic::{Password, ResticOptions, ResticProvider};
    use std::{fs, path::Path};

    pub(super) fn open_restic(
        name: &str,
        table: &TargetTable,
        dirs: &Dirs,
    ) -> Result<Box<dyn Provider>, ProviderError> {
        let options = options(name, table)?;
        let untouched =
            |path: &Path| matches!(fs::symlink_metadata(path), Err(e) if e.kind() == std::io::ErrorKind::NotFound);
        if *table == TargetTable::local(&dirs.state)
            && untouched(&dirs.state.join("repository"))
            && untouched(&dirs.state.join("repository.key"))
        {
            return Ok(Box::new(ResticProvider::init(&options)?));
        }
        Ok(Box::new(ResticProvider::open(&options)?))
    }

    pub(super) fn init_restic(name: &str, table: &TargetTable) -> Result<String, ProviderError> {
        ResticProvider::init(&options(name, table)?)?.repository_id()
    }

    fn options(name: &str, table: &TargetTable) -> Result<ResticOptions, ProviderError> {
        let TargetTable::Restic {
            repository, password_file, password_command, options, secret_files, compression, ..
        } = table
        else {
            return Err(ProviderError::new(ErrorKind::Other, format!("target `{name}` is no restic repository")));
        };
        let password = match (password_file, password_command) {
            (Some(file), None) => Password::File(file.clone()),
            (None, Some(command)) if !command.is_empty() => Password::Command(command.clone()),
            _ => {
                let message = format!("target `{name}` needs either `password-file` or `password-command`");
                return Err(ProviderError::new(ErrorKind::Credentials, message));
            }
        };
        let mut result = ResticOptions::new(repository.clone(), password);
        if let Some(level) = compression {
            result.compression = *level;
        }
        for (key, value) in options {
            result.options.insert(key.clone(), value.clone().into());
        }
        for (key, path) in secret_files {
            let text = fs::read_to_string(path).map_err(|e| {
                let message = format!("target `{name}`: `{key}` cannot be read from {}", path.display());
                ProviderError::caused_by(ErrorKind::Credentials, message, e)
            })?;
            result.options.insert(key.clone(), text.lines().next().unwrap_or_default().to_owned().into());
        }
        Ok(result)
    }
}

#[cfg(feature = "restic")]
use with_restic::{init_restic, open_restic};

#[cfg(not(feature = "restic"))]
fn init_restic(name: &str, _table: &TargetTable) -> Result<String, ProviderError> {
    Err(not_built(name))
}

#[cfg(not(feature = "restic"))]
fn open_restic(name: &str, _table: &TargetTable, _dirs: &Dirs) -> Result<Box<dyn Provider>, ProviderError> {
    Err(not_built(name))
}

#[cfg(not(feature = "restic"))]
fn not_built(name: &str) -> ProviderError {
    ProviderError::new(ErrorKind::Other, format!("target `{name}`: this program was built without the restic provider"))
}
