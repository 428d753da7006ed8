//! Configuration: targets, guests, defaults.
//!
//! Read from `/etc/pvebackup/config.toml`, then `conf.d/*.toml` beside it in the order of their names; a table that stands in
//! two files is an error. Everything has a default, so that an empty configuration backs up to the target `local`.

mod dirs;
mod file;
pub mod size;

pub use dirs::{Dirs, create_private_dir};
pub use file::{Config, ConfigError, Defaults, GuestTable, TargetTable};
