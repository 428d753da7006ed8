//! Lanes, against scripted servers.

use super::{
    Brought, Framing, Lane,
    hostile_tests::chunks,
    scripted_server::{MIB, Offer, Server, options, pattern, with_both},
};
use crate::fuzzing::block_on;
use proptest::prelude::*;
use std::{
    borrow::Cow,
    io::{Read, Seek},
    time::{Duration, Instant},
};
use tokio::net::UnixStream;

/// Offsets of reads with what came of them.
type Done = Vec<(u64, Option<Vec<u8>>)>;

async fn pair(offer: &Offer) -> (Lane<u64>, Server) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let options = options(&[]);
    let (lane, server) = tokio::join!(Lane::start(ours, &options), Server::accept(theirs, offer));
    (lane.unwrap(), server)
}

fn ask(lane: &mut Lane<u64>, offset: u64, len: usize) {
    assert!(lane.ask(offset, len, Instant::now(), offset).is_ok());
}

/// What a read brought, in memory. What is in the pipe has to be behind its head.
fn taken(offset: u64, brought: Brought<'_>) -> Option<Vec<u8>> {
    match brought {
        Brought::Bytes(bytes) => Some(bytes.into_owned()),
        Brought::Piped(pipe) => {
            let mut file = tempfile::tempfile().unwrap();
            pipe.pour(&file).unwrap();
            let mut bytes = Vec::new();
            file.rewind().unwrap();
            file.read_to_end(&mut bytes).unwrap();
            Some(bytes.strip_prefix(&head(offset)[..]).expect("the head is in front").to_vec())
        }
        Brought::Nothing => None,
    }
}

/// Everything that has come.
fn receive(lane: &mut Lane<u64>) -> Done {
    let mut done = Done::new();
    while lane.receive(|offset, brought| done.push((offset, taken(offset, brought)))) {}
    done
}

fn read(offset: u64, len: u64) -> (u64, Option<Vec<u8>>) {
    (offset, Some(pattern(offset, len)))
}

#[test]
fn reads_are_answered_in_the_order_of_replies() {
    with_both(async |offer| {
        let (mut lane, mut server) = pair(&offer).await;
        for offset in [0, 8192, 4096] {
            ask(&mut lane, offset, 4096);
        }
        server.hears_nothing().await;
        lane.send();
        assert!(!lane.has_unsent() && lane.in_flight() == 3);
        let (first, second, third) = (server.request().await, server.request().await, server.request().await);
        assert_eq!((first.offset, second.offset, third.len), (0, 8192, 4096));
        assert!(receive(&mut lane).is_empty());
        server.data(&third, true, 4096, 4096).await;
        server.data(&first, true, 0, 4096).await;
        assert_eq!(receive(&mut lane), [read(4096, 4096), read(0, 4096)]);
        server.data(&second, true, 8192, 4096).await;
        assert_eq!(receive(&mut lane), [read(8192, 4096)]);
        assert_eq!(lane.in_flight(), 0);
        drop(lane);
        assert_eq!(server.request().await.kind, 2, "it says goodbye");
    });
}

#[test]
fn an_answer_in_pieces_is_put_together() {
    with_both(async |offer| {
        let (mut lane, mut server) = pair(&offer).await;
        ask(&mut lane, 4096, 8192);
        lane.send();
        let request = server.request().await;
        server.data(&request, false, 8192, 2048).await;
        server.hole(&request, false, 10240, 2048).await;
        assert!(receive(&mut lane).is_empty());
        server.data(&request, true, 4096, 4096).await;
        let whole = [pattern(4096, 6144), vec![0; 2048]].concat();
        assert_eq!(receive(&mut lane), [(4096, Some(whole))]);
        // All of it, and its end for itself.
        ask(&mut lane, 0, 512);
        lane.send();
        let request = server.request().await;
        server.data(&request, false, 0, 512).await;
        server.chunk(&request, true, 0, &[]).await;
        assert_eq!(receive(&mut lane), [read(0, 512)]);
    });
}

#[test]
fn what_is_refused_comes_back_and_the_lane_goes_on() {
    with_both(async |offer| {
        let (mut lane, mut server) = pair(&offer).await;
        for offset in [0, 4096, 8192] {
            ask(&mut lane, offset, 4096);
        }
        lane.send();
        let (first, second, third) = (server.request().await, server.request().await, server.request().await);
        server.error(&first, true, 5, "bad luck").await;
        server.data(&second, false, 4096, 4096).await;
        server.error(&second, true, 5, &"x".repeat(60000)).await;
        server.data(&third, true, 8192, 4096).await;
        assert_eq!(receive(&mut lane), [(0, None), (4096, None), read(8192, 4096)]);
        assert!(!lane.has_ended());
    });
}

#[test]
fn a_simple_reply_only_refuses() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        for (errno, ended) in [(5, false), (0, true)] {
            let (mut lane, mut server) = pair(&Offer::of(Framing::Compact)).await;
            ask(&mut lane, 0, 4096);
            lane.send();
            let request = server.request().await;
            server.simple(&request, errno).await;
            assert_eq!(receive(&mut lane), [(0, None)]);
            assert_eq!(lane.has_ended(), ended);
        }
    });
}

#[test]
fn every_read_comes_back_at_the_end_and_none_is_taken_any_more() {
    with_both(async |offer| {
        let (mut lane, mut server) = pair(&offer).await;
        for offset in [0, 4096] {
            ask(&mut lane, offset, 4096);
        }
        lane.send();
        let first = server.request().await;
        server.data(&first, true, 0, 4096).await;
        drop(server);
        let mut done = receive(&mut lane);
        done.sort();
        assert_eq!(done, [read(0, 4096), (4096, None)]);
        assert_eq!(lane.ask(0, 4096, Instant::now(), 7), Err(7));
        assert!(lane.has_ended() && receive(&mut lane).is_empty());
    });
}

#[test]
fn an_answer_that_breaks_the_rules_ends_the_lane() {
    with_both(async |offer| {
        for break_it in 0..4 {
            let (mut lane, mut server) = pair(&offer).await;
            ask(&mut lane, 4096, 4096);
            lane.send();
            let mut request = server.request().await;
            match break_it {
                0 => server.data(&request, true, 4096, 2048).await,
                1 => server.data(&request, true, 8192, 4096).await,
                2 => server.chunk(&request, true, 0, &[]).await,
                _ => {
                    request.cookie += 1;
                    server.data(&request, true, 4096, 4096).await;
                }
            }
            assert_eq!(receive(&mut lane), [(4096, None)], "{break_it}");
            assert!(lane.has_ended());
        }
    });
}

#[test]
fn what_cannot_be_asked_for_here_comes_back() {
    with_both(async |offer| {
        let offer = Offer { blocks: Some([512, 4096, 1 << 16]), ..offer };
        let (mut lane, _server) = pair(&offer).await;
        for (offset, len) in [(0, 0), (100, 512), (0, 100), (64 * MIB, 512), (u64::MAX - 511, 512), (0, 2 << 16)] {
            assert_eq!(lane.ask(offset, len, Instant::now(), 9), Err(9), "{len} at {offset}");
        }
        assert_eq!(lane.in_flight(), 0);
    });
}

#[test]
fn a_socket_that_takes_no_more_gets_the_rest_later() {
    with_both(async |offer| {
        let (mut lane, mut server) = pair(&offer).await;
        let many = 12_000;
        for number in 0..many {
            ask(&mut lane, number * 512, 512);
        }
        lane.send();
        assert!(lane.has_unsent());
        for number in 0..many {
            if number % 1000 == 0 {
                lane.send();
            }
            let request = server.request().await;
            assert_eq!(request.offset, number * 512);
            server.data(&request, true, request.offset, 512).await;
            assert_eq!(receive(&mut lane), [read(number * 512, 512)]);
        }
    });
}

/// Asks for bytes that are received where they belong; gives the address of that place.
fn ask_into(lane: &mut Lane<u64>, offset: u64, len: usize) -> *const u8 {
    // As left by another read.
    let place = vec![0xEE; len];
    let address = place.as_ptr();
    assert!(lane.ask_into(offset, place, Instant::now(), offset).is_ok());
    address
}

/// What is put before the bytes of a read.
fn head(offset: u64) -> Vec<u8> {
    format!("the read at {offset}: ").into()
}

fn ask_piped(lane: &mut Lane<u64>, offset: u64, len: usize) {
    assert!(lane.ask_piped(offset, len, Instant::now(), offset, head(offset)).is_ok());
}

/// The short ones are received where they are taken apart, the others where they belong, or go through the pipe.
#[test]
fn replies_may_be_cut_anywhere() {
    with_both(async |offer| {
        let cuts = [(u64::MAX, 1), (4096, 1), (4096, 20), (4096, 28), (4096, 40), (0, 1)];
        for ((short, first_cut), piped) in cuts.into_iter().flat_map(|cut| [(cut, false), (cut, true)]) {
            let (mut lane, mut server) = pair(&offer).await;
            let (mut bytes, mut expected, mut places) = (Vec::new(), Done::new(), Vec::new());
            for (number, len) in [1 << 20, 4096, 65536, 512, 1 << 20, 1, 70000, 70000].into_iter().enumerate() {
                let offset = number as u64 * 2 * MIB;
                if len > short && piped {
                    ask_piped(&mut lane, offset, len as usize);
                } else if len > short {
                    places.push((offset, ask_into(&mut lane, offset, len as usize)));
                } else {
                    ask(&mut lane, offset, len as usize);
                }
                lane.send();
                let request = server.request().await;
                bytes.extend(server.header(&request, true, 1, len + 8));
                bytes.extend(offset.to_be_bytes());
                bytes.extend(pattern(offset, len));
                expected.push(read(offset, len));
            }
            let (mut done, mut addresses) = (Done::new(), Vec::new());
            let (mut rest, mut piece) = (&bytes[..], first_cut);
            while !rest.is_empty() {
                let (now, later) = rest.split_at(piece.min(rest.len()));
                server.send(now).await;
                while lane.receive(|offset, brought| {
                    if let Brought::Bytes(Cow::Owned(place)) = &brought {
                        addresses.push((offset, place.as_ptr()));
                    }
                    done.push((offset, taken(offset, brought)));
                }) {}
                (rest, piece) = (later, piece * 7 % 90_001);
            }
            assert!(done == expected, "short is {short}, the first cut at {first_cut}, piped {piped}");
            assert!(piped || addresses == places, "none was copied");
        }
    });
}

#[test]
fn a_place_is_filled_by_pieces_and_given_back_only_when_it_is_full() {
    with_both(async |offer| {
        let (mut lane, mut server) = pair(&offer).await;
        for offset in [0, MIB, 2 * MIB, 3 * MIB] {
            ask_into(&mut lane, offset, 8192);
        }
        lane.send();
        let first = server.request().await;
        server.data(&first, false, 4096, 2048).await;
        server.hole(&first, false, 6144, 2048).await;
        server.data(&first, true, 0, 4096).await;
        let whole = [pattern(0, 6144), vec![0; 2048]].concat();
        assert_eq!(receive(&mut lane), [(0, Some(whole))]);
        let second = server.request().await;
        server.data(&second, false, MIB, 4096).await;
        server.error(&second, true, 5, "bad luck").await;
        assert_eq!(receive(&mut lane), [(MIB, None)]);
        let third = server.request().await;
        server.data(&third, true, 2 * MIB, 4096).await;
        let mut done = receive(&mut lane);
        done.sort_unstable();
        assert_eq!(done, [(2 * MIB, None), (3 * MIB, None)], "the other half never came");
        assert!(lane.has_ended());
    });
}

/// How a read was answered, where its bytes went.
#[derive(Debug, PartialEq)]
enum Way {
    Pipe,
    Memory,
}

fn receive_ways(lane: &mut Lane<u64>) -> Vec<(Way, u64, Vec<u8>)> {
    let mut done = Vec::new();
    while lane.receive(|offset, brought| {
        let way = if matches!(brought, Brought::Piped(_)) { Way::Pipe } else { Way::Memory };
        done.push((way, offset, taken(offset, brought).expect("an answer")));
    }) {}
    done
}

#[test]
fn an_answer_in_one_piece_goes_through_the_pipe() {
    with_both(async |offer| {
        let (mut lane, mut server) = pair(&offer).await;
        ask_piped(&mut lane, 0, 98_304);
        ask(&mut lane, MIB, 4096);
        ask_piped(&mut lane, 2 * MIB, 98_304);
        lane.send();
        let (first, second, third) = (server.request().await, server.request().await, server.request().await);
        server.data(&first, true, 0, 98_304).await;
        server.data(&second, true, MIB, 4096).await;
        // A hole in it: put together in memory.
        server.data(&third, false, 2 * MIB, 65_536).await;
        server.hole(&third, true, 2 * MIB + 65_536, 32_768).await;
        let holey = [pattern(2 * MIB, 65_536), vec![0; 32_768]].concat();
        let expected =
            [(Way::Pipe, 0, pattern(0, 98_304)), (Way::Memory, MIB, pattern(MIB, 4096)), (Way::Memory, 2 * MIB, holey)];
        assert!(receive_ways(&mut lane) == expected);
        // Refused after the beginning, and before it.
        for begun in [true, false] {
            ask_piped(&mut lane, 0, 98_304);
            lane.send();
            let request = server.request().await;
            if begun {
                server.data(&request, false, 0, 65_536).await;
            }
            server.error(&request, true, 5, "bad luck").await;
            assert_eq!(receive(&mut lane), [(0, None)]);
        }
    });
}

#[test]
fn an_answer_in_more_parts_than_a_pipe_has_room_for_is_received_all_the_same() {
    with_both(async |offer| {
        let (mut lane, mut server) = pair(&offer).await;
        for (round, parts) in [(0, 2000), (1, 1), (2, 2000), (3, 1)] {
            let (offset, len) = (round * MIB, 98_304);
            ask_piped(&mut lane, offset, len as usize);
            lane.send();
            let request = server.request().await;
            server.send(&server.header(&request, true, 1, len + 8)).await;
            server.send(&offset.to_be_bytes()).await;
            let bytes = pattern(offset, len);
            let mut done = Vec::new();
            for (number, part) in bytes.chunks(bytes.len().div_ceil(parts)).enumerate() {
                server.send(part).await;
                // Not each, so that several are there at a time.
                if number % 100 == 99 {
                    done.extend(receive_ways(&mut lane));
                }
            }
            done.extend(receive_ways(&mut lane));
            let way = if parts == 1 { Way::Pipe } else { Way::Memory };
            assert!(done == [(way, offset, bytes)], "round {round}");
        }
    });
}

#[test]
fn what_nobody_takes_out_of_the_pipe_does_not_come_before_the_next_answer() {
    with_both(async |offer| {
        let (mut lane, mut server) = pair(&offer).await;
        for offset in [0, MIB] {
            ask_piped(&mut lane, offset, 98_304);
        }
        lane.send();
        let (first, second) = (server.request().await, server.request().await);
        server.data(&first, true, 0, 98_304).await;
        let mut ignored = Vec::new();
        while lane.receive(|offset, brought| ignored.push((offset, matches!(brought, Brought::Piped(_))))) {}
        assert_eq!(ignored, [(0, true)]);
        server.data(&second, true, MIB, 98_304).await;
        assert!(receive(&mut lane) == [read(MIB, 98_304)]);
    });
}

#[test]
fn a_connection_that_ends_within_a_piped_answer_gives_all_back() {
    with_both(async |offer| {
        let (mut lane, mut server) = pair(&offer).await;
        for offset in [0, MIB] {
            ask_piped(&mut lane, offset, 98_304);
        }
        lane.send();
        let first = server.request().await;
        server.send(&server.header(&first, true, 1, 98_304 + 8)).await;
        server.send(&0u64.to_be_bytes()).await;
        server.send(&pattern(0, 50_000)).await;
        assert!(receive(&mut lane).is_empty());
        drop(server);
        let mut done = receive(&mut lane);
        done.sort_unstable();
        assert_eq!(done, [(0, None), (MIB, None)]);
        assert!(lane.has_ended());
    });
}

#[test]
fn what_waits_too_long_is_told_from_what_only_lost_its_lane() {
    with_both(async |offer| {
        let (mut lane, _server) = pair(&offer).await;
        let now = Instant::now();
        let (early, patience) = (now.checked_sub(Duration::from_secs(40)).unwrap(), Duration::from_secs(30));
        assert!(lane.ask(0, 512, early, 0).is_ok() && lane.ask(512, 512, now, 512).is_ok());
        assert_eq!(lane.oldest(), Some(early));
        let mut over = Vec::new();
        lane.expire(early, patience, |owner, is_late| over.push((owner, is_late)));
        assert!(over.is_empty());
        lane.expire(now, patience, |owner, is_late| over.push((owner, is_late)));
        over.sort_unstable();
        assert_eq!(over, [(0, true), (512, false)]);
        assert!(lane.has_ended());
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn whatever_comes_each_read_is_done_once(
        (framing, bytes) in prop_oneof![Just(Framing::Compact), Just(Framing::Extended)]
            .prop_flat_map(|framing| (Just(framing), chunks(framing))),
    ) {
        let done = block_on(async {
            let (mut lane, mut server) = pair(&Offer::of(framing)).await;
            ask(&mut lane, 0, 500);
            ask_into(&mut lane, 1000, 500);
            ask(&mut lane, 2000, 500);
            ask_piped(&mut lane, 3000, 500);
            lane.send();
            server.send(&bytes).await;
            drop(server);
            receive(&mut lane)
        });
        let mut offsets: Vec<_> = done.iter().map(|(offset, _)| *offset).collect();
        offsets.sort_unstable();
        prop_assert_eq!(offsets, [0, 1000, 2000, 3000]);
        prop_assert!(done.iter().flat_map(|(_, bytes)| bytes).all(|bytes| bytes.len() == 500));
    }
}
