//! What QEMU is asked about a guest, and may not know.

use crate::qmp::{QmpError, Session};
use serde_json::Value;

/// An answer that only informs: when QEMU does not know the command or refuses it, there is none.
pub async fn if_known(session: &mut Session, name: &str, arguments: Value) -> Result<Option<Value>, QmpError> {
    match session.execute_value(name, arguments).await {
        Ok(value) => Ok(Some(value)),
        Err(QmpError::Refused { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}
