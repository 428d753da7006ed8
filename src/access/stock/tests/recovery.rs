//! Deaths, and what else does not go as planned.

use super::{WAYS, bitmap_of, full_backup, two_kinds};
use crate::{
    access::{
        AccessError, BitmapAction, BitmapMode, SnapshotAccess, Teardown, recover,
        stock::{
            Way,
            rig::{Kind, Vm, generation, uri},
        },
    },
    journal::{ProcessIdentity, Step},
};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

#[tokio::test]
async fn dying_at_any_point_of_a_set_up_is_undone_by_recovery() {
    for way in WAYS {
        let mut vm = Vm::running(&two_kinds()).await;
        vm.scribble().await;
        let mut image = full_backup(&vm, way, 1).await;
        vm.journal().clear().unwrap();
        let before = vm.state().await;
        let mut point = 0;
        loop {
            point += 1;
            let n = 100 + point as u32;
            vm.scribble().await;
            let mut access = vm.access(way, vm.plan(n, &BitmapMode::Use(bitmap_of(1))));
            access.trial.dies_at = Some(point);
            access.check().await.unwrap();
            match access.set_up().await {
                Err(AccessError::Killed(at)) => assert_eq!(at, point),
                Err(error) => panic!("point {point}: {error}"),
                Ok(_) => {
                    access.tear_down(Teardown::Failure).await.unwrap();
                    break;
                }
            }
            drop(access);
            vm.scribble().await;
            let journal = vm.journal();
            let report = recover(&journal, &vm.qmp, Some(&generation(1))).await.unwrap();
            assert_eq!(report.left_behind, [""; 0], "{way:?}, point {point}");
            assert!(journal.leftover().is_empty());
            assert_eq!(vm.state().await, before, "{way:?}, point {point}: {:?}", report.undone);
            // A second recovery finds nothing to do.
            assert_eq!(recover(&journal, &vm.qmp, None).await.unwrap().undone, [""; 0]);
        }
        assert!(point > 20, "only {point} points");
        // Every write since generation 1 is still known.
        vm.journal().clear().unwrap();
        let mut access = vm.access(way, vm.plan(99, &BitmapMode::Use(bitmap_of(1))));
        access.check().await.unwrap();
        let active = access.set_up().await.unwrap();
        assert!(active.disks.iter().all(|d| d.action == BitmapAction::Used));
        vm.update(&active, &mut image);
        assert_eq!(image, vm.oracle);
        access.tear_down(Teardown::Success).await.unwrap();
    }
}

#[tokio::test]
async fn dying_with_the_access_set_up_is_undone_by_what_was_committed() {
    for way in WAYS {
        for committed in [true, false] {
            let mut vm = Vm::running(&two_kinds()).await;
            vm.scribble().await;
            let mut image = full_backup(&vm, way, 1).await;
            vm.journal().clear().unwrap();
            vm.scribble().await;
            let mut access = vm.access(way, vm.plan(2, &BitmapMode::Use(bitmap_of(1))));
            access.check().await.unwrap();
            let active = access.set_up().await.unwrap();
            if committed {
                vm.update(&active, &mut image);
            }
            vm.scribble().await;
            drop(access);
            let recorded = generation(if committed { 2 } else { 1 });
            let report = recover(&vm.journal(), &vm.qmp, Some(&recorded)).await.unwrap();
            assert_eq!(report.left_behind, [""; 0]);
            let base = if committed { 2 } else { 1 };
            let bitmaps = (0..2).map(|n| (n, bitmap_of(base), true)).collect();
            assert_eq!(vm.state().await.bitmaps, bitmaps);
            let mut access = vm.access(way, vm.plan(3, &BitmapMode::Use(bitmap_of(base))));
            access.check().await.unwrap();
            let active = access.set_up().await.unwrap();
            vm.update(&active, &mut image);
            assert_eq!(image, vm.oracle);
            access.tear_down(Teardown::Failure).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_run_that_succeeds_does_not_count_for_one_before_it_that_could_not_be_undone() {
    let mut vm = Vm::running(&[Kind::VirtioBlockdev, Kind::Ahci]).await;
    vm.scribble().await;
    let journal = vm.journal();
    let begin = |n: u32| Step::Begin {
        guest: "test".into(),
        qmp: vm.qmp.socket.clone(),
        agent: None,
        qemu: ProcessIdentity::of(vm.child.id() as i32).ok(),
        target: "repo-a".into(),
        generation: generation(n),
    };
    let nodes: Vec<String> = vm.disks.iter().map(|d| d.node.clone()).collect();
    let switch = |disk: usize, n: u32| Step::Bitmap {
        node: nodes[disk].clone(),
        name: bitmap_of(n),
        replaces: Some(bitmap_of(n - 1)),
    };
    for (disk, n) in [(0, 2), (1, 3)] {
        journal.record(&begin(n)).unwrap();
        journal.record(&switch(disk, n)).unwrap();
    }
    for (disk, n) in [(0, 1), (0, 2), (1, 2), (1, 3)] {
        vm.say("block-dirty-bitmap-add", json!({"node": nodes[disk], "name": bitmap_of(n)})).await;
    }
    vm.say("block-dirty-bitmap-disable", json!({"node": nodes[0], "name": bitmap_of(1)})).await;
    vm.say("block-dirty-bitmap-disable", json!({"node": nodes[1], "name": bitmap_of(2)})).await;
    recover(&journal, &vm.qmp, Some(&generation(3))).await.unwrap();
    let bitmaps = [(0, bitmap_of(1), true), (1, bitmap_of(3), true)].into();
    assert_eq!(vm.state().await.bitmaps, bitmaps);
}

#[tokio::test]
async fn a_teardown_that_is_cut_short_is_finished_by_recovery() {
    for way in WAYS {
        let mut vm = Vm::running(&two_kinds()).await;
        full_backup(&vm, way, 1).await;
        let before = vm.state().await;
        let mut cut = 0;
        for n in 0..12 {
            let mut access = vm.access(way, vm.plan(50 + n, &BitmapMode::Use(bitmap_of(1))));
            access.check().await.unwrap();
            access.set_up().await.unwrap();
            vm.scribble().await;
            let patience = Duration::from_micros(u64::from(n) * 1500);
            cut += usize::from(tokio::time::timeout(patience, access.tear_down(Teardown::Failure)).await.is_err());
            drop(access);
            let report = recover(&vm.journal(), &vm.qmp, None).await.unwrap();
            assert_eq!(report.left_behind, [""; 0]);
            assert_eq!(vm.state().await, before);
        }
        assert!(cut > 2, "only {cut} teardowns were cut");
    }
}

#[tokio::test]
async fn leftovers_of_a_dead_run_are_refused_until_recovered() {
    for way in WAYS {
        let vm = Vm::running(&two_kinds()).await;
        let mut access = vm.access(way, vm.plan(1, &BitmapMode::New));
        access.check().await.unwrap();
        access.set_up().await.unwrap();
        drop(access);
        let error = vm.access(way, vm.plan(2, &BitmapMode::New)).check().await.unwrap_err();
        assert!(error.to_string().contains("of a dead run is still above it"), "{error}");
        recover(&vm.journal(), &vm.qmp, None).await.unwrap();
        vm.access(way, vm.plan(2, &BitmapMode::New)).check().await.unwrap();
    }
}

#[tokio::test]
async fn an_overlay_that_came_in_below_the_filter_stays_in_place() {
    for way in WAYS {
        let mut vm = Vm::running(&[Kind::VirtioBlockdev, Kind::ScsiDrive]).await;
        vm.scribble().await;
        let mut access = vm.access(way, vm.plan(1, &BitmapMode::New));
        access.check().await.unwrap();
        let active = access.set_up().await.unwrap();
        let instant = vm.oracle.clone();
        let file = vm.dir.path().join("overlay");
        let node = vm.disks[1].node.clone();
        let snapshot = json!({"node-name": node, "snapshot-file": file, "snapshot-node-name": "overlay"});
        vm.say("blockdev-snapshot-sync", snapshot).await;
        vm.scribble().await;
        assert_eq!(vm.read(&active), instant);
        let report = access.tear_down(Teardown::Failure).await.unwrap();
        assert_eq!(report.left_behind, [""; 0], "{way:?}");
        let state = vm.state().await;
        assert_eq!(state.roots, [vm.disks[0].node.as_str(), "overlay"]);
        assert!(state.bitmaps.is_empty());
        assert!(!state.nodes.iter().any(|n| n.starts_with("pvb-")), "{:?}", state.nodes);
    }
}

#[tokio::test]
async fn an_overlay_that_came_in_above_the_filter_is_told_and_left() {
    let mut vm = Vm::running(&[Kind::ScsiDrive]).await;
    let mut access = vm.access(Way::MicroPause, vm.plan(1, &BitmapMode::New));
    access.check().await.unwrap();
    access.set_up().await.unwrap();
    let file = vm.dir.path().join("overlay");
    let device = vm.disks[0].device.clone();
    vm.say("blockdev-snapshot-sync", json!({"device": device, "snapshot-file": file})).await;
    let report = access.tear_down(Teardown::Failure).await.unwrap();
    assert_eq!(report.left_behind.len(), 3, "{:?}", report.left_behind);
    assert!(report.left_behind[0].contains("was put above the filter as its `backing`"), "{:?}", report.left_behind);
    assert!(report.left_behind[2].contains("QEMU still has it open"), "{:?}", report.left_behind);
    // The guest goes on, and the rest is gone.
    vm.scribble().await;
    let state = vm.state().await;
    assert_eq!((state.exports, state.jobs, state.bitmaps.len()), (0, 0, 0));
    drop(access);
    let journal = vm.journal();
    assert!(journal.leftover().iter().any(|s| matches!(s, Step::Filter { .. })), "{:?}", journal.leftover());
    let again = recover(&journal, &vm.qmp, None).await.unwrap();
    assert_eq!(again.left_behind, report.left_behind);
}

#[tokio::test]
async fn a_disk_that_was_unplugged_meanwhile_leaves_nothing() {
    for way in WAYS {
        let mut vm = Vm::running(&[Kind::VirtioBlockdev, Kind::ScsiDrive]).await;
        let mut access = vm.access(way, vm.plan(1, &BitmapMode::New));
        access.check().await.unwrap();
        let active = access.set_up().await.unwrap();
        let instant = vm.oracle.clone();
        vm.say("device_del", json!({"id": "scsi1"})).await;
        if way == Way::MicroPause {
            // With the drive QEMU cancels the job, and with the job the snapshot is gone.
            assert_eq!(vm.read(&active), instant);
        }
        let report = access.tear_down(Teardown::Success).await.unwrap();
        assert_eq!(report.left_behind, [""; 0], "{way:?}");
        let graph = vm.graph().await;
        let ours = graph.nodes.iter().filter_map(|n| n.node_name.as_deref()).filter(|n| n.starts_with("pvb-"));
        assert_eq!(ours.collect::<Vec<_>>(), [""; 0]);
        assert!(vm.files().is_empty());
    }
}

#[tokio::test]
async fn a_client_that_hangs_on_does_not_keep_the_access() {
    for way in WAYS {
        let mut vm = Vm::running(&two_kinds()).await;
        let before = vm.state().await;
        let mut access = vm.access(way, vm.plan(1, &BitmapMode::New));
        access.check().await.unwrap();
        let active = access.set_up().await.unwrap();
        let mut idle = std::process::Command::new("qemu-io")
            .args(["-r", "-f", "raw", &uri(&active, &active.disks[0].export)])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        let report = access.tear_down(Teardown::Failure).await.unwrap();
        assert_eq!(report.left_behind, [""; 0]);
        assert_eq!(vm.state().await, before, "{way:?}");
        idle.kill().unwrap();
        idle.wait().unwrap();
        assert_eq!(vm.status().await, "running");
    }
}

#[tokio::test]
async fn a_client_that_never_spoke_does_not_make_an_old_qemu_hang() {
    let mut vm = Vm::running(&two_kinds()).await;
    let before = vm.state().await;
    let mut access = vm.access(Way::MicroPause, vm.plan(1, &BitmapMode::New));
    access.check().await.unwrap();
    let active = access.set_up().await.unwrap();
    let silent = std::os::unix::net::UnixStream::connect(&active.socket).unwrap();
    let report = access.tear_down(Teardown::Failure).await.unwrap();
    assert_eq!(report.left_behind, [""; 0]);
    assert_eq!(vm.state().await, before);
    drop(silent);
}

/// An agent whose file systems are frozen, until it is asked to thaw them.
fn frozen_agent(socket: &std::path::Path) -> std::thread::JoinHandle<usize> {
    use std::io::{BufRead, BufReader, Write};
    let listener = std::os::unix::net::UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut thaws = 0;
        for line in BufReader::new(stream.try_clone().unwrap()).split(b'\n') {
            let line: Vec<u8> = line.unwrap().into_iter().filter(|b| *b != 0xff).collect();
            let Ok(request) = serde_json::from_slice::<Value>(&line) else { continue };
            let answer = match request["execute"].as_str().unwrap() {
                "guest-sync-delimited" => {
                    stream.write_all(&[0xff]).unwrap();
                    request["arguments"]["id"].clone()
                }
                "guest-fsfreeze-status" => if thaws == 0 { "frozen" } else { "thawed" }.into(),
                "guest-fsfreeze-thaw" => {
                    thaws += 1;
                    1.into()
                }
                other => panic!("{other}"),
            };
            writeln!(stream, "{}", json!({"return": answer})).unwrap();
        }
        thaws
    })
}

#[tokio::test]
async fn file_systems_that_we_left_frozen_are_thawed() {
    let vm = Vm::running(&[Kind::VirtioBlockdev]).await;
    let socket = vm.dir.path().join("agent");
    let agent = frozen_agent(&socket);
    let journal = vm.journal();
    journal
        .record(&Step::Begin {
            guest: "test".into(),
            qmp: vm.qmp.socket.clone(),
            agent: Some(socket),
            qemu: ProcessIdentity::of(vm.child.id() as i32).ok(),
            target: "repo-a".into(),
            generation: generation(1),
        })
        .unwrap();
    journal.record(&Step::Frozen).unwrap();
    let report = recover(&journal, &vm.qmp, None).await.unwrap();
    assert!(report.thawed, "{report:?}");
    assert!(journal.leftover().is_empty());
    assert_eq!(agent.join().unwrap(), 1);
}

#[tokio::test]
async fn when_qemu_dies_only_files_are_left_to_remove() {
    for way in WAYS {
        let mut vm = Vm::running(&two_kinds()).await;
        let mut access = vm.access(way, vm.plan(1, &BitmapMode::New));
        access.check().await.unwrap();
        access.set_up().await.unwrap();
        assert_eq!(vm.files().len(), 3);
        // Not reaped: a zombie is dead as well.
        vm.child.kill().unwrap();
        let started = Instant::now();
        let report = access.tear_down(Teardown::Failure).await.unwrap();
        assert_eq!(report.left_behind, [""; 0]);
        assert!(started.elapsed() < Duration::from_secs(5));
        assert!(vm.files().is_empty(), "{:?}", vm.files());
        drop(access);
        assert!(matches!(vm.journal().leftover().as_slice(), [Step::Begin { .. }]));
    }
}

#[tokio::test]
async fn another_qemu_on_the_same_socket_is_left_alone() {
    let mut old = Vm::running(&two_kinds()).await;
    let mut access = old.access(Way::MicroPause, old.plan(1, &BitmapMode::New));
    access.check().await.unwrap();
    access.set_up().await.unwrap();
    drop(access);
    let journal = old.journal();
    journal.record(&Step::Paused).unwrap();
    old.child.kill().unwrap();
    old.child.wait().unwrap();

    // Somebody paused the new one for reasons of their own.
    let mut new = Vm::running(&two_kinds()).await;
    new.say("stop", Value::Null).await;
    let before = new.state().await;
    let report = recover(&journal, &new.qmp, None).await.unwrap();
    assert!(report.qemu_gone && !report.resumed, "{report:?}");
    assert_eq!(report.left_behind, [""; 0]);
    assert_eq!(new.state().await, before);
    assert!(old.files().is_empty());
    assert!(journal.leftover().is_empty());
}

#[tokio::test]
async fn a_guest_that_we_left_paused_is_resumed_and_one_that_stopped_otherwise_is_not() {
    let mut vm = Vm::running(&[Kind::VirtioBlockdev]).await;
    let begin = |vm: &Vm| Step::Begin {
        guest: "test".into(),
        qmp: vm.qmp.socket.clone(),
        agent: None,
        qemu: ProcessIdentity::of(vm.child.id() as i32).ok(),
        target: "repo-a".into(),
        generation: generation(1),
    };
    let journal = vm.journal();
    vm.say("stop", Value::Null).await;
    journal.record(&begin(&vm)).unwrap();
    journal.record(&Step::Paused).unwrap();
    // On an upstream QEMU there is nothing to tear down for Proxmox VE's command.
    journal.record(&Step::Access { target_id: "t".into() }).unwrap();
    let report = recover(&journal, &vm.qmp, None).await.unwrap();
    assert!(report.resumed);
    assert_eq!(report.left_behind, [""; 0]);
    assert_eq!(vm.status().await, "running");

    journal.record(&begin(&vm)).unwrap();
    journal.record(&Step::Frozen).unwrap();
    let report = recover(&journal, &vm.qmp, None).await.unwrap();
    assert_eq!(report.left_behind, ["frozen: the journal names no guest agent"]);
    assert!(journal.leftover().contains(&Step::Frozen));
}
