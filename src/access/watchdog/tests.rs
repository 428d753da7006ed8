use super::*;
use crate::qmp::agent::tests::{Reply, ScriptedAgent};
use serde_json::json;
use std::{
    env,
    path::Path,
    process,
    sync::{Arc, Mutex},
};
use tokio::net::{UnixListener, UnixStream};

impl Watchdog {
    /// A watchdog that does nothing, for tests of those who keep one. Does not wait for the child, since a paused clock does
    /// not wait for processes.
    pub(crate) fn inert() -> Self {
        let mut child = Command::new("/bin/cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let pipe = child.stdin.take().unwrap();
        Self { child, pipe }
    }
}

/// Runs the child's logic with what its pipe brings before it closes.
async fn told(words: &str, agent: Option<&Path>, qmp: Option<&Path>) -> Rescue {
    let mut ready = Vec::new();
    let rescue = watch(words.as_bytes(), &mut ready, agent.map(Into::into), qmp.map(Into::into)).await;
    assert_eq!(ready, format!("{READY}\n").as_bytes());
    rescue
}

/// A QEMU that is in one state and notes its commands.
fn scripted_qemu(socket: &Path, status: &'static str) -> Arc<Mutex<Vec<String>>> {
    let listener = UnixListener::bind(socket).unwrap();
    let log: Arc<Mutex<Vec<String>>> = Arc::default();
    let seen = log.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (read, mut write) = stream.into_split();
            write.write_all(b"{\"QMP\": {}}\n").await.unwrap();
            let mut lines = BufReader::new(read).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let request: Value = serde_json::from_str(&line).unwrap();
                let name = request["execute"].as_str().unwrap();
                seen.lock().unwrap().push(name.to_owned());
                let value = if name == "query-status" { json!({"status": status}) } else { json!({}) };
                write
                    .write_all(format!("{}\n", json!({"return": value, "id": request["id"]})).as_bytes())
                    .await
                    .unwrap();
            }
        }
    });
    log
}

#[tokio::test]
async fn a_pipe_that_closes_while_frozen_thaws() {
    for words in ["freeze\n", "freeze", "freeze\nthawed\nfreeze\n", "nonsense\nfreeze\n\n"] {
        let agent = ScriptedAgent::start(|_, _| None);
        *agent.frozen.lock().unwrap() = true;
        assert_eq!(told(words, Some(&agent.socket), None).await, Rescue::Done);
        assert!(!agent.is_frozen(), "{words:?}");
    }
}

#[tokio::test]
async fn what_it_was_not_told_of_is_left_alone() {
    let agent = ScriptedAgent::start(|_, _| None);
    let dir = tempfile::tempdir().unwrap();
    let qmp = dir.path().join("qmp");
    let log = scripted_qemu(&qmp, "paused");
    for words in ["", "freeze\nthawed\n", "freeze\npause\ndone\n", "pause\nresumed\n", "done\nfreeze\n"] {
        assert_eq!(told(words, Some(&agent.socket), Some(&qmp)).await, Rescue::NotNeeded, "{words:?}");
    }
    assert!(agent.seen().is_empty() && log.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_guest_is_resumed_only_from_a_pause_that_was_ours() {
    for (status, resumed) in [("paused", true), ("running", false), ("io-error", false), ("prelaunch", false)] {
        let dir = tempfile::tempdir().unwrap();
        let qmp = dir.path().join("qmp");
        let log = scripted_qemu(&qmp, status);
        assert_eq!(told("pause\n", None, Some(&qmp)).await, Rescue::Done);
        assert_eq!(log.lock().unwrap().contains(&"cont".to_owned()), resumed, "{status}");
    }
}

#[tokio::test(start_paused = true)]
async fn it_is_patient_with_a_slow_agent_but_not_for_ever() {
    let agent = ScriptedAgent::start(|name, nth| match (name, nth) {
        ("guest-fsfreeze-thaw", 1) => Some(Reply::HangUp),
        ("guest-fsfreeze-thaw", 2) => Some(Reply::Late(Duration::from_mins(5), json!(0))),
        _ => None,
    });
    assert_eq!(told("freeze\n", Some(&agent.socket), None).await, Rescue::Done);
    assert_eq!(agent.seen().iter().filter(|c| *c == "guest-fsfreeze-thaw").count(), 3);

    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("qga");
    let _deaf = UnixListener::bind(&socket).unwrap();
    assert_eq!(told("freeze\n", Some(&socket), None).await, Rescue::Failed);
}

#[tokio::test]
async fn when_qemu_is_gone_there_is_nothing_to_do() {
    let gone = Path::new("/nonexistent/socket");
    assert_eq!(told("freeze\npause\n", Some(gone), Some(gone)).await, Rescue::Done);
    assert_eq!(told("freeze\n", Some(gone), None).await, Rescue::Done);
}

/// Not a test: the child, and its parent that is killed, as the tests below start them.
#[test]
fn as_a_process() {
    let socket = |name| env::var_os(name).map(PathBuf::from);
    let (agent, qmp) = (socket("TEST_AGENT"), socket("TEST_QMP"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    match env::var("TEST_ROLE").as_deref() {
        Ok("child") => {
            runtime.block_on(run_child(agent, qmp)).unwrap();
            process::exit(0);
        }
        Ok("parent") => runtime.block_on(async {
            let mut watchdog = Watchdog::start(test_process("child", agent, qmp.clone())).await.unwrap();
            watchdog.before_freeze().await.unwrap();
            if let Some(qmp) = qmp {
                watchdog.before_pause().await.unwrap();
                Qmp::new(qmp).execute(&qapi::qmp::stop {}).await.unwrap();
            }
            println!("frozen");
            sleep(Duration::from_mins(1)).await;
        }),
        _ => {}
    }
}

fn test_process(role: &str, agent: Option<PathBuf>, qmp: Option<PathBuf>) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "access::watchdog::tests::as_a_process", "--nocapture"]).env("TEST_ROLE", role);
    for (name, value) in [("TEST_AGENT", agent), ("TEST_QMP", qmp)] {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}

/// Starts a parent with a watchdog over `agent` (and `qmp`), waits until it has frozen (and paused), and kills it.
async fn kill_a_parent(agent: &Path, qmp: Option<&Path>) {
    let mut parent =
        test_process("parent", Some(agent.into()), qmp.map(Into::into)).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(parent.stdout.take().unwrap()).lines();
    while lines.next_line().await.unwrap().expect("the parent froze") != "frozen" {}
    parent.kill().await.unwrap();
}

async fn within<F: AsyncFnMut() -> bool>(limit: Duration, mut reached: F) -> bool {
    let deadline = Instant::now() + limit;
    while !reached().await {
        if Instant::now() > deadline {
            return false;
        }
        sleep(Duration::from_millis(20)).await;
    }
    true
}

#[tokio::test]
async fn a_real_child_thaws_when_its_parent_is_killed() {
    let agent = ScriptedAgent::start(|_, _| None);
    *agent.frozen.lock().unwrap() = true;
    kill_a_parent(&agent.socket, None).await;
    assert!(within(Duration::from_secs(5), async || !agent.is_frozen()).await);
}

#[tokio::test]
async fn a_real_qemu_is_resumed_when_the_parent_is_killed() {
    let agent = ScriptedAgent::start(|_, _| None);
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("qmp");
    let mut qemu = process::Command::new("qemu-system-x86_64")
        .args(["-machine", "none", "-nodefaults", "-display", "none", "-qmp"])
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        .spawn()
        .unwrap();
    assert!(within(Duration::from_secs(15), async || UnixStream::connect(&socket).await.is_ok()).await);
    let qmp = Qmp::new(&socket);
    kill_a_parent(&agent.socket, Some(&socket)).await;
    let running = async || qmp.execute(&qapi::qmp::query_status {}).await.unwrap().running;
    assert!(within(Duration::from_secs(5), running).await);
    assert!(agent.seen().contains(&"guest-fsfreeze-thaw".to_owned()));
    qemu.kill().unwrap();
    qemu.wait().unwrap();
}

#[tokio::test]
async fn a_disarmed_child_leaves_and_a_dead_one_is_noticed() {
    let agent = ScriptedAgent::start(|_, _| None);
    let start = || Watchdog::start(test_process("child", Some(agent.socket.clone()), None));
    let mut watchdog = start().await.unwrap();
    watchdog.before_freeze().await.unwrap();
    let pid = watchdog.child.id().unwrap();
    watchdog.disarm().await;
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    assert!(agent.seen().is_empty());

    let mut dead = start().await.unwrap();
    dead.child.kill().await.unwrap();
    assert!(matches!(dead.before_freeze().await, Err(WatchdogError::Gone(_))));
    assert!(matches!(Watchdog::start(Command::new("/bin/true")).await, Err(WatchdogError::Gone(_))));
    assert!(matches!(Watchdog::start(Command::new("/nonexistent")).await, Err(WatchdogError::Spawn(_))));
}

#[tokio::test]
async fn signals_that_end_the_parent_do_not_end_the_child() {
    use nix::{
        sys::signal::{Signal, kill},
        unistd::Pid,
    };
    let agent = ScriptedAgent::start(|_, _| None);
    *agent.frozen.lock().unwrap() = true;
    let mut watchdog = Watchdog::start(test_process("child", Some(agent.socket.clone()), None)).await.unwrap();
    watchdog.before_freeze().await.unwrap();
    let pid = Pid::from_raw(watchdog.child.id().unwrap().cast_signed());
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
        kill(pid, signal).unwrap();
    }
    drop(watchdog);
    assert!(within(Duration::from_secs(5), async || !agent.is_frozen()).await);
}
