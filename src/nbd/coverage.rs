//! Which bytes of a read have arrived. Pure.

use super::wire::Violation;
use std::ops::Range;

/// Separate pieces remembered beyond the covered beginning. Servers answer (nearly) in order, QEMU exactly so; without a bound
/// a hostile one could make 16 bytes of memory of every second byte.
const MAX_PIECES: usize = 1024;

/// The part of a read that has arrived. The covered beginning is one number, so that answers in order cost no allocation.
#[derive(Debug)]
pub(super) struct Coverage {
    len: usize,
    /// Everything before this has arrived.
    prefix: usize,
    /// What has arrived beyond: sorted, not empty, not touching each other or the prefix.
    pieces: Vec<Range<usize>>,
}

impl Coverage {
    pub(super) fn new(len: usize) -> Self {
        Self { len, prefix: 0, pieces: Vec::new() }
    }

    pub(super) fn is_complete(&self) -> bool {
        self.prefix == self.len
    }

    /// The first byte that is missing.
    pub(super) fn first_missing(&self) -> usize {
        self.prefix
    }

    /// Adds a piece that must be new, not empty, and inside.
    pub(super) fn add(&mut self, piece: Range<usize>) -> Result<(), Violation> {
        if piece.is_empty() || piece.end > self.len {
            return Err(Violation(format!("an answer to a read of {} bytes brings bytes {piece:?}", self.len)));
        }
        let at = self.pieces.partition_point(|known| known.end <= piece.start);
        if piece.start < self.prefix || self.pieces.get(at).is_some_and(|next| next.start < piece.end) {
            return Err(Violation(format!("bytes {piece:?} of a read overlap others that were sent before")));
        }
        if piece.start == self.prefix {
            self.prefix = piece.end;
            if self.pieces.first().is_some_and(|next| next.start == self.prefix) {
                self.prefix = self.pieces.remove(0).end;
            }
            return Ok(());
        }
        let touches_before = at > 0 && self.pieces[at - 1].end == piece.start;
        let touches_after = self.pieces.get(at).is_some_and(|next| next.start == piece.end);
        match (touches_before, touches_after) {
            (true, true) => self.pieces[at - 1].end = self.pieces.remove(at).end,
            (true, false) => self.pieces[at - 1].end = piece.end,
            (false, true) => self.pieces[at].start = piece.start,
            (false, false) if self.pieces.len() == MAX_PIECES => {
                return Err(Violation(format!("a read is answered in more than {MAX_PIECES} scattered pieces")));
            }
            (false, false) => self.pieces.insert(at, piece),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_server_that_scatters_single_bytes_is_stopped() {
        let mut coverage = Coverage::new(1 << 20);
        let failed = (0..1 << 19).map(|n| coverage.add(2 * n + 1..2 * n + 2)).position(|added| added.is_err());
        assert_eq!(failed, Some(MAX_PIECES));
    }

    proptest! {
        #[test]
        fn agrees_with_a_map_of_single_bytes(pieces in prop::collection::vec((0usize..70, 0usize..20), 0..60)) {
            let mut coverage = Coverage::new(64);
            let mut model = [false; 64];
            for (start, len) in pieces {
                let piece = start..start + len;
                let fits = len > 0 && piece.end <= 64 && !model[piece.clone()].contains(&true);
                prop_assert_eq!(coverage.add(piece.clone()).is_ok(), fits);
                if fits {
                    model[piece].fill(true);
                }
                prop_assert_eq!(coverage.first_missing(), model.iter().position(|there| !there).unwrap_or(64));
                prop_assert_eq!(coverage.is_complete(), model.iter().all(|there| *there));
            }
        }
    }
}
