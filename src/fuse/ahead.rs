//! Reading ahead of one open file whose kernel does not: what a program that reads in order will ask for next is fetched while it
//! works on what it has.
//!
//! What is fetched here is a guess. When it fails, or is not what is asked for, the file is read as if nothing had been guessed,
//! so a guess that was wrong costs time and never an error.

use super::image::Image;
use bytes::Bytes;
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::{runtime::Handle, sync::watch};

/// About as many bytes are fetched at a time, and at least as many as are asked for.
const CHUNK: u64 = 512 << 10;
/// How far ahead of the reader, bytes; at least one chunk.
const DEPTH: u64 = 2 << 20;
/// So many bytes in order make a reader worth it.
const TRIAL: u64 = 256 << 10;

/// What is known about a guess: nothing yet, what could be read, or that nothing could.
type Fetched = watch::Receiver<Option<Option<Bytes>>>;

struct Chunk {
    start: u64,
    end: u64,
    fetched: Fetched,
}

#[derive(Default)]
struct State {
    /// Where the last read ended.
    next: u64,
    /// Bytes read in order up to there.
    run: u64,
    /// Reads that wait for their answer. Who has several under way is ahead by himself.
    waiting: usize,
    /// Neighbours, in order.
    chunks: VecDeque<Chunk>,
}

/// One open file.
#[derive(Default)]
pub(super) struct Ahead(Mutex<State>);

/// What to do with a read.
pub(super) enum Found {
    /// It was fetched before.
    Here(Bytes),
    /// It is being fetched.
    Coming(Coming),
    /// It has to be read.
    No,
}

/// Chunks that have together what was asked for.
pub(super) struct Coming {
    parts: Vec<(u64, Fetched)>,
    offset: u64,
    len: usize,
}

/// One read under way; keep it until its answer.
pub(super) struct Turn(Arc<Ahead>);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).waiting -= 1;
    }
}

impl Ahead {
    /// Looks for `len` bytes at `offset`, which are in the file and not none, and begins to fetch what will be asked for next.
    pub fn look(self: &Arc<Self>, image: &Arc<dyn Image>, runtime: &Handle, offset: u64, len: usize) -> (Turn, Found) {
        let end = offset + len as u64;
        let turn = Turn(self.clone());
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let alone = state.waiting == 0;
        state.waiting += 1;
        let in_order = offset == state.next;
        state.next = end;
        state.run = if in_order { state.run + len as u64 } else { 0 };
        if !in_order || !alone {
            state.chunks.clear();
            return (turn, Found::No);
        }
        if state.run < TRIAL.max(2 * len as u64) {
            return (turn, Found::No);
        }
        while state.chunks.front().is_some_and(|chunk| chunk.end <= offset) {
            state.chunks.pop_front();
        }
        // Whole reads, so that each is answered out of one chunk, without putting anything together.
        let chunk = (CHUNK / len as u64).max(1) * len as u64;
        let ahead = end + DEPTH.max(chunk);
        let mut edge = state.chunks.back().map_or(offset, |chunk| chunk.end);
        while edge < end || (edge < image.size() && edge + chunk <= ahead) {
            let stop = (edge + chunk).min(image.size());
            state.chunks.push_back(Chunk {
                start: edge,
                end: stop,
                fetched: fetch(image.clone(), runtime, edge, stop),
            });
            edge = stop;
        }
        let wanted = state.chunks.iter().take_while(|chunk| chunk.start < end);
        let coming = Coming { parts: wanted.map(|chunk| (chunk.start, chunk.fetched.clone())).collect(), offset, len };
        drop(state);
        let known = match &coming.parts[..] {
            [(start, fetched)] => fetched.borrow().as_ref().map(|bytes| {
                bytes.as_ref().and_then(|bytes| slice(bytes, *start, offset, len)).map_or(Found::No, Found::Here)
            }),
            [] => Some(Found::No),
            _ => None,
        };
        (turn, known.unwrap_or(Found::Coming(coming)))
    }
}

impl Coming {
    /// The bytes, unless they could not be fetched.
    pub async fn bytes(self) -> Option<Bytes> {
        let mut whole = Vec::new();
        let one = self.parts.len() == 1;
        for (start, mut fetched) in self.parts {
            let bytes = fetched.wait_for(Option::is_some).await.ok()?.clone()??;
            if one {
                return slice(&bytes, start, self.offset, self.len);
            }
            let from = (self.offset + whole.len() as u64).checked_sub(start)? as usize;
            let piece = bytes.get(from..)?;
            whole.extend_from_slice(&piece[..piece.len().min(self.len - whole.len())]);
        }
        (whole.len() == self.len).then(|| whole.into())
    }
}

fn slice(bytes: &Bytes, start: u64, offset: u64, len: usize) -> Option<Bytes> {
    let from = offset.checked_sub(start)? as usize;
    (from + len <= bytes.len()).then(|| bytes.slice(from..from + len))
}

fn fetch(image: Arc<dyn Image>, runtime: &Handle, start: u64, end: u64) -> Fetched {
    let (tell, fetched) = watch::channel(None);
    runtime.spawn(async move {
        // Nobody needs it once the file was closed, or is read elsewhere.
        tokio::select! {
            bytes = image.read(start, (end - start) as usize) => drop(tell.send(Some(bytes.ok()))),
            () = tell.closed() => {}
        }
    });
    fetched
}
