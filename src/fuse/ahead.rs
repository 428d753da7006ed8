//! Reading ahead of one open file whose kernel does not: what a program that reads in order will ask for next is fetched while it
//! works on what it has, and given to it from where it was received.
//!
//! What is fetched here is a guess. When it fails, or is not what is asked for, the file is read as if nothing had been guessed,
//! so a guess that was wrong costs time and never an error.

use super::{
    answer::ReadAnswer,
    export::LONGEST_READ,
    image::{Image, Span},
    reads::{Lanes, Wanted},
};
use std::{
    borrow::Cow,
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

/// Bytes that are fetched at a time.
const PIECE: u64 = LONGEST_READ as u64;
/// Bytes that are fetched from the beginning of a read on. QEMU works on 16 requests of a connection at a time.
const WINDOW: u64 = 16 * PIECE;
/// So many bytes in order make a reader worth it.
const TRIAL: u64 = 256 << 10;

/// A program that reads less than this at a time soon reads again.
const SHORT: usize = 128 << 10;
/// How soon: about as long as it takes to fall asleep and to be woken up. Without it 32 KiB at a time are read at two thirds of the
/// speed, 4 KiB at half of it.
const SOON: Duration = Duration::from_micros(50);

static ZEROES: [u8; PIECE as usize] = [0; PIECE as usize];

/// What a piece is fetched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetch {
    /// Handle of the open file.
    pub(super) handle: u64,
    start: u64,
}

enum Bytes {
    Coming,
    Here(Vec<u8>),
    Zero,
}

struct Piece {
    start: u64,
    end: u64,
    bytes: Bytes,
}

impl Piece {
    /// The part of it that lies in `offset..end`, once it is here.
    fn part(&self, offset: u64, end: u64) -> Option<&[u8]> {
        let bytes = match &self.bytes {
            Bytes::Coming => return None,
            Bytes::Here(bytes) => bytes,
            Bytes::Zero => &ZEROES[..],
        };
        let from = offset.saturating_sub(self.start) as usize;
        bytes.get(from..(end.min(self.end) - self.start) as usize)
    }
}

/// Its clones are the reads of one open file that wait for their answers.
#[derive(Clone, Default)]
pub(super) struct Turn(Arc<()>);

/// One open file.
pub(super) struct Ahead {
    handle: u64,
    image: Arc<dyn Image>,
    /// Where the last read ended.
    next: u64,
    /// Bytes read in order up to there.
    run: u64,
    /// Who has several reads under way is ahead by himself.
    turn: Turn,
    /// Neighbours, in order.
    pieces: VecDeque<Piece>,
    /// The read whose pieces are not all here.
    waiting: Option<ReadAnswer>,
    /// When the last short read was answered from what was fetched.
    given: Option<Instant>,
    /// Memory of whole pieces, used again.
    idle: Vec<Vec<u8>>,
}

impl Ahead {
    pub fn new(handle: u64, image: Arc<dyn Image>) -> Self {
        Self {
            handle,
            image,
            next: 0,
            run: 0,
            turn: Turn::default(),
            pieces: VecDeque::new(),
            waiting: None,
            given: None,
            idle: Vec::new(),
        }
    }

    /// Takes a read of bytes that are in the file and not none, if it is answered from what is fetched ahead: now or later.
    pub fn take(&mut self, mut answer: ReadAnswer, lanes: &mut Lanes) -> Option<ReadAnswer> {
        let (offset, len) = (answer.offset, answer.len as u64);
        let end = offset + len;
        let alone = Arc::strong_count(&self.turn.0) == 1;
        answer.turn = Some(self.turn.clone());
        let in_order = offset == self.next;
        self.next = end;
        self.run = if in_order { self.run + len } else { 0 };
        if !in_order || !alone {
            self.forget();
            return Some(answer);
        }
        if self.run < TRIAL.max(2 * len) {
            return Some(answer);
        }
        self.fetch(offset, end, lanes);
        if self.pieces.back().is_none_or(|last| last.end < end) {
            self.forget();
            return Some(answer);
        }
        self.waiting = Some(answer);
        self.give(lanes);
        None
    }

    /// A piece has come, or cannot be had here.
    pub fn came(&mut self, fetch: Fetch, bytes: Option<Cow<'_, [u8]>>) {
        let piece = self.pieces.iter_mut().find(|piece| piece.start == fetch.start);
        match (piece, bytes) {
            // One of another length was fetched before the reader went elsewhere and came back.
            (Some(piece), Some(bytes)) if bytes.len() as u64 == piece.end - piece.start => {
                piece.bytes = Bytes::Here(bytes.into_owned());
            }
            (Some(_), _) => self.forget(),
            (None, _) => {}
        }
    }

    /// Answers the read that waits, if all of it is here, and fetches what follows.
    pub fn give(&mut self, lanes: &mut Lanes) {
        let Some(answer) = &self.waiting else { return };
        let (offset, len) = (answer.offset, answer.len);
        let end = offset + len as u64;
        let asked = self.pieces.iter().filter(|piece| piece.end > offset).take_while(|piece| piece.start < end);
        let Some(parts) = asked.map(|piece| piece.part(offset, end)).collect::<Option<Vec<_>>>() else { return };
        let Some(answer) = self.waiting.take() else { return };
        // It may have been given away meanwhile.
        if parts.iter().map(|part| part.len()).sum::<usize>() == len && self.image.has_still(offset, len) {
            answer.parts(&parts);
            self.given = (len < SHORT).then(Instant::now);
        } else {
            answer.by_task();
        }
        self.fetch(end, end, lanes);
    }

    /// Whether something was fetched ahead, or is being.
    pub fn is_in_use(&self) -> bool {
        !self.pieces.is_empty()
    }

    /// Whether the next read is about to come.
    pub fn expects_more(&self) -> bool {
        self.given.is_some_and(|given| given.elapsed() < SOON)
    }

    /// Has all of `offset..end` fetched, and what follows, as far as it can be.
    fn fetch(&mut self, offset: u64, end: u64, lanes: &mut Lanes) {
        while self.pieces.front().is_some_and(|piece| piece.end <= offset) {
            if let Some(Piece { bytes: Bytes::Here(bytes), .. }) = self.pieces.pop_front()
                && bytes.len() as u64 == PIECE
            {
                self.idle.push(bytes);
                self.idle.truncate((WINDOW / PIECE) as usize);
            }
        }
        let until = (offset + WINDOW).max(end).min(self.image.size());
        let mut start = self.pieces.back().map_or(offset, |last| last.end);
        while start < until {
            // Borders lie where they would for another reader, so that no request is shorter than need be.
            let most = (start + 1).next_multiple_of(PIECE) - start;
            let (len, bytes) = match self.image.span(start, most) {
                Some(Span::Data(len)) => (len, Bytes::Coming),
                Some(Span::Zero(len)) => (len, Bytes::Zero),
                None => return,
            };
            if matches!(bytes, Bytes::Coming) {
                // Short pieces, of which there may be many, do not hold on to the memory of long ones.
                let mut place = if len > PIECE / 2 { self.idle.pop() } else { None }.unwrap_or_default();
                place.resize(len as usize, 0);
                let fetch = Fetch { handle: self.handle, start };
                if lanes.ask_into(start, place, Instant::now(), Wanted::Ahead(fetch)).is_err() {
                    return;
                }
            }
            self.pieces.push_back(Piece { start, end: start + len, bytes });
            start += len;
        }
    }

    /// The reader is elsewhere, or what was fetched is of no use.
    fn forget(&mut self) {
        self.pieces.clear();
        self.idle.clear();
        if let Some(answer) = self.waiting.take() {
            answer.by_task();
        }
    }
}
