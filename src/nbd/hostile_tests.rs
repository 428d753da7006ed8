//! Whatever a server sends, the client ends with an answer or an error.

use super::{
    Client, Framing, NbdError, option,
    scripted_server::{BASE, Offer, options, pair, used},
};
use crate::fuzzing::{block_on, send_and_leave};
use proptest::prelude::*;
use tokio::net::UnixStream;

/// Chunks for the first requests that are nearly right.
pub(super) fn chunks(framing: Framing) -> impl Strategy<Value = Vec<u8>> {
    let near = || prop_oneof![8 => 0u64..6000, 1 => any::<u64>()];
    let kind = prop_oneof![Just(0u16), Just(1), Just(2), Just(5), Just(6), Just(0x8001), Just(0x8002), any::<u16>()];
    let payload = (near(), near(), prop::collection::vec(any::<u8>(), 0..40));
    let chunk = (any::<bool>(), kind, 0u64..6, near(), near(), payload).prop_map(
        move |(last, kind, cookie, offset, len, payload)| {
            let (a, b, tail) = payload;
            let payload = match kind {
                1 => [&a.to_be_bytes()[..], &tail].concat(),
                2 => [&a.to_be_bytes()[..], &(b as u32).to_be_bytes()].concat(),
                5 => [7u32.to_be_bytes(), (b as u32).to_be_bytes(), [0; 4]].concat(),
                6 => [&7u32.to_be_bytes()[..], &1u32.to_be_bytes(), &b.to_be_bytes(), &[0; 8]].concat(),
                _ => tail,
            };
            let len = if len % 4 == 0 { len } else { payload.len() as u64 };
            let mut out = Vec::new();
            match framing {
                Framing::Compact => out.extend(0x668e_33ef_u32.to_be_bytes()),
                Framing::Extended => out.extend(0x6e8a_278c_u32.to_be_bytes()),
            }
            out.extend(u16::from(last).to_be_bytes());
            out.extend(kind.to_be_bytes());
            out.extend(cookie.to_be_bytes());
            if framing == Framing::Extended {
                out.extend([0, 1000, 2000, 0][cookie as usize % 4].min(offset).to_be_bytes());
                out.extend(len.to_be_bytes());
            } else {
                out.extend((len as u32).to_be_bytes());
            }
            out.extend(payload);
            out
        },
    );
    prop::collection::vec(chunk, 0..12).prop_map(|chunks| chunks.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_instead_of_a_handshake_are_an_error(
        valid in 0usize..60, bytes in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let good = [&b"NBDMAGICIHAVEOPT\0\x03"[..], b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0b\0\0\0\x01\0\0\0\0"].concat();
        let stream = [&good[..valid.min(good.len())], &bytes].concat();
        block_on(async {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let server = tokio::spawn(send_and_leave(theirs, stream));
            assert!(Client::start(ours, &options(&[BASE])).await.is_err());
            server.await.unwrap();
        });
    }

    #[test]
    fn any_stream_of_replies_ends_in_answers_or_errors(
        (framing, bytes) in prop_oneof![Just(Framing::Compact), Just(Framing::Extended)]
            .prop_flat_map(|framing| (Just(framing), chunks(framing))),
    ) {
        block_on(async {
            let (client, server) = pair(&Offer::of(framing), &[BASE]).await;
            let server = tokio::spawn(send_and_leave(server.stream, bytes));
            let (_, _, _, _) = tokio::join!(
                client.read(0, used(1000)),
                client.read(1000, used(4000)),
                client.block_status(BASE, 2000, 1000),
                client.trim(0, 1000),
            );
            let error = client.read(0, used(1)).await.unwrap_err();
            assert!(matches!(error, NbdError::Closed { .. } | NbdError::Protocol(_) | NbdError::Refused { .. } | NbdError::ShuttingDown { .. }), "{error:?}");
            drop(client);
            server.await.unwrap();
        });
    }
}

#[test]
fn absurd_lengths_in_the_handshake_are_refused() {
    let mut header = [0; 20];
    header[..8].copy_from_slice(&0x0003_e889_0455_65a9_u64.to_be_bytes());
    header[11] = 7;
    header[16..].copy_from_slice(&u32::MAX.to_be_bytes());
    option::decode_option_reply(option::Opt::Go, &header).unwrap_err();
}
