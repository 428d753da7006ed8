//! Where a repository is, and how to use it.

use std::{collections::HashSet, fmt, iter, path::PathBuf, sync::Arc, time::Duration};

/// borg's encryption modes.
const ENCRYPTION: [&str; 7] =
    ["none", "authenticated", "authenticated-blake2", "repokey", "repokey-blake2", "keyfile", "keyfile-blake2"];
/// Arguments of `borg create` that may be added, each with a value. Whatever changes which files borg reads, how it recognizes
/// them, or what it prints, is ours.
const EXTRA: [&str; 4] = ["--comment", CHUNKER_PARAMS, "--upload-buffer", "--umask"];
/// How borg cuts files into chunks. borg takes it only once.
pub(super) const CHUNKER_PARAMS: &str = "--chunker-params";

/// Where the repository's passphrase comes from. It is in no argument and no environment of borg's.
#[derive(Clone, PartialEq, Eq)]
pub enum Passphrase {
    /// The first line of a file, which borg has read by a command.
    File(PathBuf),
    /// Standard output of a program and its arguments; no shell. borg runs it.
    Command(Vec<String>),
    /// In our memory; each borg gets it through a pipe.
    Given(Arc<str>),
    /// The repository needs none.
    None,
}

impl Passphrase {
    /// A passphrase that is known already.
    pub fn given(text: &str) -> Self {
        Self::Given(text.into())
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Command(words) => f.debug_tuple("Command").field(&words.first()).finish(),
            Self::Given(_) => f.write_str("Given"),
            Self::None => f.write_str("None"),
        }
    }
}

/// A repository and how to reach it.
#[derive(Clone, Debug)]
pub struct BorgOptions {
    /// A path, or `ssh://user@host:port/path`.
    pub repository: String,
    /// The passphrase.
    pub passphrase: Passphrase,
    /// borg here: a path, or a name to look for in `PATH`.
    pub program: PathBuf,
    /// borg on the other side of SSH.
    pub remote_path: Option<String>,
    /// SSH key file.
    pub ssh_key: Option<PathBuf>,
    /// File with the host keys that are trusted, instead of the user's own.
    pub known_hosts: Option<PathBuf>,
    /// Where the keys of the `keyfile` modes are; `config/keys` in our directory if not set.
    pub keys_dir: Option<PathBuf>,
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
    /// How often to tell where a long `borg create` stands.
    pub progress_pause: Duration,
    /// Our own directory of this target: borg's caches, and the views.
    pub directory: PathBuf,
}

impl BorgOptions {
    /// A repository with defaults for all else.
    pub fn new(repository: impl Into<String>, passphrase: Passphrase, directory: PathBuf) -> Self {
        Self {
            repository: repository.into(),
            passphrase,
            program: "borg".into(),
            remote_path: None,
            ssh_key: None,
            known_hosts: None,
            keys_dir: None,
            compression: None,
            encryption: "repokey-blake2".into(),
            lock_wait: Duration::from_mins(1),
            upload_ratelimit: None,
            extra_arguments: Vec::new(),
            progress_pause: Duration::from_secs(10),
            directory,
        }
    }

    /// Looks for what borg would refuse only when the guest has its snapshot access, and for what would break our archives.
    ///
    /// # Errors
    /// The name of the option, and what is wrong with it.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        if !ENCRYPTION.contains(&self.encryption.as_str()) {
            return Err(("encryption", format!("`{}` is none of {}", self.encryption, ENCRYPTION.join(", "))));
        }
        if let Some(text) = self.compression.as_deref().filter(|text| !is_compression(text)) {
            let known = "none, lz4, zstd[,1-22], zlib[,0-9], lzma[,0-9], auto,C[,L], obfuscate,SPEC,C[,L]";
            return Err(("compression", format!("`{text}` is none of {known}")));
        }
        if self.upload_ratelimit == Some(0) {
            return Err(("upload-ratelimit", "0 would be no limit; leave it out".into()));
        }
        let mut seen = HashSet::new();
        for (name, value) in self.extra() {
            let wrong = |what: String| Err(("extra-arguments", format!("`{name}` {what}")));
            if !EXTRA.contains(&name) {
                return wrong(format!("is none of {}: others change what borg reads or prints", EXTRA.join(", ")));
            }
            let Some(value) = value else { return wrong("needs a value".into()) };
            if !seen.insert(name) {
                return wrong("is there twice".into());
            }
            let fits = match name {
                CHUNKER_PARAMS => is_chunker(value),
                "--umask" => u32::from_str_radix(value, 8).is_ok(),
                "--upload-buffer" => value.parse::<u32>().is_ok(),
                _ => true,
            };
            if !fits {
                return wrong(format!("cannot be `{value}`"));
            }
        }
        Ok(())
    }

    /// The extra arguments: names, and values if there are any.
    pub(super) fn extra(&self) -> impl Iterator<Item = (&str, Option<&str>)> {
        let mut words = self.extra_arguments.iter().map(String::as_str);
        iter::from_fn(move || {
            let word = words.next()?;
            Some(word.split_once('=').map_or_else(|| (word, words.next()), |(name, value)| (name, Some(value))))
        })
    }

    /// How borg cuts the segments' files, if the user has said that.
    pub(super) fn chunker_params(&self) -> Option<&str> {
        self.extra().find(|(name, _)| *name == CHUNKER_PARAMS)?.1
    }

    /// The passphrase that borg is to find on its standard input.
    pub(super) fn given_passphrase(&self) -> Option<&str> {
        match &self.passphrase {
            Passphrase::Given(text) => Some(text),
            _ => None,
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

    /// What borg remembers of repositories to tell one from another.
    pub(super) fn security(&self) -> PathBuf {
        self.directory.join("security")
    }

    /// Where a guest's view is mounted: in every run at the same path, which is what borg's files cache knows files by.
    pub(super) fn view(&self, guest: &str) -> PathBuf {
        self.directory.join("view").join(guest)
    }

    /// Which archives the files cache of a guest belongs to.
    pub(super) fn known(&self, guest: &str) -> PathBuf {
        self.known_dir().join(format!("{guest}.json"))
    }

    /// The segment table of a disk in its last archive.
    pub(super) fn known_table(&self, guest: &str, disk: &str) -> PathBuf {
        self.directory.join("tables").join(guest).join(disk)
    }

    /// The borg program that was found to be one that we know.
    pub(super) fn known_program(&self) -> PathBuf {
        self.directory.join("program")
    }

    pub(super) fn known_dir(&self) -> PathBuf {
        self.directory.join("known")
    }
}

/// As borg's `CompressionSpec` takes it.
fn is_compression(text: &str) -> bool {
    let (name, rest) = text.split_once(',').map_or((text, None), |(name, rest)| (name, Some(rest)));
    let level = |highest: u8, lowest: u8| {
        rest.is_none_or(|level| level.parse::<u8>().is_ok_and(|level| (lowest..=highest).contains(&level)))
    };
    match name {
        "none" | "lz4" => rest.is_none(),
        "zlib" | "lzma" => level(9, 0),
        "zstd" => level(22, 1),
        "auto" => rest.is_some_and(|inner| !inner.starts_with("auto") && is_compression(inner)),
        "obfuscate" => rest.and_then(|rest| rest.split_once(',')).is_some_and(|(spec, inner)| {
            spec.parse::<u16>().is_ok() && !inner.starts_with("obfuscate") && is_compression(inner)
        }),
        _ => false,
    }
}

/// As borg's `ChunkerParams` takes it without a warning.
fn is_chunker(text: &str) -> bool {
    /// borg's `MAX_DATA_SIZE`.
    const LONGEST: u64 = 20_971_479;
    let (name, rest) = text.split_once(',').unwrap_or((text, ""));
    let numbers = |text: &str| text.split(',').map(str::parse).collect::<Result<Vec<u64>, _>>().unwrap_or_default();
    let buzhash = |numbers: Vec<u64>| match numbers[..] {
        [min, max, mask, _window] => min >= 6 && (min..=max).contains(&mask) && max <= 23,
        _ => false,
    };
    match name {
        "default" => rest.is_empty(),
        "fixed" => matches!(numbers(rest)[..], [64..=LONGEST] | [64..=LONGEST, 0..=LONGEST]),
        "buzhash" => buzhash(numbers(rest)),
        _ => buzhash(numbers(text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn only_paths_are_made_absolute() {
        let location = |text: &str| BorgOptions::new(text, Passphrase::None, "/s".into()).location();
        assert_eq!(location("ssh://b@h:2/./x"), "ssh://b@h:2/./x");
        assert_eq!(location("b@h:x"), "b@h:x");
        assert_eq!(location("/a/b"), "/a/b");
        assert!(Path::new(&location("a")).is_absolute());
    }

    #[test]
    fn what_borg_would_refuse_late_is_refused_at_once() {
        for good in ["none", "lz4", "zstd", "zstd,22", "zlib,0", "lzma,9", "auto,zstd,3", "obfuscate,110,auto,zlib"] {
            assert!(is_compression(good), "{good}");
        }
        for bad in
            ["", "lz4,1", "zstd,0", "zstd,23", "zstd,x", "gzip", "auto", "auto,auto,lz4", "obfuscate,lz4", "zstd,"]
        {
            assert!(!is_compression(bad), "{bad}");
        }
        let refused = |change: fn(&mut BorgOptions)| {
            let mut options = BorgOptions::new("/r", Passphrase::None, "/s".into());
            change(&mut options);
            options.check().expect_err("must be refused").0
        };
        assert_eq!(refused(|o| o.encryption = "repokey-aes".into()), "encryption");
        assert_eq!(refused(|o| o.compression = Some("gzip".into())), "compression");
        assert_eq!(refused(|o| o.upload_ratelimit = Some(0)), "upload-ratelimit");
    }

    #[test]
    fn arguments_that_would_break_an_archive_are_refused() {
        let check = |words: &[&str]| {
            let mut options = BorgOptions::new("/r", Passphrase::None, "/s".into());
            options.extra_arguments = words.iter().map(ToString::to_string).collect();
            options.check()
        };
        assert_eq!(check(&["--comment", "--dry-run", "--umask=0077", "--chunker-params", "fixed,131072"]), Ok(()));
        for bad in [
            "--files-cache=ctime,size",
            "--dry-run",
            "-n",
            "--read-special",
            "--exclude=disks",
            "-x",
            "--list",
            "--json",
            "--checkpoint-interval=1",
            "--timestamp=2020-01-01",
            "--paths-from-stdin",
            "--patterns-from=x",
            "--stdin-name=x",
            "--comm=abbreviated",
            "/etc",
            "--",
        ] {
            let (what, why) = check(&[bad]).expect_err(bad);
            assert_eq!(what, "extra-arguments");
            assert!(why.contains(bad.split('=').next().expect("name")), "{why}");
        }
        assert!(check(&["--comment"]).expect_err("no value").1.contains("needs a value"));
        assert!(check(&["--umask=0077", "--umask", "0027"]).expect_err("twice").1.contains("twice"));
        for bad in ["--umask=u=rw", "--umask=9", "--upload-buffer=1G", "--chunker-params=fixed"] {
            assert!(check(&[bad]).expect_err(bad).1.contains("cannot be"), "{bad}");
        }
    }

    #[test]
    fn ways_to_cut_chunks_are_those_of_borg() {
        for good in ["default", "fixed,64", "fixed,131072,4096", "19,23,21,4095", "buzhash,10,23,16,4095"] {
            assert!(is_chunker(good), "{good}");
        }
        for bad in [
            "",
            "fixed",
            "fixed,63",
            "fixed,20971480",
            "fixed,4096,1,2",
            "19,23,21",
            "19,24,21,4095",
            "buzhash,5,23,21,1",
            "22,23,21,1",
        ] {
            assert!(!is_chunker(bad), "{bad}");
        }
    }
}
