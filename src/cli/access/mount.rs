//! `pvebackup access mount`: the disks of an access by hand as files.

use crate::{
    by_hand::{self, Showing, ShownDisk, View},
    cli::{Context, exit, print},
    fuse::Unmounted,
    guest::GuestId,
    report::{Detail, Events, Output, Plain, SCHEMA, printable, sizes},
};
use anyhow::{Context as _, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, dup2_stderr, dup2_stdout, setsid},
};
use serde_json::{Value, json};
use std::{
    fmt::Write as _,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
};
use tokio::{
    io::AsyncReadExt,
    process::Command,
    signal::unix::{SignalKind, signal},
};

/// Largest log of a server. A reader that goes on after errors would fill the file system of the sockets.
const LARGEST_LOG: u64 = 1 << 20;

#[derive(clap::Args, Debug)]
pub(in crate::cli) struct MountArgs {
    /// Guest
    #[arg(value_name = "GUEST")]
    guest: GuestId,
    /// Empty directory to mount at
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// `image` shows every disk as a file, `segment` as a directory of files whose times tell what changed
    #[arg(long, value_name = "VIEW", default_value = "image")]
    view: ViewWord,
    /// Serve the files in this process, and end with it, instead of going to the background
    #[arg(long)]
    foreground: bool,
    /// The process in the background
    #[arg(long, hide = true, conflicts_with = "foreground")]
    background: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum ViewWord {
    Image,
    Segment,
}

impl ViewWord {
    fn text(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Segment => "segment",
        }
    }
}

pub(super) async fn run(args: MountArgs, context: Context) -> Result<u8> {
    match (args.foreground, args.background) {
        (false, false) => start_server(&args, &context).await,
        (_, background) => serve(args, context, background).await,
    }
}

/// Starts a process that serves the files and stays, and waits until they are there.
async fn start_server(args: &MountArgs, context: &Context) -> Result<u8> {
    // Unlike the path of our program this finds it even after it was replaced by an update.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("pvebackup");
    let dirs = [
        ("--config-dir", &context.dirs.config),
        ("--state-dir", &context.dirs.state),
        ("--run-dir", &context.dirs.run),
    ];
    for (option, dir) in dirs {
        command.arg(option).arg(std::path::absolute(dir)?);
    }
    command.args(context.json.then_some("--json"));
    command.args(["access", "mount", "--background", "--view", args.view.text(), "--", args.guest.as_str()]);
    command.arg(std::path::absolute(&args.dir)?);
    // Standard error is ours until the files are there. It must not keep our working directory's file system busy.
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .current_dir("/")
        .spawn()
        .context("cannot start the process that serves the files")?;
    let (mut text, mut stdout) = (String::new(), child.stdout.take());
    let mut told = async || match &mut stdout {
        Some(stdout) => stdout.read_to_string(&mut text).await.map(drop),
        None => Ok(()),
    };
    tokio::select! {
        outcome = told() => outcome?,
        () = context.stop.token().cancelled() => {
            if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
            }
            told().await?;
        }
    }
    if !text.is_empty() {
        print(&text);
        return Ok(exit::OK);
    }
    // It has told why.
    let status = child.wait().await?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).filter(|code| *code != exit::OK).unwrap_or(exit::FAILED))
}

async fn serve(args: MountArgs, context: Context, background: bool) -> Result<u8> {
    // A terminal that is closed must not leave a dead mount behind.
    let mut hangup = signal(SignalKind::hangup())?;
    let here = Events::new(args.guest.as_str(), context.monitor.clone());
    let log = if background {
        // So that the terminal's signals are for others.
        let _ = setsid();
        by_hand::find(&context.dirs, &args.guest)?;
        Some(Log::create(&context.dirs.run.join(args.guest.as_str()))?)
    } else {
        None
    };
    let events = match &log {
        Some(log) => Events::new(args.guest.as_str(), Arc::new(Plain::new(Output::new(log.clone()), Detail::Full))),
        None => here.clone(),
    };
    let view = match args.view {
        ViewWord::Image => View::Image,
        ViewWord::Segment => View::Segment,
    };
    let log_path = log.as_ref().map(|log| log.path.clone());
    let wanted = Showing { dir: args.dir, view, segment_lens: context.config.segment_lens()?, log: log_path };
    let shown = by_hand::mount(&context.dirs, &args.guest, wanted, events.clone()).await;
    let shown = shown.inspect_err(|_| {
        if let Some(log) = &log {
            let _ = fs::remove_file(&log.path);
        }
    })?;
    for disk in shown.disks.iter().filter(|disk| disk.readable < disk.size) {
        here.warn(format!(
            "disk `{}`: only what is dirty can be read, {}; the rest gives input/output errors, and looks like a hole to \
             programs that skip holes: a copy of it is no image of the disk",
            disk.name,
            sizes::short_bytes(disk.readable)
        ));
    }
    let place = Place { guest: &args.guest, path: shown.path(), log: log.as_ref().map(|log| log.path.as_path()) };
    let text = if context.json { place.json(args.view, &shown.disks)? } else { place.text(args.view, &shown.disks) };
    if let Some(log) = &log {
        dup2_stderr(&*log.file)?;
        print(&text);
        // Whoever started us reads to the end.
        dup2_stdout(File::options().write(true).open("/dev/null")?)?;
    } else {
        print(&text);
    }
    let code = tokio::select! {
        () = shown.ended() => exit::OK,
        () = context.stop.token().cancelled() => context.stop.code(),
        _ = hangup.recv() => 128 + SignalKind::hangup().as_raw_value() as u8,
    };
    if shown.end().await? == Unmounted::Aborted {
        events.warn("files were open; their readers get an error");
    }
    Ok(code)
}

/// The log of a process in the background.
#[derive(Clone)]
struct Log {
    path: PathBuf,
    file: Arc<File>,
}

impl Log {
    /// In the access's own directory, with which it goes.
    fn create(dir: &Path) -> Result<Self> {
        let path = dir.join(format!("mount-{}.log", std::process::id()));
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(&path);
        let file = file.with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { path, file: Arc::new(file) })
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.file.metadata()?.len() < LARGEST_LOG {
            (&*self.file).write_all(bytes)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where files are, and who serves them.
struct Place<'a> {
    guest: &'a GuestId,
    path: &'a Path,
    log: Option<&'a Path>,
}

impl Place<'_> {
    fn json(&self, view: ViewWord, disks: &[ShownDisk]) -> serde_json::Result<String> {
        let disk = |disk: &ShownDisk| -> Value {
            let (files, changed) = disk.segments.unzip();
            json!({
                "name": disk.name, "path": self.path.join(&disk.name), "size": disk.size, "readable_bytes": disk.readable,
                "segments": files, "changed_segments": changed,
            })
        };
        serde_json::to_string(&json!({
            "schema": SCHEMA, "type": "access-mount", "guest": self.guest, "path": self.path, "view": view.text(),
            "pid": std::process::id(), "log": self.log, "disks": disks.iter().map(disk).collect::<Vec<_>>(),
        }))
    }

    fn text(&self, view: ViewWord, disks: &[ShownDisk]) -> String {
        let path = self.path.display().to_string();
        let mut text = format!(
            "{}: the disks are files below {} until `pvebackup umount` there or `pvebackup access teardown {}` (process {})\n",
            self.guest,
            printable(&path),
            self.guest,
            std::process::id()
        );
        for disk in disks {
            let file = self.path.join(&disk.name).display().to_string();
            let _ = write!(text, "  {}  {}", printable(&file), sizes::short_bytes(disk.size));
            match (view, disk.segments) {
                (ViewWord::Segment, Some((files, changed))) => {
                    let _ = write!(text, "  {files} segments, {changed} of them changed");
                }
                _ if disk.readable < disk.size => {
                    let _ = write!(text, "  {} can be read", sizes::short_bytes(disk.readable));
                }
                _ => {}
            }
            text.push('\n');
        }
        if let Some(log) = self.log {
            let _ = writeln!(text, "  what fails is told in {}", printable(&log.display().to_string()));
        }
        text
    }
}
