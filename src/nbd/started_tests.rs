//! Reads that nobody waits for, against scripted servers.

use super::{
    MAX_IN_FLIGHT, NbdError, ReadDone,
    scripted_server::{MIB, Offer, pair, pattern, used, with_both},
};
use bytes::BytesMut;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

type Outcome = (u64, Result<BytesMut, NbdError>);

/// Passes the outcome of the read at an offset on.
struct Pass(u64, UnboundedSender<Outcome>);

impl ReadDone for Pass {
    fn read_done(self, outcome: Result<BytesMut, NbdError>) {
        // A test that is over needs no more of them.
        let _ = self.1.send((self.0, outcome));
    }
}

fn outcomes() -> (impl Fn(u64) -> Pass, UnboundedReceiver<Outcome>) {
    let (sender, receiver) = unbounded_channel();
    (move |offset| Pass(offset, sender.clone()), receiver)
}

#[test]
fn a_started_read_is_answered_in_the_order_of_replies() {
    with_both(async |offer| {
        let (client, mut server) = pair(&offer, &[]).await;
        let (pass, mut outcome) = outcomes();
        for offset in [0, 8192] {
            assert!(client.start_read(offset, used(4096), pass(offset)).is_ok());
        }
        let (first, second) = (server.request().await, server.request().await);
        server.data(&second, true, 8192, 4096).await;
        let (offset, bytes) = outcome.recv().await.unwrap();
        assert_eq!((offset, bytes.unwrap().to_vec()), (8192, pattern(8192, 4096)));
        server.error(&first, true, 5, "bad luck").await;
        let (offset, error) = outcome.recv().await.unwrap();
        assert!(matches!((offset, error), (0, Err(NbdError::Refused { errno: 5, .. }))));
    });
}

#[test]
fn every_started_read_hears_of_the_end() {
    with_both(async |offer| {
        let (client, mut server) = pair(&offer, &[]).await;
        let (pass, mut outcome) = outcomes();
        assert!(client.start_read(0, used(4096), pass(0)).is_ok());
        let _ = server.request().await;
        drop(server);
        assert!(matches!(outcome.recv().await.unwrap(), (0, Err(NbdError::Closed { .. }))));
        // What comes later either comes back, or hears it too.
        if client.start_read(4096, used(4096), pass(4096)).is_ok() {
            assert!(matches!(outcome.recv().await.unwrap(), (4096, Err(NbdError::Closed { .. }))));
        }
    });
}

#[test]
fn what_cannot_be_sent_at_once_comes_back() {
    with_both(async |offer| {
        let offer = Offer { blocks: Some([512, 4096, 1 << 20]), ..offer };
        let (client, mut server) = pair(&offer, &[]).await;
        let (pass, mut outcome) = outcomes();
        for (offset, len) in [(0, 0), (100, 512), (0, 100), (64 * MIB, 512), (0, 2 * MIB)] {
            let back = client.start_read(offset, used(len), pass(offset));
            let (buffer, back) = back.expect_err("refused");
            assert_eq!((buffer.len() as u64, back.0), (len, offset));
        }
        for number in 0..MAX_IN_FLIGHT as u64 {
            assert!(client.start_read(number * 512, used(512), pass(number * 512)).is_ok());
        }
        assert!(client.start_read(0, used(512), pass(0)).is_err(), "too much is in flight");
        let request = server.request().await;
        server.data(&request, true, 0, 512).await;
        assert!(outcome.recv().await.unwrap().1.is_ok());
        assert!(client.start_read(0, used(512), pass(0)).is_ok(), "there is room again");
    });
}
