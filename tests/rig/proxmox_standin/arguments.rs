//! Arguments, checked as QEMU's generated code checks them, with its error texts.

use super::super::qmp::QmpFailure;
use serde_json::{Map, Value};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapMode {
    None,
    New,
    Use,
}

pub struct Setup {
    pub target: String,
    pub devices: Vec<(String, BitmapMode)>,
}

fn wrong_type(path: &str, expected: &str) -> QmpFailure {
    QmpFailure::generic(format!("Invalid parameter type for '{path}', expected: {expected}"))
}

/// A required member.
fn member<'a>(object: &'a Map<String, Value>, name: &str, prefix: &str) -> Result<&'a Value, QmpFailure> {
    object.get(name).ok_or_else(|| QmpFailure::generic(format!("Parameter '{prefix}{name}' is missing")))
}

fn string(value: &Value, path: &str) -> Result<String, QmpFailure> {
    value.as_str().map(str::to_owned).ok_or_else(|| wrong_type(path, "string"))
}

fn nothing_else(object: &Map<String, Value>, known: &[&str], prefix: &str) -> Result<(), QmpFailure> {
    match object.keys().find(|key| !known.contains(&key.as_str())) {
        Some(key) => Err(QmpFailure::generic(format!("Parameter '{prefix}{key}' is unexpected"))),
        None => Ok(()),
    }
}

fn object<'a>(value: &'a Value, path: &str) -> Result<&'a Map<String, Value>, QmpFailure> {
    value.as_object().ok_or_else(|| wrong_type(path, "object"))
}

pub fn parse_setup(arguments: &Value) -> Result<Setup, QmpFailure> {
    let arguments = object(arguments, "arguments")?;
    let target = string(member(arguments, "target-id", "")?, "target-id")?;
    let list = member(arguments, "devices", "")?.as_array().ok_or_else(|| wrong_type("devices", "array"))?;
    let mut devices = Vec::new();
    for (number, entry) in list.iter().enumerate() {
        let path = format!("devices[{number}]");
        let prefix = format!("{path}.");
        let entry = object(entry, &path)?;
        let device = string(member(entry, "device", &prefix)?, &format!("{prefix}device"))?;
        let mode = match entry.get("bitmap-mode") {
            None => BitmapMode::None,
            Some(mode) => match string(mode, &format!("{prefix}bitmap-mode"))?.as_str() {
                "none" => BitmapMode::None,
                "new" => BitmapMode::New,
                "use" => BitmapMode::Use,
                other => {
                    return Err(QmpFailure::generic(format!(
                        "Parameter 'bitmap-mode' does not accept value '{other}'"
                    )));
                }
            },
        };
        nothing_else(entry, &["device", "bitmap-mode"], &prefix)?;
        devices.push((device, mode));
    }
    nothing_else(arguments, &["target-id", "devices"], "")?;
    Ok(Setup { target, devices })
}

/// Target id and success.
pub fn parse_teardown(arguments: &Value) -> Result<(String, bool), QmpFailure> {
    let arguments = object(arguments, "arguments")?;
    let target = string(member(arguments, "target-id", "")?, "target-id")?;
    let success = member(arguments, "success", "")?.as_bool().ok_or_else(|| wrong_type("success", "boolean"))?;
    nothing_else(arguments, &["target-id", "success"], "")?;
    Ok((target, success))
}
