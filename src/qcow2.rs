//! What every qcow2 image of ours has in common. The images are written and read by imago.

use std::{
    future::Future,
    io,
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
};

/// QEMU counts in sectors: an image ends with a whole one.
const SECTOR: u64 = 512;
/// Largest image that QEMU opens with clusters of 64 KiB: its L1 table may have 32 MiB (`QCOW_MAX_L1_SIZE`).
const MAX_SIZE: u64 = 2 << 50;

/// Size of the image for a disk of `size` bytes: rounded up to sectors, as qemu-img does.
///
/// # Errors
/// When QEMU could not open so large an image.
pub(crate) fn image_size(size: u64) -> io::Result<u64> {
    size.checked_next_multiple_of(SECTOR)
        .filter(|rounded| *rounded <= MAX_SIZE)
        .ok_or_else(|| io::Error::new(io::ErrorKind::FileTooLarge, format!("{size} bytes are too many for qcow2")))
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs a future of imago on this thread. They only wait for each other's locks, never for a reactor, so no runtime is
/// needed; and unlike a runtime this may be called anywhere.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(value) => return value,
            Poll::Pending => thread::park(),
        }
    }
}
