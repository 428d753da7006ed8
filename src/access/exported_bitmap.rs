//! The dirty bitmap that an export shows.

use super::AccessError;
use crate::qmp::{
    Session,
    command::block::{Action, Bitmap, BitmapAdd, BitmapMerge, Transaction},
};

/// Puts a copy of a disk's bitmap on its snapshot's node, with which it goes, and returns it. QEMU aborts, and the guest with it,
/// when a disk is resized while a bitmap of its own node is exported; Proxmox VE's also when an access is torn down then.
///
/// # Errors
/// [`AccessError::Qmp`].
pub(super) async fn copy(
    session: &mut Session,
    old: Bitmap,
    snapshot: &str,
    granularity: u32,
    disk: &str,
) -> Result<Bitmap, AccessError> {
    let copy = Bitmap { node: snapshot.to_owned(), name: old.name.clone() };
    let (node, name) = (copy.node.clone(), copy.name.clone());
    let actions = vec![
        Action::BitmapAdd(BitmapAdd { node: node.clone(), name: name.clone(), granularity, disabled: true }),
        Action::BitmapMerge(BitmapMerge { node, target: name, bitmaps: vec![old] }),
    ];
    let copied = session.execute(&Transaction { actions }).await;
    copied.map_err(AccessError::qmp("cannot copy the dirty bitmap", Some(disk)))?;
    Ok(copy)
}
