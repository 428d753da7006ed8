//! `qapi-schema/proxmox.json` is what Proxmox VE's QEMU offers; our hand-written types have to agree with it, and it with
//! what a real one was seen to say.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use pvebackup::qmp::command::proxmox::{
    AccessBitmapMode, BackupAccess, BackupAccessDevice, BackupAccessSetup, BackupAccessTeardown, BackupStatus,
    BitmapInfo, PbsBitmapAction, ProxmoxSupport, QueryBackup, QueryPbsBitmapInfo, QueryProxmoxSupport,
};
use qapi::Command;
use qapi_parser::{
    Parser,
    spec::{self, DataOrType, Spec},
};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

const SCHEMA: &str = include_str!("../qapi-schema/proxmox.json");

#[derive(Default)]
struct Schema {
    commands: BTreeMap<String, spec::Command>,
    structs: BTreeMap<String, spec::Struct>,
    enums: BTreeMap<String, Vec<String>>,
}

/// Whether members that need not be there are.
#[derive(Clone, Copy, PartialEq)]
enum Optional {
    Present,
    Absent,
}

impl Schema {
    fn read() -> Self {
        let mut schema = Self::default();
        for item in Parser::from_string(Parser::strip_comments(SCHEMA)) {
            match item.unwrap() {
                Spec::Command(c) => drop(schema.commands.insert(c.id.clone(), c)),
                Spec::Struct(s) => drop(schema.structs.insert(s.id.clone(), s)),
                Spec::Enum(e) => {
                    schema.enums.insert(e.id, e.data.iter().map(|value| value.name().clone()).collect());
                }
                other => panic!("not used in this schema: {other:?}"),
            }
        }
        schema
    }

    /// Members of a structure, or a command's arguments.
    fn schema_members(&self, name: &str) -> Vec<spec::Value> {
        if let Some(found) = self.structs.get(name) {
            return found.data.fields.clone();
        }
        match &self.commands[name].data {
            DataOrType::Data(data) => data.fields.clone(),
            DataOrType::Type(of) => self.schema_members(&of.name),
        }
    }

    fn keys(&self, name: &str) -> Vec<String> {
        let mut keys: Vec<String> = self.schema_members(name).into_iter().map(|member| member.name).collect();
        keys.sort();
        keys
    }

    /// The type in one line, with all that it consists of.
    fn spell(&self, of: &spec::Type) -> String {
        let element = if let Some(values) = self.enums.get(&of.name) {
            format!("one of {}", values.join(", "))
        } else if self.structs.contains_key(&of.name) {
            self.spell_members(&of.name)
        } else if of.name == "size" {
            // Introspection has one kind of whole number.
            "int".to_owned()
        } else {
            of.name.clone()
        };
        if of.is_array { format!("array of {element}") } else { element }
    }

    /// In alphabetical order: JSON objects have none of their own.
    fn spell_members(&self, name: &str) -> String {
        let mut members = self.schema_members(name);
        members.sort_by(|a, b| a.name.cmp(&b.name));
        let members: Vec<String> = members
            .iter()
            .map(|m| format!("{}{}: {}", m.name, if m.optional { " (optional)" } else { "" }, self.spell(&m.ty)))
            .collect();
        format!("{{{}}}", members.join("; "))
    }

    /// A value of a structure with numbers, texts and truth everywhere.
    fn sample(&self, name: &str, optional: Optional) -> Value {
        let members = self.schema_members(name);
        let wanted = members.iter().filter(|m| !m.optional || optional == Optional::Present);
        Value::Object(wanted.map(|m| (m.name.clone(), self.sample_of(&m.ty, optional))).collect::<Map<_, _>>())
    }

    fn sample_of(&self, of: &spec::Type, optional: Optional) -> Value {
        let element = match of.name.as_str() {
            "str" => json!("text"),
            "int" | "size" => json!(7),
            "bool" => json!(true),
            name => self.enums.get(name).map_or_else(|| self.sample(name, optional), |values| json!(values[0])),
        };
        if of.is_array { json!([element]) } else { element }
    }

    /// An answer to the command, read as we read it.
    fn answer<C: Command>(&self, optional: Optional) -> C::Ok
    where
        C::Ok: DeserializeOwned,
    {
        let command = &self.commands[C::NAME];
        let value = command.returns.as_ref().map_or_else(|| json!({}), |returns| self.sample_of(returns, optional));
        serde_json::from_value(value).unwrap()
    }
}

fn keys(value: &Value) -> Vec<String> {
    let mut keys: Vec<String> = value.as_object().unwrap().keys().cloned().collect();
    keys.sort();
    keys
}

/// The two access commands are spelled as `query-qmp-schema` of a real QEMU with Proxmox VE's patches (10.0.2-4) gives them, the
/// others by what such QEMUs answer.
#[test]
fn the_schema_is_that_of_the_real_one() {
    const ACTIONS: &str = "one of not-used, not-used-removed, new, used, invalid, missing-recreated";
    let schema = Schema::read();
    let answer = |name: &str| schema.commands[name].returns.as_ref().map(|of| schema.spell(of)).unwrap_or_default();
    let table = [
        (
            "backup-access-setup",
            "{devices: array of {bitmap-mode (optional): one of none, new, use; device: str}; target-id: str}",
            format!(
                "array of {{bitmap-action (optional): {ACTIONS}; bitmap-name (optional): str; \
                 bitmap-node-name (optional): str; device: str; node-name: str; size: int}}"
            ),
        ),
        ("backup-access-teardown", "{success: bool; target-id: str}", String::new()),
        (
            "query-backup",
            "{}",
            "{backup-file (optional): str; dirty (optional): int; end-time (optional): int; errmsg (optional): str; \
             finishing: bool; reused (optional): int; start-time (optional): int; status (optional): str; \
             total (optional): int; transferred (optional): int; uuid (optional): str; zero-bytes (optional): int}"
                .to_owned(),
        ),
        ("query-pbs-bitmap-info", "{}", format!("array of {{action: {ACTIONS}; dirty: int; drive: str; size: int}}")),
        (
            "query-proxmox-support",
            "{}",
            "{backup-access-api: bool; backup-fleecing: bool; backup-max-workers: bool; \
             pbs-dirty-bitmap: bool; pbs-dirty-bitmap-migration: bool; \
             pbs-dirty-bitmap-savevm: bool; pbs-library-version: str; pbs-masterkey: bool; \
             query-bitmap-info: bool}"
                .to_owned(),
        ),
    ];
    for (command, arguments, returns) in &table {
        assert_eq!(schema.spell_members(command), *arguments, "{command}");
        assert_eq!(answer(command), *returns, "{command}");
    }
    assert!(schema.commands.keys().eq(table.iter().map(|(command, ..)| *command)));
}

#[test]
fn everything_in_the_schema_is_documented() {
    let schema = Schema::read();
    let names = schema.commands.keys().chain(schema.structs.keys()).chain(schema.enums.keys());
    for name in names {
        let (_, after) = SCHEMA.split_once(&format!("\n##\n# @{name}:\n")).unwrap_or_else(|| panic!("{name}"));
        let text = after.split_once("\n##\n").unwrap().0;
        let values = schema.enums.get(name).cloned().unwrap_or_default();
        let members = if values.is_empty() { schema.keys(name) } else { values };
        for member in members {
            assert!(text.contains(&format!("# @{member}: ")), "{name}.{member}");
        }
    }
}

#[test]
fn what_we_ask_is_what_the_schema_takes() {
    let schema = Schema::read();
    let setup = serde_json::to_value(BackupAccessSetup {
        target_id: "t".into(),
        devices: [AccessBitmapMode::New, AccessBitmapMode::Use]
            .map(|bitmap_mode| BackupAccessDevice { device: "d".into(), bitmap_mode })
            .into(),
    })
    .unwrap();
    assert_eq!(keys(&setup), schema.keys(BackupAccessSetup::NAME));
    for device in setup["devices"].as_array().unwrap() {
        assert_eq!(keys(device), schema.keys("BackupAccessDevice"));
        let mode = device["bitmap-mode"].as_str().unwrap();
        assert!(schema.enums["AccessBitmapMode"].iter().any(|known| known == mode), "{mode}");
    }
    let teardown = serde_json::to_value(BackupAccessTeardown { target_id: "t".into(), success: true }).unwrap();
    assert_eq!(keys(&teardown), schema.keys(BackupAccessTeardown::NAME));
    for (name, question) in [
        (QueryProxmoxSupport::NAME, serde_json::to_value(QueryProxmoxSupport {}).unwrap()),
        (QueryBackup::NAME, serde_json::to_value(QueryBackup {}).unwrap()),
        (QueryPbsBitmapInfo::NAME, serde_json::to_value(QueryPbsBitmapInfo {}).unwrap()),
    ] {
        assert_eq!(keys(&question), schema.keys(name));
    }
}

/// The patterns name every member, so that one that is added has to be looked at here.
#[test]
fn every_member_that_we_read_is_one_that_the_schema_gives() {
    let schema = Schema::read();

    let ProxmoxSupport { backup_access_api, backup_fleecing, query_bitmap_info } =
        schema.answer::<QueryProxmoxSupport>(Optional::Present);
    assert!(backup_access_api && backup_fleecing && query_bitmap_info);

    let BackupStatus { status, uuid, backup_file, start_time, finishing, total } =
        schema.answer::<QueryBackup>(Optional::Present);
    let texts = [status, uuid, backup_file];
    assert!(texts.iter().all(|text| text.as_deref() == Some("text")), "{texts:?}");
    assert_eq!((start_time, total, finishing), (Some(7), Some(7), true));

    for BackupAccess { node_name, device, size, bitmap_node_name, bitmap_name, bitmap_action } in
        schema.answer::<BackupAccessSetup>(Optional::Present)
    {
        assert_eq!([node_name, device, bitmap_node_name.unwrap(), bitmap_name.unwrap()], ["text"; 4]);
        assert_eq!((size, bitmap_action), (7, Some(PbsBitmapAction::NotUsed)));
    }
    for BitmapInfo { drive, action, size, dirty } in schema.answer::<QueryPbsBitmapInfo>(Optional::Present) {
        assert_eq!((drive.as_str(), action, size, dirty), ("text", PbsBitmapAction::NotUsed, 7, 7));
    }
    let qapi::Empty {} = schema.answer::<BackupAccessTeardown>(Optional::Present);
}

#[test]
fn members_that_need_not_be_there_are_not_needed() {
    let schema = Schema::read();
    // An older process leaves out what is not optional in a newer one.
    assert_eq!(serde_json::from_value::<ProxmoxSupport>(json!({})).unwrap(), ProxmoxSupport::default());
    assert_eq!(schema.answer::<QueryBackup>(Optional::Absent), BackupStatus { finishing: true, ..Default::default() });
    let access = &schema.answer::<BackupAccessSetup>(Optional::Absent)[0];
    assert_eq!((&access.bitmap_name, &access.bitmap_action), (&None, &None));
}

#[test]
fn every_action_is_known_by_its_word() {
    for word in &Schema::read().enums["PBSBitmapAction"] {
        let action: PbsBitmapAction = serde_json::from_value(json!(word)).unwrap();
        assert!(!matches!(action, PbsBitmapAction::Unknown(_)), "{word}");
        assert_eq!(action.as_str(), word);
    }
}
