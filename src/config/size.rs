//! Sizes and rates as people type them.
//!
//! K, M, G and T are powers of 1024, as in vzdump and qemu-img, with or without `i`, `iB`. `KB`, `MB`, … are refused:
//! they are powers of 1000 to everybody who writes them out.

use std::num::NonZeroU64;
use thiserror::Error;

/// Why a text is no size.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SizeError {
    /// Not a number with a unit.
    #[error(
        "`{0}` is no size: a whole number, then nothing, `K`, `M`, `G` or `T` (powers of 1024; also `KiB`, `MiB`, …)"
    )]
    Syntax(String),
    /// The unit is decimal.
    #[error("`{0}` has a decimal unit; write `{1}iB`, which is a power of 1024")]
    Decimal(String, char),
    /// Too large.
    #[error("`{0}` is too large")]
    Overflow(String),
}

/// Reads a size in bytes: `4096`, `512k`, `4M`, `4MiB`, `4 GiB`.
///
/// # Errors
/// When it is anything else, or does not fit 64 bits.
pub fn parse_bytes(text: &str) -> Result<u64, SizeError> {
    parse(text, 1)
}

/// Reads a rate: a plain number is KiB/s as in vzdump, a size is bytes a second (`200MiB`, `200MiB/s`). The result is in
/// bytes a second; `None`, written as 0, means no limit.
///
/// # Errors
/// When it is anything else, or does not fit 64 bits.
pub fn parse_rate(text: &str) -> Result<Option<NonZeroU64>, SizeError> {
    let trimmed = text.trim();
    parse(trimmed.strip_suffix("/s").unwrap_or(trimmed), 1024).map(NonZeroU64::new)
}

fn parse(text: &str, without_unit: u64) -> Result<u64, SizeError> {
    let shown = || text.chars().take(40).collect::<String>();
    let trimmed = text.trim();
    let digits = trimmed.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = trimmed.split_at(digits);
    if number.is_empty() {
        return Err(SizeError::Syntax(shown()));
    }
    let unit = unit.trim_start();
    let mut letters = unit.chars();
    let exponent = match letters.next() {
        None => None,
        Some('b' | 'B') if letters.as_str().is_empty() => Some(0),
        Some(letter) => {
            let power = "KMGT".find(letter.to_ascii_uppercase()).ok_or_else(|| SizeError::Syntax(shown()))?;
            match letters.as_str() {
                "" | "i" | "iB" | "ib" => Some(power as u32 + 1),
                "b" | "B" => return Err(SizeError::Decimal(shown(), letter.to_ascii_uppercase())),
                _ => return Err(SizeError::Syntax(shown())),
            }
        }
    };
    let factor = exponent.map_or(without_unit, |e| 1024u64.pow(e));
    let overflow = || SizeError::Overflow(shown());
    number.parse::<u64>().map_err(|_| overflow())?.checked_mul(factor).ok_or_else(overflow)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn units_are_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("512B", 512),
            ("512k", 512 << 10),
            ("4M", 4 << 20),
            ("4Mi", 4 << 20),
            ("4MiB", 4 << 20),
            (" 4 GiB ", 4 << 30),
            ("2t", 2 << 40),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn junk_decimal_units_and_overflow_are_refused() {
        for text in ["", " ", "M", "-1", "+1", "1.5G", "4X", "4MiBs", "4 M B", "0x10", "4P", "4é", "1_000", "4BB", "４"]
        {
            assert!(matches!(parse_bytes(text), Err(SizeError::Syntax(_))), "{text}");
        }
        assert_eq!(parse_bytes("4MB"), Err(SizeError::Decimal("4MB".into(), 'M')));
        for text in ["18446744073709551616", "18014398509481984K", "16777216T"] {
            assert!(matches!(parse_bytes(text), Err(SizeError::Overflow(_))), "{text}");
        }
    }

    #[test]
    fn a_rate_without_unit_is_in_kib() {
        assert_eq!(parse_rate("100"), Ok(NonZeroU64::new(100 << 10)));
        assert_eq!(parse_rate("200MiB"), Ok(NonZeroU64::new(200 << 20)));
        assert_eq!(parse_rate("200M/s"), Ok(NonZeroU64::new(200 << 20)));
        assert_eq!(parse_rate("512B/s"), Ok(NonZeroU64::new(512)));
        assert_eq!(parse_rate("0"), Ok(None));
        assert!(parse_rate("fast").is_err());
        assert!(parse_rate("18014398509481984").is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_a_size_or_an_error(text in ".{0,30}") {
            let _ = parse_bytes(&text);
            let _ = parse_rate(&text);
        }

        #[test]
        fn a_number_with_unit_means_its_product(number in 0u64..1 << 20, power in 0usize..5) {
            let text = format!("{number}{}", ["", "K", "M", "G", "T"][power]);
            prop_assert_eq!(parse_bytes(&text), Ok(number << (10 * power)));
        }
    }
}
