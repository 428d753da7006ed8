//! Scripted peers, and the real QEMU.

use super::*;
use std::path::Path;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    net::{
        UnixListener,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};

const HELLO: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "pve-qemu-kvm_10.0.2-4"}, "capabilities": ["oob", {"later": 1}]}}"#;

struct Peer {
    lines: Lines<BufReader<OwnedReadHalf>>,
    out: OwnedWriteHalf,
}

impl Peer {
    async fn accept(listener: &UnixListener) -> Self {
        let (read, out) = listener.accept().await.unwrap().0.into_split();
        Self { lines: BufReader::new(read).lines(), out }
    }

    async fn greet(listener: &UnixListener) -> Self {
        let mut peer = Self::accept(listener).await;
        peer.say(HELLO).await;
        let (name, id) = peer.command().await;
        assert_eq!(name, "qmp_capabilities");
        peer.answer(&id, json!({})).await;
        peer
    }

    async fn say(&mut self, line: &str) {
        self.out.write_all(format!("{line}\r\n").as_bytes()).await.unwrap();
    }

    /// Name and id of the next command.
    async fn command(&mut self) -> (String, Value) {
        let line = self.lines.next_line().await.unwrap().unwrap();
        let command: Value = serde_json::from_str(&line).unwrap();
        (command["execute"].as_str().unwrap().to_owned(), command["id"].clone())
    }

    async fn answer(&mut self, id: &Value, value: Value) {
        self.say(&json!({"return": value, "id": id}).to_string()).await;
    }
}

fn socket() -> (TempDir, UnixListener, Qmp) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    (dir, listener, Qmp::new(path))
}

/// A session and its peer, past negotiation.
async fn pair() -> (TempDir, Peer, Session) {
    let (dir, listener, qmp) = socket();
    let (peer, session) = tokio::join!(Peer::greet(&listener), qmp.session());
    (dir, peer, session.unwrap())
}

#[tokio::test]
async fn the_greeting_tells_version_and_package_and_the_socket_the_pid() {
    let (_dir, _peer, session) = pair().await;
    assert_eq!(session.version(), (10, 0, 2));
    assert_eq!(session.package(), "pve-qemu-kvm_10.0.2-4");
    assert_eq!(session.peer_pid(), Some(process::id().cast_signed()));
}

#[tokio::test(start_paused = true)]
async fn a_missing_or_deserted_socket_is_an_error_at_once() {
    let (dir, listener, qmp) = socket();
    drop(listener);
    let started = Instant::now();
    assert!(
        matches!(qmp.session().await, Err(QmpError::Connect { source, .. }) if source.kind() == ErrorKind::ConnectionRefused)
    );
    let missing = Qmp::new(dir.path().join("none")).session().await;
    assert!(matches!(missing, Err(QmpError::Connect { source, .. }) if source.kind() == ErrorKind::NotFound));
    assert_eq!(started.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_socket_that_never_greets_is_busy_after_the_lock_wait() {
    let (_dir, _listener, qmp) = socket();
    let started = Instant::now();
    assert!(matches!(qmp.session().await, Err(QmpError::Busy { waited, .. }) if waited == qmp.lock_wait));
    assert_eq!(started.elapsed(), qmp.lock_wait);
}

#[tokio::test(start_paused = true)]
async fn a_busy_socket_is_waited_for() {
    let (_dir, listener, qmp) = socket();
    let server = tokio::spawn(async move {
        // The first attempt is turned away, as a proxy in front of QEMU does; the second has to queue.
        drop(Peer::accept(&listener).await);
        sleep(Duration::from_secs(30)).await;
        Peer::greet(&listener).await
    });
    let started = Instant::now();
    qmp.session().await.unwrap();
    assert!(started.elapsed() >= Duration::from_secs(30));
    server.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_server_that_dies_while_we_queue_is_gone_not_busy() {
    let (_dir, listener, qmp) = socket();
    let server = tokio::spawn(async move {
        sleep(Duration::from_secs(3)).await;
        drop(listener);
    });
    let started = Instant::now();
    assert!(matches!(qmp.session().await, Err(QmpError::Connect { .. })));
    assert!(started.elapsed() < Duration::from_secs(10));
    server.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_is_no_qmp_is_a_protocol_error() {
    let (_dir, listener, qmp) = socket();
    let server = tokio::spawn(async move {
        let mut peer = Peer::accept(&listener).await;
        peer.say("QEMU 10.0.2 monitor - type 'help' for more information").await;
        sleep(Duration::from_mins(1)).await;
    });
    let error = qmp.session().await.unwrap_err();
    assert!(matches!(&error, QmpError::Protocol { what, .. } if what.contains("monitor")), "{error}");
    server.abort();
}

#[tokio::test]
async fn an_answer_for_the_client_before_us_does_not_hide_the_greeting() {
    let (_dir, listener, qmp) = socket();
    let server = async {
        let mut peer = Peer::accept(&listener).await;
        peer.say(r#"{"return": {}, "id": "4711:1"}"#).await;
        peer.say(HELLO).await;
        peer.say(r#"{"return": {"a": 1}, "id": "4711:2"}"#).await;
        let (_, id) = peer.command().await;
        peer.answer(&id, json!({})).await;
    };
    let (session, ()) = tokio::join!(qmp.session(), server);
    session.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_late_answer_is_not_taken_for_the_next_command() {
    let (_dir, mut peer, mut session) = pair().await;
    let error = session.execute_value("query-status", Value::Null).await.unwrap_err();
    assert!(
        matches!(&error, QmpError::TimedOut { command, limit } if command == "query-status" && *limit == limit_of("query-status"))
    );
    assert!(error.outcome_unknown());
    let late = async {
        let (_, first) = peer.command().await;
        let (name, second) = peer.command().await;
        assert_eq!(name, "query-block");
        peer.answer(&first, json!("late")).await;
        peer.answer(&second, json!([])).await;
    };
    let (answer, ()) = tokio::join!(session.execute_value("query-block", json!({})), late);
    assert_eq!(answer.unwrap(), json!([]));
}

#[tokio::test]
async fn events_wait_until_they_are_asked_for() {
    let (_dir, mut peer, mut session) = pair().await;
    let answer = async {
        let (_, id) = peer.command().await;
        peer.say(r#"{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "FROM_TOMORROW", "more": [1]}"#).await;
        peer.say(
            r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "BLOCK_EXPORT_DELETED", "data": {"id": "a"}}"#,
        )
        .await;
        peer.say(r#"{"surprise": true}"#).await;
        peer.answer(&id, json!({})).await;
        peer.say(r#"{"event": "BLOCK_EXPORT_DELETED", "data": {"id": "b"}}"#).await;
    };
    let (done, ()) = tokio::join!(session.execute_value("nbd-server-stop", Value::Null), answer);
    done.unwrap();
    for wanted in ["b", "a"] {
        let event = session.wait_event(|e| e.data["id"] == wanted, Duration::from_secs(5)).await.unwrap().unwrap();
        assert_eq!(event.name, "BLOCK_EXPORT_DELETED");
    }
    let left = session.wait_event(|_| true, Duration::from_secs(5)).await.unwrap().unwrap();
    assert_eq!((left.name.as_str(), left.data), ("FROM_TOMORROW", Value::Null));
    assert!(session.wait_event(|_| true, Duration::from_millis(10)).await.unwrap().is_none());
}

#[tokio::test]
async fn a_flood_of_events_is_bounded_and_loses_the_oldest() {
    let (_dir, mut peer, mut session) = pair().await;
    let answer = async {
        let (_, id) = peer.command().await;
        for n in 0..2000 {
            peer.say(&json!({"event": "RTC_CHANGE", "data": n}).to_string()).await;
        }
        peer.answer(&id, json!({})).await;
    };
    let (done, ()) = tokio::join!(session.execute_value("stop", Value::Null), answer);
    done.unwrap();
    assert_eq!(session.events.len(), EVENTS);
    let last = session.wait_event(|e| e.data == 1999, Duration::ZERO).await.unwrap();
    assert!(last.is_some());
}

#[tokio::test]
async fn unknown_error_classes_come_through() {
    let (_dir, mut peer, mut session) = pair().await;
    let answer = async {
        let (_, id) = peer.command().await;
        peer.say(&json!({"error": {"class": "Novel", "desc": "no ‘x’", "hint": 1}, "id": id}).to_string()).await;
    };
    let (done, ()) = tokio::join!(session.execute_value("stop", Value::Null), answer);
    let error = done.unwrap_err();
    assert!(matches!(&error, QmpError::Refused { class, desc, .. } if class == "Novel" && desc == "no ‘x’"));
    assert!(!error.outcome_unknown());
}

#[tokio::test]
async fn a_connection_that_ends_leaves_the_outcome_unknown() {
    let (_dir, mut peer, mut session) = pair().await;
    let answer = async {
        peer.command().await;
        drop(peer);
    };
    let (done, ()) = tokio::join!(session.execute_value("cont", Value::Null), answer);
    let error = done.unwrap_err();
    assert!(matches!(&error, QmpError::Closed { command } if command == "cont"));
    assert!(error.outcome_unknown());
    assert!(matches!(session.execute_value("stop", Value::Null).await, Err(QmpError::Closed { .. })));
}

#[tokio::test]
async fn garbage_is_a_protocol_error_and_the_next_command_goes_on() {
    let (_dir, mut peer, mut session) = pair().await;
    for garbage in ["}{", "[1]", "\u{1}\u{7f}", r#"{"error": {"class": "GenericError", "desc": "JSON parse error"}}"#] {
        let answer = async {
            peer.command().await;
            peer.say(garbage).await;
        };
        let (done, ()) = tokio::join!(session.execute_value("stop", Value::Null), answer);
        let error = done.unwrap_err();
        assert!(matches!(error, QmpError::Protocol { .. }) && error.outcome_unknown(), "{garbage}: {error}");
    }
    let answer = async {
        let (_, id) = peer.command().await;
        peer.answer(&id, json!(7)).await;
    };
    let (done, ()) = tokio::join!(session.execute_value("stop", Value::Null), answer);
    assert_eq!(done.unwrap(), json!(7));
}

#[tokio::test]
async fn an_endless_line_is_refused() {
    let (_dir, mut peer, mut session) = pair().await;
    let answer = async {
        peer.command().await;
        let chunk = vec![b' '; 1 << 20];
        while peer.out.write_all(&chunk).await.is_ok() {}
    };
    tokio::select! {
        done = session.execute_value("stop", Value::Null) => {
            assert!(matches!(done, Err(QmpError::Protocol { what, .. }) if what.contains("longer than")));
        }
        () = answer => panic!("the peer was cut off instead"),
    }
}

#[tokio::test]
async fn an_answer_of_another_shape_is_a_protocol_error() {
    let (_dir, mut peer, mut session) = pair().await;
    let answer = async {
        let (_, id) = peer.command().await;
        peer.answer(&id, json!([1])).await;
    };
    let (done, ()) = tokio::join!(session.execute(&qapi::qmp::query_status {}), answer);
    assert!(done.unwrap_err().outcome_unknown());
}

/// A real QEMU without a guest.
pub(crate) struct Qemu {
    dir: TempDir,
    child: process::Child,
}

impl Qemu {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let child = process::Command::new("qemu-system-x86_64")
            .args(["-S", "-machine", "q35", "-accel", "tcg", "-nodefaults", "-display", "none", "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", dir.path().join("qmp").display()))
            .args(arguments)
            .spawn()
            .unwrap();
        Self { dir, child }
    }

    pub(crate) async fn qmp(&self) -> Qmp {
        let socket = self.dir.path().join("qmp");
        for _ in 0..300 {
            if UnixStream::connect(&socket).await.is_ok() {
                return Qmp::new(socket);
            }
            sleep(Duration::from_millis(50)).await;
        }
        panic!("QEMU does not come up in {}", Path::display(self.dir.path()));
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn real_qemu_answers_a_thousand_commands_in_a_row() {
    let qemu = Qemu::start(&[]);
    let mut session = qemu.qmp().await.session().await.unwrap();
    for _ in 0..1000 {
        assert!(!session.execute(&qapi::qmp::query_status {}).await.unwrap().running);
    }
    assert_eq!(session.peer_pid(), Some(qemu.child.id().cast_signed()));
    assert!(session.version().0 >= 7);
    let unknown = session.execute_value("backup-access-setup", json!({})).await.unwrap_err();
    assert!(unknown.is_command_not_found(), "{unknown}");
    let schema = session.execute_value("query-qmp-schema", Value::Null).await.unwrap();
    assert!(schema.as_array().unwrap().len() > 500);
}

#[tokio::test]
async fn real_qemu_is_busy_while_another_client_is_connected() {
    let qemu = Qemu::start(&[]);
    let mut qmp = qemu.qmp().await;
    let first = qmp.session().await.unwrap();
    qmp.lock_wait = Duration::from_secs(1);
    // More than QEMU's queue of waiting clients takes.
    let (a, b, c, d) = tokio::join!(qmp.session(), qmp.session(), qmp.session(), qmp.session());
    for other in [a, b, c, d] {
        let error = other.unwrap_err();
        assert!(matches!(error, QmpError::Busy { .. }), "{error}");
    }
    qmp.lock_wait = Duration::from_secs(20);
    let leave = async {
        sleep(Duration::from_millis(300)).await;
        drop(first);
    };
    let (second, ()) = tokio::join!(qmp.session(), leave);
    second.unwrap().execute(&qapi::qmp::stop {}).await.unwrap();
}

#[tokio::test]
async fn real_qemu_goes_on_after_a_timeout_and_tells_its_events() {
    let qemu = Qemu::start(&["-blockdev", "null-co,node-name=n,read-zeroes=on"]);
    let mut session = qemu.qmp().await.session().await.unwrap();
    let slow = json!({"command-line": "qemu-io n \"sleep 700\""});
    let error = session.execute_within("human-monitor-command", slow, Duration::from_millis(100)).await.unwrap_err();
    assert!(matches!(error, QmpError::TimedOut { .. }), "{error}");
    let status = session.execute(&qapi::qmp::query_status {}).await.unwrap();
    assert!(!status.running);
    session.execute(&qapi::qmp::cont {}).await.unwrap();
    let resumed = session.wait_event(|e| e.name == "RESUME", Duration::from_secs(5)).await.unwrap();
    assert!(resumed.is_some());
    session.execute(&qapi::qmp::quit {}).await.unwrap();
    assert!(matches!(session.wait_event(|_| false, Duration::from_secs(20)).await, Err(QmpError::Closed { .. })));
}
