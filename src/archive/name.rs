//! How archives are named and chosen.

use jiff::{Timestamp, tz::TimeZone};
use std::{fmt, str::FromStr};
use thiserror::Error;

/// What the repository calls an archive, for example a restic snapshot id. Opaque, stable, unique in the repository.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct ArchiveId(pub String);

impl fmt::Display for ArchiveId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name that a user sees: `pve-qemu-GUEST-2026-01-31T02:00:07Z`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ArchiveName {
    guest: String,
    time: Timestamp,
}

/// Why a text is no archive name.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("`{0}` is no archive name (pve-qemu-GUEST-YYYY-MM-DDTHH:MM:SSZ)")]
pub struct NameError(String);

const PREFIX: &str = "pve-qemu-";
const TIME: &str = "%Y-%m-%dT%H:%M:%SZ";

impl ArchiveName {
    /// Name of a backup of `guest` started at `time`; the time is cut to whole seconds.
    pub fn new(guest: &str, time: Timestamp) -> Self {
        let time = Timestamp::from_second(time.as_second()).unwrap_or(time);
        Self { guest: guest.to_owned(), time }
    }

    /// Name of a backup of `guest` started at `start`, later than all the guest's names among `others`. The newest archive has to
    /// be the last one also after the host's clock was set back: `latest`, and what is kept, go by the names. `None` at the end
    /// of time.
    pub fn after<'a>(guest: &str, start: Timestamp, others: impl IntoIterator<Item = &'a Self>) -> Option<Self> {
        let newest = others.into_iter().filter(|other| other.guest == guest).map(|other| other.time.as_second()).max();
        let second = start.as_second().max(newest.map_or(i64::MIN, |newest| newest.saturating_add(1)));
        Some(Self::new(guest, Timestamp::from_second(second).ok()?))
    }

    /// The guest's id: a VMID or a configured name.
    pub fn guest(&self) -> &str {
        &self.guest
    }

    /// When the backup was started.
    pub fn time(&self) -> Timestamp {
        self.time
    }
}

impl fmt::Display for ArchiveName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}-{}", self.guest, self.time.to_zoned(TimeZone::UTC).strftime(TIME))
    }
}

impl FromStr for ArchiveName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let error = || NameError(text.chars().take(100).collect());
        let rest = text.strip_prefix(PREFIX).ok_or_else(error)?;
        let cut = rest.len().checked_sub("-2026-01-31T02:00:07Z".len()).ok_or_else(error)?;
        let (guest, time) = rest.split_at_checked(cut).ok_or_else(error)?;
        let time: Timestamp = time.strip_prefix('-').and_then(|t| t.parse().ok()).ok_or_else(error)?;
        let name = Self::new(guest, time);
        if crate::guest::GuestId::from_str(guest).is_err() || name.to_string() != text {
            return Err(error());
        }
        Ok(name)
    }
}

impl TryFrom<String> for ArchiveName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<ArchiveName> for String {
    fn from(name: ArchiveName) -> Self {
        name.to_string()
    }
}

/// How a user chooses an archive on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    /// `latest` is 0, `latest~1` the one before, and so on.
    Latest(usize),
    /// A full archive name.
    Name(ArchiveName),
    /// Anything else: an id (hex digits, or `GUEST/qemu-SECONDS`) or the beginning of one.
    Id(String),
}

impl FromStr for Selector {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if let Some(rest) = text.strip_prefix("latest") {
            let back = match rest.strip_prefix('~') {
                None if rest.is_empty() => Some(0),
                None => None,
                Some(number) => number.parse().ok(),
            };
            return back.map(Self::Latest).ok_or_else(|| NameError(text.to_owned()));
        }
        if text.starts_with(PREFIX) {
            return text.parse().map(Self::Name);
        }
        let is_hex = !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit());
        let is_directory = text.split_once('/').is_some_and(|(guest, name)| {
            let digits = name.strip_prefix("qemu-").unwrap_or_default();
            crate::guest::GuestId::from_str(guest).is_ok()
                && !digits.is_empty()
                && digits.bytes().all(|b| b.is_ascii_digit())
        });
        if !is_hex && !is_directory {
            return Err(NameError(text.to_owned()));
        }
        Ok(Self::Id(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_being_written_and_read() {
        let name = ArchiveName::new("web-01", "2026-01-31T02:00:07.5Z".parse().expect("time"));
        assert_eq!(name.to_string(), "pve-qemu-web-01-2026-01-31T02:00:07Z");
        assert_eq!(name.to_string().parse(), Ok(name));
    }

    #[test]
    fn a_new_archive_is_the_newest_also_when_the_clock_went_back() {
        let time = |text: &str| text.parse().expect("time");
        let taken = [
            ArchiveName::new("web", time("2026-01-31T02:00:07Z")),
            ArchiveName::new("db", time("2036-01-01T00:00:00Z")),
        ];
        let after = |start: &str| ArchiveName::after("web", time(start), &taken).map(|name| name.time());
        assert_eq!(after("2026-02-01T02:00:00Z"), Some(time("2026-02-01T02:00:00Z")));
        assert_eq!(after("2026-01-31T02:00:07.4Z"), Some(time("2026-01-31T02:00:08Z")));
        assert_eq!(after("2001-01-01T00:00:00Z"), Some(time("2026-01-31T02:00:08Z")));
        assert_eq!(ArchiveName::after("web", Timestamp::MIN, &[ArchiveName::new("web", Timestamp::MAX)]), None);
    }

    #[test]
    fn foreign_names_are_refused() {
        for text in
            ["", "pve-qemu-", "pve-qemu-1-2026", "pve-lxc-1-2026-01-31T02:00:07Z", "pve-qemu-../x-2026-01-31T02:00:07Z"]
        {
            assert!(text.parse::<ArchiveName>().is_err(), "{text}");
        }
    }

    #[test]
    fn selectors() {
        assert_eq!("latest".parse(), Ok(Selector::Latest(0)));
        assert_eq!("latest~2".parse(), Ok(Selector::Latest(2)));
        assert!("latest2".parse::<Selector>().is_err());
        assert_eq!("12ab".parse(), Ok(Selector::Id("12ab".into())));
        assert_eq!("web/qemu-17".parse(), Ok(Selector::Id("web/qemu-17".into())));
        for text in ["pve-qemu-1", "web/qemu-", "web/17", "../qemu-17", "/qemu-17", "web/qemu-1/2"] {
            assert!(text.parse::<Selector>().is_err(), "{text}");
        }
    }
}
