//! Mounts an NBD export as a file, for measurements against nbdfuse.
//!
//!     mount_export SOCKET EXPORT DIR [CONNECTIONS]
//!
//! The file is `DIR/disk`. It stays until SIGINT or SIGTERM, or until somebody unmounts it.

use anyhow::{Context, Result};
use pvebackup::{
    extent::Extents,
    fuse::{
        ImageView, Mount, MountOptions, ViewOptions,
        export::{ExportImage, ExportOptions, LONGEST_READ},
    },
    nbd::{Client, ConnectOptions, Lane},
    report::{Events, Json, Output},
    segment::Content,
};
use std::{sync::Arc, time::Duration, time::SystemTime};
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [socket, export, dir, numbers @ ..] = &args[..] else {
        anyhow::bail!("usage: mount_export SOCKET EXPORT DIR [CONNECTIONS]");
    };
    let connections = numbers.first().map_or(Ok(4), |text| text.parse::<usize>()).context("CONNECTIONS")?;
    let options = ConnectOptions {
        socket: socket.into(),
        export: export.clone(),
        contexts: Vec::new(),
        deadline: Duration::from_secs(30),
        longest_read: LONGEST_READ,
    };
    let mut clients = vec![Client::connect(&options).await?];
    while clients.len() < connections && clients[0].can_multi_conn() {
        clients.push(Client::connect(&options).await?);
    }
    let lanes = Lane::several(&options, 2).await?;
    let content = Extents::uniform(clients[0].size(), Content::Data);
    let options = ExportOptions { grain: 64 << 10, largest_request: None };
    let image = ExportImage::new("disk".into(), content, clients, options).with_lanes(lanes);
    let view = ImageView::new(
        vec![Arc::new(image)],
        ViewOptions {
            deadline: Duration::from_mins(1),
            time: SystemTime::now(),
            events: Events::new("export", Arc::new(Json::new(Output::new(std::io::stderr())))),
        },
    );
    let dir = std::path::PathBuf::from(dir);
    let mount =
        tokio::task::spawn_blocking(move || Mount::start_images(&dir, view, MountOptions::of_export())).await??;
    println!("mounted");
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    tokio::select! {
        () = mount.ended() => {}
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    tokio::task::spawn_blocking(move || mount.umount()).await??;
    Ok(())
}
