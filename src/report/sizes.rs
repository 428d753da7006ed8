//! Sizes, rates and durations as they are shown.

use bytesize::ByteSize;
use std::time::Duration;

/// `4.0 GiB`: with one decimal, as vzdump writes sizes.
pub fn bytes(count: u64) -> String {
    ByteSize(count).display().iec().to_string()
}

/// `4 GiB`, `1.5 GiB`: without a decimal that says nothing.
pub fn short_bytes(count: u64) -> String {
    bytes(count).replacen(".0 ", " ", 1)
}

/// `136.0 MiB/s`, for `count` bytes in `time`.
pub fn rate(count: u64, time: Duration) -> String {
    let seconds = time.as_secs_f64().max(0.001);
    format!("{}/s", bytes((count as f64 / seconds) as u64))
}

/// `1m12s`, `2h05m00s`, `12s`; `4 ms` and `0.4 ms` below a second.
pub fn duration(time: Duration) -> String {
    if time < Duration::from_millis(1) && !time.is_zero() {
        return format!("{:.1} ms", time.as_secs_f64() * 1000.0);
    }
    if time < Duration::from_secs(1) {
        return format!("{} ms", time.as_millis());
    }
    let seconds = time.as_secs() + u64::from(time.subsec_millis() >= 500);
    let (hours, minutes, rest) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match (hours, minutes) {
        (0, 0) => format!("{rest}s"),
        (0, _) => format!("{minutes}m{rest:02}s"),
        _ => format!("{hours}h{minutes:02}m{rest:02}s"),
    }
}

/// Percent of `todo` that is `done`, rounded down; 100 only when all is done.
pub fn percent(done: u64, todo: u64) -> u64 {
    if done >= todo { 100 } else { (u128::from(done) * 100 / u128::from(todo)) as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary_with_one_decimal() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(4 << 30), "4.0 GiB");
        assert_eq!(bytes(1_825_361_101), "1.7 GiB");
        assert_eq!(short_bytes(64 << 30), "64 GiB");
        assert_eq!(short_bytes((64 << 30) + (1 << 29)), "64.5 GiB");
        assert!(bytes(u64::MAX).ends_with("EiB"));
        assert_eq!(rate(272 << 20, Duration::from_secs(2)), "136.0 MiB/s");
        assert!(rate(u64::MAX, Duration::ZERO).ends_with("EiB/s"));
    }

    #[test]
    fn durations_have_the_units_that_matter() {
        for (time, text) in [
            (Duration::ZERO, "0 ms"),
            (Duration::from_micros(400), "0.4 ms"),
            (Duration::from_micros(4200), "4 ms"),
            (Duration::from_millis(999), "999 ms"),
            (Duration::from_millis(1499), "1s"),
            (Duration::from_secs(12), "12s"),
            (Duration::from_millis(59_900), "1m00s"),
            (Duration::from_secs(72), "1m12s"),
            (Duration::from_mins(125), "2h05m00s"),
        ] {
            assert_eq!(duration(time), text);
        }
    }

    #[test]
    fn a_hundred_percent_means_all() {
        assert_eq!(percent(0, 0), 100);
        assert_eq!(percent(999, 1000), 99);
        assert_eq!(percent(u64::MAX - 1, u64::MAX), 99);
        assert_eq!(percent(7, 5), 100);
    }
}
