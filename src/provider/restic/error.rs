//! From rustic's errors to ours.

use crate::provider::{ErrorKind, ProviderError};
use rustic_core::RusticError;
use std::error::Error;

/// rustic's own text runs over many lines and ends in advice for its developers; this is the short form, with secrets
/// taken out.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Cause(String);

/// Texts that must not appear in messages: passwords inside of URLs, secret backend options.
#[derive(Clone, Default)]
pub(super) struct Secrets(Vec<String>);

impl Secrets {
    pub(super) fn add(&mut self, secret: &str) {
        // Shorter ones would blacken ordinary words.
        if secret.len() >= 4 {
            self.0.push(secret.to_owned());
        }
    }

    pub(super) fn redact(&self, text: &str) -> String {
        self.0.iter().fold(text.to_owned(), |text, secret| text.replace(secret.as_str(), "***"))
    }
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Secrets({})", self.0.len())
    }
}

/// Whether the cause is a full or quota-limited target. Remote servers tell it only in words.
fn is_no_space(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<std::io::Error>()
            && matches!(io.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
        {
            return true;
        }
        let text = error.to_string();
        if ["No space left on device", "Disk quota exceeded", "507 Insufficient Storage"]
            .iter()
            .any(|t| text.contains(t))
        {
            return true;
        }
        next = error.source();
    }
    false
}

/// Wraps an error of rustic; `kind` is what it means at this place unless the error itself says more.
pub(super) fn wrap(
    secrets: &Secrets,
    kind: ErrorKind,
    message: impl Into<String>,
    error: &RusticError,
) -> ProviderError {
    let kind = if error.is_incorrect_password() {
        ErrorKind::Credentials
    } else if is_no_space(error) {
        ErrorKind::NoSpace
    } else {
        kind
    };
    ProviderError::caused_by(kind, message, Cause(secrets.redact(&short(error))))
}

/// One line for an error and its causes: rustic prints its own as pages with advice for developers and a backtrace.
fn short(error: &RusticError) -> String {
    let text = error.display_log();
    let text = text.strip_prefix("Error: ").unwrap_or(&text);
    let own = text.split(": caused by: ").next().unwrap_or(text);
    match error.source() {
        None => own.to_owned(),
        Some(cause) => {
            match cause.downcast_ref::<Box<RusticError>>().map(AsRef::as_ref).or_else(|| cause.downcast_ref()) {
                Some(cause) => format!("{own}: {}", short(cause)),
                None => format!("{own}: {}", cause.to_string().lines().next().unwrap_or_default()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustic_core::ErrorKind as RusticKind;

    #[test]
    fn a_full_target_is_recognised_through_the_causes() {
        let full = RusticError::with_source(RusticKind::InputOutput, "writing", std::io::Error::from_raw_os_error(28));
        let wrapped = wrap(&Secrets::default(), ErrorKind::Other, "pack cannot be written", &full);
        assert_eq!(wrapped.kind, ErrorKind::NoSpace);
        let other = RusticError::with_source(RusticKind::InputOutput, "writing", std::io::Error::from_raw_os_error(5));
        assert_eq!(wrap(&Secrets::default(), ErrorKind::Damaged, "x", &other).kind, ErrorKind::Damaged);
    }

    #[test]
    fn causes_are_told_in_one_line() {
        let inner = RusticError::new(RusticKind::Cryptography, "MAC check failed");
        let outer = RusticError::with_source(RusticKind::Backend, "reading failed", inner);
        let text = short(&outer);
        assert!(text.contains("reading failed") && text.contains("MAC check failed"), "{text}");
        assert!(!text.contains('\n') && !text.to_lowercase().contains("backtrace"), "{text}");
    }

    #[test]
    fn secrets_do_not_reach_the_text() {
        let mut secrets = Secrets::default();
        secrets.add("hunter22");
        let error = RusticError::new(RusticKind::Backend, "cannot reach `{url}`")
            .attach_context("url", "http://me:hunter22@host/");
        let wrapped = wrap(&secrets, ErrorKind::Other, "x", &error);
        let text = format!("{wrapped:?} {:?}", wrapped.source.as_ref().map(ToString::to_string));
        assert!(!text.contains("hunter22"), "{text}");
        assert!(text.contains("http://me:***@host/"), "{text}");
        assert!(!format!("{secrets:?}").contains("hunter22"));
    }
}
