//! What has to be read of a disk.

use super::CopyError;
use crate::{
    access::DiskAccess,
    extent::{Extent, Extents},
    nbd::{Client, StatusExtent},
    segment::Content,
};

/// What has to be looked at on a disk, from its dirty bitmap and its allocation.
#[derive(Clone, Debug)]
pub struct DiskMap {
    /// The whole disk.
    pub content: Extents<Content>,
    /// Bytes that are dirty, or all for a full backup.
    pub dirty_bytes: u64,
    /// Bytes among them that have to be read; the rest is known to be zero.
    pub data_bytes: u64,
}

const BASE_ALLOCATION: &str = "base:allocation";
/// `base:allocation` bit 1: reads as zeroes (NBD protocol, "base:allocation" metadata context).
const ZERO: u64 = 2;
/// `qemu:dirty-bitmap:…` bit 0: dirty.
pub const DIRTY: u64 = 1;

/// Asks for both maps. All of it happens before the first discard: QEMU answers block status for discarded ranges with an
/// error.
///
/// Without `allocation` all that is dirty counts as data.
///
/// `dirty` has negotiated the dirty bitmap's context only and `allocation` only `base:allocation`: QEMU 10.0 loses the
/// protocol's step when one of two contexts fails, as allocation does in ranges outside of the bitmap.
pub async fn read_map(
    access: &DiskAccess,
    dirty: Option<&Client>,
    allocation: Option<&Client>,
) -> Result<DiskMap, CopyError> {
    let disk = access.name.as_str();
    for client in dirty.into_iter().chain(allocation) {
        if client.size() != access.size {
            return Err(CopyError::Size { disk: disk.into(), found: client.size(), expected: access.size });
        }
    }
    let dirty = match (dirty, &access.dirty_context) {
        (Some(client), Some(context)) if access.size > 0 => {
            let answer = client.block_status(context, 0, access.size).await;
            let answer = answer.map_err(|source| CopyError::reading(disk, 0, source))?;
            Extents::from_ordered(access.size, located(0, answer, |flags| flags & DIRTY != 0))
                .map_err(|source| CopyError::Map { disk: disk.into(), source })?
        }
        _ => Extents::uniform(access.size, true),
    };
    let mut list: Vec<Extent<Content>> = Vec::new();
    for extent in &dirty {
        if !extent.state {
            list.push(Extent { offset: extent.offset, len: extent.len, state: Content::Clean });
            continue;
        }
        // Asking for one cluster at a time takes as long as reading it.
        let Some(allocation) = allocation.filter(|_| access.largest_request.is_none()) else {
            list.push(Extent { offset: extent.offset, len: extent.len, state: Content::Data });
            continue;
        };
        let answer = allocation.block_status(BASE_ALLOCATION, extent.offset, extent.len).await;
        let answer = answer.map_err(|source| CopyError::reading(disk, extent.offset, source))?;
        list.extend(located(
            extent.offset,
            answer,
            |flags| if flags & ZERO == 0 { Content::Data } else { Content::Zero },
        ));
    }
    let content =
        Extents::from_ordered(access.size, list).map_err(|source| CopyError::Map { disk: disk.into(), source })?;
    Ok(DiskMap {
        dirty_bytes: dirty.bytes_where(|dirty| dirty),
        data_bytes: content.bytes_where(|c| c == Content::Data),
        content,
    })
}

fn located<S>(start: u64, answer: Vec<StatusExtent>, state: impl Fn(u64) -> S) -> impl Iterator<Item = Extent<S>> {
    let mut offset = start;
    answer.into_iter().map(move |e| {
        let extent = Extent { offset, len: e.len, state: state(e.flags) };
        offset = offset.saturating_add(e.len);
        extent
    })
}
