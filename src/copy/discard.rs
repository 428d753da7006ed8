//! Discarding what is stored, so that fleecing space is freed and guest writes there need no copy any more.

use super::Counters;
use crate::{nbd::Client, report::Events};
use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio::{sync::mpsc, time::timeout};

/// A range this long is sent at once.
const ENOUGH: u64 = 16 << 20;
/// Shorter ones wait this long for neighbours.
const WAIT: Duration = Duration::from_millis(100);
/// No more than so many ranges wait.
const MOST_WAITING: usize = 1024;

/// A range that the provider has taken over.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stored {
    pub offset: u64,
    pub len: u64,
}

/// Discards the stored ranges of one disk.
pub(super) struct Discard {
    pub disk: String,
    pub size: u64,
    /// The copy-before-write cluster in bytes. Only whole clusters can be discarded, and QEMU 7.2 aborts when asked for part
    /// of one, so ranges are cut inwards to it.
    pub grain: u64,
    pub client: Client,
    pub counters: Arc<Counters>,
    pub events: Events,
    pub waiting: Ranges,
}

impl Discard {
    /// Runs until the last sender is gone, then sends what is left. Ends early when a discard fails: the range's fate is the
    /// fleecing image's space only, not the backup.
    pub async fn run(mut self, mut stored: mpsc::UnboundedReceiver<Stored>) {
        loop {
            let due = match timeout(WAIT, stored.recv()).await {
                Ok(Some(Stored { offset, len })) => {
                    let joined = self.waiting.insert(offset, offset + len);
                    joined || self.waiting.0.len() > MOST_WAITING
                }
                Ok(None) => break,
                Err(_) => true,
            };
            if due && !self.send_all().await {
                return;
            }
        }
        self.send_all().await;
    }

    async fn send_all(&mut self) -> bool {
        for (start, end) in std::mem::take(&mut self.waiting.0) {
            let first = start.next_multiple_of(self.grain);
            // The disk's last, short cluster may be discarded to its end.
            let end = if end == self.size { end } else { end / self.grain * self.grain };
            if first >= end {
                continue;
            }
            if let Err(error) = self.client.trim(first, end - first).await {
                self.events.warn(format!(
                    "disk `{}`: discarding what is stored fails, so fleecing space is not freed during this backup: {error}",
                    self.disk
                ));
                return false;
            }
            self.counters.discarded.fetch_add(end - first, Ordering::Relaxed);
        }
        true
    }
}

/// Disjoint ranges, start to end; neighbours are joined.
#[derive(Debug, Default)]
pub(super) struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// Adds a range that overlaps none; tells whether its run is long enough now to be sent.
    fn insert(&mut self, mut start: u64, mut end: u64) -> bool {
        if let Some((before, at)) = self.0.range(..start).next_back().map(|(s, e)| (*s, *e))
            && at == start
        {
            self.0.remove(&before);
            start = before;
        }
        if let Some(after) = self.0.remove(&end) {
            end = after;
        }
        self.0.insert(start, end);
        end - start >= ENOUGH
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn joined_ranges_cover_what_was_stored(order in Just((0u64..40).collect::<Vec<_>>()).prop_shuffle(), take in 1usize..40) {
            let mut ranges = Ranges::default();
            for index in &order[..take] {
                ranges.insert(index * 10, index * 10 + 10);
            }
            let mut covered: Vec<u64> = ranges.0.iter().flat_map(|(s, e)| s / 10..e / 10).collect();
            covered.sort_unstable();
            let mut expected = order[..take].to_vec();
            expected.sort_unstable();
            prop_assert_eq!(covered, expected);
            let list: Vec<(u64, u64)> = ranges.0.into_iter().collect();
            prop_assert!(list.windows(2).all(|w| w[0].1 < w[1].0), "neighbours are joined");
        }
    }
}
