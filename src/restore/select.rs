//! Which archive a selector means.

use super::RestoreError;
use crate::{archive::Selector, provider::ArchiveInfo};

/// Candidates that a message names.
const SHOWN: usize = 6;

/// The one archive that `selector` means, of `guest` if given. The list may have any order.
///
/// `latest` needs a guest, unless all archives are of one. An id may be shortened as long as it is unique.
///
/// # Errors
/// [`RestoreError::NoArchive`] and [`RestoreError::AmbiguousArchive`].
pub fn resolve(selector: &Selector, list: &[ArchiveInfo], guest: Option<&str>) -> Result<ArchiveInfo, RestoreError> {
    let mut of_guest: Vec<&ArchiveInfo> =
        list.iter().filter(|archive| guest.is_none_or(|g| archive.name.guest() == g)).collect();
    of_guest.sort_by_key(|archive| archive.name.time());
    let wanted = match selector {
        Selector::Latest(0) => "latest".to_owned(),
        Selector::Latest(back) => format!("latest~{back}"),
        Selector::Name(name) => name.to_string(),
        Selector::Id(id) => id.clone(),
    };
    let missing = || RestoreError::NoArchive { wanted: wanted.clone(), guest: guest.map(str::to_owned) };
    let ambiguous = |mut candidates: Vec<String>| {
        candidates.dedup();
        if candidates.len() > SHOWN {
            let more = candidates.len() - SHOWN;
            candidates.truncate(SHOWN);
            candidates.push(format!("{more} more"));
        }
        RestoreError::AmbiguousArchive { wanted: wanted.clone(), candidates }
    };
    let fitting: Vec<&ArchiveInfo> = match selector {
        Selector::Latest(back) => {
            let mut guests: Vec<String> =
                of_guest.iter().map(|a| format!("{wanted} of guest {}", a.name.guest())).collect();
            guests.sort();
            guests.dedup();
            if guests.len() > 1 {
                return Err(ambiguous(guests));
            }
            let time = |back: usize| of_guest.len().checked_sub(back + 1).map(|at| of_guest[at]);
            back.checked_add(1).and_then(|_| time(*back)).into_iter().collect()
        }
        Selector::Name(name) => of_guest.into_iter().filter(|a| a.name == *name).collect(),
        Selector::Id(id) => {
            let id = id.to_ascii_lowercase();
            let begins: Vec<&ArchiveInfo> =
                of_guest.into_iter().filter(|a| a.id.0.to_ascii_lowercase().starts_with(&id)).collect();
            match begins.iter().find(|a| a.id.0.eq_ignore_ascii_case(&id)) {
                Some(exact) => vec![*exact],
                None => begins,
            }
        }
    };
    match fitting.as_slice() {
        [] => Err(missing()),
        [one] => Ok((*one).clone()),
        several => Err(ambiguous(several.iter().map(|a| format!("{} ({})", a.name, a.id)).collect())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{archive::ArchiveId, restore::RestoreErrorKind};

    fn archive(id: &str, name: &str) -> ArchiveInfo {
        ArchiveInfo {
            id: ArchiveId(id.into()),
            name: name.parse().expect("name"),
            disks: Vec::new(),
            size: None,
            added_bytes: None,
        }
    }

    fn list() -> Vec<ArchiveInfo> {
        vec![
            archive("ab03", "pve-qemu-100-2026-01-03T00:00:00Z"),
            archive("ab01", "pve-qemu-100-2026-01-01T00:00:00Z"),
            archive("ab0102", "pve-qemu-100-2026-01-02T00:00:00Z"),
            archive("cd01", "pve-qemu-web-2026-01-09T00:00:00Z"),
            archive("cd02", "pve-qemu-web-2026-01-09T00:00:00Z"),
        ]
    }

    fn chosen(selector: &str, guest: Option<&str>) -> Result<String, RestoreError> {
        resolve(&selector.parse().expect("selector"), &list(), guest).map(|a| a.id.0)
    }

    #[test]
    fn latest_counts_back_by_time() {
        assert_eq!(chosen("latest", Some("100")).expect("one"), "ab03");
        assert_eq!(chosen("latest~1", Some("100")).expect("one"), "ab0102");
        assert_eq!(chosen("latest~2", Some("100")).expect("one"), "ab01");
        for selector in ["latest~3", "latest~18446744073709551615"] {
            let error = chosen(selector, Some("100")).expect_err("too far");
            assert_eq!(error.kind(), RestoreErrorKind::NotFound);
            assert_eq!(error.to_string(), format!("no archive `{selector}` of guest `100`"));
        }
    }

    #[test]
    fn latest_of_several_guests_is_ambiguous() {
        let error = chosen("latest", None).expect_err("two guests");
        assert_eq!(error.to_string(), "`latest` may be any of: latest of guest 100, latest of guest web");
        assert_eq!(error.kind(), RestoreErrorKind::Usage);
        let of_one: Vec<ArchiveInfo> = list().into_iter().filter(|a| a.name.guest() == "100").collect();
        assert_eq!(resolve(&Selector::Latest(0), &of_one, None).expect("one guest").id.0, "ab03");
    }

    #[test]
    fn names_and_ids_are_exact_or_unique() {
        assert_eq!(chosen("pve-qemu-100-2026-01-01T00:00:00Z", None).expect("one"), "ab01");
        assert_eq!(chosen("AB03", None).expect("case does not matter"), "ab03");
        assert_eq!(chosen("ab01", None).expect("exact beats longer ones"), "ab01");
        assert_eq!(chosen("ab010", None).expect("unique"), "ab0102");
        assert!(chosen("ab0", None).expect_err("three").to_string().contains("(ab0102)"));
        assert!(
            chosen("pve-qemu-web-2026-01-09T00:00:00Z", None).expect_err("same name").to_string().contains("(cd02)")
        );
        assert!(matches!(chosen("cd01", Some("100")), Err(RestoreError::NoArchive { .. })), "of another guest");
        assert!(matches!(chosen("ef", None), Err(RestoreError::NoArchive { .. })));
    }
}
