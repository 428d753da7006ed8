//! A provider on a thread of its own.

use crate::provider::{Provider, ProviderError};
use anyhow::{Context, Result, bail};

/// Providers are blocking code; this runs their calls beside the async flow, one at a time.
pub struct ProviderThread {
    provider: Option<Box<dyn Provider>>,
}

impl ProviderThread {
    /// Takes a provider.
    pub fn new(provider: Box<dyn Provider>) -> Self {
        Self { provider: Some(provider) }
    }

    /// Runs one call. Dropping the future does not stop the call; the provider is lost then.
    ///
    /// # Errors
    /// The call's, or that the provider was lost in an earlier one.
    pub async fn run<T: Send + 'static>(
        &mut self,
        call: impl FnOnce(&mut dyn Provider) -> Result<T, ProviderError> + Send + 'static,
    ) -> Result<T> {
        let Some(mut provider) = self.provider.take() else { bail!("the provider broke down in an earlier call") };
        let (provider, result) = tokio::task::spawn_blocking(move || {
            let result = call(provider.as_mut());
            (provider, result)
        })
        .await
        .context("the provider broke down")?;
        self.provider = Some(provider);
        Ok(result?)
    }
}
