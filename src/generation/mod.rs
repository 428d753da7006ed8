//! Generation records: what a disk's dirty bitmap is relative to, and when it may be trusted.
//!
//! A bitmap says what changed *since something*. That something is the archive named in the record, and only this record
//! connects the two. The commit protocol ([`crate::protocol`]) writes it when the provider has said that the archive is
//! durable, and before the access is torn down with success:
//!
//! | we die after …                | archive | bitmaps            | record | the next run reads                         |
//! |-------------------------------|---------|--------------------|--------|--------------------------------------------|
//! | the access is set up          | old     | old, merged back   | old    | all changes since the old archive          |
//! | the archive is durable        | both    | old, merged back   | old    | the same; the new archive stays, unused    |
//! | the record is written         | both    | new or a superset  | new    | all changes since the new archive, or more |
//! | the access is torn down       | both    | new                | new    | all changes since the new archive          |
//!
//! A superset of the dirty bits is always safe, a subset never. Whatever does not match on every point means a full read of
//! that disk, with the reason told.

mod id;
mod record;

pub use id::{new_id, state_id};
pub use record::{DiskGeneration, Facts, Record, RecordError};
