//! Ids that nobody else has.

use crate::config::create_private_dir;
use jiff::Timestamp;
use std::{
    fs::{self, File},
    hash::{BuildHasher, Hasher, RandomState},
    io::{self, Write},
    path::Path,
};

/// 16 hex digits that no other run has: the hasher's keys are random for every process and call.
pub fn new_id() -> String {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.write_i128(Timestamp::now().as_nanosecond());
    format!("{:016x}", hasher.finish())
}

/// The id of the state directory `state`. What lives longer than a run outside of it, and means something only with its records, is
/// named after it. Made when it is asked for first; made anew when it cannot be made out.
///
/// # Errors
/// When the file cannot be read or written.
pub fn state_id(state: &Path) -> io::Result<String> {
    let path = state.join("id");
    let known = |text: &str| text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
    match fs::read(&path) {
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            if known(text.trim_end()) {
                return Ok(text.trim_end().to_owned());
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let id = new_id();
    create_private_dir(state)?;
    let mut file = tempfile::NamedTempFile::new_in(state)?;
    writeln!(file, "{id}")?;
    file.as_file().sync_all()?;
    file.persist(&path).map_err(|error| error.error)?;
    File::open(state)?.sync_all()?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_directory_keeps_an_id_that_no_other_has() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let id_in = |dir: &Path| state_id(&dir.join("state")).unwrap();
        let id = id_in(one.path());
        assert_eq!((id.len(), id_in(one.path())), (16, id.clone()));
        assert_ne!(id_in(other.path()), id);
        // Cut by a crash: the bitmaps that were named after it are not found again, which means full backups.
        fs::write(one.path().join("state/id"), &id[..7]).unwrap();
        assert_ne!(id_in(one.path()), id);
    }
}
