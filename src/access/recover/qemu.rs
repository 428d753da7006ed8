//! What is left in QEMU.

use super::{Switch, Trouble, Undo, Work};
use crate::{
    access::{
        AccessError, Teardown,
        graph::{Graph, is_ours},
        proxmox::{Undone, undo_in_qemu},
        stock::bitmap,
    },
    guest::process_in_pid_file,
    journal::{ProcessIdentity, Step},
    protocol::{BitmapPer, after_death},
    qmp::{
        Qmp, QmpError, Session,
        agent::{Agent, FsfreezeStatus},
        command::block::{
            BlockExportDel, BlockJobCancel, BlockdevDel, Cont, NbdServerStop, QomSet, QueryBlockExports, QueryJobs,
            QueryStatus, Transaction,
        },
    },
};
use procfs::net::UnixState;
use std::{path::Path, time::Duration};
use tokio::time::{Instant, sleep};

/// How long an export, a job or a node may take to go.
const GONE_LIMIT: Duration = Duration::from_mins(1);
const POLL: Duration = Duration::from_millis(10);
/// How long clients may take to go when their exports are gone. QEMU drops clients that do not negotiate after 10 s.
const CLIENT_LIMIT: Duration = Duration::from_secs(12);
/// Before this the whole QEMU hangs in `nbd-server-stop` until a client that has connected but not negotiated goes away (seen in
/// 7.2; not in 10.0).
const STOPS_WITH_CLIENTS: (u32, u32, u32) = (10, 0, 0);
const STATUS_LIMIT: Duration = Duration::from_secs(10);
const THAW_LIMIT: Duration = Duration::from_mins(1);

/// Whether the QEMU that the journal tells of is the one that answers.
enum Qemu {
    Same(Box<Session>),
    /// It is gone, and with it everything that was in it.
    Gone,
    /// The journal does not say any more which one it was, and what is in this one may be somebody else's.
    Unknown,
}

impl Undo<'_> {
    /// Undoes what is in QEMU. Returns the files that nodes of ours still have open.
    pub(super) async fn in_qemu(
        &mut self,
        work: &Work,
        qmp: &Qmp,
        committed: Option<&str>,
    ) -> Result<Vec<String>, AccessError> {
        let mut session = match reach(work, qmp).await? {
            Qemu::Same(session) => *session,
            Qemu::Gone => {
                self.qemu_is_gone(work);
                return Ok(Vec::new());
            }
            Qemu::Unknown => {
                for step in work.in_qemu() {
                    self.left(
                        step,
                        "the journal has lost which QEMU process it is in, and another tool's has the same name; it goes when the VM \
                         is stopped",
                    );
                }
                let images = work.fleecing.iter().filter_map(|step| match step {
                    Step::FleecingFile { path } => Some(path.display().to_string()),
                    Step::FleecingVolume { volume, .. } => Some(volume.clone()),
                    _ => None,
                });
                return Ok(images.collect());
            }
        };
        // The guest comes first.
        if work.paused {
            let outcome = resume(&mut session).await;
            self.report.resumed |= matches!(outcome, Ok(true));
            self.ended(&Step::Paused, &Step::Resumed, outcome)?;
        }
        if work.frozen {
            let outcome = match &work.agent {
                Some(agent) => thaw(&mut Agent::new(agent)).await,
                None => Err(Trouble::Left("the journal names no guest agent".into())),
            };
            self.report.thawed |= matches!(outcome, Ok(true));
            self.ended(&Step::Frozen, &Step::Thawed, outcome)?;
        }
        if !work.accesses.is_empty() {
            let mut undone = Undone::default();
            undo_in_qemu(&mut session, self.journal, self.access, &mut undone).await?;
            let left: Vec<String> = self.journal.leftover().iter().map(Step::label).collect();
            self.report.undone.extend(work.in_qemu().map(Step::label).filter(|label| !left.contains(label)));
            self.report.left_behind.extend(undone.left_behind);
            return self.still_open(&mut session, work).await;
        }
        for step in &work.exports {
            let Step::Export { id } = step else { continue };
            let outcome = delete_export(&mut session, id).await;
            self.settle(step, outcome)?;
        }

        let graph = read(&mut session).await?;
        // Readers of a snapshot go before the snapshot's filter, and what the filter writes to after it.
        let (readers, targets): (Vec<_>, Vec<_>) = work.nodes.iter().partition(|step| match step {
            Step::Node { name } => graph.node(name).is_some_and(|n| n.drv == "snapshot-access"),
            _ => false,
        });
        for step in readers.into_iter().rev() {
            let outcome = delete_node(&mut session, node_of(step)).await;
            self.settle(step, outcome)?;
        }
        for step in &work.jobs {
            let Step::Job { id } = step else { continue };
            let outcome = cancel(&mut session, id).await;
            self.settle(step, outcome)?;
        }
        for step in &work.filters {
            let Step::Filter { name, qom_path, .. } = step else { continue };
            let outcome = take_out(&mut session, name, qom_path).await;
            self.settle(step, outcome)?;
        }
        for step in targets.into_iter().rev() {
            let outcome = delete_node(&mut session, node_of(step)).await;
            self.settle(step, outcome)?;
        }
        for switch in &work.bitmaps {
            let counts = committed.is_some() && switch.generation.as_deref() == committed;
            let how = after_death(BitmapPer::Generation, counts);
            let outcome = settle_bitmaps(&mut session, switch, how).await;
            self.settle(&switch.step, outcome)?;
        }
        for step in &work.servers {
            let Step::NbdServer { socket } = step else { continue };
            let outcome = stop_server(&mut session, socket).await;
            self.settle(step, outcome)?;
        }

        self.still_open(&mut session, work).await
    }

    /// Files that nodes of ours still have open.
    async fn still_open(&self, session: &mut Session, work: &Work) -> Result<Vec<String>, AccessError> {
        if self.report.left_behind.is_empty() {
            return Ok(Vec::new());
        }
        let graph = read(session).await?;
        let ours = work.nodes.iter().map(node_of).filter_map(|name| graph.node(name));
        // An image that is longer than its disk is told as JSON; the node below has it open.
        let below = ours.clone().filter_map(|n| graph.node(graph.child(n.node_name.as_deref()?, "file")?));
        Ok(ours.chain(below).flat_map(|n| [n.file.clone(), n.image.filename.clone()]).collect())
    }

    /// A pause or a freeze is over, or was never begun.
    fn ended(&mut self, begun: &Step, over: &Step, outcome: Result<bool, Trouble>) -> Result<(), AccessError> {
        match outcome {
            Ok(_) => {
                self.over(begun, over);
                Ok(())
            }
            Err(trouble) => self.settle(begun, Err(trouble)),
        }
    }

    fn over(&mut self, begun: &Step, over: &Step) {
        self.note(over);
        self.report.undone.push(begun.label());
    }

    fn qemu_is_gone(&mut self, work: &Work) {
        self.report.qemu_gone = true;
        if work.paused {
            self.over(&Step::Paused, &Step::Resumed);
        }
        if work.frozen {
            self.over(&Step::Frozen, &Step::Thawed);
        }
        for step in work.in_qemu() {
            if let Step::NbdServer { socket } = step {
                // A killed QEMU leaves its socket's file.
                remove_socket(socket);
            }
            self.done(step);
        }
    }
}

fn node_of(step: &Step) -> &str {
    match step {
        Step::Node { name } => name,
        _ => "",
    }
}

async fn read(session: &mut Session) -> Result<Graph, AccessError> {
    Graph::read(session).await.map_err(AccessError::qmp("cannot read the block graph", None))
}

async fn reach(work: &Work, qmp: &Qmp) -> Result<Qemu, AccessError> {
    let lives = work.qemu.as_ref().map(ProcessIdentity::lives);
    let mut session = match qmp.session().await {
        Ok(session) => session,
        // Without a known process, a socket on which nobody listens is all there is to know.
        Err(QmpError::Connect { .. }) if !lives.unwrap_or(false) => return Ok(Qemu::Gone),
        Err(source) => {
            return Err(AccessError::Qmp { step: "cannot reach QEMU to undo the last run".into(), disk: None, source });
        }
    };
    let peer = session.peer_pid().and_then(|pid| ProcessIdentity::of(pid).ok());
    if work.has_qemus_names() && !work.begun {
        // Our NBD server's socket is nobody else's.
        let pid = session.peer_pid();
        let serves = |step: &Step| matches!(step, Step::NbdServer { socket } if listens(pid, socket));
        if work.servers.iter().any(serves) {
            return Ok(Qemu::Same(Box::new(session)));
        }
        let graph = read(&mut session).await?;
        return Ok(if work.in_qemu().any(|step| is_there(&graph, step)) { Qemu::Unknown } else { Qemu::Gone });
    }
    if work.has_qemus_names() {
        // Another tool's access to the guest has the same names, so only the process tells whose they are.
        let now = process_in_pid_file(&qmp.socket).or(peer);
        let other = work.qemu.is_some() && now.is_some() && now != work.qemu && lives == Some(false);
        return Ok(if other { Qemu::Gone } else { Qemu::Same(Box::new(session)) });
    }
    if work.qemu.is_none() || peer.is_none() || peer == work.qemu {
        return Ok(Qemu::Same(Box::new(session)));
    }
    // The process behind the socket is who began to listen, which need not be QEMU. Names of ours are never used twice.
    let graph = read(&mut session).await?;
    let ours = work.in_qemu().any(|step| is_there(&graph, step));
    if ours || lives == Some(true) { Ok(Qemu::Same(Box::new(session))) } else { Ok(Qemu::Gone) }
}

/// Whether QEMU has something of a step's name.
fn is_there(graph: &Graph, step: &Step) -> bool {
    match step {
        Step::Node { name } | Step::Filter { name, .. } => graph.node(name).is_some(),
        Step::Export { id } => graph.exports.iter().any(|e| e.id == *id),
        Step::Bitmap { node, name, .. } => graph.bitmap(node, name).is_some(),
        _ => false,
    }
}

/// Lets a guest run that is paused. `false` when it was not paused (any more).
async fn resume(session: &mut Session) -> Result<bool, Trouble> {
    let status = session.execute(&QueryStatus {}).await?;
    if status.status != "paused" {
        return Ok(false);
    }
    session.execute(&Cont {}).await?;
    Ok(true)
}

async fn thaw(agent: &mut Agent) -> Result<bool, Trouble> {
    let left = |error| Trouble::Left(format!("the guest's file systems may be frozen: {error}"));
    if agent.fsfreeze_status(STATUS_LIMIT).await.map_err(left)? == FsfreezeStatus::Thawed {
        return Ok(false);
    }
    agent.fsfreeze_thaw(THAW_LIMIT).await.map_err(left)?;
    Ok(true)
}

/// Deletes an export, whoever is connected, and waits until it is gone.
async fn delete_export(session: &mut Session, id: &str) -> Result<(), Trouble> {
    let deadline = Instant::now() + GONE_LIMIT;
    let mut asked = false;
    loop {
        let exports = session.execute(&QueryBlockExports {}).await?;
        if !exports.iter().any(|e| e.id == id) {
            return Ok(());
        }
        if !asked {
            match session.execute(&BlockExportDel { id: id.to_owned(), mode: "hard" }).await {
                // It is going already, or went between the two commands.
                Ok(_) | Err(QmpError::Refused { .. }) => asked = true,
                Err(error) => return Err(error.into()),
            }
        } else if Instant::now() >= deadline {
            return Err(Trouble::Left(format!("the export is still there after {GONE_LIMIT:?}")));
        } else {
            sleep(POLL).await;
        }
    }
}

/// Deletes a node; one that is not there counts as deleted.
async fn delete_node(session: &mut Session, name: &str) -> Result<(), Trouble> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match session.execute(&BlockdevDel { node_name: name.to_owned() }).await {
            Ok(_) => return Ok(()),
            Err(QmpError::Refused { desc, .. }) if desc.contains("Failed to find node with node-name") => return Ok(()),
            // A job that is being cancelled lets go of it a moment later.
            Err(QmpError::Refused { desc, .. }) if desc.contains("busy") || desc.contains("in use") => {
                if Instant::now() >= deadline {
                    return Err(Trouble::Left(desc));
                }
            }
            Err(error) => return Err(error.into()),
        }
        sleep(POLL).await;
    }
}

/// Cancels a job, which takes its filter out, and waits until it is gone.
async fn cancel(session: &mut Session, id: &str) -> Result<(), Trouble> {
    let deadline = Instant::now() + GONE_LIMIT;
    let mut asked = false;
    loop {
        let jobs = session.execute(&QueryJobs {}).await?;
        if !jobs.iter().any(|j| j.id == id) {
            return Ok(());
        }
        if !asked {
            match session.execute(&BlockJobCancel { device: id.to_owned(), force: true }).await {
                Ok(_) | Err(QmpError::Refused { .. }) => asked = true,
                Err(error) => return Err(error.into()),
            }
        } else if Instant::now() >= deadline {
            return Err(Trouble::Left(format!("the job is still there after {GONE_LIMIT:?}")));
        } else {
            sleep(POLL).await;
        }
    }
}

/// Gives the device the node below our filter, whatever that is now, and deletes the filter.
async fn take_out(session: &mut Session, name: &str, qom_path: &str) -> Result<(), Trouble> {
    let graph = Graph::read(session).await?;
    if graph.node(name).is_none() {
        return Ok(());
    }
    let users = graph.users(name);
    if let Some(above) = users.iter().find(|u| u.kind == "block-driver" && !is_ours(u.name)) {
        return Err(Trouble::Left(format!(
            "node `{}` was put above the filter as its `{}`; commit it with base-node `{name}`, or remove it, first",
            above.name, above.role
        )));
    }
    if users.iter().any(|u| u.kind == "block-backend") {
        let Some(below) = graph.first_foreign(name) else {
            return Err(Trouble::Left("there is no node below the filter".into()));
        };
        let drive = QomSet { path: qom_path.to_owned(), property: "drive".into(), value: below.into() };
        match session.execute(&drive).await {
            // The device was unplugged meanwhile.
            Err(QmpError::Refused { class, .. }) if class == "DeviceNotFound" => {}
            Err(error) => return Err(error.into()),
            Ok(_) => {}
        }
    }
    delete_node(session, name).await
}

/// Decides between a bitmap of ours and the one before it.
async fn settle_bitmaps(session: &mut Session, switch: &Switch, how: Teardown) -> Result<(), Trouble> {
    let Step::Bitmap { node, name, replaces } = &switch.step else { return Ok(()) };
    let graph = Graph::read(session).await?;
    let actions = bitmap::settle(&graph, switch.target.as_deref(), node, name, replaces.as_deref(), how);
    if actions.is_empty() {
        return Ok(());
    }
    session.execute(&Transaction { actions }).await?;
    Ok(())
}

/// Stops the NBD server if it is the one on `socket` and has no exports of others.
async fn stop_server(session: &mut Session, socket: &Path) -> Result<(), Trouble> {
    let deadline = Instant::now() + CLIENT_LIMIT;
    loop {
        match users(session.peer_pid(), socket) {
            SocketUsers::Nobody => {
                remove_socket(socket);
                return Ok(());
            }
            SocketUsers::Server => break,
            SocketUsers::Clients if Instant::now() < deadline => sleep(POLL).await,
            SocketUsers::Clients if session.version() >= STOPS_WITH_CLIENTS => break,
            SocketUsers::Clients => {
                return Err(Trouble::Left(
                    "this QEMU would hang, as a client is still connected that never spoke".into(),
                ));
            }
        }
    }
    let exports = session.execute(&QueryBlockExports {}).await?;
    if let Some(export) = exports.iter().find(|e| e.kind == "nbd") {
        return Err(Trouble::Left(format!("export `{}` uses it", export.id)));
    }
    match session.execute(&NbdServerStop {}).await {
        Ok(_) => {}
        Err(QmpError::Refused { desc, .. }) if desc.contains("not running") => {}
        Err(error) => return Err(error.into()),
    }
    remove_socket(socket);
    Ok(())
}

/// Who uses a unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SocketUsers {
    /// Nobody listens.
    Nobody,
    /// Somebody listens, and nobody is connected.
    Server,
    /// Somebody is connected.
    Clients,
}

/// Who uses a unix socket, seen from here and from QEMU's network namespace.
fn users(pid: Option<i32>, socket: &Path) -> SocketUsers {
    let paths = [Some(socket.to_owned()), socket.canonicalize().ok()];
    let ours = procfs::net::unix().unwrap_or_default();
    let theirs = pid
        .and_then(|pid| procfs::process::Process::new(pid).ok())
        .and_then(|process| process.unix().ok())
        .unwrap_or_default();
    // The server's end of a connection goes by the name of the socket that it was accepted on.
    let states: Vec<UnixState> = ours
        .into_iter()
        .chain(theirs)
        .filter(|entry| entry.path.is_some() && paths.contains(&entry.path))
        .map(|entry| entry.state)
        .collect();
    if states.iter().any(|state| matches!(state, UnixState::CONNECTING | UnixState::CONNECTED)) {
        SocketUsers::Clients
    } else if states.is_empty() {
        SocketUsers::Nobody
    } else {
        SocketUsers::Server
    }
}

/// Whether anybody listens on a unix socket.
pub(in crate::access) fn listens(pid: Option<i32>, socket: &Path) -> bool {
    users(pid, socket) != SocketUsers::Nobody
}

/// Removes the file of a socket on which nobody listens any more.
pub(in crate::access) fn remove_socket(socket: &Path) {
    if let Err(error) = std::fs::remove_file(socket)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::debug!(%error, socket = %socket.display(), "socket file stays");
    }
}
