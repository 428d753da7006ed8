//! Archives: one backup of one guest in a target, always complete and independent to the user.
//!
//! Every provider keeps the same members of an archive: the [`Manifest`], the guest's configuration, its firewall
//! configuration, and for every disk the segment table and the segments. Nothing read back is trusted:
//! [`Manifest::from_bytes`] checks before anybody acts on it.

mod manifest;
mod name;
mod retention;

pub use manifest::{Consistency, DiskEntry, FineEntry, Manifest, ManifestError, SkippedDisk};
pub use name::{ArchiveId, ArchiveName, NameError, Selector};
pub use retention::{Retention, RetentionError, Verdict};
