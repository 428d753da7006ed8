//! The bitmaps of an access: the target's, and the background bitmap that records while the target's is frozen.

use super::{
    super::qmp::QmpFailure,
    BACKGROUND, Device, GRANULARITY, StandIn,
    arguments::BitmapMode,
    graph::{Found, Graph},
};
use serde_json::json;

impl StandIn {
    /// Brings the target's bitmap into the state that the mode asks for. Its action, and the bytes to be read.
    pub(super) fn prepare_bitmap(
        &self,
        graph: &Graph,
        found: &Found,
        target: &str,
        mode: BitmapMode,
    ) -> Result<(&'static str, u64), QmpFailure> {
        let this = json!({"node": found.below, "name": target});
        let existing = graph.bitmap(&found.below, target);
        match (mode, existing) {
            (BitmapMode::None, None) => Ok(("not-used", found.size)),
            (BitmapMode::None, Some(_)) => {
                self.execute("block-dirty-bitmap-remove", this)?;
                Ok(("not-used-removed", found.size))
            }
            (BitmapMode::Use, Some(bitmap)) => {
                Ok(("used", bitmap["count"].as_u64().unwrap_or(u64::MAX).min(found.size)))
            }
            (mode, existing) => {
                if existing.is_some() {
                    self.execute("block-dirty-bitmap-remove", this)?;
                }
                let (node, size) = (&found.below, found.size);
                self.execute(
                    "block-dirty-bitmap-add",
                    json!({"node": node, "name": target, "granularity": GRANULARITY}),
                )?;
                self.mark_all_dirty(node, target, size)?;
                Ok((if mode == BitmapMode::New { "new" } else { "missing-recreated" }, size))
            }
        }
    }

    /// QMP has no command that sets all bits: a bitmap on a scratch node is written full and merged.
    fn mark_all_dirty(&self, node: &str, name: &str, size: u64) -> Result<(), QmpFailure> {
        const SCRATCH: &str = "rig-pve-scratch";
        self.execute(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": SCRATCH, "size": size, "read-zeroes": true}),
        )?;
        self.execute("block-dirty-bitmap-add", json!({"node": SCRATCH, "name": "all", "granularity": GRANULARITY}))?;
        let step = 512 << 20;
        for offset in (0..size).step_by(step as usize) {
            let line = format!("qemu-io {SCRATCH} \"write -q -z {offset} {}\"", step.min(size - offset));
            self.execute("human-monitor-command", json!({"command-line": line}))?;
        }
        let source = json!([{"node": SCRATCH, "name": "all"}]);
        self.execute("block-dirty-bitmap-merge", json!({"node": node, "target": name, "bitmaps": source}))?;
        self.execute("blockdev-del", json!({"node-name": SCRATCH}))?;
        Ok(())
    }

    /// A teardown without success, as far as bitmaps are concerned.
    pub(super) fn merge_back(&self, device: &Device, target: &str) {
        if device.has_bitmap {
            let _ = self.end_bitmap(device, target, false);
        }
    }

    pub(super) fn end_bitmap(&self, device: &Device, target: &str, success: bool) -> Result<(), QmpFailure> {
        let node = &device.found.below;
        let of = |name: &str| json!({"node": node, "name": name});
        let mut actions = vec![json!({"type": "block-dirty-bitmap-enable", "data": of(target)})];
        if success {
            actions.push(json!({"type": "block-dirty-bitmap-clear", "data": of(target)}));
        }
        let merge = json!({"node": node, "target": target, "bitmaps": [BACKGROUND]});
        actions.push(json!({"type": "block-dirty-bitmap-merge", "data": merge}));
        actions.push(json!({"type": "block-dirty-bitmap-remove", "data": of(BACKGROUND)}));
        self.execute("transaction", json!({"actions": actions})).map(|_| ())
    }
}
