//! A map from byte ranges to a state.

use thiserror::Error;

/// A byte range with a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent<S> {
    /// First byte.
    pub offset: u64,
    /// Number of bytes, never 0 inside an [`Extents`].
    pub len: u64,
    /// What holds for every byte of the range.
    pub state: S,
}

impl<S> Extent<S> {
    /// First byte behind the range.
    pub fn end(&self) -> u64 {
        self.offset + self.len
    }
}

/// Why a list of extents is no map of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ExtentsError {
    /// The list has a hole, goes backwards or overlaps.
    #[error("extent at {found} where one at {expected} was due")]
    Gap {
        /// Offset that had to come next.
        expected: u64,
        /// Offset that came.
        found: u64,
    },
    /// The list ends before or behind the disk's end.
    #[error("extents end at {end}, the disk at {size}")]
    Size {
        /// Where the list ends.
        end: u64,
        /// The disk's size.
        size: u64,
    },
    /// An extent has no bytes.
    #[error("empty extent at {0}")]
    Empty(u64),
}

/// A complete map of `0..size`: sorted, gapless, neighbours with equal state merged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extents<S> {
    size: u64,
    extents: Vec<Extent<S>>,
}

impl<S: Copy + PartialEq> Extents<S> {
    /// One state over the whole disk.
    pub fn uniform(size: u64, state: S) -> Self {
        let extents = if size == 0 { Vec::new() } else { vec![Extent { offset: 0, len: size, state }] };
        Self { size, extents }
    }

    /// Takes extents as a peer sent them, in order.
    ///
    /// # Errors
    /// When they do not cover exactly `0..size`.
    pub fn from_ordered(size: u64, list: impl IntoIterator<Item = Extent<S>>) -> Result<Self, ExtentsError> {
        let mut extents: Vec<Extent<S>> = Vec::new();
        let mut expected = 0u64;
        for extent in list {
            if extent.len == 0 {
                return Err(ExtentsError::Empty(extent.offset));
            }
            if extent.offset != expected {
                return Err(ExtentsError::Gap { expected, found: extent.offset });
            }
            expected = extent
                .offset
                .checked_add(extent.len)
                .filter(|end| *end <= size)
                .ok_or(ExtentsError::Size { end: extent.offset.saturating_add(extent.len), size })?;
            match extents.last_mut() {
                Some(last) if last.state == extent.state => last.len += extent.len,
                _ => extents.push(extent),
            }
        }
        if expected != size {
            return Err(ExtentsError::Size { end: expected, size });
        }
        Ok(Self { size, extents })
    }

    /// The disk's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The extents in order.
    pub fn iter(&self) -> std::slice::Iter<'_, Extent<S>> {
        self.extents.iter()
    }

    /// Number of extents.
    pub fn len(&self) -> usize {
        self.extents.len()
    }

    /// Whether the disk has no bytes.
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// Bytes in extents whose state fulfils `wanted`.
    pub fn bytes_where(&self, wanted: impl Fn(S) -> bool) -> u64 {
        self.extents.iter().filter(|e| wanted(e.state)).map(|e| e.len).sum()
    }

    /// The same ranges with another state.
    pub fn map<T: Copy + PartialEq>(&self, f: impl Fn(S) -> T) -> Extents<T> {
        let mut out = Extents { size: self.size, extents: Vec::with_capacity(self.extents.len()) };
        for e in &self.extents {
            out.push(e.len, f(e.state));
        }
        out
    }

    /// Overlays two maps of the same disk: every byte gets the state that `f` makes of its two.
    ///
    /// # Errors
    /// When the sizes differ.
    pub fn zip<T: Copy + PartialEq, U: Copy + PartialEq>(
        &self,
        other: &Extents<T>,
        f: impl Fn(S, T) -> U,
    ) -> Result<Extents<U>, ExtentsError> {
        if self.size != other.size {
            return Err(ExtentsError::Size { end: other.size, size: self.size });
        }
        let mut out = Extents { size: self.size, extents: Vec::new() };
        let (mut left, mut right) = (self.extents.iter().copied(), other.extents.iter().copied());
        let (mut a, mut b) = (left.next(), right.next());
        while let (Some(x), Some(y)) = (a, b) {
            let end = x.end().min(y.end());
            let start = x.offset.max(y.offset);
            out.push(end - start, f(x.state, y.state));
            if x.end() == end {
                a = left.next();
            }
            if y.end() == end {
                b = right.next();
            }
        }
        Ok(out)
    }

    fn push(&mut self, len: u64, state: S) {
        match self.extents.last_mut() {
            Some(last) if last.state == state => last.len += len,
            last => {
                let offset = last.map_or(0, |e| e.end());
                self.extents.push(Extent { offset, len, state });
            }
        }
    }
}

impl<'a, S> IntoIterator for &'a Extents<S> {
    type Item = &'a Extent<S>;
    type IntoIter = std::slice::Iter<'a, Extent<S>>;

    fn into_iter(self) -> Self::IntoIter {
        self.extents.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn arbitrary() -> impl Strategy<Value = Vec<(u64, u8)>> {
        prop::collection::vec((1u64..100, 0u8..3), 1..40)
    }

    fn build(list: &[(u64, u8)], size: u64) -> Extents<u8> {
        let mut offset = 0;
        let mut extents = Vec::new();
        for (len, state) in list {
            let len = (*len).min(size - offset);
            if len == 0 {
                break;
            }
            extents.push(Extent { offset, len, state: *state });
            offset += len;
        }
        if offset < size {
            extents.push(Extent { offset, len: size - offset, state: 0 });
        }
        Extents::from_ordered(size, extents).expect("covers the disk")
    }

    fn state_at(map: &Extents<u8>, at: u64) -> u8 {
        map.iter().find(|e| e.offset <= at && at < e.end()).expect("covered").state
    }

    proptest! {
        #[test]
        fn a_zip_has_the_state_of_both_at_every_byte(a in arbitrary(), b in arbitrary(), size in 1u64..800) {
            let (a, b) = (build(&a, size), build(&b, size));
            let both = a.zip(&b, |x, y| x * 10 + y).expect("same size");
            for at in 0..size {
                let state = both.iter().find(|e| e.offset <= at && at < e.end()).expect("covered").state;
                prop_assert_eq!(state, state_at(&a, at) * 10 + state_at(&b, at));
            }
        }

        #[test]
        fn neighbours_always_differ(a in arbitrary(), size in 1u64..800) {
            let map = build(&a, size);
            for pair in map.extents.windows(2) {
                prop_assert_ne!(pair[0].state, pair[1].state);
                prop_assert_eq!(pair[0].end(), pair[1].offset);
            }
        }
    }

    #[test]
    fn a_list_that_does_not_cover_the_disk_is_refused() {
        let extent = |offset, len| Extent { offset, len, state: 0u8 };
        assert_eq!(Extents::from_ordered(10, [extent(0, 4)]), Err(ExtentsError::Size { end: 4, size: 10 }));
        assert_eq!(
            Extents::from_ordered(10, [extent(0, 4), extent(5, 5)]),
            Err(ExtentsError::Gap { expected: 4, found: 5 })
        );
        assert_eq!(Extents::from_ordered(10, [extent(0, 11)]), Err(ExtentsError::Size { end: 11, size: 10 }));
        assert_eq!(Extents::from_ordered(10, [extent(0, 0)]), Err(ExtentsError::Empty(0)));
        assert_eq!(
            Extents::from_ordered(u64::MAX, [extent(0, 4), extent(4, u64::MAX)]),
            Err(ExtentsError::Size { end: u64::MAX, size: u64::MAX })
        );
    }
}
