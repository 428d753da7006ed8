//! The QMP and guest-agent session: short-lived, typed, with a time limit for every command.

pub mod agent;
pub mod command;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod limits;
pub mod schema;
mod session;
mod wire;

pub use limits::limit_of;
pub use session::{Event, Qmp, QmpError, Session};
