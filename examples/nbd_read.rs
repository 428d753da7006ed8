//! Reads a whole NBD export, throws the bytes away, and prints how fast that was.
//!
//!     nbd_read SOCKET EXPORT [CONNECTIONS [IN_FLIGHT [REQUEST_KIB [WORKERS]]]]
//!
//! `IN_FLIGHT` counts per connection. `WORKERS` are the runtime's threads; 0 is the single-threaded runtime.

use anyhow::{Context, Result};
use bytes::BytesMut;
use pvebackup::nbd::{ConnectOptions, Connections, NbdError};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{runtime::Builder, task::JoinSet};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [socket, export, numbers @ ..] = &args[..] else {
        anyhow::bail!("usage: nbd_read SOCKET EXPORT [CONNECTIONS [IN_FLIGHT [REQUEST_KIB [WORKERS]]]]");
    };
    let number = |at: usize, default: u64| match numbers.get(at) {
        Some(text) => text.parse::<u64>().with_context(|| format!("`{text}` is not a number")),
        None => Ok(default),
    };
    let (connections, in_flight, request, workers) =
        (number(0, 2)? as usize, number(1, 4)?, number(2, 1024)? << 10, number(3, 2)? as usize);
    let options = ConnectOptions {
        socket: socket.into(),
        export: export.clone(),
        contexts: Vec::new(),
        deadline: Duration::from_secs(30),
        longest_read: ConnectOptions::LONGEST_READ,
    };
    let runtime = match workers {
        0 => Builder::new_current_thread().enable_all().build()?,
        workers => Builder::new_multi_thread().worker_threads(workers).enable_all().build()?,
    };
    runtime.block_on(read_all(&options, connections, in_flight, request))
}

async fn read_all(options: &ConnectOptions, connections: usize, in_flight: u64, request: u64) -> Result<()> {
    let export = Connections::open(options, connections).await?;
    let size = export.first().size();
    let next = Arc::new(AtomicU64::new(0));
    let begun = Instant::now();
    let mut readers = JoinSet::new();
    for _ in 0..export.count() as u64 * in_flight {
        let (client, next) = (export.next().clone(), Arc::clone(&next));
        readers.spawn(async move {
            let mut buffer = BytesMut::zeroed(request as usize);
            loop {
                let offset = next.fetch_add(request, Ordering::Relaxed);
                if offset >= size {
                    return Ok::<_, NbdError>(());
                }
                buffer.truncate((size - offset).min(request) as usize);
                buffer = client.read(offset, buffer).await?.0;
            }
        });
    }
    while let Some(reader) = readers.join_next().await {
        reader??;
    }
    let seconds = begun.elapsed().as_secs_f64();
    println!(
        "{:.0} MiB/s: {size} bytes in {seconds:.3} s, {} connections x {in_flight} requests of {} KiB",
        size as f64 / f64::from(1 << 20) / seconds,
        export.count(),
        request >> 10
    );
    export.disconnect().await?;
    Ok(())
}
