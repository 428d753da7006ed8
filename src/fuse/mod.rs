//! Files for programs that know no NBD and no archives: a FUSE server in this process.
//!
//! `session` mounts and, on every way out, unmounts; the views are [`fuser::Filesystem`]s that it serves, except that `reads`
//! answers what is read of an image. What is read through a file ends up here as a request that must be answered: with data, or
//! after a deadline with `EIO`, because nothing can interrupt a reader that waits for us.
//!
//! This room must not know QEMU, nor providers' repositories.

mod ahead;
mod answer;
pub mod archive;
mod buffers;
mod device;
pub mod export;
pub mod image;
pub mod mounts;
mod pace;
mod ranges;
mod reads;
pub mod segments;
pub mod served;
pub mod session;

#[cfg(test)]
mod archive_tests;
#[cfg(test)]
mod export_tests;

pub use image::{Image, ImageError, ImageView, ViewOptions};
pub use reads::Wanted;
pub use session::{FuseError, LARGEST_REQUEST, Mount, MountOptions, Unmounted};
