//! A key that opens its repository quickly.
//!
//! A password's key is derived with scrypt, which takes a third of a second and 128 MiB as rustic sets it, so that
//! guessing passwords takes long. A password of 256 random bits cannot be guessed at any speed, and is derived for every run.
//! Repositories that are created together with such a password get a key of lower cost. It is an ordinary key to
//! restic, which reads the cost from the key's file.

use super::{
    backend::GuardedBackend,
    seal::{SealKey, random, seal},
};
use rustic_core::{FileType, Id, OpenStatus, Repository, WriteBackend, repofile::KeyFile};
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};
use std::io;

/// scrypt's N as a power of two, with r = 8 and p = 1: 16 MiB. Below that nothing is gained.
const LOG_N: u8 = 14;

/// Puts a quick key in the place of the one that `repository` was created with. There is a key for the password at any
/// moment.
pub(super) fn quicken(
    backend: &GuardedBackend,
    repository: &Repository<OpenStatus>,
    password: &SecretString,
) -> io::Result<()> {
    let Some(slow) = *repository.key_id() else { return Ok(()) };
    let mut salt = vec![0; 64];
    random(&mut salt)?;
    let mut key: SealKey = [0; 64];
    let parameters = scrypt::Params::new(LOG_N, 8, 1).map_err(io::Error::other)?;
    scrypt::scrypt(password.expose_secret().as_bytes(), &salt, &parameters, &mut key).map_err(io::Error::other)?;
    let file = KeyFile {
        hostname: None,
        username: Some("pvebackup".into()),
        created: Some(jiff::Zoned::now()),
        kdf: "scrypt".into(),
        n: 1 << LOG_N,
        r: 8,
        p: 1,
        data: seal(&key, serde_json::to_vec(&repository.key())?)?,
        salt,
    };
    let content = serde_json::to_vec(&file)?;
    let digest: [u8; 32] = Sha256::digest(&content).into();
    let write = |error: Box<rustic_core::RusticError>| io::Error::other(error.display_log());
    backend.write_bytes(FileType::Key, &Id::new(digest), false, content.into()).map_err(write)?;
    backend.remove(FileType::Key, &slow, false).map_err(write)
}
