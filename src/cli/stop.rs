//! SIGINT and SIGTERM: the first asks the run to stop and tear down, the second leaves the rest to the journal.

use super::{exit, say};
use std::sync::{
    Arc,
    atomic::{AtomicU8, Ordering},
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Whether and why the run has to stop.
#[derive(Clone, Debug)]
pub(super) struct Stop {
    token: CancellationToken,
    code: Arc<AtomicU8>,
}

impl Stop {
    /// Listens for the signals from now on.
    pub fn listen() -> Self {
        let stop = Self { token: CancellationToken::new(), code: Arc::new(AtomicU8::new(exit::INTERRUPTED)) };
        let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
        else {
            say("warning: signals cannot be caught; a stopped run is cleaned up by the next");
            return stop;
        };
        let listener = stop.clone();
        tokio::spawn(async move {
            loop {
                let signal = tokio::select! {
                    _ = interrupt.recv() => SignalKind::interrupt(),
                    _ = terminate.recv() => SignalKind::terminate(),
                };
                let code = 128 + signal.as_raw_value() as u8;
                if listener.token.is_cancelled() {
                    say("stopped at once; what is left will be undone by the next run or `pvebackup recover`");
                    std::process::exit(code.into());
                }
                listener.code.store(code, Ordering::Relaxed);
                listener.token.cancel();
                say("stopping; once more to leave the rest to the next run");
            }
        });
        stop
    }

    /// Cancelled by the first signal.
    pub fn token(&self) -> &CancellationToken {
        &self.token
    }

    /// The exit code of the signal that came.
    pub fn code(&self) -> u8 {
        self.code.load(Ordering::Relaxed)
    }
}
