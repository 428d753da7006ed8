//! What a QEMU knows, from its `query-qmp-schema`: features are detected here, never by version numbers.

use super::{QmpError, Session};
use serde::Deserialize;
use serde_json::Value;
use std::collections::{BTreeSet, HashMap};

/// The commands, arguments and answers that a QEMU knows.
///
/// Paths name members from the outside in, separated by dots: `x-perf.min-cluster-size`. Arrays are passed through; where a
/// member depends on another's value (a union's branch) it counts as known when any branch has it, unless the branch is named.
#[derive(Clone, Debug, Default)]
pub struct Schema {
    commands: HashMap<String, Signature>,
    types: HashMap<String, Type>,
}

#[derive(Clone, Debug)]
struct Signature {
    arguments: String,
    answer: String,
}

#[derive(Clone, Debug)]
enum Type {
    Object { members: Vec<(String, String)>, branches: Vec<(String, String)> },
    Array { element: String },
    Alternate { types: Vec<String> },
    Enum { values: Vec<String> },
}

/// An entry as QEMU writes it. All that differs by kind is optional, so that nothing new makes the whole unreadable.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Entry {
    name: String,
    meta_type: String,
    #[serde(default)]
    arg_type: String,
    #[serde(default)]
    ret_type: String,
    #[serde(default)]
    element_type: String,
    #[serde(default)]
    members: Vec<Member>,
    #[serde(default)]
    variants: Vec<Branch>,
    #[serde(default)]
    values: Vec<String>,
}

#[derive(Deserialize)]
struct Member {
    #[serde(default)]
    name: String,
    #[serde(default)]
    r#type: String,
}

#[derive(Deserialize)]
struct Branch {
    case: String,
    r#type: String,
}

impl Schema {
    /// Asks QEMU.
    ///
    /// # Errors
    /// As with [`Session::execute`]; [`QmpError::Protocol`] when the answer is no list.
    pub async fn query(session: &mut Session) -> Result<Self, QmpError> {
        const NAME: &str = "query-qmp-schema";
        let answer = session.execute_value(NAME, Value::Null).await?;
        let Value::Array(entries) = answer else {
            return Err(QmpError::Protocol { command: NAME.into(), what: "no list".into() });
        };
        Ok(Self::of(entries))
    }

    /// Entries that make no sense count as not there.
    fn of(entries: Vec<Value>) -> Self {
        let mut schema = Self::default();
        for entry in entries {
            let Ok(entry) = serde_json::from_value::<Entry>(entry) else { continue };
            let typed = match entry.meta_type.as_str() {
                "command" => {
                    let signature = Signature { arguments: entry.arg_type, answer: entry.ret_type };
                    schema.commands.insert(entry.name, signature);
                    continue;
                }
                "object" => Type::Object {
                    members: entry.members.into_iter().map(|m| (m.name, m.r#type)).collect(),
                    branches: entry.variants.into_iter().map(|b| (b.case, b.r#type)).collect(),
                },
                "array" => Type::Array { element: entry.element_type },
                "alternate" => Type::Alternate { types: entry.members.into_iter().map(|m| m.r#type).collect() },
                "enum" => Type::Enum {
                    // QEMU before 6.2 has no `members` here, and the newest may drop `values`.
                    values: if entry.values.is_empty() {
                        entry.members.into_iter().map(|m| m.name).collect()
                    } else {
                        entry.values
                    },
                },
                _ => continue,
            };
            schema.types.insert(entry.name, typed);
        }
        schema
    }

    /// Whether the command exists.
    pub fn has_command(&self, command: &str) -> bool {
        self.commands.contains_key(command)
    }

    /// Whether the command takes an argument.
    pub fn command_has(&self, command: &str, path: &str) -> bool {
        !self.arguments(command, path).is_empty()
    }

    /// Whether the command takes an argument when its tag has the value `case`: for `blockdev-add`, whether the driver `case`
    /// has the option.
    pub fn variant_has(&self, command: &str, case: &str, path: &str) -> bool {
        let Some(Type::Object { members, branches }) =
            self.commands.get(command).and_then(|signature| self.types.get(&signature.arguments))
        else {
            return false;
        };
        let Some((_, branch)) = branches.iter().find(|(name, _)| name == case) else { return false };
        let (first, rest) = path.split_once('.').unwrap_or((path, ""));
        let own = members.iter().filter(|(name, _)| name == first).map(|(_, found)| found.as_str());
        let mut found: BTreeSet<&str> = own.collect();
        found.extend(self.step(&[branch.as_str()].into(), first));
        !self.follow(found, rest).is_empty()
    }

    /// Whether the command's tag can have the value `case`: for `blockdev-add`, whether the driver exists.
    pub fn has_variant(&self, command: &str, case: &str) -> bool {
        self.commands.get(command).and_then(|signature| self.types.get(&signature.arguments)).is_some_and(
            |arguments| matches!(arguments, Type::Object { branches, .. } if branches.iter().any(|(name, _)| name == case)),
        )
    }

    /// Whether the command's answer has a member.
    pub fn answer_has(&self, command: &str, path: &str) -> bool {
        let Some(signature) = self.commands.get(command) else { return false };
        !self.follow([signature.answer.as_str()].into(), path).is_empty()
    }

    /// Whether an argument of the command can have the value, one of an enumeration's.
    pub fn enum_has(&self, command: &str, path: &str, value: &str) -> bool {
        self.arguments(command, path).into_iter().any(
            |found| matches!(self.types.get(found), Some(Type::Enum { values }) if values.iter().any(|v| v == value)),
        )
    }

    fn arguments(&self, command: &str, path: &str) -> BTreeSet<&str> {
        let Some(signature) = self.commands.get(command) else { return BTreeSet::new() };
        self.follow([signature.arguments.as_str()].into(), path)
    }

    /// The types that a path may end in.
    fn follow<'a>(&'a self, from: BTreeSet<&'a str>, path: &str) -> BTreeSet<&'a str> {
        let mut types = from;
        for member in path.split('.').filter(|part| !part.is_empty()) {
            types = self.step(&types, member);
        }
        self.within(&types)
    }

    fn step<'a>(&'a self, types: &BTreeSet<&'a str>, member: &str) -> BTreeSet<&'a str> {
        self.within(types)
            .into_iter()
            .filter_map(|name| match self.types.get(name) {
                Some(Type::Object { members, .. }) => Some(members),
                _ => None,
            })
            .flatten()
            .filter(|(name, _)| name == member)
            .map(|(_, found)| found.as_str())
            .collect()
    }

    /// The types themselves with all that they stand for: elements of arrays, alternatives, branches.
    fn within<'a>(&'a self, types: &BTreeSet<&'a str>) -> BTreeSet<&'a str> {
        let mut all = BTreeSet::new();
        let mut open: Vec<&str> = types.iter().copied().collect();
        while let Some(name) = open.pop() {
            if !all.insert(name) {
                continue;
            }
            match self.types.get(name) {
                Some(Type::Array { element }) => open.push(element),
                Some(Type::Alternate { types }) => open.extend(types.iter().map(String::as_str)),
                Some(Type::Object { branches, .. }) => open.extend(branches.iter().map(|(_, found)| found.as_str())),
                Some(Type::Enum { .. }) | None => {}
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::session::tests::Qemu;
    use serde_json::json;

    fn schema(entries: &Value) -> Schema {
        Schema::of(entries.as_array().unwrap().clone())
    }

    #[test]
    fn nonsense_and_novelties_do_not_hide_the_rest() {
        let schema = schema(&json!([
            7,
            {"name": "x"},
            {"name": "9", "meta-type": "hologram", "members": [{"name": 3}]},
            {"name": "c", "meta-type": "command", "arg-type": "1", "ret-type": "loop", "novel": {}},
            {"name": "1", "meta-type": "object", "members": [{"name": "a", "type": "gone"}, {"name": "b", "type": "2"}]},
            {"name": "2", "meta-type": "enum", "members": [{"name": "on"}]},
            {"name": "loop", "meta-type": "array", "element-type": "loop"},
        ]));
        assert!(schema.has_command("c") && !schema.has_command("x"));
        assert!(schema.command_has("c", "a") && schema.command_has("c", "b"));
        assert!(!schema.command_has("c", "a.b") && !schema.command_has("d", "a"));
        assert!(
            schema.enum_has("c", "b", "on") && !schema.enum_has("c", "b", "off") && !schema.enum_has("c", "a", "on")
        );
        assert!(!schema.answer_has("c", "a") && !schema.variant_has("c", "a", "a"));
    }

    #[tokio::test]
    async fn real_qemu_tells_what_it_has() {
        let qemu = Qemu::start(&[]);
        let mut session = qemu.qmp().await.session().await.unwrap();
        let schema = Schema::query(&mut session).await.unwrap();
        let (major, ..) = session.version();
        assert!(schema.has_command("block-export-add") && !schema.has_command("backup-access-setup"));
        assert!(schema.command_has("blockdev-backup", "filter-node-name"));
        assert!(
            schema.enum_has("blockdev-backup", "sync", "none") && !schema.enum_has("blockdev-backup", "sync", "some")
        );
        assert_eq!(schema.command_has("blockdev-backup", "on-cbw-error"), major >= 11);
        assert!(!schema.command_has("blockdev-backup", "cbw-timeout"));
        assert_eq!(
            schema.command_has("blockdev-backup", "x-perf.min-cluster-size"),
            (major, session.version().1) >= (9, 2)
        );
        assert!(!schema.command_has("blockdev-backup", "device.x"));

        assert!(schema.has_variant("blockdev-add", "snapshot-access") && !schema.has_variant("blockdev-add", "nfsv5"));
        for option in ["driver", "node-name", "file", "target", "bitmap.node", "on-cbw-error", "cbw-timeout"] {
            assert!(schema.variant_has("blockdev-add", "copy-before-write", option), "{option}");
        }
        let clusters = schema.variant_has("blockdev-add", "copy-before-write", "min-cluster-size");
        assert_eq!(clusters, (major, session.version().1) >= (9, 2));
        assert!(!schema.variant_has("blockdev-add", "raw", "cbw-timeout"));
        assert!(!schema.variant_has("blockdev-add", "nfsv5", "driver"));
        assert!(schema.command_has("blockdev-add", "cbw-timeout"));
        assert!(schema.enum_has("blockdev-add", "on-cbw-error", "break-snapshot"));
        assert!(schema.variant_has("blockdev-add", "copy-before-write", "target.file.filename"));

        assert!(schema.command_has("block-export-add", "bitmaps.node"));
        assert!(schema.answer_has("query-named-block-nodes", "dirty-bitmaps.granularity"));
        assert_eq!(schema.answer_has("query-named-block-nodes", "children"), major >= 11);
    }
}
