//! Dirty bitmaps on stock QEMU: which one tells what changed, and what becomes of them.
//!
//! A bitmap is named after target and generation and lies on the disk's own node. What is done with it is decided by
//! [`crate::protocol::bitmap`]; each list of changes is one transaction.

use crate::{
    access::{
        BitmapAction, BitmapMode, Teardown,
        graph::{Graph, PREFIX},
    },
    protocol::{
        self,
        bitmap::{Change, Seen, flaw},
    },
    qmp::command::block::{Action, Bitmap, BitmapAdd, BitmapMerge, DirtyBitmap},
};

/// What is done with a disk's bitmaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BitmapPlan {
    /// The bitmap that starts.
    pub new: String,
    /// The bitmap that is read, and stops.
    pub old: Option<String>,
    /// Bytes that a bit of the bitmap that is read stands for, else of the new one.
    pub granularity: u64,
    /// The action.
    pub action: BitmapAction,
    /// Why.
    pub reason: String,
}

/// Name of the bitmap of a target that starts with a generation.
pub fn name(target: &str, generation: &str) -> String {
    format!("{PREFIX}{target}-{generation}")
}

/// Whether `name` is a bitmap of `target`, of any generation. Target ids may contain `-`, generations do not.
fn is_of(target: &str, name: &str) -> bool {
    name.strip_prefix(PREFIX)
        .and_then(|rest| rest.strip_prefix(target))
        .and_then(|rest| rest.strip_prefix('-'))
        .is_some_and(|generation| !generation.is_empty() && generation.bytes().all(|b| b.is_ascii_alphanumeric()))
}

/// The bitmap on `node` that records what changed for `target`.
pub(in crate::access) fn of_target<'g>(graph: &'g Graph, node: &str, target: &str) -> Option<&'g str> {
    graph.bitmaps(node).filter(|(name, state)| is_of(target, name) && state.recording).map(|(name, _)| name).last()
}

/// Judges whether the bitmap that is asked for can be used.
pub(super) fn plan(graph: &Graph, node: &str, mode: &BitmapMode, new: String, granularity: u32) -> BitmapPlan {
    let recreated = |reason: String| BitmapPlan {
        new: new.clone(),
        old: None,
        granularity: granularity.into(),
        action: BitmapAction::MissingRecreated,
        reason,
    };
    let old = match mode {
        // It is there for the time of the access, and goes with it.
        BitmapMode::None => {
            return BitmapPlan { action: BitmapAction::NotUsed, ..recreated("no dirty bitmap was asked for".into()) };
        }
        BitmapMode::New => {
            return BitmapPlan { action: BitmapAction::New, ..recreated("a new bitmap is started".into()) };
        }
        BitmapMode::Use(old) => old,
    };
    let Some(bitmap) = graph.bitmap(node, old) else {
        return recreated(format!("bitmap `{old}` is not on node `{node}`"));
    };
    if *old == new {
        return recreated(format!("bitmap `{old}` belongs to this very run"));
    }
    if let Some(flaw) = flaw(seen(bitmap)) {
        return recreated(format!("bitmap `{old}` {flaw}"));
    }
    BitmapPlan {
        new,
        old: Some(old.clone()),
        granularity: bitmap.granularity,
        action: BitmapAction::Used,
        reason: format!("bitmap `{old}` has every write since"),
    }
}

fn seen(bitmap: &DirtyBitmap) -> Seen {
    let DirtyBitmap { recording, inconsistent, busy, granularity, .. } = *bitmap;
    Seen { recording, inconsistent, busy, granularity }
}

/// Actions at the instant.
pub(super) fn switch(node: &str, plan: &BitmapPlan, granularity: u32) -> Vec<Action> {
    let changes = protocol::bitmap::switch(&plan.new, plan.old.as_deref());
    changes.into_iter().map(|change| action(change, node, granularity)).collect()
}

/// Actions at the end of a run, given what is on the node now. Empty when there is nothing (left) to do.
pub(in crate::access) fn settle(
    graph: &Graph,
    target: Option<&str>,
    node: &str,
    new: &str,
    replaces: Option<&str>,
    how: Teardown,
) -> Vec<Action> {
    let concerned =
        |name: &str| name == new || Some(name) == replaces || target.is_some_and(|target| is_of(target, name));
    let now: Vec<_> =
        graph.bitmaps(node).filter(|(name, _)| concerned(name)).map(|(name, state)| (name, seen(state))).collect();
    let changes = protocol::bitmap::settle(&now, new, replaces, how);
    changes.into_iter().map(|change| action(change, node, 0)).collect()
}

/// `granularity` is for a bitmap that is added.
fn action(change: Change<'_>, node: &str, granularity: u32) -> Action {
    let bitmap = |name: &str| Bitmap { node: node.to_owned(), name: name.to_owned() };
    match change {
        Change::Add(name) => {
            Action::BitmapAdd(BitmapAdd { node: node.to_owned(), name: name.to_owned(), granularity, disabled: false })
        }
        Change::Remove(name) => Action::BitmapRemove(bitmap(name)),
        Change::Enable(name) => Action::BitmapEnable(bitmap(name)),
        Change::Disable(name) => Action::BitmapDisable(bitmap(name)),
        Change::Merge { from, into } => Action::BitmapMerge(BitmapMerge {
            node: node.to_owned(),
            target: into.to_owned(),
            bitmaps: vec![bitmap(from)],
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn graph(bitmaps: &Value) -> Graph {
        Graph {
            nodes: serde_json::from_value(json!([{"node-name": "n", "drv": "raw", "dirty-bitmaps": bitmaps}])).unwrap(),
            ..Graph::default()
        }
    }

    fn on(name: &str) -> Value {
        json!({"name": name, "granularity": 131_072, "recording": true, "busy": false, "count": 0})
    }

    fn off(name: &str) -> Value {
        json!({"name": name, "granularity": 65536, "recording": false, "busy": false, "count": 0})
    }

    fn words(actions: &[Action]) -> Vec<String> {
        actions
            .iter()
            .map(|a| match a {
                Action::BitmapAdd(b) => format!("add {}", b.name),
                Action::BitmapRemove(b) => format!("remove {}", b.name),
                Action::BitmapEnable(b) => format!("enable {}", b.name),
                Action::BitmapDisable(b) => format!("disable {}", b.name),
                Action::BitmapMerge(b) => format!(
                    "merge {} into {}",
                    b.bitmaps.iter().map(|b| b.name.as_str()).collect::<Vec<_>>().join(","),
                    b.target
                ),
                Action::Backup(b) => format!("backup {}", b.job_id),
            })
            .collect()
    }

    #[test]
    fn a_bitmap_is_used_only_when_it_has_every_write() {
        let use_old = BitmapMode::Use("pvb-t-1".into());
        let plan = |bitmaps: Value| plan(&graph(&bitmaps), "n", &use_old, "pvb-t-2".into(), 65536);
        let used = plan(json!([on("pvb-t-1")]));
        assert_eq!(
            (used.action, used.old.as_deref(), used.granularity),
            (BitmapAction::Used, Some("pvb-t-1"), 131_072)
        );
        assert_eq!(words(&switch("n", &used, 65536)), ["add pvb-t-2", "disable pvb-t-1"]);

        let mut busy = on("pvb-t-1");
        busy["busy"] = true.into();
        let mut inconsistent = on("pvb-t-1");
        inconsistent["inconsistent"] = true.into();
        for (bitmaps, why) in [
            (json!([]), "bitmap `pvb-t-1` is not on node `n`"),
            (json!([off("pvb-t-1")]), "bitmap `pvb-t-1` does not record"),
            (json!([busy]), "bitmap `pvb-t-1` is in use by another operation"),
            (json!([inconsistent]), "bitmap `pvb-t-1` is inconsistent: QEMU was not shut down properly"),
        ] {
            let plan = plan(bitmaps);
            assert_eq!(
                (plan.action, plan.old.as_deref(), plan.granularity),
                (BitmapAction::MissingRecreated, None, 65536)
            );
            assert_eq!(plan.reason, why);
            assert_eq!(words(&switch("n", &plan, 65536)), ["add pvb-t-2"]);
        }
    }

    #[test]
    fn without_a_bitmap_one_is_there_for_the_time_of_the_access_only() {
        let empty = graph(&json!([]));
        let plan = plan(&empty, "n", &BitmapMode::None, "pvb-t-2".into(), 65536);
        assert_eq!((plan.action, plan.old.as_deref()), (BitmapAction::NotUsed, None));
        assert_eq!(words(&switch("n", &plan, 65536)), ["add pvb-t-2"]);
        let then = graph(&json!([on("pvb-t-1"), on("pvb-t-2")]));
        assert_eq!(words(&settle(&then, Some("t"), "n", "pvb-t-2", None, Teardown::Failure)), ["remove pvb-t-2"]);
    }

    #[test]
    fn the_bitmap_of_a_target_is_the_one_that_records() {
        let graph = graph(&json!([off("pvb-t-0"), on("pvb-t-1"), on("pvb-t-x-2"), on("pvb-tt-3")]));
        assert_eq!(of_target(&graph, "n", "t"), Some("pvb-t-1"));
        assert_eq!(of_target(&graph, "n", "u"), None);
        assert_eq!(of_target(&graph, "m", "t"), None);
    }

    #[test]
    fn success_drops_what_came_before_and_nothing_of_other_targets() {
        let graph = graph(&json!([
            on("pvb-t-2"),
            off("pvb-t-1"),
            off("pvb-t-0"),
            on("pvb-t-x-2"),
            on("theirs"),
            on("pvb-tt-1"),
            on("pvb-t-")
        ]));
        let actions = settle(&graph, Some("t"), "n", "pvb-t-2", Some("pvb-t-1"), Teardown::Success);
        assert_eq!(words(&actions), ["remove pvb-t-1", "remove pvb-t-0"]);
        assert!(settle(&graph, None, "gone", "pvb-t-2", Some("pvb-t-1"), Teardown::Success).is_empty());
    }

    #[test]
    fn failure_gives_the_old_one_the_writes_of_the_new_one() {
        let settle = |bitmaps: Value, old| {
            words(&settle(&graph(&bitmaps), Some("t"), "n", "pvb-t-2", old, Teardown::Failure)).join(", ")
        };
        let old = Some("pvb-t-1");
        assert_eq!(
            settle(json!([on("pvb-t-2"), off("pvb-t-1")]), old),
            "enable pvb-t-1, merge pvb-t-2 into pvb-t-1, remove pvb-t-2"
        );
        assert_eq!(settle(json!([on("pvb-t-2"), on("pvb-t-1")]), old), "merge pvb-t-2 into pvb-t-1, remove pvb-t-2");
        assert_eq!(settle(json!([on("pvb-t-2"), on("pvb-t-0")]), None), "remove pvb-t-2");
        assert_eq!(settle(json!([on("pvb-t-1")]), old), "");
        // A gap: nothing may be trusted.
        assert_eq!(settle(json!([off("pvb-t-2"), off("pvb-t-1")]), old), "remove pvb-t-1, remove pvb-t-2");
    }
}
