//! Commands that only Proxmox VE's QEMU knows.
//!
//! Shapes as of `pve-qemu-kvm` 9.2.0-5 (the first final one) to 11.0. Members that we do not know are passed over, and
//! so are values: what cannot be understood must not look like something that can be trusted.

use serde::{Deserialize, Deserializer, Serialize};

/// `query-proxmox-support`: what this QEMU process can do. Upstream QEMU answers `CommandNotFound`.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct QueryProxmoxSupport {}

/// Answer to `query-proxmox-support`. An older QEMU leaves out what it does not have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct ProxmoxSupport {
    /// `backup-access-setup` and `backup-access-teardown` exist.
    pub backup_access_api: bool,
    /// Fleecing is supported.
    pub backup_fleecing: bool,
    /// `query-pbs-bitmap-info` exists.
    pub query_bitmap_info: bool,
}

impl qapi::Command for QueryProxmoxSupport {
    type Ok = ProxmoxSupport;
    const NAME: &'static str = "query-proxmox-support";
    const ALLOW_OOB: bool = false;
}

/// What is asked for about a device's bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AccessBitmapMode {
    /// No bitmap; the target's is deleted, if it has one.
    None,
    /// A new bitmap, all dirty; an old one is dropped.
    New,
    /// The target's bitmap; a new one, all dirty, if there is none.
    Use,
}

/// One device of `backup-access-setup`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BackupAccessDevice {
    /// Name of the block backend or of the root node: `drive-scsi0`. A node `<device>-fleecing` must exist.
    pub device: String,
    /// What to do about its bitmap.
    pub bitmap_mode: AccessBitmapMode,
}

/// `backup-access-setup`. Fatal to the guest with an empty list, with a device twice, or with a drive without medium.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BackupAccessSetup {
    /// Names the bitmap, and is asked for again at teardown.
    pub target_id: String,
    /// The devices.
    pub devices: Vec<BackupAccessDevice>,
}

impl qapi::Command for BackupAccessSetup {
    type Ok = Vec<BackupAccess>;
    const NAME: &'static str = "backup-access-setup";
    const ALLOW_OOB: bool = false;
}

/// One entry of the answer to `backup-access-setup`; in the order of the request.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BackupAccess {
    /// The snapshot-access node, a generated name.
    pub node_name: String,
    /// The device as asked for.
    pub device: String,
    /// Size in bytes.
    pub size: u64,
    /// Node that carries the bitmap. All three bitmap members are absent when no bitmap is in use.
    pub bitmap_node_name: Option<String>,
    /// The bitmap's name: the target id.
    pub bitmap_name: Option<String>,
    /// What was done about it.
    pub bitmap_action: Option<PbsBitmapAction>,
}

/// `backup-access-teardown`. Fatal to the guest while an export of a bitmap exists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BackupAccessTeardown {
    /// As given to `backup-access-setup`.
    pub target_id: String,
    /// Whether the bitmap keeps only the writes since setup (`true`) or also what was dirty before.
    pub success: bool,
}

impl qapi::Command for BackupAccessTeardown {
    type Ok = qapi::Empty;
    const NAME: &'static str = "backup-access-teardown";
    const ALLOW_OOB: bool = false;
}

/// `query-backup`.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct QueryBackup {}

impl qapi::Command for QueryBackup {
    type Ok = BackupStatus;
    const NAME: &'static str = "query-backup";
    const ALLOW_OOB: bool = false;
}

/// Answer to `query-backup`: the last or the current backup or access.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct BackupStatus {
    /// `active`, `done`, `error`; absent before the first backup.
    pub status: Option<String>,
    /// Empty for an access.
    pub uuid: Option<String>,
    /// Where a regular backup writes to.
    pub backup_file: Option<String>,
    /// Start, seconds since the epoch.
    pub start_time: Option<i64>,
    /// Inside teardown.
    pub finishing: bool,
    /// Sum of the devices' sizes in bytes.
    pub total: Option<u64>,
}

impl BackupStatus {
    /// Whether a backup or an access holds the one place for it. After a setup that failed late this stays so until a
    /// teardown is sent.
    pub fn is_active(&self) -> bool {
        self.finishing || self.status.as_deref() == Some("active")
    }

    /// Whether what is active looks like an access (and no regular backup).
    pub fn looks_like_access(&self) -> bool {
        self.is_active() && self.uuid.as_deref().unwrap_or_default().is_empty() && self.backup_file.is_none()
    }
}

/// `query-pbs-bitmap-info`: despite its name, also about an access.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct QueryPbsBitmapInfo {}

impl qapi::Command for QueryPbsBitmapInfo {
    type Ok = Vec<BitmapInfo>;
    const NAME: &'static str = "query-pbs-bitmap-info";
    const ALLOW_OOB: bool = false;
}

/// One entry of the answer to `query-pbs-bitmap-info`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BitmapInfo {
    /// The device.
    pub drive: String,
    /// What was done about its bitmap.
    pub action: PbsBitmapAction,
    /// Size in bytes.
    pub size: u64,
    /// Dirty bytes, at most the size.
    pub dirty: u64,
}

/// What QEMU did about a bitmap. Only [`PbsBitmapAction::Used`] allows an incremental backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PbsBitmapAction {
    /// None in use.
    NotUsed,
    /// None in use; the target's bitmap was deleted.
    NotUsedRemoved,
    /// Created, all dirty.
    New,
    /// The existing one.
    Used,
    /// The existing one was of no use and is created anew.
    Invalid,
    /// There was none; created, all dirty.
    MissingRecreated,
    /// A word that we do not know.
    Unknown(String),
}

impl PbsBitmapAction {
    /// QEMU's word.
    pub fn as_str(&self) -> &str {
        match self {
            Self::NotUsed => "not-used",
            Self::NotUsedRemoved => "not-used-removed",
            Self::New => "new",
            Self::Used => "used",
            Self::Invalid => "invalid",
            Self::MissingRecreated => "missing-recreated",
            Self::Unknown(word) => word,
        }
    }
}

impl<'de> Deserialize<'de> for PbsBitmapAction {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let word = String::deserialize(deserializer)?;
        Ok(match word.as_str() {
            "not-used" => Self::NotUsed,
            "not-used-removed" => Self::NotUsedRemoved,
            "new" => Self::New,
            "used" => Self::Used,
            "invalid" => Self::Invalid,
            "missing-recreated" => Self::MissingRecreated,
            _ => Self::Unknown(word),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_missing_feature_is_absent_and_an_unknown_one_is_passed_over() {
        let support: ProxmoxSupport =
            serde_json::from_value(json!({"backup-fleecing": true, "pbs-library-version": "1.5", "later": [1]}))
                .unwrap();
        assert!(support.backup_fleecing && !support.backup_access_api);
    }

    #[test]
    fn setup_is_sent_with_the_words_of_the_schema() {
        let setup = BackupAccessSetup {
            target_id: "snapshot-access:bk".into(),
            devices: vec![BackupAccessDevice { device: "drive-scsi0".into(), bitmap_mode: AccessBitmapMode::Use }],
        };
        assert_eq!(
            serde_json::to_value(&setup).unwrap(),
            json!({"target-id": "snapshot-access:bk", "devices": [{"device": "drive-scsi0", "bitmap-mode": "use"}]})
        );
        assert_eq!(
            serde_json::to_value(BackupAccessTeardown { target_id: "t".into(), success: false }).unwrap(),
            json!({"target-id": "t", "success": false})
        );
        assert_eq!(serde_json::to_value(QueryBackup {}).unwrap(), json!({}));
    }

    #[test]
    fn answers_are_read_as_recorded_and_unknown_actions_stay_unknown() {
        let answer: Vec<BackupAccess> = serde_json::from_value(json!([
            {"device": "drive-scsi0", "node-name": "#block581", "bitmap-action": "used", "size": 67_108_864,
             "bitmap-node-name": "fcd04", "bitmap-name": "snapshot-access:store1"},
            {"node-name": "#block1372", "device": "drive-scsi1", "size": 31_457_280, "later": null},
            {"node-name": "#b", "device": "d", "size": 0, "bitmap-action": "renewed"}
        ]))
        .unwrap();
        assert_eq!(answer[0].bitmap_action, Some(PbsBitmapAction::Used));
        assert_eq!(answer[1].bitmap_action, None);
        assert_eq!(answer[2].bitmap_action, Some(PbsBitmapAction::Unknown("renewed".into())));
    }

    #[test]
    fn an_access_is_told_from_a_regular_backup() {
        let status = |v| serde_json::from_value::<BackupStatus>(v).unwrap();
        assert!(!status(json!({"finishing": false})).is_active());
        let access = status(json!({"status": "active", "uuid": "", "total": 1, "finishing": false, "start-time": 0}));
        assert!(access.is_active() && access.looks_like_access());
        let backup = status(json!({"status": "active", "uuid": "e7c64e9f", "finishing": false}));
        assert!(backup.is_active() && !backup.looks_like_access());
        assert!(!status(json!({"status": "done", "uuid": "", "finishing": false})).is_active());
        assert!(status(json!({"status": "done", "finishing": true})).is_active());
    }
}
