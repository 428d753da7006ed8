//! The client against scripted servers.

use super::{
    Client, ConnectOptions, Framing, MAX_IN_FLIGHT, NbdError, StatusExtent,
    scripted_server::{BASE, CAN_TRIM, DIRTY, MIB, Offer, Request, Server, options, pair, pattern, used, with_both},
};
use bytes::BytesMut;
use std::{future::Future, time::Duration};
use tokio::{io::AsyncWriteExt, net::UnixStream};

async fn connect_error(offer: Offer, contexts: &[&str]) -> NbdError {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = tokio::spawn(async move { Server::accept(theirs, &offer).await });
    let result = Client::start(ours, &options(contexts)).await;
    server.abort();
    result.err().unwrap()
}

/// The error of a read of 4096 bytes at 8192 that is answered by `answer`, after which the connection must be closed.
async fn breach<F: Future<Output = Server>>(offer: &Offer, answer: impl FnOnce(Server, Request) -> F) -> NbdError {
    let (client, mut server) = pair(offer, &[]).await;
    let script = async {
        let request = server.request().await;
        answer(server, request).await.hung_up().await;
    };
    let (result, ()) = tokio::join!(client.read(8192, used(4096)), script);
    assert!(matches!(client.read(0, used(1)).await, Err(NbdError::Closed { .. })));
    result.unwrap_err()
}

#[test]
fn the_export_is_described_as_the_server_tells() {
    with_both(async |offer| {
        let (client, _server) = pair(&offer, &[DIRTY, BASE]).await;
        assert_eq!(client.size(), 64 * MIB);
        assert!(client.can_trim() && !client.can_multi_conn() && !client.is_read_only());
        assert_eq!(Some(client.info().framing), offer.framing);
        assert_eq!(client.info().contexts, [(7, BASE.into()), (3, DIRTY.into())]);
        assert_eq!((client.info().min_block, client.info().max_block), (1, 32 << 20));
    });
}

#[tokio::test]
async fn a_server_without_structured_replies_is_refused() {
    let offer = Offer { framing: None, ..Offer::of(Framing::Compact) };
    let error = connect_error(offer, &[]).await;
    assert!(
        matches!(error, NbdError::NotOffered { what: "structured replies", ref text } if text == "what?"),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_context_that_is_not_selected_is_named() {
    let offer = Offer { contexts: vec![(7, BASE)], ..Offer::of(Framing::Extended) };
    let error = connect_error(offer, &[BASE, DIRTY]).await;
    assert!(matches!(error, NbdError::ContextMissing(ref name) if name == DIRTY), "{error:?}");
}

#[tokio::test]
async fn two_contexts_with_one_number_are_refused() {
    let offer = Offer { contexts: vec![(7, BASE), (7, DIRTY)], ..Offer::of(Framing::Extended) };
    let error = connect_error(offer, &[BASE, DIRTY]).await;
    assert!(matches!(error, NbdError::Protocol(_)), "{error:?}");
}

#[tokio::test]
async fn errors_of_the_handshake_keep_the_servers_words() {
    for (code, expected) in [(0x8000_0006, "no export"), (0x8000_0007, "shutting down"), (0x8000_0002, "NBD_OPT_GO")] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let script = async {
            let mut server = Server::greet(theirs).await;
            for reply in [1, code] {
                let (option, _) = server.next_option().await;
                server.option_reply(option, reply, if reply == 1 { b"" } else { b"because" }).await;
            }
        };
        let options = options(&[]);
        let (result, ()) = tokio::join!(Client::start(ours, &options), script);
        let text = result.err().unwrap().to_string();
        assert!(text.contains(expected) && text.contains("`because`"), "{text}");
    }
}

#[tokio::test]
async fn a_server_that_never_ends_an_option_is_left() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let script = async {
        let mut server = Server::greet(theirs).await;
        let (_, _) = server.next_option().await;
        server.option_reply(11, 1, &[]).await;
        let (_, _) = server.next_option().await;
        loop {
            server.option_reply(7, 3, &[0, 77]).await;
        }
    };
    let script = tokio::spawn(script);
    let error = Client::start(ours, &options(&[])).await.err().unwrap();
    assert!(matches!(error, NbdError::Protocol(_)), "{error:?}");
    script.abort();
}

#[tokio::test(start_paused = true)]
async fn a_handshake_that_stalls_ends_at_the_deadline() {
    let room = tempfile::tempdir().unwrap();
    let socket = room.path().join("nbd.sock");
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let error = Client::connect(&ConnectOptions { socket, ..options(&[]) }).await.err().unwrap();
    assert!(matches!(error, NbdError::TimedOut { .. }), "{error:?}");
    drop(listener);
}

#[test]
fn chunks_may_come_in_any_order_and_interleaved() {
    with_both(async |offer| {
        let (client, mut server) = pair(&offer, &[]).await;
        let script = async {
            let (a, b) = (server.request().await, server.request().await);
            assert_eq!((a.kind, a.flags, a.offset, a.len), (0, 0, 0, 100_000));
            server.data(&a, false, 90_000, 10_000).await;
            server.data(&b, false, MIB + 500, 500).await;
            server.hole(&a, false, 40_000, 50_000).await;
            server.hole(&b, true, MIB, 500).await;
            server.data(&a, false, 0, 40_000).await;
            server.chunk(&a, true, 0, &[]).await;
        };
        let (a, b, ()) = tokio::join!(client.read(0, used(100_000)), client.read(MIB, used(1000)), script);
        let (a, b) = (a.unwrap(), b.unwrap());
        assert_eq!(a.0, [pattern(0, 40_000), vec![0; 50_000], pattern(90_000, 10_000)].concat());
        assert_eq!(b.0, [vec![0; 500], pattern(MIB + 500, 500)].concat());
        assert!(!a.1 && !b.1);
    });
}

#[test]
fn a_read_of_holes_only_is_said_to_be_zero() {
    with_both(async |offer| {
        let (client, mut server) = pair(&offer, &[]).await;
        let script = async {
            let request = server.request().await;
            server.hole(&request, false, 5000, 3000).await;
            server.hole(&request, true, 4000, 1000).await;
        };
        let (read, ()) = tokio::join!(client.read(4000, used(4000)), script);
        let (bytes, only_holes) = read.unwrap();
        assert!(only_holes && bytes == vec![0; 4000]);
    });
}

#[test]
fn an_answer_that_is_not_exactly_the_read_ends_the_connection() {
    with_both(async |offer| {
        for (pieces, said) in [
            (vec![(8191, 4096)], "inside"),
            (vec![(8193, 4096)], "inside"),
            (vec![(0, 10)], "inside"),
            (vec![(8192, 100), (8291, 10)], "overlap"),
            (vec![(9000, 100), (8950, 51)], "overlap"),
            (vec![(8192, 4096), (8192, 1)], "overlap"),
            (vec![(8192, 4095)], "ends without byte 4095"),
            (vec![(8193, 4095)], "ends without byte 0"),
            (vec![(8192, 100), (8300, 3988)], "ends without byte 100"),
        ] {
            let error = breach(&offer, async |mut server, request| {
                for (n, (offset, len)) in pieces.iter().enumerate() {
                    if n % 2 == 1 && *len < 100 {
                        server.hole(&request, n + 1 == pieces.len(), *offset, *len as u32).await;
                    } else {
                        server.data(&request, n + 1 == pieces.len(), *offset, *len).await;
                    }
                }
                server
            });
            let error = error.await;
            assert!(matches!(&error, NbdError::Protocol(text) if text.contains(said)), "{pieces:?}: {error:?}");
        }
    });
}

#[test]
fn headers_that_do_not_suit_end_the_connection() {
    with_both(async |offer| {
        type Forge = fn(&Server, Request) -> Vec<u8>;
        let forgeries: [(Forge, &str); 8] = [
            (|server, to| server.header(&to, true, 1, 8 + 4097), "4105 bytes"),
            (|server, to| server.header(&to, true, 1, 0xffff_ffff), "4294967295 bytes"),
            (|server, to| server.header(&to, true, 5, 0xffff_fff4), "does not answer"),
            (|server, to| server.header(&to, true, 0x8001, 0x7fff_ffff), "does not answer"),
            (|server, to| server.header(&to, false, 0, 0), "does not answer"),
            (|server, to| server.header(&Request { cookie: to.cookie + 1, ..to }, true, 0, 0), "never sent"),
            (|server, to| server.header(&Request { cookie: 0, ..to }, true, 0, 0), "never sent"),
            (|_, _| b"HTTP/1.1 400 Bad Request".to_vec(), "begins with"),
        ];
        for (forge, said) in forgeries {
            let error = breach(&offer, async |mut server, request| {
                let bytes = forge(&server, request);
                server.send(&bytes).await;
                server
            });
            let error = error.await;
            assert!(matches!(&error, NbdError::Protocol(text) if text.contains(said)), "{said}: {error:?}");
        }
    });
}

#[tokio::test(start_paused = true)]
async fn an_extended_header_for_another_offset_ends_the_connection() {
    let offer = Offer::of(Framing::Extended);
    let error = breach(&offer, async |mut server, request| {
        server.hole(&Request { offset: 0, ..request }, true, 8192, 4096).await;
        server
    });
    assert!(matches!(error.await, NbdError::Protocol(text) if text.contains("names offset 0")));
}

#[test]
fn late_chunks_of_a_finished_request_are_skipped() {
    with_both(async |offer| {
        let (client, mut server) = pair(&offer, &[BASE, DIRTY]).await;
        let script = async {
            let request = server.request().await;
            server.error(&request, true, 22, "can't get block status").await;
            server.status(&request, true, 3, &[(MIB, 1)]).await;
            server.data(&request, true, 0, 200_000).await;
            let next = server.request().await;
            server.status(&next, false, 3, &[(MIB, 1)]).await;
            server.status(&next, true, 7, &[(MIB, 3)]).await;
        };
        let ask = async {
            let error = client.block_status(BASE, 0, MIB).await.unwrap_err();
            assert!(error.is_unreadable() && !error.is_fatal(), "{error:?}");
            assert_eq!(
                error.to_string(),
                "nbd server refuses block status of 1048576 bytes at 0: error 22 `can't get block status`"
            );
            let map = client.block_status(BASE, 0, MIB).await.unwrap();
            assert_eq!(map, [StatusExtent { len: MIB, flags: 3 }]);
        };
        tokio::join!(ask, script);
    });
}

#[test]
fn endless_late_chunks_are_not_skipped_for_ever() {
    with_both(async |offer| {
        let (client, mut server) = pair(&offer, &[]).await;
        let script = async {
            let request = server.request().await;
            server.hole(&request, true, 0, 10).await;
            let header = server.header(&request, true, 0, 0);
            while server.stream.write_all(&header).await.is_ok() {}
        };
        let ask = async {
            client.read(0, used(10)).await.unwrap();
            client.read(0, used(10)).await.unwrap_err()
        };
        let (error, ()) = tokio::join!(ask, script);
        assert!(matches!(error, NbdError::Protocol(_) | NbdError::Closed { .. }), "{error:?}");
    });
}

#[test]
fn an_error_in_the_middle_fails_the_read_and_nothing_else() {
    with_both(async |offer| {
        let (client, mut server) = pair(&offer, &[]).await;
        let script = async {
            let (bad, good) = (server.request().await, server.request().await);
            server.data(&bad, false, 0, 10).await;
            server.error(&bad, false, 5, "first").await;
            server.error(&bad, false, 22, "second").await;
            server.data(&good, false, MIB, 100).await;
            server.data(&bad, false, 20, 10).await;
            server.chunk(&bad, true, 0, &[]).await;
            server.data(&good, true, MIB + 100, 900).await;
        };
        let (bad, good, ()) = tokio::join!(client.read(0, used(100)), client.read(MIB, used(1000)), script);
        let error = bad.unwrap_err();
        assert!(matches!(&error, NbdError::Refused { errno: 5, offset: 0, len: 100, text, .. } if text == "first"));
        assert!(!error.is_unreadable());
        assert_eq!(good.unwrap().0, pattern(MIB, 1000));
    });
}

#[test]
fn error_108_means_that_the_server_is_leaving() {
    with_both(async |offer| {
        let (client, mut server) = pair(&offer, &[]).await;
        let script = async {
            let request = server.request().await;
            server.error(&request, true, 108, "bye").await;
        };
        let (read, ()) = tokio::join!(client.read(0, used(100)), script);
        assert!(matches!(read, Err(NbdError::ShuttingDown { text }) if text == "bye"));
    });
}

#[tokio::test(start_paused = true)]
async fn simple_replies_are_taken_where_they_bring_no_payload() {
    let (client, mut server) = pair(&Offer::of(Framing::Compact), &[BASE]).await;
    let script = async {
        for errno in [0, 1, 22, 22, 0] {
            let request = server.request().await;
            server.simple(&request, errno).await;
        }
    };
    let ask = async {
        client.trim(0, MIB).await.unwrap();
        let error = client.trim(0, MIB).await.unwrap_err();
        assert!(matches!(error, NbdError::Refused { errno: 1, .. }), "{error:?}");
        assert!(client.block_status(BASE, 0, MIB).await.unwrap_err().is_unreadable());
        assert!(client.read(0, used(10)).await.unwrap_err().is_unreadable());
        let error = client.read(0, used(10)).await.unwrap_err();
        assert!(matches!(error, NbdError::Protocol(_)), "{error:?}");
    };
    tokio::join!(ask, script);
}

#[test]
fn a_stalled_request_ends_the_connection_at_its_deadline() {
    with_both(async |offer| {
        let (client, mut server) = pair(&offer, &[]).await;
        let begun = tokio::time::Instant::now();
        let script = async {
            let stalled = server.request().await;
            let header = server.header(&stalled, true, 1, 8 + 1000);
            server.send(&[&header[..], &0u64.to_be_bytes(), &[1; 999]].concat()).await;
            server.hung_up().await;
        };
        let later = async {
            tokio::time::sleep(Duration::from_secs(10)).await;
            client.read(MIB, used(1000)).await
        };
        let (stalled, later, ()) = tokio::join!(client.read(0, used(1000)), later, script);
        assert_eq!(begun.elapsed().as_secs(), 30);
        let error = stalled.unwrap_err();
        assert_eq!(error.to_string(), "nbd server does not finish read of 1000 bytes at 0 within 30s");
        assert!(
            matches!(later, Err(NbdError::Closed { cause: Some(cause) }) if matches!(*cause, NbdError::TimedOut { .. }))
        );
    });
}

#[test]
fn a_server_that_leaves_in_the_middle_closes_the_connection() {
    with_both(async |offer| {
        let (client, mut server) = pair(&offer, &[]).await;
        let script = async {
            let request = server.request().await;
            let header = server.header(&request, true, 1, 8 + 1000);
            server.send(&[&header[..], &0u64.to_be_bytes(), &[1; 10]].concat()).await;
            drop(server);
        };
        let (read, ()) = tokio::join!(client.read(0, used(1000)), script);
        assert!(matches!(read, Err(NbdError::Closed { cause: None })));
        assert!(matches!(client.trim(0, 1).await, Err(NbdError::Closed { cause: None })));
        client.disconnect().await.unwrap_err();
    });
}

#[test]
fn a_dropped_read_leaves_the_stream_in_step() {
    with_both(async |offer| {
        let (client, mut server) = pair(&offer, &[]).await;
        let ask = async {
            let given_up = tokio::time::timeout(Duration::from_secs(1), client.read(0, used(100_000))).await;
            assert!(given_up.is_err());
            client.read(MIB, used(1000)).await.unwrap()
        };
        let script = async {
            let request = server.request().await;
            server.data(&request, false, 0, 50_000).await;
            let next = server.request().await;
            server.data(&next, false, MIB, 500).await;
            server.data(&request, true, 50_000, 50_000).await;
            server.data(&next, true, MIB + 500, 500).await;
        };
        let ((bytes, _), ()) = tokio::join!(ask, script);
        assert_eq!(bytes, pattern(MIB, 1000));
    });
}

#[test]
fn dropped_reads_are_watched_like_others() {
    with_both(async |offer| {
        let (client, mut server) = pair(&offer, &[]).await;
        let begun = tokio::time::Instant::now();
        let _ = tokio::time::timeout(Duration::from_secs(1), client.read(0, used(10))).await;
        let _ = server.request().await;
        server.hung_up().await;
        assert_eq!(begun.elapsed().as_secs(), 30);
    });
}

#[test]
fn requests_beyond_the_limit_wait_for_their_turn() {
    with_both(async |offer| {
        let (client, mut server) = pair(&offer, &[]).await;
        let total = 3 * MAX_IN_FLIGHT as u64;
        let reads: Vec<_> = (0..total)
            .map(|n| {
                let client = client.clone();
                tokio::spawn(async move { client.read(n * 100, used(100)).await.unwrap().0 })
            })
            .collect();
        let mut waiting = Vec::new();
        for n in 0..total {
            waiting.push(server.request().await);
            if n + 1 >= MAX_IN_FLIGHT as u64 {
                if n + 1 == MAX_IN_FLIGHT as u64 {
                    server.hears_nothing().await;
                }
                // The newest first.
                let request = waiting.pop().unwrap();
                server.data(&request, true, request.offset, 100).await;
            }
        }
        for request in waiting {
            server.data(&request, true, request.offset, 100).await;
        }
        for (n, read) in reads.into_iter().enumerate() {
            assert_eq!(read.await.unwrap(), pattern(n as u64 * 100, 100));
        }
    });
}

#[test]
fn requests_that_the_socket_does_not_take_at_once_are_sent_later() {
    with_both(async |offer| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        nix::sys::socket::setsockopt(&ours, nix::sys::socket::sockopt::SndBuf, &1).unwrap();
        let options = options(&[]);
        let (client, server) = tokio::join!(Client::start(ours, &options), Server::accept(theirs, &offer));
        let (client, mut server) = (client.unwrap(), server);
        let reads: Vec<_> = (0..MAX_IN_FLIGHT as u64)
            .map(|n| {
                let client = client.clone();
                tokio::spawn(async move { client.read(n * 100, used(100)).await.unwrap().0 })
            })
            .collect();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(client.watch().upgrade().unwrap().unsent_bytes() > 0);
        for n in 0..MAX_IN_FLIGHT as u64 {
            let request = server.request().await;
            assert_eq!(request.offset, n * 100);
            server.data(&request, true, request.offset, 100).await;
        }
        for (n, read) in reads.into_iter().enumerate() {
            assert_eq!(read.await.unwrap(), pattern(n as u64 * 100, 100));
        }
    });
}

#[test]
fn long_reads_are_split_at_the_servers_maximum() {
    with_both(async |offer| {
        let (client, mut server) = pair(&Offer { blocks: Some([512, 4096, 4608]), ..offer }, &[]).await;
        let script = async {
            let mut requests = Vec::new();
            for _ in 0..3 {
                requests.push(server.request().await);
            }
            assert_eq!(requests.iter().map(|request| request.len).collect::<Vec<_>>(), [4608, 4608, 1024]);
            for request in requests.iter().rev() {
                server.data(request, true, request.offset, request.len).await;
            }
        };
        let (read, ()) = tokio::join!(client.read(MIB, used(10240)), script);
        let (bytes, only_holes) = read.unwrap();
        assert!(bytes == pattern(MIB, 10240) && !only_holes);
    });
}

#[test]
fn requests_outside_the_export_or_its_blocks_are_not_sent() {
    with_both(async |offer| {
        let (client, mut server) = pair(&Offer { blocks: Some([512, 4096, 1 << 20]), ..offer }, &[BASE]).await;
        for (offset, len) in [(64 * MIB, 512), (u64::MAX - 511, 512), (1, 512), (0, 511), (0, 64 * MIB + 512)] {
            assert!(matches!(client.trim(offset, len).await, Err(NbdError::OutOfBounds { .. })));
            assert!(matches!(client.block_status(BASE, offset, len).await, Err(NbdError::OutOfBounds { .. })));
        }
        assert!(matches!(client.read(1, used(512)).await, Err(NbdError::OutOfBounds { .. })));
        assert!(matches!(client.block_status(DIRTY, 0, 512).await, Err(NbdError::ContextMissing(_))));
        assert!(client.read(512, BytesMut::new()).await.unwrap().1);
        assert!(client.block_status(BASE, 0, 0).await.unwrap().is_empty());
        client.trim(0, 0).await.unwrap();
        server.hears_nothing().await;
    });
}

#[tokio::test]
async fn trim_is_not_sent_to_a_server_that_does_not_offer_it() {
    let (client, _server) = pair(&Offer { flags: 1, ..Offer::of(Framing::Extended) }, &[]).await;
    assert!(matches!(client.trim(0, 512).await, Err(NbdError::NotOffered { what: "TRIM", .. })));
}

#[test]
fn block_status_goes_on_where_the_server_stops_and_clips_where_it_does_not() {
    with_both(async |offer| {
        let (client, mut server) = pair(&offer, &[DIRTY]).await;
        let script = async {
            let first = server.request().await;
            assert_eq!((first.kind, first.flags, first.offset, first.len), (7, 0, 1000, 5000));
            server.status(&first, true, 3, &[(1000, 0), (500, 1)]).await;
            let second = server.request().await;
            assert_eq!((second.offset, second.len), (2500, 3500));
            server.status(&second, true, 3, &[(500, 1), (100_000, 0)]).await;
        };
        let (map, ()) = tokio::join!(client.block_status(DIRTY, 1000, 5000), script);
        let extents = [(1000, 0), (1000, 1), (3000, 0)].map(|(len, flags)| StatusExtent { len, flags });
        assert_eq!(map.unwrap(), extents);
    });
}

#[tokio::test(start_paused = true)]
async fn long_ranges_are_cut_only_where_lengths_have_32_bits() {
    let size = 6 << 40;
    for framing in [Framing::Compact, Framing::Extended] {
        let (client, mut server) = pair(&Offer { size, ..Offer::of(framing) }, &[BASE]).await;
        let script = async {
            let mut lens = Vec::new();
            loop {
                let request = server.request().await;
                match request.kind {
                    4 => server.chunk(&request, true, 0, &[]).await,
                    7 => server.status(&request, true, 7, &[(request.len, 3)]).await,
                    _ => break lens,
                }
                lens.push(request.len);
            }
        };
        let ask = async {
            client.trim(0, size).await.unwrap();
            let map = client.block_status(BASE, 0, size).await.unwrap();
            assert_eq!(map, [StatusExtent { len: size, flags: 3 }]);
            drop(client);
        };
        let (lens, ()) = tokio::join!(script, ask);
        assert_eq!(lens.iter().sum::<u64>(), 2 * size);
        match framing {
            Framing::Extended => assert_eq!(lens.len(), 2),
            Framing::Compact => assert!(lens.iter().all(|len| len.is_multiple_of(1 << 16) && *len <= 0xffff_0000)),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn one_context_of_several_is_asked_for_where_the_server_can() {
    let flags = CAN_TRIM | 1 << 12;
    let (client, mut server) = pair(&Offer { flags, ..Offer::of(Framing::Extended) }, &[BASE, DIRTY]).await;
    let script = async {
        let request = server.request().await;
        assert_eq!((request.flags, request.kind, request.offset, request.len), (1 << 5, 7, 512, 12));
        assert_eq!(server.bytes(12).await, [0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 3]);
        server.status(&request, true, 3, &[(512, 1)]).await;
    };
    let (map, ()) = tokio::join!(client.block_status(DIRTY, 512, 512), script);
    assert_eq!(map.unwrap(), [StatusExtent { len: 512, flags: 1 }]);
}

#[test]
fn block_status_without_the_context_or_with_empty_extents_is_a_breach() {
    with_both(async |offer| {
        for (context, extents) in [(7, vec![(512, 0)]), (99, vec![(512, 0)]), (3, vec![]), (3, vec![(0, 0), (512, 0)])]
        {
            let (client, mut server) = pair(&offer, &[BASE, DIRTY]).await;
            let script = async {
                let request = server.request().await;
                server.status(&request, true, context, &extents).await;
                server.hung_up().await;
            };
            let (map, ()) = tokio::join!(client.block_status(DIRTY, 0, 512), script);
            assert!(matches!(map, Err(NbdError::Protocol(_))), "{map:?}");
        }
    });
}

#[test]
fn a_map_that_grows_by_bytes_ends_after_ten_deadlines() {
    with_both(async |offer| {
        let (client, mut server) = pair(&offer, &[DIRTY]).await;
        let begun = tokio::time::Instant::now();
        let script = async {
            loop {
                let request = server.request().await;
                tokio::time::sleep(Duration::from_secs(29)).await;
                server.status(&request, true, 3, &[(1, 0)]).await;
            }
        };
        let result = tokio::select! { result = client.block_status(DIRTY, 0, MIB) => result, () = script => return };
        assert!(matches!(result, Err(NbdError::TimedOut { .. })));
        assert!(begun.elapsed() < Duration::from_secs(330));
    });
}

#[test]
fn disconnect_waits_for_what_is_under_way() {
    with_both(async |offer| {
        let (client, mut server) = pair(&offer, &[]).await;
        let script = async {
            let request = server.request().await;
            tokio::time::sleep(Duration::from_secs(5)).await;
            server.data(&request, true, 0, 1000).await;
            let farewell = server.request().await;
            assert_eq!((farewell.kind, farewell.flags, farewell.offset, farewell.len), (2, 0, 0, 0));
        };
        let leave = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let (first, second, late) =
                tokio::join!(client.disconnect(), client.disconnect(), client.read(0, used(1000)));
            first.and(second).unwrap();
            assert!(matches!(late, Err(NbdError::Closed { cause: None })));
            client.disconnect().await.unwrap();
        };
        let (read, (), ()) = tokio::join!(client.read(0, used(1000)), leave, script);
        assert_eq!(read.unwrap().0, pattern(0, 1000));
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_hangs_up_at_once_makes_no_disconnect_fail() {
    for _ in 0..300 {
        let (client, mut server) = pair(&Offer::of(Framing::Extended), &[]).await;
        let server = tokio::spawn(async move { server.request().await });
        client.disconnect().await.unwrap();
        server.await.unwrap();
    }
}

#[test]
fn disconnect_from_a_server_that_answers_nothing_ends() {
    with_both(async |offer| {
        let (client, _server) = pair(&offer, &[]).await;
        let (read, left) = tokio::join!(client.read(0, used(1000)), client.disconnect());
        assert!(matches!(read, Err(NbdError::TimedOut { .. })));
        left.unwrap_err();
        let (client, _server) = pair(&offer, &[]).await;
        client.disconnect().await.unwrap();
    });
}

#[test]
fn the_last_clone_takes_the_connection_and_its_tasks_with_it() {
    with_both(async |offer| {
        let (client, mut server) = pair(&offer, &[]).await;
        let clone = client.clone();
        drop(client);
        server.hears_nothing().await;
        let connection = clone.watch();
        drop(clone);
        assert_eq!(server.request().await.kind, 2);
        server.hung_up().await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(connection.strong_count(), 0);
    });
}
