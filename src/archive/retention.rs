//! Which archives of a guest are kept: vzdump's `prune-backups`. Pure: times in, verdicts out.

use super::ArchiveName;
use jiff::{Timestamp, Zoned, tz::TimeZone};
use std::{collections::HashSet, fmt, str::FromStr};
use thiserror::Error;

/// A set of rules, as vzdump writes it: `keep-last=3,keep-daily=7`.
///
/// The rules go from `keep-last` to `keep-yearly`. Each looks at the archives that no rule before it has decided, newest
/// first, and keeps the newest one of every hour, day, … that has none yet, until it has kept as many as it says; the older
/// ones of the same hour, day, … are not kept. What no rule keeps is removed. The newest archive is always kept: dirty
/// bitmaps are relative to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    all: bool,
    /// In the order of [`Period::ALL`].
    counts: [u32; Period::ALL.len()],
}

/// What a rule counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Period {
    Last,
    Hourly,
    Daily,
    Weekly,
    Monthly,
    Yearly,
}

impl Period {
    const ALL: [Self; 6] = [Self::Last, Self::Hourly, Self::Daily, Self::Weekly, Self::Monthly, Self::Yearly];

    fn rule(self) -> &'static str {
        match self {
            Self::Last => "keep-last",
            Self::Hourly => "keep-hourly",
            Self::Daily => "keep-daily",
            Self::Weekly => "keep-weekly",
            Self::Monthly => "keep-monthly",
            Self::Yearly => "keep-yearly",
        }
    }

    /// The same for all times that lie in the same period.
    fn of(self, time: &Zoned) -> (i64, i64) {
        let (year, week) = (i64::from(time.year()), time.date().iso_week_date());
        match self {
            // An hour that the clock goes through twice in autumn is two hours here.
            Self::Hourly => {
                let offset = i64::from(time.offset().seconds());
                ((time.timestamp().as_second() + offset).div_euclid(3600), offset)
            }
            Self::Last => (time.timestamp().as_second(), 0),
            Self::Daily => (year, i64::from(time.day_of_year())),
            Self::Weekly => (i64::from(week.year()), i64::from(week.week())),
            Self::Monthly => (year, i64::from(time.month())),
            Self::Yearly => (year, 0),
        }
    }
}

/// Why a text is no set of rules.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("`{text}`: {why}")]
pub struct RetentionError {
    text: String,
    why: String,
}

/// Whether an archive is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// By this rule.
    Keep(&'static str),
    /// By none.
    Remove,
}

impl Retention {
    /// The verdict on every archive of one guest, in the order of `archives`. Days and weeks are those of `zone`.
    pub fn judge(&self, archives: &[ArchiveName], zone: &TimeZone) -> Vec<Verdict> {
        if self.all || self.counts.iter().all(|count| *count == 0) {
            return vec![Verdict::Keep("keep-all"); archives.len()];
        }
        let times: Vec<Timestamp> = archives.iter().map(ArchiveName::time).collect();
        let mut newest_first: Vec<usize> = (0..times.len()).collect();
        newest_first.sort_by_key(|index| std::cmp::Reverse(times[*index]));
        let mut verdicts: Vec<Option<Verdict>> = vec![None; times.len()];
        for (period, count) in Period::ALL.into_iter().zip(self.counts) {
            let periods: Vec<_> = times.iter().map(|time| period.of(&time.to_zoned(zone.clone()))).collect();
            let kept = |verdict: &Option<Verdict>| matches!(verdict, Some(Verdict::Keep(_)));
            let have: HashSet<_> = (0..times.len()).filter(|i| kept(&verdicts[*i])).map(|i| periods[i]).collect();
            let mut new = HashSet::new();
            for index in newest_first.iter().copied() {
                let at = periods[index];
                if verdicts[index].is_some() || have.contains(&at) {
                    continue;
                }
                if new.contains(&at) {
                    verdicts[index] = Some(Verdict::Remove);
                } else if new.len() < count as usize {
                    new.insert(at);
                    verdicts[index] = Some(Verdict::Keep(period.rule()));
                } else {
                    break;
                }
            }
        }
        if let Some(newest) = newest_first.first() {
            verdicts[*newest].get_or_insert(Verdict::Keep("newest"));
        }
        verdicts.into_iter().map(|verdict| verdict.unwrap_or(Verdict::Remove)).collect()
    }
}

impl FromStr for Retention {
    type Err = RetentionError;

    fn from_str(text: &str) -> Result<Self, RetentionError> {
        let error = |why: String| RetentionError { text: text.to_owned(), why };
        let mut rules = Self::default();
        let mut seen = HashSet::new();
        for item in text.split(',') {
            let (rule, value) = item
                .trim()
                .split_once('=')
                .ok_or_else(|| error(format!("`{item}` is no rule, such as keep-last=3")))?;
            if !seen.insert(rule) {
                return Err(error(format!("`{rule}` is there twice")));
            }
            if rule == "keep-all" {
                rules.all = match value {
                    "1" | "on" | "yes" | "true" => true,
                    "0" | "off" | "no" | "false" => false,
                    _ => return Err(error("keep-all is 0 or 1".into())),
                };
                continue;
            }
            let known = || Period::ALL.map(Period::rule).join(", ");
            let index = Period::ALL
                .into_iter()
                .position(|period| period.rule() == rule)
                .ok_or_else(|| error(format!("there is no rule `{rule}`; there are {}, keep-all", known())))?;
            rules.counts[index] = value.parse().map_err(|_| error(format!("{rule} is no number")))?;
        }
        if rules.all && rules.counts.iter().any(|count| *count > 0) {
            return Err(error("keep-all excludes other rules".into()));
        }
        Ok(rules)
    }
}

impl fmt::Display for Retention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rules = Period::ALL.into_iter().zip(self.counts).filter(|(_, count)| *count > 0);
        let text: Vec<String> = rules.map(|(period, count)| format!("{}={count}", period.rule())).collect();
        f.write_str(if text.is_empty() { "keep-all=1".to_owned() } else { text.join(",") }.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(times: &[&str]) -> Vec<ArchiveName> {
        times.iter().map(|time| ArchiveName::new("100", time.parse().unwrap())).collect()
    }

    /// Positions of what is kept.
    fn kept(rules: &str, times: &[&str], zone: &str) -> Vec<usize> {
        let zone = if zone == "UTC" { TimeZone::UTC } else { TimeZone::posix(zone).unwrap() };
        let verdicts = rules.parse::<Retention>().unwrap().judge(&names(times), &zone);
        (0..times.len()).filter(|index| verdicts[*index] != Verdict::Remove).collect()
    }

    #[test]
    fn without_a_count_everything_is_kept() {
        let times = ["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"];
        for rules in ["keep-all=1", "keep-all=0", "keep-last=0", "keep-last=0,keep-daily=0"] {
            assert_eq!(kept(rules, &times, "UTC"), [0, 1], "{rules}");
        }
        assert!(Retention::from_str("keep-last=1").unwrap().judge(&[], &TimeZone::UTC).is_empty());
    }

    #[test]
    fn each_rule_keeps_the_newest_of_its_periods() {
        let times = [
            "2024-12-30T01:00:00Z", // 0: Monday of week 1 of 2025
            "2025-01-01T01:00:00Z", // 1: the same week, another year
            "2026-01-30T10:10:00Z", // 2
            "2026-01-30T10:50:00Z", // 3: the same hour
            "2026-01-30T23:00:00Z", // 4
            "2026-01-31T02:00:00Z", // 5
            "2026-02-01T02:00:00Z", // 6: Sunday, the same week
        ];
        assert_eq!(kept("keep-last=2", &times, "UTC"), [5, 6]);
        assert_eq!(kept("keep-last=99", &times, "UTC"), [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(kept("keep-hourly=4", &times, "UTC"), [3, 4, 5, 6]);
        assert_eq!(kept("keep-daily=3", &times, "UTC"), [4, 5, 6]);
        assert_eq!(kept("keep-weekly=2", &times, "UTC"), [1, 6]);
        assert_eq!(kept("keep-monthly=3", &times, "UTC"), [1, 5, 6]);
        assert_eq!(kept("keep-yearly=3", &times, "UTC"), [0, 1, 6]);
        // What a rule kept is no longer counted by the next, and its period has one already.
        assert_eq!(kept("keep-last=1,keep-daily=1", &times, "UTC"), [5, 6]);
        assert_eq!(kept("keep-last=1,keep-weekly=1", &times, "UTC"), [1, 6]);
        // The second of an hour was decided by the first rule: it does not come back as the one of its day.
        assert_eq!(kept("keep-hourly=4,keep-daily=1", &times, "UTC"), [1, 3, 4, 5, 6]);
    }

    #[test]
    fn days_are_those_of_the_host() {
        let times = ["2026-01-30T22:30:00Z", "2026-01-30T23:30:00Z", "2026-01-31T01:00:00Z"];
        assert_eq!(kept("keep-daily=5", &times, "UTC"), [1, 2]);
        assert_eq!(kept("keep-daily=5", &times, "<+01>-1"), [0, 2]);
    }

    #[test]
    fn the_newest_stays_whatever_order_they_come_in() {
        let times = ["2026-01-03T00:00:00Z", "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"];
        assert_eq!(kept("keep-last=1", &times, "UTC"), [0]);
        assert_eq!(kept("keep-yearly=1", &times, "UTC"), [0]);
    }

    #[test]
    fn mistakes_are_named() {
        let fails = |text: &str| Retention::from_str(text).unwrap_err().to_string();
        assert!(fails("").contains("no rule"));
        assert!(fails("7").contains("no rule"));
        assert!(fails("keep-first=1").contains("keep-last, keep-hourly"));
        assert!(fails("keep-last=-1").contains("no number"));
        assert!(fails("keep-last=1,keep-last=2").contains("twice"));
        assert!(fails("keep-all=1,keep-last=2").contains("excludes"));
        assert!(fails("keep-all=2").contains("0 or 1"));
        let text = "keep-last=3,keep-yearly=1";
        assert_eq!(text.parse::<Retention>().unwrap().to_string(), text);
    }
}
