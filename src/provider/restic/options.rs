//! Where a repository is, and its password.

use super::error::Secrets;
use crate::provider::{ErrorKind, ProviderError};
use secrecy::{ExposeSecret, SecretString};
use std::{
    collections::BTreeMap,
    fs::{DirBuilder, File, OpenOptions},
    io::{Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

/// Longest password that is read, in bytes.
const MAX_PASSWORD: u64 = 64 << 10;
/// How long a password command may run.
const PASSWORD_COMMAND_LIMIT: Duration = Duration::from_mins(1);
/// zstd's fastest ordinary level: on data that is already compressed it costs next to nothing, on file systems it gains
/// nearly as much as the levels above.
const DEFAULT_COMPRESSION: i32 = 1;

/// Where the repository's password comes from. Only its first line counts, as with restic.
#[derive(Clone, Debug)]
pub enum Password {
    /// A file. [`super::ResticProvider::init`] creates it (mode 0600, 256 random bits) when it does not exist.
    File(PathBuf),
    /// Standard output of a program and its arguments; no shell.
    Command(Vec<String>),
    /// The password itself, for callers that keep secrets elsewhere.
    Secret(SecretString),
}

/// A repository and how to open it.
#[derive(Clone)]
pub struct ResticOptions {
    /// A path, `local:PATH`, `rest:http://…`, or `opendal:SERVICE` (`opendal:s3`, `opendal:sftp`, …).
    pub repository: String,
    /// Options of the backend, such as `endpoint`, `root`, `bucket`, `key`; the values may be secret.
    pub options: BTreeMap<String, SecretString>,
    /// The password.
    pub password: Password,
    /// Where index and trees of a remote repository are kept; `None` is rustic's own place (`~/.cache/rustic`) for remote
    /// repositories and no cache for local ones.
    pub cache_dir: Option<PathBuf>,
    /// zstd level of a repository that is created: −7 to 22, 0 for no compression. An existing repository keeps its own.
    pub compression: i32,
}

impl std::fmt::Debug for ResticOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ResticOptions")
            .field("repository", &self.shown())
            .field("options", &self.options)
            .field("password", &self.password)
            .field("cache_dir", &self.cache_dir)
            .field("compression", &self.compression)
            .finish()
    }
}

impl ResticOptions {
    /// A repository with defaults for all else.
    pub fn new(repository: impl Into<String>, password: Password) -> Self {
        Self {
            repository: repository.into(),
            options: BTreeMap::new(),
            password,
            cache_dir: None,
            compression: DEFAULT_COMPRESSION,
        }
    }

    /// The directory of a local repository.
    pub(super) fn local_path(&self) -> Option<&Path> {
        let text = self.repository.strip_prefix("local:").unwrap_or(&self.repository);
        (text.len() < self.repository.len() || text.starts_with(['/', '.']) || !text.contains(':'))
            .then(|| Path::new(text))
    }

    /// As rustic's own parser wants it: a path with a colon in it is not taken for a scheme.
    pub(super) fn location(&self) -> String {
        match self.local_path() {
            Some(path) => format!("local:{}", path.display()),
            None => self.repository.clone(),
        }
    }

    /// The repository for messages: without the password of a URL.
    pub(super) fn shown(&self) -> String {
        self.secrets().redact(&self.repository)
    }

    /// What messages must not contain.
    pub(super) fn secrets(&self) -> Secrets {
        let mut secrets = Secrets::default();
        for (key, value) in &self.options {
            let key = key.to_ascii_lowercase();
            if ["secret", "password", "token", "access_key", "credential", "account_key"]
                .iter()
                .any(|w| key.contains(w))
            {
                secrets.add(value.expose_secret());
            }
        }
        let authority = self.repository.split_once("://").map(|(_, rest)| rest.split('/').next().unwrap_or_default());
        if let Some((user, _)) = authority.and_then(|a| a.rsplit_once('@'))
            && let Some((_, password)) = user.split_once(':')
        {
            secrets.add(password);
        }
        secrets
    }
}

/// What to do about a password file that does not exist.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum MissingFile {
    Fail,
    Create,
}

fn credentials(message: String) -> ProviderError {
    ProviderError::new(ErrorKind::Credentials, message)
}

impl Password {
    pub(super) fn read(&self, missing: MissingFile) -> Result<SecretString, ProviderError> {
        match self {
            Self::Secret(secret) => Ok(secret.clone()),
            Self::File(path) => match File::open(path) {
                Ok(file) => first_line(file, &format!("password file {}", path.display())),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound && missing == MissingFile::Create => {
                    create(path)
                }
                Err(error) => Err(ProviderError::caused_by(
                    ErrorKind::Credentials,
                    format!("password file {} cannot be opened", path.display()),
                    error,
                )),
            },
            Self::Command(words) => run(words),
        }
    }
}

fn first_line(source: impl Read, what: &str) -> Result<SecretString, ProviderError> {
    let mut text = String::new();
    source
        .take(MAX_PASSWORD + 1)
        .read_to_string(&mut text)
        .map_err(|error| ProviderError::caused_by(ErrorKind::Credentials, format!("{what} cannot be read"), error))?;
    if text.len() as u64 > MAX_PASSWORD {
        return Err(credentials(format!("{what} has more than {MAX_PASSWORD} bytes")));
    }
    let line = text.lines().next().unwrap_or_default();
    if line.is_empty() {
        return Err(credentials(format!("{what} is empty")));
    }
    Ok(line.into())
}

fn create(path: &Path) -> Result<SecretString, ProviderError> {
    let io = |what: &str, error: std::io::Error| {
        ProviderError::caused_by(ErrorKind::Credentials, format!("password file {} {what}", path.display()), error)
    };
    let mut random = [0u8; 32];
    File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut random))
        .map_err(|e| io("cannot be filled: no random numbers", e))?;
    let password = blake3::Hash::from_bytes(random).to_hex().to_string();
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(|e| io("has no directory", e))?;
    // Made complete under another name, so that no run ever finds half a password.
    let mut temporary = tempfile::Builder::new()
        .prefix(".password-")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .tempfile_in(directory)
        .map_err(|e| io("cannot be created", e))?;
    writeln!(temporary, "{password}")
        .and_then(|()| temporary.as_file().sync_all())
        .map_err(|e| io("cannot be written", e))?;
    temporary.persist_noclobber(path).map_err(|e| io("cannot be created", e.error))?;
    OpenOptions::new()
        .read(true)
        .custom_flags(nix::fcntl::OFlag::O_DIRECTORY.bits())
        .open(directory)
        .and_then(|d| d.sync_all())
        .map_err(|e| io("is not durable", e))?;
    Ok(password.into())
}

fn run(words: &[String]) -> Result<SecretString, ProviderError> {
    let [program, arguments @ ..] = words else {
        return Err(credentials("the password command is empty".into()));
    };
    let what = format!("password command `{program}`");
    let mut child = crate::rights::command(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| ProviderError::caused_by(ErrorKind::Credentials, format!("{what} cannot be started"), e))?;
    let output = child.stdout.take();
    let reader = std::thread::spawn({
        let what = what.clone();
        move || output.map_or_else(|| Err(credentials(format!("{what} has no output"))), |o| first_line(o, &what))
    });
    let end = Instant::now() + PASSWORD_COMMAND_LIMIT;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(20)),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                let seconds = PASSWORD_COMMAND_LIMIT.as_secs();
                return Err(credentials(format!("{what} did not end within {seconds} s")));
            }
            Err(error) => {
                return Err(ProviderError::caused_by(
                    ErrorKind::Credentials,
                    format!("{what} cannot be waited for"),
                    error,
                ));
            }
        }
    };
    if !status.success() {
        return Err(credentials(format!("{what} failed: {status}")));
    }
    // A grandchild may hold the pipe open for ever; then the thread is left behind.
    while !reader.is_finished() {
        if Instant::now() >= end {
            return Err(credentials(format!("{what} left its output open")));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    reader.join().unwrap_or_else(|_| Err(credentials(format!("{what} cannot be read"))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn paths_are_told_from_schemes() {
        let local = |text: &str| ResticOptions::new(text, Password::Command(vec![])).location();
        assert_eq!(local("/a/b:c"), "local:/a/b:c");
        assert_eq!(local("local:/a"), "local:/a");
        assert_eq!(local("relative"), "local:relative");
        assert_eq!(local("rest:http://h:1/"), "rest:http://h:1/");
        assert_eq!(local("opendal:s3"), "opendal:s3");
    }

    #[test]
    fn a_missing_password_file_is_created_only_on_demand_and_private() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("new/key");
        let file = Password::File(path.clone());
        assert_eq!(file.read(MissingFile::Fail).expect_err("missing").kind, ErrorKind::Credentials);
        assert!(!path.exists());
        let made = file.read(MissingFile::Create).expect("created");
        assert_eq!(made.expose_secret().len(), 64);
        assert_eq!(std::fs::metadata(&path).expect("file").permissions().mode() & 0o777, 0o600);
        assert_eq!(file.read(MissingFile::Create).expect("read").expose_secret(), made.expose_secret());
    }

    #[test]
    fn a_command_gives_its_first_line_or_fails() {
        let read =
            |script: &str| Password::Command(vec!["sh".into(), "-c".into(), script.into()]).read(MissingFile::Fail);
        assert_eq!(read("echo secret; echo more").expect("ran").expose_secret(), "secret");
        assert_eq!(read("exit 3").expect_err("failed").kind, ErrorKind::Credentials);
        assert_eq!(read("true").expect_err("empty").kind, ErrorKind::Credentials);
    }

    #[test]
    fn no_secret_is_shown() {
        let mut options =
            ResticOptions::new("rest:http://me:geheim@host/x", Password::Secret("pass-phrase".to_owned().into()));
        options.options.insert("secret_access_key".into(), "abcdefgh".to_owned().into());
        let text = format!("{} {options:?}", options.shown());
        assert!(
            !text.contains("geheim")
                && !text.contains("abcdefgh")
                && !format!("{:?}", options.password).contains("phrase")
        );
        assert_eq!(options.shown(), "rest:http://me:***@host/x");
    }
}
