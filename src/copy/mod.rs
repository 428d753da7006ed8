//! The copy engine: dirty extents → segments → provider → discard.
//!
//! For every disk one task issues reads in order, with many in flight, and hands finished segments over in order. The bytes
//! in memory are bounded by one [`Budget`] for the whole guest: every read takes its share before it is sent, and gives it
//! back when the provider has dropped the last of its segments. The bound does not depend on the size of the disk; what
//! does is the extent map (16 to 24 bytes an extent) and the provider's own needs.
//!
//! A segment that the provider has taken over is discarded from the snapshot access by a second task, which joins
//! neighbours. A failed discard only costs fleecing space, so it is a warning.

mod discard;
mod map;
mod read;

pub use map::{DIRTY, DiskMap, read_map};
pub use read::{Counters, DiskReader, RateLimit, Settings, Source};

use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of disk content that may be in memory at a time.
#[derive(Clone, Debug)]
pub struct Budget {
    units: Arc<Semaphore>,
    total: u32,
}

impl Budget {
    const UNIT: u64 = 64 << 10;

    /// A budget of `bytes`, at least 16 MiB so that the largest read always fits.
    pub fn new(bytes: u64) -> Self {
        let total = (bytes.max(16 << 20) / Self::UNIT).min(u64::from(u32::MAX >> 4)) as u32;
        Self { units: Arc::new(Semaphore::new(total as usize)), total }
    }

    /// Takes `bytes` if they are there now.
    fn try_take(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        self.units.clone().try_acquire_many_owned(self.units(bytes)).ok()
    }

    /// Takes `bytes`, waiting until so much was given back.
    async fn take(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        self.units.clone().acquire_many_owned(self.units(bytes)).await.ok()
    }

    fn units(&self, bytes: u64) -> u32 {
        bytes.div_ceil(Self::UNIT).min(u64::from(self.total)) as u32
    }
}

/// Why a disk cannot be copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The NBD export fails.
    #[error("reading the export of disk `{disk}` fails")]
    Nbd {
        /// The disk.
        disk: String,
        /// The cause.
        source: crate::nbd::NbdError,
    },
    /// QEMU gave the snapshot up.
    #[error(
        "the snapshot of disk `{disk}` is lost (at byte {offset}): QEMU gave it up so that guest writes could go on, most likely \
         because the fleecing image ran out of space or its storage stalled"
    )]
    SnapshotLost {
        /// The disk.
        disk: String,
        /// Where it was noticed.
        offset: u64,
        /// QEMU's answer.
        source: crate::nbd::NbdError,
    },
    /// Somebody was at the fleecing image, so that what was read may be wrong.
    #[error("what was read of disk `{disk}` cannot be trusted: its {harm}, by another program, during the backup")]
    Fleecing {
        /// The disk.
        disk: String,
        /// The image, and what became of it.
        harm: String,
    },
    /// The export is not the disk that was set up.
    #[error("the export of disk `{disk}` has {found} bytes, the disk {expected}")]
    Size {
        /// The disk.
        disk: String,
        /// Size of the export.
        found: u64,
        /// Size of the disk.
        expected: u64,
    },
    /// What QEMU says about the disk does not cover it.
    #[error("what QEMU says of disk `{disk}` does not cover it")]
    Map {
        /// The disk.
        disk: String,
        /// How not.
        source: crate::extent::ExtentsError,
    },
}

impl CopyError {
    /// Tells a lost snapshot from other failures: nothing that we read was discarded before, so a range that cannot be read
    /// is QEMU's way of saying that the snapshot is gone.
    fn reading(disk: &str, offset: u64, source: crate::nbd::NbdError) -> Self {
        if source.is_unreadable() {
            Self::SnapshotLost { disk: disk.to_owned(), offset, source }
        } else {
            Self::Nbd { disk: disk.to_owned(), source }
        }
    }
}
