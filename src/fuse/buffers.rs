//! Buffers for large reads, used again: a new one costs a page fault for every 4 KiB, which is more than reading into it.

use bytes::{Bytes, BytesMut};
use std::sync::{Arc, Mutex, PoisonError};

/// Shorter ones come from the allocator, which keeps them.
const SMALLEST: usize = 64 << 10;

/// Buffers that nobody uses at the moment.
#[derive(Default)]
pub(super) struct Buffers {
    idle: Mutex<Vec<BytesMut>>,
    /// More than this many bytes are not kept.
    most: usize,
}

impl Buffers {
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { idle: Mutex::default(), most })
    }

    /// A buffer of `len` bytes with any content.
    pub fn take(self: &Arc<Self>, len: usize) -> BytesMut {
        if len < SMALLEST {
            return BytesMut::zeroed(len);
        }
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        // The one with least to spare.
        let fits = idle.iter().enumerate().filter(|(_, buffer)| buffer.len() >= len);
        let Some(at) = fits.min_by_key(|(_, buffer)| buffer.len()).map(|(at, _)| at) else {
            drop(idle);
            return BytesMut::zeroed(len);
        };
        let mut buffer = idle.swap_remove(at);
        drop(idle);
        buffer.truncate(len);
        buffer
    }

    /// Takes a buffer back.
    pub fn put(&self, buffer: BytesMut) {
        if buffer.len() < SMALLEST {
            return;
        }
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.iter().map(BytesMut::len).sum::<usize>() + buffer.len() <= self.most {
            idle.push(buffer);
        }
    }

    /// Bytes whose buffer comes back with the last of their clones.
    pub fn freeze(self: &Arc<Self>, buffer: BytesMut) -> Bytes {
        if buffer.len() < SMALLEST {
            return buffer.freeze();
        }
        Bytes::from_owner(Lent { buffer, home: self.clone() })
    }
}

struct Lent {
    buffer: BytesMut,
    home: Arc<Buffers>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.home.put(std::mem::take(&mut self.buffer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_with_the_last_of_its_clones() {
        let buffers = Buffers::new(1 << 20);
        let mut buffer = buffers.take(256 << 10);
        buffer[7] = 9;
        let place = buffer.as_ptr();
        let whole = buffers.freeze(buffer);
        let part = whole.slice(7..8);
        drop(whole);
        assert_ne!(buffers.take(256 << 10).as_ptr(), place, "it is in use");
        assert_eq!(part[..], [9]);
        drop(part);
        let again = buffers.take(200 << 10);
        assert_eq!((again.as_ptr(), again.len()), (place, 200 << 10));
    }

    #[test]
    fn no_more_is_kept_than_allowed() {
        let buffers = Buffers::new(512 << 10);
        for buffer in [256 << 10, 256 << 10, 256 << 10, 4096].map(|len| buffers.take(len)) {
            buffers.put(buffer);
        }
        assert_eq!(buffers.idle.lock().expect("lock").len(), 2);
    }
}
