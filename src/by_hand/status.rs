//! How guests stand: who is at work on them, and what is left. QEMU is not asked, so that this works when nothing else does.

use crate::{
    access::by_hand::Kept,
    config::Dirs,
    fuse::mounts,
    guest::GuestId,
    journal::{Glimpse, Journal, Step, destroyed_text, look},
};
use anyhow::{Context, Result};
use std::{fs, os::unix::fs::MetadataExt, path::PathBuf};

/// How a guest stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing is set up and nothing left.
    Idle,
    /// A run is at work.
    Running {
        /// Its process.
        pid: i32,
    },
    /// An access by hand is set up.
    ByHand {
        /// The access.
        kept: Box<Kept>,
        /// Whether its QEMU process has ended, and the access with it.
        qemu_gone: bool,
    },
    /// A run died.
    LeftBehind {
        /// What it left, as [`Step::label`] names it.
        what: Vec<String>,
    },
}

/// Whether files are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MountState {
    /// They are.
    Served,
    /// Their server was killed: the mount is there, and dead.
    Dead,
}

/// Files that show an access.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// Where.
    pub path: PathBuf,
    /// The process that serves, or served, them.
    pub pid: i32,
    /// Whether it does.
    pub state: MountState,
}

/// A fleecing image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Path, or volume of a Proxmox storage.
    pub name: String,
    /// Bytes that it holds; `None` for a volume, of which only the storage knows.
    pub bytes: Option<u64>,
}

/// A guest and how it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The guest.
    pub guest: String,
    /// How it stands.
    pub state: State,
    /// Its fleecing images.
    pub fleecing: Vec<Image>,
    /// Files that show its access by hand.
    pub mounts: Vec<Mounted>,
}

impl Standing {
    /// Bytes in fleecing images, as far as known.
    pub fn fleecing_bytes(&self) -> u64 {
        self.fleecing.iter().filter_map(|image| image.bytes).sum()
    }

    fn of(guest: String, seen: Option<Glimpse>) -> Self {
        let Some(Glimpse { steps, destroyed, owner }) = seen else {
            return Self { guest, state: State::Idle, fleecing: Vec::new(), mounts: Vec::new() };
        };
        let state = match (owner, Kept::of(&steps)) {
            (Some(pid), _) => State::Running { pid },
            (None, Some(kept)) => State::ByHand { qemu_gone: kept.qemu_is_gone(), kept: Box::new(kept) },
            (None, None) => {
                let left = steps.iter().filter(|s| !matches!(s, Step::Begin { .. } | Step::Stored { .. }));
                let mut what: Vec<String> = left.map(Step::label).collect();
                if destroyed > 0 {
                    what.push(destroyed_text(destroyed));
                }
                if what.is_empty() { State::Idle } else { State::LeftBehind { what } }
            }
        };
        let fleecing = steps.iter().filter_map(|step| match step {
            Step::FleecingFile { path } => {
                // A file that was never made, or is gone, holds nothing.
                let bytes = fs::symlink_metadata(path).map_or(0, |meta| meta.blocks().saturating_mul(512));
                Some(Image { name: path.display().to_string(), bytes: Some(bytes) })
            }
            Step::FleecingVolume { volume, .. } => Some(Image { name: volume.clone(), bytes: None }),
            _ => None,
        });
        let mounts = steps.iter().filter_map(|step| match step {
            Step::Served { path, server, .. } => {
                let state = match server.lives() {
                    true => MountState::Served,
                    false if mounts::at(path).ok()?.is_some_and(|mount| mount.is_ours()) => MountState::Dead,
                    false => return None,
                };
                Some(Mounted { path: path.clone(), pid: server.pid, state })
            }
            _ => None,
        });
        Self { guest, state, fleecing: fleecing.collect(), mounts: mounts.collect() }
    }
}

/// How `guest` stands, or all guests that have a journal.
///
/// # Errors
/// When a journal cannot be read.
pub fn status(dirs: &Dirs, guest: Option<&GuestId>) -> Result<Vec<Standing>> {
    let dir = dirs.journals();
    let guests = match guest {
        Some(guest) => vec![guest.to_string()],
        None => Journal::guests(&dir).with_context(|| format!("cannot list {}", dir.display()))?,
    };
    guests
        .into_iter()
        .map(|guest| {
            let seen = look(&dir, &guest)?;
            Ok(Standing::of(guest, seen))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(steps: Vec<Step>, owner: Option<i32>) -> Standing {
        Standing::of("100".into(), Some(Glimpse { steps, destroyed: 0, owner }))
    }

    fn begin() -> Step {
        Step::Begin {
            guest: "100".into(),
            qmp: "/q".into(),
            agent: None,
            qemu: None,
            target: "t".into(),
            generation: "g".into(),
        }
    }

    #[test]
    fn a_journal_tells_how_its_guest_stands() {
        assert_eq!(Standing::of("100".into(), None).state, State::Idle);
        assert_eq!(standing(Vec::new(), None).state, State::Idle);
        assert_eq!(standing(vec![begin()], None).state, State::Idle);
        assert_eq!(standing(vec![begin()], Some(7)).state, State::Running { pid: 7 });
        let left = standing(vec![begin(), Step::Node { name: "n".into() }], None);
        assert_eq!(left.state, State::LeftBehind { what: vec!["node n".into()] });
        let kept = Step::ByHand {
            since: jiff::Timestamp::UNIX_EPOCH,
            socket: "/s".into(),
            target: None,
            disks: Vec::new(),
            trim: false,
        };
        let by_hand = standing(vec![begin(), kept.clone()], None);
        assert!(matches!(by_hand.state, State::ByHand { qemu_gone: false, .. }), "{by_hand:?}");
        // While it is being ended.
        assert_eq!(standing(vec![begin(), kept], Some(8)).state, State::Running { pid: 8 });
    }

    #[test]
    fn fleecing_images_are_counted_as_far_as_the_host_can_tell() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        fs::write(&path, vec![1; 1 << 20]).unwrap();
        let steps = vec![
            Step::FleecingFile { path },
            Step::FleecingFile { path: dir.path().join("never made") },
            Step::FleecingVolume { volume: "local:vm-100-fleece-0".into(), pvesm: "pvesm".into() },
        ];
        let standing = standing(steps, None);
        assert!(standing.fleecing_bytes() >= 1 << 20, "{standing:?}");
        assert_eq!(standing.fleecing[2].bytes, None);
    }
}
