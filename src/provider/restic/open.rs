//! Opening and creating repositories.

use super::{
    CHUNK, PACK, ResticProvider,
    backend::{Farewell, GuardedBackend},
    error::{Secrets, wrap},
    key::quicken,
    options::{MissingFile, Password, ResticOptions},
};
use crate::provider::{ErrorKind, ProviderError};
use bytesize::ByteSize;
use rustic_backend::BackendOptions;
use rustic_core::{
    ConfigOptions, Credentials, FileType, KeyOptions, OpenStatus, ReadBackend as _, Repository, RepositoryBackends,
    RepositoryOptions, RusticError, WriteBackend, repofile::Chunker,
};
use secrecy::{ExposeSecret, SecretString};
use std::{collections::HashMap, os::unix::fs::DirBuilderExt, sync::Arc};

/// Opens nothing yet, but knows where.
struct Place {
    shown: String,
    secrets: Secrets,
    backend: Arc<GuardedBackend>,
    how: RepositoryOptions,
    repository: Repository<()>,
    farewell: Option<Arc<Farewell>>,
}

impl Place {
    fn new(options: &ResticOptions) -> Result<Self, ProviderError> {
        let secrets = options.secrets();
        let shown = options.shown();
        let mut place = BackendOptions::default();
        place.repository = Some(options.location());
        place.options =
            options.options.iter().map(|(key, value)| (key.clone(), value.expose_secret().to_owned())).collect();
        let failed =
            |e: Box<RusticError>| wrap(&secrets, ErrorKind::Other, format!("repository {shown} cannot be used"), &e);
        let inner = place.to_backends().map_err(failed)?.repository();
        let backend = Arc::new(GuardedBackend::new(inner, options.local_path().map(Into::into), secrets.clone()));
        let farewell = options.repository.starts_with("opendal:sftp").then(|| Arc::new(Farewell::new(&backend)));
        let mut how = RepositoryOptions::default();
        how.no_cache = options.cache_dir.is_none() && options.local_path().is_some();
        how.cache_dir.clone_from(&options.cache_dir);
        let shared: Arc<dyn WriteBackend> = Arc::<GuardedBackend>::clone(&backend);
        let repository = Repository::new(&how, &RepositoryBackends::new(shared, None)).map_err(failed)?;
        Ok(Self { shown, secrets, backend, how, repository, farewell })
    }

    fn exists(&self) -> Result<bool, ProviderError> {
        let config = self.repository.config_id().map_err(|e| {
            wrap(&self.secrets, ErrorKind::Other, format!("repository {} cannot be reached", self.shown), &e)
        })?;
        Ok(config.is_some())
    }
}

impl ResticProvider {
    /// Opens an existing repository.
    ///
    /// # Errors
    /// [`ErrorKind::RepositoryMissing`], [`ErrorKind::Credentials`], [`ErrorKind::Damaged`]; else [`ErrorKind::Other`].
    pub fn open(options: &ResticOptions) -> Result<Self, ProviderError> {
        let place = Place::new(options)?;
        if let Some(path) = options.local_path() {
            // rustic takes a repository that it may not look into for a missing one.
            match std::fs::metadata(path.join("config")) {
                Err(error)
                    if !matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) =>
                {
                    let message = format!("repository {} cannot be reached", place.shown);
                    return Err(ProviderError::caused_by(ErrorKind::Other, message, error));
                }
                _ => {}
            }
        }
        if !place.exists()? {
            let message = format!("there is no repository at {}; create it with `pvebackup target init`", place.shown);
            return Err(ProviderError::new(ErrorKind::RepositoryMissing, message));
        }
        let password = options.password.read(MissingFile::Fail)?;
        // The first is dropped last.
        let Place { farewell, shown, secrets, backend, how, repository } = place;
        let repository = repository
            .open(&credentials(&password))
            .map_err(|e| wrap(&secrets, ErrorKind::Damaged, format!("repository {shown} cannot be opened"), &e))?;
        Ok(Self::with(options, shown, secrets, backend, how, repository, farewell))
    }

    /// Creates a repository, and a password file if that does not exist; local directories get mode 0700.
    ///
    /// # Errors
    /// When there is a repository, or anything fails. A second try after a failure works.
    pub fn init(options: &ResticOptions) -> Result<Self, ProviderError> {
        let place = Place::new(options)?;
        if place.exists()? {
            return Err(ProviderError::new(
                ErrorKind::Other,
                format!("there already is a repository at {}", place.shown),
            ));
        }
        let made_now = matches!(&options.password, Password::File(path) if matches!(path.try_exists(), Ok(false)));
        let password = options.password.read(MissingFile::Create)?;
        if let Some(path) = options.local_path() {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|e| {
                ProviderError::caused_by(ErrorKind::Other, format!("directory {} cannot be created", path.display()), e)
            })?;
        }
        // The first is dropped last.
        let Place { farewell, shown, secrets, backend, how, repository } = place;
        let failed =
            |e: Box<RusticError>| wrap(&secrets, ErrorKind::Other, format!("repository {shown} cannot be created"), &e);
        remove_keys_of_a_broken_init(&shown, backend.as_ref(), options.local_path().is_some()).map_err(
            |e| match e {
                KeysLeft::Rustic(e) => failed(e),
                KeysLeft::InUse(e) => e,
            },
        )?;

        let mut config = ConfigOptions::default();
        config.set_version = Some(2);
        config.set_chunker = Some(Chunker::FixedSize);
        config.set_chunk_size = Some(ByteSize(CHUNK));
        config.set_compression = Some(options.compression);
        config.set_datapack_size = Some(ByteSize(PACK));
        config.set_datapack_growfactor = Some(0);
        config.set_datapack_size_limit = Some(ByteSize(PACK));
        config.set_treepack_size_limit = Some(ByteSize(PACK));
        let repository = repository.init(&credentials(&password), &KeyOptions::default(), &config).map_err(failed)?;
        if made_now && let Err(error) = quicken(&backend, &repository, &password) {
            tracing::warn!("{shown} keeps its slow key: {error}");
        }
        Ok(Self::with(options, shown, secrets, backend, how, repository, farewell))
    }

    fn with(
        options: &ResticOptions,
        shown: String,
        secrets: Secrets,
        backend: Arc<GuardedBackend>,
        how: RepositoryOptions,
        repository: Repository<OpenStatus>,
        farewell: Option<Arc<Farewell>>,
    ) -> Self {
        Self {
            shown,
            secrets,
            backend,
            how,
            repository,
            local: options.local_path().map(Into::into),
            indexed: None,
            confirmed: HashMap::new(),
            lock: None,
            added: None,
            farewell,
        }
    }
}

fn credentials(password: &SecretString) -> Credentials {
    Credentials::password(password.expose_secret())
}

enum KeysLeft {
    Rustic(Box<RusticError>),
    InUse(ProviderError),
}

impl From<Box<RusticError>> for KeysLeft {
    fn from(error: Box<RusticError>) -> Self {
        Self::Rustic(error)
    }
}

/// A run that was killed between key and config leaves a key that would open the new repository with a wrong master key.
/// But keys beside data are all that is left of a repository that has lost its config: these stay.
fn remove_keys_of_a_broken_init(shown: &str, backend: &GuardedBackend, local: bool) -> Result<(), KeysLeft> {
    // Remote stores may fail to list what was never created.
    let list = |kind| if local { backend.list(kind) } else { Ok(backend.list(kind).unwrap_or_default()) };
    let keys = list(FileType::Key)?;
    if keys.is_empty() {
        return Ok(());
    }
    for kind in [FileType::Snapshot, FileType::Index, FileType::Pack] {
        if !list(kind)?.is_empty() {
            let message =
                format!("{shown} has keys and data, but no config: a repository that has lost its config file?");
            return Err(KeysLeft::InUse(ProviderError::new(ErrorKind::Damaged, message)));
        }
    }
    for key in keys {
        backend.remove(FileType::Key, &key, false)?;
    }
    Ok(())
}
