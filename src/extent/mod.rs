//! The algebra of ranges: pure, no I/O, no clock.
//!
//! Offsets and lengths are `u64` bytes everywhere. An [`Extents`] map always covers its whole disk: sorted, gapless,
//! neighbours with equal state merged.

mod map;

pub use map::{Extent, Extents, ExtentsError};
